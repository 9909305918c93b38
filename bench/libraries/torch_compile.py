"""torch.compile on torch's batch norm."""

from __future__ import annotations

import os
import shutil

from bench.libraries import torch as eager
from bench.libraries._compiled import Compiled
from bench.library import require


class Library(Compiled, eager.Library):
    """torch.nn.BatchNorm2d, compiled anew for every shape."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        require(shutil.which(os.environ.get("CXX", "g++")) is not None, "no C++ compiler")
