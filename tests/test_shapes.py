"""Every shape takes the same care: forward and backward against the reference.

The shapes are at the edges of how work is cut: runs of a channel shorter and longer than a step of
sums, more and fewer channels than a strip of columns, narrow matrices that are folded and what is
left over of them, channels of more than one block, single samples.
"""

import numpy as np
import pytest
import reference
import support
from support import same_bits, some

from fastbn import functional as F

FEW_CHANNELS = [(n, c) for n in (2, 15, 16, 17, 33) for c in (1, 3, 5, 15)]
MANY_CHANNELS = [(n, c) for n in (2, 9, 600) for c in (16, 17, 31, 255, 256, 257, 300)]
SHORT_RUNS = [(n, c, s) for n in (1, 2, 18) for c in (1, 2, 5, 70) for s in (2, 4, 9, 15)]
LONG_RUNS = [(n, c, s) for n in (1, 3) for c in (1, 2, 18) for s in (16, 17, 31, 49, 196, 1000)]
NETWORKS = [
    *((2, 23, 17, 17), (5, 33, 27, 27), (4, 200, 17, 16), (1, 257, 28, 28), (2, 251, 28, 28)),
    *((1, 1024, 28, 17), (12, 4, 8, 8), (1, 24, 14, 14), (1, 1, 1, 2), (3, 5, 1, 7)),
    *((2, 3, 224, 224), (1, 2, 300, 400), (40, 3, 32, 32)),
]
SHAPES = [
    shape
    for shape in FEW_CHANNELS + MANY_CHANNELS + SHORT_RUNS + LONG_RUNS + NETWORKS
    if np.prod(shape) > shape[1]
]


@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_right(rng, shape, layout, dtype):
    x, dy = (layout(some(rng, shape, dtype)) for _ in range(2))
    weight, bias = support.parameters(shape[1])
    count, mean, var = reference.moments(x)

    n, got_mean, m2 = F.batch_norm_stats(x)
    assert n == count
    spread = np.sqrt(var) + np.abs(mean)
    support.assert_within(got_mean, mean, 1e-14 * spread)
    support.assert_within(m2 / n, var, 1e-13 * (var + 1e-30))

    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    exact = reference.forward(x, weight, bias)
    offset = np.abs(mean) * invstd
    support.assert_within(y, exact, reference.forward_bound(exact, x.dtype, weight, bias, offset))

    in_place = layout(x)
    F.batch_norm_forward(in_place, weight, bias, out=in_place)
    assert same_bits(in_place, y)

    gradients = F.batch_norm_backward(dy, x, weight, mean, invstd)
    bounds = reference.gradient_bounds(dy, x, x.dtype, mean, var, weight)
    for got, exact, bound in zip(gradients, reference.backward(dy, x, weight), bounds, strict=True):
        support.assert_within(got, exact, bound + 1e-30)


@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_layouts_agree(rng, shape):
    x, dy = some(rng, shape), some(rng, shape)
    results = []
    for layout in (support.contiguous, support.channels_last):
        a, da = layout(x), layout(dy)
        y, mean, invstd = F.batch_norm_forward(a)
        results.append((y, mean, invstd, *F.batch_norm_backward(da, a, None, mean, invstd)))
    for rows, columns in zip(*results, strict=True):
        np.testing.assert_allclose(rows, columns, rtol=2e-6, atol=2e-6 * np.abs(rows).max())
