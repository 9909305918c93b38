"""The measured times, looked up by what is asked of them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.cases import Case
from bench.libraries import (
    FASTBN,
    FASTBN_ONE_THREAD,
    FASTBN_UNFUSED,
    FLOOR,
    OWN,
    TORCH,
    TORCH_MALLOC,
)


class Key(NamedTuple):
    """A case with a number of threads."""

    threads: int
    case: Case


class Time(NamedTuple):
    """The milliseconds of a call, and whose they are."""

    ms: float
    library: str
    variant: str
    preallocated: bool

    @property
    def name(self) -> str:
        """Library and layout; a star for one that allocates its output."""
        return f"{self.library} {self.variant}{'' if self.preallocated else '*'}"


class Figures:
    """All times of a result."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.device: str = result["settings"].get("device", "cpu")
        self.times: dict[Key, list[Time]] = defaultdict(list)
        self.minima: dict[tuple[Key, str], float] = {}
        for record in result["results"]:
            key = key_of(record)
            who = record["library"], record["variant"], record["preallocated"]
            self.times[key].append(Time(record["median_ms"], *who))
            least = self.minima.get((key, record["library"]), math.inf)
            self.minima[key, record["library"]] = min(least, record["min_ms"])

    def keys(self, **wanted: Any) -> list[Key]:
        """What was measured, with given operation, dtype or threads, in the order of measuring."""
        return [
            key
            for key in self.times
            if all({**key.case._asdict(), **key._asdict()}[k] == v for k, v in wanted.items())
        ]

    def values(self, name: str) -> list[Any]:
        """The threads, dtypes or operations that there are, each once."""
        return list(dict.fromkeys({**k.case._asdict(), **k._asdict()}[name] for k in self.times))

    def best(
        self, key: Key, libraries: Iterable[str], variants: Iterable[str] | None = None
    ) -> Time | None:
        """The fastest of some libraries, in any variant or in some."""
        libraries = tuple(libraries)
        fitting = [
            time
            for time in self.times.get(key, ())
            if time.library in libraries and (variants is None or time.variant in variants)
        ]
        return min(fitting, default=None)

    def fastbn(self, key: Key, layout: str) -> Time | None:
        return self.best(key, [FASTBN], [layout])

    def one_thread(self, key: Key, layout: str) -> Time | None:
        """fastbn on one thread: beside the others, or measured by itself."""
        alone = self.best(key._replace(threads=1), [FASTBN], [layout])
        return self.best(key, [FASTBN_ONE_THREAD], [layout]) or alone

    def unfused(self, key: Key, layout: str) -> Time | None:
        """fastbn's batch normalization, and NumPy's addition and maximum after it."""
        return self.best(key, [FASTBN_UNFUSED], [layout])

    def floor(self, key: Key) -> Time | None:
        """The better kind of stores, of what reads and writes as many arrays."""
        return self._floor(key, key.case.floor)

    def floor_streams(self, key: Key) -> bool:
        """Tell whether a copy by streaming stores is faster than one by ordinary stores."""
        over_plain = ratio(self._floor(key, "copy_stream"), self._floor(key, "copy_plain"))
        return over_plain is not None and over_plain < 1.0

    def floor_in_place(self, key: Key) -> Time | None:
        return self._floor(key, "inplace")

    def _floor(self, key: Key, kind: str) -> Time | None:
        variants = [t.variant for t in self.times.get(key, ()) if t.variant.startswith(kind)]
        return self.best(key, [FLOOR], variants)

    def peer(self, key: Key) -> Time | None:
        """The fastest peer, in its best layout."""
        return self.best(key, {time.library for time in self.times.get(key, ())} - {*OWN})

    def torch(self, key: Key, layouts: Iterable[str] | None = None) -> Time | None:
        """torch eager, with the allocator that suits it better."""
        return self.best(key, [TORCH, TORCH_MALLOC], layouts)


def key_of(record: dict[str, Any]) -> Key:
    case = Case(record["operation"], tuple(record["shape"]), record["dtype"])
    return Key(record["threads"], case)


def ratio(one: Time | None, other: Time | None) -> float | None:
    """How many times as long the one takes; None where one of them is not there."""
    return one.ms / other.ms if one is not None and other is not None else None


def with_operation(key: Key, operation: str) -> Key:
    """The same case with another operation."""
    return key._replace(case=key.case._replace(operation=operation))


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def shape_name(case: Case) -> str:
    return "x".join(map(str, case.shape))
