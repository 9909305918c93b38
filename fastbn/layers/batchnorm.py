"""Batch normalization as layers, with the semantics of ``torch.nn.BatchNorm1d`` to ``3d``."""

from __future__ import annotations

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _normalize as normalize
from fastbn import _scalars as scalars
from fastbn._types import Array, ArrayLike, DTypeLike, Statistics
from fastbn.layers.base import Norm
from fastbn.layers.recording import recorders
from fastbn.layers.saved import SavedForBackward

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(Norm):
    """What the layers have in common; they differ in the ranks of input that they take."""

    _family = "BatchNorm"

    def __init__(
        self,
        num_features: int,
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
        options = affine, track_running_stats, device, dtype, bias, unbiased
        super().__init__(num_features, eps, momentum, *options, activation, negative_slope)
        self.ghost_batch_size = scalars.as_batch_size(ghost_batch_size) or None

    def _quick_train(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> tuple[Array, SavedForBackward] | None:
        training = self.training
        if recorders and training:
            return None
        tracks = training and self.track_running_stats
        return _core.try_layer_train(
            x,
            out,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.num_batches_tracked if tracks else None,
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
            # Evaluation without running statistics normalizes the batch as a whole.
            self.ghost_batch_size if training else None,
            False,
            training,
        )

    def _training_call(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> normalize.Forward:
        running_mean, running_var, counter = self._moving_statistics()
        batch_size = scalars.as_batch_size(self.ghost_batch_size) if self.training else 0
        return checks.training_call(
            x,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.momentum,
            self.eps,
            counter=counter,
            out=out,
            mask=mask,
            unbiased=self.unbiased,
            batch_size=batch_size,
            epilogue=self._epilogue(residual),
        )

    def _normalize(self, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        return normalize.by_batch(call)

    def _options_repr(self) -> str:
        ghosts = f", ghost_batch_size={self.ghost_batch_size}" if self.ghost_batch_size else ""
        return super()._options_repr() + ghosts


class BatchNorm2d(BatchNorm):
    """Batch normalization of (N, C, H, W) arrays, with the semantics of torch.nn.BatchNorm2d.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, channel by channel. In training mode, the
    mode of a new layer, mean and var are those of the batch, and the running ones move towards
    them: ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance
    unless `unbiased` is False. In evaluation mode they are the running ones.

    A layer is called like a function, and has a `backward` and `zero_grad`; `release` lets go of
    what a forward has saved. `train`, `eval`, `freeze` and `unfreeze` set its mode; `state_dict`,
    `load_state_dict`, `reset_parameters` and `reset_running_stats` are about its arrays, and `to`
    about where they are.

    Parameters
    ----------
    num_features : int
        The number of channels C, at least 0.
    eps : float, default 1e-5
        Added to the variance. Greater than 0.
    momentum : float or None, default 0.1
        The factor of the batch in the running statistics. None is the cumulative average: the
        factor is ``1 / num_batches_tracked``.
    affine : bool, default True
        Whether there are a weight and a bias.
    track_running_stats : bool, default True
        Whether there are running statistics. Without them, evaluation mode uses the statistics of
        the batch as well.
    device : None, "cpu", "cuda" or "cuda:" and a number, optional
        Where the arrays are: None and "cpu" stand for NumPy arrays, the others for CuPy's, which
        input and output then are as well.
    dtype : dtype, default float32
        That of the parameters and buffers: float32, float64, float16 or ml_dtypes' bfloat16. The
        dtype of the input may be another, and is the dtype of the output.
    bias : bool, default True
        Whether an affine layer has a bias.
    ghost_batch_size : int, optional
        In training, normalize each so many samples by themselves, and what is left over at the end
        as well, as if the layer were called for one after the other: the noise of small batches at
        the speed of large ones (Hoffer, Hubara and Soudry 2017).
    unbiased : bool, default True
        Whether running_var takes the unbiased variance of the batch (over n - 1), as in torch, or
        with False that of the population (over n), as in ONNX, Keras and Flax.
    activation : None, "relu", "relu6" or "leaky_relu", optional
        What is applied to the result, after the residual has been added if there is one, in the
        same pass over memory. The backward passes through it.
    negative_slope : float, default 0.01
        The slope of leaky_relu.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,) or None
        The parameters: ones and zeros at first. Plain arrays, to be changed in place or replaced.
    weight_grad, bias_grad : ndarray of shape (C,) or None
        To what `backward` adds, in the parameter's dtype. None before the first one.
    running_mean, running_var : ndarray of shape (C,) or None
        Zeros and ones at first.
    num_batches_tracked : ndarray of shape (), int64, or None
        The number of batches that the running statistics have seen.
    training, frozen : bool
        What `train` and `eval`, and `freeze` and `unfreeze`, set.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of a wrong kind.
    ImportError, RuntimeError
        If the device is a GPU, and there is no CuPy or no such GPU.

    Notes
    -----
    On a GPU a layer runs on CuPy's current stream and waits for nothing, so that its calls can be
    captured in a graph. The exceptions are training forwards in place, where weight and bias decide
    which channels cannot be recovered from the output, and with a mask, whose values are counted.
    While a graph is captured, the former keep a copy of the whole input instead, and the latter
    refuse no mask: where it leaves less than two values, the running statistics stay as they are.

    Several threads may share a layer in evaluation mode. A layer in training mode belongs to one
    thread at a time.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm2d(3)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-3)
    (True, True)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.bias_grad
    array([128., 128., 128.], dtype=float32)
    >>> y = bn.eval()(x, out=x)
    >>> y is x
    True
    """

    _ranks = _batch_ranks = (4,)


class BatchNorm1d(BatchNorm):
    """Batch normalization of (N, C) and (N, C, L) arrays; otherwise a `BatchNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm1d(2, affine=False, eps=1e-12)
    >>> bn(np.array([[1.0, 5.0], [3.0, 9.0]])).round(6)
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    _ranks = _batch_ranks = (2, 3)


class BatchNorm3d(BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays; otherwise a `BatchNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.BatchNorm3d(2)(np.zeros((1, 2, 3, 4, 5), np.float32)).shape
    (1, 2, 3, 4, 5)
    """

    _ranks = _batch_ranks = (5,)
