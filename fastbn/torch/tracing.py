"""The forward of a module as a graph, whose nodes are calls of its children and of functions.

torch.fx records what one run of a forward does with tensors. That stands for all runs only if the
rest of the forward gives the same each time, so code in which it may not is refused.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import io
import operator
import random
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx

# What a graph would keep as it was when it was recorded, or leave out.
FORBIDDEN_NAMES = {
    *("isinstance", "issubclass", "type", "hasattr", "getattr", "setattr", "callable", "vars"),
    *("open", "eval", "exec", "globals", "locals", "id"),
    *("no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast"),
    *("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "is_compiling"),
    *("checkpoint", "checkpoint_sequential", "record_function"),
}
FORBIDDEN_INSTRUCTIONS = {
    **dict.fromkeys(("BEFORE_WITH", "LOAD_SPECIAL", "BEFORE_ASYNC_WITH"), "has a with statement"),
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "sets attributes"),
    **dict.fromkeys(("STORE_SUBSCR", "DELETE_SUBSCR"), "sets elements"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "sets globals"),
    "IMPORT_NAME": "imports",
}
KNOWN_MODULES = ("torch", "math", "operator")
CONTAINERS = torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential
FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, type
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, *FUNCTIONS)
PLAIN_ATTRIBUTES = set(vars(torch.nn.Module())) | {"forward"}


class CannotTrace(Exception):
    """The forward does something that a graph would not show."""


class Traced(NamedTuple):
    """The graph of a forward, and the attributes of the module that it holds for."""

    graph: fx.Graph
    attributes: dict[str, Any]  # as `frozen` gives them


def trace(module: torch.nn.Module, constants: Mapping[str, Any]) -> Traced:
    """The graph of a forward; of its arguments, all but the constants are tensors."""
    attributes = attributes_read(module)
    random_before, output = random_states(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            graph = _Tracer(constants).trace(module)
    except CannotTrace:
        raise
    except Exception as error:  # Whatever the forward does with what is no tensor.
        lines = str(error).splitlines() or [type(error).__name__]
        raise CannotTrace(f"its forward cannot be traced: {lines[0]}") from error
    if random_states() != random_before:
        raise CannotTrace("its forward draws random numbers outside of tensor operations")
    if output.getvalue():
        raise CannotTrace("its forward prints")
    for node in graph.nodes:
        if node.op == "call_module":
            check_path(module, node.target)
    return Traced(graph, attributes)


def random_states() -> tuple[Any, ...]:
    """What every random number changes."""
    of_numpy: Any = np.random.get_state()
    return random.getstate(), repr(of_numpy[1:3]), bytes(torch.get_rng_state().numpy())


class _Proxy(fx.Proxy):
    """Records operators in place as such, which would be lost."""


def in_place(operation: Any) -> Any:
    """The method of an operator in place."""

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior"):
    setattr(_Proxy, f"__{_name}__", in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Records calls of children, and does not look into them."""

    def __init__(self, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self._constants = constants

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        args = [self.root]
        for name in parameters_of(self.root):
            if name in self._constants:
                args.append(self._constants[name])
            else:
                args.append(self.create_proxy("placeholder", name, (), {}))
        return root_fn, args

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            known = *self.root.parameters(), *self.root.buffers()
            if not any(a is tensor for tensor in known):
                raise CannotTrace("its forward makes tensors of its own")
        return super().create_arg(a)


def parameters_of(module: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a forward, by name."""
    parameters = dict(inspect.signature(type(module).forward).parameters)
    parameters.pop(next(iter(parameters)))
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        raise CannotTrace("its forward takes a varying number of arguments")
    return parameters


def check_path(module: torch.nn.Module, path: str) -> None:
    """Refuse calls of children of a child whose own forward is passed over."""
    parent, _, _ = path.rpartition(".")
    while parent:
        if not isinstance(module.get_submodule(parent), CONTAINERS):
            raise CannotTrace(f"its forward calls parts of {parent}")
        parent, _, _ = parent.rpartition(".")


# The code of a forward.


def attributes_read(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes that a forward may read; refuse code whose graph might not stand for it."""
    names: set[str] = set()
    for code in codes_of(module, type(module).forward, set()):
        for instruction in dis.get_instructions(code):
            reason = FORBIDDEN_INSTRUCTIONS.get(instruction.opname)
            if reason:
                raise CannotTrace(f"its forward {reason}")
        forbidden = sorted(FORBIDDEN_NAMES.intersection(code.co_names))
        if forbidden:
            raise CannotTrace(f"its forward uses {', '.join(forbidden)}")
        names.update(code.co_names)
    attributes = frozen_attributes(module, names.intersection(vars(module)) - PLAIN_ATTRIBUTES)
    for name, value in attributes.items():
        if value is NotImplemented:
            raise CannotTrace(f"its forward reads self.{name}, which may change")
    return attributes


def codes_of(
    module: torch.nn.Module, function: Any, seen: set[types.CodeType]
) -> Iterator[types.CodeType]:
    """The code of a function and of those that it calls, apart from torch's."""
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType) or is_known(function.__module__):
        return
    if function.__closure__ and function.__code__.co_freevars != ("__class__",):
        raise CannotTrace("its forward has variables of another function")
    for code in nested(function.__code__):
        if code in seen:
            continue
        seen.add(code)
        yield code
        for name in code.co_names:
            for called in called_by_name(module, function, name):
                yield from codes_of(module, called, seen)


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code and the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def called_by_name(module: torch.nn.Module, function: Any, name: str) -> Iterator[Any]:
    """The functions that a name may stand for: a method, a property, or a global."""
    for cls in type(module).__mro__:
        member = vars(cls).get(name)
        if member is not None and not is_known(cls.__module__):
            yield member.fget if isinstance(member, property) else getattr(cls, name)
    if name not in function.__globals__:
        return
    value = function.__globals__[name]
    if isinstance(value, types.ModuleType):
        if not is_known(value.__name__):
            raise CannotTrace(f"its forward uses the module {value.__name__}")
    elif isinstance(value, types.FunctionType):
        yield value
    elif not isinstance(value, FUNCTIONS) and not is_known(type(value).__module__):
        raise CannotTrace(f"its forward reads the global {name}")


def is_known(name: str | None) -> bool:
    """Tell whether a module is torch's, or has functions of numbers alone."""
    return name is not None and name.partition(".")[0] in KNOWN_MODULES


def frozen_attributes(module: torch.nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Attributes as values to compare with later ones."""
    return {name: frozen(vars(module).get(name)) for name in names}


def frozen(value: Any) -> Any:
    """A value to compare with later ones, NotImplemented for one whose changes do not show."""
    if isinstance(value, tuple | list | frozenset):
        items = list(map(frozen, value))
        return NotImplemented if any(i is NotImplemented for i in items) else (type(value), items)
    return (type(value), value) if isinstance(value, CONSTANTS) else NotImplemented
