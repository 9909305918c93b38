"""Put fastbn's modules into a model, take them out again, and tell what was done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fastbn._scalars import full_name
from fastbn.layers.state import LayerState
from fastbn.torch import modules
from fastbn.torch.forwards import CannotTrace
from fastbn.torch.fusion import TOO_MANY, FusedForward, Program
from fastbn.torch.tracing import LISTS

OURS = {
    torch.nn.BatchNorm1d: modules.BatchNorm1d,
    torch.nn.BatchNorm2d: modules.BatchNorm2d,
    torch.nn.BatchNorm3d: modules.BatchNorm3d,
}
TORCHS = {ours: theirs for theirs, ours in OURS.items()}
KEPT = "_vectors", "_left_to_torch"


def look_for_timm() -> None:
    """Know timm's batch normalization that activates, if the process has loaded timm."""
    if hasattr(sys.modules.get("timm.layers"), "BatchNormAct2d"):
        from fastbn.torch import timm

        OURS[timm.THEIRS] = timm.BatchNormAct2d
        TORCHS[timm.BatchNormAct2d] = timm.THEIRS


@dataclass
class Report:
    """What `accelerate` has done to a model, by the names of its batch normalizations.

    Attributes
    ----------
    replaced : list of str
        Those that fastbn normalizes.
    fused : dict of str to str
        Those of them that do what follows as well, and what that is: "relu", "add, relu"; "its own
        relu" of a `BatchNormAct2d`, fastbn's or timm's.
    unfused : dict of str to str
        The others of them, with the reason.
    left : dict of str to str
        Those that are as they were, with the reason.
    fallbacks : dict of str to dict
        How many calls torch's implementation has taken, by the reason.
    """

    replaced: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.fused)} of them fused"]
        lines += [f"{name}: fused with {what}" for name, what in self.fused.items()]
        lines += [f"{name}: not fused, {why}" for name, why in self.unfused.items()]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        for name, reasons in self.fallbacks.items():
            lines += [f"{name}: {n} calls by torch, {why}" for why, n in reasons.items()]
        return "\n".join(lines)


def accelerate(model: torch.nn.Module, fuse: bool = True) -> torch.nn.Module:
    """Let fastbn do the batch normalizations of a model, where it lies.

    Every ``torch.nn.BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d`` becomes fastbn's module of
    that name. It is the same object: parameters, buffers, hooks and names stay, and so optimizers
    and state dicts go on working. So does ``timm.layers.BatchNormAct2d``. Other subclasses,
    ``SyncBatchNorm`` and modules on other devices are left alone. Accelerate a model before
    ``torch.compile`` compiles it.

    With `fuse`, a batch normalization also does the ReLU, ReLU6 or LeakyReLU that follows it, and
    an addition in between. They are found in ``Sequential`` and, by ``torch.fx``, in the forward of
    every module, which runs as a program without them from then on. A forward that a graph might
    not stand for is left alone, as are batch normalizations and activations with hooks.

    A shallow copy of a module with such a program (``copy.copy``, a replica of ``DataParallel``)
    goes on with the program, and the attributes, of the module of which it is a copy. Accelerate
    the copy as well, or restore the model first. ``copy.deepcopy`` and pickles need no such care.

    Parameters
    ----------
    model : torch.nn.Module
        It is changed.
    fuse : bool, default True
        Whether to fuse with what follows.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If the model is not a Module.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import accelerate, report
    >>> conv, bn, relu = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    >>> model = accelerate(torch.nn.Sequential(conv, bn, relu))
    >>> print(report(model))
    1 replaced, 1 of them fused
    1: fused with relu
    """
    check_model(model)
    look_for_timm()
    for module in model.modules():
        if type(module) in OURS and not why_left(module):
            module.__class__ = OURS[type(module)]
    if fuse:
        for _, module in owners(model):
            remove_program(module)
            if "forward" not in vars(module):
                fuse_in(module)
    return model


def fuse_in(module: torch.nn.Module) -> None:
    """Let a module's batch normalizations do what follows them in its forward."""
    try:
        forward = FusedForward(module)
    except CannotTrace:
        return
    programs = forward.trace_plain_calls()
    if any(isinstance(program, Program) and program.fused for program in programs):
        module.forward = forward


def remove_program(module: torch.nn.Module) -> None:
    """Give a module back the forward of its class, if `fuse_in` has put another in its place."""
    if isinstance(vars(module).get("forward"), FusedForward):
        del module.forward


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `accelerate`.

    Tools that look for torch's very classes need that: ``torch.jit.script``, and those that fuse
    batch normalizations with convolutions, for quantization for example. Some of the latter leave
    fastbn's modules as they are without a word.

    Parameters
    ----------
    model : torch.nn.Module
        It is changed: its batch normalizations are torch's, and the forward of every module is its
        own. A `BatchNormAct2d` stays.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If the model is not a Module.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import accelerate, restore
    >>> bn = torch.nn.BatchNorm2d(8)
    >>> type(restore(accelerate(bn))) is torch.nn.BatchNorm2d
    True
    """
    check_model(model)
    look_for_timm()
    for module in model.modules():
        remove_program(module)
        if type(module) in TORCHS:
            module.__class__ = TORCHS[type(module)]
            for name in KEPT:
                vars(module).pop(name, None)
    return model


def report(model: torch.nn.Module) -> Report:
    """Tell which batch normalizations of a model are fastbn's, and why others are not.

    Parameters
    ----------
    model : torch.nn.Module
        One that `accelerate` was given, or any other.

    Returns
    -------
    Report
        It prints as a list.

    Raises
    ------
    TypeError
        If the model is not a Module.

    Examples
    --------
    >>> import torch
    >>> from fastbn.torch import accelerate, report
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.SyncBatchNorm(8))
    >>> report(accelerate(model)).left
    {'1': 'a SyncBatchNorm'}
    """
    check_model(model)
    look_for_timm()
    result = Report()
    for name, module in model.named_modules():
        if isinstance(module, modules._BatchNorm):
            result.replaced.append(name)
            fallbacks = vars(module).get("_left_to_torch")
            if fallbacks:
                result.fallbacks[name] = dict(fallbacks)
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            result.left[name] = why_left(module) or "not accelerated"
    for name, module in owners(model):
        note_fusions(result, name, module)
    for name in result.replaced:
        module = model.get_submodule(name)
        own = module._own_activation()
        if own:
            result.fused[name] = f"its own {own}"
        if name in result.fused:
            result.unfused.pop(name, None)
        elif type(module) in TORCHS:
            result.unfused.setdefault(name, "no activation follows that can be fused")
        elif not isinstance(module, modules.BatchNormAct2d):
            result.unfused.setdefault(name, f"a {type(module).__name__}")
        else:
            result.unfused[name] = "it has no activation"
    return result


def note_fusions(result: Report, name: str, owner: torch.nn.Module) -> None:
    """Add what is fused in the forward of a module that has batch normalizations, and what not."""
    prefix = f"{name}." if name else ""
    forward = vars(owner).get("forward")
    try:
        programs = (forward or FusedForward(owner)).trace_plain_calls()
        if forward and forward.module is not owner:
            whose = "the module of which it is a copy"
            programs = [f"it runs the forward of {whose}; accelerate it as well"]
    except AttributeError:
        programs = ["its module's forward is replaced already"]
    except CannotTrace as reason:
        programs = [str(reason)]
    for program in programs:
        if isinstance(program, str):
            unfused = dict.fromkeys(paths_in(owner), program)
        elif not program.holds_for(owner):
            unfused = dict.fromkeys(program.fused, "its module has changed since; accelerate again")
        elif forward is None:
            unfused = program.unfused | dict.fromkeys(program.fused, "accelerated without fusing")
        elif forward.had_too_many:
            unfused = program.unfused | dict.fromkeys(program.fused, TOO_MANY)
        else:
            unfused = program.unfused
            result.fused |= {prefix + path: what for path, what in program.fused.items()}
        result.unfused |= {prefix + path: why for path, why in unfused.items()}


def owners(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that have batch normalizations which fastbn does, and their names."""
    for name, module in model.named_modules():
        if not isinstance(module, LISTS) and any(paths_in(module)):
            yield name, module


def paths_in(module: torch.nn.Module) -> Iterator[str]:
    """The batch normalizations that a module has for itself, perhaps in lists."""
    for name, child in module.named_children():
        if type(child) in TORCHS:
            yield name
        elif isinstance(child, LISTS):
            yield from (f"{name}.{path}" for path in paths_in(child))


def why_left(module: torch.nn.Module) -> str:
    """Why a batch normalization is not replaced; empty if it can be."""
    if type(module) not in OURS:
        return f"a {type(module).__name__}"
    tensors = *module.parameters(recurse=False), *module.buffers(recurse=False)
    devices = sorted({str(t.device) for t in tensors if t.device.type != "cpu"})
    return f"on {', '.join(devices)}" if devices else ""


def check_model(model: torch.nn.Module) -> None:
    """Refuse what is no module."""
    if not isinstance(model, torch.nn.Module):
        is_class = isinstance(model, type)
        what = f"the class {full_name(model)}" if is_class else full_name(type(model))
        hint = ""
        if isinstance(model, LayerState):
            hint = "; fastbn's layers take NumPy arrays, and those of fastbn.torch tensors"
        raise TypeError(f"the model must be a torch.nn.Module, got {what}{hint}")
