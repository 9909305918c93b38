"""The backends, and which of them is asked for an array or a device.

CuPy and its backend are imported when a CuPy array or the name of a CUDA device first appears.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastbn.backends import cpu

if TYPE_CHECKING:
    from fastbn.backends.protocol import Backend

CUDA_DEVICE = re.compile(r"cuda(:\d+)?")


def is_cupy(value: Any) -> bool:
    """Tell whether it is a CuPy array, of which there are none before CuPy is imported."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def backend_of(array: Any) -> Backend:
    """The backend of an array, which is one of NumPy's or of CuPy's."""
    return cpu if isinstance(array, np.ndarray) else cuda_backend()


@functools.cache
def cuda_backend() -> Backend:
    """The CUDA backend; raise ImportError where there is no CuPy."""
    try:
        return cast("Backend", importlib.import_module("fastbn.backends.cuda"))
    except ImportError as error:
        raise ImportError(
            f"CUDA devices need CuPy: pip install 'fastbn[cuda12]' or 'fastbn[cuda13]', "
            f"in a clone pip install -e '.[cuda12]' or '.[cuda13]', "
            f"as the driver has CUDA 12 or 13 ({error})"
        ) from error


def backend_for(device: str) -> Backend:
    """The backend of a device that has been named by `as_device`."""
    return cpu if device == "cpu" else cuda_backend()
