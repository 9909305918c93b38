"""Data whose mean and variance are exact in any order of summation: they come out to the bit.

Every element and every sum of elements, of deviations from the mean or from another element, and of
their squares is an integer times a power of two that float64 holds. So there is one right answer.
"""

from fractions import Fraction

import numpy as np
import pytest
import support
from cases import each
from support import same_bits

from fastbn import functional as F

pytestmark = pytest.mark.isa

# Even counts, cut in every way: runs, groups of runs, blocks, pieces, strips, folded rows, a rest.
# No pair has a block's border between its two.
SHAPES = [
    *((2, 3), (18, 5), (1030, 3), (70_002, 4), (6, 700), (1, 2, 4), (4, 3, 7, 7), (2, 17, 3, 3)),
    *((38, 70, 2, 2), (10, 50, 7, 7), (2, 3, 33, 31), (8, 3, 150, 152), (2, 2, 500, 520)),
    *((1, 300, 28, 28), (2, 3, 4, 5, 6), (1, 1, 1, 2), (3, 4, 6, 8)),
    *((200, 70, 8, 8), (300, 2, 4, 5), (300, 5, 4, 4)),
]
LAYOUTS = [support.contiguous, support.channels_last, support.negative_strides]


def in_pairs(rng, shape, dtype):
    """Neighbours at mean - d and mean + d; with them the exact mean and m2 of each channel.

    Neighbours are of one sample where it has an even number of elements, otherwise of two.
    """
    n, c, *rest = shape
    s = int(np.prod(rest))
    # What a bfloat16 holds: integers up to 256 times a power of two.
    mean = rng.integers(-128, 129, c)
    if dtype.itemsize >= 4:
        mean += rng.choice([0, 2**22, -(2**22)], c)
    if dtype.itemsize == 8:
        mean += rng.choice([0, 2**45], c)
    scale = 2.0 ** rng.integers(-6, 6, c)
    pairs = (c, n, s // 2) if s % 2 == 0 else (c, n // 2, s)
    d = rng.integers(0, 128, pairs)
    m2 = 2.0 * (d**2).sum(axis=(1, 2)) * scale**2
    x = np.stack([mean[:, None, None] - d, mean[:, None, None] + d], -1)
    x = x.reshape(c, n, s) if s % 2 == 0 else x.transpose(0, 1, 3, 2).reshape(c, n, s)
    x = (x * scale[:, None, None]).transpose(1, 0, 2).reshape(shape)
    assert (x.astype(dtype).astype(np.float64) == x).all()
    return x.astype(dtype), mean * scale, m2


@each("layout", LAYOUTS)
@each("shape", SHAPES)
def test_pairs_around_the_mean_have_exact_statistics(rng, dtype, shape, layout, set_num_threads):
    x, exact_mean, exact_m2 = in_pairs(rng, shape, dtype)
    x = layout(x)
    for threads in (1, 3, 16):
        set_num_threads(threads)
        count, mean, m2 = F.batch_norm_stats(x)
        assert count == x.size // shape[1]
        assert same_bits(mean, exact_mean + 0.0)
        assert same_bits(m2, exact_m2)


@each("layout", LAYOUTS)
@each("shape", [*SHAPES, (33, 50, 7, 7), (1031, 3), (3, 5, 7, 11)])
def test_small_integers_have_exact_running_statistics(rng, dtype, shape, layout):
    # In any order: here means of parts are not exact, only the outcome in float32 is.
    integers = rng.integers(-100, 101, shape)
    x = layout(integers.astype(dtype))
    mean, var = np.zeros(shape[1], np.float32), np.zeros(shape[1], np.float32)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    for c in range(shape[1]):
        values = integers[:, c].ravel()
        total, squares, count = int(values.sum()), int((values**2).sum()), values.size
        exact_var = Fraction(squares * count - total**2, count * (count - 1))
        assert mean[c] == np.float32(total / count)
        assert var[c] == np.float32(float(exact_var))


@each("layout", LAYOUTS)
@each("shape", SHAPES)
def test_pairs_around_the_mean_have_exact_gradient_sums(rng, dtype, shape, layout):
    # With an exact mean and an invstd of one, the sums of small integers are exact as well.
    x, exact_mean, _ = in_pairs(rng, shape, dtype)
    dy = rng.integers(-8, 9, shape)
    deviation = x.astype(np.float64) - exact_mean.reshape(-1, *[1] * (len(shape) - 2))
    axes = (0, *range(2, len(shape)))
    ones = np.ones(shape[1])
    x, dy_ = layout(x), layout(dy.astype(dtype))
    sum_dy, sum_dy_xhat = F.batch_norm_backward_reduce(dy_, x, exact_mean, ones)
    assert (sum_dy == dy.sum(axis=axes)).all()
    assert (sum_dy_xhat == (dy * deviation).sum(axis=axes)).all()


@each("layout", LAYOUTS)
@each("shape", SHAPES)
def test_outputs_without_rounding_are_exact(rng, dtype, shape, layout):
    # Half of the elements at mean - 1/2, half at mean + 1/2: the variance is 1/4, and 1 with eps.
    n, c, *rest = shape
    signs = np.arange(n * int(np.prod(rest))).reshape(n, 1, *rest) % 2 - 0.5
    mean = rng.integers(-60, 60, c).reshape(-1, *[1] * len(rest))
    x = layout((mean + signs).astype(dtype))
    weight, bias = np.array([2.0, -4.0, 0.5, 0.0, -1.0])[np.arange(c) % 5], np.arange(c) % 16.0
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=0.75)
    assert (y == signs * weight.reshape(mean.shape) + bias.reshape(mean.shape)).all()
