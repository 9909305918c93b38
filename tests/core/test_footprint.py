"""What importing costs, and what a training step allocates."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from cases import in_pairs
from internals import AT_FIRST_USE, PACKAGE
from support import output_of

pytestmark = pytest.mark.serial


def modules_after(statement, folder):
    """The modules that a statement leaves imported in a new process."""
    return set(output_of(f"{statement}; import sys; print(*sys.modules)", folder).split())


def test_importing_brings_neither_torch_nor_cupy(tmp_path):
    modules = modules_after("import fastbn", tmp_path)
    assert "fastbn" in modules
    assert not {"torch", "cupy", "ml_dtypes", "mpi4py", "scipy"} & modules


def test_importing_leaves_to_first_use_what_takes_time_to_import(tmp_path):
    added = modules_after("import fastbn", tmp_path) - modules_after("import numpy", tmp_path)
    assert not AT_FIRST_USE & added


def test_modules_are_there_though_they_are_imported_later(tmp_path):
    names = "moments", "recalibration", "folding", "sync", "instance", "layers", "functional"
    code = "; ".join(f"import fastbn; print(fastbn.{name}.__name__)" for name in names)
    assert output_of(code, tmp_path).split() == [f"fastbn.{name}" for name in names]


def test_sources_that_are_not_built_tell_what_to_do(tmp_path):
    sources = shutil.copytree(
        PACKAGE, tmp_path / "fastbn", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    )
    # Without the finder of an editable installation, which knows where the core is.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]"
    code += "; import fastbn"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    told = found.stderr.splitlines()[-1]
    assert all(part in told for part in ("ImportError", str(sources), "not built", "pip install"))


def test_torchs_layers_are_an_attribute_where_there_is_torch(tmp_path):
    told = output_of(
        "import fastbn\ntry: print(fastbn.torch.__name__)\nexcept AttributeError as e: print(e)\n"
        "print(hasattr(fastbn, 'torch'), 'torch' in dir(fastbn))",
        tmp_path,
    ).split("\n")
    if find_spec("torch"):
        assert told[:2] == ["fastbn.torch", "True True"]
    else:
        assert told[:2] == [
            "no module of this name: fastbn.torch needs torch: pip install 'fastbn[torch]', "
            "in a clone pip install -e '.[torch]'",
            "False False",
        ]


# What forward and backward of a step in place allocate at most, above what there was before, of an
# array of 12.8 MB (6.4 in 16 bits); by what NumPy asks for and by what the system gives.
STEP = """
import tracemalloc
import numpy as np
import fastbn

def high_water():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

def buffer():
    array = np.random.default_rng(0).standard_normal((16, 64, 56, 56), dtype=np.float32)
    array = array.astype({dtype!r})
    return np.moveaxis(array.reshape(16, 56, 56, 64), -1, 1) if {last} else array

def peak(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    tracemalloc.reset_peak()
    resident, traced = high_water(), tracemalloc.get_traced_memory()[0]
    call()
    print(tracemalloc.get_traced_memory()[1] - traced, high_water() - resident)

x, dy = buffer(), buffer()
residual = buffer() if {added} else None
bn = fastbn.BatchNorm2d(64, activation={activation!r})
bn.weight[:{aside}] = 0
if {frozen}:
    bn.freeze()
# First calls start threads and map code from files, a megabyte at once on some systems.
warm, added = np.array(x[:2], order="K"), np.array(x[:2], order="K") if {added} else None
bn(warm, out=warm, residual=added), bn.backward(warm, out=warm, residual_out=added)
tracemalloc.start()
peak(lambda: bn(x, out=x, residual=residual))
peak(lambda: bn.backward(dy, out=dy, residual_out=residual))
"""
MEGABYTE = 2**20
# How many weights of 64 are 0, the activation, and whether a residual is added.
STEPS = [
    *[(aside, None, False) for aside in (0, 40, 64)],
    *[(0, "leaky_relu", False), (40, "leaky_relu", False), (0, "relu", False)],
    *[(0, None, True), (0, "relu6", True)],
]
QUICK = [(step, last, "float32", False) for step in STEPS[:4] for last in (False, True)]
SLOW = in_pairs(STEPS, [False, True], ["float32", "float16"], [False, True])
CASES = QUICK + [pytest.param(*c, marks=pytest.mark.slow) for c in SLOW if c not in QUICK]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(("step", "last", "dtype", "frozen"), CASES)
def test_training_in_place_allocates_what_it_sets_aside(tmp_path, step, last, dtype, frozen):
    aside, activation, added = step
    options = {"activation": activation, "added": added}
    code = STEP.format(aside=aside, dtype=dtype, last=last, frozen=frozen, **options)
    lines = output_of(code, tmp_path).splitlines()
    forward, backward = (max(map(int, line.split())) for line in lines)
    channel = 16 * 56 * 56 * (2 if dtype == "float16" else 4)
    inverts = activation == "leaky_relu" and not frozen
    if (frozen and dtype == "float16") or (activation and not inverts) or added:
        aside = 64  # all of it is kept then
    assert forward < aside * channel + MEGABYTE
    # Once more for the gradients of some channels, not for those of all; but a frozen layer with an
    # epilogue has several steps, of which the last may fail.
    again = 64 if frozen and (activation or added) else aside % 64
    assert backward < again * channel + MEGABYTE
