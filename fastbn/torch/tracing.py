"""The forward of a module as a graph, whose nodes are calls of its children and of functions.

torch.fx records what one run of a forward does with tensors. That stands for all runs only if the
rest of the forward gives the same each time: `forwards` refuses code in which it may not, and the
stand-ins for tensors and children refuse what they cannot tell.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastbn.torch.forwards import Attributes, CannotTrace, attributes_of, attributes_read

# A stand-in is there even if the attribute is None.
MAY_BE_NONE = {"grad", "grad_fn", "_base", "names", "_backward_hooks"}
LISTS = torch.nn.ModuleList, torch.nn.ModuleDict
CONTAINERS = (*LISTS, torch.nn.Sequential)


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
    """Records operators in place as such, which would be lost, and does not pass for a value."""

    def __getattr__(self, name: str) -> fx.Proxy:
        if name in MAY_BE_NONE:
            raise CannotTrace(f"its forward uses {name} of a tensor")
        return _Attribute(self, name)

    def refuse(self, *_: Any) -> Any:
        raise CannotTrace("its forward makes a string or a key of a tensor")

    __hash__ = __str__ = __repr__ = __format__ = refuse


class _Attribute(_Proxy, fx.proxy.Attribute):
    """What an attribute of a tensor is."""


def in_place(operation: Any) -> Any:
    """The method of an operator in place."""

    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


for _name in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
):
    setattr(_Proxy, f"__{_name}__", in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Records a forward that runs on stand-ins for a module and its children.

    So nothing is changed, of the module or of torch, and other threads may run both meanwhile.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.root, self.graph = module, fx.Graph()
        self.stand_ins: dict[torch.nn.Module, _Child] = {}

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
            name: None if child is None else self.stand_in(child, prefix + name)
            for name, child in module._modules.items()
        }

    def stand_in(self, child: torch.nn.Module, path: str) -> _Child:
        """What stands for a child; the same for each of its names."""
        if child not in self.stand_ins:
            self.stand_ins[child] = _Child(self, child, path)
        return self.stand_ins[child]

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
        self._is_true = not any(hasattr(type(module), n) for n in ("__bool__", "__len__"))

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
        if self._children is None and not self._is_true:
            raise CannotTrace(f"its forward asks whether {self._path} is true")
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
