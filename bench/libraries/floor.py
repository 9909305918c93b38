"""The floor: what memory alone takes for the reads and writes of an operation."""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np

from bench import library, machine, native
from bench.arrays import Array, new_array
from bench.cases import ACTIVATIONS, Case, Data
from bench.library import PreparedCall

# Below this size of x, one thread may be faster than starting others.
SMALL = 1 << 20
ROUND_TRIPS = 1000


class Library(library.Library):
    """What reads and writes as many arrays as an operation, and a change in place."""

    api = "floor.c: a copy, a sum of two arrays, a sum and a difference, a change in place"
    buffers = "preallocated"
    activations, groups = tuple(ACTIVATIONS), True

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        # A compiler would make the plain copy a call of memcpy, which is a variant of its own.
        self.c = native.load("floor.c", "-fno-tree-loop-distribute-patterns")
        self.c.round_trip_ns.argtypes = [ctypes.c_long]
        self.c.round_trip_ns.restype = ctypes.c_double
        # All variants share their arrays, which are there until others are asked for.
        self.arrays: list[Array] = []

    def versions(self) -> dict[str, str]:
        return {}

    def variants(self, case: Case) -> list[str]:
        kinds = [f"{case.floor}_{how}" for how in ("memcpy", "plain", "stream")]
        if case.in_place:
            kinds.append("inplace_plain")
        threads = {1, self.threads} if case.bytes <= SMALL else {self.threads}
        return [f"{kind}/{n}" for kind in kinds if hasattr(self.c, kind) for n in sorted(threads)]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        kind, threads = variant.split("/")
        count = case.bytes // 4
        if not self.arrays or self.arrays[0].size != count:
            self.arrays = [new_array((count,), np.float32) for _ in range(4)]
        arrays = self.arrays
        for array, value in zip(arrays, (5.0, 6.0, 1.0, 2.0), strict=True):
            array.fill(value)
        loop = getattr(self.c, kind)
        loop.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_size_t, ctypes.c_int, ctypes.c_long]
        loop.restype = None
        loop = partial(loop, *(array.ctypes.data for array in arrays), count, int(threads))
        return PreparedCall(partial(loop, 1), lambda _: check(kind, arrays), True, repeat=loop)

    def round_trip_ns(self) -> float:
        """How long a cache line takes from one CPU to another and back, the least of some means."""
        if min(self.threads, len(machine.available_cpus())) < 2:
            return 0.0  # two threads of one CPU wait for each other's time slices
        return min(self.c.round_trip_ns(ROUND_TRIPS) for _ in range(3))


def check(kind: str, arrays: list[Array]) -> dict[str, Array]:
    """There is no y or dx to return; see that one call has reached every element."""
    wanted = {"copy": (1.0, 6.0), "add": (3.0, 6.0), "pair": (3.0, -1.0), "inplace": (-5.0, 6.0)}
    results = zip(arrays, wanted[kind.split("_")[0]], strict=False)
    if not all((array == value).all() for array, value in results):
        raise ArithmeticError(f"{kind} is wrong")
    return {}
