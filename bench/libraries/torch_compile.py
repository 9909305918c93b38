"""torch.compile on torch's batch norm."""

from __future__ import annotations

import os
import shutil

from bench.libraries import torch as eager
from bench.libraries._compiled import Compiled
from bench.library import require


class Library(Compiled, eager.Library):
    """torch.nn.BatchNorm2d and GroupNorm, compiled anew for every shape."""

    api = (
        "torch.compile(dynamic=False) of torch.nn.BatchNorm2d, of a module with += and "
        "torch.relu_ after it, or of torch.nn.GroupNorm; backward: torch.autograd.grad"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        require(shutil.which(os.environ.get("CXX", "g++")) is not None, "no C++ compiler")
