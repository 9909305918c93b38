"""The benchmark of `python -m fastbn bench`: where this machine stands against its memory.

The floor, fastbn and, if it is installed, torch run in a process each (`worker.py`), as each
brings threads of its own, and take turns. The repository has a larger benchmark, against more
libraries; this one is what an installed package needs.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastbn._config import show_config
from fastbn._threads import get_num_threads

Shape = tuple[int, int, int, int]

# From 50 MB, far beyond the caches, to half a megabyte.
SHAPES: Sequence[Shape] = (
    (32, 512, 28, 28),
    (32, 64, 56, 56),
    (32, 256, 14, 14),
    (1, 64, 112, 112),
    (128, 1000, 1, 1),
)
# Each with what it costs memory at least, which the floor does.
OPERATIONS = {
    "eval": "evaluation",
    "eval_inplace": "evaluation in place",
    "train": "training forward",
    "train_inplace": "training forward in place",
    "backward": "backward",
    "backward_inplace": "backward in place",
}
FLOOR, FASTBN, TORCH = "floor", "fastbn", "torch"
SECONDS = 100.0
ROUNDS = 3
# After a call the threads of OpenMP spin for some milliseconds, waiting for the next one.
PAUSE_S = 0.02
ITEMSIZE = 4  # of float32


class Answer(NamedTuple):
    """What a library took in a round."""

    ms: list[float]  # of calls; none if the library has no such operation
    quiet: bool  # whether other processes left it the CPUs


class Worker:
    """The process of one library: answers a line of JSON by a line of JSON."""

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        self.process = subprocess.Popen(
            # By its path: a part of the package would import fastbn, and its OpenMP, beside torch.
            [
                *(sys.executable, "-P", str(Path(__file__).with_name("worker.py"))),
                *(library, str(threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        started = self._answer()
        if "error" in started:
            self.process.communicate()
            raise RuntimeError(f"{library} does not start: {started['error']}")
        self.version: str = started["version"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, shape: Shape, operation: str, seconds: float) -> Answer:
        """Time an operation for so long."""
        time.sleep(PAUSE_S)
        with suppress(BrokenPipeError):  # It has ended, as will be seen.
            self.requests.write(json.dumps([shape, operation, seconds]) + "\n")
            self.requests.flush()
        return Answer(*self._answer())

    def _answer(self) -> Any:
        line = self.answers.readline()
        if not line:
            self.process.communicate()
            raise RuntimeError(f"the process of {self.library} has ended; see what it wrote above")
        return json.loads(line)


def measure(seconds: float) -> dict[str, Any]:
    """Medians of all operations on all shapes, in milliseconds, and how far they are from memory.

    Shows on standard error how far it is.
    """
    threads = get_num_threads()
    steps = [
        (shape, operation) for shape in SHAPES for _ in range(ROUNDS) for operation in OPERATIONS
    ]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, threads)) for name in (FLOOR, FASTBN)]
        if importlib.util.find_spec(TORCH):
            try:
                workers.append(stack.enter_context(Worker(TORCH, threads)))
            except RuntimeError as error:
                print(f"Measuring without {TORCH}: {error}", file=sys.stderr)
        versions = {worker.library: worker.version for worker in workers}
        answers: dict[tuple[Shape, str], dict[str, list[Answer]]] = {
            step: {name: [] for name in versions} for step in steps
        }
        budget = seconds / (len(steps) * len(workers))
        for step in progress(steps):
            for worker in workers:
                answers[step][worker.library].append(worker.ask(*step, budget))
    results = [
        {"shape": shape, "operation": operation, **figures(of)}
        for (shape, operation), of in answers.items()
    ]
    return {
        "config": show_config("dicts"),
        "cpu": cpu(),
        "libraries": versions,
        "results": results,
        "over_floor": over_floor(results),
        "copy_gb_per_s": copy_speed(results),
    }


def progress(steps: list[tuple[Shape, str]]) -> Iterator[tuple[Shape, str]]:
    """The steps, with a bar on standard error if there is tqdm, or else lines."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, (shape, operation) in enumerate(steps, 1):
            print(f"{number}/{len(steps)} {named(shape)} {operation}", file=sys.stderr, flush=True)
            yield shape, operation
    else:
        with tqdm(steps, unit="step") as bar:
            for shape, operation in bar:
                bar.set_postfix_str(f"{named(shape)} {operation}")
                yield shape, operation


def figures(answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """The median of each library over its quiet rounds, and which libraries had none."""
    ms, disturbed = {}, []
    for name, rounds in answers.items():
        quiet = [answer for answer in rounds if answer.quiet]
        if not quiet:
            disturbed.append(name)
        if rounds[0].ms:
            ms[name] = statistics.median(chain(*(answer.ms for answer in quiet or rounds)))
    return {"ms": ms, "disturbed": disturbed}


def over_floor(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each operation and library the geometric mean of its times over those of the floor.

    Of undisturbed times, over the shapes that have them.
    """
    ratios: dict[str, dict[str, list[float]]] = {operation: {} for operation in OPERATIONS}
    for result in results:
        ms, of_operation = result["ms"], ratios[result["operation"]]
        for name in ms:
            if name != FLOOR and not {name, FLOOR} & {*result["disturbed"]}:
                of_operation.setdefault(name, []).append(ms[name] / ms[FLOOR])
    return {
        operation: {name: statistics.geometric_mean(found) for name, found in by_library.items()}
        for operation, by_library in ratios.items()
    }


def copy_speed(results: list[dict[str, Any]]) -> float:
    """What a copy of the largest array reads and writes, in GB a second."""
    copies = [result for result in results if result["operation"] == "eval"]
    largest = max(copies, key=lambda result: math.prod(result["shape"]))
    moved = 2 * ITEMSIZE * math.prod(largest["shape"])
    return moved / largest["ms"][FLOOR] / 1e6  # type: ignore[no-any-return]


def cpu() -> str:
    """The name of the processor, as far as the system tells."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def named(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    config, libraries = result["config"], result["libraries"]
    columns = [name for name in libraries if name != FLOOR]
    lines = [
        f"fastbn {config['version']}, {config['instruction_set']}, {config['threads']} threads "
        f"({config['threads_reason']})",
        f"{result['cpu']}; a copy reads and writes {result['copy_gb_per_s']:.0f} GB/s",
        "",
        "Milliseconds, float32, NCHW, and in brackets how many times those of the floor, which is",
        "what NumPy takes in as many threads: for a copy, for backwards a sum of two arrays, in",
        f"place a change of sign (NumPy {libraries[FLOOR]}).",
    ]
    if any(row["disturbed"] for row in result["results"]):
        lines.append("* Other processes kept the CPUs busy: the figure is too high.")
    if TORCH in libraries:
        lines.append(f"torch {libraries[TORCH]} allocates its outputs, the others have theirs.")
    title = f"{'':27}{FLOOR:>9}" + "".join(f"{name:>9}{'':11}" for name in columns)
    shape = None
    for row in result["results"]:
        if row["shape"] != shape:
            shape = row["shape"]
            megabytes = ITEMSIZE * math.prod(shape) / 1e6
            lines += ["", f"{named(shape)}, {megabytes:.1f} MB", title.rstrip()]
        lines.append(table_row(row, columns))
    lines += ["", "Geometric means of times over the floor", title.replace(FLOOR, " " * 5).rstrip()]
    for operation, means in result["over_floor"].items():
        cells = (f"{means[name]:9.2f}" if name in means else f"{'-':>9}" for name in columns)
        lines.append(f"  {OPERATIONS[operation]:25}{'':9}{(' ' * 11).join(cells)}")
    return "\n".join(lines)


def table_row(row: dict[str, Any], columns: list[str]) -> str:
    """The times of an operation, and in brackets how many times that of the floor."""
    ms = row["ms"]
    marks = {name: "*" if name in row["disturbed"] else "" for name in ms}
    cells = [f"{f'{ms[FLOOR]:.3f}{marks[FLOOR]}':>9}"]
    for name in columns:
        if name in ms:
            cells.append(f"{ms[name]:9.3f} {f'({ms[name] / ms[FLOOR]:.2f}){marks[name]}':10}")
    return f"  {OPERATIONS[row['operation']]:25}{''.join(cells)}".rstrip()
