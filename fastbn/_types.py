"""Names of array types in annotations."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["Array", "ArrayLike", "DTypeLike", "NDArray", "Statistics"]

Array: TypeAlias = NDArray[Any]
Statistics: TypeAlias = NDArray[np.float64]
