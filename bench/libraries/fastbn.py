"""fastbn, as its users call it."""

from __future__ import annotations

from functools import partial

import numpy as np
from _selfbench.sampling import Repeat

import fastbn
from bench import library
from bench.arrays import Array, in_layout, new_array, overwrite
from bench.calls import SHAPE, STEP, arrays, statement
from bench.cases import ACTIVATIONS, EPS, GROUPS, MOMENTUM, PRODUCTS, Case, Data
from bench.library import PreparedCall
from fastbn import functional

PARAMETERS = ("weight", "bias", "running_mean", "running_var")
# What is called on small arrays, by operation.
STATEMENTS = {
    "BatchNorm2d": {
        "eval": "evaluating(x, out=y)",
        "train": "layer(x, out=y)",
        "train_inplace": "layer(inout, out=inout)",
        STEP: "layer(x, out=y); layer.backward(dy, out=dx)",
    },
    **{
        f"BatchNorm2d with {activation}": {
            "eval": f"{activation}_eval(x, out=y)",
            "train": f"{activation}(x, out=y)",
            "train_inplace": f"{activation}(inout, out=inout)",
            STEP: f"{activation}(x, out=y); {activation}.backward(dy, out=dx)",
        }
        for activation in ACTIVATIONS
    },
    "BatchNorm2d with a residual and relu": {
        "eval": "relu_eval(x, out=y, residual=r)",
        "train": "relu(x, out=y, residual=r)",
        "train_inplace": "relu(inout, out=inout, residual=r)",
        STEP: "relu(x, out=y, residual=r); relu.backward(dy, out=dx, residual_out=dr)",
    },
    "F.batch_norm": {
        "eval": "F.batch_norm(x, running_mean, running_var, weight, bias, out=y)",
        "train": "F.batch_norm(x, running_mean, running_var, weight, bias, True, out=y)",
        "train_inplace": (
            "F.batch_norm(inout, running_mean, running_var, weight, bias, True, out=inout)"
        ),
    },
    "F.batch_norm_forward, F.batch_norm_backward": {
        "train": "_, mean, invstd = F.batch_norm_forward(x, weight, bias, out=y)",
        "train_inplace": "_, mean, invstd = F.batch_norm_forward(inout, weight, bias, out=inout)",
        STEP: (
            "_, mean, invstd = F.batch_norm_forward(x, weight, bias, out=y); "
            "F.batch_norm_backward(dy, x, weight, mean, invstd, out=dx)"
        ),
    },
}


class Library(library.Library):
    """fastbn in both memory layouts."""

    api = (
        "fastbn.BatchNorm2d (forward), fastbn.functional.batch_norm_backward (backward), "
        "fastbn.GroupNorm; its backward, and that of a BatchNorm2d with a residual, are those of "
        "the layers, before which what the forward saved is put back"
    )
    buffers = "preallocated: out= another array, or the input; a new array where it is said"
    activations, groups = tuple(ACTIVATIONS), True

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if threads != fastbn.get_num_threads():  # which a user seldom sets
            fastbn.set_num_threads(threads)

    def versions(self) -> dict[str, str]:
        config = fastbn.show_config("dicts")
        isas = ", ".join(config["instruction_sets"])
        return {
            "fastbn": fastbn.__version__,
            "numpy": np.__version__,
            "compiler": config["compiler"],
            "instruction set": f"{config['instruction_set']} (of {isas})",
        }

    def variants(self, case: Case) -> list[str]:
        only = case.in_place or case.fresh or case.operation in PRODUCTS
        return ["nchw"] if only else ["nchw", "nhwc"]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        if case.step:
            return step_in_place(case, data)
        if case.forward:
            return self._forward(case, variant, data)
        prepare = backward_of_layer if case.has_residual or case.grouped else backward
        return prepare(case, variant, data)

    def calls(self) -> dict[str, dict[str, Repeat]]:
        layer = fastbn.BatchNorm2d(SHAPE[1])
        names = {
            **arrays("x", "y", "r", "dy", "dx", "dr", "inout"),
            # No copies: Python takes longer to read the attributes of an object that was copied.
            **{name: fastbn.BatchNorm2d(SHAPE[1], activation=name) for name in ACTIVATIONS},
            **{
                f"{name}_eval": fastbn.BatchNorm2d(SHAPE[1], activation=name).eval()
                for name in ACTIVATIONS
            },
            **{name: getattr(layer, name).copy() for name in PARAMETERS},
            "layer": layer,
            "evaluating": fastbn.BatchNorm2d(SHAPE[1]).eval(),
            "F": functional,
        }
        return {
            call: {operation: statement(code, names) for operation, code in statements.items()}
            for call, statements in STATEMENTS.items()
        }

    def _forward(self, case: Case, variant: str, data: Data) -> PreparedCall:
        layer = layer_of(case, data, **activation_of(case))
        x = in_layout(data.x, variant)
        if case.fresh:
            return PreparedCall(partial(layer, x), lambda y: {"y": y}, False)
        if not case.in_place:
            out = new_array(case.shape, x.dtype, variant)
            call = partial(layer, x, out=out, **added(case, variant, data))
            return PreparedCall(call, lambda y: {"y": y}, True)
        return PreparedCall(
            partial(layer, x, out=x),
            lambda y: {"y": y},
            True,
            restore=partial(overwrite, x, in_layout(data.x, variant)),
        )


def activation_of(case: Case) -> dict[str, str]:
    """The options of a layer or function, of which there are none without an activation."""
    return {"activation": case.activation} if case.activated else {}


def layer_of(case: Case, data: Data, **options: str) -> fastbn.BatchNorm2d | fastbn.GroupNorm:
    """A layer with the parameters and statistics of the data."""
    channels, dtype = case.shape[1], data.weight.dtype
    if case.grouped:
        layer = fastbn.GroupNorm(GROUPS, channels, eps=EPS, dtype=dtype)
    else:
        layer = fastbn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM, dtype=dtype, **options)
    for name in PARAMETERS:
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = getattr(data, name)
    return layer.train(not case.evaluation)


def step_in_place(case: Case, data: Data) -> PreparedCall:
    """A forward that overwrites its input, and a backward that overwrites dy."""
    layer = layer_of(case, data, **activation_of(case))
    x, dy = in_layout(data.x, "nchw"), in_layout(data.dy, "nchw")

    def call() -> None:
        layer(x, out=x)
        layer.zero_grad().backward(dy, out=dy)

    def restore() -> None:
        overwrite(x, data.x)
        overwrite(dy, data.dy)

    def result(_: None) -> dict[str, Array]:
        return {"y": x, "dx": dy, "dweight": layer.weight_grad, "dbias": layer.bias_grad}

    return PreparedCall(call, result, True, restore=restore)


def backward(case: Case, variant: str, data: Data) -> PreparedCall:
    """The function under a layer's backward; the layer's own would need a forward before each."""
    gate = {**activation_of(case), "bias": data.bias} if case.activated else {}
    x, dy = in_layout(data.x, variant), in_layout(data.dy, variant)
    _, mean, invstd = functional.batch_norm_forward(x, data.weight, data.bias, EPS)
    out = None if case.fresh else dy if case.in_place else new_array(case.shape, dy.dtype, variant)
    prepared = PreparedCall(
        partial(functional.batch_norm_backward, dy, x, data.weight, mean, invstd, out=out, **gate),
        lambda result: dict(zip(("dx", "dweight", "dbias"), result, strict=True)),
        not case.fresh,
    )
    if case.in_place:
        prepared.restore = partial(overwrite, dy, in_layout(data.dy, variant))
    return prepared


def backward_of_layer(case: Case, variant: str, data: Data) -> PreparedCall:
    """The layer's own, where there is no function, or none that has a bit of every element."""
    layer = layer_of(case, data, **activation_of(case))
    x, dy = in_layout(data.x, variant), in_layout(data.dy, variant)
    outs = {"out": new_array(case.shape, dy.dtype, variant)}
    if case.has_residual:
        outs["residual_out"] = new_array(case.shape, dy.dtype, variant)
    layer(x, **added(case, variant, data))
    saved = layer._saved

    def call() -> None:
        layer._saved = saved  # which serves once
        layer.zero_grad().backward(dy, **outs)

    def result(_: None) -> dict[str, Array]:
        names = {"out": "dx", "residual_out": "dresidual"}
        gradients = {"dweight": layer.weight_grad, "dbias": layer.bias_grad}
        return {**{names[name]: out for name, out in outs.items()}, **gradients}

    return PreparedCall(call, result, True)


def added(case: Case, variant: str, data: Data) -> dict[str, Array]:
    """The residual of a layer's forward, if it has one."""
    return {"residual": in_layout(data.residual, variant)} if case.has_residual else {}
