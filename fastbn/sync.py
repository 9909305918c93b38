"""The path of `SyncBatchNorm` in pickles of version 0.1.0."""

from fastbn.layers.syncbatchnorm import SyncBatchNorm, convert_sync_batchnorm

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]
