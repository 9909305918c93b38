"""The arrays of the cases, at the same place in a page in every library's process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

# What np.empty gets from the system begins so many bytes behind a page.
PAGE, BEHIND = 4096, 16


def new_array(shape: tuple[int, ...], dtype: DTypeLike, layout: str = "nchw") -> Array:
    """An array of np.empty's, with the strides of a layout.

    It begins where NumPy's large arrays do. Smaller ones come from a heap that is another in every
    process, and would begin at other places of a cache line.
    """
    if layout == "nhwc":
        n, c, h, w = shape
        return new_array((n, h, w, c), dtype).transpose(0, 3, 1, 2)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + PAGE, np.uint8)
    begin = (BEHIND - memory.ctypes.data) % PAGE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def in_layout(array: Array, layout: str = "nchw") -> Array:
    """A copy of an NCHW array with the strides of a layout."""
    copy = new_array(array.shape, array.dtype, layout)
    copy[...] = array
    return copy


def overwrite(target: Array, source: Array) -> None:
    """Copy by ordinary stores, as another layer would have written it.

    A large memcpy may bypass the caches, and a call in place would then find them cold.
    """
    bits = np.dtype(f"u{target.itemsize}")
    np.positive(source.view(bits), out=target.view(bits))
