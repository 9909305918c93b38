"""Batch normalization of tensors by fastbn's kernels, with activation and residual; no autograd.

`forward` and `backward` take calls that `functional.unfit` has let pass. They check the rest before
they write anything, and decline what they cannot do.

Of an activation the backward keeps no result, which the next layer may overwrite. It computes from
the input again where gradients pass or, with a residual or in evaluation, the forward notes it: a
bit for each element.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _normalize as normalize
from fastbn import functional as F
from fastbn._types import Array, Epilogue, Gate, Statistics
from fastbn.backends import cpu
from fastbn.torch.arrays import PLAIN, as_array, as_array_or_none, new_like

Vector: TypeAlias = torch.Tensor | None

# torch and fastbn may each have loaded an OpenMP of their own. The idle threads of one would keep
# those of the other from their CPUs, in every layer that follows another.
_core.borrow_threads(torch._C.__file__)


class Declined(Exception):
    """A call that torch's own implementation takes, or refuses."""


def made_in_inference_mode(tensors: tuple[Vector, ...]) -> bool:
    """Tell whether a tensor was: outside of that mode it may not be written."""
    return any(t is not None and t.is_inference() for t in tensors)


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
        kinds = {type(t) for t in self.tensors if t is not None} - PLAIN
        if kinds:
            raise Declined(f"a parameter that is a {kinds.pop().__name__}")
        if any(t is not None and t.requires_grad for t in (running_mean, running_var)):
            raise Declined("running statistics that require gradients")
        if not torch.is_inference_mode_enabled() and made_in_inference_mode(self.tensors):
            raise Declined("a parameter made in inference mode, which torch does not write outside")
        self.dtypes = {t.dtype for t in self.tensors[:4] if t is not None}
        try:
            arrays = [as_array_or_none(tensor) for tensor in self.tensors]
        except (TypeError, RuntimeError) as error:  # Of another device, or of no memory of its own.
            raise Declined(f"a parameter that is no array: {error}") from error
        self.running_mean, self.running_var, self.weight, self.bias, self.counter = arrays


class KeptVectors(Vectors):
    """Vectors that are kept for later calls, for which they may not hold any more.

    Whoever sets `data` of a tensor may change all about it and keep its address, and the arrays
    would then be read and written beyond their ends. To ask each tensor for its strides, shape and
    dtype takes 1 µs in each call; the guards of torch.compile compare all that in a third of that.
    """

    def __init__(self, *tensors: Vector) -> None:
        super().__init__(*tensors)
        self.present = [t for t in self.tensors if t is not None]
        self.ask_pointers = [t.data_ptr for t in self.present]
        self.pointers = [ask() for ask in self.ask_pointers]
        self.are_alike = torch._C._dynamo.guards.TensorGuards(
            *self.present,
            dynamic_dims_sizes=[list(t.shape) for t in self.present],
            dynamic_dims_strides=[list(t.stride()) for t in self.present],
        ).check

    def are_of(self, tensors: tuple[Vector, ...]) -> bool:
        """Tell whether they are those of these five tensors, as these are now."""
        return (
            all(map(operator.is_, tensors, self.tensors))
            and self.pointers == [ask() for ask in self.ask_pointers]
            and self.are_alike(*self.present)
        )


class Call(NamedTuple):
    """The input and the options of a forward."""

    x: torch.Tensor
    training: bool
    momentum: float
    eps: float
    activation: str | None = None
    negative_slope: float = 0.01
    residual: torch.Tensor | None = None
    in_place: bool = False  # the addition: the result keeps its shape and dtype


class Result(NamedTuple):
    """What a forward gives, and what its backward needs, if that was asked for."""

    y: torch.Tensor
    mean: Statistics | None
    invstd: Statistics | None
    alive: Array | None  # where the derivative of the activation is 1; else computed again


def forward(call: Call, vectors: Vectors, saves: bool) -> Result:
    """Normalize, add the residual, activate."""
    try:
        x, residual = as_array(call.x), as_array_or_none(call.residual)
    except (TypeError, RuntimeError) as error:
        raise Declined(f"an input that is no array: {error}") from error
    (y, out), alive = new_like(call.x, x), None
    if saves and call.activation is not None and (call.residual is not None or not call.training):
        alive = cpu.new_alive(x)
    epilogue = Epilogue(call.activation, call.negative_slope, residual, alive)
    threads = _core.set_threads_here(torch.get_num_threads())
    try:
        if call.training:
            mean, invstd = train(x, out, vectors, call, epilogue)
            return Result(y, mean, invstd, alive)
        evaluate(x, out, vectors, call, epilogue)
    finally:
        _core.set_threads_here(threads)
    if not saves:
        return Result(y, None, None, None)
    running_mean, running_var = vectors.running_mean, vectors.running_var
    assert running_mean is not None
    assert running_var is not None
    return Result(y, *normalize.running_statistics(running_mean, running_var, call.eps), alive)


def train(
    x: Array, out: Array, vectors: Vectors, call: Call, epilogue: Epilogue
) -> tuple[Statistics, Statistics]:
    """Normalize by the batch; return mean and invstd."""
    parameters = vectors.running_mean, vectors.running_var, vectors.weight, vectors.bias
    unbiased = True
    result = _core.try_train(x, out, *parameters, call.momentum, call.eps, unbiased, *epilogue)
    if result is not None:
        return result[1:]
    refuse_empty(x)
    try:
        x = checks.as_input(x)
        options = call.momentum, call.eps
        checked = checks.training_call(
            x, *parameters, *options, out=out, mask=None, epilogue=epilogue[:3]
        )
    except (TypeError, ValueError) as error:
        raise Declined(str(error)) from error
    return normalize.by_batch(noting(checked, epilogue))[1:]


def evaluate(x: Array, out: Array, vectors: Vectors, call: Call, epilogue: Epilogue) -> None:
    """Normalize by running statistics."""
    parameters = vectors.running_mean, vectors.running_var, vectors.weight, vectors.bias
    follows = epilogue[:3]
    plain = _core.try_evaluate(x, out, *parameters, call.eps, *follows, None, None, epilogue.alive)
    if plain is not None:
        return
    refuse_empty(x)
    try:
        x = checks.as_input(x)
        checked = checks.running_call(
            x, *parameters, call.eps, out=out, mask=None, epilogue=epilogue[:3]
        )
    except (TypeError, ValueError) as error:
        raise Declined(str(error)) from error
    normalize.by_running(noting(checked, epilogue))


def noting(checked: normalize.Forward, epilogue: Epilogue) -> normalize.Forward:
    """The checked call, which also notes where the derivative of its activation is 1."""
    if checked.epilogue is None:
        return checked
    return checked._replace(epilogue=checked.epilogue._replace(alive=epilogue.alive))


def refuse_empty(x: Array) -> None:
    """Leave to torch what an empty batch does."""
    if not x.size:
        raise Declined("an empty batch")


class Saved(NamedTuple):
    """What `backward` needs of a forward.

    With an activation, `alive` or else the bias tells where it passes gradients.
    """

    x: torch.Tensor
    weight: Vector
    alive: Vector
    bias: Array | None
    mean: Statistics
    invstd: Statistics
    training: bool
    activation: str | None
    negative_slope: float


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
        gradient = as_array(dy)
    except (TypeError, RuntimeError) as error:  # One that stands for a batch of them.
        raise Declined(f"a gradient that is no array: {error}") from error
    threads = _core.set_threads_here(torch.get_num_threads())
    try:
        computes_gate = saved.activation is not None and saved.alive is None
        if saved.training and (needs.x or computes_gate):
            return differentiate_batch(dy, gradient, saved, needs)
        return differentiate_parts(dy, gradient, saved, needs)
    finally:
        _core.set_threads_here(threads)


def differentiate_batch(dy: torch.Tensor, gradient: Array, saved: Saved, needs: Needs) -> Gradients:
    """All gradients in one pass, where statistics are the batch's."""
    x = as_array(saved.x)
    dx, out = new_like(saved.x, x)
    operands = gradient, x, as_array_or_none(saved.weight), saved.mean, saved.invstd
    if saved.alive is not None:
        dresidual, derived = new_like(saved.x, x) if needs.residual else (None, None)
        _, dweight, dbias = differentiate_by_bits(
            normalize.Backward(*operands, out), saved, derived
        )
    else:
        dresidual = dy if needs.residual else None
        _, dweight, dbias = F.batch_norm_backward(
            *operands,
            bias=saved.bias,
            activation=saved.activation,
            negative_slope=saved.negative_slope,
            out=out,
        )
    return Gradients(dx, dweight, dbias, dresidual)


def differentiate_by_bits(
    call: normalize.Backward, saved: Saved, derived: Array | None
) -> tuple[Array, Statistics, Statistics]:
    """The gradients of a call; `derived` takes that of the residual."""
    gate = gate_of(saved, derived)
    options = None, saved.activation, saved.negative_slope
    gradients = _core.try_backward(*call[:6], *options, gate.alive, derived)
    return normalize.backward(call._replace(gate=gate)) if gradients is None else gradients


def differentiate_parts(dy: torch.Tensor, gradient: Array, saved: Saved, needs: Needs) -> Gradients:
    """The gradients that are asked for, where x's does not depend on the sums of the others."""
    if not saved.training and needs.x and needs.affine:
        gradients = differentiate_frozen(dy, gradient, saved, needs)
        if gradients is not None:
            return gradients
    x, mean, invstd = as_array(saved.x), saved.mean, saved.invstd
    dx = dweight = dbias = None
    dz = before_activation(dy, saved)
    if dz is not dy:
        gradient = as_array(dz)
    if needs.affine:
        dbias, dweight = F.batch_norm_backward_reduce(gradient, x, mean, invstd)
    if needs.x:
        dx, out = dz, gradient
        if dz is dy or needs.residual:
            dx, out = new_like(saved.x, x)
        weight = as_array_or_none(saved.weight)
        F.batch_norm_elemt(gradient, np.zeros_like(mean), invstd, weight, out=out)
    return Gradients(dx, dweight, dbias, dz if needs.residual else None)


def differentiate_frozen(
    dy: torch.Tensor, gradient: Array, saved: Saved, needs: Needs
) -> Gradients | None:
    """All gradients in one pass, where statistics are constants; None if the call is not plain."""
    x, alive = as_array(saved.x), None if saved.alive is None else bits_of(saved)
    dx, out = new_like(saved.x, x)
    dresidual, derived = dy if needs.residual else None, None
    if needs.residual and alive is not None:
        dresidual, derived = new_like(saved.x, x)
    vectors = as_array_or_none(saved.weight), saved.mean, saved.invstd
    options = None, saved.activation, saved.negative_slope
    result = _core.try_backward(gradient, x, *vectors, out, *options, alive, derived, True)
    if result is None:
        return None
    _, dweight, dbias = result
    return Gradients(dx, dweight, dbias, dresidual)


def before_activation(dy: torch.Tensor, saved: Saved) -> torch.Tensor:
    """The gradient of what was activated, where `alive` tells the derivatives."""
    if saved.activation is None:
        return dy
    x = as_array(saved.x)
    dz, derived = new_like(saved.x, x)
    cpu.activation_gradient(as_array(dy), x, gate_of(saved, None), derived)
    return dz


def gate_of(saved: Saved, derived: Array | None) -> Gate:
    """What dy passes, where `alive` tells the derivatives; `derived` takes the result."""
    options = saved.activation, saved.negative_slope
    return Gate(*options, alive=bits_of(saved), derived=derived, derived_is_new=True)


def bits_of(saved: Saved) -> Array:
    """The bits that the forward noted. Hooks of saved tensors must not have changed them."""
    assert saved.alive is not None
    bits, size = saved.alive, _core.alive_bytes(as_array(saved.x))
    if bits.dtype != torch.uint8 or bits.shape != (size,) or not bits.is_contiguous():
        raise RuntimeError(
            f"a hook of saved tensors returned a {bits.dtype} tensor of shape {tuple(bits.shape)} "
            f"for a torch.uint8 tensor of shape ({size},), the bits of an activation: hooks must "
            "return what they were given, or an equal copy"
        )
    return as_array(bits)
