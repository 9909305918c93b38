"""Instance normalization as layers: batch normalization of each sample by itself.

The semantics are those of ``torch.nn.InstanceNorm1d`` to ``InstanceNorm3d`` and their lazy forms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import functional as F
from fastbn.layers.base import _BatchNorm, _LazyBatchNorm

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]

Array = NDArray[Any]


class _InstanceNorm(_BatchNorm):
    """What the layers have in common; they differ in the ranks of input that they take."""

    _family = "InstanceNorm"
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
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )

    def forward(
        self, x: ArrayLike, *, out: Array | None = None, mask: ArrayLike | None = None
    ) -> Array:
        """Normalize each sample of a batch.

        By its own statistics in training mode, and in evaluation mode if the layer tracks none;
        otherwise, and if frozen, by the running statistics, as batch normalization does. What the
        backward needs is kept, by reference, except in evaluation mode.

        Parameters
        ----------
        x : array_like of shape (N, C, ...) or (C, ...)
            float32, float64, float16 or bfloat16, whatever the dtype of the layer.
        out : ndarray of x's shape, optional
            Where to write the result: `x`, a view of exactly its elements, or an array that does
            not overlap it, of x's dtype.
        mask : array_like of bool, optional
            Which positions count, as `BatchNorm2d.forward` takes it.

        Returns
        -------
        ndarray of x's shape
            `out`, or a new array of x's dtype and memory layout.

        Raises
        ------
        ValueError
            If x has a wrong rank or number of channels, a single value per channel of a sample or
            none that counts, or `out` or `mask` cannot serve. Nothing has been changed then.
        TypeError
            If the dtype of x is not one of the four, `out` has another, or `mask` is not boolean.
        """
        x = self._checked(x)
        out = F.check_out(out, x)
        if self._is_sample(x):
            batch_out = None if out is None else out[np.newaxis]
            y = super().forward(x[np.newaxis], out=batch_out, mask=mask)[0]
        else:
            y = super().forward(x, out=out, mask=mask)
        self._input_shape = x.shape
        return y if out is None else out

    def _is_sample(self, x: Array) -> bool:
        """Tell whether an array of a rank that fits is without the axis of samples."""
        return x.ndim == self._ranks[0]

    def _channel_axis(self, x: Array) -> int:
        return 0 if self._is_sample(x) else 1

    def _batch_size(self) -> int:
        return 1

    def _forward_eval(self, x: Array, out: Array | None, mask: Array | None) -> Array:
        if self.running_mean is None and self.running_var is None:
            return self._forward_instances(x, out, mask, tracks=False)[0]
        return super()._forward_eval(x, out, mask)

    def _forward_train(
        self, x: Array, out: Array | None, mask: Array | None
    ) -> tuple[Array, F.Statistics, F.Statistics]:
        return self._forward_instances(x, out, mask, tracks=self.track_running_stats)

    def _forward_instances(
        self, x: Array, out: Array | None, mask: Array | None, *, tracks: bool
    ) -> tuple[Array, F.Statistics, F.Statistics]:
        return F.forward_by_instance(
            x,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            # None leaves the running statistics alone: so it does in torch.
            0.0 if self.momentum is None else F.as_real(self.momentum, "momentum"),
            self.eps,
            out=out,
            mask=mask,
        )

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the gradient of the last forward's input; add to weight_grad and bias_grad.

        As `BatchNorm2d.backward` does.

        Parameters
        ----------
        dy : array_like of the input's shape
            The gradient of the output. Of another float dtype than the input it is converted.
        out : ndarray of the input's shape, optional
            Where to write the result: `dy`, the remembered array, a view of exactly the elements
            of one of them, or an array that overlaps neither, of the input's dtype.

        Returns
        -------
        ndarray of the input's shape
            `out`, or a new array of the input's dtype and memory layout.

        Raises
        ------
        RuntimeError
            If the last forward was not in training mode, or its backward has run.
        ValueError, TypeError
            If `dy` or `out` cannot serve. The backward can then be tried again.
        """
        if isinstance(self._memory, str):
            raise RuntimeError(self._memory)
        dy = F.as_array(dy, "dy")
        if dy.shape != self._input_shape:
            raise ValueError(f"dy must have x's shape {self._input_shape}, got {dy.shape}")
        if self._is_sample(dy):
            out_batch = out if out is None or not F.is_array(out) else out[np.newaxis]
            dx = super().backward(dy[np.newaxis], out=out_batch)
            return dx[0] if out is None else out
        return super().backward(dy, out=out)


class _LazyInstanceNorm(_LazyBatchNorm, _InstanceNorm):
    """A layer that takes its number of channels from the first input, or the first state."""

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
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, bias=bias)


class InstanceNorm2d(_InstanceNorm):
    """Instance normalization of (N, C, H, W) arrays, with the semantics of torch.nn.InstanceNorm2d.

    Each channel of each sample is normalized by its own mean and variance, as image generation and
    style transfer want it. An array of the shape (C, H, W) is a single sample.

    Parameters
    ----------
    num_features : int
        The number of channels C, at least 0.
    eps : float, default 1e-5
        Added to the variance. Greater than 0.
    momentum : float or None, default 0.1
        The factor of the batch in the running statistics. None is 0, as in torch.
    affine : bool, default False
        Whether there are a weight and a bias.
    track_running_stats : bool, default False
        Whether there are running statistics, by which evaluation mode then normalizes. They move
        towards the means, over the samples, of mean and unbiased variance.
    device, dtype, bias
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

    _ranks = (3, 4)


class InstanceNorm1d(_InstanceNorm):
    """Instance normalization of (N, C, L) and (C, L) arrays; otherwise an `InstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.InstanceNorm1d(1, eps=1e-12)(np.array([[1.0, 3.0]])).round(6)
    array([[-1.,  1.]])
    """

    _ranks = (2, 3)


class InstanceNorm3d(_InstanceNorm):
    """Instance normalization of (N, C, D, H, W) and (C, D, H, W) arrays.

    Otherwise an `InstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.InstanceNorm3d(2)(np.zeros((1, 2, 3, 4, 5), np.float32)).shape
    (1, 2, 3, 4, 5)
    """

    _ranks = (4, 5)


class LazyInstanceNorm2d(_LazyInstanceNorm):
    """An `InstanceNorm2d` that takes num_features from the first input, its axis of channels.

    It becomes an `InstanceNorm2d` as a `LazyBatchNorm2d` becomes a `BatchNorm2d`: at the first
    forward, or at the first `load_state_dict` that tells the number of channels.

    Parameters
    ----------
    eps, momentum
        As `InstanceNorm2d` takes them.
    affine, track_running_stats : bool, default True
        As `InstanceNorm2d` takes them, but for the default, which is that of torch's lazy layers.
    device, dtype, bias
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

    _ranks = InstanceNorm2d._ranks
    _becomes = InstanceNorm2d


class LazyInstanceNorm1d(_LazyInstanceNorm):
    """An `InstanceNorm1d` that takes num_features from the first input; see `LazyInstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> norm = fastbn.LazyInstanceNorm1d()
    >>> norm(np.zeros((5, 4), np.float32)).shape, norm.num_features
    ((5, 4), 5)
    """

    _ranks = InstanceNorm1d._ranks
    _becomes = InstanceNorm1d


class LazyInstanceNorm3d(_LazyInstanceNorm):
    """An `InstanceNorm3d` that takes num_features from the first input; see `LazyInstanceNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> norm = fastbn.LazyInstanceNorm3d()
    >>> norm(np.zeros((1, 2, 3, 4, 5), np.float32)).shape, norm.num_features
    ((1, 2, 3, 4, 5), 2)
    """

    _ranks = InstanceNorm3d._ranks
    _becomes = InstanceNorm3d
