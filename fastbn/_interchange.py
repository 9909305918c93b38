"""Arrays of other libraries as NumPy's, and what to do where that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn._types import Array
from fastbn.backends import backend_of, is_cupy


def is_masked(value: Any) -> bool:
    """Tell whether it is a masked array; np.ma is slow to import, so the others are not asked."""
    return type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray)


def mask_is_lost(name: str) -> str:
    """What is wrong with a masked array."""
    return (
        f"{name} is a masked array, whose mask would be lost: pass {name}.filled(0) and, with x, "
        f"mask= for the positions that count"
    )


def from_dlpack(value: Any, name: str) -> Array:
    """An ndarray of the memory of a DLPack object."""
    try:
        array: Array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name} of type {type(value).__name__} cannot be read: "
            f"{str(error).rstrip('.')}{dlpack_hint(value, name)}"
        ) from error
    return array


CUDA_DEVICES = (2, 13)  # DLPack's numbers of CUDA memory, and of CUDA's managed memory


def dlpack_hint(value: Any, name: str) -> str:
    """Suggest how to pass a DLPack object that NumPy cannot read."""
    if value.__dlpack_device__()[0] in CUDA_DEVICES:
        return f"; on a GPU, pass cupy.from_dlpack({name})"
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        as_bits = f"{name}.view(torch.int16).numpy()"
        return f"; of torch's bfloat16, pass {as_bits}.view(ml_dtypes.bfloat16)"
    return ""


def on_host(value: Any, name: str) -> Array:
    """An array-like, CuPy array or torch tensor, Parameter or not, as an ndarray of any dtype."""
    if is_masked(value):
        raise TypeError(mask_is_lost(name))
    if is_cupy(value):
        return backend_of(value).to_host(value)
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        try:
            return np.asarray(value)
        except TypeError:  # NumPy does not know torch's bfloat16
            return np.asarray(value.float())
    return np.asarray(value)
