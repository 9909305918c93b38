"""Properties of every input: hypothesis draws shapes, strides, dtypes and parameters."""

import numpy as np
import pytest
import reference
import strategies
from hypothesis import assume, given
from hypothesis import strategies as st
from support import assert_within, same_bits, untouched

from fastbn import functional as F

# More than what is lost where weight / std is a subnormal float32.
TINY = 1e-30


def spread(x):
    """Mean, variance and 1 + |mean| / std of each channel; 1 where there is no spread."""
    _, mean, var = reference.moments(x)
    offset = np.zeros_like(mean)
    np.divide(np.abs(mean), np.sqrt(var), out=offset, where=var > 0)
    return mean, var, 1 + offset


def finite(*vectors):
    """The channels whose parameters are all finite."""
    return np.logical_and.reduce([np.isfinite(v.astype(float)) for v in vectors if v is not None])


def channels_of(vector, chosen):
    return None if vector is None else vector[chosen]


def assert_output(y, exact, weight, bias, offset):
    """Asserts the bound of outputs for the channels with finite parameters, infinities beyond."""
    good = finite(np.zeros(y.shape[1]), weight, bias)
    assert not np.isfinite(y[:, ~good].astype(float)).any()
    weight, bias = channels_of(weight, good), channels_of(bias, good)
    y, exact, offset = y[:, good], exact[:, good], np.broadcast_to(offset, good.shape)[good]
    bound = reference.forward_bound(exact, y.dtype, weight, bias, offset) + TINY
    holds = np.abs(exact) < reference.largest(y.dtype)
    assert_within(y[holds], exact[holds], bound[holds])
    beyond = np.abs(exact) > reference.largest(y.dtype) * (1 + np.longdouble(2) ** -7)
    assert np.isinf(y[beyond].astype(float)).all()


@given(st.data())
def test_a_training_forward_is_right_or_refused(data):
    x = data.draw(strategies.inputs())
    channels = x.shape[1]
    weight = data.draw(st.none() | strategies.vectors(channels, strategies.WEIGHTS))
    bias = data.draw(st.none() | strategies.vectors(channels, strategies.BIASES))
    eps, momentum = data.draw(strategies.EPS), data.draw(strategies.MOMENTA)
    running = data.draw(
        st.just([None, None])
        | st.tuples(
            strategies.vectors(channels, st.floats(-100, 100, width=16)),
            strategies.vectors(channels, strategies.VARIANCES),
        )
    )
    before = [None if r is None else r.copy() for r in running]
    arrays = [a for a in (x, weight, bias) if a is not None]
    arguments = x, *running, weight, bias, True, momentum, eps
    count = x.size // channels if channels else int(np.prod(x.shape[:1] + x.shape[2:]))
    if count == 1:
        with untouched(*arrays), pytest.raises(ValueError, match="more than 1 value"):
            F.batch_norm(*arguments)
        unchanged = True
    else:
        with untouched(*arrays):
            y = F.batch_norm(*arguments)
        assert y.dtype == x.dtype.newbyteorder("=")
        assert y.shape == x.shape
        unchanged = count == 0
    if unchanged or running[0] is None:
        assert all(r is None or same_bits(r, b) for r, b in zip(running, before, strict=True))
    if x.size == 0 or count == 1:
        return
    _, _, offset = spread(x)
    with np.errstate(all="ignore"):
        exact = reference.forward(x, weight, bias, eps)
    assert_output(y, exact, weight, bias, offset)
    if running[0] is not None:
        assert_running(running, before, x, momentum, offset)


@np.errstate(all="ignore")
def assert_running(running, before, x, momentum, offset):
    """Asserts two ulp at the size of the parts, and what float64 statistics may lack."""
    exact = reference.updated(x, *before, momentum)
    batch = reference.updated(x, *(np.zeros_like(b) for b in before), 1.0)
    least = np.sqrt(batch[1]), np.zeros_like(batch[1])
    for got, was, new, part, std in zip(running, before, exact, batch, least, strict=True):
        good = np.isfinite(was.astype(float)) & (np.abs(new) < reference.largest(got.dtype))
        size = np.abs((1 - momentum) * reference.wide(was))
        size = np.maximum(size, np.abs(momentum) * np.maximum(np.abs(part), std))
        bound = 2 * reference.ulp(size[good], got.dtype) + 1e-14 * (offset * size)[good]
        assert_within(got[good], new[good], bound)
        lost = ~np.isfinite(was.astype(float))
        assert not np.isfinite(got[lost].astype(float)).any()


@given(st.data())
def test_an_eval_forward_is_right(data):
    x = data.draw(strategies.inputs())
    channels = x.shape[1]
    weight = data.draw(st.none() | strategies.vectors(channels, strategies.WEIGHTS))
    bias = data.draw(st.none() | strategies.vectors(channels, strategies.BIASES))
    mean = data.draw(strategies.vectors(channels, st.floats(-100, 100, width=16)))
    var = data.draw(strategies.vectors(channels, strategies.VARIANCES))
    eps = data.draw(strategies.EPS)
    with untouched(x, mean, var):
        y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
    with np.errstate(all="ignore"):
        exact = reference.normalize(x, mean, var, weight, bias, eps)
        size = np.abs(reference.wide(mean)) / np.sqrt(reference.wide(var) + eps)
    negative = reference.wide(var) + eps < 0
    lost = negative | np.isnan(var.astype(float))
    assert np.isnan(y[:, lost].astype(float)).all()
    kept = ~lost
    weight, bias = channels_of(weight, kept), channels_of(bias, kept)
    assert_output(y[:, kept], exact[:, kept], weight, bias, size[kept])


@given(st.data())
def test_gradients_are_right(data):
    x = data.draw(strategies.inputs())
    dy = data.draw(strategies.like(x, data.draw(strategies.DTYPES)))
    dy_as_read = dy.astype(x.dtype.newbyteorder("="))
    channels = x.shape[1]
    weight = data.draw(st.none() | strategies.vectors(channels, strategies.WEIGHTS))
    eps = data.draw(strategies.EPS)
    _, mean, invstd = F.batch_norm_forward(x, weight, eps=eps)
    with untouched(x, dy, mean, invstd):
        dx, dweight, dbias = F.batch_norm_backward(dy, x, weight, mean, invstd)
    assert dx.shape == x.shape
    assert dweight.shape == dbias.shape == (channels,)
    if x.size == 0:
        assert (dweight == 0).all()
        assert (dbias == 0).all()
        return
    exact_mean, var, offset = spread(x)
    with np.errstate(all="ignore"):
        exact = reference.backward(dy_as_read, x, weight, eps)
        bounds = reference.gradient_bounds(dy_as_read, x, dx.dtype, exact_mean, var, weight, eps)
    if x.dtype.itemsize < 8:
        offset = np.ones_like(offset)
    assert_within(dweight, exact[1], bounds[1] * offset + TINY)
    assert_within(dbias, exact[2], bounds[2] + TINY)
    good = finite(dbias, weight)
    assert not np.isfinite(dx[:, ~good].astype(float)).any()
    bound = (bounds[0] * reference.over_channels(offset, x.ndim))[:, good] + TINY
    rounding = reference.ulp(exact[0], dx.dtype)[:, good] if dx.dtype.itemsize == 2 else 0
    holds = np.abs(exact[0][:, good]) < reference.largest(dx.dtype)
    bound = np.broadcast_to(bound + rounding, holds.shape)
    assert_within(dx[:, good][holds], exact[0][:, good][holds], bound[holds])


@given(st.data())
def test_out_gets_the_bits_of_a_new_array(data):
    x = data.draw(strategies.inputs())
    weight = data.draw(strategies.vectors(x.shape[1], strategies.WEIGHTS))
    bias = data.draw(strategies.vectors(x.shape[1], strategies.BIASES))
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    dy = data.draw(strategies.like(x))
    dx, *_ = F.batch_norm_backward(dy, x, weight, mean, invstd)
    elsewhere = np.zeros(x.shape, y.dtype)
    out = data.draw(strategies.laid_out(elsewhere, writeable=True))
    assert F.batch_norm_forward(x, weight, bias, out=out)[0] is out
    assert same_bits(out, y)
    F.batch_norm_backward(dy, x, weight, mean, invstd, out=out)
    assert same_bits(out, dx)
    in_place = data.draw(strategies.laid_out(x.astype(y.dtype), writeable=True))
    F.batch_norm_forward(in_place, weight, bias, out=in_place)
    # In another layout sums go in another order.
    if in_place.strides == x.strides:
        assert same_bits(in_place, y)
    gradient = data.draw(strategies.laid_out(dy.astype(y.dtype), writeable=True))
    F.batch_norm_backward(gradient, x, weight, mean, invstd, out=gradient)
    assert same_bits(gradient, dx)


# Invariants.

WIDE = st.sampled_from(["float32", "float64"]).map(np.dtype)
NOT_EMPTY = [n for n in strategies.LENGTHS if n > 0]


@st.composite
def batches(draw, dtypes=strategies.DTYPES):
    """Numbers without a zero spread, of shapes with more than one value per channel."""
    shape = draw(strategies.shapes(lengths=NOT_EMPTY))
    assume(np.prod(shape) > shape[1])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = draw(st.sampled_from([0.0, 2.0, -5.0])) + rng.standard_normal(shape)
    return draw(strategies.laid_out(x.astype(draw(dtypes)), writeable=True))


@given(batches(), st.integers(-8, 8), st.sampled_from([1, -1]))
def test_a_power_of_two_as_the_scale_changes_no_bit(x, exponent, sign):
    x = x.astype(x.dtype.newbyteorder("="), order="C")
    wanted = sign * np.ldexp(x.astype(np.float64), exponent)
    scaled = wanted.astype(x.dtype)
    assume((scaled == wanted).all())  # no subnormal float16 has lost a bit
    eps = 2.0**-20
    y, mean, invstd = F.batch_norm_forward(x, eps=eps)
    scaled_y, scaled_mean, scaled_invstd = F.batch_norm_forward(scaled, eps=eps * 4.0**exponent)
    assert (scaled_y == sign * y).all()
    assert (scaled_mean == sign * np.ldexp(mean, exponent)).all()
    assert (scaled_invstd == np.ldexp(invstd, -exponent)).all()


@given(batches(WIDE), st.sampled_from([1.0, -64.0, 4096.0]))
def test_a_shift_moves_the_mean_and_nothing_else(x, shift):
    # In steps of 1/8, which can be shifted without rounding.
    x = (np.round(x * 8) / 8).astype(x.dtype.newbyteorder("="))
    count, mean, m2 = F.batch_norm_stats(x)
    _, moved_mean, moved_m2 = F.batch_norm_stats(x + x.dtype.type(shift))
    size = np.abs(mean) + np.abs(shift) + np.sqrt(m2 / count)
    assert_within(moved_mean, mean + shift, 1e-15 * size)
    assert_within(moved_m2, m2, 1e-13 * m2)
    y = F.batch_norm_forward(x)[0]
    moved_y = F.batch_norm_forward(x + x.dtype.type(shift))[0]
    exact = reference.forward(x)
    bound = reference.forward_bound(exact, x.dtype, offset=size / np.sqrt(m2 / count + 1e-5))
    assert_within(y, exact, bound)
    assert_within(moved_y, exact, bound)


@given(st.data())
def test_the_order_of_the_samples_does_not_matter(data):
    x = data.draw(batches())
    order = data.draw(st.permutations(range(x.shape[0])))
    count, mean, m2 = F.batch_norm_stats(x)
    _, same_mean, same_m2 = F.batch_norm_stats(x[order])
    std = np.sqrt(m2 / count)
    assert_within(same_mean, mean, 1e-15 * (np.abs(mean) + std))
    assert_within(same_m2, m2, 1e-13 * m2)
    y = F.batch_norm_elemt(x, mean, 1 / (std + 1e-3))
    assert same_bits(F.batch_norm_elemt(x[order], mean, 1 / (std + 1e-3)), y[order])


@given(st.data())
def test_a_batch_may_be_split_and_merged(data):
    x = data.draw(batches())
    dy = data.draw(strategies.like(x))
    cuts = data.draw(st.lists(st.integers(0, x.shape[0]), max_size=4).map(sorted))
    parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, x.shape[0]], strict=True)]
    count, mean, m2 = 0, np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for i in data.draw(st.permutations(range(len(parts)))):
        added, part_mean, part_m2 = F.batch_norm_stats(x[parts[i]])
        if added:
            count, delta = count + added, part_mean - mean
            mean = mean + delta * (added / count)
            m2 = m2 + part_m2 + delta**2 * ((count - added) * added / count)
    whole = F.batch_norm_stats(x)
    assert count == whole[0]
    assert_within(mean, whole[1], 1e-14 * (np.abs(mean) + np.sqrt(m2 / count)))
    assert_within(m2, whole[2], 1e-12 * m2)

    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    y = F.batch_norm_elemt(x, mean, invstd)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, None, *sums, count)
    total = np.zeros((2, x.shape[1]))
    for part in parts:
        assert same_bits(F.batch_norm_elemt(x[part], mean, invstd), y[part])
        total += F.batch_norm_backward_reduce(dy[part], x[part], mean, invstd)
        arguments = dy[part], x[part], mean, invstd, None, *sums, count
        assert same_bits(F.batch_norm_backward_elemt(*arguments), dx[part])
    axes = reference.channel_axes(x)
    wide_dy = np.abs(reference.wide(dy))
    xhat = np.abs(reference.normalize(x, mean, m2 / count))
    assert_within(total[0], sums[0], 1e-13 * wide_dy.sum(axis=axes))
    assert_within(total[1], sums[1], 1e-12 * (wide_dy * xhat).sum(axis=axes))


@given(st.data())
def test_the_gradient_is_orthogonal_to_the_constants_and_to_the_normalized_input(data):
    x = data.draw(batches(WIDE))
    dy = data.draw(strategies.like(x, x.dtype))
    weight = data.draw(st.sampled_from([1.0, -0.5]))
    eps = 1e-5
    _, mean, invstd = F.batch_norm_forward(x, eps=eps)
    weights = np.full(x.shape[1], weight)
    dx, dweight, _ = F.batch_norm_backward(dy, x, weights, mean, invstd)
    _, var, offset = spread(x)
    axes = reference.channel_axes(x)
    xhat = reference.normalize(x, mean, var, eps=eps)
    size = np.abs(reference.scale(var, weights, eps, x.ndim) * reference.wide(dy)).max(axis=axes)
    size = size * offset * (x.size // x.shape[1])
    relative = 1e-12 if x.dtype.itemsize == 8 else 4e-7
    wide_dx = reference.wide(dx)
    assert_within(wide_dx.sum(axis=axes), np.zeros_like(mean), relative * size + TINY)
    # Not orthogonal to the last bit of the variance: eps takes its share.
    share = weight * invstd * dweight * (eps / (var + eps))
    assert_within((wide_dx * xhat).sum(axis=axes), share, relative * size + TINY)


@given(st.data())
def test_the_gradient_is_linear_in_dy(data):
    x = data.draw(batches(WIDE))
    dy = data.draw(batches(st.just(x.dtype)).map(lambda a: np.resize(a, x.shape)))
    _, mean, invstd = F.batch_norm_forward(x)
    once = F.batch_norm_backward(dy, x, None, mean, invstd)
    thrice = F.batch_norm_backward(dy * x.dtype.type(-4), x, None, mean, invstd)
    for a, b in zip(once, thrice, strict=True):
        assert (a * -4 == b).all()
