# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""The loops over channels: how the work is cut, who does which piece, and how pieces merge.

What a piece is depends on the shape alone, and pieces merge in a fixed order, so the result has the
same bits for every number of threads.

The functions trust their caller: arrays have the right shapes, dtypes and layouts.
"""

import os

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memset


cdef extern from "_kernels.h" nogil:
    enum:
        LANES "FASTBN_LANES"
        COLUMNS "FASTBN_COLUMNS"

    ctypedef struct Sums "fastbn_sums":
        double first[LANES]
        double second[LANES]

    # What reducing a block of a channel gives: its two sums, or its mean and m2.
    ctypedef struct Pair "fastbn_pair":
        double first, second

    ctypedef struct Affine "fastbn_affine":
        double centre, scale, shift

    ctypedef struct Gradient "fastbn_gradient":
        double dy_mean, x_mean, slope, scale

    ctypedef struct Ahead "fastbn_ahead":
        Py_ssize_t near, border, jump

    ctypedef struct Kernels "fastbn_kernels":
        double (*element)(const void *x, Py_ssize_t i) noexcept nogil
        void (*moments)(const void *x, Py_ssize_t rows, Py_ssize_t len, Ahead ahead,
                        const double *pivot, Sums *sums) noexcept nogil
        void (*products)(const void *dy, const void *x, Py_ssize_t rows, Py_ssize_t len,
                         Ahead ahead, const double *mean, Sums *sums) noexcept nogil
        void (*normalize)(const void *x, void *y, Py_ssize_t rows, Py_ssize_t len,
                          Ahead ahead, const Affine *affine, int stream) noexcept nogil
        void (*gradient)(const void *dy, const void *x, void *dx, Py_ssize_t rows, Py_ssize_t len,
                         Ahead ahead, const Gradient *gradient, int stream) noexcept nogil
        void (*column_moments)(const void *x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t len,
                               const double *pivot, double *first,
                               double *second) noexcept nogil
        void (*column_products)(const void *dy, const void *x, Py_ssize_t rows, Py_ssize_t stride,
                                Py_ssize_t len, const double *mean, double *first,
                                double *second) noexcept nogil
        void (*column_normalize)(const void *x, void *y, Py_ssize_t rows, Py_ssize_t stride,
                                 Py_ssize_t len, const Affine *affine, int stream) noexcept nogil
        void (*column_gradient)(const void *dy, const void *x, void *dx, Py_ssize_t rows,
                                Py_ssize_t stride, Py_ssize_t len, const Gradient *gradient,
                                int stream) noexcept nogil
        void (*collapse)(const Sums *sums, Py_ssize_t rows, Pair *pairs) noexcept nogil
        void (*end_streaming)() noexcept nogil

    ctypedef struct Isa "fastbn_isa":
        const char *name
        Kernels float32, float64, float16, bfloat16


cdef extern from "_platform.h" nogil:
    int fastbn_supported_isas(const Isa **isas, int room)
    int fastbn_omp_max_threads()
    bint fastbn_omp_pause()
    const char *fastbn_compiler()
    const char *fastbn_openmp()


cdef extern from *:
    """
    #include <string.h>

    /* The array interface protocol of NumPy, version 3: its C side. */
    typedef struct {
        int two, nd;
        char typekind;
        int itemsize, flags;
        Py_intptr_t *shape, *strides;
        char *data;
        PyObject *descr;
    } fastbn_array_struct;

    static inline double fastbn_read_float(const char *p)
    {
        float value;
        memcpy(&value, p, sizeof value);
        return value;
    }

    static inline double fastbn_read_double(const char *p)
    {
        double value;
        memcpy(&value, p, sizeof value);
        return value;
    }
    """
    ctypedef struct ArrayStruct "fastbn_array_struct":
        int nd
        char typekind
        int itemsize, flags
        Py_ssize_t *shape
        Py_ssize_t *strides
        char *data

    double read_float "fastbn_read_float"(const char *p) noexcept nogil
    double read_double "fastbn_read_double"(const char *p) noexcept nogil


# ------------------------------------------------------------------ the instruction set in use

cdef const Isa *isa_in_use


isa_names = []


cdef void choose_isa() except *:
    """Take the best instruction set there is, or the one that FASTBN_ISA names."""
    global isa_in_use
    cdef const Isa *isas[8]
    cdef int count = fastbn_supported_isas(isas, 8)
    for i in range(count):
        isa_names.append(isas[i].name.decode())
    wanted = os.environ.get("FASTBN_ISA") or isa_names[-1]
    if wanted not in isa_names:
        raise ImportError(
            f"FASTBN_ISA is {wanted!r}, but this build on this machine has {', '.join(isa_names)}"
        )
    isa_in_use = isas[<int>isa_names.index(wanted)]


choose_isa()


def platform():
    """The compiler, the OpenMP runtime and the instruction sets, for show_config."""
    return {
        "compiler": fastbn_compiler().decode(),
        "openmp": fastbn_openmp().decode(),
        "isa": isa_in_use.name.decode(),
        "isas": tuple(isa_names),
    }


def omp_max_threads():
    """The threads that the OpenMP runtime would start."""
    return fastbn_omp_max_threads()


def omp_pause():
    """End the threads that OpenMP keeps idle for this one; tell whether that could be done."""
    return fastbn_omp_pause()


# ------------------------------------------------------------------ how the work is cut
#
# An array is n samples of c channels of s elements each, in one of two layouts.
#
# Rows: a channel of a sample is one run of memory. Short runs of neighbouring channels are walked
# together, as a group.
#
# Columns: memory is seen as a matrix whose columns belong to a channel each: s neighbouring ones
# to the first channel, s to the next, and so on. Channels-last arrays are such matrices, of one
# column per channel, and so are NCHW arrays of few elements per channel and sample. If the matrix
# is narrow, a few of its rows are folded into one. Columns are walked in strips, as a group.

cdef enum:
    # Elements of a channel that are summed before they merge: few enough for the rounding of the
    # sums not to matter in float64, enough for the merge to cost nothing.
    ROW_BLOCK = 32768
    # Rows of a matrix that are summed before they merge; more where there are many.
    COLUMN_BLOCK = 512
    COLUMN_BLOCKS_MAX = 256
    # A group of channels that is walked twice should stay in a cache of the second level, but its
    # runs should not be much shorter than a page. One that is walked once may have long runs.
    GROUP_BYTES = 524288
    RUN_BYTES = 3072
    LONG_RUN_BYTES = 65536
    # Memory is prefetched when it is so many bytes away, of all inputs.
    AHEAD_BYTES = 8192
    # As many channels have room for their sums on the stack.
    GROUP_MAX = 64
    # Shorter runs are taken for columns.
    ROW_MIN = 16
    # Rows of less than LANES columns are folded, this many into one.
    FOLD = 16
    # From so many bytes on an output is stored around the cache, if its runs are so many long.
    STREAM_BYTES = 4194304
    STREAM_RUN_BYTES = 1024
    # Below this many bytes a thread brings a few microseconds at best, and costs milliseconds where
    # another process has its CPU.
    BYTES_PER_THREAD = 262144


cdef struct Cut:
    bint columns
    Py_ssize_t n, c, s
    Py_ssize_t group, groups      # channels that are walked together, and how many times
    Py_ssize_t rows, blocks       # samples, or rows of the matrix, of a block; blocks of a channel
    Py_ssize_t length, pieces     # rows: elements of a run in a block; blocks along s
    Py_ssize_t fold               # columns: rows of the matrix in a folded one
    Py_ssize_t width              # columns: of a folded row
    Py_ssize_t rest               # columns: rows that are left over, in the last block


cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void cut_rows(Cut *cut) noexcept nogil:
    cdef Py_ssize_t s = cut.s
    cut.fold = 1
    cut.group = 1
    cut.rows = max(ROW_BLOCK // max(s, 1), 1)
    # Pieces of whole steps, of nearly the same length.
    cut.length = max(ceil_div(ceil_div(s, max(ceil_div(s, ROW_BLOCK), 1)), LANES) * LANES, LANES)
    cut.pieces = ceil_div(s, cut.length)
    cut.blocks = ceil_div(cut.n, cut.rows) * cut.pieces


cdef void group_rows(Cut *cut, Py_ssize_t itemsize, int inputs, bint reduces,
                     int threads) noexcept nogil:
    """Choose how many channels are walked together, which no result depends on."""
    cdef Py_ssize_t run = max(cut.s * itemsize, 1)
    if reduces:
        cut.group = max(GROUP_BYTES // max(cut.n * run * inputs, 1), RUN_BYTES // run)
        cut.group = min(cut.group, GROUP_MAX)
    else:
        cut.group = min(LONG_RUN_BYTES // run, COLUMNS)
    # Enough groups for all threads to be busy to the end.
    cut.group = max(min(cut.group, cut.c // (4 * threads)), 1)
    if cut.pieces > 1:  # a piece of a channel does not end where the next channel begins
        cut.group = 1
    cut.groups = ceil_div(cut.c, cut.group)


cdef void cut_columns(Cut *cut) noexcept nogil:
    cdef Py_ssize_t width = cut.c * cut.s, height, strips
    cut.columns = True
    cut.fold = 1 if width >= LANES else FOLD
    cut.width = width * cut.fold
    height = cut.n // cut.fold
    cut.rest = cut.n % cut.fold
    # Strips of nearly the same width, in whole steps.
    strips = max(ceil_div(width, COLUMNS), 1)
    cut.group = min(ceil_div(ceil_div(cut.c, strips), LANES) * LANES, COLUMNS // max(cut.s, 1))
    cut.group = max(cut.group, 1)
    cut.rows = max(COLUMN_BLOCK, ceil_div(height, COLUMN_BLOCKS_MAX))
    cut.blocks = 0 if cut.n * cut.s == 0 else max(ceil_div(height, cut.rows), 1)
    cut.length = cut.s
    cut.pieces = 1


cdef Cut cut_work(Py_ssize_t n, Py_ssize_t c, Py_ssize_t s, bint channels_last) noexcept nogil:
    cdef Cut cut
    memset(&cut, 0, sizeof(Cut))
    if channels_last:
        n, s = n * s, 1
    cut.n, cut.c, cut.s = n, c, s
    if channels_last or s < ROW_MIN:
        cut_columns(&cut)
    else:
        cut_rows(&cut)
    cut.groups = ceil_div(c, cut.group)
    return cut


# A block of a group: the channels [c0, c1) of the samples, or folded rows, [n0, n1); of them the
# elements [s0, s0 + length), or all columns and `rest` more rows of the matrix.
cdef struct Block:
    Py_ssize_t n0, n1, c0, c1, s0, length, rest
    double count                  # the elements of a channel


cdef Block block_of(const Cut *cut, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef Block block
    block.c0 = g * cut.group
    block.c1 = min(block.c0 + cut.group, cut.c)
    block.n0 = b // max(cut.pieces, 1) * cut.rows
    block.n1 = min(block.n0 + cut.rows, cut.n // cut.fold)
    block.s0 = b % max(cut.pieces, 1) * cut.length
    block.length = min(cut.length, cut.s - block.s0)
    block.rest = 0
    if cut.columns and b == cut.blocks - 1:
        block.rest = cut.rest
    block.count = <double>(((block.n1 - block.n0) * cut.fold + block.rest) * block.length)
    return block


# ------------------------------------------------------------------ a job and its three steps

# A job reduces every block of every group to partial sums, merges those of each channel, and
# applies the outcome to every block. A step that a job does not have is NULL.
ctypedef void (*BlockStep)(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil
ctypedef void (*GroupStep)(const Job *job, Py_ssize_t g) noexcept nogil

# How the layout's kernels are called: sums of a block around a centre for each channel, and the
# element-wise kernel of a block.
ctypedef void (*BlockSum)(const Job *job, const Block *block, double *centre,
                          Pair *sums) noexcept nogil
ctypedef void (*BlockWrite)(const Job *job, const Block *block) noexcept nogil

# One value per channel, of any of the four dtypes, alignments and strides.
cdef struct Vector:
    const char *data              # NULL stands for a vector of one and the same value
    Py_ssize_t stride, itemsize
    const Kernels *kernels
    double value

cdef struct Job:
    Cut cut
    Py_ssize_t itemsize
    const Kernels *kernels
    BlockStep reduce
    GroupStep merge
    BlockWrite apply
    BlockSum sum
    bint refine                   # whether a pivot must be near the mean
    bint stream                   # whether to store around the cache
    Pair *partial                 # of (c, blocks)
    const char *dy
    const char *x
    char *out
    Vector weight, bias, mean, invstd
    Vector var                    # instead of invstd, if it has data
    Vector sum_dy, sum_dy_xhat
    double *mean_out
    double *m2_out
    double *invstd_out
    double *sum_dy_out
    double *sum_dy_xhat_out
    double eps
    double count


cdef double at(const Vector *vector, Py_ssize_t c) noexcept nogil:
    """The value of a channel."""
    cdef const char *p = vector.data + c * vector.stride
    if vector.data == NULL:
        return vector.value
    if vector.itemsize == 8:
        return read_double(p)
    if vector.itemsize == 4:
        return read_float(p)
    return vector.kernels.element(p, 0)


cdef double invstd_of(const Job *job, Py_ssize_t c) noexcept nogil:
    if job.var.data != NULL:
        return 1.0 / sqrt(at(&job.var, c) + job.eps)
    return at(&job.invstd, c)


cdef void reduce_moments(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """Mean and m2 of a block: sums of deviations from a pivot, and of their squares.

    With any element h of the block as the pivot, (h - mean)^2 <= m2, so that subtracting
    (sum of deviations)^2 / count loses no more than a factor of count of the precision. Of a
    double's 53 bits enough remain for a narrower x; for float64 the first round finds a pivot
    near the mean, and a second one sums around that: the corrected two-pass algorithm.
    """
    cdef Pair sums[COLUMNS]
    cdef double pivot[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t c, channels = block.c1 - block.c0
    cdef Pair *partial
    cdef double mean_deviation
    for c in range(channels):
        pivot[c] = job.kernels.element(job.x, first_element(job, &block, c))
    job.sum(job, &block, pivot, sums)
    if job.refine:
        for c in range(channels):
            pivot[c] += sums[c].first / block.count
        job.sum(job, &block, pivot, sums)
    for c in range(channels):
        partial = job.partial + (block.c0 + c) * job.cut.blocks + b
        mean_deviation = sums[c].first / block.count
        partial.first = pivot[c] + mean_deviation
        # Rounding can take a variance of nearly zero below it.
        partial.second = max(sums[c].second - sums[c].first * mean_deviation, 0.0)


cdef void merge_moments(const Job *job, Py_ssize_t g) noexcept nogil:
    """Merge the blocks of each channel in their order, by Chan's formula."""
    cdef Py_ssize_t b, c, blocks = job.cut.blocks
    cdef double count = 0.0, added, share, delta
    cdef Block block = block_of(&job.cut, g, 0)
    for c in range(block.c0, block.c1):
        job.mean_out[c] = job.m2_out[c] = 0.0
    for b in range(blocks):
        added = block_of(&job.cut, g, b).count
        share = added / (count + added)
        for c in range(block.c0, block.c1):
            delta = job.partial[c * blocks + b].first - job.mean_out[c]
            job.m2_out[c] += job.partial[c * blocks + b].second + delta * (delta * (count * share))
            job.mean_out[c] += delta * share
        count += added
    if job.invstd_out != NULL:
        for c in range(block.c0, block.c1):
            job.invstd_out[c] = 1.0 / sqrt(job.m2_out[c] / max(job.count, 1.0) + job.eps)


cdef void reduce_products(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """The sums over a block of dy and of dy * (x - mean)."""
    cdef Pair sums[COLUMNS]
    cdef double mean[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t c
    for c in range(block.c0, block.c1):
        mean[c - block.c0] = at(&job.mean, c)
    job.sum(job, &block, mean, sums)
    for c in range(block.c0, block.c1):
        job.partial[c * job.cut.blocks + b] = sums[c - block.c0]


cdef void merge_products(const Job *job, Py_ssize_t g) noexcept nogil:
    """Add up the blocks of each channel in their order."""
    cdef Py_ssize_t b, c, blocks = job.cut.blocks
    cdef Block block = block_of(&job.cut, g, 0)
    cdef double first, second
    for c in range(block.c0, block.c1):
        first = second = 0.0
        for b in range(blocks):
            first += job.partial[c * blocks + b].first
            second += job.partial[c * blocks + b].second
        job.sum_dy_out[c] = first
        job.sum_dy_xhat_out[c] = second * at(&job.invstd, c)


cdef Affine affine_of(const Job *job, Py_ssize_t c) noexcept nogil:
    """y = (x - mean) * invstd * weight + bias."""
    cdef Affine affine
    affine.centre = at(&job.mean, c)
    affine.scale = invstd_of(job, c) * at(&job.weight, c)
    affine.shift = at(&job.bias, c)
    return affine


cdef Gradient gradient_of(const Job *job, Py_ssize_t c) noexcept nogil:
    """dx = (dy - sum_dy / count - xhat * sum_dy_xhat / count) * invstd * weight."""
    cdef Gradient gradient
    gradient.dy_mean = at(&job.sum_dy, c) / job.count
    gradient.x_mean = at(&job.mean, c)
    gradient.slope = at(&job.invstd, c) * (at(&job.sum_dy_xhat, c) / job.count)
    gradient.scale = at(&job.invstd, c) * at(&job.weight, c)
    return gradient


# ------------------------------------------------------------------ the layout of rows

cdef Py_ssize_t row_offset(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The bytes before the block's part of sample n."""
    return ((n * job.cut.c + block.c0) * job.cut.s + block.s0) * job.itemsize


cdef Ahead ahead_of(const Job *job, const Block *block, int direction) noexcept nogil:
    """Where memory is read next, if the samples are walked in this direction."""
    cdef Ahead ahead
    cdef Py_ssize_t run = (block.c1 - block.c0) * block.length
    cdef Py_ssize_t inputs = 1 if job.dy == NULL else 2
    cdef Py_ssize_t sample = direction * job.cut.c * job.cut.s
    ahead.near = AHEAD_BYTES // (job.itemsize * inputs)
    if job.cut.n == 1 or job.cut.pieces > 1:  # run after run
        ahead.border, ahead.jump = run, ahead.near
    elif run > ahead.near:
        ahead.border = run - ahead.near
        ahead.jump = sample - ahead.border
    else:
        ahead.border = 0
        ahead.jump = sample * ceil_div(ahead.near, max(run, 1))
    return ahead


cdef void sum_rows(const Job *job, const Block *block, double *centre,
                   Pair *result) noexcept nogil:
    """The sums of a block, of moments or, with a dy, of products."""
    cdef Sums sums[GROUP_MAX]
    cdef Py_ssize_t n, at, channels = block.c1 - block.c0
    cdef Ahead ahead = ahead_of(job, block, 1)
    memset(sums, 0, channels * sizeof(Sums))
    for n in range(block.n0, block.n1):
        at = row_offset(job, block, n)
        if job.dy == NULL:
            job.kernels.moments(job.x + at, channels, block.length, ahead, centre, sums)
        else:
            job.kernels.products(job.dy + at, job.x + at, channels, block.length, ahead, centre,
                                 sums)
    job.kernels.collapse(sums, channels, result)


cdef void normalize_rows(const Job *job, const Block *block) noexcept nogil:
    cdef Affine affine[COLUMNS]
    cdef Ahead ahead = ahead_of(job, block, -1)
    cdef Py_ssize_t n, c, at, channels = block.c1 - block.c0
    for c in range(channels):
        affine[c] = affine_of(job, block.c0 + c)
    for n in range(block.n1 - 1, block.n0 - 1, -1):
        at = row_offset(job, block, n)
        job.kernels.normalize(job.x + at, job.out + at, channels, block.length, ahead,
                              affine, job.stream)


cdef void gradient_rows(const Job *job, const Block *block) noexcept nogil:
    cdef Gradient gradient[COLUMNS]
    cdef Ahead ahead = ahead_of(job, block, -1)
    cdef Py_ssize_t n, c, at, channels = block.c1 - block.c0
    for c in range(channels):
        gradient[c] = gradient_of(job, block.c0 + c)
    for n in range(block.n1 - 1, block.n0 - 1, -1):
        at = row_offset(job, block, n)
        job.kernels.gradient(job.dy + at, job.x + at, job.out + at, channels, block.length,
                             ahead, gradient, job.stream)


# ------------------------------------------------------------------ the layout of columns

cdef Py_ssize_t column_offset(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The bytes before the block's columns of folded row n."""
    return (n * job.cut.width + block.c0 * job.cut.s) * job.itemsize


cdef Py_ssize_t columns_of(const Job *job, const Block *block) noexcept nogil:
    """The columns of a block; a folded row is one strip."""
    return (block.c1 - block.c0) * job.cut.s * job.cut.fold


cdef Py_ssize_t rest_of(const Job *job, const Block *block) noexcept nogil:
    """The columns of the rows that are left over after the last folded one."""
    return (block.c1 - block.c0) * job.cut.s * block.rest


cdef void sum_columns(const Job *job, const Block *block, double *centre,
                      Pair *result) noexcept nogil:
    """The sums of a block, of moments or, with a dy, of products."""
    cdef double first[LANES + COLUMNS]
    cdef double second[LANES + COLUMNS]
    cdef double centres[LANES + COLUMNS]
    cdef Py_ssize_t _fold, c, _s, columns = columns_of(job, block), column = LANES
    memset(first, 0, (LANES + columns) * sizeof(double))
    memset(second, 0, (LANES + columns) * sizeof(double))
    memset(centres, 0, LANES * sizeof(double))
    for _fold in range(job.cut.fold):
        for c in range(block.c1 - block.c0):
            for _s in range(job.cut.s):
                centres[column] = centre[c]
                column += 1
    add_columns(job, block, block.n0, block.n1 - block.n0, columns, centres, first, second)
    add_columns(job, block, block.n1, 1, rest_of(job, block), centres, first, second)
    memset(result, 0, (block.c1 - block.c0) * sizeof(Pair))
    column = LANES
    for _fold in range(job.cut.fold):
        for c in range(block.c1 - block.c0):
            for _s in range(job.cut.s):
                result[c].first += first[column]
                result[c].second += second[column]
                column += 1


cdef void add_columns(const Job *job, const Block *block, Py_ssize_t n, Py_ssize_t rows,
                      Py_ssize_t columns, const double *centres, double *first,
                      double *second) noexcept nogil:
    cdef Py_ssize_t at = column_offset(job, block, n), stride = job.cut.width
    if columns == 0:
        return
    if job.dy == NULL:
        job.kernels.column_moments(job.x + at, rows, stride, columns, centres + LANES,
                                   first + LANES, second + LANES)
    else:
        job.kernels.column_products(job.dy + at, job.x + at, rows, stride, columns,
                                    centres + LANES, first + LANES, second + LANES)


cdef void normalize_columns(const Job *job, const Block *block) noexcept nogil:
    cdef Affine affine[COLUMNS]
    cdef Py_ssize_t c, i, columns = columns_of(job, block), stride = job.cut.width, column = 0
    cdef Py_ssize_t at = column_offset(job, block, block.n0)
    cdef Py_ssize_t end = column_offset(job, block, block.n1)
    for c in range(block.c0, block.c1):
        for i in range(job.cut.s):
            affine[column] = affine_of(job, c) if i == 0 else affine[column - 1]
            column += 1
    for i in range(column, columns):
        affine[i] = affine[i - column]
    job.kernels.column_normalize(job.x + end, job.out + end, 1, stride,
                                 rest_of(job, block), affine, False)
    job.kernels.column_normalize(job.x + at, job.out + at, block.n1 - block.n0, stride, columns,
                                 affine, job.stream)


cdef void gradient_columns(const Job *job, const Block *block) noexcept nogil:
    cdef Gradient gradient[COLUMNS]
    cdef Py_ssize_t c, i, columns = columns_of(job, block), stride = job.cut.width, column = 0
    cdef Py_ssize_t at = column_offset(job, block, block.n0)
    cdef Py_ssize_t end = column_offset(job, block, block.n1)
    for c in range(block.c0, block.c1):
        for i in range(job.cut.s):
            gradient[column] = gradient_of(job, c) if i == 0 else gradient[column - 1]
            column += 1
    for i in range(column, columns):
        gradient[i] = gradient[i - column]
    job.kernels.column_gradient(job.dy + end, job.x + end, job.out + end, 1, stride,
                                rest_of(job, block), gradient, False)
    job.kernels.column_gradient(job.dy + at, job.x + at, job.out + at, block.n1 - block.n0,
                                stride, columns, gradient, job.stream)


cdef Py_ssize_t first_element(const Job *job, const Block *block, Py_ssize_t c) noexcept nogil:
    """The index of the first element of a channel in a block."""
    if job.cut.columns:
        return column_offset(job, block, block.n0) // job.itemsize + c * job.cut.s
    return row_offset(job, block, block.n0) // job.itemsize + c * job.cut.s


# ------------------------------------------------------------------ who does what

cdef void apply_block(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(&job.cut, g, b)
    job.apply(job, &block)
    if job.stream:
        job.kernels.end_streaming()


cdef void finish_group(const Job *job, Py_ssize_t g) noexcept nogil:
    """All steps of a group; the second walk goes backwards, to begin with what is in the cache."""
    cdef Py_ssize_t b
    if job.reduce != NULL:
        for b in range(job.cut.blocks):
            job.reduce(job, g, b)
        job.merge(job, g)
    if job.apply != NULL:
        for b in range(job.cut.blocks - 1, -1, -1):
            apply_block(job, g, b)


cdef void run_groups(const Job *job, int threads) noexcept nogil:
    """Each group is finished by one thread, while it sits in that thread's cache."""
    cdef Py_ssize_t g
    for g in prange(job.cut.groups, schedule="dynamic", num_threads=threads,
                    use_threads_if=threads > 1):
        finish_group(job, g)


cdef void run_blocks(const Job *job, int threads) noexcept nogil:
    """Too few groups for the threads: they share the blocks, one step after the other."""
    cdef Py_ssize_t t, g, groups = job.cut.groups, tasks = job.cut.groups * job.cut.blocks
    if job.reduce != NULL:
        for t in prange(tasks, schedule="dynamic", num_threads=threads):
            job.reduce(job, t % groups, t // groups)
        for g in range(groups):
            job.merge(job, g)
    if job.apply != NULL:
        for t in prange(tasks, schedule="dynamic", num_threads=threads):
            apply_block(job, (tasks - 1 - t) % groups, (tasks - 1 - t) // groups)


cdef int run(Job *job, int threads) except -1:
    """Run a job on at most so many threads; nothing has been written if this raises."""
    cdef Py_ssize_t size = job.cut.n * job.cut.c * job.cut.s * job.itemsize
    threads = <int>min(<Py_ssize_t>threads, max(size // BYTES_PER_THREAD, 1))
    if not job.cut.columns:
        group_rows(&job.cut, job.itemsize, 1 if job.dy == NULL else 2, job.reduce != NULL, threads)
    if job.reduce != NULL:
        job.partial = <Pair *>malloc((job.cut.c * job.cut.blocks + 1) * sizeof(Pair))
        if job.partial == NULL:
            raise MemoryError("no memory for the partial sums of the blocks")
    with nogil:
        if job.cut.groups >= 4 * threads or job.cut.blocks < 2 or threads == 1:
            run_groups(job, threads)
        else:
            run_blocks(job, threads)
    free(job.partial)
    return 0


# ------------------------------------------------------------------ arrays

cdef enum:
    # Flags of the array interface.
    C_CONTIGUOUS = 0x1
    ALIGNED_AND_NATIVE = 0x100 | 0x200


cdef ArrayStruct *struct_of(object capsule) except NULL:
    """What an ``__array_struct__`` holds, as long as it lives."""
    return <ArrayStruct *>PyCapsule_GetPointer(capsule, NULL)


cdef char *address(object array) except NULL:
    capsule = array.__array_struct__
    return struct_of(capsule).data


cdef bint is_channels_last(const ArrayStruct *array) noexcept:
    """Tell whether the array is C-contiguous as (n, ..., c)."""
    cdef Py_ssize_t expected = array.itemsize
    cdef int i, axis
    for i in range(array.nd):
        # The channels, then the axes behind them from the last one, then the samples.
        axis = 1 if i == 0 else (0 if i == array.nd - 1 else array.nd - i)
        if array.shape[axis] > 1 and array.strides[axis] != expected:
            return False
        expected *= array.shape[axis]
    return True


def layout(array):
    """Tell how the core sees an array of shape (n, c, ...).

    1 if it is C-contiguous, 2 if it is so with the channels last; 0 if neither, unaligned or
    byte-swapped: then the core cannot take it.
    """
    capsule = array.__array_struct__
    cdef const ArrayStruct *described = struct_of(capsule)
    if described.flags & ALIGNED_AND_NATIVE != ALIGNED_AND_NATIVE:
        return 0
    if described.flags & C_CONTIGUOUS:
        return 1
    return 2 if is_channels_last(described) else 0


cdef const Kernels *kernels_of(const ArrayStruct *x) noexcept:
    if x.itemsize == 8:
        return &isa_in_use.float64
    if x.itemsize == 4:
        return &isa_in_use.float32
    return &isa_in_use.float16 if x.typekind == b"f" else &isa_in_use.bfloat16


cdef Vector vector_of(object array, double default) except *:
    """An array of one value per channel; the default for None."""
    cdef Vector vector
    cdef const ArrayStruct *described
    memset(&vector, 0, sizeof(Vector))
    vector.value = default
    if array is not None:
        capsule = array.__array_struct__
        described = struct_of(capsule)
        vector.data = described.data
        vector.stride = described.strides[0]
        vector.itemsize = described.itemsize
        vector.kernels = kernels_of(described)
    return vector


cdef double *written(object array, Vector *vector) except NULL:
    """The data of a new float64 array, which the job's later steps read as the vector."""
    vector[0] = vector_of(array, 0.0)
    return <double *>vector.data


# ------------------------------------------------------------------ the jobs
#
# x has a layout that is not 0, dy and out the same layout, shape and dtype.

cdef Job new_job(object x) except *:
    """A job on x that has no steps yet."""
    cdef Job job
    cdef Py_ssize_t s = 1
    cdef int axis
    capsule = x.__array_struct__
    cdef const ArrayStruct *described = struct_of(capsule)
    for axis in range(2, described.nd):
        s *= described.shape[axis]
    memset(&job, 0, sizeof(Job))
    job.x = described.data
    job.itemsize = described.itemsize
    job.refine = described.itemsize == sizeof(double)
    job.kernels = kernels_of(described)
    job.cut = cut_work(described.shape[0], described.shape[1], s,
                       not described.flags & C_CONTIGUOUS)
    job.count = <double>(described.shape[0] * s)
    job.sum = sum_columns if job.cut.columns else sum_rows
    return job


cdef int write_to(Job *job, object out, BlockWrite rows, BlockWrite columns) except -1:
    """Let the job apply its outcome to out."""
    cdef Py_ssize_t size = job.cut.n * job.cut.c * job.cut.s * job.itemsize
    # Strips that are not the whole width of a matrix are short runs.
    cdef Py_ssize_t channels = job.cut.group if job.cut.columns else job.cut.c
    cdef Py_ssize_t run = channels * job.cut.s * job.itemsize
    job.out = address(out)
    job.apply = columns if job.cut.columns else rows
    job.stream = (size >= STREAM_BYTES and (job.cut.groups == 1 or run >= STREAM_RUN_BYTES)
                  and job.out != job.x and job.out != job.dy)
    return 0


def stats(x, mean, m2, int threads):
    """Write the mean and m2 of every channel of x."""
    cdef Job job = new_job(x)
    cdef Vector unread
    job.mean_out, job.m2_out = written(mean, &job.mean), written(m2, &unread)
    job.reduce, job.merge = reduce_moments, merge_moments
    run(&job, threads)


def elemt(x, mean, invstd, var, double eps, weight, bias, out, int threads):
    """Write x, normalized by mean and either invstd or var and eps, into out."""
    cdef Job job = new_job(x)
    job.mean, job.invstd, job.var = vector_of(mean, 0), vector_of(invstd, 1), vector_of(var, 1)
    job.weight, job.bias = vector_of(weight, 1.0), vector_of(bias, 0.0)
    job.eps = eps
    write_to(&job, out, normalize_rows, normalize_columns)
    run(&job, threads)


def forward(x, weight, bias, double eps, out, mean, m2, invstd, int threads):
    """Write x, normalized by its own statistics, into out, and those statistics."""
    cdef Job job = new_job(x)
    cdef Vector unread
    job.mean_out, job.m2_out = written(mean, &job.mean), written(m2, &unread)
    job.invstd_out = written(invstd, &job.invstd)
    job.weight, job.bias = vector_of(weight, 1.0), vector_of(bias, 0.0)
    job.eps = eps
    job.reduce, job.merge = reduce_moments, merge_moments
    write_to(&job, out, normalize_rows, normalize_columns)
    run(&job, threads)


cdef Job new_backward_job(dy, x, mean, invstd) except *:
    cdef Job job = new_job(x)
    job.dy = address(dy)
    job.mean, job.invstd = vector_of(mean, 0.0), vector_of(invstd, 1.0)
    return job


def backward_reduce(dy, x, mean, invstd, sum_dy, sum_dy_xhat, int threads):
    """Write the sums of dy and of dy * xhat of every channel."""
    cdef Job job = new_backward_job(dy, x, mean, invstd)
    job.sum_dy_out = written(sum_dy, &job.sum_dy)
    job.sum_dy_xhat_out = written(sum_dy_xhat, &job.sum_dy_xhat)
    job.reduce, job.merge = reduce_products, merge_products
    run(&job, threads)


def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xhat, double count, out,
                   int threads):
    """Write the gradient of x into out, by the given sums over count elements."""
    cdef Job job = new_backward_job(dy, x, mean, invstd)
    job.sum_dy, job.sum_dy_xhat = vector_of(sum_dy, 0.0), vector_of(sum_dy_xhat, 0.0)
    job.weight = vector_of(weight, 1.0)
    job.count = count
    write_to(&job, out, gradient_rows, gradient_columns)
    run(&job, threads)


def backward(dy, x, weight, mean, invstd, out, sum_dy, sum_dy_xhat, int threads):
    """Write the gradient of x into out, and the sums of dy and of dy * xhat."""
    cdef Job job = new_backward_job(dy, x, mean, invstd)
    job.sum_dy_out = written(sum_dy, &job.sum_dy)
    job.sum_dy_xhat_out = written(sum_dy_xhat, &job.sum_dy_xhat)
    job.weight = vector_of(weight, 1.0)
    job.reduce, job.merge = reduce_products, merge_products
    write_to(&job, out, gradient_rows, gradient_columns)
    run(&job, threads)
