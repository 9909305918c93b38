"""fastbn, as its users call it."""

from __future__ import annotations

from functools import partial

import numpy as np

import fastbn
from bench import library
from bench.cases import CALL, EPS, MOMENTUM, Case, Data
from bench.library import PreparedCall, in_layout, overwrite
from fastbn import functional

PARAMETERS = ("weight", "bias", "running_mean", "running_var")


class Library(library.Library):
    """fastbn in both memory layouts."""

    api = "fastbn.BatchNorm2d (forward), fastbn.functional.batch_norm_backward (backward)"
    buffers = "preallocated: out= another array, or the input"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
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
        return ["nchw"] if case.in_place or case.operation == CALL else ["nchw", "nhwc"]

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        return self._forward(case, variant, data) if case.forward else backward(case, variant, data)

    def _forward(self, case: Case, variant: str, data: Data) -> PreparedCall:
        layer = layer_of(case, data)
        x = in_layout(data.x, variant)
        if case.operation == CALL:
            return PreparedCall(partial(layer, x), lambda y: {"y": y}, False)
        if not case.in_place:
            return PreparedCall(partial(layer, x, out=np.zeros_like(x)), lambda y: {"y": y}, True)
        return PreparedCall(
            partial(layer, x, out=x),
            lambda y: {"y": y},
            True,
            restore=partial(overwrite, x, in_layout(data.x, variant)),
        )


def layer_of(case: Case, data: Data) -> fastbn.BatchNorm2d:
    """A layer with the parameters and statistics of the data."""
    layer = fastbn.BatchNorm2d(case.shape[1], eps=EPS, momentum=MOMENTUM, dtype=data.weight.dtype)
    for name in PARAMETERS:
        getattr(layer, name)[...] = getattr(data, name)
    return layer.train(not case.evaluation)


def backward(case: Case, variant: str, data: Data) -> PreparedCall:
    """The function under a layer's backward; the layer's own would need a forward before each."""
    x, dy = in_layout(data.x, variant), in_layout(data.dy, variant)
    _, mean, invstd = functional.batch_norm_forward(x, data.weight, data.bias, EPS)
    out = dy if case.in_place else np.zeros_like(dy)
    prepared = PreparedCall(
        partial(functional.batch_norm_backward, dy, x, data.weight, mean, invstd, out=out),
        lambda result: dict(zip(("dx", "dweight", "dbias"), result, strict=True)),
        True,
    )
    if case.in_place:
        prepared.restore = partial(overwrite, dy, in_layout(data.dy, variant))
    return prepared
