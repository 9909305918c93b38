# Partial sums of blocks, and how they merge: in the order of the blocks, whoever has computed them.

# Sums that keep what rounding takes from them, and add it in the end.
cdef struct Sums:
    double sum[COLUMNS]
    double lost[COLUMNS]


cdef void begin(Sums *sums, const double *first, Py_ssize_t channels) noexcept nogil:
    """Begin with a value for each channel, or with zeros where there is none."""
    if first == NULL:
        memset(sums.sum, 0, channels * sizeof(double))
    else:
        memcpy(sums.sum, first, channels * sizeof(double))
    memset(sums.lost, 0, channels * sizeof(double))


cdef void add(Sums *sums, const double *added, Py_ssize_t channels) noexcept nogil:
    """Add a value to the sum of each channel (Knuth's TwoSum)."""
    cdef Py_ssize_t c
    cdef double total, grown
    for c in range(channels):
        total = sums.sum[c] + added[c]
        grown = total - sums.sum[c]
        sums.lost[c] += (sums.sum[c] - (total - grown)) + (added[c] - grown)
        sums.sum[c] = total


cdef void write_sums(const Sums *sums, Py_ssize_t channels, double *to) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):  # beside an infinite sum, what is lost is NaN
        to[c] = sums.sum[c] + (0.0 if isnan(sums.lost[c]) else sums.lost[c])


# ------------------------------------------------------------------ mean and m2


cdef void reduce_moments(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """Mean and m2 of a block: sums of deviations from a pivot, and of their squares.

    With any element h of the block as the pivot, (h - mean)^2 <= m2, so that subtracting
    (sum of deviations)^2 / count loses no more than a factor of count of the precision. Of a
    double's 53 bits enough remain for a narrower x; for float64 the first walk finds a pivot
    near the mean, and a second one sums around that: the corrected two-pass algorithm. A pivot is
    finite, so that an infinite mean comes out as such and not as NaN.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef double pivot[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef BlockValid valid = valid_of(job, g, b)
    cdef Py_ssize_t c, channels = block.c1 - block.c0
    cdef double *mean = partial_sums_of(job, &block, b)
    cdef double *m2 = mean + job.cut.c
    if valid.count == 0:
        return
    job.kernels.load_as_double(job.x + element_of(job, &block, valid.first) * job.itemsize,
                               job.cut.s * job.itemsize, channels, pivot)
    for c in range(channels):
        pivot[c] = pivot[c] if isfinite(pivot[c]) else 0.0
    job.sum_block(job, &block, pivot, first, second)
    if job.refine_pivot:
        for c in range(channels):
            mean[c] = pivot[c] + first[c] / valid.count
            pivot[c] = mean[c] if isfinite(mean[c]) else pivot[c]
        job.sum_block(job, &block, pivot, first, second)
    for c in range(channels):
        mean[c] = first[c] / valid.count
        # Rounding can take a variance of nearly zero below it.
        m2[c] = max(second[c] - first[c] * mean[c], 0.0)
        mean[c] += pivot[c]


cdef void merge_moments(const Job *job, Py_ssize_t g) noexcept nogil:
    """Merge the blocks of each channel in their order, by Chan's formula."""
    cdef Py_ssize_t b, c
    cdef double count = 0.0, added, weight, delta
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
        added = <double>valid_of(job, g, b).count
        if added == 0.0:
            continue
        added_mean = partial_sums_of(job, &block, b)
        added_m2 = added_mean + job.cut.c
        if count == 0.0:
            begin(&means, added_mean, channels)
            begin(&m2s, added_m2, channels)
            count = added
            continue
        weight = added / (count + added)
        for c in range(channels):
            delta = added_mean[c] - means.sum[c] - means.lost[c]
            shift[c] = delta * weight
            growth[c] = added_m2[c] + delta * (delta * (count * weight))
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


cdef double sum_of_means(const Job *job, Py_ssize_t g, Py_ssize_t c) noexcept nogil:
    """The mean of a channel with an infinite or NaN block: what adding up its elements gives."""
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t b
    cdef double total = 0.0
    for b in range(job.cut.blocks):
        if valid_of(job, g, b).count > 0:
            total += partial_sums_of(job, &block, b)[c]
    return total


# ------------------------------------------------------------------ the sums of the backward


cdef void reduce_products(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """The sums over a block of dy and of dy * (x - mean)."""
    cdef double mean[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef double *first = partial_sums_of(job, &block, b)
    read_vector(&job.mean, &block, mean)
    job.sum_block(job, &block, mean, first, first + job.cut.c)


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
        first = partial_sums_of(job, &block, b)
        if b == 0:
            begin(&dy, first, channels)
            begin(&dy_xhat, first + job.cut.c, channels)
        else:
            add(&dy, first, channels)
            add(&dy_xhat, first + job.cut.c, channels)
    write_sums(&dy, channels, sum_dy)
    write_sums(&dy_xhat, channels, sum_dy_xhat)
    read_vector(&job.invstd, &block, invstd)
    for c in range(channels):
        sum_dy_xhat[c] *= invstd[c]
