"""Masks: what they leave out counts for nothing, against computing on the gathered values."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import support
from cases import each
from support import (
    THREADS,
    WRITEABLE_LAYOUTS,
    channels_last,
    contiguous,
    gathered,
    left_out,
    parameters,
    refused,
    same_bits,
    some,
    some_mask,
    spoilt,
)

import fastbn
from fastbn import functional as F

pytestmark = [pytest.mark.isa, pytest.mark.sanitize, pytest.mark.wheel]

EXAMPLE = Path(__file__).parents[2] / "examples" / "sequences.py"

# Runs and their tails, short runs and folded rows, several blocks and pieces of a channel; many
# samples of longer runs, whose rows are folded, and strips of them.
SHAPES = [
    (6, 3),
    (40, 5),
    (3, 2, 5),
    (4, 3, 4, 4),
    (40, 5, 4, 5),
    (5, 33, 7, 7),
    (2, 3, 40, 41),
    (3, 70, 3, 2),
    (9, 64, 5, 7),
    (3, 100, 9, 11),
    (3, 1, 180, 200),
    (700, 6, 2),
    (130, 2, 7, 7),
    (50, 9, 8, 8),
    (2, 3, 2, 3, 4),
]
BOTH = each("layout", [contiguous, channels_last])
LAYERS = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}
INSTANCES = {3: fastbn.InstanceNorm1d, 4: fastbn.InstanceNorm2d}


@BOTH
@each("shape", SHAPES)
def test_statistics_are_those_of_what_counts(rng, dtype, shape, layout):
    x, mask = layout(some(rng, shape, dtype, mean=30)), some_mask(rng, shape)
    count, mean, m2 = F.batch_norm_stats(spoilt(x, mask), mask)
    _, exact_mean, exact_var = reference.moments(gathered(x, mask))
    assert count == mask.sum()
    support.assert_close(mean, exact_mean, 1e-15)
    support.assert_close(m2 / count, exact_var, 1e-14)


@BOTH
@each("garbage", [np.nan, 1e30])
@each("shape", SHAPES)
def test_what_does_not_count_costs_no_digit_of_data_far_from_zero(rng, shape, layout, garbage):
    x, mask = layout(some(rng, shape, mean=1e6, std=1)), some_mask(rng, shape)
    mask[0].flat[0] = mask[-1].flat[0] = False
    count, _, m2 = F.batch_norm_stats(spoilt(x, mask, garbage), mask)
    support.assert_close(m2 / count, reference.moments(gathered(x, mask))[2], 1e-12)


@BOTH
@each("in_place", [False, True])
@each("shape", SHAPES)
def test_a_training_step_is_that_of_what_counts(rng, dtype, shape, layout, in_place):
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype, mean=0))
    mask, (weight, bias) = some_mask(rng, shape), parameters(shape[1])
    mean, invstd = F.batch_norm_forward(x, mask=mask)[1:]
    a, b = spoilt(x, mask), spoilt(dy, mask, np.inf)
    y, mean, invstd = F.batch_norm_forward(a, weight, bias, mask=mask, out=a if in_place else None)
    kept = gathered(x, mask)
    exact = reference.forward(kept, weight, bias)
    bound = reference.forward_bound(exact, x.dtype, weight, bias)
    support.assert_within(gathered(y, mask), exact, bound)
    assert (left_out(y, mask) == 0).all()

    a = spoilt(x, mask)
    dx, dweight, dbias = F.batch_norm_backward(
        b, a, weight, mean, invstd, mask=mask, out=b if in_place else None
    )
    kept_dy = gathered(dy, mask)
    exact = reference.backward(kept_dy, kept, weight)
    _, exact_mean, exact_var = reference.moments(kept)
    bounds = reference.gradient_bounds(kept_dy, kept, x.dtype, exact_mean, exact_var, weight)
    for actual, expected, bound in zip(
        (gathered(dx, mask), dweight, dbias), exact, bounds, strict=True
    ):
        support.assert_within(actual, expected, bound + reference.ulp(expected, actual.dtype))
    assert (left_out(dx, mask) == 0).all()


@BOTH
@each("shape", SHAPES)
def test_the_primitives_compose_to_the_fused_functions(rng, dtype, shape, layout):
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype))
    mask, (weight, bias) = some_mask(rng, shape), parameters(shape[1])
    count, mean, m2 = F.batch_norm_stats(x, mask)
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    y = F.batch_norm_elemt(x, mean, invstd, weight, bias, mask=mask)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd, mask=mask)
    dx = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, count, mask=mask)
    fused = F.batch_norm_forward(x, weight, bias, mask=mask)
    gradients = F.batch_norm_backward(dy, x, weight, mean, invstd, mask=mask)
    support.assert_step_composes(
        (*fused, *gradients), (y, mean, invstd, dx, *sums[::-1]), dtype, dy, x
    )


@pytest.mark.parametrize("layout", WRITEABLE_LAYOUTS)
def test_any_strides_of_input_and_mask_serve(rng, layout):
    x, mask = some(rng, (4, 3, 6, 7)), some_mask(rng, (4, 3, 6, 7))
    expected = F.batch_norm_forward(x, mask=mask)[0]
    for other in (mask, layout(mask), np.asfortranarray(mask), mask[::-1].copy()[::-1]):
        y = F.batch_norm_forward(layout(x), mask=other)[0]
        support.assert_close(y, expected, 1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 1, 7), (1, 1, 6, 7), (6, 7), (7,), (4, 1, 1, 1), ()])
def test_a_mask_broadcasts(rng, shape):
    x = some(rng, (4, 3, 6, 7))
    mask = rng.random(shape) < 0.5
    mask.flat[0] = True
    full = np.broadcast_to(mask, (4, 1, 6, 7)).copy()
    assert same_bits(F.batch_norm_forward(x, mask=mask)[0], F.batch_norm_forward(x, mask=full)[0])


@BOTH
@each("shape", SHAPES)
def test_a_mask_of_nothing_but_true_changes_no_bit(rng, dtype, shape, layout):
    x, dy = layout(some(rng, shape, dtype)), layout(some(rng, shape, dtype))
    for mask in (None, np.ones((shape[0], *[1] * (len(shape) - 1)), bool)):
        y, mean, invstd = F.batch_norm_forward(x, mask=mask)
        gradients = F.batch_norm_backward(dy, x, None, mean, invstd, mask=mask)
        results = [y, mean, invstd, *gradients]
        if mask is None:
            expected = results
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@BOTH
def test_every_number_of_threads_gives_the_same_bits(rng, set_num_threads, layout):
    x, dy = (layout(some(rng, (6, 40, 60, 59))) for _ in range(2))
    mask = some_mask(rng, x.shape)
    results = []
    for threads in THREADS:
        set_num_threads(threads)
        y, mean, invstd = F.batch_norm_forward(x, mask=mask)
        results.append(
            [y, mean, invstd, *F.batch_norm_backward(dy, x, None, mean, invstd, mask=mask)]
        )
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def trained(layer, x, dy, mask=None, in_place=False):
    """Output, gradient and arrays of a layer after a training step."""
    layer.weight[:], layer.bias[:] = parameters(x.shape[1])
    if in_place:
        x, dy = x.copy(order="K"), dy.copy(order="K")
    y = layer(x, mask=mask, out=x if in_place else None).copy(order="K")
    dx = layer.backward(dy, out=dy if in_place else None)
    return y, dx, layer


@each("in_place", [False, True])
@each("freeze", [False, True])
@each("shape", [(6, 3), (4, 3, 9), (4, 3, 5, 6)])
def test_a_layer_trains_as_on_what_counts(rng, shape, freeze, in_place):
    x, dy, mask = some(rng, shape), some(rng, shape), some_mask(rng, shape)
    layer, other = LAYERS[len(shape)](3), fastbn.BatchNorm1d(3)
    if freeze:
        for bn in (layer, other):
            bn.running_mean[:], bn.running_var[:] = [0.5, -1, 2], [1, 2, 0.5]
            bn.freeze()
    y, dx, _ = trained(layer, spoilt(x, mask), spoilt(dy, mask), mask, in_place)
    expected_y, expected_dx, _ = trained(other, gathered(x, mask), gathered(dy, mask))
    support.assert_close(gathered(y, mask), expected_y, 1e-6)
    support.assert_close(gathered(dx, mask), expected_dx, 1e-4 if in_place else 1e-5)
    assert (left_out(y, mask) == 0).all()
    assert (left_out(dx, mask) == 0).all()
    for name in ("running_mean", "running_var", "weight_grad", "bias_grad"):
        support.assert_close(getattr(layer, name), getattr(other, name), 1e-4 if in_place else 1e-6)
    assert layer.num_batches_tracked == other.num_batches_tracked


@pytest.mark.parametrize("in_place", [False, True])
def test_channels_that_are_set_aside_are_masked_as_well(rng, in_place):
    x, dy = some(rng, (4, 3, 5, 6)), some(rng, (4, 3, 5, 6))
    mask = some_mask(rng, x.shape)
    results = []
    for place in (False, in_place):
        bn = fastbn.BatchNorm2d(3)
        bn.weight[:], bn.bias[:] = [0, 1, 1], [1, 0, 100]
        a = spoilt(x, mask)
        y = bn(a, mask=mask, out=a if place else None)
        assert (left_out(y, mask) == 0).all()
        results.append((bn.backward(spoilt(dy, mask)), bn.weight_grad))
    for actual, expected in zip(results[1], results[0], strict=True):
        support.assert_close(actual, expected, 1e-4)


def test_evaluation_writes_zeros_where_the_mask_is_false(rng):
    x, mask = some(rng, (4, 3, 5, 6)), some_mask(rng, (4, 3, 5, 6))
    bn = fastbn.BatchNorm2d(3).eval()
    y = bn(spoilt(x, mask), mask=mask)
    assert same_bits(gathered(y, mask), gathered(bn(x), mask))
    assert (left_out(y, mask) == 0).all()
    nothing = bn(x, mask=np.zeros((4, 1, 5, 6), bool))
    assert (nothing == 0).all()


@BOTH
@pytest.mark.parametrize("shape", [(4, 3, 30), (4, 20, 7, 6)], ids=str)
def test_instance_normalization_takes_what_counts_of_each_sample(rng, shape, layout):
    x, dy = layout(some(rng, shape)), layout(some(rng, shape))
    mask = rng.random((shape[0], 1, *shape[2:])) < 0.7
    layer = INSTANCES[len(shape)](shape[1], affine=True, track_running_stats=True)
    y, dx, _ = trained(layer, spoilt(x, mask), spoilt(dy, mask), mask)
    means = []
    for k in range(shape[0]):
        one = slice(k, k + 1)
        other = INSTANCES[len(shape)](shape[1], affine=True)
        count, mean, _ = F.batch_norm_stats(x[one], mask[one])
        means.append(mean)
        kept, kept_dy = (gathered(a[one], mask[one]).T.reshape(1, -1, count) for a in (x, dy))
        expected = trained(fastbn.InstanceNorm1d(shape[1], affine=True), kept, kept_dy)
        for actual, exact in zip((y, dx), expected, strict=False):
            support.assert_close(gathered(actual[one], mask[one]), exact[0].T, 1e-5)
        assert other.running_mean is None
    support.assert_close(layer.running_mean, 0.1 * np.mean(means, axis=0), 1e-5)


def test_moments_with_a_mask_add_up_to_those_of_what_counts(rng):
    x, mask = some(rng, (8, 3, 5, 6), np.float64), some_mask(rng, (8, 3, 5, 6))
    parts = [fastbn.Moments.of(x[k : k + 2], mask[k : k + 2]) for k in range(0, 8, 2)]
    total, exact = sum(parts), fastbn.Moments.of(gathered(x, mask))
    assert total.count == exact.count == mask.sum()
    support.assert_close(total.mean, exact.mean, 1e-14)
    support.assert_close(total.m2, exact.m2, 1e-14)


def test_recalibration_counts_what_the_masks_have(rng):
    x, mask = some(rng, (8, 3, 5, 6), np.float64), some_mask(rng, (8, 3, 5, 6))
    mask[4:6] = True
    bn = fastbn.BatchNorm2d(3, dtype=np.float64)
    with fastbn.recalibrate(bn):
        for k in range(0, 8, 2):
            bn(spoilt(x, mask)[k : k + 2], mask=mask[k : k + 2])
    exact = fastbn.Moments.of(gathered(x, mask))
    support.assert_close(bn.running_mean, exact.mean, 1e-13)
    support.assert_close(bn.running_var, exact.var(correction=1), 1e-13)


def test_a_lazy_layer_takes_a_mask(rng):
    x, mask = some(rng, (4, 3, 5, 6)), some_mask(rng, (4, 3, 5, 6))
    bn = fastbn.LazyBatchNorm2d()
    assert same_bits(bn(x, mask=mask), fastbn.BatchNorm2d(3)(x, mask=mask))


@pytest.mark.parametrize(
    ("mask", "error", "names"),
    [
        (np.zeros((4, 1, 5, 6), bool), ValueError, ["mask", "no value", "leave out a batch"]),
        (np.arange(120).reshape(4, 1, 5, 6) == 7, ValueError, ["more than 1 value"]),
        (np.ones((4, 3, 5, 6), bool), ValueError, ["mask", "(4, 1, 5, 6)", "mask[:, :1]"]),
        (np.ones((4, 5, 6), bool), ValueError, ["(4, 1, 5, 6)", "mask[:, np.newaxis]"]),
        (np.ones((4, 5, 6, 1), bool), ValueError, ["(4, 1, 5, 6)", "np.moveaxis(mask, -1, 1)"]),
        (np.ones((4, 1, 5, 7), bool), ValueError, ["mask", "(4, 1, 5, 6)"]),
        (np.ones((4, 1, 5, 6)), TypeError, ["mask", "float64", "mask != 0"]),
        (np.ones((4, 1, 5, 6), np.uint8), TypeError, ["mask", "uint8"]),
        ("yes", TypeError, ["mask"]),
        (np.ma.ones((4, 1, 5, 6), bool), TypeError, ["masked array", "mask.filled(False)"]),
    ],
)
def test_a_mask_that_cannot_serve_is_refused_and_nothing_changes(rng, mask, error, names):
    bn, x = fastbn.BatchNorm2d(3), some(rng, (4, 3, 5, 6))
    out = x.copy()
    bn(x)
    with refused(error, *names, intact=(bn, x, out)):
        bn(x, mask=mask, out=out)


def test_lengths_in_place_of_a_mask_are_recognized(rng):
    bn, x, lengths = fastbn.BatchNorm1d(3), some(rng, (4, 3, 5)), np.array([5, 2, 4, 1])
    with refused(TypeError, "np.arange(5) < mask[:, np.newaxis, np.newaxis]", intact=(bn, x)):
        bn(x, mask=lengths)
    bn(x, mask=np.arange(5) < lengths[:, np.newaxis, np.newaxis])


@pytest.mark.parametrize("byte", [2, 3, 128, 255])
def test_true_may_be_any_byte(rng, byte):
    x, mask = some(rng, (4, 3, 5, 6)), some_mask(rng, (4, 3, 5, 6))
    viewed = (mask.view(np.uint8) * np.uint8(byte)).view(bool)
    for a, b in zip(F.batch_norm_stats(x, viewed), F.batch_norm_stats(x, mask), strict=True):
        assert same_bits(a, b)
    assert same_bits(F.batch_norm_forward(x, mask=viewed)[0], F.batch_norm_forward(x, mask=mask)[0])


def test_the_mask_may_be_overwritten_before_the_backward(rng):
    x, mask = some(rng, (4, 3, 5, 6)), some_mask(rng, (4, 3, 5, 6))
    bn, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    other(x, mask=mask)
    kept = mask.copy()
    bn(x, mask=mask)
    mask[...] = True
    assert same_bits(bn.backward(x), other.backward(x))
    assert (left_out(bn(x, mask=kept), kept) == 0).all()


def test_an_empty_batch_takes_a_mask_and_changes_nothing():
    bn = fastbn.BatchNorm2d(3)
    y = bn(np.zeros((0, 3, 5, 6), np.float32), mask=np.zeros((0, 1, 5, 6), bool))
    assert y.shape == (0, 3, 5, 6)
    assert bn.num_batches_tracked == 0
    assert bn.backward(y).shape == y.shape


@pytest.mark.slow
def test_the_example_runs_and_padding_moves_nothing_with_masks_alone(tmp_path):
    pytest.importorskip("tqdm")
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--epochs", "1", "--seeds", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    moved = {row[:13].strip(): float(row.split()[-1]) for row in rows}
    assert moved["with masks"] < 1e-4
    assert moved["without masks"] > 0.1


@each("run", (*range(1, 18), 31, 32, 49, 100, 128))
def test_every_run_and_number_of_channels_has_its_own_part_of_the_mask(rng, run):
    for channels in (*range(1, 20), 31, 40, 57, 170):
        samples = max(9, run)
        shape = (samples, channels, run)
        x = np.ones(shape, np.float32)
        mask = rng.random((samples, 1, run)) < 0.5
        mask[0] = True
        count, mean, m2 = F.batch_norm_stats(spoilt(x, mask), mask)
        assert (count, *set(mean), *set(m2)) == (mask.sum(), 1.0, 0.0)
        y = F.batch_norm_elemt(spoilt(x, mask), np.zeros(channels), np.ones(channels), mask=mask)
        assert same_bits(y, (x * mask).astype(np.float32))
