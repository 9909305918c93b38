"""After a call that fails, whatever the reason and the moment, every array is what it was."""

import io
import sys
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import support
from cases import each
from internals import CORE, core
from support import (
    failing_allocation,
    failures_without_a_trace,
    output_of,
    parameters,
    refused,
    some,
)

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.sanitize

SHAPE = (4, 3, 6, 5)
LAYOUTS = [support.contiguous, support.channels_last, support.sliced, support.byte_swapped]


def layer(rng, mode="train", dtype=np.float32):
    """A layer with something in every array, and a channel that in-place training sets aside."""
    bn = fastbn.BatchNorm2d(3, momentum=None, dtype=dtype)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn.weight[1] = 0
    bn(some(rng, SHAPE))
    bn.backward(some(rng, SHAPE))
    return getattr(bn, mode)()


STATISTICS = np.zeros(3), np.ones(3)
SUMS = np.zeros(3), np.ones(3)
FORWARDS = {
    "layer": lambda x, out, bn: bn(x, out=out),
    "batch_norm": lambda x, out, bn: F.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True, out=out
    ),
    "instance_norm": lambda x, out, bn: F.instance_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, out=out
    ),
    "batch_norm_forward": lambda x, out, bn: F.batch_norm_forward(x, bn.weight, bn.bias, out=out),
    "batch_norm_elemt": lambda x, out, bn: F.batch_norm_elemt(
        x, *STATISTICS, bn.weight, bn.bias, out=out
    ),
    "batch_norm_stats": lambda x, out, bn: F.batch_norm_stats(x),
}
BACKWARDS = {
    "layer": lambda dy, x, out, bn: bn.backward(dy, out=out),
    "batch_norm_backward": lambda dy, x, out, bn: F.batch_norm_backward(
        dy, x, bn.weight, *STATISTICS, out=out
    ),
    "batch_norm_backward_elemt": lambda dy, x, out, bn: F.batch_norm_backward_elemt(
        dy, x, *STATISTICS, bn.weight, *SUMS, 120, out=out
    ),
    "batch_norm_backward_reduce": lambda dy, x, out, bn: F.batch_norm_backward_reduce(
        dy, x, *STATISTICS
    ),
}


# Memory that is not to be had.


@each("make", LAYOUTS)
@each("in_place", [False, True])
@each("mode", ["train", "freeze", "eval"])
def test_no_memory_in_a_forward(rng, mode, in_place, make):
    bn, x = layer(rng, mode), make(some(rng, SHAPE))
    out = x if in_place and x.dtype.isnative else None
    failures_without_a_trace(lambda: bn(x, out=out), bn, x)


@each("make", LAYOUTS)
@each("in_place", [False, True])
@each("mode", ["train", "freeze"])
def test_no_memory_in_a_backward(rng, mode, in_place, make, dtype):
    bn, x, dy = layer(rng, mode), some(rng, SHAPE, dtype), make(some(rng, SHAPE, dtype))
    in_place = in_place and dy.dtype.isnative
    bn(x, out=x if in_place else None)
    out = dy if in_place else None
    failures_without_a_trace(lambda: bn.backward(dy, out=out), bn, x, dy)


@pytest.mark.parametrize("name", FORWARDS)
def test_no_memory_in_a_function(rng, name):
    bn, x = layer(rng), support.sliced(some(rng, SHAPE))
    call = FORWARDS[name]
    assert failures_without_a_trace(lambda: call(x, x, bn), bn, x)


@pytest.mark.parametrize("name", BACKWARDS)
def test_no_memory_in_a_function_of_the_backward(rng, name):
    bn, x, dy = layer(rng), some(rng, SHAPE), support.sliced(some(rng, SHAPE))
    bn(x)
    call = BACKWARDS[name]
    assert failures_without_a_trace(lambda: call(dy, x, dy, bn), bn, x, dy)


@pytest.mark.parametrize("lazy", [False, True])
def test_no_memory_while_a_state_is_loaded(rng, lazy):
    bn = fastbn.LazyBatchNorm2d() if lazy else layer(rng)
    state = layer(rng, dtype=np.float64).state_dict()
    kept = [] if lazy else [bn]
    failures_without_a_trace(lambda: bn.load_state_dict(state), *kept)


def test_a_lazy_layer_without_memory_stays_lazy(rng):
    bn, x = fastbn.LazyBatchNorm2d(), some(rng, SHAPE)
    for number in (1, 2):
        with failing_allocation(number), pytest.raises(MemoryError):
            bn(x)
        assert type(bn) is fastbn.LazyBatchNorm2d
        assert bn.has_uninitialized_params()
    assert bn(x).shape == SHAPE


LIMITED = """
import resource
import numpy as np
import fastbn

bn = fastbn.BatchNorm2d(16)
x = np.random.default_rng(0).standard_normal((16, 16, 256, 256), dtype=np.float32)
bn(x[:1]), bn.backward(x[:1])  # starts what threads there are
arrays = [x, bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.weight_grad]
before = [array.tobytes() for array in arrays]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
for call in (bn, bn.eval(), fastbn.functional.batch_norm_forward):
    try:
        call(x)
    except MemoryError:
        print("MemoryError")
    bn.train()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print([array.tobytes() for array in arrays] == before)
"""


@pytest.mark.serial
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by way of /proc")
def test_an_output_that_the_system_has_no_memory_for(tmp_path):
    assert output_of(LIMITED, tmp_path).split() == ["MemoryError"] * 3 + ["True"]


# Of so many channels that the memory of a vector is the system's, which has no more from the end of
# the kernel on that writes the result.
EXHAUSTED = """
import resource
import numpy as np
import fastbn
import {core} as core

def exhausting(kernel, out):
    def call(*args):
        result = kernel(*args)
        if any(np.may_share_memory(a, out) for a in args if isinstance(a, np.ndarray)):
            resource.setrlimit(resource.RLIMIT_AS, (0, resource.RLIM_INFINITY))
        return result
    return call

def attempt(call, out):
    for name, kernel in kernels.items():
        setattr(core, name, exhausting(kernel, out))
    try:
        call(out, out=out)
        print("done")
    except MemoryError:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for name, kernel in kernels.items():
        setattr(core, name, kernel)

channels = 2**18
fastbn.set_num_threads(1)
bn = {layer}
kernels = {{name: getattr(core, name) for name in {kernels!r}}}
rng = np.random.default_rng(0)
x, dy = rng.standard_normal((2, 2, channels, 2), dtype=np.float32)
for _ in range(2):  # gradients are new, then added to
    buffer = dy.copy()
    bn.weight[{kept}] = 0
    attempt(bn, x)
    attempt(bn.backward, buffer)
"""
EXHAUSTING = {
    "quick": (
        "fastbn.BatchNorm1d(channels)",
        "slice(0, 0)",
        ["try_layer_train", "try_layer_backward"],
    ),
    "quick, frozen": (
        "fastbn.BatchNorm1d(channels).freeze()",
        "slice(0, 0)",
        ["try_layer_frozen", "try_layer_backward"],
    ),
    "quick, instances": (
        "fastbn.InstanceNorm1d(channels, affine=True)",
        "slice(0, 0)",
        ["try_layer_train", "try_layer_backward"],
    ),
    "quick, groups": (
        "fastbn.GroupNorm(2**16, channels)",
        "slice(0, 0)",
        ["try_groups", "try_layer_backward"],
    ),
    "batch": ("fastbn.BatchNorm1d(channels)", "slice(0, 0)", ["forward", "backward"]),
    "some channels kept": ("fastbn.BatchNorm1d(channels)", "slice(9)", ["forward", "backward"]),
    "all channels kept": ("fastbn.BatchNorm1d(channels)", "slice(None)", ["forward", "backward"]),
    "frozen": ("fastbn.BatchNorm1d(channels).freeze()", "slice(0, 0)", ["elemt"]),
    "instance": (
        "fastbn.InstanceNorm1d(channels, affine=True, track_running_stats=True)",
        "slice(0, 0)",
        ["forward", "backward"],
    ),
    "groups": (
        "fastbn.GroupNorm(2**16, channels)",
        "slice(0, 0)",
        ["group_forward", "group_backward"],
    ),
    "groups, with a copy": (
        "fastbn.GroupNorm(2**16, channels)",
        "slice(9)",
        ["group_forward", "backward"],
    ),
    "synchronized": (
        "fastbn.SyncBatchNorm(channels)",
        "slice(0, 0)",
        ["elemt", "backward_elemt"],
    ),
}


@pytest.mark.serial
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by way of /proc")
@pytest.mark.parametrize("name", EXHAUSTING)
def test_what_comes_after_the_result_needs_no_memory(tmp_path, name):
    if name == "synchronized":
        pytest.importorskip("mpi4py.MPI")
    layer, kept, kernels = EXHAUSTING[name]
    code = EXHAUSTED.format(core=CORE, layer=layer, kept=kept, kernels=kernels)
    # Of the C library's own memory there is some for small things.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "4194304"}
    environment["FASTBN_QUICK_PATH"] = "1" if name.startswith("quick") else "0"
    assert output_of(code, tmp_path, **environment).split() == ["done"] * 4


# A KeyboardInterrupt just before a kernel starts.


KERNELS = ["forward", "elemt", "stats", "backward", "backward_reduce", "backward_elemt"]
KERNELS += ["group_forward", "group_backward"]
KERNELS += [name for name in vars(core) if name.startswith("try_")]


@contextmanager
def interrupted_kernels(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        for name in KERNELS:
            patched.setattr(core, name, interrupt)
        yield


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "freeze", "eval"])
def test_an_interrupted_forward_changes_nothing(rng, monkeypatch, mode, make):
    bn, x, dy = layer(rng), make(some(rng, SHAPE)), some(rng, SHAPE)
    bn(x)
    out = x if x.dtype.isnative else None
    getattr(bn, mode)()
    with refused(KeyboardInterrupt, intact=[bn, x]), interrupted_kernels(monkeypatch):
        bn(x, out=out)
    assert bn.backward(dy).shape == SHAPE  # of the forward before


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_an_interrupted_backward_changes_nothing(rng, monkeypatch, mode, make):
    bn, x, dy = layer(rng, mode), some(rng, SHAPE), make(some(rng, SHAPE))
    bn(x, out=x)
    out = dy if dy.dtype.isnative else None
    with refused(KeyboardInterrupt, intact=[bn, x, dy]), interrupted_kernels(monkeypatch):
        bn.backward(dy, out=out)
    assert bn.backward(dy, out=out).shape == SHAPE


@pytest.mark.parametrize("name", [*FORWARDS, *BACKWARDS])
def test_an_interrupted_function_changes_nothing(rng, monkeypatch, name):
    bn, x, dy = layer(rng), some(rng, SHAPE), some(rng, SHAPE)
    bn(x)
    for calls, args in ((FORWARDS, (x, x, bn)), (BACKWARDS, (dy, x, dy, bn))):
        if name in calls:
            with refused(KeyboardInterrupt, intact=[bn, x, dy]), interrupted_kernels(monkeypatch):
                calls[name](*args)


def test_an_interrupted_lazy_layer_stays_lazy(rng, monkeypatch):
    bn = fastbn.LazyBatchNorm2d()
    with pytest.raises(KeyboardInterrupt), interrupted_kernels(monkeypatch):
        bn(some(rng, SHAPE))
    assert type(bn) is fastbn.LazyBatchNorm2d
    assert bn.has_uninitialized_params()


# An out where other arrays of the call lie.


def pairs(a):
    """A view of an array of shape (4, 3) with two values of each channel in a sample."""
    return a.reshape(2, 3, 2)


OUT = {
    "batch_norm": (
        lambda x, out, v: F.batch_norm(x, **v, training=True, out=out),
        ["running_mean", "running_var", "weight", "bias"],
    ),
    "batch_norm in evaluation": (
        lambda x, out, v: F.batch_norm(x, **v, out=out),
        ["running_mean", "running_var", "weight", "bias"],
    ),
    "instance_norm": (
        lambda x, out, v: F.instance_norm(pairs(x), **v, out=pairs(out)),
        ["running_mean", "running_var", "weight", "bias"],
    ),
    "instance_norm by running statistics": (
        lambda x, out, v: F.instance_norm(x, **v, use_input_stats=False, out=out),
        ["running_mean", "running_var", "weight", "bias"],
    ),
    "batch_norm_forward": (
        lambda x, out, v: F.batch_norm_forward(x, **v, out=out),
        ["weight", "bias"],
    ),
    "batch_norm_elemt": (
        lambda x, out, v: F.batch_norm_elemt(x, **v, out=out),
        ["mean", "invstd", "weight", "bias"],
    ),
    "batch_norm_backward": (
        lambda x, out, v: F.batch_norm_backward(x, x, **v, out=out),
        ["weight", "mean", "invstd"],
    ),
    "batch_norm_backward_elemt": (
        lambda x, out, v: F.batch_norm_backward_elemt(x, x, **v, count=4, out=out),
        ["weight", "mean", "invstd", "sum_dy", "sum_dy_xhat"],
    ),
}
OUT_CASES = [(call, names, name) for call, names in OUT.values() for name in names]
OUT_IDS = [f"{call}: {name}" for call, (_, names) in OUT.items() for name in names]


@each("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("call", "names", "name"), OUT_CASES, ids=OUT_IDS)
def test_an_out_that_overlaps_a_vector_is_refused(rng, call, names, name, dtype):
    x, buffer = some(rng, (4, 3)), some(rng, 40)
    vectors = {other: np.ones(3, dtype) for other in names}
    vectors[name] = buffer[8:14].view(dtype)[:3]
    with refused(ValueError, f"out must not overlap {name}", intact=[x, buffer]):
        call(x, buffer[:12].reshape(4, 3), vectors)
    call(x, buffer[20:32].reshape(4, 3), vectors)


@pytest.mark.parametrize("name", ["weight", "bias", "weight_grad", "bias_grad"])
@pytest.mark.parametrize("mode", ["train", "freeze"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_out_that_overlaps_an_array_of_the_layer_is_refused(rng, mode, in_place, name):
    bn, x, dy = layer(rng, mode), some(rng, SHAPE), some(rng, SHAPE)
    out = some(rng, SHAPE)
    bn(x, out=x if in_place else None)
    part = out.reshape(-1)[100:103]
    part[:] = getattr(bn, name)
    setattr(bn, name, part)
    with refused(ValueError, f"out must not overlap {name}", intact=[bn, x, dy, out]):
        bn.backward(dy, out=out)


def test_an_out_that_is_the_input_and_holds_the_weight_is_refused(rng):
    x = some(rng, (4, 3))
    with refused(ValueError, "out must not overlap weight", intact=[x]):
        F.batch_norm_forward(x, x[2], out=x)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 3), (4, 4)), ((4, 3), (8, 4)), ((4, 3), (-8, 4)), ((4, 3), (0, 4)), ((4, 3), (4, 2))],
    ids=str,
)
def test_an_out_that_overlaps_itself_is_refused(rng, shape, strides):
    x, buffer = some(rng, shape), some(rng, 60)
    out = np.lib.stride_tricks.as_strided(buffer[30:], shape, strides)
    with refused(ValueError, "elements of its own", intact=[x, buffer]):
        F.batch_norm_forward(x, out=out)


@each("make", support.WRITEABLE_LAYOUTS)
@each("shape", [(2, 3, 4, 5), (1, 3, 1, 5), (2, 0, 3, 4), (1, 1)])
def test_an_out_of_any_strides_that_has_elements_of_its_own_is_taken(rng, make, shape):
    x = some(rng, shape)
    out = make(np.empty_like(x))
    y = F.batch_norm_forward(x, out=out)[0]
    assert y is out
    assert support.same_bits(y, F.batch_norm_forward(x)[0])


# States that are damaged, or meant to do harm.


def npz(state, path):
    np.savez(path, **state)
    return path


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


HOSTILE = {
    "object": (np.array([Bomb()] * 3, object), ValueError, "allow_pickle"),
    "object scalar": (np.array(Bomb(), object), ValueError, "allow_pickle"),
    "structured": (np.zeros(3, [("a", "f4"), ("b", "O")]), ValueError, "allow_pickle"),
    "records": (np.zeros(3, [("a", "f4")]), TypeError, "running_var must hold real numbers"),
    "text": (np.array(["1", "2", "3"]), TypeError, "running_var must hold real numbers"),
    "bytes": (np.array([b"1", b"2", b"3"]), TypeError, "running_var must hold real numbers"),
    "complex": (np.ones(3, complex), TypeError, "running_var must hold real numbers"),
    "dates": (np.zeros(3, "M8[s]"), TypeError, "running_var must hold real numbers"),
    "bool": (np.ones(3, bool), TypeError, "running_var must hold real numbers"),
    "scalar": (np.float32(1), RuntimeError, "running_var must have the shape (3,)"),
    "length": (np.ones(4, np.float32), RuntimeError, "running_var must have the shape (3,)"),
    "rank": (np.ones((3, 1), np.float32), RuntimeError, "running_var must have the shape (3,)"),
    "empty": (np.ones(0, np.float32), RuntimeError, "running_var must have the shape (3,)"),
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("value", "exception", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_npz_is_refused(rng, tmp_path, capfd, value, exception, message, lazy):
    bn = fastbn.LazyBatchNorm2d() if lazy else layer(rng)
    path = npz(layer(rng).state_dict() | {"running_var": value}, tmp_path / "bn.npz")
    with np.load(path) as state, refused(exception, message, intact=[] if lazy else [bn]):
        bn.load_state_dict(state)
    assert bn.has_uninitialized_params() == lazy
    assert "unpickled" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("value", "exception"),
    [
        (np.int64(-1), ValueError),
        (np.uint64(2**63), ValueError),
        (np.float64("nan"), ValueError),
        (np.complex64(3), TypeError),
        (np.zeros(3, np.int64), RuntimeError),
    ],
    ids=["negative", "too large", "NaN", "complex", "shape"],
)
def test_a_counter_that_cannot_count_is_refused(rng, value, exception):
    bn = layer(rng)
    with refused(exception, "num_batches_tracked", intact=[bn]):
        bn.load_state_dict(bn.state_dict() | {"num_batches_tracked": value})


def flipped(data):
    """The bytes with one changed in the middle of the last array's data."""
    at = data.index(b"running_var.npy") + 160
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def claiming_more(data):
    """A file whose array says that it has more elements than there are."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"(3,)", b"(9,)"))
    return target.getvalue()


@pytest.mark.parametrize("damage", [flipped, claiming_more])
def test_a_damaged_npz_is_refused(rng, tmp_path, damage):
    bn, path = layer(rng), npz(layer(rng).state_dict(), tmp_path / "bn.npz")
    path.write_bytes(damage(path.read_bytes()))
    with np.load(path) as state, refused((zipfile.BadZipFile, ValueError), intact=[bn]):
        bn.load_state_dict(state)


def test_an_entry_that_cannot_be_read_leaves_the_entries_before_it_unloaded(rng):
    class Broken(dict):
        def __getitem__(self, key):
            if key == "running_var":
                raise OSError("gone")
            return super().__getitem__(key)

    bn = layer(rng)
    with refused(OSError, "gone", intact=[bn]):
        bn.load_state_dict(Broken(fastbn.BatchNorm2d(3).state_dict()))


def has_opposite_infinities(dtype=np.float32):
    """Two samples whose sums are not a number together."""
    array = np.ones((2, 1, 4), dtype)
    array[:, 0, 0] = np.inf, -np.inf
    return array


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastbn.BatchNorm1d(1, ghost_batch_size=1),
        lambda: fastbn.InstanceNorm1d(1, affine=True),
        lambda: fastbn.InstanceNorm1d(1, track_running_stats=True),
        lambda: fastbn.GroupNorm(1, 1),
        lambda: fastbn.BatchNorm1d(1).freeze(),
    ],
    ids=["ghosts", "instance", "tracking", "group", "frozen"],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_numbers_that_are_not_finite_raise_no_error_of_numpy(rng, make, in_place):
    # It would come after x or dy has been overwritten.
    layer, x = make(), has_opposite_infinities()
    with np.errstate(all="raise"):
        layer(x.copy(), out=x if in_place else None)
        layer(given := some(rng, (2, 1, 4)), out=given if in_place else None)
        dy = has_opposite_infinities()
        layer.backward(dy, out=dy if in_place else None)
