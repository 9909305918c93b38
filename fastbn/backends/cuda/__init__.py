"""The CUDA backend, on CuPy arrays: the functions that every backend has.

They expect checked arguments: `x` and `dy` of the shape (N, C, ...), any strides; vectors of the
shape (C,); all arrays on the current device. They run on CuPy's current stream and wait for
nothing. Batches of one size run in one launch.

`arrays` brings arrays into a layout that the kernels take, `batches` cuts them into what one launch
takes, `plan` decides which kernels run in how many blocks, `launch` compiles and launches them, and
`kernels.cu` is their source. CuPy compiles the kernels when they are first needed, for one dtype at
a time, with a mask or without, for one batch or several, and keeps them in its cache on disk.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from fastbn import _core
from fastbn._types import Epilogue, Gate
from fastbn.backends import composed
from fastbn.backends.common import batches_of
from fastbn.backends.cuda.arrays import (
    Array,
    output,
    packed,
    packed_like,
    packed_mask,
    unpacked,
    vectors,
)
from fastbn.backends.cuda.batches import Running, ranges_of, valid_counts
from fastbn.backends.cuda.plan import element_wise, fused, geometry, reduction_of


def stats(x: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """Mean and m2 of each channel."""
    source = packed(x)
    mean, m2 = vectors(source, 2)
    if source.size:
        reduction = reduction_of("moments", geometry(source, mask))
        reduction(x=source, valid=packed_mask(mask), mean_out=mean, m2_out=m2)
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
    if epilogue is not None:
        vectors_read = mean, invstd, weight, bias
        z = elemt(composed.wide(x), *vectors_read, None, var=var, eps=eps, mask=mask)
        return written(composed.followed(z, epilogue, mask), x, out)
    source = packed(x)
    target, out = output(x, source, out)
    if source.size:
        launch = element_wise("normalize", geometry(source, mask))
        launch(
            x=source,
            out=target,
            eps=eps,
            weight=weight,
            bias=bias,
            mean=mean,
            invstd=invstd,
            var=var,
            valid=packed_mask(mask),
        )
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
) -> tuple[Array, Array, Array]:
    """Normalize by the batch's own statistics; return y, mean and invstd.

    The running statistics move towards those of the batch, the counter is increased. A momentum of
    None stands for 1 / counter, or 0 without one. The variance is the unbiased one, or else that of
    the population. A batch of which a mask leaves less than two values does nothing to them. The
    counts are not read: a mask may not be known yet.

    With a batch size the array is a sequence of batches, and mean and invstd have the shape
    (batches, C); running statistics of that shape have a vector for each batch.
    """
    if epilogue is not None:
        z, mean, invstd = forward(
            composed.wide(x),
            *(weight, bias, eps, None),
            *(running_mean, running_var, momentum, counter),
            unbiased=unbiased,
            mask=mask,
            batch_size=batch_size,
            counts=counts,
        )
        return written(composed.followed(z, epilogue, mask), x, out), mean, invstd
    source = packed(x)
    target, out = output(x, source, out)
    mean, invstd = vectors(source, 2, batch_size)
    running = Running(running_mean, running_var, momentum, counter, unbiased)
    if not source.size:
        invstd[...] = 1.0 / math.sqrt(eps) if eps else math.inf
        return unpacked(target, out), mean, invstd
    valid = packed_mask(mask)
    valid_count = valid_counts(valid, batch_size)
    ranges = ranges_of(source, mask, batch_size)
    m2 = vectors(source, 1, batch_size)[0] if batch_size else None
    moves: dict[str, Any] = {}
    if not batch_size:  # Its launch moves the running statistics, too.
        weight, bias = running.apart(weight), running.apart(bias)
        moves = running.arguments(count=True)
    for each in ranges:
        fused("moments", each.geometry)(
            each.samples_of(target),
            {"mean": each.entries_of(mean), "invstd": each.entries_of(invstd)},
            x=each.samples_of(source),
            batches=each.number,
            eps=eps,
            count=each.geometry.per_channel,
            weight=weight,
            bias=bias,
            valid=each.samples_of(valid),
            valid_count=each.entries_of(valid_count),
            m2_out=each.entries_of(m2),
            **moves,
        )
    if batch_size:
        running.follow(ranges, source, mean, m2, valid, valid_count)
    if batch_size or not running.counted_in_launch:
        running.increase_counter(batches_of(source, batch_size), valid_count)
    return unpacked(target, out), mean, invstd


def backward_reduce(
    dy: Array, x: Array, mean: Array, invstd: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """The sums of dy and of dy * xhat."""
    source = packed(x)
    sum_dy, sum_dy_xhat = vectors(source, 2)
    if source.size:
        reduction = reduction_of("products", geometry(source, mask))
        reduction(
            x=source,
            dy=packed_like(source, dy),
            mean=mean,
            invstd=invstd,
            valid=packed_mask(mask),
            sum_dy_out=sum_dy,
            sum_dy_xhat_out=sum_dy_xhat,
        )
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
    if source.size:
        launch = element_wise("differentiate", geometry(source, mask))
        launch(
            x=source,
            dy=dy,
            out=target,
            count=count,
            weight=weight,
            mean=mean,
            invstd=invstd,
            sum_dy=sum_dy,
            sum_dy_xhat=sum_dy_xhat,
            valid=packed_mask(mask),
        )
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
) -> tuple[Array, Array, Array]:
    """The gradient of x, and the sums of dy and of dy * xhat.

    With a batch size the sums have the shape (batches, C), and the weight, mean and invstd have it
    or are the same for all batches.
    """
    if gate is not None:
        memory = composed.own_memory(sys.modules[__name__], gate, x)
        dy = composed.activation_gradient(dy, gate, memory)
    source = packed(x)
    packed_dy = packed_like(source, dy)
    target, out = output(x, source, out)
    sum_dy, sum_dy_xhat = vectors(source, 2, batch_size)
    valid = packed_mask(mask)
    valid_count = valid_counts(valid, batch_size)
    for each in ranges_of(source, mask, batch_size):
        sums = {"sum_dy": each.entries_of(sum_dy), "sum_dy_xhat": each.entries_of(sum_dy_xhat)}
        fused("products", each.geometry)(
            each.samples_of(target),
            sums,
            x=each.samples_of(source),
            dy=each.samples_of(packed_dy),
            batches=each.number,
            count=each.geometry.per_channel,
            weight=each.vectors_of(weight),
            mean=each.vectors_of(mean),
            invstd=each.vectors_of(invstd),
            valid=each.samples_of(valid),
            valid_count=each.entries_of(valid_count),
        )
    composed.hand_over(gate, dy)
    return unpacked(target, out), sum_dy, sum_dy_xhat


def gates(mask: Array | None) -> bool:
    """No kernel computes the derivatives of a gate."""
    return False


def group_gates(x: Array, weight: Array | None) -> bool:
    """`group_backward` is composed of other calls, and takes no gate."""
    return False


def new_alive(x: Array) -> Array:
    """Memory in which a forward of x notes where the derivative of its activation is 1."""
    return cupy.empty(x.shape, bool)


def activation_gradient(dy: Array, x: Array, gate: Gate, out: Array) -> Array:
    """Write dy times the derivatives that `alive` or `y` tell."""
    return composed.activation_gradient(dy, gate, out)


def written(result: Array, x: Array, out: Array | None) -> Array:
    """A result for x in `out`, or in an array of x's dtype and layout."""
    if out is None and result.dtype == x.dtype:
        return result
    out = empty_like(x) if out is None else out
    with np.errstate(all="ignore"):  # What the dtype cannot hold is inf there.
        out[...] = result
    return out


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
) -> tuple[Array, Array, Array]:
    """Normalize groups of channels of each sample, of an array that is not empty.

    Return y, and mean and invstd for each sample and channel: those of its group.
    """
    backend = sys.modules[__name__]
    return composed.group_forward(backend, x, num_groups, weight, bias, eps, out, mask, epilogue)


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
) -> tuple[Array, Array, Array]:
    """The gradient of x, and the sums of dy and of dy * xhat for each channel.

    xhat is (x - mean) * invstd. The factor is the weight, since no x is the output, and the gate is
    None.
    """
    backend = sys.modules[__name__]
    return composed.group_backward(backend, dy, x, num_groups, weight, mean, invstd, out, mask)


# What is asked of a backend besides batch normalization.


def check(array: Array, name: str) -> None:
    """Refuse an array that is not on the current device."""
    current = runtime.getDevice()
    if array.data.device_id != current:
        raise ValueError(
            f"{name} is on CUDA device {array.data.device_id}, the current one is {current}: "
            f"see cupy.cuda.Device"
        )


def addresses(array: Array) -> np.ndarray[Any, Any]:
    """A NumPy array of the same addresses, of which nothing but them may be used."""
    return np.asarray(Addresses(array))


class Addresses:
    """Where the elements of an array are."""

    def __init__(self, array: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "data": (array.data.ptr, False),
        }


def empty_like(x: Array) -> Array:
    """Memory for a result, in x's layout."""
    return cupy.empty_like(x)


def unrecoverable(
    x: Array, weight: Array, bias: Array | None, *, slope: float = 1.0, num_groups: int = 0
) -> Array:
    """The channels of x that the output of a forward in place does not determine.

    Negative values of the output are multiplied by the slope. None of `group_forward` is
    recovered.
    """
    if num_groups:
        return cupy.array(range(x.shape[1]), np.intp)
    count = float(x.size // max(x.shape[1], 1))
    bias = None if bias is None else to_host(bias)
    channels = _core.unrecoverable_channels(x.dtype, count, to_host(weight), bias, slope)
    return cupy.array(channels, np.intp)


def channels_of(x: Array, channels: Array) -> Array:
    """A copy of some channels of an array."""
    return x[:, channels]


def writeable(array: Array) -> bool:
    """Tell whether an array can be written to."""
    return True


def readable() -> bool:
    """Tell whether values can be read: not while a graph is captured, which has none yet."""
    return not cupy.cuda.get_current_stream().is_capturing()


def named_device(device: str) -> str:
    """The name of a device with its number; raise RuntimeError if there is no such GPU."""
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(f"device {device!r} needs a GPU with CUDA: {error}") from error
    _, _, number = device.partition(":")
    index = int(number or runtime.getDevice())
    if index >= count:
        raise RuntimeError(f"there is no device {device!r}: the number of GPUs is {count}")
    return f"cuda:{index}"


def asarray(array: Any, dtype: Any, device: str) -> Array:
    """A copy of an array, NumPy's or CuPy's, on a device."""
    with cupy.cuda.Device(int(device.partition(":")[2])):
        return cupy.array(array, dtype)


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """A copy of an array as one of NumPy's."""
    return cupy.asnumpy(array)  # type: ignore[no-any-return]
