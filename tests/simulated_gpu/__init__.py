"""A simulated GPU: the CUDA source, compiled for the host, and what stands in for CuPy.

`language.h` gives a C++ compiler the words of CUDA, `scheduler.cpp` runs the threads of a kernel
one after the other, from barrier to barrier, in an order that a test chooses, and `cupy.py` has as
much of CuPy as fastbn and its tests use. So the kernels and the backend run as they are, on any
Linux with g++. What is shown is arithmetic, indexing, alignment, which memory is read and written,
and barriers that are missing wherever an order of the threads can tell. What is not shown is speed,
what the caches of a GPU do, and the instructions that `language.h` replaces.
"""

import ctypes
import shutil
import sys

from simulated_gpu import cupy, module


def available():
    """Whether the simulation can run here: with glibc, and a compiler that is not too old."""
    if sys.platform != "linux" or shutil.which(module.COMPILER) is None:
        return False
    try:
        module.scheduler()
    except RuntimeError:
        return False
    return hasattr(ctypes.CDLL(None), "makecontext")


def install():
    """Make `import cupy` find the stand-in."""
    sys.modules["cupy"] = cupy
    sys.modules["cupy.cuda"] = cupy.cuda
    return cupy
