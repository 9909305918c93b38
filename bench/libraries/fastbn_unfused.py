"""fastbn's batch normalization, with NumPy's addition and maximum after it."""

from __future__ import annotations

from functools import partial

import numpy as np

from bench.arrays import Array, in_layout, new_array
from bench.cases import EPS, Case, Data
from bench.libraries import fastbn
from bench.library import PreparedCall, require
from fastbn import BatchNorm2d, functional


class Library(fastbn.Library):
    """A ReLU, and an addition before it, as a user of NumPy writes them."""

    api = (
        "fastbn.BatchNorm2d, np.add, np.maximum in place; backward: np.multiply by y > 0, "
        "fastbn.functional.batch_norm_backward"
    )
    buffers = "preallocated: out= another array; y > 0 is a new one"
    activations = ("relu",)

    def variants(self, case: Case) -> list[str]:
        require(case.activated, "nothing follows that could be fused")
        return super().variants(case)

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        x = in_layout(data.x, variant)
        out = new_array(case.shape, x.dtype, variant)
        residual = in_layout(data.residual, variant) if case.has_residual else None
        if case.forward:
            layer = fastbn.layer_of(case, data)
            return PreparedCall(partial(forward, layer, x, residual, out), lambda y: {"y": y}, True)
        y, mean, invstd = functional.batch_norm_forward(x, data.weight, data.bias, EPS)
        activate(y, residual)
        dy, names = in_layout(data.dy, variant), ["dx", "dweight", "dbias", "dresidual"]
        derived = new_array(case.shape, x.dtype, variant) if case.has_residual else out
        return PreparedCall(
            partial(backward, dy, y, derived, x, data.weight, mean, invstd, out),
            lambda results: dict(zip(names, results, strict=True)),
            True,
        )


def forward(layer: BatchNorm2d, x: Array, residual: Array | None, out: Array) -> Array:
    return activate(layer(x, out=out), residual)


def activate(y: Array, residual: Array | None) -> Array:
    if residual is not None:
        np.add(y, residual, out=y)
    return np.maximum(y, y.dtype.type(0), out=y)


def backward(
    dy: Array,
    y: Array,
    derived: Array,
    x: Array,
    weight: Array,
    mean: Array,
    invstd: Array,
    out: Array,
) -> tuple[Array, ...]:
    np.multiply(dy, y > 0, out=derived)
    gradients = functional.batch_norm_backward(derived, x, weight, mean, invstd, out=out)
    return *gradients, derived
