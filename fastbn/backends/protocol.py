"""What a backend offers: the contract between normalization and the kernels of a device.

The functions expect checked arguments and write nothing before they can no longer fail for want of
memory. `x` and `dy` have the shape (N, C, ...) and any strides, alignment and byte order; vectors
have the shape (C,) and native byte order; a mask is boolean, of the shape (N, 1, ...). With a
batch size, x is a sequence of batches of so many samples, and statistics have the shape
(batches, C). Results are new arrays of x's dtype and layout, or `out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastbn._types import Array, Epilogue, Gate, Statistics


class Backend(Protocol):
    """A module with these functions."""

    def stats(self, x: Array, mask: Array | None = None) -> tuple[Statistics, Statistics]:
        """Mean and m2 of each channel."""

    def elemt(
        self,
        x: Array,
        mean: Array,
        invstd: Array | None,
        weight: Array | None,
        bias: Array | None,
        out: Array | None,
        *,
        var: Array | None = None,
        eps: float = 0.0,
        mask: Array | None = None,
        epilogue: Epilogue | None = None,
    ) -> Array:
        """Normalize by given statistics: mean and invstd, or mean, var and eps."""

    def forward(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        out: Array | None,
        running_mean: Array | None = None,
        running_var: Array | None = None,
        momentum: float | None = 0.0,
        counter: Array | None = None,
        *,
        unbiased: bool = True,
        mask: Array | None = None,
        batch_size: int = 0,
        counts: Sequence[int] = (),
        epilogue: Epilogue | None = None,
    ) -> tuple[Array, Statistics, Statistics]:
        """Normalize by the batch's own statistics; return y, mean and invstd.

        Running statistics move towards those of the batch, the counter is increased. A momentum of
        None stands for 1 / counter, or 0 without one. Their variance is the unbiased one, or else
        that of the population.
        """

    def backward_reduce(
        self, dy: Array, x: Array, mean: Array, invstd: Array, mask: Array | None = None
    ) -> tuple[Statistics, Statistics]:
        """The sums of dy and of dy * xhat."""

    def backward_elemt(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        invstd: Array,
        weight: Array | None,
        sum_dy: Array,
        sum_dy_xhat: Array,
        count: float,
        out: Array | None,
        mask: Array | None = None,
    ) -> Array:
        """The gradient of x, from the two sums."""

    def backward(
        self,
        dy: Array,
        x: Array,
        weight: Array | None,
        mean: Array,
        invstd: Array,
        out: Array | None,
        *,
        mask: Array | None = None,
        batch_size: int = 0,
        gate: Gate | None = None,
    ) -> tuple[Array, Statistics, Statistics]:
        """The gradient of x, and the sums of dy and of dy * xhat, for each batch.

        The derivatives of a gate are known, or it has no `derived` and `gates` is true.
        """

    def gates(self, mask: Array | None) -> bool:
        """Tell whether the derivatives of a gate are computed from x, with such a mask."""

    def group_gates(self, x: Array, weight: Array | None) -> bool:
        """Tell whether `group_backward` takes a gate, with such a weight."""

    def new_alive(self, x: Array) -> Array:
        """Memory in which a forward of x notes where the derivative of its activation is 1."""

    def activation_gradient(self, dy: Array, x: Array, gate: Gate, out: Array) -> Array:
        """Write dy times the derivatives that `alive` or `y` tell; `alive` is of a forward of x."""

    def empty_like(self, x: Array) -> Array:
        """Memory for a result, in x's layout and in native byte order."""

    def group_forward(
        self,
        x: Array,
        num_groups: int,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        out: Array | None,
        *,
        mask: Array | None = None,
        epilogue: Epilogue | None = None,
    ) -> tuple[Array, Statistics, Statistics]:
        """Normalize groups of channels of each sample, of an array that is not empty.

        Return y, and mean and invstd for each sample and channel: those of its group.
        """

    def group_backward(
        self,
        dy: Array,
        x: Array,
        num_groups: int,
        weight: Array | None,
        factor: Array | None,
        mean: Array,
        invstd: Array,
        out: Array | None,
        *,
        mask: Array | None = None,
        gate: Gate | None = None,
    ) -> tuple[Array, Statistics, Statistics]:
        """The gradient of x, and the sums of dy and of dy * xhat for each channel.

        xhat is (x - mean) * invstd. dy reaches dx times factor * invstd: the factor is the weight
        but where x is the output of a forward in place.
        """

    def unrecoverable(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        *,
        slope: float = 1.0,
        num_groups: int = 0,
    ) -> Array:
        """The channels of x that the output of a forward in place does not determine.

        Negative values of the output are multiplied by the slope. With a number of groups the
        forward is `group_forward`.
        """

    def channels_of(self, x: Array, channels: Array) -> Array:
        """A copy of some channels of an array, in its layout."""

    def check(self, array: Array, name: str) -> None:
        """Refuse an array that the backend cannot take."""

    def addresses(self, array: Array) -> Array:
        """A NumPy array of the same addresses, of which nothing but them may be used."""

    def writeable(self, array: Array) -> bool:
        """Tell whether an array can be written to."""

    def readable(self) -> bool:
        """Tell whether values can be read now."""

    def named_device(self, device: str) -> str:
        """The full name of a device; raise RuntimeError where there is none."""

    def asarray(self, array: Any, dtype: Any, device: str) -> Array:
        """A copy of an array of any backend, on a device of this one."""

    def to_host(self, array: Array) -> Array:
        """An array as one of NumPy's."""
