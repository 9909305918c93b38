"""The quick path and the checked path give the same bits, statistics, states and errors."""

import copy
import itertools

import numpy as np
import pytest
from cases import each
from internals import CHECKS, core
from support import (
    LAYER_ARRAYS,
    WRITEABLE_LAYOUTS,
    byte_swapped,
    channels_last,
    contiguous,
    dtype_of,
    parameters,
    read_only,
    some,
)

import fastbn
from fastbn import functional as F

SHAPES = [(4, 3, 5, 7), (2, 64, 2, 2), (3, 600, 1, 1), (6, 2, 33, 40)]
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"unbiased": False},
    {"dtype": np.float64},
    {"dtype": np.float16},
]

ACTIVATIONS = [
    {"activation": "relu"},
    {"activation": "relu6"},
    {"activation": "leaky_relu"},
    {"activation": "leaky_relu", "negative_slope": -0.3},
    {"activation": "leaky_relu", "negative_slope": 0.0},
    {"activation": "".join(["re", "lu"])},  # which is not interned
    {"activation": "leaky_relu", "negative_slope": np.float64(0.2)},
    {"activation": "leaky_relu", "negative_slope": 1},
    {"activation": "leaky_relu", "negative_slope": 1e39},
    {"activation": "leaky_relu", "negative_slope": 1e-39},  # its inverse is not a float32
    {"activation": "relu", "affine": False},
    {"activation": "leaky_relu", "affine": False},
    {},
]


@pytest.fixture
def both_paths():
    """Calls a function on each path, on arguments of its own, and compares what comes of it."""
    was_on = core.set_quick_path(True)

    def compare(function, *arguments):
        outcomes = []
        for on in (True, False):
            core.set_quick_path(on)
            outcomes.append(outcome_of(function, copy.deepcopy(arguments)))
        assert outcomes[0] == outcomes[1]

    yield compare
    core.set_quick_path(was_on)


def outcome_of(function, arguments):
    """What a function returns or raises, and what it leaves of its arguments, to the bit."""
    try:
        result = [described(value) for value in function(*arguments)]
    except Exception as error:
        result = type(error), str(error)
    return result, [described(value) for value in arguments]


def described(value):
    """An array or a layer, to the bit."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.tobytes()
    if isinstance(value, fastbn.BatchNorm2d | fastbn.InstanceNorm2d | fastbn.GroupNorm):
        arrays = {name: described(getattr(value, name, None)) for name in LAYER_ARRAYS}
        return arrays, saved_by(value)
    return repr(value)


def saved_by(layer):
    saved = layer._saved
    if isinstance(saved, str):
        return saved
    names = ["x", "mean", "invstd", "weight", "bias", "alive", "kept", "kept_channels"]
    arrays = [described(getattr(saved, name)) for name in names]
    follows = saved.activation, saved.has_residual
    if saved.activation is not None:
        follows += (saved.negative_slope,)
    batches = saved.batch_size, saved.num_groups
    return arrays, saved.in_place, saved.frozen, batches, follows


@each("x_layout", [contiguous, channels_last])
@each("where", range(3))
def test_evaluation_of_instance_normalization(rng, both_paths, x_layout, where):
    layer = fastbn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    layer(some(rng, (4, 3, 5, 7)))
    x = x_layout(some(rng, (4, 3, 5, 7)))
    both_paths(
        lambda layer, x: [layer.eval()(x, out=list(outputs(x))[where]), layer(x[0].copy())],
        layer,
        x,
    )


@pytest.mark.parametrize("shape", [(4, 105, 1, 1), (1, 12, 5, 7), (2, 3, 10, 7)])
@each("affine", [False, True])
@each("in_place", [False, True])
def test_a_backward_of_an_array_that_was_given_another_shape(
    rng, both_paths, in_place, affine, shape
):
    def call(bn, x):
        bn(x, out=x if in_place else None)
        x.shape = shape
        yield bn.backward(np.ones_like(x))

    both_paths(call, layer_of(3, affine=affine), some(rng, (4, 3, 5, 7)))
    with pytest.raises(RuntimeError, match="has been set"):
        list(call(layer_of(3, affine=affine), some(rng, (4, 3, 5, 7))))


def test_a_weight_of_zero_after_a_forward_in_place(rng, both_paths):
    def call(bn, x, dy):
        bn(x, out=x)
        bn.weight[1] = 0
        yield bn.backward(dy)

    both_paths(call, layer_of(3), some(rng, (4, 3, 5, 7)), some(rng, (4, 3, 5, 7)))


def layer_of(channels, mode="train", family=fastbn.BatchNorm2d, **options):
    bn = family(channels, **options)
    for name, values in zip(("weight", "bias"), parameters(channels), strict=True):
        if getattr(bn, name) is not None:
            getattr(bn, name)[...] = values
    return getattr(bn, mode)()


# Where a call writes: nowhere that is given, somewhere else, over its input.
def outputs(x):
    yield None
    yield np.empty_like(x)
    yield x


@each("where", range(3))
@each("mode", ["train", "eval", "freeze"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_a_layer(rng, both_paths, shape, layout, options, mode, where):
    if "track_running_stats" in options and mode == "freeze":
        mode = "train"  # There is nothing to freeze.
    bn = layer_of(shape[1], mode, **options)
    x, dy = layout(some(rng, shape)), layout(some(rng, shape))

    def step(bn, x, dy):
        for _ in range(2):  # the second backward adds to the gradients of the first
            y = bn(x, out=list(outputs(x))[where])
            yield y
            if mode != "eval":
                yield bn.backward(dy, out=list(outputs(dy))[where])

    both_paths(step, bn, x, dy)


def groups_of(num_groups):
    def family(channels, **options):
        return fastbn.GroupNorm(num_groups, channels, **options)

    return family


def instances(channels, **options):
    return fastbn.InstanceNorm2d(channels, **{"affine": True} | options)


def ghosts_of(batch_size):
    def family(channels, **options):
        return fastbn.BatchNorm2d(channels, ghost_batch_size=batch_size, **options)

    return family


# Families of layers whose samples, or parts of a batch, are normalized by themselves.
BY_SAMPLE = {
    "instances": instances,
    "one group": groups_of(1),
    "groups of 2": groups_of(3),
    "groups of 1": groups_of(6),
    "ghosts of 1": ghosts_of(1),
    "ghosts of 2": ghosts_of(2),
    "ghosts of 3": ghosts_of(3),
    "ghosts of all": ghosts_of(7),
}
by_sample = pytest.mark.parametrize("family", BY_SAMPLE.values(), ids=BY_SAMPLE)


@each("where", range(3))
@each(
    "shape, layout",
    [
        ((7, 6, 5, 8), contiguous),
        ((7, 6, 5, 8), channels_last),
        ((40, 6, 1, 2), contiguous),
        ((1, 6, 3, 3), channels_last),
        ((3, 600, 7, 7), contiguous),
    ],
)
@by_sample
def test_a_step_by_sample(rng, both_paths, family, shape, layout, where):
    x, dy = layout(some(rng, shape)), layout(some(rng, shape))

    def step(layer, x, dy):
        for _ in range(2):
            yield layer(x, out=list(outputs(x))[where])
            yield layer.backward(dy, out=list(outputs(dy))[where])
        yield layer.eval()(x, out=list(outputs(x))[where])

    for options in ({}, {"affine": False}, {"bias": False}):
        both_paths(step, layer_of(shape[1], family=family, **options), x, dy)


@by_sample
def test_a_step_by_sample_of_any_dtype(rng, both_paths, family):
    def step(layer, x, dy):
        yield from (layer(x), layer.backward(dy), layer(x, out=x), layer.backward(dy))

    for name in ("float16", "bfloat16", "float64"):
        x, dy = (some(rng, (7, 6, 5, 8), dtype_of(name)) for _ in range(2))
        both_paths(step, layer_of(6, family=family), x, dy)
        both_paths(step, layer_of(6, family=family, dtype=np.float64), x, dy)


@each("number", range(3))
@by_sample
def test_parameters_that_a_step_by_sample_cannot_recover_with(rng, both_paths, family, number):
    def step(layer, x, dy):
        yield from (layer(x, out=x), layer.backward(dy), layer(x), layer.backward(dy))

    x, dy = (some(rng, (7, 6, 5, 8)) for _ in range(2))
    weight, bias = [(0.0, 1.0), (1e-30, 0.0), (1.0, 100.0)][number]
    for channels in (slice(1), slice(None)):
        layer = layer_of(6, family=family)
        layer.weight[channels], layer.bias[channels] = weight, bias
        both_paths(step, layer, x, dy)


@each("where", ["none", "x", "residual"])
@each("options", [*ACTIVATIONS[:4], {}])
@by_sample
def test_a_step_by_sample_with_an_activation(rng, both_paths, family, options, where):
    def step(layer, x, dy, residual, added):
        for _ in range(2):
            out = {"none": None, "x": x, "residual": residual}[where]
            yield layer(x, out=out, residual=residual if added else None)
            gradients = layer.backward(dy)
            yield from gradients if added else [gradients]

    for added in (True, False) if where != "residual" else (True,):
        for layout in (contiguous, channels_last):
            x, dy, residual = (layout(some(rng, (7, 6, 5, 8))) for _ in range(3))
            layer = layer_of(6, family=family, **options)
            both_paths(lambda *a, added=added: step(*a, added), layer, x, dy, residual)


@by_sample
def test_unusual_steps_by_sample_do_and_say_the_same(rng, both_paths, family):
    def step(layer, x, dy):
        yield layer(x)
        yield layer.backward(dy)

    x = some(rng, (7, 6, 5, 8))
    others = [x[:, :5].copy(), x[:, :, 0, 0].copy(), x[0], x[..., ::2], x[:0], x.astype(int)]
    for other in others:
        both_paths(step, layer_of(6, family=family), x, other)
        both_paths(step, layer_of(6, family=family), other, other)
    single = some(rng, (7, 6, 1, 1))
    both_paths(step, layer_of(6, family=family), single, single)
    both_paths(step, layer_of(6, family=family), single[:1], single[:1])


@each("momentum", [0.1, None])
@each("unbiased", [False, True])
def test_running_statistics_of_ghost_batches(rng, both_paths, momentum, unbiased):
    layer = layer_of(6, family=ghosts_of(3), momentum=momentum, unbiased=unbiased)
    x = some(rng, (7, 6, 5, 8))
    both_paths(lambda layer, x: (layer(x), layer(x[:6].copy())), layer, x)
    for count in (2**63 - 4, 2**63 - 3):
        layer.num_batches_tracked[...] = count
        both_paths(lambda layer, x: [layer(x)], layer, x)


@each("where", range(3))
@each("layout", [contiguous, channels_last])
@pytest.mark.parametrize("options", [*ACTIVATIONS[:4], {}], ids=str)
def test_functions_by_sample(rng, both_paths, options, layout, where):
    def call(x, residual, weight, bias):
        for added in (None, residual):
            follows = options | {"out": list(outputs(x))[where], "residual": added}
            yield F.instance_norm(x, None, None, weight, bias, **follows)
            yield F.group_norm(x, 3, weight, bias, **follows)
            yield F.instance_norm(x, **follows)
            yield F.group_norm(x, 2, **follows)

    both_paths(call, *(layout(some(rng, (4, 6, 5, 8))) for _ in range(2)), *parameters(6))


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 4},
        {"num_groups": 0},
        {"num_groups": 3.0},
        {"num_groups": True},
        {"num_groups": np.int64(3)},
        {"num_groups": 3, "eps": 0.0},
        {"num_groups": 3, "eps": -1.0},
        {"num_groups": 3, "weight": np.ones(5)},
        {"num_groups": 3, "activation": "tanh"},
        {"momentum": None},
        {"momentum": "0.1"},
        {"momentum": 1},
        {"unbiased": 1},
        {"eps": 0.0},
        {"bias": [0.0] * 6},
        {"running_mean": np.zeros(6)},
    ],
    ids=str,
)
def test_unusual_calls_by_sample_do_and_say_the_same(rng, both_paths, options):
    function = F.group_norm if "num_groups" in options else F.instance_norm
    both_paths(lambda x: [function(x, **options)], some(rng, (4, 6, 5, 8)))
    both_paths(lambda x: [function(x, **options)], some(rng, (1, 6, 1, 1)))


@pytest.mark.parametrize(
    "size", [0, -1, 2.0, True, "2", np.int64(2), 2**63 - 1, 2**63, 2**70, None]
)
def test_sizes_of_ghost_batches_that_were_set_later(rng, both_paths, size):
    layer = layer_of(6, family=ghosts_of(3))
    layer.ghost_batch_size = size
    both_paths(lambda layer, x: [layer(x), layer.backward(x)], layer, some(rng, (7, 6, 5, 8)))


@pytest.mark.parametrize("family", [fastbn.BatchNorm2d, groups_of(2)], ids=["batch", "groups"])
def test_a_bias_without_a_weight_is_not_recovered_from_either(rng, both_paths, family):
    layer, x, dy = layer_of(6, family=family), some(rng, (7, 6, 5, 8)), some(rng, (7, 6, 5, 8))
    layer.weight = None
    layer.bias[...] = 1e5
    both_paths(lambda layer, x, dy: (layer(x, out=x), layer.backward(dy)), layer, x, dy)
    expected = copy.deepcopy(layer)
    expected(x.copy())
    layer(x, out=x)
    assert np.array_equal(layer.backward(dy), expected.backward(dy))


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": True},
        {"training": False, "running_mean": np.zeros(6), "running_var": np.ones(6)},
        {"momentum": "a"},
        {"num_features": 2**70},
        {"num_groups": 4},
        {"eps": "a"},
    ],
    ids=str,
)
@by_sample
def test_attributes_that_were_set_by_hand(rng, both_paths, family, changes):
    layer, x = layer_of(6, family=family), some(rng, (7, 6, 5, 8))
    for name, value in changes.items():
        setattr(layer, name, value)
    both_paths(lambda layer, x: [layer(x)], layer, x)


@each("samples", [1, 3])
@by_sample
def test_sums_of_negative_zeros(rng, both_paths, family, samples):
    x = some(rng, (samples, 6, 5, 8))
    both_paths(
        lambda layer, x: [layer(x), layer.backward(np.full_like(x, -0.0))],
        layer_of(6, family=family),
        x,
    )


def test_a_single_sample_beside_a_batch(rng, both_paths):
    def step(layer, x):
        layer(x[0].copy())
        yield layer.backward(x[:1].copy())

    both_paths(step, layer_of(6, family=instances), some(rng, (7, 6, 5, 8)))


@each("layout", [*WRITEABLE_LAYOUTS, read_only, byte_swapped])
@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_any_dtype_and_layout(rng, both_paths, x_dtype, layout):
    x, dy = (some(rng, (4, 3, 5, 7), dtype_of(x_dtype)) for _ in range(2))

    def step(bn, x, dy):
        x, dy = layout(x), layout(dy)
        yield from (bn(x), bn.backward(dy), bn.eval()(x))

    both_paths(step, layer_of(3), x, dy)


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "float64"])
@each("ratio", [0.0, 1.0, 3.9, 4.0, 4.1, 15.9, 16.0, 16.1, np.nan, np.inf])
@each("size", [1e-300, 1e-40, 1e-5, 1.0, 1e4, 1e38, 1e300])
def test_channels_that_cannot_be_recovered_are_kept(rng, both_paths, x_dtype, ratio, size):
    bn = layer_of(3, dtype=np.float64)
    bn.weight[1], bn.bias[1] = size, size * ratio
    x, dy = (some(rng, (4, 3, 5, 7), dtype_of(x_dtype)) for _ in range(2))
    with np.errstate(all="ignore"):
        both_paths(lambda bn, x, dy: (bn(x, out=x), bn.backward(dy, out=dy)), bn, x, dy)


@each("where", ["none", "new", "x", "residual"])
@each("gradient_where", ["none", "dy", "x"])
@each("added", [False, True])
@each("mode", ["train", "eval", "freeze"])
@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
@each("layout", [contiguous, channels_last])
def test_a_step_of_a_layer_with_an_activation(
    rng, both_paths, layout, options, mode, added, gradient_where, where
):
    x, dy, residual = (layout(some(rng, (4, 3, 5, 7))) for _ in range(3))
    if not added and where == "residual":
        return

    def step(bn, x, dy, residual):
        for _ in range(2):
            out = {"none": None, "new": np.empty_like(x), "x": x, "residual": residual}[where]
            yield bn(x, out=out, residual=residual if added else None)
            if mode != "eval":
                out = {"none": None, "dy": dy, "x": x}[gradient_where]
                gradients = bn.backward(dy, out=out)
                yield from gradients if added else [gradients]

    both_paths(step, layer_of(3, mode, **options), x, dy, residual)


@each("options", ACTIVATIONS)
@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "float64"])
@each("added", [False, True])
@each("in_place", [False, True])
def test_functions_with_an_activation(rng, both_paths, options, x_dtype, added, in_place):
    arrays = [some(rng, (4, 3, 5, 7), dtype_of(x_dtype)) for _ in range(3)]

    def call(x, dy, residual, mean, var, weight, bias):
        follows = options | {"residual": residual if added else None}
        yield F.batch_norm(x, mean, var, weight, bias, **follows)
        yield F.batch_norm(x, mean, var, weight, bias, training=True, **follows)
        told = {"bias": bias} if "activation" in options else {}
        y, mean, invstd = F.batch_norm_forward(x, weight, bias, **follows)
        yield from (y, mean, invstd)
        out = {"out": dy if in_place else None}
        yield from F.batch_norm_backward(dy, x, weight, mean, invstd, **told, **follows, **out)
        yield F.batch_norm_forward(x, weight, bias, **follows, out=x if in_place else None)[0]

    both_paths(call, *arrays, np.zeros(3, np.float32), np.ones(3, np.float32), *parameters(3))


def overlapping(x):
    """An array that overlaps x in part."""
    return np.lib.stride_tricks.as_strided(x.reshape(-1)[1:], x.shape, x.strides)


WRONG = {
    "a list": lambda bn, x: {"x": x.tolist()},
    "a number of features that is none": lambda bn, x: setattr(bn, "num_features", 3.0),
    "another number of channels": lambda bn, x: {"x": x[:, :2].copy()},
    "another rank": lambda bn, x: {"x": x[0]},
    "integers": lambda bn, x: {"x": x.astype(np.int32)},
    "complex numbers": lambda bn, x: {"x": x.astype(np.complex64)},
    "a subclass": lambda bn, x: {"x": x.view(np.recarray)},
    "nothing": lambda bn, x: {"x": x[:0]},
    "one value per channel": lambda bn, x: {"x": x[:1, :, :1, :1].copy()},
    "an output of another shape": lambda bn, x: {"out": np.empty((1, *x.shape[1:]), x.dtype)},
    "an output of another dtype": lambda bn, x: {"out": np.empty(x.shape, np.float64)},
    "an output of another layout": lambda bn, x: {"out": channels_last(x)},
    "a read-only output": lambda bn, x: {"out": read_only(x)},
    "an output that is a list": lambda bn, x: {"out": x.tolist()},
    "an output that overlaps the input": lambda bn, x: {"x": x[:-1], "out": overlapping(x[:-1])},
    "a mask": lambda bn, x: {"mask": np.ones((len(x), 1, *x.shape[2:]), bool)},
    "an unknown activation": lambda bn, x: setattr(bn, "activation", "gelu"),
    "an activation that is no string": lambda bn, x: setattr(bn, "activation", 3),
    "a slope of NaN": lambda bn, x: setattr(bn, "negative_slope", np.nan),
    "a bool for a slope": lambda bn, x: setattr(bn, "negative_slope", True),
    "a residual of another shape": lambda bn, x: {"residual": x[:1]},
    "a residual of another dtype": lambda bn, x: {"residual": x.astype(np.float64)},
    "a residual of another layout": lambda bn, x: {"residual": channels_last(x)},
    "a read-only residual": lambda bn, x: {"residual": read_only(x)},
    "a residual that is a list": lambda bn, x: {"residual": x.tolist()},
    "a residual that is the input": lambda bn, x: {"residual": x},
    "a residual that overlaps the input": lambda bn, x: {
        "x": x[:-1],
        "residual": overlapping(x[:-1]),
    },
    "a residual that overlaps the output": lambda bn, x: {
        "x": x[:-1].copy(),
        "out": x[:-1],
        "residual": overlapping(x[:-1]),
    },
    "a residual that is the output that is the input": lambda bn, x: {"out": x, "residual": x},
    "no eps": lambda bn, x: setattr(bn, "eps", 0.0),
    "an integer eps": lambda bn, x: setattr(bn, "eps", 1),
    "eps of NaN": lambda bn, x: setattr(bn, "eps", np.nan),
    "an integer momentum": lambda bn, x: setattr(bn, "momentum", 1),
    "a bool for a momentum": lambda bn, x: setattr(bn, "momentum", True),
    "a number for unbiased": lambda bn, x: setattr(bn, "unbiased", 0),
    "a bool of NumPy's for unbiased": lambda bn, x: setattr(bn, "unbiased", np.False_),
    "a weight of another length": lambda bn, x: setattr(bn, "weight", np.ones(5, np.float32)),
    "a weight that is a list": lambda bn, x: setattr(bn, "weight", [1.0, 2.0, 3.0]),
    "a weight of integers": lambda bn, x: setattr(bn, "weight", np.ones(3, int)),
    "a reversed weight": lambda bn, x: setattr(bn, "weight", bn.weight[::-1]),
    "a byte-swapped bias": lambda bn, x: setattr(bn, "bias", byte_swapped(bn.bias)),
    "one running statistic": lambda bn, x: setattr(bn, "running_var", None),
    "read-only statistics": lambda bn, x: bn.running_mean.setflags(write=False),
    "byte-swapped statistics": lambda bn, x: setattr(
        bn, "running_mean", byte_swapped(bn.running_mean)
    ),
    "statistics that are the weight": lambda bn, x: setattr(bn, "running_var", bn.weight),
    "statistics that are the bias": lambda bn, x: setattr(bn, "running_mean", bn.bias),
    "statistics in the input": lambda bn, x: setattr(bn, "running_var", x.reshape(-1)[1:4]),
    "statistics in the residual": lambda bn, x: {
        "residual": (residual := x.copy()),
        "x": setattr(bn, "running_mean", residual.reshape(-1)[1:4]) or x,
    },
    "a full counter": lambda bn, x: bn.num_batches_tracked.fill(2**63 - 1),
    "a negative counter": lambda bn, x: bn.num_batches_tracked.fill(-1),
    "a small counter": lambda bn, x: setattr(bn, "num_batches_tracked", np.array(3, np.int8)),
    "no counter": lambda bn, x: setattr(bn, "num_batches_tracked", None),
    "a float counter": lambda bn, x: setattr(bn, "num_batches_tracked", np.array(3.0)),
}


@pytest.mark.parametrize("name", WRONG)
@each("mode", ["train", "eval"])
def test_unusual_calls_do_and_say_the_same(rng, both_paths, mode, name):
    bn, x = layer_of(3, mode), some(rng, (4, 3, 5, 7))

    def call(bn, x):
        changed = WRONG[name](bn, x) or {}
        yield bn(changed.pop("x", x), **changed)

    both_paths(call, bn, x)


UNUSUAL_BACKWARDS = {
    "a gradient of another dtype": lambda bn, x: {"dy": x.astype(np.float64)},
    "a gradient of another shape": lambda bn, x: {"dy": x[:1]},
    "a gradient of another layout": lambda bn, x: {"dy": channels_last(x)},
    "sums of another shape": lambda bn, x: setattr(bn, "weight_grad", np.ones(2, np.float32)),
    "sums of another dtype": lambda bn, x: setattr(bn, "weight_grad", np.ones(3, np.float16)),
    "sums of two dtypes": lambda bn, x: setattr(bn, "bias_grad", np.ones(3)),
    "read-only sums": lambda bn, x: setattr(bn, "bias_grad", read_only(np.ones(3, np.float32))),
    "sums without a parameter": lambda bn, x: bn.__dict__.update(
        weight=None, weight_grad=np.ones(3)
    ),
    "one array for both sums": lambda bn, x: bn.__dict__.update(
        weight_grad=(ones := np.ones(3)), bias_grad=ones
    ),
    "an output of another dtype": lambda bn, x: {"out": np.empty(x.shape, np.float64)},
    "a read-only output": lambda bn, x: {"out": read_only(x)},
}


@each("in_place", [False, True])
@pytest.mark.parametrize("name", UNUSUAL_BACKWARDS)
@each("activation", [None, "relu"])
def test_unusual_backwards_do_and_say_the_same(rng, both_paths, name, in_place, activation):
    bn = layer_of(3, activation=activation)
    x, dy = some(rng, (4, 3, 5, 7)), some(rng, (4, 3, 5, 7))

    def call(bn, x, dy):
        yield bn(x, out=x if in_place else None)
        changed = UNUSUAL_BACKWARDS[name](bn, dy) or {}
        yield bn.backward(changed.pop("dy", dy), **changed)

    both_paths(call, bn, x, dy)


@each("name", ["x", "dy"])
def test_sums_of_gradients_in_what_a_backward_reads(rng, both_paths, name):
    x, dy = some(rng, (4, 3, 5, 7)), some(rng, (4, 3, 5, 7))

    def call(bn, x, dy):
        yield bn(x)
        bn.weight_grad = {"x": x, "dy": dy}[name].reshape(-1)[1:4]
        yield bn.backward(dy)

    both_paths(call, layer_of(3), x, dy)


@each("offset", range(-4, 5))
def test_a_bias_beside_and_in_the_output(rng, both_paths, offset):
    x = some(rng, (4, 3, 3, 3))

    def call(x, memory):
        out, bias = memory[8 : 8 + x.size].reshape(x.shape), memory[8 + offset :][:3]
        yield F.batch_norm(x, np.zeros(3), np.ones(3), bias=bias, out=out)

    both_paths(call, x, np.zeros(x.size + 16, np.float32))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@each("training, out", list(itertools.product([False, True], range(3))))
def test_functions(rng, both_paths, layout, training, out):
    x, dy = layout(some(rng, (4, 3, 5, 7))), layout(some(rng, (4, 3, 5, 7)))
    running = np.zeros(3, np.float32), np.ones(3, np.float32)

    def call(x, dy, mean, var, weight, bias):
        vectors = mean, var, weight, bias
        for unbiased in (True, False):
            options = {"out": list(outputs(x))[out], "unbiased": unbiased}
            yield F.batch_norm(x, *vectors, training, 0.3, **options)
        y, mean, invstd = F.batch_norm_forward(x, weight, bias)
        yield from (y, mean, invstd)
        yield from F.batch_norm_backward(dy, x, weight, mean, invstd, out=list(outputs(dy))[out])

    both_paths(call, x, dy, *running, *parameters(3))


def test_a_plain_call_takes_the_quick_path(rng, monkeypatch):
    bn, x = layer_of(3), some(rng, (4, 3, 5, 7))

    def checked(*_):
        raise AssertionError

    monkeypatch.setattr(f"{CHECKS}.as_array", checked)
    bn(x)
    bn.backward(x)
    bn(x, out=x)
    bn.backward(x, out=x)
    bn.eval()(x)
    y, mean, invstd = F.batch_norm_forward(x)
    F.batch_norm_backward(y, x, None, mean, invstd)
    F.batch_norm(x, bn.running_mean, bn.running_var, training=True)
    F.batch_norm(x, bn.running_mean, bn.running_var)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize(
    "family", [*BY_SAMPLE.values(), fastbn.BatchNorm2d], ids=[*BY_SAMPLE, "frozen"]
)
def test_a_plain_step_of_any_family_takes_the_quick_path(rng, monkeypatch, family, options):
    layer, x = layer_of(6, family=family, **options), some(rng, (7, 6, 5, 8))
    layer.weight[...] = 2.0  # so that a step in place recovers all channels
    if family is fastbn.BatchNorm2d:
        layer.freeze()

    def checked(*_):
        raise AssertionError

    monkeypatch.setattr(f"{CHECKS}.as_array", checked)
    layer(x)
    layer.backward(x.copy())
    layer(x, residual=x)
    layer.backward(x.copy(), residual_out=np.empty_like(x))
    layer(x, residual=x)
    layer.backward(x.copy(), out=x)
    layer(x, out=x)
    layer.backward(x, out=x)
    layer.eval()(x)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "".join(["leaky", "_relu"])])
def test_a_plain_call_with_an_activation_takes_the_quick_path(rng, monkeypatch, activation):
    bn = layer_of(3, activation=activation)
    x, dy = (some(rng, (4, 3, 5, 7)) for _ in range(2))

    def checked(*_):
        raise AssertionError

    monkeypatch.setattr(f"{CHECKS}.as_array", checked)
    activation = bn.activation
    bn(x)
    bn.backward(x)
    bn(x, residual=x)
    bn(x, residual=x, out=np.empty_like(x))
    for options in ({}, {"residual": dy}, {"residual": x}):
        bn(x, out=x, **options)
        bn.backward(dy, out=x)
    bn.eval()(x, out=x)
    bn(x, residual=x)
    y, mean, invstd = F.batch_norm_forward(x, activation=activation, residual=x)
    F.batch_norm_backward(y, x, None, mean, invstd, bias=None, activation=activation)
    F.batch_norm(x, bn.running_mean, bn.running_var, activation=activation, training=True)
    F.batch_norm(x, bn.running_mean, bn.running_var, activation=activation, residual=y, out=y)


def test_an_override_of_a_method_is_not_passed_over(rng):
    class Doubled(fastbn.BatchNorm2d):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

        def backward(self, dy, **options):
            return super().backward(2 * dy, **options)

    x = some(rng, (4, 3, 5, 7))
    plain, doubled = fastbn.BatchNorm2d(3), Doubled(3)
    assert (doubled(x) == 2 * plain(x)).all()
    assert (doubled.backward(x) == plain.backward(2 * x)).all()


def test_it_can_be_switched_off_in_the_environment(tmp_path):
    from support import output_of

    code = "from fastbn import _core; print(_core.set_quick_path(True))"
    assert output_of(code, tmp_path, FASTBN_QUICK_PATH="0").strip() == "False"
    assert output_of(code, tmp_path, FASTBN_QUICK_PATH=None).strip() == "True"
