"""What several test files share: memory layouts, comparisons, fresh interpreters."""

import importlib
import itertools
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import reference
from internals import core

DTYPES = ["float16", "bfloat16", "float32", "float64"]
THREADS = [1, 2, 3, 4, 7]
ALLOCATING = ["empty", "empty_like", "zeros", "zeros_like", "full_like", "array", "require"]
LAYER_ARRAYS = [
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "weight_grad",
    "bias_grad",
]


def dtype_of(name):
    """The dtype called `name`; skips the test where bfloat16 is not to be had."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def some(rng, shape, dtype=np.float32, mean=0.5, std=2.0):
    """Normally distributed numbers, rounded to `dtype`."""
    return (mean + std * rng.standard_normal(shape)).astype(dtype)


def parameters(channels, dtype=np.float32):
    """A weight and a bias of both signs, the same for every call."""
    weight = np.linspace(-1.5, 2.0, channels) + 0.1
    bias = np.linspace(1.0, -0.5, channels)
    return weight.astype(dtype), bias.astype(dtype)


def case(rng, shape, dtype=np.float32):
    """x, dy, weight and bias, on the host."""
    weight, bias = parameters(shape[1])
    return some(rng, shape, dtype), some(rng, shape, dtype, mean=0.1), weight, bias


# Masks.


def some_mask(rng, shape):
    """A random mask of shape (N, 1, ...) for an array of a shape, with nothing in one sample."""
    mask = rng.random((shape[0], 1, *shape[2:])) < 0.6
    mask[0] = True
    mask[shape[0] // 2] = False
    return mask


def gathered(x, mask):
    """The positions that count, as an array of shape (n, C)."""
    return np.moveaxis(x, 1, -1)[mask[:, 0]]


def spoilt(x, mask, value=np.nan):
    """The array with a value where it does not count."""
    x = x.copy(order="K")
    np.copyto(x, x.dtype.type(value), where=~mask)
    return x


def left_out(x, mask):
    """What an array has where it does not count."""
    return np.moveaxis(x, 1, -1)[~mask[:, 0]]


# Each of these returns an array of the same values as `a`, laid out differently in new memory.


def contiguous(a):
    return a.copy(order="C")


def channels_last(a):
    return np.moveaxis(np.moveaxis(a, 1, -1).copy(order="C"), -1, 1)


def sliced(a):
    buffer = np.zeros([2 * n + 1 for n in a.shape], a.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def negative_strides(a):
    reverse = (slice(None, None, -1),) * a.ndim
    return a[reverse].copy(order="C")[reverse]


def fortran(a):
    return a.copy(order="F")


def unaligned(a):
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def batch_slice(a):
    """Some channels of a wider array: rows are contiguous, samples lie further apart."""
    buffer = np.zeros((a.shape[0], a.shape[1] + 2, *a.shape[2:]), a.dtype)
    buffer[:, 1:-1] = a
    return buffer[:, 1:-1]


WRITEABLE_LAYOUTS = [
    contiguous,
    channels_last,
    sliced,
    negative_strides,
    fortran,
    unaligned,
    batch_slice,
]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def byte_swapped(a):
    return a.astype(a.dtype.newbyteorder())


def same_bits(a, b):
    """Whether two arrays agree in dtype, shape and every bit, NaNs and signed zeros included."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_within(actual, expected, bound):
    """Asserts |actual - expected| <= bound everywhere, in wide arithmetic."""
    actual, expected = reference.wide(actual), reference.wide(expected)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected)
    # Not `error > bound`, which a NaN would pass.
    wrong = ~(error <= bound)
    if wrong.any():
        bound = np.broadcast_to(bound, wrong.shape)
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} are too far off, the first at {where}: "
            f"{float(actual[where])!r} instead of {float(expected[where])!r}, "
            f"which is {float(error[where] / bound[where]):.3g} times the bound"
        )


def assert_close(actual, expected, relative):
    """Asserts agreement relative to the largest expected magnitude of the array."""
    expected = reference.wide(expected)
    assert_within(actual, expected, relative * np.abs(expected).max(initial=0))


def assert_composes(fused, composed, dtype, size=None):
    """Asserts that a fused function gives, for inputs of a dtype, what its primitives compose to.

    Those of float64 have the same bits. For narrower ones the fused functions may sum in float32:
    they are within 2 ulp at a size that is given, or that of the largest result.
    """
    if np.dtype(dtype) == np.float64:
        assert same_bits(fused, composed)
        return
    assert fused.dtype == composed.dtype
    size = np.abs(reference.wide(composed)).max(initial=0) if size is None else size
    unit = np.float32 if fused.dtype == np.float64 else fused.dtype
    assert_within(fused, composed, 2 * reference.ulp(size, unit))


def assert_step_composes(fused, composed, dtype, dy, x):
    """The same of y, mean, invstd, dx, dweight and dbias, by what the sums are made of."""
    axes = (0, *range(2, x.ndim))
    dy, x = np.abs(reference.wide(dy)), reference.wide(x)
    mean, invstd = (a.reshape(-1, *[1] * (x.ndim - 2)) for a in composed[1:3])
    sizes = [None, np.maximum(np.abs(composed[1]), 1 / composed[2]), None, None]
    sizes += [(dy * np.abs((x - mean) * invstd)).sum(axes), dy.sum(axes)]
    for one, other, size in zip(fused, composed, sizes, strict=True):
        assert_composes(one, other, dtype, size)


def torch_step(layer, x, dy):
    """y and dx of a layer of torch's; gradients of the parameters add up in it."""
    x, dy = (tensor(array) for array in (x, dy))
    y = layer(x.requires_grad_())
    y.backward(dy)
    return y.detach().numpy(), x.grad.numpy()


def tensor(array):
    """A tensor of torch's, of the memory of an array if that is C-contiguous."""
    return importlib.import_module("torch").from_numpy(np.ascontiguousarray(array))


def assert_as_torch(ours, theirs, rng, shape, assert_gradient, steps=1):
    """Asserts that layers of float64 agree in training, evaluation, state and gradients.

    The parameters of torch's become random ones, and those of the other layer the same.
    """
    for parameter in theirs.parameters():
        parameter.data.copy_(tensor(rng.standard_normal(parameter.shape)))
    ours.load_state_dict(theirs.state_dict())
    for _ in range(steps):
        x, dy = some(rng, shape, np.float64), some(rng, shape, np.float64, mean=0)
        y, dx = torch_step(theirs, x, dy)
        assert_close(ours(x), y, 1e-12)
        assert_gradient(ours.backward(dy), dx)
    x = some(rng, shape, np.float64)
    assert_close(ours.eval()(x), theirs.eval()(tensor(x)).detach().numpy(), 1e-12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key], value.numpy(), 1e-12)
    for key, parameter in theirs.named_parameters():
        assert_close(getattr(ours, f"{key}_grad"), parameter.grad.numpy(), 1e-12)


def bits_of(thing):
    """All bits of an array, or of all arrays of a layer."""
    if isinstance(thing, np.ndarray):
        return thing.tobytes()
    values = {name: getattr(thing, name) for name in LAYER_ARRAYS}
    return {name: value if value is None else value.tobytes() for name, value in values.items()}


@contextmanager
def untouched(*things):
    """Asserts that arrays, and all arrays of layers, keep every bit through the block."""
    before = [bits_of(thing) for thing in things]
    yield
    assert [bits_of(thing) for thing in things] == before


@contextmanager
def refused(exception, *names, intact=()):
    """Asserts the exception, that its message has every name, and that nothing was written."""
    with untouched(*intact), pytest.raises(exception) as caught:
        yield
    for name in names:
        assert str(name) in str(caught.value)


@contextmanager
def failing_allocation(number):
    """Lets the allocation of that number fail, of all that go through NumPy's functions."""
    numbers = itertools.count(1)

    def counted(allocate):
        def call(*args, **kwargs):
            if next(numbers) == number:
                raise MemoryError("injected")
            return allocate(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in ALLOCATING:
            patched.setattr(np, name, counted(getattr(np, name)))
        patched.setattr(core, "empty_like", counted(core.empty_like))
        yield


def failures_without_a_trace(call, *things):
    """Lets each allocation of a call fail in turn; returns how many there are."""
    for number in itertools.count(1):
        before = [bits_of(thing) for thing in things]
        try:
            with failing_allocation(number):
                call()
        except MemoryError:
            assert [bits_of(thing) for thing in things] == before, number
        else:
            break
    return number - 1


def run_python(code, cwd, **environment):
    """Runs `code` in a fresh interpreter; a variable that is None is taken out of the environment.

    Thread counts and the instruction set of the calling environment do not leak in.
    """
    variables = {"OMP_NUM_THREADS": None, "FASTBN_ISA": None, **environment}
    env = {k: v for k, v in os.environ.items() if k not in variables}
    env |= {k: v for k, v in variables.items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )


# What a forked child makes of a function. A process that does not end is killed.
IN_CHILD = """
import os, signal

signal.alarm(60)

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


# Tests that load an OpenMP runtime a second time.
beside_another_runtime = pytest.mark.skipif(
    sys.platform != "linux" or core.platform()["openmp"] == "none",
    reason="no OpenMP runtime that could be there twice",
)


def output_of(code, cwd, **environment):
    """What `code` prints in a fresh interpreter; fails the test if it fails."""
    done = run_python(code, cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
