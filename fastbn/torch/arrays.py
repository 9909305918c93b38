"""Tensors as ndarrays of the same memory, and new tensors for results."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastbn import _core
from fastbn._types import Array

# NumPy has no bfloat16 of its own: without ml_dtypes, such tensors are torch's to normalize.
bfloat16: Any
try:
    import ml_dtypes
except ImportError:
    bfloat16 = None
else:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

HALVES = {torch.float16} if bfloat16 is None else {torch.float16, torch.bfloat16}
DTYPES = {torch.float32, torch.float64} | HALVES
PLAIN = {torch.Tensor, torch.nn.Parameter}


def as_array(tensor: torch.Tensor) -> Array:
    """The memory of a tensor; autograd does not see what is written to it."""
    array: Array
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(bfloat16)
    else:
        array = tensor.numpy()
    return array


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor of the memory of an array."""
    if bfloat16 is not None and array.dtype == bfloat16:  # None would stand for float64.
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array_or_none(tensor: torch.Tensor | None) -> Array | None:
    """The memory of a tensor, if there is one."""
    return None if tensor is None else as_array(tensor)


def new_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialized tensor of x's dtype, in the memory format that torch gives its result.

    A large one takes the memory of freed results. torch's allocator gives it back to the system,
    which hands it out again page by page, in more time than a normalization takes.
    """
    memory_format = torch.contiguous_format if x.is_contiguous() else memory_format_of(x)
    if not _core.reuses_memory(x.nbytes) or not x.is_contiguous(memory_format=memory_format):
        return torch.empty_like(x, memory_format=memory_format)
    if memory_format is torch.contiguous_format:
        return as_tensor(_core.empty_like(as_array(x)))
    # So that the strides of axes of one element are torch's as well: they tell the memory format.
    last = _core.empty_like(np.moveaxis(as_array(x), 1, -1))
    return as_tensor(np.moveaxis(last, -1, 1))


def memory_format_of(x: torch.Tensor) -> Any:
    """The memory format that torch suggests for results of x."""
    if x.dim() == 4 and is_channels_last(x.stride(), (1, 3, 2, 0)):
        return torch.channels_last
    if x.dim() == 5 and is_channels_last(x.stride(), (1, 4, 3, 2, 0)):
        return torch.channels_last_3d
    return torch.contiguous_format


def is_channels_last(strides: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Tell whether strides grow in this order of the axes."""
    ordered = [strides[axis] for axis in order]
    return strides[1] == 1 and ordered == sorted(ordered)
