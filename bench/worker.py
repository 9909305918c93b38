"""The process of one library: answers the runner, a line of JSON for a line of JSON.

It is started as `python -P -c STARTUP` (see runner.py) with its settings as the only argument. The
first line it writes tells what the library is, or why there is none. Then it answers messages:

- `prepare` a case in some layouts, or in every one that the library knows;
- `time` a layout of it;
- `release` what was prepared.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from bench.cases import Case, Data, check
from bench.library import Library, Run

# A sample is the mean over so many calls that it takes at least this long.
SAMPLE_NS = 100_000
# A library this slow is not called an extra time to warm up in every round.
SLOW_NS = 100_000_000


class Prepared:
    """A case in a layout, ready and known to be right."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.calls = 1
        self.calls = max(1, int(SAMPLE_NS / max(min(self._first()), 1.0)))

    def _first(self) -> list[float]:
        """Samples of a single call; more of them if calls are short."""
        first = self.sample()
        return [first, *(self.sample() for _ in range(9 if first < SLOW_NS / 100 else 1))]

    def sample(self) -> float:
        """The nanoseconds of a call, the mean over several."""
        if self.run.sample is not None:
            return self.run.sample()
        call, repeat, calls = self.run.call, self.run.repeat, self.calls
        if self.run.restore is not None:
            self.run.restore()
        if repeat is not None:
            start = time.perf_counter_ns()
            repeat(calls)
        else:
            start = time.perf_counter_ns()
            for _ in range(calls):
                call()
        return (time.perf_counter_ns() - start) / calls

    def samples(self, budget_ns: float) -> list[float]:
        """Samples for about as long as the budget says, at least one."""
        start = time.perf_counter_ns()
        samples = [self.sample()]
        if samples[0] * self.calls < SLOW_NS:  # That one woke the threads and warmed the caches.
            samples = []
        while not samples or time.perf_counter_ns() - start < budget_ns:
            samples.append(self.sample())
        return samples


class Worker:
    """Answers messages about one library."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.prepared: dict[str, Prepared] = {}
        self.data: Data | None = None

    def prepare(
        self, operation: str, shape: list[int], dtype: str, variants: list[str] | None
    ) -> dict[str, Any]:
        """Prepare a case; tell about each layout what came of it, or why nothing did."""
        case = Case(operation, tuple(shape), dtype)
        if self.data is None or (self.data.shape, self.data.dtype.name) != (case.shape, dtype):
            self.data = None  # so that its memory is free before new data is made
            self.data = Data(case)
        answer: dict[str, Any] = {"prepared": {}, "failed": {}}
        try:
            known = self.library.variants(case)
        except Exception as error:
            return {"prepared": {}, "failed": {"": reason(error)}}
        for variant in known if variants is None else [v for v in known if v in variants]:
            try:
                run = self.library.prepare(case, variant, self.data)
                if run.restore is not None:
                    run.restore()
                check(case, self.data, run.result(run.call()))
                self.prepared[variant] = Prepared(run)
            except Exception as error:  # Whatever it is, the others go on.
                answer["failed"][variant] = reason(error)
            else:
                answer["prepared"][variant] = {"preallocated": run.preallocated, "note": run.note}
        return answer

    def time(self, variant: str, budget_ns: float) -> dict[str, Any]:
        """Samples, and how long threads had to wait for a CPU, relative to the time it took."""
        prepared = self.prepared[variant]
        start, waited = time.perf_counter_ns(), waited_ns()
        samples = prepared.samples(budget_ns)
        waited, took = waited_ns() - waited, time.perf_counter_ns() - start
        return {"samples": samples, "calls": prepared.calls, "waited": waited / took}

    def release(self, keep_data: bool) -> dict[str, Any]:
        self.prepared.clear()
        self.library.release()
        if not keep_data:
            self.data = None
        gc.collect()
        return {}


def waited_ns() -> int:
    """How long the threads of this process have been ready to run while others had the CPUs."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # It has ended.
            total += int(path.read_text().split()[1])
    return total


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text[:300] if name == "Unsupported" else f"{name}: {text[:300]}"


def private_stdout() -> TextIO:
    """The standard output for answers only; whatever a library prints goes to standard error."""
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return private


def serve(worker: Worker, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer until standard input ends. An answer tells how busy the process was before it."""
    gc.disable()
    gc.freeze()  # What the library has imported need not be searched at every release.
    idle_wall, idle_cpu = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = [time.perf_counter() - idle_wall, time.process_time() - idle_cpu]
        message = json.loads(line)
        method = getattr(worker, message.pop("do"))
        answer({**method(**message), "idle": idle})
        idle_wall, idle_cpu = time.perf_counter(), time.process_time()


def main() -> None:
    """Import the library, say what it is, serve."""
    output = private_stdout()

    def answer(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    settings = json.loads(sys.argv[1])
    if settings["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings["cpus"])
    warnings.simplefilter("ignore")
    try:
        module = importlib.import_module(f"bench.libraries.{settings['module']}")
        library = module.Library(settings["threads"])
        versions = library.versions()
    except Exception as error:
        answer({"unavailable": reason(error)})
        return
    answer({"versions": versions, "api": library.api, "buffers": library.buffers})
    serve(Worker(library), answer)
