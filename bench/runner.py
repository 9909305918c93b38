"""Runs the libraries, each in a process of its own, in turn and in several rounds."""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench import machine
from bench.cases import CALL, Case
from bench.libraries import (
    FASTBN,
    FASTBN_AVX2,
    FASTBN_ONE_THREAD,
    TORCH,
    Setup,
    libraries_on,
)

ROOT = Path(__file__).parent.parent
# An installed fastbn comes before the folder in the checkout, which may not be built.
STARTUP = f"import sys; sys.path.append({str(ROOT)!r}); from bench.worker import main; main()"

# Compilation included.
TIMEOUT_S = 600
# After a parallel region the threads of most libraries spin for some milliseconds, waiting for the
# next one. So long at most the runner waits for them to sleep before it asks another library.
SPIN_S = 0.1
# Where the system does not tell what threads do, it waits so long.
PAUSE_S = 0.02
# Threads that share a CPU with another process wait for it in slices of milliseconds. A round in
# which a library's threads waited for more than this share of the time is repeated, so often at
# most; the least disturbed one counts.
DISTURBED = 0.15
ATTEMPTS = 4
# Estimated arrays of x's size that a library holds for a case.
ARRAYS_HELD = 8
# The share of the memory that the libraries may take together.
MEMORY_SHARE = 0.7
# fastbn with less than it could have, and the operations that this is measured for.
WAYS = (FASTBN_AVX2, FASTBN_ONE_THREAD)
OPERATIONS_OF_WAYS = ("eval", "train", "backward")
# The cost of a call is asked of the libraries that have layers, and for long: its minimum counts.
LIBRARIES_WITH_LAYERS = (FASTBN, TORCH)
CALL_BUDGET_MS = 100.0


class WorkerDied(Exception):
    """The process of a library has ended, or does not answer."""


@dataclass
class Settings:
    """How to measure."""

    rounds: int
    budget_ms: float
    threads: int
    libraries: list[str]
    # The layouts of fastbn; its peers take all of theirs.
    layouts: list[str]
    device: str = "cpu"


class Worker:
    """The runner's side of a library's process."""

    def __init__(self, name: str, setup: Setup, threads: int) -> None:
        self.name = name
        self.threads = setup.threads or threads
        self.idle_wall = self.idle_cpu = 0.0
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", STARTUP, json.dumps(self._settings(setup))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment(setup, self.threads),
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def _settings(self, setup: Setup) -> dict[str, Any]:
        cpus = machine.available_cpus()[: self.threads]
        return {"module": setup.module, "threads": self.threads, "cpus": cpus}

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def about(self) -> dict[str, Any]:
        """What the library is, or why it is unavailable; its first answer."""
        try:
            return self._answer()
        except WorkerDied as death:
            return {"unavailable": str(death)}

    def ask(self, do: str, **message: Any) -> dict[str, Any]:
        """Send a message, return the answer when the process sleeps again."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **message}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerDied(self._last_words()) from None
        answer = self._answer()
        wait_for_sleep(self.process.pid)
        wall, cpu = answer.pop("idle")
        self.idle_wall += wall
        self.idle_cpu += cpu
        return answer

    def _answer(self) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=TIMEOUT_S)
        except queue.Empty:
            self.process.kill()
            raise WorkerDied(f"no answer in {TIMEOUT_S} s") from None
        if not line:
            raise WorkerDied(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().split("\n")
        words = " ".join(line.strip() for line in lines[-4:]).strip()
        return f"ended with {self.process.returncode}: {words[-300:]}"


def wait_for_sleep(process: int) -> None:
    """Return when all threads of a process sleep, or when they have spun for too long."""
    tasks = Path(f"/proc/{process}/task")
    if not tasks.exists():
        time.sleep(PAUSE_S)
    end = time.monotonic() + SPIN_S
    while time.monotonic() < end and any(map(runs, tasks.glob("*/stat"))):
        time.sleep(0.0005)


def runs(stat: Path) -> bool:
    """Tell whether a thread runs, or could; its state follows its name, which is in brackets."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:  # It has ended.
        return False


def environment(setup: Setup, threads: int) -> dict[str, str]:
    """The environment of a library's process: the caller's, but OpenMP as it is by default."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MALLOC_", "GLIBC_", "FASTBN_", "OPENBLAS_", "MKL_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    pools = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    return {**inherited, **{f"{p}_NUM_THREADS": str(threads) for p in pools}, **setup.environment}


class Entry(NamedTuple):
    """A library in one of its layouts."""

    worker: Worker
    variant: str


@dataclass
class Samples:
    """The samples of an entry, by rounds."""

    about: dict[str, Any]
    rounds: list[list[float]] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    calls: int = 1

    def record(self) -> dict[str, Any]:
        """Milliseconds: the median of the rounds' medians, and how the samples lie about it."""
        pooled = sorted(sample for samples in self.rounds for sample in samples)
        return {
            "median_ms": milliseconds(statistics.median(map(statistics.median, self.rounds))),
            "min_ms": milliseconds(pooled[0]),
            "p90_ms": milliseconds(pooled[int(0.9 * (len(pooled) - 1) + 0.5)]),
            "samples": len(pooled),
            "calls_per_sample": self.calls,
            "waited": float(f"{statistics.median(self.waited):.2g}"),
            **self.about,
        }


def milliseconds(nanoseconds: float) -> float:
    """With five digits, which is more than noise leaves."""
    return float(f"{nanoseconds * 1e-6:.5g}")


class Runner:
    """The processes of all libraries, and what they have answered."""

    def __init__(self, settings: Settings, workers: list[Worker]) -> None:
        self.settings = settings
        self.workers = workers
        self.memory = machine.available_memory()
        self.results: list[dict[str, Any]] = []
        self.left_out: dict[tuple[str, ...], list[str]] = {}

    def measure(self, case: Case) -> Iterator[None]:
        """Measure a case; yields after every round."""
        wanted = [worker for worker in self.workers if self._takes_part(worker, case)]
        keys = {"threads": self.settings.threads, **case._asdict()}
        for group in self._groups(wanted, case):
            entries = self._prepare(group, case)
            for number in range(self.settings.rounds):
                self._round(case, entries, number)
                yield
            for (worker, variant), samples in entries.items():
                if samples.rounds:
                    about = {**keys, "library": worker.name, "variant": variant}
                    self.results.append({**about, **samples.record()})
            for worker in group:
                self._ask(worker, case, "release", keep_data=len(group) == len(wanted))

    def rounds_of(self, case: Case) -> int:
        """How often `measure` will yield."""
        wanted = [worker for worker in self.workers if self._takes_part(worker, case)]
        return self.settings.rounds * len(self._groups(wanted, case))

    def _takes_part(self, worker: Worker, case: Case) -> bool:
        if case.operation == CALL:
            return worker.name in LIBRARIES_WITH_LAYERS
        if worker.name in WAYS:
            return case.operation in OPERATIONS_OF_WAYS and case.dtype == "float32"
        return True

    def _groups(self, workers: list[Worker], case: Case) -> list[list[Worker]]:
        """Libraries that hold their arrays at the same time: all, unless memory is too small."""
        if ARRAYS_HELD * case.bytes * len(workers) <= MEMORY_SHARE * self.memory:
            return [workers]
        return [[worker] for worker in workers]

    def _prepare(self, workers: list[Worker], case: Case) -> dict[Entry, Samples]:
        entries = {}
        for worker in workers:
            message = {**case._asdict(), "variants": self._variants(worker)}
            answer = self._ask(worker, case, "prepare", **message)
            if answer is None:
                continue
            for variant, reason in answer["failed"].items():
                self._leave_out(worker.name, variant, case, reason)
            for variant, about in answer["prepared"].items():
                entries[Entry(worker, variant)] = Samples(about)
        return entries

    def _variants(self, worker: Worker) -> list[str] | None:
        """The layouts to prepare; None is all that the library knows."""
        if worker.name in WAYS:
            return ["nchw"]
        return self.settings.layouts if worker.name == FASTBN else None

    def _round(self, case: Case, entries: dict[Entry, Samples], number: int) -> None:
        """Ask every entry for samples; a round begins where the one before began, and one on."""
        budget_ms = CALL_BUDGET_MS if case.operation == CALL else self.settings.budget_ms
        order = list(entries)
        start = number % max(len(order), 1)
        for entry in order[start:] + order[:start]:
            answer = self._time(entry, case, budget_ms)
            if answer is not None:
                entries[entry].rounds.append(answer["samples"])
                entries[entry].waited.append(answer["waited"])
                entries[entry].calls = answer["calls"]

    def _time(self, entry: Entry, case: Case, budget_ms: float) -> dict[str, Any] | None:
        """The least disturbed of some answers, or the first that is not disturbed."""
        answers = []
        while len(answers) < ATTEMPTS:
            answer = self._ask(
                entry.worker, case, "time", variant=entry.variant, budget_ns=budget_ms * 1e6
            )
            if answer is None:
                return None
            answers.append(answer)
            if answer["waited"] < DISTURBED:
                break
        return min(answers, key=lambda answer: answer["waited"])

    def _ask(self, worker: Worker, case: Case, do: str, **message: Any) -> dict[str, Any] | None:
        """The answer, or None where the process has died: it is out from now on."""
        if worker not in self.workers:
            return None
        try:
            return worker.ask(do, **message)
        except WorkerDied as death:
            self.workers.remove(worker)
            self._leave_out(worker.name, "", case, f"{death}; all that follows is left out too")
            return None

    def _leave_out(self, library: str, variant: str, case: Case, reason: str) -> None:
        """Note why there are no figures; one note for all shapes with the same reason."""
        note = library, variant, case.operation, case.dtype, reason
        self.left_out.setdefault(note, []).append("x".join(map(str, case.shape)))

    def notes(self) -> list[dict[str, Any]]:
        """What was left out, and why."""
        names = ("library", "variant", "operation", "dtype", "reason")
        return [
            {
                **dict(zip(names, note, strict=True)),
                "threads": self.settings.threads,
                "shapes": shapes,
            }
            for note, shapes in self.left_out.items()
        ]


@contextmanager
def started(settings: Settings) -> Iterator[tuple[Runner, dict[str, Any]]]:
    """A runner with all the libraries that there are, and what each tells about itself."""
    about: dict[str, Any] = {}
    setups = libraries_on(settings.device)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(Worker(name, setups[name], settings.threads))
            for name in settings.libraries
            if name != FASTBN_ONE_THREAD or settings.threads > 1
        ]
        for worker in processes:
            setup = setups[worker.name]
            about[worker.name] = {**worker.about(), "environment": dict(setup.environment)}
        if "unavailable" in about.get(FASTBN, {}):
            raise SystemExit(f"no fastbn: {about[FASTBN]['unavailable']}")
        workers = [worker for worker in processes if "unavailable" not in about[worker.name]]
        yield Runner(settings, workers), about
        for worker in workers:
            if worker.idle_wall:
                about[worker.name]["busy_while_idle"] = worker.idle_cpu / worker.idle_wall


def measure(settings: Settings, cases: list[Case], progress: Any) -> dict[str, Any]:
    """Measure all cases with a number of threads."""
    with started(settings) as (runner, about):
        progress.total = (progress.total or 0) + sum(map(runner.rounds_of, cases))
        for case in cases:
            progress.set_postfix_str(describe(case, settings.threads))
            for _ in runner.measure(case):
                progress.update()
    return {"libraries": about, "results": runner.results, "left_out": runner.notes()}


def describe(case: Case, threads: int) -> str:
    shape = "x".join(map(str, case.shape))
    what = "a call" if case.operation == CALL else case.operation
    return f"{what} {shape} {case.dtype}, {threads} threads"
