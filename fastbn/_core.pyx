# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""The loops over channels: how the work is cut, who does which piece, and how pieces merge.

What a piece is depends on the shape alone, and pieces merge in a fixed order, so the result has the
same bits for every number of threads.

The functions trust their caller: arrays have the right shapes, dtypes and layouts.
"""

import os

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange, threadid
from libc.math cimport isfinite, isnan
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memset


cdef extern from "kernels.h" nogil:
    enum:
        LANES "FASTBN_LANES"
        GROUP "FASTBN_GROUP"
        COLUMNS "FASTBN_COLUMNS"
        ADDITIONS "FASTBN_ADDITIONS"
        MASK_BYTES "FASTBN_MASK_BYTES"

    ctypedef struct Affine "fastbn_affine":
        double centre[COLUMNS]
        double scale[COLUMNS]
        double shift[COLUMNS]

    ctypedef struct Gradient "fastbn_gradient":
        double dy_mean[COLUMNS]
        double x_mean[COLUMNS]
        double slope[COLUMNS]
        double scale[COLUMNS]

    ctypedef struct Ahead "fastbn_ahead":
        Py_ssize_t near, border, jump

    ctypedef struct Runs "fastbn_runs":
        Py_ssize_t samples, stride, channels, len
        Ahead ahead
        const unsigned char *mask
        Py_ssize_t mask_stride

    ctypedef struct Matrix "fastbn_matrix":
        Py_ssize_t rows, len, stride, channels, run
        const unsigned char *mask
        Py_ssize_t mask_stride

    ctypedef struct Kernels "fastbn_kernels":
        void (*load_as_double)(const void *x, Py_ssize_t stride, Py_ssize_t count,
                               double *to) noexcept nogil
        void (*store_from_double)(const double *from_, Py_ssize_t stride, Py_ssize_t count,
                                  void *to) noexcept nogil
        void (*moments)(const void *x, const Runs *runs, const double *pivot, double *first,
                        double *second) noexcept nogil
        void (*products)(const void *dy, const void *x, const Runs *runs, const double *mean,
                         double *first, double *second) noexcept nogil
        void (*normalize)(const void *x, void *y, const Runs *runs, const Affine *affine,
                          int stream) noexcept nogil
        void (*gradient)(const void *dy, const void *x, void *dx, const Runs *runs,
                         const Gradient *gradient, int stream) noexcept nogil
        void (*column_moments)(const void *x, const Matrix *matrix, const double *pivot,
                               double *first, double *second) noexcept nogil
        void (*column_products)(const void *dy, const void *x, const Matrix *matrix,
                                const double *mean, double *first, double *second) noexcept nogil
        void (*column_normalize)(const void *x, void *y, const Matrix *matrix,
                                 const Affine *affine, int stream) noexcept nogil
        void (*column_gradient)(const void *dy, const void *x, void *dx, const Matrix *matrix,
                                const Gradient *gradient, int stream) noexcept nogil
        Py_ssize_t (*count_valid)(const unsigned char *mask, Py_ssize_t len) noexcept nogil
        void (*invstd)(const double *m2, double n, double eps, Py_ssize_t count,
                       double *invstd) noexcept nogil
        void (*fence_nontemporal)() noexcept nogil

    ctypedef struct Isa "fastbn_isa":
        const char *name
        Kernels float32, float64, float16, bfloat16


cdef extern from "platform.h" nogil:
    int fastbn_supported_isas(const Isa **isas, int capacity)
    Py_ssize_t fastbn_l3_bytes()
    int fastbn_omp_max_threads()
    bint fastbn_omp_pause()
    double fastbn_seconds()
    const char *fastbn_compiler()
    const char *fastbn_openmp()


cdef extern from *:
    """
    #if defined(_MSC_VER)
    #  define FASTBN_THREAD_LOCAL __declspec(thread)
    #else
    #  define FASTBN_THREAD_LOCAL _Thread_local
    #endif
    static FASTBN_THREAD_LOCAL Py_ssize_t fastbn_calls_alone, fastbn_next_alone;
    """
    # Of each thread of Python, which has threads of OpenMP of its own: the calls that shall run on
    # one thread, and how many it will be when one has to wait for a CPU.
    Py_ssize_t calls_alone "fastbn_calls_alone"
    Py_ssize_t next_alone "fastbn_next_alone"


cdef extern from *:
    """
    /* The array interface protocol of NumPy, version 3: its C side. */
    typedef struct {
        int two, nd;
        char typekind;
        int itemsize, flags;
        Py_intptr_t *shape, *strides;
        char *data;
        PyObject *descr;
    } fastbn_array_struct;
    """
    ctypedef struct ArrayStruct "fastbn_array_struct":
        int nd
        char typekind
        int itemsize, flags
        Py_ssize_t *shape
        Py_ssize_t *strides
        char *data


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


def avoid_waits(bint avoid):
    """Let calls after one whose threads waited for a CPU run alone, or not."""
    global waits_avoided
    waits_avoided = avoid


# ------------------------------------------------------------------ how the work is cut
#
# An array is one or more batches, each with statistics of its own, of n samples of c channels of s
# elements each. A batch is cut like any other one. It has one of two layouts.
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
    # runs should not be much shorter than a page.
    GROUP_BYTES = 524288
    RUN_BYTES = 3072
    # One that is walked once may have long runs, and coefficients that serve so many elements.
    LONG_RUN_BYTES = 524288
    COEFFICIENT_ELEMENTS = 1024
    # Memory is prefetched when it is so many bytes away, of all inputs.
    AHEAD_BYTES = 8192
    # Shorter runs are taken for columns.
    ROW_MIN = 16
    # Rows of less than LANES columns are folded, this many into one.
    FOLD = 16
    # Shorter runs of an output are not stored around the cache.
    STREAM_RUN_BYTES = 1024
    # With less to read and write, a thread brings a few microseconds at best, and costs
    # milliseconds where another process has its CPU.
    BYTES_PER_THREAD = 524288
    # The calls that run on one thread after one whose threads had to wait for a CPU: few after a
    # rare wait, twice as many after each that comes soon again.
    FEWEST_ALONE = 64
    MOST_ALONE = 2048

# The seconds from which on a wait is one for a CPU: several times what waking a thread takes, less
# than a scheduler's slice.
cdef double LONG_WAIT = 1e-3
cdef bint waits_avoided = True

# Half of the third-level cache, which others use too. An output is stored around it if the inputs
# and the output are more; what all threads together walk twice should be less.
cdef Py_ssize_t near_bytes = (fastbn_l3_bytes() or 16777216) // 2


cdef struct Cut:
    bint columns
    Py_ssize_t batches
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


cdef void group_rows(Cut *cut, Py_ssize_t itemsize, int inputs, int threads) noexcept nogil:
    """Choose how many channels are summed together, which no result depends on."""
    cdef Py_ssize_t run = max(cut.s * itemsize, 1)
    cut.group = max(GROUP_BYTES // max(cut.n * run * inputs, 1), RUN_BYTES // run)
    cut.group = min(cut.group, GROUP)
    if threads > 1:  # enough groups for all threads to be busy to the end
        cut.group = min(cut.group, cut.batches * cut.c // (4 * threads))
    if cut.pieces > 1:  # a piece of a channel does not end where the next channel begins
        cut.group = 1
    cut.group = max(cut.group, 1)
    cut.groups = ceil_div(cut.c, cut.group)


cdef void block_rows(Cut *cut, Py_ssize_t itemsize, int threads) noexcept nogil:
    """Cut rows, of which no sums are asked for, into blocks that are as linear as memory is."""
    cdef Py_ssize_t tasks
    cut.group = 1
    if cut.pieces <= 1:
        cut.group = min(LONG_RUN_BYTES // max(cut.s * itemsize, 1), min(cut.c, COLUMNS))
        cut.rows = max(COEFFICIENT_ELEMENTS // max(cut.s, 1), 1)
        tasks = cut.batches * ceil_div(cut.c, max(cut.group, 1)) * ceil_div(cut.n, cut.rows)
        if threads > 1 and tasks < 4 * threads:
            cut.group = cut.group * tasks // (4 * threads)
        cut.group = max(cut.group, 1)
    cut.groups = ceil_div(cut.c, cut.group)
    cut.blocks = ceil_div(cut.n, cut.rows) * cut.pieces


cdef void cut_columns(Cut *cut) noexcept nogil:
    cdef Py_ssize_t width = cut.c * cut.s, height
    cut.columns = True
    cut.fold = 1 if width >= LANES else FOLD
    cut.width = width * cut.fold
    height = cut.n // cut.fold
    cut.rest = cut.n % cut.fold
    cut.rows = max(COLUMN_BLOCK, ceil_div(height, COLUMN_BLOCKS_MAX))
    cut.blocks = 0 if cut.n * cut.s == 0 else max(ceil_div(height, cut.rows), 1)
    cut.length = cut.s
    cut.pieces = 1


cdef void group_columns(Cut *cut, int threads) noexcept nogil:
    """Choose how wide strips are, which no result depends on."""
    cdef Py_ssize_t strips = max(ceil_div(cut.width, COLUMNS), 1)
    # Enough strips for all threads, if there are few blocks. A folded row is one strip.
    if cut.batches * cut.blocks < 2 * threads and threads > 1 and cut.fold == 1:
        strips = max(strips, 2 * threads)
    # Of nearly the same width, in whole steps.
    cut.group = ceil_div(ceil_div(cut.c, strips), LANES) * LANES
    cut.group = max(min(cut.group, COLUMNS // (max(cut.s, 1) * cut.fold)), 1)
    cut.groups = ceil_div(cut.c, cut.group)


cdef Cut cut_work(Py_ssize_t batches, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s,
                  bint channels_last) noexcept nogil:
    cdef Cut cut
    memset(&cut, 0, sizeof(Cut))
    if channels_last:
        n, s = n * s, 1
    cut.batches, cut.n, cut.c, cut.s = batches, n, c, s
    if channels_last or s < ROW_MIN:
        cut_columns(&cut)
    else:
        cut_rows(&cut)
    return cut


# A block of a group: the channels [c0, c1) of the samples, or folded rows, [n0, n1) of a batch; of
# them the elements [s0, s0 + length), or all columns and `rest` more rows of the matrix.
cdef struct Block:
    Py_ssize_t batch, n0, n1, c0, c1, s0, length, rest


cdef Block block_of(const Cut *cut, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """A block of a group; the groups of the first batch come first, then those of the next."""
    cdef Block block
    block.batch = g // cut.groups
    block.c0 = g % cut.groups * cut.group
    block.c1 = min(block.c0 + cut.group, cut.c)
    block.n0 = b // max(cut.pieces, 1) * cut.rows
    block.n1 = min(block.n0 + cut.rows, cut.n // cut.fold)
    block.s0 = b % max(cut.pieces, 1) * cut.length
    block.length = min(cut.length, cut.s - block.s0)
    block.rest = 0
    if cut.columns and b == cut.blocks - 1:
        block.rest = cut.rest
    return block


# ------------------------------------------------------------------ a job and its three steps

# A job reduces every block of every group to partial sums, merges those of each channel, and
# applies the outcome to every block. A step that a job does not have is NULL.
ctypedef void (*BlockStep)(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil
ctypedef void (*GroupStep)(const Job *job, Py_ssize_t g) noexcept nogil

# How the layout's kernels are called: sums of a block around a centre for each channel, and the
# element-wise kernel of a block.
ctypedef void (*BlockSum)(const Job *job, const Block *block, const double *centre,
                          double *first, double *second) noexcept nogil
ctypedef void (*BlockWrite)(const Job *job, const Block *block) noexcept nogil

# One value per channel, or per batch and channel, of any of the four dtypes, alignment and strides.
cdef struct Vector:
    const char *data              # NULL stands for a vector of one and the same value
    Py_ssize_t stride
    Py_ssize_t batch_stride       # 0 if all batches have the same values
    const Kernels *kernels
    double value

# What of a block counts, if there is a mask.
cdef struct Part:
    Py_ssize_t count              # the elements of a channel
    Py_ssize_t first              # the first one, in the order of the mask's memory

cdef struct Job:
    Cut cut
    Py_ssize_t samples            # of a batch
    Py_ssize_t rest               # samples after the batches, which make up a smaller one
    bint channels_last
    Py_ssize_t itemsize
    const Kernels *kernels
    BlockStep reduce
    GroupStep merge
    BlockWrite apply
    BlockSum sum
    bint refine                   # whether a pivot must be near the mean
    bint stream                   # whether to store around the cache
    double *partial               # of (batches, blocks, 2, c): mean and m2, or the two sums
    const unsigned char *mask     # of (batches, n, s), 255 for what counts; NULL if all does
    Part *parts                   # of (batches, blocks), if there is a mask
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
    double count                  # the elements of a channel that the sums are over
    double *counts                # the same for each batch, if there is a mask


cdef const char *start_of_vector(const Vector *vector, const Block *block) noexcept nogil:
    """Where the value of a block's first channel is."""
    return vector.data + block.batch * vector.batch_stride + block.c0 * vector.stride


cdef void read(const Vector *vector, const Block *block, double *to) noexcept nogil:
    """The values of a block's channels."""
    cdef Py_ssize_t c, count = block.c1 - block.c0
    if vector.data != NULL:
        vector.kernels.load_as_double(start_of_vector(vector, block), vector.stride, count, to)
        return
    for c in range(count):
        to[c] = vector.value


cdef void read_invstd(const Job *job, const Block *block, double *to) noexcept nogil:
    if job.var.data == NULL:
        read(&job.invstd, block, to)
        return
    read(&job.var, block, to)
    job.kernels.invstd(to, 1.0, job.eps, block.c1 - block.c0, to)


cdef double *results_of(const Job *job, double *vectors, const Block *block) noexcept nogil:
    """Where the results of a block's channels are in an array of (batches, c)."""
    return vectors + block.batch * job.cut.c + block.c0


cdef double *partial_of(const Job *job, const Block *block, Py_ssize_t b) noexcept nogil:
    """Where the first of the partial sums of a block's channels are; the second are c further."""
    return job.partial + 2 * (block.batch * job.cut.blocks + b) * job.cut.c + block.c0


cdef Py_ssize_t sample_of(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The number of a sample, or folded row, of a batch among the samples of the array."""
    return block.batch * job.cut.n + n * job.cut.fold


cdef Py_ssize_t offset_of(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The bytes before the block's part of sample, or folded row, n."""
    cdef Py_ssize_t runs = sample_of(job, block, n) * job.cut.c + block.c0
    return (runs * job.cut.s + block.s0) * job.itemsize


cdef const unsigned char *mask_of(const Job *job, const Block *block,
                                  Py_ssize_t n) noexcept nogil:
    """The mask of the block's part of sample, or folded row, n."""
    if job.mask == NULL:
        return NULL
    return job.mask + sample_of(job, block, n) * job.cut.s + block.s0


# ------------------------------------------------------------------ what counts

cdef Part part_of(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """What of a block counts."""
    cdef Part part
    cdef Block block = block_of(&job.cut, g, b)
    if job.mask != NULL:
        return job.parts[block.batch * job.cut.blocks + b]
    part.count = ((block.n1 - block.n0) * job.cut.fold + block.rest) * block.length
    part.first = sample_of(job, &block, block.n0) * job.cut.s + block.s0
    return part


cdef double count_of(const Job *job, const Block *block) noexcept nogil:
    """The elements of a channel that the sums of a batch are over."""
    return job.count if job.counts == NULL else job.counts[block.batch]


cdef void find_parts(const Job *job) noexcept nogil:
    """See what of each block the mask has."""
    cdef Py_ssize_t k, b
    cdef Part part
    for k in range(job.cut.batches):
        job.counts[k] = 0.0
        for b in range(job.cut.blocks):
            part = masked_part(job, k * job.cut.groups, b)
            job.parts[k * job.cut.blocks + b] = part
            job.counts[k] += <double>part.count


cdef Part masked_part(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef Part part
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t _n, count, length = block.length
    cdef Py_ssize_t samples = (block.n1 - block.n0) * job.cut.fold + block.rest
    cdef const unsigned char *mask = mask_of(job, &block, block.n0)
    cdef const void *found
    part.count, part.first = 0, -1
    if length == job.cut.s:  # one behind the other
        length, samples = length * samples, 1
    for _n in range(samples):
        count = job.kernels.count_valid(mask, length)
        if count > 0 and part.first < 0:
            found = memchr(mask, 255, length)
            part.first = <const unsigned char *>found - job.mask
        part.count += count
        mask += job.cut.s
    return part


# Sums of any number of parts: what rounding takes from them is kept, and added in the end.
cdef struct Sums:
    double sum[COLUMNS]
    double rest[COLUMNS]


cdef void begin(Sums *sums, const double *first, Py_ssize_t channels) noexcept nogil:
    """Begin with a value for each channel, or with zeros where there is none."""
    if first == NULL:
        memset(sums.sum, 0, channels * sizeof(double))
    else:
        memcpy(sums.sum, first, channels * sizeof(double))
    memset(sums.rest, 0, channels * sizeof(double))


cdef void add(Sums *sums, const double *added, Py_ssize_t channels) noexcept nogil:
    """Add a value to the sum of each channel (Knuth's TwoSum)."""
    cdef Py_ssize_t c
    cdef double total, part
    for c in range(channels):
        total = sums.sum[c] + added[c]
        part = total - sums.sum[c]
        sums.rest[c] += (sums.sum[c] - (total - part)) + (added[c] - part)
        sums.sum[c] = total


cdef void write_sums(const Sums *sums, Py_ssize_t channels, double *to) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):  # beside an infinite sum, the rest is NaN
        to[c] = sums.sum[c] + (0.0 if isnan(sums.rest[c]) else sums.rest[c])


cdef void reduce_moments(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """Mean and m2 of a block: sums of deviations from a pivot, and of their squares.

    With any element h of the block as the pivot, (h - mean)^2 <= m2, so that subtracting
    (sum of deviations)^2 / count loses no more than a factor of count of the precision. Of a
    double's 53 bits enough remain for a narrower x; for float64 the first round finds a pivot
    near the mean, and a second one sums around that: the corrected two-pass algorithm. A pivot is
    finite, so that an infinite mean comes out as such and not as NaN.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef double pivot[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Part part = part_of(job, g, b)
    cdef Py_ssize_t c, channels = block.c1 - block.c0
    cdef double *mean = partial_of(job, &block, b)
    cdef double *m2 = mean + job.cut.c
    if part.count == 0:
        return
    job.kernels.load_as_double(job.x + element_of(job, &block, part.first) * job.itemsize,
                               job.cut.s * job.itemsize, channels, pivot)
    for c in range(channels):
        pivot[c] = pivot[c] if isfinite(pivot[c]) else 0.0
    job.sum(job, &block, pivot, first, second)
    if job.refine:
        for c in range(channels):
            mean[c] = pivot[c] + first[c] / part.count
            pivot[c] = mean[c] if isfinite(mean[c]) else pivot[c]
        job.sum(job, &block, pivot, first, second)
    for c in range(channels):
        mean[c] = first[c] / part.count
        # Rounding can take a variance of nearly zero below it.
        m2[c] = max(second[c] - first[c] * mean[c], 0.0)
        mean[c] += pivot[c]


cdef Py_ssize_t element_of(const Job *job, const Block *block, Py_ssize_t at) noexcept nogil:
    """The number, in the array, of an element of the block's first channel."""
    cdef Py_ssize_t s = job.cut.s
    return (at // s * job.cut.c + block.c0) * s + at % s


cdef double sum_of_means(const Job *job, Py_ssize_t g, Py_ssize_t c) noexcept nogil:
    """The mean of a channel with an infinite or NaN block: what adding up its elements gives."""
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t b
    cdef double total = 0.0
    for b in range(job.cut.blocks):
        if part_of(job, g, b).count > 0:
            total += partial_of(job, &block, b)[c]
    return total


cdef void merge_moments(const Job *job, Py_ssize_t g) noexcept nogil:
    """Merge the blocks of each channel in their order, by Chan's formula."""
    cdef Py_ssize_t b, c
    cdef double count = 0.0, added, share, delta
    cdef double shift[COLUMNS]
    cdef double growth[COLUMNS]
    cdef Sums means, m2s
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t channels = block.c1 - block.c0
    cdef double *mean = results_of(job, job.mean_out, &block)
    cdef double *m2 = results_of(job, job.m2_out, &block)
    cdef const double *added_mean
    cdef const double *added_m2
    begin(&means, NULL, channels)
    begin(&m2s, NULL, channels)
    for b in range(job.cut.blocks):
        added = <double>part_of(job, g, b).count
        if added == 0.0:
            continue
        added_mean = partial_of(job, &block, b)
        added_m2 = added_mean + job.cut.c
        if count == 0.0:
            begin(&means, added_mean, channels)
            begin(&m2s, added_m2, channels)
            count = added
            continue
        share = added / (count + added)
        for c in range(channels):
            delta = added_mean[c] - means.sum[c] - means.rest[c]
            shift[c] = delta * share
            growth[c] = added_m2[c] + delta * (delta * (count * share))
        add(&means, shift, channels)
        add(&m2s, growth, channels)
        count += added
    write_sums(&means, channels, mean)
    write_sums(&m2s, channels, m2)
    for c in range(channels):
        if isnan(mean[c]):
            mean[c] = sum_of_means(job, g, c)
    if job.invstd_out != NULL:
        job.kernels.invstd(m2, max(count_of(job, &block), 1.0), job.eps, channels,
                           results_of(job, job.invstd_out, &block))


cdef void reduce_products(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """The sums over a block of dy and of dy * (x - mean)."""
    cdef double mean[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef double *first = partial_of(job, &block, b)
    read(&job.mean, &block, mean)
    job.sum(job, &block, mean, first, first + job.cut.c)


cdef void merge_products(const Job *job, Py_ssize_t g) noexcept nogil:
    """Add up the blocks of each channel in their order."""
    cdef Py_ssize_t b, c
    cdef double invstd[COLUMNS]
    cdef Sums dy, dy_xhat
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t channels = block.c1 - block.c0
    cdef double *sum_dy = results_of(job, job.sum_dy_out, &block)
    cdef double *sum_dy_xhat = results_of(job, job.sum_dy_xhat_out, &block)
    cdef const double *first
    begin(&dy, NULL, channels)
    begin(&dy_xhat, NULL, channels)
    for b in range(job.cut.blocks):
        first = partial_of(job, &block, b)
        if b == 0:
            begin(&dy, first, channels)
            begin(&dy_xhat, first + job.cut.c, channels)
        else:
            add(&dy, first, channels)
            add(&dy_xhat, first + job.cut.c, channels)
    write_sums(&dy, channels, sum_dy)
    write_sums(&dy_xhat, channels, sum_dy_xhat)
    read(&job.invstd, &block, invstd)
    for c in range(channels):
        sum_dy_xhat[c] *= invstd[c]


cdef void affine_of(const Job *job, const Block *block, Affine *affine) noexcept nogil:
    """y = (x - mean) * invstd * weight + bias."""
    cdef Py_ssize_t c
    cdef double weight[COLUMNS]
    read(&job.mean, block, affine.centre)
    read(&job.weight, block, weight)
    read(&job.bias, block, affine.shift)
    read_invstd(job, block, affine.scale)
    for c in range(block.c1 - block.c0):
        affine.scale[c] *= weight[c]


cdef void gradient_of(const Job *job, const Block *block, Gradient *gradient) noexcept nogil:
    """dx = (dy - sum_dy / count - xhat * sum_dy_xhat / count) * invstd * weight."""
    cdef Py_ssize_t c
    cdef double count = count_of(job, block)
    cdef double invstd[COLUMNS]
    read(&job.invstd, block, invstd)
    read(&job.mean, block, gradient.x_mean)
    read(&job.sum_dy, block, gradient.dy_mean)
    read(&job.sum_dy_xhat, block, gradient.slope)
    read(&job.weight, block, gradient.scale)
    for c in range(block.c1 - block.c0):
        gradient.dy_mean[c] /= count
        gradient.slope[c] = invstd[c] * (gradient.slope[c] / count)
        gradient.scale[c] *= invstd[c]


# ------------------------------------------------------------------ the layout of rows

cdef Runs runs_of(const Job *job, const Block *block, bint backwards) noexcept nogil:
    """The runs of a block, from the first sample to the last or backwards."""
    cdef Runs runs
    runs.mask = mask_of(job, block, block.n1 - 1 if backwards else block.n0)
    runs.mask_stride = -job.cut.s if backwards else job.cut.s
    runs.samples = block.n1 - block.n0
    runs.stride = -job.cut.c * job.cut.s if backwards else job.cut.c * job.cut.s
    runs.channels = block.c1 - block.c0
    runs.len = block.length
    runs.ahead = ahead_of(job, &runs)
    return runs


cdef Ahead ahead_of(const Job *job, const Runs *runs) noexcept nogil:
    """Where memory is read next: this sample's runs go on, and then those of the next sample."""
    cdef Ahead ahead
    cdef Py_ssize_t run = runs.channels * runs.len
    ahead.near = AHEAD_BYTES // (job.itemsize * (1 if job.dy == NULL else 2))
    if runs.samples == 1:  # block after block
        ahead.border, ahead.jump = run, ahead.near
    elif run > ahead.near:
        ahead.border = run - ahead.near
        ahead.jump = runs.stride - ahead.border
    else:
        ahead.border = 0
        ahead.jump = runs.stride * ceil_div(ahead.near, max(run, 1))
    return ahead


cdef Py_ssize_t start_of(const Job *job, const Block *block, bint backwards) noexcept nogil:
    """The bytes before the runs of the sample that comes first."""
    return offset_of(job, block, block.n1 - 1 if backwards else block.n0)


cdef void sum_rows(const Job *job, const Block *block, const double *centre, double *first,
                   double *second) noexcept nogil:
    """The sums of a block, of moments or, with a dy, of products."""
    cdef Runs runs = runs_of(job, block, False)
    cdef Py_ssize_t at = offset_of(job, block, block.n0)
    if job.dy == NULL:
        job.kernels.moments(job.x + at, &runs, centre, first, second)
    else:
        job.kernels.products(job.dy + at, job.x + at, &runs, centre, first, second)


cdef void normalize_rows(const Job *job, const Block *block) noexcept nogil:
    cdef Affine affine
    # A second walk begins with what the first one has left in the cache.
    cdef bint backwards = job.reduce != NULL
    cdef Runs runs = runs_of(job, block, backwards)
    cdef Py_ssize_t at = start_of(job, block, backwards)
    affine_of(job, block, &affine)
    job.kernels.normalize(job.x + at, job.out + at, &runs, &affine, job.stream)


cdef void gradient_rows(const Job *job, const Block *block) noexcept nogil:
    cdef Gradient gradient
    # A second walk begins with what the first one has left in the cache.
    cdef bint backwards = job.reduce != NULL
    cdef Runs runs = runs_of(job, block, backwards)
    cdef Py_ssize_t at = start_of(job, block, backwards)
    gradient_of(job, block, &gradient)
    job.kernels.gradient(job.dy + at, job.x + at, job.out + at, &runs, &gradient, job.stream)


# ------------------------------------------------------------------ the layout of columns

cdef Matrix folded_rows(const Job *job, const Block *block) noexcept nogil:
    """The rows of a block."""
    cdef Matrix matrix
    matrix.mask = mask_of(job, block, block.n0)
    matrix.mask_stride = job.cut.fold * job.cut.s
    matrix.rows = block.n1 - block.n0
    matrix.stride = job.cut.width
    matrix.channels = block.c1 - block.c0
    matrix.run = job.cut.s
    matrix.len = matrix.channels * matrix.run * job.cut.fold
    return matrix


cdef Matrix rest_rows(const Job *job, const Block *block) noexcept nogil:
    """The rows that are left over after the last folded one, as one row."""
    cdef Matrix matrix = folded_rows(job, block)
    matrix.mask = mask_of(job, block, block.n1)
    matrix.rows = 1 if block.rest > 0 else 0
    matrix.len = matrix.channels * matrix.run * block.rest
    return matrix


cdef void sum_columns(const Job *job, const Block *block, const double *centre, double *first,
                      double *second) noexcept nogil:
    """The sums of a block, of moments or, with a dy, of products."""
    cdef Matrix rows = folded_rows(job, block), rest = rest_rows(job, block)
    memset(first, 0, rows.channels * sizeof(double))
    memset(second, 0, rows.channels * sizeof(double))
    add_columns(job, &rows, offset_of(job, block, block.n0), centre, first, second)
    add_columns(job, &rest, offset_of(job, block, block.n1), centre, first, second)


cdef void add_columns(const Job *job, const Matrix *matrix, Py_ssize_t at, const double *centre,
                      double *first, double *second) noexcept nogil:
    if matrix.rows == 0:
        return
    if job.dy == NULL:
        job.kernels.column_moments(job.x + at, matrix, centre, first, second)
    else:
        job.kernels.column_products(job.dy + at, job.x + at, matrix, centre, first, second)


cdef void sum_columns_in_parts(const Job *job, const Block *block, const double *centre,
                               double *first, double *second) noexcept nogil:
    """The same, a few rows at a time; what rows are left over go with the last ones."""
    cdef Sums firsts, seconds
    cdef Block part = block[0]
    cdef Py_ssize_t i, parts = max(ceil_div(block.n1 - block.n0, ADDITIONS), 1)
    begin(&firsts, NULL, block.c1 - block.c0)
    begin(&seconds, NULL, block.c1 - block.c0)
    for i in range(parts):
        part.n0 = block.n0 + i * ADDITIONS
        part.n1 = min(part.n0 + ADDITIONS, block.n1)
        part.rest = block.rest if i == parts - 1 else 0
        sum_columns(job, &part, centre, first, second)
        add(&firsts, first, block.c1 - block.c0)
        add(&seconds, second, block.c1 - block.c0)
    write_sums(&firsts, block.c1 - block.c0, first)
    write_sums(&seconds, block.c1 - block.c0, second)


cdef void normalize_columns(const Job *job, const Block *block) noexcept nogil:
    cdef Affine affine
    cdef Matrix rows = folded_rows(job, block), rest = rest_rows(job, block)
    cdef Py_ssize_t at = offset_of(job, block, block.n0)
    cdef Py_ssize_t end = offset_of(job, block, block.n1)
    affine_of(job, block, &affine)
    if rest.rows > 0:
        job.kernels.column_normalize(job.x + end, job.out + end, &rest, &affine, False)
    job.kernels.column_normalize(job.x + at, job.out + at, &rows, &affine, job.stream)


cdef void gradient_columns(const Job *job, const Block *block) noexcept nogil:
    cdef Gradient gradient
    cdef Matrix rows = folded_rows(job, block), rest = rest_rows(job, block)
    cdef Py_ssize_t at = offset_of(job, block, block.n0)
    cdef Py_ssize_t end = offset_of(job, block, block.n1)
    gradient_of(job, block, &gradient)
    if rest.rows > 0:
        job.kernels.column_gradient(job.dy + end, job.x + end, job.out + end, &rest, &gradient,
                                    False)
    job.kernels.column_gradient(job.dy + at, job.x + at, job.out + at, &rows, &gradient,
                                job.stream)


# ------------------------------------------------------------------ who does what

cdef Py_ssize_t bytes_of(const Job *job) noexcept nogil:
    """The size of an array."""
    return job.cut.batches * job.cut.n * job.cut.c * job.cut.s * job.itemsize


cdef Py_ssize_t group_bytes(const Job *job) noexcept nogil:
    """What a group of a batch reads."""
    cdef Py_ssize_t inputs = 1 if job.dy == NULL else 2
    return max(job.cut.n * job.cut.group * job.cut.s * job.itemsize * inputs, 1)


cdef Py_ssize_t groups_of(const Job *job) noexcept nogil:
    """The groups of all batches."""
    return job.cut.batches * job.cut.groups


cdef bint streams(const Job *job) noexcept nogil:
    """Whether to store around the cache."""
    cdef Py_ssize_t arrays = 2 if job.dy == NULL else 3
    cdef Py_ssize_t moved = arrays * bytes_of(job)
    # Strips that are not the whole width of a matrix are short runs. So are groups of rows where
    # there are many threads; but what is not stored around the cache takes longer there, too: runs
    # of 64 to 800 bytes up to 1.8 times the CPU time of a training forward.
    cdef Py_ssize_t channels = job.cut.group if job.cut.columns else job.cut.c
    cdef Py_ssize_t run = channels * job.cut.s * job.itemsize
    return (moved > near_bytes and (job.cut.groups == 1 or run >= STREAM_RUN_BYTES)
            and job.out != job.x and job.out != job.dy)


# A task of those that the threads share, of some groups from g0 on.
ctypedef void (*Task)(const Job *job, Py_ssize_t g0, Py_ssize_t groups,
                      Py_ssize_t t) noexcept nogil


cdef void share(const Job *job, Task task, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t tasks,
                int threads) noexcept nogil:
    """Do all tasks. A parallel region of one thread would cost a microsecond."""
    cdef Py_ssize_t t
    cdef double busy = 0.0, start
    cdef double *busy_here = &busy
    if threads == 1:
        for t in range(tasks):
            task(job, g0, groups, t)
    else:
        start = fastbn_seconds()
        for t in prange(tasks, schedule="dynamic", num_threads=threads):
            do_timed(job, task, g0, groups, t, busy_here)
        avoid_waiting(fastbn_seconds() - start - busy, busy)


cdef void do_timed(const Job *job, Task task, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t t,
                   double *busy) noexcept nogil:
    """Do a task; add what it takes to the time for which the calling thread was busy."""
    cdef double start
    if threadid() != 0:
        task(job, g0, groups, t)
        return
    start = fastbn_seconds()
    task(job, g0, groups, t)
    busy[0] += fastbn_seconds() - start


cdef void avoid_waiting(double idle, double busy) noexcept nogil:
    """Let the next calls run alone if this one would have been faster so.

    A region of OpenMP ends when all threads have come to its end, and where another process has a
    thread's CPU that takes a slice of the scheduler, many times a small array's time. Such waits
    should be rarer than one call in a hundred.
    """
    global calls_alone, next_alone
    if waits_avoided and idle > LONG_WAIT and idle > busy:
        calls_alone = max(next_alone, FEWEST_ALONE)
        next_alone = min(2 * calls_alone, MOST_ALONE)


cdef int threads_now(int threads) noexcept nogil:
    """How many threads a call that could use so many takes."""
    global calls_alone, next_alone
    if not waits_avoided or threads == 1:
        return threads
    if calls_alone > 0:
        calls_alone -= 1
        return 1
    next_alone -= next_alone > 0
    return threads


cdef void apply_block(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(&job.cut, g, b)
    job.apply(job, &block)
    if job.stream:
        job.kernels.fence_nontemporal()


cdef void finish_group(const Job *job, Py_ssize_t g0, Py_ssize_t groups,
                       Py_ssize_t t) noexcept nogil:
    """All steps of a group, by one thread while it sits in that thread's cache.

    The second walk goes backwards, to begin with what is in the cache.
    """
    cdef Py_ssize_t b
    for b in range(job.cut.blocks):
        job.reduce(job, g0 + t, b)
    job.merge(job, g0 + t)
    if job.apply != NULL:
        for b in range(job.cut.blocks - 1, -1, -1):
            apply_block(job, g0 + t, b)


cdef void reduce_one(const Job *job, Py_ssize_t g0, Py_ssize_t groups,
                     Py_ssize_t t) noexcept nogil:
    job.reduce(job, g0 + t % groups, t // groups)


cdef void apply_one(const Job *job, Py_ssize_t g0, Py_ssize_t groups,
                    Py_ssize_t t) noexcept nogil:
    """In the order of memory, or backwards after a walk that has left its end in the cache."""
    cdef Py_ssize_t u = t if job.reduce == NULL else groups * job.cut.blocks - 1 - t
    apply_block(job, g0 + u % groups, u // groups)


cdef void run_round(const Job *job, Py_ssize_t g0, Py_ssize_t groups, int threads) noexcept nogil:
    """The threads share the blocks of some groups, one step after the other."""
    cdef Py_ssize_t g, tasks = groups * job.cut.blocks
    if job.reduce != NULL:
        share(job, reduce_one, g0, groups, tasks, threads)
        for g in range(g0, g0 + groups):
            job.merge(job, g)
    if job.apply != NULL:
        share(job, apply_one, g0, groups, tasks, threads)


cdef void run_rounds(const Job *job, int threads) noexcept nogil:
    """Rounds of so many groups that the second walk finds them in the third-level cache."""
    cdef Py_ssize_t r, most = max(near_bytes // (2 * group_bytes(job)), 1), groups = groups_of(job)
    for r in range(ceil_div(groups, most)):
        run_round(job, r * most, min(most, groups - r * most), threads)


cdef void run_batches(Job *job, int threads) noexcept nogil:
    """Run a job on at most so many threads, but for its rest."""
    cdef int inputs = 1 if job.dy == NULL else 2
    cdef Py_ssize_t moved = bytes_of(job) * (
        inputs * ((job.reduce != NULL) + (job.apply != NULL)) + (job.apply != NULL))
    threads = threads_now(<int>min(<Py_ssize_t>threads, max(moved // BYTES_PER_THREAD, 1)))
    if job.cut.columns:
        group_columns(&job.cut, threads)
    elif job.reduce != NULL:
        group_rows(&job.cut, job.itemsize, inputs, threads)
    else:
        block_rows(&job.cut, job.itemsize, threads)
    job.stream = job.apply != NULL and job.kernels.fence_nontemporal != NULL and streams(job)
    if job.parts != NULL and job.cut.groups > 0:
        find_parts(job)
    if job.reduce == NULL:
        run_round(job, 0, groups_of(job), threads)
    elif threads == 1 or job.cut.blocks < 2 or (
            groups_of(job) >= 4 * threads and group_bytes(job) * threads <= near_bytes):
        share(job, finish_group, 0, groups_of(job), groups_of(job), threads)
    else:
        run_rounds(job, threads)


cdef Job rest_of(const Job *job) noexcept nogil:
    """The job on the samples after the batches, as a batch of its own."""
    cdef Job rest = job[0]
    cdef Py_ssize_t batches = job.cut.batches, results = batches * job.cut.c
    cdef Py_ssize_t elements = job.cut.n * job.cut.s, done = bytes_of(job)
    cdef Vector *vectors[6]
    cdef int i
    rest.cut = cut_work(1, job.rest, job.cut.c, elements // job.samples, job.channels_last)
    rest.count = <double>(job.rest * (elements // job.samples))
    rest.x += done
    rest.dy += 0 if job.dy == NULL else done
    rest.out += 0 if job.out == NULL else done
    rest.mask += 0 if job.mask == NULL else batches * elements
    vectors[:] = [&rest.weight, &rest.mean, &rest.invstd, &rest.bias, &rest.sum_dy,
                  &rest.sum_dy_xhat]
    for i in range(6):
        vectors[i].data += batches * vectors[i].batch_stride
    if job.mean_out != NULL:
        rest.mean_out, rest.m2_out = rest.mean_out + results, rest.m2_out + results
    if job.invstd_out != NULL:
        rest.invstd_out += results
    if job.sum_dy_out != NULL:
        rest.sum_dy_out += results
        rest.sum_dy_xhat_out += results
    return rest


cdef int run(Job *job, int threads) except -1:
    """Run a job on at most so many threads; nothing has been written if this raises."""
    cdef Job rest
    allocate(job)
    with nogil:
        run_batches(job, threads)
        if job.rest > 0:
            rest = rest_of(job)
            run_batches(&rest, threads)
    release(job)
    return 0


cdef int allocate(Job *job) except -1:
    """Get the memory for sums, if there are any."""
    cdef Py_ssize_t blocks = job.cut.batches * job.cut.blocks
    if job.reduce == NULL:
        return 0
    job.partial = <double *>malloc((2 * job.cut.c * blocks + 1) * sizeof(double))
    if job.mask != NULL:
        job.parts = <Part *>malloc((blocks + 1) * sizeof(Part))
        job.counts = <double *>malloc((job.cut.batches + 1) * sizeof(double))
    if job.partial == NULL or job.mask != NULL and (job.parts == NULL or job.counts == NULL):
        release(job)
        raise MemoryError("no memory for the partial sums of the blocks")
    return 0


cdef void release(Job *job) noexcept:
    free(job.partial)
    free(job.parts)
    free(job.counts)


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
    """An array of one value per channel, or per batch and channel; the default for None."""
    cdef Vector vector
    cdef const ArrayStruct *described
    memset(&vector, 0, sizeof(Vector))
    vector.value = default
    if array is not None:
        capsule = array.__array_struct__
        described = struct_of(capsule)
        vector.data = described.data
        vector.stride = described.strides[described.nd - 1]
        vector.batch_stride = described.strides[0] if described.nd == 2 else 0
        vector.kernels = kernels_of(described)
    return vector


cdef double *written(object array, Vector *vector) except NULL:
    """The data of a new float64 array, which the job's later steps read as the vector."""
    vector[0] = vector_of(array, 0.0)
    return <double *>vector.data


# ------------------------------------------------------------------ the jobs
#
# x has a layout that is not 0, dy and out the same layout, shape and dtype. A batch has so many
# samples, of which x has a multiple; 0 stands for all of them. Where there is more than one batch,
# what is written per channel has the shape (batches, c), and what is read may have it. A mask is
# None or a C-contiguous array of the shape of x without its channels, of 255 and 0, behind which
# are mask_padding more bytes.

mask_padding = MASK_BYTES


cdef Job new_job(object x, object mask, Py_ssize_t batch_size) except *:
    """A job on x that has no steps yet."""
    cdef Job job
    cdef Py_ssize_t n, batches = 1, rest = 0, s = 1
    cdef int axis
    capsule = x.__array_struct__
    cdef const ArrayStruct *described = struct_of(capsule)
    n = described.shape[0]
    for axis in range(2, described.nd):
        s *= described.shape[axis]
    if 0 < batch_size < n:
        batches, rest, n = n // batch_size, n % batch_size, batch_size
    memset(&job, 0, sizeof(Job))
    job.x = described.data
    job.itemsize = described.itemsize
    job.refine = described.itemsize == sizeof(double)
    job.kernels = kernels_of(described)
    job.channels_last = not described.flags & C_CONTIGUOUS
    job.cut = cut_work(batches, n, described.shape[1], s, job.channels_last)
    job.samples, job.rest = n, rest
    job.count = <double>(n * s)
    if not job.cut.columns:
        job.sum = sum_rows
    else:
        job.sum = sum_columns_in_parts if job.refine else sum_columns
    if mask is not None:
        job.mask = <const unsigned char *>address(mask)
    return job


cdef int write_to(Job *job, object out, BlockWrite rows, BlockWrite columns) except -1:
    """Let the job apply its outcome to out."""
    job.out = address(out)
    job.apply = columns if job.cut.columns else rows
    return 0


def stats(x, mask, Py_ssize_t batch_size, mean, m2, int threads):
    """Write the mean and m2 of every channel of x."""
    cdef Job job = new_job(x, mask, batch_size)
    cdef Vector unread
    job.mean_out, job.m2_out = written(mean, &job.mean), written(m2, &unread)
    job.reduce, job.merge = reduce_moments, merge_moments
    run(&job, threads)


def elemt(x, mask, mean, invstd, var, double eps, weight, bias, out, int threads):
    """Write x, normalized by mean and either invstd or var and eps, into out."""
    cdef Job job = new_job(x, mask, 0)
    job.mean, job.invstd, job.var = vector_of(mean, 0), vector_of(invstd, 1), vector_of(var, 1)
    job.weight, job.bias = vector_of(weight, 1.0), vector_of(bias, 0.0)
    job.eps = eps
    write_to(&job, out, normalize_rows, normalize_columns)
    run(&job, threads)


def forward(x, mask, Py_ssize_t batch_size, weight, bias, double eps, out, mean, m2, invstd,
            int threads):
    """Write x, normalized by its own statistics, into out, and those statistics."""
    cdef Job job = new_job(x, mask, batch_size)
    cdef Vector unread
    job.mean_out, job.m2_out = written(mean, &job.mean), written(m2, &unread)
    job.invstd_out = written(invstd, &job.invstd)
    job.weight, job.bias = vector_of(weight, 1.0), vector_of(bias, 0.0)
    job.eps = eps
    job.reduce, job.merge = reduce_moments, merge_moments
    write_to(&job, out, normalize_rows, normalize_columns)
    run(&job, threads)


def move_towards(running, batches, divisors, factors):
    """Set running to (1 - factor) * running + factor * batch / divisor, batch after batch.

    Running statistics that have the shape of the batches take a row each.
    """
    cdef Vector moved = vector_of(running, 0.0), target = vector_of(batches, 0.0)
    cdef Py_ssize_t k
    for k in range(len(factors)):
        move_once(&moved, &target, k, running.shape[-1], divisors[k], factors[k])


cdef void move_once(const Vector *moved, const Vector *target, Py_ssize_t batch, Py_ssize_t count,
                    double divisor, double factor) noexcept:
    cdef double values[COLUMNS]
    cdef double targets[COLUMNS]
    cdef Block block
    cdef Py_ssize_t c, i
    block.batch = batch
    for i in range(ceil_div(count, COLUMNS)):
        block.c0, block.c1 = i * COLUMNS, min((i + 1) * COLUMNS, count)
        read(moved, &block, values)
        read(target, &block, targets)
        for c in range(block.c1 - block.c0):
            values[c] = (1.0 - factor) * values[c] + factor * (targets[c] / divisor)
        moved.kernels.store_from_double(values, moved.stride, block.c1 - block.c0,
                                        <char *>start_of_vector(moved, &block))


cdef Job new_backward_job(dy, x, mask, Py_ssize_t batch_size, mean, invstd) except *:
    cdef Job job = new_job(x, mask, batch_size)
    job.dy = address(dy)
    job.mean, job.invstd = vector_of(mean, 0.0), vector_of(invstd, 1.0)
    return job


def backward_reduce(dy, x, mask, mean, invstd, sum_dy, sum_dy_xhat, int threads):
    """Write the sums of dy and of dy * xhat of every channel."""
    cdef Job job = new_backward_job(dy, x, mask, 0, mean, invstd)
    job.sum_dy_out = written(sum_dy, &job.sum_dy)
    job.sum_dy_xhat_out = written(sum_dy_xhat, &job.sum_dy_xhat)
    job.reduce, job.merge = reduce_products, merge_products
    run(&job, threads)


def backward_elemt(dy, x, mask, mean, invstd, weight, sum_dy, sum_dy_xhat, double count, out,
                   int threads):
    """Write the gradient of x into out, by the given sums over count elements."""
    cdef Job job = new_backward_job(dy, x, mask, 0, mean, invstd)
    job.sum_dy, job.sum_dy_xhat = vector_of(sum_dy, 0.0), vector_of(sum_dy_xhat, 0.0)
    job.weight = vector_of(weight, 1.0)
    job.count = count
    write_to(&job, out, gradient_rows, gradient_columns)
    run(&job, threads)


def backward(dy, x, mask, Py_ssize_t batch_size, weight, mean, invstd, out, sum_dy, sum_dy_xhat,
             int threads):
    """Write the gradient of x into out, and the sums of dy and of dy * xhat."""
    cdef Job job = new_backward_job(dy, x, mask, batch_size, mean, invstd)
    job.sum_dy_out = written(sum_dy, &job.sum_dy)
    job.sum_dy_xhat_out = written(sum_dy_xhat, &job.sum_dy_xhat)
    job.weight = vector_of(weight, 1.0)
    job.reduce, job.merge = reduce_products, merge_products
    write_to(&job, out, gradient_rows, gradient_columns)
    run(&job, threads)
