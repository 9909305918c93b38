"""torch, eager."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import numpy as np
import torch
from _selfbench.sampling import Repeat

from bench import library
from bench.arrays import Array, in_layout
from bench.calls import SHAPE, STEP, arrays, statement
from bench.cases import CALL, EPS, MOMENTUM, Case, Data
from bench.library import PreparedCall, require


class Library(library.Library):
    """torch.nn.BatchNorm2d in both memory formats."""

    api = "torch.nn.BatchNorm2d; backward: torch.autograd.grad with retain_graph"
    buffers = "allocates its output: torch's batch norm takes no out"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)
        self.mode = contextlib.ExitStack()

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def variants(self, case: Case) -> list[str]:
        require(not case.in_place, "torch's batch norm does not work in place")
        return ["nchw"] if case.operation == CALL else ["nchw", "nhwc"]

    def layer(self, module: torch.nn.Module) -> Any:
        """What a user calls; torch.compile has its say here."""
        return module

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        module = torch.nn.BatchNorm2d(case.shape[1], eps=EPS, momentum=MOMENTUM)
        module = module.to(as_tensor(data.weight).dtype).train(not case.evaluation)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).data.copy_(as_tensor(getattr(data, name)))
        layer = self.layer(module)
        x = as_tensor(in_layout(data.x, variant))
        if case.evaluation:
            self.mode.enter_context(torch.inference_mode())
        if case.forward:
            return PreparedCall(partial(layer, x), lambda y: {"y": as_array(y)}, False)
        x.requires_grad_()
        dy = as_tensor(in_layout(data.dy, variant))
        return PreparedCall(
            partial(
                torch.autograd.grad,
                layer(x),
                [x, module.weight, module.bias],
                dy,
                retain_graph=True,
            ),
            lambda grads: dict(zip(("dx", "dweight", "dbias"), map(as_array, grads), strict=True)),
            False,
        )

    def calls(self) -> dict[str, dict[str, Repeat]]:
        x, dy = map(torch.from_numpy, arrays("x", "dy").values())
        module = torch.nn.BatchNorm2d(SHAPE[1])
        names = {
            "module": module,
            "evaluating": torch.nn.BatchNorm2d(SHAPE[1]).eval(),
            "x": x,
            "inputs": [x.clone().requires_grad_(), module.weight, module.bias],
            "dy": dy,
            "torch": torch,
        }
        evaluation = statement("evaluating(x)", names)
        return {
            "torch.nn.BatchNorm2d": {
                "eval": torch.inference_mode()(evaluation),
                "train": statement("module(inputs[0])", names),
                STEP: statement("torch.autograd.grad(module(inputs[0]), inputs, dy)", names),
            }
        }

    def release(self) -> None:
        self.mode.close()


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor on the array's memory; NumPy's bfloat16 is not known to torch."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
