"""torch on a GPU, eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import library
from bench.cases import CALL, EPS, GROUPS, MOMENTUM, Case, Data
from bench.libraries._device import OnDevice, calls_of, sampler
from bench.libraries.torch import Activated, as_array, as_tensor
from bench.library import PreparedCall, require

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class Library(library.Library):
    """torch.nn.BatchNorm2d in both memory formats."""

    api = (
        "torch.nn.BatchNorm2d; backward: torch.autograd.grad with retain_graph; "
        "steps: the module, += and torch.relu_, and torch.autograd.grad"
    )
    buffers = "allocates its output: torch's batch norm takes no out"
    activations = ("relu",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.mode = contextlib.ExitStack()

    def versions(self) -> dict[str, str]:
        versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
        return {**versions, "cudnn": str(torch.backends.cudnn.version())}

    def variants(self, case: Case) -> list[str]:
        require(not case.masked, "torch has no masks")
        require(case.operation != "step_ghosts", "torch has no ghost batches")
        return ["nchw"] if case.operation == CALL else ["nchw", "nhwc"]

    def layer(self, module: torch.nn.Module) -> Any:
        """What a user calls; torch.compile has its say here."""
        return module

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        module = normalization(case)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data.copy_(as_tensor(getattr(data, name)))
        module = module.to("cuda", as_tensor(data.weight).dtype).train(not case.evaluation)
        layer = self.layer(Activated(module, case.activation) if case.activated else module)
        x = on_device(data.x, variant)
        if case.step:
            return self.step(case, variant, data, layer, [x, module.weight, module.bias])
        if case.operation == CALL:
            self.mode.enter_context(torch.inference_mode())
            return PreparedCall(partial(layer, x), lambda y: looked_at(("y",), (y,)), False)
        if case.forward:
            self.mode.enter_context(torch.inference_mode(case.evaluation))
            call = partial(layer, x)
            return PreparedCall(
                call, lambda y: looked_at(("y",), (y,)), False, sample_ns=timed(call)
            )
        x.requires_grad_()
        dy = on_device(data.dy, variant)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):  # A backward runs where its forward has run.
            y = layer(x)
        parameters = [x, module.weight, module.bias]
        call = partial(torch.autograd.grad, y, parameters, dy, retain_graph=True)
        torch.cuda.synchronize()
        return PreparedCall(
            call,
            lambda gradients: looked_at(("dx", "dweight", "dbias"), gradients),
            False,
            sample_ns=timed(call, side),
        )

    def step(
        self, case: Case, variant: str, data: Data, layer: Any, of: list[torch.Tensor]
    ) -> PreparedCall:
        """A forward and its backward."""
        inputs = [of[0].requires_grad_()]
        if case.has_residual:
            inputs.append(on_device(data.residual, variant).requires_grad_())
        dy, names = on_device(data.dy, variant), ("y", "dx", "dweight", "dbias")

        def call() -> tuple[torch.Tensor, ...]:
            y = layer(*inputs)
            gradients = torch.autograd.grad(y, [*of, *inputs[1:]], dy)
            return y.detach(), *gradients[:3]

        result = partial(looked_at, names)
        return PreparedCall(call, result, False, sample_ns=timed(call))

    def release(self) -> None:
        self.mode.close()
        torch.cuda.empty_cache()


def normalization(case: Case) -> torch.nn.Module:
    """The module of a case."""
    channels = case.shape[1]
    if case.operation == "step_instance":
        return torch.nn.InstanceNorm2d(channels, eps=EPS, affine=True)
    if case.operation == "step_group":
        return torch.nn.GroupNorm(GROUPS, channels, eps=EPS)
    return torch.nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)


def on_device(array: Any, variant: str) -> torch.Tensor:
    return as_tensor(array).to("cuda").contiguous(memory_format=FORMATS[variant])


def looked_at(names: tuple[str, ...], tensors: Any) -> dict[str, Any]:
    """Results by their names, which stay on the device until they are looked at."""
    torch.cuda.synchronize()
    return {
        name: OnDevice(tensor, lambda piece: as_array(piece.cpu()))
        for name, tensor in zip(names, tensors, strict=True)
    }


def timed(call: Callable[[], object], side: Any = None) -> Callable[[], float]:
    """The clock of a call: a graph of many, replayed between two events."""
    side = side or torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed_ms(work: Callable[[], object]) -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    torch.cuda.synchronize()  # What prepares the arrays runs on another stream.
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
        calls = calls_of(elapsed_ms(call))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                call()
    return sampler(partial(elapsed_ms, graph.replay), calls)
