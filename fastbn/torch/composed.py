"""The same of torch's operations: for other devices, and where gradients are differentiated."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastbn.torch import compute
from fastbn.torch.arrays import as_tensor
from fastbn.torch.compute import Call, Saved, Vector


def forward(call: Call, *vectors: Vector) -> torch.Tensor:
    """Normalize, add the residual, activate."""
    return finished(F.batch_norm(call.x, *vectors, *call[1:4]), call)


def finished(y: torch.Tensor, call: Call) -> torch.Tensor:
    """Add the residual and activate."""
    if call.residual is not None:
        y = y.add_(call.residual) if call.in_place else y + call.residual
    if call.activation == "relu":
        return F.relu(y)
    if call.activation == "relu6":
        return F.relu6(y)
    if call.activation == "leaky_relu":
        return F.leaky_relu(y, call.negative_slope)
    return y


def backward(
    dy: torch.Tensor, saved: Saved, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight, bias and residual, by formulas that autograd can differentiate.

    In training, mean and invstd are computed anew, since they depend on x.
    """
    x, weight = saved.x, saved.weight
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    x = x.to(dtype)
    if saved.training:
        deviation = x - x.mean(axes, keepdim=True)
        factor = (deviation.square().mean(axes, keepdim=True) + eps).rsqrt()
    else:
        mean, invstd = map(torch.from_numpy, (saved.mean, saved.invstd))
        deviation, factor = x - mean.to(dtype).view(shape), invstd.to(dtype).view(shape)
    xhat = deviation * factor
    y = xhat if weight is None else xhat * weight.to(dtype).view(shape)
    if saved.bias is not None:
        y = y + as_tensor(saved.bias).to(dtype).view(shape)
    dresidual = before_activation(dy, y.detach(), saved)
    dz = dresidual.to(dtype)
    dweight, dbias = (dz * xhat).sum(axes), dz.sum(axes)
    if weight is not None:
        factor = factor * weight.to(dtype).view(shape)
    if saved.training:
        means = dz.mean(axes, keepdim=True), (dz * xhat).mean(axes, keepdim=True)
        dz = dz - means[0] - xhat * means[1]
    return (dz * factor).to(saved.x.dtype), dweight, dbias, dresidual


def before_activation(dy: torch.Tensor, y: torch.Tensor, saved: Saved) -> torch.Tensor:
    """The gradient of what was activated: y, unless the forward has noted the derivatives."""
    if saved.activation is None:
        return dy
    if saved.alive is not None:
        passes = compute.before_activation(torch.ones_like(saved.x), saved) == 1
    else:
        passes = y > 0
        if saved.activation == "relu6":
            passes = passes & (y < 6)
    slope = saved.negative_slope if saved.activation == "leaky_relu" else 0.0
    return torch.where(passes, dy, dy * slope)
