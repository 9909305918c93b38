# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""The loops over channels: how the work is cut, which thread does what, and how sums merge.

What a block is depends on the shape, and on whether a mask leaves out anything, and partial sums
merge in a fixed order, so the result has the same bits for every number of threads.

The functions trust their caller: arrays have the right shapes, dtypes and layouts.
"""

import os

cimport cython
cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.pystate cimport PyThreadState
from cpython.ref cimport Py_INCREF, PyTypeObject
from cython.parallel cimport prange
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.math cimport INFINITY, fabs, fmod, isfinite, isnan, pow
from libc.stdint cimport INT32_MAX, INT64_MAX, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset


cdef extern from "Python.h":
    PyThreadState *PyEval_SaveThread()
    void PyEval_RestoreThread(PyThreadState *state)


cdef extern from "kernels.h" nogil:
    enum:
        LANES "FASTBN_LANES"
        GROUP "FASTBN_GROUP"
        COLUMNS "FASTBN_COLUMNS"
        ADDITIONS "FASTBN_ADDITIONS"
        MASK_BYTES "FASTBN_MASK_BYTES"
        STREAM_BYTES "FASTBN_STREAM_BYTES"

    ctypedef struct Affine "fastbn_affine":
        double centre[COLUMNS]
        double scale[COLUMNS]
        double shift[COLUMNS]

    ctypedef struct Gradient "fastbn_gradient":
        double dy_mean[COLUMNS]
        double x_mean[COLUMNS]
        double slope[COLUMNS]
        double scale[COLUMNS]

    enum:
        LINEAR "FASTBN_LINEAR"
        RELU "FASTBN_RELU"
        LEAKY_RELU "FASTBN_LEAKY_RELU"
        LEAKY_RELU_INVERTED "FASTBN_LEAKY_RELU_INVERTED"

    ctypedef struct Activation "fastbn_activation":
        int kind
        double slope, cap

    ctypedef struct Epilogue "fastbn_epilogue":
        Activation activation
        const void *residual
        unsigned char *alive
        Py_ssize_t first

    ctypedef struct Gate "fastbn_gate":
        Activation activation
        const double *low
        const double *high

    ctypedef struct Ahead "fastbn_ahead":
        Py_ssize_t near, border, jump

    ctypedef struct Runs "fastbn_runs":
        Py_ssize_t samples, stride, channels, len
        Ahead ahead
        Ahead residual_ahead
        const unsigned char *mask
        Py_ssize_t mask_stride

    ctypedef struct Matrix "fastbn_matrix":
        Py_ssize_t rows, len, stride, channels, run
        const unsigned char *mask
        Py_ssize_t mask_stride

    ctypedef void SumMoments "fastbn_moments"(const void *x, const Runs *runs, const double *pivot,
                                              double *first, double *second) noexcept nogil
    ctypedef void SumProducts "fastbn_products"(const void *dy, const void *x, const Runs *runs,
                                                const double *mean, const Gate *gate,
                                                double *first, double *second) noexcept nogil
    ctypedef void SumColumnMoments "fastbn_column_moments"(const void *x, const Matrix *matrix,
                                                           const double *pivot, double *first,
                                                           double *second) noexcept nogil
    ctypedef void SumColumnProducts "fastbn_column_products"(const void *dy, const void *x,
                                                             const Matrix *matrix,
                                                             const double *mean,
                                                             const Gate *gate, double *first,
                                                             double *second) noexcept nogil

    ctypedef struct Kernels "fastbn_kernels":
        void (*load_as_double)(const void *x, Py_ssize_t stride, Py_ssize_t count,
                               double *to) noexcept nogil
        void (*store_from_double)(const double *from_, Py_ssize_t stride, Py_ssize_t count,
                                  void *to) noexcept nogil
        SumMoments *moments
        SumProducts *products
        SumColumnMoments *column_moments
        SumColumnProducts *column_products
        SumMoments *tree_moments
        SumProducts *tree_products
        SumColumnProducts *column_tree_products
        SumMoments *raw_moments
        SumColumnMoments *column_raw_moments
        void (*pivots)(const void *x, const Py_ssize_t *at, Py_ssize_t count, Py_ssize_t stride,
                       Py_ssize_t channels, double *pivot) noexcept nogil
        void (*normalize)(const void *x, void *y, const Runs *runs, const Affine *affine,
                          const Epilogue *epilogue, int nontemporal) noexcept nogil
        void (*gradient)(const void *dy, const void *x, void *dx, const Runs *runs,
                         const Gradient *gradient, const Gate *gate,
                         int nontemporal) noexcept nogil
        void (*column_normalize)(const void *x, void *y, const Matrix *matrix,
                                 const Affine *affine, const Epilogue *epilogue,
                                 int nontemporal) noexcept nogil
        void (*column_gradient)(const void *dy, const void *x, void *dx, const Matrix *matrix,
                                const Gradient *gradient, const Gate *gate,
                                int nontemporal) noexcept nogil
        void (*gate_bounds)(const Affine *affine, const Activation *activation, Py_ssize_t count,
                            double *low, double *high) noexcept nogil
        void (*activation_gradient)(const void *dy, const void *y, const unsigned char *alive,
                                    Py_ssize_t first, Py_ssize_t count,
                                    const Activation *activation, void *to) noexcept nogil

    ctypedef struct Recovery "fastbn_recovery":
        double least, greatest, reach, ratio

    ctypedef struct CommonKernels "fastbn_common_kernels":
        Py_ssize_t (*count_valid)(const unsigned char *mask, Py_ssize_t len) noexcept nogil
        void (*invstd)(const double *m2, double n, double eps, Py_ssize_t count,
                       double *invstd) noexcept nogil
        void (*mean_and_m2)(const double *pivot, const double *first, const double *second,
                            double n, Py_ssize_t count, double *mean, double *m2) noexcept nogil
        bint (*float32_mean_and_m2)(const double *pivot, const double *first,
                                    const double *second, double n, Py_ssize_t count,
                                    double *mean, double *m2) noexcept nogil
        bint (*raw_mean_and_m2)(const double *first, const double *second, double n,
                                Py_ssize_t count, double *mean, double *m2) noexcept nogil
        bint (*float32_products)(const double *mean, const double *first, double n,
                                 Py_ssize_t count, double *second) noexcept nogil
        void (*move_towards)(const double *target, double divisor, double factor,
                             Py_ssize_t count, double *moved) noexcept nogil
        void (*multiply)(const double *by, Py_ssize_t count, double *multiplied) noexcept nogil
        void (*gradient_coefficients)(const double *invstd, double n, Py_ssize_t count,
                                      double *dy_mean, double *slope, double *scale) noexcept nogil
        bint (*any_huge)(const double *mean, Py_ssize_t count) noexcept nogil
        bint (*all_recoverable)(const double *weight, const double *bias, double slope,
                                const Recovery *recovery, Py_ssize_t count) noexcept nogil
        void (*fence_nontemporal)() noexcept nogil

    ctypedef struct Isa "fastbn_isa":
        const char *name
        const CommonKernels *common
        const Kernels *float32
        const Kernels *float64
        const Kernels *float16
        const Kernels *bfloat16


cdef extern from "platform.h" nogil:
    int fastbn_supported_isas(const Isa **isas, int capacity)
    Py_ssize_t fastbn_cache_bytes(int level)
    int fastbn_omp_max_threads()
    bint fastbn_omp_pause()
    bint fastbn_borrow_threads(const char *library)
    ctypedef void fastbn_work(void *data, int share) noexcept nogil
    bint fastbn_on_borrowed_threads(fastbn_work *work, void *data, int shares)
    double fastbn_seconds()
    ctypedef struct fastbn_range:
        pass
    void fastbn_set_range(fastbn_range *range, Py_ssize_t first, Py_ssize_t end)
    Py_ssize_t fastbn_take_first(fastbn_range *range, Py_ssize_t reserved)
    Py_ssize_t fastbn_take_last(fastbn_range *range, Py_ssize_t reserved)
    const char *fastbn_compiler()
    const char *fastbn_openmp()


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


def borrow_threads(library):
    """Let the threads of the OpenMP runtime that a library is loaded with do the work.

    Tell whether it has one.
    """
    return fastbn_borrow_threads(os.fsencode(library))


include "core/threads.pxi"
include "core/trials.pxi"
include "core/caches.pxi"
include "core/cut.pxi"

# ------------------------------------------------------------------ a job and its three steps

# A job reduces every block of every group to partial sums, merges those of each channel, and
# applies the outcome to every block. A step that a job does not have is NULL.
ctypedef void (*BlockStep)(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil
ctypedef void (*GroupStep)(const Job *job, Py_ssize_t g) noexcept nogil

ctypedef void (*ApplyBlock)(const Job *job, const Block *block) noexcept nogil

# How the batches of a job are divided among threads.
ctypedef void (*Schedule)(Job *job, int threads) noexcept nogil

# One value per channel, or per batch and channel, of any of the four dtypes, alignment and strides.
cdef struct Vector:
    const char *data              # NULL stands for a vector of one and the same value
    Py_ssize_t stride
    Py_ssize_t batch_stride       # 0 if all batches have the same values
    const Kernels *kernels
    double value

# Where a job writes what it finds about batches: each of (batches, c).
cdef struct Statistics:
    double *mean
    double *m2
    double *invstd

# Running statistics, and how they move towards those of a batch: the variance is m2 / divisor.
cdef struct Running:
    Vector mean, var
    double divisor, factor

# The sums of the gradients of weight and bias, which begin with a batch's or are added to.
cdef struct GradientSums:
    Vector weight, bias           # without data if there are none
    bint weight_is_new, bias_is_new

# The valid positions of a block.
cdef struct BlockValid:
    Py_ssize_t count              # how many there are of each channel
    Py_ssize_t first              # the first one, in the order of the mask's memory

cdef struct Job:
    Cut cut
    Py_ssize_t samples            # of a batch
    Py_ssize_t leftover_samples   # those after the batches, which make up a smaller one
    bint channels_last
    Py_ssize_t itemsize
    const Kernels *kernels
    BlockStep reduce
    GroupStep merge
    ApplyBlock apply
    Schedule schedule
    bint refine_pivot             # whether a pivot must be near the mean
    bint in_float32               # whether sums may be as exact as float32, where that is faster
    bint in_float64               # whether the gradient of x is computed in float64, for its range
    int tries                     # what it tries: STORES, THREADS or NOTHING
    Trial *trial                  # the trial of that, if there is one
    int way                       # 0 or 1: the way that the trial has chosen for this call
    bint nontemporal              # whether the output is written by non-temporal stores
    bint reads_ahead              # whether a group's second walk prefetches the next group
    bint finds_cached             # whether its results need no prefetches, as caches have all
    double *partial_sums          # of (batches, blocks, 2, c): mean and m2, or the two sums
    const unsigned char *mask     # of (batches, n, s), 255 at valid positions; NULL if all are
    BlockValid *valid             # of (batches, blocks), if there is a mask
    const char *dy
    const char *x
    char *out
    char *kept                    # or NULL; a copy of x is written there before out, which is x
    Activation activation
    bint has_epilogue             # whether a residual or the activation follows a normalization
    const char *residual
    unsigned char *alive          # a bit for each element of the array: see the kernels' epilogue
    bint has_gate                 # whether dy passes a gate in the kernels
    Vector gate_weight, gate_bias  # those of the forward
    double *gate_bounds           # of (2, batches, c): the lower ones, then the higher ones
    Py_ssize_t first_element      # the number of x's first one in the whole array
    const char *raw_dy            # or NULL; dy is the product of this and of the derivative, which
    const char *y                 # the bits or the output tell, and is written block by block
    Vector weight, bias, mean, invstd
    Vector var                    # instead of invstd, if it has data
    Vector sum_dy, sum_dy_xhat
    double *mean_out              # this and the other results: of (batches, c)
    double *m2_out
    double *invstd_out
    double *sum_dy_out
    double *sum_dy_xhat_out
    # What the merge of a channel's sums moves towards its statistics, and what it adds the sums to:
    # that thread has them in its cache. NULL for neither, and where there are several batches.
    const Running *running
    const GradientSums *gradients
    double eps
    double count                  # the elements of a channel that the sums are over
    double *counts                # the same for each batch, if there is a mask


cdef void init_job(Job *job, const char *x, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s,
                   Py_ssize_t itemsize, int type_num, bint channels_last,
                   Py_ssize_t batch_size) noexcept nogil:
    """Make a job on x that has no steps yet.

    x has the shape (n, c, s), or in memory (n, s, c) with the channels last. A batch has
    `batch_size` samples, the last one may have fewer; 0 stands for all samples.
    """
    cdef Py_ssize_t batches = 1
    memset(job, 0, sizeof(Job))
    if 0 < batch_size < n:
        batches, job.leftover_samples, n = n // batch_size, n % batch_size, batch_size
    job.samples = n
    job.x, job.itemsize, job.channels_last = x, itemsize, channels_last
    job.kernels = kernels_of(itemsize, type_num)
    job.refine_pivot = itemsize == sizeof(double)
    job.cut = cut_work(batches, n, c, s, channels_last)
    job.count = <double>(n * s)
    job.schedule = execute_batches
    job.weight = job.invstd = job.var = constant(1.0)


cdef void reduce_to_moments(Job *job, double *mean, double *m2, double *invstd) noexcept nogil:
    """Let the job find the statistics of x; invstd may be NULL."""
    job.mean_out, job.m2_out, job.invstd_out = mean, m2, invstd
    job.reduce, job.merge = reduce_moments, merge_moments


cdef void normalize_by(Job *job, const Statistics *found) noexcept nogil:
    """Let the job find the statistics of x, and normalize by them."""
    reduce_to_moments(job, found.mean, found.m2, found.invstd)
    job.mean = vector_of_batches(found.mean, job.cut.c)
    job.invstd = vector_of_batches(found.invstd, job.cut.c)


cdef void reduce_to_products(Job *job, double *sum_dy, double *sum_dy_xhat) noexcept nogil:
    """Let the job find the sums of dy and of dy * xhat."""
    job.sum_dy_out, job.sum_dy_xhat_out = sum_dy, sum_dy_xhat
    job.reduce, job.merge = reduce_products, merge_products


cdef void sum_in_float32(Job *job) noexcept nogil:
    """Let sums be no more exact than results in float32 need: nothing else is made of them."""
    job.in_float32 = job.itemsize < <Py_ssize_t>sizeof(double)


cdef void apply_normalize(Job *job, char *out) noexcept nogil:
    """Let the job write x, normalized, to out."""
    job.out = out
    job.apply = normalize_block


cdef void apply_gradient(Job *job, char *out) noexcept nogil:
    """Let the job write the gradient of x to out."""
    job.out = out
    job.apply = gradient_block


# ------------------------------------------------------------------ where things are


cdef const char *start_of_vector(const Vector *vector, const Block *block) noexcept nogil:
    """Where the value of a block's first channel is."""
    return vector.data + block.batch * vector.batch_stride + block.c0 * vector.stride


cdef Block some_channels(Py_ssize_t i, Py_ssize_t channels) noexcept nogil:
    """The i-th COLUMNS of a number of channels, of the first batch."""
    cdef Block block
    memset(&block, 0, sizeof(Block))
    block.c0, block.c1 = i * COLUMNS, min((i + 1) * COLUMNS, channels)
    return block


cdef void read_vector(const Vector *vector, const Block *block, double *to) noexcept nogil:
    """The values of a block's channels."""
    cdef Py_ssize_t c, count = block.c1 - block.c0
    if vector.data != NULL:
        vector.kernels.load_as_double(start_of_vector(vector, block), vector.stride, count, to)
        return
    for c in range(count):
        to[c] = vector.value


cdef void read_invstd(const Job *job, const Block *block, double *to) noexcept nogil:
    if job.var.data == NULL:
        read_vector(&job.invstd, block, to)
        return
    read_vector(&job.var, block, to)
    isa_in_use.common.invstd(to, 1.0, job.eps, block.c1 - block.c0, to)


cdef double *results_of(const Job *job, double *vectors, const Block *block) noexcept nogil:
    """Where the results of a block's channels are in an array of (batches, c)."""
    return vectors + block.batch * job.cut.c + block.c0


cdef double *partial_sums_of(const Job *job, const Block *block, Py_ssize_t b) noexcept nogil:
    """Where the first of the partial sums of a block's channels are; the second are c further."""
    return job.partial_sums + 2 * (block.batch * job.cut.blocks + b) * job.cut.c + block.c0


cdef Py_ssize_t samples_of(const Job *job, const Block *block) noexcept nogil:
    """The samples, or rows of the matrix, of a block."""
    return (block.n1 - block.n0) * job.cut.fold + block.leftover_rows


cdef Py_ssize_t sample_of(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The number of a sample, or folded row, of a batch among the samples of the array."""
    return block.batch * job.cut.n + n * job.cut.fold


cdef Py_ssize_t offset_of(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The bytes before the block's elements of sample, or folded row, n."""
    cdef Py_ssize_t runs = sample_of(job, block, n) * job.cut.c + block.c0
    return (runs * job.cut.s + block.s0) * job.itemsize


cdef Py_ssize_t element_of(const Job *job, const Block *block, Py_ssize_t at) noexcept nogil:
    """The number, in the array, of an element of the block's first channel."""
    cdef Py_ssize_t s = job.cut.s
    return (at // s * job.cut.c + block.c0) * s + at % s


cdef const unsigned char *mask_of(const Job *job, const Block *block,
                                  Py_ssize_t n) noexcept nogil:
    """The mask of the block's elements of sample, or folded row, n."""
    if job.mask == NULL:
        return NULL
    return job.mask + sample_of(job, block, n) * job.cut.s + block.s0


include "core/coefficients.pxi"
include "core/running.pxi"
include "core/range.pxi"
include "core/valid.pxi"
include "core/activation.pxi"
include "core/sums.pxi"
include "core/row_layout.pxi"
include "core/pieces.pxi"
include "core/column_layout.pxi"
include "core/layouts.pxi"
include "core/schedule.pxi"
include "core/stores.pxi"
include "core/tried.pxi"
include "core/arrays.pxi"


# ------------------------------------------------------------------ the entry points
#
# x has a layout that is not 0, dy and out the same layout, shape and dtype. A batch has so many
# samples, the last one the remaining ones; 0 stands for all of them. Where there is more than one
# batch, what is written per channel has the shape (batches, c), and what is read may have it. A
# mask is None or a C-contiguous array of the shape of x without its channels, of 255 and 0, behind
# which are mask_padding more bytes.
#
# An activation is None or its name. A residual has x's layout, shape and dtype; `alive` is None, or
# an array of alive_bytes(x) zeros that takes the bits of which a backward can tell the derivatives.

mask_padding = MASK_BYTES


def stats(cnp.ndarray x not None, cnp.ndarray mask, Py_ssize_t batch_size,
          cnp.ndarray mean not None, cnp.ndarray m2 not None):
    """Write the mean and m2 of every channel of x."""
    cdef Job job
    cdef Vector unread
    init_job_on(&job, x, mask, batch_size)
    reduce_to_moments(&job, output_vector(mean, &job.mean), output_vector(m2, &unread), NULL)
    execute(&job)


def elemt(cnp.ndarray x not None, cnp.ndarray mask, cnp.ndarray mean, cnp.ndarray invstd,
          cnp.ndarray var, double eps, cnp.ndarray weight, cnp.ndarray bias,
          cnp.ndarray out not None, activation=None, double slope=0.0,
          cnp.ndarray residual=None, cnp.ndarray alive=None):
    """Write x, normalized by mean and either invstd or var and eps, into out."""
    cdef Job job
    init_job_on(&job, x, mask, 0)
    job.mean, job.invstd, job.var = vector_of(mean, 0), vector_of(invstd, 1), vector_of(var, 1)
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = eps
    apply_normalize(&job, cnp.PyArray_BYTES(out))
    set_epilogue(&job, activation_of(activation, slope), residual, alive)
    execute(&job)


def forward(cnp.ndarray x not None, cnp.ndarray mask, Py_ssize_t batch_size, cnp.ndarray weight,
            cnp.ndarray bias, double eps, cnp.ndarray out not None, cnp.ndarray mean not None,
            cnp.ndarray m2 not None, cnp.ndarray invstd not None, activation=None,
            double slope=0.0, cnp.ndarray residual=None, cnp.ndarray alive=None):
    """Write x, normalized by its own statistics, into out, and those statistics."""
    cdef Job job
    cdef Statistics found = statistics_in(mean, m2, invstd)
    init_job_on(&job, x, mask, batch_size)
    normalize_by(&job, &found)
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = eps
    sum_in_float32(&job)
    apply_normalize(&job, cnp.PyArray_BYTES(out))
    set_epilogue(&job, activation_of(activation, slope), residual, alive)
    execute(&job)


def move_towards(cnp.ndarray running not None, cnp.ndarray batches not None, divisors, factors):
    """Set running to (1 - factor) * running + factor * batch / divisor, batch after batch.

    Running statistics that have the shape of the batches take one batch's values each.
    """
    cdef Vector moved = vector_of(running, 0), target = vector_of(batches, 0)
    cdef Py_ssize_t k, channels = cnp.PyArray_DIMS(running)[cnp.PyArray_NDIM(running) - 1]
    for k in range(len(factors)):
        move_batch(&moved, &target, k, channels, divisors[k], factors[k])


cdef void init_backward_job_on(Job *job, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mask,
                               Py_ssize_t batch_size, cnp.ndarray mean,
                               cnp.ndarray invstd) noexcept:
    init_job_on(job, x, mask, batch_size)
    job.dy = cnp.PyArray_BYTES(dy)
    job.mean, job.invstd = vector_of(mean, 0), vector_of(invstd, 1)


def backward_reduce(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
                    cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray sum_dy not None,
                    cnp.ndarray sum_dy_xhat not None):
    """Write the sums of dy and of dy * xhat of every channel."""
    cdef Job job
    init_backward_job_on(&job, dy, x, mask, 0, mean, invstd)
    reduce_to_products(&job, output_vector(sum_dy, &job.sum_dy),
                       output_vector(sum_dy_xhat, &job.sum_dy_xhat))
    execute(&job)


def backward_elemt(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
                   cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray weight, cnp.ndarray sum_dy,
                   cnp.ndarray sum_dy_xhat, double count, cnp.ndarray out not None):
    """Write the gradient of x into out, by the given sums over count elements."""
    cdef Job job
    init_backward_job_on(&job, dy, x, mask, 0, mean, invstd)
    job.sum_dy, job.sum_dy_xhat = vector_of(sum_dy, 0), vector_of(sum_dy_xhat, 0)
    job.weight = vector_of(weight, 1)
    job.count = count
    apply_gradient(&job, cnp.PyArray_BYTES(out))
    execute(&job)


def backward(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
             Py_ssize_t batch_size, cnp.ndarray weight, cnp.ndarray mean, cnp.ndarray invstd,
             cnp.ndarray out not None, cnp.ndarray sum_dy not None,
             cnp.ndarray sum_dy_xhat not None, gate=None):
    """Write the gradient of x into out, and the sums of dy and of dy * xhat."""
    cdef Job job
    init_backward_job_on(&job, dy, x, mask, batch_size, mean, invstd)
    reduce_to_products(&job, output_vector(sum_dy, &job.sum_dy),
                       output_vector(sum_dy_xhat, &job.sum_dy_xhat))
    job.weight = vector_of(weight, 1)
    sum_in_float32(&job)
    apply_gradient(&job, cnp.PyArray_BYTES(out))
    set_gate(&job, gate)
    execute(&job)


def activation_gradient(cnp.ndarray dy not None, cnp.ndarray y, cnp.ndarray alive, activation,
                        double slope, cnp.ndarray out not None):
    """Write dy times the derivative of the activation, which the bits or its output tell."""
    cdef Job job
    cdef GateOfJob gate = gate_with(activation_of(activation, slope), dy, y, alive)
    init_job_on(&job, dy, None, 0)
    job.dy = cnp.PyArray_BYTES(out)
    pass_gate(&job, &gate)
    job.apply = derive_block
    execute(&job)


include "core/channel_groups.pxi"
include "core/recovery.pxi"
include "core/saved.pxi"
include "core/results.pxi"
include "core/tensors.pxi"
include "core/plain.pxi"
include "core/quick_forward.pxi"
include "core/quick_backward.pxi"
