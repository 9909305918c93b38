"""Live comparison with torch, where it can be imported."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import reference
import support
from support import same_bits, some, tensor, torch_step

import fastbn

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")
of_tensors = pytest.importorskip("fastbn.torch.functional")

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
DTYPES = list(TOLERANCE)
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
LAYERS = {
    "BatchNorm1d (N, C)": ("BatchNorm1d", (6, 3)),
    "BatchNorm1d (N, C, L)": ("BatchNorm1d", (2, 3, 7)),
    "BatchNorm2d": ("BatchNorm2d", (2, 3, 6, 6)),
    "BatchNorm3d": ("BatchNorm3d", (2, 3, 2, 3, 4)),
}


def pair(name, *args, dtype="float32", seed=0, **kwargs):
    """The same layer of both libraries, with the same random parameters and buffers."""
    theirs = getattr(torch.nn, name)(*args, dtype=getattr(torch, dtype), **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if key == "num_batches_tracked":
                continue
            value.copy_(torch.randn(value.shape, generator=generator))
            if key == "running_var":
                value.abs_().add_(0.1)
    ours = getattr(fastbn, name)(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_agree(ours, theirs, relative):
    for key in KEYS:
        mine, other = getattr(ours, key), getattr(theirs, key)
        assert (mine is None) == (other is None)
        if mine is not None:
            support.assert_close(mine, other.detach().numpy(), relative)
    for key in ("weight", "bias"):
        mine, parameter = getattr(ours, f"{key}_grad"), getattr(theirs, key)
        if mine is not None:
            support.assert_close(mine, parameter.grad.numpy(), relative)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("affine", "tracking", "momentum"),
    list(itertools.product([True, False], [True, False], [None, 0.1, 1.0])),
)
@pytest.mark.parametrize(("name", "shape"), LAYERS.values(), ids=LAYERS)
def test_training_agrees_over_several_steps(rng, name, shape, affine, tracking, momentum, dtype):
    kwargs = {"momentum": momentum, "affine": affine, "track_running_stats": tracking}
    ours, theirs = pair(name, shape[1], dtype=dtype, **kwargs)
    for _ in range(3):
        x, dy = some(rng, shape, dtype), some(rng, shape, dtype, mean=0)
        y, dx = torch_step(theirs, x, dy)
        support.assert_close(ours(x), y, TOLERANCE[dtype])
        support.assert_close(ours.backward(dy), dx, TOLERANCE[dtype])
        assert_agree(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("affine", "tracking", "momentum"),
    list(itertools.product([True, False], [True, False], [None, 0.1, 1.0])),
)
@pytest.mark.parametrize(("name", "shape"), LAYERS.values(), ids=LAYERS)
def test_eval_agrees(rng, name, shape, affine, tracking, momentum, dtype):
    kwargs = {"momentum": momentum, "affine": affine, "track_running_stats": tracking}
    ours, theirs = pair(name, shape[1], dtype=dtype, **kwargs)
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype, mean=0)
    y, dx = torch_step(theirs.eval(), x, dy)
    support.assert_close(ours.eval()(x), y, TOLERANCE[dtype])
    if tracking:
        # torch differentiates its eval forward; here that is what a frozen layer does.
        ours.train().freeze()
        support.assert_close(ours(x), y, TOLERANCE[dtype])
        support.assert_close(ours.backward(dy), dx, TOLERANCE[dtype])
    assert_agree(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "args",
    [(3,), (3, 1e-3, None), (3, 1e-3, 0.8), (3, 1e-3, 0.8, False), (3, 1e-3, 0.8, True, False)],
    ids=str,
)
def test_the_constructor_calls_of_torchs_own_tests(rng, args, dtype):
    ours, theirs = pair("BatchNorm2d", *args, dtype=dtype)
    x, dy = some(rng, (2, 3, 6, 6), dtype), some(rng, (2, 3, 6, 6), dtype, mean=0)
    y, dx = torch_step(theirs, x, dy)
    support.assert_close(ours(x), y, TOLERANCE[dtype])
    support.assert_close(ours.backward(dy), dx, TOLERANCE[dtype])
    assert_agree(ours, theirs, TOLERANCE[dtype])


def test_an_empty_batch_gives_torchs_empty_results():
    ours, theirs = pair("BatchNorm2d", 5, 1e-3, 0.3, False)
    x = np.empty((0, 5, 2, 2), np.float32)
    y, dx = torch_step(theirs, x, x)
    assert same_bits(ours(x), y)
    assert same_bits(ours.backward(x), dx)
    for key in ("running_mean", "running_var"):
        assert same_bits(getattr(ours, key), getattr(theirs, key).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1)], ids=str)
def test_channels_last_agrees_with_torchs_nchw(rng, shape, dtype):
    ours, theirs = pair("BatchNorm2d", shape[1], dtype=dtype)
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype, mean=0)
    y, dx = torch_step(theirs, x, dy)
    relative = TOLERANCE[dtype]
    support.assert_close(ours(support.channels_last(x)), y, relative)
    support.assert_close(ours.backward(support.channels_last(dy)), dx, relative)
    assert_agree(ours, theirs, relative)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_training_agrees(rng, dtype):
    ours, theirs = pair("BatchNorm2d", 3, dtype=dtype)
    x, dy = some(rng, (2, 3, 6, 6), dtype), some(rng, (2, 3, 6, 6), dtype, mean=0)
    y, dx = torch_step(theirs, x, dy)
    support.assert_close(ours(x, out=x), y, TOLERANCE[dtype])
    support.assert_close(ours.backward(dy, out=dy), dx, 1e-4 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [[np.inf], [-np.inf], [np.nan], [np.inf, -np.inf]], ids=str)
@pytest.mark.parametrize("sample", [0, 7, 39], ids="sample {}".format)
@pytest.mark.parametrize("shape", [(40, 3, 60, 60), (1000, 3)], ids=str)
def test_what_an_infinity_does_to_the_statistics_agrees(rng, shape, sample, values, dtype):
    ours, theirs = pair("BatchNorm2d" if len(shape) == 4 else "BatchNorm1d", 3, dtype=dtype)
    x = some(rng, shape, dtype)
    for i, value in enumerate(values):
        x[sample - i, 1] = value
    y = theirs(tensor(x)).detach().numpy()
    support.assert_close(ours(x)[:, ::2], y[:, ::2], TOLERANCE[dtype])
    assert np.isnan(ours(x)[:, 1]).all()
    assert np.isnan(y[:, 1]).all()
    for name in ("running_mean", "running_var"):
        assert np.array_equal(getattr(ours, name)[1], getattr(theirs, name)[1], equal_nan=True)


def test_momentum_none_agrees_after_a_reset(rng):
    ours, theirs = pair("BatchNorm2d", 3, momentum=None)
    for _ in range(2):
        for _ in range(3):
            x = some(rng, (2, 3, 6, 6))
            ours(x)
            theirs(tensor(x))
        assert_agree(ours, theirs, 1e-5)
        ours.reset_running_stats()
        theirs.reset_running_stats()


def test_tracking_turned_off_later_agrees(rng):
    ours, theirs = pair("BatchNorm2d", 3)
    ours.track_running_stats = theirs.track_running_stats = False
    x = some(rng, (2, 3, 6, 6))
    for _ in range(2):
        support.assert_close(ours(x), theirs(tensor(x)).detach().numpy(), 1e-5)
        assert_agree(ours, theirs, 0)
        ours.eval()
        theirs.eval()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
def test_batch_norm_agrees_with_torchs_function(rng, training, parameters):
    x = some(rng, (2, 3, 6, 6))
    arrays = [some(rng, 3), np.abs(some(rng, 3)) + 0.1]
    arrays += [some(rng, 3), some(rng, 3)] if parameters else [None, None]
    tensors = [None if a is None else tensor(a.copy()) for a in arrays]
    theirs = torch.nn.functional.batch_norm(tensor(x), *tensors, training, 0.3, 1e-3)
    ours = fastbn.functional.batch_norm(x, *arrays, training, 0.3, 1e-3)
    support.assert_close(ours, theirs.numpy(), 1e-5)
    for mine, other in zip(arrays[:2], tensors[:2], strict=True):
        support.assert_close(mine, other.numpy(), 1e-5)


@pytest.mark.parametrize("by_input", [True, False])
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 3, 5, 2), (1, 3, 5, 2, 3)], ids=str)
def test_instance_norm_agrees(rng, shape, parameters, by_input):
    x = some(rng, shape)
    arrays = [some(rng, 3), np.abs(some(rng, 3)) + 0.1]
    arrays += [some(rng, 3), some(rng, 3)] if parameters else [None, None]
    tensors = [None if a is None else tensor(a.copy()) for a in arrays]
    theirs = torch.nn.functional.instance_norm(tensor(x), *tensors, by_input, 0.3, 1e-3)
    ours = fastbn.functional.instance_norm(x, *arrays, by_input, 0.3, 1e-3)
    support.assert_close(ours, theirs.numpy(), 1e-5)
    for mine, other in zip(arrays[:2], tensors[:2], strict=True):
        support.assert_close(mine, other.numpy(), 1e-5)


def same_names(ours, theirs, but=()):
    """The pairs of what is public in both modules under one name."""
    names = [name for name in ours.__all__ if name not in but and hasattr(theirs, name)]
    return {name: (getattr(ours, name), getattr(theirs, name)) for name in names}


# torch's SyncBatchNorm takes a process_group in the midst of them, ours a communicator by name.
NOT_ALIKE = "functional", "SyncBatchNorm"
NAMESAKES = same_names(fastbn, torch.nn, NOT_ALIKE)
NAMESAKES |= same_names(fastbn.functional, torch.nn.functional)
NAMESAKES["of tensors"] = of_tensors.batch_norm, torch.nn.functional.batch_norm


@pytest.mark.parametrize(("ours", "theirs"), NAMESAKES.values(), ids=NAMESAKES)
def test_layers_and_functions_take_torchs_arguments_and_more_by_name(ours, theirs):
    mine, others = (
        [p.replace(annotation=p.empty) for p in inspect.signature(f).parameters.values()]
        for f in (ours, theirs)
    )
    assert mine[: len(others)] == others
    assert {p.kind for p in mine[len(others) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_the_same_inputs_are_refused_with_the_same_message(rng):
    ours, theirs = pair("BatchNorm2d", 3)
    x = some(rng, (1, 3, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value") as expected:
        theirs(tensor(x))
    with pytest.raises(ValueError, match="Expected more than 1 value") as actual:
        ours(x)
    assert str(actual.value).split(" size")[0] == str(expected.value).split(" size")[0]


@pytest.mark.parametrize("family", ["BatchNorm", "InstanceNorm"])
@pytest.mark.parametrize("axes", ["1d", "2d", "3d"])
@pytest.mark.parametrize(
    "args", [(), (1e-3, None), (0.5, 0.8, False), (1e-5, 0.1, True, False)], ids=str
)
def test_repr_agrees(family, axes, args):
    name = f"{family}{axes}"
    assert repr(getattr(fastbn, name)(7, *args)) == repr(getattr(torch.nn, name)(7, *args))
    lazy = f"Lazy{name}"
    assert repr(getattr(fastbn, lazy)(*args)) == repr(getattr(torch.nn, lazy)(*args))


@pytest.mark.parametrize("name", ["LazyBatchNorm2d", "LazyInstanceNorm2d"])
def test_a_lazy_layer_agrees(rng, name):
    ours, theirs = getattr(fastbn, name)(), getattr(torch.nn, name)()
    x, dy = some(rng, (16, 3, 6, 7)), some(rng, (16, 3, 6, 7), mean=0)
    y, dx = torch_step(theirs, x, dy)
    support.assert_close(ours(x), y, 1e-5)
    support.assert_close(ours.backward(dy), dx, 1e-5)
    assert_agree(ours, theirs, 1e-5)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_state_dicts_have_the_same_keys_dtypes_and_shapes(kwargs):
    ours = fastbn.BatchNorm2d(3, **kwargs).state_dict()
    theirs = torch.nn.BatchNorm2d(3, **kwargs).state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert same_bits(ours[key], value.numpy())


def trained(rng, **kwargs):
    layer = torch.nn.BatchNorm2d(3, **kwargs)
    for _ in range(3):
        x, dy = some(rng, (2, 3, 6, 6)), some(rng, (2, 3, 6, 6))
        torch_step(layer, x, dy)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.01 * parameter.grad
    return layer


def test_a_lazy_layer_takes_the_sample_that_torch_refuses(rng):
    x = some(rng, (3, 6, 7))
    with pytest.raises(ValueError, match=r"num_features \(6\), but got: 3"):
        torch.nn.LazyInstanceNorm2d()(tensor(x))
    theirs = torch.nn.InstanceNorm2d(3)(tensor(x))
    support.assert_close(fastbn.LazyInstanceNorm2d()(x), theirs.numpy(), 1e-5)


def test_a_torch_state_dict_makes_a_lazy_layer_of_instances(rng):
    theirs = torch.nn.LazyInstanceNorm2d()
    theirs(tensor(some(rng, (2, 3, 6, 6))))
    ours = fastbn.LazyInstanceNorm2d()
    ours.load_state_dict(theirs.state_dict())
    x = some(rng, (2, 3, 6, 6))
    support.assert_close(ours.eval()(x), theirs.eval()(tensor(x)).detach().numpy(), 1e-5)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_torch_state_dict_loads_and_gives_torchs_output(rng, lazy):
    theirs = trained(rng).eval()
    ours = fastbn.LazyBatchNorm2d() if lazy else fastbn.BatchNorm2d(3)
    ours.load_state_dict(theirs.state_dict())
    x = some(rng, (2, 3, 6, 6))
    support.assert_close(ours.eval()(x), theirs(tensor(x)).detach().numpy(), 1e-5)


def test_a_state_dict_loads_into_torch(rng):
    ours = fastbn.BatchNorm2d(3)
    ours.weight[:], ours.bias[:] = support.parameters(3)
    ours(some(rng, (2, 3, 6, 6)))
    theirs = torch.nn.BatchNorm2d(3).eval()
    theirs.load_state_dict({key: torch.from_numpy(a) for key, a in ours.state_dict().items()})
    x = some(rng, (2, 3, 6, 6))
    support.assert_close(ours.eval()(x), theirs(tensor(x)).detach().numpy(), 1e-5)


def test_a_network_of_torch_loads_layer_by_layer_by_prefix(rng):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), trained(rng), torch.nn.ReLU())
    ours = fastbn.BatchNorm2d(3)
    ours.load_state_dict(network.state_dict(), prefix="1.")
    assert_agree(ours, network[1], 0)


def test_parameters_load_though_they_require_gradients(rng):
    theirs = trained(rng)
    state = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    ours = fastbn.BatchNorm2d(3)
    ours.load_state_dict(state)
    assert_agree(ours, theirs, 0)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_bfloat16_and_float16_tensors_load(rng, name):
    theirs = trained(rng)
    half = copy.deepcopy(theirs).to(torch.bfloat16 if name == "bfloat16" else torch.float16)
    ours = fastbn.BatchNorm2d(3, dtype=support.dtype_of(name))
    ours.load_state_dict(half.state_dict())
    for key in KEYS[:4]:
        mine = getattr(ours, key)
        assert mine.dtype == support.dtype_of(name)
        exact = getattr(half, key).detach().float().numpy()
        # float16 numbers may lie between those of bfloat16, never the other way round here.
        assert same_bits(mine, exact.astype(mine.dtype))


def test_a_torch_tensor_is_an_array_like(rng):
    x = some(rng, (2, 3, 6, 6))
    y = fastbn.BatchNorm2d(3)(torch.from_numpy(x))
    assert same_bits(y, fastbn.BatchNorm2d(3)(x))


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
def test_the_reference_agrees_with_torch(rng, shape):
    x, dy = some(rng, shape, np.float64), some(rng, shape, np.float64)
    weight, bias = support.parameters(3, np.float64)
    mean, var = np.linspace(-1, 1, 3), np.linspace(0.5, 2, 3)
    leaves = [tensor(a.copy()).requires_grad_() for a in (x, weight, bias)]
    for training in (True, False):
        running = tensor(mean.copy()), tensor(var.copy())
        y = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], training, 0.3, 1e-3)
        expected = torch.autograd.grad(y, leaves, tensor(dy))
        if training:
            actual_y = reference.forward(x, weight, bias, 1e-3)
            actual = reference.backward(dy, x, weight, 1e-3)
            for a, b in zip(reference.updated(x, mean, var, 0.3), running, strict=True):
                support.assert_close(a, b.numpy(), 1e-13)
        else:
            actual_y = reference.normalize(x, mean, var, weight, bias, 1e-3)
            actual = reference.backward_frozen(dy, x, mean, var, weight, 1e-3)
        for a, b in zip([actual_y, *actual], [y.detach(), *expected], strict=True):
            support.assert_close(a, b.numpy(), 1e-13)


# Where torch's modules do otherwise, as docs/interoperation.md says.


def refuses(kind, call):
    """Tell whether a call raises an error of a kind."""
    try:
        call()
    except kind:
        return True
    return False


@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_counts_an_empty_batch(rng, momentum):
    ours, theirs = pair("BatchNorm2d", 3, momentum=momentum)
    x = some(rng, (2, 3, 6, 6))
    for batch in (x[:0], x):
        ours(batch)
        theirs(tensor(batch))
    assert (ours.num_batches_tracked, theirs.num_batches_tracked) == (1, 2)
    agrees = np.allclose(ours.running_mean, theirs.running_mean, atol=1e-5)
    assert agrees == (momentum is not None)


def test_torch_refuses_an_eps_of_zero_in_training_alone(rng):
    x = some(rng, (2, 3, 6, 6))
    assert refuses(ValueError, lambda: fastbn.BatchNorm2d(3, eps=0))
    theirs = torch.nn.BatchNorm2d(3, eps=0)
    assert refuses(ValueError, lambda: theirs(tensor(x)))
    assert theirs.eval()(tensor(x)).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_torch_moves_statistics_of_instances_without_tracking_and_does_not_use_them(rng, training):
    ours, theirs = pair("InstanceNorm2d", 3, track_running_stats=True)
    before, x = ours.running_mean.copy(), some(rng, (2, 3, 6, 6))
    for layer in (ours.train(training), theirs.train(training)):
        layer.track_running_stats = False
    agrees = np.allclose(ours(x), theirs(tensor(x)), atol=1e-5)
    assert agrees == training
    assert (ours.running_mean == before).all()
    assert not np.allclose(theirs.running_mean, before)


def test_torch_asks_a_strict_load_for_the_counter():
    ours, theirs = pair("BatchNorm2d", 3)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    ours.load_state_dict(state)
    assert refuses(RuntimeError, lambda: theirs.load_state_dict(state))


def test_torch_warns_of_a_wrong_number_of_instance_channels(rng):
    x = some(rng, (2, 3, 6, 6))
    assert refuses(ValueError, lambda: fastbn.InstanceNorm2d(5)(x))
    with pytest.warns(UserWarning, match="num_features"):
        assert torch.nn.InstanceNorm2d(5)(tensor(x)).shape == x.shape


@pytest.mark.parametrize("of_layer", DTYPES)
def test_torch_refuses_parameters_of_another_dtype(rng, of_layer):
    ours, theirs = pair("BatchNorm2d", 3, dtype=of_layer)
    for dtype in (*DTYPES, "float16"):
        x = some(rng, (2, 3, 6, 6), dtype)
        assert ours(x).dtype == dtype
        takes = dtype == of_layer or (dtype, of_layer) == ("float16", "float32")
        assert refuses(RuntimeError, lambda x=x: theirs(tensor(x))) != takes


def test_torch_differentiates_evaluation_and_what_it_has_differentiated(rng):
    ours, theirs = pair("BatchNorm2d", 3)
    x = some(rng, (2, 3, 6, 6))
    for training in (True, False):
        y = ours.train(training)(x)
        their_y = theirs.train(training)(tensor(x).requires_grad_()).sum()
        if training:
            ours.backward(y)
        assert refuses(RuntimeError, lambda y=y: ours.backward(y))
        their_y.backward(retain_graph=True)
        their_y.backward()


PRIMITIVES = {
    "batch_norm_stats": ("input, eps", 2),
    "batch_norm_elemt": ("input, weight, bias, mean, invstd, eps", 1),
    "batch_norm_backward_reduce": (
        "grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g",
        4,
    ),
    "batch_norm_backward_elemt": (
        "grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count",
        1,
    ),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_torchs_primitives_of_these_names_take_other_arguments(name):
    assert hasattr(torch, name)
    schema = getattr(torch.ops.aten, name).default._schema
    arguments = ", ".join(argument.name for argument in schema.arguments)
    assert (arguments, len(schema.returns)) == PRIMITIVES[name]
    assert arguments != ", ".join(inspect.signature(getattr(fastbn.functional, name)).parameters)
