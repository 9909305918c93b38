"""Measures the libraries, each in a process of its own, in several rounds and turns."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from _selfbench.process import Process, ProcessEnded
from _selfbench.sampling import Round, counted, median_ms, pooled_ms

from bench import machine
from bench.cases import CALL, PRODUCTS, STEPS_IN_PLACE, Case
from bench.figures import shape_name
from bench.libraries import (
    FASTBN,
    FASTBN_ONE_THREAD,
    FASTBN_UNFUSED,
    FLOOR,
    LIBRARIES,
    TORCH,
    WAYS,
    Setup,
    libraries_on,
)

ROOT = Path(__file__).parent.parent

# How often a library is asked again in a turn, while other processes disturb it.
ATTEMPTS = 4
# The turns of a round, each with a part of the budget. The memory of a virtual machine may change
# its speed every few seconds: what is compared should be measured in the same ones.
TURNS = 4
# Estimated arrays of x's size that a library holds for a case, and for one with a residual.
ARRAYS_HELD, ARRAYS_HELD_WITH_RESIDUAL = 8, 13
# The fraction of the memory that the libraries may take together.
MEMORY_FRACTION = 0.7
# What is measured of fastbn with less than it could have.
OPERATIONS_OF_WAYS = ("eval", "train", "backward")
# The cost of a call is asked of the libraries that have layers.
LIBRARIES_WITH_LAYERS = (FASTBN, TORCH)
# For long, as the minimum of a call counts; and after matrix products, which take time themselves.
LONG_BUDGET_MS = 100.0


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


class Worker(Process):
    """The process of a library, in its own environment."""

    def __init__(self, name: str, setup: Setup, threads: int) -> None:
        threads = setup.threads or threads
        cpus = machine.available_cpus()[:threads]
        settings = {"module": setup.module, "threads": threads, "cpus": cpus}
        super().__init__(name, "bench.worker", settings, str(ROOT), environment(setup, threads))


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
    """The samples of an entry, by turns."""

    about: dict[str, Any]
    turns: list[Round] = field(default_factory=list)
    calls: int = 1

    def record(self) -> dict[str, Any]:
        """Milliseconds: the median, and how the samples lie about it."""
        samples = pooled_ms(self.turns)
        return {
            "median_ms": rounded(median_ms(self.turns)),
            "min_ms": rounded(samples[0]),
            "p90_ms": rounded(samples[int(0.9 * (len(samples) - 1) + 0.5)]),
            "samples": len(samples),
            "calls_per_sample": self.calls,
            "waited": rounded(statistics.median(of.waited for of in counted(self.turns)), digits=2),
            **self.about,
        }


def rounded(value: float, digits: int = 5) -> float:
    """With five digits a time has more than noise leaves."""
    return float(f"{value:.{digits}g}")


class Runner:
    """The processes of all libraries, and what they have answered.

    A round goes through all cases, with new arrays, and asks the libraries in several turns. So the
    samples of a figure are spread over the whole run, and neither a disturbed minute nor the place
    that an array has in memory decides it.
    """

    def __init__(self, settings: Settings, workers: list[Worker]) -> None:
        self.settings = settings
        self.workers = workers
        self.memory = machine.available_memory()
        # By case, and by the names of library and layout.
        self.samples: dict[tuple[Case, str, str], Samples] = {}
        self.left_out: dict[tuple[str, ...], list[str]] = {}
        # How far the CPUs were from each other, once for each case and round.
        self.round_trips_ns: list[float] = []

    def measure(self, cases: list[Case], show: Callable[[Case], object]) -> None:
        """Measure all cases; show what comes next."""
        for number in range(self.settings.rounds):
            for case, following in zip(cases, [*cases[1:], None], strict=True):
                show(case)
                self._ask_for_round_trip(case)
                keep_data = following is not None and following.has_data_of(case)
                self._ask_all(case, number, keep_data)

    def _ask_for_round_trip(self, case: Case) -> None:
        """Note how long a cache line takes from one CPU to another and back.

        The CPUs of a virtual machine may be near each other at one moment, and far at the next.
        """
        for worker in self.workers:
            if worker.name == FLOOR and self.settings.threads > 1:
                answer = self._ask(worker, case, "round_trip")
                if answer is not None and answer["ns"] > 0.0:
                    self.round_trips_ns.append(rounded(answer["ns"], 3))

    def _ask_all(self, case: Case, number: int, keep_data: bool) -> None:
        """Take the samples of a case in a round."""
        wanted = [worker for worker in self.workers if self._is_asked(worker, case)]
        groups = self._groups(wanted, case)
        for group in groups:
            self._round(case, self._prepare(group, case), number)
            for worker in group:
                self._ask(worker, case, "release", keep_data=keep_data and len(groups) == 1)

    def results(self) -> list[dict[str, Any]]:
        """A record of every figure, in the order of the cases."""
        return [
            {
                "threads": self.settings.threads,
                **case._asdict(),
                "library": library,
                "variant": variant,
                **samples.record(),
            }
            for (case, library, variant), samples in self.samples.items()
            if samples.turns
        ]

    def _is_asked(self, worker: Worker, case: Case) -> bool:
        if case.operation in STEPS_IN_PLACE:
            return worker.name == FASTBN
        if case.operation == CALL:
            return worker.name in LIBRARIES_WITH_LAYERS
        if worker.name in WAYS:
            return case.operation in OPERATIONS_OF_WAYS and case.dtype == "float32"
        return case.activated or worker.name != FASTBN_UNFUSED

    def _groups(self, workers: list[Worker], case: Case) -> list[list[Worker]]:
        """Libraries that hold their arrays at the same time: all, unless memory is too small."""
        arrays = ARRAYS_HELD_WITH_RESIDUAL if case.has_residual else ARRAYS_HELD
        if arrays * case.bytes * len(workers) <= MEMORY_FRACTION * self.memory:
            return [workers]
        return [[worker] for worker in workers]

    def _prepare(self, workers: list[Worker], case: Case) -> list[Entry]:
        entries = []
        for worker in workers:
            message = {**case._asdict(), "variants": self._variants(worker)}
            answer = self._ask(worker, case, "prepare", **message)
            if answer is None:
                continue
            for variant, reason in answer["failed"].items():
                self._leave_out(worker.name, variant, case, reason)
            for variant, about in answer["prepared"].items():
                entries.append(Entry(worker, variant))
                self.samples.setdefault((case, worker.name, variant), Samples(about))
        return entries

    def _variants(self, worker: Worker) -> list[str] | None:
        """The layouts to prepare; None is all that the library knows."""
        if worker.name in WAYS:
            return ["nchw"]
        return self.settings.layouts if worker.name in (FASTBN, FASTBN_UNFUSED) else None

    def _round(self, case: Case, entries: list[Entry], number: int) -> None:
        """Ask every entry for samples, in turns that begin one further on each time."""
        lengthy = case.operation == CALL or case.operation in PRODUCTS
        budget_ms = LONG_BUDGET_MS if lengthy else self.settings.budget_ms
        for turn in range(TURNS):
            start = (number * TURNS + turn) % max(len(entries), 1)
            for entry in entries[start:] + entries[:start]:
                answer = self._time(entry, case, budget_ms / TURNS)
                if answer is not None:
                    samples = self.samples[case, entry.worker.name, entry.variant]
                    samples.turns.append(Round(**answer["round"]))
                    samples.calls = answer["calls"]

    def _time(self, entry: Entry, case: Case, budget_ms: float) -> dict[str, Any] | None:
        """The least disturbed of some answers, or the first with undisturbed samples."""
        answers = []
        while len(answers) < ATTEMPTS:
            answer = self._ask(
                entry.worker, case, "time", variant=entry.variant, budget_ms=budget_ms
            )
            if answer is None:
                return None
            answers.append(answer)
            if Round(**answer["round"]).quiet:
                break
        return min(answers, key=lambda answer: answer["round"]["waited"])

    def _ask(self, worker: Worker, case: Case, do: str, **message: Any) -> dict[str, Any] | None:
        """The answer, or None where the process has died: it is out from now on."""
        if worker not in self.workers:
            return None
        try:
            return worker.request(do, **message)
        except ProcessEnded as end:
            self.workers.remove(worker)
            self._leave_out(worker.name, "", case, f"{end}; all that follows is left out too")
            return None

    def _leave_out(self, library: str, variant: str, case: Case, reason: str) -> None:
        """Note why there are no figures; one note for all shapes with the same reason."""
        note = library, variant, case.operation, case.dtype, reason
        shapes = self.left_out.setdefault(note, [])
        if shape_name(case) not in shapes:
            shapes.append(shape_name(case))

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
        require_fastbn(about)
        workers = [worker for worker in processes if "unavailable" not in about[worker.name]]
        yield Runner(settings, workers), about
        for worker in workers:
            if worker.idle_wall:
                about[worker.name]["busy_while_idle"] = worker.idle_cpu / worker.idle_wall


def measure(settings: Settings, cases: list[Case], progress: Any) -> dict[str, Any]:
    """Measure all cases with a number of threads."""
    with started(settings) as (runner, about):
        progress.total = (progress.total or 0) + settings.rounds * len(cases)

        def show(case: Case) -> None:
            progress.update()
            progress.set_postfix_str(describe(case, settings.threads))

        runner.measure(cases, show)
    return {
        "libraries": about,
        "results": runner.results(),
        "left_out": runner.notes(),
        "round_trips_ns": runner.round_trips_ns,
    }


def measure_calls() -> dict[str, Any]:
    """The cost of calls of the libraries that have layers, on one thread."""
    result: dict[str, Any] = {"libraries": {}, "calls": []}
    for name in LIBRARIES_WITH_LAYERS:
        setup = LIBRARIES[name]
        with Worker(name, setup, 1) as worker:
            about = {**worker.about(), "environment": dict(setup.environment)}
            result["libraries"][name] = about
            try:
                if "unavailable" not in about:
                    costs = worker.request("time_calls")["costs"]
                    result["calls"] += [{"library": name, **cost} for cost in costs]
            except ProcessEnded as end:
                about["unavailable"] = str(end)
    require_fastbn(result["libraries"])
    return result


def require_fastbn(about: dict[str, Any]) -> None:
    """End where fastbn is to be measured and there is none."""
    if "unavailable" in about.get(FASTBN, {}):
        raise SystemExit(f"no fastbn: {about[FASTBN]['unavailable']}")


def describe(case: Case, threads: int) -> str:
    what = "a call" if case.operation == CALL else case.operation
    return f"{what} {shape_name(case)} {case.dtype}, {threads} threads"
