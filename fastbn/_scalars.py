"""Every refusal of a number or a name, and its message."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from typing import Any

import numpy as np


def full_name(cls: type) -> str:
    """The name of a class that other libraries may have, too, with that of its module."""
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def as_integer(value: Any, name: str, kind: str = "an integer") -> int:
    """An integer, which a bool is not."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        got = "a bool" if isinstance(value, bool | np.bool_) else type(value).__name__
        raise TypeError(f"{name} must be {kind}, got {got}") from None


def as_batch_size(value: Any) -> int:
    """A number of samples of a batch, at least 1; 0 for None, which stands for all of them."""
    if value is None:
        return 0
    size = as_integer(value, "ghost_batch_size", "an integer or None")
    if size < 1:
        raise ValueError(f"ghost_batch_size must be at least 1, got {size}")
    return min(size, sys.maxsize)


def as_num_groups(value: Any, channels: int) -> int:
    """A number of groups into which so many channels can be divided."""
    groups = as_integer(value, "num_groups")
    if groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {groups}")
    if channels % groups:
        raise ValueError(
            f"the number of channels must be divisible by num_groups, got {channels} channels and "
            f"num_groups={groups}; {groups_of(channels, groups)} would do"
        )
    return groups


def groups_of(channels: int, most: int) -> int:
    """The largest number of groups, at most a given one, into which channels can be divided."""
    if not channels:
        return most
    return next(n for n in range(min(most, channels), 0, -1) if channels % n == 0)


def as_count(value: Any, name: str = "count") -> int:
    """A non-negative integer."""
    count = as_integer(value, name)
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}")
    return count


def scalar_of(value: Any) -> Any:
    """The scalar of a 0-d array, as which NumPy reads one from a file; other values as they are."""
    return value[()] if type(value) is np.ndarray and value.ndim == 0 else value


def as_real(value: Any, name: str) -> float:
    """A real number, which a bool is not, as a float."""
    if type(value) is float:
        return value
    value = scalar_of(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold") from None


def as_finite(value: Any, name: str) -> float:
    """A real number that is finite, as a float."""
    number = as_real(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_momentum(value: Any) -> float:
    """The momentum of a function, which counts no batches."""
    if value is None:
        raise TypeError(
            "momentum must be a real number, got None: the cumulative average is for layers, which "
            "count batches, such as BatchNorm2d(..., momentum=None)"
        )
    return as_real(value, "momentum")


def as_bool(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def as_eps(eps: Any, *, zero: bool = False) -> float:
    """A real number greater than 0, or 0 where that is allowed."""
    eps = as_real(eps, "eps")
    if not (eps > 0.0 or (zero and eps == 0.0)):
        raise ValueError(f"eps must be {'at least' if zero else 'greater than'} 0, got {eps}")
    return float(eps)


ACTIVATIONS = "relu", "relu6", "leaky_relu"
FLOAT32_MAX = float(np.finfo(np.float32).max)


def as_activation(
    activation: Any, negative_slope: Any, dtype: np.dtype[Any] | None = None
) -> tuple[str | None, float]:
    """The name of an activation, or None, and the slope of leaky_relu, for an x of a dtype."""
    legal = "activation must be None, 'relu', 'relu6' or 'leaky_relu', got"
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"{legal} {type(activation).__name__}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{legal} {activation!r}")
    if activation is not None:
        activation = sys.intern(str(activation))  # The quick path knows names by identity.
    slope = as_finite(negative_slope, "negative_slope")
    is_float32 = dtype is not None and dtype.itemsize < 8  # so is the arithmetic of 16 bits
    if is_float32 and activation == "leaky_relu" and abs(slope) > FLOAT32_MAX:
        raise ValueError(
            f"negative_slope must be in float32's range where x is {dtype}, got {slope}; where x "
            f"is float64 it may be any finite number"
        )
    return activation, slope
