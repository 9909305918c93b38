"""Group normalization, and activations, composed of the other functions of a backend.

The groups of a sample are normalized as the channels of an array of the shape (N, groups, ...),
each sample by itself; weight and bias are applied after that, and a second reading of memory. The
arrays of 16 bits are float32 in between, so that results are rounded once.

Residuals and activations are passes of their own, also in float32; `alive` is an array of bools.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fastbn._types import Array, Epilogue, Gate, Statistics

if TYPE_CHECKING:
    from fastbn.backends.protocol import Backend


def group_forward(
    backend: Backend,
    x: Array,
    num_groups: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    mask: Array | None,
    epilogue: Epilogue | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """What `group_forward` of a backend returns."""
    grouped, valid = _grouped(wide(x), num_groups), _grouped_mask(mask, x, num_groups)
    xhat, *statistics = backend.forward(
        grouped, None, None, eps, None, mask=valid, batch_size=1, counts=()
    )
    y = np.empty_like(x) if out is None else out
    zeros, ones = _constants(x)
    affine = zeros, ones, weight, bias
    z = backend.elemt(xhat.reshape(x.shape), *affine, None, mask=mask)
    _write(y, followed(z, epilogue, mask))
    mean, invstd = (_of_channels(vector, x) for vector in statistics)
    return y, mean, invstd


def group_backward(
    backend: Backend,
    dy: Array,
    x: Array,
    num_groups: int,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    out: Array | None,
    mask: Array | None,
) -> tuple[Array, Statistics, Statistics]:
    """What `group_backward` of a backend returns, for mean and invstd of `group_forward`."""
    source = wide(x)
    with np.errstate(all="ignore"):  # What the dtype cannot hold is inf there.
        dy = dy.astype(source.dtype, copy=False)
    zeros, ones = _constants(x)
    samples = _as_one_sample(source)
    xhat = backend.elemt(samples, mean.reshape(-1), invstd.reshape(-1), None, None, None)
    sum_dy, sum_dy_xhat = backend.backward_reduce(dy, xhat.reshape(x.shape), zeros, ones, mask)
    weighted = dy if weight is None else backend.elemt(dy, zeros, ones, weight, None, None)
    first = slice(None, None, x.shape[1] // num_groups)  # channel of each group
    dx, _, _ = backend.backward(
        _grouped(weighted, num_groups),
        _grouped(source, num_groups),
        None,
        mean[:, first].copy(),
        invstd[:, first].copy(),
        None,
        mask=_grouped_mask(mask, x, num_groups),
        batch_size=1,
    )
    result = np.empty_like(x) if out is None else out
    _write(result, dx.reshape(x.shape))
    return result, sum_dy, sum_dy_xhat


def followed(z: Array, epilogue: Epilogue | None, mask: Array | None) -> Array:
    """What follows a normalization to z, which is overwritten."""
    if epilogue is None:
        return z
    activation, slope, residual, alive = epilogue
    with np.errstate(all="ignore"):
        if residual is not None:
            np.add(z, residual.astype(z.dtype, copy=False), out=z)
        if alive is not None:
            alive.reshape(z.shape)[...] = _is_alive(z, activation)
        if activation == "leaky_relu":
            z[...] = np.where(z > 0, z, z * slope)
        elif activation is not None:
            np.maximum(z, 0, out=z)
        if activation == "relu6":
            np.minimum(z, 6, out=z)
    if mask is not None:
        z[...] = np.where(mask, z, 0)
    return z


def activation_gradient(dy: Array, gate: Gate, out: Array) -> Array:
    """Write dy times the derivatives that `alive` or `y` of a gate tell."""
    if gate.activation is None:
        _write(out, dy)
        return out
    if gate.alive is not None:
        alive = gate.alive.reshape(dy.shape)
    else:
        assert gate.y is not None
        alive = _is_alive(gate.y, gate.activation)
    with np.errstate(all="ignore"):
        flat = dy * gate.negative_slope if gate.activation == "leaky_relu" else 0
        _write(out, np.where(alive, dy, flat))
    return out


def own_memory(backend: Backend, gate: Gate, x: Array) -> Array:
    """Memory for dy times the derivatives that nobody else has."""
    if gate.derived is not None and gate.derived_is_new:
        return gate.derived
    return backend.empty_like(x)


def hand_over(gate: Gate | None, derived: Array) -> None:
    """Write dy times the derivatives where a gate wants it, now that nothing can fail any more."""
    if gate is not None and gate.derived is not None and gate.derived is not derived:
        gate.derived[...] = derived


def _is_alive(z: Array, activation: str | None) -> Array:
    """Where the derivative at z is 1; of NaN it is so, except with leaky_relu."""
    if activation == "leaky_relu":
        return z > 0
    alive = np.logical_not(z <= 0)
    return alive if activation != "relu6" else np.logical_and(alive, np.logical_not(z >= 6))


def wide(x: Array) -> Array:
    """x in native byte order, as float32 if its dtype has 16 bits."""
    dtype = np.float32 if x.itemsize == 2 else x.dtype.newbyteorder("=")
    return x.astype(dtype, copy=False)


def _grouped(x: Array, num_groups: int) -> Array:
    """x of the shape (N, C, ...) as an array of the shape (N, groups, values)."""
    return _contiguous(x).reshape(len(x), num_groups, -1)


def _as_one_sample(x: Array) -> Array:
    """x of the shape (N, C, ...) as an array of the shape (1, N * C, values)."""
    return _contiguous(x).reshape(1, x.shape[0] * x.shape[1], -1)


def _contiguous(x: Array) -> Array:
    return x if x.flags.c_contiguous else x.copy(order="C")


def _grouped_mask(mask: Array | None, x: Array, num_groups: int) -> Array | None:
    """The mask of x as one for the shape (N, groups, values)."""
    if mask is None:
        return None
    n, channels, positions = len(x), x.shape[1] // num_groups, math.prod(x.shape[2:])
    per_channel = mask.reshape(n, 1, 1, positions)
    return np.broadcast_to(per_channel, (n, 1, channels, positions)).reshape(n, 1, -1)


def _of_channels(vector: Statistics, x: Array) -> Statistics:
    """Values of the shape (N, groups) for each channel."""
    n, num_groups = vector.shape
    channels = x.shape[1] // num_groups
    wide: Array = np.broadcast_to(vector.reshape(n, num_groups, 1), (n, num_groups, channels))
    return wide.reshape(n, -1)


def _constants(x: Array) -> tuple[Statistics, Statistics]:
    """A zero and a one for each channel."""
    zeros = np.zeros_like(x, np.float64, shape=x.shape[1])
    return zeros, np.ones_like(zeros)


def _write(out: Array, result: Array) -> None:
    with np.errstate(all="ignore"):  # What the dtype cannot hold is inf there.
        out[...] = result
