"""Every layer against torch's autograd in double precision, over options drawn at random.

The reference is made of torch's elementary operations, whose gradients autograd derives, not of its
normalization layers: means over what is normalized together, or the running statistics as
constants, as chainer's fixed batch normalization has them.
"""

import numpy as np
import pytest
import support
from support import (
    byte_swapped,
    channels_last,
    contiguous,
    dtype_of,
    fortran,
    negative_strides,
    sliced,
    some,
)

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")

LAYOUTS = [contiguous, channels_last, sliced, negative_strides, fortran, byte_swapped]
# Relative to the terms of a result; in place the normalized input is rounded once more.
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
BATCH_NORMS = fastbn.BatchNorm1d, fastbn.BatchNorm2d, fastbn.BatchNorm3d
INSTANCE_NORMS = fastbn.InstanceNorm1d, fastbn.InstanceNorm2d, fastbn.InstanceNorm3d
FAMILIES = ["BatchNorm", "InstanceNorm", "GroupNorm"]


def drawn(rng, family):
    """Options of a layer, those of its call, a shape, and a number of groups."""
    rest = tuple(int(n) for n in rng.integers(2, 6, rng.integers(1, 4)))
    groups, of_group = rng.integers(1, 4, 2)
    shape = int(rng.integers(3, 8)), int(groups * of_group), *rest
    options = {"affine": bool(rng.integers(2)), "bias": bool(rng.integers(4))}
    options["eps"] = float(10.0 ** rng.uniform(-6, -1))
    if family != "GroupNorm":
        options["momentum"] = [None, 0.1, 0.7][rng.integers(3)]
        options["track_running_stats"] = bool(rng.integers(2))
        options["unbiased"] = bool(rng.integers(2))
    if family == "BatchNorm" and rng.integers(3) == 0:
        options["ghost_batch_size"] = int(rng.integers(2, 4))
    call = {
        "in_place": bool(rng.integers(2)),
        "masked": bool(rng.integers(3) == 0),
        "layout": LAYOUTS[rng.integers(len(LAYOUTS))],
        "frozen": options.get("track_running_stats", False) and bool(rng.integers(3) == 0),
    }
    return options, call, shape, int(groups)


def layer_of(rng, family, options, shape, groups):
    """The layer with random parameters, and running statistics where it has them."""
    if family == "GroupNorm":
        layer = fastbn.GroupNorm(groups, shape[1], **options)
    else:
        layer = getattr(fastbn, f"{family}{len(shape) - 2}d")(shape[1], **options)
    for name in ("weight", "bias", "running_mean", "running_var"):
        array = getattr(layer, name, None)
        if array is not None:
            array[:] = rng.uniform(0.5, 2, shape[1]) * (1 if name == "running_var" else -1)
    return layer


def together(layer, shape):
    """What is normalized together: slices of the samples, and the number of groups of channels."""
    if isinstance(layer, fastbn.GroupNorm):
        return [slice(n, n + 1) for n in range(shape[0])], layer.num_groups
    if isinstance(layer, INSTANCE_NORMS):
        return [slice(n, n + 1) for n in range(shape[0])], shape[1]
    size = layer.ghost_batch_size or shape[0]
    return [slice(n, n + size) for n in range(0, shape[0], size)], shape[1]


class Expected:
    """Output and gradients from torch's elementary operations, in double precision."""

    def __init__(self, layer, x, dy, mask, frozen):
        self.x = torch.tensor(x.astype(np.float64), requires_grad=True)
        self.parameters = {
            name: torch.tensor(getattr(layer, name).astype(np.float64), requires_grad=True)
            for name in ("weight", "bias")
            if getattr(layer, name) is not None
        }
        self.moments = []  # mean, variance and count of each batch
        self.invstd = 0.0  # the largest one
        valid = torch.ones_like(self.x) if mask is None else torch.tensor(mask * np.ones(x.shape))
        if frozen:
            xhat = self.by_constants(layer)
        else:
            parts, groups = together(layer, x.shape)
            xhat = torch.cat([self.by_values(layer, part, groups, valid) for part in parts])
        y = xhat
        if "weight" in self.parameters:
            y = y * beside(self.parameters["weight"], x.ndim)
        if "bias" in self.parameters:
            y = y + beside(self.parameters["bias"], x.ndim)
        y = y * valid
        y.backward(torch.tensor(dy.astype(np.float64)))
        self.y, self.dx = y.detach().numpy(), self.x.grad.numpy()
        self.dy, self.xhat = dy.astype(np.float64), xhat.detach().numpy()

    def by_values(self, layer, part, groups, valid):
        x, valid = self.x[part], valid[part]
        n, c = x.shape[:2]
        x, valid = (t.reshape(n, groups, c // groups, -1) for t in (x, valid))
        axes = (0, 2, 3)
        count = valid.sum(axes, keepdim=True)
        mean = (x * valid).sum(axes, keepdim=True) / count
        var = ((x - mean) ** 2 * valid).sum(axes, keepdim=True) / count
        self.moments.append([m.detach().numpy().reshape(-1) for m in (mean, var, count)])
        self.invstd = max(self.invstd, (var.detach() + layer.eps).min().item() ** -0.5)
        return ((x - mean) / torch.sqrt(var + layer.eps)).reshape(self.x[part].shape)

    def by_constants(self, layer):
        mean, var = (
            beside(torch.tensor(v.astype(np.float64)), self.x.ndim)
            for v in (layer.running_mean, layer.running_var)
        )
        self.invstd = (var + layer.eps).min().item() ** -0.5
        return (self.x - mean) / torch.sqrt(var + layer.eps)

    def assert_gradients(self, layer, dx, relative, relative_of_parameters):
        """Asserts them, relative to the terms that they are made of: differences may be small."""
        weight = self.parameters.get("weight", torch.ones(1)).detach().numpy()
        size = np.abs(self.dy).max() * np.abs(weight).max() * self.invstd
        support.assert_within(dx, self.dx, relative * size)
        axes = (0, *range(2, dx.ndim))
        sizes = {"weight": np.abs(self.dy * self.xhat), "bias": np.abs(self.dy)}
        for name, parameter in self.parameters.items():
            bound = relative_of_parameters * sizes[name].sum(axis=axes)
            support.assert_within(getattr(layer, f"{name}_grad"), parameter.grad.numpy(), bound)


def beside(vector, ndim):
    return vector.reshape(-1, *[1] * (ndim - 2))


def moved(layer, moments, mean, var):
    """The running statistics after batches, or after the samples of an instance normalization."""
    updates, by_batch = [], isinstance(layer, BATCH_NORMS)
    for k, (batch_mean, batch_var, count) in enumerate(moments):
        momentum = layer.momentum
        if momentum is None:
            momentum = 1 / (k + 1) if by_batch else 0.0
        batch_var = batch_var * count / (count - 1) if layer.unbiased else batch_var
        pairs = (mean, batch_mean), (var, batch_var)
        after = [(1 - momentum) * running + momentum * batch for running, batch in pairs]
        updates.append(after)
        if by_batch:
            mean, var = after
    if by_batch:
        return mean, var
    return [np.mean(each, axis=0) for each in zip(*updates, strict=True)]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("name", support.DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_gradients_and_running_statistics(family, name, seed):
    rng, dtype = np.random.default_rng([seed, FAMILIES.index(family)]), dtype_of(name)
    options, call, shape, groups = drawn(rng, family)
    layer = layer_of(rng, family, {**options, "dtype": np.float64}, shape, groups)
    running = [getattr(layer, name, None) for name in ("running_mean", "running_var")]
    before = [None if array is None else array.copy() for array in running]
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype, mean=0.1)
    mask = None
    if call["masked"]:
        mask = rng.random((shape[0], 1, *shape[2:])) < 0.7
        mask[:, :, :2] = True
    if call["frozen"]:
        layer.freeze()
    expected = Expected(layer, x, dy, mask, call["frozen"])
    x = call["layout"](x)
    in_place = call["in_place"] and x.dtype.isnative
    relative = TOLERANCE[name] * (10 if in_place else 1)
    y = layer(x, mask=mask, out=x if in_place else None)
    support.assert_close(y, expected.y, relative)
    dx = layer.backward(call["layout"](dy))
    expected.assert_gradients(layer, dx, relative, relative)
    if running[0] is not None:
        after = before if call["frozen"] else moved(layer, expected.moments, *before)
        for actual, reference in zip(running, after, strict=True):
            support.assert_close(actual, reference, 1e-6 if name != "float64" else 1e-12)


# Chainer's fixed batch normalization: mean and variance are given, and constants.


@pytest.mark.parametrize("parameters", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", support.DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rest", [(), (4,), (4, 3), (2, 3, 2)], ids=str)
def test_fixed_statistics(rng, rest, layout, name, parameters):
    shape, dtype = (5, 3, *rest), dtype_of(name)
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype, mean=0.1)
    layer = BATCH_NORMS[max(len(rest), 1) - 1](3, eps=2e-3, dtype=parameters)
    for array in (layer.weight, layer.bias, layer.running_mean):
        array[:] = rng.uniform(-1, 1, 3)
    layer.running_var[:] = rng.uniform(0.2, 2, 3)
    expected = Expected(layer, x, dy, None, frozen=True)
    statistics = layer.running_mean.copy(), layer.running_var.copy()
    y = F.batch_norm(layout(x), *statistics, layer.weight, layer.bias, eps=layer.eps)
    support.assert_close(y, expected.y, TOLERANCE[name])
    assert support.same_bits(layer.freeze()(layout(x)), y)
    dx = layer.backward(layout(dy))
    relative = max(TOLERANCE[parameters], TOLERANCE["float32"] if name != "float64" else 0)
    expected.assert_gradients(layer, dx, TOLERANCE[name], relative)
    assert support.same_bits(layer.running_mean, statistics[0])
    assert support.same_bits(layer.running_var, statistics[1])
    assert layer.num_batches_tracked == 0
