"""The memory of freed results, which new results take."""

from __future__ import annotations

import os

from fastbn import _core
from fastbn._cgroups import memory_limit

MOST_KEPT = 2**28


def most_kept() -> int:
    """The bytes of freed results that are kept at most: little of what the process may use."""
    if os.environ.get("FASTBN_REUSE_MEMORY") == "0":
        return 0
    return min(MOST_KEPT, min(machine_memory(), memory_limit()) // 16)


def machine_memory() -> int:
    """The bytes of memory that the machine has; 0 where the system does not tell."""
    try:
        return max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0)
    except (AttributeError, OSError, ValueError):
        return 0


_core.limit_free_memory(most_kept())


def release_memory() -> int:
    """Give the memory of freed results back to the system.

    The memory of a freed result of 4 MiB or more is kept for the next one of the same size. At most
    two of a size are kept, in all at most 256 MiB and a sixteenth of the memory that the machine
    and the process's cgroup grant. A result for which there is no memory releases all that is kept
    before it fails. When the system runs short of memory, it may take most of what is kept, but
    only as far as it was offered: offers are left out where they take long, which is without huge
    pages and on some virtual machines. So call this where the process should look small at once,
    or before other libraries need all the memory there is.

    With ``FASTBN_REUSE_MEMORY=0`` in the environment, and on Windows always, nothing is kept.

    Returns
    -------
    int
        The number of bytes that were kept.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> x = np.ones((32, 64, 28, 28), np.float32)  # 6.4 MB
    >>> y = fastbn.BatchNorm2d(64)(x)
    >>> del y
    >>> released = fastbn.release_memory()
    >>> fastbn.release_memory()
    0
    """
    return _core.release_free_memory()
