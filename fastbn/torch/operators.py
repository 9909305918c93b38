"""The operators that torch.compile sees: functional ones, which it need not look into.

They take tensors of any memory format (`flexible_layout`), so that the compiler need not convert
what it keeps with the channels last.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from fastbn import _core
from fastbn.torch import compute
from fastbn.torch.arrays import as_array_or_none, empty_like
from fastbn.torch.compute import Call, Needs, Saved, Vector, Vectors

Tensor: TypeAlias = torch.Tensor
FLEXIBLE = (torch.Tag.flexible_layout,)


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), tags=FLEXIBLE)
def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize by the batch.

    Return y, mean, invstd, what the running statistics become, and `alive`.
    """
    moved_mean = None if running_mean is None else running_mean.clone()
    moved_var = None if running_var is None else running_var.clone()
    call = Call(x, True, momentum, eps, activation, negative_slope, residual)
    vectors = Vectors(moved_mean, moved_var, weight, bias)
    y, mean, invstd, alive = compute.forward(call, vectors, True)
    moved = [x.new_empty(0) if r is None else r for r in (moved_mean, moved_var)]
    bits = x.new_empty(0, dtype=torch.uint8) if alive is None else torch.from_numpy(alive)
    return y, torch.from_numpy(mean), torch.from_numpy(invstd), *moved, bits


@batch_norm.register_fake
def _(
    x: Tensor,
    weight: Vector,
    bias: Vector,
    residual: Vector,
    running_mean: Vector,
    running_var: Vector,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, ...]:
    statistics = [x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2)]
    running = running_mean, running_var
    moved = [x.new_empty(0) if r is None else torch.empty_like(r) for r in running]
    count = (x.numel() + 7) // 8 + _core.bits_padding if notes_alive(activation, residual) else 0
    return empty_like(x), *statistics, *moved, x.new_empty(count, dtype=torch.uint8)


def notes_alive(activation: str | None, residual: Vector) -> bool:
    """Tell whether a forward in training notes where its activation passes gradients."""
    return activation is not None and residual is not None


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=(), tags=FLEXIBLE)
def batch_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    alive: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str | None,
    negative_slope: float,
    needs_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight, bias and, if it is needed, of the residual."""
    options = True, activation, negative_slope
    vectors = as_array_or_none(bias), mean.numpy(), invstd.numpy()
    saved = Saved(x, weight, alive, *vectors, *options)
    needs = Needs(True, True, needs_residual)
    dx, dweight, dbias, dresidual = compute.backward(dy, saved, needs)
    if dresidual is None:
        dresidual = x.new_empty(0)
    elif dresidual is dy:  # An operator returns no tensor that it was given.
        dresidual = dy.clone()
    return dx, torch.from_numpy(dweight), torch.from_numpy(dbias), dresidual


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Vector,
    bias: Vector,
    alive: Vector,
    mean: Tensor,
    invstd: Tensor,
    activation: str | None,
    negative_slope: float,
    needs_residual: bool,
) -> tuple[Tensor, ...]:
    dresidual = x.new_empty(0)
    if needs_residual:
        dresidual = torch.empty_like(dy) if activation is None else empty_like(x)
    return empty_like(x), torch.empty_like(mean), torch.empty_like(mean), dresidual


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward needs."""
    x, weight, bias, residual, *_, ctx.activation, ctx.negative_slope = inputs
    ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    _, mean, invstd, _, _, alive = output
    tells = (None, alive) if notes_alive(ctx.activation, residual) else (bias, None)
    ctx.save_for_backward(x, weight, *tells, mean, invstd)


def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients of `batch_norm`."""
    options = ctx.activation, ctx.negative_slope, ctx.needs_input_grad[3]
    dx, dweight, dbias, dresidual = batch_norm_backward(dy, *ctx.saved_tensors, *options)
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        dx,
        None if weight_dtype is None else dweight.to(weight_dtype),
        None if bias_dtype is None else dbias.to(bias_dtype),
        dresidual if ctx.needs_input_grad[3] else None,
        *(None,) * 6,
    )


batch_norm.register_autograd(backward, setup_context=setup_context)


def run(
    call: Call, running_mean: Vector, running_var: Vector, weight: Vector, bias: Vector
) -> Tensor:
    """Normalize by the batch in a program that is compiled."""
    x, _, *options, residual, _ = call
    y, _, _, moved_mean, moved_var, _ = batch_norm(
        x, weight, bias, residual, running_mean, running_var, *options
    )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.copy_(moved_mean)
            running_var.copy_(moved_var)
    return y
