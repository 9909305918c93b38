"""Samples of calls: how long they take, which of them count, and their median."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

from .machine import waited_s

# Makes so many calls.
Repeat = Callable[[int], object]

# A sample is the mean over so many calls that it takes at least this long.
SAMPLE_S = 1e-3
# Threads that share a CPU with another process wait for it in slices of milliseconds. A sample in
# which they waited for more than this fraction of its time tells nothing about the machine.
DISTURBED = 0.1
# A call this slow is not made an extra time to warm up.
SLOW_S = 0.1
# Libraries may do something else in the first calls: compile, or try what is faster. So many are
# not measured, or as many as take this long, unless something else is said.
FIRST_CALLS = 64
FIRST_CALLS_S = 0.2
# After another process, caches hold what that one has used: so many calls bring back what they can
# hold of the arrays, or as many as take this long, as larger arrays are not held.
WARMING_CALLS = 16
WARMING_S = 5e-3


def repeated(call: Callable[[], object]) -> Repeat:
    """A function that makes the call so many times.

    As in a loop over `y = f(x)`, a result is there until the next call has returned.
    """
    result = None

    def repeat(calls: int) -> None:
        nonlocal result
        for _ in range(calls):
            result = call()

    return repeat


class Sample(NamedTuple):
    """The seconds that the calls of a sample took, and for which threads waited for a CPU."""

    took: float
    waited: float

    @property
    def quiet(self) -> bool:
        """Whether other processes left it the CPUs."""
        return self.waited <= DISTURBED * self.took


# Measures so many calls.
Clock = Callable[[int], Sample]


def wall_clock(repeat: Repeat) -> Clock:
    """The time that passes during so many calls."""

    def clock(calls: int) -> Sample:
        waited, start = waited_s(), time.perf_counter()
        repeat(calls)
        took = time.perf_counter() - start
        return Sample(took, waited_s() - waited)

    return clock


class Round(NamedTuple):
    """The samples that a library was asked for at a time, as far as they count."""

    ms: list[float]  # of a call
    waited: float  # The fraction of their time for which threads waited for a CPU.

    @property
    def quiet(self) -> bool:
        """Whether other processes left the library the CPUs."""
        return self.waited <= DISTURBED


class Sampler:
    """Takes samples of a call, each over as many calls as take `sample_s`.

    `restore` puts back what a call in place has overwritten, before every sample.
    """

    def __init__(
        self,
        clock: Clock,
        sample_s: float = SAMPLE_S,
        restore: Callable[[], object] | None = None,
        first_calls_s: float = FIRST_CALLS_S,
    ) -> None:
        self.clock, self.restore, self.calls = clock, restore, 1
        end = time.perf_counter() + first_calls_s
        for _ in range(FIRST_CALLS):
            self.sample()
            if time.perf_counter() >= end:
                break
        # The shorter of two, as one may have had to wait.
        while (took := min(self.sample(), self.sample()).took) < sample_s:
            self.calls = max(2 * self.calls, int(self.calls * sample_s / max(took, 1e-9)))
        self.is_slow = took >= SLOW_S

    def sample(self) -> Sample:
        """Measure as many calls as a sample has."""
        if self.restore is not None:
            self.restore()
        return self.clock(self.calls)

    def warm_up(self) -> None:
        """Wake the threads, and bring back to the caches what others have put out of them."""
        if self.is_slow:
            return
        end = time.perf_counter() + WARMING_S
        for _ in range(math.ceil(WARMING_CALLS / self.calls)):
            self.sample()
            if time.perf_counter() >= end:
                break

    def samples_until(self, end: float) -> Round:
        """Take samples until `time.perf_counter` reaches the end, but one at least."""
        found: list[Sample] = []
        while not found or time.perf_counter() < end:
            found.append(self.sample())
        counted = [sample for sample in found if sample.quiet] or found
        waited = sum(sample.waited for sample in counted) / sum(sample.took for sample in counted)
        return Round([1e3 * sample.took / self.calls for sample in counted], waited)


def counted(rounds: Sequence[Round]) -> Sequence[Round]:
    """The quiet rounds, or all if none is quiet."""
    return [each for each in rounds if each.quiet] or rounds


def pooled_ms(rounds: Sequence[Round]) -> list[float]:
    """The samples of the rounds that count, in ascending order."""
    return sorted(chain(*(each.ms for each in counted(rounds))))


def median_ms(rounds: Sequence[Round]) -> float:
    """The median of the samples of the rounds that count."""
    return statistics.median(pooled_ms(rounds))
