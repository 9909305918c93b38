"""Masks on a GPU: what they leave out counts for nothing, and layers do as on the CPU."""

import numpy as np
import pytest
from cases import each
from gpu import SIMULATED, assert_alike, cupy, on_both, simulated, step, to_gpu
from internals import alone_on_its_rank
from kinds import OneRank
from support import (
    channels_last,
    contiguous,
    parameters,
    same_bits,
    some,
    some_mask,
    spoilt,
)

import fastbn
from fastbn import functional as F

BOTH = each("layout", [contiguous, channels_last])
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


@pytest.mark.slow
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


# Layers.


@BOTH
@each("in_place", [False, True])
@each("freeze", [False, True])
@each("options", [{}, {"momentum": None}, {"ghost_batch_size": 4}])
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
@each("in_place", [False, True])
@each("options", [{}, {"affine": True, "track_running_stats": True}])
def test_instance_normalization(rng, options, in_place, layout):
    layer = fastbn.InstanceNorm2d(20, **options)
    x, dy = layout(some(rng, (4, 20, 7, 6))), layout(some(rng, (4, 20, 7, 6)))
    mask = rng.random((4, 1, 7, 6)) < 0.7
    assert_alike(
        step(each, a, b, in_place, mask=each_mask)
        for each, a, b, each_mask in on_both(layer, x, dy, mask)
    )


def test_synchronization_moments_and_recalibration(rng, monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())
    x, dy = some(rng, (8, 3, 5, 6)), some(rng, (8, 3, 5, 6))
    mask, results = some_mask(rng, x.shape), []
    for layer, a, b, own_mask in on_both(fastbn.BatchNorm2d(3), spoilt(x, mask), dy, mask):
        with fastbn.recalibrate(layer):
            layer(a, mask=own_mask)
        moments = fastbn.Moments.of(a, own_mask)
        assert moments.count == mask.sum()
        trained = step(fastbn.convert_sync_batchnorm(layer, OneRank()), a, b, mask=own_mask)
        results.append([moments.mean, moments.m2, *trained])
    assert_alike(results)


# Errors.


def state_of(layer):
    """All bits of a layer."""
    return {name: array.get().tobytes() for name, array in layer.state_dict().items()}


@pytest.mark.parametrize("mask", [np.ones((4, 1, 5, 6), bool), [True]], ids=["NumPy", "list"])
@pytest.mark.parametrize("ghost_batch_size", [None, 2])
def test_a_mask_of_another_kind_is_refused_and_nothing_changes(rng, mask, ghost_batch_size):
    bn = fastbn.BatchNorm2d(3, device="cuda", ghost_batch_size=ghost_batch_size)
    x = to_gpu(some(rng, (4, 3, 5, 6)))
    bn(x)
    before, bits = state_of(bn), x.get()
    with pytest.raises(TypeError, match="mask must be a CuPy array"):
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
