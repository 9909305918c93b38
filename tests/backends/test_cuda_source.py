"""The source of the CUDA kernels compiles for every dtype and architecture; no GPU is needed."""

import ctypes
import ctypes.util
import importlib.util
from pathlib import Path

import pytest
from cases import in_pairs
from internals import CUDA_SOURCE

# Volta, Ampere and Hopper: the source asks whether it is compiled for 80 or later, and there are
# clusters from 90 on.
ARCHITECTURES = [(70, 1), (80, 1), (90, 1), (90, 2), (90, 8), (90, 16)]
OPTIONS = [(), ("-DWITH_MASK=1",), ("-DWITH_BATCHES=1",), ("-DWITH_MASK=1", "-DWITH_BATCHES=1")]
FORMATS = ["float32", "float64", "float16", "bfloat16"]  # in the order of their numbers


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


def architectures_of(nvrtc):
    """The architectures that it compiles for; newer ones have dropped the oldest."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    architectures = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(architectures)
    return set(architectures)


def compile_or_fail(nvrtc, *options):
    """Compiles the source to PTX; fails with the compiler's log, warnings about it included."""
    program = ctypes.c_void_p()
    source, name = CUDA_SOURCE.read_bytes(), CUDA_SOURCE.name.encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None)
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
    assert name + b"(" not in log.value, log.value.decode()


@pytest.mark.parametrize(
    ("format", "architecture", "options"), in_pairs(FORMATS, ARCHITECTURES, OPTIONS), ids=str
)
def test_the_kernels_compile(format, architecture, options):
    architecture, cluster = architecture
    nvrtc = nvrtc_or_skip()
    if architecture not in architectures_of(nvrtc):
        pytest.skip(f"this NVRTC does not compile for {architecture}")
    compile_or_fail(
        nvrtc,
        f"--gpu-architecture=compute_{architecture}",
        f"-DFORMAT={FORMATS.index(format)}",
        f"-DCLUSTER={cluster}",
        "--std=c++17",
        *options,
    )
