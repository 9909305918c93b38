"""fastbn on CuPy arrays, as its users call it."""

from __future__ import annotations

from functools import partial

import cupy

import fastbn
from bench import library
from bench.cases import CALL, EPS, MOMENTUM, Case, Data
from bench.libraries import _cupy
from bench.library import PreparedCall
from fastbn import functional


class Library(library.Library):
    """fastbn in both memory layouts."""

    api = "fastbn.BatchNorm2d (forward), fastbn.functional.batch_norm_backward (backward)"
    buffers = "preallocated: out= another array"

    def versions(self) -> dict[str, str]:
        return {"fastbn": fastbn.__version__, "cupy": cupy.__version__}

    def variants(self, case: Case) -> list[str]:
        return ["nchw"] if case.operation == CALL else ["nchw", "nhwc"]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
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
