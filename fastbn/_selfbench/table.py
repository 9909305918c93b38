"""The result of `python -m fastbn bench` as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

FLOOR, FASTBN, TORCH = "floor", "fastbn", "torch"
# Each with what it costs memory at least, which the floor does.
OPERATIONS = {
    "eval": "evaluation",
    "eval_inplace": "evaluation in place",
    "train": "training forward",
    "train_inplace": "training forward in place",
    "backward": "backward",
    "backward_inplace": "backward in place",
}
ITEMSIZE = 4  # of float32


def named(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    config, libraries = result["config"], result["libraries"]
    columns = [name for name in libraries if name != FLOOR]
    lines = [
        f"fastbn {config['version']}, {config['instruction_set']}, threads: {config['threads']} "
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
