"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

from _selfbench.machine import cpu

from bench.native import compiler

CPUS = Path("/sys/devices/system/cpu")


def describe(device: str = "cpu") -> dict[str, object]:
    """The machine, as far as it tells."""
    return {
        **({} if device == "cpu" else {"gpu": _gpu()}),
        "cpu": cpu(),
        "architecture": platform.machine(),
        "cpus": len(available_cpus()),
        "virtual": "hypervisor" in _flags(),
        "caches": _caches(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "vector_extensions": _vector_extensions(),
        "transparent_hugepage": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "compiler": _compiler(),
    }


def commit() -> str | None:
    """The revision of the checkout, if it is one."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Others:
    """How many CPUs other processes, or other machines on the same hardware, take meanwhile."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    def cpus(self) -> float | None:
        """The average since the beginning; processes that this one has started must have ended."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - (_own_seconds() - self.own)
        return max(others / (time.monotonic() - self.start), 0.0)


def available_cpus() -> list[int]:
    """The CPUs that this process may use, one of each core first."""
    cpus = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return sorted(cpus, key=lambda cpu: (_rank_in_core(cpu), cpu))


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    return int((_field("/proc/meminfo", "MemAvailable") or "8388608 kB").split()[0]) * 1024


def _rank_in_core(cpu: int) -> int:
    """0 for the first hardware thread of a core, 1 for the second."""
    siblings = []
    for part in (_read(CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)).split(","):
        first, _, last = part.partition("-")
        siblings += range(int(first), int(last or first) + 1)
    return siblings.index(cpu) if cpu in siblings else 0


def _busy_seconds() -> float | None:
    """What all CPUs have worked since the system's start, stolen time included."""
    fields = (_read("/proc/stat") or "").split("\n")[0].split()
    if len(fields) < 9:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """What this process and those it has started have worked."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _field(path: str, name: str) -> str | None:
    """The value of the first line `name: value` of a file."""
    for line in (_read(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _caches() -> dict[str, str]:
    """Sizes of the caches that the first CPU uses."""
    caches = {}
    for index in sorted(CPUS.glob("cpu0/cache/index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if size and kind != "Instruction":
            caches[f"L{level}"] = size
    return caches


def _gpu() -> str | None:
    """Name, memory and driver of the GPUs."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _flags() -> list[str]:
    """What the first CPU has; a CPU that a hypervisor lends says so."""
    return (_field("/proc/cpuinfo", "flags") or "").split()


def _vector_extensions() -> list[str]:
    flags = _flags()
    return [
        name for name in ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16") if name in flags
    ]


def _compiler() -> str | None:
    try:
        command = [*compiler(), "--version"]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return None
