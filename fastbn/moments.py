"""Statistics as a value: those of the parts of a data set add up to those of the whole."""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping
from typing import Any, Never, Self

import numpy as np

from fastbn import _checks as checks
from fastbn import _scalars as scalars
from fastbn import functional as F
from fastbn._interchange import on_host
from fastbn._types import ArrayLike, Statistics

__all__ = ["Moments"]


class Moments:
    """Count, mean and m2 (the sum of squared deviations from the mean) of each channel.

    ``a + b`` has the statistics of both a's and b's values, by the formula of Chan, Golub and
    LeVeque (1983) in float64, so that a data set larger than memory, or spread over processes, is a
    sum. ``Moments()`` has no values, and may be added to any other; `sum` starts without it too.
    An addition rounds as one of floats does: by an ulp at the size of ``max(|mean|, std)``. Over a
    great many parts a tree of additions is more accurate than `sum`.

    Parameters
    ----------
    count : int, default 0
        The number of values of a channel.
    mean, m2 : array_like of shape (C,), default empty
        Real numbers, those of m2 not negative. They are copied.

    Attributes
    ----------
    count : int
    mean, m2 : ndarray of shape (C,), float64
        Read-only.

    Raises
    ------
    ValueError, TypeError
        If a shape, a sign or a type is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 2.0]])
    >>> total = fastbn.Moments.of(x[:2]) + fastbn.Moments.of(x[2:])
    >>> total
    Moments(count=3, mean=[4.0, 4.0], m2=[26.0, 6.0])
    >>> total.var(correction=1)
    array([13.,  3.])
    >>> total == sum(fastbn.Moments.of(row[np.newaxis]) for row in x)
    True
    """

    __slots__ = ("count", "m2", "mean")

    count: int
    mean: Statistics
    m2: Statistics

    def __init__(self, count: int = 0, mean: ArrayLike = (), m2: ArrayLike = ()) -> None:
        mean, m2 = _as_statistics(mean, "mean"), _as_statistics(m2, "m2")
        if mean.shape != m2.shape:
            raise ValueError(f"mean and m2 must have one shape, got {mean.shape} and {m2.shape}")
        if (m2 < 0).any():
            raise ValueError("m2 must not be negative")
        for name, value in (("count", scalars.as_count(count)), ("mean", mean), ("m2", m2)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> Never:
        raise AttributeError(f"moments do not change: cannot set {name!r}")

    def __delattr__(self, name: str) -> Never:
        raise AttributeError(f"moments do not change: cannot delete {name!r}")

    @classmethod
    def of(cls, x: ArrayLike, mask: ArrayLike | None = None) -> Self:
        """Return the statistics of the channels of an array.

        Parameters
        ----------
        x : array_like of shape (N, C, ...)
            float32, float64, float16 or bfloat16. May be empty.
        mask : array_like of bool, optional
            Which positions are valid, of a shape that broadcasts to (N, 1, ...).

        Returns
        -------
        Moments

        Raises
        ------
        ValueError, TypeError
            If x has fewer than two axes, or another dtype; if the mask does not fit.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.Moments.of([[1.0, 5.0], [3.0, 5.0]])
        Moments(count=2, mean=[2.0, 5.0], m2=[2.0, 0.0])
        """
        return cls(*F.batch_norm_stats(x, mask))

    def var(self, correction: float = 0) -> Statistics:
        """Return the variances, ``m2 / (count - correction)``.

        Parameters
        ----------
        correction : float, default 0
            1 gives the unbiased variance, which running statistics hold.

        Returns
        -------
        ndarray of shape (C,), float64

        Raises
        ------
        ValueError
            If there are not more values than `correction`.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.Moments(3, [4.0], [26.0]).var(correction=1)
        array([13.])
        """
        if not self.count > correction:
            raise ValueError(
                f"a variance with correction={correction} needs more values than that "
                f"per channel, there are {self.count}"
            )
        return self.m2 / (self.count - correction)

    def std(self, correction: float = 0) -> Statistics:
        """Return the standard deviations: the square roots of `var`.

        Parameters
        ----------
        correction : float, default 0
            As `var` takes it.

        Returns
        -------
        ndarray of shape (C,), float64

        Raises
        ------
        ValueError
            If there are not more values than `correction`.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.Moments(4, [1.0], [16.0]).std()
        array([2.])
        """
        return np.sqrt(self.var(correction))

    def __add__(self, other: object) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if other._is_identity():
            return self
        if self._is_identity():
            return other
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of {self.mean.size} and of {other.mean.size} channels do not add up"
            )
        # The smaller one is a correction of the larger one: this rounds least.
        a, b = (self, other) if self.count >= other.count else (other, self)
        if b.count == 0:
            return a
        count = a.count + b.count
        with np.errstate(all="ignore"):  # An infinity or a NaN stays in its channel.
            delta = b.mean - a.mean
            mean = a.mean + delta * (b.count / count)
            m2 = a.m2 + b.m2 + delta * delta * (a.count * b.count / count)
        return Moments(count, mean, m2)

    def __radd__(self, other: object) -> Moments:
        if isinstance(other, int) and other == 0:  # where sum() starts
            return self
        return NotImplemented

    def _is_identity(self) -> bool:
        """Tell whether this has neither values nor channels."""
        return self.count == 0 and self.mean.size == 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean)
            and np.array_equal(self.m2, other.m2)
        )

    def __hash__(self) -> int:
        return hash((self.count, *self.mean.tolist(), *self.m2.tolist()))

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean.tolist()}, m2={self.m2.tolist()})"

    def __reduce__(self) -> tuple[type[Self], tuple[int, Statistics, Statistics]]:
        # Through the constructor: an array that is pickled would come back writeable.
        return type(self), (self.count, self.mean, self.m2)

    def to_dict(self) -> dict[str, Any]:
        """Return count, mean and m2 as an int and lists of floats, which JSON keeps exactly.

        Returns
        -------
        dict

        Examples
        --------
        >>> import fastbn
        >>> fastbn.Moments(3, [4.0], [26.0]).to_dict()
        {'count': 3, 'mean': [4.0], 'm2': [26.0]}
        """
        return {"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the moments that `to_dict` made a dict of.

        Parameters
        ----------
        state : mapping
            With "count", "mean" and "m2", and nothing else. Arrays serve too, as ``np.load``
            returns them.

        Returns
        -------
        Moments

        Raises
        ------
        ValueError, TypeError
            If a name is missing or unexpected, or a value cannot serve.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.Moments.from_dict({"count": 3, "mean": [4.0], "m2": [26.0]})
        Moments(count=3, mean=[4.0], m2=[26.0])
        """
        if not isinstance(state, collections.abc.Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if set(state) != {"count", "mean", "m2"}:
            raise ValueError(f"state must have count, mean and m2, got {sorted(map(str, state))}")
        return cls(state["count"], state["mean"], state["m2"])


def _as_statistics(value: Any, name: str) -> Statistics:
    """A read-only copy, of float64 in host memory, of one real number per channel."""
    array = on_host(value, name)
    if array.size and array.dtype.kind not in "iu" and not checks.is_float(array.dtype):
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have the shape (C,), got {array.shape}")
    array = array.astype(np.float64)
    array.flags.writeable = False
    return array
