"""Batch normalizations that add and activate, in the forward of the module that they are in."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.torch.tracing import CannotTrace, frozen_attributes, parameters_of, trace

BATCH_NORMS = BatchNorm1d, BatchNorm2d, BatchNorm3d
RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
LEAKY_RELUS = {F.leaky_relu, F.leaky_relu_}
ADDITIONS = {operator.add, torch.add, "add", "__add__"}
ADDITIONS_IN_PLACE = {operator.iadd, "add_", "__iadd__"}
MOST_PROGRAMS = 8
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class Activation(NamedTuple):
    """What follows a batch normalization."""

    name: str
    negative_slope: float = 0.01


class Fusion(NamedTuple):
    """What a graph fuses, and why not the rest: by the paths of batch normalizations."""

    graph: fx.Graph
    attributes: dict[str, Any]  # of the module, that it holds for
    fused: dict[str, str]
    unfused: dict[str, str]
    modules: list[torch.nn.Module]  # that must not have hooks


# The graph.


def fusion_of(module: torch.nn.Module, constants: dict[str, Any]) -> Fusion:
    """The graph of a forward, with what follows a batch normalization made part of it."""
    fusion = Fusion(*trace(module, constants), {}, {}, [])
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


def fuse(module: torch.nn.Module, bn: torch.nn.Module, node: fx.Node, fusion: Fusion) -> None:
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
    moved_past = {n for n in nodes_between(node, last) if n is not addition}
    if moved_past and len(node.args[0].users) > 1:
        raise CannotTrace("its input is used until the activation")
    modules = [bn]
    if last.op == "call_module":
        modules.append(module.get_submodule(last.target))
    if any(map(has_hooks, modules)):
        raise CannotTrace("it or its activation has hooks")
    options: dict[str, Any] = {"activation": activation.name}
    if activation.name == "leaky_relu":
        options["negative_slope"] = activation.negative_slope
    if addition is not None:
        options["residual"] = residual
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


def activation_of(module: torch.nn.Module, node: fx.Node, of: fx.Node) -> Activation | None:
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


def activation_of_module(module: torch.nn.Module) -> Activation | None:
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


def has_hooks(module: torch.nn.Module) -> bool:
    """Tell whether others want to see what goes into a module and what comes out."""
    return any(getattr(module, name) for name in HOOKS)


# The program.


class Program:
    """A graph as a function, and the state of the module that it holds for."""

    def __init__(self, module: torch.nn.Module, fusion: Fusion) -> None:
        code = fusion.graph.python_code("self")
        self.source, namespace = code.src, dict(code.globals)
        name = f"<fused forward of {type(module).__name__}>"
        exec(compile(self.source, name, "exec"), namespace)
        self.run: Callable[..., Any] = namespace["forward"]
        self.fused, self.unfused, self._modules = fusion.fused, fusion.unfused, fusion.modules
        self._children = list(module._modules.values())
        self._attributes = fusion.attributes

    def holds_for(self, module: torch.nn.Module) -> bool:
        """Tell whether the forward would do the same as when it was traced."""
        children = module._modules
        return (
            len(children) == len(self._children)
            and all(a is b for a, b in zip(children.values(), self._children, strict=True))
            and self._attributes == frozen_attributes(module, self._attributes)
            and not any(map(has_hooks, self._modules))
            and all(type(m).__module__ != "torch.nn.modules.batchnorm" for m in self._modules)
            and not torch_module._has_any_global_hook()
        )


class FusedForward:
    """The forward of a module in which batch normalizations activate.

    For each kind of call, in training or not and with which constants, the forward is traced once.
    Where that cannot be done, or does not hold any more, the module's own forward runs, whose
    results are the same.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.defaults = {name: p.default for name, p in parameters_of(module).items()}
        self.programs: dict[Any, Program | str] = {}  # Or why there is none.

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"programs": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        tensors, key = self.kind_of(args, kwargs)
        program = self.programs.get(key)
        if not torch.compiler.is_compiling():
            if program is None and key is not None:
                program = self.traced(key)
            if isinstance(program, Program) and not program.holds_for(module):
                program = None
        if isinstance(program, Program):
            return program.run(module, *tensors)
        return type(module).forward(module, *args, **kwargs)

    def kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        """The tensors of a call, and what else its program depends on; None for other calls."""
        names = list(self.defaults)
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(k in given or k not in names for k in kwargs):
            return [], None
        given.update(kwargs)
        tensors, key = [], [self.module.training]
        for name in names:
            value = given.get(name, self.defaults[name])
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                key.append(torch.Tensor)
            elif value is None or isinstance(value, bool | int | float | str):
                key.append((type(value), value))
            else:
                return [], None
        return tensors, tuple(key)

    def trace_plain_calls(self) -> list[Program | str]:
        """The programs, in training and not, of calls with tensors for all that has no default."""
        kinds = [
            torch.Tensor if default is inspect.Parameter.empty else (type(default), default)
            for default in self.defaults.values()
        ]
        return [self.traced((training, *kinds)) for training in (True, False)]

    def traced(self, key: Any) -> Program | str:
        """The program for calls of a kind, or why there is none."""
        if key in self.programs or len(self.programs) == MOST_PROGRAMS:
            return self.programs.get(key, "its forward is called with too many constants")
        training, *kinds = key
        named = zip(self.defaults, kinds, strict=True)
        constants = {name: kind[1] for name, kind in named if kind is not torch.Tensor}
        was_training = self.module.training
        self.module.training = training
        try:
            fusion = fusion_of(self.module, constants)
            program: Program | str = Program(self.module, fusion)
        except CannotTrace as reason:
            program = str(reason)
        finally:
            self.module.training = was_training
        self.programs[key] = program
        return program
