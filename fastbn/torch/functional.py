"""Batch normalization as a function of tensors, and which implementation a call takes."""

from __future__ import annotations

import torch

from fastbn._scalars import ACTIVATIONS
from fastbn.torch import composed, eager, operators
from fastbn.torch.arrays import DTYPES, HALVES, PLAIN
from fastbn.torch.compute import Call, Declined, Vector, Vectors
from fastbn.torch.eager import Fallbacks

__all__ = ["batch_norm"]

NUMBERS = float, int


def __dir__() -> list[str]:
    return sorted(__all__)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.batch_norm``, on CPU tensors by fastbn's kernels.

    The result is ``activation(batch_norm(input) + residual)``. What fastbn has no kernels for goes
    to torch's own implementation: other devices and dtypes, gradients of gradients, forward AD,
    ``torch.func`` and subclasses of tensors.

    Parameters
    ----------
    input : torch.Tensor of shape (N, C, ...)
        float32, float64, float16 or bfloat16, of any strides.
    running_mean, running_var : torch.Tensor of shape (C,) or None
        In training they are updated in place.
    weight, bias : torch.Tensor of shape (C,), optional
        Of input's dtype or, where that has 16 bits, of float32.
    training : bool, default False
        Whether to normalize by the statistics of the batch.
    momentum : float, default 0.1
        The factor of the batch in the running statistics.
    eps : float, default 1e-5
        Added to the variance.
    activation : {"relu", "relu6", "leaky_relu"}, optional
        What is applied to the result.
    negative_slope : float, default 0.01
        That of "leaky_relu".
    residual : torch.Tensor, optional
        Added before the activation. Of input's shape and dtype, or such that torch can add it.

    Returns
    -------
    torch.Tensor of shape (N, C, ...)
        A new tensor of input's dtype and memory format.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        What torch raises; ValueError for an activation that is not one of the three.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch.functional import batch_norm
    >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    >>> batch_norm(x, None, None, training=True, eps=1e-12, activation="relu")
    tensor([[0., 0.],
            [1., 0.]])
    """
    check_activation(activation)
    call = Call(input, training, momentum, eps, activation, negative_slope, residual)
    tensors = running_mean, running_var, weight, bias
    if torch.compiler.is_compiling():
        return run_compiled(call, tensors)
    return run(call, tensors, None, Fallbacks())


def check_activation(activation: str | None) -> None:
    """Refuse an unknown activation."""
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be one of {known} or None, got {activation!r}")


def run(
    call: Call, tensors: tuple[Vector, ...], vectors: Vectors | None, fallbacks: Fallbacks
) -> torch.Tensor:
    """Let fastbn or torch normalize; the vectors are those of the tensors, if these are plain."""
    residual, reason = call.residual, unfit(call)
    if not reason and vectors is None and eager.is_transformed():
        reason = "forward AD, torch.func, a trace or a dispatch mode"
    # Not before: a trace warns of shapes that are compared.
    if not reason and residual is not None and not is_beside(residual, call.x):
        fallbacks.note("a residual of another shape or kind, which torch adds")
        alone = call._replace(activation=None, residual=None)
        return composed.finished(run(alone, tensors, vectors, fallbacks), call)
    if not reason:
        try:
            vectors = vectors or Vectors(*tensors)
            reason = unfit_vectors(call, vectors)
            if not reason:
                return eager.run(call, vectors, fallbacks)
        except Declined as declined:
            reason = str(declined)
    fallbacks.note(reason)
    return composed.forward(call, *tensors)


def run_compiled(call: Call, tensors: tuple[Vector, ...]) -> torch.Tensor:
    """Let fastbn train; an evaluation the compiler fuses with what is around it."""
    x, residual = call.x, call.residual
    vectors = [t for t in tensors if t is not None]
    if (
        call.training
        and not torch.compiler.is_exporting()
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.dim() > 1
        and x.numel() > x.shape[1]
        and are_dtypes_fit(x.dtype, {t.dtype for t in vectors})
        and all(t.shape == x.shape[1:2] for t in vectors)
        and are_options_of_their_kinds(call)
        and not has_unfit_slope(call)
        and not any(t is not None and t.requires_grad for t in tensors[:2])
        and (residual is None or is_beside(residual, x))
    ):
        return operators.run(call, *tensors)
    return composed.forward(call, *tensors)


def unfit(call: Call) -> str:
    """Why fastbn has no kernel for an input and options; empty if it may have one."""
    x = call.x
    if type(x) not in PLAIN:
        return f"a {type(x).__name__}"
    if not x.is_cpu or x.layout is not torch.strided:
        return f"a tensor on {x.device}, {x.layout}"
    if x.dtype not in DTYPES:
        return f"a tensor of {x.dtype}"
    if not are_options_of_their_kinds(call):
        return "an option of another kind"
    if has_unfit_slope(call):
        return "a negative slope"
    return ""


def unfit_vectors(call: Call, vectors: Vectors) -> str:
    """Why fastbn has no kernel for vectors beside an input."""
    if not are_dtypes_fit(call.x.dtype, vectors.dtypes):
        return f"an input of {call.x.dtype} with {', '.join(sorted(map(str, vectors.dtypes)))}"
    if not call.training and (vectors.running_mean is None or vectors.running_var is None):
        return "evaluation without running statistics"
    return ""


def are_dtypes_fit(dtype: torch.dtype, vectors: set[torch.dtype]) -> bool:
    """Tell whether torch takes vectors of such dtypes beside an input."""
    return not vectors or vectors == {dtype} or (dtype in HALVES and vectors == {torch.float32})


def are_options_of_their_kinds(call: Call) -> bool:
    """Tell whether they are what torch asks for; it refuses most others."""
    return (
        isinstance(call.training, bool)
        and isinstance(call.momentum, NUMBERS)
        and isinstance(call.eps, NUMBERS)
    )


def has_unfit_slope(call: Call) -> bool:
    """Tell whether the result does not show the sign of what was activated."""
    return call.activation == "leaky_relu" and not call.negative_slope >= 0


def is_beside(residual: torch.Tensor, x: torch.Tensor) -> bool:
    """Tell whether a residual has x's shape, dtype and kind."""
    return (
        type(residual) is type(x)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.layout is x.layout
    )
