"""What is measured: operations on shapes; their data, and what is right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.arrays import Array, new_array

# Batch normalization with an activation after it, or with an addition and a ReLU.
ACTIVATIONS = {"leaky_relu": "leaky ReLU", "relu6": "ReLU6", "relu": "ReLU"}
ACTIVATED = {
    "eval_relu": "evaluation forward + ReLU",
    "train_relu": "training forward + ReLU",
    "backward_relu": "backward + ReLU",
    "eval_relu6": "evaluation forward + ReLU6",
    "train_relu6": "training forward + ReLU6",
    "backward_relu6": "backward + ReLU6",
    "eval_leaky_relu": "evaluation forward + leaky ReLU",
    "train_leaky_relu": "training forward + leaky ReLU",
    "backward_leaky_relu": "backward + leaky ReLU",
    "eval_add_relu": "evaluation forward + addition + ReLU",
    "train_add_relu": "training forward + addition + ReLU",
    "backward_add_relu": "backward + addition + ReLU",
}
# A training forward with its backward, of layers on a GPU: by itself, and what has kernels of its
# own there or is composed.
STEPS = {
    "step": "training step",
    "step_masked": "training step with a mask",
    "step_ghosts": "training step, ghost batches of 8",
    "step_instance": "training step of an InstanceNorm",
    "step_group": "training step of a GroupNorm of 32 groups",
    "step_relu": "training step + ReLU",
    "step_add_relu": "training step + addition + ReLU",
}
# The same of a GroupNorm, whose evaluation normalizes as its training does.
GROUPED = {
    "eval_group": "evaluation forward of a GroupNorm of 32 groups",
    "train_group": "training forward of a GroupNorm of 32 groups",
    "backward_group": "backward of a GroupNorm of 32 groups",
}
GHOST_BATCH, GROUPS = 8, 32
# A training forward in place with its backward in place, of a layer of fastbn's.
STEPS_IN_PLACE = {
    "step_inplace": "training step in place",
    "step_relu_inplace": "training step in place + ReLU",
    "step_leaky_relu_inplace": "training step in place + leaky ReLU",
}
OPERATIONS = {
    "eval": "evaluation forward",
    "eval_inplace": "evaluation forward in place",
    "train": "training forward",
    "train_inplace": "training forward in place",
    "backward": "backward",
    "backward_inplace": "backward in place",
    "eval_fresh": "evaluation forward, new array",
    "train_fresh": "training forward, new array",
    "backward_fresh": "backward, new array",
    **ACTIVATED,
}
NAMES = OPERATIONS | GROUPED | STEPS | STEPS_IN_PLACE
# A training forward right after NumPy has multiplied two square matrices, by the number of rows:
# the threads of OpenBLAS, which waits by spinning, then still have the CPUs.
PRODUCTS = {"train_after_256": 256, "train_after_768": 768}
PRODUCTS_SHAPE = (32, 64, 56, 56)
# What only reads and writes so many arrays: y = x; y = a + b; two results of a and b.
FLOORS = {2: "copy", 3: "add", 4: "pair", 5: "copy and add"}
# The cost of a call: on a GPU an evaluation forward on an array too small to matter, into a new
# array; on a CPU what calls.py measures.
CALL, CALL_SHAPE = "call", (1, 64, 1, 1)

# A result may be so far off, relative to the largest value: whoever is further off is broken.
TOLERANCES = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}

EPS = 1e-5
MOMENTUM = 0.1
NEGATIVE_SLOPE = 0.01
CAPS = {"relu6": 6.0}
BATCH_OF_NETWORKS = 32
ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

SHAPES = Path(__file__).with_name("shapes.json")


class Case(NamedTuple):
    """An operation on arrays of a shape and dtype."""

    operation: str
    shape: tuple[int, int, int, int]
    dtype: str

    @property
    def step(self) -> bool:
        """Whether a forward and a backward are measured together."""
        return self.operation in STEPS or self.operation in STEPS_IN_PLACE

    @property
    def masked(self) -> bool:
        return self.operation == "step_masked"

    @property
    def grouped(self) -> bool:
        """Whether a GroupNorm is measured, by a call at a time."""
        return self.operation in GROUPED

    @property
    def batch(self) -> int:
        """The samples that are normalized together."""
        sizes = {"step_ghosts": GHOST_BATCH, "step_instance": 1, "step_group": 1}
        return 1 if self.grouped else sizes.get(self.operation, self.shape[0])

    @property
    def group(self) -> int:
        """The channels that are normalized together."""
        return self.shape[1] // GROUPS if self.operation.endswith("_group") else 1

    @property
    def bytes(self) -> int:
        """The size of x."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    def has_data_of(self, other: Case) -> bool:
        """Tell whether the arrays of another case serve this one."""
        return (self.shape, self.dtype) == (other.shape, other.dtype)

    @property
    def forward(self) -> bool:
        return not self.operation.startswith("backward")

    @property
    def evaluation(self) -> bool:
        return self.operation.startswith("eval") or self.operation == CALL

    @property
    def in_place(self) -> bool:
        return self.operation.endswith("_inplace")

    @property
    def runs_away(self) -> bool:
        """Whether calls that are repeated in place let the values grow or shrink.

        A training forward by itself normalizes what the one before has normalized.
        """
        return self.in_place and self.operation != "train_inplace"

    @property
    def fresh(self) -> bool:
        """Whether no memory is given for the result."""
        return self.operation.endswith("_fresh") or self.operation == CALL

    @property
    def activation(self) -> str | None:
        """The activation that follows."""
        operation = self.operation.removesuffix("_inplace")
        return next((name for name in ACTIVATIONS if operation.endswith(f"_{name}")), None)

    @property
    def activated(self) -> bool:
        """Whether an activation follows."""
        return self.activation is not None

    @property
    def has_residual(self) -> bool:
        """Whether something is added before the activation."""
        return self.operation.endswith("_add_relu")

    @property
    def floor(self) -> str:
        """What of the floor reads and writes as many arrays."""
        return FLOORS[self.streams]

    @property
    def streams(self) -> int:
        """How many arrays of x's size are read and written at least.

        x and y, or dy, x and dx; with a residual this one or its gradient. A step is both, and with
        a residual held against the same: no floor has its arrays.
        """
        if self.step:
            return 5
        return (2 if self.forward else 3) + self.has_residual


class Data:
    """The arrays of all cases of a shape and dtype. Nobody may write to them."""

    def __init__(self, case: Case) -> None:
        self.case, self.shape, self.dtype = case, case.shape, dtype_of(case.dtype)
        rng = np.random.default_rng(1)
        channels = case.shape[1]
        parameters = np.float64 if case.dtype == "float64" else np.float32
        self.weight = rng.uniform(0.8, 1.2, channels).astype(parameters)
        self.bias = rng.normal(0.0, 0.2, channels).astype(parameters)
        self.running_mean = rng.normal(0.5, 0.1, channels).astype(parameters)
        self.running_var = rng.uniform(1.0, 1.5, channels).astype(parameters)

    @cached_property
    def x(self) -> Array:
        return self._values(seed=2, mean=0.5)

    @cached_property
    def dy(self) -> Array:
        return self._values(seed=3, mean=0.1)

    @cached_property
    def residual(self) -> Array:
        return self._values(seed=4, mean=0.0)

    @cached_property
    def mask(self) -> Array:
        """Three of four positions."""
        n, _, *image = self.shape
        return np.random.default_rng(5).random((n, 1, *image)) < 0.75

    @cached_property
    def mean(self) -> Array:
        """The batch's own mean, for those who take it as an argument of their backward."""
        return self.x.mean((0, 2, 3), dtype=self.weight.dtype)

    @cached_property
    def var(self) -> Array:
        return self.x.var((0, 2, 3), dtype=self.weight.dtype)

    def _values(self, seed: int, mean: float) -> Array:
        """Normally distributed values; a long block of them, repeated, which is soon made."""
        array = new_array(self.shape, self.dtype)
        flat, block = array.reshape(-1), normal(seed, mean).astype(self.dtype)
        for begin in range(0, flat.size, block.size):
            piece = flat[begin : begin + block.size]
            piece[...] = block[: piece.size]
        return array


@cache
def normal(seed: int, mean: float) -> Array:
    """A million normally distributed values."""
    return np.random.default_rng(seed).normal(mean, 1.0, 1_000_003)


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of a name; bfloat16 is not NumPy's own."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def check(case: Case, data: Data, arrays: Mapping[str, Array]) -> None:
    """Raise ArithmeticError unless the result is right, judged by a few channels.

    `arrays` has y, or dx with dweight and dbias, and dresidual where there was one; nothing where
    there is no batch normalization.
    """
    if not arrays:
        return
    channels = sorted({0, case.shape[1] // 2, case.shape[1] - 1})
    by_parts = case.step or case.grouped
    wanted, value = (_expected_of_parts if by_parts else _expected)(case, data, channels)
    tolerance = TOLERANCES[case.dtype]
    # So near to a kink, rounding decides what the derivative of an activation is.
    backward = case.step or not case.forward
    is_decided = (np.abs(value) > tolerance) & (np.abs(value - 6.0) > tolerance)
    decided = is_decided if case.activated and backward else True
    count = math.prod(case.shape) // max(case.shape[1], 1)
    for name, want in wanted.items():
        array = arrays[name]
        got = array[channels] if array.ndim == 1 else array[:, channels]
        # The gradients of the parameters are sums of `count` values of about 1.
        size = count if array.ndim == 1 else np.abs(want).max()
        errors = np.abs(got.astype(np.float64) - want)
        certain = array.ndim == 1 or name == "y"
        error = (errors if certain else np.where(decided, errors, 0.0)).max() / size
        if not error <= tolerance:
            raise ArithmeticError(f"wrong result: {name} is off by {error:.1e}")


def _expected(case: Case, data: Data, channels: list[int]) -> tuple[dict[str, Array], Array]:
    """The result on some channels, in float64, and the value before an activation."""
    x = data.x[:, channels].astype(np.float64)
    column = (1, -1, 1, 1)
    weight, bias = (v[channels].reshape(column) for v in (data.weight, data.bias))
    mean, var = data.running_mean[channels], data.running_var[channels]
    if not case.evaluation:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    invstd = 1 / np.sqrt(var.astype(np.float64) + EPS).reshape(column)
    xhat = (x - mean.reshape(column)) * invstd
    value = xhat * weight + bias
    if case.has_residual:
        value += data.residual[:, channels].astype(np.float64)
    if case.forward:
        return {"y": activated(case, value)}, value
    dy = data.dy[:, channels].astype(np.float64) * derivative(case, value)
    dbias, dweight = dy.sum((0, 2, 3)), (dy * xhat).sum((0, 2, 3))
    mean_dy, mean_dy_xhat = (
        v.reshape(column) / (x.size // len(channels)) for v in (dbias, dweight)
    )
    dx = (dy - mean_dy - xhat * mean_dy_xhat) * invstd * weight
    gradients = {"dx": dx, "dweight": dweight, "dbias": dbias}
    return gradients | ({"dresidual": dy} if case.has_residual else {}), value


def _expected_of_parts(
    case: Case, data: Data, channels: list[int]
) -> tuple[dict[str, Array], Array]:
    """The same of a step, or of what is normalized together by a mask, in batches or in groups."""
    n, _, height, width = case.shape
    members = [c // case.group * case.group + k for c in channels for k in range(case.group)]
    chosen = [i * case.group + c % case.group for i, c in enumerate(channels)]
    # Batches, samples of a batch, groups, channels of a group, image: sums are over a cell.
    cells = n // case.batch, case.batch, len(channels), case.group, height, width
    axes = (1, 3, 4, 5)

    def in_cells(array: Array) -> Array:
        return array[:, members].astype(np.float64).reshape(cells)

    def of_channels(array: Array) -> Array:
        return array.reshape(n, len(members), height, width)[:, chosen]

    def mean(array: Array) -> Array:
        return (array * valid).sum(axes, keepdims=True) / count

    weight, bias = (v[members].reshape(1, 1, *cells[2:4], 1, 1) for v in (data.weight, data.bias))
    valid = np.ones(cells, bool)
    if case.masked:
        valid &= data.mask.reshape(*cells[:2], 1, 1, height, width)
    count = valid.sum(axes, keepdims=True)
    x = in_cells(data.x)
    centred = x - mean(x)
    invstd = 1 / np.sqrt(mean(centred**2) + EPS)
    xhat = centred * invstd
    value = (xhat * weight + bias) * valid
    if case.has_residual:
        value += in_cells(data.residual)
    dy = in_cells(data.dy) * valid * derivative(case, value)
    gradient = dy * weight
    dx = (gradient - mean(gradient) - xhat * mean(gradient * xhat)) * invstd * valid
    y = {"y": of_channels(activated(case, value))}
    gradients = {
        "dx": of_channels(dx),
        "dweight": (dy * xhat).sum((0, 1, 4, 5)).reshape(-1)[chosen],
        "dbias": dy.sum((0, 1, 4, 5)).reshape(-1)[chosen],
    }
    wanted = y | gradients if case.step else y if case.forward else gradients
    return wanted, of_channels(value)


def activated(case: Case, value: Array) -> Array:
    """A value through the activation of a case."""
    if case.activation is None:
        return value
    flat = NEGATIVE_SLOPE * value if case.activation == "leaky_relu" else 0.0
    return np.minimum(np.where(value > 0.0, value, flat), CAPS.get(case.activation, np.inf))


def derivative(case: Case, value: Array) -> Array | float:
    """The derivative of the activation of a case at a value."""
    if case.activation is None:
        return 1.0
    is_alive = (value > 0.0) & (value < CAPS.get(case.activation, np.inf))
    return np.where(is_alive, 1.0, NEGATIVE_SLOPE if case.activation == "leaky_relu" else 0.0)


# The shapes.


def shapes_of(names: str) -> list[tuple[int, int, int, int]]:
    """The shapes of a comma-separated list of names and of shapes such as 32x64x56x56."""
    lists = json.loads(SHAPES.read_text())
    shapes = []
    for name in names.split(","):
        if name in lists:
            shapes += [_with_batch(entry) for entry in lists[name]]
        elif re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", name):
            shapes.append(tuple(map(int, name.split("x"))))
        else:
            raise SystemExit(f"neither a shape such as 32x64x56x56 nor one of the lists: {name}")
    return list(dict.fromkeys(shapes))


def _with_batch(entry: list[Any]) -> tuple[int, ...]:
    """A shape of the file; those of networks lack the batch and have a number of layers."""
    return (BATCH_OF_NETWORKS, *entry[0]) if isinstance(entry[0], list) else tuple(entry)


def growing_shapes() -> list[tuple[int, int, int, int]]:
    """Shapes whose float32 arrays take 1, 2, 4 KB and so on, and 400 MB: images, then batches."""
    images = [(1, 64, 2 << (k // 2), 2 << ((k + 1) // 2)) for k in range(11)]
    return images + [(n, 64, 64, 64) for n in (2, 4, 8, 16, 32, 64, 128, 256, 400)]
