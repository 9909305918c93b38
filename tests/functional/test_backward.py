"""The backward: against the reference and finite differences, in place and frozen."""

import activated
import numpy as np
import pytest
import reference
import support
from cases import each
from support import parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.sanitize, pytest.mark.wheel]

SHAPES = [(4, 3), (3, 2, 5), (2, 3, 4, 5), (5, 33, 7, 7), (2, 1, 40, 41), (2, 3, 2, 3, 4)]


def check_gradients(dx, dweight, dbias, dy, x, weight=None, frozen=None):
    """Compares with the reference; `frozen` is the (mean, var) of a frozen layer."""
    mean, var = frozen or reference.moments(x)[1:]
    if frozen:
        exact = reference.backward_frozen(dy, x, mean, var, weight)
    else:
        exact = reference.backward(dy, x, weight)
    dtype = x.dtype.newbyteorder("=")
    bounds = reference.gradient_bounds(dy, x, dtype, mean, var, weight)
    assert type(dx) is np.ndarray
    assert dx.dtype == dtype
    assert dx.shape == x.shape
    for actual, expected, bound in zip((dx, dweight, dbias), exact, bounds, strict=True):
        if actual is not None:
            support.assert_within(actual, expected, bound + reference.ulp(expected, actual.dtype))


def layer(channels, dtype=np.float32):
    bn = fastbn.BatchNorm2d(channels, dtype=dtype)
    bn.weight[:], bn.bias[:] = parameters(channels)
    bn.running_mean[:] = np.linspace(-1, 1, channels)
    bn.running_var[:] = np.linspace(0.5, 2, channels)
    return bn


@each("shape", SHAPES)
def test_gradients_match_the_reference(rng, dtype, shape):
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype)
    weight, _ = parameters(shape[1])
    _, mean, invstd = F.batch_norm_forward(x)
    check_gradients(*F.batch_norm_backward(dy, x, weight, mean, invstd), dy, x, weight)


@each("activation", [None, "relu", "relu6", "leaky_relu"])
@each("layout", [support.contiguous, support.channels_last])
@each("place", ["new", "x", "dy"])
@each("masked", [False, True])
def test_gradients_of_values_near_the_largest_are_right_and_finite(
    rng, activation, layout, place, masked
):
    values = np.where(rng.random((4, 5, 6, 5)) < 0.25, -3e38, 3e38).astype(np.float32)
    values[:, 1::2] = some(rng, (4, 2, 6, 5))  # neighbours of usual size
    x, dy = layout(values.copy()), layout(some(rng, values.shape))
    weight = np.where(np.arange(5) % 2, 1, 1e38) * np.array([1, 1, -1, -1, 1])
    bias = np.array([-3e37, 0.5, 3e37, -0.5, 1e38])
    mask = rng.random((4, 1, 6, 5)) < 0.7 if masked else None
    case = activated.Case(x, weight, bias, activation=activation, mask=mask)
    dy = layout(activated.decided(case, dy))
    exact, bounds = activated.expected(case, dy)
    _, mean, invstd = F.batch_norm_forward(x, weight, bias, activation=activation, mask=mask)
    out = {"new": None, "x": x, "dy": dy}[place]
    gradients = F.batch_norm_backward(
        dy, x, weight, mean, invstd, bias=bias, activation=activation, mask=mask, out=out
    )
    activated.assert_step((None, *gradients), exact, bounds)


def test_gradients_without_a_weight(rng, dtype):
    x, dy = some(rng, (3, 4, 5, 6), dtype), some(rng, (3, 4, 5, 6), dtype)
    _, mean, invstd = F.batch_norm_forward(x)
    dx, dweight, dbias = F.batch_norm_backward(dy, x, None, mean, invstd)
    assert dweight.dtype == dbias.dtype == np.float64
    check_gradients(dx, dweight, dbias, dy, x)


@pytest.mark.parametrize("parameter_dtype", ["float32", "float64"])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_layer_gives_the_gradients_of_its_last_forward(rng, dtype, parameter_dtype, freeze):
    x, dy = some(rng, (3, 4, 5, 6), dtype), some(rng, (3, 4, 5, 6), dtype)
    bn = layer(4, parameter_dtype)
    if freeze:
        bn.freeze()
    bn(some(rng, x.shape, dtype))
    frozen = (bn.running_mean.copy(), bn.running_var.copy()) if freeze else None
    bn(x)
    dx = bn.backward(dy)
    assert bn.weight_grad.dtype == bn.bias_grad.dtype == parameter_dtype
    assert bn.weight_grad.shape == bn.bias_grad.shape == (4,)
    check_gradients(dx, bn.weight_grad, bn.bias_grad, dy, x, bn.weight, frozen)


def numerical(function, at, step=1e-5):
    """Central differences of a scalar function, at an array that it reads."""
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        value = at[i]
        at[i] = value + step
        above = function()
        at[i] = value - step
        gradient[i] = (above - function()) / (2 * step)
        at[i] = value
    return gradient


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (2, 3, 1, 2)], ids=str)
def test_gradients_match_finite_differences(rng, shape, freeze):
    x, dy = some(rng, shape, np.float64), some(rng, shape, np.float64)
    bn = layer(shape[1], np.float64)
    if freeze:
        bn.freeze()

    def loss():
        return (bn(x) * dy).sum()

    expected = [numerical(loss, array) for array in (x, bn.weight, bn.bias)]
    bn(x)
    actual = bn.backward(dy), bn.weight_grad, bn.bias_grad
    for a, b in zip(actual, expected, strict=True):
        support.assert_within(a, b, 1e-8)


@each("dy_layout", [*support.WRITEABLE_LAYOUTS, support.read_only])
@each("x_layout", [*support.WRITEABLE_LAYOUTS, support.read_only])
def test_any_memory_layouts_go_together(rng, x_layout, dy_layout):
    x, dy = x_layout(some(rng, (3, 4, 6, 5))), dy_layout(some(rng, (3, 4, 6, 5)))
    bn = layer(4)
    bn(x)
    dx = bn.backward(dy)
    check_gradients(dx, bn.weight_grad, bn.bias_grad, dy, x, bn.weight)


def test_channels_last_gradients_are_channels_last(rng, dtype):
    x, dy = (support.channels_last(some(rng, (3, 4, 6, 5), dtype)) for _ in range(2))
    bn = layer(4)
    bn(x)
    assert bn.backward(dy).strides == x.strides


def test_a_broadcast_dy(rng, dtype):
    x = some(rng, (3, 4, 6, 5), dtype)
    dy = np.broadcast_to(some(rng, (1, 4, 1, 1), dtype), x.shape)
    bn = layer(4)
    bn(x)
    check_gradients(bn.backward(dy), bn.weight_grad, bn.bias_grad, dy, x, bn.weight)


@pytest.mark.parametrize("swap", [support.byte_swapped, lambda dy: dy], ids=["swapped", "native"])
def test_byte_swapped_arrays_give_a_native_dx(rng, swap):
    x = support.byte_swapped(some(rng, (3, 4, 6, 5)))
    dy = swap(some(rng, (3, 4, 6, 5)))
    bn = layer(4)
    bn(x)
    dx = bn.backward(dy)
    assert dx.dtype.isnative
    check_gradients(dx, bn.weight_grad, bn.bias_grad, dy, x, bn.weight)


@pytest.mark.parametrize("dy_dtype", support.DTYPES)
def test_dy_of_another_float_dtype_is_converted(rng, dtype, dy_dtype):
    x = some(rng, (3, 4, 6, 5), dtype)
    # Whole numbers up to 8 are the same in every dtype.
    dy = rng.integers(-8, 9, x.shape).astype(support.dtype_of(dy_dtype))
    bn = layer(4)
    bn(x)
    check_gradients(bn.backward(dy), bn.weight_grad, bn.bias_grad, dy, x, bn.weight)


@each("freeze", [False, True])
@each("target", ["dy", "view of dy", "x", "new"])
@each("layout", support.WRITEABLE_LAYOUTS)
def test_dx_written_to_out_has_the_bits_of_a_new_dx(rng, dtype, layout, target, freeze):
    x, dy = (layout(some(rng, (3, 4, 6, 5), dtype)) for _ in range(2))
    bn = layer(4)
    if freeze:
        bn.freeze()
    bn(x)
    expected = bn.backward(dy)
    sums = bn.weight_grad, bn.bias_grad
    out = {"dy": dy, "view of dy": dy[...], "x": x, "new": layout(np.zeros_like(x))}[target]
    bn.zero_grad()(x)
    assert bn.backward(dy, out=out) is out
    assert same_bits(out, expected)
    assert same_bits(bn.weight_grad, sums[0])
    assert same_bits(bn.bias_grad, sums[1])


def test_out_may_be_dy_where_dy_and_x_differ_in_layout(rng):
    x, dy = some(rng, (3, 4, 6, 5)), support.channels_last(some(rng, (3, 4, 6, 5)))
    bn = layer(4)
    bn(x)
    exact_dy = dy.copy()
    bn.backward(dy, out=dy)
    check_gradients(dy.copy(), bn.weight_grad, bn.bias_grad, exact_dy, x, bn.weight)


def awkward_parameters(dtype):
    """Channels whose normalized input cannot be had back from the output, and some that can."""
    tiny = 2.0**-20 if dtype.name == "float16" else 1e-30
    weight = [1.0, -0.5, 0.0, 0.0, tiny, tiny, 0.01, -0.1, np.nan, np.inf]
    bias = [0.25, 0.0, 0.0, 1.0, 0.0, 1.0, -3.0, 1.0, 1.0, 1.0]
    return np.array(weight, np.float32), np.array(bias, np.float32)


@each("freeze", [False, True])
@each("correlated", [False, True])
@each("layout", [support.contiguous, support.channels_last, support.sliced])
def test_in_place_training_recovers_the_gradients(rng, dtype, layout, correlated, freeze):
    weight, bias = awkward_parameters(dtype)
    x = layout(some(rng, (4, len(weight), 9, 8), dtype))
    dy = layout(some(rng, x.shape, dtype, mean=0.0))
    if correlated:
        dy = dy + x
    layers = [fastbn.BatchNorm2d(len(weight)) for _ in range(2)]
    for bn in layers:
        bn.weight[:], bn.bias[:] = weight, bias
        if freeze:
            bn.freeze()
    apart, in_place = layers
    _, mean, var = reference.moments(x)
    if freeze:
        mean, var = apart.running_mean, apart.running_var
    finite = np.isfinite(weight)
    relative = 2e-2 if dtype.itemsize == 2 else 1e-4
    bounds = reference.gradient_bounds(
        dy, x, dtype, mean, var, np.where(finite, weight, 0), relative=relative
    )
    y = apart(x)
    expected = apart.backward(dy)
    in_place(x, out=x)
    assert same_bits(x, y)
    dx = in_place.backward(dy)
    support.assert_within(dx[:, finite], expected[:, finite], bounds[0][:, finite])
    assert not np.isfinite(dx[:, ~finite].astype(float)).any()
    support.assert_within(in_place.weight_grad, apart.weight_grad, bounds[1])
    support.assert_within(in_place.bias_grad, apart.bias_grad, 1e-6 * np.abs(apart.bias_grad))


@each(
    "dtype, ratio, relative", [("float32", 16, 1e-4), ("float16", 16, 2e-2), ("bfloat16", 4, 0.1)]
)
@each("outlier", [6, 30])
def test_outliers_cost_gradients_in_place_few_digits(rng, dtype, ratio, relative, outlier):
    x = rng.standard_normal((8, 2, 4000))
    x[0, :, :6] = outlier
    x = x.astype(support.dtype_of(dtype))
    dy, gradients = np.sign(x), []
    for out in (None, x.copy()):
        bn = fastbn.BatchNorm1d(2)
        bn.bias[:] = 0.97 * ratio, -0.97 * ratio
        bn(x if out is None else out, out=out)
        gradients.append(bn.backward(dy).astype(np.float64))
    expected, actual = gradients
    support.assert_within(actual, expected, relative / x.astype(np.float64).std())


@each("ratio", [1.0, 4.0, 15.9, 16.1])
@each("weight", [2.0, -0.5, 1e-6, 1e-40])
def test_in_place_training_recovers_the_gradients_for_the_worst_dy(rng, dtype, weight, ratio):
    x = some(rng, (4, 1, 19, 18), dtype, mean=0.0, std=1.0)
    _, mean, var = reference.moments(x)
    # An error of the normalized input counts most where dy goes with it.
    dy = np.sign(reference.normalize(x, mean, var)).astype(dtype)
    layers = [fastbn.BatchNorm2d(1) for _ in range(2)]
    for bn in layers:
        bn.weight[:], bn.bias[:] = weight, 0 if abs(weight) < 1e-3 else weight * ratio
    apart, in_place = layers
    relative = 2e-2 if dtype.itemsize == 2 else 1e-4
    bounds = reference.gradient_bounds(dy, x, dtype, mean, var, bn.weight, relative=relative)
    apart(x)
    expected = apart.backward(dy)
    in_place(x, out=x)
    support.assert_within(in_place.backward(dy), expected, bounds[0])
    support.assert_within(in_place.weight_grad, apart.weight_grad, bounds[1])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_in_place_training_with_and_without_parameters(rng, affine, bias):
    x, dy = some(rng, (3, 4, 6, 5)), some(rng, (3, 4, 6, 5))
    exact = x.copy()
    bn = fastbn.BatchNorm2d(4, affine=affine, bias=bias)
    bn(x, out=x)
    check_gradients(bn.backward(dy), bn.weight_grad, bn.bias_grad, dy, exact, bn.weight)


@pytest.mark.parametrize("target", ["dy", "y", "new"])
def test_in_place_training_takes_an_out_in_its_backward(rng, target):
    x, dy = some(rng, (3, 4, 6, 5)), some(rng, (3, 4, 6, 5))
    exact_x, exact_dy = x.copy(), dy.copy()
    bn = layer(4)
    y = bn(x, out=x)
    out = {"dy": dy, "y": y, "new": np.empty_like(x)}[target]
    assert bn.backward(dy, out=out) is out
    check_gradients(out, bn.weight_grad, bn.bias_grad, exact_dy, exact_x, bn.weight)


def test_in_place_through_another_view_is_noticed(rng):
    x, dy = some(rng, (3, 4, 6, 5)), some(rng, (3, 4, 6, 5))
    exact = x.copy()
    bn = layer(4)
    bn(x, out=x[...])
    check_gradients(bn.backward(dy), bn.weight_grad, bn.bias_grad, dy, exact, bn.weight)


def test_a_frozen_backward_treats_the_statistics_as_constants(rng):
    x, dy = some(rng, (3, 4, 6, 5)), some(rng, (3, 4, 6, 5))
    bn = layer(4).freeze()
    bn(x)
    scale = bn.weight / np.sqrt(bn.running_var + 1e-5)
    support.assert_close(bn.backward(dy), dy * scale.reshape(4, 1, 1), 1e-6)


def test_the_gradient_of_a_constant_channel_is_finite(rng, dtype):
    x, dy = np.full((3, 4, 6, 5), 7.0, dtype), some(rng, (3, 4, 6, 5), dtype)
    bn = layer(4)
    bn(x)
    check_gradients(bn.backward(dy), bn.weight_grad, bn.bias_grad, dy, x, bn.weight)


def test_the_gradient_of_magnitudes_of_1e30(rng):
    x, dy = some(rng, (3, 4, 6, 5)) * np.float32(1e30), some(rng, (3, 4, 6, 5))
    _, mean, invstd = F.batch_norm_forward(x)
    check_gradients(*F.batch_norm_backward(dy, x, None, mean, invstd), dy, x)


@pytest.mark.parametrize(("dtype", "weight"), [(np.float16, 3e4), (np.float32, 1e38)])
def test_in_place_training_keeps_the_gradients_where_the_output_overflows(rng, dtype, weight):
    x = rng.normal(size=(8, 1, 16, 16)).astype(dtype)
    dy = (rng.normal(size=x.shape) * 1e-3).astype(dtype)
    gradients = []
    for out in (None, x.copy()):
        bn = fastbn.BatchNorm2d(1)
        bn.weight[:] = weight
        bn(x if out is None else out, out=out)
        gradients.append((bn.backward(dy), bn.weight_grad))
    for in_place, apart in zip(gradients[1], gradients[0], strict=True):
        assert np.isfinite(apart).all()
        np.testing.assert_allclose(in_place, apart, rtol=2e-2, atol=2e-2 * np.abs(apart).max())


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_in_place_keeps_16_bit_inputs_whatever_the_statistics(affine):
    x = np.full((4, 2, 5, 5), 700, np.float16)
    dy = np.ones_like(x)
    gradients = []
    for out in (None, x.copy()):
        bn = fastbn.BatchNorm2d(2, affine=affine).freeze()
        bn.running_var[:] = 1e-4
        bn(x if out is None else out, out=out)
        gradients.append((bn.backward(dy), bn.weight_grad))
    np.testing.assert_allclose(gradients[1][0], gradients[0][0], rtol=2e-2)
    if affine:
        np.testing.assert_allclose(gradients[1][1], gradients[0][1], rtol=2e-2)


def test_a_frozen_backward_may_overwrite_dy_after_a_forward_in_place(rng, dtype):
    bn = fastbn.BatchNorm2d(3).freeze()
    bn.weight[:], bn.bias[:] = support.parameters(3)
    bn.weight[1] = 0  # a channel that cannot be recovered from the output
    bn.running_var[:] = 4
    x, dy = some(rng, (4, 3, 6, 5), dtype), some(rng, (4, 3, 6, 5), dtype)
    bn(x)
    expected = bn.backward(dy), bn.weight_grad, bn.bias_grad
    bn.zero_grad()
    bn(x, out=x)
    actual = bn.backward(dy, out=dy), bn.weight_grad, bn.bias_grad
    for a, b in zip(actual, expected, strict=True):
        support.assert_close(a, b, 1e-5 if dtype.itemsize > 2 else 1e-2)
