"""timm's batch normalization that activates, which a class of the same attributes stands for."""

import copy
import pickle
import sys
import types

import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
accelerated = pytest.importorskip("fastbn.torch")
acceleration = pytest.importorskip("fastbn.torch.acceleration")
nn, F = torch.nn, torch.nn.functional


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, num_features, act_layer=nn.ReLU, drop_layer=nn.Identity):
        super().__init__(num_features)
        self.drop, self.act = drop_layer(), act_layer()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    """A timm that has this class."""
    package, layers = types.ModuleType("timm"), types.ModuleType("timm.layers")
    package.layers, layers.BatchNormAct2d = layers, BatchNormAct2d
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.layers", layers)
    for name in "OURS", "TORCHS":
        monkeypatch.setattr(acceleration, name, dict(getattr(acceleration, name)))
    yield
    sys.modules.pop("fastbn.torch.timm", None)
    vars(accelerated).pop("timm", None)


def model_of(**kwargs):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, **kwargs), nn.Conv2d(8, 4, 1))
    nn.init.normal_(model[1].weight)
    return model


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "none": nn.Identity,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_is_that_of_the_module(activation, training):
    theirs = model_of(act_layer=ACTIVATIONS[activation]).train(training)
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    x, dy = torch.randn(4, 3, 9, 9), torch.randn(4, 4, 7, 7)
    found = []
    for model in ours, theirs:
        y = model(x)
        y.backward(dy)
        found.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    report = accelerated.report(ours)
    assert report.replaced == ["1"]
    assert not report.fallbacks
    fused = activation.split()[0] in ("relu", "relu6", "leaky_relu")
    assert report.fused == ({"1": f"its own {activation.split()[0]}"} if fused else {})
    assert list(report.unfused) == ([] if fused else ["1"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_it_is_compiled_as_one_graph(activation, training):
    theirs = model_of(act_layer=ACTIVATIONS[activation]).train(training)
    ours = accelerated.accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 9, 9)
    y = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-4)


def test_hooks_and_dropout_run():
    seen = []
    model = accelerated.accelerate(model_of(drop_layer=lambda: nn.Dropout(1.0)))
    assert torch.equal(model[:2](torch.randn(4, 3, 9, 9)), torch.zeros(4, 8, 7, 7))
    model = accelerated.accelerate(model_of())
    model[1].act.register_forward_hook(lambda *_: seen.append("act"))
    model(torch.randn(4, 3, 9, 9))
    assert seen == ["act"]
    assert accelerated.report(model).fused == {}


def test_it_is_restored_copied_and_pickled():
    model, x = accelerated.accelerate(model_of()), torch.randn(4, 3, 9, 9)
    for duplicate in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert type(duplicate[1]) is type(model[1])
        assert torch.equal(duplicate(x), model(x))
        duplicate.load_state_dict(model.state_dict())
    assert type(accelerated.restore(model)[1]) is BatchNormAct2d
    assert repr(model) == repr(model_of())
    model(x)


def test_a_subclass_is_left_alone():
    class Own(BatchNormAct2d):
        pass

    model = accelerated.accelerate(nn.Sequential(Own(3)))
    assert type(model[0]) is Own
    assert accelerated.report(model).left == {"0": "a Own"}
