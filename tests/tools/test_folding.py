"""A batch normalization folded into a convolution or a linear layer gives what both give."""

import numpy as np
import pytest
import reference
import support
from activated import ACTIVATIONS
from support import read_only, refused, same_bits, some, untouched

import fastbn

RELATIVE = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
LAYERS = {1: fastbn.BatchNorm1d, 2: fastbn.BatchNorm2d, 3: fastbn.BatchNorm3d}
# The extents of an input and of a kernel with so many axes.
EXTENTS = {0: ((), ()), 1: ((7,), (3,)), 2: ((6, 5), (3, 2)), 3: ((4, 5, 3), (2, 3, 1))}


def trained(rng, channels, axes=2, **kwargs):
    """A layer with something in every array that it has."""
    bn = LAYERS[max(axes, 1)](channels, dtype=np.float64, **kwargs)
    bn.running_mean[:] = rng.normal(0.5, 1.0, channels)
    bn.running_var[:] = rng.uniform(0.1, 3.0, channels)
    if bn.weight is not None:
        bn.weight[:] = rng.normal(0.0, 1.5, channels)
    if bn.bias is not None:
        bn.bias[:] = rng.normal(0.0, 1.0, channels)
    return bn.eval()


def grouped(x, weight, groups):
    """Input and weight as pairs of the groups' own."""
    return zip(np.split(x, groups, axis=1), np.split(weight, groups), strict=True)


def convolve(x, weight, bias, groups=1, stride=1):
    """A convolution without padding (cross-correlation, as networks have it), from its definition.

    Without axes behind the channels it is a linear layer.
    """
    kernel = weight.shape[2:]
    y = []
    for part, w in grouped(x, weight, groups):
        extents = tuple(range(2, x.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(part, kernel, extents)
        windows = windows[
            (..., *(slice(None, None, stride) for _ in kernel), *[slice(None)] * len(kernel))
        ]
        axes = [1, *range(x.ndim, 2 * x.ndim - 2)]
        product = np.tensordot(windows, w, (axes, list(range(1, w.ndim))))
        y.append(np.moveaxis(product, -1, 1))
    return np.concatenate(y, axis=1) + per_channel(bias, x.ndim)


def convolve_transposed(x, weight, bias, groups=1, stride=1):
    """A transposed convolution: every input element adds its multiple of the kernel."""
    kernel = weight.shape[2:]
    y = []
    for part, w in grouped(x, weight, groups):
        extents = [(n - 1) * stride + k for n, k in zip(x.shape[2:], kernel, strict=True)]
        target = np.zeros((len(x), w.shape[1], *extents))
        for tap in np.ndindex(*kernel):
            product = np.moveaxis(np.tensordot(part, w[(..., *tap)], (1, 0)), -1, 1)
            ends = [k + (n - 1) * stride + 1 for k, n in zip(tap, x.shape[2:], strict=True)]
            places = tuple(slice(k, end, stride) for k, end in zip(tap, ends, strict=True))
            target[(..., *places)] += product
        y.append(target)
    return np.concatenate(y, axis=1) + per_channel(bias, x.ndim)


def per_channel(bias, ndim):
    return 0 if bias is None else np.reshape(bias, (-1, *[1] * (ndim - 2)))


CASES = [
    (axes, groups, has_bias)
    for axes in EXTENTS
    for groups in ([1, 3] if axes else [1])
    for has_bias in (True, False)
]
STRIDES = [1, 2]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("axes", "groups", "has_bias"), CASES)
def test_after_a_convolution(rng, axes, groups, has_bias, stride):
    extents, kernel = EXTENTS[axes]
    x, weight = some(rng, (2, 6, *extents)), some(rng, (9, 6 // groups, *kernel), np.float64)
    bias = some(rng, 9, np.float64) if has_bias else None
    bn = trained(rng, 9, axes)
    folded = fastbn.fold(bn, weight, bias, groups=groups)
    expected = bn(convolve(x, weight, bias, groups, stride))
    support.assert_close(convolve(x, *folded, groups, stride), expected, 1e-13)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("axes", "groups", "has_bias"), CASES)
def test_before_a_convolution(rng, axes, groups, has_bias, stride):
    extents, kernel = EXTENTS[axes]
    x = some(rng, (2, 6, *extents), np.float64)
    weight = some(rng, (9, 6 // groups, *kernel), np.float64)
    bias = some(rng, 9, np.float64) if has_bias else None
    bn = trained(rng, 6, axes)
    folded = fastbn.fold(bn, weight, bias, bn_first=True, groups=groups)
    expected = convolve(bn(x), weight, bias, groups, stride)
    support.assert_close(convolve(x, *folded, groups, stride), expected, 1e-13)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("axes", "groups", "has_bias"), [case for case in CASES if case[0]])
def test_after_a_transposed_convolution(rng, axes, groups, has_bias, stride):
    extents, kernel = EXTENTS[axes]
    x, weight = some(rng, (2, 6, *extents)), some(rng, (6, 9 // groups, *kernel), np.float64)
    bias = some(rng, 9, np.float64) if has_bias else None
    bn = trained(rng, 9, axes)
    folded = fastbn.fold(bn, weight, bias, transposed=True, groups=groups)
    expected = bn(convolve_transposed(x, weight, bias, groups, stride))
    support.assert_close(convolve_transposed(x, *folded, groups, stride), expected, 1e-13)


def padded(x, values):
    """x with a border of one value for each channel."""
    y = np.empty((*x.shape[:2], *(n + 2 for n in x.shape[2:])), x.dtype)
    y[...] = per_channel(values, x.ndim)
    y[:, :, 1:-1, 1:-1] = x
    return y


def test_before_a_convolution_that_pads_with_zeros_the_border_is_wrong_and_can_be_mended(rng):
    x, weight = some(rng, (2, 4, 6, 6), np.float64), some(rng, (3, 4, 3, 3), np.float64)
    bn = trained(rng, 4)
    zeros = np.zeros(4)
    expected = convolve(padded(bn(x), zeros), weight, None)
    folded = fastbn.fold(bn, weight, bn_first=True)
    y = convolve(padded(x, zeros), *folded)
    inside = (..., slice(1, -1), slice(1, -1))
    support.assert_close(y[inside], expected[inside], 1e-13)
    assert abs(y - expected).max() > 0.1
    # The value that the batch normalization takes to 0 is what the border has to be.
    zero = bn.running_mean - bn.bias * np.sqrt(bn.running_var + bn.eps) / bn.weight
    support.assert_close(convolve(padded(x, zero), *folded), expected, 1e-13)


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
def test_before_a_convolution_that_pads_with_its_input_nothing_is_wrong(rng, mode):
    x, weight = some(rng, (2, 4, 6, 6), np.float64), some(rng, (3, 4, 3, 3), np.float64)
    bn = trained(rng, 4)
    around = [(0, 0), (0, 0), (1, 1), (1, 1)]
    expected = convolve(np.pad(bn(x), around, mode), weight, None)
    folded = fastbn.fold(bn, weight, bn_first=True)
    support.assert_close(convolve(np.pad(x, around, mode), *folded), expected, 1e-13)


@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_normalization_that_tracks(rng, affine):
    norm = fastbn.InstanceNorm2d(4, affine=affine, track_running_stats=True, dtype=np.float64)
    norm(some(rng, (6, 4, 5, 5), np.float64))
    if affine:
        norm.weight[:], norm.bias[:] = rng.normal(size=(2, 4))
    x, weight, bias = rng.normal(size=(2, 3, 6, 5)), rng.normal(size=(4, 3, 3, 2)), np.arange(4.0)
    expected = norm.eval()(convolve(x, weight, bias))
    support.assert_close(convolve(x, *fastbn.fold(norm, weight, bias)), expected, 1e-13)


# The axes of other libraries' kernels, torch's for the same, and how to get from these to those.
MOVED = {
    "TensorFlow, Keras, Flax": ("hwio->oihw", {}, "(-1, -2), (0, 1)"),
    "the same, before": ("hwio->oihw", {"bn_first": True}, "(-1, -2), (0, 1)"),
    "Keras, transposed": ("hwoi->iohw", {"transposed": True}, "(-1, -2), (0, 1)"),
    "Flax, transposed": ("hwio->iohw", {"transposed": True}, "(-2, -1), (0, 1)"),
}


@pytest.mark.parametrize(("axes", "options", "moved"), MOVED.values(), ids=MOVED)
def test_a_kernel_of_another_library_folds_as_the_docstring_says(rng, axes, options, moved):
    """Where all sizes fit, so that nothing would be refused."""
    bn, kernel, x = trained(rng, 4), rng.normal(size=(4, 4, 4, 4)), rng.normal(size=(2, 4, 6, 5))
    run = convolve_transposed if options.get("transposed") else convolve
    weight = np.einsum(axes, kernel)
    expected = run(bn(x), weight, None) if options.get("bn_first") else bn(run(x, weight, None))
    advice = f"np.moveaxis(kernel, {moved})"
    assert advice in fastbn.fold.__doc__
    folded = fastbn.fold(bn, eval(advice, {"np": np, "kernel": kernel}), **options)
    support.assert_close(run(x, *folded), expected, 1e-13)


@pytest.mark.parametrize("bn_first", [True, False])
@pytest.mark.parametrize("kwargs", [{"affine": False}, {"bias": False}], ids=str)
def test_a_layer_may_lack_weight_or_bias(rng, kwargs, bn_first):
    x, weight = some(rng, (5, 4), np.float64), some(rng, (4, 4), np.float64)
    bn = trained(rng, 4, 0, **kwargs)
    folded = fastbn.fold(bn, weight, bn_first=bn_first)
    expected = convolve(bn(x), weight, None) if bn_first else bn(convolve(x, weight, None))
    support.assert_close(convolve(x, *folded), expected, 1e-13)


@pytest.mark.parametrize("bn_first", [True, False])
def test_the_result_has_the_dtype_of_the_weight(rng, dtype, bn_first):
    x, weight = some(rng, (5, 4), np.float64), some(rng, (4, 4), dtype)
    bn = trained(rng, 4, 0)
    new_weight, new_bias = fastbn.fold(bn, weight, np.ones(4), bn_first=bn_first)
    assert new_weight.dtype == new_bias.dtype == dtype
    wide = fastbn.fold(bn, weight.astype(np.float64), np.ones(4), bn_first=bn_first)
    assert same_bits(new_weight, wide[0].astype(dtype))
    assert same_bits(new_bias, wide[1].astype(dtype))
    expected = convolve(x, *wide)
    narrow = (array.astype(np.float64) for array in (new_weight, new_bias))
    support.assert_close(convolve(x, *narrow), expected, 4 * RELATIVE[dtype.name])


@pytest.mark.parametrize("state", ["train", "eval", "freeze"])
def test_the_mode_does_not_matter_and_nothing_is_changed(rng, state):
    bn = trained(rng, 4)
    weight, bias = read_only(some(rng, (4, 2, 3, 3))), read_only(some(rng, 4))
    expected = fastbn.fold(bn, weight, bias)
    getattr(bn, state)()
    with untouched(bn, weight, bias):
        folded = fastbn.fold(bn, weight, bias)
    for new, same, old in zip(folded, expected, (weight, bias), strict=True):
        assert same_bits(new, same)
        assert not np.shares_memory(new, old)


@pytest.mark.parametrize("layout", [support.sliced, support.fortran, support.byte_swapped])
def test_a_weight_of_any_strides_and_byte_order_serves(rng, layout):
    bn, weight, bias = trained(rng, 4), some(rng, (4, 2, 3, 3)), some(rng, 4)
    expected = fastbn.fold(bn, weight, bias)
    for new, same in zip(fastbn.fold(bn, layout(weight), layout(bias)), expected, strict=True):
        assert same_bits(new, same)


@pytest.mark.torch
def test_torch_parameters_serve(rng):
    torch = pytest.importorskip("torch")
    bn, conv = trained(rng, 4), torch.nn.Conv2d(3, 4, 2)
    expected = fastbn.fold(bn, conv.weight.detach().numpy(), conv.bias.detach().numpy())
    for new, same in zip(fastbn.fold(bn, conv.weight, conv.bias), expected, strict=True):
        assert same_bits(new, same)


@pytest.mark.torch
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules_of_torch_with_folded_parameters_give_what_both_gave(rng, axes, bias, transposed):
    torch = pytest.importorskip("torch")
    name = f"Conv{'Transpose' if transposed else ''}{axes}d"
    conv = getattr(torch.nn, name)(4, 6, 3, 2, 1, groups=2, bias=bias, dtype=torch.float64)
    norm = getattr(torch.nn, f"BatchNorm{axes}d")(6, dtype=torch.float64)
    both = torch.nn.Sequential(conv, norm)
    x = torch.from_numpy(some(rng, (5, 4, *[6] * axes), np.float64))
    both(x)
    bn = LAYERS[axes](6, dtype=np.float64)
    bn.load_state_dict(both.state_dict(), prefix="1.")
    folded = fastbn.fold(bn, conv.weight, conv.bias, transposed=conv.transposed, groups=conv.groups)
    expected = both.eval()(x).detach().numpy()
    conv.weight.data, new_bias = map(torch.from_numpy, folded)
    conv.bias = torch.nn.Parameter(new_bias)
    support.assert_close(conv(x).detach().numpy(), expected, 1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2)])
def test_layers_without_channels_fold(shape):
    bn = fastbn.BatchNorm1d(shape[0])
    weight, bias = fastbn.fold(bn, np.zeros(shape), np.ones(shape[0]))
    assert weight.shape == shape
    assert bias.shape == shape[:1]


# What cannot be folded.


@pytest.mark.parametrize("make", [fastbn.BatchNorm2d, fastbn.InstanceNorm2d])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_layer_with_one_of_the_running_statistics_is_refused_by_its_name(make, name):
    layer = make(4, track_running_stats=True)
    setattr(layer, name, None)
    with refused(RuntimeError, f"{name} of this layer is None", intact=[layer]):
        fastbn.fold(layer, np.ones((4, 3)))


@pytest.mark.parametrize(
    ("layer", "exception", "word"),
    [
        (
            fastbn.BatchNorm2d(4, track_running_stats=False),
            RuntimeError,
            "track_running_stats=True",
        ),
        (fastbn.LazyBatchNorm2d(), RuntimeError, "first input"),
        (fastbn.InstanceNorm2d(4), TypeError, "each sample"),
        (fastbn.LazyInstanceNorm2d(), RuntimeError, "first input"),
        (fastbn.GroupNorm(2, 4), TypeError, "GroupNorm"),
        (None, TypeError, "NoneType"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_folded_is_refused(layer, exception, word):
    with refused(exception, word):
        fastbn.fold(layer, np.ones((4, 4)))


def test_no_layer_is_advised_for_what_has_no_running_statistics():
    with pytest.raises(TypeError, match=r"got fastbn\.layers\.groupnorm\.GroupNorm$"):
        fastbn.fold(fastbn.GroupNorm(2, 4), np.ones((4, 4)))


class Convolution:
    """What has a weight and a bias."""

    weight, bias = np.ones((4, 4)), np.ones(4)


def test_a_convolution_in_place_of_its_weight_is_refused_with_the_mend(rng):
    layer = Convolution()
    with refused(TypeError, "got Convolution; pass its weight and bias"):
        fastbn.fold(trained(rng, 4), layer)
    fastbn.fold(trained(rng, 4), layer.weight, layer.bias)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm3d", "SyncBatchNorm"])
def test_a_layer_of_torchs_is_refused_with_the_mend(name):
    torch = pytest.importorskip("torch")
    layer = getattr(torch.nn, name)(4, eps=1e-3, affine=True, track_running_stats=True)
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.\w+\." + name) as caught:
        fastbn.fold(layer, np.ones((4, 4)))
    advice = str(caught.value).partition(" into ")[2]
    ours = eval(advice, {"fastbn": fastbn, "layer": layer})
    ours.load_state_dict(layer.state_dict())
    assert ours.eps == 1e-3
    fastbn.fold(ours, np.ones((4, 4)))


@pytest.mark.parametrize(
    ("weight", "kwargs", "exception", "names"),
    [
        (np.ones(4), {}, ValueError, ["(4,)", "(out, in / groups, ...)"]),
        (np.ones(4), {"transposed": True}, ValueError, ["(in, out / groups, ...)"]),
        (np.ones((4, 4), int), {}, TypeError, ["int64", "astype"]),
        (np.ma.ones((4, 4)), {}, TypeError, ["mask"]),
        (np.ones((6, 4)), {}, ValueError, [6, 4, "bn_first=True", "transposed=True"]),
        (np.ones((3, 2, 5, 4)), {}, ValueError, ["moveaxis(weight, (-1, -2), (0, 1))"]),
        (np.ones((3, 2, 4, 5)), {"bn_first": True}, ValueError, ["moveaxis(weight, (-1, -2)"]),
        (np.ones((6, 5)), {"bn_first": True}, ValueError, ["5 input", 4]),
        (np.ones((4, 5, 3)), {"transposed": True}, ValueError, ["5 output", 4]),
        (np.ones((4, 4, 1)), {"transposed": True, "bn_first": True}, ValueError, ["border"]),
        (np.ones((4, 1, 1)), {"groups": 3}, ValueError, ["groups", 4, 3]),
        (np.ones((4, 1, 1)), {"groups": 0}, ValueError, ["groups", 0]),
        (np.ones((4, 1, 1)), {"groups": 2.0}, TypeError, ["groups", "float"]),
        (np.ones((4, 1, 1)), {"groups": True}, TypeError, ["groups", "bool"]),
        (np.ones((4, 1)), {"bias": np.ones(3)}, ValueError, ["bias", "(4,)", "(3,)"]),
        (np.ones((4, 1)), {"bias": np.ones(4, complex)}, TypeError, ["bias", "complex128"]),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(rng, weight, kwargs, exception, names):
    with refused(exception, *names):
        fastbn.fold(trained(rng, 4), weight, **kwargs)


# Kernels of other libraries' layouts: their shapes, the layer's channels, the outputs, and options.
LAYOUTS = {
    "after": ((3, 3, 4, 8), 8, 8, {}),
    "before": ((3, 3, 4, 8), 4, 8, {"bn_first": True}),
    "before, in groups": ((3, 3, 2, 8), 4, 8, {"bn_first": True, "groups": 2}),
    "after, in groups": ((3, 3, 2, 8), 8, 8, {"groups": 2}),
    "after, in groups that divide": ((4, 4, 2, 8), 8, 8, {"groups": 2}),
    "before, that fits by chance": ((4, 4, 4, 8), 4, 8, {"bn_first": True}),
    "one axis": ((5, 4, 8), 8, 8, {}),
    "linear": ((4, 8), 8, 8, {}),
    "transposed": ((3, 3, 8, 4), 8, 8, {"transposed": True}),
    "transposed, as Flax has it": ((3, 3, 4, 8), 8, 8, {"transposed": True}),
}


@pytest.mark.parametrize(("shape", "channels", "outputs", "options"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_kernel_of_another_layout_is_told_how_to_pass_it(
    rng, shape, channels, outputs, options, has_bias
):
    bn, weight = trained(rng, channels), some(rng, shape)
    arguments = {"bias": np.ones(outputs) if has_bias else None, **options}
    if not has_bias and shape[:2] == (4, 4) and options.get("bn_first"):
        fastbn.fold(bn, weight, **arguments)  # nothing tells
        return
    with pytest.raises(ValueError, match="if its axes are") as caught:
        fastbn.fold(bn, weight, **arguments)
    advice = str(caught.value).partition(", pass ")[2]
    moved = eval(advice, {"np": np, "weight": weight})
    assert fastbn.fold(bn, moved, **arguments)[1].shape == (outputs,)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 4), {"groups": 3}),
        ((4, 8, 1, 4), {"groups": 3}),
        ((8, 4), {"groups": 0}),
        ((8, 4), {"groups": -1}),
        ((5, 2), {"groups": 2, "transposed": True}),
    ],
    ids=str,
)
def test_groups_that_no_layout_has_are_not_blamed_on_it(rng, shape, options):
    with pytest.raises(ValueError, match=r"groups must divide .*, got -?\d+$"):
        fastbn.fold(trained(rng, 4), some(rng, shape), **options)


# Activations.


@pytest.mark.parametrize(("activation", "slope"), ACTIVATIONS[1:], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_dropped_activation_is_applied_after_the_convolution(rng, activation, slope, transposed):
    x = some(rng, (2, 4, 6, 5), np.float64)
    weight = some(rng, (4, 9, 3, 2) if transposed else (9, 4, 3, 2), np.float64)
    run = convolve_transposed if transposed else convolve
    bn = trained(rng, 9, activation=activation, negative_slope=slope)
    folded = fastbn.fold(bn, weight, transposed=transposed, activation="drop")
    expected = bn(run(x, weight, None))
    actual = reference.activate(run(x, *folded), activation, slope)
    support.assert_close(actual, expected, 1e-13)


def test_dropping_changes_nothing_for_a_layer_without_an_activation(rng):
    bn, weight = trained(rng, 9), some(rng, (9, 4))
    for one, other in zip(
        fastbn.fold(bn, weight), fastbn.fold(bn, weight, activation="drop"), strict=True
    ):
        assert same_bits(one, other)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_an_activation_is_dropped_only_on_request(rng, activation):
    bn, weight = trained(rng, 9, activation=activation), some(rng, (9, 4))
    names = f"the layer has an activation, '{activation}'", "activation='drop'"
    with refused(ValueError, *names, intact=[bn, weight]):
        fastbn.fold(bn, weight)
    with refused(ValueError, f"activation, '{activation}', stands between", intact=[bn]):
        fastbn.fold(bn, some(rng, (4, 9)), bn_first=True, activation="drop")


@pytest.mark.parametrize(
    ("value", "exception"),
    [("relu", ValueError), ("", ValueError), (True, TypeError), (np.ones(2), TypeError)],
    ids=str,
)
def test_what_to_do_with_an_activation_is_none_or_drop(rng, value, exception):
    got = repr(value) if exception is ValueError else type(value).__name__
    for bn in (trained(rng, 9), trained(rng, 9, activation="relu")):
        with refused(exception, f"activation must be None or 'drop', got {got}", intact=[bn]):
            fastbn.fold(bn, some(rng, (9, 4)), activation=value)
