# The coefficients of the element-wise kernels, from vectors of one value per channel.


cdef void affine_of(const Job *job, const Block *block, Affine *affine) noexcept nogil:
    """y = (x - mean) * invstd * weight + bias."""
    affine_with(job, block, &job.weight, &job.bias, affine)


cdef void affine_with(const Job *job, const Block *block, const Vector *weight,
                      const Vector *bias, Affine *affine) noexcept nogil:
    """The same with a weight and a bias that are not the job's: those of a backward's forward."""
    cdef double weights[COLUMNS]
    read_vector(&job.mean, block, affine.centre)
    read_vector(weight, block, weights)
    read_vector(bias, block, affine.shift)
    read_invstd(job, block, affine.scale)
    isa_in_use.common.multiply(weights, block.c1 - block.c0, affine.scale)


cdef void gradient_of(const Job *job, const Block *block, Gradient *gradient) noexcept nogil:
    """dx = (dy - sum_dy / count - xhat * sum_dy_xhat / count) * invstd * weight."""
    cdef double invstd[COLUMNS]
    read_vector(&job.invstd, block, invstd)
    read_vector(&job.mean, block, gradient.x_mean)
    read_vector(&job.sum_dy, block, gradient.dy_mean)
    read_vector(&job.sum_dy_xhat, block, gradient.slope)
    read_vector(&job.weight, block, gradient.scale)
    isa_in_use.common.gradient_coefficients(invstd, count_of(job, block.batch), block.c1 - block.c0,
                                            gradient.dy_mean, gradient.slope, gradient.scale)
