"""CuPy, which has no batch norm of its own: as one writes it with its ufuncs and reductions."""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy

from bench import library
from bench.cases import CALL, EPS, Case, Data
from bench.libraries import _cupy
from bench.library import PreparedCall, require

AXES, COLUMN = (0, 2, 3), (1, -1, 1, 1)


class Library(library.Library):
    """A few lines of CuPy."""

    api = "expressions of cupy.mean, cupy.var, cupy.sum and arithmetic, in x's dtype"
    buffers = "allocates its output and its intermediate results"

    def versions(self) -> dict[str, str]:
        return {"cupy": cupy.__version__}

    def variants(self, case: Case) -> list[str]:
        require(case.operation != CALL, "a call is asked of layers only")
        require(not case.step, "not measured in steps")
        return ["nchw"]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        x, dy = _cupy.on_device(data.x), _cupy.on_device(data.dy)
        vectors = (data.weight, data.bias, data.running_mean, data.running_var)
        weight, bias, mean, var = (cupy.asarray(v, x.dtype).reshape(COLUMN) for v in vectors)
        names: tuple[str, ...] = ("y",)
        if case.operation == "eval":
            call = partial(normalized, x, mean, var, weight, bias)
        elif case.operation == "train":
            call = partial(trained, x, weight, bias)
        else:
            call, names = partial(gradients, dy, x, weight), ("dx", "dweight", "dbias")
        return PreparedCall(
            call, lambda result: _cupy.looked_at(names, result), False, sample_ns=_cupy.timed(call)
        )

    def release(self) -> None:
        _cupy.release()


def normalized(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> tuple[Any]:
    return ((x - mean) / cupy.sqrt(var + x.dtype.type(EPS)) * weight + bias,)


def trained(x: Any, weight: Any, bias: Any) -> tuple[Any]:
    mean, var = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
    return normalized(x, mean, var, weight, bias)


def gradients(dy: Any, x: Any, weight: Any) -> tuple[Any, Any, Any]:
    mean, var = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
    invstd = 1 / cupy.sqrt(var + x.dtype.type(EPS))
    xhat = (x - mean) * invstd
    dbias, dweight = dy.sum(AXES, dtype="f"), (dy * xhat).sum(AXES, dtype="f")
    count = x.size // x.shape[1]
    means = ((v / count).astype(x.dtype).reshape(COLUMN) for v in (dbias, dweight))
    mean_dy, mean_dy_xhat = means
    return (dy - mean_dy - xhat * mean_dy_xhat) * invstd * weight, dweight, dbias
