# A forward in place overwrites its input, and its backward recovers the normalized input from the
# output, as (y - bias) / weight. For some channels that would lose too many digits.

cdef struct Limits:
    double least, greatest        # the normal numbers of the output's dtype
    double ratio                  # of |bias| to |weight|, above which the bias has too many digits


cdef Limits limits_of(Py_ssize_t itemsize, int type_num) noexcept nogil:
    cdef Limits limits
    limits.least, limits.greatest, limits.ratio = FLT_MIN, FLT_MAX, 16.0
    if itemsize == 8:
        limits.least, limits.greatest = DBL_MIN, DBL_MAX
    elif type_num == cnp.NPY_FLOAT16:
        limits.least, limits.greatest = 6.103515625e-05, 65504.0
    elif itemsize == 2:  # bfloat16 has the exponents of float32, and fewer digits to lose
        limits.ratio = 4.0
    return limits


cdef bint is_recoverable(const Limits *limits, double reach, double weight,
                         double bias) noexcept nogil:
    """Tell whether a channel's output neither under- nor overflows, nor drowns in the bias."""
    return ((fabs(weight) >= limits.least) & (fabs(weight) * reach <= limits.greatest)
            & (fabs(bias) <= limits.ratio * fabs(weight)))


cdef Py_ssize_t next_unrecoverable(const Limits *limits, double count, double slope,
                                   const Vector *weight, const Vector *bias, Py_ssize_t c,
                                   Py_ssize_t channels) noexcept nogil:
    """The first channel from c on that cannot be recovered; the number of channels if all can.

    Negative values of the output are multiplied by the slope.
    """
    cdef double weights[COLUMNS]
    cdef double biases[COLUMNS]
    cdef double reach = pow(count, 0.5) + limits.ratio  # no normalized value of n exceeds sqrt(n)
    cdef Block block
    cdef Py_ssize_t i, recoverable
    block.batch = 0
    while c < channels:
        block.c0, block.c1 = c, min(c + COLUMNS, channels)
        read_vector(weight, &block, weights)
        read_vector(bias, &block, biases)
        recoverable = 0
        for i in range(block.c1 - block.c0):  # without branches: nearly always it is all of them
            recoverable += is_recoverable_on_both_sides(limits, reach, slope, weights[i], biases[i])
        i = 0
        if recoverable < block.c1 - block.c0:
            while is_recoverable_on_both_sides(limits, reach, slope, weights[i], biases[i]):
                i += 1
            return c + i
        c = block.c1
    return channels


cdef bint is_recoverable_on_both_sides(const Limits *limits, double reach, double slope,
                                       double weight, double bias) noexcept nogil:
    """The same of an output whose negative values were multiplied by a slope.

    A channel that leaves the range on that side is as lost as one that leaves it on the other one.
    """
    return (is_recoverable(limits, reach, weight, bias)
            & is_recoverable(limits, reach, slope * weight, slope * bias))


def unrecoverable_channels(cnp.dtype dtype not None, double count, cnp.ndarray weight not None,
                           cnp.ndarray bias, double slope):
    """The channels, of so many values each, that the output does not determine, as a list.

    Negative values of the output are multiplied by the slope.
    """
    cdef Limits limits = limits_of(dtype.itemsize, dtype.type_num)
    cdef Vector weights = vector_of(weight, 1.0), biases = vector_of(bias, 0.0)
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(weight)[0], c
    found = []
    c = next_unrecoverable(&limits, count, slope, &weights, &biases, 0, channels)
    while c < channels:
        found.append(c)
        c = next_unrecoverable(&limits, count, slope, &weights, &biases, c + 1, channels)
    return found
