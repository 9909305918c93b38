"""Names of array types in annotations, and what normalizations are fused with."""

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["Array", "ArrayLike", "DTypeLike", "Epilogue", "Gate", "NDArray", "Statistics"]

Array: TypeAlias = NDArray[Any]
Statistics: TypeAlias = NDArray[np.float64]


class Epilogue(NamedTuple):
    """What follows a normalization in the same pass over memory."""

    activation: str | None
    negative_slope: float
    residual: Array | None  # is added before the activation
    alive: Array | None = None  # of `new_alive`: takes where the derivative is 1


class Gate(NamedTuple):
    """What dy passes before a backward uses it: the derivative of the forward's activation.

    `alive` or the activation's output `y` tell the derivatives; without both they are computed from
    the input again, and the residual.
    """

    activation: str | None
    negative_slope: float
    weight: Array | None = None  # those of the forward
    bias: Array | None = None
    residual: Array | None = None
    y: Array | None = None
    alive: Array | None = None
    inverted: bool = False  # whether the input is the output of a forward in place
    derived: Array | None = None  # where to write dy times the derivative: what the residual gets
    derived_is_new: bool = False  # whether nobody else has that memory

    @property
    def is_known(self) -> bool:
        """Whether the derivatives are told, not computed."""
        return self.alive is not None or self.y is not None
