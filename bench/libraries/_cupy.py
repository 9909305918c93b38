"""CuPy arrays of the cases, and times of what runs on CuPy's stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy

from bench.arrays import Array
from bench.libraries._device import OnDevice, calls_of, sampler


def on_device(array: Array, layout: str = "nchw") -> Any:
    """A copy of an NCHW array on the device, with the strides of the layout."""
    array = cupy.asarray(array)
    if layout == "nhwc":
        return cupy.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return array


def looked_at(names: tuple[str, ...], arrays: tuple[Any, ...]) -> dict[str, Any]:
    """Results by their names, which stay on the device until they are looked at."""
    return dict(zip(names, (OnDevice(array, cupy.asnumpy) for array in arrays), strict=True))


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The clock of a call: a graph of many, replayed between two events."""
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()  # What the graph writes to must be nobody else's.
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def elapsed_ms(work: Callable[[], object]) -> float:
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end))

    # What prepares the arrays runs on another stream, for which this one does not wait.
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        call()
        calls = calls_of(elapsed_ms(call))
        stream.begin_capture()
        for _ in range(calls):
            call()
        graph = stream.end_capture()
        stream.synchronize()
    clock = sampler(partial(elapsed_ms, partial(graph.launch, stream)), calls)
    clock.pool = pool  # type: ignore[attr-defined]  # which lives as long as the graph
    return clock


def release() -> None:
    """Give the memory of a case back to the device."""
    cupy.cuda.Device().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()
