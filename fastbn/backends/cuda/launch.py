"""Launches: the source, compiled; its kernels; and the argument that they are given."""

from __future__ import annotations

import functools
import struct
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import cupy
from cupy.cuda import driver

from fastbn.backends.cuda.arrays import Array

# The dtypes' numbers in the source, by their characters; bfloat16 is ml_dtypes'.
FORMATS = {"f": 0, "d": 1, "e": 2, "E": 3}
ITEMSIZES = (4, 8, 2, 2)

# The source's Job: x, dy, out and whether they are aligned; the geometry; results, eps and count;
# nine vectors; the counter, the momentum and the correction of the variance. With a mask, that and
# its count follow; with several batches, the steps from one to the next, and how many there are.
JOB = struct.Struct("4q 11q 6q2d 18q 2q2d")
MASK = struct.Struct("2q")
BATCHES = struct.Struct("9q 2qd")
NO_VECTOR = (0, 0)

# From this size on an output is written by non-temporal stores: it leaves the cache of the second
# level before other data does.
NON_TEMPORAL_BYTES = 20_000_000


class Launch(NamedTuple):
    """A kernel, with how many threads and for which geometry it is launched."""

    function: int  # of CUDA's driver
    blocks: int
    threads: int
    shared_bytes: int
    numbers: tuple[int, ...]  # the fields of the argument that the geometry decides

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
        counter: Array | None = None,
        cumulative: bool = False,
        momentum: float = 0.0,
        correction: float = 1.0,
        valid: Array | None = None,
        valid_count: Array | None = None,
        batches: int = 0,
        partials_size: int = 0,
        batch_count: int = 0,
        last_count: float = 0.0,
    ) -> None:
        """Launch it on the current stream.

        `batches` are side by side in the grid, 0 for a kernel compiled for one batch; `batch_count`
        are those that `follow` takes one after the other. The rest are fields of the source's Job.
        """
        arrays = x.data.ptr, pointer(dy), pointer(out)
        job = JOB.pack(
            *arrays,
            (arrays[0] | arrays[1] | arrays[2]) % 16 == 0,
            *self.numbers,
            x.nbytes >= NON_TEMPORAL_BYTES,
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
            pointer(counter),
            cumulative,
            momentum,
            correction,
        )
        if valid is not None:
            job += MASK.pack(valid.data.ptr, pointer(valid_count))
        if batches or batch_count:
            vectors = weight, bias, mean, invstd, var, sum_dy, sum_dy_xhat
            steps = map(step, (*vectors, running_mean, running_var))
            job += BATCHES.pack(*steps, partials_size, batch_count, last_count)
        argument = array("b", job)
        arguments = array("Q", argument.buffer_info()[:1])
        driver.launchKernel(
            self.function,
            *(self.blocks, batches or 1, 1),
            *(self.threads, 1, 1),
            self.shared_bytes,
            cupy.cuda.get_current_stream().ptr,
            arguments.buffer_info()[0],
            0,
        )


def pointer(a: Array | None) -> int:
    """The address of an array; 0 for None."""
    return 0 if a is None else a.data.ptr


def vector(a: Array) -> tuple[int, int]:
    """The source's Vector of an array, or of the first batch's vector in one."""
    return a.data.ptr, 4 * a.strides[-1] + FORMATS[a.dtype.char]


def step(a: Array | None) -> int:
    """The bytes from the vector of a batch to that of the next; 0 if it is the same."""
    return a.strides[0] if a is not None and a.ndim == 2 else 0


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


class CompiledFor(NamedTuple):
    """The dtype and device of a kernel, whether it has a mask, and whether several batches."""

    format: int
    device: int
    masked: bool
    in_batches: bool


@functools.lru_cache(None)
def kernel(name: str, key: CompiledFor, cluster: int = 1, shared_bytes: int = 0) -> int:
    """A kernel, ready to be launched on the current device.

    A launch may ask for so many bytes of shared memory; every device has enough for a small number.
    """
    function = module(key.format, cluster, key.masked, key.in_batches).get_function(name)
    if shared_bytes:
        function.max_dynamic_shared_size_bytes = shared_bytes
    if cluster > 8:
        driver.funcSetAttribute(function.kernel.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    kernels.append(function)  # which must live as long as what is returned
    return function.kernel.ptr  # type: ignore[no-any-return]


kernels: list[Any] = []
