"""CuPy for the tests: where there is a GPU the real one, otherwise the simulated one."""

import importlib

import pytest
import simulated_gpu


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

on_hardware = pytest.mark.skipif(SIMULATED, reason="the simulation has no streams and graphs")
simulated = pytest.mark.skipif(not SIMULATED, reason="real hardware decides that by itself")


def to_gpu(a):
    """A CuPy array of the same values, strides included if they are those of a dense array."""
    return cupy.array(a, order="K")
