"""Which arrays share memory, and how."""

from __future__ import annotations

import numpy as np

from fastbn._types import Array
from fastbn.backends import backend_of


def overlaps_itself(array: Array) -> bool:
    """Tell whether elements of an array share memory; where strides do not nest, yes."""
    extent = array.itemsize
    axes = [(abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n != 1]
    for stride, n in sorted(axes):
        if stride < extent:
            return array.size > 0
        extent += stride * (n - 1)
    return False


def share_memory(a: Array, b: Array) -> bool:
    """Tell whether two arrays have memory in common; where that is too hard to tell, yes."""
    if a is b:
        return True
    backend = backend_of(a)
    a, b = backend.addresses(a), backend.addresses(b)
    try:
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same_elements(a: Array, b: Array) -> bool:
    """Tell whether two arrays of one shape have each element at the same place."""
    if a is b:
        return True
    backend = backend_of(a)
    a, b = backend.addresses(a), backend.addresses(b)
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.itemsize == b.itemsize
        and all(
            s == t for s, t, size in zip(a.strides, b.strides, a.shape, strict=True) if size > 1
        )
    )
