"""Bad activations and residuals: the right exception, what is legal, and nothing written."""

import numpy as np
import pytest
import support
from cases import each, in_pairs
from internals import core
from support import dtype_of, failures_without_a_trace, refused, some

import fastbn
from fastbn import functional as F

SHAPE = (4, 4, 6, 5)
STATISTICS = np.zeros(4), np.ones(4)
LEGAL = "activation must be None, 'relu', 'relu6' or 'leaky_relu', got"


def alone(channels, **options):
    """A SyncBatchNorm of this process alone."""
    comm = pytest.importorskip("mpi4py.MPI").COMM_SELF
    return fastbn.SyncBatchNorm(channels, comm=comm, **options)


LAYERS = {
    "batch": fastbn.BatchNorm2d,
    "lazy": lambda _, **options: fastbn.LazyBatchNorm2d(**options),
    "ghost": lambda c, **options: fastbn.BatchNorm2d(c, ghost_batch_size=2, **options),
    "frozen": lambda c, **options: fastbn.BatchNorm2d(c, **options).freeze(),
    "instance": lambda c, **options: fastbn.InstanceNorm2d(c, affine=True, **options),
    "group": lambda c, **options: fastbn.GroupNorm(2, c, **options),
    "sync": alone,
}


@pytest.fixture(params=LAYERS)
def make(request):
    """What makes a layer of each kind, of a number of channels."""
    return LAYERS[request.param]


@pytest.fixture
def arrays(rng):
    """x, dy and a residual."""
    return [some(rng, SHAPE) for _ in range(3)]


FORWARDS = {
    "batch_norm": lambda x, **options: F.batch_norm(x, *STATISTICS, **options),
    "batch_norm in training": lambda x, **options: F.batch_norm(
        x, *STATISTICS, training=True, **options
    ),
    "batch_norm_forward": F.batch_norm_forward,
    "instance_norm": F.instance_norm,
    "group_norm": lambda x, **options: F.group_norm(x, 2, **options),
}
BACKWARD = "batch_norm_backward"
FUNCTIONS = FORWARDS | {
    BACKWARD: lambda x, **options: F.batch_norm_backward(
        x, x, None, *STATISTICS, bias=None, **options
    )
}
forwards = each("call", FORWARDS)
functions = each("call", FUNCTIONS)


# Options.

BAD_OPTIONS = [
    ({"activation": "gelu"}, ValueError, f"{LEGAL} 'gelu'"),
    ({"activation": "ReLU"}, ValueError, f"{LEGAL} 'ReLU'"),
    ({"activation": ""}, ValueError, f"{LEGAL} ''"),
    ({"activation": np.maximum}, TypeError, f"{LEGAL} ufunc"),
    ({"activation": True}, TypeError, f"{LEGAL} bool"),
    ({"activation": b"relu"}, TypeError, f"{LEGAL} bytes"),
    ({"activation": ["relu"]}, TypeError, f"{LEGAL} list"),
    ({"negative_slope": np.nan}, ValueError, "negative_slope must be finite, got nan"),
    ({"negative_slope": -np.inf}, ValueError, "negative_slope must be finite, got -inf"),
    ({"negative_slope": 10**400}, ValueError, "negative_slope must be a number that a float"),
    ({"negative_slope": "0.1"}, TypeError, "negative_slope must be a real number, got str"),
    ({"negative_slope": True}, TypeError, "negative_slope must be a real number, got bool"),
    ({"negative_slope": None}, TypeError, "negative_slope must be a real number, got NoneType"),
    ({"negative_slope": [0.1]}, TypeError, "negative_slope must be a real number, got list"),
]
bad_options = each("options, exception, message", BAD_OPTIONS)


@bad_options
@functions
def test_a_function_says_which_options_are_legal(arrays, call, options, exception, message):
    x, _, _ = arrays
    options = {"activation": "leaky_relu"} | options
    with refused(exception, message, intact=[x, *STATISTICS]):
        call(x, out=x, **options)


@bad_options
def test_a_layer_says_which_options_are_legal(arrays, make, options, exception, message):
    x, _, residual = arrays
    options = {"activation": "leaky_relu"} | options
    with refused(exception, message):
        make(4, **options)
    layer = make(4)
    if layer.has_uninitialized_params():
        layer(x)
    for name, value in options.items():
        setattr(layer, name, value)
    for added in (None, residual):
        with refused(exception, message, intact=[layer, x, residual]):
            layer(x, out=x, residual=added)


def beyond_float32(x_dtype, slope):
    """What is said of a slope that the arithmetic of x does not hold."""
    return f"negative_slope must be in float32's range where x is {x_dtype}, got {slope}"


@pytest.mark.parametrize("x_dtype", ["float64", "float32", "float16", "bfloat16"])
@each("slope", [1e39, -1e39])
@functions
def test_a_slope_beyond_the_arithmetic_of_the_input(rng, call, x_dtype, slope):
    x = some(rng, SHAPE, dtype_of(x_dtype))
    options = {"activation": "leaky_relu", "negative_slope": slope}
    call(x, **options | {"activation": "relu"})
    if x_dtype == "float64":
        call(x, **options)
        return
    with refused(ValueError, beyond_float32(x_dtype, slope), intact=[x]):
        call(x, **options)


def test_a_layer_refuses_a_slope_beyond_the_arithmetic_of_its_input(arrays, make):
    x, dy, residual = arrays
    layer = make(4, activation="leaky_relu", negative_slope=1e39)
    layer(x.astype(float))
    layer.backward(dy)
    for added in (None, residual):
        with refused(ValueError, beyond_float32("float32", 1e39), intact=[layer, x, residual]):
            layer(x, out=x, residual=added)


@each("slope", [np.float32(0.25), np.float64(0.25), 1, np.int64(1), -0.5, 0.0])
def test_any_real_number_serves_as_a_slope(arrays, make, slope):
    layer = make(4, activation="leaky_relu", negative_slope=slope)
    assert type(layer.negative_slope) is float
    layer(arrays[0])


# Residuals.


def overlapping(a, elements):
    """An array, and one that begins so many elements behind it."""
    buffer = np.zeros(a.size + elements, a.dtype)
    buffer[: a.size] = a.reshape(-1)
    return buffer[: a.size].reshape(a.shape), buffer[elements:].reshape(a.shape)


LIKE_X = "residual must have x's shape"
BAD_RESIDUALS = {
    "batch": (lambda x: x[:2], ValueError, [LIKE_X, SHAPE, (2, *SHAPE[1:])]),
    "rank": (lambda x: x[0], ValueError, [LIKE_X, SHAPE]),
    "broadcast": (lambda x: x[:, :, :1, :1], ValueError, [LIKE_X, SHAPE]),
    "scalar": (lambda x: np.float32(1), ValueError, [LIKE_X, ()]),
    "wider": (lambda x: x.astype(float), TypeError, ["float32", "float64", "astype"]),
    "narrower": (lambda x: x.astype(np.float16), TypeError, ["float32", "float16"]),
    "int": (lambda x: x.astype(int), TypeError, ["residual must be float32", "int64"]),
    "complex": (lambda x: x.astype(complex), TypeError, ["residual must be", "complex128"]),
    "list": (lambda x: x.tolist(), TypeError, ["x's dtype float32", "list of float64"]),
    "masked": (np.ma.asarray, TypeError, ["residual", "mask"]),
    "string": (lambda x: "x", TypeError, ["residual", "str"]),
}
bad_residuals = each("bad, exception, names", BAD_RESIDUALS)


@bad_residuals
@functions
def test_a_function_refuses_a_bad_residual(arrays, call, bad, exception, names):
    x, _, _ = arrays
    with refused(exception, *names, intact=[x, *STATISTICS]):
        call(x, residual=bad(x), out=x, activation="relu")


@bad_residuals
@each("mode", ["train", "eval"])
def test_a_layer_refuses_a_bad_residual(arrays, make, mode, bad, exception, names):
    x, _, _ = arrays
    layer = make(4)
    if layer.has_uninitialized_params():
        layer(x)
    with refused(exception, *names, intact=[layer, x]):
        getattr(layer, mode)()(x, residual=bad(x), out=x)


@each("elements", [1, 30, 120])
@forwards
def test_an_out_that_overlaps_the_residual_in_part_is_refused(arrays, call, elements):
    residual, out = overlapping(arrays[2], elements)
    message = "out must be residual, or not overlap it; it overlaps residual in part"
    with refused(ValueError, message, intact=[arrays[0], residual]):
        call(arrays[0], residual=residual, out=out)
    with refused(ValueError, message, intact=[residual]):  # out is x, which overlaps it
        call(out, residual=residual, out=out)


# The gradient of the residual.

BAD_OUTS = {
    "shape": (lambda a: a[..., :4].copy(), ValueError, ["residual_out must have x's shape", SHAPE]),
    "dtype": (lambda a: a.astype(float), TypeError, ["residual_out must have x's dtype float32"]),
    "read-only": (support.read_only, ValueError, ["residual_out must be writeable"]),
    "list": (lambda a: a.tolist(), TypeError, ["residual_out must be an ndarray, got list"]),
    "itself": (
        lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (0, *a.strides[1:])),
        ValueError,
        ["residual_out must have elements of its own"],
    ),
}
bad_outs = each("bad, exception, names", BAD_OUTS)


def after_a_forward(make, arrays, in_place=False, **options):
    """A layer that has had a forward with a residual."""
    x, _, residual = arrays
    layer = make(4, activation="relu", **options)
    layer(x, out=x if in_place else None, residual=residual)
    return layer


def functional_backward(arrays, **options):
    x, dy, residual = arrays
    options = {"bias": None, "activation": "relu", "residual": residual} | options
    return F.batch_norm_backward(dy, x, None, *STATISTICS, **options)


@bad_outs
def test_a_bad_residual_out_is_refused(arrays, make, bad, exception, names):
    layer = after_a_forward(make, arrays)
    wrong = bad(np.zeros_like(arrays[0]))
    with refused(exception, *names, intact=[layer, *arrays]):
        layer.backward(arrays[1], residual_out=wrong)
    with refused(exception, *names, intact=arrays):
        functional_backward(arrays, residual_out=wrong)
    layer.backward(arrays[1])


def test_a_residual_out_that_overlaps_what_is_read_or_written_is_refused(arrays, make):
    x, dy, residual = arrays
    a, b = overlapping(dy, 1)
    layer = after_a_forward(make, arrays)
    for gradient, options, message in [
        (dy, {"residual_out": x}, "residual_out must not overlap x"),
        (dy, {"residual_out": x[::-1]}, "residual_out must not overlap x, which is read after"),
        (a, {"residual_out": b}, "residual_out must be dy, or not overlap it"),
        (dy, {"residual_out": a, "out": a}, "residual_out must not overlap out"),
        (dy, {"residual_out": a, "out": b}, "residual_out must not overlap out"),
        (dy, {"residual_out": dy, "out": dy}, "residual_out must not overlap out"),
    ]:
        with refused(ValueError, message, intact=[layer, *arrays, a, b]):
            layer.backward(gradient, **options)
        with refused(ValueError, message, intact=[*arrays, a, b]):
            functional_backward([x, gradient, residual], **options)
    layer.backward(dy)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_output_of_a_backward_that_overlaps_a_parameter_is_refused(arrays, make, name):
    layer, out = after_a_forward(make, arrays), np.ones_like(arrays[0])
    setattr(layer, name, out.reshape(-1)[7:11])
    for place in ("out", "residual_out"):
        message = f"{place} must not overlap {name}"
        with refused(ValueError, message, intact=[layer, *arrays, out]):
            layer.backward(arrays[1], **{place: out})


@pytest.mark.parametrize("place", ["out", "residual_out"])
@pytest.mark.parametrize("name", ["bias", "y"])
def test_an_output_that_overlaps_what_tells_the_derivatives_is_refused(arrays, place, name):
    out = np.ones_like(arrays[0])
    told = {"bias": out.reshape(-1)[7:11], "y": out}[name]
    with refused(ValueError, f"{place} must not overlap {name}", intact=[*arrays, out]):
        functional_backward(arrays, **{name: told, place: out})


def test_a_residual_out_needs_a_forward_with_a_residual(arrays, make):
    x, dy, residual = arrays
    layer = make(4, activation="relu")
    layer(x)
    message = "residual_out needs a forward with a residual before it"
    with refused(ValueError, message, intact=[layer, *arrays]):
        layer.backward(dy, residual_out=residual)
    layer.backward(dy)


# What tells the derivatives.


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_without_bias_and_y_the_derivatives_are_not_known(arrays, activation):
    x, dy, residual = arrays
    options = {"activation": activation, "out": dy}
    message = f"bias is needed with activation='{activation}' and without y"
    for more in ({}, {"residual": residual}):
        with refused(TypeError, message, "bias=None", intact=arrays):
            F.batch_norm_backward(dy, x, None, *STATISTICS, **options, **more)


def test_y_does_not_tell_the_derivatives_of_a_negative_slope(arrays):
    options = {"activation": "leaky_relu", "negative_slope": -0.1}
    with refused(ValueError, "below 0, got -0.1", "pass bias", intact=arrays):
        functional_backward(arrays, y=arrays[0], **options)


@pytest.mark.parametrize(
    ("bad", "exception", "message"),
    [
        (lambda y: y[:1], ValueError, "y must have x's shape"),
        (lambda y: y.astype(float), TypeError, "y must have x's dtype float32, got float64"),
        (lambda y: y.astype(int), TypeError, "y must be float32"),
    ],
)
def test_a_bad_y_is_refused(arrays, bad, exception, message):
    with refused(exception, message, intact=arrays):
        functional_backward(arrays, y=bad(arrays[0]))


# After a call that fails, every array is what it was.

ACTIVATIONS = [None, "relu", "leaky_relu"]
PLACES = [(False, "out"), (True, "out"), (True, "residual_out")]
LAYOUTS = [support.contiguous, support.channels_last, support.sliced]


STEPS = in_pairs(LAYOUTS, ACTIVATIONS, [False, True], PLACES, [False, True])


@each("layout, activation, masked, added_and_place, in_place", STEPS)
def test_no_memory_in_a_step_of_a_layer(
    rng, make, layout, activation, masked, added_and_place, in_place
):
    added, place = added_and_place
    layer = make(4, activation=activation)
    layer.eval()(some(rng, SHAPE))  # A lazy layer has its arrays from now on.
    layer.train()
    mask = np.ones((4, 1, 6, 5), bool) if masked else None
    x, dy, residual = (layout(some(rng, SHAPE)) for _ in range(3))
    out, options = x if in_place else None, {"residual": residual if added else None}
    failures_without_a_trace(lambda: layer(x, out=out, mask=mask, **options), layer, x, residual)
    failures_without_a_trace(lambda: layer.backward(dy, **{place: dy}), layer, x, dy)


@each("layout", LAYOUTS)
@each("tells", ["bias", "y"])
@each("place", ["out", "residual_out"])
@each("masked", [False, True])
@each("size", [None, 2])
def test_no_memory_in_a_backward_of_a_function(rng, layout, tells, place, masked, size):
    x, dy, residual = (layout(some(rng, SHAPE)) for _ in range(3))
    parts = {"mask": np.ones((4, 1, 6, 5), bool) if masked else None, "ghost_batch_size": size}
    options = {"activation": "relu", "residual": residual} | parts
    y, mean, invstd = F.batch_norm_forward(x, **options)
    told = {"bias": {"bias": None}, "y": {"y": y}}[tells]
    failures_without_a_trace(
        lambda: F.batch_norm_backward(dy, x, None, mean, invstd, **told, **options, **{place: dy}),
        *(x, dy, residual, y),
    )


KERNELS = ["forward", "elemt", "stats", "backward", "backward_reduce", "backward_elemt"]
KERNELS += ["group_forward", "group_backward"]
KERNELS += [name for name in vars(core) if name.startswith("try_")]


def interrupted(monkeypatch, kernel, call, *things):
    """Calls, and interrupts before a kernel; tells whether it was reached, with nothing written."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = [support.bits_of(thing) for thing in things]
    with monkeypatch.context() as patched:
        patched.setattr(core, kernel, interrupt)
        try:
            call()
        except KeyboardInterrupt:
            assert [support.bits_of(thing) for thing in things] == before
            return True
    return False


@each("added, place", PLACES)
@each("kernel", KERNELS)
def test_an_interrupted_step_of_a_layer_changes_nothing(
    arrays, make, monkeypatch, added, place, kernel
):
    x, dy, residual = arrays
    layer = make(4, activation="relu")
    layer.eval()(x)
    layer.train()
    options = {"residual": residual} if added else {}

    def forward():
        layer(x, out=x, **options)

    def backward():
        layer.backward(dy, **{place: dy})

    for call in (forward, backward):
        if interrupted(monkeypatch, kernel, call, layer, *arrays):
            call()


def test_a_rank_that_fails_leaves_the_gradients_of_the_others_alone(arrays, monkeypatch):
    """As when another rank has no memory: the reduction raises, and a second backward is right."""
    x, dy, residual = arrays
    for added, place in PLACES:
        layer = alone(4, activation="relu")
        layer(x, residual=residual if added else None)

        def fail(*_):
            raise RuntimeError("rank 1 failed")

        group = type(layer._all_ranks())
        with monkeypatch.context() as patched, refused(RuntimeError, intact=[layer, *arrays]):
            patched.setattr(group, "total_sums", fail)
            layer.backward(dy, **{place: dy})
