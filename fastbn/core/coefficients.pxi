# The coefficients of the element-wise kernels, from vectors of one value per channel.


cdef void affine_of(const Job *job, const Block *block, Affine *affine) noexcept nogil:
    """y = (x - mean) * invstd * weight + bias."""
    affine_with(job, block, &job.weight, &job.bias, affine)


cdef void affine_with(const Job *job, const Block *block, const Vector *weight,
                      const Vector *bias, Affine *affine) noexcept nogil:
    """The same with a weight and a bias that are not the job's: those of a backward's forward."""
    cdef Py_ssize_t c
    cdef double weights[COLUMNS]
    read_vector(&job.mean, block, affine.centre)
    read_vector(weight, block, weights)
    read_vector(bias, block, affine.shift)
    read_invstd(job, block, affine.scale)
    for c in range(block.c1 - block.c0):
        affine.scale[c] *= weights[c]


cdef bint scale_down_first(const Job *job, const Block *block, Affine *affine,
                           Affine *first) noexcept nogil:
    """Divide affine in two where x - mean may leave float32's range: `first` comes before it.

    That takes a mean of 2^103, half a unit in the last place of the greatest float32, or more.
    First multiplying x by 2^-24 is exact, except for elements that do not count beside such a mean.
    A residual whose place the result takes would be lost in between.
    """
    cdef Py_ssize_t c
    cdef bint is_needed = False
    if job.itemsize == sizeof(double) or job.out == job.residual:
        return False
    for c in range(block.c1 - block.c0):
        is_needed = is_needed or fabs(affine.centre[c]) >= 2.0 ** 103
    if not is_needed:
        return False
    for c in range(block.c1 - block.c0):
        first.centre[c], first.scale[c], first.shift[c] = 0.0, 1.0, -0.0
        if fabs(affine.centre[c]) >= 2.0 ** 103:
            first.scale[c] = 2.0 ** -24
            affine.centre[c] *= 2.0 ** -24
            affine.scale[c] *= 2.0 ** 24
    return True


cdef void gradient_of(const Job *job, const Block *block, Gradient *gradient) noexcept nogil:
    """dx = (dy - sum_dy / count - xhat * sum_dy_xhat / count) * invstd * weight."""
    cdef Py_ssize_t c
    cdef double count = count_of(job, block.batch)
    cdef double invstd[COLUMNS]
    read_vector(&job.invstd, block, invstd)
    read_vector(&job.mean, block, gradient.x_mean)
    read_vector(&job.sum_dy, block, gradient.dy_mean)
    read_vector(&job.sum_dy_xhat, block, gradient.slope)
    read_vector(&job.weight, block, gradient.scale)
    for c in range(block.c1 - block.c0):
        gradient.dy_mean[c] /= count
        gradient.slope[c] = invstd[c] * (gradient.slope[c] / count)
        gradient.scale[c] *= invstd[c]
