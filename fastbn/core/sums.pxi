# Partial sums of blocks, and how they merge: in the order of the blocks, whoever has computed them.

# How a block is summed: deviations in float64 or in float32, or x and x^2 in float64.
cdef enum:
    IN_FLOAT64
    IN_FLOAT32  # products in both layouts, moments in the row layout alone
    RAW

cdef enum:
    # The rows of a matrix whose raw moments are added one after the other: FASTBN_RAW_MOST tells
    # what they may lose.
    RAW_ROWS_MOST = 4096

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


cdef void reduce_moments(const Job *job, Py_ssize_t g, Py_ssize_t b,
                         const Block *beside) noexcept nogil:
    """Mean and m2 of a block."""
    cdef Block block = block_of(&job.cut, g, b)
    cdef BlockValid valid = valid_of(job, g, b)
    cdef double *mean = partial_sums_of(job, &block, b)
    cdef double *m2 = mean + job.cut.c
    if valid.count == 0:
        return
    if job.in_float32 and has_raw_moments(&job.cut):
        raw_moments(job, &block, &valid, mean, m2, beside)
    elif job.in_float32 and valid.count >= MOMENTS_MIN:
        float32_moments(job, &block, &valid, mean, m2, beside)
    else:
        if beside != NULL:
            job.apply(job, beside)
        exact_moments(job, &block, &valid, mean, m2)


cdef void exact_moments(const Job *job, const Block *block, const BlockValid *valid, double *mean,
                        double *m2) noexcept nogil:
    """Mean and m2 of a block: sums of deviations from a pivot, and of their squares, in float64.

    With any element h of the block as the pivot, (h - mean)^2 <= m2, so that subtracting
    (sum of deviations)^2 / count loses no more than a factor of count of the precision. Of a
    double's 53 bits enough remain for a narrower x; for float64 the first walk finds a pivot
    near the mean, and a second one sums around that: the corrected two-pass algorithm. A pivot is
    finite, so that an infinite mean comes out as such and not as NaN.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef double pivot[COLUMNS]
    cdef Py_ssize_t c, channels = block.c1 - block.c0
    read_channels(job, block, valid.first, pivot)
    for c in range(channels):
        pivot[c] = pivot[c] if isfinite(pivot[c]) else 0.0
    sum_block(job, block, IN_FLOAT64, pivot, first, second)
    if job.is_float64:
        for c in range(channels):
            mean[c] = pivot[c] + first[c] / valid.count
            pivot[c] = mean[c] if isfinite(mean[c]) else pivot[c]
        sum_block(job, block, IN_FLOAT64, pivot, first, second)
    isa_in_use.common.mean_and_m2(pivot, first, second, <double>valid.count, channels, mean, m2)


cdef void read_channels(const Job *job, const Block *block, Py_ssize_t at,
                        double *to) noexcept nogil:
    """The elements of a block's channels at a position, counted in those of one channel."""
    job.kernels.load_as_double(job.x + element_of(job, block, at) * job.itemsize,
                               job.cut.s * job.itemsize, block.c1 - block.c0, to)


# ------------------------------------------------------------------ as exact as float32

cdef enum:
    # Columns, and shorter runs, have raw moments. In longer ones sums in float32 are faster, since
    # half as many additions wait for each other.
    FLOAT32_RUN_MIN = 256


cdef bint has_raw_moments(const Cut *cut) noexcept nogil:
    return cut.column_layout or cut.s < FLOAT32_RUN_MIN


cdef void raw_moments(const Job *job, const Block *block, const BlockValid *valid, double *mean,
                      double *m2, const Block *beside) noexcept nogil:
    """Mean and m2 of a block from the sums of x and of x^2 in float64.

    The squares are exact. Where m2 is small beside count * mean^2 their difference has lost digits,
    and the channel is summed again around a pivot.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef Py_ssize_t channels = block.c1 - block.c0
    sum_block(job, block, RAW, NULL, first, second, beside)
    if isa_in_use.common.raw_mean_and_m2(first, second, <double>valid.count, channels, mean, m2):
        sum_again(job, block, valid, mean, m2)


cdef void sum_again(const Job *job, const Block *block, const BlockValid *valid, double *mean,
                    double *m2) noexcept nogil:
    """Find mean and m2 of the channels whose m2 is NaN by exact sums.

    In the column layout with as many of their neighbours as a step of the kernels takes anyway;
    folded rows have no narrower strips.
    """
    cdef Py_ssize_t begin = 0, end, step = 1, channels = block.c1 - block.c0
    if job.cut.column_layout:
        step = channels if job.cut.fold > 1 else ceil_div(LANES, job.cut.s)
    while begin < channels:
        end = end_of_lost(m2, begin, channels, step)
        if end > begin:
            sum_channels_again(job, block, valid, begin, end, mean, m2)
        begin = end + step


cdef Py_ssize_t end_of_lost(const double *m2, Py_ssize_t begin, Py_ssize_t channels,
                            Py_ssize_t step) noexcept nogil:
    """Where, from `begin` on, the first step of so many channels begins that has no NaN in m2."""
    cdef Py_ssize_t end = begin, c = begin
    while c < min(end + step, channels):
        c += 1
        if isnan(m2[c - 1]):
            end = c = min(end + step, channels)
    return end


cdef void sum_channels_again(const Job *job, const Block *block, const BlockValid *valid,
                             Py_ssize_t begin, Py_ssize_t end, double *mean,
                             double *m2) noexcept nogil:
    """Sum some channels of a block again; what is right already is kept.

    Channels do not depend on their neighbours.
    """
    cdef double exact_mean[COLUMNS]
    cdef double exact_m2[COLUMNS]
    cdef Py_ssize_t c
    cdef Block some = block[0]
    some.c0, some.c1 = block.c0 + begin, block.c0 + end
    exact_moments(job, &some, valid, exact_mean, exact_m2)
    for c in range(begin, end):
        if isnan(m2[c]):
            mean[c], m2[c] = exact_mean[c - begin], exact_m2[c - begin]


cdef enum:
    # Deviations at fewer valid positions are summed in float64: rounding errors of few numbers do
    # not average out, and a pivot costs as much as is gained. Products have their pivot.
    MOMENTS_MIN = 512
    PRODUCTS_MIN = 128
    # The positions among whose elements a pivot is looked for.
    PIVOT_SAMPLES = 16


cdef void float32_moments(const Job *job, const Block *block, const BlockValid *valid,
                          double *mean, double *m2, const Block *beside) noexcept nogil:
    """Mean and m2 of a block in float32, where rounding errors are of the size of the deviations.

    So the pivot must be near the mean: subtracting (sum of deviations)^2 / count multiplies the
    relative error of m2 by 1 + (pivot - mean)^2 / variance. Channels where that is more than 2 are
    summed again in float64, and so are those whose squares have left float32's range.
    """
    cdef double first[COLUMNS]
    cdef double second[COLUMNS]
    cdef double pivot[COLUMNS]
    find_pivots(job, block, valid, pivot)
    sum_block(job, block, IN_FLOAT32, pivot, first, second, beside)
    if isa_in_use.common.float32_mean_and_m2(pivot, first, second, <double>valid.count,
                                             block.c1 - block.c0, mean, m2):
        sum_again(job, block, valid, mean, m2)


cdef void find_pivots(const Job *job, const Block *block, const BlockValid *valid,
                      double *pivot) noexcept nogil:
    """Of a few valid elements of each channel the one that is next to their mean.

    They lie an odd number of positions apart, all over the block.
    """
    cdef Py_ssize_t at[PIVOT_SAMPLES]
    cdef Py_ssize_t i, position, count = 1
    cdef Py_ssize_t step = samples_of(job, block) * block.length // (PIVOT_SAMPLES + 1) | 1
    at[0] = element_of(job, block, valid.first)
    for i in range(1, PIVOT_SAMPLES):
        position = position_of(job, block, i * step)
        at[count] = element_of(job, block, position)
        count += job.mask == NULL or job.mask[position] != 0
    job.kernels.pivots(job.x, at, count, job.cut.s, block.c1 - block.c0, pivot)


cdef Py_ssize_t position_of(const Job *job, const Block *block, Py_ssize_t i) noexcept nogil:
    """The i-th position of a block, counted in the elements of one channel of the array."""
    return (sample_of(job, block, block.n0) + i // block.length) * job.cut.s + (
        block.s0 + i % block.length)


cdef void merge_moments(const Job *job, Py_ssize_t g) noexcept nogil:
    """Merge the blocks of each channel, if there are several; find invstd if that is asked for."""
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t channels = block.c1 - block.c0
    cdef double *mean = results_of(job, job.mean_out, &block)
    cdef double *m2 = results_of(job, job.m2_out, &block)
    cdef const double *of_block = partial_sums_of(job, &block, 0)
    if job.cut.blocks == 1 and valid_of(job, g, 0).count > 0:
        memcpy(mean, of_block, channels * sizeof(double))
        memcpy(m2, of_block + job.cut.c, channels * sizeof(double))
    else:
        merge_blocks(job, g, mean, m2)
    if job.invstd_out != NULL:
        isa_in_use.common.invstd(m2, max(count_of(job, block.batch), 1.0), job.eps, channels,
                                 results_of(job, job.invstd_out, &block))
    if job.running != NULL:
        move_running(job.running, &block, mean, m2)


cdef void merge_blocks(const Job *job, Py_ssize_t g, double *mean, double *m2) noexcept nogil:
    """Merge the blocks of each channel in their order, by Chan's formula."""
    cdef Py_ssize_t b, c
    cdef double count = 0.0, added, weight, delta
    cdef double shift[COLUMNS]
    cdef double growth[COLUMNS]
    cdef Sums means, m2s
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t channels = block.c1 - block.c0
    cdef const double *added_mean
    cdef const double *added_m2
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
    if count == 0.0:
        begin(&means, NULL, channels)
        begin(&m2s, NULL, channels)
    write_sums(&means, channels, mean)
    write_sums(&m2s, channels, m2)
    for c in range(channels):
        if isnan(mean[c]):
            mean[c] = sum_of_means(job, g, c)


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


cdef void reduce_products(const Job *job, Py_ssize_t g, Py_ssize_t b,
                          const Block *beside) noexcept nogil:
    """The sums over a block of dy and of dy * (x - mean)."""
    cdef double mean[COLUMNS]
    cdef Block block = block_of(&job.cut, g, b)
    cdef BlockValid valid = valid_of(job, g, b)
    cdef double *first = partial_sums_of(job, &block, b)
    cdef double *second = first + job.cut.c
    cdef Job derived
    read_vector(&job.mean, &block, mean)
    if job.raw_dy != NULL:
        derive_block(job, &block)
    elif sums_need_derived(job, &block, valid.count):
        derived = with_derived(job, &block)
        job = &derived
    if job.in_float32 and valid.count >= PRODUCTS_MIN:
        float32_products(job, &block, &valid, mean, first, second, beside)
    else:
        if beside != NULL:
            job.apply(job, beside)
        sum_block(job, &block, IN_FLOAT64, mean, first, second)


cdef void float32_products(const Job *job, const Block *block, const BlockValid *valid,
                           const double *mean, double *first, double *second,
                           const Block *beside) noexcept nogil:
    """The same in float32; channels whose products have left its range are summed again."""
    cdef double exact_first[COLUMNS]
    cdef double exact_second[COLUMNS]
    cdef Job derived
    cdef Py_ssize_t c, channels = block.c1 - block.c0
    sum_block(job, block, IN_FLOAT32, mean, first, second, beside)
    if not isa_in_use.common.float32_products(mean, first, <double>valid.count, channels, second):
        return
    if passes_by_bits(job):
        derived = with_derived(job, block)
        job = &derived
    sum_block(job, block, IN_FLOAT64, mean, exact_first, exact_second)
    for c in range(channels):
        if isnan(second[c]):
            first[c], second[c] = exact_first[c], exact_second[c]


cdef void merge_products(const Job *job, Py_ssize_t g) noexcept nogil:
    """Add up the blocks of each channel, if there are several; find the sums of dy * xhat."""
    cdef double invstd[COLUMNS]
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t channels = block.c1 - block.c0
    cdef double *sum_dy = results_of(job, job.sum_dy_out, &block)
    cdef double *sum_dy_xhat = results_of(job, job.sum_dy_xhat_out, &block)
    cdef const double *of_block = partial_sums_of(job, &block, 0)
    if job.cut.blocks == 1:
        memcpy(sum_dy, of_block, channels * sizeof(double))
        memcpy(sum_dy_xhat, of_block + job.cut.c, channels * sizeof(double))
    else:
        add_blocks(job, g, sum_dy, sum_dy_xhat)
    read_vector(&job.invstd, &block, invstd)
    isa_in_use.common.multiply(invstd, channels, sum_dy_xhat)
    if job.gradients != NULL:
        add_gradients(job.gradients, &block, sum_dy_xhat, sum_dy)


cdef void add_blocks(const Job *job, Py_ssize_t g, double *sum_dy,
                     double *sum_products) noexcept nogil:
    """Add up the blocks of each channel in their order."""
    cdef Py_ssize_t b
    cdef Sums dy, products
    cdef Block block = block_of(&job.cut, g, 0)
    cdef Py_ssize_t channels = block.c1 - block.c0
    cdef const double *first
    if job.cut.blocks == 0:
        begin(&dy, NULL, channels)
        begin(&products, NULL, channels)
    for b in range(job.cut.blocks):
        first = partial_sums_of(job, &block, b)
        if b == 0:
            begin(&dy, first, channels)
            begin(&products, first + job.cut.c, channels)
        else:
            add(&dy, first, channels)
            add(&products, first + job.cut.c, channels)
    write_sums(&dy, channels, sum_dy)
    write_sums(&products, channels, sum_products)
