"""fastbn on CuPy arrays, as its users call it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy

import fastbn
from bench import library
from bench.cases import CALL, EPS, GHOST_BATCH, GROUPS, MOMENTUM, Case, Data
from bench.libraries import _cupy
from bench.library import PreparedCall
from fastbn import functional


class Library(library.Library):
    """fastbn in both memory layouts."""

    api = (
        "fastbn.BatchNorm2d (forward), fastbn.functional.batch_norm_backward (backward); "
        "steps: the layer and its backward"
    )
    buffers = "preallocated: out= another array"
    activations = ("relu",)

    def versions(self) -> dict[str, str]:
        return {"fastbn": fastbn.__version__, "cupy": cupy.__version__}

    def variants(self, case: Case) -> list[str]:
        return ["nchw"] if case.operation == CALL else ["nchw", "nhwc"]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        if case.step:
            call = step(case, variant, data)
            names = "y", "dx", "dweight", "dbias"
            result = partial(_cupy.looked_at, names)
            return PreparedCall(call, result, True, sample_ns=_cupy.timed(call))
        layer = fastbn.BatchNorm2d(
            case.shape[1], EPS, MOMENTUM, device="cuda", dtype=data.weight.dtype
        ).train(not case.evaluation)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).set(getattr(data, name))
        x = _cupy.on_device(data.x, variant)
        if case.operation == CALL:
            return PreparedCall(partial(layer, x), lambda y: _cupy.looked_at(("y",), (y,)), False)
        out = cupy.zeros_like(x)
        if case.forward:
            call = partial(layer, x, out=out)
            return PreparedCall(
                call, lambda y: _cupy.looked_at(("y",), (y,)), True, sample_ns=_cupy.timed(call)
            )
        dy = _cupy.on_device(data.dy, variant)
        _, mean, invstd = functional.batch_norm_forward(x, layer.weight, layer.bias, EPS)
        call = partial(functional.batch_norm_backward, dy, x, layer.weight, mean, invstd, out=out)
        return PreparedCall(
            call,
            lambda result: _cupy.looked_at(("dx", "dweight", "dbias"), result),
            True,
            sample_ns=_cupy.timed(call),
        )

    def release(self) -> None:
        _cupy.release()


def step(case: Case, variant: str, data: Data) -> Callable[[], tuple[Any, ...]]:
    """A forward and a backward of a layer, whose results are those since the last call."""
    channels, options = case.shape[1], {"device": "cuda", "dtype": data.weight.dtype}
    if case.operation == "step_instance":
        layer = fastbn.InstanceNorm2d(channels, EPS, affine=True, **options)
    elif case.operation == "step_group":
        layer = fastbn.GroupNorm(GROUPS, channels, EPS, **options)
    else:
        ghosts = GHOST_BATCH if case.operation == "step_ghosts" else None
        activation = "relu" if case.activated else None
        options |= {"ghost_batch_size": ghosts, "activation": activation}
        layer = fastbn.BatchNorm2d(channels, EPS, MOMENTUM, **options)
    for name in ("weight", "bias"):
        getattr(layer, name)[...] = cupy.asarray(getattr(data, name))
    x, dy = (_cupy.on_device(array, variant) for array in (data.x, data.dy))
    y, dx = cupy.zeros_like(x), cupy.zeros_like(x)
    given = {}
    if case.masked:
        given["mask"] = cupy.asarray(data.mask)
    if case.has_residual:
        given["residual"] = _cupy.on_device(data.residual, variant)

    def call() -> tuple[Any, ...]:
        layer.zero_grad()
        layer(x, out=y, **given)
        layer.backward(dy, out=dx)
        return y, dx, layer.weight_grad, layer.bias_grad

    return call
