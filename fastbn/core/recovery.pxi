# A forward in place overwrites its input, and its backward recovers the normalized input from the
# output, as (y - bias) / weight. For some channels that would lose too many digits.

cdef Recovery recovery_of(Py_ssize_t itemsize, int type_num, double count) noexcept nogil:
    """What decides it for outputs of a dtype and so many values in each channel.

    A bias of `ratio` times the weight takes as many bits of the values that it is added to as the
    logarithm of the ratio: 4 of float16's 11 or more, 2 of bfloat16's 8.
    """
    cdef Recovery recovery
    recovery.least, recovery.greatest, recovery.ratio = FLT_MIN, FLT_MAX, 16.0
    if itemsize == 8:  # times invstd, of 1e-154 to 1e154, the square of the weight is a double
        recovery.least, recovery.greatest = 1e-75, 1e75
    elif type_num == cnp.NPY_FLOAT16:
        recovery.least, recovery.greatest = 6.103515625e-05, 65504.0
    elif itemsize == 2:  # bfloat16 has the exponents of float32, and fewer bits to lose
        recovery.ratio = 4.0
    recovery.reach = sqrt(count) + recovery.ratio  # no normalized value of n exceeds sqrt(n)
    return recovery


cdef Py_ssize_t next_unrecoverable(const Recovery *recovery, double slope, const Vector *weight,
                                   const Vector *bias, Py_ssize_t c,
                                   Py_ssize_t channels) noexcept nogil:
    """The first channel from c on that cannot be recovered; the number of channels if all can.

    Negative values of the output are multiplied by the slope. A channel that leaves the range on
    that side is as lost as one that leaves it on the other one.
    """
    cdef double weights[COLUMNS]
    cdef double biases[COLUMNS]
    cdef Block block
    cdef Py_ssize_t i
    block.batch = 0
    while c < channels:
        block.c0, block.c1 = c, min(c + COLUMNS, channels)
        read_vector(weight, &block, weights)
        read_vector(bias, &block, biases)
        if not are_recoverable(recovery, slope, weights, biases, block.c1 - block.c0):
            i = 0
            while are_recoverable(recovery, slope, weights + i, biases + i, 1):
                i += 1
            return c + i
        c = block.c1
    return channels


cdef bint are_recoverable(const Recovery *recovery, double slope, const double *weight,
                          const double *bias, Py_ssize_t count) noexcept nogil:
    """Tell whether so many channels can be recovered on both sides."""
    if not isa_in_use.common.all_recoverable(weight, bias, 1.0, recovery, count):
        return False
    return slope == 1.0 or isa_in_use.common.all_recoverable(weight, bias, slope, recovery, count)


def unrecoverable_channels(cnp.dtype dtype not None, double count, cnp.ndarray weight not None,
                           cnp.ndarray bias, double slope):
    """The channels, of so many values each, that the output does not determine, as a list.

    Negative values of the output are multiplied by the slope.
    """
    cdef Recovery recovery = recovery_of(dtype.itemsize, dtype.type_num, count)
    cdef Vector weights = vector_of(weight, 1.0), biases = vector_of(bias, 0.0)
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(weight)[0], c
    found = []
    c = next_unrecoverable(&recovery, slope, &weights, &biases, 0, channels)
    while c < channels:
        found.append(c)
        c = next_unrecoverable(&recovery, slope, &weights, &biases, c + 1, channels)
    return found
