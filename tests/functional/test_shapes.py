"""Every shape takes the same care: forward and backward against the reference.

The shapes are at the edges of how work is cut: runs of a channel shorter and longer than a step of
sums, more and fewer channels than a strip of columns, narrow matrices that are folded and what is
left over of them, channels of more than one block, single samples.
"""

import numpy as np
import pytest
import reference
import support
from cases import each
from internals import core
from support import same_bits, some

from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.sanitize, pytest.mark.wheel]

FEW_CHANNELS = [(n, c) for n in (2, 15, 16, 17, 33) for c in (1, 3, 5, 15)]
MANY_CHANNELS = [(n, c) for n in (2, 9, 600) for c in (16, 17, 31, 255, 256, 257, 300)]
SHORT_RUNS = [(n, c, s) for n in (1, 2, 18) for c in (1, 2, 5, 70) for s in (2, 4, 9, 15)]
LONG_RUNS = [(n, c, s) for n in (1, 3) for c in (1, 2, 18) for s in (16, 17, 31, 49, 196, 1000)]
NETWORKS = [
    *((2, 23, 17, 17), (5, 33, 27, 27), (4, 200, 17, 16), (1, 257, 28, 28), (2, 251, 28, 28)),
    *((1, 1024, 28, 17), (12, 4, 8, 8), (1, 24, 14, 14), (1, 1, 1, 2), (3, 5, 1, 7)),
    *((2, 3, 224, 224), (1, 2, 300, 400), (40, 3, 32, 32), (1, 16, 200, 200)),
]
SHAPES = [
    shape
    for shape in FEW_CHANNELS + MANY_CHANNELS + SHORT_RUNS + LONG_RUNS + NETWORKS
    if np.prod(shape) > shape[1]
]
DENSE = support.contiguous, support.channels_last


@each("shape", SHAPES)
def test_forward_and_backward_are_right(rng, shape, dtype):
    check(rng, shape, dtype, *DENSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_arrays_larger_than_caches_are_right(rng, name):
    check(rng, (2, 64, 190, 190), support.dtype_of(name), *DENSE)


# How channels are grouped depends on the number of threads; what comes out does not.
@each("shape", [(1, 16, 200, 200), (32, 64, 7, 7)])
def test_one_thread_is_right(rng, shape, dtype, set_num_threads):
    set_num_threads(1)
    check(rng, shape, dtype, support.contiguous)


@each("layout", support.WRITEABLE_LAYOUTS)
@each("shape", [(6, 1), (6, 1, 5), (6, 1, 4, 5), (2, 3, 1, 1), (1, 1, 7, 3)])
def test_axes_of_length_one_are_right(rng, shape, layout, dtype):
    check(rng, shape, dtype, layout)


def test_writing_in_place_leaves_the_neighbours_alone(rng, dtype):
    buffer = some(rng, (6, 4, 5, 3), dtype)
    kept = buffer.copy()
    x = buffer[::-1, 2:3]
    F.batch_norm_forward(x, out=x)
    others = [0, 1, 3]
    assert same_bits(buffer[:, others], kept[:, others])
    assert not same_bits(buffer[:, 2], kept[:, 2])


@pytest.mark.parametrize(
    "shape", [(4, 5, 6), (2, 3, 5, 7), (2, 20, 3, 4, 5), (3, 1, 2, 2)], ids=str
)
def test_channels_last_arrays_are_read_as_they_lie(rng, shape):
    x = support.channels_last(some(rng, shape))
    assert core.layout(x) == (1 if shape[1] == 1 else 2)
    assert core.layout(x[::-1]) == 0


def check(rng, shape, dtype, *layouts):
    """Compare a step with the reference, which is computed once for all layouts."""
    x, dy = (some(rng, shape, dtype) for _ in range(2))
    weight, bias = support.parameters(shape[1])
    count, mean, var = reference.moments(x)
    spread = np.sqrt(var) + np.abs(mean)
    y, gradients = reference.forward(x, weight, bias), reference.backward(dy, x, weight)
    offset = np.abs(mean) / np.sqrt(var + 1e-5)
    y_bound = reference.forward_bound(y, dtype, weight, bias, offset)
    bounds = reference.gradient_bounds(dy, x, dtype, mean, var, weight)

    def check_layout(x, dy):
        n, got_mean, m2 = F.batch_norm_stats(x)
        assert n == count
        support.assert_within(got_mean, mean, 1e-14 * spread)
        support.assert_within(m2 / n, var, 1e-13 * (var + 1e-30))
        got, *statistics = F.batch_norm_forward(x, weight, bias)
        support.assert_within(got, y, y_bound)
        results = F.batch_norm_backward(dy, x, weight, *statistics)
        for got_gradient, exact, bound in zip(results, gradients, bounds, strict=True):
            support.assert_within(got_gradient, exact, bound + 1e-30)
        F.batch_norm_forward(x, weight, bias, out=x)
        assert same_bits(x, got)

    for layout in layouts:
        check_layout(layout(x), layout(dy))


@each("shape", SHAPES[::3])
def test_layouts_agree(rng, shape):
    x, dy = some(rng, shape), some(rng, shape)
    results = []
    for layout in DENSE:
        a, da = layout(x), layout(dy)
        y, mean, invstd = F.batch_norm_forward(a)
        results.append((y, mean, invstd, *F.batch_norm_backward(da, a, None, mean, invstd)))
    for rows, columns in zip(*results, strict=True):
        np.testing.assert_allclose(rows, columns, rtol=2e-6, atol=2e-6 * np.abs(rows).max())
