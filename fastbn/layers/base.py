"""What all normalization layers have in common: options, modes and the forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Never

import numpy as np

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _layer_checks as layer_checks
from fastbn import _normalize as normalize
from fastbn import _scalars as scalars
from fastbn._types import Array, ArrayLike, DTypeLike, Statistics
from fastbn.layers.backward import Differentiable
from fastbn.layers.recording import Recorder, recorder_of
from fastbn.layers.saved import (
    AFTER_FREEZE,
    AFTER_TRAIN,
    NO_FORWARD,
    KeptChannels,
    SavedForBackward,
    keep_input,
    used_parameters,
    with_alive,
)

# The number of channels of a lazy layer.
UNKNOWN: Any = object()


class Norm(Differentiable):
    """A normalization layer; families differ in what is normalized together."""

    _family: ClassVar[str]
    _ranks: ClassVar[tuple[int, ...]]
    # Of those, the ones with an axis of samples; None stands for all.
    _batch_ranks: ClassVar[tuple[int, ...] | None] = None
    _zero_eps: ClassVar[bool] = False  # whether eps may be 0
    # Whether a backward may compute the derivatives of the activation from the input.
    _computes_gates: ClassVar[bool] = True

    # Those of layers that were pickled before there were activations.
    activation: str | None = None
    negative_slope: float = 0.01

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: str | None,
        dtype: DTypeLike | None,
        bias: bool,
        unbiased: bool,
        activation: str | None,
        negative_slope: float,
    ) -> None:
        """Check and keep the options, and make the arrays if the number of channels is known."""
        self.eps = scalars.as_finite(scalars.as_eps(eps, zero=self._zero_eps), "eps")
        self.momentum = None if momentum is None else scalars.as_finite(momentum, "momentum")
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.unbiased = scalars.as_bool(unbiased, "unbiased")
        self.activation, self.negative_slope = scalars.as_activation(activation, negative_slope)
        self._device = layer_checks.as_device(device)
        self._dtype = layer_checks.as_dtype(dtype)
        self._has_bias = self.affine and bool(bias)
        self.training = True
        self.frozen = False
        self.num_features = 0
        self.num_batches_tracked = self._full((), 0, np.int64) if self.track_running_stats else None
        self.weight_grad = self.bias_grad = None
        self._saved = NO_FORWARD
        if num_features is not UNKNOWN:
            self._allocate(layer_checks.as_num_features(num_features))

    def __call__(
        self,
        input: ArrayLike,
        *others: Never,
        out: Array | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize a batch, as `forward` does; all but the input is passed by name."""
        if others:
            raise TypeError(
                f"{type(self).__name__} is called with x alone by position, got {1 + len(others)} "
                f"arguments; pass the others by name: layer(x, out=..., mask=..., residual=...)"
            )
        return self.forward(input, out=out, mask=mask, residual=residual)

    # What Python's errors of arguments call it: users know no Norm.
    __call__.__qualname__ = "layer"

    def forward(
        self,
        input: ArrayLike,
        *,
        out: Array | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize a batch, add a residual, and apply the activation.

        In training mode by its own statistics, towards which the running ones then move; what the
        backward needs is kept, by reference. In evaluation mode, and in training mode if frozen,
        by the running statistics; evaluation mode keeps nothing for a backward. An empty batch
        changes nothing.

        Parameters
        ----------
        input : array_like of shape (N, C, ...)
            float32, float64, float16 or bfloat16, whatever the dtype of the layer.
        out : ndarray of shape (N, C, ...), optional
            Where to write the result: `input`, a view of exactly its elements, or an array that
            does not overlap it, of its dtype. With ``out=input`` the backward reads the output: do
            not write to it before. A training step in place allocates nothing of the input's size,
            with two exceptions. The output does not determine channels whose weight is 0, or whose
            bias is more than 16 times as large as the weight (4 times in bfloat16): the layer
            keeps a copy of their input, and the backward allocates as much again, unless these are
            all channels. With relu, relu6 or a residual the layer keeps a copy of the whole input.
        mask : array_like of bool, optional
            Which positions are valid, of a shape that broadcasts to (N, 1, ...): pixels of an
            image, or the part of each sequence that is not padding. What the input holds at the
            others changes nothing, neither here nor in the backward; output and gradient are 0
            there. The backward has a copy.
        residual : array_like of the input's shape and dtype, optional
            Is added to the normalized batch, before the activation and in the same pass over
            memory. After that, it may be overwritten; `out` may be it.

        Returns
        -------
        ndarray of shape (N, C, ...)
            `out`, or a new array of the input's dtype and memory layout.

        Raises
        ------
        ValueError
            If the input has a wrong rank or number of channels, or in training a single value per
            channel or no valid one; or if `out` or `mask` cannot serve. Nothing has been changed
            then.
        TypeError
            If the dtype of the input is not one of the four, `out` or `residual` has another, or
            `mask` is not boolean.
        """
        if mask is None:
            y = self._quick_forward(input, out, residual)
            if y is not None:
                return y
        return self._forward(self._as_input(input), out, mask, residual)

    def _quick_forward(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> Array | None:
        """`forward` of a plain call; None for any other."""
        y: Array
        saved: SavedForBackward | str
        training = self.training
        by_running = (
            self.frozen
            if training
            else self.running_mean is not None or self.running_var is not None
        )
        if not by_running:
            result = self._quick_train(x, out, residual)
            if result is None:
                return None
            y, saved = result
            if not training:
                saved = self._no_backward_in_eval()
            self._saved = saved
            return y
        function: Callable[..., Any] = _core.try_layer_frozen if training else _core.try_evaluate
        result = function(
            x,
            out,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            self.activation,
            self.negative_slope,
            residual,
            self._batch_ranks,
            self.num_features,
        )
        if result is None:
            return None
        y, saved = result if training else (result, self._no_backward_in_eval())
        self._saved = saved
        return y

    def _quick_train(
        self, x: ArrayLike, out: Array | None, residual: ArrayLike | None
    ) -> tuple[Array, SavedForBackward] | None:
        """`forward` of a plain call by the input's own statistics; None for any other.

        Returns the result and, in training mode, what the backward needs.
        """
        return None

    def _forward(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> Array:
        """`forward` of an array of shape (N, C, ...) that fits the layer."""
        if not self.training:
            y = self._forward_eval(x, out, mask, residual)
            self._saved = self._no_backward_in_eval()
            return y
        if self.frozen:
            forward, call_of = normalize.frozen, self._running_call
        else:
            recorder, call_of = self._recorder, self._training_call
            forward = self._forward_train if recorder is None else partial(recorder.record, self)
        call = with_alive(
            call_of(x, out, mask, residual), computes_gates=self._computes_gates and not self.frozen
        )
        if isinstance(call.mask, np.ndarray):  # A C-contiguous one is saved.
            call = call._replace(mask=np.ascontiguousarray(call.mask))
        kept = self._keep_input(call) if call.in_place else None
        weight, bias = used_parameters(call)
        y, mean, invstd = forward(call)
        self._saved = SavedForBackward(
            y if call.in_place else x,
            mean,
            invstd,
            call.in_place,
            self.frozen,
            kept,
            call.mask,
            call.batch_size,
            weight,
            bias,
            call.epilogue,
            call.num_groups,
        )
        return y

    def _no_backward_in_eval(self) -> str:
        """Why a forward in evaluation mode has no backward, and which one has."""
        return AFTER_TRAIN if self.frozen or self.running_mean is None else AFTER_FREEZE

    def _as_input(self, x: ArrayLike) -> Array:
        """x as an array of a rank and a number of channels that fit."""
        array = layer_checks.as_input_of_rank(x, self._ranks, self._family)
        axis = self._channel_axis(array)
        layer_checks.check_channels(array, axis, self.num_features, self._other_layers)
        return array

    def _channel_axis(self, x: Array) -> int:
        """The axis of channels of an array of a rank that fits."""
        return 1

    def _forward_eval(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> Array:
        if self.running_mean is None and self.running_var is None:
            return self._normalize(self._training_call(x, out, mask, residual))[0]
        return normalize.by_running(self._running_call(x, out, mask, residual))

    @property
    def _recorder(self) -> Recorder | None:
        """What records the layer, if it is recalibrated and tracks running statistics."""
        return recorder_of(self) if self.track_running_stats else None

    def _forward_train(self, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        """Normalize by the input's own statistics; move the running ones."""
        return self._normalize(call)

    def _normalize(self, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        """What the family does to its input."""
        raise NotImplementedError

    def _training_call(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> normalize.Forward:
        """The checked arguments of a forward by the input's own statistics."""
        raise NotImplementedError

    def _moving_statistics(self) -> tuple[Array | None, Array | None, Array | None]:
        """The running statistics, and their counter, that a training forward moves."""
        if not self.training or not self.track_running_stats or self._recorder is not None:
            return None, None, None
        return self.running_mean, self.running_var, self.num_batches_tracked

    def _running_call(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> normalize.Forward:
        """The checked arguments of a forward by the running statistics."""
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        epilogue = self._epilogue(residual)
        return checks.running_call(x, *parameters, self.eps, out=out, mask=mask, epilogue=epilogue)

    def _epilogue(self, residual: ArrayLike | None) -> tuple[Any, Any, Any]:
        """What follows the normalization, to be checked."""
        return self.activation, self.negative_slope, residual

    def _keep_input(self, call: normalize.Forward) -> KeptChannels | None:
        """A copy of what a forward in place would make unrecoverable."""
        return keep_input(call, frozen=self.frozen, inverts=self._computes_gates)
