"""As much of CuPy as fastbn and its tests use, on the simulated device.

An array is not one of NumPy's and does not become one unasked. Where CuPy differs from NumPy, so
does this: reductions and elements are arrays, arrays of NumPy are refused beside those of CuPy, and
what reads a value waits for the device, which cannot be while a graph is captured.
"""

import ctypes
import functools
import operator
import types
from contextlib import contextmanager

import numpy as np

from simulated_gpu import memory, module


class ndarray:
    """An array in the memory of a simulated device."""

    __slots__ = ("__weakref__", "_host", "base", "data")
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        if isinstance(shape, int):
            shape = (shape,)
        if memptr is None:
            nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
            memptr = MemoryPointer(memory.Memory(nbytes, device()), 0)
        self._host = np.ndarray(shape, dtype, memptr.mem.buffer, memptr.offset, strides, order)
        self.data, self.base = memptr, None

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    flags = property(lambda self: Flags(self._host.flags))
    T = property(lambda self: wrapped(self._host.T, self))

    def get(self):
        wait()
        return self._host.copy()

    def item(self):
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __bool__(self):
        return bool(self.get())

    def __repr__(self):
        return repr(self.get())

    def __array__(self, dtype=None, copy=None):
        raise TypeError("no implicit conversion to a NumPy array: see get()")

    @property
    def __cuda_array_interface__(self):
        pointer = self.data.ptr, False
        return {"shape": self.shape, "typestr": self.dtype.str, "data": pointer, "version": 3}

    def __dlpack_device__(self):
        return 2, self.data.device_id

    def __dlpack__(self, **_):
        raise BufferError("not simulated")

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        key = indices(key)
        found = self._host[key]
        if not np.may_share_memory(found, self._host):
            found = np.array(found, order="C")
        return wrapped(found, self)

    def __setitem__(self, key, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("an array of NumPy's cannot be assigned")
        with np.errstate(all="ignore"):
            self._host[indices(key)] = unwrapped(value)

    def __reduce__(self):
        return array, (self.get(),)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, _):
        return self.copy()

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        function = globals().get(ufunc.__name__)
        if method != "__call__" or function is None:
            return NotImplemented
        return function(*inputs, **options, **({"out": out[0]} if out else {}))

    def __array_function__(self, function, kinds, arguments, options):
        ours = globals().get(function.__name__) if function.__module__ == "numpy" else None
        return NotImplemented if ours is None else ours(*arguments, **options)


class Flags:
    """The flags that CuPy's arrays have."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = flags.owndata


class MemoryPointer:
    """An address in the memory of a device."""

    def __init__(self, mem, offset):
        self.mem, self.offset = mem, offset
        self.device_id = mem.device_id

    @property
    def ptr(self):
        return self.mem.buffer.ctypes.data + self.offset


def wrapped(result, *sources):
    """What NumPy returned as an array of a device: a view of a source, or in new memory."""
    result = np.asanyarray(result)
    for source in sources:
        if source.data.mem.owns(result):
            view = ndarray.__new__(ndarray)
            offset = result.ctypes.data - source.data.mem.buffer.ctypes.data
            view._host, view.data = result, MemoryPointer(source.data.mem, offset)
            view.base = source if source.base is None else source.base
            return view
    dense = np.empty_like(result, subok=False)
    new = ndarray(dense.shape, dense.dtype, strides=dense.strides)
    new._host[...] = result
    return new


def unwrapped(value):
    """An argument as NumPy takes it; arrays of NumPy's are refused."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(unwrapped(each) for each in value)
    return value


def indices(key):
    """An index as NumPy takes it. The number of elements that a mask selects has to be read."""
    for each in key if isinstance(key, tuple) else (key,):
        if isinstance(each, ndarray) and each.dtype == bool:
            wait()
    return unwrapped(key)


def arrays_in(values):
    """The arrays of a device among arguments."""
    for value in values:
        if isinstance(value, ndarray):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays_in(value)


def of_numpy(function):
    """A function of NumPy's, for arrays of a device."""

    @functools.wraps(function)
    def run(*arguments, out=None, **options):
        if out is not None:
            options["out"] = out
        sources = list(arrays_in([*arguments, *options.values()]))
        arguments = [unwrapped(each) for each in arguments]
        options = {name: unwrapped(value) for name, value in options.items()}
        with np.errstate(all="ignore"):
            result = function(*arguments, **options)
        return wrapped(result, *sources) if out is None else out

    return run


# Methods, operators and functions that are NumPy's.

METHODS = """all any astype copy fill max mean min ravel reshape sum transpose view"""
BINARY = """add and floordiv lshift mod mul or pow rshift sub truediv xor"""
OTHERS = """abs eq ge gt invert le lt ne neg pos"""
FUNCTIONS = """absolute add array_equal broadcast_to concatenate divide equal full_like greater
greater_equal isfinite isnan less less_equal logical_and logical_not logical_or maximum minimum
moveaxis multiply negative not_equal ones_like reciprocal sqrt stack subtract tile where
zeros_like"""


def reflected(run):
    return lambda self, other: run(other, self)


def in_place(ufunc):
    def run(self, other):
        with np.errstate(all="ignore"):
            ufunc(self._host, unwrapped(other), out=self._host)
        return self

    return run


for name in METHODS.split():
    setattr(ndarray, name, of_numpy(getattr(np.ndarray, name)))
for name in [*BINARY.split(), *OTHERS.split()]:
    setattr(ndarray, f"__{name}__", of_numpy(getattr(operator, f"__{name}__")))
for name in BINARY.split():
    setattr(ndarray, f"__r{name}__", reflected(getattr(ndarray, f"__{name}__")))
for name, ufunc in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    setattr(ndarray, f"__i{name}__", in_place(ufunc))
for name in FUNCTIONS.split():
    globals()[name] = of_numpy(getattr(np, name))
abs = of_numpy(np.absolute)
float32, float64, newaxis = np.float32, np.float64, np.newaxis


def empty_like(prototype, *arguments, **options):
    """Not what NumPy's has in fresh memory, but what the device has."""
    dense = np.empty_like(prototype._host, *arguments, **options)
    return ndarray(dense.shape, dense.dtype, strides=dense.strides)


def flatnonzero(a):
    wait()  # for their number
    return wrapped(np.flatnonzero(a._host))


def count_nonzero(a, axis=None):
    return wrapped(np.count_nonzero(a._host, axis=axis))


def shape(a):
    return a.shape


def copyto(dst, src, casting="same_kind", where=True):
    np.copyto(dst._host, unwrapped(src), casting, unwrapped(where))


def array(obj, dtype=None, copy=True, order="K"):
    host = obj._host if isinstance(obj, ndarray) else np.asarray(obj)
    return wrapped(np.array(host, dtype, order=order))


def asarray(a, dtype=None):
    return a if isinstance(a, ndarray) and dtype in (None, a.dtype) else array(a, dtype)


def ascontiguousarray(a):
    return a if a.flags.c_contiguous else array(a, order="C")


def empty(shape, dtype=float):
    return ndarray(shape, dtype)


def full(shape, fill_value, dtype=None):
    return wrapped(np.full(shape, fill_value, dtype))


def zeros(shape, dtype=float):
    return full(shape, 0, dtype)


def ones(shape, dtype=float):
    return full(shape, 1, dtype)


def asnumpy(a):
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


# Devices: the first has clusters of blocks, the second is from before them and has less memory in
# its multiprocessors.


class Device:
    """A device; in a with statement the current one."""

    ALL = (
        ("90", {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 << 10}),
        ("70", {"MultiProcessorCount": 80, "MaxSharedMemoryPerBlockOptin": 96 << 10}),
    )

    def __init__(self, number=None):
        self.id = device() if number is None else number
        if not 0 <= self.id < len(self.ALL):
            raise runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.compute_capability, self.attributes = self.ALL[self.id]

    def __enter__(self):
        entered.append(self.id)
        return self

    def __exit__(self, *_):
        entered.pop()


entered = [0]


def device():
    """The number of the current device."""
    return entered[-1]


# How things stand: the order in which threads and blocks run, and whether a graph is captured.
state = types.SimpleNamespace(schedule=0, capturing=False)


@contextmanager
def schedule(number):
    """Run blocks and threads in another order; see `scheduler.h`."""
    before, state.schedule = state.schedule, number
    try:
        yield
    finally:
        state.schedule = before


@contextmanager
def capturing():
    """Refuse what a stream refuses while it captures a graph."""
    state.capturing = True
    try:
        yield
    finally:
        state.capturing = False


def wait():
    """Wait for the device, in order to read a value."""
    if state.capturing:
        raise runtime.CUDARuntimeError("cudaErrorStreamCaptureUnsupported")


class Stream:
    """The one stream, on which everything has been done when its call returns."""

    ptr = 0

    def is_capturing(self):
        return state.capturing

    def synchronize(self):
        wait()


class CUDARuntimeError(RuntimeError):
    """An error that CUDA reports."""


class RawModule:
    """A source and options, compiled for the current device."""

    options_of_module: tuple[str, ...] = ()  # a test's own

    def __init__(self, *, code, options=()):
        self.code, self.options = code, options

    def get_function(self, name):
        defined = tuple(option for option in self.options if option.startswith("-D"))
        architecture = f"-D__CUDA_ARCH__={Device().compute_capability}0"
        library = module.library(self.code, (*defined, architecture, *self.options_of_module))
        cluster = dict(option[2:].split("=") for option in defined)["CLUSTER"]
        return Function(module.Kernel(library, name, int(cluster)), Device())


class Function:
    """A kernel that can be launched."""

    def __init__(self, kernel, device):
        self.kernel = types.SimpleNamespace(ptr=kernel.address)
        self.own, self.device = kernel, device

    @property
    def max_dynamic_shared_size_bytes(self):
        return self.own.shared_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value):
        if value > self.device.attributes["MaxSharedMemoryPerBlockOptin"]:
            raise CUDARuntimeError("cudaErrorInvalidValue")
        self.own.shared_bytes = value


def launchKernel(f, *arguments):
    grid, block, (shared_bytes, _, kernel_params, _) = arguments[:3], arguments[3:6], arguments[6:]
    assert (grid[2], *block[1:]) == (1, 1, 1)
    job = ctypes.c_void_p.from_address(kernel_params).value
    module.kernels[f].launch(*grid[:2], block[0], shared_bytes, job, state.schedule)


def funcSetAttribute(f, attribute, value):
    assert (attribute, value) == (14, 1)  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    module.kernels[f].non_portable = True


runtime = types.SimpleNamespace(
    getDevice=device, getDeviceCount=lambda: len(Device.ALL), CUDARuntimeError=CUDARuntimeError
)
driver = types.SimpleNamespace(launchKernel=launchKernel, funcSetAttribute=funcSetAttribute)
cuda = types.SimpleNamespace(
    Device=Device,
    Stream=Stream,
    driver=driver,
    get_current_stream=Stream,
    runtime=runtime,
    memory=memory,
)
