"""The cost of a call where arrays are too small to matter, in multiples of `np.add`.

Statements are timed, as by `timeit`, on one thread. Every round times each of them and `np.add`,
and a figure is the median of the rounds' ratios, so that what slows the machine for a while slows
both. Rounds in which another process had the CPU do not count. The backward is a training forward
with it, less the forward alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from timeit import Timer
from typing import Any, NamedTuple

import numpy as np
from _selfbench.sampling import Repeat, Sampler, wall_clock

SHAPE = (2, 64, 2, 2)
ROUNDS = 400
# A statement is repeated for so long in every round.
SAMPLE_S = 3e-4
OPERATIONS = ("eval", "train", "train_inplace", "backward")
# A training forward with its backward.
STEP = "step"
ADD = "np.add(a, b, out=c)"


class Timed(NamedTuple):
    """What a statement took in a round."""

    seconds: float
    quiet: bool  # whether another process left it the CPU


# By what is called, and by operation.
Times = dict[tuple[str, str], Timed]


def statement(code: str, names: Mapping[str, Any]) -> Repeat:
    """What executes a statement about some names so many times."""
    return Timer(code, globals=dict(names)).timeit


def arrays(*names: str) -> dict[str, Any]:
    """New arrays of the shape, by names."""
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(SHAPE).astype(np.float32) for name in names}


def costs(calls: Mapping[str, Mapping[str, Repeat]]) -> dict[str, Any]:
    """Nanoseconds, and multiples of np.add, by what is called and by operation."""
    repeats = {(ADD, ""): statement(ADD, {"np": np, **arrays("a", "b", "c")})}
    for call, statements in calls.items():
        repeats |= {(call, operation): repeat for operation, repeat in statements.items()}
    samplers = {key: Sampler(wall_clock(repeat), SAMPLE_S) for key, repeat in repeats.items()}
    rounds = [
        with_backwards({key: timed(sampler) for key, sampler in samplers.items()})
        for _ in range(ROUNDS)
    ]
    return {"costs": [cost(key, rounds) for key in rounds[0]]}


def timed(sampler: Sampler) -> Timed:
    sample = sampler.sample()
    return Timed(sample.took / sampler.calls, sample.quiet)


def with_backwards(times: Times) -> Times:
    """The times of a round, with backwards instead of steps."""
    result = {}
    for (call, operation), took in times.items():
        if operation == STEP:
            forward = times[call, "train"]
            seconds, quiet = took.seconds - forward.seconds, took.quiet and forward.quiet
            result[call, "backward"] = Timed(seconds, quiet)
        else:
            result[call, operation] = took
    return result


def cost(key: tuple[str, str], rounds: list[Times]) -> dict[str, Any]:
    """The medians over the rounds."""
    pairs = [(times[key], times[ADD, ""]) for times in rounds]
    counted = [(own, add) for own, add in pairs if own.quiet and add.quiet] or pairs
    ns = 1e9 * statistics.median(own.seconds for own, _ in counted)
    multiple = statistics.median(own.seconds / add.seconds for own, add in counted)
    call, operation = key
    return {
        "call": call,
        "operation": operation,
        "ns": float(f"{ns:.4g}"),
        "times_add": float(f"{multiple:.4g}"),
        "rounds": len(counted),
    }
