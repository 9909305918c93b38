"""The source of the CUDA kernels compiles for every dtype and architecture; no GPU is needed."""

import ctypes
import ctypes.util
import importlib.util
from pathlib import Path

import pytest

import fastbn

SOURCE = Path(fastbn.__file__).with_name("_cuda.cu")
# Volta to Hopper, where there are clusters.
ARCHITECTURES = [(70, 1), (75, 1), (80, 1), (86, 1), (89, 1), (90, 1), (90, 2), (90, 8), (90, 16)]


def nvrtc_or_skip():
    """CUDA's run-time compiler, of the system or of one of its wheels."""
    names = [ctypes.util.find_library("nvrtc")]
    for package in ("nvidia.cuda_nvrtc", "nvidia.cu13"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            names += sorted(map(str, Path(folder, "lib").glob("libnvrtc.so.*")))
    for name in filter(None, names):
        if "builtins" not in name:
            return ctypes.CDLL(name)
    pytest.skip("no NVRTC")


def compile_or_fail(nvrtc, *options):
    """Compiles the source to PTX; fails with the compiler's log, warnings included."""
    program = ctypes.c_void_p()
    source = SOURCE.read_bytes()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"_cuda.cu", 0, None, None)
    encoded = [option.encode() for option in options]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    assert not log.value.strip(), log.value.decode()


@pytest.mark.parametrize("format", range(4), ids=["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("architecture", "cluster"), ARCHITECTURES, ids=str)
def test_the_kernels_compile(format, architecture, cluster):
    nvrtc = nvrtc_or_skip()
    compile_or_fail(
        nvrtc,
        f"--gpu-architecture=compute_{architecture}",
        f"-DFORMAT={format}",
        f"-DCLUSTER={cluster}",
        "--std=c++17",
    )
