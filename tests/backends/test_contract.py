"""The contract of the backends: what functions and layers do with the arrays of each of them.

On NumPy's arrays, and on CuPy's where there is a GPU or a compiler that can simulate two: one with
clusters of blocks and one without.
"""

import copy
import pickle

import activated
import numpy as np
import pytest
import reference
import support
from backend import (
    DENSE,
    LAYOUTS,
    by_shape,
    channels_last,
    contiguous,
    odd_offset,
    odd_offset_channels_last,
    sliced,
)
from cases import each
from support import (
    case,
    dtype_of,
    gathered,
    left_out,
    parameters,
    same_bits,
    some,
    some_mask,
    spoilt,
)

import fastbn
from fastbn import functional as F

# Channels that fit a block of a GPU, a cluster of blocks, and neither; runs that are whole chunks
# of 16 bytes or not; more and fewer channels than a strip of columns has; strips of columns that
# stay on chip.
SHAPES = [
    (4, 3),
    (3, 2, 5),
    (2, 3, 4, 5),
    (1, 4, 3, 3),
    (5, 33, 7, 7),
    (16, 48, 7, 7),
    (2, 3, 2, 3, 4),
    (68, 2, 32, 32),
    (5, 1, 131, 127),
    (260, 70, 1, 1),
    (90, 70, 3, 3),
    (5, 512, 3, 3),
]
PIECES = [(68, 2, 32, 32), (9, 2, 81, 79)]
LARGE = [(150, 2, 96, 96), (40, 6, 32, 32), (3, 5, 131, 127), (2, 1, 300, 300), (700, 300, 1, 1)]
MASKED = [
    (6, 3),
    (3, 2, 5),
    (5, 33, 7, 7),
    (68, 2, 32, 32),
    (260, 70, 1, 1),
    (90, 70, 3, 3),
    (2, 3, 2, 3, 4),
]
# Batches that begin at a multiple of 16 bytes or not.
BATCHES = [(11, 40), (11, 5, 6, 7), (11, 3, 5), (203, 1, 32, 32), (269, 70, 3)]

of_any_shape = by_shape(*SHAPES, pieces=PIECES, large=LARGE)
masked_shapes = by_shape(*MASKED, pieces=PIECES, large=LARGE[:1])
by_batches = by_shape(*BATCHES, pieces=[(67, 2, 40, 41)], large=[(150, 2, 160, 160)])
by_dense_layout = each("layout", DENSE)
by_host_layout = each("layout", [support.contiguous, support.channels_last])


def offset_of(x):
    _, mean, var = reference.moments(x)
    return np.abs(mean) / np.sqrt(var)


@of_any_shape
@by_dense_layout
def test_training_forward_normalizes_with_the_statistics_of_the_batch(
    rng, backend, dtype, shape, layout
):
    x, _, weight, bias = case(rng, shape, dtype)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    running = backend.array(mean), backend.array(var)
    own = backend.array(weight), backend.array(bias)
    y = F.batch_norm(layout(backend, x), *running, *own, training=True, momentum=0.3)
    exact = reference.forward(x, weight, bias)
    assert isinstance(y, backend.xp.ndarray)
    assert y.dtype == dtype
    bound = reference.forward_bound(exact, dtype, weight, bias, offset_of(x))
    support.assert_within(backend.host(y), exact, bound)
    for moved, expected in zip(running, reference.updated(x, mean, var, 0.3), strict=True):
        support.assert_close(backend.host(moved), expected, 1e-6 if dtype.itemsize < 8 else 1e-13)


@of_any_shape
@by_dense_layout
def test_eval_forward_normalizes_with_the_running_statistics(rng, backend, dtype, shape, layout):
    x, _, weight, bias = case(rng, shape, dtype)
    mean, var = some(rng, shape[1]), np.abs(some(rng, shape[1])) + 0.1
    y = F.batch_norm(layout(backend, x), *map(backend.array, (mean, var, weight, bias)))
    exact = reference.normalize(x, mean, var, weight, bias)
    offset = np.abs(mean) / np.sqrt(var)
    bound = reference.forward_bound(exact, dtype, weight, bias, offset)
    support.assert_within(backend.host(y), exact, bound)


@of_any_shape
@by_dense_layout
def test_backward_gives_the_gradients(rng, backend, dtype, shape, layout):
    x, dy, weight, _ = case(rng, shape, dtype)
    _, mean, invstd = F.batch_norm_forward(layout(backend, x))
    gradients = F.batch_norm_backward(
        layout(backend, dy), layout(backend, x), backend.array(weight), mean, invstd
    )
    _, x_mean, x_var = reference.moments(x)
    expected = reference.backward(dy, x, weight)
    bounds = reference.gradient_bounds(dy, x, dtype, x_mean, x_var, weight)
    for actual, exact, bound in zip(gradients, expected, bounds, strict=True):
        support.assert_within(backend.host(actual), exact, bound)


@pytest.mark.sanitize
@of_any_shape
@by_dense_layout
def test_fused_functions_give_what_their_primitives_compose_to(rng, backend, dtype, shape, layout):
    x, dy, weight, bias = case(rng, shape, dtype)
    x, dy = layout(backend, x), layout(backend, dy)
    weight, bias = backend.array(weight), backend.array(bias)
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = F.batch_norm_backward(dy, x, weight, mean, invstd)
    count, own_mean, m2 = F.batch_norm_stats(x)
    own_invstd = 1.0 / backend.xp.sqrt(m2 / count + 1e-5)
    sums = F.batch_norm_backward_reduce(dy, x, own_mean, own_invstd)
    own_y = F.batch_norm_elemt(x, own_mean, own_invstd, weight, bias)
    own_dx = F.batch_norm_backward_elemt(dy, x, own_mean, own_invstd, weight, *sums, count)
    assert_composes(
        backend,
        (y, mean, invstd, dx, dweight, dbias),
        (own_y, own_mean, own_invstd, own_dx, *sums[::-1]),
        dy,
        x,
    )


def assert_composes(backend, fused, composed, dy, x):
    """The fused functions of a GPU have the bits of their primitives."""
    fused, composed, (dy, x) = (
        [backend.host(array) for array in arrays] for arrays in (fused, composed, (dy, x))
    )
    dtype = x.dtype if backend.xp is np else np.float64
    support.assert_step_composes(fused, composed, dtype, dy, x)


@of_any_shape
@by_dense_layout
def test_results_have_the_same_bits_in_place_and_in_every_run(rng, backend, dtype, shape, layout):
    x, dy, weight, bias = case(rng, shape, dtype)
    weight, bias = backend.array(weight), backend.array(bias)
    results = []
    for in_place in (False, True, False):
        a, b = layout(backend, x), layout(backend, dy)
        _, mean, invstd = F.batch_norm_forward(a, weight, bias)
        dx = F.batch_norm_backward(b, a, weight, mean, invstd, out=b if in_place else None)[0]
        y = F.batch_norm_forward(a, weight, bias, out=a if in_place else None)[0]
        assert not in_place or (y is a and dx is b)
        results.append([backend.host(array) for array in (y, mean, invstd, dx)])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("shape", [(5, 33, 7, 7), (6, 8, 12, 12), (68, 2, 32, 32), (9, 20, 1, 1)])
@each("layout", LAYOUTS)
def test_strides_and_alignment_change_no_bit(rng, backend, dtype, shape, layout):
    x, dy, weight, bias = case(rng, shape, dtype)
    weight, bias = backend.array(weight), backend.array(bias)
    same = channels_last if layout in (channels_last, odd_offset_channels_last) else contiguous

    def results(x, dy, out):
        y, mean, invstd = F.batch_norm_forward(x, weight, bias, out=out)
        return y, mean, invstd, *F.batch_norm_backward(dy, x, weight, mean, invstd)

    expected = results(same(backend, x), same(backend, dy), None)
    for out in (None, odd_offset(backend, x), sliced(backend, x)):
        for a, b in zip(
            results(layout(backend, x), layout(backend, dy), out), expected, strict=True
        ):
            assert same_bits(backend.host(a), backend.host(b))


DISTRIBUTIONS = {
    "N(0,1)": lambda rng, shape: rng.standard_normal(shape),
    "N(1e4,0.1)": lambda rng, shape: rng.normal(1e4, 0.1, shape),
    "N(1e6,1)": lambda rng, shape: rng.normal(1e6, 1.0, shape),
    "N(1,1e-4)": lambda rng, shape: rng.normal(1.0, 1e-4, shape),
    "outlier": lambda rng, shape: with_outlier(rng.standard_normal(shape)),
    "1e30": lambda rng, shape: rng.normal(0.0, 1e30, shape),
}


def with_outlier(x):
    x[0, :, 0, 0] = 1e6
    return x


@each("distribution", list(DISTRIBUTIONS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@by_shape((8, 5, 7, 7), (16, 2, 56, 56), (22, 1, 56, 56), pieces=PIECES, large=LARGE[:1])
@by_dense_layout
def test_statistics_are_right_to_the_last_place(rng, backend, distribution, dtype, shape, layout):
    dtype = np.dtype(dtype)
    x = DISTRIBUTIONS[distribution](rng, shape).astype(dtype)
    count, mean, m2 = F.batch_norm_stats(layout(backend, x))
    _, exact_mean, exact_var = reference.moments(x)
    size = np.maximum(np.abs(exact_mean), np.sqrt(exact_var))
    unit = 1.0 if dtype.itemsize == 4 else 20.0
    support.assert_within(backend.host(mean), exact_mean, unit * reference.ulp(size, dtype))
    relative = (1 + np.abs(exact_mean) / np.sqrt(exact_var)) * 1e-14
    # Deviations are squared in float32; that of an outlier is most of the sum.
    ulps = 2.0 if distribution == "outlier" else 1.0
    bound = (
        ulps * reference.ulp(exact_var.astype(np.float64), dtype)
        if dtype.itemsize == 4 and (distribution != "1e30")
        else exact_var * (relative if dtype.itemsize == 8 else 1.2e-7)
    )
    support.assert_within(backend.host(m2) / count, exact_var, bound)
    y = F.batch_norm_forward(layout(backend, x))[0]
    exact = reference.forward(x)
    bound = reference.forward_bound(exact, dtype, offset=offset_of(x))
    support.assert_within(backend.host(y), exact, bound)


@by_dense_layout
@by_shape((8, 5, 7, 7), (44, 1, 56, 56), pieces=PIECES, large=LARGE[:1])
def test_a_constant_has_no_variance(backend, dtype, shape, layout):
    x = np.full(shape, 0.1, dtype)
    bias = np.linspace(-1, 1, shape[1]).astype(np.float32)
    _, mean, m2 = F.batch_norm_stats(layout(backend, x))
    assert (backend.host(m2) == 0).all()
    assert (backend.host(mean) == x.flat[0].astype(np.float64)).all()
    y = backend.host(F.batch_norm_forward(layout(backend, x), None, backend.array(bias))[0])
    assert same_bits(y, np.broadcast_to(bias[:, None, None], shape).astype(dtype))


@by_dense_layout
@by_shape((8, 5, 7, 7), (40, 70, 1, 1), (5, 33, 3, 3), pieces=[(9, 2, 81, 79)])
def test_values_near_the_largest_are_normalized(rng, backend, dtype, shape, layout):
    case, dy = activated.near_the_largest(rng, shape, dtype)
    expected, bounds = activated.expected(case, dy)
    x, dy = layout(backend, case.x), layout(backend, dy)
    weight, bias = backend.array(case.weight), backend.array(case.bias)
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    gradients = F.batch_norm_backward(dy, x, weight, mean, invstd)
    activated.assert_step(map(backend.host, (y, *gradients)), expected, bounds)
    # By the primitives.
    count, mean, m2 = F.batch_norm_stats(x)
    invstd = 1.0 / backend.xp.sqrt(m2 / count + 1e-5)
    y = F.batch_norm_elemt(x, mean, invstd, weight, bias)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, count)
    activated.assert_step(map(backend.host, (y, dx, *sums[::-1])), expected, bounds)
    # By running statistics.
    case = case._replace(running=activated.statistics_near_the_largest(shape[1], dtype))
    expected, bounds = activated.expected(case, backend.host(dy))
    y = F.batch_norm(x, *map(backend.array, case.running), weight, bias)
    activated.assert_step([backend.host(y)], expected, bounds)


@by_dense_layout
@each("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("shape", [(6, 5, 7, 7), (90, 70, 3, 3), (16, 48, 7, 7)], ids=str)
def test_a_nan_an_infinity_or_what_has_no_square_stays_in_its_channel(
    rng, backend, dtype, shape, layout, value
):
    x, dy, _, _ = case(rng, shape, dtype)
    clean = [backend.host(a) for a in results_of(layout(backend, x), layout(backend, dy))]
    with np.errstate(over="ignore"):  # It is an infinity in float16.
        x[3, 2, -1, -1] = value
    dirty = [backend.host(a) for a in results_of(layout(backend, x), layout(backend, dy))]
    for a, b in zip(clean, dirty, strict=True):
        axis = 0 if a.ndim == 1 else 1
        assert same_bits(np.delete(a, 2, axis), np.delete(b, 2, axis))


def results_of(x, dy):
    y, mean, invstd = F.batch_norm_forward(x)
    return y, mean, invstd, *F.batch_norm_backward(dy, x, None, mean, invstd)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_parameters_may_have_any_dtype_and_stride(rng, backend, name):
    x, _, weight, bias = case(rng, (4, 6, 5, 5))
    other = dtype_of(name)
    weight, bias = weight.astype(other), bias.astype(other)
    buffer = backend.xp.zeros((6, 3), other)
    buffer[:, 1], buffer[:, 2] = backend.array(weight), backend.array(bias)
    running = backend.xp.zeros((2, 6), other)[:, ::-1]
    y = F.batch_norm(
        backend.array(x), *running, buffer[:, 1], buffer[:, 2], training=True, momentum=1.0
    )
    exact = reference.forward(x, weight, bias)
    support.assert_within(
        backend.host(y), exact, reference.forward_bound(exact, x.dtype, weight, bias)
    )
    expected = reference.updated(x, 0.0 * weight, 0.0 * weight, 1.0)
    support.assert_close(
        backend.host(running), np.stack(expected), {2: 1e-2}.get(other.itemsize, 1e-6)
    )


def test_running_statistics_may_share_memory_with_the_parameters(rng, backend):
    x, _, weight, bias = case(rng, (8, 4, 6, 6))
    expected = F.batch_norm_forward(backend.array(x), backend.array(weight), backend.array(bias))[0]
    buffer = backend.xp.stack([backend.array(weight), backend.array(bias)])
    y = F.batch_norm(backend.array(x), buffer[0], buffer[1], buffer[0], buffer[1], training=True)
    assert same_bits(backend.host(y), backend.host(expected))
    assert not same_bits(backend.host(buffer[0]), weight)


@by_shape((4, 3, 5, 7), (5, 33, 7, 7), (68, 2, 32, 32), pieces=PIECES)
@by_dense_layout
@pytest.mark.parametrize("kind", ["one batch", "ghost batches", "a mask", "instances"])
def test_running_variances_of_the_population(rng, backend, shape, layout, kind):
    x = layout(backend, some(rng, shape))
    samples = {"ghost batches": 2, "instances": 1}.get(kind, len(x))
    if kind == "instances":
        norm = fastbn.InstanceNorm2d(
            shape[1], track_running_stats=True, device=backend.device, unbiased=False
        )
    else:
        norm = fastbn.BatchNorm2d(shape[1], device=backend.device, unbiased=False)
        norm.ghost_batch_size = None if samples == len(x) else samples
    mask = np.ones((len(x), 1, *shape[2:]), bool)
    mask[:, :, 0] = kind != "a mask"
    norm(x, mask=backend.array(mask) if kind == "a mask" else None)
    expected = np.zeros(shape[1]), np.ones(shape[1])
    moved = []
    for first in range(0, len(x), samples):
        part = slice(first, first + samples)
        batch = np.moveaxis(backend.host(x)[part], 1, -1)[mask[part, 0]]
        moved.append(reference.updated(batch, *expected, 0.1, unbiased=False))
        expected = expected if kind == "instances" else moved[-1]
    if kind == "instances":
        expected = [sum(values) / len(x) for values in zip(*moved, strict=True)]
    support.assert_close(backend.host(norm.running_mean), expected[0], 1e-6)
    support.assert_close(backend.host(norm.running_var), expected[1], 1e-6)


@by_dense_layout
@each("shape", [(0, 5, 2, 2), (3, 0, 2, 2), (3, 5, 0, 2)])
def test_an_empty_batch_is_legal(backend, layout, shape):
    x = layout(backend, np.zeros(shape, np.float32))
    bn = fastbn.BatchNorm2d(shape[1], device=backend.device)
    y = bn(x)
    assert y.shape == shape
    dx = bn.backward(y)
    assert dx.shape == shape
    assert int(bn.num_batches_tracked) == 0
    assert (backend.host(bn.running_var) == 1).all()
    assert (backend.host(bn.weight_grad) == 0).all()
    _, mean, m2 = F.batch_norm_stats(x)
    assert not backend.host(mean).any()
    assert not backend.host(m2).any()


@pytest.mark.parametrize("out", ["overlap", "shape", "dtype", "kind"])
def test_an_out_that_cannot_serve_is_refused_before_anything_is_written(rng, backend, out):
    if out == "kind" and backend.device == "cpu":
        pytest.skip("needs an array of a GPU; see test_cuda.py")
    bn = fastbn.BatchNorm2d(3, device=backend.device)
    buffer = backend.xp.zeros(2 * 3 * 16 + 16, np.float32)
    x = buffer[: 2 * 3 * 16].reshape(2, 3, 4, 4)
    x[...] = backend.array(some(rng, x.shape))
    wrong = {
        "overlap": buffer[16:].reshape(2, 3, 4, 4),
        "shape": backend.xp.zeros((2, 3, 4, 5), np.float32),
        "dtype": backend.xp.zeros((2, 3, 4, 4)),
        "kind": np.zeros((2, 3, 4, 4), np.float32),
    }[out]
    before = backend.host(buffer)
    with pytest.raises((ValueError, TypeError)):
        bn(x, out=wrong)
    assert same_bits(backend.host(buffer), before)
    assert same_bits(backend.host(bn.running_mean), np.zeros(3, np.float32))
    assert int(bn.num_batches_tracked) == 0


def test_the_cumulative_average_follows_the_counter_on_the_device(rng, backend):
    bn = fastbn.BatchNorm2d(2, momentum=None, device=backend.device)
    means = []
    for _ in range(3):
        x = some(rng, (4, 2, 5, 5))
        bn(backend.array(x))
        means.append(reference.moments(x)[1])
    support.assert_close(backend.host(bn.running_mean), np.mean(means, axis=0), 1e-6)
    assert int(bn.num_batches_tracked) == 3


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))]
)
def test_copies_and_pickles_keep_state_and_device(rng, backend, duplicate):
    bn = fastbn.BatchNorm2d(3, device=backend.device)
    x = backend.array(some(rng, (4, 3, 5, 5)))
    bn(x)
    other = duplicate(bn)
    assert same_bits(backend.host(other.eval()(x)), backend.host(bn.eval()(x)))


def test_a_lazy_layer_takes_its_channels_from_an_array_of_the_device(rng, backend):
    bn = fastbn.LazyBatchNorm2d(device=backend.device)
    bn(backend.array(some(rng, (4, 3, 5, 5))))
    assert type(bn) is fastbn.BatchNorm2d
    assert isinstance(bn.weight, backend.xp.ndarray)


@by_host_layout
@each("eps", [1e-5, 0.0])
def test_instances_without_two_valid_positions(rng, backend, layout, eps):
    x, mask = some(rng, (4, 3, 5, 7)), np.ones((4, 1, 5, 7), bool)
    mask[1], mask[2], mask[2, 0, 0, 3] = False, False, True
    norm = fastbn.InstanceNorm2d(3, eps, track_running_stats=True, device=backend.device)
    a, own_mask = backend.array(layout(spoilt(x, mask))), backend.array(mask)
    y = backend.host(norm(a, mask=own_mask))
    dx = backend.host(norm.backward(a))
    assert (left_out(y, mask) == 0).all()
    assert (left_out(dx, mask) == 0).all()
    assert (y[2, :, 0, 3] == 0).all() if eps else np.isnan(y[2, :, 0, 3]).all()
    moved = []
    for n in (0, 3):
        sample = x[n : n + 1]
        support.assert_close(y[n : n + 1], reference.forward(sample, eps=eps), 1e-5)
        moved.append(reference.updated(sample, np.zeros(3), np.ones(3), 0.1))
    means = [sum(values) / 2 for values in zip(*moved, strict=True)]
    support.assert_close(backend.host(norm.running_mean), means[0], 1e-6)
    support.assert_close(backend.host(norm.running_var), means[1], 1e-6)


# Group normalization.


def own(norm, backend, **arrays):
    """A layer on the backend, with these parameters."""
    for name, values in arrays.items():
        getattr(norm, name)[...] = backend.array(values)
    return norm


@by_shape(
    (4, 6), (3, 6, 5), (2, 36, 7, 7), (3, 4, 131, 7), (2, 6, 2, 3, 4), large=[(9, 64, 56, 56)]
)
@by_dense_layout
@each("in_place", [False, True])
@each("masked", [False, True])
def test_groups_of_channels_are_normalized_by_themselves(
    rng, backend, dtype, shape, layout, in_place, masked
):
    x, dy, weight, bias = case(rng, shape, dtype)
    weight[-1] = 0.0
    groups, mask = 2, None
    norm = fastbn.GroupNorm(groups, shape[1], device=backend.device)
    norm = own(norm, backend, weight=weight, bias=bias)
    if masked:
        mask = backend.array(np.ones((shape[0], 1, *shape[2:]), bool))
    a, b = layout(backend, x), layout(backend, dy)
    y = backend.host(norm(a, out=a if in_place else None, mask=mask))
    dx = norm.backward(b, out=b if in_place else None)
    assert not in_place or dx is b
    mean, var = reference.group_moments(x, groups)
    exact = reference.group_norm(x, groups, weight, bias)
    offset = (np.abs(mean) / np.sqrt(var)).max(axis=0)
    bound = reference.forward_bound(exact, dtype, weight, bias, offset)
    # Where the affine map is a step of its own, the normalized values are rounded before it.
    support.assert_within(y, exact, 2 * bound)
    expected = reference.group_norm_backward(dy, x, groups, weight)
    of_samples = 1 / np.sqrt(var.min() + 1e-5)
    relative = {2: 1e-2, 4: 1e-5, 8: 1e-12}[dtype.itemsize]
    size = relative * of_samples * np.abs(dy.astype(float)).max() * np.abs(weight).max()
    support.assert_within(backend.host(dx), expected[0], size)
    for actual, sums in zip((norm.weight_grad, norm.bias_grad), expected[1:], strict=True):
        scale = 1 + np.abs(dy.astype(float)).sum()
        support.assert_within(backend.host(actual), sums, 1e-5 * scale)


@by_dense_layout
def test_groups_at_valid_positions(rng, backend, layout):
    x, dy, weight, bias = case(rng, (4, 6, 5, 7))
    mask = some_mask(rng, x.shape)
    norm = own(fastbn.GroupNorm(2, 6, device=backend.device), backend, weight=weight, bias=bias)
    a, b = (layout(backend, spoilt(v, mask)) for v in (x, dy))
    y, dx = backend.host(norm(a, mask=backend.array(mask))), backend.host(norm.backward(b))
    assert (left_out(y, mask) == 0).all()
    assert (left_out(dx, mask) == 0).all()
    for n in range(len(x)):
        own_mask = mask[n : n + 1]
        if not own_mask.any():
            continue
        valid, valid_dy, actual, gradient = (
            gathered(v[n : n + 1], own_mask).T[np.newaxis] for v in (x, dy, y, dx)
        )
        support.assert_close(actual, reference.group_norm(valid, 2, weight, bias), 1e-5)
        expected = reference.group_norm_backward(valid_dy, valid, 2, weight)[0]
        support.assert_close(gradient, expected, 1e-5)


# Masks.


@by_host_layout
@masked_shapes
@each("in_place", [False, True])
def test_a_training_step_is_that_of_what_counts(rng, backend, dtype, shape, layout, in_place):
    x, dy = (
        layout(some(rng, shape, dtype)),
        layout(some(rng, shape, dtype, mean=0)),
    )
    mask, (weight, bias) = some_mask(rng, shape), parameters(shape[1])
    own_mask, own_weight = backend.array(mask), backend.array(weight)
    a, b = backend.array(spoilt(x, mask)), backend.array(spoilt(dy, mask, np.inf))
    _, mean, invstd = F.batch_norm_forward(a, mask=own_mask)
    gradients = F.batch_norm_backward(
        b, a, own_weight, mean, invstd, mask=own_mask, out=b if in_place else None
    )
    out = a if in_place else None
    y = F.batch_norm_forward(a, own_weight, backend.array(bias), mask=own_mask, out=out)[0]
    y = backend.host(y)
    kept, kept_dy = gathered(x, mask), gathered(dy, mask)
    exact = reference.forward(kept, weight, bias)
    _, exact_mean, exact_var = reference.moments(kept)
    offset = np.abs(exact_mean) / np.sqrt(exact_var)
    bound = reference.forward_bound(exact, dtype, weight, bias, offset)
    support.assert_within(gathered(y, mask), exact, bound)
    assert (left_out(y, mask) == 0).all()
    dx, *sums = (backend.host(array) for array in gradients)
    exact = reference.backward(kept_dy, kept, weight)
    bounds = reference.gradient_bounds(kept_dy, kept, dtype, exact_mean, exact_var, weight)
    for actual, expected, bound in zip((gathered(dx, mask), *sums), exact, bounds, strict=True):
        support.assert_within(actual, expected, bound + reference.ulp(expected, actual.dtype))
    assert (left_out(dx, mask) == 0).all()


@by_host_layout
@masked_shapes
@each("garbage", [np.nan, 1e30])
def test_what_does_not_count_costs_no_digit_of_data_far_from_zero(
    rng, backend, shape, layout, garbage
):
    x, mask = layout(some(rng, shape, mean=1e6, std=1)), some_mask(rng, shape)
    mask[: shape[0] // 3 + 1] = False  # the first threads and blocks have nothing
    mask[-1] = True
    count, mean, m2 = F.batch_norm_stats(
        backend.array(spoilt(x, mask, garbage)), backend.array(mask)
    )
    exact_count, exact_mean, exact_var = reference.moments(gathered(x, mask))
    assert count == exact_count
    support.assert_within(backend.host(mean), exact_mean, reference.ulp(exact_mean, np.float32))
    support.assert_within(backend.host(m2) / count, exact_var, reference.ulp(exact_var, np.float32))


@pytest.mark.sanitize
@by_host_layout
@masked_shapes
def test_the_primitives_compose_to_the_fused_functions(rng, backend, dtype, shape, layout):
    x, dy = (backend.array(layout(some(rng, shape, dtype))) for _ in range(2))
    mask, (weight, bias) = some_mask(rng, shape), map(backend.array, parameters(shape[1]))
    mask = backend.array(mask)
    count, mean, m2 = F.batch_norm_stats(x, mask)
    y, fused_mean, invstd = F.batch_norm_forward(x, weight, bias, mask=mask)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd, mask=mask)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, count, mask=mask)
    own_invstd = 1.0 / backend.xp.sqrt(m2 / count + 1e-5)
    own_y = F.batch_norm_elemt(x, mean, invstd, weight, bias, mask=mask)
    gradients = F.batch_norm_backward(dy, x, weight, mean, invstd, mask=mask)
    assert_composes(
        backend,
        (y, fused_mean, invstd, *gradients),
        (own_y, mean, own_invstd, dx, *sums[::-1]),
        dy,
        x,
    )


@by_host_layout
@masked_shapes
def test_a_mask_of_nothing_but_true_changes_nothing(rng, backend, dtype, shape, layout):
    x, dy = (backend.array(layout(some(rng, shape, dtype))) for _ in range(2))
    results = []
    for mask in (None, backend.xp.ones((shape[0], *[1] * (len(shape) - 1)), bool)):
        y, mean, invstd = F.batch_norm_forward(x, mask=mask)
        gradients = F.batch_norm_backward(dy, x, None, mean, invstd, mask=mask)
        results.append([backend.host(a) for a in (y, mean, invstd, *gradients)])
    if backend.device == "cpu":
        assert all(map(same_bits, *results))
    else:  # without a mask, channels-last arrays may stay on chip
        for actual, expected in zip(*results, strict=True):
            rounding = {2: 2.0**-8, 4: 2.0**-20, 8: 2.0**-40}[actual.itemsize]
            support.assert_close(actual, expected, rounding)


@each("shape", [(4, 1, 1, 7), (1, 1, 6, 7), (6, 7), (7,), (4, 1, 1, 1), ()])
def test_a_mask_broadcasts(rng, backend, shape):
    x, mask = backend.array(some(rng, (4, 3, 6, 7))), rng.random(shape) < 0.5
    mask.flat[0] = True
    full = np.broadcast_to(mask, (4, 1, 6, 7)).copy()
    y, expected = (F.batch_norm_forward(x, mask=backend.array(own))[0] for own in (mask, full))
    assert same_bits(backend.host(y), backend.host(expected))


def test_evaluation_writes_zeros_where_the_mask_is_false(rng, backend):
    x, mask = some(rng, (4, 3, 5, 6)), some_mask(rng, (4, 3, 5, 6))
    bn = fastbn.BatchNorm2d(3, device=backend.device).eval()
    y = backend.host(bn(backend.array(spoilt(x, mask)), mask=backend.array(mask)))
    assert same_bits(gathered(y, mask), gathered(backend.host(bn(backend.array(x))), mask))
    assert (left_out(y, mask) == 0).all()


def test_the_mask_may_be_overwritten_before_the_backward(rng, backend):
    x, mask = backend.array(some(rng, (4, 3, 5, 6))), backend.array(some_mask(rng, (4, 3, 5, 6)))
    bn, other = (fastbn.BatchNorm2d(3, device=backend.device) for _ in range(2))
    other(x, mask=mask)
    bn(x, mask=mask)
    mask[...] = True
    assert same_bits(backend.host(bn.backward(x)), backend.host(other.backward(x)))


def test_an_empty_batch_takes_a_mask_and_changes_nothing(backend):
    bn = fastbn.BatchNorm2d(3, device=backend.device)
    y = bn(backend.xp.zeros((0, 3, 5, 6), np.float32), mask=backend.xp.zeros((0, 1, 5, 6), bool))
    assert y.shape == (0, 3, 5, 6)
    assert int(bn.num_batches_tracked) == 0
    assert bn.backward(y).shape == y.shape


def state_of(backend, layer):
    """All bits of a layer."""
    return {name: backend.host(array).tobytes() for name, array in layer.state_dict().items()}


# What is no mask of an array of shape (4, 3, 5, 6), and what it is refused with.
NO_MASKS = {
    "nothing": (lambda xp: xp.zeros((4, 1, 5, 6), bool), ValueError, "no value"),
    "one": (
        lambda xp: xp.array(np.arange(120).reshape(4, 1, 5, 6) == 7),
        ValueError,
        "no value|more than 1 value",
    ),
    "channels": (lambda xp: xp.ones((4, 3, 5, 6), bool), ValueError, r"mask\[:, :1\]"),
    "shape": (lambda xp: xp.ones((4, 1, 5, 7), bool), ValueError, r"\(4, 1, 5, 6\)"),
    "dtype": (lambda xp: xp.ones((4, 1, 5, 6)), TypeError, "float64"),
}


@pytest.mark.parametrize(("make", "error", "message"), NO_MASKS.values(), ids=NO_MASKS)
@pytest.mark.parametrize("ghost_batch_size", [None, 2])
def test_a_mask_that_cannot_serve_is_refused_and_nothing_changes(
    rng, backend, make, error, message, ghost_batch_size
):
    bn = fastbn.BatchNorm2d(3, device=backend.device, ghost_batch_size=ghost_batch_size)
    x = backend.array(some(rng, (4, 3, 5, 6)))
    bn(x)
    before, bits = state_of(backend, bn), backend.host(x)
    if ghost_batch_size is None:
        message = message.removeprefix("no value|")
    with pytest.raises(error, match=message):
        bn(x, mask=make(backend.xp), out=x)
    assert state_of(backend, bn) == before
    assert same_bits(backend.host(x), bits)


# Ghost batches.


@pytest.mark.sanitize
@by_host_layout
@by_batches
@pytest.mark.parametrize(
    ("dtype", "masked", "momentum"),
    [(np.float32, False, 0.3), (np.float32, True, None), (np.float16, False, None)],
)
def test_ghost_batches_are_calls_on_one_part_after_the_other(
    rng, backend, dtype, shape, masked, momentum, layout
):
    size = shape[0] // 3  # and a rest of one or two samples
    kind = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}[len(shape)]
    plain = kind(shape[1], momentum=momentum, dtype=dtype, device=backend.device)
    ghosts = copy.deepcopy(plain)
    ghosts.ghost_batch_size = size
    x, dy = (backend.array(layout(some(rng, shape, dtype))) for _ in range(2))
    mask = rng.random((shape[0], 1, *shape[2:])) < 0.6
    mask[::size] = mask[-2:] = True
    mask = backend.array(mask) if masked else None
    y, dx = ghosts(x, mask=mask), ghosts.backward(dy)
    for first in range(0, shape[0], size):
        part = slice(first, first + size)
        y_part = plain(x[part], mask=None if mask is None else mask[part])
        assert same_bits(backend.host(y_part), backend.host(y[part]))
        assert same_bits(backend.host(plain.backward(dy[part])), backend.host(dx[part]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(backend.host(getattr(ghosts, name)), backend.host(getattr(plain, name)))
