"""Whole training steps of torch models, with and without `fastbn.torch`.

`python -m bench.torch` measures ResNet-50 and MobileNetV2 in eager mode and compiled; `report`
writes the tables of a result anew. The models are written here, of torch's modules.

It can be done piece by piece, for example ``--models mobilenet_v2 --kinds float32-last --modes
eager fastbn --steps 5``: each run adds to the same file, which is written after every round, so
that nothing is lost when it is stopped. Modes that are compared belong in one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import fastbn
from bench import machine
from bench.marks import insert
from fastbn.torch import accelerate, report

RESULTS = Path(__file__).with_name("results")
MODES = {
    "eager": "torch",
    "fastbn": "torch with fastbn.torch",
    "compiled": "torch.compile",
    "fastbn-compiled": "torch.compile with fastbn.torch",
}
# Time of an accelerated step over that of the same in eager torch.
GOALS = {
    ("resnet50", "float32"): 0.88,
    ("resnet50", "float32-last"): 0.84,
    ("resnet50", "bfloat16-last"): 0.75,
    ("mobilenet_v2", "float32-last"): 0.70,
    ("mobilenet_v2", "bfloat16-last"): 0.78,
}
CLASSES = 1000


# The models.


class Bottleneck(nn.Module):
    """The block of ResNet-50: three convolutions, and what goes around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3, self.relu = nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def resnet50() -> nn.Module:
    """ResNet-50 (He and others 2016), with the stride in the second convolutions."""
    layers = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        *(nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)),
    ]
    channels = 64
    for width, blocks, stride in (64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, *head(channels))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: a wide depthwise convolution between narrow ones."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels * expansion
        layers = [] if expansion == 1 else convolution(channels, width, 1)
        layers += convolution(width, width, 3, stride, groups=width)
        self.layers = nn.Sequential(*layers, *convolution(width, out, 1)[:2])
        self.adds = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


def convolution(
    channels: int, out: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution, a batch normalization and ReLU6."""
    conv = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU6(inplace=True)]


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (Sandler and others 2018)."""
    layers, channels = convolution(3, 32, 3, 2), 32
    stages = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )
    for expansion, out, blocks, stride in stages:
        for block in range(blocks):
            first = stride if block == 0 else 1
            layers.append(InvertedResidual(channels, out, first, expansion))
            channels = out
    return nn.Sequential(*layers, *convolution(channels, 1280, 1), *head(1280))


def head(channels: int) -> list[nn.Module]:
    """The mean over the image, and a linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


MODELS = {"resnet50": resnet50, "mobilenet_v2": mobilenet_v2}


# Steps.


class Kind(NamedTuple):
    """The dtype of activations, and the memory format."""

    dtype: torch.dtype
    memory_format: torch.memory_format


KINDS = {
    "float32": Kind(torch.float32, torch.contiguous_format),
    "float32-last": Kind(torch.float32, torch.channels_last),
    "bfloat16-last": Kind(torch.bfloat16, torch.channels_last),
}


def step_of(
    model: nn.Module, kind: Kind, batch: int, size: int, compiled: bool
) -> Callable[[], Any]:
    """A training step on a batch of random images: forward, backward, and SGD."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator)
    x = x.to(memory_format=kind.memory_format)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    model = model.to(memory_format=kind.memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    run = torch.compile(model) if compiled else model
    mixed = kind.dtype is not torch.float32

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = nn.functional.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def models_by_mode(name: str, modes: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The same model for each mode."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for mode in modes:
        twin = copy.deepcopy(model)
        yield mode, accelerate(twin) if "fastbn" in mode else twin


# Parts of a step, by what torch's profiler calls them.

PARTS = {
    "batch norm": ("batch_norm", "BatchNorm"),
    "convolution": ("convolution", "conv2d", "mkldnn", "ConvolutionBackward"),
    "activations": ("relu", "Relu", "threshold", "hardtanh", "clamp", "Hardtanh"),
    "additions": ("aten::add", "aten::add_"),
}


def parts_of(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """The time of each part, in ms per step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / steps * 1e-3
    return parts


def part_of(event: str) -> str:
    """The part that an event of the profiler belongs to."""
    if event in PARTS["additions"]:
        return "additions"
    for part, words in PARTS.items():
        if part != "additions" and any(word in event for word in words):
            return part
    return "other"


# Measuring.


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Time the steps of all modes in turn, and take the parts of those that are not compiled.

    They are added to the result that is in the file, which is written after every round.
    """
    torch.set_num_threads(options.threads)
    result = result_to_add_to(path, beginning(options))
    cases = [(model, kind) for model in options.models for kind in options.kinds]
    rounds = options.steps + 1
    with tqdm(total=len(cases) * len(options.modes) * rounds, unit="step") as progress:
        for model, kind in cases:
            case = case_of(result, model, kind)
            for _ in measured(case, options, progress):
                save(result, path)
            torch.compiler.reset()
    return result


def beginning(options: argparse.Namespace) -> dict[str, Any]:
    """A result without measurements: what must be the same wherever one is added to it."""
    return {
        "machine": machine.describe(),
        "commit": machine.commit(),
        "versions": {"torch": torch.__version__, "fastbn": fastbn.__version__},
        "settings": {name: vars(options)[name] for name in ("batch", "size", "threads")},
        "results": [],
    }


def result_to_add_to(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The result in a file, or the new one if there is none."""
    if not path.exists():
        return new
    result: dict[str, Any] = json.loads(path.read_text())
    same = json.loads(json.dumps(new)) | {"results": result["results"]}
    differing = sorted(name for name in same if same[name] != result.get(name))
    if differing:
        raise SystemExit(
            f"{path} has been measured with other {', '.join(differing)}, so nothing can be added "
            f"to it: move it away, or take another --name"
        )
    return result


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result, so that the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def case_of(result: dict[str, Any], model: str, kind: str) -> dict[str, Any]:
    """What a result has of a model in one dtype and memory format, in the order of the options."""
    cases: list[dict[str, Any]] = result["results"]
    for case in cases:
        if (case["model"], case["kind"]) == (model, kind):
            return case
    case = {"model": model, "kind": kind, "fused": 0, "loss": {}, "ms": {}, "parts": {}}
    cases.append(case)
    cases.sort(
        key=lambda case: (list(MODELS).index(case["model"]), list(KINDS).index(case["kind"]))
    )
    return case


def measured(
    case: dict[str, Any], options: argparse.Namespace, progress: tqdm[Any]
) -> Iterator[None]:
    """Add times and parts to a case; give way whenever some are there."""
    steps = {}
    for mode, model in models_by_mode(case["model"], options.modes):
        case["fused"] = max(case["fused"], len(report(model).fused))
        compiled, kind = "compiled" in mode, KINDS[case["kind"]]
        steps[mode] = step_of(model, kind, options.batch, options.size, compiled)
        progress.set_description(f"{case['model']} {case['kind']} {mode}")
        case["loss"][mode] = float(steps[mode]())  # Compilation, and memory for the first time.
        progress.update()
    progress.set_description(f"{case['model']} {case['kind']}")
    for _ in range(options.steps):
        times = {}
        for mode, step in steps.items():
            start = time.perf_counter()
            step()
            times[mode] = (time.perf_counter() - start) * 1e3
            progress.update()
        for mode, ms in times.items():
            case["ms"].setdefault(mode, []).append(ms)
        yield
    if options.parts:
        case["parts"] |= {m: parts_of(s, 1) for m, s in steps.items() if "compiled" not in m}
        yield


# Tables.


def tables(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    lines = ["# Training steps of torch models", "", conditions(result), "", *step_table(result)]
    names = [*PARTS, "other"]
    lines += ["", "Parts of a step by torch's profiler, which slows it (ms):", ""]
    lines += [row("model", "kind", "mode", *names), row(*[":--"] * 3, *["--:"] * len(names))]
    for case in result["results"]:
        for mode, parts in case["parts"].items():
            cells = [f"{parts[name]:.0f}" for name in names]
            lines.append(row(case["model"], case["kind"], mode, *cells))
    return "\n".join(lines) + "\n"


def conditions(result: dict[str, Any]) -> str:
    """On what, and how, the steps were measured."""
    settings, versions, size = result["settings"], result["versions"], result["settings"]["size"]
    counts = {len(times) for case in result["results"] for times in case["ms"].values()} or {0}
    steps = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return (
        f"{result['machine']['cpu']}, {settings['threads']} threads, torch {versions['torch']}, "
        f"batch {settings['batch']} of {size} by {size}; medians of {steps} steps, the modes of a "
        "run in turn. `-last` is channels-last, bfloat16 is autocast."
    )


def step_table(result: dict[str, Any]) -> list[str]:
    """The times of whole steps, and fastbn's over torch's."""
    cases = result["results"]
    modes = [mode for mode in MODES if any(mode in case["ms"] for case in cases)]
    columns = [f"{MODES[mode]} (ms)" for mode in modes] + ["fastbn / eager", "goal"]
    lines = [row("model", "kind", *columns), row(":--", ":--", *["--:"] * len(columns))]
    for case in cases:
        ms = {mode: statistics.median(times) for mode, times in case["ms"].items()}
        ratio = f"{ms['fastbn'] / ms['eager']:.2f}" if {"fastbn", "eager"} <= set(ms) else ""
        cells = [f"{ms[mode]:.0f}" if mode in ms else "" for mode in modes]
        goal = GOALS.get((case["model"], case["kind"]), "")
        lines.append(row(case["model"], case["kind"], *cells, ratio, str(goal)))
    return lines


def row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser("python -m bench.torch", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    again = commands.add_parser("report", help="write the tables of a result anew")
    again.add_argument("result", type=Path)
    again.add_argument(
        "--readme",
        type=Path,
        help="a file with lines <!-- bench-torch --> and <!-- /bench-torch -->, between which the "
        "table of steps goes",
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--batch", type=int, default=8)
    add("--size", type=int, default=224, help="of the images")
    add("--steps", type=int, default=10, help="of each mode, after one that is not timed")
    add("--threads", type=int, default=len(machine.available_cpus()))
    add("--parts", action=argparse.BooleanOptionalAction, default=True, help="profile a step")
    add("--out", type=Path, default=RESULTS, help="the folder of the results")
    add("--name", default="torch", help="the results' file name; what is there is added to")
    return parser


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.command == "report":
        path = options.result
        result = json.loads(path.read_text())
        if options.readme is not None:
            insert(options.readme, "bench-torch", summary(result))
    else:
        path = options.out / f"{options.name}.json"
        result = measure(options, path)
    path.with_suffix(".md").write_text(tables(result))
    print(tables(result))


def summary(result: dict[str, Any]) -> str:
    """The table of steps, for a page."""
    return "\n".join([conditions(result), "", *step_table(result)])


if __name__ == "__main__":
    main(sys.argv[1:])
