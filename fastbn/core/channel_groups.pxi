# Group normalization: the channels of a sample are normalized in groups, a GroupNorm's. A job on
# batches of one sample finds mean and m2, or the two sums, of each channel, as it does for batch
# normalization. Between that and the element-wise kernel, what it has found for the channels of a
# GroupNorm's group is combined.

# Combines what has been found for the channels from c0 on of a sample.
ctypedef void (*Combine)(const GroupNormJob *norm, Py_ssize_t sample,
                         Py_ssize_t c0) noexcept nogil

cdef struct GroupNormJob:
    Job job                       # first, so that a pointer to it is one to all
    Combine combine
    Py_ssize_t channels           # of a GroupNorm's group
    Py_ssize_t span               # groups of the cut that are walked together
    double *invstd_out            # of (samples, c), the same for all channels of a group
    Vector weight                 # that of the forward
    double *dy_sums               # of (samples, c): what takes the place of sum_dy and sum_dy_xhat
    double *dy_xhat_sums          # in the gradient of x


cdef void init_group_norm(GroupNormJob *norm, cnp.ndarray x, cnp.ndarray mask,
                          Py_ssize_t groups) noexcept:
    """Make a job on x, which has no steps yet, for so many groups of channels."""
    memset(norm, 0, sizeof(GroupNormJob))
    init_job_on(&norm.job, x, mask, 1)
    norm.job.schedule = execute_spans
    norm.channels = norm.job.cut.c // groups


cdef void combine_moments(const GroupNormJob *norm, Py_ssize_t sample,
                          Py_ssize_t c0) noexcept nogil:
    """Replace mean and m2 of each channel by those of its group, by Chan's formula."""
    cdef const Job *job = &norm.job
    cdef Py_ssize_t c, first = sample * job.cut.c + c0, channels = norm.channels
    cdef double *mean = job.mean_out + first
    cdef double *m2 = job.m2_out + first
    cdef double *invstds = norm.invstd_out + first
    cdef double count = count_of(job, sample), shift = 0.0, within = 0.0, between = 0.0
    cdef double centre, deviation, total, invstd
    for c in range(channels):
        shift += mean[c] - mean[0]
    centre = mean[0] + shift / <double>channels
    for c in range(channels):
        deviation = mean[c] - centre
        between += deviation * deviation
        within += m2[c]
    total = within + count * between
    isa_in_use.common.invstd(&total, max(count * <double>channels, 1.0), job.eps, 1, &invstd)
    if count == 0.0:  # sums over nothing, times infinity, would be NaN
        invstd = 0.0
    for c in range(channels):
        mean[c], m2[c], invstds[c] = centre, total, invstd


cdef void combine_products(const GroupNormJob *norm, Py_ssize_t sample,
                           Py_ssize_t c0) noexcept nogil:
    """Find the sums that the gradient of x is made of, from those of each channel.

    With dy * weight in place of dy it would be that of a normalization without a weight. The kernel
    multiplies dy - ... by the weight of its channel, so the sums over a group are divided by it.
    """
    cdef const Job *job = &norm.job
    cdef double weight[COLUMNS]
    cdef double factor, sum_dy = 0.0, sum_dy_xhat = 0.0
    cdef Py_ssize_t c, i, first, pieces = ceil_div(norm.channels, COLUMNS)
    for i in range(pieces):
        first = read_weight(norm, c0, i, weight)
        for c in range(min(norm.channels - i * COLUMNS, COLUMNS)):
            sum_dy += weight[c] * job.sum_dy_out[sample * job.cut.c + first + c]
            sum_dy_xhat += weight[c] * job.sum_dy_xhat_out[sample * job.cut.c + first + c]
    for i in range(pieces):
        first = read_weight(norm, c0, i, weight)
        for c in range(min(norm.channels - i * COLUMNS, COLUMNS)):
            factor = 1.0 / (weight[c] * <double>norm.channels)
            norm.dy_sums[sample * job.cut.c + first + c] = sum_dy * factor
            norm.dy_xhat_sums[sample * job.cut.c + first + c] = sum_dy_xhat * factor


cdef Py_ssize_t read_weight(const GroupNormJob *norm, Py_ssize_t c0, Py_ssize_t i,
                            double *weight) noexcept nogil:
    """The weights of the i-th COLUMNS channels of the group from c0 on; return the first one."""
    cdef Block block
    memset(&block, 0, sizeof(Block))
    block.c0 = c0 + i * COLUMNS
    block.c1 = min(block.c0 + COLUMNS, c0 + norm.channels)
    read_vector(&norm.weight, &block, weight)
    return block.c0


# ------------------------------------------------------------------ which thread does what


cdef void choose_spans(GroupNormJob *norm, int threads) noexcept nogil:
    """Choose how many channels are walked together: whole GroupNorm's groups, or a part of one."""
    cdef Cut *cut = &norm.job.cut
    cdef Py_ssize_t channels = norm.channels, most, tasks, step
    cdef Py_ssize_t run = max(cut.s * norm.job.itemsize, 1)
    if cut.column_layout:
        most = STRIP // (max(cut.s, 1) * cut.fold)
    elif cut.blocks_along_s > 1:  # a block of a channel does not end where the next one begins
        most = 1
    else:
        most = min(GROUP_BYTES // (run * inputs_of(&norm.job)), GROUP)
    most = max(most, 1)
    norm.span = 1
    if cut.fold > 1:  # a folded row is one strip
        cut.group = cut.c
    elif channels <= most:
        # Enough for all threads; strips of columns are read faster where they are wide.
        tasks = threads if cut.column_layout else TASKS_OF_THREAD * threads
        most = min(most, max(cut.batches * cut.c // tasks, 1))
        cut.group = channels * max(most // channels, 1)
    else:  # parts of nearly the same size, in whole steps
        step = LANES if cut.column_layout and cut.s < LANES else 1
        cut.group = ceil_div(channels, ceil_div(channels, most))
        cut.group = min(ceil_div(cut.group, step) * step, most)
        norm.span, cut.period = ceil_div(channels, cut.group), channels
    cut.groups = cut.c // cut.period * ceil_div(cut.period, cut.group)


cdef void combine_span(const GroupNormJob *norm, Py_ssize_t span) noexcept nogil:
    """Merge the blocks of each channel, then the channels of each of GroupNorm's groups."""
    cdef const Job *job = &norm.job
    cdef Py_ssize_t g, c0, first = span * norm.span
    cdef Block block = block_of(&job.cut, first, 0), last = block
    for g in range(first, first + norm.span):
        job.merge(job, g)
        last = block_of(&job.cut, g, 0)
    c0 = block.c0
    while c0 < last.c1:
        norm.combine(norm, block.batch, c0)
        c0 += norm.channels


cdef void execute_span(const Job *job, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t span,
                       Py_ssize_t before) noexcept nogil:
    """All steps of a span, by one thread while it sits in that thread's cache.

    Where tasks are interleaved, its results are left to the next one. Those of groups that were
    summed last, which caches still have, are written first.
    """
    cdef const GroupNormJob *norm = <const GroupNormJob *>job
    cdef Py_ssize_t i, g = NO_TASK, written = NO_TASK
    for i in range(norm.span):
        if span != NO_TASK:
            g = span * norm.span + i
        if before != NO_TASK:
            written = (before + 1) * norm.span - 1 - i
        reduce_beside(job, g, written)
    if span == NO_TASK:
        return
    combine_span(norm, span)
    if not job.interleaves:
        for i in range(norm.span):
            apply_group(job, (span + 1) * norm.span - 1 - i)


cdef void execute_spans(Job *job, int threads) noexcept nogil:
    cdef GroupNormJob *norm = <GroupNormJob *>job
    cdef Py_ssize_t spans, span, groups
    threads = threads_for(bytes_moved(job), threads)
    choose_spans(norm, threads)
    find_for_walks(job, threads)
    groups = groups_of(job)
    spans = groups // norm.span
    if (threads == 1 or spans >= TASKS_OF_THREAD * threads
            or norm.span == 1 and job.cut.blocks == 1):
        job.interleaves = spans >= 2 * threads and interleaves_groups(job)
        job.reads_ahead = (norm.span == 1 and not job.interleaves
                           and prefetches_groups(job, threads))
        job.finds_cached = finds_in_caches(job, threads, norm.span * group_bytes(job))
        take_turns(job, execute_span, spans, threads)
        return
    parallel_for(job, execute_reduce, 0, groups, groups * job.cut.blocks, threads)
    for span in range(spans):
        combine_span(norm, span)
    parallel_for(job, execute_apply, 0, groups, groups * job.cut.blocks, threads, True)


# ------------------------------------------------------------------ the entry points
#
# x is not empty; vectors that are written have the shape (n, c), and those of each channel that are
# read may have it, but for the weight of `group_forward` and the bias.


def group_forward(cnp.ndarray x not None, cnp.ndarray mask, Py_ssize_t groups, cnp.ndarray weight,
                  cnp.ndarray bias, double eps, cnp.ndarray out not None,
                  cnp.ndarray mean not None, cnp.ndarray m2 not None, cnp.ndarray invstd not None,
                  activation=None, double slope=0.0, cnp.ndarray residual=None,
                  cnp.ndarray alive=None):
    """Write x, normalized in groups of channels, into out, and the statistics of the groups."""
    cdef Statistics found = statistics_in(mean, m2, invstd)
    normalize_groups(x, mask, groups, weight, bias, eps, out, &found,
                     activation_of(activation, slope), residual, alive, None)


cdef int normalize_groups(cnp.ndarray x, cnp.ndarray mask, Py_ssize_t groups, cnp.ndarray weight,
                          cnp.ndarray bias, double eps, cnp.ndarray out, const Statistics *found,
                          Activation activation, cnp.ndarray residual, cnp.ndarray alive,
                          SavedForBackward saved) except -1:
    """`group_forward`, which also keeps what is to be saved of an output in place."""
    cdef GroupNormJob norm
    init_group_norm(&norm, x, mask, groups)
    normalize_by(&norm.job, found)
    norm.job.invstd_out, norm.invstd_out = NULL, found.invstd  # that of groups, not of channels
    norm.combine = combine_moments
    norm.job.weight, norm.job.bias = vector_of(weight, 1), vector_of(bias, 0)
    norm.job.eps = eps
    sum_in_float32(&norm.job)
    apply_normalize(&norm.job, cnp.PyArray_BYTES(out))
    set_epilogue(&norm.job, activation, residual, alive)
    save_in_pass(&norm.job, out, saved)
    return execute(&norm.job)


def group_backward(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
                   Py_ssize_t groups, cnp.ndarray weight, cnp.ndarray factor,
                   cnp.ndarray mean not None, cnp.ndarray invstd not None,
                   cnp.ndarray out not None, cnp.ndarray sum_dy not None,
                   cnp.ndarray sum_dy_xhat not None, cnp.ndarray dy_sums not None,
                   cnp.ndarray dy_xhat_sums not None, gate=None):
    """Write the gradient of x into out, and the sums of dy and of dy * xhat of every channel.

    xhat is (x - mean) * invstd, and dy reaches dx times factor * invstd. No weight is 0.
    """
    cdef GroupNormJob norm
    cdef Vector sums[4]
    cdef Vector weights = vector_of(weight, 1), factors = vector_of(factor, 1)
    cdef Vector means = vector_of(mean, 0), invstds = vector_of(invstd, 1)
    sums[:] = [vector_of(sum_dy, 0), vector_of(sum_dy_xhat, 0), vector_of(dy_sums, 0),
               vector_of(dy_xhat_sums, 0)]
    init_group_backward(&norm, dy, x, mask, groups, &weights, &factors, &means, &invstds, out, sums)
    set_gate(&norm.job, gate)
    execute(&norm.job)


cdef void init_group_backward(GroupNormJob *norm, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mask,
                              Py_ssize_t groups, const Vector *weight, const Vector *factor,
                              const Vector *mean, const Vector *invstd, cnp.ndarray out,
                              const Vector *sums) noexcept:
    """Make the job of `group_backward`, without a gate; the sums are those four that it writes."""
    init_group_norm(norm, x, mask, groups)
    norm.job.dy = cnp.PyArray_BYTES(dy)
    norm.job.mean, norm.job.invstd = mean[0], invstd[0]
    norm.job.weight, norm.weight = factor[0], weight[0]
    reduce_to_products(&norm.job, <double *>sums[0].data, <double *>sums[1].data)
    norm.job.sum_dy, norm.dy_sums = sums[2], <double *>sums[2].data
    norm.job.sum_dy_xhat, norm.dy_xhat_sums = sums[3], <double *>sums[3].data
    norm.combine = combine_products
    sum_in_float32(&norm.job)
    apply_gradient(&norm.job, cnp.PyArray_BYTES(out))


def group_gates(cnp.ndarray x not None, cnp.ndarray weight):
    """Tell whether the sums of a group can be divided by any of the weights.

    They are sums of products with the weights, which have all their bits then, and quotients that
    the arithmetic of results can hold.
    """
    cdef Vector weights = vector_of(weight, 1)
    return has_group_gates(x, &weights)


cdef bint has_group_gates(cnp.ndarray x, const Vector *weight) noexcept:
    cdef double values[COLUMNS]
    cdef double least = INFINITY, greatest = 0.0
    cdef double ratio = 1e-200 if cnp.PyArray_ITEMSIZE(x) == 8 else 1e-25
    cdef Block block
    cdef Py_ssize_t i, c, channels = cnp.PyArray_DIMS(x)[1]
    if weight.data == NULL:
        return True
    for i in range(ceil_div(channels, COLUMNS)):
        block = some_channels(i, channels)
        read_vector(weight, &block, values)
        for c in range(block.c1 - block.c0):
            if not fabs(values[c]) > 0.0:
                return False
            least, greatest = min(least, fabs(values[c])), max(greatest, fabs(values[c]))
    return least >= 1e-305 and least >= greatest * ratio
