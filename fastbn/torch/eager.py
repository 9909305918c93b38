"""The autograd of calls that are not compiled.

An `autograd.Function` costs less than a registered operator, and what it saves goes through
autograd's hooks all the same: checkpointing and offloading work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from fastbn.torch import composed, compute
from fastbn.torch.arrays import as_tensor
from fastbn.torch.compute import Call, Declined, Needs, Saved, Vector, Vectors


class Fallbacks(dict[str, int]):
    """How often torch's own implementation ran, by the reason."""

    def note(self, reason: str) -> None:
        """Count one more."""
        self[reason] = self.get(reason, 0) + 1


def is_transformed() -> bool:
    """Tell whether tensors stand for others: in torch.func, forward AD, traces and such modes."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


class BatchNorm(torch.autograd.Function):
    """`compute.forward` and `compute.backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Vector,
        bias: Vector,
        residual: Vector,
        call: Call,
        vectors: Vectors,
        fallbacks: Fallbacks,
    ) -> torch.Tensor:
        y, mean, invstd, alive = compute.forward(call, vectors, True)
        options = call.training, call.activation, call.negative_slope
        kept_bias = None
        if vectors.bias is not None and call.activation is not None and alive is None:
            kept_bias = vectors.bias.copy()  # As in torch, it may change before the backward.
        ctx.options = kept_bias, mean, invstd, *options
        ctx.others = vectors, call.eps, fallbacks
        ctx.save_for_backward(x, weight, None if alive is None else torch.from_numpy(alive))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        vectors, eps, fallbacks = ctx.others
        saved = Saved(*ctx.saved_tensors, *ctx.options)
        try:
            if torch.is_grad_enabled():
                raise Declined("a backward that is differentiated")
            if is_transformed() or type(dy) is not torch.Tensor:
                raise Declined("a backward in torch.func, forward AD, a trace or a dispatch mode")
            needs = Needs(needs_x, needs_weight or needs_bias, needs_residual)
            dx, sum_dy_xhat, sum_dy, dresidual = compute.backward(dy, saved, needs)
            dweight = as_gradient(sum_dy_xhat, vectors.weight) if needs_weight else None
            dbias = as_gradient(sum_dy, vectors.bias) if needs_bias else None
        except Declined as declined:
            fallbacks.note(str(declined))
            dx, dweight, dbias, dresidual = composed.backward(dy, saved, eps)
            dweight, dbias = (
                gradient if parameter is None else gradient.to(parameter.dtype)
                for gradient, parameter in zip((dweight, dbias), vectors.tensors[2:4], strict=True)
            )
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dresidual if needs_residual else None,
            *(None,) * 3,
        )


# torch's own `apply` also looks after torch.func, whose calls do not come here.
apply = super(torch.autograd.Function, BatchNorm).apply


def as_gradient(sums: Any, parameter: Any) -> torch.Tensor:
    """Sums over a batch in the dtype of their parameter."""
    return as_tensor(sums.astype(parameter.dtype, copy=False))


def run(call: Call, vectors: Vectors, fallbacks: Fallbacks) -> torch.Tensor:
    """Normalize, with a gradient where one may be asked for."""
    x, residual, (_, _, weight, bias, _) = call.x, call.residual, vectors.tensors
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return apply(x, weight, bias, residual, call, vectors, fallbacks)
    return compute.forward(call, vectors, False).y
