"""The CPU backend: brings arrays into a layout that the core takes.

The functions expect checked arguments. `x` and `dy` have the shape (N, C, ...), any strides,
alignment and byte order; vectors have the shape (C,) and native byte order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbn import _core
from fastbn._types import Array, Epilogue, Gate, NDArray, Statistics
from fastbn.backends import composed
from fastbn.backends.common import batches_of, factors_of


def stats(x: Array, mask: Array | None = None) -> tuple[Statistics, Statistics]:
    """Mean and m2 of each channel."""
    mean, m2 = vectors(x, 2)
    _core.stats(packed(x), packed_mask(mask), 0, mean, m2)
    return mean, m2


def elemt(
    x: Array,
    mean: Array,
    invstd: Array | None,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
    *,
    var: Array | None = None,
    eps: float = 0.0,
    mask: Array | None = None,
    epilogue: Epilogue | None = None,
) -> Array:
    """Normalize by given statistics: mean and invstd, or mean, var and eps."""
    source = packed(x)
    target, out = output(x, source, out)
    mask = packed_mask(mask)
    follows = packed_epilogue(epilogue, source)
    _core.elemt(source, mask, mean, invstd, var, eps, weight, bias, target, *follows)
    return unpacked(target, out)


def forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float | None = 0.0,
    counter: Array | None = None,
    *,
    unbiased: bool = True,
    mask: Array | None = None,
    batch_size: int = 0,
    counts: Sequence[int] = (),
    epilogue: Epilogue | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """Normalize by the batch's own statistics; return y, mean and invstd.

    The running statistics move towards those of the batch, the counter is increased:
    ``running = (1 - momentum) * running + momentum * batch``, computed in float64. A momentum of
    None stands for 1 / counter, or 0 without one. The variance is the unbiased one, or else that of
    the population.

    With a batch size the array is a sequence of batches, and mean and invstd have the shape
    (batches, C); running statistics of that shape take a row each. The counts are the numbers of
    values per channel, of each batch.
    """
    source = packed(x)
    target, out = output(x, source, out)
    mean, m2, invstd = vectors(x, 3, batch_size)
    native_mean, native_var = native(running_mean), native(running_var)
    mask = packed_mask(mask)
    # Before anything is written.
    ones, divisors = [1.0] * len(counts), [count - float(unbiased) for count in counts]
    factors = factors_of(momentum, counter, len(counts))
    follows = packed_epilogue(epilogue, source)
    _core.forward(source, mask, batch_size, weight, bias, eps, target, mean, m2, invstd, *follows)
    y = unpacked(target, out)
    if any(counts):
        # Not before: they may share memory with weight and bias.
        moves = (
            (running_mean, native_mean, mean, ones),
            (running_var, native_var, m2, divisors),
        )
        for running, moved, batch, by in moves:
            if running is not None and moved is not None:
                _core.move_towards(moved, batch, by, factors)
                unpacked(moved, running)
        if counter is not None:
            counter[()] = int(counter) + len(counts)
    return y, mean, invstd


def native(running: Array | None) -> Array | None:
    """Running statistics in native byte order: the array itself or, before the kernel, a copy."""
    return (
        running if running is None else running.astype(running.dtype.newbyteorder("="), copy=False)
    )


def backward_reduce(
    dy: Array, x: Array, mean: Array, invstd: Array, mask: Array | None = None
) -> tuple[Statistics, Statistics]:
    """The sums of dy and of dy * xhat."""
    source = packed(x)
    dy = packed_like(source, dy)
    sum_dy, sum_dy_xhat = vectors(x, 2)
    mask = packed_mask(mask)
    _core.backward_reduce(dy, source, mask, mean, invstd, sum_dy, sum_dy_xhat)
    return sum_dy, sum_dy_xhat


def backward_elemt(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    sum_dy: Array,
    sum_dy_xhat: Array,
    count: float,
    out: Array | None,
    mask: Array | None = None,
) -> Array:
    """The gradient of x, from the two sums."""
    source = packed(x)
    dy = packed_like(source, dy)
    target, out = output(x, source, out)
    mask = packed_mask(mask)
    _core.backward_elemt(dy, source, mask, mean, invstd, weight, sum_dy, sum_dy_xhat, count, target)
    return unpacked(target, out)


def backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    out: Array | None,
    *,
    mask: Array | None = None,
    batch_size: int = 0,
    gate: Gate | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """The gradient of x, and the sums of dy and of dy * xhat.

    With a batch size, mean, invstd, the sums and perhaps the weight have the shape (batches, C).
    """
    source = packed(x)
    dy = packed_like(source, dy)
    target, out = output(x, source, out)
    sum_dy, sum_dy_xhat = vectors(x, 2, batch_size)
    mask = packed_mask(mask)
    dy, passed = behind_gate(gate, dy, source, target)
    sums = sum_dy, sum_dy_xhat
    _core.backward(dy, source, mask, batch_size, weight, mean, invstd, target, *sums, passed)
    unpack_derived(gate, dy)
    return unpacked(target, out), sum_dy, sum_dy_xhat


def gates(mask: Array | None) -> bool:
    """Tell whether the derivatives of a gate are computed from x, with such a mask."""
    return mask is None


def new_alive(x: Array) -> Array:
    """Memory in which a forward of x notes where the derivative of its activation is 1."""
    return np.zeros(_core.alive_bytes(x), np.uint8)


def activation_gradient(dy: Array, x: Array, gate: Gate, out: Array) -> Array:
    """Write dy times the derivatives that `alive` or `y` tell; `alive` is of a forward of x."""
    source = packed(x)
    dy = packed_like(source, dy)
    target, out = output(x, source, out)
    y = packed_y(gate, source)
    _core.activation_gradient(dy, y, gate.alive, gate.activation, gate.negative_slope, target)
    return unpacked(target, out)


def memory_for_derived(gate: Gate, source: Array, target: Array, dy: Array) -> Array:
    """Where the core shall write dy times the derivatives of a gate; dy if it writes none.

    In the source's layout: the array that is asked for if it fits or, if nobody asks, the result's.
    """
    if not gate.is_known:
        return dy
    memory = target if gate.derived is None else gate.derived
    fits = _core.layout(memory) == _core.layout(source)
    return memory if fits and not np.may_share_memory(memory, source) else _core.empty_like(source)


def behind_gate(
    gate: Gate | None, dy: Array, source: Array, target: Array
) -> tuple[Array, tuple[Any, ...] | None]:
    """The dy that the core reads, or writes first, and the gate as its argument."""
    if gate is None:
        return dy, None
    return memory_for_derived(gate, source, target, dy), packed_gate(gate, source, dy)


def unpack_derived(gate: Gate | None, dy: Array) -> None:
    """Write dy times the derivatives, which the core has written, where a gate wants it."""
    if gate is not None and gate.derived is not None:
        unpacked(dy, gate.derived)


def packed_gate(gate: Gate, source: Array, raw_dy: Array) -> tuple[Any, ...]:
    """A gate as an argument of the core; with known derivatives it has the dy that came."""
    options = gate.activation, gate.negative_slope
    if not gate.is_known:
        return *options, gate.weight, gate.bias, gate.inverted, None, None, None
    return *options, None, None, False, raw_dy, packed_y(gate, source), gate.alive


def packed_y(gate: Gate, source: Array) -> Array | None:
    """The output of the activation in the source's layout, if there is one."""
    return None if gate.y is None else packed_like(source, gate.y)


def packed_epilogue(epilogue: Epilogue | None, source: Array) -> tuple[Any, ...]:
    """An epilogue as arguments of the core."""
    if epilogue is None:
        return ()
    residual = epilogue.residual
    return (
        epilogue.activation,
        epilogue.negative_slope,
        None if residual is None else packed_like(source, residual),
        epilogue.alive,
    )


def group_forward(
    x: Array,
    num_groups: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    *,
    mask: Array | None = None,
    epilogue: Epilogue | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """Normalize groups of channels of each sample, of an array that is not empty.

    Return y, and mean and invstd for each sample and channel: those of its group.
    """
    source = packed(x)
    target, out = output(x, source, out)
    mean, m2, invstd = vectors(x, 3, 1)
    parameters, results = (num_groups, weight, bias, eps), (target, mean, m2, invstd)
    follows = packed_epilogue(epilogue, source)
    _core.group_forward(source, packed_mask(mask), *parameters, *results, *follows)
    return unpacked(target, out), mean, invstd


def group_backward(
    dy: Array,
    x: Array,
    num_groups: int,
    weight: Array | None,
    factor: Array | None,
    mean: Array,
    invstd: Array,
    out: Array | None,
    *,
    mask: Array | None = None,
    gate: Gate | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """The gradient of x, and the sums of dy and of dy * xhat for each channel.

    xhat is (x - mean) * invstd. dy reaches dx times factor * invstd: the factor is the weight but
    where x is the output of a forward in place.
    """
    if factor is weight and not group_gates(x, weight):
        backend = sys.modules[__name__]
        return composed.group_backward(backend, dy, x, num_groups, weight, mean, invstd, out, mask)
    source = packed(x)
    dy = packed_like(source, dy)
    target, out = output(x, source, out)
    sums = vectors(x, 4, 1)
    totals = np.empty((2, x.shape[1]))
    dy, passed = behind_gate(gate, dy, source, target)
    arguments = dy, source, packed_mask(mask), num_groups, weight, factor, mean, invstd, target
    _core.group_backward(*arguments, sums[0], sums[1], sums[2], sums[3], passed)
    unpack_derived(gate, dy)
    with np.errstate(all="ignore"):  # Infinities of two samples may be of either sign.
        sums[:2].sum(axis=1, out=totals)
    return unpacked(target, out), totals[0], totals[1]


def group_gates(x: Array, weight: Array | None) -> bool:
    """Tell whether `group_backward` takes a gate: it divides sums by the weight of each channel.

    So no weight may be too small beside the largest one.
    """
    return _core.group_gates(x, weight)


def packed_mask(mask: Array | None) -> Array | None:
    """A boolean mask of shape (N, 1, ...) as the core takes it: (N, ...), of 255 and 0."""
    if mask is None:
        return None
    source = mask[:, 0].view(np.uint8)
    memory = np.empty(source.size + _core.mask_padding, np.uint8)
    memory[source.size :] = 0
    return np.negative(source, out=memory[: source.size].reshape(source.shape))


# Layouts. The core takes arrays that are C-contiguous, as they are or with the channels last. Which
# of the two a call uses is decided by x; what lies otherwise is copied.


def packed(x: Array) -> Array:
    """The array as the core takes it: itself or a copy."""
    if _core.layout(x):
        return x
    return np.require(x, x.dtype.newbyteorder("="), ["C_CONTIGUOUS", "ALIGNED"])


def packed_like(source: Array, array: Array) -> Array:
    """The array in the source's layout and dtype: itself or a copy."""
    if array.dtype == source.dtype and _core.layout(array) == _core.layout(source):
        return array
    copy = _core.empty_like(source)
    with np.errstate(all="ignore"):  # What the source's dtype cannot hold is inf there.
        copy[...] = array
    return copy


def output(x: Array, source: Array, out: Array | None) -> tuple[Array, Array]:
    """Where the core shall write, and where the result shall be in the end."""
    if out is None:
        if source is x:
            out = empty_like(x)
            return out, out
        out = empty_like(x)
    if _core.layout(out) == _core.layout(source):
        return out, out
    # A source that is a copy can be overwritten.
    return (_core.empty_like(source) if source is x else source), out


def empty_like(x: Array) -> Array:
    """Memory for a result, in x's layout and in native byte order."""
    return _core.empty_like(x, x.dtype.newbyteorder("="))


def unpacked(target: Array, out: Array) -> Array:
    """The result where it shall be."""
    if target is not out:
        out[...] = target
    return out


def vectors(x: Array, count: int, batch_size: int = 0) -> NDArray[np.float64]:
    """So many new vectors of one value per channel, or with a batch size per batch and channel."""
    batches = (batches_of(x, batch_size),) if batch_size else ()
    return np.empty((count, *batches, x.shape[1]))


# What is asked of a backend besides batch normalization.


def unrecoverable(
    x: Array, weight: Array, bias: Array | None, *, slope: float = 1.0, num_groups: int = 0
) -> NDArray[np.intp]:
    """The channels of x that a forward in place does not determine.

    Negative values of the output are multiplied by the slope. With a number of groups the forward
    is `group_forward`.
    """
    if num_groups and not group_gates(x, weight):
        return np.arange(x.shape[1])
    count = float(x.size // max(len(x) * num_groups or x.shape[1], 1))
    return np.array(_core.unrecoverable_channels(x.dtype, count, weight, bias, slope), np.intp)


def channels_of(x: Array, channels: NDArray[np.intp]) -> Array:
    """A copy of some channels of an array, in its layout."""
    copy = np.empty_like(x, shape=(x.shape[0], len(channels), *x.shape[2:]))
    source, target, axis = x, copy, 1
    if _core.layout(x) == 2:
        source, target, axis = np.moveaxis(x, 1, -1), np.moveaxis(copy, 1, -1), -1
    # With another mode, there would be a second copy for indices out of range.
    np.take(source, channels, axis, out=target, mode="clip")
    return copy


def check(array: Array, name: str) -> None:
    """Refuse an array that this backend cannot take; there is none."""


def addresses(array: Array) -> Array:
    """A NumPy array of the same addresses."""
    return array


def writeable(array: Array) -> bool:
    """Tell whether an array can be written to."""
    return array.flags.writeable


def readable() -> bool:
    """Tell whether values can be read."""
    return True


def asarray(array: Any, dtype: Any, device: str) -> Array:
    """A copy of an array, NumPy's or CuPy's, on the device "cpu"."""
    return np.array(array if isinstance(array, np.ndarray) else array.get(), dtype)


def to_host(array: Array) -> Array:
    """The array itself, which is one of NumPy's."""
    return array


def named_device(device: str) -> str:
    """The name of the CPU, which has no number."""
    return device
