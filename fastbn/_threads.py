"""How many threads a call uses, and why."""

from __future__ import annotations

import os
import re
import threading
from typing import Any

import numpy as np

from fastbn import _core
from fastbn._cgroups import cpu_quota

INT_MAX = 2**31 - 1


def granted_cpus() -> dict[str, int]:
    """The CPUs that this process may use, by its affinity and by the quota of its cgroup."""
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        affinity = os.cpu_count() or 1
    return {"affinity": affinity, "cgroup": max(cpu_quota(), 1)}


def is_used(omp_num_threads: str | None) -> bool:
    """Tell whether OpenMP uses a value: a positive number, or a list of them, one a level."""
    if omp_num_threads is None:
        return False
    number = re.compile(r"\s*\+?[0-9]+\s*", re.ASCII)
    parts = omp_num_threads.split(",")
    return all(number.fullmatch(part) and 0 < int(part) < 2**63 for part in parts)


# Read at import: once another OpenMP runtime has bound this thread to a CPU, it is too late.
_granted = granted_cpus()
_omp_num_threads = os.environ.get("OMP_NUM_THREADS")
_omp_max_threads = _core.omp_max_threads()
_cpus = INT_MAX if is_used(_omp_num_threads) else min(_granted.values())
_num_threads: int | None = None
_limit = INT_MAX
_paused = True


def tell_core() -> None:
    """Let the core decide by what is known here."""
    _core.set_thread_policy(_num_threads or 0, _cpus, _limit)


def pause_before_fork() -> None:
    """End the idle threads of the pool: the child would wait for them, and has none of them."""
    global _paused
    _paused = _core.omp_pause()


def limit_after_fork() -> None:
    """In a child whose parent could not do so, start no threads."""
    global _limit
    if not _paused:
        _limit = 1
        tell_core()


tell_core()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=pause_before_fork, after_in_child=limit_after_fork)


def get_num_threads() -> int:
    """Return the number of threads that a call uses at most.

    Returns
    -------
    int
        Inside `threads`, the number that it sets for the calling thread; otherwise the number of
        `set_num_threads`. By default it is what OpenMP would use where ``OMP_NUM_THREADS`` gives
        it, otherwise no more than the CPUs that the affinity mask and the cgroup grant: all of
        these as they are when fastbn is imported; afterwards call `set_num_threads`.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.get_num_threads() >= 1
    True
    """
    return _core.num_threads()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads that a call uses at most, in all threads of this process.

    Results have the same bits for any number. By default, calls avoid waits for CPUs that other
    processes occupy: where such waits have cost more time than several threads have lately saved,
    the next calls use one thread, for 4 times as long as was lost. Each time that this soon happens
    again they do so for twice as long, up to 256 times what was lost. With a number set here, calls
    do not avoid such waits.

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
    _num_threads = as_num_threads(n)
    tell_core()


class threads:
    """Set the number of threads of the calls that the calling thread makes in a ``with`` block.

    It takes precedence over `set_num_threads`; as after that, calls wait for their threads. Other
    Python threads, those that are started inside the block included, do not notice it. Blocks may
    be nested, and the inner one decides.

    Parameters
    ----------
    n : int or None
        At least 1; it may exceed the number of CPUs. None is the default, whatever has been set.

    Raises
    ------
    ValueError, TypeError
        If n is less than 1, or neither an integer nor None.
    RuntimeError
        If a block is left in another thread than the one that entered it.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.threads(3):
    ...     fastbn.get_num_threads()
    3
    """

    def __init__(self, n: int | None) -> None:
        self._n = as_num_threads(n)

    def __enter__(self) -> None:
        blocks_here().append(self)
        set_by_blocks()

    def __exit__(self, *_: object) -> None:
        # Of several Python coroutines, one may leave its block before another leaves an inner one.
        blocks = blocks_here()
        places = [i for i, block in enumerate(blocks) if block is self]
        if not places:
            raise RuntimeError("fastbn.threads must be left in the thread that entered it")
        del blocks[places[-1]]
        set_by_blocks()


_here = threading.local()


def blocks_here() -> list[threads]:
    """The blocks that the calling thread is in, the inner ones last."""
    blocks: list[threads] = _here.__dict__.setdefault("blocks", [])
    return blocks


def set_by_blocks() -> None:
    """Let the innermost block decide, if there is one."""
    blocks = blocks_here()
    _core.set_threads_here((blocks[-1]._n or DEFAULT) if blocks else 0)


DEFAULT = -1  # As the core calls it.


def as_num_threads(n: Any) -> int | None:
    """A number of threads, or None for the default."""
    if n is None:
        return None
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"the number of threads must be an int or None, got {n!r}")
    if n < 1:
        raise ValueError(
            f"the number of threads must be at least 1, got {n}; None is the default again"
        )
    return min(int(n), INT_MAX)


def why_so_many_threads() -> str:
    """What decides `get_num_threads`."""
    maximum, threads_here = _core.omp_max_threads(), _core.set_threads_here(0)
    _core.set_threads_here(threads_here)
    if _limit < INT_MAX:
        return "forked from a process whose threads could not be ended"
    if threads_here > 0:
        return "fastbn.threads"
    if _num_threads is not None and threads_here == 0:
        return "set_num_threads"
    if _core.platform()["openmp"] == "none":
        return "built without OpenMP"
    if maximum != _omp_max_threads and maximum <= _cpus:
        return "changed in the OpenMP runtime since the import, as threadpoolctl does"
    if is_used(_omp_num_threads):
        return f"OMP_NUM_THREADS={_omp_num_threads}"
    unused = ""
    if _omp_num_threads is not None:
        unused = f"; OMP_NUM_THREADS={_omp_num_threads} is not a positive number"
    if maximum < _cpus:
        return f"the default of the OpenMP runtime{unused}"
    if _granted["cgroup"] < _granted["affinity"]:
        return f"the cgroup grants {_granted['cgroup']} CPUs, rounded up{unused}"
    return f"{_granted['affinity']} of {os.cpu_count()} CPUs are in the affinity mask{unused}"
