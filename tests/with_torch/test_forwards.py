"""Which forwards are fused: those that ask what a stand-in cannot tell, or may change, are not."""

import copy
import enum

import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
accelerated = pytest.importorskip("fastbn.torch")
accelerate, report = accelerated.accelerate, accelerated.report
nn, F = torch.nn, torch.nn.functional
grad_on = torch.is_grad_enabled


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.empty = nn.ParameterList()
        self.again = self.conv


def asked(condition):
    """A forward with a convolution where a condition holds."""
    scope = {"torch": torch, "F": F, "grad_on": grad_on, "__name__": "asked"}
    source = (
        f"def forward(self, x):\n  if {condition}: x = self.conv(x)\n  return F.relu(self.bn(x))"
    )
    exec(source, scope)
    return scope["forward"]


def tries(self, x):
    try:
        factor = float(x.std())
    except Exception:
        factor = 5.0
    return F.relu(self.bn(x)) * factor


def matches(self, x):
    match x:
        case torch.Tensor():
            x = self.conv(x)
    return F.relu(self.bn(x))


def seeds(self, x):
    torch.manual_seed(0)
    return F.dropout(F.relu(self.bn(x)), 0.5)


def counts(self, x):
    return F.relu(self.bn(x)) * len({x, x.data})


CONDITIONS = [
    "x.dtype is torch.float32",
    "x.requires_grad is False",
    "x.dim() in {4, 5}",
    "x.dtype in {torch.float32}",
    "{4: True}.get(x.dim())",
    'str(x.device) == "cpu"',
    'f"{x.dtype}" == "torch.float32"',
    "x.__class__ is torch.Tensor",
    "x.grad_fn is None",
    "self.bn.weight.grad is None",
    "torch.is_tensor(x)",
    "torch.get_default_dtype() == torch.float32",
    "grad_on()",
    "torch.jit.is_tracing()",
    "torch.distributed.is_initialized()",
    "self.empty",
    "self.again is self.conv",
]
FORWARDS = [pytest.param(asked(c), id=c) for c in CONDITIONS] + [tries, matches, seeds, counts]


@pytest.mark.parametrize("forward", FORWARDS)
def test_what_a_stand_in_cannot_tell_is_not_traced(forward):
    original = type("M", (Model,), {"forward": forward})()
    model = accelerate(copy.deepcopy(original))
    assert list(report(model).unfused) == ["bn"]
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model(x), original(x))


def test_what_the_module_itself_tells_is_traced():
    model = accelerate(type("M", (Model,), {"forward": asked("self.training")})())
    assert report(model).fused == {"bn": "relu"}


class Shared(Model):
    def __init__(self):
        super().__init__()
        del self.again
        self.empty = self.conv

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def test_a_child_of_two_names_is_one():
    original = Shared()
    model, x = accelerate(copy.deepcopy(original)), torch.randn(4, 3, 5, 5)
    assert report(model).fused == {"bn": "relu"}
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("change", ["x.data", "x.mT"])
def test_an_attribute_of_a_tensor_is_changed_in_place(change):
    scope = {"F": F, "__name__": "asked"}
    exec(f"def forward(self, x):\n  v = {change}\n  v *= 2\n  return F.relu(self.bn(x))", scope)
    model, x = type("M", (Model,), {"forward": scope["forward"]})(), torch.randn(4, 3, 5, 5)
    y = x.clone()
    accelerate(model)(y)
    torch.testing.assert_close(y, x * 2)


class SharedWithContainer(Model):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.first = self.features[0]

    def forward(self, x):
        return F.relu(self.bn(self.first(x))) + self.features(x)


def test_a_container_that_has_a_child_of_another_name_may_change():
    original, x = SharedWithContainer(), torch.randn(4, 3, 5, 5)
    model = accelerate(copy.deepcopy(original))
    assert report(model).fused == {"bn": "relu"}
    for each in original, model:
        torch.manual_seed(1)
        each.features[0] = nn.Conv2d(3, 3, 1)
    torch.testing.assert_close(model(x), original(x))


class Scaled(Model):
    def __init__(self):
        super().__init__()
        self.down, self.scale = nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + self.down(x)) * self.scale


def test_a_parameter_of_the_module_is_no_use_of_the_batch_normalization():
    assert report(accelerate(Scaled())).fused == {"bn": "add, relu"}


class SharedBelow(Model):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 3, 1), self.bn)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + self.down(x))


def test_a_batch_normalization_shared_with_a_container_keeps_its_order():
    original, x = SharedBelow(), torch.randn(4, 3, 5, 5)
    model = accelerate(copy.deepcopy(original))
    torch.testing.assert_close(model(x), original(x))
    torch.testing.assert_close(model.bn.running_mean, original.bn.running_mean)


class Adds(Model):
    def forward(self, x, residual):
        y = self.bn(x)
        y += residual
        return self.relu(y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float32 float64", "float16 float32"])
def test_an_addition_in_place_keeps_the_dtype(dtypes, compiled, training):
    mine, other = (getattr(torch, name) for name in dtypes.split())
    model = accelerate(Adds().train(training))
    assert report(model).fused == {"bn": "add, relu"}
    called = torch.compile(model, backend="aot_eager") if compiled else model
    x = torch.randn(4, 3, 5, 5, dtype=mine)
    assert called(x, torch.randn(4, 3, 5, 5, dtype=other)).dtype is mine


def test_an_addition_in_place_keeps_the_shape():
    model, x = accelerate(Adds()), torch.randn(4, 3, 5, 5)
    with pytest.raises(RuntimeError, match="broadcast shape"):
        model(x, torch.randn(2, 4, 3, 5, 5))


# What a forward reaches by other ways than names, and what of that may change between two calls.
STATE = {"factor": 1.0}


def scaled(x):
    return x * STATE["factor"]


def without_gradients(x):
    with torch.no_grad():
        return x * 2


def scaled_by_default(x, scale=scaled):
    return scale(x)


class Options:
    factor = 1.0


class WithFactor(enum.Enum):
    @staticmethod
    def factor():
        return STATE["factor"]


class Choice(WithFactor):
    ONE = 1


class FunctionOfTorch(Model):
    def __init__(self):
        super().__init__()
        self.asks = torch.is_grad_enabled

    def forward(self, x):
        return F.relu(self.bn(x)) * (2 if self.asks() else 1)


class FunctionsInList(Model):
    def __init__(self):
        super().__init__()
        self.functions = [without_gradients]

    def forward(self, x):
        return F.relu(self.bn(self.functions[0](x)))


class FunctionsOfClass(Model):
    functions = (scaled,)

    def forward(self, x):
        return F.relu(self.bn(x)) + self.functions[0](x)


class FunctionAsDefault(Model):
    def forward(self, x):
        return F.relu(self.bn(x)) + scaled_by_default(x)


class ClassAsAttribute(Model):
    def __init__(self):
        super().__init__()
        self.options = Options

    def forward(self, x):
        return F.relu(self.bn(x)) * self.options.factor


class MethodOfEnum(Model):
    def __init__(self):
        super().__init__()
        self.choice = Choice.ONE

    def forward(self, x):
        return F.relu(self.bn(x)) * self.choice.factor()


class AttributeByMethod(Model):
    def __getattr__(self, name):
        return STATE["factor"] if name == "factor" else super().__getattr__(name)

    def forward(self, x):
        return F.relu(self.bn(x)) * self.factor


class OperatorOfModule(Model):
    def __add__(self, x):
        return x * STATE["factor"]

    def forward(self, x):
        return F.relu(self.bn(x)) + (self + x)


class LengthOfModule(Model):
    def __len__(self):
        return int(STATE["factor"])

    def forward(self, x):
        return F.relu(self.bn(x)) * len(self)


def gradient_of(y, x):
    return torch.autograd.grad(y, x, allow_unused=True, materialize_grads=True)[0]


@pytest.mark.parametrize(
    "model",
    [
        *(FunctionsInList, FunctionsOfClass, FunctionAsDefault, ClassAsAttribute, MethodOfEnum),
        *(AttributeByMethod, OperatorOfModule, LengthOfModule, FunctionOfTorch),
    ],
)
def test_what_a_forward_reaches_may_change(model, monkeypatch):
    original = model()
    accelerated_model = accelerate(copy.deepcopy(original))
    assert list(report(accelerated_model).unfused) == ["bn"]
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    for factor in 1.0, 3.0:
        monkeypatch.setitem(STATE, "factor", factor)
        monkeypatch.setattr(Options, "factor", factor)
        results = [m(x) for m in (accelerated_model, original)]
        torch.testing.assert_close(*results)
        gradients = [gradient_of(y.sum(), x) for y in results]
        torch.testing.assert_close(*gradients)
