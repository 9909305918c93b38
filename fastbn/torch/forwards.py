"""Which forwards a graph stands for, as their code and the attributes that they read tell.

A graph has what one run of a forward does with tensors. Code that may do something else in another
run is refused, and so are attributes whose changes do not show.
"""

from __future__ import annotations

import dis
import enum
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# What a graph would keep as it was when it was recorded, or leave out.
FORBIDDEN_NAMES = {
    *("isinstance", "issubclass", "type", "hasattr", "getattr", "setattr", "callable", "vars"),
    *("input", "open", "eval", "exec", "globals", "locals", "id", "__dict__", "__class__"),
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
    **dict.fromkeys(("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR"), "sets elements"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "sets globals"),
    "IMPORT_NAME": "imports",
    "PUSH_EXC_INFO": "has a try statement",
    "MATCH_CLASS": "asks for types",
}
# torch's functions of such names tell, or set, what a graph does not have: whether something is a
# tensor, a mode, a seed, a number of threads. That a forward is scripted stays as it is.
OF_STATE = (
    *("is_", "are_", "has_", "get_", "set_", "use_", "in_", "_is_", "_has_", "_get_", "_set_"),
    *("seed", "initial_seed", "manual_seed", "typename", "barrier"),
)
STAYS = {"is_scripting"}
# What `is` may be asked for: None and, before any(... for ...) from Python 3.14 on, builtins.
ASKED = {"None", "tuple", "list", "set", "frozenset", repr(all), repr(any)}
GLOBAL_INSTRUCTIONS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
KNOWN_MODULES = ("torch", "math", "operator")
# Their functions and classes do the same each time; what these have made may not.
TOOLS = ("functools", "_functools", "itertools")
FUNCTIONS = types.FunctionType, types.BuiltinFunctionType, type
# Of these types and of no others that derive from them: a program has its constants as their repr,
# which may need a name that it does not know, as np.float64's does.
NUMBERS_AND_STRINGS = {type(None), bool, int, float, str}
CONSTANTS = (torch.dtype, torch.device, enum.Enum, *FUNCTIONS)
SEVERAL = tuple, list, frozenset
PLAIN_ATTRIBUTES = set(vars(torch.nn.Module())) | {"forward"}
# What a forward does with its module does not call methods of these names.
NOT_OPERATORS = {
    *("__init__", "__new__", "__init_subclass__", "__repr__", "__dir__", "__setattr__"),
    *("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__"),
    *("__del__", "__delattr__", "__hash__", "__str__", "__call__"),
    *("__annotate__", "__annotate_func__"),  # from Python 3.14 on
}


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


def attributes_read(module: torch.nn.Module) -> Attributes:
    """The attributes that a forward may read; refuse code whose graph might not stand for it."""
    forward, names = type(module).forward, set[str]()
    if is_known(forward.__module__) and forward is not torch.nn.Sequential.forward:
        raise CannotTrace("its forward is torch's own")
    seen = set[Any]()
    functions = [
        called
        for function in (forward, *operators_of(type(module)))
        for called in functions_called(module, function, seen)
    ]
    for code in (code for function in functions for code in nested(function.__code__)):
        refuse_instructions(code)
        forbidden = sorted(FORBIDDEN_NAMES.intersection(code.co_names))
        if forbidden:
            raise CannotTrace(f"its forward uses {', '.join(forbidden)}")
        names.update(code.co_names)
    for function in functions:
        if vars(function).keys() & names:
            raise CannotTrace(f"its forward reads attributes of {function.__name__}")
        if frozen(defaults_of(function)) is NotImplemented:
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


def refuse_instructions(code: types.CodeType) -> None:
    """Refuse those that a graph does not show; `is`, too, unless it is asked for None."""
    before: Any = None
    for instruction in dis.get_instructions(code):
        reason = FORBIDDEN_INSTRUCTIONS.get(instruction.opname)
        if instruction.opname == "IS_OP" and not (
            before.opname in ("LOAD_CONST", "LOAD_COMMON_CONSTANT") and before.argrepr in ASKED
        ):
            reason = "asks which object something is"
        if reason:
            raise CannotTrace(f"its forward {reason}")
        before = instruction


def refuse_state(function: types.FunctionType, code: types.CodeType) -> None:
    """Refuse functions of torch's that tell or set what a graph does not have."""
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in GLOBAL_INSTRUCTIONS:
            value = function.__globals__.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            is_module = isinstance(value, types.ModuleType)
            value = getattr(value, instruction.argval, None) if is_module else None
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG"):
            value = None
        refuse_function_of_state(value)


def refuse_function_of_state(value: Any) -> None:
    """Refuse one of these functions."""
    name = getattr(value, "__name__", "") if isinstance(value, FUNCTIONS[:2]) else ""
    known = is_known(getattr(value, "__module__", None) or "torch")
    forbidden = name in FORBIDDEN_NAMES or (name.startswith(OF_STATE) and name not in STAYS)
    if known and forbidden:
        raise CannotTrace(f"its forward uses {name}")


def operators_of(cls: type) -> Iterator[Any]:
    """The methods of a module's classes that operators call, and reads of attributes."""
    for base in own_classes(cls):
        for name, member in vars(base).items():
            if name.startswith("__") and name.endswith("__") and name not in NOT_OPERATORS:
                yield member


def own_classes(cls: type) -> Iterator[type]:
    """A module's class and its bases, apart from torch's: a forward may read attributes of each."""
    return (base for base in cls.__mro__ if not is_known(base.__module__))


def functions_called(
    module: torch.nn.Module, function: Any, seen: set[Any]
) -> Iterator[types.FunctionType]:
    """A function and those that it calls, apart from torch's."""
    refuse_function_of_state(function)
    is_function = isinstance(function, types.FunctionType)
    if not is_function or is_known(function.__module__) or function in seen:
        return
    seen.add(function)
    if hasattr(function, "__wrapped__"):
        raise CannotTrace(f"{function.__name__} is decorated")
    if function.__closure__ and function.__code__.co_freevars != ("__class__",):
        raise CannotTrace("its forward has variables of another function")
    yield function
    for other in functions_in(defaults_of(function)):
        yield from functions_called(module, other, seen)
    for code in nested(function.__code__):
        refuse_state(function, code)
        globals_read = {
            i.argval for i in dis.get_instructions(code) if i.opname in GLOBAL_INSTRUCTIONS
        }
        found = {n: function.__globals__[n] for n in globals_read if n in function.__globals__}
        called = [function_of_global(module, *named) for named in found.items()]
        for name in code.co_names:  # One may be that of an attribute and of a global.
            called += attributes_named(module, name)
        for other in called:
            yield from functions_called(module, other, seen)


def defaults_of(function: types.FunctionType) -> tuple[Any, ...]:
    """The defaults of a function's arguments."""
    return *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()


def nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code and the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def attributes_named(module: torch.nn.Module, name: str) -> Iterator[Any]:
    """The functions that an attribute of a module may be: its own, a method, or a property."""
    yield from functions_in(vars(module).get(name))
    for cls in own_classes(type(module)):
        member = vars(cls).get(name)
        if member is not None:
            is_property = isinstance(member, property)
            yield from functions_in(member.fget if is_property else getattr(cls, name))


def functions_in(value: Any) -> Iterator[Any]:
    """A value, or what is in it."""
    if isinstance(value, SEVERAL):
        for item in value:
            yield from functions_in(item)
    else:
        yield value


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
    if not does_the_same(value):
        return NotImplemented
    has_name = isinstance(value, CONSTANTS) and not isinstance(value, enum.Flag)  # Not A | B.
    is_constant = has_name or type(value) in NUMBERS_AND_STRINGS
    return (type(value), value) if is_constant else NotImplemented


def does_the_same(value: Any) -> bool:
    """Tell whether a value has no attributes and methods of its own, whose results may change."""
    if isinstance(value, type):
        return is_known(value.__module__, "builtins", *TOOLS)
    if isinstance(value, enum.Enum):
        known = "builtins", "enum"
        bases = (base for base in type(value).__mro__ if base.__module__ not in known)
        own = (member for base in bases for member in vars(base).values())
        methods: tuple[type, ...] = (types.FunctionType, staticmethod, classmethod, property)
        return frozen(value.value) is not NotImplemented and not any(
            isinstance(m, methods) and getattr(m, "__module__", None) != "enum" for m in own
        )
    return True
