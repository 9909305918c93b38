"""oneDNN, through onednn.c, in the layout that it does best in."""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench import library, native
from bench.arrays import Array, in_layout, new_array, overwrite
from bench.cases import EPS, Case, Data
from bench.library import PreparedCall, require

# The numbers by which onednn.c knows them.
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
# The blocked ones are those of AVX-512 and of AVX2.
LAYOUTS = {"nchw": 0, "nhwc": 1, "nChw16c": 2, "nChw8c": 3}
EVAL, TRAIN, BACKWARD = range(3)
ALONE, RELU, ADD_RELU = range(3)
# In the order of onednn.c.
ARGUMENTS = (
    *("SRC", "DST", "DIFF_SRC", "DIFF_DST", "SRC_1", "DIFF_SRC_1"),
    *("MEAN", "VARIANCE", "SCALE", "SHIFT", "DIFF_SCALE", "DIFF_SHIFT", "WORKSPACE"),
)
# The results of x's shape.
WHOLE = ("y", "dx", "dresidual")
# By the names of arguments.
Buffers = dict[str, Array]

PACKAGES = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")

Dims = ctypes.c_int64 * 4


class Library(library.Library):
    """The primitives of oneDNN, bound to buffers."""

    api = "dnnl_primitive_execute, called from C; running statistics are not updated"
    buffers = "preallocated: another array, or the input"
    activations = ("relu",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.packages = {name: metadata.version(name) for name in PACKAGES}
        headers, libraries = Path(sys.prefix, "include"), Path(sys.prefix, "lib")
        self.c = native.load(
            "onednn.c", f"-I{headers}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ldnnl"
        )
        self.c.array_bytes.restype = self.c.workspace_bytes.restype = ctypes.c_size_t
        self.c.norm_create.restype = ctypes.c_void_p
        self.c.norm_implementation.restype = ctypes.c_char_p
        self.c.norm_execute.argtypes = [ctypes.c_void_p, ctypes.c_long]
        # Primitives with the arrays they are bound to.
        self.norms: list[tuple[ctypes.c_void_p, Buffers]] = []

    def versions(self) -> dict[str, str]:
        return self.packages

    def variants(self, case: Case) -> list[str]:
        require(case.dtype in DTYPES, f"no {case.dtype} in its batch normalization")
        require(not case.fresh, "it is given the memory of its results")
        return list(LAYOUTS)

    def prepare(self, case: Case, variant: str, data: Data) -> PreparedCall:
        self.dims, self.dtype, layout = Dims(*case.shape), DTYPES[case.dtype], LAYOUTS[variant]
        given = self.arranged(data.x if case.forward else data.dy, layout)
        pristine = in_layout(given) if case.in_place else None
        out = given if case.in_place else new_array(given.shape, given.dtype)
        self.fusion = ADD_RELU if case.has_residual else RELU if case.activated else ALONE
        if case.forward:
            kind, results = EVAL if case.evaluation else TRAIN, {"y": out}
            buffers = {"SRC": given, "DST": out, **self.read_by_forward(case, layout, data)}
        else:
            kind = BACKWARD
            dweight, dbias = np.zeros((2, case.shape[1]), np.float32)
            results = {"dx": out, "dweight": dweight, "dbias": dbias}
            buffers = {"DIFF_DST": given, "DIFF_SRC": out, "DIFF_SCALE": dweight}
            buffers |= {"DIFF_SHIFT": dbias, **self.left_by_forward(case, layout, data)}
            if case.has_residual:
                buffers["DIFF_SRC_1"] = results["dresidual"] = new_array(given.shape, given.dtype)
        norm = self.create(kind, layout, buffers)

        def result(_: object) -> dict[str, Array]:
            return {
                name: self.plain(value, layout, data) if name in WHOLE else value
                for name, value in results.items()
            }

        def repeat(count: int) -> None:
            require(self.c.norm_execute(norm, count) == 0, "oneDNN failed")

        restore = partial(overwrite, given, pristine) if case.in_place else None
        note = self.c.norm_implementation(norm).decode()
        return PreparedCall(partial(repeat, 1), result, True, restore, repeat, note=note)

    def read_by_forward(self, case: Case, layout: int, data: Data) -> Buffers:
        """What a forward reads beside x, and what it keeps."""
        buffers = {"SCALE": data.weight, "SHIFT": data.bias}
        # A training forward writes the statistics.
        buffers |= {"MEAN": data.running_mean.copy(), "VARIANCE": data.running_var.copy()}
        if case.has_residual:
            buffers["SRC_1"] = self.arranged(data.residual, layout)
        if case.activated and not case.evaluation:
            size = self.c.workspace_bytes(*self.described(layout))
            buffers["WORKSPACE"] = new_array((size,), np.uint8)
        return buffers

    def left_by_forward(self, case: Case, layout: int, data: Data) -> Buffers:
        """What a backward has of a forward; with a ReLU also a workspace."""
        x = self.arranged(data.x, layout)
        left = {"SRC": x, "MEAN": data.mean, "VARIANCE": data.var, "SCALE": data.weight}
        if case.activated:
            forward = {"DST": np.empty_like(x), **self.read_by_forward(case, layout, data)}
            norm = self.create(TRAIN, layout, {"SRC": x, **forward})
            require(self.c.norm_execute(norm, 1) == 0, "oneDNN failed")
            left["WORKSPACE"] = forward["WORKSPACE"]
        return left

    def arranged(self, plain: Array, layout: int) -> Array:
        """A copy in oneDNN's layout, as a flat array; blocks of channels are padded."""
        size = self.c.array_bytes(self.dims, self.dtype, layout) // plain.itemsize
        array = new_array((size,), plain.dtype)
        self.reorder(plain, LAYOUTS["nchw"], array, layout)
        return array

    def plain(self, array: Array, layout: int, data: Data) -> Array:
        """The NCHW array of one in oneDNN's layout."""
        plain = np.zeros_like(data.x)
        self.reorder(array, layout, plain, LAYOUTS["nchw"])
        return plain

    def reorder(self, source: Array, source_layout: int, target: Array, layout: int) -> None:
        pointers = pointer(source), pointer(target)
        status = self.c.reorder(
            self.dims, self.dtype, source_layout, pointers[0], layout, pointers[1]
        )
        require(status == 0, "oneDNN cannot reorder")

    def described(self, layout: int) -> tuple[Any, ...]:
        """What onednn.c is told about a batch normalization."""
        return self.fusion, self.dims, self.dtype, layout, ctypes.c_float(EPS)

    def create(self, kind: int, layout: int, buffers: Buffers) -> ctypes.c_void_p:
        """A primitive on buffers, which live as long as it does."""
        pointers = [pointer(buffers.get(name)) for name in ARGUMENTS]
        pointers = (ctypes.c_void_p * len(ARGUMENTS))(*pointers)
        norm = self.c.norm_create(kind, *self.described(layout), pointers)
        require(norm is not None, "oneDNN has no primitive for this")
        norm = ctypes.c_void_p(norm)
        self.norms.append((norm, buffers))
        is_reference = self.c.norm_implementation(norm).startswith(b"ref")
        variant = list(LAYOUTS)[layout]
        require(not is_reference, f"only its reference implementation for {variant}")
        return norm

    def release(self) -> None:
        while self.norms:
            self.c.norm_destroy(self.norms.pop()[0])


def pointer(array: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
