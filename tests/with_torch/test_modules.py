"""The modules of fastbn.torch against torch's, and as parts of torch's programs."""

import copy
import doctest
import importlib
import io
import itertools
import pickle
import re
import sys
import warnings
import weakref
from pathlib import Path

import pytest
from internals import CHECKS, PACKAGE, core
from support import beside_another_runtime, output_of

import fastbn

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")
prune = pytest.importorskip("torch.nn.utils.prune")
parametrize = pytest.importorskip("torch.nn.utils.parametrize")
accelerated = pytest.importorskip("fastbn.torch")
functional = pytest.importorskip("fastbn.torch.functional")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    common = pytest.importorskip("torch.testing._internal.common_modules")

NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
INFOS = {
    info.module_cls.__name__: info for info in common.module_db if info.module_cls.__name__ in NAMES
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)
ACTIVATIONS = [None, "relu", "relu6", "leaky_relu"]
FORMATS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[..., :1].expand_as(x),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def module_inputs(name, training=True, dtype=torch.float64):
    """torch's own cases of a module: arguments of the constructor, and an input."""
    make = INFOS[name].module_inputs_func
    cases = make(INFOS[name], "cpu", dtype, True, training)
    return [(c.constructor_input, c.forward_input.args[0], c.desc) for c in cases]


CASES = [
    pytest.param(
        name, i, training, id=f"{name}-{desc or 'plain'}-{'train' if training else 'eval'}"
    )
    for name in NAMES
    for training in (True, False)
    for i, (_, _, desc) in enumerate(module_inputs(name))
]


def randomized(module):
    """A module with random parameters and statistics, which are not those of a new one."""
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    return module


def pair(name, *args, **kwargs):
    """torch's module and fastbn's, in the same state."""
    theirs = randomized(getattr(torch.nn, name)(*args, **kwargs))
    ours = getattr(accelerated, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(module, x, dy, **kwargs):
    """y, and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x, **kwargs)
    y.backward(dy)
    return y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)


def assert_same_step(ours, theirs, x, dy, tolerance):
    for mine, other in zip(step(ours, x, dy), step(theirs, x, dy), strict=True):
        assert mine.dtype is other.dtype
        assert mine.stride() == other.stride()
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def left_to_torch(module):
    return dict(module.__dict__.get("_left_to_torch", {}))


@pytest.mark.parametrize("name", ["functional", "modules"])
def test_docstring_examples_give_what_they_say(name):
    outcome = doctest.testmod(importlib.import_module(f"fastbn.torch.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_torch_is_imported_nowhere_else():
    files = PACKAGE.rglob("*.py")
    imports = re.compile(r"^\s*(import|from) torch\b", re.MULTILINE)
    importing = {f.relative_to(PACKAGE).parts[0] for f in files if imports.search(f.read_text())}
    assert importing == {"torch", "_selfbench"}  # which measures it


# What torch's own tests ask of the modules.


@pytest.mark.parametrize(("name", "i", "training"), CASES)
def test_steps_agree_on_torchs_own_cases(name, i, training):
    arguments, x, _ = module_inputs(name, training)[i]
    ours, theirs = pair(name, *arguments.args, **arguments.kwargs, dtype=x.dtype)
    for _ in range(3):
        dy = torch.randn_like(x)
        assert_same_step(ours.train(training), theirs.train(training), x, dy, 1e-12)
    without_kernels = not x.numel()
    assert bool(left_to_torch(ours)) == without_kernels


@pytest.mark.parametrize(("name", "i", "training"), CASES)
def test_gradients_and_their_gradients_are_derivatives(name, i, training):
    arguments, x, _ = module_inputs(name, training)[i]
    if not x.numel():
        pytest.skip("torch's own, on an empty batch")
    module = getattr(accelerated, name)(*arguments.args, **arguments.kwargs, dtype=x.dtype)
    randomized(module).train(training)
    assert_gradients(module, x, None, None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_through_an_activation_and_of_a_residual(activation, training):
    module = randomized(accelerated.BatchNorm2d(3, dtype=torch.float64)).train(training)
    x, residual = torch.randn(2, 2, 3, 3, 2, dtype=torch.float64)
    assert_gradients(module, x.requires_grad_(), residual.requires_grad_(), activation)


def fused_steps(training):
    """Outputs, gradients and statistics of each activation, behind a residual and without."""
    dy = torch.randn(4, 3, 5, 6)
    for activation, added in itertools.product(ACTIVATIONS, (True, False)):
        bn = randomized(accelerated.BatchNormAct2d(3, activation)).train(training)
        x, residual = torch.randn(2, 4, 3, 5, 6)
        y = bn(x.requires_grad_(), residual.requires_grad_() if added else None)
        y.backward(dy)
        parameters = bn.weight.grad, bn.bias.grad, *bn.buffers()
        yield [y, x.grad, *([residual.grad] if added else []), *parameters]


@pytest.mark.parametrize("training", [True, False])
def test_both_paths_of_a_fused_step_give_the_same_bits(training):
    results = []
    was_on = core.set_quick_path(True)
    try:
        for on in (True, False):
            core.set_quick_path(on)
            torch.manual_seed(1)
            results.append(list(fused_steps(training)))
    finally:
        core.set_quick_path(was_on)
    for quick, checked in zip(*results, strict=True):
        assert all(map(torch.equal, quick, checked))


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_step_takes_the_quick_path(monkeypatch, training):
    def checked(*_, **__):
        raise AssertionError

    monkeypatch.setattr(f"{CHECKS}.as_input", checked)
    monkeypatch.setattr(core, "backward", checked)
    assert all(torch.isfinite(part).all() for step in fused_steps(training) for part in step)


def assert_gradients(module, x, residual, activation):
    leaves = [x, residual, *module.parameters()]

    def forward(x, residual, *_):
        return module(x, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_refuses_is_refused_alike(name):
    make = INFOS[name].module_error_inputs_func
    for case in make(INFOS[name], "cpu", torch.float32, False, True):
        arguments, x = case.module_error_input.constructor_input, None
        module = getattr(accelerated, name)(*arguments.args, **arguments.kwargs)
        x = case.module_error_input.forward_input.args[0]
        with pytest.raises(case.error_type, match=case.error_regex):
            module(x)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 4, 3, 3),
        torch.ones(2, 3, 3),
        torch.ones(1, 3, 1, 1),
        torch.ones(2, 3, 4, 4, dtype=torch.int64),
        torch.ones(2, 3, 4, 4, dtype=torch.float64),
    ],
    ids=["channels", "rank", "one value", "integers", "float64"],
)
def test_errors_are_torchs_and_leave_running_statistics_alone(x):
    ours, theirs = pair("BatchNorm2d", 3)
    messages = []
    for module in (theirs, ours):
        before = module.running_mean.clone()
        with pytest.raises(Exception, match=r".") as raised:
            module(x)
        messages.append((raised.type, str(raised.value)))
        assert torch.equal(module.running_mean, before)
    assert messages[0] == messages[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        *(torch.ones(shape) for shape in [(), (3,), (0, 3), (2, 0), (1, 3), (2, 3, 0), (2, 4)]),
        *(torch.ones(2, 3, dtype=dtype) for dtype in (torch.int32, torch.complex64, torch.bool)),
        torch.ones(2, 3).to_sparse(),
        *(None, 3.0, [1.0]),
    ],
    ids=lambda x: f"{x.shape}-{x.dtype}" if isinstance(x, torch.Tensor) else repr(x),
)
def test_the_function_gives_or_refuses_what_torchs_does(x, training):
    outcomes = []
    for function in (torch.nn.functional.batch_norm, functional.batch_norm):
        running = torch.zeros(3), torch.ones(3)
        try:
            outcomes.append(function(x, *running, training=training).shape)
        except Exception as error:
            outcomes.append((type(error), str(error)))
        assert torch.equal(running[0], torch.zeros(3)) or isinstance(outcomes[-1], torch.Size)
    assert outcomes[0] == outcomes[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({"momentum": m, "training": t} for m in (None, "0.1", 1j) for t in (True, False)),
        *({"eps": eps, "training": True} for eps in (None, 1j)),
        *({"training": training} for training in (1, 0, None)),
    ],
    ids=str,
)
def test_the_function_refuses_the_kinds_of_options_that_torchs_does(options, compiled):
    x, errors = torch.randn(4, 3), []
    for function in (torch.nn.functional.batch_norm, functional.batch_norm):
        running = torch.zeros(3), torch.ones(3)
        torch.compiler.reset()
        call = torch.compile(function, backend="eager") if compiled else function
        with pytest.raises(Exception, match=r".") as raised:
            call(x, *running, **options)
        errors.append((raised.type, None if compiled else str(raised.value)))
        assert torch.equal(running[0], torch.zeros(3))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("options", [{"momentum": 1}, {"momentum": True}, {"eps": 1}], ids=str)
def test_integers_are_numbers(options):
    x, outcomes = torch.randn(4, 3), []
    for function in (torch.nn.functional.batch_norm, functional.batch_norm):
        running = torch.zeros(3), torch.ones(3)
        outcomes.append((function(x, *running, training=True, **options), *running))
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_an_eps_of_zero_is_refused_in_training_alone():
    ours, theirs = pair("BatchNorm2d", 3, eps=0)
    x, dy = torch.randn(2, 2, 3, 4, 4)
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="eps must be positive"):
            module(x)
    assert_same_step(ours.eval(), theirs.eval(), x, dy, 2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_require_gradients_are_torchs(name, training, compiled):
    outcomes, x = [], torch.randn(4, 3, 2, 2)
    for module in pair("BatchNorm2d", 3):
        torch.compiler.reset()
        module.train(training)(x)
        getattr(module, name).requires_grad_()
        run = torch.compile(module, backend="eager") if compiled else module
        with pytest.raises(RuntimeError, match="not differentiable") as raised:
            run(x)
        outcomes.append((str(raised.value).splitlines()[0], module.running_mean.tolist()))
        with torch.no_grad():
            module(x)
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
    assert compiled or outcomes[0][0] == outcomes[1][0]


# Options, dtypes, memory formats.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_agree_with_float64(dtype, memory, mixed, training):
    if mixed and dtype not in (torch.float16, torch.bfloat16):
        pytest.skip("torch mixes only 16 bits with float32")
    ours, theirs = pair("BatchNorm2d", 5, dtype=torch.float32 if mixed else dtype)
    ours.train(training)
    exact = copy.deepcopy(theirs).double().train(training)
    x = FORMATS[memory](torch.randn(4, 5, 6, 3, dtype=torch.float64).to(dtype))
    dy = torch.randn(4, 5, 6, 3, dtype=torch.float64).to(dtype)
    results = step(ours, x, dy), step(exact, x.double(), dy.double())
    for mine, other in zip(*results, strict=True):
        tolerance = TOLERANCE[mine.dtype if mixed else dtype] * max(other.abs().max(), 1)
        torch.testing.assert_close(mine.double(), other, atol=float(tolerance), rtol=0)
    theirs.train(training)
    assert results[0][0].stride() == theirs(x).stride()
    assert ours.running_mean.dtype is theirs.running_mean.dtype
    assert not left_to_torch(ours)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("subset", list(itertools.product([True, False], repeat=4)), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_subset_may_ask_for_gradients(subset, activation, training):
    ours, theirs = pair("BatchNorm2d", 5, dtype=torch.float64)
    ours.train(training), theirs.train(training)
    x, r, dy = torch.randn(3, 4, 5, 3, 3, dtype=torch.float64)[:, :, :, :, :2].contiguous()
    found = []
    for module in (ours, theirs):
        leaves = [x.clone(), r.clone(), module.weight, module.bias]
        for leaf, requires in zip(leaves, subset, strict=True):
            leaf.requires_grad_(requires)
        if module is ours:
            y = ours(leaves[0], activation=activation, residual=leaves[1])
        else:
            act = {None: lambda z: z, "leaky_relu": torch.nn.functional.leaky_relu}
            act |= {"relu": torch.relu, "relu6": torch.nn.functional.relu6}
            y = act[activation](theirs(leaves[0]) + leaves[1])
        assert y.requires_grad == any(subset)
        if any(subset):
            y.backward(dy)
        found.append([y, *(leaf.grad for leaf in leaves)])
    for mine, other in zip(*found, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("residual", [torch.ones(1), torch.ones(3, 5, 1, 1), 2.0], ids=str)
def test_a_residual_that_must_be_broadcast_is_torchs(residual):
    bn = accelerated.BatchNormAct2d(5)
    x = torch.randn(3, 5, 4, 4)
    y = bn(x, torch.as_tensor(residual))
    expected = torch.relu(torch.nn.BatchNorm2d(5)(x) + residual)
    torch.testing.assert_close(y, expected)
    assert any("residual" in reason for reason in left_to_torch(bn))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_normalization_addition_and_activation_in_one(activation, dtype):
    bn = randomized(accelerated.BatchNormAct2d(5, activation, negative_slope=0.2, dtype=dtype))
    exact = copy.deepcopy(bn).double()
    x, r, dy = 3 * torch.randn(3, 4, 5, 3, 3, dtype=torch.float64).to(dtype)
    found = []
    for module, *arrays in ((bn, x, r, dy), (exact, x.double(), r.double(), dy.double())):
        x, r, dy = arrays
        x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
        if module is bn:
            y = bn(x, r)
        else:
            act = torch.nn.functional.leaky_relu, torch.relu, torch.nn.functional.relu6
            act = dict(zip(("leaky_relu", "relu", "relu6"), act, strict=True))[activation]
            z = torch.nn.functional.batch_norm(x, None, None, exact.weight, exact.bias, True)
            y = act(z + r, 0.2) if activation == "leaky_relu" else act(z + r)
        y.backward(dy)
        found.append((y.detach(), x.grad, r.grad, module.weight.grad, module.bias.grad))
    of_elements = slice(None) if dtype.itemsize > 2 else slice(3)
    for mine, other in zip(*(results[of_elements] for results in found), strict=True):
        close = (mine.double() - other).abs() <= 2 * TOLERANCE[dtype] * max(other.abs().max(), 1)
        # In 16 bits, rounding may reach 0 or 6, where the gradient jumps.
        assert close.double().mean() >= (1.0 if dtype.itemsize > 2 else 0.97)
    assert not left_to_torch(bn)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"'relu6'.*'gelu'"):
        accelerated.BatchNormAct2d(5, "gelu")
    with pytest.raises(ValueError, match=r"'relu6'.*'gelu'"):
        functional.batch_norm(torch.ones(2, 3), None, None, training=True, activation="gelu")
    bn = accelerated.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"'relu6'.*'gelu'"):
        bn(torch.ones(2, 3), activation="gelu")
    assert bn.num_batches_tracked == 0


def test_a_negative_slope_is_torchs():
    bn = accelerated.BatchNormAct2d(5, "leaky_relu", -0.5)
    x = torch.randn(3, 5, 2, 2)
    expected = torch.nn.functional.leaky_relu(torch.nn.BatchNorm2d(5)(x), -0.5)
    torch.testing.assert_close(bn(x), expected)
    assert left_to_torch(bn) == {"a negative slope": 1}


def test_repr_and_state_dict_are_torchs():
    ours, theirs = pair("BatchNorm2d", 5, momentum=None)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert "activation='relu6'" in repr(accelerated.BatchNormAct2d(5, "relu6"))


# Where the parameters lie.


MOVES = {
    "to float64": lambda bn: bn.double(),
    "load with assign": lambda bn: bn.load_state_dict(
        {k: v + 1 for k, v in bn.state_dict().items()}, assign=True
    ),
    "load": lambda bn: bn.load_state_dict({k: v + 1 for k, v in bn.state_dict().items()}),
    "data": lambda bn: setattr(bn.weight, "data", bn.weight.data + 1),
    "another parameter": lambda bn: setattr(bn, "weight", torch.nn.Parameter(bn.weight + 1)),
    "shared memory": lambda bn: bn.share_memory(),
    "buffers": lambda bn: setattr(bn, "running_mean", torch.ones(5)),
    "reset": lambda bn: bn.reset_running_stats(),
    "no statistics": lambda bn: setattr(bn, "track_running_stats", False),
    "pruned": lambda bn: prune.l1_unstructured(bn, "weight", 0.4),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_parameters_may_move_between_calls(move):
    ours, theirs = pair("BatchNorm2d", 5)
    for _ in range(2):
        dtype = ours.bias.dtype
        x, dy = torch.randn(2, 4, 5, 3, 3, dtype=dtype)
        assert_same_step(ours, theirs, x, dy, 2e-5)
        assert_same_step(ours.eval(), theirs.eval(), x, dy, 2e-5)
        for module in (ours.train(), theirs.train()):
            move(module)
            module.zero_grad()


def negated(memory):
    """Every other element, from the second one on, with its sign changed by a bit of the tensor."""
    return torch.view_as_complex(memory.view(-1, 2)).conj().imag


# Of one memory, from the same address.
SEEN_ANEW = {
    "strides": (lambda memory: memory[::2], lambda memory: memory[:4]),
    "dtype": (lambda memory: memory[:4], lambda memory: memory.view(torch.bfloat16)[:4]),
    "length": (lambda memory: memory[:4], lambda memory: memory[:3]),
    "rank": (lambda memory: memory[:4], lambda memory: memory[:4].view(2, 2)),
    "sign": (lambda memory: memory[1::2], negated),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("views", SEEN_ANEW.values(), ids=SEEN_ANEW)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_the_same_memory_may_be_seen_in_another_way(name, views, training):
    x, outcomes = torch.randn(2, 4, 3, 3), []
    for module in pair("BatchNorm2d", 4):
        memory = torch.arange(1.0, 9.0)
        for view in (*views, *views):
            getattr(module, name).data = view(memory)
            try:
                outcomes.append((module.train(training)(x).detach(), memory.clone()))
            except Exception as error:
                outcomes.append((type(error), str(error)))
    theirs, ours = outcomes[4:], outcomes[:4]
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(other[0], torch.Tensor):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5, equal_nan=True)
        else:
            assert mine == other


def test_a_counter_may_become_one_of_another_dtype():
    ours, theirs = pair("BatchNorm2d", 4, momentum=None)
    for module in (ours, theirs):
        module(torch.ones(2, 4, 3, 3))
        words = module.num_batches_tracked.data.view(1).view(torch.int16)
        module.num_batches_tracked.data = words[0 if sys.byteorder == "little" else -1]
        module(torch.ones(2, 4, 3, 3))
    assert ours.num_batches_tracked.dtype is torch.int16
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_loaded(module),
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_an_independent_module(copied):
    ours, theirs = pair("BatchNorm2d", 5)
    x, dy = torch.randn(2, 4, 5, 3, 3)
    assert_same_step(ours, theirs, x, dy, 2e-5)
    twin = copied(ours)
    assert "_vectors" not in pickle.loads(pickle.dumps(ours)).__dict__
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.zero_grad(), theirs.zero_grad(), twin.zero_grad()
    assert_same_step(twin, theirs, x, dy, 2e-5)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_computed_in_every_forward():
    ours, theirs = pair("BatchNorm2d", 5)
    for module in (ours, theirs):
        parametrize.register_parametrization(module, "weight", Doubled())
    x, dy = torch.randn(2, 4, 5, 3, 3)
    assert_same_step(ours, theirs, x, dy, 2e-5)
    twin = copy.deepcopy(ours)
    twin.zero_grad(), theirs.zero_grad()
    assert_same_step(twin, theirs, x, dy, 2e-5)


def test_the_graph_of_a_weight_ends_with_its_call():
    bn, weight = accelerated.BatchNorm2d(5), torch.ones(5, requires_grad=True) * 2
    gone = weakref.ref(weight)
    torch.func.functional_call(bn, {"weight": weight}, torch.randn(4, 5, 3, 3))
    del weight
    assert gone() is None


class Marked(torch.Tensor):
    """A subclass, of which torch's functions give results of that class."""


def test_parameters_of_a_subclass_are_torchs():
    bn, x = accelerated.BatchNorm2d(5), torch.randn(4, 5, 3, 3)
    bn._parameters["weight"] = bn.weight.as_subclass(Marked)
    assert type(bn(x)) is Marked
    assert left_to_torch(bn) == {"a parameter that is a Marked": 1}


def test_without_ml_dtypes_float64_is_float64(monkeypatch):
    monkeypatch.setattr("fastbn.torch.arrays.bfloat16", None)
    ours, theirs = pair("BatchNorm2d", 5, dtype=torch.float64)
    x, dy = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64)
    assert_same_step(ours, theirs, x, dy, 1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("gradient", FORMATS)
def test_gradients_in_any_memory_format(gradient, memory, activation, training):
    x, dy = torch.randn(2, 4, 5, 6, 3, dtype=torch.float64)
    ours, theirs = (m.train(training) for m in pair("BatchNorm2d", 5, dtype=torch.float64))
    gradients = []
    for module in (ours, theirs):
        leaf = FORMATS[memory](x).detach().requires_grad_()
        if module is ours:
            y = module(leaf, activation=activation)
        else:
            y = torch.relu(module(leaf)) if activation else module(leaf)
        y.backward(FORMATS[gradient](dy))
        gradients.append([leaf.grad, module.weight.grad, module.bias.grad])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", FORMATS)
def test_large_results_have_torchs_memory_format_and_values(memory, dtype):
    x, dy, residual = torch.randn(3, 2, 64, 64, 512 // dtype.itemsize).to(dtype)
    x, dy, residual = (FORMATS[memory](t) for t in (x, dy, residual))
    ours, theirs = pair("BatchNorm2d", 64, dtype=dtype)
    # torch rounds to 16 bits what it activates, which may be on the other side of 0 then.
    activation = "relu" if dtype.itemsize > 2 else None
    results = []
    for module in (ours, theirs):
        leaf, added = (t.detach().requires_grad_() for t in (x, residual))
        if module is ours:
            y = module(leaf, activation=activation, residual=added)
        else:
            y = torch.relu(module(leaf) + added) if activation else module(leaf) + added
        results.append([y, *torch.autograd.grad(y, [leaf, added], dy)])
    assert ours._fallbacks() == {}
    for mine, other in zip(*results, strict=True):
        for format in (torch.contiguous_format, torch.channels_last):
            assert mine.is_contiguous(memory_format=format) == other.is_contiguous(
                memory_format=format
            )
        torch.testing.assert_close(mine, other, atol=5 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "shape", [(1, 64, 128, 128), (2, 64, 1, 8192), (8192, 128, 1, 1), (1, 64, 1, 1, 2**14)], ids=str
)
def test_large_results_have_torchs_strides_where_axes_have_one_element(shape):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for memory_format in (torch.contiguous_format, last):
        x = torch.randn(shape).to(memory_format=memory_format)
        ours, theirs = (m.train(False) for m in pair(f"BatchNorm{x.dim() - 2}d", x.shape[1]))
        assert ours(x).stride() == theirs(x).stride()


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((4, 4, 6, 6), (288, 2, 48, 8)),  # every other channel
        ((4, 8, 3, 6), (288, 1, 96, 8)),  # every other row
        ((2, 4, 3, 3), (18, 1, 6, 2)),  # rows that overlap
        ((4, 8, 6, 6), (0, 1, 48, 8)),  # the same samples
        ((4, 8, 6, 6), (1, 0, 12, 2)),  # the same channels
        ((3, 1, 1, 5), (12, 12, 12, 2)),  # every other column
        ((3, 1, 1, 1), (7, 7, 7, 7)),
        ((2, 3, 4, 4, 4), (384, 2, 96, 24, 6)),
    ],
    ids=str,
)
def test_results_of_parts_have_torchs_strides(shape, strides):
    x = torch.randn(2000).as_strided(shape, strides)
    ours, theirs = (m.train(False) for m in pair(f"BatchNorm{x.dim() - 2}d", x.shape[1]))
    assert ours(x).stride() == theirs(x).stride()


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (2, 1, 3, 3), (2, 3, 1, 4), (1, 1, 4, 1)], ids=str)
def test_results_have_torchs_strides_whatever_those_of_axes_of_one_element(shape, order):
    for stride in (1, 2, 7, 100):
        strides, step = [stride] * 4, 1
        for axis in order:
            if shape[axis] > 1:
                strides[axis] = step
            step *= shape[axis]
        x = torch.randn(200).as_strided(shape, strides)
        ours, theirs = (m.train(False) for m in pair("BatchNorm2d", x.shape[1]))
        assert ours(x).stride() == theirs(x).stride()


def test_large_results_take_the_memory_of_freed_ones():
    fastbn.release_memory()
    bn = accelerated.BatchNorm2d(64)
    x = torch.randn(4, 64, 64, 65)
    pointers = set()
    for _ in range(4):
        y = bn(x)
        pointers.add(y.data_ptr())
        del y
    assert len(pointers) == 1
    assert fastbn.release_memory() == x.nbytes


def test_the_storage_of_a_large_result_is_of_a_fixed_size():
    bn = accelerated.BatchNorm2d(4)
    bn(torch.randn(2, 4, 3, 3)).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not resizable"):
        bn(torch.randn(2, 4, 512, 512)).untyped_storage().resize_(0)


@pytest.mark.parametrize("option", ["x", "dy"])
def test_negative_views_are_taken_by_torch(option):
    bn, theirs = pair("BatchNorm2d", 4)
    tensors = {name: torch.randn(2, 4, 3, 3) for name in ("x", "dy")}
    tensors[option] = torch.randn(2, 4, 3, 3, dtype=torch.complex64).conj().imag
    assert tensors[option].is_neg()
    assert_same_step(bn, theirs, tensors["x"], tensors["dy"], 2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_activations_of_what_is_not_finite_are_torchs(activation, training, value):
    x = torch.randn(4, 5, 3, 3)
    x[1, 2, 0, 0] = value
    ours, theirs = (m.train(training) for m in pair("BatchNorm2d", 5))
    act = getattr(torch.nn.functional, activation)
    y, expected = ours(x, activation=activation), act(theirs(x))
    torch.testing.assert_close(y, expected, equal_nan=True, atol=2e-5, rtol=2e-5)


def test_torch_fx_traces_the_modules_as_it_traces_torchs():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.act = accelerated.BatchNorm2d(5), accelerated.BatchNormAct2d(5)

        def forward(self, x):
            return self.act(self.bn(x, activation="relu6"), residual=x)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(traced(x), model(x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["bn", "act"]


def test_a_state_dict_file_is_torchs(tmp_path):
    ours, theirs = pair("BatchNorm2d", 5)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    theirs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


# Other modes of torch.


@pytest.mark.parametrize("grad", [False, True])
def test_statistics_made_in_inference_mode_do_not_move_outside(grad):
    errors, states, x = [], [], torch.randn(2, 4, 3, 3)
    with torch.inference_mode():
        modules = pair("BatchNorm2d", 4)
        for module in modules:
            module(x)
    for module in modules:
        mean = module.running_mean.clone()
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as error:
            module(x)
        errors.append(str(error.value))
        states.append(module.state_dict())
        assert torch.equal(module.running_mean, mean)
    assert errors[0] == errors[1]
    torch.testing.assert_close(*states)  # torch itself counts the batch before its error


def test_inference_mode_and_no_grad():
    ours, theirs = pair("BatchNorm2d", 5)
    x = torch.randn(4, 5, 3, 3)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(ours(x), theirs(x))
            assert not ours(x).requires_grad
    assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked + 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes(reentrant):
    ours, theirs = pair("BatchNorm2d", 5)
    x, dy = torch.randn(2, 4, 5, 3, 3)
    gradients = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=reentrant)
        y.backward(dy)
        gradients.append([leaf.grad, module.weight.grad, module.bias.grad, module.running_var])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unpack", [torch.Tensor.float, lambda t: t[:-1]], ids=["dtype", "shape"])
def test_bits_that_a_hook_has_changed_are_refused(unpack, training):
    bn, x = accelerated.BatchNormAct2d(5).train(training), torch.randn(4, 5, 3, 3)

    def changed(tensor):
        return unpack(tensor) if tensor.dtype == torch.uint8 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, changed):
        y = bn(x.requires_grad_(), torch.randn(x.shape))
    with pytest.raises(RuntimeError, match=r"a hook of saved tensors returned .* equal copy"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_saved_tensors_pass_through_autograds_hooks(residual, training):
    """The input alone and, where the backward could not tell otherwise, a bit for each element.

    Behind the bits there are three bytes of padding.
    """
    bn, x = accelerated.BatchNormAct2d(5).train(training), torch.randn(4, 5, 3, 3)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        bn(x, x if residual else None)
    sizes = {t.numel() * t.itemsize for t in packed} - {5 * 4}
    bits = {-(-x.numel() // 8) + 3} if residual or not training else set()
    assert sizes == {x.numel() * 4} | bits


@pytest.mark.parametrize("change", ["result", "bias"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_torch_lets_change_before_the_backward_may_change(
    activation, residual, training, change
):
    """ReLU6 and leaky ReLU keep their input in torch, and nobody keeps a bias."""
    ours, theirs = pair("BatchNorm2d", 5, dtype=torch.float64)
    x, r, dy = torch.randn(3, 4, 5, 3, 3, dtype=torch.float64)
    act = {None: lambda z: z, "leaky_relu": torch.nn.functional.leaky_relu}
    act |= {"relu": lambda z: z * (z > 0), "relu6": torch.nn.functional.relu6}
    gradients = []
    for module in (ours.train(training), theirs.train(training)):
        leaves = [t.clone().requires_grad_() for t in (x, r)]
        shortcut = leaves[1] if residual else None
        if module is ours:
            y = module(leaves[0], activation=activation, residual=shortcut)
        else:
            z = module(leaves[0])
            y = act[activation](z if shortcut is None else z + shortcut)
        with torch.no_grad():
            (y if change == "result" else module.bias).add_(10)
        y.backward(dy)
        gradients.append([leaves[0].grad, leaves[1].grad, module.weight.grad, module.bias.grad])
    for mine, other in zip(*gradients, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


def test_a_result_may_be_changed_in_place_with_its_gradient():
    gradients = []
    for bn in pair("BatchNorm2d", 5, dtype=torch.float64):
        x = torch.linspace(-3, 3, 180, dtype=torch.float64).reshape(4, 5, 3, 3).requires_grad_()
        if type(bn) is accelerated.BatchNorm2d:
            y = bn(x, activation="leaky_relu", residual=x)
        else:
            y = torch.nn.functional.leaky_relu(bn(x) + x)
        y.mul_(2).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_a_tensor_that_is_changed_before_the_backward_is_noticed():
    bn, x = accelerated.BatchNorm2d(5), torch.randn(4, 5, 3, 3)
    y = bn(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


FUNCTIONAL = {
    "vmap": lambda bn, x: torch.vmap(lambda x: bn.eval()(x))(torch.stack([x, x])),
    "grad": lambda bn, x: torch.func.grad(lambda x: bn.eval()(x).square().sum())(x),
    "jvp": lambda bn, x: torch.func.jvp(bn.eval(), (x,), (x.square(),))[1],
    "hessian": lambda bn, x: torch.func.hessian(lambda x: bn.eval()(x).pow(3).sum())(x),
    "batches of gradients": lambda bn, x: torch.autograd.grad(
        bn(x.requires_grad_()), x, torch.stack([x.detach(), x.detach() ** 2]), is_grads_batched=True
    )[0],
    "meta": lambda bn, x: bn.to("meta")(x.to("meta")).shape,
    "traced": lambda bn, x: torch.jit.trace(bn.eval(), x)(x + 1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_what_has_no_kernel_is_torchs_and_counted(call):
    ours, theirs = pair("BatchNorm2d", 2, dtype=torch.float64)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    mine, other = call(ours, x.clone()), call(theirs, x.clone())
    if isinstance(other, torch.Tensor):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)
    assert mine.shape == other.shape if isinstance(other, torch.Tensor) else mine == other
    assert left_to_torch(ours)


# What torch loads for it, if nothing has before, still calls torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_ad():
    from torch.autograd import forward_ad

    ours, theirs = pair("BatchNorm2d", 2)
    x = torch.randn(3, 2, 2, 2)
    tangents = []
    for module in (ours, theirs):
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, x**2))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


def test_the_third_derivative():
    ours, theirs = pair("BatchNorm2d", 2, dtype=torch.float64)
    found = []
    for module in (ours, theirs.eval()):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 2, 2, 2).requires_grad_()
        module.eval()
        g = x
        for _ in range(3):
            (g,) = torch.autograd.grad(module(g).pow(3).sum(), x, create_graph=True)
        found.append(g)
    torch.testing.assert_close(*found)


def test_autocast_mixes_bfloat16_with_float32():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), accelerated.BatchNorm2d(5))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert model[1].weight.grad.dtype is torch.float32
    assert not left_to_torch(model[1])


class Block(torch.nn.Module):
    """Two convolutions, with an addition."""

    def __init__(self, bn):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 5, 3, padding=1), bn(5)
        self.conv2, self.bn2 = torch.nn.Conv2d(5, 5, 3, padding=1), bn(5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.bn2(self.conv2(x), activation="relu", residual=x)


COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
def test_errors_of_compiled_modules_are_torchs():
    errors = []
    for module in pair("BatchNorm2d", 3):
        with pytest.raises(Exception, match=r".") as raised:
            torch.compile(module, backend="aot_eager")(torch.ones(2, 4, 3, 3))
        errors.append(raised.type)
    assert errors[0] is errors[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_in_one_graph(backend, training, memory):
    # In double precision no rounding of a convolution takes a value to the other side of 0.
    eager = randomized(Block(accelerated.BatchNorm2d)).double().train(training)
    compiled = torch.compile(copy.deepcopy(eager), backend=backend, fullgraph=True)
    for _ in range(2):
        x, dy = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 6, 6)
        x, dy = (t.double().to(memory_format=memory) for t in (x, dy))
        assert_same_step(compiled, eager, x, dy, 1e-9)
        compiled.zero_grad(), eager.zero_grad()


@pytest.mark.parametrize("index", [0, 1])
def test_tensors_without_memory_are_taken_by_torch(index):
    x = torch._efficientzerotensor((2, 2, 4, 3, 3))[index]
    ours, theirs = pair("BatchNorm2d", 4)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("index", [0, 1])
def test_tensors_whose_memory_was_freed_are_refused_as_by_torch(index):
    tensor = torch.randn(2, 2, 4, 3, 3)
    x = tensor[index]
    tensor.untyped_storage().resize_(0)
    for module in pair("BatchNorm2d", 4):
        with pytest.raises(RuntimeError, match="not allocated"):
            module(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_with_results_that_take_the_memory_of_freed_ones(memory):
    eager = torch.nn.Sequential(accelerated.BatchNorm2d(8), torch.nn.Sigmoid())
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    x, dy = torch.randn(2, 2, 8, 300, 300).unbind()
    x, dy = (t.to(memory_format=memory) for t in (x, dy))
    assert core.reuses_memory(x.nbytes)
    assert_same_step(compiled, eager, x, dy, 1e-5)


def test_a_program_that_is_exported_has_torchs_operators():
    bn = accelerated.BatchNorm2d(5).eval()
    program = torch.export.export(bn, (torch.randn(2, 5, 3, 3),))
    assert not any("fastbn" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_operators_keep_torchs_rules(options):
    from fastbn.torch import operators

    x = torch.randn(2, 5, 3, 3, **options, requires_grad=True)
    weight, bias, *running = torch.rand(4, 5).unbind()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    residual = torch.randn(2, 5, 3, 3, **options, requires_grad=True)
    for extra in (None, None), ("relu", residual):
        arguments = x, weight, bias, extra[1], *running, 0.1, 1e-5, extra[0], 0.01
        torch.library.opcheck(
            operators.batch_norm, arguments, test_utils=["test_schema", "test_faketensor"]
        )


# Processes and threads.


@pytest.mark.serial
def test_under_ddp_on_one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ours, theirs = pair("BatchNorm2d", 5)
        wrapped = torch.nn.parallel.DistributedDataParallel(ours)
        x, dy = torch.randn(2, 4, 5, 3, 3)
        assert_same_step(wrapped, theirs, x, dy, 2e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_a_frozen_module_passes_gradients_alone(activation, residual):
    ours = accelerated.BatchNormAct2d(5, activation=activation).requires_grad_(False).eval()
    theirs = torch.nn.BatchNorm2d(5).requires_grad_(False).eval()
    for buffer in ours.running_mean, ours.running_var:
        buffer.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x, r, dy = torch.randn(3, 4, 5, 3, 3)
    found = []
    for module, apply in (ours, lambda y: y), (theirs, getattr(torch.nn.functional, activation)):
        inputs = [t.clone().requires_grad_() for t in ((x, r) if residual else (x,))]
        y = module(*inputs) if module is ours else apply(sum(inputs[1:], module(inputs[0])))
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


class Normalized(torch.utils.data.Dataset):
    """Samples that are normalized where they are loaded."""

    def __init__(self):
        self.bn = accelerated.BatchNorm2d(8).requires_grad_(False)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.bn(torch.full((4, 8, 64, 64), float(i)))


@pytest.mark.serial
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_of_a_data_loader_that_are_forked():
    data = Normalized()
    data[0]  # The parent's threads have run.
    loader = torch.utils.data.DataLoader(
        data, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert len(list(loader)) == 4


# Each library may have loaded an OpenMP of its own.
THREADS = """
import os
import fastbn
import torch
import fastbn.torch

def started(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(2)
x = torch.randn(8, 64, 64, 64, requires_grad=True)
bn = fastbn.torch.BatchNorm2d(64)
print(started(lambda: x.exp()), started(lambda: bn(x).sum().backward()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads are counted in other ways")
def test_the_threads_are_torchs_even_if_fastbn_is_imported_first(tmp_path):
    assert output_of(THREADS, tmp_path) == "1 0\n"


@beside_another_runtime
def test_the_threads_are_torchs_where_another_openmp_is_preloaded(tmp_path):
    runtime = core.platform()["openmp"].partition("(")[2].rstrip(")")
    content = Path(runtime).read_bytes()
    other = tmp_path / "another.so"
    name = Path(runtime).name.partition(".so")[0].encode() + b".so"
    other.write_bytes(content.replace(name, b"A" + name[1:]))  # The name by which it is needed.
    assert output_of(THREADS, tmp_path, LD_PRELOAD=str(other)) == "1 0\n"


def test_the_number_of_threads_is_torchs(monkeypatch):
    asked = []
    set_threads_here = core.set_threads_here

    def noted(n):
        asked.append(n)
        return set_threads_here(n)

    monkeypatch.setattr(core, "set_threads_here", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with fastbn.threads(5):
        accelerated.BatchNorm2d(5)(torch.randn(2, 5, 3, 3)).sum().backward()
        assert fastbn.get_num_threads() == 5
    assert asked.count(3) == 2
