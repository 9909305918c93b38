"""Instance normalization as layers: batch normalization of each sample by itself.

The semantics are those of ``torch.nn.InstanceNorm1d`` to ``InstanceNorm3d``. An array of the shape
(N, C, ...) is seen as one sample of N * C channels, (1, N * C, ...), which a batch normalization of
so many channels takes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import functional as F
from fastbn.layers import NO_BACKWARD_IN_EVAL, NO_SECOND_BACKWARD, _accumulated, _BatchNorm

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]

Array = NDArray[Any]


class _Flat(_BatchNorm):
    """The batch normalization of N * C channels that a forward uses, and then its backward."""

    _ranks = (3, 4, 5)
    _memory: Any


class Instances(NamedTuple):
    """What a forward that normalized each sample by itself leaves for its backward."""

    flat: _Flat
    shape: tuple[int, ...]  # of the input, (N, C, ...)


class _InstanceNorm(_BatchNorm):
    """What the layers have in common; they differ in the ranks of input that they take."""

    _family = "InstanceNorm"
    _memory: Any  # Instances, or what a batch normalization leaves
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

    def forward(self, x: ArrayLike, *, out: Array | None = None) -> Array:
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

        Returns
        -------
        ndarray of x's shape
            `out`, or a new array of x's dtype and memory layout.

        Raises
        ------
        ValueError
            If x has a wrong rank or number of channels, a single value per channel of a sample, or
            `out` cannot serve. Nothing has been changed then.
        TypeError
            If the dtype of x is not one of the four, or `out` has another.
        """
        x = self._of_rank(x)
        out = F.check_out(out, x)
        if x.ndim == self._ranks[0]:  # without the axis of samples
            y = self._forward_batch(x[np.newaxis], None if out is None else out[np.newaxis])[0]
        else:
            y = self._forward_batch(x, out)
        self._input_shape = x.shape
        return y if out is None else out

    def _forward_batch(self, x: Array, out: Array | None) -> Array:
        x = self._checked(x)
        by_running = self.frozen if self.training else self.running_mean is not None
        if by_running:
            return super().forward(x, out=out)
        y, flat = self._forward_instances(x, out)
        self._memory = Instances(flat, x.shape) if self.training else NO_BACKWARD_IN_EVAL
        return y

    def _forward_instances(self, x: Array, out: Array | None) -> tuple[Array, _Flat]:
        """Normalize each sample by itself; return y and what did it."""
        if math.prod(x.shape[2:]) == 1:
            raise ValueError(
                f"Expected more than 1 spatial element when training, got input size {x.shape}"
            )
        tracks = self.training and self.track_running_stats and x.size > 0
        if tracks:
            F.check_running(self.running_mean, self.running_var, x, writeable=True)
        flat = self._flat(x, tracks)
        if out is None:
            out = np.empty_like(x, dtype=x.dtype.newbyteorder("="))
        target, is_view = _flattened(out)
        y = flat.forward(_flattened(x)[0], out=target if is_view else None)
        if not is_view:
            out[...] = y.reshape(out.shape)
        if tracks and flat.running_mean is not None:
            self._average(flat, len(x))
        return out, flat

    def _flat(self, x: Array, tracks: bool) -> _Flat:
        """A layer with the arrays of this one, in float64, once for each sample."""
        n = len(x)
        flat = _Flat(n * self.num_features, self.eps, affine=False, track_running_stats=False)
        flat._device = self._device
        flat.training = self.training
        # None leaves the running statistics alone: so it does in torch.
        flat.momentum = 0.0 if self.momentum is None else F.as_real(self.momentum, "momentum")
        names = ["weight", "bias"]
        if tracks:
            names += ["running_mean", "running_var"]
            flat.track_running_stats = True
        for name in names:
            if getattr(self, name) is not None:
                setattr(flat, name, np.tile(self._vector(name, 0.0, x), n))
        return flat

    def _average(self, flat: _Flat, n: int) -> None:
        """Take for running statistics the means of those of the samples."""
        for name in ("running_mean", "running_var"):
            mean = getattr(flat, name).reshape(n, -1).mean(axis=0)
            with np.errstate(all="ignore"):  # What the layer's dtype cannot hold is inf there.
                getattr(self, name)[...] = mean

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the gradient of the last forward's input; add to weight_grad and bias_grad.

        As `BatchNorm2d.backward` does. The weight is that of the forward.

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
            `out`, or a new array of the input's dtype and dy's memory layout.

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
        if dy.ndim == self._ranks[0]:  # without the axis of samples
            out_batch = out if out is None or not F.is_array(out) else out[np.newaxis]
            dx = self._backward_batch(dy[np.newaxis], out_batch)
            return dx[0] if out is None else out
        return self._backward_batch(dy, out)

    def _backward_batch(self, dy: Array, out: Array | None) -> Array:
        memory = self._memory
        if not isinstance(memory, Instances):
            return super().backward(dy, out=out)
        flat, shape = memory
        x = flat._memory.x.reshape(shape)
        dy = F.as_gradient(dy, x)
        out = F.check_out(out, x, dy)
        self._check_gradients(x)
        if out is None:
            out = np.empty_like(dy, dtype=x.dtype.newbyteorder("="))
        target, is_view = _flattened(out)
        dx = flat.backward(_flattened(dy)[0], out=target if is_view else None)
        if not is_view:
            out[...] = dx.reshape(shape)
        for name in ("weight", "bias"):
            of_samples = getattr(flat, f"{name}_grad")
            if of_samples is not None:
                added = of_samples.reshape(shape[:2]).sum(axis=0)
                gradient = getattr(self, f"{name}_grad")
                total = _accumulated(gradient, getattr(self, name), added)
                setattr(self, f"{name}_grad", total)
        self._memory = NO_SECOND_BACKWARD
        return out


class InstanceNorm2d(_InstanceNorm):
    """Instance normalization of (N, C, H, W) arrays, with the semantics of torch.nn.InstanceNorm2d.

    Each channel of each sample is normalized by its own mean and variance, as image generation and
    style transfer want it. An array of the shape (C, H, W) is a single sample. A C-contiguous array
    is read as it lies; others, channels-last ones included, work through a copy.

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


def _flattened(x: Array) -> tuple[Array, bool]:
    """(N, C, ...) as (1, N * C, ...), and whether it is a view; else it is a copy."""
    n, c, *rest = x.shape
    flat = x.reshape(1, n * c, *rest)
    return flat, F.share_memory(flat, x)
