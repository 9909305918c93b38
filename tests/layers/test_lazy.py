"""The lazy layers: uninitialized until the first input or a state tells the channels."""

import copy
import os
import pickle
import threading

import numpy as np
import pytest
from support import IN_CHILD, output_of, parameters, refused, same_bits, some

import fastbn

LAYERS = [
    (fastbn.LazyBatchNorm1d, fastbn.BatchNorm1d, (4, 3)),
    (fastbn.LazyBatchNorm1d, fastbn.BatchNorm1d, (4, 3, 5)),
    (fastbn.LazyBatchNorm2d, fastbn.BatchNorm2d, (16, 3, 6, 7)),
    (fastbn.LazyBatchNorm3d, fastbn.BatchNorm3d, (4, 3, 5, 2, 3)),
    (fastbn.LazyInstanceNorm1d, fastbn.InstanceNorm1d, (4, 3, 5)),
    (fastbn.LazyInstanceNorm1d, fastbn.InstanceNorm1d, (3, 5)),
    (fastbn.LazyInstanceNorm2d, fastbn.InstanceNorm2d, (4, 3, 6, 7)),
    (fastbn.LazyInstanceNorm2d, fastbn.InstanceNorm2d, (3, 6, 7)),
    (fastbn.LazyInstanceNorm3d, fastbn.InstanceNorm3d, (4, 3, 5, 2, 3)),
    (fastbn.LazyInstanceNorm3d, fastbn.InstanceNorm3d, (3, 5, 2, 3)),
]
FAMILIES = {
    "batch": (fastbn.LazyBatchNorm2d, fastbn.BatchNorm2d),
    "instance": (fastbn.LazyInstanceNorm2d, fastbn.InstanceNorm2d),
}

families = pytest.mark.parametrize(("lazy", "becomes"), FAMILIES.values(), ids=FAMILIES)


def full(becomes, **kwargs):
    """A layer of three channels with every array."""
    return becomes(3, affine=True, track_running_stats=True, **kwargs)


@pytest.mark.parametrize(("lazy", "becomes", "shape"), LAYERS)
def test_the_first_input_makes_it_a_layer_of_as_many_channels(rng, lazy, becomes, shape):
    x = some(rng, shape)
    bn, other = lazy(), full(becomes)
    assert bn.num_features == 0
    assert bn.has_uninitialized_params()
    y = bn(x)
    assert type(bn) is becomes
    assert bn.num_features == 3
    assert same_bits(y, other(x))
    for name, array in other.state_dict().items():
        assert same_bits(getattr(bn, name), array)


@families
def test_the_arguments_hold_for_the_layer_it_becomes(rng, lazy, becomes):
    bn = lazy(1e-3, None, True, True, "cpu", np.float64, bias=False)
    bn(some(rng, (16, 3, 6, 7)))
    expected = full(becomes, eps=1e-3, momentum=None, bias=False, dtype=np.float64)
    assert repr(bn) == repr(expected)
    assert bn.weight.dtype == bn.running_mean.dtype == np.float64
    assert bn.bias is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
@families
def test_a_layer_gets_the_arrays_that_it_was_asked_for(rng, lazy, becomes, affine, tracking):
    bn = lazy(affine=affine, track_running_stats=tracking)
    bn(some(rng, (16, 3, 6, 7)))
    assert type(bn) is becomes
    assert (bn.weight is not None) is (bn.bias is not None) is affine
    assert (bn.running_mean is not None) is (bn.running_var is not None) is tracking


@pytest.mark.parametrize(
    ("lazy", "expected"),
    [
        (
            fastbn.LazyBatchNorm2d(),
            "LazyBatchNorm2d(0, eps=1e-05, momentum=0.1, affine=True, bias=True, "
            "track_running_stats=True)",
        ),
        (
            fastbn.LazyBatchNorm1d(1e-3, None, False),
            "LazyBatchNorm1d(0, eps=0.001, momentum=None, affine=False, bias=False, "
            "track_running_stats=True)",
        ),
        (
            fastbn.LazyInstanceNorm3d(),
            "LazyInstanceNorm3d(0, eps=1e-05, momentum=0.1, affine=True, bias=True, "
            "track_running_stats=True)",
        ),
    ],
    ids=["2d", "1d", "instance"],
)
def test_repr_is_that_of_torch(lazy, expected):
    assert repr(lazy) == expected


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@families
def test_reading_an_uninitialized_array_says_that_the_first_input_decides(lazy, becomes, name):
    bn = lazy()
    with pytest.raises(AttributeError, match="first input"):
        getattr(bn, name)
    assert not hasattr(bn, name)


@families
def test_the_counter_can_be_read_before_the_first_input(lazy, becomes):
    assert same_bits(lazy().num_batches_tracked, np.array(0, np.int64))


@families
@pytest.mark.parametrize("channels", [1, 64, np.int64(64), np.array(64)])
def test_a_number_of_channels_in_the_place_of_eps_is_refused(lazy, becomes, channels):
    with refused(TypeError, f"{lazy.__name__} takes no num_features", "eps", str(channels)):
        lazy(channels)
    assert becomes(3, channels).eps == lazy(float(channels)).eps


@families
def test_an_eval_forward_initializes_too(rng, lazy, becomes):
    x = some(rng, (16, 3, 6, 7))
    bn = lazy().eval()
    assert same_bits(bn(x), full(becomes).eval()(x))
    assert type(bn) is becomes
    assert bn.training is False


@families
def test_an_empty_batch_initializes_too(lazy, becomes):
    bn = lazy()
    bn(np.empty((0, 3, 6, 7), np.float32))
    assert type(bn) is becomes
    assert bn.num_features == 3
    assert bn.num_batches_tracked == 0


@families
def test_a_layer_frozen_before_its_first_input_is_frozen_after_it(rng, lazy, becomes):
    x = some(rng, (16, 3, 6, 7))
    bn = lazy()
    assert bn.freeze() is bn
    assert same_bits(bn(x), full(becomes).eval()(x))
    assert bn.num_batches_tracked == 0
    assert bn.backward(x).shape == x.shape


@pytest.mark.parametrize(("lazy", "becomes", "shape"), LAYERS)
def test_the_first_input_may_be_normalized_in_place(rng, lazy, becomes, shape):
    x = some(rng, shape)
    expected = full(becomes)(x)
    assert lazy()(x, out=x) is x
    assert same_bits(x, expected)


def test_resetting_the_parameters_of_an_uninitialized_layer_does_nothing():
    bn = fastbn.LazyBatchNorm2d()
    bn.reset_parameters()
    assert bn.has_uninitialized_params()


@pytest.mark.parametrize(
    ("x", "exception"),
    [
        (np.ones((2, 3), np.float32), ValueError),
        (np.ones((2, 3, 4, 4), np.int64), TypeError),
        (np.ones((1, 3, 1, 1), np.float32), ValueError),
    ],
    ids=["rank", "dtype", "single value"],
)
@families
def test_a_refused_input_leaves_the_layer_uninitialized(lazy, becomes, x, exception):
    bn = lazy()
    with pytest.raises(exception):
        bn(x)
    assert type(bn) is lazy
    assert bn.has_uninitialized_params()
    bn(np.ones((2, 5, 4, 4), np.float32))
    assert bn.num_features == 5


@families
def test_a_backward_before_the_first_input_is_refused(rng, lazy, becomes):
    with pytest.raises(RuntimeError, match="forward"):
        lazy().backward(some(rng, (16, 3, 6, 7)))


@families
def test_an_uninitialized_layer_has_no_state_dict(lazy, becomes):
    with pytest.raises(RuntimeError, match="first input"):
        lazy().state_dict()


@families
def test_freezing_needs_running_statistics(lazy, becomes):
    with pytest.raises(RuntimeError, match="running"):
        lazy(track_running_stats=False).freeze()


def full_state(rng, becomes=fastbn.BatchNorm2d):
    bn = full(becomes)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, (16, 3, 6, 7)))
    return bn.state_dict()


@families
def test_loading_a_full_state_initializes(rng, lazy, becomes):
    state = full_state(rng, becomes)
    bn = lazy()
    missing, unexpected = bn.load_state_dict(state)
    assert not missing
    assert not unexpected
    assert type(bn) is becomes
    assert bn.num_features == 3
    for name, array in state.items():
        assert same_bits(getattr(bn, name), array)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@families
def test_any_entry_tells_the_channels(lazy, becomes, name):
    bn = lazy()
    missing, _ = bn.load_state_dict({name: np.full(5, 2.0)}, strict=False)
    assert type(bn) is becomes
    assert bn.num_features == 5
    assert name not in missing
    for other, start in [("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)]:
        assert (getattr(bn, other) == (2 if other == name else start)).all()


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_disagrees_about_the_channels_leaves_the_layer_uninitialized(rng, strict):
    state = full_state(rng) | {"bias": np.zeros(4, np.float32)}
    bn = fastbn.LazyBatchNorm2d()
    with refused(RuntimeError, "bias"):
        bn.load_state_dict(state, strict=strict)
    assert bn.has_uninitialized_params()


@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_a_misshapen_entry_tells_no_channels(shape):
    bn = fastbn.LazyBatchNorm2d()
    with refused(RuntimeError, "weight", shape):
        bn.load_state_dict({"weight": np.ones(shape)}, strict=False)
    assert bn.has_uninitialized_params()


def test_a_counter_alone_is_loaded_and_tells_no_channels():
    bn = fastbn.LazyBatchNorm2d()
    missing, _ = bn.load_state_dict({"num_batches_tracked": np.array(4)}, strict=False)
    assert list(missing) == ["weight", "bias", "running_mean", "running_var"]
    assert bn.has_uninitialized_params()
    assert bn.num_batches_tracked == 4


@families
def test_a_refused_state_leaves_the_layer_uninitialized(rng, lazy, becomes):
    state = full_state(rng, becomes)
    del state["running_var"]
    bn = lazy()
    with refused(RuntimeError, "running_var"):
        bn.load_state_dict(state)
    assert bn.has_uninitialized_params()
    assert bn.num_batches_tracked == 0


def while_arrays_are_made(monkeypatch, call):
    """Make a call in another thread while the first array of a layer is made; return its results.

    The arrays are not there until the call has returned, or waits for them.
    """
    results, threads = [], []

    def meanwhile():
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    def full(*args, make=np.full):
        if not threads:
            threads.append(threading.Thread(target=meanwhile))
            threads[0].start()
            threads[0].join(0.2)  # It returns in microseconds, unless it waits.
        return make(*args)

    monkeypatch.setattr(np, "full", full)
    return results, threads


@families
def test_threads_share_a_layer_in_evaluation_mode_from_its_first_input_on(
    rng, monkeypatch, lazy, becomes
):
    x = some(rng, (16, 3, 6, 7))
    expected = full(becomes).eval()(x)
    bn = lazy().eval()
    results, threads = while_arrays_are_made(monkeypatch, lambda: bn(x))
    assert same_bits(bn(x), expected)
    threads[0].join()
    assert same_bits(results[0], expected)
    assert type(bn) is becomes


class InputOfTwoThreads:
    """An array, before the conversion of which ends another thread calls a function."""

    def __init__(self, x, function):
        self.x, self.function = x, function

    def __array__(self, dtype=None, copy=None):
        thread = threading.Thread(target=self.function)
        thread.start()
        thread.join()
        return self.x


@families
def test_a_thread_may_find_that_a_layer_is_lazy_no_more(rng, lazy, becomes):
    x = some(rng, (16, 3, 6, 7))
    bn, expected = lazy().eval(), full(becomes).eval()(x)
    assert same_bits(bn(InputOfTwoThreads(x, lambda: bn(x))), expected)
    bn, state = lazy().eval(), full(becomes).state_dict()
    weight = InputOfTwoThreads(state["weight"], lambda: bn(x))
    bn.load_state_dict({**state, "weight": weight})
    assert same_bits(bn(x), expected)


@families
def test_a_thread_whose_first_input_is_refused_leaves_the_layer_to_the_others(
    rng, monkeypatch, lazy, becomes
):
    x = some(rng, (16, 3, 6, 7))
    bn = lazy().eval()
    results, threads = while_arrays_are_made(monkeypatch, lambda: bn(x))
    with refused(ValueError, "out"):
        bn(some(rng, (16, 5, 6, 7)), out=x)
    threads[0].join()
    assert same_bits(results[0], full(becomes).eval()(x))
    assert bn.num_features == 3


@pytest.mark.serial
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_lazy_layer_works_in_a_child_that_was_forked_while_a_thread_made_its_arrays(tmp_path):
    code = """
import threading
import numpy as np
import fastbn

x, bn = np.ones((2, 3, 4, 5), np.float32), fastbn.LazyBatchNorm2d().eval()
make, begun, forked = np.full, threading.Event(), threading.Event()

def full(*args):
    begun.set()
    forked.wait()
    return make(*args)

np.full = full
thread = threading.Thread(target=bn, args=[x])
thread.start()
begun.wait()
np.full = make
print(in_child(lambda: bn(x).shape == x.shape and type(bn) is fastbn.BatchNorm2d))
forked.set()
thread.join()
print(type(bn) is fastbn.BatchNorm2d)
"""
    assert output_of(IN_CHILD + code, tmp_path) == "True\nTrue\n"


DUPLICATES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@families
def test_an_uninitialized_layer_can_be_duplicated(rng, lazy, becomes, duplicate):
    bn = lazy(momentum=0.3, dtype=np.float64)
    twin = duplicate(bn)
    assert type(twin) is lazy
    assert twin.has_uninitialized_params()
    x = some(rng, (16, 3, 6, 7))
    assert same_bits(twin(x), full(becomes)(x))
    assert repr(twin) == repr(full(becomes, momentum=0.3, dtype=np.float64))
    assert bn.has_uninitialized_params()


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@families
def test_an_initialized_layer_can_be_duplicated(rng, lazy, becomes, duplicate):
    bn = lazy()
    bn(some(rng, (16, 3, 6, 7)))
    twin = duplicate(bn)
    assert type(twin) is becomes
    for name, array in bn.state_dict().items():
        assert same_bits(getattr(twin, name), array)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_first_input_may_be_a_sample_with_as_many_rows_as_channels(rng, rank, frozen):
    x = some(rng, (3, 3, 5, 4)[: rank + 1])
    lazy = getattr(fastbn, f"LazyInstanceNorm{rank}d")(track_running_stats=frozen)
    norm = getattr(fastbn, f"InstanceNorm{rank}d")(3, affine=True, track_running_stats=frozen)
    if frozen:
        lazy.freeze(), norm.freeze()
    assert same_bits(lazy(x), norm(x))
    assert same_bits(lazy.backward(x), norm.backward(x))
