"""torch.compile on torch's batch norm, on a GPU."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch._functorch import config as functorch_config

from bench.libraries import torch_cuda as eager


class Library(eager.Library):
    """torch.nn.BatchNorm2d, compiled anew for every shape."""

    api = "torch.compile(torch.nn.BatchNorm2d, dynamic=False); backward: torch.autograd.grad"
    buffers = "allocates its output: torch's batch norm takes no out"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.cache = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.cache.name
        # With donated buffers a backward could not be called again on the same graph.
        functorch_config.donated_buffer = False

    def layer(self, module: torch.nn.Module) -> Any:
        return torch.compile(module, dynamic=False)

    def release(self) -> None:
        super().release()
        torch._dynamo.reset()
