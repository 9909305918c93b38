"""Batch normalizations that add and activate, in the forward of the module that they are in."""

from __future__ import annotations

import copy
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastbn.torch.forwards import NUMBERS_AND_STRINGS, Attributes, CannotTrace, frozen
from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.torch.tracing import CONTAINERS, LISTS, parameters_of, trace

Module: TypeAlias = torch.nn.Module
BATCH_NORMS = BatchNorm1d, BatchNorm2d, BatchNorm3d
# What these return is memory of their own.
MAKERS = torch.nn.modules.conv._ConvNd, torch.nn.Linear, torch.nn.modules.batchnorm._BatchNorm
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}
ADDITIONS = {operator.add, torch.add, "add", "__add__"}
ADDITIONS_IN_PLACE = {operator.iadd, "add_", "__iadd__"}
MOST_PROGRAMS = 8
TOO_MANY = "its forward is called with too many constants; pass changing numbers as tensors"


class Activation(NamedTuple):
    """What follows a batch normalization."""

    name: str
    negative_slope: float = 0.01


class Fusion(NamedTuple):
    """What a graph fuses, and why not the rest: by the paths of batch normalizations."""

    graph: fx.Graph
    attributes: Attributes  # of the module, that it holds for
    fused: dict[str, str]
    unfused: dict[str, str]
    modules: list[Module]  # that are fused


# The graph.


def fusion_of(module: Module, constants: dict[str, Any], *, training: bool) -> Fusion:
    """The graph of a forward, with what follows a batch normalization made part of it."""
    fusion = Fusion(*trace(module, constants, training=training), {}, {}, [])
    for node in list(fusion.graph.nodes):
        if node.op != "call_module":
            continue
        bn = module.get_submodule(node.target)
        if type(bn) in BATCH_NORMS:
            try:
                fuse(module, bn, node, fusion)
            except CannotTrace as reason:
                fusion.unfused[node.target] = str(reason)
    fusion.graph.lint()
    return fusion


def fuse(module: Module, bn: Module, node: fx.Node, fusion: Fusion) -> None:
    """Let a batch normalization do what follows it."""
    if len(node.args) != 1 or node.kwargs:
        raise CannotTrace("it is called with options")
    last, addition = only_user(node), None
    activation = activation_of(module, last, node)
    if activation is None:
        addition, last = last, only_user(last)
        residual = residual_of(addition, node)
        activation = activation_of(module, last, addition)
        if residual is None or activation is None:
            raise CannotTrace("no activation follows that can be fused")
        if addition.next is not last:
            raise CannotTrace("something lies between the addition and the activation")
    check_move(module, node, [n for n in nodes_between(node, last) if n is not addition])
    modules = [bn]
    if last.op == "call_module":
        modules.append(module.get_submodule(last.target))
    if any(map(is_tapped, modules)):
        raise CannotTrace("it or its activation has hooks")
    options: dict[str, Any] = {"activation": activation.name}
    if activation.name == "leaky_relu":
        options["negative_slope"] = activation.negative_slope
    if addition is not None:
        options["residual"] = residual
        if addition.target in ADDITIONS_IN_PLACE:
            options["in_place"] = True
    with fusion.graph.inserting_before(last):
        fused = fusion.graph.call_module(node.target, node.args, options)
    last.replace_all_uses_with(fused)
    for gone in (last, addition, node):
        if gone is not None:
            fusion.graph.erase_node(gone)
    fusion.fused[node.target] = "add, " * (addition is not None) + activation.name
    fusion.modules.extend(modules)


def only_user(node: fx.Node) -> fx.Node:
    """The node that has a node's output to itself."""
    if len(node.users) > 1:
        raise CannotTrace("its output is used more than once")
    user = next(iter(node.users), None)
    if user is None or user.op == "output":
        raise CannotTrace("no activation follows that can be fused")
    return user


def nodes_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes after the first one and before the last one."""
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def check_move(module: Module, node: fx.Node, past: list[fx.Node]) -> None:
    """Refuse to let a batch normalization run after these nodes, if that may change a result."""
    if not past:
        return
    x, bn = node.args[0], module.get_submodule(node.target)
    if len(x.users) > 1:
        raise CannotTrace("its input is used until the activation")
    if x.op != "call_module" or not isinstance(module.get_submodule(x.target), MAKERS):
        raise CannotTrace("its input may be changed until the activation")
    called = [module.get_submodule(n.target) for n in past if n.op == "call_module"]
    read = [n.target.rpartition(".")[0] for n in node.graph.nodes if n.op == "get_attr"]
    if any(bn in other.modules() for other in called) or any(
        module.get_submodule(path) is bn for path in read
    ):
        raise CannotTrace("it is used again until the activation")


def activation_of(module: Module, node: fx.Node, of: fx.Node) -> Activation | None:
    """The activation that a node is, of another one."""
    if not node.args or node.args[0] is not of or of in node.args[1:]:
        return None
    if node.op == "call_module":
        return activation_of_module(module.get_submodule(node.target)) if not node.kwargs else None
    options = dict(node.kwargs)
    if node.target in LEAKY_RELUS:
        slope = node.args[1] if len(node.args) > 1 else options.get("negative_slope", 0.01)
        return leaky_relu(slope)
    if node.target in RELUS or node.target is F.relu6:
        return Activation("relu6" if node.target is F.relu6 else "relu")
    return None


def activation_of_module(module: Module) -> Activation | None:
    """The activation that a module is."""
    if type(module) is torch.nn.ReLU:
        return Activation("relu")
    if type(module) is torch.nn.ReLU6:
        return Activation("relu6")
    return leaky_relu(module.negative_slope) if type(module) is torch.nn.LeakyReLU else None


def leaky_relu(slope: Any) -> Activation | None:
    """Leaky ReLU, if its result shows the sign of what was activated."""
    is_fit = isinstance(slope, float | int) and slope >= 0
    return Activation("leaky_relu", float(slope)) if is_fit else None


def residual_of(node: fx.Node, bn: fx.Node) -> fx.Node | None:
    """What a node adds to a batch normalization, if that is what it does."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    residual = second if first is bn else first
    in_place = node.target in ADDITIONS_IN_PLACE and first is bn
    if residual is bn or not isinstance(residual, fx.Node):
        return None
    return residual if in_place or node.target in ADDITIONS else None


def is_tapped(module: Module) -> bool:
    """Tell whether others see or change what goes into a module and what comes out."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


# The program.


class Program:
    """A graph as a function, and the state of the module that it holds for."""

    def __init__(self, module: Module, fusion: Fusion) -> None:
        code = fusion.graph.python_code("self")
        self.source, namespace = code.src, dict(code.globals)
        name = f"<fused forward of {type(module).__name__}>"
        exec(compile(self.source, name, "exec"), namespace)
        self.run: Callable[..., Any] = namespace["forward"]
        self.fused, self.unfused = fusion.fused, fusion.unfused
        self._forward, self._attributes = type(module).forward, fusion.attributes
        self._fused_modules = [(m, what_it_does(m)) for m in fusion.modules]
        reached = {n.target for n in fusion.graph.nodes if n.op in ("call_module", "get_attr")}
        opened = [module, *opened_containers(module, reached)]
        self._opened = [(m, list(m._modules.items()), missing_tensors(m)) for m in opened]

    def holds_for(self, module: Module) -> bool:
        """Tell whether the forward would do the same as when it was traced."""
        # Loops, which cost less than generators, since each call asks.
        for m, children, missing in self._opened:
            if list(m._modules.items()) != children or missing_tensors(m) != missing:
                return False
        for m, done in self._fused_modules:
            if what_it_does(m) != done or is_tapped(m):
                return False
        return (
            type(module).forward is self._forward
            and self._attributes.are_of(module)
            and not torch_module._has_any_global_hook()
        )


def what_it_does(module: Module) -> tuple[type, Any]:
    """What tells what a batch normalization or an activation does, apart from its parameters."""
    slope = module.__dict__.get("negative_slope")
    return type(module), None if slope is None else frozen(slope)


def opened_containers(module: Module, reached: set[Any], prefix: str = "") -> Iterator[Module]:
    """The containers whose children a forward takes one by one.

    It may call one as a whole, too: a child has one path, whichever of its names a forward uses.
    """
    for name, child in module._modules.items():
        path = prefix + name
        if isinstance(child, CONTAINERS) and (
            isinstance(child, LISTS)
            or path not in reached
            or any(target.startswith(f"{path}.") for target in reached)
        ):
            yield child
            yield from opened_containers(child, reached, f"{path}.")


def missing_tensors(module: Module) -> list[str]:
    """The parameters and buffers that a module does without."""
    if not module._parameters and not module._buffers:
        return []
    tensors = *module._parameters.items(), *module._buffers.items()
    return [name for name, tensor in tensors if tensor is None]


def is_constant(value: Any) -> bool:
    """Tell whether an argument is one for which a forward may be traced, as it is."""
    if type(value) is tuple:
        return all(map(is_constant, value))
    return type(value) in NUMBERS_AND_STRINGS


class FusedForward:
    """The forward of a module in which batch normalizations activate.

    For each kind of call, in training or not and with which constants, the forward is traced once.
    Where that cannot be done, or does not hold any more, the module's own forward runs, whose
    results are the same.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.defaults = {name: p.default for name, p in parameters_of(module).items()}
        for name, default in self.defaults.items():
            if default is not inspect.Parameter.empty and not is_constant(default):
                raise CannotTrace(f"its forward has a default for {name} that is no constant")
        self.programs: dict[Any, Program | str] = {}  # Or why there is none.
        self.had_too_many = False  # kinds of calls, so that some had no program

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"programs": {}, "had_too_many": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    @property
    def __code__(self) -> types.CodeType:
        """That of the module's own forward, which torch.export asks for."""
        code: types.CodeType = type(self.module).forward.__code__
        return code

    @property
    def __globals__(self) -> dict[str, Any]:
        """There are none; torch.jit.script asks for them, to compile the source of a function."""
        raise AttributeError(
            "a fused forward is no function: restore the model before torch.jit.script"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        tensors, constants, key = self.kind_of(args, kwargs)
        program = self.programs.get(key)
        if program is None and key is not None and not torch.compiler.is_compiling():
            program = self.traced(key, constants)
        if isinstance(program, Program) and program.holds_for(module):
            return program.run(module, *tensors)
        return type(module).forward(module, *args, **kwargs)

    def kind_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any], Any]:
        """The tensors and the constants of a call, and what its program depends on.

        That is None for calls with other arguments.
        """
        if kwargs:
            given = dict(zip(self.defaults, args, strict=False))
            if any(name in given or name not in self.defaults for name in kwargs):
                return [], {}, None
            args = tuple((self.defaults | given | kwargs).values())
        elif len(args) < len(self.defaults):
            args = *args, *list(self.defaults.values())[len(args) :]
        if len(args) > len(self.defaults):
            return [], {}, None
        tensors, constants, key = [], {}, [self.module.training]
        for name, value in zip(self.defaults, args, strict=True):
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                key.append(torch.Tensor)
            elif is_constant(value):
                constants[name] = value
                key.append(frozen(value))
            else:
                return [], {}, None
        return tensors, constants, tuple(key)

    def trace_plain_calls(self) -> list[Program | str]:
        """The programs, in training and not, of calls with tensors for all that has no default."""
        constants = {n: d for n, d in self.defaults.items() if d is not inspect.Parameter.empty}
        kinds = [
            frozen(constants[name]) if name in constants else torch.Tensor for name in self.defaults
        ]
        return [self.traced((training, *kinds), constants) for training in (True, False)]

    def traced(self, key: Any, constants: dict[str, Any]) -> Program | str:
        """The program for calls of a kind, or why there is none."""
        if key in self.programs:
            return self.programs[key]
        if len(self.programs) == MOST_PROGRAMS:
            self.had_too_many = True
            return TOO_MANY
        try:
            fusion = fusion_of(self.module, constants, training=key[0])
            program: Program | str = Program(self.module, fusion)
        except CannotTrace as reason:
            program = str(reason)
        self.programs[key] = program
        return program
