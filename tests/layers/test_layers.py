"""The layers: attributes, modes, momentum, freezing, gradients, copies."""

import copy
import pickle
import weakref

import numpy as np
import pytest
import reference
import support
from cases import each
from internals import alone_on_its_rank
from kinds import TRACKING, OneRank
from support import parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.wheel

LAYERS = [
    (fastbn.BatchNorm1d, (4, 3)),
    (fastbn.BatchNorm1d, (4, 3, 5)),
    (fastbn.BatchNorm2d, (4, 3, 5, 2)),
    (fastbn.BatchNorm3d, (4, 3, 5, 2, 3)),
]

every_kind = pytest.mark.parametrize(
    "kind",
    [
        f"{lazy}{family}Norm{rank}d"
        for lazy in ("", "Lazy")
        for family in ("Batch", "Instance")
        for rank in (1, 2, 3)
    ],
)


def test_attributes_and_their_defaults():
    bn = fastbn.BatchNorm2d(3)
    assert (bn.num_features, bn.eps, bn.momentum) == (3, 1e-5, 0.1)
    assert bn.affine is bn.track_running_stats is bn.training is True
    for name, value in [("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)]:
        assert same_bits(getattr(bn, name), np.full(3, value, np.float32))
    assert same_bits(bn.num_batches_tracked, np.array(0, np.int64))
    assert isinstance(bn.num_batches_tracked, np.ndarray)
    assert bn.weight_grad is bn.bias_grad is None


def test_the_arguments_of_the_constructor():
    bn = fastbn.BatchNorm2d(3, 1e-3, 0.8, True, True, None, np.float64, bias=False)
    assert (bn.num_features, bn.eps, bn.momentum) == (3, 1e-3, 0.8)
    assert bn.weight.dtype == bn.running_mean.dtype == bn.running_var.dtype == np.float64
    assert bn.bias is None
    with pytest.raises(TypeError):
        fastbn.BatchNorm2d(3, 1e-3, 0.8, True, True, None, np.float64, False)


def test_every_dtype_serves_for_the_arrays(dtype):
    bn = fastbn.BatchNorm2d(3, dtype=dtype)
    for array in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        assert array.dtype == dtype
    assert bn.num_batches_tracked.dtype == np.int64


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_cpu_is_a_device(device):
    assert fastbn.BatchNorm2d(3, device=device).weight is not None


def test_a_layer_that_is_not_affine_has_no_parameters():
    bn = fastbn.BatchNorm2d(3, affine=False)
    assert bn.weight is bn.bias is None
    assert bn.running_mean is not None


def test_a_layer_that_does_not_track_has_no_buffers():
    bn = fastbn.BatchNorm2d(3, track_running_stats=False)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None
    assert bn.weight is not None


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            fastbn.BatchNorm2d(3),
            "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, "
            "track_running_stats=True)",
        ),
        (
            fastbn.BatchNorm1d(5, 1e-3, None, False),
            "BatchNorm1d(5, eps=0.001, momentum=None, affine=False, bias=False, "
            "track_running_stats=True)",
        ),
        (
            fastbn.BatchNorm3d(1, track_running_stats=False, bias=False),
            "BatchNorm3d(1, eps=1e-05, momentum=0.1, affine=True, bias=False, "
            "track_running_stats=False)",
        ),
    ],
    ids=["2d", "1d", "3d"],
)
def test_repr_is_that_of_torch(layer, expected):
    assert repr(layer) == expected
    assert expected == f"{type(layer).__name__}({layer.extra_repr()})"


def test_repr_shows_another_dtype_than_the_default(dtype):
    shown = repr(fastbn.BatchNorm2d(3, dtype=dtype))
    assert shown.endswith(f", dtype={dtype})") == (dtype != np.float32)
    assert ("dtype" in shown) == (dtype != np.float32)


def test_methods_that_set_something_return_the_layer():
    bn = fastbn.BatchNorm2d(3)
    assert bn.train() is bn.eval() is bn.freeze() is bn.unfreeze() is bn.zero_grad() is bn


def test_train_and_eval_set_training():
    bn = fastbn.BatchNorm2d(3)
    assert bn.eval().training is False
    assert bn.train().training is True
    assert bn.train(False).training is False
    assert bn.train(True).training is True


def test_freezing_leaves_training_alone():
    bn = fastbn.BatchNorm2d(3)
    assert bn.freeze().training is True
    assert bn.eval().training is False
    assert bn.unfreeze().training is False


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_training_step(rng, layer, shape):
    x = some(rng, shape)
    bn = layer(3)
    bn.weight[:], bn.bias[:] = parameters(3)
    exact = reference.forward(x, bn.weight, bn.bias)
    mean, var = reference.updated(x, np.zeros(3), np.ones(3), 0.1)
    support.assert_within(bn(x), exact, reference.forward_bound(exact, x.dtype, bn.weight, bn.bias))
    support.assert_close(bn.running_mean, mean, 3e-7)
    support.assert_close(bn.running_var, var, 3e-7)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_an_eval_step_changes_nothing(rng, layer, shape):
    bn = layer(3)
    bn(some(rng, shape))
    bn.eval()
    x = some(rng, shape)
    exact = reference.normalize(x, bn.running_mean, bn.running_var)
    with support.untouched(bn):
        y = bn(x)
    support.assert_close(y, exact, 1e-6)


def test_running_statistics_move_by_momentum_towards_the_batch(rng):
    bn = fastbn.BatchNorm2d(3, momentum=0.3, dtype=np.float64)
    mean, var = np.zeros(3), np.ones(3)
    for step in range(1, 4):
        x = some(rng, (4, 3, 5, 2), np.float64)
        mean, var = reference.updated(x, mean, var, 0.3)
        bn(x)
        support.assert_close(bn.running_mean, mean, 1e-13)
        support.assert_close(bn.running_var, var, 1e-13)
        assert bn.num_batches_tracked == step


def test_a_momentum_of_one_keeps_the_last_batch(rng):
    bn = fastbn.BatchNorm2d(3, momentum=1.0, dtype=np.float64)
    for _ in range(2):
        x = some(rng, (4, 3, 5, 2), np.float64)
        bn(x)
    support.assert_close(bn.running_mean, x.mean((0, 2, 3)), 1e-13)
    support.assert_close(bn.running_var, x.var((0, 2, 3), ddof=1), 1e-13)


def test_a_momentum_of_zero_keeps_the_running_statistics(rng):
    bn = fastbn.BatchNorm2d(3, momentum=0.0)
    bn(some(rng, (4, 3, 5, 2)))
    assert (bn.running_mean == 0).all()
    assert (bn.running_var == 1).all()
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("resets", [0, 1])
def test_momentum_none_averages_all_batches_since_the_reset(rng, resets):
    bn = fastbn.BatchNorm2d(3, momentum=None, dtype=np.float64)
    for _ in range(resets):
        bn(some(rng, (4, 3, 5, 2), np.float64))
        bn.reset_running_stats()
        assert bn.num_batches_tracked == 0
    batches = [some(rng, (4, 3, 5, 2), np.float64) for _ in range(4)]
    for x in batches:
        bn(x)
    support.assert_close(bn.running_mean, np.mean([x.mean((0, 2, 3)) for x in batches], 0), 1e-13)
    unbiased = [x.var((0, 2, 3), ddof=1) for x in batches]
    support.assert_close(bn.running_var, np.mean(unbiased, 0), 1e-13)


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_running_variance_of_two_values(unbiased):
    x = np.array([[1.0], [3.0]])
    mean, var = np.zeros(1), np.ones(1)
    F.batch_norm(x, mean, var, training=True, momentum=0.1, unbiased=unbiased)
    for layer in (
        fastbn.BatchNorm1d(1, dtype=np.float64, unbiased=unbiased),
        fastbn.LazyBatchNorm1d(dtype=np.float64, unbiased=unbiased),
    ):
        layer(x)
        assert layer.running_var == var
    assert np.isclose(var, 1.1 if unbiased else 1.0, rtol=1e-15)


@every_kind
def test_what_torch_lacks_is_shown_where_it_is_not_the_default(kind):
    layer = getattr(fastbn, kind)
    channels = () if "Lazy" in kind else (3,)
    assert "unbiased" not in repr(layer(*channels))
    shown = repr(layer(*channels, dtype=np.float64, unbiased=False))
    assert shown.endswith(", unbiased=False, dtype=float64)")


@every_kind
def test_unbiased_survives_copies(rng, kind):
    channels = () if "Lazy" in kind else (3,)
    layer = getattr(fastbn, kind)(*channels, track_running_stats=True, unbiased=False)
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.unbiased is False


def test_without_a_counter_momentum_none_means_a_factor_of_zero(rng):
    bn = fastbn.BatchNorm2d(3, momentum=None)
    bn.num_batches_tracked = None
    bn(some(rng, (4, 3, 5, 2)))
    assert (bn.running_mean == 0).all()
    assert (bn.running_var == 1).all()
    assert bn.num_batches_tracked is None


def test_without_a_counter_a_number_as_momentum_works_as_ever(rng):
    x = some(rng, (4, 3, 5, 2))
    bn, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    bn.num_batches_tracked = None
    bn(x)
    other(x)
    assert same_bits(bn.running_mean, other.running_mean)
    assert same_bits(bn.running_var, other.running_var)


def test_reset_running_stats_leaves_the_parameters_alone(rng):
    bn = fastbn.BatchNorm2d(3)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, (4, 3, 5, 2)))
    bn.reset_running_stats()
    assert (bn.running_mean == 0).all()
    assert (bn.running_var == 1).all()
    assert bn.num_batches_tracked == 0
    assert same_bits(bn.weight, parameters(3)[0])


def test_reset_parameters_resets_everything(rng):
    bn = fastbn.BatchNorm2d(3)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, (4, 3, 5, 2)))
    bn.reset_parameters()
    for name, value in [("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)]:
        assert (getattr(bn, name) == value).all()
    assert bn.num_batches_tracked == 0


def test_resetting_a_layer_without_arrays_does_nothing():
    bn = fastbn.BatchNorm2d(3, affine=False, track_running_stats=False)
    bn.reset_running_stats()
    bn.reset_parameters()
    assert bn.weight is bn.running_mean is None


def test_without_tracking_eval_uses_the_statistics_of_the_batch(rng):
    x = some(rng, (4, 3, 5, 2))
    bn = fastbn.BatchNorm2d(3, track_running_stats=False)
    assert same_bits(bn(x), bn.eval()(x))


def test_buffers_set_to_none_later_count_as_not_tracked(rng):
    x = some(rng, (4, 3, 5, 2))
    bn = fastbn.BatchNorm2d(3)
    bn.running_mean = bn.running_var = None
    expected = fastbn.BatchNorm2d(3)(x)
    assert same_bits(bn(x), expected)
    assert same_bits(bn.eval()(x), expected)


def test_tracking_turned_off_later_leaves_the_buffers_alone_and_eval_uses_them(rng):
    x = some(rng, (4, 3, 5, 2))
    bn = fastbn.BatchNorm2d(3)
    bn(x)
    bn.track_running_stats = False
    expected = fastbn.BatchNorm2d(3)(x)
    with support.untouched(bn):
        assert same_bits(bn(x), expected)
        exact = reference.normalize(x, bn.running_mean, bn.running_var)
        support.assert_close(bn.eval()(x), exact, 1e-6)


def test_a_frozen_layer_uses_its_running_statistics_in_training(rng):
    bn = fastbn.BatchNorm2d(3)
    bn(some(rng, (4, 3, 5, 2)))
    x = some(rng, (4, 3, 5, 2))
    expected = bn.eval()(x)
    bn.train().freeze()
    with support.untouched(bn):
        assert same_bits(bn(x), expected)


def test_freezing_survives_train_and_ends_with_unfreeze(rng):
    x = some(rng, (4, 3, 5, 2))
    bn = fastbn.BatchNorm2d(3).freeze().eval().train()
    with support.untouched(bn):
        bn(x)
    bn.unfreeze()(x)
    assert bn.num_batches_tracked == 1
    assert (bn.running_mean != 0).all()


def test_a_frozen_layer_takes_a_single_value_per_channel(rng):
    x = some(rng, (1, 3, 1, 1))
    bn = fastbn.BatchNorm2d(3).freeze()
    support.assert_close(bn(x), reference.normalize(x, np.zeros(3), np.ones(3)), 1e-6)


def test_eval_takes_a_single_value_per_channel(rng):
    x = some(rng, (1, 3, 1, 1))
    bn = fastbn.BatchNorm2d(3).eval()
    support.assert_close(bn(x), reference.normalize(x, np.zeros(3), np.ones(3)), 1e-6)


@pytest.mark.parametrize("parameter_dtype", support.DTYPES)
def test_gradients_add_up_in_the_dtype_of_their_parameters(rng, parameter_dtype):
    parameter_dtype = support.dtype_of(parameter_dtype)
    bn = fastbn.BatchNorm2d(3, dtype=parameter_dtype)
    total_weight, total_bias = np.zeros(3, parameter_dtype), np.zeros(3, parameter_dtype)
    for _ in range(3):
        x, dy = some(rng, (4, 3, 5, 2)), some(rng, (4, 3, 5, 2))
        _, dweight, dbias = reference.backward(dy, x)
        total_weight, total_bias = total_weight + dweight, total_bias + dbias
        bn(x)
        bn.backward(dy)
    assert bn.weight_grad.dtype == bn.bias_grad.dtype == parameter_dtype
    for actual, exact in [(bn.weight_grad, total_weight), (bn.bias_grad, total_bias)]:
        support.assert_within(actual, exact, 4 * reference.ulp(np.abs(exact) + 40, parameter_dtype))


def test_a_gradient_has_the_dtype_of_its_own_parameter(rng):
    bn = fastbn.BatchNorm2d(3)
    bn.weight = np.ones(3)
    bn(some(rng, (4, 3, 5, 2)))
    bn.backward(some(rng, (4, 3, 5, 2)))
    assert bn.weight_grad.dtype == np.float64
    assert bn.bias_grad.dtype == np.float32


def test_zero_grad_sets_the_gradients_to_none(rng):
    bn = fastbn.BatchNorm2d(3)
    bn(some(rng, (4, 3, 5, 2)))
    bn.backward(some(rng, (4, 3, 5, 2)))
    assert bn.weight_grad is not None
    bn.zero_grad()
    assert bn.weight_grad is bn.bias_grad is None


def test_parameters_that_are_not_there_get_no_gradient(rng):
    x = some(rng, (4, 3, 5, 2))
    bn = fastbn.BatchNorm2d(3, bias=False)
    bn(x)
    bn.backward(x)
    assert bn.weight_grad is not None
    assert bn.bias_grad is None
    bn = fastbn.BatchNorm2d(3, affine=False)
    bn(x)
    bn.backward(x)
    assert bn.weight_grad is bn.bias_grad is None


def test_parameters_and_buffers_may_be_views_of_one_larger_array(rng):
    x = some(rng, (4, 3, 5, 2))
    bn, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    buffer = np.zeros((3, 8), np.float32)
    bn.weight, bn.bias, bn.running_mean, bn.running_var = buffer.T[1:8:2]
    bn.weight[:] = bn.running_var[:] = 1
    assert same_bits(bn(x), other(x))
    assert same_bits(buffer[:, 5], other.running_mean)
    assert same_bits(buffer[:, 7], other.running_var)
    assert (buffer[:, ::2] == 0).all()


def test_a_forward_keeps_its_input_until_the_backward(rng):
    x = some(rng, (4, 3, 5, 2))
    alive = weakref.ref(x)
    bn = fastbn.BatchNorm2d(3)
    bn(x)
    del x
    assert alive() is not None
    bn.backward(np.ones((4, 3, 5, 2), np.float32))
    assert alive() is None


def test_an_eval_forward_drops_what_was_remembered(rng):
    x = some(rng, (4, 3, 5, 2))
    alive = weakref.ref(x)
    bn = fastbn.BatchNorm2d(3)
    bn(x)
    del x
    bn.eval()(np.ones((4, 3, 5, 2), np.float32))
    assert alive() is None


def test_changing_the_mode_keeps_what_was_remembered(rng):
    x, dy = some(rng, (4, 3, 5, 2)), some(rng, (4, 3, 5, 2))
    bn, other = fastbn.BatchNorm2d(3), fastbn.BatchNorm2d(3)
    bn(x)
    other(x)
    assert same_bits(bn.eval().backward(dy), other.backward(dy))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_training_batch_touches_nothing(rng, dtype, shape, momentum):
    bn = fastbn.BatchNorm2d(3, momentum=momentum)
    bn(some(rng, (4, 3, 5, 2)))
    x = np.empty(shape, dtype)
    with support.untouched(bn):
        y = bn(x)
    assert same_bits(y, x)
    assert same_bits(bn.backward(x), x)
    assert same_bits(bn.weight_grad, np.zeros(3, np.float32))
    assert same_bits(bn.bias_grad, np.zeros(3, np.float32))


def test_an_empty_batch_adds_nothing_to_the_gradients(rng):
    bn = fastbn.BatchNorm2d(3)
    bn(some(rng, (4, 3, 5, 2)))
    bn.backward(some(rng, (4, 3, 5, 2)))
    x = np.empty((0, 3, 5, 2), np.float32)
    with support.untouched(bn):
        bn(x)
        bn.backward(x)


def test_an_empty_batch_in_place(rng):
    x = np.empty((0, 3, 5, 2), np.float32)
    bn = fastbn.BatchNorm2d(3)
    assert bn(x, out=x) is x
    assert bn.backward(x, out=x) is x


@pytest.mark.parametrize("mode", ["eval", "freeze"])
def test_an_empty_batch_in_eval_and_frozen(mode):
    x = np.empty((0, 3, 5, 2), np.float32)
    bn = fastbn.BatchNorm2d(3)
    getattr(bn, mode)()
    with support.untouched(bn):
        assert same_bits(bn(x), x)


@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
@each("shape", [(2, 0, 3, 3), (90, 0, 8, 8), (95, 0, 2, 64)])
def test_no_channels(mode, shape):
    x = np.empty(shape, np.float32)
    bn = fastbn.BatchNorm2d(0)
    getattr(bn, mode)()
    assert same_bits(bn(x), x)
    assert bn.running_mean.shape == (0,)
    if mode != "eval":
        assert same_bits(bn.backward(x), x)
        assert bn.weight_grad.shape == (0,)


def trained(rng):
    bn = fastbn.BatchNorm2d(3, 1e-3, 0.3)
    bn.weight[:], bn.bias[:] = parameters(3)
    bn(some(rng, (4, 3, 5, 2)))
    return bn


DUPLICATES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_duplicate_is_the_same_layer(rng, duplicate):
    bn = trained(rng)
    twin = duplicate(bn)
    assert type(twin) is fastbn.BatchNorm2d
    assert repr(twin) == repr(bn)
    for name, array in bn.state_dict().items():
        assert same_bits(getattr(twin, name), array)
    assert isinstance(twin.num_batches_tracked, np.ndarray)


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_a_duplicate_keeps_the_mode(rng, duplicate, mode):
    x = some(rng, (4, 3, 5, 2))
    bn = trained(rng)
    getattr(bn, mode)()
    twin = duplicate(bn)
    assert twin.training is bn.training
    assert same_bits(twin(x), bn(x))


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_deep_duplicate_is_independent(rng, name):
    bn = trained(rng)
    twin = DUPLICATES[name](bn)
    with support.untouched(bn):
        twin(some(rng, (4, 3, 5, 2)))
        twin.weight[:] = 7


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_a_bfloat16_layer_can_be_pickled(rng, dtype):
    bn = fastbn.BatchNorm2d(3, dtype=support.dtype_of(dtype))
    bn(some(rng, (4, 3, 5, 2)))
    twin = pickle.loads(pickle.dumps(bn))
    assert same_bits(twin.running_mean, bn.running_mean)


@pytest.mark.parametrize("name", fastbn.layers.__all__)
def test_the_input_may_be_passed_by_torchs_name(rng, name):
    layer = getattr(fastbn, name)
    arguments = () if name.startswith("Lazy") else (3, 3) if name == "GroupNorm" else (3,)
    layer = layer(*arguments)
    x = some(rng, (4, 3, *([5] * int(name[-2]) if name.endswith("d") else [5])))
    y = layer(input=x)
    assert same_bits(layer.forward(input=x), y)


@pytest.mark.parametrize(
    ("prepare", "mend"),
    [
        (lambda bn: bn.eval(), "freeze()"),
        (lambda bn: bn.freeze().eval(), "call train()"),
        (lambda bn: fastbn.BatchNorm2d(3, track_running_stats=False).eval(), "call train()"),
        (lambda bn: fastbn.InstanceNorm2d(3).eval(), "call train()"),
    ],
    ids=["eval", "frozen", "no running statistics", "instance"],
)
@pytest.mark.parametrize("quick", [False, True])
def test_after_evaluation_the_error_says_what_makes_a_backward(rng, prepare, mend, quick):
    bn, x = prepare(fastbn.BatchNorm2d(3)), some(rng, (4, 3, 5, 5))
    bn(x if quick else x.astype(x.dtype.newbyteorder()))
    with pytest.raises(RuntimeError, match="in evaluation mode") as caught:
        bn.backward(x)
    assert mend in str(caught.value)


@pytest.mark.parametrize("of_instances", [False, True])
@pytest.mark.parametrize("overlap", ["the same", "one value"])
def test_running_statistics_that_share_memory_are_not_moved(rng, of_instances, overlap):
    make = fastbn.InstanceNorm2d if of_instances else fastbn.BatchNorm2d
    layer, x = make(3, track_running_stats=True), some(rng, (4, 3, 5, 6))
    memory = np.ones(5, np.float32)
    layer.running_mean = memory[:3]
    layer.running_var = memory[:3] if overlap == "the same" else memory[2:]
    for way in (lambda: layer(x), layer.reset_running_stats, layer.reset_parameters):
        with support.refused(ValueError, "running_mean", "running_var", intact=(memory, x)):
            way()
    layer.eval()
    assert np.isfinite(layer(x)).all()
    layer.train()
    memory = np.ones(6, np.float32)
    layer.running_mean, layer.running_var = memory[::2], memory[1::2]
    layer(x)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "layer", [fastbn.BatchNorm2d(3), fastbn.InstanceNorm2d(3, affine=True), fastbn.GroupNorm(1, 3)]
)
def test_a_parameter_that_is_a_list_has_no_gradient(rng, layer, name):
    layer, x = copy.deepcopy(layer), some(rng, (4, 3, 2, 5))
    dy = some(rng, x.shape)
    expected = layer(x)
    setattr(layer, name, getattr(layer, name).tolist())
    assert same_bits(layer(x), expected)
    mend = rf"{name} must be an ndarray, got list.*np\.asarray"
    with support.untouched(dy), pytest.raises(TypeError, match=mend):
        layer.backward(dy)
    setattr(layer, name, np.asarray(getattr(layer, name), np.float32))
    layer.backward(dy)
    assert getattr(layer, f"{name}_grad").dtype == np.float32


def test_a_counter_that_has_become_a_number_is_refused_with_the_mend(rng):
    layer, x = fastbn.BatchNorm2d(3), some(rng, (4, 3, 5, 6))
    layer.num_batches_tracked = layer.num_batches_tracked + 1
    with support.refused(TypeError, "num_batches_tracked", "+= 1", intact=(layer.running_mean,)):
        layer(x)
    layer.num_batches_tracked = np.array(1)
    layer(x)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize(("make", "shape"), TRACKING.values(), ids=TRACKING)
@each("momentum", [0.1, None])
@each("in_place", [False, True])
@each("masked", [False, True])
@each("is_first", [False, True])  # of a lazy layer, it makes the arrays
def test_a_forward_that_tracks_nothing_for_a_while_leaves_the_statistics_alone(
    rng, make, shape, momentum, in_place, masked, is_first, monkeypatch
):
    alone_on_its_rank(monkeypatch, OneRank())
    layer, other, x, dy = make(momentum=momentum), make(), *some(rng, (2, *shape))
    mask = support.some_mask(rng, shape) if masked else None
    before = {"running_mean": np.zeros(3, "f"), "running_var": np.ones(3, "f")}
    before["num_batches_tracked"] = np.array(0)
    if not is_first:
        layer(7 * x)
        before = layer.state_dict()
    layer.track_running_stats = False
    y, z = x.copy(), x.copy()
    results = [
        each(a, out=a if in_place else None, mask=mask) for each, a in ((layer, y), (other, z))
    ]
    assert same_bits(*results)
    layer.track_running_stats = True
    assert same_bits(layer.backward(dy), other.backward(dy))
    for name, array in before.items():
        assert same_bits(getattr(layer, name), array)
    layer(x)
    if momentum is not None or layer.num_batches_tracked:
        assert not same_bits(layer.running_mean, before["running_mean"])


@pytest.mark.parametrize("layer_class", [fastbn.BatchNorm2d, fastbn.InstanceNorm2d])
@pytest.mark.parametrize("number", [np.int64(1), 1, 1.0])
@pytest.mark.parametrize("way", ["reset_running_stats", "reset_parameters", "load_state_dict"])
def test_no_way_writes_beside_a_counter_that_is_a_number(rng, layer_class, number, way):
    layer = layer_class(3, affine=True, track_running_stats=True)
    state = layer.state_dict()
    layer(some(rng, (4, 3, 5, 6)))
    layer.weight[:] = 2.0
    layer.num_batches_tracked = number
    arrays = layer.weight, layer.running_mean, layer.running_var
    with support.refused(TypeError, "num_batches_tracked", "+= 1", "np.array(1)", intact=arrays):
        getattr(layer, way)(*[state] * (way == "load_state_dict"))


def test_lists_of_different_lengths_as_a_mask_are_refused_by_name(rng):
    x = some(rng, (4, 3, 5, 6))
    with support.refused(ValueError, "mask must be", "different lengths", intact=(x,)):
        fastbn.BatchNorm2d(3)(x, mask=[[True], [True, False]])


def test_a_mask_of_one_column_of_samples_is_told_to_reshape(rng):
    x = some(rng, (4, 3, 5, 6))
    with support.refused(ValueError, "mask.reshape(-1, 1, 1, 1)", intact=(x,)):
        fastbn.BatchNorm2d(3)(x, mask=np.ones((4, 1), bool))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 2, 2)])
def test_an_empty_batch_does_not_count(shape):
    layer = fastbn.BatchNorm2d(shape[1])
    assert layer(np.zeros(shape, np.float32)).shape == shape
    assert layer.num_batches_tracked == 0


def test_freeze_needs_both_running_statistics():
    bn = fastbn.BatchNorm1d(2)
    bn.running_var = None
    with pytest.raises(RuntimeError, match="needs running statistics"):
        bn.freeze()


@pytest.mark.parametrize("mask", [None, np.ones((2, 1), bool)], ids=["plain", "masked"])
def test_a_frozen_layer_in_evaluation_is_not_told_to_freeze(mask):
    bn = fastbn.BatchNorm1d(2).freeze().eval()
    bn(np.eye(2), mask=mask)
    with pytest.raises(RuntimeError, match=r"call train\(\) before it$"):
        bn.backward(np.eye(2))


def test_evaluation_without_statistics_has_no_ghost_batches():
    x, mask = np.array([[1.0], [2.0], [5.0], [9.0]]), np.ones((4, 1), bool)
    whole, ghosts = (
        fastbn.BatchNorm1d(1, track_running_stats=False, ghost_batch_size=size).eval()
        for size in (None, 2)
    )
    assert same_bits(whole(x), ghosts(x))
    assert same_bits(whole(x, mask=mask), ghosts(x, mask=mask))
