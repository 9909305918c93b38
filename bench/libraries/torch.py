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
from bench.cases import ACTIVATIONS, CALL, EPS, GROUPS, MOMENTUM, NEGATIVE_SLOPE, Case, Data
from bench.library import PreparedCall, require

# All in place, as in torchvision's networks.
IN_PLACE = {
    "relu": torch.relu_,
    "relu6": partial(torch.nn.functional.relu6, inplace=True),
    "leaky_relu": partial(torch.nn.functional.leaky_relu_, negative_slope=NEGATIVE_SLOPE),
}


class Activated(torch.nn.Module):
    """An addition and an activation after a batch norm."""

    def __init__(self, norm: torch.nn.Module, activation: str) -> None:
        super().__init__()
        self.norm, self.activate = norm, IN_PLACE[activation]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        return self.activate(y)


class Library(library.Library):
    """torch.nn.BatchNorm2d and GroupNorm in both memory formats."""

    api = (
        "torch.nn.BatchNorm2d, +=, torch.relu_ and the like, or torch.nn.GroupNorm; backward: "
        "torch.autograd.grad with retain_graph"
    )
    buffers = "allocates its output: torch's batch norm takes no out"
    activations, groups = tuple(ACTIVATIONS), True

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
        module = normalization(case).to(as_tensor(data.weight).dtype).train(not case.evaluation)
        for name, tensor in module.state_dict().items():
            if name != "num_batches_tracked":
                tensor.copy_(as_tensor(getattr(data, name)))
        layer = self.layer(Activated(module, case.activation) if case.activated else module)
        arrays = [data.x, data.residual] if case.has_residual else [data.x]
        inputs = [as_tensor(in_layout(array, variant)) for array in arrays]
        if case.evaluation:
            self.mode.enter_context(torch.inference_mode())
        if case.forward:
            return PreparedCall(partial(layer, *inputs), lambda y: {"y": as_array(y)}, False)
        for tensor in inputs:
            tensor.requires_grad_()
        x, *residual = inputs
        of = [x, module.weight, module.bias, *residual]
        dy = as_tensor(in_layout(data.dy, variant))
        names = ("dx", "dweight", "dbias", "dresidual")[: len(of)]
        return PreparedCall(
            partial(torch.autograd.grad, layer(*inputs), of, dy, retain_graph=True),
            lambda grads: dict(zip(names, map(as_array, grads), strict=True)),
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


def normalization(case: Case) -> torch.nn.Module:
    """The module of a case."""
    if case.grouped:
        return torch.nn.GroupNorm(GROUPS, case.shape[1], eps=EPS)
    return torch.nn.BatchNorm2d(case.shape[1], eps=EPS, momentum=MOMENTUM)


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor on the array's memory; NumPy's bfloat16 is not known to torch."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
