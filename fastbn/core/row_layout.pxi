# The row layout: how its kernels are called, which walk the runs of a block.

# Cores with a second-level cache of 1 MiB or more, such as those of a Zen 5, read memory so fast
# that they have to ask for it earlier than those with less.
cdef bint has_large_l2 = l2_bytes >= 1048576

# Memory is prefetched when it is so many bytes away, of all inputs: what lies further on in a run
# is left to the hardware.
cdef Py_ssize_t prefetch_bytes = 8192 if has_large_l2 else 2048

# A larger group would push out of the caches what is prefetched of the next one, or be pushed out
# by it, which costs more than is gained while the third-level cache has a part of the inputs.
cdef enum:
    AHEAD_GROUP_BYTES = 2097152
cdef Py_ssize_t ahead_group_bytes_in_l3 = 524288 if has_large_l2 else AHEAD_GROUP_BYTES

# Where the third-level cache holds what all of several such cores read, there is no memory to wait
# for. It is not larger than this, whatever a virtual machine reports.
cdef enum:
    HELD_BYTES = 33554432
cdef Py_ssize_t held_bytes = min(l3_bytes, HELD_BYTES) if has_large_l2 else 0


cdef Runs runs_of(const Job *job, const Block *block, bint backwards) noexcept nogil:
    """The runs of a block, from the first sample to the last or backwards."""
    cdef Runs runs
    runs.mask = mask_of(job, block, block.n1 - 1 if backwards else block.n0)
    runs.mask_stride = -job.cut.s if backwards else job.cut.s
    runs.samples = block.n1 - block.n0
    runs.stride = -job.cut.c * job.cut.s if backwards else job.cut.c * job.cut.s
    runs.channels = block.c1 - block.c0
    runs.len = block.length
    runs.ahead = runs.residual_ahead = ahead_of(job, &runs)
    if backwards:  # a second walk: the cache has what it reads, but for a residual
        if job.reads_ahead and block.c1 < job.cut.c:
            runs.ahead = ahead_to_next_group(&runs)
        if runs.residual_ahead.border == 0:  # several samples ahead: that costs more than it gains
            memset(&runs.residual_ahead, 0, sizeof(Ahead))
    return runs


cdef Matrix matrix_of(const Runs *runs) noexcept nogil:
    """The same runs as the rows of a matrix."""
    cdef Matrix matrix
    matrix.mask, matrix.mask_stride = runs.mask, runs.mask_stride
    matrix.rows, matrix.stride = runs.samples, runs.stride
    matrix.channels, matrix.run = runs.channels, runs.len
    matrix.len = runs.channels * runs.len
    return matrix


cdef Ahead ahead_of(const Job *job, const Runs *runs, Py_ssize_t at_once=1) noexcept nogil:
    """Where memory is read next: further on in the samples read at once, then in the next ones."""
    cdef Ahead ahead
    cdef Py_ssize_t len_of_sample = runs.channels * runs.len
    ahead.near = prefetch_bytes // (job.itemsize * inputs_of(job) * at_once)
    if runs.samples == 1:  # the next block follows in memory
        ahead.border, ahead.jump = len_of_sample, ahead.near
    elif len_of_sample > ahead.near:
        ahead.border = len_of_sample - ahead.near
        ahead.jump = at_once * runs.stride - ahead.border
    else:
        ahead.border = 0
        ahead.jump = at_once * runs.stride * ceil_div(ahead.near, max(len_of_sample, 1))
    return ahead


cdef Py_ssize_t samples_of_tree(const Runs *runs) noexcept nogil:
    """How many samples sums in float32 read at once: short runs of several make up a tree."""
    return max(min(TREE // max(ceil_div(runs.len, LANES), 1), runs.samples), 1)


cdef bint prefetches_groups(const Job *job, int threads) noexcept nogil:
    """Tell whether a group's second walk prefetches what another's first one reads next.

    So memory is read while results are written, unless a residual is read meanwhile. Where the
    caches have it all, it only costs, but for one thread that has the third-level cache to itself.
    """
    cdef bint is_partly_in_l3 = input_bytes(job) <= 2 * l3_bytes
    cdef Py_ssize_t most = ahead_group_bytes_in_l3 if is_partly_in_l3 else AHEAD_GROUP_BYTES
    # What is written elsewhere takes a part of the cache, too.
    cdef Py_ssize_t held = held_bytes if overwrites_input(job) else held_bytes // 4 * 3
    return (job.residual == NULL
            and footprint_bytes(job) > half_l3_bytes and group_bytes(job) <= most
            and (threads == 1 or input_bytes(job) > held))


cdef bint finds_in_caches(const Job *job, int threads, Py_ssize_t walked) noexcept nogil:
    """Tell whether a plain forward's results are computed from what nearby caches have.

    To prefetch it only costs. Where there are sums, these are the `walked` bytes, which a thread
    has just summed.
    """
    if job.reads_ahead or job.has_epilogue or job.nontemporal:
        return False
    if job.reduce != NULL:
        return walked <= l2_bytes
    return is_in_l2(job, threads)


cdef Ahead ahead_to_next_group(const Runs *runs) noexcept nogil:
    """Where a group's first walk begins after another's second one: in the next channels."""
    cdef Ahead ahead
    ahead.border = 0
    ahead.near = ahead.jump = runs.channels * runs.len
    return ahead


cdef Py_ssize_t start_of(const Job *job, const Block *block, bint backwards) noexcept nogil:
    """The bytes before the runs of the sample that comes first."""
    return offset_of(job, block, block.n1 - 1 if backwards else block.n0)


cdef void sum_runs(const Job *job, const Block *block, int arithmetic, const double *centre,
                   double *first, double *second, const Block *beside) noexcept nogil:
    """The sums of a block: of moments or, with a dy, of products."""
    cdef Block some = block[0], some_beside
    cdef const double *centre_of_some = centre
    cdef Py_ssize_t i
    for i in range(ceil_div(block.c1 - block.c0, GROUP)):
        some.c0 = block.c0 + i * GROUP
        some.c1 = min(some.c0 + GROUP, block.c1)
        if centre != NULL:  # raw moments have none
            centre_of_some = centre + i * GROUP
        if beside == NULL:
            sum_group(job, &some, arithmetic, centre_of_some, first + i * GROUP,
                      second + i * GROUP)
        else:
            some_beside = beside[0]
            some_beside.c0 = beside.c0 + i * GROUP
            some_beside.c1 = min(some_beside.c0 + GROUP, beside.c1)
            sum_beside_results(job, &some, centre_of_some, first + i * GROUP, second + i * GROUP,
                               &some_beside)


cdef void sum_group(const Job *job, const Block *block, int arithmetic, const double *centre,
                    double *first, double *second) noexcept nogil:
    """The same of as many channels as a kernel takes."""
    cdef Runs runs = runs_of(job, block, False)
    cdef Py_ssize_t at = offset_of(job, block, block.n0)
    cdef SumMoments *moments = job.kernels.moments
    cdef SumProducts *products = job.kernels.products
    cdef Gate gate
    if arithmetic == RAW:
        moments = job.kernels.raw_moments
    elif arithmetic == IN_FLOAT32:
        moments, products = job.kernels.tree_moments, job.kernels.tree_products
        runs.ahead = ahead_of(job, &runs, samples_of_tree(&runs))
    if job.dy == NULL:
        moments(job.x + at, &runs, centre, first, second)
    else:
        products(job.dy + at, job.x + at, &runs, centre, gate_of(job, block, at, &gate), first,
                 second)


cdef void sum_beside_results(const Job *job, const Block *block, const double *centre,
                             double *first, double *second,
                             const Block *beside) noexcept nogil:
    """The sums of as many channels as a kernel takes, while results of others are written.

    Moments without a centre are raw ones; all others are in float32.
    """
    cdef Results results
    cdef Affine affine
    cdef Gradient gradient
    cdef Gate gate, gate_of_results
    cdef Runs runs = runs_of(job, block, False)
    cdef Py_ssize_t at = offset_of(job, block, block.n0), at_results = start_of(job, beside, True)
    results.x, results.to = job.x + at_results, job.out + at_results
    results.stride = -job.cut.c * job.cut.s
    if job.dy != NULL:
        gradient_of(job, beside, &gradient)
        results.dy, results.gradient = job.dy + at_results, &gradient
        results.gate = gate_of(job, beside, at_results, &gate_of_results)
        job.kernels.products_beside_results(job.dy + at, job.x + at, &runs, centre,
                                            gate_of(job, block, at, &gate), first, second,
                                            &results)
        return
    affine_of(job, beside, &affine)
    if has_huge_mean(job, affine.centre, beside.c1 - beside.c0):
        normalize_runs(job, beside)
        sum_group(job, block, RAW if centre == NULL else IN_FLOAT32, centre, first, second)
        return
    results.affine = &affine
    results.activation = &job.activation if job.has_epilogue else NULL
    job.kernels.moments_beside_results(job.x + at, &runs, centre, first, second, &results)


cdef void normalize_runs(const Job *job, const Block *block) noexcept nogil:
    cdef Affine affine, first
    cdef Epilogue epilogue
    # A second walk begins with what the first one has left in the cache.
    cdef bint backwards = job.reduce != NULL
    cdef Runs runs = runs_of(job, block, backwards)
    cdef Py_ssize_t at = start_of(job, block, backwards)
    cdef const char *x = job.x + at
    cdef bint nontemporal = job.nontemporal
    if job.finds_cached:
        memset(&runs.ahead, 0, sizeof(Ahead))
    affine_of(job, block, &affine)
    if scale_down_first(job, block, &affine, &first):
        job.kernels.normalize(x, job.out + at, &runs, &first, NULL, False)
        x, nontemporal = job.out + at, False
    job.kernels.normalize(x, job.out + at, &runs, &affine, epilogue_of(job, at, &epilogue),
                          nontemporal)


cdef void gradient_runs(const Job *job, const Block *block) noexcept nogil:
    cdef Gradient gradient
    cdef Matrix matrix
    cdef Gate gate
    cdef bint backwards = job.reduce != NULL
    cdef Runs runs = runs_of(job, block, backwards)
    cdef Py_ssize_t at = start_of(job, block, backwards)
    gradient_of(job, block, &gradient)
    if job.in_float64:
        matrix = matrix_of(&runs)
        gradient_in_float64(job, &gradient, gate_of(job, block, at, &gate), at, &matrix)
        return
    job.kernels.gradient(job.dy + at, job.x + at, job.out + at, &runs, &gradient,
                         gate_of(job, block, at, &gate), job.nontemporal)
