"""Instance normalization as layers, with the semantics of ``torch.nn.InstanceNorm1d`` to ``3d``."""

from __future__ import annotations

import numpy as np

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _normalize as normalize
from fastbn._types import Array, ArrayLike, DTypeLike, Statistics
from fastbn.layers.base import Norm
from fastbn.layers.saved import SavedForBackward

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


class InstanceNorm(Norm):
    """What the layers have in common; they differ in the ranks of input that they take."""

    _family = "InstanceNorm"
    _zero_eps = True
    _input_shape: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        unbiased: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        options = affine, track_running_stats, device, dtype, bias, unbiased
        super().__init__(num_features, eps, momentum, *options, activation, negative_slope)

    def forward(
        self,
        input: ArrayLike,
        *,
        out: Array | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize each sample of a batch.

        By its own statistics in training mode, and in evaluation mode if the layer tracks none;
        otherwise, and if frozen, by the running statistics, as batch normalization does. What the
        backward needs is kept, by reference, except in evaluation mode.

        Parameters
        ----------
        input : array_like of shape (N, C, ...) or (C, ...)
            float32, float64, float16 or bfloat16, whatever the dtype of the layer.
        out : ndarray of the input's shape, optional
            Where to write the result: `input`, a view of exactly its elements, or an array that
            does not overlap it, of its dtype.
        mask : array_like of bool, optional
            Which positions are valid, as `BatchNorm2d.forward` takes it. A sample may have none, or
            one, whose variance is then 0; such a sample moves no running statistics.
        residual : array_like of the input's shape and dtype, optional
            As `BatchNorm2d.forward` takes it.

        Returns
        -------
        ndarray of the input's shape
            `out`, or a new array of the input's dtype and memory layout.

        Raises
        ------
        ValueError
            If the input has a wrong rank or number of channels, or samples of a single value per
            channel and no mask; or if `out` or `mask` cannot serve. Nothing has been changed then.
        TypeError
            If the dtype of the input is not one of the four, `out` or `residual` has another, or
            `mask` is not boolean.
        """
        return super().forward(input, out=out, mask=mask, residual=residual)

    def _forward(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> Array:
        if self._is_sample(x):
            out = checks.check_out(out, x)
            batch_out = None if out is None else out[np.newaxis]
            if residual is not None:
                residual = checks.as_residual(residual, x)[np.newaxis]
            sample: Array = super()._forward(x[np.newaxis], batch_out, mask, residual)[0]
            y = sample if out is None else out
        else:
            y = super()._forward(x, out, mask, residual)
        self._input_shape = x.shape
        return y

    def _quick_forward(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> Array | None:
        y = super()._quick_forward(x, out, residual)
        if y is not None:
            self._input_shape = y.shape
        return y

    def _quick_train(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> tuple[Array, SavedForBackward] | None:
        if self.training and self.track_running_stats:  # which move to a mean over samples
            return None
        return _core.try_layer_train(
            x,
            out,
            None,
            None,
            None,
            self.weight,
            self.bias,
            self.momentum,
            self.eps,
            self.unbiased,
            self.activation,
            self.negative_slope,
            residual,
            self._batch_ranks,
            self.num_features,
            1,
            True,
            self.training,
        )

    def _quick_backward(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[Array, Array | None] | None:
        if len(self._input_shape) == self._ranks[0]:  # a sample
            return None
        return super()._quick_backward(saved, dy, out, residual_out)

    def _is_sample(self, x: Array) -> bool:
        """Tell whether an array of a rank that fits is without the axis of samples."""
        return x.ndim == self._ranks[0]

    def _channel_axis(self, x: Array) -> int:
        return 0 if self._is_sample(x) else 1

    def _training_call(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> normalize.Forward:
        running_mean, running_var, _ = self._moving_statistics()  # it does not count batches
        return checks.training_call(
            x,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.momentum,  # None, without a counter, leaves the running statistics alone
            self.eps,
            out=out,
            mask=mask,
            by_instance=True,
            unbiased=self.unbiased,
            epilogue=self._epilogue(residual),
        )

    def _normalize(self, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        return normalize.by_instance(call)

    def _backward(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[Array, Array | None]:
        dy = checks.as_array(dy, "dy")
        if dy.shape != self._input_shape:
            raise ValueError(f"dy must have x's shape {self._input_shape}, got {dy.shape}")
        if not self._is_sample(dy):
            return super()._backward(saved, dy, out, residual_out)
        outs = [
            o[np.newaxis] if o is not None and checks.is_array(o) else o
            for o in (out, residual_out)
        ]
        dx, derived = super()._backward(saved, dy[np.newaxis], *outs)
        if residual_out is None and derived is not None:
            residual_out = derived[0]
        return dx[0] if out is None else out, residual_out


class InstanceNorm2d(InstanceNorm):
    """Instance normalization of (N, C, H, W) arrays, with the semantics of torch.nn.InstanceNorm2d.

    Each channel of each sample is normalized by its own mean and variance, as image generation and
    style transfer want it. An array of the shape (C, H, W) is a single sample.

    Parameters
    ----------
    num_features : int
        The number of channels C, at least 0.
    eps : float, default 1e-5
        Added to the variance. Not less than 0.
    momentum : float or None, default 0.1
        The factor of the batch in the running statistics. None is 0, as in torch.
    affine : bool, default False
        Whether there are a weight and a bias.
    track_running_stats : bool, default False
        Whether there are running statistics, by which evaluation mode then normalizes. They move
        towards the means, over the samples, of mean and unbiased variance; see `unbiased`.
    device, dtype, bias, unbiased, activation, negative_slope
        As `BatchNorm2d` takes them.

    Attributes
    ----------
    weight, bias, weight_grad, bias_grad, running_mean, running_var, training, frozen
        As those of `BatchNorm2d`.
    num_batches_tracked : ndarray of shape (), int64, or None
        0: instance normalization does not count, as in torch.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of a wrong kind.
    ImportError, RuntimeError
        If the device is a GPU, and there is no CuPy or no such GPU.

    Notes
    -----
    Where torch only warns of a wrong number of channels, because the layer has no arrays, this is a
    ValueError.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.array([[[[1.0, 3.0]]], [[[50.0, 70.0]]]])
    >>> fastbn.InstanceNorm2d(1, eps=1e-12)(x).round(6).tolist()
    [[[[-1.0, 1.0]]], [[[-1.0, 1.0]]]]
    """

    _ranks, _batch_ranks = (3, 4), (4,)


class InstanceNorm1d(InstanceNorm):
    """Instance normalization of (N, C, L) and (C, L) arrays; otherwise an `InstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.InstanceNorm1d(1, eps=1e-12)(np.array([[1.0, 3.0]])).round(6)
    array([[-1.,  1.]])
    """

    _ranks, _batch_ranks = (2, 3), (3,)


class InstanceNorm3d(InstanceNorm):
    """Instance normalization of (N, C, D, H, W) and (C, D, H, W) arrays.

    Otherwise an `InstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.InstanceNorm3d(2)(np.zeros((1, 2, 3, 4, 5), np.float32)).shape
    (1, 2, 3, 4, 5)
    """

    _ranks, _batch_ranks = (4, 5), (5,)
