"""Copies of layers are independent working layers, whenever they are made."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from support import same_bits, some

import fastbn

DEEP = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
DEEP_NAMES = ["deepcopy", "pickle"]
LAYERS = {
    "1d": (fastbn.BatchNorm1d, (6, 3, 5)),
    "2d": (fastbn.BatchNorm2d, (6, 3, 5, 2)),
    "3d": (fastbn.BatchNorm3d, (6, 3, 5, 2, 2)),
    "lazy": (lambda _, **options: fastbn.LazyBatchNorm2d(**options), (6, 3, 5, 2)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


@layers
@pytest.mark.parametrize("copied", DEEP, ids=DEEP_NAMES)
@pytest.mark.parametrize("before_the_first_batch", [False, True])
def test_a_copy_made_inside_recalibrate_tracks(rng, make, shape, copied, before_the_first_batch):
    bn = make(3)
    with fastbn.recalibrate(bn):
        if before_the_first_batch:
            twin = copied(bn)
        bn(some(rng, shape))
        if not before_the_first_batch:
            twin = copied(bn)
        inside = some(rng, shape)
        twin(inside)
    expected = make(3)
    expected(inside)
    for x in (some(rng, shape) for _ in range(3)):
        twin(x)
        expected(x)
    assert same_bits(twin.running_mean, expected.running_mean)
    assert same_bits(twin.running_var, expected.running_var)
    assert twin.num_batches_tracked == 4


@layers
@pytest.mark.parametrize("passed", ["first", "second", "both"])
def test_twins_are_recalibrated_by_all_that_they_see(rng, make, shape, passed):
    first = make(3)
    first(some(rng, shape))
    second = copy.copy(first)
    x = some(rng, shape, mean=5.0)
    with fastbn.recalibrate(*{"first": [first], "second": [second]}.get(passed, [first, second])):
        first(x)
        second(x + 10)
    together = np.concatenate([x, x + 10])
    axes = (0, *range(2, x.ndim))
    np.testing.assert_allclose(first.running_mean, together.mean(axis=axes), rtol=1e-5)
    np.testing.assert_allclose(first.running_var, together.var(axis=axes, ddof=1), rtol=1e-5)
    assert first.num_batches_tracked == 2
    assert second.running_mean is first.running_mean


def test_a_twin_made_inside_recalibrate_is_recorded_too(rng):
    first, x = fastbn.LazyBatchNorm1d(), some(rng, (6, 3))
    with fastbn.recalibrate(first):
        first(x)
        copy.copy(first)(x + 10)
    np.testing.assert_allclose(first.running_mean, x.mean(axis=0) + 5, rtol=1e-5)
    assert first.num_batches_tracked == 2


def test_two_blocks_for_one_array_are_refused(rng):
    first = fastbn.BatchNorm1d(3)
    second = copy.copy(first)
    with fastbn.recalibrate(first):
        first(some(rng, (6, 3)))
        with pytest.raises(RuntimeError, match="already"), fastbn.recalibrate(second):
            pass


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_copy_of_a_lazy_layer_shares_nothing_with_it(rng, momentum):
    first = fastbn.LazyBatchNorm1d(momentum=momentum, dtype=np.float64)
    second = copy.copy(first)
    x = some(rng, (6, 3), np.float64)
    first(x)
    second(x)
    assert same_bits(first.running_mean, second.running_mean)
    assert first.num_batches_tracked == second.num_batches_tracked == 1


def test_a_copy_of_an_initialized_layer_shares_its_arrays_but_new_gradients(rng):
    first = fastbn.BatchNorm1d(3)
    second = copy.copy(first)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(first, name) is getattr(second, name)
    x = some(rng, (6, 3))
    first(x)
    first.backward(x)
    assert second.weight_grad is None
    third = copy.copy(first)
    first(x)
    first.backward(x)
    assert third.weight_grad is first.weight_grad  # It was there, and is added to in place.


def saved_array(layer, x):
    """A reference to an input that a layer keeps alive."""
    layer(x)
    return weakref.ref(x)


def test_release_lets_go_of_the_batch(rng):
    bn = fastbn.BatchNorm1d(3)
    saved = saved_array(bn, some(rng, (6, 3)))
    gc.collect()
    assert saved() is not None
    assert bn.release() is bn
    gc.collect()
    assert saved() is None
    with pytest.raises(RuntimeError, match="since release"):
        bn.backward(some(rng, (6, 3)))


@pytest.mark.parametrize("fails", [False, True])
def test_recalibrate_lets_go_of_the_last_batch(rng, fails):
    bn, other = fastbn.BatchNorm1d(3), fastbn.BatchNorm1d(3)

    def block():
        with fastbn.recalibrate(bn):
            saved = [saved_array(bn, some(rng, (6, 3))), saved_array(other, some(rng, (6, 3)))]
            yield from saved
            if fails:
                raise KeyError

    saved, of_other = [], None
    try:
        for reference in block():
            saved.append(reference)
    except KeyError:
        pass
    gc.collect()
    of_other = saved[1]
    assert saved[0]() is None
    assert of_other() is not None


class Ranks:
    """A communicator that cannot be copied."""

    def __deepcopy__(self, memo):
        raise TypeError("ranks are not copied")


def test_a_deepcopy_of_a_synchronized_layer_shares_its_ranks_alone(rng):
    layer = fastbn.SyncBatchNorm(3, comm=Ranks())
    layer.twin = layer
    copied = copy.deepcopy(layer)
    assert copied.comm is layer.comm
    assert copied.twin is copied
    assert not np.shares_memory(copied.weight, layer.weight)
    assert not np.shares_memory(copied.running_mean, layer.running_mean)
