"""What the benchmark asks of a library, and what a library tells about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from _selfbench.sampling import Repeat
from _selfbench.serving import Unsupported

from bench.arrays import Array
from bench.cases import Case, Data


@dataclass
class PreparedCall:
    """A case, ready to be called again and again.

    `result` takes what `call` returned and gives y, or dx with dweight and dbias, as NCHW arrays.
    """

    call: Callable[[], Any]
    result: Callable[[Any], Mapping[str, Array]]
    # Whether the result goes to memory that is there before the call.
    preallocated: bool
    # Puts back what a call in place has overwritten.
    restore: Callable[[], object] | None = None
    # So many calls without Python between them, for code that is C.
    repeat: Repeat | None = None
    # The nanoseconds of a call by another clock than this process's, such as a device's.
    sample_ns: Callable[[], float] | None = None
    # Which of several implementations it is.
    note: str = ""


class Library(ABC):
    """One library; its process imports it and nothing else."""

    # What is called, and where its results go.
    api: ClassVar[str]
    buffers: ClassVar[str]
    # The activations that it is measured with after the batch normalization.
    activations: ClassVar[tuple[str, ...]] = ()
    # Whether it is measured with a GroupNorm in place of the batch normalization.
    groups: ClassVar[bool] = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The versions of the library, and what else tells builds apart."""

    def variants(self, case: Case) -> list[str]:
        """The memory layouts in which it can do the case; raise Unsupported if in none."""
        return ["nchw"]

    @abstractmethod
    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        """Everything that happens once: buffers, compilation."""

    def release(self) -> None:
        """Forget what was prepared."""
        return

    def round_trip_ns(self) -> float:
        """How long a cache line takes from one CPU to another and back; the floor measures it."""
        raise Unsupported("round trips are not measured")

    def calls(self) -> Mapping[str, Mapping[str, Repeat]]:
        """Statements whose cost is asked for, by what is called and by operation (see calls.py)."""
        return {}


def require(condition: bool, reason: str) -> None:
    """Raise Unsupported for that reason unless the condition holds."""
    if not condition:
        raise Unsupported(reason)
