# Which layout walks a block.


cdef void sum_block(const Job *job, const Block *block, int arithmetic, const double *centre,
                    double *first, double *second, const Block *beside=NULL) noexcept nogil:
    """Sum a block in one of the arithmetics, around a centre for each channel.

    Raw moments have none, so that it may be NULL. Unless `beside` is NULL, the results of that
    block are written meanwhile.
    """
    if not job.cut.column_layout:
        sum_runs(job, block, arithmetic, centre, first, second, beside)
    elif job.is_float64:
        sum_columns_in_chunks(job, block, ADDITIONS, arithmetic, centre, first, second)
    elif arithmetic == RAW and block.n1 - block.n0 > RAW_ROWS_MOST:
        sum_columns_in_chunks(job, block, RAW_ROWS_MOST, arithmetic, centre, first, second)
    else:
        sum_columns(job, block, arithmetic, centre, first, second)


cdef bint has_columns_of_results(const Job *job) noexcept nogil:
    """Tell whether results are walked in columns. Runs of folded rows always are."""
    return job.cut.column_layout and (job.cut.s < RUN_MIN_AFTER_SUMS or job.cut.fold > 1)


cdef void normalize_block(const Job *job, const Block *block) noexcept nogil:
    if has_columns_of_results(job):
        normalize_columns(job, block)
    else:
        normalize_runs(job, block)


cdef void gradient_block(const Job *job, const Block *block) noexcept nogil:
    if has_columns_of_results(job):
        gradient_columns(job, block)
    else:
        gradient_runs(job, block)


cdef void scale_block(const Job *job, const Block *block) noexcept nogil:
    """Normalize the dy of a block by mean 0 and invstd 1."""
    cdef Job results = job[0]
    results.x, results.dy = job.dy, NULL
    results.mean, results.invstd = constant(0.0), constant(1.0)
    normalize_block(&results, block)
