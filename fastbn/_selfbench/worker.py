"""The process of one library, which the benchmark starts by its path: no part of the package.

Its arguments are the library's name and the number of threads. It writes the library's version, or
why it does not start, and then answers [shape, operation, seconds] by the milliseconds of calls,
and whether other processes left it the CPUs meanwhile. Both ways a message is a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# What does an operation so many times.
Repeat = Callable[[int], object]

# A sample is the mean over so many calls that it takes at least this long.
SAMPLE_S = 1e-3
# Threads that share a CPU with another process wait for it in slices of milliseconds. A sample in
# which they waited for more than this share of its time tells nothing about the machine.
DISTURBED = 0.1


class Arrays(NamedTuple):
    """What an operation reads and writes. Repeats in place keep the values as large as they are."""

    x: Array
    dy: Array
    out: Array


@cache
def block(seed: int) -> Array:
    """Normally distributed values, of which larger arrays are repetitions."""
    return np.random.default_rng(seed).standard_normal(1_000_003).astype(np.float32)


def arrays_of(shape: tuple[int, ...]) -> Arrays:
    """New arrays of a shape."""
    return Arrays(
        np.resize(block(0), shape), np.resize(block(1), shape), np.ones(shape, np.float32)
    )


def repeated(call: Callable[[], object]) -> Repeat:
    """A function that makes the call so many times."""

    def repeat(calls: int) -> None:
        for _ in range(calls):
            call()

    return repeat


class Floor:
    """What memory takes: a copy, for backwards a sum of two arrays, in place a change of sign.

    By NumPy, each thread on a part of its own, as often as asked, without waiting for the others.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self.version = np.__version__

    def prepare(self, operation: str, arrays: Arrays) -> Repeat:
        parts = [
            repeated(self.call(operation, *part))
            for part in zip(
                *(np.array_split(array.reshape(-1), self.threads) for array in arrays), strict=True
            )
        ]
        return lambda calls: list(self.pool.map(lambda part: part(calls), parts))

    def call(self, operation: str, x: Array, dy: Array, out: Array) -> Callable[[], object]:
        if operation == "backward":
            return partial(np.add, x, dy, out=out)
        if operation == "backward_inplace":
            return partial(np.subtract, x, dy, out=dy)
        if operation.endswith("_inplace"):
            return partial(np.negative, x, out=x)
        return partial(np.copyto, out, x)


class FastBN:
    """fastbn, with memory for its results."""

    def __init__(self, threads: int) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1]))  # the package that is asked
        import fastbn

        if threads != fastbn.get_num_threads():
            fastbn.set_num_threads(threads)
        self.fastbn = fastbn
        self.version = fastbn.__version__

    def prepare(self, operation: str, arrays: Arrays) -> Repeat:
        x, dy, out = arrays
        layer = self.fastbn.BatchNorm2d(x.shape[1])
        if operation.startswith("backward"):
            functional = self.fastbn.functional
            _, mean, invstd = functional.batch_norm_forward(x)
            target = dy if operation == "backward_inplace" else out
            backward = functional.batch_norm_backward
            return repeated(partial(backward, dy, x, layer.weight, mean, invstd, out=target))
        layer.train(operation.startswith("train"))
        return repeated(partial(layer, x, out=x if operation.endswith("_inplace") else out))


class Torch:
    """torch, eager; it takes no memory for its results, and does nothing in place."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch: Any = torch
        self.version = torch.__version__

    def prepare(self, operation: str, arrays: Arrays) -> Repeat | None:
        if operation.endswith("_inplace"):
            return None
        torch = self.torch
        x, dy = torch.from_numpy(arrays.x), torch.from_numpy(arrays.dy)
        module = torch.nn.BatchNorm2d(x.shape[1]).train(operation != "eval")
        if operation == "eval":
            return repeated(torch.inference_mode()(partial(module, x)))
        if operation == "train":
            return repeated(partial(module, x))
        y = module(x.requires_grad_())
        wanted = [x, module.weight, module.bias]
        return repeated(partial(torch.autograd.grad, y, wanted, dy, retain_graph=True))


LIBRARIES: dict[str, Callable[[int], Floor | FastBN | Torch]] = {
    "floor": Floor,
    "fastbn": FastBN,
    "torch": Torch,
}


def samples(repeat: Repeat, seconds: float) -> tuple[list[float], bool]:
    """The milliseconds of a call, measured again and again, for about so many seconds.

    Those of quiet samples if there are any, and whether there are.
    """
    start = time.perf_counter()
    repeat(1)  # wakes the threads and fetches the memory
    calls = 1
    # Of two, as one may have had to wait.
    while (took := min(found := [timed(repeat, calls), timed(repeat, calls)])[0]) < SAMPLE_S:
        calls = max(2 * calls, int(calls * SAMPLE_S / max(took, 1e-9)))
    while time.perf_counter() - start < seconds:
        found.append(timed(repeat, calls))
    quiet = [took for took, waited in found if waited <= DISTURBED * took]
    counted = quiet or [took for took, _ in found]
    return [1e3 * took / calls for took in counted], bool(quiet)


def timed(repeat: Repeat, calls: int) -> tuple[float, float]:
    """The seconds of so many calls, and those for which threads waited for a CPU."""
    waited, start = waited_s(), time.perf_counter()
    repeat(calls)
    took = time.perf_counter() - start
    return took, waited_s() - waited


def waited_s() -> float:
    """How long the threads of this process have been ready to run while others had the CPUs."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # It has ended.
            total += int(path.read_text().split()[1])
    return total / 1e9


def serve(name: str, threads: int) -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints is no answer.

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    start = LIBRARIES[name]
    try:
        library = start(threads)
    except Exception as error:  # Whatever a broken installation raises.
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        return
    gc.disable()
    answer({"version": library.version})
    arrays = arrays_of((0, 1, 1, 1))
    for line in sys.stdin:
        shape, operation, seconds = json.loads(line)
        if arrays.x.shape != tuple(shape):
            del arrays
            arrays = arrays_of(tuple(shape))
        repeat = library.prepare(operation, arrays)
        answer(([], True) if repeat is None else samples(repeat, seconds))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
