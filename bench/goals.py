"""What fastbn is to reach, and whether it does. Every goal is a ratio of times with a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.cases import CALL, ITEMSIZES
from bench.figures import Figures, Key, Time, geometric_mean, ratio, shape_name
from bench.libraries import FASTBN, FASTBN_AVX2, TORCH

MB = 1 << 20
NOISE = 1.05
# The cost of a call, in multiples of np.add.
CALL_LIMITS = {"eval": 3.0, "train": 5.0, "train_inplace": 6.0, "backward": 5.0}
LARGE_SHAPES = ("32x64x112x112", "32x256x56x56", "32x512x28x28")

Ratio = Callable[[Figures, Key, str], float | None]


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
    applies: Callable[[Figures, Key], bool] = lambda figures, key: True

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


def avx2_over_best(figures: Figures, key: Key, layout: str) -> float | None:
    return ratio(figures.best(key, [FASTBN_AVX2], [layout]), figures.fastbn(key, layout))


def step_over_torch(figures: Figures, key: Key, layout: str) -> float | None:
    """Training forward and backward together, torch in NCHW as well."""
    keys = [key._replace(case=key.case._replace(operation=op)) for op in ("train", "backward")]
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


def above_mb(figures: Figures, key: Key) -> bool:
    """Tell whether x is larger than 1 MB, in float32."""
    return key.case.bytes / ITEMSIZES[key.case.dtype] * 4 > MB


def bound_by_one_thread(figures: Figures, key: Key) -> bool:
    """Tell whether a case is above 1 MB and one thread takes more than twice the floor of all."""
    slowness = ratio(figures.one_thread(key, "nchw"), figures.floor(key))
    return above_mb(figures, key) and slowness is not None and slowness > 2.0


def has_16_threads(figures: Figures, key: Key) -> bool:
    return key.threads == 16 and shape_name(key.case) in LARGE_SHAPES


FORWARD_AND_BACKWARD = ("eval", "train", "backward")
HALF = ("float16", "bfloat16")


def _goals() -> list[Goal]:
    """All of them, in the order of the report."""
    goals = []
    for operation, name, floor, limit in (
        ("eval", "evaluation forward", "copy", 1.1),
        ("train", "training forward", "copy", 1.3),
        ("backward", "backward", "add", 1.3),
    ):
        one = (operation,)
        goals.append(Goal(f"{name} / {floor}", over_floor, limit, one, short="floor"))
        goals.append(Goal(f"{name} / fastest peer", over_peer, 1.0, one, short="peer"))
        if operation != "eval":
            goals.append(Goal(f"{name} / fastest peer", over_peer, 0.8, one, mean=True))
    goals.append(
        Goal("training forward in place / copy", over_floor, 1.0, ("train_inplace",), short="floor")
    )
    for operation in FORWARD_AND_BACKWARD:
        one, name = (operation,), f"channels-last {operation}"
        goals.append(Goal(f"{name} / floor", over_floor, 1.6, one, "nhwc", short="floor"))
        goals.append(Goal(f"{name} / fastest peer", over_peer, 1.0, one, "nhwc", short="peer"))
    for dtype in HALF:
        about = {"dtypes": (dtype,), "operations": FORWARD_AND_BACKWARD}
        goals += [
            Goal(
                f"{dtype} / float32, above 1 MB",
                over_float32,
                1.0,
                applies=above_mb,
                short="float32",
                **about,
            ),
            Goal(f"{dtype} / torch", over_torch, 1.0, short="torch", **about),
        ]
    return [
        *goals,
        Goal("train + backward / torch eager NCHW", step_over_torch, 0.2, ("train",), mean=True),
        Goal("a call on 1x64x1x1 / torch's module", call_over_torch, 0.5, (CALL,)),
        Goal(
            "all threads / one thread, above 1 MB, not bound by memory",
            over_one_thread,
            1 / 1.8,
            FORWARD_AND_BACKWARD,
            applies=bound_by_one_thread,
        ),
        Goal(
            f"all threads / one thread (up to {NOISE} is noise)",
            over_one_thread,
            NOISE,
            FORWARD_AND_BACKWARD,
        ),
        Goal("AVX2 / best instruction set", avx2_over_best, 1.3, FORWARD_AND_BACKWARD),
        Goal(
            "training forward / copy, 16 threads, large shapes",
            over_floor,
            1.5,
            ("train",),
            applies=has_16_threads,
        ),
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


def limit_over_floor(operation: str, device: str = "cpu") -> float:
    """How far above the floor an operation in NCHW may be."""
    goals = goals_on(device)
    return next(g.limit for g in goals if g.ratio is over_floor and operation in g.operations)


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


def misses(figures: Figures, key: Key, layout: str) -> list[str] | None:
    """The goals that a single case misses, by their short names; None if it has no goal."""
    own = [goal for goal in goals_on(figures.device) if goal.short and goal.concerns(key, layout)]
    values = [
        (goal, goal.ratio(figures, key, layout)) for goal in own if goal.applies(figures, key)
    ]
    values = [(goal, value) for goal, value in values if value is not None]
    return [goal.short for goal, value in values if value > goal.limit] if values else None
