"""`python -m bench` measures; `python -m bench report RESULT.json` writes the report anew.

`python -m bench --calls` measures what a call costs, in a minute, and `--activations` batch
normalization with an activation, or an addition and a ReLU, after it; `--groups` measures group
normalization, and `--device cuda --steps` training steps with masks, ghost batches and activations,
and those of other layers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import machine, runner
from bench.cases import (
    ACTIVATED,
    CALL,
    CALL_SHAPE,
    GROUPED,
    ITEMSIZES,
    NAMES,
    OPERATIONS,
    PRODUCTS,
    PRODUCTS_SHAPE,
    STEPS,
    STEPS_IN_PLACE,
    Case,
    growing_shapes,
    shapes_of,
)
from bench.libraries import (
    FASTBN,
    FASTBN_UNFUSED,
    FLOOR,
    NUMBA_FASTMATH,
    ONEDNN,
    TORCH,
    TORCH_COMPILE,
    TORCH_MALLOC,
    libraries_on,
)
from bench.report import write_report

RESULTS = Path(__file__).with_name("results")
LAYOUTS = ("nchw", "nhwc")
# Without them there is nothing to compare.
ALWAYS = (FLOOR, FASTBN)
# Not in a quick measurement: seconds of compilation for every shape.
SLOW_TO_START = (TORCH_COMPILE,)
# The sizes up to 400 MB would take the others minutes each.
LIBRARIES_OF_SIZES = (FLOOR, FASTBN, NUMBA_FASTMATH, TORCH, TORCH_MALLOC, ONEDNN)
OPERATIONS_OF_SIZES = ("eval", "train", "backward")
# What activations, and an addition before them, are measured with: of those that fuse them.
LIBRARIES_OF_ACTIVATIONS = (*LIBRARIES_OF_SIZES, FASTBN_UNFUSED, TORCH_COMPILE)
OPERATIONS_OF_ACTIVATIONS = (*OPERATIONS_OF_SIZES, *ACTIVATED, *STEPS_IN_PLACE)
LIBRARIES_OF_GROUPS = (FLOOR, FASTBN, TORCH, TORCH_MALLOC, TORCH_COMPILE)
# Of these, what is measured on few shapes unless others are asked for: what no peer does, and what
# differs from a ReLU in registers alone.
OPERATIONS_ON_FEW_SHAPES = (
    *STEPS_IN_PLACE,
    *(of for of in ACTIVATED if of.endswith(("_relu6", "_leaky_relu"))),
)
# What is not measured unless it is asked for: what has no goal, and what is in a run of its own.
NOT_BY_DEFAULT = ("eval_inplace", "backward_inplace", *ACTIVATED)
ROUNDS, QUICK_ROUNDS = 5, 3
# How long a library is asked for samples in a round; at least for one in each of its turns.
BUDGET_MS, QUICK_BUDGET_MS = 20.0, 10.0


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["report"]:
        options = report_parser().parse_args(arguments[1:])
        write_report(options.result, options.out or options.result.parent, options.readme)
        return
    command_line = parser()
    options = command_line.parse_args(arguments)
    if (options.calls or options.activations or options.groups) and options.device != "cpu":
        command_line.error("--calls, --activations and --groups are for arrays on the CPU")
    if options.steps and options.device != "cuda":
        command_line.error("--steps is for arrays on a GPU: --device cuda")
    result = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{result['settings']['name']}.json"
    path.write_text(as_json(result))
    write_report(path, options.out, None)
    if options.calls:
        print(path.with_suffix(".md").read_text())


def parser() -> argparse.ArgumentParser:
    """The options of a measurement."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    names = commas(str)
    add = parser.add_argument
    add("--shapes", help="lists of shapes.json, and shapes such as 32x64x56x56 (default: gate)")
    add("--dtypes", type=names, default=["float32"], help=f"of {', '.join(ITEMSIZES)}")
    add("--layouts", type=names, default=list(LAYOUTS), help="those of fastbn: nchw, nhwc")
    add("--threads", type=commas(int), help="thread counts (default: the number of CPUs)")
    operations = ", ".join([*NAMES, *PRODUCTS, CALL])
    add("--operations", type=names, help=f"of {operations} (default: those with goals)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the arrays are")
    known = ", ".join({**libraries_on("cpu"), **libraries_on("cuda")})
    add("--libraries", type=names, help=f"of {known} (default: all of the device)")
    add("--rounds", type=int, help=f"how many, of {runner.TURNS} turns each (default: {ROUNDS})")
    mode = parser.add_mutually_exclusive_group()
    flag = {"action": "store_true"}
    mode.add_argument(
        "--quick", **flag, help="three short rounds on five shapes, without torch.compile"
    )
    mode.add_argument("--size-sweep", **flag, help="arrays from 1 KB to 400 MB; fewer libraries")
    mode.add_argument("--calls", **flag, help="only what calls cost, in multiples of np.add")
    mode.add_argument(
        "--activations", **flag, help="activations, and an addition before one; fewer libraries"
    )
    mode.add_argument("--groups", **flag, help="GroupNorm of 32 groups; its libraries and shapes")
    mode.add_argument(
        "--steps", **flag, help="training steps, with masks and ghost batches and of other layers"
    )
    add("--out", type=Path, default=RESULTS, help="the folder of the results")
    add("--name", help="the results' file name (default: what was measured)")
    return parser


def report_parser() -> argparse.ArgumentParser:
    """The options of a report."""
    parser = argparse.ArgumentParser("python -m bench report")
    parser.add_argument("result", type=Path, help="the JSON file of a measurement")
    parser.add_argument("--out", type=Path, help="the folder of the report (default: the result's)")
    parser.add_argument(
        "--readme",
        type=Path,
        help="a file with lines <!-- bench --> and <!-- /bench -->, between which the summary goes",
    )
    return parser


def commas(kind: type) -> Any:
    """A parser of comma-separated values."""
    return lambda text: [kind(item) for item in text.split(",")]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for, for each number of threads."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    budget_ms = QUICK_BUDGET_MS if options.quick else BUDGET_MS
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(options.device),
        "settings": {
            "name": options.name or kind_of(options),
            "device": options.device,
            "options": {k: v for k, v in vars(options).items() if v and k not in ("out", "name")},
            "rounds": rounds,
            "turns": runner.TURNS,
            "budget_ms": budget_ms,
        },
        "libraries": {},
        "calls": [],
        "results": [],
        "left_out": [],
        "round_trips_ns": [],
    }
    others = machine.Others()
    if wants_calls(options):
        add(result, runner.measure_calls())
    if not options.calls:
        cases = cases_of(options)
        with tqdm(unit="round", smoothing=0.05) as progress:
            for threads in options.threads or [default_threads(options.device)]:
                names = libraries_of(options)
                how = rounds, budget_ms, threads, names, options.layouts, options.device
                add(result, runner.measure(runner.Settings(*how), cases, progress))
    result["others"] = others.cpus()
    return result


def wants_calls(options: argparse.Namespace) -> bool:
    """Tell whether the cost of calls is measured, which on a CPU is no case."""
    return options.calls or (options.device == "cpu" and CALL in operations_of(options))


def add(result: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add what was measured to the result."""
    for name, value in measured.items():
        if isinstance(value, dict):
            result[name].update(value)
        else:
            result[name] += value


def as_json(result: dict[str, Any]) -> str:
    """JSON with a line for every entry of the long lists."""
    entries = []
    for name, value in result.items():
        text = json.dumps(value, indent=1)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        entries.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def default_threads(device: str) -> int:
    """All CPUs, or the one that launches what a GPU does."""
    return len(machine.available_cpus()) if device == "cpu" else 1


def kind_of(options: argparse.Namespace) -> str:
    """What the results are called."""
    names = "quick", "calls", "activations", "groups", "steps"
    kinds = {name: name for name in names} | {"size_sweep": "sizes"}
    kind = next((kind for option, kind in kinds.items() if getattr(options, option)), "full")
    return kind if options.device == "cpu" else f"{options.device}-{kind}"


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases, all operations of a shape one after the other."""
    operations = operations_of(options)
    known = {CALL, *NAMES, *PRODUCTS, *ITEMSIZES, *LAYOUTS}
    refuse_unknown({*operations, *options.dtypes, *options.layouts} - known)
    shapes = growing_shapes() if options.size_sweep else []
    if options.shapes or not shapes:
        names = {"quick": options.quick, "groups": options.groups, "gate": True}
        shapes += shapes_of(options.shapes or next(name for name in names if names[name]))
    is_short = options.activations and not options.shapes and not options.operations
    few = shapes_of("quick") if is_short else shapes
    cases = [
        Case(operation, shape, dtype)
        for shape in shapes
        for dtype in options.dtypes
        for operation in operations
        if operation in NAMES and (shape in few or operation not in OPERATIONS_ON_FEW_SHAPES)
    ]
    products = [operation for operation in operations if operation in PRODUCTS]
    if products:  # They are held against the training forward by itself.
        cases += [Case(operation, PRODUCTS_SHAPE, "float32") for operation in ["train", *products]]
    if CALL in operations and options.device == "cuda":
        cases.insert(0, Case(CALL, CALL_SHAPE, "float32"))
    return list(dict.fromkeys(cases))


def operations_of(options: argparse.Namespace) -> list[str]:
    """The operations to measure."""
    chosen = options.operations
    if chosen is None and options.size_sweep:
        chosen = OPERATIONS_OF_SIZES
    if chosen is None and options.activations:
        chosen = OPERATIONS_OF_ACTIVATIONS
    if chosen is None and options.groups:
        chosen = tuple(GROUPED)
    if chosen is None and options.steps:
        chosen = tuple(STEPS)
    if chosen is None:
        chosen = [name for name in [CALL, *OPERATIONS, *PRODUCTS] if name not in NOT_BY_DEFAULT]
    if options.device == "cuda":  # Times are those of replays, between which nothing is restored.
        chosen = [name for name in chosen if name in (CALL, *OPERATIONS_OF_SIZES, *STEPS)]
    return list(chosen)


def libraries_of(options: argparse.Namespace) -> list[str]:
    """The libraries to start: the chosen ones, with the floor and fastbn in any case."""
    known = libraries_on(options.device)
    chosen = options.libraries
    if chosen is None and options.size_sweep:
        chosen = LIBRARIES_OF_SIZES
    if chosen is None and options.activations:
        chosen = LIBRARIES_OF_ACTIVATIONS
    if chosen is None and options.groups:
        chosen = LIBRARIES_OF_GROUPS
    if chosen is None:
        needless = SLOW_TO_START if options.quick else ()
        if not {*operations_of(options)} & {*ACTIVATED}:
            needless += (FASTBN_UNFUSED,)
        chosen = [name for name in known if name not in needless]
    refuse_unknown({*chosen} - {*known, *LIBRARIES_OF_SIZES})
    return [name for name in known if name in {*chosen, *ALWAYS}]


def refuse_unknown(names: set[str]) -> None:
    if names:
        raise SystemExit(f"unknown: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main(sys.argv[1:])
