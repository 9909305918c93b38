"""The report of a result: what was measured, against the floor, the peers and the goals."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _selfbench.sampling import DISTURBED

from bench.calls import ADD, ROUNDS, SHAPE
from bench.cases import ACTIVATED, CALL, GROUPED, NAMES, OPERATIONS, PRODUCTS, STEPS_IN_PLACE
from bench.figures import (
    Figures,
    Key,
    Time,
    geometric_mean,
    ratio,
    shape_name,
    with_operation,
)
from bench.goals import (
    CALL_LIMITS,
    FOLLOWED_ALLOWANCE,
    MAY_MISS,
    Goal,
    Ratio,
    Verdict,
    call_limit,
    call_verdicts,
    goals_on,
    met,
    misses,
    over_floor,
    over_out,
    over_peer,
    over_unfused,
    over_without,
    ratios_of,
    verdicts,
)
from bench.libraries import FASTBN, FLOOR, OWN, TORCH
from bench.marks import insert
from bench.picture import draw, draw_peers

LAYOUT_NAMES = {"nchw": "", "nhwc": ", channels-last"}
COMPARED = ("eval", "train", "backward")
# What a call with an activation is held against beside floor and peers.
BESIDE = over_without, over_unfused
# README tells arrays that are larger from the others: caches hold those.
LARGE = 8 * 2**20
# CPUs whose round trips take so many times as long as the shortest have no cache in common.
FAR = 2.0

NOTES = """\
- Every library runs in a process of its own. A round goes through all cases, with new arrays, and \
asks the libraries in turns; a time is the median of the samples of all rounds. Arrays are warm, \
as far as the caches hold them, and begin 16 bytes behind a page, as NumPy's large ones do.
- The floor is measured by another process in the same rounds: a copy for a forward, the sum of \
two arrays for a backward, with all threads (or one, if that is faster), by ordinary or by \
streaming stores of whole cache lines, whichever is faster.
- A star marks a library that allocates its output in every call, because its users cannot do \
otherwise. torch-malloc is torch with an allocator that keeps its memory, which spares it the page \
faults; torch-compile and jax run with it as well.
- Samples in which the threads of a library had to wait for a CPU, because other processes were \
busy, do not count; where there were no others, they were taken anew up to three times.
- Where a call makes a new array, the one before is there until it returns, as in a loop over \
`y = bn(x)`.
- Calls in place follow each other, too. Where that would let the values grow or shrink (not in a \
training forward by itself, which normalizes what the one before has normalized), the input is \
restored before every sample, outside of the time.
- oneDNN and the floor are called from C, everything else from Python.
- The process of a library sleeps while another one is measured: `busy` is the fraction of that \
time in which its threads took a CPU nevertheless.
- Results are compared with a float64 computation before they are timed.
- fastbn-avx2, fastbn-base and fastbn-1-thread are fastbn with less than it could have, for some \
of the goals."""


CUDA_NOTES = """\
- Times are those of the device: as many calls as take a millisecond are captured in a CUDA graph, \
whose replays are timed by events. Every library runs in a process of its own, and they are asked \
in turn, in several rounds; a time is the median of their samples. The arrays are the same \
in every call: what fits the second-level cache is found there, by the floor as well.
- The floor is a copy for a forward (a device-to-device memcpy or a kernel, whichever is faster), \
and the sum of two float32 arrays of the same bytes for a backward.
- A star marks a library that allocates its output in every call, from a pool: in a graph, that \
costs nothing. fastbn and the floor write to arrays that are there before.
- A call is timed by the host's clock, without waiting for the device.
- Results are compared with a float64 computation before they are timed."""


def write_report(path: Path, out: Path, readme: Path | None) -> None:
    """Write table and pictures of a result beside it, or elsewhere; put a summary into a file."""
    result = json.loads(path.read_text())
    figures = Figures(result)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(result, figures, out / path.name, grows(result))
    images = [picture for picture in pictures if picture.suffix == ".svg"]
    table = out / f"{path.stem}.md"
    table.write_text(_report(result, figures, [image.name for image in images]))
    if readme is not None:
        means = _peers(figures)
        if not means:
            raise SystemExit(f"{path} has no float32 figures of other libraries, for {readme}")
        bars = draw_peers(means, out / f"{path.stem}-peers.svg")
        insert(
            readme, "bench", _short_summary(result, figures, os.path.relpath(bars, readme.parent))
        )
    print(f"written: {', '.join(map(str, [path, table, *pictures]))}")


def grows(result: dict[str, Any]) -> bool:
    """Tell whether it is a sweep over sizes; the goals are for the shapes of real networks."""
    return "size_sweep" in result["settings"]["options"]


def _report(result: dict[str, Any], figures: Figures, images: list[str]) -> str:
    if not result["results"]:
        return f"{_call_costs(result)}\n"
    paragraphs = [
        "# fastbn, its peers and the floor that memory sets",
        _summary(result, figures, images),
        "" if grows(result) else _goals(result, figures),
        _call_costs(result),
    ]
    for threads in figures.values("threads"):
        for dtype in figures.values("dtype"):
            paragraphs += [of(figures, threads, dtype) for of in (_activations, _groups)]
            for layout in LAYOUT_NAMES:
                paragraphs += [
                    section
                    for operation in NAMES
                    if (section := _section(figures, threads, dtype, operation, layout))
                ]
        paragraphs.append(_products(figures, threads))
    paragraphs += [_calls(figures), _threads(figures), _libraries(result), _left_out(result)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _summary(result: dict[str, Any], figures: Figures, images: list[str]) -> str:
    """The machine, the peers and the pictures."""
    threads = max(figures.values("threads"), default=1)
    shown = "GB/s over the size" if grows(result) else "Time over the floor of memory"
    parts = [
        _machine(result, threads),
        _distance(result.get("round_trips_ns", [])),
        _against_peers(figures),
        *(f"![{shown}]({image})" for image in images),
    ]
    return "\n\n".join(part for part in parts if part)


def _machine(result: dict[str, Any], threads: int) -> str:
    machine, settings = result["machine"], result["settings"]
    if "gpu" in machine:
        return (
            f"Measured on {machine['gpu']}, {result['date'][:10]} (checkout {result['commit']}), "
            f"{_rounds(settings)}."
        )
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    virtual = "virtual " if machine.get("virtual") else ""
    versions = result["libraries"].get(FASTBN, {}).get("versions", {})
    disturbed = sum(record["waited"] >= DISTURBED for record in result["results"])
    return (
        f"Measured on {machine['cpu']} ({machine['cpus']} {virtual}CPUs, which say that they have "
        f"{caches}) with {threads} threads, "
        f"{result['date'][:10]}: fastbn {versions.get('fastbn')} (checkout {result['commit']}), "
        f"{versions.get('instruction set', '')}. {_rounds(settings)}; other processes "
        f"took {_number(result['others'])} CPUs meanwhile, and {disturbed} of "
        f"{len(result['results'])} figures suffered from it: threads waited for a CPU."
    )


def _distance(round_trips_ns: list[float]) -> str:
    """How far the CPUs were from each other, which a virtual machine may change meanwhile."""
    if not round_trips_ns:
        return ""
    least = min(round_trips_ns)
    far = [ns for ns in round_trips_ns if ns > FAR * least]
    text = f"A cache line went from one CPU to another one and back in {_number(least)} ns"
    if far:
        text += (
            f", and in {_number(statistics.median(far))} ns before {len(far)} of "
            f"{len(round_trips_ns)} rounds of a case, whose CPUs were far from each other"
        )
    return f"{text}."


def _rounds(settings: dict[str, Any]) -> str:
    """How often the libraries were asked: once a round, unless it has turns."""
    turns = f" of {settings['turns']} turns" if "turns" in settings else ""
    return f"{settings['rounds']} rounds{turns}"


def _table(header: list[str], body: Iterable[Iterable[str]], align: str = "--:") -> str:
    """A Markdown table; the first column is text, the others are numbers unless aligned so."""
    lines = [header, [":--", *[align] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ms(time: Time | None) -> str:
    return _number(time.ms if time else None)


def _peers(figures: Figures) -> dict[str, dict[str, float]]:
    """For each peer and operation: how many times as long as fastbn it takes, in the mean."""
    threads = max(figures.values("threads"), default=1)
    names = {time.library for times in figures.times.values() for time in times} - {*OWN}
    means: dict[str, dict[str, float]] = {}
    for name in sorted(names):
        for operation in COMPARED:
            keys = figures.keys(threads=threads, operation=operation, dtype="float32")
            mean = _mean_over_fastbn(figures, keys, name)
            if mean is not None:
                means.setdefault(name, {})[operation] = mean
    return means


def _mean_over_fastbn(figures: Figures, keys: list[Key], name: str) -> float | None:
    """How many times as long as fastbn a library takes, in its best memory layout."""
    return _mean(ratio(figures.best(key, [name]), figures.fastbn(key, "nchw")) for key in keys)


def _mean_of(ratio_of: Ratio, figures: Figures, keys: list[Key], layout: str) -> float | None:
    return _mean(ratio_of(figures, key, layout) for key in keys)


def _mean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that were measured."""
    found = [value for value in ratios if value is not None]
    return geometric_mean(found) if found else None


def _against_peers(figures: Figures) -> str:
    """How many times as long as fastbn each peer takes."""
    body = [
        [name, *(f"{means[op]:.2f}" if op in means else "-" for op in COMPARED)]
        for name, means in _peers(figures).items()
    ]
    if not body:
        return ""
    header = ["time / fastbn", *(OPERATIONS[operation] for operation in COMPARED)]
    text = "How many times as long as fastbn the others take, each in its best memory layout; "
    return f"{text}geometric means over the shapes, float32:\n\n{_table(header, body)}"


def _short_summary(result: dict[str, Any], figures: Figures, image: str) -> str:
    """README's: where fastbn stands against the fastest peer of each shape, and against memory."""
    threads = max(figures.values("threads"), default=1)
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']} with {threads} threads"
    body = [
        _standing(figures, figures.keys(threads=threads, operation=operation, dtype="float32"))
        for operation in COMPARED
    ]
    header = ["float32", "fastest on", f"time / fastest other, above {LARGE >> 20} MiB", "below"]
    header += [f"time / floor, above {LARGE >> 20} MiB", "below"]
    text = (
        f"{where}, {result['date'][:10]}. The floor is a copy of the array for a forward, and an "
        "addition of two arrays for a backward. Ratios are geometric means over the shapes."
    )
    picture = f"![Time of other libraries over that of fastbn]({image})"
    return f"{textwrap.fill(text, 100)}\n\n{_table(header, body)}\n\n{picture}"


def _standing(figures: Figures, keys: list[Key]) -> list[str]:
    """A line of README's table: an operation, for arrays above and below a size."""
    ours = {key: figures.fastbn(key, "nchw") for key in keys}
    to_peer = {key: ratio(ours[key], figures.peer(key)) for key in keys}
    to_floor = {key: ratio(ours[key], figures.floor(key)) for key in keys}
    won = sum(value <= 1.0 for value in to_peer.values() if value is not None)
    cells = [OPERATIONS[keys[0].case.operation] if keys else "-", f"{won} of {len(keys)} shapes"]
    for ratios in to_peer, to_floor:
        for large in True, False:
            found = [
                value
                for key, value in ratios.items()
                if value is not None and (key.case.bytes > LARGE) == large
            ]
            cells.append(f"{geometric_mean(found):.2f}" if found else "-")
    return cells


def _goals(result: dict[str, Any], figures: Figures) -> str:
    """Every goal that was measured, with its verdict, and every figure that misses its limit.

    Empty if there is none.
    """
    threads = max(figures.values("threads"), default=1)
    ratios = {goal: ratios_of(goal, figures, threads) for goal in goals_on(figures.device)}
    body = [_goal_line(goal, found) for goal, found in ratios.items() if found]
    header = ["goal", "limit", "cases within", "geometric mean", "worst case", "verdict"]
    text = (
        "Goals that were measured, as ratios of times, with limits for every case or for the "
        "geometric mean. A copy is streaming where streaming stores are faster than ordinary ones."
    )
    every = verdicts(figures, threads) + call_verdicts(result.get("calls", ()))
    if not every:
        return ""
    return f"{text}\n\n{_table(header, body)}\n\n{_misses(every, figures.device)}"


def _misses(every: list[Verdict], device: str) -> str:
    """How many figures miss their limits, and which, the worst first."""
    missed = sorted((each for each in every if each.missed), key=lambda e: e.limit / e.value)
    text = (
        f"{len(missed)} of {len(every)} figures miss their limits"
        f"{f'; one in {1 / MAY_MISS:.0f} may' if device == 'cpu' else ''}. "
        "A figure is the ratio of a case, or the mean where that has the limit; the costs of "
        "calls are among them."
    )
    body = [[each.goal, each.case, f"{each.value:.2f}", f"{each.limit:g}"] for each in missed]
    return f"## Misses\n\n{text}\n\n{_table(['goal', 'case', 'figure', 'limit'], body)}"


def _goal_line(goal: Goal, found: list[Any]) -> list[str]:
    limit = f"≤ {goal.limit:.2f}{' in the mean' if goal.mean else ''}"
    worst = max(found, key=lambda each: each.value)
    within = sum(each.value <= goal.limit for each in found)
    return [
        goal.name,
        limit,
        f"{within} of {len(found)}",
        f"{geometric_mean(each.value for each in found):.2f}",
        f"{worst.value:.2f} ({worst.name})",
        "hit" if met(goal, found) else "**miss**",
    ]


def _activations(figures: Figures, threads: int, dtype: str) -> str:
    """What a ReLU, and an addition before it, take in the pass of the normalization."""
    text = (
        "An activation, or an addition and a ReLU, in the pass of the normalization; a step in "
        "place copies its input for a ReLU, but not for a leaky one. fastbn's time is "
        "held against the floor, which reads and writes as many arrays (a copy; with a third array "
        "an addition; in the backward of the addition the sum and the difference of two arrays, "
        "called a pair), and against the call without what follows. The other columns tell how "
        "many times as long as fastbn the others take, each in its best memory layout. "
        "fastbn-unfused is fastbn's batch normalization with NumPy's `add` and `maximum` after it. "
        "Geometric means over the shapes."
    )
    ratios = {"fastbn / floor": over_floor, "fastbn / without": over_without}
    keys = figures.keys(threads=threads, dtype=dtype)
    table = _against_all(
        figures,
        [key for key in keys if key.case.operation in (*ACTIVATED, *STEPS_IN_PLACE)],
        ratios,
    )
    title = f"## Activations and residuals, {dtype}, {threads} threads"
    return f"{title}\n\n{text}\n\n{table}" if table else ""


def _groups(figures: Figures, threads: int, dtype: str) -> str:
    """What group normalization takes."""
    text = (
        "fastbn's time for the groups of each sample is held against the floor, a copy or, for the "
        "backward, an addition. The other columns tell how many times as long as fastbn the others "
        "take, each in its best memory layout. Geometric means over the shapes."
    )
    keys = figures.keys(threads=threads, dtype=dtype)
    ratios = {"fastbn / floor": over_floor}
    table = _against_all(figures, [key for key in keys if key.case.operation in GROUPED], ratios)
    title = f"## Group normalization, {dtype}, {threads} threads"
    return f"{title}\n\n{text}\n\n{table}" if table else ""


def _against_all(figures: Figures, keys: list[Key], ratios: dict[str, Ratio]) -> str:
    """A line for each operation: ratios of fastbn's, and all others over fastbn; or nothing."""
    measured = [time.library for key in keys for time in figures.times[key]]
    others = [name for name in dict.fromkeys(measured) if name not in (FLOOR, FASTBN)]
    body = []
    for operation in [name for name in NAMES if any(k.case.operation == name for k in keys)]:
        own = [key for key in keys if key.case.operation == operation]
        means = [_mean_of(ratio_of, figures, own, "nchw") for ratio_of in ratios.values()]
        means += [_mean_over_fastbn(figures, own, name) for name in others]
        body.append([NAMES[operation], *map(_number, means)])
    header = ["", *ratios, *(f"{name} / fastbn" for name in others)]
    return _table(header, body) if body else ""


def _section(figures: Figures, threads: int, dtype: str, operation: str, layout: str) -> str:
    """The table of an operation in a layout; empty if it was not measured."""
    keys = [
        key
        for key in figures.keys(threads=threads, dtype=dtype, operation=operation)
        if figures.fastbn(key, layout)
    ]
    if not keys:
        return ""
    floor = keys[0].case.floor
    header = ["shape", "MB", f"{floor} ms", "fastbn ms", f"fastbn / {floor}"]
    header += ["fastest peer", "peer ms", "fastbn / peer", "goals"]
    body = [_row(figures, key, layout) for key in keys]
    to_floor, to_peer, *beside = (
        _number(_mean_of(ratio_of, figures, keys, layout))
        for ratio_of in (over_floor, over_peer, *BESIDE)
    )
    last = ["**geometric mean**", "", "", "", to_floor, "", "", to_peer, ""]
    if keys[0].case.in_place:
        header.insert(3, "in-place floor ms")
        last.insert(3, "")
    if keys[0].case.fresh:
        header.insert(4, "fastbn / out=")
        last.insert(4, "")
    if keys[0].case.activated:
        header[5:5] = ["fastbn / without", "fastbn / unfused"]
        last[5:5] = beside
    name = NAMES[operation]
    title = f"## {name[0].upper()}{name[1:]}{LAYOUT_NAMES[layout]}, {dtype}"
    if figures.device == "cpu":
        title += f", {threads} threads"
    return f"{title}\n\n{_table(header, [*body, last])}"


def _row(figures: Figures, key: Key, layout: str) -> list[str]:
    ours, floor, peer = figures.fastbn(key, layout), figures.floor(key), figures.peer(key)
    missed = misses(figures, key, layout)
    verdict = "" if missed is None else f"miss: {', '.join(missed)}" if missed else "hit"
    cells = [shape_name(key.case), _number(key.case.bytes / 2**20), _ms(floor), _ms(ours)]
    if key.case.in_place:
        cells.insert(3, _ms(figures.floor_in_place(key)))
    if key.case.fresh:
        cells.append(_number(over_out(figures, key, layout)))
    cells.append(_number(ratio(ours, floor)))
    if key.case.activated:
        cells += [_number(ratio_of(figures, key, layout)) for ratio_of in BESIDE]
    return [
        *cells,
        peer.name if peer else "-",
        _ms(peer),
        _number(ratio(ours, peer)),
        verdict,
    ]


def _products(figures: Figures, threads: int) -> str:
    """What calls take while the threads of OpenBLAS still spin."""
    keys = [key for of in PRODUCTS for key in figures.keys(threads=threads, operation=of)]
    if not keys:
        return ""
    quiet = with_operation(keys[0], "train")
    body = []
    for name in dict.fromkeys(time.library for key in keys for time in figures.times[key]):
        before = figures.best(quiet, [name])
        after = [figures.best(key, [name]) for key in keys]
        cells = [f"{_ms(time)} ({_number(ratio(time, before))})" for time in after]
        body.append([name, _ms(before), *cells])
    sizes = [PRODUCTS[key.case.operation] for key in keys]
    text = (
        f"A training forward on {shape_name(quiet.case)} right after NumPy has multiplied two "
        f"square float32 matrices in the same process, with {threads} threads: milliseconds and, "
        "in brackets, their ratio to those of the call by itself."
    )
    table = _table(["", "by itself", *(f"after {n}x{n}" for n in sizes)], body)
    return f"## Beside OpenBLAS\n\n{text}\n\n{table}"


def _calls(figures: Figures) -> str:
    """What a call costs where the array is too small to matter."""
    body = []
    for key in figures.keys(operation=CALL):
        for library in (FASTBN, TORCH):
            minimum = figures.minima.get((key, library))
            if minimum is not None:
                body.append([library, str(key.threads), f"{minimum * 1e6:.0f}"])
    if not body:
        return ""
    text = "An evaluation forward of a layer on a 1x64x1x1 float32 array, the shortest of many."
    return f"## A call\n\n{text}\n\n{_table(['library', 'threads', 'ns'], body)}"


def _call_costs(result: dict[str, Any]) -> str:
    """What calls cost where arrays are too small to matter, and whether that is within limits."""
    costs = {(cost["call"], cost["operation"]): cost for cost in result.get("calls", ())}
    if not costs:
        return ""
    calls = list(dict.fromkeys(call for call, operation in costs if operation))
    body = [
        [OPERATIONS[operation], f"≤ {limit:g}"]
        + [_call_cost(costs.get((call, operation)), call_limit(call, operation)) for call in calls]
        for operation, limit in CALL_LIMITS.items()
    ]
    add = ", ".join(
        f"{cost['ns']:.0f} ns in the process of {cost['library']}"
        for cost in result["calls"]
        if not cost["operation"]
    )
    text = (
        f"In multiples of `{ADD}` on float32 arrays of {'x'.join(map(str, SHAPE))}, on one "
        "thread, with `out=` (torch has none); a backward is a training forward with it, less the "
        f"forward alone. Medians of {ROUNDS} rounds, in each of which np.add and the calls take "
        "turns; where another process had the CPU, a round does not count. The limit of a call "
        f"with an activation is {FOLLOWED_ALLOWANCE:g} higher. "
        f"np.add took {add}. {result['machine']['cpu']}, {result['date'][:10]} "
        f"(checkout {result['commit']})."
    )
    table = _table(["", "limit", *calls], body)
    return f"## The cost of a call\n\n{text}\n\n{table}"


def _call_cost(cost: dict[str, Any] | None, limit: float) -> str:
    """A multiple of np.add; of fastbn's with its verdict."""
    if cost is None:
        return "-"
    verdict = " hit" if cost["times_add"] <= limit else " **miss**"
    return f"{cost['times_add']:.1f}{verdict if cost['library'] == FASTBN else ''}"


def _threads(figures: Figures) -> str:
    """How fastbn and the floor scale, where several numbers of threads were measured."""
    counts = figures.values("threads")
    if len(counts) < 2:
        return ""
    cases = list(dict.fromkeys(k.case for k in figures.times if k.case.operation in COMPARED))
    body = []
    for case in cases:
        line = [f"{shape_name(case)} {case.operation} {case.dtype}"]
        for threads in counts:
            key = Key(threads, case)
            ours = figures.fastbn(key, "nchw")
            line.append(f"{_ms(ours)} ({_number(ratio(ours, figures.floor(key)))})")
        body.append(line)
    header = ["shape, operation", *(f"{n} thread{'s' if n > 1 else ''}" for n in counts)]
    text = "fastbn's milliseconds in NCHW and, in brackets, their ratio to the floor."
    return f"## Threads\n\n{text}\n\n{_table(header, body)}"


def _libraries(result: dict[str, Any]) -> str:
    """What was called, where the results went, and how the processes were set up."""
    body = []
    for name, about in result["libraries"].items():
        if "unavailable" in about:
            continue
        busy = about.get("busy_while_idle")
        body.append(
            [
                name,
                ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
                about["api"],
                about["buffers"],
                " ".join(f"{k}={v}" for k, v in about["environment"].items()) or "-",
                "-" if busy is None else f"{busy:.1%}",
            ]
        )
    header = ["library", "versions", "what is called", "output", "environment", "busy"]
    machine = result["machine"]
    details = "; ".join(
        f"{name.replace('_', ' ')}: {machine[name]}"
        for name in ("system", "libc", "python", "compiler", "memory", "transparent_hugepage")
    )
    variables = "In every process OMP_NUM_THREADS and its like are the number of threads; "
    variables += "OMP_WAIT_POLICY and GOMP_SPINCOUNT are not set."
    table = _table(header, body, ":--")
    notes = CUDA_NOTES if "gpu" in machine else f"{NOTES}\n- {variables}"
    return f"## How it was measured\n\n{notes}\n- {details}.\n\n{table}"


def _left_out(result: dict[str, Any]) -> str:
    """What is not in the tables, and why; once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, about in result["libraries"].items():
        if "unavailable" in about:
            reasons[name, about["unavailable"]].append("all")
    for entry in result["left_out"]:
        reasons[entry["library"], entry["reason"]].append(_what(entry))
    if not reasons:
        return ""
    body = [
        [library, ", ".join(dict.fromkeys(what)), reason.replace("|", "\\|")]
        for (library, reason), what in reasons.items()
    ]
    return f"## Left out\n\n{_table(['library', 'what', 'why'], body, ':--')}"


def _what(entry: dict[str, Any]) -> str:
    """Which operation was left out, for which dtype and layout."""
    return " ".join(filter(None, (entry["operation"], entry["dtype"], entry["variant"])))
