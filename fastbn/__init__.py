"""Batch normalization for NumPy arrays, with the semantics of torch.nn.BatchNorm2d."""

from fastbn import functional
from fastbn._config import show_config
from fastbn._threads import get_num_threads, set_num_threads
from fastbn._version import __version__
from fastbn.folding import fold
from fastbn.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from fastbn.layers.instancenorm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from fastbn.layers.syncbatchnorm import SyncBatchNorm, convert_sync_batchnorm
from fastbn.moments import Moments
from fastbn.recalibration import recalibrate

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "Moments",
    "SyncBatchNorm",
    "__version__",
    "convert_sync_batchnorm",
    "fold",
    "functional",
    "get_num_threads",
    "recalibrate",
    "set_num_threads",
    "show_config",
]
