from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn._types import Epilogue

Array = NDArray[Any]
Statistics = NDArray[np.float64]

mask_padding: int
bits_padding: int

def platform() -> dict[str, Any]: ...
def omp_max_threads() -> int: ...
def omp_pause() -> bool: ...
def borrow_threads(library: str) -> bool: ...
def set_thread_policy(fixed: int, cpus: int, limit: int) -> None: ...
def set_threads_here(n: int) -> int: ...
def num_threads() -> int: ...
def set_nontemporal_bytes(limit: int) -> int: ...
def limit_free_memory(limit: int) -> int: ...
def release_free_memory() -> int: ...
def array_at(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], owner: Any
) -> Array: ...
def new_tensor_memory(x: Array, channels_last: bool) -> Array: ...
def reuses_memory(nbytes: int) -> bool: ...
def empty_like(x: Array, dtype: np.dtype[Any] | None = None) -> Array: ...
def layout(array: Array) -> int: ...
def stats(x: Array, mask: Array | None, batch_size: int, mean: Array, m2: Array) -> None: ...
def elemt(
    x: Array,
    mask: Array | None,
    mean: Array | None,
    invstd: Array | None,
    var: Array | None,
    eps: float,
    weight: Array | None,
    bias: Array | None,
    out: Array,
    activation: str | None = None,
    slope: float = 0.0,
    residual: Array | None = None,
    alive: Array | None = None,
) -> None: ...
def forward(
    x: Array,
    mask: Array | None,
    batch_size: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array,
    m2: Array,
    invstd: Array,
    activation: str | None = None,
    slope: float = 0.0,
    residual: Array | None = None,
    alive: Array | None = None,
) -> None: ...
def move_towards(
    running: Array, batches: Array, divisors: Sequence[float], factors: Sequence[float]
) -> None: ...
def backward_reduce(
    dy: Array,
    x: Array,
    mask: Array | None,
    mean: Array | None,
    invstd: Array | None,
    sum_dy: Array,
    sum_dy_xhat: Array,
) -> None: ...
def backward_elemt(
    dy: Array,
    x: Array,
    mask: Array | None,
    mean: Array | None,
    invstd: Array | None,
    weight: Array | None,
    sum_dy: Array | None,
    sum_dy_xhat: Array | None,
    count: float,
    out: Array,
) -> None: ...
def backward(
    dy: Array,
    x: Array,
    mask: Array | None,
    batch_size: int,
    weight: Array | None,
    mean: Array | None,
    invstd: Array | None,
    out: Array,
    sum_dy: Array,
    sum_dy_xhat: Array,
    gate: tuple[Any, ...] | None = None,
) -> None: ...
def alive_bytes(x: Array) -> int: ...
def activation_gradient(
    dy: Array,
    y: Array | None,
    alive: Array | None,
    activation: str | None,
    slope: float,
    out: Array,
) -> None: ...
def group_forward(
    x: Array,
    mask: Array | None,
    groups: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array,
    m2: Array,
    invstd: Array,
    activation: str | None = None,
    slope: float = 0.0,
    residual: Array | None = None,
    alive: Array | None = None,
) -> None: ...
def group_backward(
    dy: Array,
    x: Array,
    mask: Array | None,
    groups: int,
    weight: Array | None,
    factor: Array | None,
    mean: Array,
    invstd: Array,
    out: Array,
    sum_dy: Array,
    sum_dy_xhat: Array,
    dy_sums: Array,
    dy_xhat_sums: Array,
    gate: tuple[Any, ...] | None = None,
) -> None: ...
def group_gates(x: Array, weight: Array | None) -> bool: ...
def unrecoverable_channels(
    dtype: np.dtype[Any], count: float, weight: Array, bias: Array | None, slope: float
) -> list[int]: ...
def set_quick_path(on: bool) -> bool: ...
def know_bfloat16(dtype: np.dtype[Any]) -> None: ...
def try_evaluate(
    x: object,
    out: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    eps: object,
    activation: object,
    slope: object,
    residual: object,
    ranks: tuple[int, ...] | None,
    num_features: int | None,
    alive: Array | None = None,
    /,
) -> Array | None: ...
def try_train(
    x: object,
    out: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    momentum: object,
    eps: object,
    unbiased: object,
    activation: object,
    slope: object,
    residual: object,
    alive: Array | None = None,
    /,
) -> tuple[Array, Statistics, Statistics] | None: ...
def try_layer_frozen(
    x: object,
    out: object,
    running_mean: object,
    running_var: object,
    weight: object,
    bias: object,
    eps: object,
    activation: object,
    slope: object,
    residual: object,
    ranks: tuple[int, ...] | None,
    num_features: int,
    /,
) -> tuple[Array, SavedForBackward] | None: ...
def try_layer_train(
    x: object,
    out: object,
    running_mean: object,
    running_var: object,
    counter: object,
    weight: object,
    bias: object,
    momentum: object,
    eps: object,
    unbiased: object,
    activation: object,
    slope: object,
    residual: object,
    ranks: tuple[int, ...] | None,
    num_features: int | None,
    batch_size: object,
    by_instance: bool,
    keeps: bool,
    /,
) -> tuple[Array, SavedForBackward] | None: ...
def try_groups(
    x: object,
    out: object,
    num_groups: object,
    weight: object,
    bias: object,
    eps: object,
    activation: object,
    slope: object,
    residual: object,
    num_features: int | None,
    keeps: bool,
    /,
) -> tuple[Array, SavedForBackward] | None: ...
def try_backward(
    dy: object,
    x: object,
    weight: object,
    mean: object,
    invstd: object,
    out: object,
    bias: object,
    activation: object,
    slope: object,
    alive: Array | None = None,
    residual_out: object = None,
    frozen: bool = False,
    /,
) -> tuple[Array, Statistics, Statistics] | None: ...
def try_layer_backward(
    dy: object,
    saved: SavedForBackward,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    weight_grad: object,
    bias_grad: object,
    out: object,
    residual_out: object,
    /,
) -> tuple[Array, Array | None, Array | None, Array | None] | None: ...

class SavedForBackward:
    def __init__(
        self,
        x: Array,
        mean: Statistics,
        invstd: Statistics,
        in_place: bool = False,
        frozen: bool = False,
        kept: tuple[NDArray[np.intp] | None, Array] | None = None,
        mask: Array | None = None,
        batch_size: int = 0,
        weight: Statistics | None = None,
        bias: Statistics | None = None,
        epilogue: Epilogue | None = None,
        num_groups: int = 0,
    ) -> None: ...
    @property
    def x(self) -> Array: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def mean(self) -> Statistics: ...
    @property
    def invstd(self) -> Statistics: ...
    @property
    def in_place(self) -> bool: ...
    @property
    def frozen(self) -> bool: ...
    @property
    def kept(self) -> Array | None: ...
    @property
    def kept_channels(self) -> NDArray[np.intp] | None: ...
    @property
    def mask(self) -> Array | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def weight(self) -> Statistics | None: ...
    @property
    def bias(self) -> Statistics | None: ...
    @property
    def activation(self) -> str | None: ...
    @property
    def negative_slope(self) -> float: ...
    @property
    def has_residual(self) -> bool: ...
    @property
    def alive(self) -> Array | None: ...
    def has_changed(self) -> bool: ...
