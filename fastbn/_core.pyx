# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""The loops over channels: how the work is cut, who does which piece, and how pieces merge.

An array is seen as (n, c, s): n samples of c channels of s elements each, C-contiguous. What a
piece is depends on the shape alone, and pieces merge in a fixed order, so the result has the same
bits for every number of threads.

The functions trust their caller: arrays have the right shapes, dtypes and layouts.
"""

import os

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc


cdef extern from "_kernels.h" nogil:
    enum:
        LANES "FASTBN_LANES"

    ctypedef struct Sums "fastbn_sums":
        double first[LANES]
        double second[LANES]

    ctypedef struct Affine "fastbn_affine":
        double centre, scale, shift

    ctypedef struct Gradient "fastbn_gradient":
        double dy_mean, x_mean, slope, scale

    ctypedef struct Kernels "fastbn_kernels":
        void (*pivots)(const void *x, Py_ssize_t rows, Py_ssize_t len, double *pivot) noexcept nogil
        void (*moments)(const void *x, Py_ssize_t rows, Py_ssize_t len, const double *pivot,
                        Sums *sums) noexcept nogil
        void (*products)(const void *dy, const void *x, Py_ssize_t rows, Py_ssize_t len,
                         const double *mean, Sums *sums) noexcept nogil
        void (*normalize)(const void *x, void *y, Py_ssize_t rows, Py_ssize_t len,
                          const Affine *affine) noexcept nogil
        void (*gradient)(const void *dy, const void *x, void *dx, Py_ssize_t rows, Py_ssize_t len,
                         const Gradient *gradient) noexcept nogil

    ctypedef struct Isa "fastbn_isa":
        const char *name
        Kernels float32, float64


cdef extern from "_platform.h" nogil:
    int fastbn_supported_isas(const Isa **isas, int room)
    int fastbn_omp_max_threads()
    const char *fastbn_compiler()
    const char *fastbn_openmp()


cdef extern from *:
    """
    /* The array interface protocol of NumPy, version 3: its C side. */
    typedef struct {
        int two, nd;
        char typekind;
        int itemsize, flags;
        Py_intptr_t *shape, *strides;
        void *data;
        PyObject *descr;
    } fastbn_array_struct;
    """
    ctypedef struct ArrayStruct "fastbn_array_struct":
        void *data


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
    wanted = os.environ.get("FASTBN_ISA", isa_names[-1])
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


# ------------------------------------------------------------------ how the work is cut

cdef enum:
    # Elements of a channel that are summed before they merge: few enough for the sums to be
    # exact to a few units of the last place of a double, enough for the merge to cost nothing.
    BLOCK = 32768
    # Where a channel's run is short, neighbours are walked together: as many as make up a page.
    GROUP_BYTES = 4096
    GROUP_MAX = 16
    # Below this many bytes a thread costs more than it brings.
    BYTES_PER_THREAD = 65536


cdef struct Cut:
    Py_ssize_t n, c, s
    Py_ssize_t group, groups      # neighbouring channels walked together, and how many times
    Py_ssize_t rows, length       # a block of a channel: so many samples of so many elements
    Py_ssize_t pieces, blocks     # blocks along s, and blocks of a channel in all


cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Cut cut_work(Py_ssize_t n, Py_ssize_t c, Py_ssize_t s, Py_ssize_t itemsize) noexcept nogil:
    cdef Cut cut
    cut.n, cut.c, cut.s = n, c, s
    cut.group = min(max(GROUP_BYTES // max(s * itemsize, 1), 1), GROUP_MAX)
    cut.groups = ceil_div(c, cut.group)
    cut.rows = max(BLOCK // max(s, 1), 1)
    # Pieces of whole steps, of nearly the same length.
    cut.length = max(ceil_div(ceil_div(s, max(ceil_div(s, BLOCK), 1)), LANES) * LANES, LANES)
    cut.pieces = ceil_div(s, cut.length)
    cut.blocks = ceil_div(n, cut.rows) * cut.pieces
    return cut


# A block of a group: the samples [n0, n1), the channels [c0, c1), the elements [s0, s0 + length).
cdef struct Block:
    Py_ssize_t n0, n1, c0, c1, s0, length


cdef Block block_of(const Cut *cut, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef Block block
    block.n0 = b // cut.pieces * cut.rows
    block.n1 = min(block.n0 + cut.rows, cut.n)
    block.c0 = g * cut.group
    block.c1 = min(block.c0 + cut.group, cut.c)
    block.s0 = b % cut.pieces * cut.length
    block.length = min(cut.length, cut.s - block.s0)
    return block


# ------------------------------------------------------------------ a job and its three steps

# A job reduces every block of every group to partial sums, merges those of each channel, and
# applies the outcome to every block. A step that a job does not have is NULL.
ctypedef void (*BlockStep)(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil
ctypedef void (*ChannelStep)(const Job *job, Py_ssize_t c) noexcept nogil

# What reducing a block of a channel gives: its mean and m2, or its sums of dy and dy * (x - mean).
cdef struct Pair:
    double first, second

cdef struct Job:
    Cut cut
    Py_ssize_t itemsize
    const Kernels *kernels
    BlockStep reduce
    ChannelStep merge
    BlockStep apply
    Pair *partial                 # of (c, blocks)
    const char *dy
    const char *x
    char *out
    const double *weight          # NULL stands for ones
    const double *bias            # NULL stands for zeros
    double *mean
    double *m2
    double *invstd
    double *sum_dy
    double *sum_dy_xhat
    double eps
    double count


cdef Py_ssize_t offset(const Job *job, const Block *block, Py_ssize_t n) noexcept nogil:
    """The bytes before the block's part of sample n."""
    return ((n * job.cut.c + block.c0) * job.cut.s + block.s0) * job.itemsize


cdef double collapse(double *lanes) noexcept nogil:
    """The sum over the lanes, by halves."""
    cdef int half = LANES // 2, i
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


cdef void clear(Sums *sums, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t c
    cdef int i
    for c in range(count):
        for i in range(LANES):
            sums[c].first[i] = sums[c].second[i] = 0.0


cdef void sum_deviations(const Job *job, const Block *block, const double *pivot, Sums *sums,
                         Pair *result) noexcept nogil:
    """The sums over a block of x - pivot and of its square, channel by channel."""
    cdef Py_ssize_t n, c, channels = block.c1 - block.c0
    clear(sums, channels)
    for n in range(block.n0, block.n1):
        job.kernels.moments(job.x + offset(job, block, n), channels, block.length, pivot, sums)
    for c in range(channels):
        result[c].first = collapse(sums[c].first)
        result[c].second = collapse(sums[c].second)


cdef void reduce_moments(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """Mean and m2 of a block: the corrected two-pass sums around a pivot.

    With any element h of the block as the pivot, (h - mean)^2 <= m2, so that subtracting
    (sum of deviations)^2 / count loses no more than a factor of count of the precision. Of a
    double's 53 bits enough remain for a narrower x; for float64 the first round finds a pivot
    near the mean, and a second one sums around that.
    """
    cdef Sums sums[GROUP_MAX]
    cdef Pair result[GROUP_MAX]
    cdef double pivot[GROUP_MAX]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t c, channels = block.c1 - block.c0
    cdef double count = <double>((block.n1 - block.n0) * block.length)
    cdef Pair *partial
    cdef double mean_deviation
    cdef const char *x = job.x + offset(job, &block, block.n0)
    job.kernels.pivots(x, channels, block.length, pivot)
    sum_deviations(job, &block, pivot, sums, result)
    if job.itemsize == sizeof(double):
        for c in range(channels):
            pivot[c] += result[c].first / count
        sum_deviations(job, &block, pivot, sums, result)
    for c in range(channels):
        partial = job.partial + (block.c0 + c) * job.cut.blocks + b
        mean_deviation = result[c].first / count
        partial.first = pivot[c] + mean_deviation
        # Rounding can take a variance of nearly zero below it.
        partial.second = max(result[c].second - result[c].first * mean_deviation, 0.0)


cdef void merge_moments(const Job *job, Py_ssize_t c) noexcept nogil:
    """Merge the blocks of a channel in their order, by Chan's formula."""
    cdef const Pair *partial = job.partial + c * job.cut.blocks
    cdef Block block
    cdef Py_ssize_t b
    cdef double count = 0.0, mean = 0.0, m2 = 0.0, added, delta
    for b in range(job.cut.blocks):
        block = block_of(&job.cut, 0, b)
        added = <double>((block.n1 - block.n0) * block.length)
        delta = partial[b].first - mean
        m2 += partial[b].second + delta * delta * (count * added / (count + added))
        mean += delta * (added / (count + added))
        count += added
    job.mean[c] = mean
    job.m2[c] = m2
    if job.invstd != NULL:
        job.invstd[c] = 1.0 / sqrt(m2 / max(job.count, 1.0) + job.eps)


cdef void apply_normalize(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """y = (x - mean) * invstd * weight + bias, from the last sample back to the first."""
    cdef Affine affine[GROUP_MAX]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t n, c, at
    for c in range(block.c0, block.c1):
        affine[c - block.c0].centre = job.mean[c]
        affine[c - block.c0].scale = job.invstd[c] * (1.0 if job.weight == NULL else job.weight[c])
        affine[c - block.c0].shift = 0.0 if job.bias == NULL else job.bias[c]
    for n in range(block.n1 - 1, block.n0 - 1, -1):
        at = offset(job, &block, n)
        job.kernels.normalize(job.x + at, job.out + at, block.c1 - block.c0, block.length, affine)


cdef void reduce_products(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """The sums over a block of dy and of dy * (x - mean)."""
    cdef Sums sums[GROUP_MAX]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t n, c, at
    cdef Pair *partial
    clear(sums, block.c1 - block.c0)
    for n in range(block.n0, block.n1):
        at = offset(job, &block, n)
        job.kernels.products(job.dy + at, job.x + at, block.c1 - block.c0, block.length,
                             job.mean + block.c0, sums)
    for c in range(block.c1 - block.c0):
        partial = job.partial + (block.c0 + c) * job.cut.blocks + b
        partial.first = collapse(sums[c].first)
        partial.second = collapse(sums[c].second)


cdef void merge_products(const Job *job, Py_ssize_t c) noexcept nogil:
    cdef const Pair *partial = job.partial + c * job.cut.blocks
    cdef Py_ssize_t b
    cdef double first = 0.0, second = 0.0
    for b in range(job.cut.blocks):
        first += partial[b].first
        second += partial[b].second
    job.sum_dy[c] = first
    job.sum_dy_xhat[c] = second * job.invstd[c]


cdef void apply_gradient(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """dx = (dy - sum_dy / count - xhat * sum_dy_xhat / count) * invstd * weight."""
    cdef Gradient gradient[GROUP_MAX]
    cdef Block block = block_of(&job.cut, g, b)
    cdef Gradient *one
    cdef Py_ssize_t n, c, at
    for c in range(block.c0, block.c1):
        one = gradient + (c - block.c0)
        one.dy_mean = job.sum_dy[c] / job.count
        one.x_mean = job.mean[c]
        one.slope = job.invstd[c] * (job.sum_dy_xhat[c] / job.count)
        one.scale = job.invstd[c] * (1.0 if job.weight == NULL else job.weight[c])
    for n in range(block.n1 - 1, block.n0 - 1, -1):
        at = offset(job, &block, n)
        job.kernels.gradient(job.dy + at, job.x + at, job.out + at, block.c1 - block.c0,
                             block.length, gradient)


# ------------------------------------------------------------------ who does what

cdef void merge_group(const Job *job, Py_ssize_t g) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(g * job.cut.group, min((g + 1) * job.cut.group, job.cut.c)):
        job.merge(job, c)


cdef void finish_group(const Job *job, Py_ssize_t g) noexcept nogil:
    """All steps of a group; the second walk goes backwards, to begin with what is in the cache."""
    cdef Py_ssize_t b
    if job.reduce != NULL:
        for b in range(job.cut.blocks):
            job.reduce(job, g, b)
        merge_group(job, g)
    if job.apply != NULL:
        for b in range(job.cut.blocks - 1, -1, -1):
            job.apply(job, g, b)


cdef void run_groups(const Job *job, int threads) noexcept nogil:
    """Each group is finished by one thread, while it sits in that thread's cache."""
    cdef Py_ssize_t g
    for g in prange(job.cut.groups, schedule="dynamic", num_threads=threads,
                    use_threads_if=threads > 1):
        finish_group(job, g)


cdef void run_blocks(const Job *job, int threads) noexcept nogil:
    """Too few groups for the threads: they share the blocks, one step after the other."""
    cdef Py_ssize_t t, g, blocks = job.cut.blocks, tasks = job.cut.groups * job.cut.blocks
    if job.reduce != NULL:
        for t in prange(tasks, schedule="dynamic", num_threads=threads):
            job.reduce(job, t // blocks, t % blocks)
        for g in range(job.cut.groups):
            merge_group(job, g)
    if job.apply != NULL:
        for t in prange(tasks, schedule="dynamic", num_threads=threads):
            job.apply(job, (tasks - 1 - t) // blocks, (tasks - 1 - t) % blocks)


cdef int run(Job *job, int threads) except -1:
    """Run a job on at most so many threads; nothing has been written if this raises."""
    cdef Py_ssize_t size = job.cut.n * job.cut.c * job.cut.s * job.itemsize
    threads = <int>min(<Py_ssize_t>threads, size // BYTES_PER_THREAD + 1)
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


# ------------------------------------------------------------------ the jobs

cdef char *data(object array) except? NULL:
    """The address of an array's data."""
    capsule = array.__array_struct__  # owns what it points to
    return <char *>(<ArrayStruct *>PyCapsule_GetPointer(capsule, NULL)).data


cdef double *doubles(object array) except? NULL:
    """The data of a float64 array, or NULL for None."""
    return NULL if array is None else <double *>data(array)


cdef Job new_job(object x, shape) except *:
    """A job on x, an array that is C-contiguous in the given shape (n, c, s)."""
    cdef Job job
    cdef Py_ssize_t n, c, s
    n, c, s = shape
    job.itemsize = x.itemsize
    job.cut = cut_work(n, c, s, job.itemsize)
    job.kernels = &isa_in_use.float64 if job.itemsize == sizeof(double) else &isa_in_use.float32
    job.count = <double>(n * s)
    job.x = data(x)
    job.reduce = job.apply = NULL
    job.merge = NULL
    job.partial = NULL
    job.weight = job.bias = NULL
    job.invstd = NULL
    return job


def stats(x, shape, mean, m2, int threads):
    """Write the mean and m2 of every channel of x."""
    cdef Job job = new_job(x, shape)
    job.mean, job.m2 = doubles(mean), doubles(m2)
    job.reduce, job.merge = reduce_moments, merge_moments
    run(&job, threads)


def elemt(x, shape, mean, invstd, weight, bias, out, int threads):
    """Write x, normalized by the given statistics, into out."""
    cdef Job job = new_job(x, shape)
    job.mean, job.invstd = doubles(mean), doubles(invstd)
    job.weight, job.bias = doubles(weight), doubles(bias)
    job.out = data(out)
    job.apply = apply_normalize
    run(&job, threads)


def forward(x, shape, weight, bias, double eps, out, mean, m2, invstd, int threads):
    """Write x, normalized by its own statistics, into out, and those statistics."""
    cdef Job job = new_job(x, shape)
    job.mean, job.m2, job.invstd = doubles(mean), doubles(m2), doubles(invstd)
    job.weight, job.bias = doubles(weight), doubles(bias)
    job.eps = eps
    job.out = data(out)
    job.reduce, job.merge, job.apply = reduce_moments, merge_moments, apply_normalize
    run(&job, threads)


cdef Job new_backward_job(dy, x, shape, mean, invstd, sum_dy, sum_dy_xhat) except *:
    cdef Job job = new_job(x, shape)
    job.dy = data(dy)
    job.mean, job.invstd = doubles(mean), doubles(invstd)
    job.sum_dy, job.sum_dy_xhat = doubles(sum_dy), doubles(sum_dy_xhat)
    return job


def backward_reduce(dy, x, shape, mean, invstd, sum_dy, sum_dy_xhat, int threads):
    """Write the sums of dy and of dy * xhat of every channel."""
    cdef Job job = new_backward_job(dy, x, shape, mean, invstd, sum_dy, sum_dy_xhat)
    job.reduce, job.merge = reduce_products, merge_products
    run(&job, threads)


def backward_elemt(dy, x, shape, mean, invstd, weight, sum_dy, sum_dy_xhat, double count, out,
                   int threads):
    """Write the gradient of x into out, by the given sums over count elements."""
    cdef Job job = new_backward_job(dy, x, shape, mean, invstd, sum_dy, sum_dy_xhat)
    job.weight = doubles(weight)
    job.count = count
    job.out = data(out)
    job.apply = apply_gradient
    run(&job, threads)


def backward(dy, x, shape, weight, mean, invstd, out, sum_dy, sum_dy_xhat, int threads):
    """Write the gradient of x into out, and the sums of dy and of dy * xhat."""
    cdef Job job = new_backward_job(dy, x, shape, mean, invstd, sum_dy, sum_dy_xhat)
    job.weight = doubles(weight)
    job.out = data(out)
    job.reduce, job.merge, job.apply = reduce_products, merge_products, apply_gradient
    run(&job, threads)
