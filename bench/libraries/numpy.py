"""NumPy, as one writes batch normalization by hand."""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import library
from bench.arrays import Array, in_layout, overwrite
from bench.cases import EPS, MOMENTUM, Case, Data
from bench.library import PreparedCall, require

AXES = (0, 2, 3)


class Library(library.Library):
    """Expressions on whole arrays."""

    api = "expressions: mean, var, arithmetic with broadcasting"
    buffers = "allocates its temporaries and its output; in place: no output"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def variants(self, case: Case) -> list[str]:
        require(case.operation != "backward_inplace", "an expression needs temporaries")
        require(case.dtype != "bfloat16", "no bfloat16")
        return super().variants(case)

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        weight, bias, running_mean, running_var = (
            v.astype(data.dtype).reshape(1, -1, 1, 1)
            for v in (data.weight, data.bias, data.running_mean, data.running_var)
        )
        if not case.forward:
            mean, var = (v.astype(data.dtype).reshape(1, -1, 1, 1) for v in (data.mean, data.var))
            return PreparedCall(
                partial(backward, data.dy, data.x, weight, mean, var),
                lambda result: dict(zip(("dx", "dweight", "dbias"), result, strict=True)),
                False,
            )
        x = in_layout(data.x) if case.in_place else data.x
        function = partial(train_inplace if case.in_place else train, x)
        if case.evaluation:
            function = partial(normalize_inplace if case.in_place else normalize, x)
        arguments = (running_mean, running_var, weight, bias)
        return PreparedCall(
            partial(function, *arguments),
            lambda y: {"y": y},
            case.in_place,
            restore=partial(overwrite, x, data.x) if case.in_place else None,
        )


def normalize(x: Array, mean: Array, var: Array, weight: Array, bias: Array) -> Array:
    return (x - mean) / np.sqrt(var + EPS) * weight + bias


def normalize_inplace(x: Array, mean: Array, var: Array, weight: Array, bias: Array) -> Array:
    x -= mean
    x *= weight / np.sqrt(var + EPS)
    x += bias
    return x


def train(x: Array, running_mean: Array, running_var: Array, weight: Array, bias: Array) -> Array:
    mean, var = batch_statistics(x, running_mean, running_var)
    return normalize(x, mean, var, weight, bias)


def train_inplace(
    x: Array, running_mean: Array, running_var: Array, weight: Array, bias: Array
) -> Array:
    mean, var = batch_statistics(x, running_mean, running_var)
    return normalize_inplace(x, mean, var, weight, bias)


def batch_statistics(x: Array, running_mean: Array, running_var: Array) -> tuple[Array, Array]:
    """Mean and variance; the running ones move towards them."""
    mean, var = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
    n = x.size / x.shape[1]
    running_mean += MOMENTUM * (mean - running_mean)
    running_var += MOMENTUM * (var * (n / (n - 1)) - running_var)
    return mean, var


def backward(
    dy: Array, x: Array, weight: Array, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    invstd = 1 / np.sqrt(var + EPS)
    xhat = (x - mean) * invstd
    dbias, dweight = dy.sum(AXES), (dy * xhat).sum(AXES)
    mean_dy, mean_dy_xhat = dy.mean(AXES, keepdims=True), (dy * xhat).mean(AXES, keepdims=True)
    return (dy - mean_dy - xhat * mean_dy_xhat) * (invstd * weight), dweight, dbias
