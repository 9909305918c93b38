"""The lazy layers: uninitialized until the first input or a state tells the channels."""

import copy
import pickle

import numpy as np
import pytest
from support import parameters, refused, same_bits, some

import fastbn

LAYERS = [
    (fastbn.LazyBatchNorm1d, fastbn.BatchNorm1d, (4, 3)),
    (fastbn.LazyBatchNorm1d, fastbn.BatchNorm1d, (4, 3, 5)),
    (fastbn.LazyBatchNorm2d, fastbn.BatchNorm2d, (16, 3, 6, 7)),
    (fastbn.LazyBatchNorm3d, fastbn.BatchNorm3d, (4, 3, 5, 2, 3)),
]


@pytest.mark.parametrize(("lazy", "becomes", "shape"), LAYERS)
def test_the_first_input_makes_it_a_layer_of_as_many_channels(rng, lazy, becomes, shape):
    x = some(rng, shape)
    bn, other = lazy(), becomes(3)
    assert bn.has_uninitialized_params()
    y = bn(x)
    assert type(bn) is becomes
    assert bn.num_features == 3
    assert same_bits(y, other(x))
    for name, array in other.state_dict().items():
        assert same_bits(getattr(bn, name), array)


def test_the_arguments_hold_for_the_layer_it_becomes(rng):
    bn = fastbn.LazyBatchNorm2d(1e-3, None, True, True, None, np.float64, bias=False)
    bn(some(rng, (16, 3, 6, 7)))
    assert repr(bn) == repr(fastbn.BatchNorm2d(3, 1e-3, None, bias=False, dtype=np.float64))
    assert bn.weight.dtype == bn.running_mean.dtype == np.float64
    assert bn.bias is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_a_layer_gets_the_arrays_that_it_was_asked_for(rng, affine, tracking):
    bn = fastbn.LazyBatchNorm2d(affine=affine, track_running_stats=tracking)
    bn(some(rng, (16, 3, 6, 7)))
    assert type(bn) is fastbn.BatchNorm2d
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
    ],
    ids=["2d", "1d"],
)
def test_repr_is_that_of_torch(lazy, expected):
    assert repr(lazy) == expected


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_reading_an_uninitialized_array_says_that_the_first_input_decides(name):
    bn = fastbn.LazyBatchNorm2d()
    with pytest.raises(AttributeError, match="first input"):
        getattr(bn, name)
    assert not hasattr(bn, name)


def test_the_counter_can_be_read_before_the_first_input():
    assert same_bits(fastbn.LazyBatchNorm2d().num_batches_tracked, np.array(0, np.int64))


def test_an_eval_forward_initializes_too(rng):
    x = some(rng, (16, 3, 6, 7))
    bn = fastbn.LazyBatchNorm2d().eval()
    assert same_bits(bn(x), fastbn.BatchNorm2d(3).eval()(x))
    assert type(bn) is fastbn.BatchNorm2d
    assert bn.training is False


def test_an_empty_batch_initializes_too():
    bn = fastbn.LazyBatchNorm2d()
    bn(np.empty((0, 3, 6, 7), np.float32))
    assert type(bn) is fastbn.BatchNorm2d
    assert bn.num_features == 3
    assert bn.num_batches_tracked == 0


def test_a_layer_frozen_before_its_first_input_is_frozen_after_it(rng):
    x = some(rng, (16, 3, 6, 7))
    bn = fastbn.LazyBatchNorm2d()
    assert bn.freeze() is bn
    assert same_bits(bn(x), fastbn.BatchNorm2d(3).eval()(x))
    assert bn.num_batches_tracked == 0
    assert bn.backward(x).shape == x.shape


def test_the_first_input_may_be_normalized_in_place(rng):
    x = some(rng, (16, 3, 6, 7))
    expected = fastbn.BatchNorm2d(3)(x)
    assert fastbn.LazyBatchNorm2d()(x, out=x) is x
    assert same_bits(x, expected)


def test_resetting_the_parameters_of_an_uninitialized_layer_does_nothing():
    bn = fastbn.LazyBatchNorm2d()
    bn.reset_parameters()
    assert bn.has_uninitialized_params()


@pytest.mark.parametrize(
    ("x", "exception"),
    [
        (np.ones((2, 3, 4), np.float32), ValueError),
        (np.ones((2, 3, 4, 4), np.int64), TypeError),
        (np.ones((1, 3, 1, 1), np.float32), ValueError),
    ],
    ids=["rank", "dtype", "single value"],
)
def test_a_refused_input_leaves_the_layer_uninitialized(x, exception):
    bn = fastbn.LazyBatchNorm2d()
    with pytest.raises(exception):
        bn(x)
    assert type(bn) is fastbn.LazyBatchNorm2d
    assert bn.has_uninitialized_params()
    bn(np.ones((2, 5, 4, 4), np.float32))
    assert bn.num_features == 5


def test_a_backward_before_the_first_input_is_refused(rng):
    with pytest.raises(RuntimeError):
        fastbn.LazyBatchNorm2d().backward(some(rng, (16, 3, 6, 7)))


def test_an_uninitialized_layer_has_no_state_dict():
    with pytest.raises(RuntimeError, match="first input"):
        fastbn.LazyBatchNorm2d().state_dict()


def test_freezing_needs_running_statistics():
    with pytest.raises(RuntimeError, match="running"):
        fastbn.LazyBatchNorm2d(track_running_stats=False).freeze()


def full_state(rng):
    bn = fastbn.BatchNorm2d(3)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, (16, 3, 6, 7)))
    return bn.state_dict()


def test_loading_a_full_state_initializes(rng):
    state = full_state(rng)
    bn = fastbn.LazyBatchNorm2d()
    missing, unexpected = bn.load_state_dict(state)
    assert not missing
    assert not unexpected
    assert type(bn) is fastbn.BatchNorm2d
    assert bn.num_features == 3
    for name, array in state.items():
        assert same_bits(getattr(bn, name), array)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_any_entry_tells_the_channels(name):
    bn = fastbn.LazyBatchNorm2d()
    missing, _ = bn.load_state_dict({name: np.full(5, 2.0)}, strict=False)
    assert type(bn) is fastbn.BatchNorm2d
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


def test_a_refused_state_leaves_the_layer_uninitialized(rng):
    state = full_state(rng)
    del state["running_var"]
    bn = fastbn.LazyBatchNorm2d()
    with refused(RuntimeError, "running_var"):
        bn.load_state_dict(state)
    assert bn.has_uninitialized_params()
    assert bn.num_batches_tracked == 0


DUPLICATES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_an_uninitialized_layer_can_be_duplicated(rng, duplicate):
    bn = fastbn.LazyBatchNorm2d(momentum=0.3, dtype=np.float64)
    twin = duplicate(bn)
    assert type(twin) is fastbn.LazyBatchNorm2d
    assert twin.has_uninitialized_params()
    x = some(rng, (16, 3, 6, 7))
    assert same_bits(twin(x), fastbn.BatchNorm2d(3)(x))
    assert repr(twin) == repr(fastbn.BatchNorm2d(3, momentum=0.3, dtype=np.float64))
    assert bn.has_uninitialized_params()


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_an_initialized_layer_can_be_duplicated(rng, duplicate):
    bn = fastbn.LazyBatchNorm2d()
    bn(some(rng, (16, 3, 6, 7)))
    twin = duplicate(bn)
    assert type(twin) is fastbn.BatchNorm2d
    for name, array in bn.state_dict().items():
        assert same_bits(getattr(twin, name), array)
