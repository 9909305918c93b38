"""16-bit arrays: conversions are exact, and results are float32's, rounded to nearest even."""

import numpy as np
import pytest
import support
from cases import each
from support import same_bits

from fastbn import functional as F

pytestmark = pytest.mark.isa

CODES = np.arange(2**16, dtype=np.uint16)


@pytest.fixture(params=["float16", "bfloat16"])
def half(request):
    return support.dtype_of(request.param)


def scaled(x, factor):
    """x * factor by the element-wise kernel: no mean, no shift."""
    c = x.shape[1]
    return F.batch_norm_elemt(x, np.zeros(c), np.full(c, factor))


# One column is folded, many are strips, a long run of one channel is a row: three kernels.
@each("shape", [(2**16, 1), (2**8, 2**8), (2**4, 2**4, 2**8), (2**13, 8)])
@each("factor", [1.0, 0.3, 3.7e-4, 1e-30, 700.0, 1e30])
def test_every_code_is_read_and_every_result_rounded_right(half, shape, factor):
    x = CODES.view(half).reshape(shape)
    with np.errstate(all="ignore"):
        wide = (x.astype(np.float32) - np.float32(0)) * np.float32(factor) + np.float32(0)
        expected = wide.astype(half)
    y = scaled(x, factor)
    nan = np.isnan(wide)
    assert np.isnan(y[nan].astype(np.float32)).all()
    assert same_bits(y[~nan], expected[~nan])


def test_ties_are_rounded_to_even(half):
    # Odd codes times 1.5 or 2.5 need one bit more than there is.
    ones = CODES[: 2**8].reshape(1, 1, -1)
    x = (ones + np.ones(1, half).view(np.uint16)).astype(np.uint16).view(half)
    for factor in (1.5, 2.5, 1.25):
        assert same_bits(
            scaled(x, factor), (x.astype(np.float32) * np.float32(factor)).astype(half)
        )


def test_statistics_are_those_of_the_widened_array(half):
    x = CODES.view(half)
    with np.errstate(invalid="ignore"):  # NaN codes
        small = np.abs(x.astype(np.float64)) < 1e15
    x = x[small][:, None]
    n, mean, m2 = F.batch_norm_stats(x)
    n_wide, mean_wide, m2_wide = F.batch_norm_stats(x.astype(np.float64))
    assert n == n_wide
    std = np.sqrt(m2_wide / n)
    assert np.abs(mean - mean_wide) < 1e-12 * std
    assert np.abs(m2 - m2_wide) < 1e-12 * m2_wide
