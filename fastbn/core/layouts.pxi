# Which layout walks a block.


cdef void sum_block(const Job *job, const Block *block, bint in_float32, const double *centre,
                    double *first, double *second) noexcept nogil:
    """Sum a block around a centre for each channel, in float32 or in double."""
    if not job.cut.column_layout:
        sum_runs(job, block, in_float32, centre, first, second)
    elif job.refine_pivot:
        sum_columns_in_chunks(job, block, in_float32, centre, first, second)
    else:
        sum_columns(job, block, in_float32, centre, first, second)


cdef void normalize_block(const Job *job, const Block *block) noexcept nogil:
    if job.cut.column_layout:
        normalize_columns(job, block)
    else:
        normalize_runs(job, block)


cdef void gradient_block(const Job *job, const Block *block) noexcept nogil:
    if job.cut.column_layout:
        gradient_columns(job, block)
    else:
        gradient_runs(job, block)
