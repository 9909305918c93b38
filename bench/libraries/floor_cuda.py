"""The floor on a GPU: what its memory alone takes for the reads and writes of an operation."""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy
import numpy as np

from bench import library
from bench.cases import Case, Data
from bench.libraries import _cupy
from bench.library import PreparedCall


class Library(library.Library):
    """A copy (forward), and a sum of two arrays (backward)."""

    api = "a device-to-device memcpy and a copying kernel; a float32 sum of two arrays"
    buffers = "preallocated"

    def versions(self) -> dict[str, str]:
        return {}

    def variants(self, case: Case) -> list[str]:
        if case.step:
            return ["copy and add"]
        return ["copy_memcpy", "copy_kernel"] if case.forward else ["add_kernel"]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        # Other dtypes would take no less time for the same bytes, and some kernels more.
        x, dy = (cupy.full(case.bytes // 4, value, np.float32) for value in (1.0, 2.0))
        out = cupy.zeros_like(x)
        call = {
            "copy_memcpy": partial(out.data.copy_from_device_async, x.data, x.nbytes),
            "copy_kernel": partial(cupy.positive, x, out=out),
            "add_kernel": partial(cupy.add, x, dy, out=out),
            "copy and add": partial(copy_and_add, x, dy, cupy.zeros_like(x), out),
        }[variant]
        wanted = 3.0 if case.step or not case.forward else 1.0
        return PreparedCall(call, lambda _: check(out, wanted), True, sample_ns=_cupy.timed(call))

    def release(self) -> None:
        _cupy.release()


def copy_and_add(x: Any, dy: Any, y: Any, dx: Any) -> None:
    cupy.positive(x, out=y)
    cupy.add(x, dy, out=dx)


def check(out: Any, wanted: float) -> dict[str, Any]:
    """There is no y or dx to return; see that one call has reached every element."""
    if not (out == wanted).all():
        raise ArithmeticError("the floor is wrong")
    return {}
