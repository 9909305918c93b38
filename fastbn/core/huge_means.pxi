# Where x - mean may leave the range of float32, since the mean is huge.


cdef bint has_huge_mean(const Job *job, const double *means, Py_ssize_t channels) noexcept nogil:
    """Tell whether the mean of any channel is so large."""
    return not job.is_float64 and isa_in_use.common.any_huge(means, channels)


cdef bint needs_float64(const Job *job) noexcept nogil:
    """Tell whether a gradient is computed in float64 because the mean of any channel is huge.

    In all channels: which of them are walked together depends on threads and addresses.
    """
    cdef double means[COLUMNS]
    cdef Block block
    cdef Py_ssize_t batch, i, batches = 1
    if job.dy == NULL or job.apply == NULL or job.is_float64:
        return False
    if job.mean.batch_stride != 0:
        batches = job.cut.batches + (job.leftover_samples > 0)
    for batch in range(batches):
        for i in range(ceil_div(job.cut.c, COLUMNS)):
            block = some_channels(i, job.cut.c)
            block.batch = batch
            read_vector(&job.mean, &block, means)
            if has_huge_mean(job, means, block.c1 - block.c0):
                return True
    return False


cdef bint scale_down_first(const Job *job, const Block *block, Affine *affine,
                           Affine *first) noexcept nogil:
    """Divide affine in two where means are huge: `first` comes before it.

    First multiplying x by 2^-24 is exact, except for elements that do not count beside such a mean.
    A residual whose place the result takes would be lost in between.
    """
    cdef Py_ssize_t c
    cdef bint loses_residual = job.residual != NULL and job.out == job.residual
    if loses_residual or not has_huge_mean(job, affine.centre, block.c1 - block.c0):
        return False
    for c in range(block.c1 - block.c0):
        first.centre[c], first.scale[c], first.shift[c] = 0.0, 1.0, -0.0
        if isa_in_use.common.any_huge(&affine.centre[c], 1):
            first.scale[c] = 2.0 ** -24
            affine.centre[c] *= 2.0 ** -24
            affine.scale[c] *= 2.0 ** 24
    return True


cdef void gradient_in_float64(const Job *job, const Gradient *gradient, const Gate *gate,
                              Py_ssize_t at, const Matrix *matrix) noexcept nogil:
    """Compute the dx of rows that begin so many bytes behind x, one element after the other."""
    cdef double dy[LANES]
    cdef double x[LANES]
    cdef Py_ssize_t r, step, i, i0, c, count, offset
    for r in range(matrix.rows):
        for step in range(ceil_div(matrix.len, LANES)):
            i0 = step * LANES
            count = min(<Py_ssize_t>LANES, matrix.len - i0)
            offset = at + (r * matrix.stride + i0) * job.itemsize
            job.kernels.load_as_double(job.dy + offset, job.itemsize, count, dy)
            job.kernels.load_as_double(job.x + offset, job.itemsize, count, x)
            for i in range(count):
                c = (i0 + i) // matrix.run % matrix.channels
                if gate != NULL:
                    pass_one(gate, c, &dy[i], &x[i])
                dy[i] = (dy[i] - gradient.dy_mean[c] - (x[i] - gradient.x_mean[c])
                         * gradient.slope[c]) * gradient.scale[c]
                if matrix.mask != NULL and not is_valid(matrix, r, i0 + i):
                    dy[i] = 0.0
            job.kernels.store_from_double(dy, job.itemsize, count, job.out + offset)


cdef bint is_valid(const Matrix *matrix, Py_ssize_t row, Py_ssize_t column) noexcept nogil:
    """Tell whether the mask of a matrix has a valid position there."""
    cdef Py_ssize_t period = column // (matrix.run * matrix.channels)
    return matrix.mask[row * matrix.mask_stride + period * matrix.run + column % matrix.run] != 0


cdef void pass_one(const Gate *gate, Py_ssize_t c, double *dy, double *x) noexcept nogil:
    """Let a dy, and the x that belongs to it, pass the gate of a channel."""
    cdef bint inside = not (x[0] < gate.low[c] or x[0] > gate.high[c])
    if gate.activation.kind == RELU:
        dy[0] = dy[0] if inside else 0.0
    elif inside:
        dy[0] *= gate.activation.slope
        if gate.activation.kind == LEAKY_RELU_INVERTED:
            x[0] /= gate.activation.slope
