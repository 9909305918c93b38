"""Layers with activations and residuals: forward and backward, in place, copies, tools."""

import activated
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same_bits, some

import fastbn

pytestmark = pytest.mark.isa

BATCH_NORMS = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}
BATCH_NORMS[5] = fastbn.BatchNorm3d
INSTANCE_NORMS = {3: fastbn.InstanceNorm1d, 4: fastbn.InstanceNorm2d, 5: fastbn.InstanceNorm3d}


def layer_of(case, lazy=False):
    """A layer in training mode, of float64, that does what a case tells."""
    channels, rank = case.x.shape[1], case.x.ndim
    options = {"activation": case.activation, "negative_slope": case.slope, "dtype": np.float64}
    if case.groups:
        layer = fastbn.GroupNorm(case.groups, channels, **options)
    elif case.batch_size == 1:
        layer = INSTANCE_NORMS[rank](channels, affine=True, **options)
    else:
        layer = BATCH_NORMS[rank](channels, ghost_batch_size=case.batch_size, **options)
    if case.weight is None:
        layer.weight = None
    else:
        layer.weight[:] = case.weight
    if case.bias is None:
        layer.bias = None
    else:
        layer.bias[:] = case.bias
    if case.running is not None:
        layer.running_mean[:], layer.running_var[:] = case.running
        layer.freeze()
    return layer


@settings(max_examples=250)
@given(st.data())
def test_a_step_is_that_of_the_formulas(data):
    case, dy = data.draw(activated.cases())
    expected, bounds = activated.expected(case, dy)
    layer, x, residual = layer_of(case), case.x, case.residual
    out = data.draw(activated.outputs(x, residual))
    y = layer(x, out=out, mask=case.mask, residual=residual)
    assert out is None or y is out
    y = y.copy()
    if residual is None:
        dx, dresidual = layer.backward(dy, out=data.draw(activated.outputs(dy, None))), None
    else:
        residual_out = data.draw(activated.outputs(dy, None))
        dx, dresidual = layer.backward(dy, residual_out=residual_out)
        assert residual_out is None or dresidual is residual_out
    if out is x:
        bounds = inverted(bounds, x.dtype)
    gradients = dx, layer.weight_grad, layer.bias_grad, dresidual
    activated.assert_step((y, *gradients), expected, bounds)


def inverted(bounds, dtype):
    """Bounds of gradients where what was normalized is recovered from a rounded output."""
    factor = {"float16": 3e3, "bfloat16": 2e4}.get(dtype.name, 1)
    return bounds._replace(dx=factor * bounds.dx, dweight=factor * bounds.dweight)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 5), (3, 2, 4, 5)], ids=str)
def test_a_sample_without_an_axis_of_samples_is_a_batch_of_one(rng, shape, masked, in_place):
    x, dy, residual = (some(rng, shape) for _ in range(3))
    mask = np.arange(x[0].size).reshape(1, 1, *shape[1:]) > 2 if masked else None
    batch, single = (
        INSTANCE_NORMS[len(shape) + 1](3, affine=True, activation="relu6") for _ in range(2)
    )
    expected = batch(x[np.newaxis], mask=mask, residual=residual[np.newaxis])
    place = x.copy() if in_place else None
    y = single(x if place is None else place, out=place, mask=mask, residual=residual)
    assert same_bits(y, expected[0])
    for into in (None, np.empty_like(x), dy.copy()):
        if into is not None:
            batch(x[np.newaxis], mask=mask, residual=residual[np.newaxis])
            single(x, mask=mask, residual=residual)
        gradient = dy if into is None else into
        gradient[...] = dy
        expected = batch.backward(dy[np.newaxis])
        results = single.backward(gradient, residual_out=into)
        assert into is None or results[1] is into
        assert same_bits(results[0], expected[0][0])
        assert same_bits(results[1], expected[1][0])
