"""Batch normalization of tensors by fastbn's kernels, with activation and residual; no autograd.

`forward` and `backward` take calls that `functional.unfit` has let pass. They check the rest before
they write anything, and decline what they cannot do.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _normalize as normalize
from fastbn import functional as F
from fastbn._types import Array, Statistics
from fastbn.torch.arrays import as_array, as_array_or_none, new_like

Vector: TypeAlias = torch.Tensor | None


class Declined(Exception):
    """A call that torch's own implementation takes, or refuses."""


class Vectors:
    """Running statistics, weight and bias, and perhaps a module's counter, as arrays."""

    def __init__(
        self,
        running_mean: Vector,
        running_var: Vector,
        weight: Vector,
        bias: Vector,
        counter: Vector = None,
    ) -> None:
        self.tensors = (running_mean, running_var, weight, bias, counter)
        self.pointers = [None if t is None else t.data_ptr() for t in self.tensors]
        self.dtypes = {t.dtype for t in self.tensors[:4] if t is not None}
        try:
            arrays = [as_array_or_none(tensor) for tensor in self.tensors]
        except (TypeError, RuntimeError) as error:  # Of another device, or of no memory of its own.
            raise Declined(f"a parameter that is no array: {error}") from error
        self.running_mean, self.running_var, self.weight, self.bias, self.counter = arrays

    def are_of(self, tensors: tuple[Vector, ...]) -> bool:
        """Tell whether they are those of these five tensors, where they lie now."""
        for tensor, mine, pointer in zip(tensors, self.tensors, self.pointers, strict=True):
            if tensor is not mine or (tensor is not None and tensor.data_ptr() != pointer):
                return False
        return True


class Call(NamedTuple):
    """The input and the options of a forward."""

    x: torch.Tensor
    training: bool
    momentum: float
    eps: float
    activation: str | None = None
    negative_slope: float = 0.01
    residual: torch.Tensor | None = None


def forward(
    call: Call, vectors: Vectors, saves: bool
) -> tuple[torch.Tensor, Statistics | None, Statistics | None]:
    """Normalize, add the residual, activate; return mean and invstd as well, if it saves them."""
    try:
        x, residual = as_array(call.x), as_array_or_none(call.residual)
    except (TypeError, RuntimeError) as error:
        raise Declined(f"an input that is no array: {error}") from error
    y = new_like(call.x)
    normalize_by = train if call.training else evaluate
    threads = _core.set_threads_here(torch.get_num_threads())
    try:
        mean, invstd = normalize_by(x, residual, as_array(y), vectors, call)
    finally:
        _core.set_threads_here(threads)
    if saves and not call.training:
        running_mean, running_var = vectors.running_mean, vectors.running_var
        assert running_mean is not None
        assert running_var is not None
        mean, invstd = normalize.running_statistics(running_mean, running_var, call.eps)
    return y, mean, invstd


def train(
    x: Array, residual: Array | None, out: Array, vectors: Vectors, call: Call
) -> tuple[Statistics, Statistics]:
    """Normalize by the batch; return mean and invstd."""
    parameters = vectors.running_mean, vectors.running_var, vectors.weight, vectors.bias
    epilogue = call.activation, call.negative_slope, residual
    result = _core.try_train(x, out, *parameters, call.momentum, call.eps, True, *epilogue)
    if result is None:
        refuse_empty(x)
        try:
            x = checks.as_input(x)
            options = call.momentum, call.eps
            checked = checks.training_call(
                x, *parameters, *options, out=out, mask=None, epilogue=epilogue
            )
        except (TypeError, ValueError) as error:
            raise Declined(str(error)) from error
        result = normalize.by_batch(checked)
    return result[1:]


def evaluate(
    x: Array, residual: Array | None, out: Array, vectors: Vectors, call: Call
) -> tuple[None, None]:
    """Normalize by running statistics."""
    parameters = vectors.running_mean, vectors.running_var, vectors.weight, vectors.bias
    epilogue = call.activation, call.negative_slope, residual
    if _core.try_evaluate(x, out, *parameters, call.eps, *epilogue, None, None) is None:
        refuse_empty(x)
        try:
            x = checks.as_input(x)
            checked = checks.running_call(
                x, *parameters, call.eps, out=out, mask=None, epilogue=epilogue
            )
        except (TypeError, ValueError) as error:
            raise Declined(str(error)) from error
        normalize.by_running(checked)
    return None, None


def refuse_empty(x: Array) -> None:
    """Leave to torch what an empty batch does."""
    if not x.size:
        raise Declined("an empty batch")


class Saved(NamedTuple):
    """What `backward` needs of a forward.

    With an activation, y or the bias tells where it passes gradients: in training, and without a
    residual, the kernels compute that from x again, so that y need not be kept.
    """

    x: torch.Tensor
    weight: Vector
    bias: Vector
    y: torch.Tensor | None
    mean: Statistics
    invstd: Statistics
    training: bool
    activation: str | None
    negative_slope: float


def bias_and_result(
    call: Call, bias: Vector, y: torch.Tensor
) -> tuple[Vector, torch.Tensor | None]:
    """Those of the two that a backward needs."""
    if call.activation is None:
        return None, None
    return (None, y) if call.residual is not None or not call.training else (bias, None)


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    affine: bool
    residual: bool


class Gradients(NamedTuple):
    """None where it is not asked for."""

    x: torch.Tensor | None
    weight: Statistics | None
    bias: Statistics | None
    residual: torch.Tensor | None


def backward(dy: torch.Tensor, saved: Saved, needs: Needs) -> Gradients:
    """The gradients of `forward`."""
    try:
        as_array(dy)
    except (TypeError, RuntimeError) as error:  # One that stands for a batch of them.
        raise Declined(f"a gradient that is no array: {error}") from error
    threads = _core.set_threads_here(torch.get_num_threads())
    try:
        if saved.training and needs.x:
            return differentiate_batch(dy, saved, needs)
        return differentiate_parts(dy, saved, needs)
    finally:
        _core.set_threads_here(threads)


def differentiate_batch(dy: torch.Tensor, saved: Saved, needs: Needs) -> Gradients:
    """All gradients in one pass, where x's is among them and statistics are the batch's."""
    x, mean, invstd = as_array(saved.x), saved.mean, saved.invstd
    dx, weight = new_like(saved.x), as_array_or_none(saved.weight)
    options: dict[str, Any] = {"out": as_array(dx)}
    dresidual = None
    if saved.activation is not None:
        options |= {"activation": saved.activation, "negative_slope": saved.negative_slope}
        options |= {"y": as_array_or_none(saved.y), "bias": as_array_or_none(saved.bias)}
    if needs.residual and saved.activation is None:
        dresidual = dy
    elif needs.residual:
        dresidual = new_like(saved.x)
        options["residual_out"] = as_array(dresidual)
    results = F.batch_norm_backward(as_array(dy), x, weight, mean, invstd, **options)
    return Gradients(dx, results[1], results[2], dresidual)


def differentiate_parts(dy: torch.Tensor, saved: Saved, needs: Needs) -> Gradients:
    """The gradients that are asked for, where x's does not depend on the sums of the others."""
    dz = before_activation(dy, saved)
    gradient, mean, invstd = as_array(dz), saved.mean, saved.invstd
    dx = dweight = dbias = None
    if needs.affine:
        x = as_array(saved.x)
        dbias, dweight = F.batch_norm_backward_reduce(gradient, x, mean, invstd)
    if needs.x:
        dx = new_like(saved.x) if dz is dy or needs.residual else dz
        weight = as_array_or_none(saved.weight)
        F.batch_norm_elemt(gradient, np.zeros_like(mean), invstd, weight, out=as_array(dx))
    return Gradients(dx, dweight, dbias, dz if needs.residual else None)


def before_activation(dy: torch.Tensor, saved: Saved) -> torch.Tensor:
    """The gradient of what was activated."""
    aten, y = torch.ops.aten, saved.y
    if saved.activation is None:
        return dy
    if y is None:
        y = recomputed(saved)
    if saved.activation == "relu":
        return aten.threshold_backward(dy, y, 0)
    if saved.activation == "relu6":
        return aten.hardtanh_backward(dy, y, 0, 6)
    return aten.leaky_relu_backward(dy, y, saved.negative_slope, True)


def recomputed(saved: Saved) -> torch.Tensor:
    """What was activated in training without a residual."""
    y = new_like(saved.x)
    vectors = map(as_array_or_none, (saved.weight, saved.bias))
    F.batch_norm_elemt(as_array(saved.x), saved.mean, saved.invstd, *vectors, out=as_array(y))
    return y
