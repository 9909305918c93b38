# What is to be done with an array: a job.

# A job reduces every block of every group to partial sums, merges those of each channel, and
# applies the outcome to every block. A step that a job does not have is NULL. Where a job
# interleaves its groups, the results of the block `beside`, of another group, are written
# meanwhile; elsewhere it is NULL.
ctypedef void (*BlockStep)(const Job *job, Py_ssize_t g, Py_ssize_t b,
                           const Block *beside) noexcept nogil
ctypedef void (*GroupStep)(const Job *job, Py_ssize_t g) noexcept nogil

ctypedef void (*ApplyBlock)(const Job *job, const Block *block) noexcept nogil

# How the batches of a job are divided among threads.
ctypedef void (*Schedule)(Job *job, int threads) noexcept nogil

cdef enum:
    PROBES = 64                   # elements by which a change of an array is noticed

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

# What it has for each batch, or for all elements of the batches, is moved in `leftover_job`.
cdef struct Job:
    Cut cut
    Py_ssize_t samples            # of a batch
    Py_ssize_t leftover_samples   # those after the batches, which make up a smaller one
    bint channels_last
    Py_ssize_t itemsize
    bint is_float64
    const Kernels *kernels
    BlockStep reduce
    GroupStep merge
    ApplyBlock apply
    Schedule schedule
    bint in_float32               # whether sums may be as exact as float32, where that is faster
    bint in_float64               # whether the gradient of x is computed in float64, for its range
    int tries                     # what it tries: STORES, THREADS or NOTHING
    Trial *trial                  # the trial of that, if there is one
    int way                       # 0 or 1: the way that the trial has chosen for this call
    bint nontemporal              # whether the output is written by non-temporal stores
    bint reads_ahead              # whether a group's second walk prefetches the next group
    bint interleaves              # whether a group is summed while another's results are written
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
    char *passed                  # or NULL; what passes of dy is written there beside dx
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
    uint64_t *probe_bits          # where threads write the probes of the whole output; or NULL
    Py_ssize_t probed             # how many elements that has
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
    job.is_float64 = itemsize == sizeof(double)
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
    job.in_float32 = not job.is_float64


cdef void apply_normalize(Job *job, char *out) noexcept nogil:
    """Let the job write x, normalized, to out."""
    job.out = out
    job.apply = normalize_block


cdef void apply_scale(Job *job, char *out) noexcept nogil:
    """Let the job write dy, times a weight, to out: the gradient of x by constants."""
    job.out = out
    job.apply = scale_block


cdef void apply_gradient(Job *job, char *out) noexcept nogil:
    """Let the job write the gradient of x to out."""
    job.out = out
    job.apply = gradient_block


# ------------------------------------------------------------------ where things are


cdef Block some_channels(Py_ssize_t i, Py_ssize_t channels) noexcept nogil:
    """The channels from i * COLUMNS on, COLUMNS at most, as a block of the first batch."""
    cdef Block block
    memset(&block, 0, sizeof(Block))
    block.c0, block.c1 = i * COLUMNS, min((i + 1) * COLUMNS, channels)
    return block


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
