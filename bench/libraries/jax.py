"""JAX: jitted functions and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from bench import library
from bench.cases import EPS, MOMENTUM, Case, Data
from bench.library import PreparedCall

AXES = (0, 2, 3)


class Library(library.Library):
    """jax.jit; in place by donating the input's buffer."""

    api = "jax.jit; backward: the function that jax.vjp returns, under jax.jit"
    buffers = "allocates its output; in place: the input's buffer, donated"

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        parameters = [jnp.array(v) for v in (data.weight, data.bias)]
        statistics = [jnp.array(v) for v in (data.running_mean, data.running_var)]
        if case.forward:
            function = partial(evaluate, *statistics) if case.evaluation else train
            if not case.evaluation:
                parameters += statistics
            given = data.x
        else:
            x = jnp.array(data.x)
            # The residuals are arguments: what is closed over would be compiled in as constants.
            _, function = jax.jit(partial(jax.vjp, normalize_batch))(x, *parameters)
            function, parameters, given = apply, [function], data.dy
        call = Call(jax.jit(function, donate_argnums=(0,) if case.in_place else ()), parameters)
        call.restore = partial(call.take, given)
        call.restore()
        return PreparedCall(
            call.in_place if case.in_place else call,
            partial(as_arrays, case),
            case.in_place,
            call.restore if case.in_place else None,
        )


class Call:
    """A jitted function on an array; in place, its result is its next argument."""

    def __init__(self, function: Callable[..., Any], rest: list[Any]) -> None:
        self.function, self.rest = function, rest

    def take(self, array: Any) -> None:
        self.x = jax.block_until_ready(jnp.array(array))

    def __call__(self) -> Any:
        return jax.block_until_ready(self.function(self.x, *self.rest))

    def in_place(self) -> Any:
        result = self()
        self.x = result[0] if isinstance(result, tuple) else result
        return result


def as_arrays(case: Case, result: Any) -> dict[str, Any]:
    arrays = [np.asarray(a) for a in (result if isinstance(result, tuple) else (result,))]
    return dict(zip(("y",) if case.forward else ("dx", "dweight", "dbias"), arrays, strict=False))


def column(vector: Any) -> Any:
    return vector.reshape(1, -1, 1, 1)


def normalize(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
    scale = weight * jax.lax.rsqrt(var + EPS)
    return ((x - column(mean)) * column(scale) + column(bias)).astype(x.dtype)


def evaluate(mean: Any, var: Any, x: Any, weight: Any, bias: Any) -> Any:
    return normalize(x, mean, var, weight, bias)


def batch_statistics(x: Any) -> tuple[Any, Any]:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x.mean(AXES, dtype=dtype), x.astype(dtype).var(AXES)


def normalize_batch(x: Any, weight: Any, bias: Any) -> Any:
    return normalize(x, *batch_statistics(x), weight, bias)


def train(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
    mean, var = batch_statistics(x)
    n = x.size / x.shape[1]
    return (
        normalize(x, mean, var, weight, bias),
        running_mean + MOMENTUM * (mean - running_mean),
        running_var + MOMENTUM * (var * (n / (n - 1)) - running_var),
    )


def apply(dy: Any, function: Any) -> Any:
    return function(dy)
