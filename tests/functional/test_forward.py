"""The forward: training and eval against the reference, in every dtype and memory layout."""

import numpy as np
import pytest
import reference
import support
from cases import each
from support import parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.sanitize, pytest.mark.wheel]

SHAPES = [(4, 3), (3, 2, 5), (2, 3, 4, 5), (1, 4, 3, 3), (5, 33, 7, 7), (2, 3, 2, 3, 4)]


def offset_of(x):
    _, mean, var = reference.moments(x)
    return np.abs(mean) / np.sqrt(var)


def check_training(x, y, weight=None, bias=None, eps=1e-5):
    exact = reference.forward(x, weight, bias, eps)
    dtype = x.dtype.newbyteorder("=")
    assert type(y) is np.ndarray
    assert y.dtype == dtype
    bound = reference.forward_bound(exact, dtype, weight, bias, offset_of(x))
    support.assert_within(y, exact, bound)


@each("shape", SHAPES)
def test_training_forward_normalizes_with_the_statistics_of_the_batch(rng, dtype, shape):
    x = some(rng, shape, dtype)
    weight, bias = parameters(shape[1])
    check_training(x, F.batch_norm(x, None, None, weight, bias, training=True), weight, bias)


@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last])
@pytest.mark.parametrize("in_place", [False, True])
def test_training_forward_of_values_near_the_largest_is_right_and_finite(rng, layout, in_place):
    values = np.where(rng.random((4, 5, 6, 5)) < 0.25, -3e38, 3e38).astype(np.float32)
    values[:, 1::2] = rng.standard_normal((4, 2, 6, 5))  # neighbours of usual size
    x = layout(values)
    weight, bias = parameters(5)
    y = F.batch_norm_forward(x, weight, bias, out=x if in_place else None)[0]
    check_training(values, y, weight, bias)
    usual = F.batch_norm_forward(layout(values[:, 1::2]), weight[1::2], bias[1::2])[0]
    assert same_bits(y[:, 1::2], usual)


@each("shape", SHAPES)
def test_eval_forward_normalizes_with_the_running_statistics(rng, dtype, shape):
    x = some(rng, shape, dtype)
    weight, bias = parameters(shape[1])
    mean, var = some(rng, shape[1]), np.abs(some(rng, shape[1])) + 0.1
    kept = mean.copy(), var.copy()
    y = F.batch_norm(x, mean, var, weight, bias)
    exact = reference.normalize(x, mean, var, weight, bias)
    # The cancellation in x - mean is scaled up where the running variance is small.
    offset = np.abs(mean) / np.sqrt(var)
    assert y.dtype == dtype
    support.assert_within(y, exact, reference.forward_bound(exact, dtype, weight, bias, offset))
    assert same_bits(mean, kept[0])
    assert same_bits(var, kept[1])


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_weight_and_bias_are_optional_each(rng, has_weight, has_bias):
    x = some(rng, (3, 4, 5, 2))
    weight, bias = parameters(4)
    weight, bias = weight if has_weight else None, bias if has_bias else None
    check_training(x, F.batch_norm_forward(x, weight, bias)[0], weight, bias)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5, 10.0])
def test_eps_is_added_to_the_variance(rng, eps):
    x = some(rng, (3, 4, 5, 2))
    check_training(x, F.batch_norm(x, None, None, training=True, eps=eps), eps=eps)


@pytest.mark.parametrize("running_dtype", ["float32", "float64"])
def test_a_training_forward_updates_the_running_statistics(rng, dtype, running_dtype):
    x = some(rng, (4, 3, 5, 6), dtype)
    mean = np.array([0.5, 0.0, -1.0], running_dtype)
    var = np.array([1.0, 2.0, 0.5], running_dtype)
    exact_mean, exact_var = reference.updated(x, mean, var, 0.3)
    F.batch_norm(x, mean, var, training=True, momentum=0.3)
    relative = 1e-14 if dtype.itemsize == 8 == mean.itemsize else 3e-7
    support.assert_close(mean, exact_mean, relative)
    support.assert_close(var, exact_var, relative)


@pytest.mark.parametrize("parameter_dtype", support.DTYPES)
def test_every_combination_of_dtypes_is_legal(rng, dtype, parameter_dtype):
    parameter_dtype = support.dtype_of(parameter_dtype)
    x = some(rng, (4, 3, 5, 6), dtype)
    bn = fastbn.BatchNorm2d(3, dtype=parameter_dtype)
    bn.weight[:], bn.bias[:] = parameters(3)
    exact_mean, exact_var = reference.updated(x, np.zeros(3), np.ones(3), 0.1)
    check_training(x, bn(x), bn.weight, bn.bias)
    for actual, exact in [(bn.running_mean, exact_mean), (bn.running_var, exact_var)]:
        assert actual.dtype == parameter_dtype
        support.assert_within(actual, exact, 2 * reference.ulp(np.abs(exact) + 1, parameter_dtype))


def test_weight_and_bias_may_differ_in_dtype(rng, dtype):
    x = some(rng, (4, 3, 5, 6), dtype)
    weight, bias = parameters(3, np.float64)
    bias = bias.astype(np.float16)
    check_training(x, F.batch_norm(x, None, None, weight, bias, training=True), weight, bias)


@each("layout", [*support.WRITEABLE_LAYOUTS, support.read_only])
@each("shape", [(3, 4, 6, 5), (4, 3), (2, 3, 7)])
def test_any_memory_layout_is_normalized(rng, dtype, layout, shape):
    x = layout(some(rng, shape, dtype))
    kept = x.copy()
    weight, bias = parameters(shape[1])
    check_training(x, F.batch_norm(x, None, None, weight, bias, training=True), weight, bias)
    assert same_bits(x, kept)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_byte_swapped_input_gives_a_native_output(rng, dtype):
    x = support.byte_swapped(some(rng, (3, 4, 6, 5), np.dtype(dtype)))
    y = F.batch_norm(x, None, None, training=True)
    assert y.dtype.isnative
    check_training(x, y)


def test_a_broadcast_input_is_normalized(rng, dtype):
    x = np.broadcast_to(some(rng, (1, 4, 6, 5), dtype), (3, 4, 6, 5))
    check_training(x, F.batch_norm(x, None, None, training=True))


@each("training", [True, False])
@each("shape", [(3, 4, 6, 5), (4, 3, 2, 2), (2, 17, 3, 3)])
def test_a_channels_last_input_gives_a_channels_last_output(rng, dtype, shape, training):
    x = support.channels_last(some(rng, shape, dtype))
    bn = fastbn.BatchNorm2d(shape[1]).train(training)
    assert bn(x).strides == x.strides


@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1)], ids=str)
def test_channels_last_equals_nchw(rng, dtype, shape):
    x = some(rng, shape, dtype)
    weight, bias = parameters(shape[1])
    y = F.batch_norm(support.channels_last(x), None, None, weight, bias, training=True)
    check_training(x, y, weight, bias)


@each("shape", [(3, 4, 6, 5), (2, 70, 7, 7), (1, 1, 1, 2), (2, 3, 33, 31)])
@each("layout", support.WRITEABLE_LAYOUTS)
def test_in_place_gives_the_bits_of_out_of_place(rng, dtype, layout, shape):
    x = layout(some(rng, shape, dtype))
    weight, bias = parameters(shape[1])
    expected = F.batch_norm(x, None, None, weight, bias, training=True)
    assert F.batch_norm(x, None, None, weight, bias, training=True, out=x) is x
    assert same_bits(x, expected)


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_a_layer_in_place_gives_the_bits_of_out_of_place(rng, dtype, mode):
    x = some(rng, (3, 4, 6, 5), dtype)
    layers = [fastbn.BatchNorm2d(4) for _ in range(2)]
    for bn in layers:
        bn.weight[:], bn.bias[:] = parameters(4)
        getattr(bn, mode)()
    expected = layers[0](x)
    assert layers[1](x, out=x) is x
    assert same_bits(x, expected)
    assert same_bits(layers[0].running_mean, layers[1].running_mean)
    assert same_bits(layers[0].running_var, layers[1].running_var)


def test_in_place_through_another_view_of_the_same_elements(rng):
    x = some(rng, (3, 4, 6, 5))
    expected = F.batch_norm(x, None, None, training=True)
    F.batch_norm(x, None, None, training=True, out=x[...])
    assert same_bits(x, expected)


def test_writing_in_place_leaves_the_memory_between_the_elements_alone(rng):
    buffer = some(rng, (6, 8, 10, 9))
    around = np.ones(buffer.shape, bool)
    around[1::2, 2:5, ::-3, 1:] = False
    kept = buffer.copy()
    x = buffer[1::2, 2:5, ::-3, 1:]
    expected = F.batch_norm(x, None, None, training=True)
    F.batch_norm(x, None, None, training=True, out=x)
    assert same_bits(x, expected)
    assert same_bits(buffer[around], kept[around])


@each("out_layout", support.WRITEABLE_LAYOUTS)
@each("x_layout", [support.contiguous, support.channels_last, support.sliced])
def test_out_may_have_any_memory_layout(rng, dtype, x_layout, out_layout):
    x = x_layout(some(rng, (3, 4, 6, 5), dtype))
    out = out_layout(np.zeros(x.shape, dtype))
    expected = F.batch_norm(x, None, None, training=True)
    assert F.batch_norm(x, None, None, training=True, out=out) is out
    assert same_bits(out, expected)


def test_out_may_be_interleaved_with_the_input(rng):
    buffer = some(rng, (3, 4, 6, 10))
    x, out = buffer[..., ::2], buffer[..., 1::2]
    kept = x.copy()
    F.batch_norm(x, None, None, training=True, out=out)
    assert same_bits(x, kept)
    check_training(x, out.copy())


def test_out_may_be_other_channels_of_the_array_that_holds_the_input(rng):
    buffer = some(rng, (3, 8, 6, 5))
    x, out = buffer[:, :4], buffer[:, 4:]
    kept = x.copy()
    F.batch_norm(x, None, None, training=True, out=out)
    assert same_bits(x, kept)
    check_training(x, out.copy())


class OnlyArray:
    """An object that NumPy turns into an array through `__array__` alone."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class OnlyDLPack:
    """An object that exchanges its data through DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "convert",
    [OnlyArray, OnlyDLPack, lambda x: x.view(Subclass)],
    ids=["array", "dlpack", "subclass"],
)
def test_array_likes_give_a_plain_array(rng, convert):
    x = some(rng, (3, 4, 6, 5))
    check_training(x, fastbn.BatchNorm2d(4)(convert(x)))


def test_nested_lists_are_float64():
    x = [[[[0.0, 1.0]]], [[[2.0, 3.0]]]]
    y = fastbn.BatchNorm2d(1)(x)
    check_training(np.array(x), y)
