"""The benchmark of `python -m fastbn bench`: where this machine stands against its memory.

The floor, fastbn and, if it is installed, torch run in a process each (`libraries`, `serving`), as
each brings threads of its own, and take turns (`process`). The repository has a larger benchmark,
against more libraries, which shares how processes are asked and samples taken; this one is what an
installed package needs. The modules import no other of fastbn, this one excepted: `worker` is why.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from fastbn._config import show_config
from fastbn._threads import get_num_threads

from .machine import cpu
from .process import TIMEOUT_S, Process
from .sampling import Round, median_ms
from .table import FASTBN, FLOOR, ITEMSIZE, OPERATIONS, TORCH, named, report

__all__ = ["SECONDS", "measure", "report"]

Shape = tuple[int, int, int, int]

# From 50 MB, far beyond the caches, to half a megabyte.
SHAPES: Sequence[Shape] = (
    (32, 512, 28, 28),
    (32, 64, 56, 56),
    (32, 256, 14, 14),
    (1, 64, 112, 112),
    (128, 1000, 1, 1),
)
SECONDS = 100.0
ROUNDS = 3


class Worker(Process):
    """The process of a library, which times its operations."""

    def __init__(self, library: str, threads: int) -> None:
        super().__init__(library, "_selfbench.libraries", {"library": library, "threads": threads})
        about = self.about()
        if "unavailable" in about:
            self.close()
            raise RuntimeError(f"{library} does not start: {about['unavailable']}")
        self.version: str = about["version"]

    def time(self, shape: Shape, operation: str, seconds: float) -> Round:
        """Time an operation for so long."""
        timeout_s = TIMEOUT_S + seconds
        answer = self.request("time", timeout_s, shape=shape, operation=operation, seconds=seconds)
        return Round(**answer)


def measure(seconds: float) -> dict[str, Any]:
    """Medians of all operations on all shapes, in milliseconds, and how far they are from memory.

    Shows on standard error how far it is.
    """
    threads = get_num_threads()
    steps = [
        (shape, operation) for shape in SHAPES for _ in range(ROUNDS) for operation in OPERATIONS
    ]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, threads)) for name in (FLOOR, FASTBN)]
        if importlib.util.find_spec(TORCH):
            try:
                workers.append(stack.enter_context(Worker(TORCH, threads)))
            except RuntimeError as error:
                print(f"Measuring without {TORCH}: {error}", file=sys.stderr)
        versions = {worker.name: worker.version for worker in workers}
        rounds: dict[tuple[Shape, str], dict[str, list[Round]]] = {
            step: {name: [] for name in versions} for step in steps
        }
        budget = seconds / (len(steps) * len(workers))
        for step in progress(steps):
            for worker in workers:
                rounds[step][worker.name].append(worker.time(*step, budget))
    results = [
        {"shape": shape, "operation": operation, **figures(of)}
        for (shape, operation), of in rounds.items()
    ]
    return {
        "config": show_config("dicts"),
        "cpu": cpu(),
        "libraries": versions,
        "results": results,
        "over_floor": over_floor(results),
        "copy_gb_per_s": copy_speed(results),
    }


def progress(steps: list[tuple[Shape, str]]) -> Iterator[tuple[Shape, str]]:
    """The steps, with a bar on standard error if there is tqdm, or else lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, (shape, operation) in enumerate(steps, 1):
            print(f"{number}/{len(steps)} {named(shape)} {operation}", file=sys.stderr, flush=True)
            yield shape, operation
    else:
        with tqdm(steps, unit="step") as bar:
            for shape, operation in bar:
                bar.set_postfix_str(f"{named(shape)} {operation}")
                yield shape, operation


def figures(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """The median of each library over its quiet rounds, and which libraries had none."""
    return {
        "ms": {name: median_ms(of) for name, of in rounds.items() if of[0].ms},
        "disturbed": [name for name, of in rounds.items() if not any(each.quiet for each in of)],
    }


def over_floor(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each operation and library the geometric mean of its times over those of the floor.

    Of undisturbed times, over the shapes that have them.
    """
    ratios: dict[str, dict[str, list[float]]] = {operation: {} for operation in OPERATIONS}
    for result in results:
        ms, of_operation = result["ms"], ratios[result["operation"]]
        for name in ms:
            if name != FLOOR and not {name, FLOOR} & {*result["disturbed"]}:
                of_operation.setdefault(name, []).append(ms[name] / ms[FLOOR])
    return {
        operation: {name: statistics.geometric_mean(found) for name, found in by_library.items()}
        for operation, by_library in ratios.items()
    }


def copy_speed(results: list[dict[str, Any]]) -> float:
    """What a copy of the largest array reads and writes, in GB a second."""
    copies = [result for result in results if result["operation"] == "eval"]
    largest = max(copies, key=lambda result: math.prod(result["shape"]))
    moved = 2 * ITEMSIZE * math.prod(largest["shape"])
    return moved / largest["ms"][FLOOR] / 1e6  # type: ignore[no-any-return]
