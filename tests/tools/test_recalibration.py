"""Recalibration: running statistics that are those of all data, and nothing else changed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import support
from support import same_bits, some

import fastbn

pytestmark = pytest.mark.isa

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
        ([fastbn.InstanceNorm2d(3, track_running_stats=True)], TypeError, "InstanceNorm2d"),
        ([fastbn.LazyInstanceNorm2d()], TypeError, "LazyInstanceNorm2d"),
        ([fastbn.BatchNorm2d(3, track_running_stats=False)], RuntimeError, "tracks none: "),
        ([fastbn.BatchNorm2d(3).freeze()], RuntimeError, "unfreeze()"),
    ],
)
def test_what_cannot_be_recalibrated_is_refused(layers, error, words):
    bn = fastbn.BatchNorm2d(3)
    with support.refused(error, words), fastbn.recalibrate(*([bn] if layers else []), *layers):
        raise AssertionError
    assert "_forward_train" not in vars(bn)


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
