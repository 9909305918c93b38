"""fastbn's kernels under torch modules, on the CPU.

`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` are torch's modules of these names, whose forward and
backward on CPU tensors are fastbn's. `accelerate` puts them into a model, `restore` takes them out.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ImportError(
        "fastbn.torch needs torch: pip install 'fastbn[torch]', "
        "in a clone pip install -e '.[torch]'"
    )

from fastbn.torch import functional as functional
from fastbn.torch.acceleration import Report, accelerate, report, restore
from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "Report",
    "accelerate",
    "functional",
    "report",
    "restore",
]


def __dir__() -> list[str]:
    return sorted(__all__)
