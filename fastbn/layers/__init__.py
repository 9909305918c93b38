"""The layers: parameters, buffers, modes, momentum, lazy initialization, state.

The semantics are those of torch's layers of the same names, on NumPy arrays and, on a GPU, CuPy's.
`SyncBatchNorm` is imported from its own module, since it needs mpi4py.
"""

from fastbn.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.layers.groupnorm import GroupNorm
from fastbn.layers.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastbn.layers.lazy import (
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]
