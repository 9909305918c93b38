"""Lazy layers: they take their number of channels from the first input, or the first state."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from fastbn import _layer_checks as layer_checks
from fastbn._types import Array, ArrayLike, DTypeLike
from fastbn.layers.base import UNKNOWN, Norm
from fastbn.layers.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.layers.instancenorm import (
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from fastbn.layers.state import LoadedKeys

__all__ = [
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]

Result = TypeVar("Result")

# Held by the thread that makes a layer's arrays; one for all layers, so that they can be copied.
_becoming = threading.RLock()


def renew_after_fork() -> None:
    """In a child no thread is there that could have the lock of the parent, and release it."""
    global _becoming
    _becoming = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_after_fork)


class Lazy(Norm):
    """A layer that takes its number of channels from the first input, or the first state."""

    _becomes: ClassVar[type[Norm]]

    def _leave_out(self) -> None:
        """Set the arrays that the layer will not have to None; the others are not there yet."""
        if not self.affine:
            self.weight = None
        if not self._has_bias:
            self.bias = None
        if not self.track_running_stats:
            self.running_mean = self.running_var = None

    if not TYPE_CHECKING:  # a checker takes every name that a __getattr__ may have

        def __getattr__(self, name: str) -> Any:
            # Called for what is not there: the arrays whose shape is not known yet.
            if name in self._state_names:
                raise AttributeError(
                    f"{type(self).__name__} has no {name} yet: the first input, or "
                    f"load_state_dict(), decides num_features"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def forward(
        self,
        input: ArrayLike,
        *,
        out: Array | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Take the number of channels from the input; do what the layer that this becomes does."""
        x = layer_checks.as_input_of_rank(input, self._ranks, self._family)
        num_features = x.shape[self._channel_axis(x)]
        return Lazy._initialized(
            self,
            num_features,
            lambda becomes: becomes.forward(self, x, out=out, mask=mask, residual=residual),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy shares no array with a layer that has but this one yet.
        state = super().__getstate__()
        if self.num_batches_tracked is not None:
            state["num_batches_tracked"] = self.num_batches_tracked.copy()
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> LoadedKeys:
        """Take the number of channels from an entry, then load as `BatchNorm2d` does."""
        layer_checks.check_state(state_dict)
        for name in self._state_names[:-1]:  # A counter may have the shape (1,).
            shape = np.shape(state_dict.get(prefix + name, 0))
            if len(shape) == 1:
                return Lazy._initialized(
                    self,
                    shape[0],
                    lambda becomes: becomes.load_state_dict(self, state_dict, strict, prefix),
                )
        return Norm.load_state_dict(self, state_dict, strict, prefix)

    def _initialized(self, num_features: int, call: Callable[[type[Norm]], Result]) -> Result:
        """Call a method of the class of `_becomes`, and become it; if that fails, stay lazy.

        Other threads may share the layer in evaluation mode. Those that come meanwhile wait, since
        the class is the last thing that changes, and then find a layer that has all arrays. So any
        method of this class may go on with a layer that is lazy no more, and calls no other by it.
        """
        with _becoming:
            if isinstance(self, Lazy):
                lazy_attributes = dict(self.__dict__)
                try:
                    self._allocate(num_features)
                    result = call(self._becomes)
                except BaseException:
                    self.__dict__ = lazy_attributes
                    raise
                self.__class__ = self._becomes  # type: ignore[assignment]
                return result
        return call(type(self))  # another thread has been here


class LazyBatchNorm(Lazy, BatchNorm):
    """What the lazy layers of batch normalization have in common."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        ghost_batch_size: int | None = None,
        unbiased: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        layer_checks.refuse_channels(eps, type(self).__name__)
        BatchNorm.__init__(
            self,
            UNKNOWN,
            *(eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            ghost_batch_size=ghost_batch_size,
            unbiased=unbiased,
            activation=activation,
            negative_slope=negative_slope,
        )
        self._leave_out()


class LazyInstanceNorm(Lazy, InstanceNorm):
    """What the lazy layers of instance normalization have in common."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        unbiased: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        layer_checks.refuse_channels(eps, type(self).__name__)
        InstanceNorm.__init__(
            self,
            UNKNOWN,
            *(eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            unbiased=unbiased,
            activation=activation,
            negative_slope=negative_slope,
        )
        self._leave_out()


class LazyBatchNorm2d(LazyBatchNorm):
    """A `BatchNorm2d` that takes num_features from the first input, ``x.shape[1]``.

    Its other parameters are those of `BatchNorm2d`. It becomes a `BatchNorm2d`, class and all, at
    the first forward, or at the first `load_state_dict` that tells the number of channels. Until
    then its arrays are not there: reading one raises AttributeError. What comes first is eps: an
    integer above 0, a number of channels as a rule, is refused there with a TypeError.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.LazyBatchNorm2d(momentum=None)
    >>> bn.has_uninitialized_params()
    True
    >>> y = bn(np.zeros((2, 5, 4, 4), np.float32))
    >>> bn
    BatchNorm2d(5, eps=1e-05, momentum=None, affine=True, bias=True, track_running_stats=True)
    """

    _ranks = BatchNorm2d._ranks
    _becomes = BatchNorm2d


class LazyBatchNorm1d(LazyBatchNorm):
    """A `BatchNorm1d` that takes num_features from the first input; see `LazyBatchNorm2d`."""

    _ranks = BatchNorm1d._ranks
    _becomes = BatchNorm1d


class LazyBatchNorm3d(LazyBatchNorm):
    """A `BatchNorm3d` that takes num_features from the first input; see `LazyBatchNorm2d`."""

    _ranks = BatchNorm3d._ranks
    _becomes = BatchNorm3d


class LazyInstanceNorm2d(LazyInstanceNorm):
    """An `InstanceNorm2d` that takes num_features from the first input, its axis of channels.

    It becomes an `InstanceNorm2d` as a `LazyBatchNorm2d` becomes a `BatchNorm2d`: at the first
    forward, or at the first `load_state_dict` that tells the number of channels.

    Parameters
    ----------
    eps, momentum
        As `InstanceNorm2d` takes them.
    affine, track_running_stats : bool, default True
        As `InstanceNorm2d` takes them, but for the default, which is that of torch's lazy layers.
    device, dtype, bias, unbiased, activation, negative_slope
        As `InstanceNorm2d` takes them.

    Notes
    -----
    A first input of the shape (C, H, W), without the axis of samples, serves as well. In torch,
    which takes H for C, it is an error.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> norm = fastbn.LazyInstanceNorm2d(track_running_stats=False)
    >>> y = norm(np.zeros((2, 5, 4, 4), np.float32))
    >>> norm
    InstanceNorm2d(5, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=False)
    """

    _ranks, _batch_ranks = InstanceNorm2d._ranks, InstanceNorm2d._batch_ranks
    _becomes = InstanceNorm2d


class LazyInstanceNorm1d(LazyInstanceNorm):
    """An `InstanceNorm1d` that takes num_features from the first input; see `LazyInstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> norm = fastbn.LazyInstanceNorm1d()
    >>> norm(np.zeros((5, 4), np.float32)).shape, norm.num_features
    ((5, 4), 5)
    """

    _ranks, _batch_ranks = InstanceNorm1d._ranks, InstanceNorm1d._batch_ranks
    _becomes = InstanceNorm1d


class LazyInstanceNorm3d(LazyInstanceNorm):
    """An `InstanceNorm3d` that takes num_features from the first input; see `LazyInstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> norm = fastbn.LazyInstanceNorm3d()
    >>> norm(np.zeros((1, 2, 3, 4, 5), np.float32)).shape, norm.num_features
    ((1, 2, 3, 4, 5), 2)
    """

    _ranks, _batch_ranks = InstanceNorm3d._ranks, InstanceNorm3d._batch_ranks
    _becomes = InstanceNorm3d
