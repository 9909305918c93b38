"""What `python -m fastbn bench` asks of the floor, fastbn and torch, in a process each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sampling import FIRST_CALLS_S, Repeat, Round, Sampler, repeated, wall_clock

Array = NDArray[np.float32]


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


class Floor:
    """What memory takes: a copy, for backwards a sum of two arrays, in place a change of sign.

    By NumPy, each thread on a piece of its own, as often as asked, without waiting for the others.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self.version = np.__version__

    def prepare(self, operation: str, arrays: Arrays) -> Repeat:
        pieces = [
            repeated(self.call(operation, *piece))
            for piece in zip(
                *(np.array_split(array.reshape(-1), self.threads) for array in arrays), strict=True
            )
        ]
        return lambda calls: list(self.pool.map(lambda piece: piece(calls), pieces))

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
        sys.path.insert(0, str(Path(__file__).parents[2]))  # the package that is asked
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


class Server:
    """Answers for one of the libraries."""

    def __init__(self, library: Floor | FastBN | Torch) -> None:
        self.library = library
        self.arrays = arrays_of((0, 1, 1, 1))

    def about(self) -> dict[str, Any]:
        return {"version": self.library.version}

    def time(self, shape: list[int], operation: str, seconds: float) -> dict[str, Any]:
        """Time an operation for so long; no samples if the library has no such operation."""
        if self.arrays.x.shape != tuple(shape):
            del self.arrays  # so that its memory is free before new arrays are made
            self.arrays = arrays_of(tuple(shape))
        repeat = self.library.prepare(operation, self.arrays)
        if repeat is None:
            return Round([], 0.0)._asdict()
        end = time.perf_counter() + seconds
        sampler = Sampler(wall_clock(repeat), first_calls_s=min(FIRST_CALLS_S, seconds / 2))
        return sampler.samples_until(end)._asdict()


def start(library: str, threads: int) -> Server:
    """Start a library in this process."""
    return Server(LIBRARIES[library](threads))
