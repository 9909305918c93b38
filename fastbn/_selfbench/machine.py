"""What the system tells about the machine, and about what threads do."""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path

# After a parallel region the threads of most libraries spin for some milliseconds, waiting for the
# next one. So long at most one waits for them to sleep before another library is asked.
SPIN_S = 0.1
# Where the system does not tell what threads do, one waits so long.
PAUSE_S = 0.02


def cpu() -> str:
    """The name of the processor, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def waited_s() -> float:
    """How long the threads of this process have been ready to run while others had the CPUs."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # The thread has ended.
            total += int(path.read_text().split()[1])
    return total / 1e9


def wait_for_sleep(process: int) -> None:
    """Return when all threads of a process sleep, or when they have spun for too long."""
    tasks = Path(f"/proc/{process}/task")
    if not tasks.exists():
        time.sleep(PAUSE_S)
        return
    end = time.monotonic() + SPIN_S
    while time.monotonic() < end and any(map(_is_awake, tasks.glob("*/stat"))):
        time.sleep(0.0005)


def _is_awake(stat: Path) -> bool:
    """Tell whether a thread has a CPU or wants one; its state follows its name, in brackets."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:  # The thread has ended.
        return False
