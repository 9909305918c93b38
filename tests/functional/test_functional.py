"""The functional layer: `batch_norm`, and the primitives that everything composes from."""

import inspect

import numpy as np
import pytest
import reference
import support
from cases import each
from support import parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.sanitize, pytest.mark.wheel]

SHAPES = [(4, 3), (3, 2, 5), (3, 4, 6, 5), (2, 33, 7, 7), (2, 3, 2, 3, 4), (2, 1, 300, 300)]
LAYOUTS = [support.contiguous, support.channels_last, support.sliced]


def names(function):
    return list(inspect.signature(function).parameters)


def test_torchs_functions_have_its_signatures_and_more_by_keyword():
    first = ["input", "running_mean", "running_var", "weight", "bias"]
    more = ["momentum", "eps", "out", "mask"]
    last = ["activation", "negative_slope", "residual"]
    assert names(F.batch_norm) == [*first, "training", *more, "ghost_batch_size", "unbiased", *last]
    assert names(F.instance_norm) == [*first, "use_input_stats", *more, "unbiased", *last]
    assert names(F.group_norm) == ["input", "num_groups", "weight", "bias", *more[1:], *last]
    for function in (F.batch_norm, F.instance_norm, F.group_norm):
        parameters = inspect.signature(function).parameters
        for name in ("out", "mask", *last):
            assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY


@each("shape", SHAPES)
@each("layout", LAYOUTS)
def test_the_primitives_compose_to_the_fused_forward(rng, dtype, layout, shape):
    x = layout(some(rng, shape, dtype))
    weight, bias = parameters(shape[1])
    fused_y, fused_mean, fused_invstd = F.batch_norm_forward(x, weight, bias, 1e-3)
    count, mean, m2 = F.batch_norm_stats(x)
    invstd = 1 / np.sqrt(m2 / count + 1e-3)
    y = F.batch_norm_elemt(x, mean, invstd, weight, bias)
    support.assert_composes(fused_mean, mean, dtype, np.maximum(np.abs(mean), 1 / invstd))
    support.assert_composes(fused_invstd, invstd, dtype)
    support.assert_composes(fused_y, y, dtype)
    assert same_bits(fused_y, F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3))


@each("shape", SHAPES)
@each("layout", LAYOUTS)
@each("has_weight", [True, False])
def test_the_primitives_compose_to_the_fused_backward(rng, dtype, layout, shape, has_weight):
    x, dy = (layout(some(rng, shape, dtype)) for _ in range(2))
    weight = parameters(shape[1])[0] if has_weight else None
    count, mean, m2 = F.batch_norm_stats(x)
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    fused = F.batch_norm_backward(dy, x, weight, mean, invstd)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, count)
    statistics = (x, mean, invstd)
    support.assert_step_composes(
        (*statistics, *fused), (*statistics, dx, *sums[::-1]), dtype, dy, x
    )


def test_statistics_are_float64_and_the_count_an_int(rng, dtype):
    x = some(rng, (3, 4, 6, 5), dtype)
    count, mean, m2 = F.batch_norm_stats(x)
    assert type(count) is int
    assert count == 90
    _, mean_, invstd = F.batch_norm_forward(x)
    sums = F.batch_norm_backward_reduce(x, x, mean, invstd)
    gradients = F.batch_norm_backward(x, x, None, mean, invstd)[1:]
    for array in (mean, m2, mean_, invstd, *sums, *gradients):
        assert array.dtype == np.float64
        assert array.shape == (4,)


def test_m2_is_the_sum_of_squared_deviations(rng):
    x = some(rng, (3, 4, 6, 5), np.float64)
    _, mean, m2 = F.batch_norm_stats(x)
    count, exact_mean, exact_var = reference.moments(x)
    support.assert_close(mean, exact_mean, 1e-14)
    support.assert_close(m2, exact_var * count, 1e-14)


def merged(a, b):
    """Statistics of two batches together, by Chan's formula."""
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count, delta = count_a + count_b, mean_b - mean_a
    mean = mean_a + delta * count_b / count
    return count, mean, m2_a + m2_b + delta**2 * count_a * count_b / count


def test_statistics_of_parts_merge_to_those_of_the_whole(rng):
    x = some(rng, (7, 4, 6, 5), np.float64)
    count, mean, m2 = merged(F.batch_norm_stats(x[:2]), F.batch_norm_stats(x[2:]))
    whole = F.batch_norm_stats(x)
    assert count == whole[0]
    support.assert_close(mean, whole[1], 1e-14)
    support.assert_close(m2, whole[2], 1e-14)


def test_statistics_of_an_empty_part_change_nothing_in_a_merge(rng):
    x = some(rng, (7, 4, 6, 5), np.float64)
    whole = F.batch_norm_stats(x)
    count, mean, m2 = merged(whole, F.batch_norm_stats(x[:0]))
    assert count == whole[0]
    assert same_bits(mean, whole[1])
    assert same_bits(m2, whole[2])


def test_a_batch_in_two_parts_is_normalized_like_the_whole(rng):
    x, dy = some(rng, (7, 4, 6, 5)), some(rng, (7, 4, 6, 5))
    weight, bias = parameters(4)
    parts = [(x[:2], dy[:2]), (x[2:], dy[2:])]
    count, mean, m2 = merged(*(F.batch_norm_stats(part) for part, _ in parts))
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    y = [F.batch_norm_elemt(part, mean, invstd, weight, bias) for part, _ in parts]
    exact = reference.forward(x, weight, bias)
    bound = reference.forward_bound(exact, x.dtype, weight, bias)
    support.assert_within(np.concatenate(y), exact, bound)
    sums = [F.batch_norm_backward_reduce(d, part, mean, invstd) for part, d in parts]
    sum_dy, sum_dy_xhat = (sum(pair) for pair in zip(*sums, strict=True))
    dx = [
        F.batch_norm_backward_elemt(d, part, mean, invstd, weight, sum_dy, sum_dy_xhat, count)
        for part, d in parts
    ]
    exact = reference.backward(dy, x, weight)
    support.assert_close(np.concatenate(dx), exact[0], 1e-5)
    support.assert_close(sum_dy_xhat, exact[1], 1e-5)
    support.assert_close(sum_dy, exact[2], 1e-5)


def test_fused_functions_take_a_single_value_per_channel():
    x = np.full((1, 3, 1, 1), 5.0, np.float32)
    bias = np.array([1.0, 2.0, 3.0], np.float32)
    y, mean, invstd = F.batch_norm_forward(x, None, bias)
    assert (y.ravel() == bias).all()
    assert (mean == 5).all()
    dx, _, _ = F.batch_norm_backward(x, x, None, mean, invstd)
    assert (dx == 0).all()


def test_functions_take_an_empty_batch(dtype):
    x = np.empty((0, 3, 2, 2), dtype)
    ones = np.ones(3)
    count, _, _ = F.batch_norm_stats(x)
    assert count == 0
    assert same_bits(F.batch_norm_forward(x)[0], x)
    assert same_bits(F.batch_norm_elemt(x, ones, ones), x)
    dx, dweight, dbias = F.batch_norm_backward(x, x, None, ones, ones)
    assert same_bits(dx, x)
    assert (dweight == 0).all()
    assert (dbias == 0).all()


def test_batch_norm_leaves_the_running_statistics_alone_for_an_empty_batch():
    mean, var = np.full(3, 0.5), np.full(3, 2.0)
    F.batch_norm(np.empty((0, 3, 2, 2), np.float32), mean, var, training=True)
    assert (mean == 0.5).all()
    assert (var == 2).all()


FORWARDS = {
    "batch_norm": lambda x, out: F.batch_norm(x, None, None, training=True, out=out),
    "instance_norm": lambda x, out: F.instance_norm(x, out=out),
    "batch_norm_forward": lambda x, out: F.batch_norm_forward(x, out=out)[0],
    "batch_norm_elemt": lambda x, out: F.batch_norm_elemt(x, np.ones(4), np.ones(4), out=out),
}
BACKWARDS = {
    "batch_norm_backward": lambda dy, x, out: F.batch_norm_backward(
        dy, x, None, np.ones(4), np.ones(4), out=out
    )[0],
    "batch_norm_backward_elemt": lambda dy, x, out: F.batch_norm_backward_elemt(
        dy, x, np.ones(4), np.ones(4), None, np.ones(4), np.ones(4), 90, out=out
    ),
}


@pytest.mark.parametrize("call", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_forward_writes_to_out(rng, call, in_place):
    x = some(rng, (3, 4, 6, 5))
    expected = call(x, None)
    out = x if in_place else np.empty_like(x)
    assert call(x, out) is out
    assert same_bits(out, expected)


@pytest.mark.parametrize("call", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("target", ["dy", "x", "new"])
def test_a_backward_writes_to_out(rng, call, target):
    x, dy = some(rng, (3, 4, 6, 5)), some(rng, (3, 4, 6, 5))
    expected = call(dy, x, None)
    out = {"dy": dy, "x": x, "new": np.empty_like(x)}[target]
    assert call(dy, x, out) is out
    assert same_bits(out, expected)


def test_running_statistics_may_be_views_of_one_array(rng):
    x = some(rng, (3, 4, 6, 5))
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    F.batch_norm(x, mean, var, training=True)
    buffer = np.zeros((4, 3), np.float32)
    buffer[:, 1] = 1
    F.batch_norm(x, buffer[:, 0], buffer[:, 1], training=True)
    assert same_bits(buffer[:, 0], mean)
    assert same_bits(buffer[:, 1], var)
    assert (buffer[:, 2] == 0).all()


@pytest.mark.parametrize("shared", ["running_mean", "running_var"])
def test_normalizes_first_where_weight_and_running_statistics_are_one_array(rng, shared):
    x = some(rng, (3, 4, 6, 5))
    arrays = {"running_mean": np.zeros(4, np.float32), "running_var": np.ones(4, np.float32)}
    weight = arrays[shared] = parameters(4)[0]
    expected = F.batch_norm(x, None, None, weight, training=True)
    exact = dict(zip(arrays, reference.updated(x, *arrays.values(), momentum=0.1), strict=True))
    assert same_bits(F.batch_norm(x, **arrays, weight=weight, training=True), expected)
    support.assert_close(arrays[shared], exact[shared], 3e-7)


def test_read_only_running_statistics_serve_for_eval(rng):
    x = some(rng, (3, 4, 6, 5))
    mean, var = support.read_only(np.ones(4)), support.read_only(np.full(4, 2.0))
    support.assert_close(F.batch_norm(x, mean, var), reference.normalize(x, mean, var), 1e-6)


def test_integer_like_floats_of_python_serve_as_momentum_and_eps(rng):
    x = some(rng, (3, 4, 6, 5))
    mean, var = np.zeros(4), np.ones(4)
    F.batch_norm(x, mean, var, training=True, momentum=1, eps=1)
    support.assert_close(mean, x.mean((0, 2, 3), np.float64), 1e-6)


# Each sample by itself.

INSTANCES = [(3, 2, 5), (3, 4, 6, 5), (2, 33, 7, 7), (2, 3, 2, 3, 4), (2, 1, 300, 300)]


@each("shape", INSTANCES)
@each("layout", LAYOUTS)
@each("in_place", [False, True])
def test_instance_norm_normalizes_each_sample_by_itself(rng, dtype, layout, shape, in_place):
    x, (weight, bias) = layout(some(rng, shape, dtype)), parameters(shape[1])
    samples = np.split(x.copy(), len(x))
    y = F.instance_norm(x, weight=weight, bias=bias, eps=1e-3, out=x if in_place else None)
    assert (y is x) == in_place
    exact = np.concatenate([reference.forward(s, weight, bias, 1e-3) for s in samples])
    support.assert_within(y, exact, reference.forward_bound(exact, dtype, weight, bias))


@each("layout", LAYOUTS)
@each("momentum", [0.1, 1.0, 0])
def test_instance_norm_moves_the_running_statistics_to_the_mean_of_the_samples(
    rng, dtype, layout, momentum
):
    x = layout(some(rng, (4, 3, 6, 5), dtype))
    mean, var = some(rng, 3, np.float64), some(rng, 3, np.float64)
    moved = [reference.updated(s, mean, var, momentum) for s in np.split(x, len(x))]
    F.instance_norm(x, mean, var, momentum=momentum)
    for actual, values in zip((mean, var), zip(*moved, strict=True), strict=True):
        support.assert_close(actual, sum(values) / len(x), 1e-14)


def test_instance_norm_by_running_statistics_is_batch_norm_by_them(rng, dtype):
    x, (weight, bias) = some(rng, (4, 3, 6, 5), dtype), parameters(3)
    running = support.read_only(some(rng, 3)), support.read_only(np.full(3, 2.0))
    y = F.instance_norm(x, *running, weight, bias, False, 0.3, 1e-3)
    assert same_bits(y, F.batch_norm(x, *running, weight, bias, False, 0.3, 1e-3))


@pytest.mark.parametrize("masked", [False, True])
def test_instance_norm_does_what_the_layers_do(rng, dtype, masked):
    x = some(rng, (4, 3, 6, 5), dtype)
    mask = rng.random((4, 1, 6, 5)) < 0.7 if masked else None
    layer = fastbn.InstanceNorm2d(3, 1e-3, 0.3, affine=True, track_running_stats=True)
    layer.weight[:], layer.bias[:] = parameters(3)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    y = F.instance_norm(x, mean, var, layer.weight, layer.bias, True, 0.3, 1e-3, mask=mask)
    assert same_bits(y, layer(x, mask=mask))
    assert same_bits(mean, layer.running_mean)
    assert same_bits(var, layer.running_var)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (2, 0, 5)], ids=str)
def test_instance_norm_takes_an_empty_batch(shape):
    mean, var = np.full(shape[1], 0.5), np.full(shape[1], 2.0)
    x = np.empty(shape, np.float32)
    with support.untouched(mean, var):
        assert same_bits(F.instance_norm(x, mean, var), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_normalizes_first_where_its_arrays_are_one(rng, layout):
    x, mean, var = layout(some(rng, (4, 3, 6, 5))), some(rng, 3), np.full(3, 2.0, np.float32)
    expected, moved = F.instance_norm(x, weight=mean, bias=var), [mean.copy(), var.copy()]
    F.instance_norm(x, *moved)
    assert same_bits(F.instance_norm(x, mean, var, weight=mean, bias=var), expected)
    assert same_bits(np.stack([mean, var]), np.stack(moved))
