# What becomes of a batch's statistics and sums: running statistics move towards them, the gradients
# of weight and bias are added up.


cdef void move_running(const Running *running, const Block *block, const double *mean,
                       const double *m2) noexcept nogil:
    """Move the running statistics of a block's channels towards those of a batch."""
    move_channels(&running.mean, block, mean, 1.0, running.factor)
    move_channels(&running.var, block, m2, running.divisor, running.factor)


cdef void move_all_channels(const Running *running, Py_ssize_t channels, const double *mean,
                            const double *m2) noexcept nogil:
    """The same of all channels."""
    cdef Block block
    cdef Py_ssize_t i
    for i in range(ceil_div(channels, COLUMNS)):
        block = some_channels(i, channels)
        move_running(running, &block, mean + block.c0, m2 + block.c0)


cdef void move_channels(const Vector *moved, const Block *block, const double *target,
                        double divisor, double factor) noexcept nogil:
    """Set the values of a block's channels to (1 - factor) * value + factor * target / divisor."""
    cdef double values[COLUMNS]
    cdef Py_ssize_t channels = block.c1 - block.c0
    read_vector(moved, block, values)
    isa_in_use.common.move_towards(target, divisor, factor, channels, values)
    write_vector(moved, block, values)


cdef void move_batch(const Vector *moved, const Vector *target, Py_ssize_t batch,
                     Py_ssize_t channels, double divisor, double factor) noexcept nogil:
    """The same of all channels, towards the values of a batch."""
    cdef double targets[COLUMNS]
    cdef Block block
    cdef Py_ssize_t i
    for i in range(ceil_div(channels, COLUMNS)):
        block = some_channels(i, channels)
        block.batch = batch
        read_vector(target, &block, targets)
        move_channels(moved, &block, targets, divisor, factor)


cdef void add_gradients(const GradientSums *gradients, const Block *block, const double *of_weight,
                        const double *of_bias) noexcept nogil:
    """Add to the gradients of weight and bias in a block's channels, or begin them."""
    add_channels(&gradients.weight, block, of_weight, gradients.weight_is_new)
    add_channels(&gradients.bias, block, of_bias, gradients.bias_is_new)


cdef void add_all_gradients(const GradientSums *gradients, Py_ssize_t channels,
                            const double *of_weight, const double *of_bias) noexcept nogil:
    """The same in all channels."""
    cdef Block block
    cdef Py_ssize_t i
    for i in range(ceil_div(channels, COLUMNS)):
        block = some_channels(i, channels)
        add_gradients(gradients, &block, of_weight + block.c0, of_bias + block.c0)


cdef void add_channels(const Vector *total, const Block *block, const double *added,
                       bint is_new) noexcept nogil:
    cdef double sums[COLUMNS]
    cdef Py_ssize_t c
    if total.data == NULL:
        return
    if is_new:
        write_vector(total, block, added)
        return
    read_vector(total, block, sums)
    for c in range(block.c1 - block.c0):
        sums[c] += added[c]
    write_vector(total, block, sums)
