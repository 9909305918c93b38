"""The pictures of a result: times over the floor of memory, or GB/s; peers over fastbn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from bench.cases import ACTIVATED, OPERATIONS
from bench.figures import Figures, Key, Time, ratio, shape_name
from bench.goals import limit_over_floor
from bench.libraries import FASTBN, FLOOR, OWN, libraries_on

PANELS = ("eval", "train", "backward")
# The bars of the peers end here, with their figure beside them: one slow peer would flatten all.
LONGEST_BAR = 5.0
MARKERS = "osD^v<>Pp*hX"
FORMATS = ("svg",)


def draw(result: dict[str, Any], figures: Figures, path: Path, sizes: bool) -> list[Path]:
    """A picture for each dtype and number of threads that has floors; the files written."""
    plt.rcParams.update({"svg.hashsalt": "bench", "font.size": 9})
    written = []
    many = len(figures.values("threads")) * len(figures.values("dtype")) > 1
    for threads in figures.values("threads"):
        for dtype in figures.values("dtype"):
            chosen = [
                key for key in figures.keys(threads=threads, dtype=dtype) if figures.floor(key)
            ]
            panels = ACTIVATED if any(key.case.activated for key in chosen) else PANELS
            operations = [op for op in panels if any(k.case.operation == op for k in chosen)]
            if not operations:
                continue
            machine = result["machine"]
            where = machine.get("gpu") or f"{machine['cpu']}, {threads} threads"
            title = f"{where}, {dtype}"
            suffix = f"-{dtype}-{threads}" if many else ""
            written += _save(_figure(figures, chosen, operations, title, sizes), path, suffix)
    return written


def draw_peers(means: dict[str, dict[str, float]], path: Path) -> Path:
    """A bar for each peer and operation: how many times as long as fastbn it takes, in the mean."""
    plt.rcParams.update({"svg.hashsalt": "bench", "font.size": 9})
    operations = [op for op in PANELS if any(op in times for times in means.values())]
    figure, panels = plt.subplots(
        1, len(operations), figsize=(9.5, 2.8), squeeze=False, layout="constrained"
    )
    for panel, operation in zip(panels[0], operations, strict=True):
        _bars(
            panel, {name: times[operation] for name, times in means.items() if operation in times}
        )
        panel.set_title(OPERATIONS[operation], loc="left", size="medium", weight="bold")
    note = f"time / fastbn (bars end at {LONGEST_BAR:g}): right of the line, fastbn is faster"
    figure.supxlabel(note, size="medium")
    with plt.rc_context({"svg.fonttype": "none"}):  # half the size
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path


def _bars(panel: Axes, means: dict[str, float]) -> None:
    """The libraries of an operation from the fastest down, fastbn in black among them."""
    times = sorted({FASTBN: 1.0, **means}.items(), key=lambda item: item[1])
    names = [name for name, _ in times]
    lengths = [min(time, LONGEST_BAR) for _, time in times]
    colors = ["black" if name == FASTBN else "C0" for name in names]
    bars = panel.barh(names, lengths, color=colors, height=0.7)
    panel.bar_label(bars, [f"{time:.2f}" for _, time in times], padding=2, size="small")
    panel.axvline(1.0, color="0.3", lw=1)
    panel.set_xlim(0, LONGEST_BAR * 1.15)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: plt.Figure, path: Path, suffix: str) -> list[Path]:
    paths = [path.with_name(f"{path.stem}{suffix}.{kind}") for kind in FORMATS]
    for target in paths:
        metadata = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(target, bbox_inches="tight", dpi=130, metadata=metadata)
    plt.close(figure)
    return paths


def _figure(
    figures: Figures, keys: list[Key], operations: list[str], title: str, sizes: bool
) -> plt.Figure:
    figure, panels = plt.subplots(
        len(operations),
        1,
        figsize=(9.5, 0.6 + 3.1 * len(operations)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, operation in zip(panels[:, 0], operations, strict=True):
        own = [key for key in keys if key.case.operation == operation]
        _panel(panel, figures, own, operation, sizes)
    bottom = panels[-1, 0]
    if sizes:
        bottom.set_xscale("log", base=2)
        bottom.set_xlabel("bytes of x")
    else:
        names = [shape_name(key.case) for key in own]
        bottom.set_xticks(range(len(names)), names, rotation=45, ha="right")
    figure.suptitle(title)
    panels[0, 0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def _panel(panel: Axes, figures: Figures, keys: list[Key], operation: str, sizes: bool) -> None:
    """An operation: a line for fastbn, marks for the peers."""
    xs = [key.case.bytes if sizes else index for index, key in enumerate(keys)]
    for index, (label, times, style) in enumerate(_series(figures, keys, sizes)):
        points = [
            (x, _speed(key, time) if sizes else ratio(time, figures.floor(key)))
            for x, key, time in zip(xs, keys, times, strict=True)
            if time is not None
        ]
        if points:
            color = f"C{index % 10}" if "color" not in style else style["color"]
            panel.plot(*zip(*points, strict=True), label=label, **{**style, "color": color})
    if not sizes:
        panel.axhline(1.0, color="0.3", lw=1)
        if (limit := limit_over_floor(operation, figures.device)) is not None:
            panel.axhline(limit, color="0.3", lw=1, ls=":")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("GB/s" if sizes else "time / floor")
    panel.grid(axis="both", color="0.9", lw=0.6)
    panel.set_title(OPERATIONS[operation], loc="left", size="medium", weight="bold")


def _speed(key: Key, time: Time) -> float:
    """GB/s of what an operation reads and writes at least, which is what the floor does."""
    return key.case.streams * key.case.bytes / time.ms / 1e6


def _series(
    figures: Figures, keys: list[Key], sizes: bool
) -> list[tuple[str, list[Time | None], dict[str, Any]]]:
    """Label, times and style of each library: fastbn's two layouts, then each peer's best one.

    Lines join what can be joined: a library over sizes, or fastbn, that it be seen among the marks.
    """
    line = {"color": "black", "marker": "o", "ms": 5, "lw": 1.8, "zorder": 3}
    series = []
    for layout, label, style in (
        ("nchw", FASTBN, line),
        ("nhwc", f"{FASTBN} channels-last", {**line, "mfc": "white", "lw": 1, "ls": "--"}),
    ):
        series.append((label, [figures.fastbn(key, layout) for key in keys], style))
    if sizes:
        floor = {"color": "0.5", "lw": 4, "alpha": 0.5}
        series.append((FLOOR, [figures.floor(key) for key in keys], floor))
    for index, name in enumerate(name for name in libraries_on(figures.device) if name not in OWN):
        style = {"marker": MARKERS[index], "ms": 5, "lw": 0.8 if sizes else 0, "alpha": 0.75}
        series.append((name, [figures.best(key, [name]) for key in keys], style))
    return series
