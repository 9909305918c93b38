"""The CPU backend: brings arrays into the layout and dtype that the core takes, and picks threads.

The functions expect checked arguments. `x` and `dy` have the shape (N, C, ...), vectors (C,); all
may have any strides, alignment, byte order and any of the four dtypes.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import _core
from fastbn._version import __version__

Array = NDArray[Any]
Statistics = NDArray[np.float64]


def stats(x: Array) -> tuple[Statistics, Statistics]:
    """Mean and m2 of each channel."""
    mean, m2 = vectors(x, 2)
    _core.stats(packed(x), shape_of(x), mean, m2, get_num_threads())
    return mean, m2


def elemt(
    x: Array,
    mean: Array,
    invstd: Array,
    weight: Array | None,
    bias: Array | None,
    out: Array | None,
) -> Array:
    """Normalize by given statistics."""
    source = packed(x)
    target, out = output(x, source, out)
    _core.elemt(
        source,
        shape_of(x),
        doubles(mean),
        doubles(invstd),
        doubles(weight),
        doubles(bias),
        target,
        get_num_threads(),
    )
    return unpacked(target, out)


def forward(
    x: Array, weight: Array | None, bias: Array | None, eps: float, out: Array | None
) -> tuple[Array, Statistics, Statistics, Statistics]:
    """Normalize by the batch's own statistics; return y, mean, m2 and invstd."""
    source = packed(x)
    target, out = output(x, source, out)
    mean, m2, invstd = vectors(x, 3)
    _core.forward(
        source,
        shape_of(x),
        doubles(weight),
        doubles(bias),
        eps,
        target,
        mean,
        m2,
        invstd,
        get_num_threads(),
    )
    return unpacked(target, out), mean, m2, invstd


def backward_reduce(
    dy: Array, x: Array, mean: Array, invstd: Array
) -> tuple[Statistics, Statistics]:
    """The sums of dy and of dy * xhat."""
    sum_dy, sum_dy_xhat = vectors(x, 2)
    _core.backward_reduce(
        packed(dy, like=x),
        packed(x),
        shape_of(x),
        doubles(mean),
        doubles(invstd),
        sum_dy,
        sum_dy_xhat,
        get_num_threads(),
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
) -> Array:
    """The gradient of x, from the two sums."""
    source = packed(x)
    target, out = output(x, source, out)
    _core.backward_elemt(
        packed(dy, like=x),
        source,
        shape_of(x),
        doubles(mean),
        doubles(invstd),
        doubles(weight),
        doubles(sum_dy),
        doubles(sum_dy_xhat),
        count,
        target,
        get_num_threads(),
    )
    return unpacked(target, out)


def backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    out: Array | None,
) -> tuple[Array, Statistics, Statistics]:
    """The gradient of x, and the sums of dy and of dy * xhat."""
    source = packed(x)
    target, out = output(x, source, out)
    sum_dy, sum_dy_xhat = vectors(x, 2)
    _core.backward(
        packed(dy, like=x),
        source,
        shape_of(x),
        doubles(weight),
        doubles(mean),
        doubles(invstd),
        target,
        sum_dy,
        sum_dy_xhat,
        get_num_threads(),
    )
    return unpacked(target, out), sum_dy, sum_dy_xhat


# Layouts and dtypes.


def shape_of(x: Array) -> tuple[int, int, int]:
    """How the core sees x: samples, channels, elements of a channel in a sample."""
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def core_dtype(x: Array) -> type[np.floating[Any]]:
    """The dtype in which the core computes on x."""
    return np.float64 if x.itemsize == 8 else np.float32


def packed(x: Array, like: Array | None = None) -> Array:
    """The array as the core takes it: itself, or a copy."""
    if like is not None and x.dtype != like.dtype:
        with np.errstate(all="ignore"):  # What x's dtype cannot hold is inf there.
            x = x.astype(like.dtype)
    return np.require(x, core_dtype(x), ["C_CONTIGUOUS", "ALIGNED"])


def output(x: Array, source: Array, out: Array | None) -> tuple[Array, Array]:
    """Where the core shall write, and where the result shall be in the end."""
    if out is None:
        out = np.empty_like(x, dtype=x.dtype.newbyteorder("="), subok=False)
    if out.dtype == source.dtype and out.flags.c_contiguous and out.flags.aligned:
        return out, out
    # A source that is a copy can be overwritten.
    return (source if not np.may_share_memory(source, x) else np.empty_like(source)), out


def unpacked(target: Array, out: Array) -> Array:
    """The result where it shall be."""
    if target is not out:
        with np.errstate(all="ignore"):  # What out's dtype cannot hold is inf there.
            out[...] = target
    return out


def doubles(vector: Array | None) -> Statistics | None:
    """A vector as the core takes it."""
    return None if vector is None else np.require(vector, np.float64, ["C", "A"])


def vectors(x: Array, count: int) -> NDArray[np.float64]:
    """So many new vectors of one value per channel."""
    return np.empty((count, x.shape[1]))


# Threads.


def available_cpus() -> int:
    """The CPUs that this process may use, by its affinity and by the quota of its cgroup."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cpus = os.cpu_count() or 1
    return max(min(cpus, cgroup_quota()), 1)


def cgroup_quota() -> int:
    """The CPUs that the cgroup (version 2, then 1) grants, rounded up."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except OSError:
        try:
            with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
                quota = file.read()
            with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                period = file.read()
        except OSError:
            quota, period = "max", "100000"
    if quota == "max" or int(quota) <= 0:
        return 2**31 - 1
    return math.ceil(int(quota) / int(period))


# Read at import: once another OpenMP runtime has bound this thread to a CPU, it is too late.
_cpus = available_cpus()
_num_threads: int | None = None


def get_num_threads() -> int:
    """Return the number of threads that a call uses at most.

    Returns
    -------
    int
        What `set_num_threads` set. By default what OpenMP would use where ``OMP_NUM_THREADS`` is
        set, otherwise no more than the CPUs that the affinity mask and the cgroup grant.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.get_num_threads() >= 1
    True
    """
    if _num_threads is not None:
        return _num_threads
    threads: int = _core.omp_max_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, _cpus)


def set_num_threads(n: int | None) -> None:
    """Set the number of threads that a call uses at most, in all threads of this process.

    Results do not depend on it, to the bit.

    Parameters
    ----------
    n : int or None
        At least 1; it may exceed the number of CPUs. None is the default again.

    Raises
    ------
    ValueError, TypeError
        If n is less than 1, or neither an integer nor None.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(2)
    >>> fastbn.get_num_threads()
    2
    >>> fastbn.set_num_threads(None)
    """
    global _num_threads
    if n is not None:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise TypeError(f"the number of threads must be an int or None, got {n!r}")
        if n < 1:
            raise ValueError(f"the number of threads must be at least 1, got {n}")
        n = int(n)
    _num_threads = n


def show_config() -> None:
    """Print version, compiler, OpenMP runtime, instruction set in use and number of threads.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn ...
    """
    config = _core.platform()
    print(f"fastbn {__version__}")
    print(f"compiler: {config['compiler']}")
    print(f"OpenMP: {config['openmp']}")
    print(f"instruction set: {config['isa']} (of {', '.join(config['isas'])})")
    print(f"threads: {get_num_threads()}")
