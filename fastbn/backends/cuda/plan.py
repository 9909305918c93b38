"""Plans: which kernels compute a result, in how many blocks of how many threads.

A plan depends on the shape, the layout and the device alone, and so do the bits of sums. In this
folder a block is one of CUDA's, and a piece is as much of a channel, or of the rows of a matrix, as
a block sums into one partial sum.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from fastbn.backends.cuda.arrays import Array
from fastbn.backends.cuda.launch import FORMATS, ITEMSIZES, CompiledFor, Launch, kernel

# The kernels that read a channel once, those that read a strip of channels once, and those that
# follow where it is read twice.
RESIDENT = {"moments": "forward_resident", "products": "backward_resident"}
RESIDENT_STRIP = {"moments": "forward_of_strip", "products": "backward_of_strip"}
ELEMENT_WISE = {"moments": "normalize", "products": "differentiate"}
# How many arrays a block keeps a part of.
ARRAYS = {"moments": 1, "products": 2}
# How much a block should keep of a channel, so that some blocks fit a multiprocessor: while one
# waits for memory, another computes. More, so that two fit, spares a cluster, or a larger one than
# two blocks, its waiting. Few blocks are divided down to the third number. With more than the last,
# a block is alone on its multiprocessor: then a forward had better read twice, but not a backward,
# which reads two arrays.
RESIDENT_BYTES, RESIDENT_BYTES_OF_FEW_BLOCKS, RESIDENT_BYTES_MIN = 56 << 10, 106 << 10, 32 << 10
RESIDENT_BYTES_MAX = {"moments": 110 << 10, "products": 256 << 10}
# How much of that a thread takes at most; less while multiprocessors have fewer threads than that.
BYTES_OF_THREAD, BYTES_OF_SPARE_THREAD, THREADS_OF_MULTIPROCESSOR = 256, 100, 1024
# Strips of columns that stay on chip: their chunks, the wider the better; the blocks that share one
# and the rows at most, beyond which waiting for each other takes longer than reading twice; and of
# the multiprocessors the part that is to be busy, whether a block is small or large.
STRIPS, STRIP_CLUSTER_MAX, STRIP_ROWS_MAX = (4, 2), 4, 8192
STRIP_BYTES, BUSY_WITH_SMALL, BUSY_WITH_LARGE = 106 << 10, 0.48, 0.9
# Shorter runs would leave most of a chunk unused, which only small arrays can afford.
RUN_MIN = 8
SMALL_BYTES = 1 << 20
# The threads of a block that walks memory, the chunks that each of them takes of a piece of a
# channel, and the doubles of a partial sum.
THREADS = 256
CHUNKS_OF_PIECE = 16
DOUBLES = {"moments": 3, "products": 2}
PIECES_MAX = 4096
# As in the source: the chunks of a strip of columns for sums, and for elements where a chunk can
# meet several channels; the rows that a thread has in flight in both.
STRIP, STRIP_MIXED, STRIP_TILE, AHEAD = 8, 32, 8, 4
# The rows that a thread sums around one pivot at most.
ROWS_MAX = 256
# Blocks for each multiprocessor, so that all are busy to the end.
BLOCKS_OF_ELEMENTS = 16
# As many blocks as a multiprocessor has at once, where sums of columns are computed.
BLOCKS_OF_COLUMNS = 2
# Where a thread has at most the second number of chunks to compute, all blocks had better be on
# their multiprocessors at once.
BLOCKS_AT_ONCE, SHORT = 4, 16


class Geometry(NamedTuple):
    """All that a plan depends on: n samples of c channels of s elements each.

    `row_layout` tells that the s elements are a run; channels-last arrays have s = 1. `masked`
    tells that not all positions may be valid, `in_batches` that there are more such arrays.
    """

    format: int
    n: int
    c: int
    s: int
    row_layout: bool
    device: int
    masked: bool
    in_batches: bool

    @property
    def vector(self) -> int:
        """The elements of a chunk of 16 bytes."""
        return 16 // ITEMSIZES[self.format]

    @property
    def compiled_for(self) -> CompiledFor:
        return CompiledFor(self.format, self.device, self.masked, self.in_batches)

    @property
    def size(self) -> int:
        return self.n * self.c * self.s

    @property
    def per_channel(self) -> float:
        """The elements of a channel."""
        return float(self.n * self.s)


def geometry(x: Array, mask: Array | None, *, in_batches: bool = False) -> Geometry:
    """An array that is packed, as the kernels see it."""
    n, c, *image = x.shape
    s, row_layout = math.prod(image), x.flags.c_contiguous
    if not row_layout:
        n, s = n * s, 1
    compiled_for = x.data.device_id, mask is not None, in_batches
    return Geometry(FORMATS[x.dtype.char], n, c, s, row_layout, *compiled_for)


class Device(NamedTuple):
    """What plans need to know of a device."""

    multiprocessors: int
    shared_bytes: int  # that a block can have
    clusters: tuple[int, ...]  # of how many blocks clusters can be


@functools.lru_cache(None)
def device_of(index: int) -> Device:
    """The device with a number."""
    device = cupy.cuda.Device(index)
    # Some of it is declared in the source, and some is the system's.
    shared_bytes = device.attributes["MaxSharedMemoryPerBlockOptin"] - 4096
    clusters = (1, 2, 4, 8, 16) if int(device.compute_capability) >= 90 else (1,)
    return Device(device.attributes["MultiProcessorCount"], shared_bytes, clusters)


# Sums of channels.


class Reduction(NamedTuple):
    """How the sums of all channels are computed: in one launch, or in pieces that are merged."""

    resident: Launch | None
    reduce: Launch | None
    merge: Launch | None
    partials: int

    def __call__(self, **arguments: Any) -> None:
        if self.resident is not None:
            self.resident(**arguments)
            return
        assert self.reduce is not None
        assert self.merge is not None
        batches = arguments.get("batches", 0)
        partials = cupy.ndarray((self.partials * max(batches, 1),), np.float64)
        pieces = {"partials": partials, "partials_size": self.partials}
        self.reduce(**arguments, **pieces)
        self.merge(**arguments, **pieces)


@functools.lru_cache(4096)
def reduction_of(kind: str, g: Geometry) -> Reduction:
    """The plan for the sums of a kind: moments or products."""
    resident = (resident_of(kind, g) if g.row_layout else None) or strip_of(kind, g)
    if resident is not None:
        return Reduction(resident, None, None, 0)
    if g.row_layout and g.s >= RUN_MIN:
        return reduction_of_runs(kind, g)
    return reduction_of_columns(kind, g)


def resident_of(kind: str, g: Geometry) -> Launch | None:
    """A launch in which channels stay on chip, each shared by a cluster of blocks, if they fit."""
    device = device_of(g.device)
    chunks = chunks_of_run(g)
    if g.s < RUN_MIN and 16 * g.n * g.c * chunks > SMALL_BYTES:
        return None
    for cluster in device.clusters:
        slots = g.n * chunks // cluster + 1
        nbytes = 16 * ARRAYS[kind] * slots
        few = 2 * g.c * cluster < device.multiprocessors and nbytes > RESIDENT_BYTES_MIN
        enough = RESIDENT_BYTES_OF_FEW_BLOCKS if cluster <= 2 else RESIDENT_BYTES
        if nbytes <= enough and not few:
            break
    if nbytes > min(device.shared_bytes, RESIDENT_BYTES_MAX[kind]):
        return None
    threads = threads_of(nbytes, g.c * cluster, device)
    function = kernel(RESIDENT[kind], g.compiled_for, cluster, device.shared_bytes)
    return Launch(function, g.c * cluster, threads, nbytes, numbers_of_runs(g, threads, 1))


def threads_of(nbytes: int, blocks: int, device: Device) -> int:
    """The threads of each block, of so many that keep so many bytes."""
    threads, spare = 32, THREADS_OF_MULTIPROCESSOR * device.multiprocessors // blocks
    while threads < 512 and (
        nbytes > threads * BYTES_OF_THREAD
        or (nbytes > threads * BYTES_OF_SPARE_THREAD and 2 * threads <= spare)
    ):
        threads *= 2
    return threads


def strip_of(kind: str, g: Geometry) -> Launch | None:
    """A launch in which strips of columns stay on chip, where every column is a channel."""
    device = device_of(g.device)
    if g.s != 1 or g.c % g.vector or g.n > STRIP_ROWS_MAX or g.masked:
        return None
    for strip, cluster in itertools.product(STRIPS, device.clusters):
        blocks = ceil_div(g.c, strip * g.vector) * cluster
        kept = 16 * strip * (g.n // cluster + 1)  # bytes of an array
        threads = max(threads_of(ARRAYS[kind] * kept, blocks, device), strip * g.vector)
        nbytes = ARRAYS[kind] * kept + sums_of_strip(g, strip, threads)
        busy = BUSY_WITH_SMALL if kept <= STRIP_BYTES else BUSY_WITH_LARGE
        fits = nbytes <= device.shared_bytes and cluster <= min(g.n, STRIP_CLUSTER_MAX)
        if fits and busy * device.multiprocessors <= blocks <= device.multiprocessors:
            function = kernel(RESIDENT_STRIP[kind], g.compiled_for, cluster, device.shared_bytes)
            numbers = (g.n, g.c, 1, g.size, 1, strip, 0, 0, g.c, g.n)
            return Launch(function, blocks, threads, nbytes, numbers)
    return None


def sums_of_strip(g: Geometry, strip: int, threads: int) -> int:
    """The bytes in which warps exchange two sums of each column, and a first one."""
    return threads // 32 * strip * g.vector * (16 + max(ITEMSIZES[g.format], 4))


def reduction_of_runs(kind: str, g: Geometry) -> Reduction:
    """Pieces of channels, and their merging as columns of one element."""
    chunks = g.n * chunks_of_run(g)
    splits = min(ceil_div(chunks, THREADS * CHUNKS_OF_PIECE), PIECES_MAX)
    function = kernel(f"{kind}_of_runs", g.compiled_for)
    reduce = Launch(function, g.c * splits, THREADS, 0, numbers_of_runs(g, THREADS, splits))
    merge = merge_of(kind, g, reduce.numbers)
    return Reduction(None, reduce, merge, splits * g.c * DOUBLES[kind])


def reduction_of_columns(kind: str, g: Geometry) -> Reduction:
    """Strips of columns, cut into pieces, and their merging."""
    width, height = folded(g, STRIP)
    strips = ceil_div(width, STRIP * g.vector)
    wanted = max(BLOCKS_OF_COLUMNS * device_of(g.device).multiprocessors // strips, 1)
    lanes = THREADS // STRIP
    splits = min(wanted, ceil_div(height, STRIP_TILE * lanes))
    splits = max(splits, ceil_div(height, ROWS_MAX * lanes))
    numbers = numbers_of_columns(g, splits, width, height)
    function = kernel(f"{kind}_of_columns", g.compiled_for)
    reduce = Launch(function, strips * splits, THREADS, 0, numbers)
    return Reduction(None, reduce, merge_of(kind, g, numbers), splits * width * DOUBLES[kind])


def merge_of(kind: str, g: Geometry, numbers: tuple[int, ...]) -> Launch:
    """A launch in which a block for each channel merges its pieces."""
    return Launch(kernel(f"merge_{kind}", g.compiled_for), g.c, THREADS, 0, numbers)


# Elements.


@functools.lru_cache(4096)
def element_wise(name: str, g: Geometry) -> Launch:
    """The plan for a result that is computed element by element."""
    mixed = g.s % g.vector != 0
    strip = STRIP_MIXED if mixed else THREADS
    width, height = folded(g, strip)
    strips = ceil_div(width, strip * g.vector)
    multiprocessors, rows = device_of(g.device).multiprocessors, AHEAD * (THREADS // strip)
    at_once = BLOCKS_AT_ONCE * multiprocessors
    if strips * height <= at_once * SHORT * (THREADS // strip):
        rounds = ceil_div(height, rows * max(at_once // strips, 1))
    else:
        wanted = ceil_div(BLOCKS_OF_ELEMENTS * multiprocessors, strips)
        rounds = max(height // (rows * wanted), 1)
    splits = ceil_div(height, rows * rounds)
    if mixed:
        name += "_mixed"
    numbers = numbers_of_columns(g, splits, width, height)
    return Launch(kernel(name, g.compiled_for), strips * splits, THREADS, 0, numbers)


@functools.lru_cache(4096)
def follower(g: Geometry) -> Launch:
    """A launch in which a thread for each channel moves its running statistics by each batch."""
    numbers = numbers_of_columns(g, 0, 0, 0)
    return Launch(kernel("follow", g.compiled_for), ceil_div(g.c, THREADS), THREADS, 0, numbers)


# Both.


class Fused(NamedTuple):
    """Sums of all channels and, with them, an output: in one launch where channels stay on chip."""

    reduction: Reduction
    element_wise: Launch | None  # None where the reduction writes the output

    def __call__(self, out: Array, results: dict[str, Array], **given: Any) -> None:
        """Fill the results, which are named as where they are given again, and the output."""
        written = {f"{name}_out": result for name, result in results.items()}
        if self.element_wise is None:
            self.reduction(**given, **written, out=out)
        else:
            self.reduction(**given, **written)
            self.element_wise(**given, **results, out=out)


@functools.lru_cache(4096)
def fused(kind: str, g: Geometry) -> Fused:
    """The plan for the sums of a kind, and for the output that is made of them."""
    reduction = reduction_of(kind, g)
    resident = reduction.resident is not None
    return Fused(reduction, None if resident else element_wise(ELEMENT_WISE[kind], g))


# What the source is told of a geometry.


def chunks_of_run(g: Geometry) -> int:
    """The chunks that a run can touch."""
    v = g.vector
    return g.s // v if g.s % v == 0 else (g.s + v - 2) // v + 1


def numbers_of_runs(g: Geometry, threads: int, splits: int) -> tuple[int, ...]:
    """The source's numbers for the row layout, where a thread walks runs."""
    chunks = chunks_of_run(g)
    samples, rest = divmod(threads, chunks)
    return (g.n, g.c, g.s, g.size, splits, chunks, samples * g.c * g.s, rest, 0, 0)


def numbers_of_columns(g: Geometry, splits: int, width: int, height: int) -> tuple[int, ...]:
    """The source's numbers for an array that is walked as a matrix of columns."""
    return (g.n, g.c, g.s, g.size, splits, 0, 0, 0, width, height)


def folded(g: Geometry, chunks: int) -> tuple[int, int]:
    """Width and height of the matrix of columns: a row is whole chunks, at least so many."""
    width = g.c * g.s
    fold = g.vector // math.gcd(width, g.vector)
    fold *= ceil_div(chunks * g.vector, width * fold)
    return width * fold, ceil_div(g.n, fold)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
