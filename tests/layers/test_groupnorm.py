"""Group normalization: the groups of each sample by their own statistics."""

import copy
import functools
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import reference
import support
from cases import each
from internals import core
from support import (
    THREADS,
    channels_last,
    contiguous,
    failures_without_a_trace,
    parameters,
    refused,
    same_bits,
    some,
)

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.wheel

# Shapes of runs and of columns; groups that are walked together, alone, and in parts, of which the
# last one may be smaller.
SHAPES = [
    ((4, 6, 5, 7), 3),
    ((4, 6), 2),
    ((3, 12, 3), 12),
    ((2, 64, 7, 7), 32),
    ((3, 96, 9, 9), 1),
    ((2, 600, 3, 3), 2),
    ((2, 1030, 2), 2),
    ((2, 134, 7, 7), 2),
    ((2, 1042, 3), 2),
    ((2, 4, 200, 180), 2),
    ((5, 4, 1, 1), 2),
    ((40, 20, 4, 4), 4),
    ((2, 6, 2, 3, 2, 1, 2), 3),
]
LAYOUTS = each("layout", [contiguous, channels_last])
shapes = each("shape, groups", SHAPES)


def norm_of(groups, channels, **options):
    norm = fastbn.GroupNorm(groups, channels, **options)
    if norm.affine:
        norm.weight[:], norm.bias[:] = parameters(channels)
    return norm


def test_attributes_repr_and_state():
    norm = fastbn.GroupNorm(2, 6, 1e-3, dtype=np.float64, bias=False)
    assert (norm.num_groups, norm.num_channels, norm.eps, norm.affine) == (2, 6, 1e-3, True)
    assert norm.bias is None
    assert same_bits(norm.weight, np.ones(6))
    assert list(norm.state_dict()) == ["weight"]
    assert repr(norm) == "GroupNorm(2, 6, eps=0.001, affine=True, bias=False, dtype=float64)"
    assert repr(fastbn.GroupNorm(3, 6)) == "GroupNorm(3, 6, eps=1e-05, affine=True, bias=True)"
    assert fastbn.GroupNorm(3, 6, affine=False).state_dict() == {}


@shapes
@LAYOUTS
@each("in_place", [False, True])
def test_a_step_has_the_same_bits_for_every_number_of_threads(
    rng, set_num_threads, shape, groups, layout, in_place
):
    x, dy = layout(some(rng, shape)), layout(some(rng, shape, mean=0))
    outcomes = []
    for threads in THREADS:
        set_num_threads(threads)
        norm, a, b = norm_of(groups, shape[1]), x.copy(order="K"), dy.copy(order="K")
        y = norm(a, out=a if in_place else None).copy()
        dx = norm.backward(b, out=b if in_place else None)
        outcomes.append([y, dx, norm.weight_grad, norm.bias_grad])
    for other in outcomes[1:]:
        assert all(map(same_bits, outcomes[0], other))


@shapes
@LAYOUTS
@each("affine", [True, False])
def test_in_place_gives_the_same(rng, dtype, shape, groups, layout, affine):
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype, mean=0))
    ours, other = (norm_of(groups, shape[1], affine=affine) for _ in range(2))
    y, dx = other(x.copy(order="K")), other.backward(dy.copy(order="K"))
    assert ours(x, out=x) is x
    assert same_bits(x, y)
    assert ours.backward(dy, out=dy) is dy
    of_y = {"float16": 3e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-12}[dtype.name]
    support.assert_within(dy, dx, of_y * 10)


@pytest.mark.parametrize("layout", support.WRITEABLE_LAYOUTS)
def test_any_layout_gives_the_same(rng, layout):
    x, dy = some(rng, (4, 6, 5, 7)), some(rng, (4, 6, 5, 7), mean=0)
    norm, expected = norm_of(2, 6), norm_of(2, 6)
    y = norm(layout(x))
    assert y.strides == np.empty_like(layout(x)).strides
    support.assert_close(y, expected(x), 1e-6)
    support.assert_close(norm.backward(layout(dy)), expected.backward(dy), 1e-6)
    assert same_bits(F.group_norm(layout(x), 2, norm.weight, norm.bias), y)


@LAYOUTS
@each("zeros", ["some", "all", "nearly"])
@each("in_place", [False, True])
@each("masked", [False, True])
def test_weights_of_zero_leave_their_channels_a_gradient(
    rng, dtype, layout, zeros, in_place, masked
):
    x, dy = layout(some(rng, (3, 6, 5, 7), dtype)), layout(some(rng, (3, 6, 5, 7), dtype, mean=0))
    norm = norm_of(2, 6, dtype=np.float64)
    norm.weight[{"all": slice(None)}.get(zeros, slice(1, None, 2))] = 0
    if zeros == "nearly":
        norm.weight[1] = 1e-200
    expected = reference.group_norm_backward(dy, x, 2, norm.weight)
    norm(x, out=x if in_place else None, mask=np.ones((3, 1, 5, 7), bool) if masked else None)
    dx = norm.backward(dy)
    size = np.abs(expected[0]).max() + (0.0 if zeros == "all" else 1.0)
    relative = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}[dtype.name]
    support.assert_within(dx, expected[0], relative * size)
    support.assert_close(norm.weight_grad, expected[1], 1e-2 if dtype.itemsize == 2 else 1e-5)


def test_one_group_is_a_layer_normalization_and_as_many_as_channels_an_instance_normalization(rng):
    x, dy = some(rng, (4, 6, 5, 7)), some(rng, (4, 6, 5, 7))
    groups, instances = norm_of(6, 6), fastbn.InstanceNorm2d(6, affine=True)
    instances.load_state_dict(groups.state_dict())
    support.assert_close(groups(x), instances(x), 1e-6)
    support.assert_close(groups.backward(dy), instances.backward(dy), 1e-6)
    whole = fastbn.GroupNorm(1, 6)(x).astype(np.float64)
    support.assert_within(whole.mean(axis=(1, 2, 3)), np.zeros(4), 1e-6)
    support.assert_within(whole.std(axis=(1, 2, 3)), np.ones(4), 1e-5)


def test_evaluation_is_training_without_a_backward(rng):
    x, norm = some(rng, (4, 6, 5, 7)), norm_of(3, 6)
    assert same_bits(norm(x), norm.eval()(x))
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        norm.backward(x)
    with pytest.raises(RuntimeError, match="running statistics"):
        norm.freeze()


def test_a_sample_does_not_depend_on_the_others(rng):
    x, norm = some(rng, (5, 6, 5, 7)), norm_of(3, 6)
    assert same_bits(norm(x)[2:3], norm(x[2:3]))


def test_a_constant_group_gives_the_bias(dtype):
    norm = norm_of(2, 4)
    y = norm(np.full((2, 4, 5, 5), 0.1, dtype))
    assert same_bits(y[0, :, 0, 0], norm.bias.astype(dtype))
    y = norm_of(4, 4)(np.ones((2, 4), dtype))  # groups of a single value
    assert same_bits(y[1], norm.bias.astype(dtype))


@pytest.mark.parametrize("shape", [(0, 6, 5, 2), (4, 6, 0, 2), (0, 6)], ids=str)
def test_an_empty_array_is_legal(rng, shape):
    norm, x = norm_of(2, 6), np.empty(shape, np.float32)
    assert same_bits(norm(x), x)
    assert same_bits(norm.backward(x), x)
    assert same_bits(norm.weight_grad, np.zeros(6, np.float32))
    assert fastbn.GroupNorm(2, 0)(np.empty((3, 0, 5))).shape == (3, 0, 5)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_an_empty_array_is_legal_behind_an_activation_and_a_weight_of_zero(activation):
    norm, x = fastbn.GroupNorm(1, 2, activation=activation), np.empty((0, 2, 3), np.float32)
    norm.weight[0] = 0
    assert same_bits(norm.backward(norm(x)), x)
    assert same_bits(norm.weight_grad, np.zeros(2, np.float32))


@pytest.mark.parametrize(("dtype", "tiny"), [("float32", 1e-40), ("float64", 1e-250)])
def test_a_tiny_weight_is_as_good_as_zero_beside_others(rng, dtype, tiny):
    x, dy = some(rng, (3, 4, 20), dtype), some(rng, (3, 4, 20), dtype)
    found = []
    for weight in tiny, 0.0:
        norm = fastbn.GroupNorm(1, 4, dtype="float64")
        norm.weight[:] = 1, weight, -1, 2
        norm(x)
        found.append(norm.backward(dy))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_an_array_is_read_as_it_lies(rng, layout):
    x = layout(some(rng, (4, 4, 50, 20)))
    norm = fastbn.GroupNorm(2, 4)
    tracemalloc.start()
    norm(x, out=x)
    norm.backward(x, out=x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 4


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_an_activation_needs_neither_bits_nor_a_further_array(rng, layout, activation):
    x, dy, out = (layout(some(rng, (4, 4, 250, 80))) for _ in range(3))
    norm = fastbn.GroupNorm(2, 4, activation=activation)
    tracemalloc.start()
    norm(x, out=out)
    norm.backward(dy, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 40  # bits would take a thirty-second


def test_the_state_loads_and_copies_work(rng):
    norm, x = norm_of(2, 6), some(rng, (4, 6, 5, 2))
    norm(x)
    other = fastbn.GroupNorm(2, 6)
    other.load_state_dict(norm.state_dict())
    for twin in (other, copy.copy(norm), copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        if twin is not other:
            with pytest.raises(RuntimeError):
                twin.backward(x)
        assert same_bits(twin(x), norm(x))
        assert same_bits(twin.backward(x), norm.backward(x))
    assert copy.copy(norm).weight is norm.weight
    with refused(RuntimeError, "GroupNorm(1, 5)", intact=[]):
        norm.load_state_dict({"weight": np.ones(5), "bias": np.ones(5)})


# Masks.


@LAYOUTS
@shapes
@each("in_place", [False, True])
def test_a_masked_step_is_that_of_the_valid_positions(rng, dtype, shape, groups, layout, in_place):
    mask = rng.random((shape[0], 1, *shape[2:])) < 0.6
    mask.reshape(len(mask), -1)[:, 0] = True
    mask[1] = False
    x, dy = (layout(some(rng, shape, dtype, mean=mean)) for mean in (0.5, 0))
    norm = norm_of(groups, shape[1], dtype=np.float64)
    a, b = support.spoilt(x, mask), support.spoilt(dy, mask, np.inf)
    y = norm(a, mask=mask, out=a if in_place else None).copy()
    dx = norm.backward(b, out=b if in_place else None)
    assert (support.left_out(y, mask) == 0).all()
    assert (support.left_out(dx, mask) == 0).all()
    sums = np.zeros((2, shape[1]), np.longdouble)
    relative = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 2e-5, "float64": 1e-11}[dtype.name]
    for n in range(len(x)):
        valid, valid_dy = (support.gathered(v[n : n + 1], mask[n : n + 1]).T for v in (x, dy))
        if not valid.size:
            continue
        valid, valid_dy = valid[np.newaxis], valid_dy[np.newaxis]
        exact = reference.group_norm(valid, groups, norm.weight, norm.bias)
        actual = support.gathered(y[n : n + 1], mask[n : n + 1]).T[np.newaxis]
        support.assert_within(actual, exact, relative * (1 + np.abs(exact)))
        exact, *added = reference.group_norm_backward(valid_dy, valid, groups, norm.weight)
        actual = support.gathered(dx[n : n + 1], mask[n : n + 1]).T[np.newaxis]
        _, var = reference.group_moments(valid, groups)
        size = 10 * np.abs(valid_dy.astype(float)).max() / np.sqrt(var.min() + 1e-5)
        support.assert_within(actual, exact, relative * size)
        sums += added
    for actual, exact in zip((norm.weight_grad, norm.bias_grad), sums, strict=True):
        support.assert_within(actual, exact, relative * 10 * np.abs(sums).max())


def test_an_all_true_mask_changes_no_bit(rng):
    x = some(rng, (4, 6, 5, 7))
    norm = norm_of(3, 6)
    assert same_bits(norm(x, mask=np.ones((4, 1, 5, 7), bool)), norm(x))


# Errors.


@pytest.mark.parametrize(
    ("groups", "exception", "words"),
    [
        (0, ValueError, "at least 1"),
        (-2, ValueError, "at least 1"),
        (4, ValueError, "divisible by num_groups"),
        (12, ValueError, "divisible"),
        (2.0, TypeError, "num_groups"),
        (True, TypeError, "num_groups"),
        (None, TypeError, "num_groups"),
    ],
)
def test_num_groups_divides_the_channels(groups, exception, words):
    with refused(exception, words):
        fastbn.GroupNorm(groups, 6)
    with refused(exception, words):
        F.group_norm(np.ones((2, 6, 3)), groups)


@pytest.mark.parametrize("channels", range(8))
@pytest.mark.parametrize("groups", [1, 4, 6])
def test_the_layer_that_is_suggested_takes_the_input(groups, channels):
    x = np.arange(14.0 * channels).reshape(2, channels, 7)
    with pytest.raises(ValueError, match="use GroupNorm") as caught:
        norm_of(groups, 12)(x)
    suggested = re.search(r"GroupNorm\((\d+), (\d+)\)", str(caught.value))
    assert fastbn.GroupNorm(*map(int, suggested.groups()))(x).shape == x.shape


@pytest.mark.parametrize(("value", "exception"), [(-1, ValueError), (6.0, TypeError)])
def test_num_channels_is_a_non_negative_int(value, exception):
    with refused(exception, "num_channels"):
        fastbn.GroupNorm(1, value)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((6,), ["(N, C, ...)"]),
        ((2, 4, 5), ["4 channels", "GroupNorm(4, 4)"]),
        ((2, 5, 6), ["5 channels", "moveaxis"]),
        ((1, 6), ["more than 1 value", "(1, 6)"]),
        ((1, 6, 1, 1), ["more than 1 value"]),
    ],
)
def test_an_input_that_does_not_fit_is_refused(shape, words):
    norm = norm_of(6, 6)
    for mode in (True, False):
        with refused(ValueError, *words, intact=[norm]):
            norm.train(mode)(np.ones(shape))


def test_a_refused_call_changes_nothing(rng):
    norm, x = norm_of(2, 6), some(rng, (4, 6, 5, 2))
    for out in (x[::-1], x[:2], np.empty_like(x, np.float64), "out", support.read_only(x)):
        with refused((ValueError, TypeError), "out", intact=[norm, x]):
            norm(x, out=out)
    with refused(TypeError, "mask", intact=[norm, x]):
        norm(x, out=x, mask=np.ones((4, 1, 5, 2)))
    with refused(ValueError, "weight", intact=[x]):
        F.group_norm(x, 2, np.ones(5), out=x)
    norm(x)
    for dy in (x[0], x[..., :1], x.astype(int)):
        with refused((ValueError, TypeError), "dy", intact=[norm]):
            norm.backward(dy)
    norm.backward(x)
    with pytest.raises(RuntimeError, match="has run"):
        norm.backward(x)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_no_memory(rng, monkeypatch, in_place, zero):
    monkeypatch.setattr(core, "try_groups", lambda *_: None)
    monkeypatch.setattr(core, "try_layer_backward", lambda *_: None)
    norm, x, dy = norm_of(2, 6), some(rng, (4, 6, 5, 2)), some(rng, (4, 6, 5, 2))
    norm.weight[0] *= not zero
    assert failures_without_a_trace(lambda: norm(x, out=x if in_place else None), norm, x)
    out = dy if in_place else None
    assert failures_without_a_trace(lambda: norm.backward(dy, out=out), norm, x, dy)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_training_and_eval_agree_with_torch(rng, shape, groups, affine):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.GroupNorm(groups, shape[1], affine=affine, dtype=torch.float64)
    ours = fastbn.GroupNorm(groups, shape[1], affine=affine, dtype=np.float64)
    assert repr(ours).startswith(repr(theirs)[:-1].removesuffix(", bias=True"))
    # dx is small where groups are of two values, what it is the difference of is not.
    of_dx = functools.partial(support.assert_within, bound=1e-11)
    support.assert_as_torch(ours, theirs, rng, shape, of_dx)


@pytest.mark.parametrize("shape", [(1, 6), (2, 6), (1, 6, 1), (1, 6, 2), (2, 6, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_the_same_arrays_are_refused_as_by_torch(shape, groups):
    torch = pytest.importorskip("torch")
    try:
        torch.nn.functional.group_norm(torch.ones(shape), groups)
    except ValueError as error:
        with refused(ValueError, str(error).partition(",")[0]):
            F.group_norm(np.ones(shape), groups)
    else:
        F.group_norm(np.ones(shape), groups)
