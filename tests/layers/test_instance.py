"""Instance normalization: each sample by itself, as a batch normalization of it alone."""

import copy
import functools
import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
import reference
import support
from cases import each
from support import channels_last, contiguous, parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.wheel

LAYERS = {
    "1d": (fastbn.InstanceNorm1d, fastbn.BatchNorm1d, (4, 3, 7)),
    "2d": (fastbn.InstanceNorm2d, fastbn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (fastbn.InstanceNorm3d, fastbn.BatchNorm3d, (4, 3, 5, 2, 3)),
}
RELATIVE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}

layers = pytest.mark.parametrize(("layer", "batch", "shape"), LAYERS.values(), ids=LAYERS)
layouts = each("layout", support.WRITEABLE_LAYOUTS)


def trained_pair(layer, batch, **kwargs):
    """A layer and the batch normalization that does the same to a single sample."""
    ours, single = layer(3, affine=True, **kwargs), batch(3)
    for norm in (ours, single):
        norm.weight[:], norm.bias[:] = parameters(3)
    return ours, single


def test_neither_parameters_nor_running_statistics_by_default():
    norm = fastbn.InstanceNorm2d(3)
    assert norm.weight is norm.bias is norm.running_mean is norm.num_batches_tracked is None
    assert repr(norm) == (
        "InstanceNorm2d(3, eps=1e-05, momentum=0.1, affine=False, bias=False, "
        "track_running_stats=False)"
    )
    assert norm.state_dict() == {}


@layers
@layouts
def test_each_sample_is_normalized_as_a_batch_of_its_own(rng, dtype, layer, batch, shape, layout):
    ours, single = trained_pair(layer, batch)
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype, mean=0))
    y = ours(x)
    assert y.dtype == dtype
    samples = [x[i : i + 1] for i in range(len(x))]
    assert same_bits(y, np.concatenate([single(sample) for sample in samples]))
    dx = ours.backward(dy)
    expected = []
    for sample, gradient in zip(samples, dy, strict=True):
        single(sample)
        expected.append(single.backward(gradient[np.newaxis]))
    support.assert_close(dx, np.concatenate(expected), RELATIVE[dtype.name])
    support.assert_close(ours.weight_grad, single.weight_grad, 1e-6)
    support.assert_close(ours.bias_grad, single.bias_grad, 1e-6)


@layers
@layouts
@each("affine", [True, False])
def test_in_place_gives_the_same(rng, layer, batch, shape, layout, affine):
    ours, other = layer(3, affine=affine), layer(3, affine=affine)
    x, dy = layout(some(rng, shape)), layout(some(rng, shape, mean=0))
    y, dx = other(x.copy()), other.backward(dy.copy())
    assert ours(x, out=x) is x
    assert same_bits(x, y)
    assert ours.backward(dy, out=dy) is dy
    support.assert_close(dy, dx, 1e-5)


@layouts
def test_the_output_has_the_layout_of_the_input(rng, layout):
    x = layout(some(rng, (4, 3, 5, 2)))
    norm = fastbn.InstanceNorm2d(3)
    assert norm(x).strides == np.empty_like(x).strides
    assert norm.backward(x).strides == np.empty_like(x).strides


@layers
@pytest.mark.parametrize("in_place", [False, True])
def test_a_single_sample_needs_no_axis_of_samples(rng, layer, batch, shape, in_place):
    ours, other = layer(3, affine=True), layer(3, affine=True)
    x, dy = some(rng, shape[1:]), some(rng, shape[1:], mean=0)
    y, dx = other(x[np.newaxis].copy())[0], other.backward(dy[np.newaxis])[0]
    assert same_bits(ours(x, out=x if in_place else None), y)
    out = ours.backward(dy, out=dy if in_place else None)
    support.assert_close(out, dx, 1e-5)
    if in_place:
        assert same_bits(x, y)
        assert out is dy


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_batch_is_read_as_it_lies(rng, layout):
    x = layout(some(rng, (4, 3, 50, 20)))
    norm = fastbn.InstanceNorm2d(3)
    tracemalloc.start()
    norm(x, out=x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 4


@layers
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_move_to_the_mean_of_the_samples(rng, layer, batch, shape, momentum):
    norm = layer(3, momentum=momentum, track_running_stats=True, dtype=np.float64)
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(2):
        x = some(rng, shape, np.float64)
        norm(x)
        moved = [reference.updated(s[np.newaxis], mean, var, momentum or 0.0) for s in x]
        mean, var = (sum(values) / len(x) for values in zip(*moved, strict=True))
    support.assert_close(norm.running_mean, mean, 1e-14)
    support.assert_close(norm.running_var, var, 1e-14)
    assert norm.num_batches_tracked == 0


# Masks that leave next to nothing, and eps=0.


def starved_mask(shape):
    """A mask with all positions of the first sample, none, one, and some of the next ones."""
    mask = np.zeros((shape[0], 1, *shape[2:]), bool)
    mask.reshape(len(mask), -1)[3, :4] = mask.reshape(len(mask), -1)[2, 1] = mask[0] = True
    return mask


@layers
@each("layout", [contiguous, channels_last])
@each("mode", ["train", "eval"])
@each("in_place", [False, True])
@each("eps", [1e-5, 0.0])
def test_samples_without_or_with_one_valid_position(
    rng, dtype, layer, batch, shape, layout, mode, in_place, eps
):
    mask = starved_mask(shape)
    x, dy = (layout(support.spoilt(some(rng, shape, dtype), mask)) for _ in range(2))
    norm = getattr(layer(3, eps, affine=True), mode)()
    norm.weight[:], norm.bias[:] = parameters(3)
    y = norm(x.copy(order="K"), mask=mask)
    if in_place:
        assert same_bits(norm(x, out=x, mask=mask), y)
    assert (support.left_out(y, mask) == 0).all()
    single = np.moveaxis(y[2], 0, -1)[mask[2, 0]]
    if eps:
        assert same_bits(single[0], norm.bias.astype(dtype))
    else:  # 0 / 0
        assert np.isnan(single).all()
    others = [0, 3]
    for n in others:
        valid, actual = (support.gathered(v[n : n + 1], mask[n : n + 1]) for v in (x, y))
        if not in_place:
            exact = reference.forward(valid, norm.weight, norm.bias, eps)
            support.assert_within(actual, exact, RELATIVE[dtype.name] * (1 + np.abs(exact)))
    if mode == "train":
        dx = norm.backward(dy)
        assert (support.left_out(dx, mask) == 0).all()
        assert np.isfinite(dx[others]).all()
        assert np.isfinite(norm.bias_grad).all()
        assert np.isfinite(norm.weight_grad).all() == bool(eps)


@layers
@pytest.mark.parametrize("unbiased", [True, False])
def test_samples_without_two_valid_positions_move_no_running_statistics(
    rng, layer, batch, shape, unbiased
):
    x, mask = some(rng, shape, np.float64), starved_mask(shape)
    norm = layer(3, track_running_stats=True, dtype=np.float64, unbiased=unbiased)
    norm(x, mask=mask)
    moved = [
        reference.updated(
            support.gathered(x[n : n + 1], mask[n : n + 1]), np.zeros(3), np.ones(3), 0.1, unbiased
        )
        for n in (0, 3)
    ]
    mean, var = (sum(values) / 2 for values in zip(*moved, strict=True))
    support.assert_close(norm.running_mean, mean, 1e-14)
    support.assert_close(norm.running_var, var, 1e-14)
    with support.untouched(norm):
        norm(x[1:3], mask=mask[1:3])


def test_lengths_of_which_one_is_zero(rng):
    norm, x = fastbn.InstanceNorm1d(3).eval(), some(rng, (2, 3, 8))
    y = norm(x, mask=np.arange(8) < np.array([[[8]], [[0]]]))
    assert same_bits(y[0], norm(x[0]))
    assert not y[1].any()


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 3, 1)])
def test_a_mask_of_a_single_position_per_sample(rng, shape):
    x, running = some(rng, shape), (np.zeros(3), np.ones(3))
    mask = np.zeros((len(x), 1, shape[2]), bool)
    mask[:, :, -1] = True
    with support.untouched(*running):
        y = F.instance_norm(x, *running, bias=np.arange(3.0), mask=mask)
    assert same_bits(y[..., -1], np.tile(np.arange(3, dtype=np.float32), (len(x), 1)))
    assert not y[..., :-1].any()


EPS_OF_ZERO = {
    "instance_norm": lambda x, **options: F.instance_norm(x, eps=0, **options),
    "by running statistics": lambda x, **options: F.instance_norm(
        x, x.mean((0, 2)), x.var((0, 2)), use_input_stats=False, eps=0.0, **options
    ),
    "batch_norm": lambda x, **options: F.batch_norm(
        x, x.mean((0, 2)), x.var((0, 2)), eps=0.0, **options
    ),
    "group_norm": lambda x, **options: F.group_norm(x, 3, eps=0, **options),
    "InstanceNorm1d": lambda x, **options: fastbn.InstanceNorm1d(3, eps=0)(x, **options),
    "GroupNorm": lambda x, **options: fastbn.GroupNorm(3, 3, eps=0.0)(x, **options),
}


@pytest.mark.parametrize("name", EPS_OF_ZERO)
def test_eps_may_be_zero_outside_batch_normalizations_training(rng, name):
    x = some(rng, (1, 3, 50), np.float64)
    exact = reference.forward(x, eps=0)
    support.assert_close(EPS_OF_ZERO[name](x), exact, 1e-14)
    x[:, 1] = 0.25  # 0 / 0
    y = EPS_OF_ZERO[name](x)
    assert np.isnan(y[:, 1]).all()
    support.assert_close(y[:, ::2], exact[:, ::2], 1e-14)


def test_eps_of_zero_gives_gradients(rng):
    x, dy = some(rng, (1, 3, 50), np.float64), some(rng, (1, 3, 50), np.float64)
    for norm in (fastbn.InstanceNorm1d(3, eps=0, affine=True), fastbn.GroupNorm(3, 3, eps=0)):
        norm(x)
        support.assert_close(norm.backward(dy), reference.backward(dy, x, eps=0)[0], 1e-6)


@pytest.mark.parametrize("eps", [-1e-5, np.nan, "0", None])
def test_eps_is_not_negative(eps):
    for make in (fastbn.InstanceNorm1d, lambda *args: fastbn.GroupNorm(1, *args)):
        with support.refused((ValueError, TypeError), "eps"):
            make(3, eps)


@layers
def test_eval_and_frozen_use_the_running_statistics_if_there_are_any(rng, layer, batch, shape):
    norm = layer(3, affine=True, track_running_stats=True)
    norm(some(rng, shape))
    x = some(rng, shape)
    bn = batch(3)
    bn.load_state_dict(norm.state_dict())
    with support.untouched(norm):
        y = norm.eval()(x)
        assert same_bits(y, bn.eval()(x))
        assert same_bits(norm(x[0]), y[0])
    dx, expected = (m.train().freeze()(x) is None or m.backward(x) for m in (norm, bn))
    assert same_bits(dx, expected)


@layers
def test_without_running_statistics_eval_is_like_training(rng, layer, batch, shape):
    x = some(rng, shape)
    norm = layer(3)
    assert same_bits(norm(x), norm.eval()(x))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        norm.backward(x)
    with pytest.raises(RuntimeError, match="running statistics"):
        norm.freeze()


def test_the_state_loads_and_survives_copies(rng):
    norm = fastbn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    norm(some(rng, (4, 3, 5, 2)))
    other = fastbn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    other.load_state_dict(norm.state_dict())
    x = some(rng, (4, 3, 5, 2))
    expected = norm.eval()(x)
    for twin in (other.eval(), copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert same_bits(twin(x), expected)
        with pytest.raises(RuntimeError):
            twin.backward(x)


@pytest.mark.parametrize("shape", [(0, 3, 5, 2), (4, 3, 0, 2)], ids=str)
def test_an_empty_batch_touches_nothing(rng, shape):
    norm = fastbn.InstanceNorm2d(3, affine=True, track_running_stats=True, dtype=np.float64)
    norm(some(rng, (7, 3, 5, 2)))
    x = np.empty(shape, np.float32)
    with support.untouched(norm):
        y = norm(x)
    assert same_bits(y, x)
    assert same_bits(norm.backward(x), x)
    assert same_bits(norm.weight_grad, np.zeros(3))


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (fastbn.InstanceNorm1d, (3,), "2D or 3D"),
        (fastbn.InstanceNorm2d, (4, 3), "3D or 4D"),
        (fastbn.InstanceNorm3d, (3, 4, 5), "4D or 5D"),
        (fastbn.InstanceNorm2d, (2, 4, 5, 5), "4 channels"),
        (fastbn.InstanceNorm2d, (4, 5, 5), "4 channels"),
        (fastbn.InstanceNorm2d, (2, 3, 1, 1), "more than 1 spatial element"),
        (fastbn.InstanceNorm1d, (3, 1), "more than 1 spatial element"),
    ],
)
def test_input_that_does_not_fit_is_refused(layer, shape, words):
    norm = layer(3, affine=True, track_running_stats=True)
    with support.refused(ValueError, words, intact=[norm]):
        norm(np.ones(shape))


def test_a_refused_call_changes_nothing(rng):
    norm = fastbn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    x = some(rng, (4, 3, 5, 2))
    for out in (x[::-1], x[:2], np.empty_like(x, np.float64), "out", support.read_only(x)):
        with support.refused((ValueError, TypeError), "out", intact=[norm, x]):
            norm(x, out=out)
    norm.running_var = support.read_only(norm.running_var)
    with support.refused(ValueError, "running_var", intact=[norm, x]):
        norm(x, out=x)


def test_a_refused_backward_can_be_tried_again(rng):
    norm = fastbn.InstanceNorm2d(3, affine=True)
    x = some(rng, (1, 3, 5, 2))
    norm(x)
    for dy in (x[0], x[..., :1], x.astype(int)):
        with support.refused((ValueError, TypeError), "dy", intact=[norm]):
            norm.backward(dy)
    for out in (x[0], "out", np.empty_like(x, np.float64)):
        with support.refused((ValueError, TypeError), "out", intact=[norm]):
            norm.backward(x, out=out)
    norm.backward(x)
    with pytest.raises(RuntimeError, match="has run"):
        norm.backward(x)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(("affine", "tracking"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("name", LAYERS)
def test_training_and_eval_agree_with_torch(rng, name, affine, tracking, unbatched):
    torch = pytest.importorskip("torch")
    layer, _, shape = LAYERS[name]
    shape = shape[1:] if unbatched else shape
    kwargs = {"affine": affine, "track_running_stats": tracking}
    theirs = getattr(torch.nn, layer.__name__)(3, **kwargs, dtype=torch.float64)
    ours = layer(3, **kwargs, dtype=np.float64)
    of_dx = functools.partial(support.assert_close, relative=1e-12)
    support.assert_as_torch(ours, theirs, rng, shape, of_dx, steps=2)


def test_a_sample_without_valid_positions_has_finite_gradients_without_eps(rng):
    norm, x = fastbn.InstanceNorm1d(1, eps=0.0, affine=True), some(rng, (2, 1, 3))
    norm(x, mask=np.array([[[True] * 3], [[False] * 3]]))
    assert np.isfinite(norm.backward(np.ones_like(x))).all()
    assert np.isfinite(norm.weight_grad).all()
