"""Masks on a GPU: what they leave out counts for nothing, and layers do as on the CPU."""

import numpy as np
import pytest
import reference
import support
from gpu import SIMULATED, OneRank, assert_alike, cupy, on_both, simulated, step, to_gpu
from support import (
    channels_last,
    contiguous,
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

BOTH = pytest.mark.parametrize("layout", [contiguous, channels_last])
# As in test_cuda.py; those of the second device are summed in pieces.
CASES = [
    (0, (6, 3)),
    (0, (3, 2, 5)),
    (0, (5, 33, 7, 7)),
    (0, (68, 2, 32, 32)),
    (0, (260, 70, 1, 1)),
    (0, (90, 70, 3, 3)),
    (0, (2, 3, 2, 3, 4)),
    *([(1, (68, 2, 32, 32)), (1, (9, 2, 81, 79))] if SIMULATED else [(0, (150, 2, 96, 96))]),
]
by_shape = pytest.mark.parametrize(("device", "shape"), CASES, indirect=["device"], ids=str)
DTYPES = [np.dtype(name) for name in ("float16", "float32", "float64")]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("device")


@BOTH
@by_shape
@by_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_a_training_step_is_that_of_what_counts(rng, dtype, shape, layout, in_place):
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype, mean=0))
    mask, (weight, bias) = some_mask(rng, shape), parameters(shape[1])
    on_gpu, gpu_weight = to_gpu(mask), to_gpu(weight)
    a, b = to_gpu(spoilt(x, mask)), to_gpu(spoilt(dy, mask, np.inf))
    _, mean, invstd = F.batch_norm_forward(a, mask=on_gpu)
    gradients = F.batch_norm_backward(
        b, a, gpu_weight, mean, invstd, mask=on_gpu, out=b if in_place else None
    )
    y = F.batch_norm_forward(a, gpu_weight, to_gpu(bias), mask=on_gpu, out=a if in_place else None)[
        0
    ].get()
    kept, kept_dy = gathered(x, mask), gathered(dy, mask)
    exact = reference.forward(kept, weight, bias)
    _, exact_mean, exact_var = reference.moments(kept)
    offset = np.abs(exact_mean) / np.sqrt(exact_var)
    bound = reference.forward_bound(exact, dtype, weight, bias, offset)
    support.assert_within(gathered(y, mask), exact, bound)
    assert (left_out(y, mask) == 0).all()
    dx, *sums = (array.get() for array in gradients)
    exact = reference.backward(kept_dy, kept, weight)
    bounds = reference.gradient_bounds(kept_dy, kept, dtype, exact_mean, exact_var, weight)
    for actual, expected, bound in zip((gathered(dx, mask), *sums), exact, bounds, strict=True):
        support.assert_within(actual, expected, bound + reference.ulp(expected, actual.dtype))
    assert (left_out(dx, mask) == 0).all()


@BOTH
@by_shape
@pytest.mark.parametrize("garbage", [np.nan, 1e30])
def test_what_does_not_count_costs_no_digit_of_data_far_from_zero(rng, shape, layout, garbage):
    x, mask = layout(some(rng, shape, mean=1e6, std=1)), some_mask(rng, shape)
    mask[: shape[0] // 3 + 1] = False  # the first threads and blocks have nothing
    mask[-1] = True
    count, mean, m2 = F.batch_norm_stats(to_gpu(spoilt(x, mask, garbage)), to_gpu(mask))
    exact_count, exact_mean, exact_var = reference.moments(gathered(x, mask))
    assert count == exact_count
    support.assert_within(mean.get(), exact_mean, reference.ulp(exact_mean, np.float32))
    support.assert_within(m2.get() / count, exact_var, reference.ulp(exact_var, np.float32))


@pytest.mark.sanitize
@BOTH
@by_shape
@by_dtype
def test_the_primitives_compose_to_the_fused_functions(rng, dtype, shape, layout):
    x, dy = (to_gpu(layout(some(rng, shape, dtype))) for _ in range(2))
    mask, (weight, bias) = to_gpu(some_mask(rng, shape)), map(to_gpu, parameters(shape[1]))
    count, mean, m2 = F.batch_norm_stats(x, mask)
    y, fused_mean, invstd = F.batch_norm_forward(x, weight, bias, mask=mask)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd, mask=mask)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, count, mask=mask)
    own_invstd = 1.0 / cupy.sqrt(m2 / count + 1e-5)
    composed = [mean, own_invstd, F.batch_norm_elemt(x, mean, invstd, weight, bias, mask=mask)]
    fused = F.batch_norm_backward(dy, x, weight, mean, invstd, mask=mask)
    for one, other in zip(
        (fused_mean, invstd, y, *fused), (*composed, dx, *sums[::-1]), strict=True
    ):
        assert same_bits(one.get(), other.get())


@BOTH
@by_shape
@by_dtype
def test_a_mask_of_nothing_but_true_changes_no_bit(rng, dtype, shape, layout):
    x, dy = (to_gpu(layout(some(rng, shape, dtype))) for _ in range(2))
    results = []
    for mask in (None, cupy.ones((shape[0], *[1] * (len(shape) - 1)), bool)):
        y, mean, invstd = F.batch_norm_forward(x, mask=mask)
        gradients = F.batch_norm_backward(dy, x, None, mean, invstd, mask=mask)
        results.append([a.get() for a in (y, mean, invstd, *gradients)])
    assert all(map(same_bits, *results))


@simulated
@by_shape
def test_the_order_of_threads_and_blocks_changes_no_bit(rng, shape):
    x, dy = (to_gpu(some(rng, shape)) for _ in range(2))
    mask, results = to_gpu(some_mask(rng, shape)), []
    for number in range(4):
        with cupy.schedule(number):
            y, mean, invstd = F.batch_norm_forward(x, mask=mask)
            gradients = F.batch_norm_backward(dy, x, None, mean, invstd, mask=mask)
        results.append([a.get() for a in (y, mean, invstd, *gradients)])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize("shape", [(4, 1, 1, 7), (1, 1, 6, 7), (6, 7), (7,), (4, 1, 1, 1), ()])
def test_a_mask_broadcasts(rng, shape):
    x, mask = to_gpu(some(rng, (4, 3, 6, 7))), rng.random(shape) < 0.5
    mask.flat[0] = True
    full = np.broadcast_to(mask, (4, 1, 6, 7)).copy()
    y, expected = (F.batch_norm_forward(x, mask=to_gpu(each))[0] for each in (mask, full))
    assert same_bits(y.get(), expected.get())


# Layers.


@BOTH
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"ghost_batch_size": 4}], ids=str)
def test_a_layer_does_what_it_does_on_the_cpu(rng, options, freeze, in_place, layout):
    layer = fastbn.BatchNorm2d(5, **options)
    layer.weight[:], layer.bias[:] = parameters(5)
    layer.weight[2] = 0  # cannot be recovered from the output
    if freeze:
        layer.freeze()
    x, dy = layout(some(rng, (11, 5, 6, 7))), layout(some(rng, (11, 5, 6, 7)))
    mask = rng.random((11, 1, 6, 7)) < 0.5
    x, dy = spoilt(x, mask), spoilt(dy, mask)
    relative = 1e-4 if in_place else 1e-5
    assert_alike(
        (
            step(each, a, b, in_place, mask=each_mask)
            for each, a, b, each_mask in on_both(layer, x, dy, mask)
        ),
        relative,
    )


@BOTH
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": True, "track_running_stats": True}], ids=str)
def test_instance_normalization(rng, options, in_place, layout):
    layer = fastbn.InstanceNorm2d(20, **options)
    x, dy = layout(some(rng, (4, 20, 7, 6))), layout(some(rng, (4, 20, 7, 6)))
    mask = rng.random((4, 1, 7, 6)) < 0.7
    assert_alike(
        step(each, a, b, in_place, mask=each_mask)
        for each, a, b, each_mask in on_both(layer, x, dy, mask)
    )


def test_synchronization_moments_and_recalibration(rng, monkeypatch):
    for name in ("mpi", "_record_type", "_operation"):
        monkeypatch.setattr(f"fastbn._mpi.{name}", lambda *_: OneRank())
    x, dy = some(rng, (8, 3, 5, 6)), some(rng, (8, 3, 5, 6))
    mask, results = some_mask(rng, x.shape), []
    for layer, a, b, each in on_both(fastbn.BatchNorm2d(3), spoilt(x, mask), dy, mask):
        with fastbn.recalibrate(layer):
            layer(a, mask=each)
        moments = fastbn.Moments.of(a, each)
        assert moments.count == mask.sum()
        trained = step(fastbn.convert_sync_batchnorm(layer, OneRank()), a, b, mask=each)
        results.append([moments.mean, moments.m2, *trained])
    assert_alike(results)


def test_evaluation_writes_zeros_where_the_mask_is_false(rng):
    x, mask = some(rng, (4, 3, 5, 6)), some_mask(rng, (4, 3, 5, 6))
    bn = fastbn.BatchNorm2d(3, device="cuda").eval()
    y = bn(to_gpu(spoilt(x, mask)), mask=to_gpu(mask)).get()
    assert same_bits(gathered(y, mask), gathered(bn(to_gpu(x)).get(), mask))
    assert (left_out(y, mask) == 0).all()


def test_the_mask_may_be_overwritten_before_the_backward(rng):
    x, mask = to_gpu(some(rng, (4, 3, 5, 6))), to_gpu(some_mask(rng, (4, 3, 5, 6)))
    bn, other = (fastbn.BatchNorm2d(3, device="cuda") for _ in range(2))
    other(x, mask=mask)
    bn(x, mask=mask)
    mask[...] = True
    assert same_bits(bn.backward(x).get(), other.backward(x).get())


def test_an_empty_batch_takes_a_mask_and_changes_nothing():
    bn = fastbn.BatchNorm2d(3, device="cuda")
    y = bn(cupy.zeros((0, 3, 5, 6), np.float32), mask=cupy.zeros((0, 1, 5, 6), bool))
    assert y.shape == (0, 3, 5, 6)
    assert int(bn.num_batches_tracked) == 0
    assert bn.backward(y).shape == y.shape


# Errors.


def state_of(layer):
    """All bits of a layer."""
    return {name: array.get().tobytes() for name, array in layer.state_dict().items()}


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (cupy.zeros((4, 1, 5, 6), bool), ValueError, "no value"),
        (cupy.array(np.arange(120).reshape(4, 1, 5, 6) == 7), ValueError, "more than 1 value"),
        (cupy.ones((4, 3, 5, 6), bool), ValueError, r"mask\[:, :1\]"),
        (cupy.ones((4, 1, 5, 7), bool), ValueError, r"\(4, 1, 5, 6\)"),
        (cupy.ones((4, 1, 5, 6)), TypeError, "float64"),
        (np.ones((4, 1, 5, 6), bool), TypeError, "mask must be a CuPy array"),
        ([True], TypeError, "mask must be a CuPy array"),
    ],
)
@pytest.mark.parametrize("ghost_batch_size", [None, 2])
def test_a_mask_that_cannot_serve_is_refused_and_nothing_changes(
    rng, mask, error, message, ghost_batch_size
):
    bn = fastbn.BatchNorm2d(3, device="cuda", ghost_batch_size=ghost_batch_size)
    x = to_gpu(some(rng, (4, 3, 5, 6)))
    bn(x)
    before, bits = state_of(bn), x.get()
    if ghost_batch_size and message == "more than 1 value":
        message = "no value|more than 1 value"
    with pytest.raises(error, match=message):
        bn(x, mask=mask, out=x)
    assert state_of(bn) == before
    assert same_bits(x.get(), bits)


def test_a_mask_on_a_gpu_does_not_serve_an_array_on_the_cpu(rng):
    with pytest.raises(TypeError, match="mask must be a NumPy array"):
        fastbn.BatchNorm2d(3)(some(rng, (4, 3, 5, 6)), mask=cupy.ones((4, 1, 5, 6), bool))


@simulated
@BOTH
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counting", [0, 1, 2])
def test_a_captured_batch_that_has_too_little_moves_no_running_statistics(
    rng, counting, momentum, layout
):
    bn = fastbn.BatchNorm2d(3, momentum=momentum, device="cuda")
    x, mask = to_gpu(layout(some(rng, (4, 3, 5, 6)))), np.zeros((4, 1, 5, 6), bool)
    mask.flat[:counting] = True
    before, mask = state_of(bn), to_gpu(mask)
    with cupy.capturing():
        y = bn(x, mask=mask)
        dx = bn.backward(x)
    assert (state_of(bn) == before) == (counting < 2)
    assert int(bn.num_batches_tracked) == (counting == 2)
    for result in (y, dx):
        assert np.isfinite(result.get()).all()
