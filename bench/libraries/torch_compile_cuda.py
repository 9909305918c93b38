"""torch.compile on torch's batch norm, on a GPU."""

from __future__ import annotations

from bench.libraries import torch_cuda as eager
from bench.libraries._compiled import Compiled


class Library(Compiled, eager.Library):
    """torch.nn.BatchNorm2d, compiled anew for every shape."""
