"""Group normalization as a layer, with the semantics of ``torch.nn.GroupNorm``."""

from __future__ import annotations

from typing import Never

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _layer_checks as layer_checks
from fastbn import _normalize as normalize
from fastbn import _scalars as scalars
from fastbn._types import Array, ArrayLike, DTypeLike, Gate, Statistics
from fastbn.layers.base import Norm
from fastbn.layers.saved import KeptChannels, SavedForBackward, group_gradients, keep_in_groups

__all__ = ["GroupNorm"]


class GroupNorm(Norm):
    """Group normalization of (N, C, ...) arrays, with the semantics of torch.nn.GroupNorm.

    The channels of each sample are divided into groups of neighbours, and each group is normalized
    by its own mean and variance (Wu and He 2018); weight and bias are those of each channel.
    Batches may be small, since a sample does not depend on the others, and evaluation does what
    training does. One group is layer normalization over (C, ...), as many groups as channels are
    instance normalization.

    Parameters
    ----------
    num_groups : int
        Into how many groups the channels are divided: a divisor of num_channels.
    num_channels : int
        The number of channels C, at least 0.
    eps : float, default 1e-5
        Added to the variance. Not less than 0.
    affine : bool, default True
        Whether there are a weight and a bias.
    device, dtype, bias, activation, negative_slope
        As `BatchNorm2d` takes them.

    Attributes
    ----------
    weight, bias, weight_grad, bias_grad, training
        As those of `BatchNorm2d`.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of a wrong kind.
    ImportError, RuntimeError
        If the device is a GPU, and there is no CuPy or no such GPU.

    Notes
    -----
    It has the methods of `BatchNorm2d`, but has no running statistics to freeze. On a GPU a call
    reads its input once more than the other layers do, and a forward in place keeps a copy of it.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.array([[[1.0], [3.0], [50.0], [70.0]]])
    >>> fastbn.GroupNorm(2, 4, eps=1e-12)(x).round(6).tolist()
    [[[-1.0], [1.0], [-1.0], [1.0]]]
    """

    _family = "GroupNorm"
    _zero_eps = True
    _state_names = ("weight", "bias")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        channels = scalars.as_count(num_channels, "num_channels")
        self.num_groups = scalars.as_num_groups(num_groups, channels)
        options = affine, False, device, dtype, bias, True
        super().__init__(channels, eps, None, *options, activation, negative_slope)

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return self.num_features

    def forward(
        self,
        input: ArrayLike,
        *,
        out: Array | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize the groups of each sample, in evaluation mode as in training.

        What the backward needs is kept, by reference, except in evaluation mode.

        Parameters
        ----------
        input : array_like of shape (N, C, ...)
            float32, float64, float16 or bfloat16, whatever the dtype of the layer.
        out : ndarray of shape (N, C, ...), optional
            Where to write the result: `input`, a view of exactly its elements, or an array that
            does not overlap it, of its dtype. With ``out=input`` a training step keeps a copy of
            the input if the output does not determine it, as `BatchNorm2d.forward` tells.
        mask : array_like of bool, optional
            Which positions are valid, as `BatchNorm2d.forward` takes it. A sample may have none.
        residual : array_like of the input's shape and dtype, optional
            As `BatchNorm2d.forward` takes it.

        Returns
        -------
        ndarray of shape (N, C, ...)
            `out`, or a new array of the input's dtype and memory layout.

        Raises
        ------
        ValueError
            If the input has a wrong number of channels, or the groups of all samples a single value
            together; or if `out` or `mask` cannot serve. Nothing has been changed then.
        TypeError
            If the dtype of the input is not one of the four, `out` or `residual` has another, or
            `mask` is not boolean.
        """
        return super().forward(input, out=out, mask=mask, residual=residual)

    def freeze(self) -> Never:
        """Raise RuntimeError: there are no running statistics."""
        raise RuntimeError(
            "freeze() needs running statistics, and a GroupNorm has none: it normalizes each "
            "sample by its own"
        )

    def _quick_train(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> tuple[Array, SavedForBackward] | None:
        return _core.try_groups(
            x,
            out,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            self.activation,
            self.negative_slope,
            residual,
            self.num_features,
            self.training,
        )

    def _as_input(self, x: ArrayLike) -> Array:
        array = checks.as_input(x)
        layer_checks.check_channels(array, 1, self.num_features, self._other_layers)
        return array

    def _training_call(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> normalize.Forward:
        parameters = self.num_groups, self.weight, self.bias, self.eps
        epilogue = self._epilogue(residual)
        return checks.group_call(x, *parameters, out=out, mask=mask, epilogue=epilogue)

    def _normalize(self, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        return normalize.by_group(call)

    def _keep_input(self, call: normalize.Forward) -> KeptChannels | None:
        return keep_in_groups(call)

    def _gradients(
        self,
        saved: SavedForBackward,
        dy: Array,
        weight: Array | None,
        bias: Array | None,
        out: Array | None,
        gate: Gate | None,
    ) -> tuple[Array, Statistics, Statistics]:
        return group_gradients(saved, dy, weight, bias, out, gate)

    def _options_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_features}, eps={self.eps}, affine={self.affine}, "
            f"bias={self._has_bias}"
        )

    def _other_layers(self, num_features: int) -> str:
        """Suggest a layer that takes another number of channels."""
        return f"GroupNorm({scalars.groups_of(num_features, self.num_groups)}, {num_features})"
