# The column layout: how its kernels are called, which walk the rows of a block's matrix.


cdef Matrix folded_matrix(const Job *job, const Block *block) noexcept nogil:
    """The folded rows of a block."""
    cdef Matrix matrix
    matrix.mask = mask_of(job, block, block.n0)
    matrix.mask_stride = job.cut.fold * job.cut.s
    matrix.rows = block.n1 - block.n0
    matrix.stride = job.cut.width
    matrix.channels = block.c1 - block.c0
    matrix.run = job.cut.s
    matrix.len = matrix.channels * matrix.run * job.cut.fold
    return matrix


cdef Matrix leftover_matrix(const Job *job, const Block *block) noexcept nogil:
    """The rows that are left over after the last folded one, as one row."""
    cdef Matrix matrix = folded_matrix(job, block)
    matrix.mask = mask_of(job, block, block.n1)
    matrix.rows = 1 if block.leftover_rows > 0 else 0
    matrix.len = matrix.channels * matrix.run * block.leftover_rows
    return matrix


cdef bint leaves_out_rows(const Job *job) noexcept nogil:
    """Whether a mask leaves out whole rows, which kernels heed faster than single columns of folded
    ones."""
    return job.mask != NULL and job.cut.s == 1 and job.cut.c > MASKED_WIDTH


cdef Matrix unfolded_matrix(const Job *job, const Block *block) noexcept nogil:
    """All rows of a block."""
    cdef Matrix matrix = folded_matrix(job, block)
    matrix.rows = matrix.rows * job.cut.fold + block.leftover_rows
    matrix.stride //= job.cut.fold
    matrix.len = matrix.channels * matrix.run
    matrix.mask_stride = job.cut.s
    return matrix


cdef void find_matrices(const Job *job, const Block *block, Matrix *rows,
                        Matrix *leftover) noexcept nogil:
    """The rows of a block to walk for results, and those that are left over."""
    if leaves_out_rows(job):
        rows[0] = leftover[0] = unfolded_matrix(job, block)
        leftover.rows = 0
    else:
        rows[0], leftover[0] = folded_matrix(job, block), leftover_matrix(job, block)


cdef void sum_columns(const Job *job, const Block *block, int arithmetic, const double *centre,
                      double *first, double *second) noexcept nogil:
    """The sums of a block: of moments or, with a dy, of products."""
    cdef Matrix folded = folded_matrix(job, block), leftover = leftover_matrix(job, block)
    memset(first, 0, folded.channels * sizeof(double))
    memset(second, 0, folded.channels * sizeof(double))
    if leaves_out_rows(job):
        add_sections(job, block, arithmetic, centre, first, second)
    else:
        add_columns(job, block, &folded, arithmetic, offset_of(job, block, block.n0), centre, first,
                    second)
    add_columns(job, block, &leftover, arithmetic, offset_of(job, block, block.n1), centre, first,
                second)


cdef void add_sections(const Job *job, const Block *block, int arithmetic, const double *centre,
                       double *first, double *second) noexcept nogil:
    """Add the first rows of all folded ones, then the second ones and so on.

    These have the columns, and thus the sums, that they have in folded rows.
    """
    cdef Matrix section = folded_matrix(job, block)
    cdef Py_ssize_t i, at = offset_of(job, block, block.n0)
    section.len = section.channels
    for i in range(job.cut.fold):
        add_columns(job, block, &section, arithmetic, at, centre, first, second)
        section.mask += 1
        at += job.cut.c * job.itemsize


cdef void add_columns(const Job *job, const Block *block, const Matrix *matrix, int arithmetic,
                      Py_ssize_t at, const double *centre, double *first,
                      double *second) noexcept nogil:
    """Add what a matrix of a block's channels has, so many bytes behind x, to their sums."""
    cdef Gate gate
    cdef SumColumnMoments *moments = job.kernels.column_moments
    cdef SumColumnProducts *products = job.kernels.column_products
    if matrix.rows == 0:
        return
    if arithmetic == RAW:
        moments = job.kernels.column_raw_moments
    elif arithmetic == IN_FLOAT32:
        products = job.kernels.column_tree_products
    if job.dy == NULL:
        moments(job.x + at, matrix, centre, first, second)
    else:
        products(job.dy + at, job.x + at, matrix, centre, gate_of(job, block, at, &gate), first,
                 second)


cdef void sum_columns_in_chunks(const Job *job, const Block *block, Py_ssize_t rows, int arithmetic,
                                const double *centre, double *first,
                                double *second) noexcept nogil:
    """The sums of a block, so many rows at a time; left-over rows go with the last."""
    cdef Sums firsts, seconds
    cdef Block chunk = block[0]
    cdef Py_ssize_t i, chunks = max(ceil_div(block.n1 - block.n0, rows), 1)
    begin(&firsts, NULL, block.c1 - block.c0)
    begin(&seconds, NULL, block.c1 - block.c0)
    for i in range(chunks):
        chunk.n0 = block.n0 + i * rows
        chunk.n1 = min(chunk.n0 + rows, block.n1)
        chunk.leftover_rows = block.leftover_rows if i == chunks - 1 else 0
        sum_columns(job, &chunk, arithmetic, centre, first, second)
        add(&firsts, first, block.c1 - block.c0)
        add(&seconds, second, block.c1 - block.c0)
    write_sums(&firsts, block.c1 - block.c0, first)
    write_sums(&seconds, block.c1 - block.c0, second)


cdef void normalize_columns(const Job *job, const Block *block) noexcept nogil:
    cdef Affine affine, first
    cdef Matrix rows, leftover
    cdef Py_ssize_t at = offset_of(job, block, block.n0)
    cdef Py_ssize_t end = offset_of(job, block, block.n1)
    cdef const char *x = job.x
    cdef bint nontemporal = job.nontemporal
    find_matrices(job, block, &rows, &leftover)
    affine_of(job, block, &affine)
    if scale_down_first(job, block, &affine, &first):
        if leftover.rows > 0:
            job.kernels.column_normalize(x + end, job.out + end, &leftover, &first, NULL, False)
        job.kernels.column_normalize(x + at, job.out + at, &rows, &first, NULL, False)
        x, nontemporal = job.out, False
    normalize_matrix(job, x, end, &leftover, &affine, False)
    normalize_matrix(job, x, at, &rows, &affine, nontemporal)


cdef void normalize_matrix(const Job *job, const char *x, Py_ssize_t at, const Matrix *matrix,
                           const Affine *affine, bint nontemporal) noexcept nogil:
    """Normalize the rows of a matrix that begins so many bytes behind x."""
    cdef Epilogue epilogue
    if matrix.rows > 0:
        job.kernels.column_normalize(x + at, job.out + at, matrix, affine,
                                     epilogue_of(job, at, &epilogue), nontemporal)


cdef void gradient_columns(const Job *job, const Block *block) noexcept nogil:
    cdef Gradient gradient
    cdef Matrix rows, leftover
    cdef Py_ssize_t at = offset_of(job, block, block.n0)
    cdef Py_ssize_t end = offset_of(job, block, block.n1)
    cdef Gate gate_memory, gate_of_end
    cdef const Gate *gate = gate_of(job, block, at, &gate_memory)
    cdef const Gate *last_gate = gate_of(job, block, end, &gate_of_end)
    find_matrices(job, block, &rows, &leftover)
    gradient_of(job, block, &gradient)
    if job.in_float64:
        gradient_in_float64(job, &gradient, last_gate, end, &leftover)
        gradient_in_float64(job, &gradient, gate, at, &rows)
        return
    if leftover.rows > 0:
        job.kernels.column_gradient(job.dy + end, job.x + end, job.out + end, &leftover, &gradient,
                                    last_gate, False)
    job.kernels.column_gradient(job.dy + at, job.x + at, job.out + at, &rows, &gradient, gate,
                                job.nontemporal)
