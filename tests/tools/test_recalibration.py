"""Recalibration: running statistics that are those of all data, and nothing else changed."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
import support
from internals import alone_on_its_rank
from kinds import TRACKING, OneRank
from support import same_bits, some

import fastbn

EXAMPLE = Path(__file__).parents[2] / "examples" / "recalibrate.py"
LAYERS = {
    "1d": (fastbn.BatchNorm1d, (4, 3, 7)),
    "2d": (fastbn.BatchNorm2d, (4, 3, 5, 2)),
    "3d": (fastbn.BatchNorm3d, (4, 3, 5, 2, 3)),
    "lazy": (lambda _, **kwargs: fastbn.LazyBatchNorm2d(**kwargs), (4, 3, 5, 2)),
}
layers = pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)


def drifting_batches(rng, shape, dtype=np.float32):
    """Batches of different means and lengths: most of the variance is between them."""
    for i, n in enumerate((4, 1, 7, 2)):
        yield some(rng, (n, *shape[1:]), dtype, mean=10.0 * i)


def assert_calibrated(bn, batches):
    count, mean, var = reference.moments(np.concatenate(batches))
    var = var * count / (count - 1) if bn.unbiased else var
    dtype = bn.running_mean.dtype
    support.assert_within(bn.running_mean, mean, reference.ulp(mean, dtype))
    support.assert_within(bn.running_var, var, 3 * reference.ulp(var, dtype))
    assert bn.num_batches_tracked == len(batches)


@layers
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_become_those_of_all_batches(
    rng, layer, shape, momentum, in_place, unbiased
):
    bn = layer(3, momentum=momentum, unbiased=unbiased)
    batches = list(drifting_batches(rng, shape))
    with fastbn.recalibrate(bn):
        for x in batches:
            x = x.copy()
            bn(x, out=x if in_place else None)
    assert_calibrated(bn, batches)


def test_every_dtype_of_layer_and_input(rng, dtype):
    bn = fastbn.BatchNorm2d(3, dtype=dtype)
    batches = list(drifting_batches(rng, (4, 3, 5, 2), dtype))
    with fastbn.recalibrate(bn):
        for x in batches:
            bn(x)
    assert_calibrated(bn, batches)


def test_outputs_and_gradients_inside_are_those_of_training(rng):
    ours, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    with fastbn.recalibrate(ours):
        for x in drifting_batches(rng, (4, 3, 5, 2)):
            assert same_bits(ours(x), other(x))
            assert same_bits(ours.backward(x), other.backward(x))
    assert same_bits(ours.weight_grad, other.weight_grad)


def test_running_statistics_stay_until_the_end_and_the_layer_tracks_again_then(rng):
    bn, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    x = some(rng, (4, 3, 5, 2))
    with fastbn.recalibrate(bn), support.untouched(bn):
        bn(x)
    other.load_state_dict(bn.state_dict())
    bn(x)
    other(x)
    assert same_bits(bn.running_mean, other.running_mean)
    assert bn.num_batches_tracked == 2
    assert repr(bn) == repr(other)
    assert vars(bn).keys() == vars(other).keys()


def test_evaluation_inside_does_not_count(rng):
    bn = fastbn.BatchNorm2d(3)
    x = some(rng, (4, 3, 5, 2))
    expected = bn.eval()(x)
    with fastbn.recalibrate(bn.train()):
        bn(x)
        assert same_bits(bn.eval()(2 * x), fastbn.BatchNorm2d(3).eval()(2 * x))
    assert_calibrated(bn, [x])
    assert not same_bits(bn(x), expected)


def test_an_exception_leaves_everything_as_it_was(rng):
    bn = fastbn.BatchNorm2d(3)
    bn(some(rng, (4, 3, 5, 2)))
    attributes = vars(bn).keys()

    def interrupted():
        with fastbn.recalibrate(bn):
            bn(some(rng, (4, 3, 5, 2)))
            raise KeyboardInterrupt

    with support.untouched(bn), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert vars(bn).keys() == attributes


def test_a_forward_that_is_refused_is_not_counted(rng):
    bn = fastbn.BatchNorm2d(3)
    x = some(rng, (4, 3, 5, 2))
    with fastbn.recalibrate(bn):
        bn(x)
        with pytest.raises(ValueError, match="more than 1 value"):
            bn(x[:1, :, :1, :1])
        with pytest.raises(ValueError, match="out"):
            bn(x, out=x[::-1])
        bn(x[:0])
    assert_calibrated(bn, [x])


def test_all_layers_or_none(rng):
    first, second = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    with (
        support.refused(RuntimeError, "no batch in training mode", intact=[first, second]),
        fastbn.recalibrate(first, second),
    ):
        first(some(rng, (4, 3, 5, 2)))
        second.eval()(some(rng, (4, 3, 5, 2)))
    second.running_var = support.read_only(second.running_var)
    with (
        support.refused(ValueError, "running_var", intact=[first, second]),
        fastbn.recalibrate(first, second.train()),
    ):
        first(some(rng, (4, 3, 5, 2)))
        second(some(rng, (4, 3, 5, 2)))


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([], ValueError, "at least one"),
        ([None], TypeError, "NoneType"),
        ([[fastbn.BatchNorm2d(3)]], TypeError, "got list: recalibrate(*layers)"),
        ([np.ones((4, 3, 5, 2))], TypeError, "got ndarray: call the layers with it in the block"),
        ([fastbn.InstanceNorm2d(3)], RuntimeError, "argument 1 of 2, tracks none: "),
        ([fastbn.GroupNorm(1, 3)], TypeError, "GroupNorm"),
        ([fastbn.BatchNorm2d(3, track_running_stats=False)], RuntimeError, "tracks none: "),
        ([fastbn.BatchNorm2d(3).freeze()], RuntimeError, "argument 1 of 2, is frozen: unfreeze()"),
        ([fastbn.BatchNorm2d(3).eval()], RuntimeError, "argument 1 of 2, is in evaluation mode: "),
        ([fastbn.LazyBatchNorm2d().eval()], RuntimeError, "evaluation mode: train() it first"),
    ],
)
def test_what_cannot_be_recalibrated_is_refused(layers, error, words):
    bn = fastbn.BatchNorm2d(3)
    with support.refused(error, words), fastbn.recalibrate(*([bn] if layers else []), *layers):
        raise AssertionError
    assert "_forward_train" not in vars(bn)


def test_of_equal_layers_the_error_says_which_has_seen_nothing(rng):
    twins = [fastbn.BatchNorm2d(3) for _ in range(3)]
    with (
        support.refused(RuntimeError, "argument 1 of 3, has seen no batch", intact=twins),
        fastbn.recalibrate(*twins),
    ):
        twins[0](some(rng, (4, 3, 5, 2)))
        twins[2](some(rng, (4, 3, 5, 2)))


def test_running_statistics_that_share_memory_are_not_written(rng):
    bn = fastbn.BatchNorm2d(3)
    bn.running_var = bn.running_mean
    with support.refused(ValueError, "share memory", intact=[bn]), fastbn.recalibrate(bn):
        bn(some(rng, (4, 3, 5, 2)))


BOTH = "both running statistics in common"
PARTS = {
    "variances": (("running_var",), BOTH),
    "means": (("running_mean",), BOTH),
    "counters": (("num_batches_tracked",), BOTH),
}


@pytest.mark.parametrize("passed", ["both", "one"])
@pytest.mark.parametrize(("names", "words"), PARTS.values(), ids=PARTS)
def test_layers_with_a_part_in_common_are_refused(rng, names, words, passed):
    first, second = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    for name in names:
        setattr(second, name, getattr(first, name)[...])
    layers, x = [first, second], some(rng, (4, 3, 5, 2))
    with (
        support.refused(RuntimeError, words, *names, intact=layers),
        fastbn.recalibrate(*layers if passed == "both" else layers[:1]),
    ):
        first(x)
        second(x)


def crossed(layer, other):
    layer.running_mean, layer.running_var = other.running_var, other.running_mean


def shortened(layer, other):
    layer.running_mean, layer.running_var = other.running_mean[:2], other.running_var[:2]
    layer.num_features, layer.weight, layer.bias = 2, None, None


def reread(layer, other):
    layer.running_mean = other.running_mean.view(np.int32)
    layer.running_var = other.running_var.view(np.int32)


@pytest.mark.parametrize("share", [crossed, shortened, reread])
def test_layers_with_the_same_memory_in_another_way_are_refused(share):
    first, second = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    share(second, first)
    with support.refused(RuntimeError, BOTH), fastbn.recalibrate(first, second):
        raise AssertionError


def test_layers_of_two_families_are_not_recalibrated_together(rng):
    bn, norm = fastbn.BatchNorm2d(3), fastbn.InstanceNorm2d(3, track_running_stats=True)
    norm.running_mean, norm.running_var = bn.running_mean, bn.running_var
    with support.refused(RuntimeError, "another way", intact=[bn]), fastbn.recalibrate(bn, norm):
        raise AssertionError


def test_layers_that_get_common_arrays_inside_are_refused(rng):
    first, second = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    x = some(rng, (4, 3, 5, 2))
    with (
        support.refused(RuntimeError, "before the block", intact=[first]),
        fastbn.recalibrate(first, second),
    ):
        first(x)
        second(x)
        second.running_mean, second.running_var = first.running_mean, first.running_var


def test_a_layer_whose_arrays_are_replaced_inside_stays_recorded(rng):
    bn, other, x = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3), some(rng, (4, 3, 5, 2))
    old = bn.running_mean
    with fastbn.recalibrate(bn):
        bn(x)
        bn.running_mean, bn.running_var = bn.running_mean.copy(), bn.running_var.copy()
        other.running_mean, other.running_var = old, np.ones(3, np.float32)
        other(x)  # has the old array, which is nobody's now
        copy.copy(bn)(x + 1)
        bn(x + 2)
    assert_calibrated(bn, [x, x + 1, x + 2])
    support.assert_close(old, 0.1 * x.mean(axis=(0, 2, 3)), 1e-6)


def test_no_other_layer_is_taken_for_one_whose_memory_it_gets(rng):
    x = some(rng, (4, 3, 5, 2))
    bn = fastbn.BatchNorm2d(3)
    with fastbn.recalibrate(bn):
        for _ in range(20):
            bn(x)
            bn.running_mean, bn.running_var = np.zeros(3, np.float32), np.ones(3, np.float32)
            other = fastbn.BatchNorm2d(3)
            other(x)
            assert other.num_batches_tracked == 1
            assert other.running_mean.any()
    assert_calibrated(bn, [x] * 20)


def test_threads_recalibrate_at_the_same_time(rng):
    x = some(rng, (4, 3, 5, 2))

    def recalibrated(_):
        first, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
        twin = copy.copy(first)
        with fastbn.recalibrate(first):
            for layer in (first, other, twin):
                layer(x)
        assert other.num_batches_tracked == 1
        return first

    with ThreadPoolExecutor(4) as pool:
        for bn in pool.map(recalibrated, range(40)):
            assert_calibrated(bn, [x, x])


@pytest.mark.parametrize(("make", "shape"), TRACKING.values(), ids=TRACKING)
@pytest.mark.parametrize("masked", [False, True])
def test_a_forward_that_tracks_nothing_is_not_recorded(rng, make, shape, masked, monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())
    layer, twin, alone, x = make(), make(), make(), some(rng, shape)
    mask = support.some_mask(rng, shape) if masked else None
    with fastbn.recalibrate(alone):
        alone(x, mask=mask)
    with fastbn.recalibrate(layer):
        if masked:  # a lazy layer may have its first forward so, or not
            layer(x, mask=mask)
        layer.track_running_stats = False
        aside = layer(10 * x, mask=mask)
        layer.track_running_stats = True
        if not masked:
            layer(x)
    twin.track_running_stats = False
    assert same_bits(aside, twin(10 * x, mask=mask))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(layer, name), getattr(alone, name))


def test_a_layer_without_channels_stays_as_it_is():
    bn = fastbn.BatchNorm1d(0)
    with fastbn.recalibrate(bn):
        bn(np.empty((4, 0, 5), np.float32))
    assert bn.num_batches_tracked == 0


INSTANCES = {
    "1d": (fastbn.InstanceNorm1d, (4, 3, 7)),
    "2d": (fastbn.InstanceNorm2d, (4, 3, 5, 2)),
    "3d": (fastbn.InstanceNorm3d, (4, 3, 5, 2, 3)),
    "lazy": (lambda _, **kwargs: fastbn.LazyInstanceNorm2d(**kwargs), (4, 3, 5, 2)),
}


@pytest.mark.parametrize(("layer", "shape"), INSTANCES.values(), ids=INSTANCES)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("unbiased", [True, False])
def test_instances_give_the_means_over_all_samples(rng, layer, shape, momentum, in_place, unbiased):
    norm = layer(3, momentum=momentum, track_running_stats=True, unbiased=unbiased)
    alone = layer(3, track_running_stats=False)
    batches = list(drifting_batches(rng, shape))
    with fastbn.recalibrate(norm):
        for x in batches:
            y = x.copy()
            assert same_bits(norm(y, out=y if in_place else None), alone(x))
        norm(x[:0])
        norm(x[0])  # a sample without the axis of samples
    samples = np.concatenate([*batches, x[:1]]).astype(np.float64)
    axes = tuple(range(2, x.ndim))
    mean = samples.mean(axis=axes).mean(axis=0)
    var = samples.var(axis=axes, ddof=int(unbiased)).mean(axis=0)
    support.assert_close(norm.running_mean, mean, 1e-6)
    support.assert_close(norm.running_var, var, 1e-6)
    assert norm.num_batches_tracked == 0
    norm(batches[0])
    assert momentum is None or not np.allclose(norm.running_mean, mean)  # it tracks again


def test_samples_without_two_valid_positions_add_nothing(rng):
    norm, x = fastbn.InstanceNorm1d(3, track_running_stats=True), some(rng, (4, 3, 7))
    mask = np.arange(7) < np.array([7, 1, 0, 4])[:, np.newaxis, np.newaxis]
    with fastbn.recalibrate(norm):
        norm(x[1:3], mask=mask[1:3])
        norm(x, mask=mask)
    samples = [x[0].astype(np.float64), x[3, :, :4].astype(np.float64)]
    support.assert_close(norm.running_mean, np.mean([s.mean(axis=1) for s in samples], 0), 1e-6)
    support.assert_close(norm.running_var, np.mean([s.var(1, ddof=1) for s in samples], 0), 1e-6)


def test_a_layer_is_recalibrated_once_at_a_time(rng):
    bn = fastbn.BatchNorm2d(3)
    x = some(rng, (4, 3, 5, 2))
    with fastbn.recalibrate(bn, bn):
        with pytest.raises(RuntimeError, match="already"), fastbn.recalibrate(bn):
            pass
        bn(x)
    assert_calibrated(bn, [x])


@pytest.mark.slow
def test_the_example_runs_and_recalibration_is_no_worse(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--epochs", "1", "--seeds", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recalibrated" in done.stdout


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("running_var", np.ones(7, np.float32), r"running_var must have the shape \(2,\)"),
        ("running_var", np.ones(2, int), "running_var must be of a floating dtype"),
        ("num_batches_tracked", np.zeros(3, int), "num_batches_tracked must be"),
        ("num_batches_tracked", np.zeros((), np.int8), "num_batches_tracked must be"),
    ],
)
def test_arrays_that_cannot_take_the_results_are_refused(rng, name, array, words):
    bn = fastbn.BatchNorm1d(2)

    def calibrate():
        with fastbn.recalibrate(bn):
            for _ in range(130):
                bn(some(rng, (5, 2)))
            setattr(bn, name, array)

    with pytest.raises((ValueError, TypeError), match=words):
        calibrate()
    assert same_bits(bn.running_mean, np.zeros(2, np.float32))


def test_a_counter_is_set_to_the_batches_whatever_it_has_been(rng):
    bn = fastbn.BatchNorm1d(2)
    bn.num_batches_tracked = np.array(100, np.int8)
    with fastbn.recalibrate(bn):
        for _ in range(50):
            bn(some(rng, (5, 2)))
    assert bn.num_batches_tracked == 50
