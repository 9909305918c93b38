"""Copies of layers are independent working layers, whenever they are made."""

import contextlib
import copy
import os
import pickle
import weakref

import numpy as np
import pytest
from cases import each
from internals import alone_on_its_rank
from kinds import KINDS, SHAPES, TRACKING, OneRank
from support import LAYER_ARRAYS, output_of, same_bits, some, untouched

import fastbn

DEEP = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
DEEP_NAMES = ["deepcopy", "pickle"]
tracking = pytest.mark.parametrize(("make", "shape"), TRACKING.values(), ids=TRACKING)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())


def assert_same_statistics(first, second):
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(first, name), getattr(second, name)), name


@tracking
@pytest.mark.parametrize("copied", DEEP, ids=DEEP_NAMES)
@each("before_the_first_batch", [False, True])
def test_a_copy_made_inside_recalibrate_tracks(rng, make, shape, copied, before_the_first_batch):
    layer = make()
    with fastbn.recalibrate(layer):
        if before_the_first_batch:
            twin = copied(layer)
        layer(some(rng, shape))
        if not before_the_first_batch:
            twin = copied(layer)
        inside = some(rng, shape)
        twin(inside)
    expected = make()
    expected(inside)
    for x in (some(rng, shape) for _ in range(3)):
        twin(x)
        expected(x)
    assert_same_statistics(twin, expected)


POOL = """
import concurrent.futures, multiprocessing
import numpy as np
import fastbn

x = np.random.default_rng(0).standard_normal((6, 3, 5, 2), dtype=np.float32)
KINDS = {
    fastbn.BatchNorm2d: {},
    fastbn.InstanceNorm2d: {"track_running_stats": True},
}

def moved(layer, x):
    layer(x)
    return layer

context = multiprocessing.get_context("fork")
for kind, options in KINDS.items():
    layer, expected = kind(3, **options), kind(3, **options)
    with fastbn.recalibrate(layer):
        layer(x)
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            copied = pool.submit(moved, layer, x + 10).result()
    expected(x + 10)
    assert (copied.running_mean == expected.running_mean).all()
    assert copied.num_batches_tracked == expected.num_batches_tracked
    assert np.allclose(layer.running_mean, x.mean(axis=(0, 2, 3)), atol=1e-6)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_copy_that_a_pool_of_processes_gets_inside_recalibrate_tracks(tmp_path):
    output_of(POOL, tmp_path)


def with_views(layer):
    """The layer, with views of its own on the same running statistics."""
    layer.running_mean, layer.running_var = layer.running_mean[:], layer.running_var[:]
    return layer


def with_own_counter(layer):
    """The layer, with a counter of its own."""
    layer.num_batches_tracked = layer.num_batches_tracked.copy()
    return layer


TWINS = {
    "arrays": copy.copy,
    "views": lambda layer: with_views(copy.copy(layer)),
    "own counters": lambda layer: with_own_counter(copy.copy(layer)),
}


@tracking
@each("twin_of", TWINS.values())
@each("passed", ["first", "second", "both"])
def test_twins_are_recalibrated_by_all_that_they_see(rng, make, shape, passed, twin_of):
    first, alone, x = make(), make(), some(rng, shape, mean=5.0)
    first(some(rng, shape))
    second = twin_of(first)
    with fastbn.recalibrate(*{"first": [first], "second": [second]}.get(passed, [first, second])):
        first(x)
        with untouched(first, second):
            second(x + 10)
    with fastbn.recalibrate(alone):
        alone(x)
        alone(x + 10)
    assert_same_statistics(first, alone)
    assert_same_statistics(second, alone)
    assert np.shares_memory(second.running_mean, first.running_mean)


@tracking
@each("loads", [False, True])
def test_a_twin_made_inside_recalibrate_is_recorded_too(rng, make, shape, loads):
    first, alone, x = make(), make(), some(rng, shape)
    state = make()
    state(x)
    with fastbn.recalibrate(first):
        if loads:  # a lazy layer has arrays before its first forward, then
            first.load_state_dict(state.state_dict())
        else:
            first(x)
        copy.copy(first)(x + 10)
        if loads:
            first(x)
    with fastbn.recalibrate(alone):
        for batch in (x + 10, x) if loads else (x, x + 10):
            alone(batch)
    assert_same_statistics(first, alone)


def test_two_blocks_for_one_array_are_refused(rng):
    first = fastbn.BatchNorm1d(3)
    second = copy.copy(first)
    with fastbn.recalibrate(first):
        first(some(rng, (6, 3)))
        with pytest.raises(RuntimeError, match="already"), fastbn.recalibrate(second):
            pass


LAZY = {name: kind for name, kind in KINDS.items() if "lazy" in name}


@pytest.mark.parametrize(("make", "shape"), LAZY.values(), ids=LAZY)
@each("momentum", [0.1, None])
@each("copied", [copy.copy, *DEEP])
def test_a_copy_of_a_lazy_layer_shares_nothing_with_it(rng, make, shape, momentum, copied):
    first = make(momentum=momentum, dtype=np.float64)
    second, alone = copied(first), make(momentum=momentum, dtype=np.float64)
    x = some(rng, shape, np.float64)
    alone(x)
    for layer in (first, second):
        layer(x)
        assert_same_statistics(layer, alone)
    for name in LAYER_ARRAYS[:5]:
        assert not np.shares_memory(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)
def test_a_copy_of_an_initialized_layer_shares_its_arrays_but_new_gradients(rng, make, shape):
    first, x = make(), some(rng, shape)
    first(x)
    second = copy.copy(first)
    for name in LAYER_ARRAYS[:5]:
        assert getattr(first, name) is getattr(second, name)
    with pytest.raises(RuntimeError, match="needs a forward"):
        second.backward(x)
    first.backward(x)
    assert second.weight_grad is None
    third = copy.copy(first)
    first(x)
    first.backward(x)
    assert third.weight_grad is first.weight_grad  # It was there, and is added to in place.


def saved_array(layer, x, **arguments):
    """A reference to an input that a layer keeps alive."""
    layer(x, **arguments)
    return weakref.ref(x)


USES = {
    "plain": ({}, {}),
    "mask": ({}, {"mask": np.arange(6).reshape(6, *[1] * 3) < 5}),
    "residual": ({}, {"residual": np.ones(SHAPES["2d"], np.float32)}),
    "activation": ({"activation": "relu"}, {}),
    "both": ({"activation": "relu6"}, {"residual": np.ones(SHAPES["2d"], np.float32)}),
}
PLANE = {name: make for name, (make, shape) in KINDS.items() if shape == SHAPES["2d"]}
planes = pytest.mark.parametrize("make", PLANE.values(), ids=PLANE)
TRACKED = {name: make for name, make in PLANE.items() if name in TRACKING}
tracked_planes = pytest.mark.parametrize("make", TRACKED.values(), ids=TRACKED)
uses = each("options, arguments", USES)


@planes
@uses
def test_release_lets_go_of_the_batch(rng, make, options, arguments):
    layer = make(**options)
    saved = saved_array(layer, some(rng, SHAPES["2d"]), **arguments)
    assert saved() is not None
    assert layer.release() is layer
    assert saved() is None
    with pytest.raises(RuntimeError, match="since release"):
        layer.backward(some(rng, SHAPES["2d"]))


@tracked_planes
@uses
@each("fails", [False, True])
def test_recalibrate_lets_go_of_the_last_batches(rng, make, options, arguments, fails):
    layer, twin, idle, other = make(**options), None, make(**options), make(**options)
    before = saved_array(idle, some(rng, SHAPES["2d"]), **arguments)
    with contextlib.suppress(KeyError, RuntimeError), fastbn.recalibrate(layer, idle):
        saved = [before, saved_array(layer, some(rng, SHAPES["2d"]), **arguments)]
        twin = copy.copy(layer)
        saved.append(saved_array(twin, some(rng, SHAPES["2d"]), **arguments))
        of_other = saved_array(other, some(rng, SHAPES["2d"]), **arguments)
        if fails:
            raise KeyError
    assert [reference() for reference in saved] == [None] * 3
    assert of_other() is not None


@tracked_planes
def test_a_twin_that_is_gone_keeps_no_batch_alive(rng, make):
    layer = make()
    with fastbn.recalibrate(layer):
        layer(some(rng, SHAPES["2d"]))
        saved = saved_array(copy.copy(layer), some(rng, SHAPES["2d"]))
        assert saved() is None


class Ranks(OneRank):
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
