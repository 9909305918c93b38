"""Arrays as the kernels take them: layouts, copies, outputs, vectors and masks.

The kernels take arrays that are C-contiguous, as they are or with the channels last. Which of the
two a call uses is decided by x; arrays that lie otherwise are copied.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np

from fastbn.backends.common import batches_of

Array = Any  # CuPy has no types.


def layout(x: Array) -> int:
    """1 if x is C-contiguous, 2 if it is so with the channels last, 0 if neither."""
    if x.flags.c_contiguous:
        return 1
    expected = channels_last_strides(x.shape, x.itemsize)
    pairs = zip(x.strides, expected, x.shape, strict=True)
    return 2 if all(s == e or size == 1 for s, e, size in pairs) else 0


@functools.lru_cache(4096)
def channels_last_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of a channels-last array."""
    strides = [0] * len(shape)
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        strides[axis] = itemsize
        itemsize *= shape[axis]
    return tuple(strides)


def packed(x: Array) -> Array:
    """The array as the kernels take it: itself or a copy."""
    return x if layout(x) else cupy.ascontiguousarray(x)


def packed_like(source: Array, array: Array) -> Array:
    """The array in the source's layout and dtype: itself or a copy."""
    if array.dtype == source.dtype and layout(array) == layout(source):
        return array
    copy = cupy.empty_like(source)
    copy[...] = array
    return copy


def packed_mask(mask: Array | None) -> Array | None:
    """A boolean mask of shape (N, 1, ...) as the kernels take it: of shape (N, ...), dense."""
    return None if mask is None else cupy.ascontiguousarray(mask[:, 0])


def output(x: Array, source: Array, out: Array | None) -> tuple[Array, Array]:
    """The array that the kernels write, and the one that the result shall be in in the end."""
    if out is None:
        if source is x:
            out = empty_like(x)
            return out, out
        out = cupy.empty_like(x)
    if layout(out) == layout(source):
        return out, out
    # A source that is a copy can be overwritten.
    return (cupy.empty_like(source) if source is x else source), out


def empty_like(x: Array) -> Array:
    """A new array of the same layout, which is not 0."""
    if x.flags.c_contiguous:
        return cupy.ndarray(x.shape, x.dtype)
    return cupy.ndarray(x.shape, x.dtype, strides=channels_last_strides(x.shape, x.itemsize))


def unpacked(target: Array, out: Array) -> Array:
    """The result in the array where it shall be."""
    if target is not out:
        out[...] = target
    return out


def vectors(x: Array, count: int, batch_size: int = 0) -> list[Array]:
    """So many new arrays of one float64 per channel, or with a batch size per batch and channel.

    Kernels fill them; no kernel runs on an array without elements, for which they are zero.
    """
    shape = batches_of(x, batch_size), x.shape[1]
    new = cupy.ndarray if x.size else cupy.zeros
    return [new(shape if batch_size else shape[1:], np.float64) for _ in range(count)]


def apart(parameter: Array | None, *written: Array) -> Array | None:
    """The parameter, or a copy of it if it may share memory with an array that is written."""
    if parameter is None:
        return None
    for other in written:
        reach = parameter.size * max(abs(parameter.strides[0]), abs(other.strides[0]))
        if abs(parameter.data.ptr - other.data.ptr) < reach:
            return parameter.copy()
    return parameter
