"""Ghost batches: a large batch is normalized as its parts are, one after the other."""

import numpy as np
import pytest
import support
from cases import each
from support import (
    LAYER_ARRAYS,
    THREADS,
    WRITEABLE_LAYOUTS,
    channels_last,
    contiguous,
    parameters,
    refused,
    same_bits,
    some,
)

import fastbn
from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.sanitize, pytest.mark.wheel]

SHAPES = [(12, 3), (12, 3, 5), (12, 40, 5, 7), (12, 3, 40, 41), (12, 70, 3, 2), (13, 2, 9, 9)]
# Of parts that are summed by columns, and of a rest that is not.
SHAPES += [(50, 3, 4, 5)]
BOTH = each("layout", [contiguous, channels_last])
LAYERS = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}


def pair(shape, size, **options):
    """A layer with ghost batches, and one without, of the same parameters."""
    layers = [LAYERS[len(shape)](shape[1], ghost_batch_size=s, **options) for s in (size, None)]
    for layer in layers:
        if layer.affine:
            layer.weight[:], layer.bias[:] = parameters(shape[1])
    return layers


def parts(size, *arrays):
    """The batches that the arrays are normalized in."""
    for k in range(0, len(arrays[0]), size):
        yield tuple(a[k : k + size] for a in arrays)


@BOTH
@each("size", [2, 4, 5, 12, 20])
@each("shape", SHAPES)
def test_a_step_has_the_bits_of_calls_on_one_part_after_the_other(rng, dtype, shape, size, layout):
    if shape[0] % size == 1 and len(shape) == 2:
        shape = (shape[0] + 1, shape[1])  # a last batch of a single value is an error
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype, mean=0))
    ghosts, plain = pair(shape, size)
    y, dx = ghosts(x), ghosts.backward(dy)
    each = [(plain(a), plain.backward(b)) for a, b in parts(size, x, dy)]
    assert same_bits(y, np.concatenate([a for a, _ in each]))
    assert same_bits(dx, np.concatenate([b for _, b in each]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(ghosts, name), getattr(plain, name))
    for name in ("weight_grad", "bias_grad"):  # one sums in float64, the other adds to float32
        scale = np.abs(dy.astype(np.float64)).sum()
        support.assert_within(getattr(ghosts, name), getattr(plain, name), 1e-6 * scale)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("stats_dtype", ["float16", "float32", "float64"])
def test_running_statistics_take_one_part_after_the_other(rng, momentum, stats_dtype):
    x = some(rng, (14, 700, 3, 3), mean=5)
    ghosts, plain = pair(x.shape, 4, momentum=momentum, dtype=stats_dtype)
    for _ in range(2):
        ghosts(x)
        for (part,) in parts(4, x):
            plain(part)
    assert ghosts.num_batches_tracked == 8
    assert same_bits(ghosts.running_mean, plain.running_mean)
    assert same_bits(ghosts.running_var, plain.running_var)


@BOTH
@pytest.mark.parametrize("weight", [None, [0.0, 1.0, 2.0]])
def test_in_place_the_output_has_the_same_bits_and_the_gradient_is_close(rng, layout, weight):
    x, dy = layout(some(rng, (11, 3, 6, 7))), layout(some(rng, (11, 3, 6, 7)))
    results = []
    for in_place in (False, True):
        bn = fastbn.BatchNorm2d(3, affine=weight is not None, ghost_batch_size=4)
        if weight is not None:
            bn.weight[:] = weight
        a = x.copy(order="K")
        y = bn(a, out=a if in_place else None).copy()
        results.append((y, bn.backward(dy), bn.weight_grad, bn.bias_grad))
    assert same_bits(results[0][0], results[1][0])
    for actual, expected in zip(results[1][1:], results[0][1:], strict=True):
        if expected is not None:
            support.assert_close(actual, expected, 1e-4)


@BOTH
def test_every_number_of_threads_gives_the_same_bits(rng, set_num_threads, layout):
    x, dy = (layout(some(rng, (14, 40, 30, 31))) for _ in range(2))
    results = []
    for threads in THREADS:
        set_num_threads(threads)
        bn = fastbn.BatchNorm2d(40, ghost_batch_size=4)
        results.append([bn(x), bn.backward(dy), bn.weight_grad, bn.running_var])
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("layout", WRITEABLE_LAYOUTS)
def test_any_strides_serve(rng, layout):
    x = some(rng, (7, 3, 4, 5))
    y = fastbn.BatchNorm2d(3, ghost_batch_size=3)(layout(x))
    support.assert_close(y, fastbn.BatchNorm2d(3, ghost_batch_size=3)(x), 1e-6)


# Runs of 42, 49 and 16 elements; few samples, and so many that columns are summed.
@BOTH
@pytest.mark.parametrize(
    ("shape", "size"), [((11, 5, 6, 7), 4), ((300, 8, 7, 7), 100), ((70, 3, 4, 4), 30)]
)
def test_masks_and_ghost_batches_go_together(rng, layout, shape, size):
    x, dy = layout(some(rng, shape)), layout(some(rng, shape))
    mask = rng.random((shape[0], 1, *shape[2:])) < 0.5
    mask[size : 2 * size] = True  # of one ghost batch, which has the bits of no mask
    ghosts, plain = pair(x.shape, size)
    y, dx = ghosts(x, mask=mask), ghosts.backward(dy)
    each = [
        (plain(a, mask=None if m.all() else m), plain.backward(b))
        for a, b, m in parts(size, x, dy, mask)
    ]
    assert same_bits(y, np.concatenate([a for a, _ in each]))
    assert same_bits(dx, np.concatenate([b for _, b in each]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(ghosts, name), getattr(plain, name))


def test_the_functions_take_ghost_batches(rng):
    x, dy = some(rng, (10, 3, 6, 7)), some(rng, (10, 3, 6, 7))
    weight, bias = parameters(3)
    y, mean, invstd = F.batch_norm_forward(x, weight, bias, ghost_batch_size=4)
    assert mean.shape == invstd.shape == (3, 3)
    dx, dweight, dbias = F.batch_norm_backward(dy, x, weight, mean, invstd, ghost_batch_size=4)
    running = [np.zeros(3), np.ones(3)]
    assert same_bits(F.batch_norm(x, *running, weight, bias, training=True, ghost_batch_size=4), y)
    ghosts, _ = pair(x.shape, 4, dtype=np.float64)
    ghosts.weight[:], ghosts.bias[:] = weight, bias
    assert same_bits(ghosts(x), y)
    assert same_bits(ghosts.backward(dy), dx)
    assert same_bits(ghosts.weight_grad, dweight)
    assert same_bits(ghosts.bias_grad, dbias)
    assert same_bits(ghosts.running_mean, running[0])
    assert same_bits(ghosts.running_var, running[1])


def test_evaluation_and_frozen_layers_have_no_ghost_batches(rng):
    x = some(rng, (10, 3, 6, 7))
    ghosts, plain = pair(x.shape, 4)
    assert same_bits(ghosts.eval()(x), plain.eval()(x))
    assert same_bits(ghosts.train().freeze()(x), plain.train().freeze()(x))
    assert same_bits(ghosts.backward(x), plain.backward(x))


def test_recalibration_counts_them_as_training_does(rng):
    x = some(rng, (10, 3, 6, 7))
    ghosts, plain = pair(x.shape, 4)
    with fastbn.recalibrate(ghosts, plain):
        ghosts(x)
        plain(x)
    assert ghosts.num_batches_tracked == 3
    assert same_bits(ghosts.running_var, plain.running_var)


def test_a_lazy_layer_keeps_the_size(rng):
    bn = fastbn.LazyBatchNorm2d(ghost_batch_size=4)
    bn(some(rng, (10, 3, 6, 7)))
    assert bn.ghost_batch_size == 4
    assert "ghost_batch_size=4" in repr(bn)
    assert bn.num_batches_tracked == 3


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises((ValueError, TypeError), match="ghost_batch_size"):
        fastbn.BatchNorm2d(3, ghost_batch_size=size)


SINGLE_VALUES = {
    "last": (4, None, "the last ghost batch, by ghost_batch_size=4, is sample 8 alone; drop"),
    "every": (1, None, "a ghost batch, by ghost_batch_size=1, is sample 0 alone; drop"),
    "by a mask": (
        3,
        [0, 1, 2, 5, 6, 7],
        "a ghost batch, by ghost_batch_size=3, has samples 3 to 5",
    ),
}


@pytest.mark.parametrize(("size", "valid", "words"), SINGLE_VALUES.values(), ids=SINGLE_VALUES)
def test_a_ghost_batch_of_a_single_value_is_an_error_that_changes_nothing(rng, size, valid, words):
    bn, x = fastbn.BatchNorm1d(3, ghost_batch_size=size), some(rng, (9, 3))
    mask = None if valid is None else np.isin(np.arange(9), valid)[:, np.newaxis]
    names = "more than 1 value", words, "drop or join it, or choose another size"
    with refused(ValueError, *names, intact=(bn, x)):
        bn(x, out=x, mask=mask)


@pytest.mark.parametrize("size", [None, 1, 4])
def test_evaluation_is_advised_where_the_whole_batch_is_a_single_value(rng, size):
    bn, x = fastbn.BatchNorm1d(3, ghost_batch_size=size), some(rng, (1, 3))
    with pytest.raises(ValueError, match=r"size \(1, 3\); evaluation mode .* single values$"):
        bn(x)
    bn.eval()(x)


def test_a_counter_that_cannot_take_all_parts_is_refused_and_nothing_changes(rng):
    bn, x = fastbn.BatchNorm2d(2, ghost_batch_size=2), some(rng, (8, 2, 3, 3))
    bn.num_batches_tracked[...] = 2**63 - 4
    with refused(ValueError, "num_batches_tracked", intact=(bn, x)):
        bn(x, out=x)
    bn.num_batches_tracked[...] -= 1
    bn(x)
    assert bn.num_batches_tracked == 2**63 - 1


def test_a_size_beyond_every_batch_is_one_batch(rng):
    x = some(rng, (8, 2, 3, 3))
    assert same_bits(fastbn.BatchNorm2d(2, ghost_batch_size=2**70)(x), fastbn.BatchNorm2d(2)(x))


def test_an_empty_batch_changes_nothing():
    bn = fastbn.BatchNorm2d(3, ghost_batch_size=4)
    y = bn(np.zeros((0, 3, 6, 7), np.float32))
    assert bn.num_batches_tracked == 0
    assert bn.backward(y).shape == y.shape
    assert bn.weight_grad.tolist() == [0, 0, 0]


def test_statistics_of_the_wrong_shape_are_refused(rng):
    x = some(rng, (10, 3, 6, 7))
    _, mean, invstd = F.batch_norm_forward(x, ghost_batch_size=4)
    with refused(ValueError, "mean", "(3, 3)", intact=(x,)):
        F.batch_norm_backward(x, x, None, mean[0], invstd[0], ghost_batch_size=4)


def test_the_size_travels_with_copies(rng):
    import copy

    bn = copy.deepcopy(fastbn.BatchNorm2d(3, ghost_batch_size=4))
    x = some(rng, (8, 3, 6, 7))
    other = fastbn.BatchNorm2d(3, ghost_batch_size=4)
    assert same_bits(bn(x), other(x))
    for name in LAYER_ARRAYS:
        assert same_bits(getattr(bn, name), getattr(other, name))


def test_leftover_samples_may_have_more_blocks_than_a_batch(rng):
    x = some(rng, (2 * 16384 + 4, 1, 64))
    bn = fastbn.BatchNorm1d(1, ghost_batch_size=16388)
    y = bn(x)
    assert same_bits(y[16388:], F.batch_norm_forward(x[16388:], bn.weight, bn.bias)[0])


def test_what_an_activation_in_place_keeps_of_leftover_samples_is_theirs(rng):
    x, dy = some(rng, (7, 5, 6, 6)), some(rng, (7, 5, 6, 6))
    found = []
    for in_place in False, True:
        bn, given = fastbn.BatchNorm2d(5, ghost_batch_size=3, activation="relu"), x.copy()
        bn(given, out=given if in_place else None)
        found.append(bn.backward(dy))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
