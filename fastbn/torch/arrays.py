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
NUMPYS = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: bfloat16,
    torch.int64: np.dtype(np.int64),
    torch.uint8: np.dtype(np.uint8),
}
PLAIN = {torch.Tensor, torch.nn.Parameter}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# Between the layers of a model, whose arrays fill the caches, a call of torch or NumPy takes ten
# times as long as in a loop. So what every layer does takes few of them.


def as_array(tensor: torch.Tensor) -> Array:
    """The memory of a tensor; autograd does not see what is written to it."""
    dtype = NUMPYS.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu or tensor.is_neg():
        raise TypeError(f"a {tensor.dtype} tensor on {tensor.device}, which is no array")
    address, offset = tensor.data_ptr(), tensor.storage_offset()
    if offset and address == offset * dtype.itemsize:  # Of a storage whose address is 0.
        raise TypeError("a view of a tensor without memory, which is no array")
    return _core.array_at(address, tensor.shape, tensor.stride(), dtype, tensor)


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor of the memory of an array."""
    if bfloat16 is not None and array.dtype == bfloat16:  # None would stand for float64.
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array_or_none(tensor: torch.Tensor | None) -> Array | None:
    """The memory of a tensor, if there is one."""
    return None if tensor is None else as_array(tensor)


def new_like(x: torch.Tensor, array: Array) -> tuple[torch.Tensor, Array]:
    """An uninitialized tensor like x, whose memory `array` is, and its own memory.

    Its memory format is that of torch's result. A large one takes the memory of freed results:
    torch's allocator gives it back to the system, which hands it out again page by page, in more
    time than a normalization takes.
    """
    memory_format = memory_format_of(x)
    if _core.reuses_memory(array.nbytes):
        memory = _core.new_tensor_memory(array, memory_format is not torch.contiguous_format)
        return as_tensor(memory), memory
    y = torch.empty_like(x, memory_format=memory_format)
    return y, as_array(y)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """The same of torch's memory: of an x that has none itself, too."""
    return torch.empty_like(x, memory_format=memory_format_of(x))


def memory_format_of(x: torch.Tensor) -> Any:
    """The memory format of torch's result for x."""
    last = CHANNELS_LAST.get(x.dim())
    if last is None or x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=last) or steps_over_channels_last(x.shape, x.stride()):
        return last
    return torch.contiguous_format


def steps_over_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether torch takes a tensor for one that steps over elements of a channels-last one."""
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        ambiguous = axis == 0 and least == strides[1]  # One element in each sample.
        if shape[axis] == 0 or strides[axis] < least or ambiguous:
            return False
        least = strides[axis] * shape[axis]
    return strides[1] > 0
