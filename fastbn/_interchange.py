"""Arrays of other libraries as NumPy's, and what to do where that cannot be."""

from __future__ import annotations

import sys
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
    """An ndarray of the memory of a DLPack object, or of a copy where that holds the negatives."""
    refuse_meta(value, name)
    value = resolved(value)
    array: Array | None
    try:
        array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        array = bfloat16_of_torch(value)
        if array is not None:
            return array
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
    if is_bfloat16_of_torch(value) and not value.requires_grad and is_strided(value):
        return "; torch's bfloat16 is read through ml_dtypes: pip install ml_dtypes"
    return ""


def memory_hint(value: Any, name: str) -> str:
    """Suggest how to pass the memory of an object to what writes to it."""
    if is_meta(value):
        return "; it is on torch's meta device and has no memory"
    if is_negative_view(value):
        return "; its memory holds the negatives of its elements"
    if not hasattr(value, "__dlpack__"):
        return ""
    if getattr(value, "requires_grad", False):
        name += ".detach()"
    if value.__dlpack_device__()[0] in CUDA_DEVICES:
        return f"; on a GPU, cupy.from_dlpack({name}) shares its memory"
    if is_bfloat16_of_torch(value):
        return f"; {name}.view(torch.int16).numpy().view(ml_dtypes.bfloat16) shares its memory"
    return f"; np.from_dlpack({name}) shares its memory"


def is_bfloat16_of_torch(value: Any) -> bool:
    """Tell whether it is a tensor of torch's bfloat16, which NumPy's DLPack does not know."""
    return str(getattr(value, "dtype", "")) == "torch.bfloat16"


def bfloat16_of_torch(value: Any) -> Array | None:
    """An ndarray of the memory of a bfloat16 tensor; None without ml_dtypes, or for any other."""
    if not is_bfloat16_of_torch(value) or value.requires_grad or value.device.type != "cpu":
        return None
    if not is_strided(value):
        return None
    try:
        import ml_dtypes
    except ImportError:
        return None
    bits = value.view(sys.modules["torch"].int16).numpy()
    array: Array = bits.view(ml_dtypes.bfloat16)
    return array


def is_negative_view(value: Any) -> bool:
    """Tell whether it is a tensor of torch's whose memory holds the negatives of its elements.

    The imaginary part of a conjugate is one. DLPack does not tell.
    """
    return hasattr(value, "resolve_neg") and bool(value.is_neg())


def resolved(value: Any) -> Any:
    """The same elements, in memory that holds them."""
    return value.resolve_neg() if is_negative_view(value) else value


def is_strided(value: Any) -> bool:
    """Tell whether a tensor of torch's has its elements in memory, as sparse ones have not."""
    return str(value.layout) == "torch.strided"


def is_meta(value: Any) -> bool:
    """Tell whether it is a tensor of torch's that has a shape, and no elements."""
    return str(getattr(value, "device", "")) == "meta"


def refuse_meta(value: Any, name: str) -> None:
    """Refuse a tensor that has no elements."""
    if is_meta(value):
        raise TypeError(
            f"{name} is on torch's meta device and has no elements: give it some first, by "
            f"to_empty(device='cpu') of its module and load_state_dict(), for example"
        )


def on_host(value: Any, name: str) -> Array:
    """An array-like, CuPy array or torch tensor, Parameter or not, as an ndarray of any dtype."""
    if is_masked(value):
        raise TypeError(mask_is_lost(name))
    if is_cupy(value):
        return backend_of(value).to_host(value)
    if hasattr(value, "detach"):
        refuse_meta(value, name)
        value = resolved(value.detach().cpu())
        try:
            return np.asarray(value)
        except TypeError:  # NumPy does not know torch's bfloat16
            return np.asarray(value.float())
    return np.asarray(value)
