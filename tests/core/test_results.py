"""Results take the memory of freed ones, within bounds, and are arrays like any other."""

import copy
import ctypes
import importlib
import os
import pickle
import queue
import sys
import threading

import internals
import numpy as np
import pytest
from support import IN_CHILD, output_of

import fastbn
from fastbn import functional as F

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(sys.platform == "win32", reason="nothing is kept on Windows"),
]

MIB = 2**20
SMALLEST = 4 * MIB


@pytest.fixture(autouse=True)
def limit():
    """No free memory before and after, and a limit that does not depend on the machine."""
    fastbn.release_memory()
    previous = internals.core.limit_free_memory(256 * MIB)
    yield
    internals.core.limit_free_memory(previous)
    fastbn.release_memory()


def array(size=SMALLEST, dtype=np.float32):
    """An array of so many bytes, of 4 channels."""
    x = np.ones((2, 4, size // 8 // np.dtype(dtype).itemsize), dtype)
    x[1] = -1
    return x


def address(a):
    return a.__array_interface__["data"][0]


def evaluate(x, **options):
    return F.batch_norm(x, np.zeros(4), np.ones(4), eps=1e-5, **options)


def channels_last(x):
    return np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)


def backward(x):
    return F.batch_norm_backward(x, x, None, np.zeros(4), np.ones(4))[0]


def frozen_backward(x):
    bn = fastbn.BatchNorm1d(4).freeze()
    bn(x, out=x.copy())
    return bn.backward(x)


CALLS = {
    "evaluation": evaluate,
    "training": lambda x: fastbn.BatchNorm1d(4)(x),
    "functional training": lambda x: F.batch_norm_forward(x)[0],
    "backward": backward,
    "frozen backward": frozen_backward,
    "a mask": lambda x: F.batch_norm_forward(x, mask=np.ones((2, 1, x.shape[2]), bool))[0],
    "other byte order": lambda x: evaluate(x.astype(">f4")),
    "non-contiguous": lambda x: evaluate(np.repeat(x, 2, axis=2)[:, :, ::2]),
    "channels last": lambda x: evaluate(channels_last(x)),
    "instances": lambda x: fastbn.InstanceNorm1d(4)(x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_result_takes_the_memory_of_one_that_is_freed(call):
    x = array()
    y = call(x)
    expected, at, strides = y.copy(), address(y), y.strides
    y[...] = np.nan
    del y
    y = call(x)
    assert address(y) == at
    assert y.strides == strides
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_memory_serves_other_shapes_and_dtypes_of_the_same_size(dtype):
    at = address(evaluate(array()))
    assert address(evaluate(array(dtype=dtype))) == at


def test_results_that_are_alive_share_nothing():
    x = array()
    results = [evaluate(x) for _ in range(4)]
    assert len({address(y) for y in results}) == 4


def test_a_view_keeps_the_memory():
    x = array()
    y = evaluate(x)
    row, at = y[0], address(y)
    expected = row.copy()
    del y
    assert address(evaluate(x)) != at
    np.testing.assert_array_equal(row, expected)


# Arrays like any other.


def test_a_result_owns_its_memory():
    y = evaluate(array())
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.base is None


@pytest.mark.parametrize("size", [16, SMALLEST // 2, 2 * SMALLEST])
def test_a_result_can_be_resized(size):
    y = evaluate(array())
    expected = y.ravel()[: size // 4].copy()
    y.resize(size // 4, refcheck=False)
    np.testing.assert_array_equal(y[: expected.size], expected)
    assert not y[expected.size :].any()
    kept = size if size >= SMALLEST else 0
    del y
    assert fastbn.release_memory() == kept


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda y: pickle.loads(pickle.dumps(y))]
)
def test_a_result_can_be_copied_and_pickled(through):
    y = evaluate(array())
    copied, expected = through(y), np.array(y)
    y[...] = 0
    np.testing.assert_array_equal(copied, expected)


def test_a_result_can_take_the_state_of_another_array():
    y, other = evaluate(array()), np.arange(3.0)
    y.__setstate__(other.__reduce__()[2])
    np.testing.assert_array_equal(y, other)


@pytest.mark.torch
def test_a_tensor_keeps_the_memory():
    torch = pytest.importorskip("torch")
    x = array()
    y = evaluate(x)
    expected, at = y.copy(), address(y)
    tensor = torch.from_numpy(y)
    del y
    assert address(evaluate(x)) != at
    np.testing.assert_array_equal(tensor.numpy(), expected)
    del tensor
    assert fastbn.release_memory() == 2 * x.nbytes


# Bounds.


def test_two_of_a_size_are_kept_at_most():
    x = array()
    results = [evaluate(x) for _ in range(5)]
    del results
    assert fastbn.release_memory() == 2 * x.nbytes
    assert fastbn.release_memory() == 0


def test_what_was_freed_first_goes_first():
    internals.core.limit_free_memory(4 * SMALLEST)
    small, large = array(), array(2 * SMALLEST)
    results = [evaluate(small), evaluate(large)]
    at = address(results[1])
    del results[0], results[0]
    assert address(evaluate(array(3 * SMALLEST // 2)))
    assert address(evaluate(large)) == at
    assert fastbn.release_memory() == (2 + 1.5) * SMALLEST


@pytest.mark.parametrize("size", [SMALLEST - 8 * 4, 3 * SMALLEST])
def test_results_out_of_bounds_are_left_to_malloc(size):
    internals.core.limit_free_memory(2 * SMALLEST)
    evaluate(array(size))
    assert fastbn.release_memory() == 0


def test_a_lower_limit_gives_back_what_is_above_it():
    x = array()
    results = [evaluate(x), evaluate(x)]
    del results
    internals.core.limit_free_memory(x.nbytes)
    assert fastbn.release_memory() == x.nbytes
    y = evaluate(x)
    internals.core.limit_free_memory(0)
    del y
    assert fastbn.release_memory() == 0


def test_many_sizes_keep_within_the_limit():
    internals.core.limit_free_memory(256 * MIB)
    for k in range(70):
        evaluate(array(SMALLEST + 32 * k))
    assert 63 * SMALLEST <= fastbn.release_memory() <= 256 * MIB


@pytest.mark.parametrize(
    ("machine", "granted", "most"),
    [(2**40, 2**62, 2**28), (2**34, 2**30, 2**26), (2**30, 2**34, 2**26), (0, 2**34, 0)],
    ids=["plenty", "cgroup", "machine", "unknown"],
)
def test_a_sixteenth_of_the_memory_is_kept_at_most(monkeypatch, machine, granted, most):
    monkeypatch.delenv("FASTBN_REUSE_MEMORY", raising=False)
    monkeypatch.setattr(internals.memory, "machine_memory", lambda: machine)
    monkeypatch.setattr(internals.memory, "memory_limit", lambda: granted)
    assert internals.memory.most_kept() == most


def test_the_machine_tells_its_memory():
    assert internals.memory.machine_memory() > 64 * MIB


CGROUPS = {
    "version 2": ("0::/", {"memory.max": "1000"}, 1000),
    "version 2, no limit": ("0::/", {"memory.max": "max"}, None),
    "version 2, of its own": ("0::/a/b", {"a/b/memory.max": "1000"}, 1000),
    "version 2, above": ("0::/a/b", {"a/b/memory.max": "2000", "a/memory.max": "1000"}, 1000),
    "version 2, another's": ("0::/a", {"b/memory.max": "1000"}, None),
    "version 2, path unseen": ("0::/host/path", {"memory.max": "1000"}, 1000),
    "version 1": ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "1000"}, 1000),
    "version 1, path unseen": ("4:memory:/a", {"memory/memory.limit_in_bytes": "1000"}, 1000),
    "version 1, another controller": ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "1"}, None),
    "nothing": (None, {}, None),
    "damaged": ("0::/a", {"memory.max": "much", "a/memory.max": ""}, None),
}


@pytest.mark.parametrize(("of_process", "files", "limit"), CGROUPS.values(), ids=CGROUPS)
def test_the_memory_that_the_cgroup_grants(tmp_path, of_process, files, limit):
    texts = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    if of_process is not None:
        texts["proc/self/cgroup"] = of_process
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    granted = internals.cgroups.memory_limit(str(tmp_path))
    assert granted == (internals.cgroups.NO_LIMIT if limit is None else limit)


# Programs in processes of their own.

START = """
import resource, threading
import numpy as np
import fastbn

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

bn = fastbn.BatchNorm1d(4).eval()
"""
reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(("value", "kept"), [("0", 0), ("1", 2**23), (None, 2**23)])
def test_a_variable_switches_it_off(tmp_path, value, kept):
    code = START + "bn(np.ones((2, 4, 2**18), np.float32)); print(fastbn.release_memory())"
    assert int(output_of(code, tmp_path, FASTBN_REUSE_MEMORY=value)) == kept


@reads_proc
@pytest.mark.serial
@pytest.mark.parametrize("mebibytes", [8, 49])
def test_released_memory_is_the_systems(tmp_path, mebibytes):
    code = """
x = np.ones((2, 4, {} * 2**17 // 4), np.float32)
bn(x, out=x)  # starts the threads
y = bn(x)
beside = np.ones(2**18)  # on a heap, the block is not the last one
with_y = status("VmRSS")
del y
print(fastbn.release_memory() - x.nbytes, (with_y - status("VmRSS")) / x.nbytes)
"""
    rest, freed = map(float, output_of(START + code.format(mebibytes), tmp_path).split())
    assert rest == 0
    assert freed > 0.95


@reads_proc
@pytest.mark.serial
def test_the_system_may_take_free_memory(tmp_path):
    with open("/proc/self/smaps") as file:
        if "LazyFree:" not in file.read():
            pytest.skip("this system does not tell what it may take")
    code = """
def lazily_free():
    with open("/proc/self/smaps") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("LazyFree")) * 1024

x = np.ones((2, 4, 2**20), np.float32)
before = lazily_free()
y = bn(x)
del y
print((lazily_free() - before) / x.nbytes)
y = bn(x)
print((lazily_free() - before) / x.nbytes)
"""
    free, taken = map(float, output_of(START + code, tmp_path).split())
    assert 0.8 < free <= 1
    assert taken == 0


@reads_proc
@pytest.mark.serial
def test_a_result_for_which_there_is_no_memory_gets_that_of_freed_ones(tmp_path):
    code = """
x, larger = np.ones((2, 4, 2**20), np.float32), np.ones((2, 4, 3 * 2**19), np.float32)
bn(x, out=x)
results = [bn(x), bn(x)]
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2**20, resource.RLIM_INFINITY))
del results
y = bn(larger)  # 48 MiB, where 1 is left beside twice 32
print(fastbn.release_memory(), 0.9999 < y.min() <= y.max() < 1)
del y
print(fastbn.release_memory())
try:
    [bn(larger) for _ in range(3)]
except MemoryError:
    print("MemoryError")
"""
    words = output_of(START + code, tmp_path, MALLOC_MMAP_THRESHOLD_="1048576").split()
    assert words == ["0", "True", str(48 * MIB), "MemoryError"]


# Threads and forks.


def test_threads_free_what_others_were_given():
    inputs = [array(size) * k for size in (SMALLEST, 5 * MIB) for k in (1, 2, 3)]
    expected = [evaluate(x) for x in inputs]
    results, wrong = queue.Queue(8), []

    def produce(k):
        for i in range(30):
            number = (i + k) % len(inputs)
            results.put((number, evaluate(inputs[number])))
        results.put(None)

    def consume():
        while (result := results.get()) is not None:
            if not np.array_equal(result[1], expected[result[0]]):
                wrong.append(result[0])
            result[1][...] = np.nan

    threads = [threading.Thread(target=produce, args=(k,)) for k in range(3)]
    threads += [threading.Thread(target=consume) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fastbn.release_memory() <= 4 * 5 * MIB


@pytest.mark.serial
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_parent_and_child_use_their_own_free_memory(tmp_path):
    code = """
x = np.ones((2, 4, 2**18), np.float32)
y, gone = bn(x), bn(2 * x)
del gone
stop = threading.Event()

def calls(factor):
    expected = bn(factor * x)
    while not stop.is_set():
        assert (bn(factor * x) == expected).all()

def right():
    z = bn(3 * x)
    return (y == bn(x)).all() and abs(z - 3).max() < 1e-4 and fastbn.release_memory() > 0

print(in_child(right))
threads = [threading.Thread(target=calls, args=(k,)) for k in (4, 5)]
for thread in threads:
    thread.start()
print(all([in_child(right) for _ in range(10)]))
stop.set()
for thread in threads:
    thread.join()
print(right())
"""
    assert output_of(IN_CHILD + START + code, tmp_path).split() == ["True"] * 3


# An allocator of the program's own, by NumPy's protocol.


class Handler(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("functions", ctypes.c_void_p * 5),
    )


def test_an_allocator_of_the_programs_own_is_left_in_charge():
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    private = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"
    multiarray = importlib.import_module(f"{private}.multiarray")
    table = (ctypes.c_void_p * 307).from_address(pointer_of(multiarray._ARRAY_API, None))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304])
    default = ctypes.cast(table[306], ctypes.POINTER(ctypes.py_object))[0]
    own = Handler.from_buffer_copy(Handler.from_address(pointer_of(default, b"mem_handler")))
    own.name = b"own"
    before = set_handler(capsule(ctypes.addressof(own), b"mem_handler", None))
    try:
        y = evaluate(array())
        assert multiarray.get_handler_name(y) == "own"
    finally:
        set_handler(before)
    del y
    assert fastbn.release_memory() == 0
    assert multiarray.get_handler_name(evaluate(array())) == "fastbn"
    assert multiarray.get_handler_name() == "default_allocator"
