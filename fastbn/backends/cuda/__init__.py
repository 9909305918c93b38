"""The CUDA backend: brings CuPy arrays into a layout that the kernels take, plans and launches.

The functions are those of the CPU backend. They expect checked arguments: `x` and `dy` of the shape
(N, C, ...), any strides; vectors of the shape (C,); all arrays on the current device. They run on
CuPy's current stream and wait for nothing. Batches of one size run in one launch.

CuPy compiles the kernels when they are first needed, for one dtype at a time, with a mask or
without, for one batch or several, and keeps them in its cache on disk.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import driver, runtime

Array = Any  # CuPy has no types.

# The dtypes' numbers in the source, by their characters; bfloat16 is ml_dtypes'.
FORMATS = {"f": 0, "d": 1, "e": 2, "E": 3}
ITEMSIZES = (4, 8, 2, 2)


def stats(x: Array, mask: Array | None = None) -> tuple[Array, Array]:
    """Mean and m2 of each channel."""
    source = packed(x)
    mean, m2 = vectors(source, 2)
    if source.size:
        where, valid = geometry(source, mask), packed_mask(mask)
        results = {"mean_out": mean, "m2_out": m2}
        reduction_of("moments", where)(x=source, valid=valid, **results)
    else:
        mean[...] = m2[...] = 0.0
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
) -> Array:
    """Normalize by given statistics: mean and invstd, or mean, var and eps."""
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
    mask: Array | None = None,
    batch_size: int = 0,
    counts: Sequence[int] = (),
) -> tuple[Array, Array, Array]:
    """Normalize by the batch's own statistics; return y, mean and invstd.

    The running statistics move towards those of the batch, the counter is increased. A momentum of
    None stands for 1 / counter, or 0 without one. A batch of which a mask leaves less than two
    values does nothing to them.

    With a batch size the array is a sequence of batches, and mean and invstd have the shape
    (batches, C); running statistics of that shape take a row each.
    """
    if batch_size:
        running = running_mean, running_var, momentum, counter
        return forward_of_batches(x, weight, bias, eps, out, *running, mask, batch_size)
    source = packed(x)
    target, out = output(x, source, out)
    mean, invstd = vectors(source, 2)
    if not source.size:
        mean[...], invstd[...] = 0.0, 1.0 / math.sqrt(eps)
        if counter is not None and x.shape[0] * math.prod(x.shape[2:]):
            counter += 1
        return unpacked(target, out), mean, invstd
    if running_mean is not None:  # The kernels read and write in no particular order.
        weight = separated(weight, running_mean, running_var)
        bias = separated(bias, running_mean, running_var)
    cumulative = momentum is None and counter is not None
    # Where the kernels read the counter, or cannot write it, it is increased afterwards.
    counted = counter is not None and not cumulative and counter.dtype.char == "l"
    batches = counter if counted else None
    if cumulative:
        batches = counter.astype(np.int64, copy=False)  # type: ignore[union-attr]
    where, valid = geometry(source, mask), packed_mask(mask)
    valid_count = count_of(valid)
    run_forward(
        where,
        target,
        mean,
        invstd,
        x=source,
        eps=eps,
        count=where.per_channel,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        batches=batches,
        cumulative=cumulative,
        momentum=momentum or 0.0,
        valid=valid,
        valid_count=valid_count,
    )
    if counter is not None and not counted:
        counter += 1 if valid_count is None else (valid_count > 1).astype(counter.dtype)
    return unpacked(target, out), mean, invstd


def run_forward(
    where: Geometry, out: Array, mean: Array, invstd: Array, m2: Array | None = None, **given: Any
) -> None:
    """The statistics and, with them, the output: in one launch where channels stay on chip."""
    reduction = reduction_of("moments", where)
    resident = reduction.resident is not None
    results = {"mean_out": mean, "m2_out": m2, "invstd_out": invstd}
    reduction(**given, **results, out=out if resident else None)
    if not resident:
        element_wise("normalize", where)(**given, mean=mean, invstd=invstd, out=out)


def forward_of_batches(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float | None,
    counter: Array | None,
    mask: Array | None,
    batch_size: int,
) -> tuple[Array, Array, Array]:
    """The forward of a sequence of batches."""
    source = packed(x)
    target, out = output(x, source, out)
    mean, m2, invstd = rows_of_vectors(source, 3, batch_size)
    if not source.size:
        mean[...], invstd[...] = 0.0, 1.0 / math.sqrt(eps)
        if counter is not None and x.shape[0] * math.prod(x.shape[2:]):
            counter += len(mean)
        return unpacked(target, out), mean, invstd
    valid = packed_mask(mask)
    valid_counts = None if valid is None else counts_of_batches(valid, batch_size)
    parts = parts_of(source, mask, batch_size)
    for samples, own, where in parts:
        run_forward(
            where,
            target[samples],
            mean[own],
            invstd[own],
            m2[own],
            x=source[samples],
            rows=own.stop - own.start,
            eps=eps,
            count=where.per_channel,
            weight=weight,
            bias=bias,
            valid=cut(valid, samples),
            valid_count=cut(valid_counts, own),
        )
    cumulative = momentum is None and counter is not None
    if running_mean is not None:  # Not before: they may share memory with weight and bias.
        follower(parts[0].where)(
            x=source,
            batch_count=len(mean),
            mean_out=mean,
            m2_out=m2,
            count=parts[0].where.per_channel,
            last_count=parts[-1].where.per_channel,
            running_mean=running_mean,
            running_var=running_var,
            batches=counter.astype(np.int64, copy=False) if cumulative else None,  # type: ignore[union-attr]
            cumulative=cumulative,
            momentum=momentum or 0.0,
            valid=valid,
            valid_count=valid_counts,
        )
    if counter is not None:
        enough = len(mean) if valid_counts is None else (valid_counts > 1).sum()
        counter += enough
    return unpacked(target, out), mean, invstd


class Part(NamedTuple):
    """Batches of one size, which run in one launch."""

    samples: slice
    batches: slice
    where: Geometry  # of one of them


# The rows that a grid can have.
ROWS_MAX_OF_GRID = 65535


def parts_of(x: Array, mask: Array | None, batch_size: int) -> list[Part]:
    """The batches of an array that is packed: whole ones, and the rest."""
    n, parts = len(x), []
    whole = n // batch_size
    cuts = [*range(0, whole, ROWS_MAX_OF_GRID), whole]
    for first, last in itertools.pairwise(cuts):
        samples = slice(first * batch_size, last * batch_size)
        where = geometry(x[samples.start : samples.start + batch_size], mask, in_batches=True)
        parts.append(Part(samples, slice(first, last), where))
    if n % batch_size:
        samples = slice(whole * batch_size, n)
        where = geometry(x[samples], mask, in_batches=True)
        parts.append(Part(samples, slice(whole, whole + 1), where))
    return parts


def rows_of_vectors(x: Array, count: int, batch_size: int) -> list[Array]:
    """So many new arrays of one float64 per batch and channel."""
    batches = max(ceil_div(len(x), batch_size), 1)
    return [cupy.ndarray((batches, x.shape[1]), np.float64) for _ in range(count)]


def cut(array: Array | None, part: slice) -> Array | None:
    """The part of an array, if there is one."""
    return None if array is None else array[part]


def rows_of(vectors: Array | None, batches: slice) -> Array | None:
    """Those of some batches, if there is a row for each of them."""
    return vectors[batches] if vectors is not None and vectors.ndim == 2 else vectors


def backward_reduce(
    dy: Array, x: Array, mean: Array, invstd: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """The sums of dy and of dy * xhat."""
    source = packed(x)
    sum_dy, sum_dy_xhat = vectors(source, 2)
    if source.size:
        sums = {"sum_dy_out": sum_dy, "sum_dy_xhat_out": sum_dy_xhat}
        dy = packed_like(source, dy)
        reduction = reduction_of("products", geometry(source, mask))
        reduction(x=source, dy=dy, mean=mean, invstd=invstd, **sums, valid=packed_mask(mask))
    else:
        sum_dy[...] = sum_dy_xhat[...] = 0.0
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
        sums = {"sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat, "count": count}
        launch = element_wise("differentiate", geometry(source, mask))
        given = {"mean": mean, "invstd": invstd, "weight": weight, "valid": packed_mask(mask)}
        launch(x=source, dy=dy, out=target, **given, **sums)
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
) -> tuple[Array, Array, Array]:
    """The gradient of x, and the sums of dy and of dy * xhat.

    With a batch size the sums have the shape (batches, C), and the weight, mean and invstd have it
    or are the same for all batches.
    """
    if batch_size:
        return backward_of_batches(dy, x, weight, mean, invstd, out, mask, batch_size)
    source = packed(x)
    dy = packed_like(source, dy)
    target, out = output(x, source, out)
    sum_dy, sum_dy_xhat = vectors(source, 2)
    if source.size:
        where, valid = geometry(source, mask), packed_mask(mask)
        run_backward(
            where,
            target,
            sum_dy,
            sum_dy_xhat,
            x=source,
            dy=dy,
            count=where.per_channel,
            weight=weight,
            mean=mean,
            invstd=invstd,
            valid=valid,
            valid_count=count_of(valid),
        )
    else:
        sum_dy[...] = sum_dy_xhat[...] = 0.0
    return unpacked(target, out), sum_dy, sum_dy_xhat


def run_backward(
    where: Geometry, out: Array, sum_dy: Array, sum_dy_xhat: Array, **given: Any
) -> None:
    """The sums and, with them, the gradient: in one launch where channels stay on chip."""
    reduction = reduction_of("products", where)
    resident = reduction.resident is not None
    results = {"sum_dy_out": sum_dy, "sum_dy_xhat_out": sum_dy_xhat}
    reduction(**given, **results, out=out if resident else None)
    if not resident:
        launch = element_wise("differentiate", where)
        launch(**given, sum_dy=sum_dy, sum_dy_xhat=sum_dy_xhat, out=out)


def backward_of_batches(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    out: Array | None,
    mask: Array | None,
    batch_size: int,
) -> tuple[Array, Array, Array]:
    """The backward of a sequence of batches."""
    source = packed(x)
    dy = packed_like(source, dy)
    target, out = output(x, source, out)
    sum_dy, sum_dy_xhat = rows_of_vectors(source, 2, batch_size)
    if not source.size:
        sum_dy[...] = sum_dy_xhat[...] = 0.0
        return unpacked(target, out), sum_dy, sum_dy_xhat
    valid = packed_mask(mask)
    valid_counts = None if valid is None else counts_of_batches(valid, batch_size)
    for samples, own, where in parts_of(source, mask, batch_size):
        run_backward(
            where,
            target[samples],
            sum_dy[own],
            sum_dy_xhat[own],
            x=source[samples],
            dy=dy[samples],
            rows=own.stop - own.start,
            count=where.per_channel,
            weight=rows_of(weight, own),
            mean=rows_of(mean, own),
            invstd=rows_of(invstd, own),
            valid=cut(valid, samples),
            valid_count=cut(valid_counts, own),
        )
    return unpacked(target, out), sum_dy, sum_dy_xhat


def separated(parameter: Array | None, *written: Array) -> Array | None:
    """The parameter, or a copy of it if it may share memory with what is written."""
    if parameter is None:
        return None
    for other in written:
        reach = parameter.size * max(abs(parameter.strides[0]), abs(other.strides[0]))
        if abs(parameter.data.ptr - other.data.ptr) < reach:
            return parameter.copy()
    return parameter


# Layouts. The kernels take arrays that are C-contiguous, as they are or with the channels last.
# Which of the two a call uses is decided by x; what lies otherwise is copied.


def layout(x: Array) -> int:
    """1 if x is C-contiguous, 2 if it is so with the channels last, 0 if neither."""
    if x.flags.c_contiguous:
        return 1
    expected = channels_last_strides(x.shape, x.itemsize)
    pairs = zip(x.strides, expected, x.shape, strict=True)
    return 2 if all(s == e or size == 1 for s, e, size in pairs) else 0


@functools.lru_cache(4096)
def channels_last_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of a channels-last array."""
    strides = [0] * len(shape)
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        strides[axis] = itemsize
        itemsize *= shape[axis]
    return tuple(strides)


def packed(x: Array) -> Array:
    """The array as the kernels take it: itself or a copy."""
    return x if layout(x) else cupy.ascontiguousarray(x)


def packed_like(source: Array, array: Array) -> Array:
    """The array in the source's layout and dtype: itself or a copy."""
    if array.dtype == source.dtype and layout(array) == layout(source):
        return array
    copy = cupy.empty_like(source)
    copy[...] = array
    return copy


def packed_mask(mask: Array | None) -> Array | None:
    """A boolean mask of shape (N, 1, ...) as the kernels take it: of shape (N, ...), dense."""
    return None if mask is None else cupy.ascontiguousarray(mask[:, 0])


def count_of(valid: Array | None) -> Array | None:
    """How many positions count, where the kernels read it: nobody waits for it."""
    return None if valid is None else valid.sum(dtype=np.float64)


def counts_of_batches(valid: Array, batch_size: int) -> Array:
    """`count_of` each batch."""
    of_samples = valid.reshape(len(valid), -1).sum(axis=1, dtype=np.float64)
    whole = len(valid) // batch_size
    in_whole = whole * batch_size
    counts = cupy.ndarray((ceil_div(len(valid), batch_size),), np.float64)
    counts[:whole] = of_samples[:in_whole].reshape(whole, batch_size).sum(axis=1)
    if in_whole < len(valid):
        counts[whole] = of_samples[in_whole:].sum()
    return counts


def output(x: Array, source: Array, out: Array | None) -> tuple[Array, Array]:
    """Where the kernels shall write, and where the result shall be in the end."""
    if out is None:
        if source is x:
            out = empty_like(x)
            return out, out
        out = cupy.empty_like(x)
    if layout(out) == layout(source):
        return out, out
    # A source that is a copy can be overwritten.
    return (cupy.empty_like(source) if source is x else source), out


def empty_like(x: Array) -> Array:
    """A new array of the same layout, which is not 0."""
    if x.flags.c_contiguous:
        return cupy.ndarray(x.shape, x.dtype)
    return cupy.ndarray(x.shape, x.dtype, strides=channels_last_strides(x.shape, x.itemsize))


def unpacked(target: Array, out: Array) -> Array:
    """The result where it shall be."""
    if target is not out:
        out[...] = target
    return out


def vectors(x: Array, count: int) -> list[Array]:
    """So many new vectors of one float64 per channel."""
    return [cupy.ndarray((x.shape[1],), np.float64) for _ in range(count)]


class Geometry(NamedTuple):
    """All that a plan depends on: n samples of c channels of s elements each.

    `rows` tells that the s elements lie one behind the other; channels-last arrays have s = 1.
    `masked` tells that not all of them may count, `in_batches` that there are more such arrays.
    """

    format: int
    n: int
    c: int
    s: int
    rows: bool
    device: int
    masked: bool
    in_batches: bool

    @property
    def vector(self) -> int:
        """The elements of a chunk of 16 bytes."""
        return 16 // ITEMSIZES[self.format]

    @property
    def compiled_for(self) -> tuple[int, int, bool, bool]:
        """Dtype, device, whether with a mask and whether for several batches."""
        return self.format, self.device, self.masked, self.in_batches

    @property
    def size(self) -> int:
        return self.n * self.c * self.s

    @property
    def per_channel(self) -> float:
        """The elements of a channel."""
        return float(self.n * self.s)


def geometry(x: Array, mask: Array | None, *, in_batches: bool = False) -> Geometry:
    """How the kernels see an array that is packed."""
    n, c, *image = x.shape
    s, rows = math.prod(image), x.flags.c_contiguous
    if not rows:
        n, s = n * s, 1
    compiled_for = x.data.device_id, mask is not None, in_batches
    return Geometry(FORMATS[x.dtype.char], n, c, s, rows, *compiled_for)


# Launches.


class Launch(NamedTuple):
    """A kernel, with how many threads and for which geometry it runs."""

    function: int  # of CUDA's driver
    blocks: int
    threads: int
    shared_bytes: int
    numbers: tuple[int, ...]  # the part of the argument that the geometry decides

    def __call__(
        self,
        *,
        x: Array,
        dy: Array | None = None,
        out: Array | None = None,
        partials: Array | None = None,
        mean_out: Array | None = None,
        m2_out: Array | None = None,
        invstd_out: Array | None = None,
        sum_dy_out: Array | None = None,
        sum_dy_xhat_out: Array | None = None,
        eps: float = 0.0,
        count: float = 0.0,
        weight: Array | None = None,
        bias: Array | None = None,
        mean: Array | None = None,
        invstd: Array | None = None,
        var: Array | None = None,
        sum_dy: Array | None = None,
        sum_dy_xhat: Array | None = None,
        running_mean: Array | None = None,
        running_var: Array | None = None,
        batches: Array | None = None,
        cumulative: bool = False,
        momentum: float = 0.0,
        valid: Array | None = None,
        valid_count: Array | None = None,
        rows: int = 0,
        partials_size: int = 0,
        batch_count: int = 0,
        last_count: float = 0.0,
    ) -> None:
        """Launch it on the current stream; the argument is the source's Job."""
        arrays = x.data.ptr, pointer(dy), pointer(out)
        job = JOB.pack(
            *arrays,
            (arrays[0] | arrays[1] | arrays[2]) % 16 == 0,
            *self.numbers,
            x.nbytes >= STREAM_BYTES,
            pointer(partials),
            pointer(mean_out),
            pointer(m2_out),
            pointer(invstd_out),
            pointer(sum_dy_out),
            pointer(sum_dy_xhat_out),
            eps,
            count,
            *(NO_VECTOR if weight is None else vector(weight)),
            *(NO_VECTOR if bias is None else vector(bias)),
            *(NO_VECTOR if mean is None else vector(mean)),
            *(NO_VECTOR if invstd is None else vector(invstd)),
            *(NO_VECTOR if var is None else vector(var)),
            *(NO_VECTOR if sum_dy is None else vector(sum_dy)),
            *(NO_VECTOR if sum_dy_xhat is None else vector(sum_dy_xhat)),
            *(NO_VECTOR if running_mean is None else vector(running_mean)),
            *(NO_VECTOR if running_var is None else vector(running_var)),
            pointer(batches),
            cumulative,
            momentum,
        )
        if valid is not None:
            job += MASK.pack(valid.data.ptr, pointer(valid_count))
        if rows or batch_count:
            vectors = weight, bias, mean, invstd, var, sum_dy, sum_dy_xhat
            steps = map(row_step, (*vectors, running_mean, running_var))
            job += BATCHES.pack(*steps, partials_size, batch_count, last_count)
        argument = array("b", job)
        arguments = array("Q", argument.buffer_info()[:1])
        driver.launchKernel(
            self.function,
            *(self.blocks, rows or 1, 1),
            *(self.threads, 1, 1),
            self.shared_bytes,
            cupy.cuda.get_current_stream().ptr,
            arguments.buffer_info()[0],
            0,
        )


# The source's Job: x, dy, out and whether they are aligned; the geometry; results, eps and count;
# nine vectors; the counter and the momentum. With a mask, that and its count follow; with several
# batches, the steps from one to the next, and how many there are.
JOB = struct.Struct("4q 11q 6q2d 18q 2qd")
MASK = struct.Struct("2q")
BATCHES = struct.Struct("9q 2qd")
NO_VECTOR = (0, 0)


def pointer(a: Array | None) -> int:
    """The address of an array; 0 for None."""
    return 0 if a is None else a.data.ptr


def vector(a: Array) -> tuple[int, int]:
    """The source's Vector of an array, or of the first row of one."""
    return a.data.ptr, 4 * a.strides[-1] + FORMATS[a.dtype.char]


def row_step(a: Array | None) -> int:
    """The bytes from the vector of a batch to that of the next; 0 if it is the same."""
    return a.strides[0] if a is not None and a.ndim == 2 else 0


class Device(NamedTuple):
    """What plans need to know of a device."""

    multiprocessors: int
    shared_bytes: int  # that a block can have
    clusters: tuple[int, ...]  # of how many blocks clusters can be


@functools.lru_cache(None)
def device_of(index: int) -> Device:
    device = cupy.cuda.Device(index)
    # Some of it is declared in the source, and some is the system's.
    shared_bytes = device.attributes["MaxSharedMemoryPerBlockOptin"] - 3072
    clusters = (1, 2, 4, 8, 16) if int(device.compute_capability) >= 90 else (1,)
    return Device(device.attributes["MultiProcessorCount"], shared_bytes, clusters)


@functools.lru_cache(None)
def module(format: int, cluster: int, masked: bool, in_batches: bool) -> Any:
    """The source, compiled for a dtype and a number of blocks that share a channel."""
    source = Path(__file__).with_name("kernels.cu").read_text()
    options: tuple[str, ...] = (f"-DFORMAT={format}", f"-DCLUSTER={cluster}", "--std=c++17")
    if masked:
        options += ("-DWITH_MASK=1",)
    if in_batches:
        options += ("-DWITH_BATCHES=1",)
    return cupy.RawModule(code=source, options=options)


# Of a function of CUDA's driver: that clusters of more than 8 blocks are allowed.
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14


@functools.lru_cache(None)
def kernel(
    name: str, format: int, device: int, masked: bool, in_batches: bool, cluster: int = 1
) -> int:
    """A kernel, ready to be launched on the current device."""
    function = module(format, cluster, masked, in_batches).get_function(name)
    if name in RESIDENT.values():
        function.max_dynamic_shared_size_bytes = device_of(device).shared_bytes
        if cluster > 8:
            driver.funcSetAttribute(function.kernel.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    kernels.append(function)  # which must live as long as what is returned
    return function.kernel.ptr  # type: ignore[no-any-return]


kernels: list[Any] = []


# Plans. They depend on the shape, the layout and the device alone, and so do the bits of sums.

RESIDENT = {"moments": "forward_rows", "products": "backward_rows"}
# What a block should keep of a channel, so that some blocks fit a multiprocessor: while one waits
# for memory, another computes. With less than the second number, more blocks do not help. With more
# than the last, a block is alone on its multiprocessor: then a forward had better read twice, but
# not a backward, which reads two arrays.
KEPT_BYTES, KEPT_BYTES_MIN = 56 * 1024, 8 * 1024
KEPT_BYTES_MAX = {"moments": 110 * 1024, "products": 256 * 1024}
KEPT_BYTES_OF_THREAD = 256
# From this size on an output is stored so that it leaves the cache of the second level first.
STREAM_BYTES = 20_000_000
# Rows of fewer elements would leave most of a chunk unused, which only small arrays can afford.
ROW_MIN = 8
SMALL_BYTES = 1 << 20
# The threads of a block that walks memory, the chunks that each of them takes of a piece of a
# channel, and the doubles of a partial sum.
THREADS = 256
CHUNKS_OF_PIECE = 16
DOUBLES = {"moments": 3, "products": 2}
PIECES_MAX = 4096
# As in the source: the chunks of a strip of columns for sums, and for elements where a chunk can
# meet several channels; the rows that a thread has in flight in both.
STRIP, STRIP_MIXED, STRIP_RUN, AHEAD = 8, 32, 8, 4
# The rows that a thread sums around one pivot at most.
ROWS_MAX = 256
# Blocks for each multiprocessor, so that all are busy to the end.
BLOCKS_OF_ELEMENTS = 16
# As many as run at once, where sums of columns are computed.
BLOCKS_OF_COLUMNS = 2
# Where a thread has so few chunks to compute, all blocks had better run at once.
BLOCKS_AT_ONCE, SHORT = 4, 16


class Reduction(NamedTuple):
    """How the sums of all channels are computed: in one launch, or in pieces that are merged."""

    resident: Launch | None
    reduce: Launch | None
    merge: Launch | None
    partials: int

    def __call__(self, **arguments: Any) -> None:
        if self.resident is not None:
            self.resident(**arguments)
            return
        assert self.reduce is not None
        assert self.merge is not None
        rows = arguments.get("rows", 0)
        partials = cupy.ndarray((self.partials * max(rows, 1),), np.float64)
        pieces = {"partials": partials, "partials_size": self.partials}
        self.reduce(**arguments, **pieces)
        self.merge(**arguments, **pieces)


@functools.lru_cache(4096)
def reduction_of(kind: str, g: Geometry) -> Reduction:
    """The plan for the sums of a kind: moments or products."""
    resident = resident_of(kind, g) if g.rows else None
    if resident is not None:
        return Reduction(resident, None, None, 0)
    if g.rows and g.s >= ROW_MIN:
        return reduction_of_rows(kind, g)
    return reduction_of_columns(kind, g)


def resident_of(kind: str, g: Geometry) -> Launch | None:
    """Channels stay on chip, each shared by a cluster of blocks, if they fit."""
    device = device_of(g.device)
    chunks = chunks_of_row(g)
    if g.s < ROW_MIN and 16 * g.n * g.c * chunks > SMALL_BYTES:
        return None
    arrays = {"moments": 1, "products": 2}[kind]
    for cluster in device.clusters:
        slots = g.n * chunks // cluster + 1
        kept = 16 * arrays * slots
        few = g.c * cluster < 2 * device.multiprocessors and kept > 2 * KEPT_BYTES_MIN
        if kept <= KEPT_BYTES and not few:
            break
    if kept > min(device.shared_bytes, KEPT_BYTES_MAX[kind]):
        return None
    threads = 32
    while threads < 512 and threads * KEPT_BYTES_OF_THREAD < kept:
        threads *= 2
    function = kernel(RESIDENT[kind], *g.compiled_for, cluster)
    numbers = numbers_of_rows(g, threads, 1)
    return Launch(function, g.c * cluster, threads, kept, numbers)


def chunks_of_row(g: Geometry) -> int:
    """The chunks that the elements of a channel and sample can touch."""
    v = g.vector
    return g.s // v if g.s % v == 0 else (g.s + v - 2) // v + 1


def numbers_of_rows(g: Geometry, threads: int, splits: int) -> tuple[int, ...]:
    """The source's numbers for rows."""
    chunks = chunks_of_row(g)
    samples, rest = divmod(threads, chunks)
    return (g.n, g.c, g.s, g.size, splits, chunks, samples * g.c * g.s, rest, 0, 0)


def numbers_of_columns(g: Geometry, splits: int, width: int, height: int) -> tuple[int, ...]:
    """The source's numbers for columns."""
    return (g.n, g.c, g.s, g.size, splits, 0, 0, 0, width, height)


def reduction_of_rows(kind: str, g: Geometry) -> Reduction:
    """Pieces of channels, and their merging as columns of one element."""
    chunks = g.n * chunks_of_row(g)
    splits = min(ceil_div(chunks, THREADS * CHUNKS_OF_PIECE), PIECES_MAX)
    reduce = Launch(
        kernel(f"{kind}_rows", *g.compiled_for),
        g.c * splits,
        THREADS,
        0,
        numbers_of_rows(g, THREADS, splits),
    )
    merge = merge_of(kind, g, reduce.numbers)
    return Reduction(None, reduce, merge, splits * g.c * DOUBLES[kind])


def reduction_of_columns(kind: str, g: Geometry) -> Reduction:
    """Strips of columns, cut into pieces, and their merging."""
    width, height = folded(g, STRIP)
    strips = ceil_div(width, STRIP * g.vector)
    wanted = max(BLOCKS_OF_COLUMNS * device_of(g.device).multiprocessors // strips, 1)
    lanes = THREADS // STRIP
    splits = min(wanted, ceil_div(height, STRIP_RUN * lanes))
    splits = max(splits, ceil_div(height, ROWS_MAX * lanes))
    numbers = numbers_of_columns(g, splits, width, height)
    reduce = Launch(
        kernel(f"{kind}_columns", *g.compiled_for), strips * splits, THREADS, 0, numbers
    )
    return Reduction(None, reduce, merge_of(kind, g, numbers), splits * width * DOUBLES[kind])


def merge_of(kind: str, g: Geometry, numbers: tuple[int, ...]) -> Launch:
    """A block for each channel merges its pieces."""
    return Launch(kernel(f"merge_{kind}", *g.compiled_for), g.c, THREADS, 0, numbers)


def folded(g: Geometry, chunks: int) -> tuple[int, int]:
    """Width and height of the matrix of columns: a row is whole chunks, at least so many."""
    width = g.c * g.s
    fold = g.vector // math.gcd(width, g.vector)
    fold *= ceil_div(chunks * g.vector, width * fold)
    return width * fold, ceil_div(g.n, fold)


@functools.lru_cache(4096)
def follower(g: Geometry) -> Launch:
    """A thread for each channel moves its running statistics, batch by batch."""
    numbers = numbers_of_columns(g, 0, 0, 0)
    return Launch(kernel("follow", *g.compiled_for), ceil_div(g.c, THREADS), THREADS, 0, numbers)


@functools.lru_cache(4096)
def element_wise(name: str, g: Geometry) -> Launch:
    """The plan for a result that is computed element by element."""
    mixed = g.s % g.vector != 0
    strip = STRIP_MIXED if mixed else THREADS
    width, height = folded(g, strip)
    strips = ceil_div(width, strip * g.vector)
    multiprocessors, rows = device_of(g.device).multiprocessors, AHEAD * (THREADS // strip)
    at_once = BLOCKS_AT_ONCE * multiprocessors
    if strips * height <= at_once * SHORT * (THREADS // strip):
        rounds = ceil_div(height, rows * max(at_once // strips, 1))
    else:
        wanted = ceil_div(BLOCKS_OF_ELEMENTS * multiprocessors, strips)
        rounds = max(height // (rows * wanted), 1)
    splits = ceil_div(height, rows * rounds)
    if mixed:
        name += "_mixed"
    numbers = numbers_of_columns(g, splits, width, height)
    return Launch(kernel(name, *g.compiled_for), strips * splits, THREADS, 0, numbers)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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
