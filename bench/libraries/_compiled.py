"""What torch.compile needs, on a CPU and on a GPU."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch._functorch import config as functorch_config

from bench import library


class Compiled(library.Library):
    """Before a library of eager torch, a library that compiles its layers, for every shape anew."""

    api = "torch.compile(torch.nn.BatchNorm2d, dynamic=False); backward: torch.autograd.grad"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        # A forward that an earlier process has compiled would do as well, but the backward of the
        # same shape is to find it here.
        self.cache = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.cache.name
        # With donated buffers a backward could not be called again on the same graph.
        functorch_config.donated_buffer = False

    def layer(self, module: torch.nn.Module) -> Any:
        """What a user calls."""
        return torch.compile(module, dynamic=False)

    def release(self) -> None:
        super().release()
        torch._dynamo.reset()
