"""Batch normalization for NumPy arrays, with the semantics of torch.nn.BatchNorm2d."""

from typing import TYPE_CHECKING, Any

try:
    from fastbn import functional
except ImportError as error:
    from importlib.util import find_spec

    if find_spec(f"{__name__}._core") is not None:
        raise
    raise ImportError(
        f"the core of {__path__[0]} is not built: `pip install -e .` builds it in a clone; to "
        "import an installed fastbn instead, leave the folder that holds these sources"
    ) from error
from fastbn._memory import release_memory
from fastbn._threads import get_num_threads, set_num_threads, threads
from fastbn._version import __version__
from fastbn.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)

if TYPE_CHECKING:
    from fastbn._config import show_config
    from fastbn.folding import fold
    from fastbn.layers.syncbatchnorm import SyncBatchNorm, convert_sync_batchnorm
    from fastbn.moments import Moments
    from fastbn.recalibration import recalibrate

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
    "Moments",
    "SyncBatchNorm",
    "__version__",
    "convert_sync_batchnorm",
    "fold",
    "functional",
    "get_num_threads",
    "recalibrate",
    "release_memory",
    "set_num_threads",
    "show_config",
    "threads",
]

# What many programs never use, and the modules that are imported when it is first asked for.
_LATER = {
    "Moments": "fastbn.moments",
    "SyncBatchNorm": "fastbn.layers.syncbatchnorm",
    "convert_sync_batchnorm": "fastbn.layers.syncbatchnorm",
    "fold": "fastbn.folding",
    "recalibrate": "fastbn.recalibration",
    "show_config": "fastbn._config",
}
_LATER_MODULES = ("folding", "instance", "moments", "recalibration", "sync")

if not TYPE_CHECKING:  # a checker takes every name that a module's __getattr__ may have

    def __getattr__(name: str) -> Any:
        import importlib

        if name in _LATER_MODULES:
            return importlib.import_module(f"fastbn.{name}")
        if name == "torch":
            try:
                return importlib.import_module("fastbn.torch")
            except ImportError as error:  # hasattr(fastbn, "torch") shall tell, not raise
                raise AttributeError(f"no module of this name: {error}") from error
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
        return value

    def __dir__() -> list[str]:
        from importlib.util import find_spec

        return sorted([*__all__, *(["torch"] if find_spec("torch") else [])])
