"""The forward of a module as a graph, whose nodes are calls of its children and of functions.

torch.fx records what one run of a forward does with tensors. That stands for all runs only if the
rest of the forward gives the same each time, so code in which it may not is refused.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import enum
import inspect
import operator
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

# What a graph would keep as it was when it was recorded, or leave out.
FORBIDDEN_NAMES = {
    *("isinstance", "issubclass", "type", "hasattr", "getattr", "setattr", "callable", "vars"),
    *("input", "open", "eval", "exec", "globals", "locals", "id", "__dict__"),
    *("no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast"),
    *("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "is_compiling"),
    *("checkpoint", "checkpoint_sequential", "record_function"),
    *("train", "apply", "zero_grad", "add_module", "register_module"),
    *("register_buffer", "register_parameter", "load_state_dict"),
    *("attrgetter", "methodcaller"),
}
FORBIDDEN_INSTRUCTIONS = {
    **dict.fromkeys(("BEFORE_WITH", "LOAD_SPECIAL", "BEFORE_ASYNC_WITH"), "has a with statement"),
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "sets attributes"),
    **dict.fromkeys(("STORE_SUBSCR", "DELETE_SUBSCR"), "sets elements"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "sets globals"),
    "IMPORT_NAME": "imports",
}
GLOBAL_INSTRUCTIONS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
KNOWN_MODULES = ("torch", "math", "operator")
# Their functions and classes do the same each time; what these have made may not.
TOOLS = ("functools", "_functools", "itertools")
LISTS = torch.nn.ModuleList, torch.nn.ModuleDict
CONTAINERS = (*LISTS, torch.nn.Sequential)
FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, type
# Of these types and of no others that derive from them: a program has its constants as their repr,
# which may need a name that it does not know, as np.float64's does.
NUMBERS_AND_STRINGS = {type(None), bool, int, float, str}
CONSTANTS = (torch.dtype, torch.device, enum.Enum, *FUNCTIONS)
SEVERAL = tuple, list, frozenset
PLAIN_ATTRIBUTES = set(vars(torch.nn.Module())) | {"forward"}


class CannotTrace(Exception):
    """The forward does something that a graph would not show."""


class Attributes(NamedTuple):
    """The attributes that a forward may read, as `frozen` gives them."""

    cls: type
    names: list[str]
    of_module: dict[str, Any]
    of_classes: dict[tuple[type, str], Any]

    def are_of(self, module: torch.nn.Module) -> bool:
        """Tell whether a module has the same ones now."""
        if type(module) is not self.cls or attributes_of(module, self.names) != self.of_module:
            return False
        for (cls, name), value in self.of_classes.items():
            if frozen(getattr(cls, name, None)) != value:
                return False
        return True


class Traced(NamedTuple):
    """The graph of a forward, and the attributes of the module that it holds for."""

    graph: fx.Graph
    attributes: Attributes


def trace(module: torch.nn.Module, constants: Mapping[str, Any], *, training: bool) -> Traced:
    """The graph of a forward; of its arguments, all but the constants are tensors."""
    attributes = attributes_read(module)
    tracer = _Tracer(module)
    try:
        with _NoTensors(), no_printing():
            tracer.record(attributes, constants, training=training)
    except CannotTrace:
        raise
    except Exception as error:  # Whatever the forward does with what is no tensor.
        lines = str(error).splitlines() or [type(error).__name__]
        raise CannotTrace(f"its forward cannot be traced: {lines[0]}") from error
    return Traced(tracer.graph, attributes)


class _NoTensors(TorchDispatchMode):
    """Refuses operations on tensors themselves: a graph would keep their results."""

    def __torch_dispatch__(self, *_: Any, **__: Any) -> Any:
        raise CannotTrace("its forward makes tensors of its own")


@contextlib.contextmanager
def no_printing() -> Iterator[None]:
    """Refuse calls of print, in this thread: a graph would leave them out."""

    def refuse(frame: types.FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called is print:
            raise CannotTrace("its forward prints")

    profiler = sys.getprofile()
    sys.setprofile(refuse)
    try:
        yield
    finally:
        sys.setprofile(profiler)


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
    """Records a forward that runs on stand-ins for a module and its children.

    So nothing is changed, of the module or of torch, and other threads may run both meanwhile.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.root, self.graph = module, fx.Graph()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def record(
        self, attributes: Attributes, constants: Mapping[str, Any], *, training: bool
    ) -> None:
        """Run the forward once."""
        arguments = [
            constants[name] if name in constants else self.create_proxy("placeholder", name, (), {})
            for name in parameters_of(self.root)
        ]
        state = self.root.__dict__
        module: Any = object.__new__(type(self.root))
        vars(module).update(
            # Lists of its own, to which a forward may append.
            {name: copy.deepcopy(state[name]) for name in attributes.of_module},
            training=training,
            _parameters=self.tensors(self.root._parameters, ""),
            _buffers=self.tensors(self.root._buffers, ""),
            _modules=self.children(self.root, ""),
        )
        result = type(self.root).forward(module, *arguments)
        self.create_node("output", "output", (self.create_arg(result),), {})
        if attributes_of(module, attributes.names) != attributes.of_module:
            raise CannotTrace("its forward changes attributes")
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)

    def tensors(self, tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """What stands for parameters or buffers."""
        return {
            name: None if t is None else self.create_proxy("get_attr", prefix + name, (), {})
            for name, t in tensors.items()
        }

    def children(self, module: torch.nn.Module, prefix: str) -> dict[str, Any]:
        """What stands for the children of a module."""
        return {
            name: None if child is None else _Child(self, child, prefix + name)
            for name, child in module._modules.items()
        }

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            raise CannotTrace("its forward makes tensors of its own")
        return super().create_arg(a)


class _Child:
    """Stands for a child: it can be called, its tensors be read, and what a container has."""

    def __init__(self, tracer: _Tracer, module: torch.nn.Module, path: str) -> None:
        self._tracer, self._path = tracer, path
        prefix = f"{path}."
        self._tensors = tracer.tensors({**module._parameters, **module._buffers}, prefix)
        is_container = isinstance(module, CONTAINERS)
        self._children = tracer.children(module, prefix) if is_container else None
        self._is_dict = isinstance(module, torch.nn.ModuleDict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.create_proxy("call_module", self._path, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        for known in self._tensors, self.contained():
            if name in known:
                return known[name]
        if self._is_dict and name in ("items", "keys", "values"):
            return getattr(self._children, name)
        raise CannotTrace(f"its forward uses {self._path}.{name}")

    def contained(self) -> dict[str, Any]:
        """What is in a container."""
        return self._children or {}

    def elements(self) -> list[Any]:
        """What an iteration gives."""
        if self._children is None:
            raise CannotTrace(f"its forward uses {self._path} as a container")
        return list(self._children if self._is_dict else self._children.values())

    def __len__(self) -> int:
        return len(self.elements())

    def __bool__(self) -> bool:
        return self._children is None or bool(self._children)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements())

    def __contains__(self, name: Any) -> bool:
        return name in self.elements()

    def __getitem__(self, key: Any) -> Any:
        return self.contained()[key] if self._is_dict else self.elements()[key]


def parameters_of(module: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a forward, by name."""
    parameters = dict(inspect.signature(type(module).forward).parameters)
    parameters.pop(next(iter(parameters)))
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        raise CannotTrace("its forward takes a varying number of arguments")
    return parameters


# The code of a forward.


def attributes_read(module: torch.nn.Module) -> Attributes:
    """The attributes that a forward may read; refuse code whose graph might not stand for it."""
    forward, names = type(module).forward, set[str]()
    if is_known(forward.__module__) and forward is not torch.nn.Sequential.forward:
        raise CannotTrace("its forward is torch's own")
    functions = list(functions_called(module, forward, set()))
    for code in (code for function in functions for code in nested(function.__code__)):
        for instruction in dis.get_instructions(code):
            reason = FORBIDDEN_INSTRUCTIONS.get(instruction.opname)
            if reason:
                raise CannotTrace(f"its forward {reason}")
        forbidden = sorted(FORBIDDEN_NAMES.intersection(code.co_names))
        if forbidden:
            raise CannotTrace(f"its forward uses {', '.join(forbidden)}")
        names.update(code.co_names)
    for function in functions:
        if vars(function).keys() & names:
            raise CannotTrace(f"its forward reads attributes of {function.__name__}")
        defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
        if frozen(defaults) is NotImplemented:
            raise CannotTrace(f"{function.__name__} has a default that may change")
    names -= PLAIN_ATTRIBUTES
    of_module = attributes_of(module, names)
    of_classes = {
        (cls, name): frozen(getattr(cls, name))
        for cls in own_classes(type(module))
        for name in names
        if is_of_class(cls, name)
    }
    for name, value in (*of_module.items(), *((n, v) for (_, n), v in of_classes.items())):
        if value is NotImplemented:
            raise CannotTrace(f"its forward reads self.{name}, which may change")
    return Attributes(type(module), sorted(names), of_module, of_classes)


def own_classes(cls: type) -> Iterator[type]:
    """A module's class and its bases, apart from torch's: a forward may read attributes of each."""
    return (base for base in cls.__mro__ if not is_known(base.__module__))


def functions_called(
    module: torch.nn.Module, function: Any, seen: set[Any]
) -> Iterator[types.FunctionType]:
    """A function and those that it calls, apart from torch's."""
    is_function = isinstance(function, types.FunctionType)
    if not is_function or is_known(function.__module__) or function in seen:
        return
    seen.add(function)
    if hasattr(function, "__wrapped__"):
        raise CannotTrace(f"{function.__name__} is decorated")
    if function.__closure__ and function.__code__.co_freevars != ("__class__",):
        raise CannotTrace("its forward has variables of another function")
    yield function
    for code in nested(function.__code__):
        globals_read = {
            i.argval for i in dis.get_instructions(code) if i.opname in GLOBAL_INSTRUCTIONS
        }
        found = {n: function.__globals__[n] for n in globals_read if n in function.__globals__}
        called = [function_of_global(module, *named) for named in found.items()]
        for name in code.co_names:  # One may be that of an attribute and of a global.
            called += attributes_named(module, name)
        for other in called:
            yield from functions_called(module, other, seen)


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code and the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def attributes_named(module: torch.nn.Module, name: str) -> Iterator[Any]:
    """The functions that an attribute of a module may be: its own, a method, or a property."""
    yield vars(module).get(name)
    for cls in own_classes(type(module)):
        member = vars(cls).get(name)
        if member is not None:
            yield member.fget if isinstance(member, property) else getattr(cls, name)


def function_of_global(module: torch.nn.Module, name: str, value: Any) -> Any:
    """A global that a function reads, if it is a function; refuse one that may change."""
    if isinstance(value, types.FunctionType):
        return value
    if isinstance(value, types.ModuleType):
        kind, stays = "module", is_known(value.__name__, *TOOLS)
    elif isinstance(value, type):
        # Attributes of a class may be read. Those of the module's own classes are compared.
        known = is_known(value.__module__, *TOOLS)
        kind, stays = "class", known or isinstance(module, value) or only_names_elements(value)
    elif isinstance(value, types.BuiltinFunctionType):
        # Python's random numbers, for example, are methods of an object.
        kind, stays = "global", is_known(value.__module__, *TOOLS)
    else:
        is_tensor = isinstance(value, torch.nn.Module | torch.Tensor)
        kind, stays = "global", not is_tensor and is_known(type(value).__module__)
    if not stays:
        raise CannotTrace(f"its forward uses the {kind} {name}")
    return None


class Named(NamedTuple):
    """A named tuple with what every one has."""

    element: Any


def only_names_elements(cls: type) -> bool:
    """Tell whether a class is a named tuple without functions and attributes of its own."""
    own = vars(cls).keys() - vars(Named).keys() - set(getattr(cls, "_fields", ()))
    defaults = tuple(getattr(cls, "_field_defaults", {}).values())
    return cls.__bases__ == (tuple,) and not own and frozen(defaults) is not NotImplemented


def is_known(name: str | None, *others: str) -> bool:
    """Tell whether a module is torch's, has functions of numbers alone, or is one of others."""
    return name is not None and name.partition(".")[0] in (*KNOWN_MODULES, *others)


# What must be as it was when a forward was recorded.


def attributes_of(module: torch.nn.Module, names: Any) -> dict[str, Any]:
    """Those attributes that a module has itself, as values to compare with later ones."""
    state = module.__dict__
    return {name: frozen(state[name]) for name in names if name in state}


def is_of_class(cls: type, name: str) -> bool:
    """Tell whether a class, or a base that is not torch's, has an attribute that is no property."""
    return any(
        name in vars(base) and not isinstance(vars(base)[name], property)
        for base in own_classes(cls)
    )


def frozen(value: Any) -> Any:
    """A value to compare with later ones, NotImplemented for one whose changes do not show."""
    if isinstance(value, SEVERAL):
        items = tuple(map(frozen, value))
        return NotImplemented if any(i is NotImplemented for i in items) else (type(value), items)
    if type(value) is float:  # 0.0 and -0.0 are equal, and NaN is not even to itself.
        return float, value.hex()
    has_name = isinstance(value, CONSTANTS) and not isinstance(value, enum.Flag)  # Not A | B.
    is_constant = has_name or type(value) in NUMBERS_AND_STRINGS
    return (type(value), value) if is_constant else NotImplemented
