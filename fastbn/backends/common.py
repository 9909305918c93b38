"""What a batch size and a momentum mean, to all backends and to those who call them."""

from __future__ import annotations

from fastbn._types import Array


def batches_of(x: Array, batch_size: int) -> int:
    """The number of batches of so many samples that x is; at least one."""
    return max(-(-len(x) // batch_size), 1) if batch_size else 1


def factors_of(momentum: float | None, counter: Array | None, batches: int) -> list[float]:
    """The weight of each batch in the running statistics."""
    if momentum is not None:
        return [momentum] * batches
    if counter is None:
        return [0.0] * batches
    return [1.0 / (int(counter) + k) for k in range(1, batches + 1)]
