from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

mask_padding: int

def platform() -> dict[str, Any]: ...
def omp_max_threads() -> int: ...
def omp_pause() -> bool: ...
def set_thread_policy(fixed: int, cpus: int, limit: int) -> None: ...
def set_threads_here(n: int) -> int: ...
def num_threads() -> int: ...
def avoid_waits(avoid: bool) -> None: ...
def layout(array: Array) -> int: ...
def stats(
    x: Array, mask: Array | None, batch_size: int, mean: Array, m2: Array, threads: int
) -> None: ...
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
    threads: int,
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
    threads: int,
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
    threads: int,
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
    threads: int,
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
    threads: int,
) -> None: ...
