"""What the libraries on a GPU share: times by events, and results that stay on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.arrays import Array

# A graph holds as many calls as take so long, up to a limit; a sample is a median of replays.
GRAPH_MS, CALLS_MAX, REPLAYS = 1.0, 50, 5


class OnDevice:
    """An array that is copied to the host where it is looked at."""

    def __init__(self, array: Any, to_host: Callable[[Any], Array]) -> None:
        self.array, self.to_host, self.ndim = array, to_host, array.ndim

    def __getitem__(self, index: Any) -> Array:
        return self.to_host(self.array[index])


def calls_of(once_ms: float) -> int:
    """How many calls a graph should hold."""
    return max(2, min(CALLS_MAX, int(GRAPH_MS / max(once_ms, 1e-3))))


def sampler(replay_ms: Callable[[], float], calls: int) -> Callable[[], float]:
    """Nanoseconds of a call, from the milliseconds that a graph of so many takes on the device."""

    def sample() -> float:
        return statistics.median(replay_ms() for _ in range(REPLAYS)) / calls * 1e6

    return sample
