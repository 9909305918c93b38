"""The libraries: which module measures each, and in which environment its process runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Libraries that cannot write into a given array get theirs from malloc. By default glibc maps every
# large array anew, and the page faults cost more than the computation. This makes malloc keep its
# memory, in huge pages. (MALLOC_MMAP_THRESHOLD_ would not do: glibc ignores values above 32 MB.)
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Setup(NamedTuple):
    """How the process of a library is set up."""

    module: str
    environment: Mapping[str, str] = {}
    # None is as many as the benchmark is asked for.
    threads: int | None = None


FLOOR, FASTBN, TORCH, TORCH_MALLOC = "floor", "fastbn", "torch", "torch-malloc"
TORCH_COMPILE = "torch-compile"
NUMBA_FASTMATH, ONEDNN = "numba-fastmath", "onednn"
# fastbn with less than it could have.
FASTBN_AVX2, FASTBN_BASE = "fastbn-avx2", "fastbn-base"
FASTBN_ONE_THREAD = "fastbn-1-thread"
WAYS = (FASTBN_AVX2, FASTBN_BASE, FASTBN_ONE_THREAD)
# fastbn's batch normalization with NumPy's addition and maximum after it.
FASTBN_UNFUSED = "fastbn-unfused"
# What is not a peer.
OWN = (FLOOR, FASTBN, *WAYS, FASTBN_UNFUSED)

LIBRARIES = {
    FLOOR: Setup("floor"),
    FASTBN: Setup("fastbn"),
    FASTBN_AVX2: Setup("fastbn", {"FASTBN_ISA": "avx2"}),
    FASTBN_BASE: Setup("fastbn", {"FASTBN_ISA": "base"}),
    FASTBN_ONE_THREAD: Setup("fastbn", threads=1),
    FASTBN_UNFUSED: Setup("fastbn_unfused"),
    "numpy": Setup("numpy"),
    "numba": Setup("numba"),
    NUMBA_FASTMATH: Setup("numba_fastmath"),
    TORCH: Setup("torch"),
    TORCH_MALLOC: Setup("torch", TUNED_MALLOC),
    TORCH_COMPILE: Setup("torch_compile", {"TORCHINDUCTOR_COMPILE_THREADS": "1", **TUNED_MALLOC}),
    "jax": Setup("jax", {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", **TUNED_MALLOC}),
    "onnxruntime": Setup("onnxruntime"),
    "openvino": Setup("openvino"),
    ONEDNN: Setup("onednn"),
}

# The same for arrays on a GPU.
CUDA_LIBRARIES = {
    FLOOR: Setup("floor_cuda"),
    FASTBN: Setup("fastbn_cuda"),
    TORCH: Setup("torch_cuda"),
    TORCH_COMPILE: Setup("torch_compile_cuda"),
    "cupy": Setup("cupy"),
}


def libraries_on(device: str) -> Mapping[str, Setup]:
    """The libraries that can be measured on a device."""
    return LIBRARIES if device == "cpu" else CUDA_LIBRARIES
