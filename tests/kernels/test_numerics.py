"""Accuracy and reproducibility: what distance from the exact result is allowed, and what is not."""

import itertools

import numpy as np
import pytest
import reference
import support
from accuracy import sample
from cases import each
from support import parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.isa

DISTRIBUTIONS = ["N(0,1)", "N(1e3,1)", "N(1e4,0.1²)", "N(1e6,1)", "N(1,1e-4²)", "one outlier"]
# Small, odd and large channels; the last splits one channel over many blocks.
SHAPES = [
    (32, 3, 28, 28),
    (5, 3, 7, 7),
    (2, 3, 1, 1),
    (3, 3, 33, 27),
    (64, 17, 1, 1),
    (96, 5, 7, 7),
    (2, 1, 512, 512),
]
LAYOUTS = [support.contiguous, support.channels_last]


def every_distribution(test):
    """Parametrizes by distribution; each of these has all shapes and layouts."""
    test = each("shape, layout", itertools.product(SHAPES, LAYOUTS))(test)
    return pytest.mark.parametrize("distribution", DISTRIBUTIONS)(test)


@every_distribution
def test_float32_statistics_are_within_one_ulp(rng, distribution, shape, layout):
    x = sample(rng, distribution, shape, np.float32, layout)
    exact_count, exact_mean, exact_var = reference.moments(x)
    count, mean, m2 = F.batch_norm_stats(x)
    assert count == exact_count
    size = np.maximum(np.abs(exact_mean), np.sqrt(exact_var))
    support.assert_within(mean, exact_mean, reference.ulp(size, np.float32))
    support.assert_within(m2 / count, exact_var, reference.ulp(exact_var, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@each("shape, layout", itertools.product([(4, 9, 7, 7), (70, 9), (600, 9, 5)], LAYOUTS))
def test_variances_are_right_whatever_the_mean_is_beside_them(rng, dtype, shape, layout):
    """A channel for each ratio of mean and deviation, on both sides of where raw moments end."""
    ratios = np.array([0, 1, 30, 200, 255, 257, 300, 3000, 1e5])
    x = rng.standard_normal(shape) + ratios.reshape(1, 9, *[1] * len(shape[2:]))
    x = layout((x / 10).astype(support.dtype_of(dtype)))
    _, exact_mean, exact_var = reference.moments(x.astype(np.float32))
    _, mean, invstd = F.batch_norm_forward(x, eps=1e-12)
    size = np.maximum(np.abs(exact_mean), np.sqrt(exact_var))
    support.assert_within(mean, exact_mean, reference.ulp(size, np.float32))
    var = 1 / invstd**2 - 1e-12
    support.assert_within(var, exact_var, reference.ulp(exact_var + 1e-12, np.float32))


@pytest.mark.parametrize("channels", [[5], [0, 1, 2, 40], [3, 17, 18, 39], range(41)], ids=str)
@pytest.mark.parametrize("shape", [(6, 41, 3, 7), (6, 130, 3, 7), (70, 50, 5, 5)], ids=str)
@each("value", [np.nan, np.inf, 1.1, 1e4])
@each("layout", LAYOUTS)
def test_channels_that_are_summed_again_leave_the_others_alone(rng, shape, channels, value, layout):
    samples, width, *spatial = shape
    usual = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random((samples, 1, *spatial)) < 0.8 if samples < 70 else None
    lost = usual + np.float32(value)
    lost[:, ::3] = value
    is_lost = np.isin(np.arange(width), channels)
    mixed = np.where(is_lost[:, np.newaxis, np.newaxis], lost, usual)
    of_lost, of_usual, of_mixed = (
        F.batch_norm_forward(layout(x), mask=mask) for x in (lost, usual, mixed)
    )
    for a, b, c in zip(of_lost, of_usual, of_mixed, strict=True):
        along = is_lost.reshape(-1, *[1] * (a.ndim - 2))
        np.testing.assert_array_equal(c, np.where(along, a, b))


@pytest.mark.slow
def test_moments_of_a_million_rows_are_right():
    """More rows of a block than are added one after the other, with rounding of one sign."""
    x = np.empty((1_200_000, 49), np.float16)
    x[::2], x[1::2] = 1000, 1008
    mean, var = np.zeros(49), np.zeros(49)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(mean, 1004, rtol=2**-40)
    np.testing.assert_allclose(var, 16 * (1 + 1 / (len(x) - 1)), rtol=2**-30)


@every_distribution
def test_float32_running_statistics_are_within_two_ulp(rng, distribution, shape, layout):
    x = sample(rng, distribution, shape, np.float32, layout)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    exact_mean, exact_var = reference.updated(x, mean, var, 0.1)
    _, _, batch_var = reference.moments(x)
    F.batch_norm(x, mean, var, training=True, momentum=0.1)
    size = np.maximum(np.abs(exact_mean), np.sqrt(batch_var) / 10)
    support.assert_within(mean, exact_mean, 2 * reference.ulp(size, np.float32))
    support.assert_within(var, exact_var, 2 * reference.ulp(exact_var, np.float32))


@each("eps", [1e-5, 1e-14])
@every_distribution
def test_float32_outputs_are_within_four_ulp(rng, distribution, shape, layout, eps):
    x = sample(rng, distribution, shape, np.float32, layout)
    weight, bias = parameters(shape[1])
    exact = reference.forward(x, weight, bias, eps)
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    bound = reference.forward_bound(exact, x.dtype, weight, bias)
    support.assert_within(y, exact, bound)


@every_distribution
def test_float64_is_within_1e_14(rng, distribution, shape, layout):
    x = sample(rng, distribution, shape, np.float64, layout)
    weight, bias = parameters(shape[1], np.float64)
    _, exact_mean, exact_var = reference.moments(x)
    offset = np.abs(exact_mean) / np.sqrt(exact_var)
    allowed = np.longdouble(1e-14) * (1 + offset)
    count, mean, m2 = F.batch_norm_stats(x)
    support.assert_within(mean, exact_mean, 1e-14 * (np.abs(exact_mean) + np.sqrt(exact_var)))
    support.assert_within(m2 / count, exact_var, allowed * exact_var)
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    exact = reference.forward(x, weight, bias)
    support.assert_within(y, exact, reference.forward_bound(exact, x.dtype, weight, bias, offset))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 2, 200, 160), (4, 1, 512, 500)], ids=str)
def test_float64_does_not_depend_on_the_first_element(rng, shape, layout):
    # Deviations are taken from the first element, and here that is far from all others.
    x = sample(rng, "N(0,1)", shape, np.float64)
    x[0, :, 0, 0] = 1e6
    _, exact_mean, exact_var = reference.moments(x)
    count, mean, m2 = F.batch_norm_stats(layout(x))
    support.assert_within(mean, exact_mean, 1e-14 * (np.abs(exact_mean) + np.sqrt(exact_var)))
    support.assert_within(m2 / count, exact_var, 1e-14 * exact_var)


# Long and short runs, one and many blocks, folded columns, strips, blocks of many rows.
EQUAL_TERMS = [
    *(((1, 2, 32768), False), ((8, 1, 400, 500), False), ((700, 2, 7, 7), False)),
    *(((600, 1, 16390), False), ((9, 3, 56, 56), False), ((2**14, 1, 15), False)),
    *(((2**16, 3), False), ((2**12, 17, 4, 4), True), ((2**20, 16), False)),
]


@pytest.mark.parametrize("value", [0.3, 0.7])
@pytest.mark.parametrize(("shape", "last"), EQUAL_TERMS, ids=str)
def test_terms_that_are_rounded_to_one_side_add_up_within_1e_14(value, shape, last):
    # Two values in turn: all squares are equal, and so are the rounding errors of their sum.
    n, c, *rest = shape
    count = n * int(np.prod(rest, dtype=int))
    signs = np.resize([1.0, -1.0], (n, 1, *rest)) if count > n else np.resize([1.0, -1.0], (n, 1))
    x = np.repeat(signs * value, c, axis=1)
    if last:
        x = support.channels_last(x)
    _, mean, m2 = F.batch_norm_stats(x)
    support.assert_within(mean, np.zeros(c), 1e-14 * value)
    exact = count * np.longdouble(value)
    support.assert_within(m2, np.full(c, exact * value), 1e-14 * exact * value)
    # With dy = |x| and xhat = x / |x| = ±1, the sum of dy, and that of dy * xhat for dy = x.
    zeros, ones = np.zeros(c), np.ones(c)
    sum_dy, _ = F.batch_norm_backward_reduce(np.abs(x), x, zeros, ones)
    _, sum_dy_x = F.batch_norm_backward_reduce(x, x, zeros, ones)
    support.assert_within(sum_dy, np.full(c, exact), 1e-14 * exact)
    support.assert_within(sum_dy_x, np.full(c, exact * value), 1e-14 * exact * value)


@each("distribution", DISTRIBUTIONS)
@each("running_dtype", ["float32", "float64"])
@each("layout", LAYOUTS)
def test_eval_outputs_are_within_four_ulp(rng, distribution, running_dtype, layout):
    x = sample(rng, distribution, (8, 3, 9, 11), np.float32, layout)
    weight, bias = parameters(3)
    _, mean, var = reference.moments(x)
    mean, var = mean.astype(running_dtype), var.astype(running_dtype)
    y = F.batch_norm(x, mean, var, weight, bias)
    exact = reference.normalize(x, mean, var, weight, bias)
    support.assert_within(y, exact, reference.forward_bound(exact, x.dtype, weight, bias))


@each("value", [0.0, 0.1, -3.14159, 1e4 / 7, 6e4 / 7, 1e-20])
@each("shape", SHAPES)
@each("layout", LAYOUTS)
def test_a_constant_channel_has_no_variance_and_gives_its_bias(dtype, value, shape, layout):
    x = layout(np.full(shape, value, dtype))
    weight, bias = np.full(shape[1], 3.0), np.linspace(-2, 5, shape[1]).astype(dtype)
    _count, mean, m2 = F.batch_norm_stats(x)
    assert (mean == x.flat[0].astype(np.float64)).all()
    assert (m2 == 0).all()
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-12)
    assert (y == bias.reshape(-1, 1, 1)).all()


@pytest.mark.parametrize("value", [1e6 / 3, 1e30, -3e38, 1e-40])
def test_a_constant_of_any_float32_magnitude_gives_its_bias(value):
    x = np.full((4, 2, 9, 9), value, np.float32)
    bias = np.array([0.5, -1.0], np.float32)
    assert (F.batch_norm(x, None, None, None, bias, training=True) == bias.reshape(2, 1, 1)).all()


def test_a_constant_gives_its_bias_where_float32_has_the_factor_of_eps(dtype):
    x, bias = np.full((4, 2, 9, 9), 2.5, dtype), np.array([0.5, -1.0], dtype)
    for eps in (1e-77, 1e-300) if dtype == np.float64 else (1e-77,):
        y = F.batch_norm(x, None, None, None, bias, training=True, eps=eps)
        assert (y == bias.reshape(2, 1, 1)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitudes_of_1e30_give_the_right_output(rng, layout):
    x = sample(rng, "N(0,1)", (4, 3, 9, 9), np.float32)
    x[:, 1] *= np.float32(1e30)
    x = layout(x)
    exact_mean, exact_var = reference.updated(x, np.zeros(3), np.ones(3), 1.0)
    bn = fastbn.BatchNorm2d(3, momentum=1.0)
    exact = reference.forward(x)
    with np.errstate(over="ignore"):
        y = bn(x)
    support.assert_within(y, exact, reference.forward_bound(exact, x.dtype))
    support.assert_within(bn.running_mean, exact_mean, 2 * reference.ulp(exact_mean, np.float32))
    # The variance of the middle channel is beyond float32.
    assert bn.running_var[1] == np.inf
    support.assert_close(bn.running_var[::2], exact_var[::2], 2e-7)


@pytest.mark.parametrize(("std", "weight"), [(3e37, 1e-3), (1e3, 1e-40), (1e30, 1e-9)])
def test_a_subnormal_factor_costs_what_it_has_lost_and_no_more(rng, std, weight):
    x = sample(rng, "N(0,1)", (8, 1, 9, 9), np.float32) * np.float32(std)
    weight = np.array([weight], np.float32)
    y = F.batch_norm(x, None, None, weight, training=True)
    exact = reference.forward(x, weight)
    lost = np.ldexp(np.longdouble(1), -150) * np.abs(reference.wide(x) - reference.moments(x)[1])
    support.assert_within(y, exact, reference.forward_bound(exact, x.dtype, weight) + lost)


@each("bad", [np.nan, np.inf, -np.inf])
@each("layout", LAYOUTS)
def test_a_nan_or_an_infinity_stays_in_its_channel(rng, dtype, bad, layout):
    x = some(rng, (4, 5, 6, 7), dtype)
    dy = layout(some(rng, x.shape, dtype))
    clean = layout(x)
    x[1, 2, 3, 4] = bad
    x = layout(x)
    others = [0, 1, 3, 4]
    results = []
    for batch in (clean, x):
        bn = fastbn.BatchNorm2d(5)
        y = bn(batch)
        dx = bn.backward(dy)
        per_channel = [bn.running_mean, bn.running_var, bn.weight_grad]
        results.append([np.moveaxis(y, 1, 0), np.moveaxis(dx, 1, 0), *per_channel])
    for a, b in zip(*results, strict=True):
        assert same_bits(a[others], b[others])
    y, dx, mean, var, _ = results[1]
    assert np.isnan(y[2].astype(float)).all()
    assert np.isnan(dx[2].astype(float)).all()
    assert not np.isfinite(mean[2])
    assert np.isnan(var[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_or_an_infinity_in_dy_stays_in_its_channel(rng, bad, layout):
    x = layout(some(rng, (4, 5, 6, 7)))
    dy = some(rng, x.shape)
    clean = layout(dy)
    dy[1, 2, 3, 4] = bad
    _, mean, invstd = F.batch_norm_forward(x)
    good = F.batch_norm_backward(clean, x, None, mean, invstd)
    bad = F.batch_norm_backward(layout(dy), x, None, mean, invstd)
    others = [0, 1, 3, 4]
    assert same_bits(good[0][:, others], bad[0][:, others])
    assert same_bits(good[1][others], bad[1][others])
    assert same_bits(good[2][others], bad[2][others])
    assert np.isnan(bad[0][:, 2]).all()
    assert not np.isfinite([bad[1][2], bad[2][2]]).any()


def test_in_eval_a_nan_stays_in_its_element(rng, dtype):
    x = some(rng, (4, 3, 6, 7), dtype)
    bn = fastbn.BatchNorm2d(3).eval()
    clean = bn(x)
    x[1, 2, 3, 4] = np.nan
    y = bn(x)
    assert np.isnan(y[1, 2, 3, 4])
    y[1, 2, 3, 4] = clean[1, 2, 3, 4]
    assert same_bits(y, clean)


def test_denormal_numbers_survive(rng):
    # A library linked with -ffast-math would switch them off for the whole process.
    fastbn.BatchNorm2d(3)(some(rng, (2, 3, 4, 4)))
    tiny = np.full(4, 1e-40, np.float32)
    assert (tiny * np.float32(0.5) != 0).all()


def test_a_huge_constant_in_float64_has_no_variance():
    _, mean, m2 = F.batch_norm_stats(np.full((4, 2, 5, 5), 1e160))
    assert (mean == 1e160).all()
    assert (m2 == 0).all()


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_blocks_lose_no_more_than_the_rounding_of_their_means(rng, spread):
    # Channels-last, of 441 and 1640 rows: several blocks.
    for shape in ((3, 256, 7, 21), (1, 64, 40, 41)):
        x = support.channels_last(some(rng, shape, mean=spread, std=1))
        count, mean, m2 = F.batch_norm_stats(x)
        _, exact_mean, exact_var = reference.moments(x)
        support.assert_close(mean, exact_mean, 1e-15)
        support.assert_close(m2 / count, exact_var, 1e-13 + 1e-16 * spread)


LAYERS = {
    "batch": lambda: fastbn.BatchNorm1d(4, dtype=np.float64),
    "instance": lambda: fastbn.InstanceNorm1d(4, affine=True, dtype=np.float64),
    "group": lambda: fastbn.GroupNorm(2, 4, dtype=np.float64),
}
# Exponents of weights and of the input: products with subnormal weights have few digits.
WEIGHTS = [-320, -310, -300, -250, -165, -100, -80, 80, 100, 160, 250, 300]
INPUTS = [-120, -75, 0, 50, 75, 120]
SIZES = [(w, x) for w in WEIGHTS for x in INPUTS if (w > -305 and abs(w - x) < 290) or x == 0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@each("weight, x", SIZES)
def test_gradients_in_float64_are_right_for_weights_of_any_size(
    rng, quick, make, in_place, weight, x
):
    values, dy = some(rng, (4, 4, 5), np.float64, mean=0), some(rng, (4, 4, 5), np.float64, mean=0)
    weights = np.array([1.0, -0.75, 0.5, 2.0])
    gradients = []
    for factor in (1.0, 10.0**weight):
        layer, y = make(), values * 10.0**x
        layer.eps, layer.weight[:] = 1e-300, factor * weights
        layer(y, out=y if in_place else None)
        gradients.append(layer.backward(dy))
    expected = gradients[0] * 10.0**weight
    bound = 1e-12 * np.abs(expected).max() + 1e-322
    support.assert_within(gradients[1], expected, bound)
