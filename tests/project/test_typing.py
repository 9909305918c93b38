"""What a type checker and a reader of help() get to know."""

import importlib.util
import inspect
import pydoc
import typing
from pathlib import Path

import pytest

import fastbn

FUNCTIONS = [getattr(fastbn.functional, name) for name in fastbn.functional.__all__]
PUBLIC = [getattr(fastbn, name) for name in fastbn.__all__ if name not in ("__version__",)]
FUNCTIONS += [thing for thing in PUBLIC if inspect.isfunction(thing)]
CLASSES = [thing for thing in PUBLIC if inspect.isclass(thing)]


def methods(cls):
    """The public methods of a class, inherited ones included, and its constructor and call."""
    for name, member in inspect.getmembers(cls):
        if not name.startswith("_") or name in ("__init__", "__call__"):
            function = inspect.unwrap(getattr(member, "__func__", member))
            if inspect.isfunction(function):
                yield name, function


def assert_annotated(function):
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty, (function, parameter)
    assert "return" in function.__annotations__, function
    typing.get_type_hints(function)  # The names in the annotations mean something.


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_are_annotated(function):
    assert_annotated(inspect.unwrap(function))


@pytest.mark.parametrize("name", fastbn.functional.__all__)
def test_functions_name_the_public_module(name):
    function = getattr(fastbn.functional, name)
    assert function.__module__ == "fastbn.functional"
    assert f"function {name} in module fastbn.functional" in pydoc.render_doc(function)


def test_dir_shows_what_is_public():
    with_torch = ["torch"] if importlib.util.find_spec("torch") else []
    assert dir(fastbn) == sorted([*fastbn.__all__, *with_torch])
    assert dir(fastbn.functional) == sorted(fastbn.functional.__all__)
    assert all(hasattr(fastbn, name) for name in dir(fastbn))


@pytest.mark.torch
def test_dir_of_torchs_layers_shows_what_is_public():
    pytest.importorskip("torch")
    for module in (fastbn.torch, fastbn.torch.functional):
        assert dir(module) == sorted(module.__all__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_public_methods_are_annotated_and_documented(cls):
    for name, function in methods(cls):
        assert_annotated(function)
        assert name == "__init__" or inspect.getdoc(function), name


def test_the_page_of_a_layer_names_every_method_in_its_introduction():
    introduction = inspect.getdoc(fastbn.BatchNorm2d).split("Parameters")[0]
    # `has_uninitialized_params` and `extra_repr` are there for who knows them from torch.
    others = {"__init__", "__call__", "forward", "has_uninitialized_params", "extra_repr"}
    for name in {name for name, _ in methods(fastbn.BatchNorm2d)} - others:
        assert f"`{name}`" in introduction, name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_shows_no_private_members(cls):
    page = pydoc.plain(pydoc.render_doc(cls))
    assert " |  _memory" not in page
    assert " |  _ranks" not in page
    assert "Examples" in page or "see `LazyBatchNorm2d`" in page


# What someone writes who uses the library and a strict type checker.
CONSUMER = """
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn import functional as F

Array = NDArray[Any]
Statistics = NDArray[np.float64]

x = np.zeros((2, 3, 4, 5), np.float32)
bn = fastbn.BatchNorm2d(3, dtype=np.float64, momentum=None, bias=False)
assert_type(bn(x), Array)
assert_type(bn(x.tolist(), out=x), Array)
assert_type(bn.backward(x), Array | Any)  # a pair after a forward with a residual
assert_type(bn(x, residual=x), Array)
dx, dresidual = bn.backward(x, residual_out=x)
activated = fastbn.BatchNorm2d(3, activation="leaky_relu", negative_slope=0.1)
assert_type(activated.activation, str | None)
assert_type(bn.train().eval().freeze().unfreeze().zero_grad().to("cpu"), fastbn.BatchNorm2d)
assert_type(bn.state_dict("bn."), dict[str, Array])
assert_type(bn.load_state_dict(np.load("bn.npz"), strict=False).missing_keys, list[str])
missing, unexpected = bn.load_state_dict(np.load("bn.npz"))
assert_type(unexpected, list[str])
bn.weight -= 0.1 * bn.weight_grad
lazy = fastbn.LazyBatchNorm2d()
assert_type(lazy(x), Array)
assert_type(lazy.num_features, int)
assert_type(fastbn.InstanceNorm2d(3)(x), Array)
assert_type(fastbn.LazyInstanceNorm2d(affine=False)(x), Array)

assert_type(F.batch_norm(x, bn.running_mean, bn.running_var, training=True), Array)
assert_type(F.instance_norm(x, use_input_stats=True, out=x), Array)
assert_type(F.batch_norm_stats(x), tuple[int, Statistics, Statistics])
assert_type(F.batch_norm_forward(x), tuple[Array, Statistics, Statistics])
assert_type(F.batch_norm(x, None, None, training=True, activation="relu", residual=x), Array)
assert_type(F.batch_norm_backward(x, x, None, [0.0], [1.0], bias=None), tuple[Array, ...])

total = fastbn.Moments.of(x) + fastbn.Moments.of(x)
assert_type(total, fastbn.Moments)
assert_type(sum([total, total], fastbn.Moments()), fastbn.Moments)
assert_type(total.var(correction=1), Statistics)

with fastbn.recalibrate(bn, lazy):
    bn(x)
assert_type(fastbn.fold(bn, x[0], None, groups=1), tuple[Array, Array])
assert_type(fastbn.convert_sync_batchnorm(bn), fastbn.SyncBatchNorm)
assert_type(fastbn.show_config("dicts"), dict[str, Any])
fastbn.show_config()
fastbn.set_num_threads(None)
assert_type(fastbn.get_num_threads(), int)
"""
WRONG = {
    "bn = fastbn.BatchNorm2d('3')": "arg-type",
    "fastbn.show_config('json')": "call-overload",
    "fastbn.recalibrate([fastbn.BatchNorm2d(3)])": "arg-type",
    "fastbn.BatchNorm2d(3).weigth": "attr-defined",
    "fastbn.LazyBatchNorm2d().weigth": "attr-defined",
    "fastbn.fold(fastbn.BatchNorm2d(3))": "call-arg",
    "F.batch_norm(x, [0.0], None)": "arg-type",
    "bn(x, x)": "arg-type",
}


def test_a_strict_type_checker_accepts_what_is_right_and_finds_what_is_wrong(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(tmp_path)
    folder = Path(fastbn.__file__).parents[1]
    if folder.name != "site-packages":  # Checkers do not see what pip install -e adds to the path.
        monkeypatch.setenv("MYPYPATH", str(folder))
    lines = CONSUMER.count("\n")
    (tmp_path / "consumer.py").write_text(CONSUMER + "".join(f"{line}\n" for line in WRONG))
    output, errors, _ = api.run(["--strict", "--no-pretty", "consumer.py"])
    assert errors == ""
    found = [line for line in output.splitlines() if ": error: " in line]
    assert len(found) == len(WRONG), output
    for number, (line, code) in enumerate(zip(found, WRONG.values(), strict=True), lines + 1):
        assert line.startswith(f"consumer.py:{number}: ")
        assert line.endswith(f"[{code}]")
