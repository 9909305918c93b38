"""What fastbn is to reach, and whether it does. Every goal is a ratio of times with a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from bench.cases import ACTIVATED, CALL, PRODUCTS
from bench.figures import (
    Figures,
    Key,
    Time,
    geometric_mean,
    ratio,
    shape_name,
    with_operation,
)
from bench.libraries import FASTBN, FASTBN_AVX2, FASTBN_BASE, TORCH

MIB = 1 << 20
NOISE = 1.05
# Of all figures, so many may miss their limits.
MAY_MISS = 0.1
# The cost of a call, in multiples of np.add.
CALL_LIMITS = {"eval": 3.0, "train": 5.0, "train_inplace": 6.0, "backward": 5.0}
# What may follow the normalization adds to that, in a call "with" something.
FOLLOWED_ALLOWANCE = 1.0
# Arrays of 16-bit elements may be so much further above a copy of their bytes than others are.
HALF_ALLOWANCE = 0.3
HALF = ("float16", "bfloat16")
FORWARD_AND_BACKWARD = ("eval", "train", "backward")
FRESH = ("eval_fresh", "train_fresh", "backward_fresh")
LAYOUT_WORDS = {"nchw": "", "nhwc": "channels-last "}

Ratio = Callable[[Figures, Key, str], float | None]
Applies = Callable[[Figures, Key], bool]


class Goal(NamedTuple):
    """The ratio is to be within the limit, on every case or in the geometric mean."""

    name: str
    ratio: Ratio
    limit: float
    operations: tuple[str, ...]
    layout: str = "nchw"
    dtypes: tuple[str, ...] = ("float32",)
    mean: bool = False
    # A word for a case that misses it.
    short: str = ""
    applies: Applies = lambda figures, key: True

    def concerns(self, key: Key, layout: str) -> bool:
        """Tell whether the goal is about this case."""
        case = key.case
        return (case.operation in self.operations and case.dtype in self.dtypes) and (
            layout == self.layout
        )


class CaseRatio(NamedTuple):
    """The ratio of a goal in one case."""

    name: str
    value: float


def over_floor(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.fastbn(key, layout), figures.floor(key))


def over_peer(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.fastbn(key, layout), figures.peer(key))


def over_torch(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.fastbn(key, layout), figures.torch(key))


def over_float32(figures: Figures, key: Key, layout: str) -> float | None:
    same = key._replace(case=key.case._replace(dtype="float32"))
    return ratio(figures.fastbn(key, layout), figures.fastbn(same, layout))


def over_one_thread(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.fastbn(key, layout), figures.one_thread(key, layout))


def over_out(figures: Figures, key: Key, layout: str) -> float | None:
    """A new array for the result, over one that is there."""
    given = with_operation(key, key.case.operation.removesuffix("_fresh"))
    return ratio(figures.fastbn(key, layout), figures.fastbn(given, layout))


def over_without(figures: Figures, key: Key, layout: str) -> float | None:
    """With what follows the normalization, over the normalization by itself."""
    suffix = "_inplace" if key.case.in_place else ""
    without = with_operation(key, key.case.operation.split("_")[0] + suffix)
    return ratio(figures.fastbn(key, layout), figures.fastbn(without, layout))


def over_unfused(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.fastbn(key, layout), figures.unfused(key, layout))


def over_torch_nchw(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.fastbn(key, layout), figures.torch(key, ["nchw"]))


def over_quiet(figures: Figures, key: Key, layout: str) -> float | None:
    """After a matrix product, over the better of all threads and one without."""
    quiet = with_operation(key, "train")
    times = figures.fastbn(quiet, layout), figures.one_thread(quiet, layout)
    best = min((time for time in times if time is not None), default=None)
    return ratio(figures.fastbn(key, layout), best)


def avx2_over_best(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.best(key, [FASTBN_AVX2], [layout]), figures.fastbn(key, layout))


def baseline_over_best(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.best(key, [FASTBN_BASE], [layout]), figures.fastbn(key, layout))


def step_over_torch(figures: Figures, key: Key, layout: str) -> float | None:
    """Training forward and backward together, torch in NCHW as well."""
    keys = [with_operation(key, operation) for operation in ("train", "backward")]
    ours = [figures.fastbn(k, layout) for k in keys]
    theirs = [figures.torch(k, ["nchw"]) for k in keys]
    return ratio(_sum(ours), _sum(theirs))


def call_over_torch(figures: Figures, key: Key, layout: str) -> float | None:
    """The shortest of many calls, as the rest is not the call's own doing."""
    ours, theirs = (figures.minima.get((key, library)) for library in (FASTBN, TORCH))
    return ours / theirs if ours and theirs else None


def _sum(times: list[Time | None]) -> Time | None:
    if None in times:
        return None
    return times[0]._replace(ms=sum(time.ms for time in times))


def above(mib: float) -> Applies:
    """Cases whose x is larger than so many MiB."""
    return lambda figures, key: key.case.bytes > mib * MIB


def from_1_mib(figures: Figures, key: Key) -> bool:
    return key.case.bytes >= MIB


def both(one: Applies, other: Applies) -> Applies:
    return lambda figures, key: one(figures, key) and other(figures, key)


def all_but(those: Applies) -> Applies:
    return lambda figures, key: not those(figures, key)


def short_runs(figures: Figures, key: Key) -> bool:
    """Tell whether the runs of a channel have 49 elements."""
    return key.case.shape[2:] == (7, 7)


STREAMING = Figures.floor_streams
SHORT_RUNS, LONG_RUNS = both(above(1), short_runs), both(above(1), all_but(short_runs))
# How far above the floor an operation may be: above a copy, the backward above an addition.
FLOOR_LIMITS: list[tuple[str, str, float, str, Applies]] = [
    ("eval", "nchw", 1.1, "", above(1)),
    ("train", "nchw", 1.25, "", LONG_RUNS),
    ("train", "nchw", 2.0, ", 7x7", SHORT_RUNS),
    ("train_inplace", "nchw", 0.85, ", ordinary", both(LONG_RUNS, all_but(STREAMING))),
    ("train_inplace", "nchw", 1.1, ", streaming", both(LONG_RUNS, STREAMING)),
    ("train_inplace", "nchw", 2.0, ", 7x7", SHORT_RUNS),
    ("backward", "nchw", 1.3, "", above(1)),
    ("eval", "nhwc", 1.1, "", above(1)),
    ("train", "nhwc", 1.7, "", above(1)),
    ("backward", "nhwc", 1.9, "", above(1)),
]
# The time over that of the fastest peer in its best layout: above 8 MiB, and below.
PEER_LIMITS: list[tuple[str, str, float, float]] = [
    ("eval", "nchw", 1.0, 1.05),
    ("train", "nchw", 0.95, 1.05),
    ("train_inplace", "nchw", 0.9, 1.05),
    ("backward", "nchw", 0.85, 1.05),
    ("eval", "nhwc", 1.0, 1.05),
    ("train", "nhwc", 1.0, 1.05),
    ("backward", "nhwc", 1.0, 1.05),
]
# The operations with an activation alone, and how far above the floor those with a residual may be:
# above an addition, the backward above two results of two arrays.
ALONE = tuple(operation for operation in ACTIVATED if "add" not in operation)
# A step in place reads and writes 5 arrays; a copy of x is 2 more. The limits over one without.
IN_PLACE_LIMITS = {"step_relu_inplace": 1.1 * 7 / 5, "step_leaky_relu_inplace": 1.05}
RESIDUAL_LIMITS = {"eval_add_relu": 1.25, "train_add_relu": 1.4, "backward_add_relu": 1.4}


def _floor_goals(dtype: str) -> list[Goal]:
    """How far above the floor the operations on a dtype may be, above 1 MiB."""
    allowance = HALF_ALLOWANCE if dtype in HALF else 0.0
    goals = []
    for operation, layout, limit, what, applies in FLOOR_LIMITS:
        floor = "add" if operation == "backward" else "copy"
        name = f"{dtype} {LAYOUT_WORDS[layout]}{operation} / {floor}{what}"
        about = (operation,), layout, (dtype,), False, "floor", applies
        goals.append(Goal(name, over_floor, round(limit + allowance, 2), *about))
    return goals


def _peer_goals() -> list[Goal]:
    """How long the operations may take beside the fastest peer."""
    goals = []
    for operation, layout, *limits in PEER_LIMITS:
        name = f"float32 {LAYOUT_WORDS[layout]}{operation} / fastest peer"
        sizes = (", above 8 MiB", above(8)), (", up to 8 MiB", all_but(above(8)))
        for limit, (what, applies) in zip(limits, sizes, strict=True):
            about = (operation,), layout, ("float32",), False, "peer", applies
            goals.append(Goal(f"{name}{what}", over_peer, limit, *about))
    return goals


def _half_goals(dtype: str) -> list[Goal]:
    """What 16 bits are to gain, above 1 MiB."""
    about = FORWARD_AND_BACKWARD, "nchw", (dtype,), False
    return [
        Goal(f"{dtype} / float32", over_float32, 0.8, *about, "float32", above(1)),
        Goal(f"{dtype} / torch", over_torch, 1.0, *about, "torch", above(1)),
    ]


def _activation_goals() -> list[Goal]:
    """What activations, and an addition before one, may take in the pass of the normalization."""
    options = "nchw", ("float32",), False, "without", from_1_mib
    goals = [Goal("float32 with / without an activation", over_without, 1.05, ALONE, *options)]
    for operation, limit in IN_PLACE_LIMITS.items():
        name = f"float32 {operation} / without"
        goals.append(Goal(name, over_without, round(limit, 2), (operation,), *options))
    for operation, limit in RESIDUAL_LIMITS.items():
        floor = "pair" if operation.startswith("backward") else "add"
        about = (operation,), "nchw", ("float32",), False, "floor", from_1_mib
        goals.append(Goal(f"float32 {operation} / {floor}", over_floor, limit, *about))
    means = tuple(RESIDUAL_LIMITS), "nchw", ("float32",), True, "", from_1_mib
    return [
        *goals,
        Goal("addition and ReLU fused / unfused", over_unfused, 1 / 1.6, *means),
        Goal("addition and ReLU fused / torch eager NCHW", over_torch_nchw, 1 / 2.5, *means),
    ]


def _goals() -> list[Goal]:
    """All of them, in the order of the report."""
    all_three = FORWARD_AND_BACKWARD
    return [
        *_floor_goals("float32"),
        *_peer_goals(),
        *(goal for dtype in HALF for goal in _floor_goals(dtype) + _half_goals(dtype)),
        *_activation_goals(),
        Goal("train + backward / torch eager NCHW", step_over_torch, 0.3, ("train",), mean=True),
        Goal(
            "new array / out=, above 20 MiB", over_out, 1.1, FRESH, applies=above(20), short="out"
        ),
        Goal("train after a matrix product / before", over_quiet, 1.2, tuple(PRODUCTS)),
        Goal("float64 / float32", over_float32, 2.2, all_three, dtypes=("float64",)),
        Goal("all threads / one thread", over_one_thread, NOISE, all_three),
        Goal("AVX2 / best, above 8 MiB", avx2_over_best, 1.3, all_three, applies=above(8)),
        Goal("baseline / best, above 8 MiB", baseline_over_best, 2.0, all_three, applies=above(8)),
    ]


GOALS = _goals()


def above_10_mb(figures: Figures, key: Key) -> bool:
    return key.case.bytes > 10e6


def fits_l2(figures: Figures, key: Key) -> bool:
    """Tell whether x fits the 50 MB that the second-level cache of an H100 has."""
    return key.case.bytes <= 50e6


def is_above_l2(figures: Figures, key: Key) -> bool:
    return not fits_l2(figures, key)


def channel_fits_chip(figures: Figures, key: Key) -> bool:
    """Tell whether a channel fits the shared memory of eight multiprocessors."""
    return key.case.bytes / key.case.shape[1] <= 8 * 227 * 1024


def channel_exceeds_chip(figures: Figures, key: Key) -> bool:
    return not channel_fits_chip(figures, key)


def _cuda_goals() -> list[Goal]:
    """The goals on a GPU, for both layouts and for float16 over a copy of its own."""
    goals = []
    for dtype in ("float32", "float16"):
        for layout, words in (("nchw", ""), ("nhwc", "channels-last ")):
            for operation, what, limit, applies in (
                ("eval", "eval / copy, above 10 MB", 1.05, above_10_mb),
                ("train", "train / copy, small channels", 1.2, channel_fits_chip),
                ("train", "train / copy, larger ones", 1.5, channel_exceeds_chip),
                ("backward", "backward / add, above 50 MB", 1.67, is_above_l2),
                ("backward", "backward / add, below", 1.3, fits_l2),
            ):
                name = f"{dtype} {words}{what}"
                about = {"layout": layout, "dtypes": (dtype,), "applies": applies}
                goals.append(Goal(name, over_floor, limit, (operation,), short="floor", **about))
            name = f"{dtype} {words}/ fastest peer"
            about = {"layout": layout, "dtypes": (dtype,), "short": "peer"}
            goals.append(Goal(name, over_peer, 1.0, FORWARD_AND_BACKWARD, **about))
    return [*goals, Goal("a call on 1x64x1x1 / torch's module", call_over_torch, 1.0, (CALL,))]


CUDA_GOALS = _cuda_goals()


def goals_on(device: str) -> list[Goal]:
    """The goals for arrays on a device."""
    return GOALS if device == "cpu" else CUDA_GOALS


def limit_over_floor(operation: str, device: str = "cpu") -> float | None:
    """How far above the floor an operation in NCHW may be; None where that is no goal."""
    goals = [goal for goal in goals_on(device) if goal.ratio is over_floor]
    return next((goal.limit for goal in goals if operation in goal.operations), None)


def ratios_of(goal: Goal, figures: Figures, threads: int) -> list[CaseRatio]:
    """The ratios of a goal that were measured."""
    found = []
    for key in figures.keys(threads=threads):
        if goal.concerns(key, goal.layout) and goal.applies(figures, key):
            value = goal.ratio(figures, key, goal.layout)
            name = shape_name(key.case)
            if len(goal.operations) > 1:
                name += f" {key.case.operation}"
            if value is not None:
                found.append(CaseRatio(name, value))
    return found


def met(goal: Goal, found: list[CaseRatio]) -> bool:
    """Tell whether the ratios, of which there is at least one, meet the goal."""
    if goal.mean:
        return geometric_mean(each.value for each in found) <= goal.limit
    return all(each.value <= goal.limit for each in found)


class Verdict(NamedTuple):
    """A figure that has a limit."""

    goal: str
    case: str
    value: float
    limit: float

    @property
    def missed(self) -> bool:
        return self.value > self.limit


def verdicts(figures: Figures, threads: int) -> list[Verdict]:
    """On every ratio that has a limit, and on the means where the limit is theirs."""
    result = []
    for goal in goals_on(figures.device):
        found = ratios_of(goal, figures, threads)
        if goal.mean and found:
            mean = geometric_mean(each.value for each in found)
            found = [CaseRatio("geometric mean", mean)]
        result += [Verdict(goal.name, *each, goal.limit) for each in found]
    return result


def call_limit(call: str, operation: str) -> float:
    """What a call may cost."""
    return CALL_LIMITS[operation] + FOLLOWED_ALLOWANCE * (" with " in call)


def call_verdicts(costs: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """On what fastbn's calls cost."""
    return [
        Verdict(f"{call} / np.add", operation, cost["times_add"], call_limit(call, operation))
        for cost in costs
        if cost["library"] == FASTBN
        and (call := cost["call"])
        and (operation := cost["operation"]) in CALL_LIMITS
    ]


def misses(figures: Figures, key: Key, layout: str) -> list[str] | None:
    """The goals that a single case misses, by their short names; None if it has no goal."""
    own = [goal for goal in goals_on(figures.device) if goal.short and goal.concerns(key, layout)]
    values = [
        (goal, goal.ratio(figures, key, layout)) for goal in own if goal.applies(figures, key)
    ]
    values = [(goal, value) for goal, value in values if value is not None]
    return [goal.short for goal, value in values if value > goal.limit] if values else None
