"""oneDNN, through onednn.c, in the layout that it does best in."""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

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

PACKAGES = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")

Dims = ctypes.c_int64 * 4


class Library(library.Library):
    """The primitives of oneDNN, bound to buffers."""

    api = "dnnl_primitive_execute, called from C; running statistics are not updated"
    buffers = "preallocated: another array, or the input"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.packages = {name: metadata.version(name) for name in PACKAGES}
        headers, libraries = Path(sys.prefix, "include"), Path(sys.prefix, "lib")
        self.c = native.load(
            "onednn.c", f"-I{headers}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ldnnl"
        )
        self.c.array_bytes.restype = ctypes.c_size_t
        self.c.norm_create.restype = ctypes.c_void_p
        self.c.norm_implementation.restype = ctypes.c_char_p
        self.c.norm_execute.argtypes = [ctypes.c_void_p, ctypes.c_long]
        # Primitives with the arrays they are bound to.
        self.norms: list[tuple[ctypes.c_void_p, list[Array | None]]] = []

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
        vectors: list[Array | None] = [data.mean, data.var, data.weight, data.bias]
        if case.forward:  # A training forward writes them.
            vectors[:2] = data.running_mean.copy(), data.running_var.copy()
        gradients = np.zeros((2, case.shape[1]), np.float32)
        if case.forward:
            kind = EVAL if case.evaluation else TRAIN
            arrays = [given, out, None, None, *vectors, None, None]
        else:
            kind = BACKWARD
            vectors[-1] = None
            arrays = [self.arranged(data.x, layout), None, out, given, *vectors, *gradients]
        norm = self.create(kind, layout, arrays)

        def result(_: object) -> dict[str, Array]:
            plain = np.zeros_like(data.x)
            self.reorder(out, layout, plain, LAYOUTS["nchw"])
            names = ("y",) if case.forward else ("dx", "dweight", "dbias")
            return dict(zip(names, (plain, *gradients), strict=False))

        def repeat(count: int) -> None:
            require(self.c.norm_execute(norm, count) == 0, "oneDNN failed")

        restore = partial(overwrite, given, pristine) if case.in_place else None
        note = self.c.norm_implementation(norm).decode()
        require(not note.startswith("ref"), f"only its reference implementation for {variant}")
        return PreparedCall(partial(repeat, 1), result, True, restore, repeat, note=note)

    def arranged(self, plain: Array, layout: int) -> Array:
        """A copy in oneDNN's layout, as a flat array; blocks of channels are padded."""
        size = self.c.array_bytes(self.dims, self.dtype, layout) // plain.itemsize
        array = new_array((size,), plain.dtype)
        self.reorder(plain, LAYOUTS["nchw"], array, layout)
        return array

    def reorder(self, source: Array, source_layout: int, target: Array, layout: int) -> None:
        pointers = pointer(source), pointer(target)
        status = self.c.reorder(
            self.dims, self.dtype, source_layout, pointers[0], layout, pointers[1]
        )
        require(status == 0, "oneDNN cannot reorder")

    def create(self, kind: int, layout: int, arrays: list[Array | None]) -> ctypes.c_void_p:
        """A primitive on arrays, which live as long as it does."""
        buffers = (ctypes.c_void_p * len(arrays))(*map(pointer, arrays))
        eps = ctypes.c_float(EPS)
        norm = self.c.norm_create(kind, self.dims, self.dtype, layout, eps, buffers)
        require(norm is not None, "oneDNN has no primitive for this")
        self.norms.append((ctypes.c_void_p(norm), arrays))
        return self.norms[-1][0]

    def release(self) -> None:
        while self.norms:
            self.c.norm_destroy(self.norms.pop()[0])


def pointer(array: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
