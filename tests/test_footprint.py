"""What importing costs, and what a training step allocates."""

import sys

import pytest
from support import output_of


def test_importing_brings_neither_torch_nor_cupy(tmp_path):
    code = "import fastbn, sys; print(*sys.modules)"
    modules = output_of(code, tmp_path).split()
    assert "fastbn" in modules
    assert not {"torch", "cupy", "ml_dtypes", "scipy"} & set(modules)


def test_importing_adds_less_than_50_ms_to_importing_numpy(tmp_path):
    code = (
        "import numpy, time; start = time.perf_counter(); import fastbn;"
        "print(time.perf_counter() - start)"
    )
    seconds = [float(output_of(code, tmp_path)) for _ in range(7)]
    assert min(seconds) < 0.05  # the others are those of a busy machine


STEP = """
import tracemalloc
import numpy as np
import fastbn

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

bn = fastbn.BatchNorm2d(64)
x = np.random.default_rng(0).standard_normal((32, 64, 56, 56), dtype=np.float32)
warm = x[:2].copy()
bn(warm, out=warm)  # maps code from files, a megabyte at once on some systems
tracemalloc.start()
before = high_water()
bn(x, out=x)
print(tracemalloc.get_traced_memory()[1], (high_water() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_training_in_place_allocates_less_than_a_megabyte(tmp_path):
    traced, resident = map(int, output_of(STEP, tmp_path).split())
    assert traced < 2**20
    assert resident < 2**20
