"""What a forward leaves for its backward, the backward from that, and sums of gradients.

A forward in place overwrites its input, so that the backward recovers the normalized input from
the output, as ``(y - bias) / weight``. Channels for which that would lose too many digits keep a
copy of their input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastbn import _core
from fastbn import _normalize as normalize
from fastbn._core import SavedForBackward
from fastbn._types import Array, Gate, NDArray, Statistics
from fastbn.backends import backend_of

__all__ = [
    "AFTER_FREEZE",
    "AFTER_TRAIN",
    "NO_FORWARD",
    "NO_SECOND_BACKWARD",
    "RELEASED",
    "GradBuffer",
    "KeptChannels",
    "SavedForBackward",
    "gate_of",
    "grad_buffer",
    "gradients",
    "group_gradients",
    "keep_all",
    "keep_in_groups",
    "keep_input",
    "reads_array",
    "used_parameters",
    "with_alive",
]

# Saved where no backward is possible: the reason.
NO_FORWARD = "backward() needs a forward in training mode before it"
RELEASED = (
    "backward() needs another forward in training mode: what the last one saved is gone since "
    "release(), or since the end of recalibrate()"
)
AFTER_FREEZE, AFTER_TRAIN = (
    f"backward() needs a forward in training mode, and the last one was in evaluation mode; {mend}"
    for mend in (
        "call train() before it; freeze() trains with running statistics",
        "call train() before it",
    )
)
NO_SECOND_BACKWARD = "backward() has run for the last forward, and each serves once"


class KeptChannels(NamedTuple):
    """The input of the channels that cannot be recovered from the output."""

    channels: NDArray[np.intp] | None  # all of them
    x: Array


class Operands(NamedTuple):
    """What a backward computes with: ``xhat = (x - mean) * invstd``."""

    x: Array
    mean: Statistics
    invstd: Statistics
    weight: Array | None  # such that weight * invstd is the factor of dx
    scale: Statistics | None  # that factor, where the statistics are constants


def keep_input(call: normalize.Forward, *, frozen: bool, inverts: bool) -> KeptChannels | None:
    """A copy of what a forward in place makes unrecoverable of x."""
    x, epilogue = call.x, call.epilogue
    if epilogue is None:
        if frozen and x.itemsize == 2:
            # Running statistics bound no normalized value; 16 bits would not hold every one.
            return keep_all(x)
        is_affine = call.weight is not None or call.bias is not None
        return keep_channels(call) if is_affine else None
    _, slope, residual, alive = epilogue
    is_leaky_relu = epilogue.activation == "leaky_relu" and residual is None
    if not is_leaky_relu or not inverts or frozen or alive is not None:
        return keep_all(x)
    least = np.finfo(np.float64 if x.itemsize == 8 else np.float32).tiny
    if not least <= slope <= 1.0 / least:  # in the arithmetic of x, it or its inverse is 0
        return keep_all(x)
    return keep_channels(call, slope)


def keep_channels(call: normalize.Forward, slope: float = 1.0) -> KeptChannels | None:
    """A copy of the channels of x that the output does not determine.

    Negative values of the output are multiplied by the slope.
    """
    x, backend = call.x, backend_of(call.x)
    if not backend.readable():
        return keep_all(x)
    weight = _as_float64(call.weight, 1.0, x)
    channels = backend.unrecoverable(x, weight, call.bias, slope=slope)
    if not len(channels):
        return None
    if len(channels) == x.shape[1]:
        return keep_all(x)
    return KeptChannels(channels, backend.channels_of(x, channels))


def keep_in_groups(call: normalize.Forward) -> KeptChannels | None:
    """A copy of x if a forward of groups in place makes any of its channels unrecoverable."""
    x = call.x
    if call.epilogue is not None:
        return keep_all(x)
    weight = _as_float64(call.weight, 1.0, x)
    channels = backend_of(x).unrecoverable(x, weight, call.bias, num_groups=call.num_groups)
    return keep_all(x) if len(channels) else None


def keep_all(x: Array) -> KeptChannels:
    """A copy of all channels, of which notes about x's elements are true."""
    is_dense = not isinstance(x, np.ndarray) or _core.layout(x)
    return KeptChannels(None, x.copy(order="K" if is_dense else "C"))


def used_parameters(call: normalize.Forward) -> tuple[Statistics | None, Statistics | None]:
    """Copies of the weight and bias of a forward with which its backward computes.

    On a GPU, where a copy is a launch, a weight is copied only to recover or to derive with it.
    """
    has_activation = call.epilogue is not None and call.epilogue.activation is not None
    if call.in_place or has_activation:
        used = call.weight, call.bias
    else:
        used = call.weight if isinstance(call.x, np.ndarray) else None, None
    weight, bias = (None if value is None else value.astype(np.float64) for value in used)
    return weight, bias


def with_alive(call: normalize.Forward, *, computes_gates: bool) -> normalize.Forward:
    """The call, which notes where the derivative of its activation is 1 if its backward needs it.

    Otherwise the backward computes the derivatives from the input.
    """
    epilogue = call.epilogue
    if epilogue is None or epilogue.activation is None:
        return call
    backend = backend_of(call.x)
    if computes_gates and epilogue.residual is None and backend.gates(call.mask):
        return call
    return call._replace(epilogue=epilogue._replace(alive=backend.new_alive(call.x)))


def gate_of(
    saved: SavedForBackward, dy: Array, derived: Array | None, *, is_new: bool
) -> Gate | None:
    """What dy passes in the backward; `derived` takes the gradient of the residual."""
    if saved.activation is None and derived is None:
        return None
    if saved.activation is None:  # The residual gets dy.
        return Gate(None, 0.0, y=dy, derived=derived, derived_is_new=is_new)
    return Gate(
        saved.activation,
        saved.negative_slope,
        saved.weight,
        saved.bias,
        alive=saved.alive,
        inverted=saved.in_place and (saved.kept is None or saved.kept_channels is not None),
        derived=derived,
        derived_is_new=is_new,
    )


def reads_array(saved: SavedForBackward, weight: Array | None) -> bool:
    """Tell whether the backward depends on the array that the forward saved."""
    keeps_all = saved.kept is not None and saved.kept_channels is None
    is_constant_factor = saved.frozen and weight is None
    return not keeps_all and not is_constant_factor


def gradients(
    saved: SavedForBackward,
    dy: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
    gate: Gate | None,
) -> tuple[Array, Statistics, Statistics]:
    """The gradients of input, weight and bias."""
    if saved.kept is None:
        return _gradients(saved, _operands(saved, weight, bias), dy, out, gate)
    channels, kept = saved.kept_channels, saved.kept
    kept_operands = _kept_operands(saved, kept, weight)
    if channels is None:
        return _gradients(saved, kept_operands, dy, out, gate)
    # Before dy may be overwritten, and in the memory of its copy.
    copy = backend_of(kept).channels_of(dy, channels)
    place = copy if copy.dtype == kept.dtype else None
    of_kept = _gradients(saved, kept_operands, copy, place, _gate_of_channels(gate, channels))
    dx, dweight, dbias = _gradients(saved, _operands(saved, weight, bias), dy, out, gate)
    dx[:, channels], dweight[channels], dbias[channels] = of_kept
    return dx, dweight, dbias


def _gate_of_channels(gate: Gate | None, channels: NDArray[np.intp]) -> Gate | None:
    """What dy of channels passes whose input was kept; there was no residual."""
    if gate is None:
        return None
    weight, bias = (None if v is None else v[channels] for v in (gate.weight, gate.bias))
    return gate._replace(weight=weight, bias=bias, inverted=False)


def group_gradients(
    saved: SavedForBackward,
    dy: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
    gate: Gate | None,
) -> tuple[Array, Statistics, Statistics]:
    """The gradients of input, weight and bias where groups of channels were normalized."""
    operands = Operands(saved.x, saved.mean, saved.invstd, weight, None)
    if saved.kept is not None:
        operands = operands._replace(x=saved.kept)
    elif saved.in_place:
        operands = _operands(saved, weight, bias)
    x, mean, invstd, factor, _ = operands
    call = normalize.Backward(dy, x, factor, mean, invstd, out, saved.mask, 1, gate)
    return normalize.group_backward(call, saved.num_groups, weight)


def _gradients(
    saved: SavedForBackward,
    operands: Operands,
    dy: Array,
    out: Array | None,
    gate: Gate | None = None,
) -> tuple[Array, Statistics, Statistics]:
    x, mean, invstd, weight, scale = operands
    batches = saved.mask, saved.batch_size
    call = normalize.Backward(dy, x, weight, mean, invstd, out, *batches, gate)
    if saved.frozen and scale is not None:
        return normalize.frozen_backward(call, scale)
    return normalize.backward(call)


def _operands(saved: SavedForBackward, weight: Array | None, bias: Array | None) -> Operands:
    """What the backward of the channels that were not kept computes with."""
    x, mean, invstd = saved.x, saved.mean, saved.invstd
    if not saved.in_place and not saved.frozen:
        return Operands(x, mean, invstd, weight, None)
    weight = _as_float64(weight, 1.0, x)
    with np.errstate(all="ignore"):
        scale = invstd * weight
    if not saved.in_place:
        return Operands(x, mean, invstd, weight, scale)
    bias = _as_float64(bias, 0.0, x)
    if saved.kept is not None:  # These get their gradients from what was kept.
        weight[saved.kept_channels], bias[saved.kept_channels] = 1.0, 0.0
    # xhat = (y - bias) / weight: the output, normalized by bias and 1 / weight.
    with np.errstate(all="ignore"):  # A weight may have been set to 0 since.
        return Operands(x, bias, 1.0 / weight, scale * weight, scale)


def _kept_operands(saved: SavedForBackward, x: Array, weight: Array | None) -> Operands:
    """What the backward of the kept channels, and their input, computes with."""
    channels = slice(None) if saved.kept_channels is None else saved.kept_channels
    mean, invstd = saved.mean[..., channels], saved.invstd[..., channels]
    factor = _as_float64(weight, 1.0, saved.x)[channels]
    with np.errstate(all="ignore"):
        return Operands(x, mean, invstd, factor, invstd * factor)


def _as_float64(vector: Array | None, default: float, x: Array) -> Statistics:
    """A float64 copy of weight or bias, or what stands for None."""
    if vector is None:
        return np.full_like(x, default, np.float64, shape=x.shape[1])
    return vector.astype(np.float64)


class GradBuffer(NamedTuple):
    """Memory for the sum of a parameter's gradients, taken before anything is written."""

    gradient: Array  # the one that is added to, or a new one
    total: Statistics | None  # the sum in float64; None for a new gradient

    def add(self, added: Statistics) -> Array:
        """The gradient after adding to it, in place if it was there."""
        gradient, total = self
        with np.errstate(all="ignore"):  # What the gradient's dtype cannot hold is inf there.
            if total is not None:
                total[...] = gradient
                total += added
            gradient[...] = added if total is None else total
        return gradient


def grad_buffer(
    gradient: Array | None, parameter: Array | None, like: Statistics
) -> GradBuffer | None:
    """What adding to the gradient of a parameter writes to; None without a parameter."""
    if parameter is None:
        return None
    if gradient is None:
        return GradBuffer(np.empty_like(like, dtype=parameter.dtype, shape=parameter.shape), None)
    return GradBuffer(gradient, np.empty_like(like, shape=parameter.shape))
