"""What bad input gets: the right exception, a message that says why, and nothing written."""

import sys
from functools import partial
from pathlib import Path

import internals
import kinds
import numpy as np
import pytest
import support
from cases import each
from support import parameters, refused, some

import fastbn
from fastbn import functional as F

SHAPE = (4, 3, 6, 5)


@pytest.fixture
def x(rng):
    return some(rng, SHAPE)


@pytest.fixture
def dy(rng):
    return some(rng, SHAPE)


@pytest.fixture
def bn(rng):
    """A layer with something in every array, and nothing remembered."""
    bn = fastbn.BatchNorm2d(3)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, SHAPE))
    bn.backward(some(rng, SHAPE))
    return bn


# The constructor.


def named(value, exception):
    """What a message should say of a bad value: itself, or its type where that is what is bad."""
    return value if exception is ValueError or value is None else type(value).__name__


@pytest.mark.parametrize("layer", [fastbn.BatchNorm1d, fastbn.BatchNorm2d, fastbn.BatchNorm3d])
@pytest.mark.parametrize(
    ("value", "exception"),
    [(-1, ValueError), (3.0, TypeError), ("3", TypeError), (None, TypeError), (True, TypeError)],
)
def test_num_features_is_a_non_negative_int(layer, value, exception):
    with refused(exception, "num_features", named(value, exception)):
        layer(value)


@pytest.mark.parametrize(
    ("value", "exception"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (-1e-5, ValueError),
        (float("nan"), ValueError),
        ("1e-5", TypeError),
        (None, TypeError),
        (1e-5j, TypeError),
        (True, TypeError),
    ],
)
def test_eps_is_a_positive_number(value, exception):
    with refused(exception, "eps", named(value, exception)):
        fastbn.BatchNorm2d(3, eps=value)
    with refused(exception, "eps", named(value, exception)):
        fastbn.LazyBatchNorm2d(eps=value)


@pytest.mark.parametrize("value", ["0.1", 0.1j, True, [0.1]], ids=str)
def test_momentum_is_a_number_or_none(value):
    with refused(TypeError, "momentum", type(value).__name__):
        fastbn.BatchNorm2d(3, momentum=value)
    with refused(TypeError, "momentum", type(value).__name__):
        fastbn.LazyBatchNorm2d(momentum=value)


# By their own statistics, and by running ones.
NORMALIZATIONS = [
    *(partial(F.batch_norm, training=training) for training in (True, False)),
    *(partial(F.instance_norm, use_input_stats=own) for own in (True, False)),
]


@pytest.mark.parametrize(
    ("options", "exception"),
    [
        ({"momentum": "0.1"}, TypeError),
        ({"momentum": None}, TypeError),
        ({"momentum": 10**400}, ValueError),
        ({"eps": "1e-5"}, TypeError),
        ({"eps": -1.0}, ValueError),
        ({"activation": "tanh"}, ValueError),
        ({"negative_slope": np.inf}, ValueError),
        ({"negative_slope": "0.1"}, TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_options_are_checked_in_every_mode(x, bn, options, exception, masked):
    mask = np.ones((len(x), 1, 1, 1), bool) if masked else None
    for call in NORMALIZATIONS:
        with refused(exception, next(iter(options)), intact=[bn, x]):
            call(x, bn.running_mean, bn.running_var, out=x, mask=mask, **options)


def test_who_asks_a_function_for_the_cumulative_average_is_told_of_layers(x, bn):
    running = bn.running_mean, bn.running_var
    for call in NORMALIZATIONS:
        with refused(TypeError, "BatchNorm2d(..., momentum=None)", intact=[bn, x]):
            call(x, *running, out=x, momentum=None)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2"])
@pytest.mark.parametrize("training", [False, True])
def test_ghost_batch_size_is_checked_in_every_mode(x, bn, size, training):
    with refused((ValueError, TypeError), "ghost_batch_size", intact=[bn, x]):
        F.batch_norm(
            x, bn.running_mean, bn.running_var, training=training, out=x, ghost_batch_size=size
        )


@pytest.mark.parametrize("value", ["yes", 1, 0.0, None], ids=str)
def test_unbiased_is_a_bool(x, bn, value):
    for layer in (fastbn.BatchNorm2d, fastbn.InstanceNorm2d):
        with refused(TypeError, "unbiased", type(value).__name__):
            layer(3, unbiased=value)
    with refused(TypeError, "unbiased", type(value).__name__):
        fastbn.LazyBatchNorm2d(unbiased=value)
    running = bn.running_mean, bn.running_var
    for call in NORMALIZATIONS:
        with refused(TypeError, "unbiased", type(value).__name__, intact=[bn, x]):
            call(x, *running, out=x, unbiased=value)
    bn.unbiased = value
    with refused(TypeError, "unbiased", type(value).__name__, intact=[bn, x]):
        bn(x, out=x)


@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_the_options_of_a_layer_are_finite(name, value):
    for make in (partial(fastbn.BatchNorm2d, 3), fastbn.LazyBatchNorm2d):
        with refused(ValueError, name, value):
            make(**{name: value})
    if name == "eps":
        with refused(ValueError, name, value):
            fastbn.GroupNorm(1, 3, eps=value)


def test_options_that_a_file_has_kept_serve_again(x, tmp_path):
    np.savez(tmp_path / "bn.npz", num_features=3, eps=1e-3, momentum=0.3)
    with np.load(tmp_path / "bn.npz") as file:
        bn = fastbn.BatchNorm2d(**file)
        options = {name: file[name] for name in ("eps", "momentum")}
    assert repr(bn) == repr(fastbn.BatchNorm2d(3, 1e-3, 0.3))
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    y = F.batch_norm(x, mean, var, training=True, **options)
    assert support.same_bits(y, bn(x))
    assert support.same_bits(var, bn.running_var)


@pytest.mark.parametrize("value", [np.array("0.1"), np.array(True), np.array(0.1j), np.ones(1)])
@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_an_array_that_is_no_real_number_is_none(name, value):
    with refused(TypeError, f"{name} must be a real number"):
        fastbn.BatchNorm2d(3, **{name: value})


@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_a_number_beyond_every_float_is_refused(name):
    with refused(ValueError, name):
        fastbn.BatchNorm2d(3, **{name: 10**400})


NUMBERS = [1e-3, np.float32(1e-3), np.float64(1e-3), 1, np.int64(1), np.array(1e-3), np.array(1)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_any_real_number_serves_as_eps_and_momentum(value):
    bn = fastbn.BatchNorm2d(3, eps=value, momentum=value)
    assert bn.eps == bn.momentum == value


@pytest.mark.parametrize("value", [np.int64, "complex64", object, "no dtype", bool])
def test_an_unsupported_dtype_is_refused(value):
    with refused(TypeError):
        fastbn.BatchNorm2d(3, dtype=value)


class OfTorch:
    """A dtype that NumPy does not know."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


FOREIGN_DTYPES = {
    "torch.float64": (OfTorch("float64"), "np.float64"),
    "torch.bfloat16": (OfTorch("bfloat16"), "ml_dtypes.bfloat16"),
    ">f4": (np.dtype(np.float32).newbyteorder(), "np.float32"),
    "its name": (np.dtype(np.float16).newbyteorder().str, "np.float16"),
}


@pytest.mark.parametrize(("value", "mend"), FOREIGN_DTYPES.values(), ids=FOREIGN_DTYPES)
def test_a_dtype_of_another_library_or_byte_order_is_refused_with_the_mend(value, mend):
    with pytest.raises(TypeError, match=f"native byte order, got .*; pass {mend}$"):
        fastbn.BatchNorm2d(3, dtype=value)


def test_an_unknown_device_is_refused():
    with refused(ValueError, "tpu", "cpu"):
        fastbn.BatchNorm2d(3, device="tpu")


@pytest.fixture
def without_cupy(monkeypatch):
    """As if CuPy could not be imported, whether it is installed or not."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, internals.CUDA, raising=False)
    internals.backends.cuda_backend.cache_clear()
    yield
    internals.backends.cuda_backend.cache_clear()


@pytest.mark.usefixtures("without_cupy")
def test_a_gpu_without_cupy_is_refused_with_what_to_install():
    bn = fastbn.BatchNorm2d(3)
    with refused(ImportError, "fastbn[cuda12]", "fastbn[cuda13]", "in a clone", ".[cuda12]"):
        fastbn.BatchNorm2d(3, device="cuda")
    with refused(ImportError, "fastbn[cuda12]", intact=[bn]):
        bn.to("cuda:1")


def test_to_the_cpu_changes_nothing_on_the_cpu():
    bn = fastbn.BatchNorm2d(3)
    weight = bn.weight
    assert bn.to("cpu") is bn
    assert bn.weight is weight


@pytest.mark.parametrize("mode", [3, "train", None])
def test_train_takes_a_bool(bn, mode):
    with refused((TypeError, ValueError), intact=[bn]):
        bn.train(mode)


# The input.


NOT_FLOATING = {
    "int": np.ones(SHAPE, np.int64),
    "uint8": np.ones(SHAPE, np.uint8),
    "bool": np.ones(SHAPE, bool),
    "complex": np.ones(SHAPE, complex),
    "object": np.ones(SHAPE, object),
    "str": np.full(SHAPE, "1.0"),
    "longdouble": np.ones(SHAPE, np.longdouble),
    "list of int": np.ones(SHAPE, int).tolist(),
    "masked": np.ma.ones(SHAPE, np.float32),
    "masked nothing": np.ma.masked_invalid(np.ones(SHAPE)),
    "None": None,
}
if np.dtype(np.longdouble) == np.dtype(np.float64):
    del NOT_FLOATING["longdouble"]
MODES = ["train", "eval", "freeze"]


@pytest.mark.parametrize("value", NOT_FLOATING.values(), ids=NOT_FLOATING)
@each("mode", MODES)
def test_an_input_that_is_not_floating_is_refused(bn, value, mode):
    getattr(bn, mode)()
    with refused(TypeError, intact=[bn]):
        bn(value)


def test_the_message_names_the_dtype_that_came_and_those_that_serve(bn):
    with refused(TypeError, "int64", "float32", intact=[bn]):
        bn(NOT_FLOATING["int"])


def test_the_message_for_a_masked_array_names_the_mask(bn):
    with refused(TypeError, "mask", intact=[bn]):
        bn(NOT_FLOATING["masked"])


@pytest.mark.parametrize(
    ("layer", "good", "shapes"),
    [
        (fastbn.BatchNorm1d, "2D or 3D", [(), (4,), (4, 3, 2, 2)]),
        (fastbn.BatchNorm2d, "4D", [(4, 3), (4, 3, 2), (4, 3, 2, 2, 2), (3,), ()]),
        (fastbn.BatchNorm3d, "5D", [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2, 2)]),
    ],
)
@pytest.mark.parametrize("kwargs", [{}, {"affine": False, "track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_rank_is_refused(layer, good, shapes, kwargs, training):
    bn = layer(3, **kwargs).train(training)
    for shape in shapes:
        with refused(ValueError, good, f"{len(shape)}D", intact=[bn]):
            bn(np.ones(shape, np.float32))


@pytest.mark.parametrize("kwargs", [{}, {"affine": False, "track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [0, 1, 4, 5])
def test_a_wrong_channel_count_is_refused(kwargs, training, channels):
    bn = fastbn.BatchNorm2d(3, **kwargs).train(training)
    with refused(ValueError, 3, channels, intact=[bn]):
        bn(np.ones((4, channels, 2, 2), np.float32))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fastbn.BatchNorm1d, (1, 3)),
        (fastbn.BatchNorm1d, (1, 3, 1)),
        (fastbn.BatchNorm2d, (1, 3, 1, 1)),
        (fastbn.BatchNorm3d, (1, 3, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_single_value_per_channel_is_refused_in_training(layer, shape, momentum):
    bn = layer(3, momentum=momentum)
    one = np.ones(shape, np.float32)
    message = "Expected more than 1 value per channel when training, got input size"
    with refused(ValueError, message, shape, intact=[bn, one]):
        bn(one, out=one)


def test_a_single_value_per_channel_is_refused_in_eval_without_buffers():
    bn = fastbn.BatchNorm2d(3, track_running_stats=False).eval()
    with refused(ValueError, "Expected more than 1 value per channel"):
        bn(np.ones((1, 3, 1, 1), np.float32))


def test_a_single_value_per_channel_is_refused_by_batch_norm():
    mean, var = np.zeros(3), np.ones(3)
    one = np.ones((1, 3, 1, 1), np.float32)
    with refused(ValueError, "Expected more than 1 value per channel", intact=[one, mean, var]):
        F.batch_norm(one, mean, var, training=True, out=one)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 3, 1, 1)], ids=str)
def test_a_single_value_per_channel_of_a_sample_is_refused_by_instance_norm(shape):
    mean, var, x = np.zeros(3), np.ones(3), np.ones(shape, np.float32)
    message = "Expected more than 1 spatial element when training, got input size"
    with refused(ValueError, message, shape, intact=[x, mean, var]):
        F.instance_norm(x, mean, var, out=x)
    F.instance_norm(x, mean, var, use_input_stats=False, out=x)


# The output.


def overlapping(shape, shift):
    """Two arrays of `shape` in one buffer, `shift` elements apart."""
    size = int(np.prod(shape))
    buffer = np.arange(size + shift, dtype=np.float32)
    return buffer[:size].reshape(shape), buffer[shift:].reshape(shape)


OVERLAPS = {
    "one element apart": overlapping(SHAPE, 1),
    "one sample apart": overlapping(SHAPE, 90),
    "reversed": (lambda a: (a, a[::-1]))(overlapping(SHAPE, 0)[0]),
    "transposed": (lambda a: (a, a.transpose(0, 1, 3, 2)))(overlapping((4, 3, 6, 6), 0)[0]),
}
BAD_OUT = {
    "shape": (lambda x: np.empty((4, 3, 6, 4), np.float32), ValueError, [SHAPE, (4, 3, 6, 4)]),
    "rank": (lambda x: np.empty((4, 3, 30), np.float32), ValueError, [SHAPE, (4, 3, 30)]),
    "wider dtype": (lambda x: np.empty(SHAPE, np.float64), TypeError, ["float32", "float64"]),
    "narrower dtype": (lambda x: np.empty(SHAPE, np.float16), TypeError, ["float32", "float16"]),
    "integer dtype": (lambda x: np.empty(SHAPE, np.int32), TypeError, ["float32", "int32"]),
    "read-only": (support.read_only, (ValueError, TypeError), ["writ"]),
    "list": (lambda x: x.tolist(), TypeError, ["list"]),
}


def statistics():
    return np.zeros(3), np.ones(3)


def layer_call(mode):
    def call(x, out, bn):
        getattr(bn, mode)()
        bn(x, out=out)

    return call


FORWARDS = {
    **{mode: layer_call(mode) for mode in MODES},
    "batch_norm": lambda x, out, bn: F.batch_norm(
        x, bn.running_mean, bn.running_var, training=True, out=out
    ),
    "instance_norm": lambda x, out, bn: F.instance_norm(
        x, bn.running_mean, bn.running_var, out=out
    ),
    "batch_norm_forward": lambda x, out, bn: F.batch_norm_forward(x, out=out),
    "batch_norm_elemt": lambda x, out, bn: F.batch_norm_elemt(x, *statistics(), out=out),
}


@pytest.mark.parametrize("call", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize(("make", "exception", "names"), BAD_OUT.values(), ids=BAD_OUT)
def test_a_bad_out_of_a_forward_is_refused(bn, x, call, make, exception, names):
    out = make(x)
    arrays = [a for a in (bn, x, out) if not isinstance(a, list)]
    with refused(exception, *names, intact=arrays):
        call(x, out, bn)


@pytest.mark.parametrize("call", FORWARDS.values(), ids=FORWARDS)
@pytest.mark.parametrize(("x", "out"), OVERLAPS.values(), ids=OVERLAPS)
def test_an_out_that_overlaps_the_input_is_refused(bn, call, x, out):
    with refused(ValueError, "overlap", intact=[bn, x, out]):
        call(x, out, bn)


BACKWARDS = {
    "batch_norm_backward": lambda dy, x, out, bn: F.batch_norm_backward(
        dy, x, bn.weight, *statistics(), out=out
    ),
    "batch_norm_backward_elemt": lambda dy, x, out, bn: F.batch_norm_backward_elemt(
        dy, x, *statistics(), bn.weight, *statistics(), 120, out=out
    ),
}


@pytest.mark.parametrize("call", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize(("make", "exception", "names"), BAD_OUT.values(), ids=BAD_OUT)
def test_a_bad_out_of_a_backward_is_refused(bn, x, dy, call, make, exception, names):
    out = make(x)
    arrays = [a for a in (bn, x, dy, out) if not isinstance(a, list)]
    with refused(exception, *names, intact=arrays):
        call(dy, x, out, bn)


@pytest.mark.parametrize("call", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("overlaps_dy", [True, False])
@pytest.mark.parametrize(("a", "out"), OVERLAPS.values(), ids=OVERLAPS)
def test_an_out_that_overlaps_dy_or_the_input_is_refused(bn, call, overlaps_dy, a, out):
    other = np.ones(a.shape, np.float32)
    dy, x = (a, other) if overlaps_dy else (other, a)
    with refused(ValueError, "overlap", intact=[bn, dy, x, out]):
        call(dy, x, out, bn)


# The backward of a layer. A refused call leaves what was remembered usable.


@each("mode", ["train", "freeze"])
@each("in_place", [True, False])
@pytest.mark.parametrize(
    ("make", "exception", "names"),
    [
        (lambda dy: dy[:2], ValueError, [SHAPE, (2, 3, 6, 5)]),
        (lambda dy: dy[..., None], ValueError, [SHAPE, (4, 3, 6, 5, 1)]),
        (lambda dy: np.float32(1), ValueError, [SHAPE, ()]),
        (lambda dy: dy.astype(int), TypeError, ["int64"]),
        (lambda dy: dy.astype(complex), TypeError, ["complex128"]),
        (lambda dy: dy.astype(object), TypeError, ["object"]),
        (np.ma.asarray, TypeError, ["mask"]),
        (lambda dy: None, TypeError, ["NoneType"]),
    ],
    ids=["batch", "rank", "scalar", "int", "complex", "object", "masked", "None"],
)
def test_a_bad_dy_is_refused(bn, x, dy, mode, in_place, make, exception, names):
    getattr(bn, mode)()
    bn(x, out=x if in_place else None)
    with refused(exception, *names, intact=[bn, x, dy]):
        bn.backward(make(dy))
    bn.backward(dy)


@pytest.mark.parametrize("mode", ["train", "freeze"])
@pytest.mark.parametrize(("make", "exception", "names"), BAD_OUT.values(), ids=BAD_OUT)
def test_a_bad_out_of_a_layer_backward_is_refused(bn, x, dy, mode, make, exception, names):
    getattr(bn, mode)()
    bn(x)
    out = make(x)
    arrays = [a for a in (bn, x, dy, out) if not isinstance(a, list)]
    with refused(exception, *names, intact=arrays):
        bn.backward(dy, out=out)
    bn.backward(dy)


@pytest.mark.parametrize("mode", ["train", "freeze"])
@pytest.mark.parametrize("overlaps_dy", [True, False])
@pytest.mark.parametrize(("a", "out"), OVERLAPS.values(), ids=OVERLAPS)
def test_an_overlapping_out_of_a_layer_backward_is_refused(bn, mode, overlaps_dy, a, out):
    getattr(bn, mode)()
    other = np.ones(a.shape, np.float32)
    dy, x = (a, other) if overlaps_dy else (other, a)
    bn(x)
    with refused(ValueError, "overlap", intact=[bn, dy, x, out]):
        bn.backward(dy, out=out)
    bn.backward(dy)


def test_a_backward_without_a_forward_is_refused(dy):
    bn = fastbn.BatchNorm2d(3)
    with refused(RuntimeError, "forward", intact=[bn, dy]):
        bn.backward(dy, out=dy)


def test_a_second_backward_is_refused(bn, x, dy):
    bn(x)
    bn.backward(dy)
    with refused(RuntimeError, "forward", intact=[bn, dy]):
        bn.backward(dy, out=dy)


def test_a_backward_after_an_eval_forward_is_refused(bn, x, dy):
    bn(x)
    bn.eval()(x)
    with refused(RuntimeError, "forward", intact=[bn, dy]):
        bn.train().backward(dy, out=dy)


def test_a_refused_forward_leaves_what_was_remembered(bn, x, dy):
    bn(x)
    expected = F.batch_norm_backward(dy, x, bn.weight, *F.batch_norm_forward(x)[1:])[0]
    with refused(TypeError):
        bn(NOT_FLOATING["int"])
    assert support.same_bits(bn.backward(dy), expected)


# Parameters, buffers and modes.


def test_freezing_without_running_statistics_is_refused():
    with refused(RuntimeError, "running"):
        fastbn.BatchNorm2d(3, track_running_stats=False).freeze()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_running_statistic_without_the_other_is_refused(bn, x, name, mode):
    setattr(bn, name, None)
    getattr(bn, mode)()
    with refused(ValueError, "running_mean", "running_var", intact=[bn, x]):
        bn(x, out=x)


# The functions with torch's signatures, by the statistics of the input or the running ones.
NORMS = {
    f"{name}, {by}": partial(function, **{keyword: by == "input"})
    for name, function, keyword in (
        ("batch_norm", F.batch_norm, "training"),
        ("instance_norm", F.instance_norm, "use_input_stats"),
    )
    for by in ("input", "running")
}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@norms
@pytest.mark.parametrize("there", ["running_mean", "running_var"])
def test_one_running_statistic_without_the_other_is_refused_by_a_function(x, there, norm):
    arrays = {"running_mean": None, "running_var": None, there: np.ones(3)}
    with refused(ValueError, "running_mean", "running_var", intact=[x, arrays[there]]):
        norm(x, **arrays, out=x)


PARAMETERS = ["weight", "bias", "running_mean", "running_var"]
BAD_PARAMETERS = {
    "length": (np.ones(4, np.float32), ValueError, [4]),
    "rank": (np.ones((3, 1), np.float32), ValueError, [(3, 1)]),
    "int": (np.ones(3, np.int64), TypeError, ["int64"]),
    "complex": (np.ones(3, complex), TypeError, ["complex128"]),
    "object": (np.ones(3, object), TypeError, ["object"]),
}


@each("name", PARAMETERS)
@norms
@pytest.mark.parametrize(
    ("value", "exception", "names"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS
)
def test_a_bad_parameter_is_refused(x, name, norm, value, exception, names):
    arrays = {other: np.ones(3, np.float32) for other in PARAMETERS} | {name: value}
    with refused(exception, name, *names, intact=[x, *arrays.values()]):
        norm(x, **arrays, out=x)


@pytest.mark.parametrize("name", PARAMETERS)
@each("mode", MODES)
@pytest.mark.parametrize(
    ("value", "exception", "names"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS
)
def test_a_bad_parameter_of_a_layer_is_refused(bn, x, name, mode, value, exception, names):
    setattr(bn, name, value)
    getattr(bn, mode)()
    with refused(exception, name, *names, intact=[bn, x]):
        bn(x, out=x)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_read_only_running_statistics_are_refused_in_training(bn, x, name):
    setattr(bn, name, support.read_only(getattr(bn, name)))
    with refused((ValueError, TypeError), name, intact=[bn, x]):
        bn(x, out=x)


def test_a_read_only_counter_is_refused_in_training(bn, x):
    bn.num_batches_tracked = support.read_only(bn.num_batches_tracked)
    with refused((ValueError, TypeError), "num_batches_tracked", intact=[bn, x]):
        bn(x, out=x)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_a_counter_at_the_end_of_its_dtype_is_refused_in_training(bn, x, dtype):
    bn.num_batches_tracked = np.array(np.iinfo(dtype).max, dtype)
    with refused(ValueError, "num_batches_tracked", intact=[bn, x]):
        bn(x, out=x)
    bn.num_batches_tracked -= dtype(1)
    bn(x, out=x)
    assert bn.num_batches_tracked == np.iinfo(dtype).max


@pytest.mark.parametrize(("name", "value"), [("eps", -1.0), ("eps", "0.1"), ("momentum", "0.1")])
def test_a_bad_number_set_later_is_refused(bn, x, name, value):
    setattr(bn, name, value)
    with refused((ValueError, TypeError), name, intact=[bn, x]):
        bn(x, out=x)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "exception"),
    [
        ("weight", np.ones(4, np.float32), ValueError),
        ("weight", np.ones(3, complex), TypeError),
        ("weight_grad", np.ones(4, np.float32), ValueError),
        ("bias_grad", np.ones(4, np.float32), ValueError),
        ("bias_grad", support.read_only(np.ones(3, np.float32)), ValueError),
    ],
    ids=["weight length", "weight dtype", "weight_grad length", "bias_grad length", "read-only"],
)
def test_a_bad_array_set_before_the_backward_is_refused(
    bn, x, dy, in_place, name, value, exception
):
    bn(x, out=x if in_place else None)
    setattr(bn, name, value)
    with refused(exception, name, intact=[bn, x, dy]):
        bn.backward(dy, out=dy)


@pytest.mark.parametrize("eps", [-1.0, float("nan")])
@norms
def test_a_bad_eps_is_refused_by_a_function(x, norm, eps):
    mean, var = np.zeros(3), np.ones(3)
    with refused(ValueError, "eps", intact=[x, mean, var]):
        norm(x, mean, var, eps=eps, out=x)


# The primitives.

STATISTICS = [np.zeros(3), np.ones(3)]
PRIMITIVES = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": F.instance_norm,
    "batch_norm_stats": F.batch_norm_stats,
    "batch_norm_elemt": lambda x: F.batch_norm_elemt(x, *STATISTICS),
    "batch_norm_forward": F.batch_norm_forward,
}
PAIRED = {
    "batch_norm_backward_reduce": lambda dy, x: F.batch_norm_backward_reduce(dy, x, *STATISTICS),
    "batch_norm_backward_elemt": lambda dy, x: F.batch_norm_backward_elemt(
        dy, x, *STATISTICS, None, *STATISTICS, 120
    ),
    "batch_norm_backward": lambda dy, x: F.batch_norm_backward(dy, x, None, *STATISTICS),
}


@pytest.mark.parametrize(
    ("count", "exception"),
    [
        (-1, ValueError),
        (np.inf, ValueError),
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (0, ValueError),
        ("120", TypeError),
        (True, TypeError),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_count_that_is_no_number_of_values_is_refused(x, dy, count, exception, masked):
    mask, out = (x[:, :1] > 0 if masked else None), np.zeros_like(x)
    with refused(exception, "count", intact=[x, dy, out]):
        F.batch_norm_backward_elemt(
            dy, x, *STATISTICS, None, *STATISTICS, count, out=out, mask=mask
        )


def test_a_part_of_a_batch_without_values_has_a_gradient_whatever_the_count(x, dy):
    nothing = np.zeros((len(x), 1, 1, 1), bool)
    for count in (0, 120, 120.0):
        dx = F.batch_norm_backward_elemt(dy, x, *STATISTICS, None, *STATISTICS, count, mask=nothing)
        assert not dx.any()
        dx = F.batch_norm_backward_elemt(dy[:0], x[:0], *STATISTICS, None, *STATISTICS, count)
        assert dx.shape == x[:0].shape


@pytest.mark.parametrize("call", PRIMITIVES.values(), ids=PRIMITIVES)
@pytest.mark.parametrize("value", NOT_FLOATING.values(), ids=NOT_FLOATING)
def test_a_function_refuses_an_input_that_is_not_floating(call, value):
    with refused(TypeError):
        call(value)


@pytest.mark.parametrize("call", PRIMITIVES.values(), ids=PRIMITIVES)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_a_function_refuses_an_input_without_channels(call, shape):
    with refused(ValueError, shape):
        call(np.ones(shape, np.float32))


@pytest.mark.parametrize("call", PAIRED.values(), ids=PAIRED)
@each("which", ["dy", "x"])
@pytest.mark.parametrize("value", NOT_FLOATING.values(), ids=NOT_FLOATING)
def test_a_function_of_two_refuses_what_is_not_floating(x, call, which, value):
    with refused(TypeError):
        call(*((value, x) if which == "dy" else (x, value)))


@pytest.mark.parametrize("call", PAIRED.values(), ids=PAIRED)
@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (4, 3, 30), (4, 3, 5, 6), (1, 3, 1, 1)], ids=str)
def test_a_function_of_two_refuses_different_shapes(x, call, shape):
    with refused(ValueError, SHAPE, shape):
        call(np.ones(shape, np.float32), x)


@pytest.mark.parametrize("name", ["mean", "invstd"])
@pytest.mark.parametrize(
    ("value", "exception"),
    [(np.ones(4), ValueError), (np.ones((3, 1)), ValueError), (np.ones(3, complex), TypeError)],
    ids=["length", "rank", "complex"],
)
def test_a_function_refuses_bad_statistics(x, name, value, exception):
    arrays = {"mean": np.zeros(3), "invstd": np.ones(3)} | {name: value}
    for call in (
        lambda: F.batch_norm_elemt(x, **arrays, out=x),
        lambda: F.batch_norm_backward_reduce(x, x, **arrays),
        lambda: F.batch_norm_backward(x, x, weight=None, **arrays, out=x),
        lambda: F.batch_norm_backward_elemt(
            x, x, **arrays, weight=None, sum_dy=np.ones(3), sum_dy_xhat=np.ones(3), count=120, out=x
        ),
    ):
        with refused(exception, name, intact=[x, *arrays.values()]):
            call()


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("value", "exception", "names"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS
)
def test_a_function_refuses_bad_parameters(x, name, value, exception, names):
    for call in (
        lambda: F.batch_norm_forward(x, **{name: value}, out=x),
        lambda: F.batch_norm_elemt(x, *statistics(), **{name: value}, out=x),
    ):
        with refused(exception, name, *names, intact=[x]):
            call()


@pytest.mark.parametrize("name", ["sum_dy", "sum_dy_xhat"])
def test_the_backward_refuses_sums_of_another_length(x, name):
    sums = {"sum_dy": np.ones(3), "sum_dy_xhat": np.ones(3)} | {name: np.ones(4)}
    with refused(ValueError, name, 4, intact=[x]):
        F.batch_norm_backward_elemt(x, x, *statistics(), None, **sums, count=120, out=x)


# What the messages suggest.


def test_channels_that_come_last_are_recognized(bn):
    with pytest.raises(ValueError, match=r"moveaxis\(x, -1, 1\)"):
        bn(np.zeros((2, 8, 8, 3), np.float32))


def test_channels_that_come_last_in_a_single_sample_are_recognized():
    x, norm = np.zeros((8, 9, 3), np.float32), fastbn.InstanceNorm2d(3)
    with pytest.raises(ValueError, match=r"axis 0 of .*\(8, 9, 3\).*moveaxis\(x, -1, 0\)"):
        norm(x)
    assert norm(np.moveaxis(x, -1, 0)).shape == (3, 8, 9)


@pytest.mark.parametrize(
    ("dimensions", "shape", "hint"),
    [(1, (4, 8), "3D here$"), (2, (4, 8, 6), "4D here, and 3D for a 1d layer$")],
)
def test_a_batch_without_its_axis_of_positions_is_recognized(dimensions, shape, hint):
    norm = getattr(fastbn, f"InstanceNorm{dimensions}d")(8)
    with pytest.raises(ValueError, match=f"x has 4 channels .* axis 0 has them: a batch is {hint}"):
        norm(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (fastbn.BatchNorm1d, (4, 2), "; use BatchNorm1d(2), or LazyBatchNorm1d"),
        (fastbn.BatchNorm2d, (4, 2, 1, 1), "; use BatchNorm2d(2), or LazyBatchNorm2d"),
        (fastbn.BatchNorm3d, (4, 2, 1, 1, 1), "; use BatchNorm3d(2), or LazyBatchNorm3d"),
        (fastbn.InstanceNorm2d, (4, 2, 5, 5), "; use InstanceNorm2d(2), or LazyInstanceNorm2d"),
    ],
)
def test_layers_for_other_channels_are_suggested(layer, shape, words):
    with pytest.raises(ValueError, match="this layer 3") as caught:
        layer(3)(np.zeros(shape, np.float32))
    assert str(caught.value).endswith(words)


@pytest.mark.parametrize("layer", [fastbn.BatchNorm2d, fastbn.LazyBatchNorm2d])
def test_a_batch_of_one_sample_is_suggested(layer):
    bn = layer() if layer is fastbn.LazyBatchNorm2d else layer(3)
    x = np.zeros((3, 4, 5), np.float32)
    with pytest.raises(ValueError, match=r"x\[np.newaxis\] .*; BatchNorm1d takes 3D$"):
        bn(x)
    assert bn.eval()(x[np.newaxis]).shape == (1, 3, 4, 5)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (fastbn.BatchNorm2d, (4, 3), "BatchNorm1d takes 2D"),
        (fastbn.BatchNorm1d, (4, 3, 2, 2), "BatchNorm2d takes 4D"),
        (fastbn.BatchNorm2d, (4, 3, 2, 2, 2), "BatchNorm3d takes 5D"),
        (fastbn.InstanceNorm3d, (4, 3, 2), "InstanceNorm1d takes 3D"),
        (fastbn.InstanceNorm1d, (4, 3, 2, 2), "InstanceNorm2d takes 4D"),
    ],
)
def test_layers_for_another_rank_are_suggested(layer, shape, words):
    x = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=f"; {words}$"):
        layer(3)(x)
    getattr(fastbn, words.split()[0])(3).eval()(x)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1, 2, 3], [4, 5, 6]], "got a list of int64; convert it: np.asarray(x, np.float32)"),
        (([1, 2, 3], [4, 5, 6]), "got a tuple of int64"),
        (np.ones((2, 3), int), "got int64; convert it, for example by astype(np.float32)"),
        (None, "got NoneType"),
        ({"x": np.ones((2, 3))}, "got dict"),
        ("x.npy", "got str"),
        (np.array(None), "got object"),
    ],
    ids=["list", "tuple", "array", "None", "dict", "str", "array of an object"],
)
@pytest.mark.parametrize("name", ["x", "dy"])
def test_what_came_is_told_by_its_type(rng, value, words, name):
    bn, x = fastbn.BatchNorm1d(3), some(rng, (2, 3))
    bn(x)
    with refused(TypeError, words.replace("(x", f"({name}"), intact=[bn]):
        bn(value) if name == "x" else bn.backward(value)


def test_lists_of_different_lengths_are_refused():
    bn = fastbn.BatchNorm1d(3)
    with refused(ValueError, "x must be an array", "different lengths", "mask=", intact=[bn]):
        bn([[1.0, 2.0], [3.0]])


@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 3, 6, 5), (4, 3, 2, 6, 5)])
def test_a_mask_of_whole_samples_is_told_how(rng, shape):
    x, mask = some(rng, shape), np.array([True, False, True, True])
    words = f"mask.reshape({', '.join(['-1', *'1' * (len(shape) - 1)])})"
    with refused(ValueError, words, intact=[x]):
        F.batch_norm(x, None, None, training=True, mask=mask)
    mask = mask.reshape(-1, *[1] * (len(shape) - 1))
    y = F.batch_norm(x, None, None, training=True, mask=mask)
    assert not y[1].any()


def test_no_layer_is_suggested_where_there_is_none(bn):
    with pytest.raises(ValueError, match=r"of shape \(3,\)$"):
        bn(np.zeros(3, np.float32))


def test_layers_for_the_channels_of_a_state_are_suggested(bn):
    with pytest.raises(RuntimeError, match=r": BatchNorm2d\(4\), or LazyBatchNorm2d$"):
        bn.load_state_dict(fastbn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"affine": False}, "; a layer with affine=True has them"),
        ({"bias": False}, "; a layer with bias=True has them"),
        ({"track_running_stats": False}, "; a layer with track_running_stats=True has them"),
        (
            {"affine": False, "track_running_stats": False},
            "; a layer with affine=True, track_running_stats=True has them",
        ),
    ],
)
@pytest.mark.parametrize("make", [fastbn.BatchNorm2d, fastbn.LazyBatchNorm2d])
def test_the_options_that_a_state_needs_are_suggested(bn, make, options, words):
    layer = make(*[3] * (make is fastbn.BatchNorm2d), **options)
    with refused(RuntimeError, words):
        layer.load_state_dict(bn.state_dict("a."), prefix="a.")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("bn.npz", "got str; np.load and safetensors.numpy.load_file read files"),
        (Path("bn.npz"), "np.load"),
        (fastbn.BatchNorm2d(3), "got BatchNorm2d; pass its state_dict()"),
    ],
)
@pytest.mark.parametrize("make", [lambda: fastbn.BatchNorm2d(3), fastbn.LazyBatchNorm2d])
def test_who_passes_no_state_is_told_how_to_get_it(make, state, words):
    with refused(TypeError, words):
        make().load_state_dict(state)


def overlapping_vectors(channels):
    """Two vectors that have one element in common."""
    both = np.zeros(2 * channels - 1, np.float32)
    return both[:channels], both[-channels:]


def view(array):
    return None if array is None else array[:]


ALIASES = {
    "one another": lambda bn: [np.zeros(3, np.float32)] * 2,
    "one another in part": lambda bn: overlapping_vectors(3),
    "running_mean": lambda bn: (bn.running_mean, None),
    "running_var": lambda bn: (None, bn.running_var),
    "weight": lambda bn: (bn.weight, None),
    "weight, by the other": lambda bn: (np.zeros(3, np.float32), bn.weight),
    "bias": lambda bn: (None, bn.bias),
    "a view of running_var": lambda bn: (view(bn.running_var), None),
    "a view of bias": lambda bn: (None, view(bn.bias)),
}


@pytest.mark.parametrize("gradients", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("kind", ["batch 2d", "instance 2d", "group"])
def test_gradients_that_share_memory_are_refused(rng, kind, gradients):
    make, shape = kinds.KINDS[kind]
    layer, x = make(), some(rng, shape)
    out = np.zeros_like(x)
    for mask in (None, x[:, :1] < 5):
        layer.zero_grad()(x, mask=mask)
        layer.weight_grad, layer.bias_grad = gradients(layer)
        if layer.weight_grad is layer.bias_grad is None:
            pytest.skip("a layer without running statistics")
        with refused(ValueError, "share memory", ".copy()", "zero_grad()", intact=[layer, out]):
            layer.backward(x, out=out)
        layer.zero_grad().backward(x)


def test_running_statistics_that_share_memory_are_not_loaded(bn):
    state = bn.state_dict()
    bn.running_mean = bn.running_var
    with refused(ValueError, "share memory", intact=[bn]):
        bn.load_state_dict(state)


def test_not_to_be_strict_is_suggested_where_the_prefix_is_right(bn):
    state = bn.state_dict("a.") | {"a.extra": np.zeros(3)}
    with pytest.raises(RuntimeError, match="strict=False"):
        bn.load_state_dict(state, prefix="a.")
    bn.load_state_dict(state, strict=False, prefix="a.")


@pytest.mark.parametrize(
    "call", [lambda bn: bn.weight, lambda bn: bn.state_dict()], ids=["weight", "state_dict"]
)
def test_what_initializes_a_lazy_layer_is_named(call):
    with pytest.raises((AttributeError, RuntimeError), match=r"the first input, or load_state_d"):
        call(fastbn.LazyBatchNorm2d())


def test_training_is_suggested_where_there_are_no_running_statistics(x):
    with pytest.raises(ValueError, match="training=True"):
        F.batch_norm(x, None, None)
    with pytest.raises(ValueError, match="use_input_stats=True"):
        F.instance_norm(x, use_input_stats=False)


LAYERS = {
    "batch": lambda: fastbn.BatchNorm2d(3),
    "lazy": fastbn.LazyBatchNorm2d,
    "instance": lambda: fastbn.InstanceNorm2d(3),
    "lazy instance": fastbn.LazyInstanceNorm2d,
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("others", [("mask",), (None, "mask"), ("out",)], ids=str)
def test_who_passes_a_mask_or_an_output_by_position_is_told_their_names(x, layer, others):
    values = {"mask": np.ones((4, 1, 6, 5), bool), "out": x, None: None}
    norm = layer()
    name = type(norm).__name__
    with refused(TypeError, f"{name} is called with x alone", "out=..., mask=...", intact=[x]):
        norm(x, *(values[other] for other in others))
    assert type(norm).__name__ == name


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(x, training=True),
        lambda layer, x: layer(x=x),
        lambda layer, x: layer(x, input=x),
        lambda layer, _: layer(),
    ],
    ids=["unknown", "renamed", "twice", "missing"],
)
def test_who_calls_a_layer_wrongly_reads_of_no_internal_class(x, layer, call):
    with refused(TypeError, "layer() ", intact=[x]):
        call(layer(), x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, mask: F.batch_norm(x, np.zeros(3), np.ones(3), mask),
        lambda x, mask: F.instance_norm(x, mask, mask),
        lambda x, mask: F.batch_norm_forward(x, mask),
        lambda x, mask: F.batch_norm_elemt(x, np.zeros(3), np.ones(3), mask),
        lambda x, mask: F.batch_norm_backward(x, x, mask, np.zeros(3), np.ones(3)),
    ],
    ids=["batch_norm", "instance_norm", "forward", "elemt", "backward"],
)
def test_who_passes_a_mask_in_place_of_a_parameter_is_told_its_name(x, call):
    with refused(TypeError, "got bool; a mask is passed by name: mask=..."):
        call(x, np.ones((4, 1, 6, 5), bool))
    with refused(TypeError, "got bool; convert it"):
        F.batch_norm_forward(x > 0)


def test_none_is_suggested_for_the_default_number_of_threads():
    with pytest.raises(ValueError, match="None is the default"):
        fastbn.set_num_threads(0)


def test_running_statistics_are_suggested_to_whom_they_lack():
    with pytest.raises(RuntimeError, match="track_running_stats=True"):
        fastbn.BatchNorm2d(3, track_running_stats=False).freeze()


@pytest.mark.parametrize(
    ("mode", "words"), [("none", "before it"), ("eval", "freeze"), ("twice", "each serves once")]
)
def test_a_backward_says_why_it_cannot_be(bn, x, dy, mode, words):
    if mode == "none":
        bn = fastbn.BatchNorm2d(3)
    else:
        bn(x)
    if mode == "eval":
        bn.eval()(x)
    if mode == "twice":
        bn.backward(dy)
    with pytest.raises(RuntimeError, match=words):
        bn.backward(dy)


def test_a_forgotten_prefix_is_suggested(bn):
    state = bn.state_dict(prefix="layer1.bn2.")
    with pytest.raises(RuntimeError, match=r"prefix='layer1\.bn2\.'"):
        bn.load_state_dict(state)


def test_a_prefix_in_the_place_of_strict_is_refused(bn):
    with refused(TypeError, "strict", intact=[bn]):
        bn.load_state_dict(bn.state_dict("a."), "a.")


def test_bfloat16_that_lost_its_dtype_in_an_npz_is_refused(bn):
    state = bn.state_dict() | {"weight": np.zeros(3, "V2")}
    with refused(TypeError, "safetensors", intact=[bn]):
        bn.load_state_dict(state)


def test_an_output_of_foreign_byte_order_is_refused_by_that(bn):
    x = np.ones((4, 3, 2, 5), np.dtype(np.float32).newbyteorder())
    with refused(TypeError, "byte order", intact=[bn, x]):
        bn(x, out=x)
    assert bn(x).dtype.isnative


def test_a_dlpack_object_that_numpy_cannot_read_is_refused(bn):
    class Foreign:
        def __dlpack__(self, **_):
            raise BufferError("elsewhere")

        def __dlpack_device__(self):
            return (2, 0)

    with refused(TypeError, "Foreign", intact=[bn]):
        bn(Foreign())
