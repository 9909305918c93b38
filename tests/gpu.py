"""CuPy for the tests: where there is a GPU the real one, otherwise the simulated one."""

import copy
import importlib

import internals
import pytest
import simulated_gpu
import support


def find():
    """CuPy and whether it is simulated; None where there is neither a GPU nor a compiler."""
    try:
        real = importlib.import_module("cupy")
        if real.cuda.runtime.getDeviceCount() > 0:
            return real, real.__name__ != "cupy"
    except (ImportError, RuntimeError):  # no CuPy, or no driver
        pass
    return (simulated_gpu.install(), True) if simulated_gpu.available() else None


found = find()
if found is None:
    pytest.skip("no GPU, and no g++ to simulate one", allow_module_level=True)
cupy, SIMULATED = found
cuda = importlib.import_module(internals.CUDA)  # the backend

on_hardware = pytest.mark.skipif(SIMULATED, reason="the simulation has no streams and graphs")
simulated = pytest.mark.skipif(not SIMULATED, reason="real hardware decides that by itself")


def to_gpu(a):
    """A CuPy array of the same values, strides included if they are those of a dense array."""
    return cupy.array(a, order="K")


def host(value):
    """An array of either kind, or what is none, as NumPy has it."""
    return value.get() if isinstance(value, cupy.ndarray) else value


def on_both(layer, *arrays):
    """Copies of a layer on the CPU and on the GPU, each with arrays beside it."""
    yield copy.deepcopy(layer), *(array.copy(order="K") for array in arrays)
    yield copy.deepcopy(layer).to("cuda"), *map(to_gpu, arrays)


def assert_alike(results, relative=1e-5):
    """Asserts that lists of arrays, one from each device, agree."""
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            support.assert_close(host(actual), expected, relative)


def step(layer, x, dy, in_place=False, **options):
    """Results of a training step, and the arrays of the layer after it."""
    y = layer(x, out=x if in_place else None, **options)
    results = [y.copy(), layer.backward(dy)]
    return results + [getattr(layer, name) for name in support.LAYER_ARRAYS]
