from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, int, int]

def platform() -> dict[str, Any]: ...
def omp_max_threads() -> int: ...
def stats(
    x: Array, shape: Shape, channels_last: bool, mean: Array, m2: Array, threads: int
) -> None: ...
def elemt(
    x: Array,
    shape: Shape,
    channels_last: bool,
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
    shape: Shape,
    channels_last: bool,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array,
    m2: Array,
    invstd: Array,
    threads: int,
) -> None: ...
def backward_reduce(
    dy: Array,
    x: Array,
    shape: Shape,
    channels_last: bool,
    mean: Array | None,
    invstd: Array | None,
    sum_dy: Array,
    sum_dy_xhat: Array,
    threads: int,
) -> None: ...
def backward_elemt(
    dy: Array,
    x: Array,
    shape: Shape,
    channels_last: bool,
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
    shape: Shape,
    channels_last: bool,
    weight: Array | None,
    mean: Array | None,
    invstd: Array | None,
    out: Array,
    sum_dy: Array,
    sum_dy_xhat: Array,
    threads: int,
) -> None: ...
