"""How a layer's backward goes, from what its forward has saved."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _layer_checks as layer_checks
from fastbn import _normalize as normalize
from fastbn._types import Array, ArrayLike, Gate, NDArray, Statistics
from fastbn.backends import backend_of
from fastbn.layers.saved import (
    NO_SECOND_BACKWARD,
    RELEASED,
    GradBuffer,
    SavedForBackward,
    gate_of,
    grad_buffer,
    gradients,
    reads_array,
)
from fastbn.layers.state import LayerState


class Differentiable(LayerState):
    """The arrays of a layer, and its backward."""

    num_features: int
    # Any stands for None: which of them are None, one knows from the arguments, a type checker
    # does not.
    weight: Array | Any
    bias: Array | Any
    running_mean: Array | Any
    running_var: Array | Any
    num_batches_tracked: NDArray[np.int64] | Any
    weight_grad: Array | Any
    bias_grad: Array | Any

    def zero_grad(self) -> Self:
        """Set weight_grad and bias_grad to None; return the layer."""
        self.weight_grad = self.bias_grad = None
        return self

    def backward(
        self, dy: ArrayLike, *, out: Array | None = None, residual_out: Array | None = None
    ) -> Array | Any:
        """Return the gradient of the last forward's input; add to weight_grad and bias_grad.

        Uses up what the forward in training mode left: a reference to its input or, after a forward
        in place, to its output, beside copies of weight and bias. That array must not have been
        written to since then, by an activation in place for example; of a NumPy array, up to 64
        elements tell. Weight and bias may change before the backward; only on a GPU, after a
        forward that was neither in place nor followed by an activation, the weight may not.

        Parameters
        ----------
        dy : array_like of the input's shape
            The gradient of the output. Of another float dtype than the input it is converted.
        out : ndarray of the input's shape, optional
            Where to write the result: `dy`, the array that the forward has saved, a view of exactly
            the elements of one of them, or an array that overlaps neither, of the input's dtype.
        residual_out : ndarray of the input's shape, optional
            After a forward with a residual: where to write its gradient. `dy`, or an array that
            overlaps nothing else of the call, of the input's dtype.

        Returns
        -------
        ndarray of the input's shape
            `out`, or a new array of the input's dtype and memory layout. After a forward with a
            residual a pair: this, and the gradient of the residual, `residual_out` or new.

        Raises
        ------
        RuntimeError
            If the last forward was not in training mode, or its backward has run; or if what the
            forward saved has been written to.
        ValueError, TypeError
            If `dy`, `out` or `residual_out` cannot serve, or weight_grad and bias_grad cannot be
            added to. The backward can then be tried again.
        """
        saved = self._saved
        if isinstance(saved, str):
            raise RuntimeError(saved)
        if residual_out is not None and not saved.has_residual:
            raise ValueError("residual_out needs a forward with a residual before it")
        gradients = self._quick_backward(saved, dy, out, residual_out)
        dx, derived = gradients or self._backward(saved, dy, out, residual_out)
        return dx if derived is None else (dx, derived)

    def _quick_backward(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[Array, Array | None] | None:
        """`backward` of a plain call; None for any other."""
        result = _core.try_layer_backward(
            dy,
            saved,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.weight_grad,
            self.bias_grad,
            out,
            residual_out,
        )
        if result is None:
            return None
        dx, derived, self.weight_grad, self.bias_grad = result
        self._saved = NO_SECOND_BACKWARD
        return dx, derived

    def _backward(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[Array, Array | None]:
        """`backward`, from what the forward left: the gradients of input and residual."""
        dy, parameters, out, gate, buffers = self._backward_arguments(saved, dy, out, residual_out)
        invalid = normalize.invalid_positions(saved.mask)
        dx, *added = self._gradients(saved, dy, **parameters, out=out, gate=gate)
        self._add_gradients(buffers, *added)
        derived = None if gate is None else gate.derived
        return dx, None if derived is None else normalize.clear(derived, invalid)

    def _backward_arguments(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[
        Array,
        dict[str, Array | None],
        Array | None,
        Gate | None,
        tuple[GradBuffer | None, GradBuffer | None],
    ]:
        """The checked arguments of `backward`, and the memory that it takes.

        These are dy, weight and bias, out, the gate, and the memory for sums of gradients.
        """
        layer_checks.check_saved(saved, is_read=reads_array(saved, self.weight))
        layer_checks.check_parameters(weight=self.weight, bias=self.bias)
        dy = checks.as_gradient(dy, saved.x)
        parameters = checks.as_vectors(saved.x, weight=self.weight, bias=self.bias)
        read = parameters | self._checked_gradients(saved.x)
        out = checks.check_out(out, saved.x, dy, **read)
        derived = self._derived(saved, dy, residual_out, out=out, **read)
        buffers = self._grad_buffers(saved.mean)
        if saved.in_place or saved.activation is not None or isinstance(saved.x, np.ndarray):
            parameters = {"weight": saved.weight, "bias": saved.bias}
        gate = gate_of(saved, dy, derived, is_new=residual_out is None)
        return dy, parameters, out, gate, buffers

    def _derived(
        self,
        saved: SavedForBackward,
        dy: Array,
        residual_out: Array | None,
        **read: Array | None,
    ) -> Array | None:
        """Where to write the gradient of the residual, if there was one."""
        if not saved.has_residual:
            return None
        x = saved.x if reads_array(saved, self.weight) else None
        derived = checks.check_residual_out(residual_out, saved.x, dy, x=x, **read)
        return backend_of(saved.x).empty_like(saved.x) if derived is None else derived

    def _gradients(
        self,
        saved: SavedForBackward,
        dy: Array,
        weight: Array | None,
        bias: Array | None,
        out: Array | None,
        gate: Gate | None,
    ) -> tuple[Array, Statistics, Statistics]:
        """The gradients of input, weight and bias, from checked arguments."""
        return gradients(saved, dy, weight, bias, out, gate)

    def _checked_gradients(self, x: Array) -> dict[str, Array | None]:
        """weight_grad and bias_grad, if they can be added to."""
        sums = {"weight_grad": self.weight_grad, "bias_grad": self.bias_grad}
        for name, gradient in sums.items():
            if gradient is not None:
                checks.as_vector(gradient, name, self.num_features, x)
                checks.check_ndarray(gradient, name, writeable=True)
        layer_checks.check_gradients_apart(
            sums,
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
        )
        return sums

    def _grad_buffers(self, like: Statistics) -> tuple[GradBuffer | None, GradBuffer | None]:
        """The memory that adding to weight_grad and bias_grad takes, before anything is written."""
        return (
            grad_buffer(self.weight_grad, self.weight, like),
            grad_buffer(self.bias_grad, self.bias, like),
        )

    def _add_gradients(
        self,
        buffers: tuple[GradBuffer | None, GradBuffer | None],
        dweight: Statistics,
        dbias: Statistics,
    ) -> None:
        """Add to weight_grad and bias_grad; the backward is done."""
        of_weight, of_bias = buffers
        self.weight_grad = None if of_weight is None else of_weight.add(dweight)
        self.bias_grad = None if of_bias is None else of_bias.add(dbias)
        self._saved = NO_SECOND_BACKWARD

    def release(self) -> Self:
        """Let go of what the last forward has saved for its backward; return the layer.

        That is as large as a batch. A backward then needs another forward. The end of `recalibrate`
        does the same.
        """
        if not isinstance(self._saved, str):
            self._saved = RELEASED
        return self
