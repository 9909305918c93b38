"""Folding: a batch normalization becomes part of the weights of the layer beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastbn import _checks as checks
from fastbn import _scalars as scalars
from fastbn._interchange import on_host
from fastbn._normalize import running_statistics
from fastbn._types import Array, ArrayLike, Statistics
from fastbn.layers.batchnorm import BatchNorm
from fastbn.layers.instancenorm import InstanceNorm

__all__ = ["fold"]


def fold(
    layer: BatchNorm | InstanceNorm,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    bn_first: bool = False,
    transposed: bool = False,
    groups: int = 1,
    activation: str | None = None,
) -> tuple[Array, Array]:
    """Return the weight and bias of a convolution that includes a batch normalization.

    With them the convolution, or linear layer, alone gives what the two give one after the other in
    evaluation mode, whichever mode the layer is in. Computed in float64.

    Parameters
    ----------
    layer : BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm or InstanceNorm1d to 3d
        With running statistics. It is not changed.
    weight : array_like of shape (out, in / groups, ...)
        Of a convolution in torch's layout or, without further axes, of a linear layer; of a
        transposed convolution (in, out / groups, ...). A torch Parameter serves. A kernel of
        TensorFlow's, Keras's or Flax's layout (..., in, out) is passed as
        ``np.moveaxis(kernel, (-1, -2), (0, 1))``, and so is Keras's (..., out, in) of a transposed
        convolution. Flax's (..., in, out) of a transposed one is passed as
        ``np.moveaxis(kernel, (-2, -1), (0, 1))``. If you forget that and the sizes fit by chance,
        `fold` cannot notice it.
    bias : array_like of shape (out,), optional
        None stands for zeros.
    bn_first : bool, default False
        Whether the batch normalization comes before the convolution, not after it. The result is
        exact only if the convolution does not pad with zeros: padded zeros are not normalized, and
        folding cannot leave them out. (Other modes of padding repeat normalized values: they fold.)
    transposed : bool, default False
        Whether the convolution is a transposed one. A batch normalization before such a one cannot
        be folded: the shift would reach border and interior differently.
    groups : int, default 1
        The groups of the convolution.
    activation : None or "drop", default None
        "drop" leaves out the layer's activation, which the caller then applies to the output of the
        convolution. Without it, a layer with an activation is refused.

    Returns
    -------
    weight : ndarray of the weight's shape and dtype; float32 for a bfloat16 tensor of torch's
    bias : ndarray of shape (out,), of that dtype

    Raises
    ------
    TypeError
        If the layer is neither a batch nor an instance normalization, weight or bias does not hold
        floats, or activation is no string.
    ValueError
        If a shape does not fit the layer and the groups, or for a batch normalization before a
        transposed convolution, or if the layer has an activation that is not dropped, or that
        stands between it and the convolution.
    RuntimeError
        If the layer has no running statistics, or is lazy and has not seen its first input.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm1d(2, dtype=np.float64)
    >>> y = bn(np.array([[1.0, 5.0], [3.0, 9.0]]))
    >>> weight, bias = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), np.array([0.5, -0.5])
    >>> x = np.array([[1.0, -2.0, 4.0]])
    >>> folded_weight, folded_bias = fastbn.fold(bn, weight, bias)
    >>> np.allclose(x @ folded_weight.T + folded_bias, bn.eval()(x @ weight.T + bias))
    True
    """
    scale, shift = _scale_and_shift(layer)
    _check_activation(layer, activation, bn_first)
    weight = _as_floats(weight, "weight")
    groups = scalars.as_integer(groups, "groups")
    hint = _layout_hint(layer, weight, groups, bn_first, transposed)
    _check_groups(groups, weight, transposed, hint)
    if bn_first and transposed:
        raise ValueError(
            "a batch normalization before a transposed convolution cannot be folded: its shift "
            "would reach border and interior differently"
        )
    first, second, *kernel = weight.shape
    folded = weight.astype(np.float64).reshape(groups, first // groups, second, math.prod(kernel))
    if transposed:
        folded = folded.swapaxes(1, 2)
    _, outputs, inputs, _ = folded.shape  # of a group
    channels = groups * (inputs if bn_first else outputs)
    _check_channels(layer, weight, channels, bn_first, transposed, hint)
    old_bias = _as_bias(bias, groups * outputs, weight, hint)
    with np.errstate(all="ignore"):  # What the weight's dtype cannot hold is inf there.
        if bn_first:
            of_inputs = groups, 1, inputs, 1
            reached = (folded * shift.reshape(of_inputs)).sum(axis=(2, 3))
            folded *= scale.reshape(of_inputs)
            new_bias = old_bias + reached.reshape(old_bias.shape)
        else:
            folded *= scale.reshape(groups, outputs, 1, 1)
            new_bias = old_bias * scale + shift
        if transposed:
            folded = folded.swapaxes(1, 2)
        return folded.reshape(weight.shape).astype(weight.dtype), new_bias.astype(weight.dtype)


def _check_activation(
    layer: BatchNorm | InstanceNorm, activation: str | None, bn_first: bool
) -> None:
    """Refuse an activation that the convolution would lose, or could not follow."""
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"activation must be None or 'drop', got {type(activation).__name__}")
    if activation not in (None, "drop"):
        raise ValueError(f"activation must be None or 'drop', got {activation!r}")
    if layer.activation is None:
        return
    if bn_first:
        raise ValueError(
            f"the layer's activation, {layer.activation!r}, stands between it and the convolution, "
            f"which cannot be folded then"
        )
    if activation is None:
        raise ValueError(
            f"the layer has an activation, {layer.activation!r}, which a convolution has not: pass "
            f"activation='drop', and apply it to the output of the convolution"
        )


def _layout_hint(
    layer: BatchNorm | InstanceNorm, weight: Array, groups: int, bn_first: bool, transposed: bool
) -> str:
    """Suggest how to move the axes of a weight that fits the layer in another library's layout."""
    if weight.ndim < 2 or groups < 1:
        return ""
    before_last, last = weight.shape[-2:]
    # With them the channels that the layer would have, and the extent that groups would divide.
    layouts = [("in, out", groups * before_last if bn_first else last, last, "(-1, -2)")]
    if transposed:  # Keras, and Flax
        layouts = [
            ("out, in", groups * before_last, last, "(-1, -2)"),
            ("in, out", groups * last, before_last, "(-2, -1)"),
        ]
    for axes, channels, first, moved in layouts:
        if channels == layer.num_features and first % groups == 0:
            return f"; if its axes are (..., {axes}), pass np.moveaxis(weight, {moved}, (0, 1))"
    return ""


def _check_channels(
    layer: BatchNorm | InstanceNorm,
    weight: Array,
    channels: int,
    bn_first: bool,
    transposed: bool,
    hint: str,
) -> None:
    """Refuse a weight of another number of channels than the layer has."""
    if channels == layer.num_features:
        return
    if weight.shape[1] == layer.num_features and not bn_first and not transposed:
        hint = (
            f"; if axis 1 is meant: bn_first=True or, for a transposed one, transposed=True{hint}"
        )
    raise ValueError(
        f"weight, of the shape {weight.shape}, has {channels} {'in' if bn_first else 'out'}put "
        f"channels, this layer {layer.num_features}{hint}"
    )


def _scale_and_shift(layer: Any) -> tuple[Statistics, Statistics]:
    """What the layer does in evaluation mode, channel by channel: ``y = x * scale + shift``."""
    if isinstance(layer, InstanceNorm) and not layer.track_running_stats:
        raise TypeError(
            f"{type(layer).__name__} cannot be folded without running statistics: it normalizes "
            f"each sample by statistics of its own, in evaluation too"
        )
    if not isinstance(layer, BatchNorm | InstanceNorm):
        hint = ""
        if hasattr(layer, "state_dict") and getattr(layer, "running_mean", None) is not None:
            hint = "; load its state_dict() into fastbn.LazyBatchNorm2d(eps=layer.eps)"
        raise TypeError(
            f"layer must be one of fastbn's batch normalizations, or instance normalizations with "
            f"running statistics, got {scalars.full_name(type(layer))}{hint}"
        )
    if layer.has_uninitialized_params():
        raise RuntimeError(
            f"{type(layer).__name__} cannot be folded yet: the first input, or "
            f"load_state_dict(), decides num_features"
        )
    mean, var, weight, bias = (
        None if value is None else _as_vector(value, name, layer.num_features)
        for name in ("running_mean", "running_var", "weight", "bias")
        for value in [getattr(layer, name)]
    )
    if (mean is None) != (var is None):
        name = "running_mean" if mean is None else "running_var"
        raise RuntimeError(
            f"fold() needs running_mean and running_var, and {name} of this layer is None"
        )
    if mean is None or var is None:
        raise RuntimeError(
            "fold() needs running statistics, and this layer has none: make it with "
            "track_running_stats=True"
        )
    mean, scale = running_statistics(mean, var, layer.eps)
    with np.errstate(all="ignore"):
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale
        return scale, shift if bias is None else shift + bias


def _as_vector(value: Any, name: str, c: int) -> Statistics:
    """One value per channel of the layer, in float64 on the host."""
    vector = on_host(value, name)
    return checks.as_vector(vector, name, c, vector).astype(np.float64)


def _as_floats(value: Any, name: str) -> Array:
    """An ndarray of one of the four dtypes, in native byte order."""
    if hasattr(value, "weight"):
        raise TypeError(
            f"{name} must be an array, got {type(value).__name__}; pass its weight and bias"
        )
    array = checks.as_array(on_host(value, name), name)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _as_bias(value: Any, outputs: int, weight: Array, hint: str) -> Statistics:
    """The bias of a convolution in float64; zeros for None."""
    if value is None:
        return np.zeros(outputs)
    bias = _as_floats(value, "bias")
    if bias.shape != (outputs,):
        raise ValueError(
            f"bias must have the shape ({outputs},), one value per output channel of weight, "
            f"got {bias.shape}{hint if bias.size in weight.shape[-2:] else ''}"
        )
    return bias.astype(np.float64)


def _check_groups(groups: int, weight: Array, transposed: bool, hint: str) -> None:
    """Refuse a number of groups into which the channels of a weight cannot be divided."""
    if weight.ndim < 2:
        axes = "(in, out / groups, ...)" if transposed else "(out, in / groups, ...)"
        raise ValueError(f"weight must have the shape {axes}, got {weight.shape}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the first axis of weight, {weight.shape[0]}, got {groups}{hint}"
        )
