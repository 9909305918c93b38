"""Activations and residuals on every backend, against the formulas."""

import activated
import numpy as np
import pytest
import reference
import support
from activated import ACTIVATIONS
from cases import each, in_pairs
from support import channels_last, contiguous, parameters, refused, same_bits, some, some_mask

import fastbn
from fastbn import functional as F

SHAPE = (6, 4, 5, 7)
KINDS = {
    "batch": (fastbn.BatchNorm2d, {}),
    "ghost": (
        lambda c, **options: fastbn.BatchNorm2d(c, ghost_batch_size=2, **options),
        {"batch_size": 2},
    ),
    "instance": (
        lambda c, **options: fastbn.InstanceNorm2d(c, affine=True, **options),
        {"batch_size": 1},
    ),
    "group": (lambda c, **options: fastbn.GroupNorm(2, c, **options), {"groups": 2}),
    "frozen": (
        lambda c, **options: fastbn.BatchNorm2d(c, **options).freeze(),
        {"running": (np.zeros(4), np.ones(4))},
    ),
}
LAYOUTS, BOTH = [contiguous, channels_last], [False, True]
by_activation = each("activation, slope", ACTIVATIONS[1:])
by_layout = each("layout", LAYOUTS)
by_kind = pytest.mark.parametrize(("make", "parts"), KINDS.values(), ids=KINDS)
added_or_not = each("added", BOTH)


def case_of(rng, dtype, activation, slope, added, masked, layout, **parts):
    """A case, and a dy of which no element depends on how a value beside a kink is rounded."""
    x, dy, residual = (layout(some(rng, SHAPE, dtype, mean)) for mean in (0.5, 0.0, 0.3))
    mask = np.ones((6, 1, 5, 7), bool)
    mask[:, :, 2:, 1::2] = False
    case = activated.Case(
        x,
        *(3 * vector for vector in parameters(4)),
        activation=activation,
        slope=slope,
        residual=residual if added else None,
        mask=mask if masked else None,
        **parts,
    )
    return case, activated.decided(case, dy)


def on(backend, array):
    return None if array is None else backend.array(array)


def hosts(backend, arrays):
    return [None if a is None else backend.host(a) for a in arrays]


@by_kind
@each(
    "activation, layout, in_place, added, masked",
    in_pairs(ACTIVATIONS[1:], LAYOUTS, BOTH, BOTH, BOTH),
)
def test_a_step_of_a_layer(
    rng, backend, dtype, make, parts, activation, layout, in_place, added, masked
):
    activation, slope = activation
    case, dy = case_of(rng, dtype, activation, slope, added, masked, layout, **parts)
    expected, bounds = activated.expected(case, dy)
    layer = make(4, activation=activation, negative_slope=slope, device=backend.device)
    layer.weight[...], layer.bias[...] = on(backend, case.weight), on(backend, case.bias)
    x, gradient = on(backend, case.x), on(backend, dy)
    residual, mask = on(backend, case.residual), on(backend, case.mask)
    y = layer(x, out=x if in_place else None, mask=mask, residual=residual)
    assert not in_place or y is x
    y = backend.host(y)
    if added:
        dx, dresidual = layer.backward(gradient, residual_out=gradient)
        assert dresidual is gradient
    else:
        dx, dresidual = layer.backward(gradient, out=gradient), None
        assert dx is gradient
    if in_place:
        bounds = activated.inverted(bounds, dtype)
    bounds = activated.stored(bounds, expected, layer.weight.dtype)
    gradients = dx, layer.weight_grad, layer.bias_grad, dresidual
    activated.assert_step([y, *hosts(backend, gradients)], expected, bounds)


@by_kind
@each("layout, in_place, fused, masked", in_pairs(LAYOUTS, BOTH, BOTH, BOTH))
def test_a_step_of_a_layer_near_the_largest_values(
    rng, backend, dtype, make, parts, layout, in_place, fused, masked
):
    added, activation = (True, "relu") if fused else (False, None)
    case, dy = activated.near_the_largest(rng, SHAPE, dtype, activation=activation, **parts)
    if case.running:
        case = case._replace(running=activated.statistics_near_the_largest(4, dtype))
    case = case._replace(
        x=layout(case.x),
        residual=layout((case.x / 500).astype(dtype)) if added else None,
        mask=rng.random((6, 1, 5, 7)) < 0.8 if masked else None,
    )
    dy = activated.decided(case, layout(dy))
    expected, bounds = activated.expected(case, dy)
    layer = make(4, activation=activation, device=backend.device, dtype=np.float64)
    layer.weight[...], layer.bias[...] = on(backend, case.weight), on(backend, case.bias)
    if case.running:
        layer.running_mean[...], layer.running_var[...] = (on(backend, v) for v in case.running)
    x, gradient = on(backend, case.x), on(backend, dy)
    residual, mask = on(backend, case.residual), on(backend, case.mask)
    y = backend.host(layer(x, out=x if in_place else None, mask=mask, residual=residual))
    results = layer.backward(gradient)
    dx, dresidual = results if added else (results, None)
    if in_place:
        bounds = activated.inverted(bounds, dtype)
    gradients = dx, layer.weight_grad, layer.bias_grad, dresidual
    activated.assert_step([y, *hosts(backend, gradients)], expected, bounds)


@each(
    "activation, layout, added, masked, size",
    in_pairs(ACTIVATIONS[1:], LAYOUTS, BOTH, BOTH, [None, 2]),
)
def test_a_backward_of_functions(rng, backend, dtype, activation, layout, added, masked, size):
    activation, slope = activation
    parts = {"batch_size": size}
    case, dy = case_of(rng, dtype, activation, slope, added, masked, layout, **parts)
    expected, bounds = activated.expected(case, dy)
    x, gradient, residual, weight, bias, mask = (
        on(backend, a) for a in (case.x, dy, case.residual, case.weight, case.bias, case.mask)
    )
    options = {"activation": activation, "negative_slope": slope, "mask": mask}
    options |= {"ghost_batch_size": size, "residual": residual}
    y, mean, invstd = F.batch_norm_forward(x, weight, bias, **options)
    for told in ({"bias": bias}, {"y": y}):
        if "y" in told and slope < 0:
            continue
        results = F.batch_norm_backward(gradient, x, weight, mean, invstd, **told, **options)
        activated.assert_step(hosts(backend, (y, *results)), expected, bounds)


@by_activation
@by_layout
@added_or_not
def test_evaluation(rng, backend, dtype, activation, slope, layout, added):
    running = rng.normal(0, 1, 4), rng.uniform(0.5, 4, 4)
    case, dy = case_of(rng, dtype, activation, slope, added, False, layout, running=running)
    exact, bound = (step.y for step in activated.expected(case, dy))
    options = {"activation": activation, "negative_slope": slope}
    for place in ("none", "x", "residual"):
        x, residual = on(backend, case.x), on(backend, case.residual)
        out = {"none": None, "x": x, "residual": residual}[place]
        vectors = (on(backend, v) for v in (*running, case.weight, case.bias))
        y = F.batch_norm(x, *vectors, **options, residual=residual, out=out)
        assert out is None or y is out
        support.assert_within(backend.host(y), exact, bound)


@by_activation
def test_what_is_no_number_passes_through(backend, dtype, activation, slope):
    z = np.resize([np.nan, np.inf, -np.inf, 0.0, 6.0, 3.0, -3.0, 9.0], (40, 1)).astype(dtype)
    x, nothing = on(backend, z), on(backend, np.zeros_like(z))
    statistics = on(backend, np.zeros(1)), on(backend, np.ones(1))
    options = {"activation": activation, "negative_slope": slope}
    y = backend.host(F.batch_norm(x, *statistics, eps=0.0, **options))
    # The slope is rounded to the type of element-wise arithmetic.
    arithmetic = np.float64 if dtype.itemsize == 8 else np.float32
    with np.errstate(all="ignore"):
        exact = reference.activate(z, activation, arithmetic(slope)).astype(float)
        np.testing.assert_array_equal(y.astype(float), exact.astype(dtype).astype(float))
    dy = on(backend, np.full_like(z, 2))
    dresidual = F.batch_norm_backward(
        dy, x, None, *statistics, bias=None, residual=nothing, **options
    )[3]
    exact = 2 * reference.derivative(z, activation, slope)
    support.assert_close(backend.host(dresidual), exact, {2: 1e-2}.get(dtype.itemsize, 1e-7))


@by_kind
@by_layout
def test_invalid_positions_of_the_residual_are_not_looked_at(rng, backend, make, parts, layout):
    x, dy, residual = (layout(some(rng, SHAPE)) for _ in range(3))
    mask = some_mask(rng, SHAPE)
    mask[:, :, 0, :2] = True
    results = []
    for value in (0.0, np.nan, np.inf):
        layer = make(4, activation="relu", device=backend.device)
        arrays = (on(backend, support.spoilt(a, mask, value)) for a in (x, dy, residual))
        a, gradient, added = arrays
        y = layer(a, mask=on(backend, mask), residual=added)
        results.append(hosts(backend, [y, *layer.backward(gradient), layer.weight_grad]))
        for array in results[-1][:3]:
            assert (support.left_out(array, mask) == 0).all()
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


def test_a_residual_of_another_kind_is_refused(rng, backend):
    if backend.device == "cpu":
        pytest.skip("needs an array of a GPU")
    host, x = some(rng, SHAPE), on(backend, some(rng, SHAPE))
    layer = fastbn.BatchNorm2d(4, device=backend.device)
    with refused(TypeError, "residual must be a CuPy array", "cupy.asarray(residual)"):
        layer(x, residual=host)
    with refused(TypeError, "residual must be a NumPy array", "cupy.asnumpy(residual)"):
        fastbn.BatchNorm2d(4)(host, residual=x)
    layer(x, residual=x)
    with refused(TypeError, "residual_out must be a CuPy array"):
        layer.backward(x, residual_out=host)
