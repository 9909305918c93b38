"""What the control groups of this process grant: CPUs and memory."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator

NO_LIMIT = sys.maxsize


def cpu_quota(root: str = "/") -> int:
    """The CPUs that the process's cgroup and those above it grant, rounded up."""
    return min(folder_quota(folder) for folder in folders("cpu", root))


def folder_quota(folder: str) -> int:
    """The CPUs that the cgroup of a folder grants, whichever version it is of."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (number for name in names for number in numbers(folder, name))
            return math.ceil(quota / period) if quota > 0 and period > 0 else NO_LIMIT
    return NO_LIMIT


def memory_limit(root: str = "/") -> int:
    """The bytes that the process's cgroup and those above it grant."""
    limits = [NO_LIMIT]
    for folder in folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits += numbers(folder, name)
    return min(limits)


def numbers(folder: str, name: str) -> list[int]:
    """The numbers in a file; ValueError if there is anything else."""
    with open(os.path.join(folder, name)) as file:
        return [int(word) for word in file.read().split()]


def folders(controller: str, root: str) -> Iterator[str]:
    """The folders of the process's cgroup, and of those above it, that may have limits."""
    # Version 2 has one hierarchy, version 1 one for each controller. Where a container does not
    # see its own path, the root of what it sees is its cgroup.
    bases = {"": "sys/fs/cgroup", controller: f"sys/fs/cgroup/{controller}"}
    yield from (os.path.join(root, base) for base in bases.values())
    try:
        with open(os.path.join(root, "proc/self/cgroup")) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        for base in {bases[name] for name in controllers.split(",") if name in bases}:
            parts = path.strip("/").split("/")
            for n in range(1, len(parts) + 1):
                yield os.path.join(root, base, *parts[:n])
