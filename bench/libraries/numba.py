"""numba: the loops that one writes by hand, compiled, with channels in parallel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from bench import library
from bench.arrays import Array, in_layout, new_array, overwrite
from bench.cases import EPS, MOMENTUM, Case, Data
from bench.library import PreparedCall, require


class Library(library.Library):
    """Loops over (N, C, H*W) arrays."""

    fastmath = False
    api = "@njit(parallel=True) loops over channels, sums in float64"
    buffers = "preallocated: another array, or the input; a new array where it is said"
    activations = ("relu",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        numba.set_num_threads(threads)

    def versions(self) -> dict[str, str]:
        return {"numba": numba.__version__, "numpy": np.__version__}

    def variants(self, case: Case) -> list[str]:
        require(case.dtype in ("float32", "float64"), "no 16-bit floating point on CPUs")
        return super().variants(case)

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        n, c, h, w = case.shape
        flat = (n, c, h * w)
        x, weight, bias = data.x.reshape(flat), data.weight, data.bias
        given = x if case.forward else data.dy.reshape(flat)
        source = in_layout(given) if case.in_place else given
        out = source if case.in_place else new_array(flat, given.dtype)
        sum_dtype = np.dtype(case.dtype if self.fastmath else "float64")
        follows = case.activated, case.has_residual
        evaluate, train, backward = kernels(sum_dtype, self.fastmath, *follows)
        residual = y = derived = x  # which nobody looks at without a residual
        if case.has_residual:
            residual = data.residual.reshape(flat)
        statistics = (data.running_mean.copy(), data.running_var.copy())
        if case.forward:
            function = evaluate if case.evaluation else train
            call = partial(function, source, residual, *statistics, weight, bias)
        else:
            mean, var = data.mean.astype(sum_dtype), data.var.astype(np.float64)
            invstd = (1 / np.sqrt(var + EPS)).astype(sum_dtype)
            if case.has_residual:
                y, derived = new_array(flat, x.dtype), new_array(flat, x.dtype)
                train(x, residual, *statistics, weight, bias, y)
            call = partial(backward, source, x, y, weight, bias, mean, invstd, derived)

        def into_new() -> tuple[Array, ...]:
            return call(np.empty_like(source))

        def result(arrays: tuple[Array, ...]) -> dict[str, Array]:
            names = ("y",) if case.forward else ("dx", "dweight", "dbias", "dresidual")
            whole = (a.reshape(case.shape) if a.ndim == len(flat) else a for a in arrays)
            return dict(zip(names, whole, strict=False))

        restore = partial(overwrite, source, given) if case.in_place else None
        call_it = into_new if case.fresh else partial(call, out)
        return PreparedCall(call_it, result, not case.fresh, restore)


@cache
def kernels(
    sum_dtype: np.dtype[Any], fastmath: bool, relu: bool, add: bool
) -> tuple[Callable[..., Any], ...]:
    """Evaluation, training forward and backward, with sums of a dtype.

    What follows the normalization is known when they are compiled: nothing is left of conditions on
    it. The backward computes the value before the ReLU again or, after an addition, reads y.
    """
    of_sums = sum_dtype.type
    compiled = njit(parallel=True, fastmath=fastmath)

    @njit(fastmath=fastmath)
    def finished(value, residual, i, c, j):
        if add:
            value += residual[i, c, j]
        return max(value, residual.dtype.type(0)) if relu else value

    @njit(fastmath=fastmath)
    def passed(dy, x, y, center, scale, shift, i, c, j):
        value = y[i, c, j] if add else (x[i, c, j] - center) * scale + shift
        if not relu:
            return dy[i, c, j]
        return dy[i, c, j] * dy.dtype.type(value > 0)  # which unlike a choice is vectorized

    @compiled
    def evaluate(x, residual, running_mean, running_var, weight, bias, out):
        n, channels, size = x.shape
        for c in prange(channels):
            scale = weight[c] / np.sqrt(running_var[c] + x.dtype.type(EPS))
            mean, shift = running_mean[c], bias[c]
            for i in range(n):
                for j in range(size):
                    value = (x[i, c, j] - mean) * scale + shift
                    out[i, c, j] = finished(value, residual, i, c, j)
        return (out,)

    @compiled
    def train(x, residual, running_mean, running_var, weight, bias, out):
        n, channels, size = x.shape
        count = n * size
        for c in prange(channels):
            total = of_sums(0)
            for i in range(n):
                for j in range(size):
                    total += x[i, c, j]
            mean = of_sums(total / count)
            total = of_sums(0)
            for i in range(n):
                for j in range(size):
                    total += (x[i, c, j] - mean) ** 2
            var = total / count
            running_mean[c] += MOMENTUM * (mean - running_mean[c])
            running_var[c] += MOMENTUM * (total / (count - 1) - running_var[c])
            center = x.dtype.type(mean)
            scale = x.dtype.type(weight[c] / np.sqrt(var + EPS))
            shift = bias[c]
            for i in range(n):
                for j in range(size):
                    value = (x[i, c, j] - center) * scale + shift
                    out[i, c, j] = finished(value, residual, i, c, j)
        return (out,)

    @compiled
    def backward(dy, x, y, weight, bias, mean, invstd, derived, out):
        n, channels, size = x.shape
        count = n * size
        dweight, dbias = np.empty(channels), np.empty(channels)
        for c in prange(channels):
            center, a = x.dtype.type(mean[c]), x.dtype.type(weight[c] * invstd[c])
            sum_dy = sum_dy_xhat = of_sums(0)
            for i in range(n):
                for j in range(size):
                    g = passed(dy, x, y, center, a, bias[c], i, c, j)
                    if add:
                        derived[i, c, j] = g
                    sum_dy += g
                    sum_dy_xhat += g * ((x[i, c, j] - mean[c]) * invstd[c])
            dweight[c], dbias[c] = sum_dy_xhat, sum_dy
            # dx = g * a + (x - mean) * b + shift, in x's dtype
            b = x.dtype.type(-sum_dy_xhat / count * weight[c] * invstd[c] ** 2)
            shift = x.dtype.type(-sum_dy / count * weight[c] * invstd[c])
            for i in range(n):
                for j in range(size):
                    g = derived[i, c, j] if add else passed(dy, x, y, center, a, bias[c], i, c, j)
                    out[i, c, j] = g * a + (x[i, c, j] - center) * b + shift
        return (out, dweight, dbias, derived) if add else (out, dweight, dbias)

    return evaluate, train, backward
