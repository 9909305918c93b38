"""torch's modules of batch normalization, on CPU tensors by fastbn's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastbn.torch.compute import (
    Call,
    Declined,
    KeptVectors,
    Vector,
    Vectors,
    made_in_inference_mode,
)
from fastbn.torch.eager import Fallbacks, is_transformed
from fastbn.torch.functional import check_activation, run, run_compiled


def recorded(module: torch.nn.Module, input: fx.Proxy, residual: Any, **options: Any) -> fx.Proxy:
    """A call of a module as a node, where torch.fx traces: it does so with torch's own modules."""
    if residual is not None:
        options["residual"] = residual
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, (input,), options)


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """The forward of all modules; how they check their input is torch's."""

    def forward(
        self,
        input: torch.Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Normalize, add the residual and activate.

        Parameters
        ----------
        input : torch.Tensor of shape (N, C, ...)
            Of the rank that torch's module of this name takes.
        activation : {"relu", "relu6", "leaky_relu"}, optional
            What is applied to the result; `accelerate` passes the one that follows in the model.
        negative_slope : float, default 0.01
            That of "leaky_relu".
        residual : torch.Tensor, optional
            Added before the activation.
        in_place : bool, default False
            Whether it is added as by ``+=``, which keeps shape and dtype.

        Returns
        -------
        torch.Tensor of shape (N, C, ...)
            A new tensor of input's dtype and memory format.
        """
        if isinstance(input, fx.Proxy):
            options: dict[str, Any] = {"in_place": True} if in_place else {}
            if activation:
                options |= {"activation": activation, "negative_slope": negative_slope}
            return recorded(self, input, residual, **options)
        if activation is not None:
            check_activation(activation)
        self._check_input_dim(input)
        training, compiling = self.training, torch.compiler.is_compiling()
        tensors = self._tensors()
        as_they_are = not compiling and not is_transformed()
        kept = self._kept_vectors(tensors) if as_they_are else None
        momentum = self._count_batch(kept) if training and self.track_running_stats else 0.0
        if not training:
            training = tensors[0] is None and tensors[1] is None
        elif not self.track_running_stats:
            tensors, kept = (None, None, *tensors[2:]), None
        follows = activation, negative_slope, residual, in_place
        call = Call(input, training, momentum, self.eps, *follows)
        if compiling:
            return run_compiled(call, tensors)
        return run(call, tensors, kept, self._fallbacks())

    def _tensors(self) -> tuple[Vector, Vector, Vector, Vector]:
        """Running statistics, weight and bias."""
        parameters, buffers = self._parameters, self._buffers
        try:  # Faster than by attribute.
            running = buffers["running_mean"], buffers["running_var"]
            return *running, parameters["weight"], parameters["bias"]
        except KeyError:  # Pruning, for example, computes a weight in every forward.
            return self.running_mean, self.running_var, self.weight, self.bias

    def _kept_vectors(self, tensors: tuple[Vector, ...]) -> Vectors | None:
        """The arrays of the tensors, kept from the last call; None where there are none."""
        tensors = (*tensors, self._buffers.get("num_batches_tracked"))
        kept: KeptVectors | None = self.__dict__.get("_vectors")
        if kept is not None and kept.are_of(tensors):
            return kept
        try:
            are_leaves = all(tensor is None or tensor.is_leaf for tensor in tensors)
            # Kept ones would keep the graph as well, and not look at the mode again.
            if not are_leaves or made_in_inference_mode(tensors):
                return Vectors(*tensors)
            kept = self.__dict__["_vectors"] = KeptVectors(*tensors)
        except Declined:
            return None
        return kept

    def _count_batch(self, kept: Vectors | None) -> float:
        """Count a batch of training; return its factor in the running statistics."""
        momentum: float | None = self.momentum
        if kept is not None and kept.counter is not None:
            count = kept.counter.item() + 1
            kept.counter[()] = count
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            count = self.num_batches_tracked
        else:
            return momentum or 0.0
        return 1.0 / float(count) if momentum is None else momentum

    def _own_activation(self) -> str | None:
        """The activation that is part of the pass whatever follows the module."""
        return None

    def _fallbacks(self) -> Fallbacks:
        """The calls that torch has taken."""
        fallbacks: Fallbacks | None = self.__dict__.get("_left_to_torch")
        if fallbacks is None:
            fallbacks = self.__dict__["_left_to_torch"] = Fallbacks()
        return fallbacks

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_vectors"}


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, on CPU tensors by fastbn's kernels; see `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import BatchNorm1d
    >>> BatchNorm1d(2, affine=False)(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).round(decimals=3)
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, on CPU tensors by fastbn's kernels.

    A subclass with the same constructor, state dict, modes and ``repr``. float32, float64, float16
    and bfloat16 tensors on the CPU are normalized, and differentiated, by fastbn, with torch's
    number of threads; so are they in models that ``torch.compile`` compiles, in training. All else
    goes to torch's implementation, and `report` tells what did.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import BatchNorm2d
    >>> bn = BatchNorm2d(64)
    >>> y = bn(torch.randn(32, 64, 28, 28))
    >>> y.shape, isinstance(bn, torch.nn.BatchNorm2d)
    (torch.Size([32, 64, 28, 28]), True)
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, on CPU tensors by fastbn's kernels; see `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import BatchNorm3d
    >>> BatchNorm3d(2)(torch.randn(4, 2, 3, 3, 3)).shape
    torch.Size([4, 2, 3, 3, 3])
    """


class BatchNormAct2d(BatchNorm2d):
    """Batch normalization, an addition if there is one, and an activation.

    Parameters
    ----------
    num_features : int
        The number of channels.
    activation : {"relu", "relu6", "leaky_relu"} or None, default "relu"
        What follows the normalization.
    negative_slope : float, default 0.01
        That of "leaky_relu".
    **kwargs
        What ``torch.nn.BatchNorm2d`` takes.

    Raises
    ------
    ValueError
        If the activation is not one of these.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import BatchNormAct2d
    >>> bn = BatchNormAct2d(64)
    >>> x = torch.randn(8, 64, 14, 14)
    >>> torch.equal(bn(x, residual=x) >= 0, torch.ones_like(x, dtype=torch.bool))
    True
    """

    def __init__(
        self,
        num_features: int,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> None:
        check_activation(activation)
        super().__init__(num_features, **kwargs)
        self.activation, self.negative_slope = activation, negative_slope

    def _own_activation(self) -> str | None:
        return self.activation

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalize, add the residual and activate.

        Parameters
        ----------
        input : torch.Tensor of shape (N, C, H, W)
        residual : torch.Tensor, optional
            Added before the activation.

        Returns
        -------
        torch.Tensor of shape (N, C, H, W)
            A new tensor of input's dtype and memory format.
        """
        if isinstance(input, fx.Proxy):
            return recorded(self, input, residual)
        return super().forward(
            input,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
        )

    def extra_repr(self) -> str:
        """What the constructor took."""
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{slope}"
