"""Fills whose results are known without a reference, over the shapes of real networks.

As oneDNN's benchdnn checks batch normalization: every sum, mean, variance and product of the data
is a small integer times a power of two, so that errors of a layout, a cut or a merge stand out. The
fills are our own. A channel is m + s where s is 1 or -1 and both are equally many: its mean is m,
its variance 1, and with an eps of 3 invstd is 1/2. The gradient of the output is a + b s + r, where
r is 1, -1 or 0 and adds up to 0 where s is 1 and where it is -1.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import reference
import support
from support import assert_within, channels_last, contiguous, dtype_of

import fastbn
from fastbn import functional as F

LISTS = json.loads((Path(__file__).parents[2] / "bench/shapes.json").read_text())
NETWORKS = ["resnet50", "mobilenet_v1", "googlenet_v2"]
SHAPES = {(2, *shape) for network in NETWORKS for shape, _ in LISTS[network]}
SHAPES |= {tuple(shape) for shape in LISTS["odd"]}
SHAPES |= {(8, 16, 9), (6, 32), (32, 1000), (2, 6, 3, 4, 5)}
LARGE = 200_000  # elements, from which on one dtype is enough
EPS = 3.0


def cases():
    for shape in sorted(SHAPES):
        n, c, *rest = shape
        shape = n + n * int(np.prod(rest)) % 2, c, *rest  # an even number of values per channel
        for name in support.DTYPES:
            if name == "float32" or np.prod(shape) <= LARGE:
                yield pytest.param(shape, name, id=f"{shape}-{name}")


class Fill:
    """Data of a shape, and the results that they have."""

    def __init__(self, rng, shape):
        n, c, *rest = shape
        count = n * int(np.prod(rest))
        signs, balanced = signs_of(count)
        order = rng.permuted(np.tile(np.arange(count), (c, 1)), axis=1)
        s, r = (over_samples(values[order], shape) for values in (signs, balanced))
        self.count = count
        self.mean, self.a, self.b = rng.integers(-30, 31, c), *rng.integers(-4, 5, (2, c))
        self.weight = 2.0 ** rng.integers(-2, 3, c) * rng.choice([-1, 1], c)
        self.bias = rng.integers(-4, 5, c).astype(np.float64)
        mean, a, b, weight, bias = (
            reference.over_channels(v, len(shape)).astype(np.float64)
            for v in (self.mean, self.a, self.b, self.weight, self.bias)
        )
        self.x, self.dy = mean + s, a + b * s + r
        self.y = 0.5 * s * weight + bias
        # dx = (dy - a - xhat * b / 2) * weight / 2, where xhat = s / 2
        self.dx = (0.75 * b * s + r) * weight / 2
        self.dweight, self.dbias = 0.5 * self.b * count, 1.0 * self.a * count


@functools.lru_cache(maxsize=1)  # the tests of a shape follow one another
def fill_of(shape):
    return Fill(np.random.default_rng(20260101), shape)


def signs_of(count):
    """As many 1 as -1, and what adds up to 0 over each of the two."""
    half = count // 2
    balanced = np.zeros(half)
    balanced[: half // 2], balanced[half // 2 : half // 2 * 2] = 1, -1
    return np.repeat([1.0, -1.0], half), np.tile(balanced, 2)


def over_samples(values, shape):
    """(C, count) values as an array of a shape."""
    n, c, *rest = shape
    return np.moveaxis(values.reshape(c, n, *rest), 0, 1)


@pytest.mark.parametrize(("shape", "name"), list(cases()))
def test_results_that_are_known_without_a_reference(shape, name):
    fill, dtype = fill_of(shape), dtype_of(name)
    x, dy = fill.x.astype(dtype), fill.dy.astype(dtype)
    bounds = bounds_of(fill, dtype)
    for layout in (contiguous, channels_last):
        check_primitives(fill, layout(x), layout(dy))
        check_layer(fill, layout(x), layout(dy), *bounds)


def check_primitives(fill, x, dy):
    """Sums in float64: what is left of the exact results are the merges of blocks."""
    count, mean, m2 = F.batch_norm_stats(x)
    assert count == fill.count
    assert_within(mean, fill.mean, 1e-14)
    assert_within(m2, np.full(len(mean), count), 1e-13 * count)
    invstd = 1 / np.sqrt(m2 / count + EPS)
    y = F.batch_norm_elemt(x, mean, invstd, fill.weight, fill.bias)
    assert_within(y, fill.y, 1e-13 if x.dtype == np.float64 else 0)
    sum_dy, sum_dy_xhat = F.batch_norm_backward_reduce(dy, x, mean, invstd)
    assert_within(sum_dy, fill.dbias, 0)
    assert_within(sum_dy_xhat, fill.dweight, 1e-13 * count)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, fill.weight, sum_dy, sum_dy_xhat, count)
    # Where the exact gradient is 0, the mean's last digit shows.
    assert_within(dx, fill.dx, 1e-12 if x.dtype == np.float64 else 1e-6)


def bounds_of(fill, dtype):
    """How far y, and how far the gradients of a layer, may be off."""
    vectors = fill.mean, np.ones(len(fill.mean)), fill.weight
    return (
        reference.forward_bound(fill.y, dtype, fill.weight, fill.bias),
        reference.gradient_bounds(fill.dy, fill.x, dtype, *vectors, EPS),
    )


def check_layer(fill, x, dy, y_bound, bounds):
    """Sums in the arithmetic of the fused calls."""
    c = len(fill.mean)
    bn = fastbn.BatchNorm1d(c) if x.ndim < 4 else fastbn.BatchNorm2d(c)
    if x.ndim == 5:
        bn = fastbn.BatchNorm3d(c)
    bn.eps, bn.momentum = EPS, 0.5
    bn.weight[:], bn.bias[:] = fill.weight, fill.bias
    assert_within(bn(x), fill.y, y_bound)
    dx = bn.backward(dy)
    for actual, expected, bound in zip(
        (dx, bn.weight_grad, bn.bias_grad), (fill.dx, fill.dweight, fill.dbias), bounds, strict=True
    ):
        assert_within(actual, expected, bound)
    support.assert_close(bn.running_mean, 0.5 * fill.mean, 1e-7)
    unbiased = fill.count / (fill.count - 1)
    support.assert_close(bn.running_var, np.full(c, 0.5 + 0.5 * unbiased), 2e-7)
