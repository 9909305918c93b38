"""The process of one library: answers the runner's requests.

- `prepare` a case in some layouts, or in every one that the library knows;
- `time` a layout of it;
- `release` what was prepared;
- `time_calls`, which need nothing prepared;
- `round_trip`: how far the CPUs are from each other.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from _selfbench.sampling import SAMPLE_S, Clock, Sample, Sampler, repeated, wall_clock
from _selfbench.serving import reason

from bench import calls
from bench.cases import GROUPS, PRODUCTS, Case, Data, check
from bench.library import Library, PreparedCall, require

# Where repeated calls in place let the values grow or shrink, down to subnormal numbers, which are
# slow, the input is restored before every sample, and these are short.
SAMPLE_RUNNING_AWAY_S = 1e-4


def sampler_of(prepared: PreparedCall, case: Case) -> Sampler:
    """What takes samples of a case, by the clock that it needs."""
    if case.operation in PRODUCTS:
        matrix = np.ones((PRODUCTS[case.operation],) * 2, np.float32)
        return Sampler(timed(prepared.call), 0.0, partial(np.matmul, matrix, matrix))
    if prepared.sample_ns is not None:
        sample_ns = prepared.sample_ns
        return Sampler(lambda calls: Sample(calls * sample_ns() * 1e-9, 0.0), sample_s=0.0)
    clock = wall_clock(prepared.repeat or repeated(prepared.call))
    if case.runs_away and prepared.restore is not None:
        return Sampler(clock, SAMPLE_RUNNING_AWAY_S, prepared.restore)
    return Sampler(clock, SAMPLE_S)


def timed(call: Callable[[], object]) -> Clock:
    """The time of a call whose threads may wait for others of its process, which counts."""

    def clock(_: int) -> Sample:
        start = time.perf_counter()
        call()
        return Sample(time.perf_counter() - start, 0.0)

    return clock


class Worker:
    """Answers requests about one library."""

    def __init__(self, library: Library) -> None:
        self.library = library
        # Both, as the memory that a call writes to may be owned by what tells its result.
        self.prepared: dict[str, tuple[PreparedCall, Sampler]] = {}
        self.data: Data | None = None

    def about(self) -> dict[str, Any]:
        """What is measured."""
        library = self.library
        return {"versions": library.versions(), "api": library.api, "buffers": library.buffers}

    def prepare(
        self, operation: str, shape: list[int], dtype: str, variants: list[str] | None
    ) -> dict[str, Any]:
        """Prepare a case; tell about each layout what came of it, or why nothing did."""
        case = Case(operation, tuple(shape), dtype)
        if self.data is None or not case.has_data_of(self.data.case):
            self.data = None  # so that its memory is free before new data is made
            self.data = Data(case)
        answer: dict[str, Any] = {"prepared": {}, "failed": {}}
        try:
            measured = case.activation in (None, *self.library.activations)
            require(measured, f"not measured with {case.activation}")
            require(self.library.groups or not case.grouped, "not measured with a GroupNorm")
            require(
                not case.grouped or case.shape[1] % GROUPS == 0,
                f"{GROUPS} groups do not divide the channels",
            )
            known = self.library.variants(case)
        except Exception as error:
            return {"prepared": {}, "failed": {"": reason(error)}}
        for variant in known if variants is None else [v for v in known if v in variants]:
            try:
                prepared = self.library.prepare(case, variant, self.data)
                if prepared.restore is not None:
                    prepared.restore()
                check(case, self.data, prepared.result(prepared.call()))
                self.prepared[variant] = prepared, sampler_of(prepared, case)
            except Exception as error:  # Whatever it is, the others go on.
                answer["failed"][variant] = reason(error)
            else:
                about = {"preallocated": prepared.preallocated, "note": prepared.note}
                answer["prepared"][variant] = about
        return answer

    def time(self, variant: str, budget_ms: float) -> dict[str, Any]:
        """A round of samples, and how many calls each of them is the mean of."""
        _, sampler = self.prepared[variant]
        sampler.warm_up()
        found = sampler.samples_until(time.perf_counter() + budget_ms / 1e3)
        return {"round": found._asdict(), "calls": sampler.calls}

    def time_calls(self) -> dict[str, Any]:
        """The cost of the library's calls."""
        return calls.costs(self.library.calls())

    def round_trip(self) -> dict[str, float]:
        """How far the CPUs are from each other, which the floor's library tells."""
        return {"ns": self.library.round_trip_ns()}

    def release(self, keep_data: bool) -> dict[str, Any]:
        """Forget what was prepared, and the data too unless it is kept."""
        self.prepared.clear()
        self.library.release()
        if not keep_data:
            self.data = None
        gc.collect()
        return {}


def start(module: str, threads: int, cpus: list[int]) -> Worker:
    """Import the library, on the CPUs that it may use."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    warnings.simplefilter("ignore")
    return Worker(importlib.import_module(f"bench.libraries.{module}").Library(threads))
