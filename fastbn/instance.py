"""The path of the instance normalization layers in pickles of version 0.1.0."""

from fastbn.layers.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastbn.layers.lazy import LazyInstanceNorm1d, LazyInstanceNorm2d, LazyInstanceNorm3d

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]
