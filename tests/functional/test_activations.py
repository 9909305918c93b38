"""Functions with activations and residuals: against the formulas, to the bit, and at the kinks."""

import itertools

import activated
import numpy as np
import pytest
import reference
import support
from activated import ACTIVATIONS
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same_bits, some, some_mask

from fastbn import functional as F

pytestmark = pytest.mark.isa

by_activation = pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS[1:], ids=str)
LAYOUTS = [support.contiguous, support.channels_last, support.sliced, support.byte_swapped]
by_layout = each("layout", LAYOUTS)


def options_of(case):
    return {"activation": case.activation, "negative_slope": case.slope}


@settings(max_examples=150)
@given(st.data())
def test_a_forward_and_its_backward_are_those_of_the_formulas(data):
    case, dy = data.draw(activated.cases(kinds=["batch", "ghost"]))
    tells = data.draw(st.sampled_from(["bias", "y", "both"]))
    if case.slope < 0:
        tells = "bias"
    expected, bounds = activated.expected(case, dy)
    x, residual, options = case.x, case.residual, options_of(case)
    parts = {"mask": case.mask, "ghost_batch_size": case.batch_size}
    kept = x.copy(order="K"), None if residual is None else residual.copy(order="K")
    out = data.draw(activated.outputs(x, residual))
    y, mean, invstd = F.batch_norm_forward(
        x, case.weight, case.bias, residual=residual, out=out, **options, **parts
    )
    assert out is None or y is out
    x, residual = kept
    told = {"y": {"y": y.copy()}, "bias": {"bias": case.bias}}
    told["both"] = told["y"] | told["bias"]
    options["out"] = data.draw(activated.outputs(dy, x))
    if residual is not None:
        if tells == "bias" or data.draw(st.booleans()):
            options["residual"] = residual
        options["residual_out"] = data.draw(activated.outputs(dy, None))
        if options["residual_out"] is options["out"] or "residual" not in options:
            options["residual_out"] = np.empty(x.shape, x.dtype.newbyteorder("="))
    results = F.batch_norm_backward(
        dy, x, case.weight, mean, invstd, **told[tells], **options, **parts
    )
    activated.assert_step((y, *results), expected, bounds)


@settings(max_examples=100)
@given(st.data())
def test_normalization_is_followed_by_the_residual_and_the_activation(data):
    case, dy = data.draw(activated.cases())
    exact, bounds = (step.y for step in activated.expected(case, dy))
    options = options_of(case) | {"mask": case.mask, "residual": case.residual, "eps": case.eps}
    vectors = {"weight": case.weight, "bias": case.bias}
    options["out"] = data.draw(activated.outputs(case.x, case.residual))
    if case.groups:
        y = F.group_norm(case.x, case.groups, **vectors, **options)
    elif case.batch_size == 1:
        y = F.instance_norm(case.x, **vectors, **options)
    elif case.running is None:
        sizes = {"ghost_batch_size": case.batch_size, "training": True}
        y = F.batch_norm(case.x, None, None, **vectors, **sizes, **options)
    else:
        function = data.draw(st.sampled_from([F.batch_norm, F.instance_norm]))
        if function is F.instance_norm:
            options["use_input_stats"] = False
        y = function(case.x, *case.running, **vectors, **options)
    support.assert_within(y, exact, bounds)


# To the bit.


def applied(z, activation, slope):
    """An activation, in the arithmetic of z's dtype."""
    if activation == "leaky_relu":
        return np.where(z > 0, z, z * z.dtype.type(slope))
    z = np.where(z < 0, z.dtype.type(0), z)
    return np.where(z > 6, z.dtype.type(6), z) if activation == "relu6" else z


def forwards(x, weight, bias, mask, **options):
    """The results of every kind of forward, by name."""
    vectors, running = (weight, bias), (0.5 * np.ones(x.shape[1]), 2.0 * np.ones(x.shape[1]))
    options |= {"mask": mask}
    yield "batch", F.batch_norm_forward(x, *vectors, **options)[0]
    yield "ghost", F.batch_norm_forward(x, *vectors, ghost_batch_size=2, **options)[0]
    yield "instance", F.instance_norm(x, None, None, *vectors, **options)
    yield "group", F.group_norm(x, 2, *vectors, **options)
    yield "running", F.batch_norm(x, *running, *vectors, **options)


@by_activation
@by_layout
@each("shape", [(4, 6, 5, 7), (2, 66, 3, 2)])
@each("masked", [False, True])
def test_the_bits_are_those_of_separate_steps(rng, dtype, activation, slope, layout, shape, masked):
    if dtype.name == "bfloat16" and layout is support.byte_swapped:
        pytest.skip("bfloat16 has one byte order")
    x, residual = (layout(some(rng, shape, dtype)) for _ in range(2))
    mask = np.ones((shape[0], 1, *shape[2:]), bool)
    mask[:, :, 1:, :1] = not masked
    arguments = *support.parameters(shape[1], np.float64), mask if masked else None
    options = {"activation": activation, "negative_slope": slope}
    # Of an array of 16 bits, results are rounded once, from float32.
    arithmetic = np.float64 if dtype.itemsize == 8 else np.float32
    wide, added = x.astype(arithmetic), residual.astype(arithmetic)
    for (name, z), (_, y), (_, finished) in zip(
        forwards(wide, *arguments),
        forwards(x, *arguments, **options),
        forwards(x, *arguments, residual=residual, **options),
        strict=True,
    ):
        zeros = np.where(mask, z.dtype.type(1), z.dtype.type(0)).astype(dtype)
        expected = np.where(zeros, applied(z, activation, slope).astype(dtype), zeros)
        assert same_bits(y, expected), name
        expected = np.where(zeros, applied(z + added, activation, slope).astype(dtype), zeros)
        assert same_bits(finished, expected), name


PATHS = [
    {},
    {"ghost_batch_size": 3},
    {"masked": True},
    {"masked": True, "ghost_batch_size": 3},
]


def step(x, dy, residual, weight, bias, mask, in_place, **options):
    """The results of a forward and of its backwards that tell derivatives in every way."""
    forward = {k: v for k, v in options.items() if k != "masked"} | {"mask": mask}
    place = x.copy(order="K") if in_place else None
    y, mean, invstd = F.batch_norm_forward(
        x if place is None else place, weight, bias, residual=residual, out=place, **forward
    )
    results, tells = [y, mean, invstd], [{"bias": bias}]
    if options["negative_slope"] >= 0:
        tells.append({"y": y})
    for told in tells:
        out = dy.copy(order="K") if in_place else None
        more = {} if residual is None else {"residual": residual}
        gradient = dy if out is None else out
        results += F.batch_norm_backward(
            gradient, x, weight, mean, invstd, out=out, **told, **more, **forward
        )
    return results


LARGE = [
    ((7, 3, 40, 41), support.contiguous, "float32"),
    ((7, 3, 40, 41), support.channels_last, "float64"),
    ((40, 130, 3, 4), support.contiguous, "float16"),
]


@pytest.mark.parametrize(("activation", "slope"), [("relu6", 0.01), ("leaky_relu", 0.2)])
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("shape", "layout", "name"), LARGE)
def test_threads_and_places_change_no_bit(
    rng, activation, slope, path, shape, layout, name, set_num_threads
):
    x, dy, residual = (layout(some(rng, shape, support.dtype_of(name))) for _ in range(3))
    mask = some_mask(rng, shape) if path.get("masked") else None
    if mask is not None:
        mask[:, :, 0, 0] = True
    arguments = *support.parameters(shape[1]), mask
    options = path | {"activation": activation, "negative_slope": slope}
    for added, ways in (
        (None, [(1, True), (2, False), (5, True)]),
        (residual, [(1, True), (2, True), (5, False)]),
    ):
        set_num_threads(1)
        expected = step(x, dy, added, *arguments, False, **options)
        for threads, in_place in ways:
            set_num_threads(threads)
            results = step(x, dy, added, *arguments, in_place, **options)
            assert all(map(same_bits, results, expected)), (threads, in_place)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.01), ("leaky_relu", 0.3)])
def test_dy_is_rounded_after_its_derivative_where_that_is_told(rng, dtype, activation, slope):
    x, dy = some(rng, (6, 5, 7, 8), dtype, mean=0.0), some(rng, (6, 5, 7, 8), dtype)
    vectors = support.parameters(5)
    options = {"activation": activation, "negative_slope": slope}
    y, mean, invstd = F.batch_norm_forward(x, *vectors, **options)
    wide = dy.astype(np.float64 if dtype.itemsize == 8 else np.float32)
    dz = np.where(y > 0, wide, wide * wide.dtype.type(slope if activation == "leaky_relu" else 0))
    arguments = x, vectors[0], mean, invstd
    separate = F.batch_norm_backward(dz.astype(dtype), *arguments)
    mask = np.ones((6, 1, 7, 8), bool)
    for told in ({"y": y}, {"bias": vectors[1], "mask": mask}):
        results = F.batch_norm_backward(dy, *arguments, **told, **options)
        assert all(map(same_bits, results, separate))
    computed = F.batch_norm_backward(dy, *arguments, bias=vectors[1], **options)
    support.assert_close(computed[2], dz.astype(np.float64).sum(axis=(0, 2, 3)), 1e-6)
    exact = dtype.itemsize > 2 or activation == "relu"
    assert all(map(same_bits, computed, separate)) == exact


# At the kinks.

AT_KINKS = [np.nan, np.inf, -np.inf, 0.0, -0.0, 6.0, 3.0, -3.0, 9.0]


def at_kinks(dtype, count=70):
    """Values of an array of one channel: at kinks, beside them and beyond all numbers."""
    beside = [np.finfo(np.float32).smallest_normal, 6.0]
    if dtype.itemsize > 2:
        beside += [np.nextafter(dtype.type(6), dtype.type(7)), np.nextafter(dtype.type(6), 0)]
    values = np.array([*AT_KINKS, *beside, *(-value for value in beside)]).astype(dtype)
    return np.resize(values, (count, 1))


@by_activation
@each("tells", ["x", "residual", "y"])
@each("zero", [0.0, -0.0])
def test_the_derivative_at_a_kink_is_that_of_the_flat_side(dtype, activation, slope, tells, zero):
    if tells == "y" and slope < 0:
        pytest.skip("y does not tell")
    z = at_kinks(dtype)
    options = {"activation": activation, "negative_slope": slope}
    nothing, statistics = np.zeros_like(z), (np.zeros(1), np.ones(1))
    with np.errstate(all="ignore"):
        y = F.batch_norm(z, *statistics, bias=np.array([zero]), eps=0.0, **options)
        arithmetic = np.float64 if dtype.itemsize == 8 else np.float32
        shifted = z.astype(arithmetic) + arithmetic(zero)
        assert same_bits(y, applied(shifted, activation, slope).astype(dtype))
    exact = reference.derivative(z, activation, slope)
    # Of one value after the other, so that the sum of the gradients is that of one.
    for i in range(0, len(z), 3):  # all values, which are repeated in a period of 13 or 17
        dy = np.zeros_like(z)
        dy[i] = 2
        told = {"x": {}, "residual": {"residual": nothing}, "y": {"y": y}}[tells]
        told["bias"] = np.array([zero])
        gradients = F.batch_norm_backward(dy, z, None, *statistics, **told, **options)
        unit = {"float16": 1e-3, "bfloat16": 1e-2}.get(dtype.name, 1e-7)
        np.testing.assert_allclose(gradients[2], float(2 * exact[i, 0]), rtol=unit, atol=1e-30)
        if tells == "residual":
            np.testing.assert_allclose(
                gradients[3][i].astype(float), float(2 * exact[i, 0]), rtol=unit, atol=1e-30
            )


@pytest.mark.torch
@by_activation
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_kinks_are_those_of_torch(activation, slope, name):
    torch = pytest.importorskip("torch")
    z = at_kinks(np.dtype(name))
    leaf = support.tensor(z).requires_grad_()
    functional = torch.nn.functional
    y = {
        "relu": functional.relu,
        "relu6": functional.relu6,
        "leaky_relu": lambda z: functional.leaky_relu(z, slope),
    }[activation](leaf)
    y.backward(torch.ones_like(y))
    options = {"activation": activation, "negative_slope": slope}
    statistics = np.zeros(1), np.ones(1)
    with np.errstate(all="ignore"):
        actual = F.batch_norm(z, *statistics, eps=0.0, **options)
        np.testing.assert_array_equal(actual, y.detach().numpy())
        gradients = F.batch_norm_backward(
            np.ones_like(z), z, None, *statistics, bias=None, residual=np.zeros_like(z), **options
        )
    # At NaN, torch's own relu6 has 1 for single elements and 0 for registers of them.
    known = ~np.isnan(z) if activation == "relu6" else np.ones_like(z, bool)
    np.testing.assert_array_equal(gradients[3][known], leaf.grad.numpy()[known])


# Derivatives that are computed from x are those of the forward, to the last bit of x.

WEIGHTS = [1.0, -1.0, 0.3, -2.7, 1e-3, 1e4, 1e-30, -1e20, 1e-42, 1e35, -1e35, 0.0, -0.0, np.nan]
BIASES = [0.0, -0.0, 0.7, -1.3, 5.9, 6.0, 1e-6, -1e5, 1e30, -np.inf, np.nan]
INVSTDS = [1.0, 0.37, 316.2, 1e-3, 1e12, np.inf]
MEANS = [0.0, 0.1, -700.3, 1e6]


@np.errstate(all="ignore")
def around_kinks(rng, dtype, mean, invstd, weight, bias):
    """Neighbouring numbers where z is 0 or 6, and others, for each channel: 200 of them."""
    rows, inf = list((mean + rng.standard_normal((37, len(mean))) / invstd).astype(dtype)), np.inf
    for kink in (0.0, 6.0):
        x = (mean + (kink - bias) / (invstd * weight)).astype(dtype)
        below = above = np.where(np.isfinite(x), x, 1).astype(dtype)
        for _ in range(40):
            rows += [below, above]
            below, above = (
                np.nextafter(below, dtype.type(-inf)),
                np.nextafter(above, dtype.type(inf)),
            )
    rows += [np.full_like(below, value) for value in (np.nan, 0.0, -0.0)]
    return rng.permutation(np.stack(rows))


@pytest.mark.parametrize(
    ("activation", "slope"), [("relu", 0.01), ("relu6", 0.01), ("leaky_relu", 0.5)]
)
@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(200, -1), (2, -1, 100), (100, -1, 2)], ids=str)
def test_the_derivatives_computed_from_x_are_those_of_the_forward(
    rng, activation, slope, name, shape
):
    dtype = np.dtype(name)
    mean, invstd, weight, bias = np.array(
        list(itertools.product(MEANS, INVSTDS, WEIGHTS, BIASES))
    ).T
    x = around_kinks(rng, dtype, mean, invstd, weight, bias)
    if len(shape) == 3:
        x = np.ascontiguousarray(np.moveaxis(x.reshape(shape[0], shape[2], -1), 1, -1))
    y = F.batch_norm_elemt(x, mean, invstd, weight, bias)
    with np.errstate(all="ignore"):
        y = applied(y, activation, slope)
    options = {"activation": activation, "negative_slope": slope}
    # As a sum, dbias tells every derivative: those of a channel get distinct powers of two.
    for start in range(0, 200, 20):
        dy = np.zeros((200, x.shape[1]), dtype)
        dy[start : start + 20] = 2.0 ** np.arange(20)[:, np.newaxis]
        if len(shape) == 3:
            dy = np.ascontiguousarray(np.moveaxis(dy.reshape(shape[0], shape[2], -1), 1, -1))
        vectors = dy, x, weight, mean, invstd
        computed = F.batch_norm_backward(*vectors, bias=bias, **options)[2]
        told = F.batch_norm_backward(*vectors, y=y, **options)[2]
        assert same_bits(computed, told)


def test_residual_out_without_a_residual_gets_the_gradient_behind_the_activation():
    x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [2.0], [3.0]])
    _, mean, invstd = F.batch_norm_forward(x, activation="relu")
    residual_out = np.full_like(x, 7.0)
    *_, found = F.batch_norm_backward(
        dy, x, None, mean, invstd, bias=None, activation="relu", residual_out=residual_out
    )
    assert found is residual_out
    assert found.tolist() == [[0.0], [0.0], [3.0]]
