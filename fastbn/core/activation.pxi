# Activations and residuals: what follows a normalization in the same walk, and what precedes the
# use of dy in a backward.


cdef str RELU_NAME = "relu"
cdef str RELU6_NAME = "relu6"
cdef str LEAKY_RELU_NAME = "leaky_relu"


cdef Activation activation_of(object name, double slope) except *:
    """The activation of a name that has been checked; None stands for the identity."""
    cdef Activation activation
    activation.kind, activation.slope, activation.cap = LINEAR, slope, INFINITY
    if name is None:
        return activation
    activation.kind = RELU
    if name == LEAKY_RELU_NAME:
        activation.kind = LEAKY_RELU
    elif name == RELU6_NAME:
        activation.cap = 6.0
    return activation


def alive_bytes(cnp.ndarray x not None):
    """The bytes that a bit for each element takes, and the padding behind them."""
    return bytes_of_bits(cnp.PyArray_SIZE(x))


cdef Py_ssize_t bytes_of_bits(Py_ssize_t count) noexcept nogil:
    return (count + 7) // 8 + BITS_PADDING


cdef void set_epilogue(Job *job, Activation activation, cnp.ndarray residual,
                       cnp.ndarray alive) noexcept:
    """Let a residual and an activation follow the job's normalization, if there are any."""
    job.activation = activation
    job.has_epilogue = activation.kind != LINEAR or residual is not None
    if residual is not None:
        job.residual = cnp.PyArray_BYTES(residual)
    if alive is not None:
        job.alive = <unsigned char *>cnp.PyArray_BYTES(alive)


cdef bint only_clamps(const Job *job) noexcept nogil:
    """Tell whether an epilogue in float32 is a clamp alone."""
    return (job.residual == NULL and job.alive == NULL
            and is_clamped(job.activation.kind, <float>job.activation.slope))


cdef const Epilogue *epilogue_of(const Job *job, Py_ssize_t at,
                                 Epilogue *epilogue) noexcept nogil:
    """The epilogue of a kernel that begins so many bytes behind x; NULL if there is none."""
    if not job.has_epilogue:
        return NULL
    epilogue.activation = job.activation
    epilogue.residual = NULL
    if job.residual != NULL:
        epilogue.residual = job.residual + at
    epilogue.alive = job.alive
    epilogue.first = number_of(job, at)
    return epilogue


cdef Py_ssize_t number_of(const Job *job, Py_ssize_t at) noexcept nogil:
    """The number, in the whole array, of the element so many bytes behind x."""
    return job.first_element + at // job.itemsize


# ------------------------------------------------------------------ backwards
#
# A gate is None or a tuple: the name of the activation and its slope; weight and bias of the
# forward, and whether x is the output of a forward in place; a raw dy and what tells the
# derivatives, the output or the bits. Without a raw dy the kernels compute the derivatives. With
# one, dy is overwritten by the product of the two, and with a mask there is always one.


# What dy passes in a job: a gate of the kernels, or with a raw dy the derivatives that are known.
cdef struct GateOfJob:
    Activation activation
    Vector weight, bias
    const char *raw_dy
    const char *y
    unsigned char *alive


cdef void pass_gate(Job *job, const GateOfJob *gate) noexcept nogil:
    """Let dy pass a gate."""
    job.activation = gate.activation
    job.has_gate = gate.raw_dy == NULL and gate.activation.kind != LINEAR
    job.gate_weight, job.gate_bias = gate.weight, gate.bias
    job.raw_dy, job.y, job.alive = gate.raw_dy, gate.y, gate.alive


cdef int set_gate(Job *job, tuple gate) except -1:
    cdef GateOfJob passed
    if gate is None:
        return 0
    name, slope, weight, bias, inverted, raw_dy, y, alive = gate
    passed = gate_with(activation_of(name, slope), raw_dy, y, alive)
    if inverted:
        passed.activation.kind = LEAKY_RELU_INVERTED
    passed.weight, passed.bias = vector_of(weight, 1), vector_of(bias, 0)
    pass_gate(job, &passed)
    return 0


cdef GateOfJob gate_with(Activation activation, cnp.ndarray raw_dy, cnp.ndarray y,
                         cnp.ndarray alive) noexcept:
    """A gate with a raw dy, and what tells the derivatives, or with neither."""
    cdef GateOfJob gate
    memset(&gate, 0, sizeof(GateOfJob))
    gate.activation = activation
    if raw_dy is not None:
        gate.raw_dy = cnp.PyArray_BYTES(raw_dy)
    if y is not None:
        gate.y = cnp.PyArray_BYTES(y)
    if alive is not None:
        gate.alive = <unsigned char *>cnp.PyArray_BYTES(alive)
    return gate


cdef const Gate *gate_of(const Job *job, const Block *block, Py_ssize_t at,
                         Gate *gate) noexcept nogil:
    """The gate of a block's channels, for a kernel that begins so many bytes behind dy; or NULL."""
    if not job.has_gate and job.passed == NULL:
        return NULL
    memset(gate, 0, sizeof(Gate))
    gate.activation = job.activation
    if job.has_gate:
        gate.low = results_of(job, job.gate_bounds, block)
        gate.high = gate.low + job.cut.batches * job.cut.c
        return gate
    gate.first, gate.passed = number_of(job, at), job.passed + at
    if passes_by_bits(job):
        gate.alive = job.alive
    return gate


cdef bint passes_by_bits(const Job *job) noexcept nogil:
    """Tell whether kernels of both walks derive by bits."""
    return job.passed != NULL and job.activation.kind != LINEAR


cdef void pass_in_second_walk(Job *job) noexcept nogil:
    """Let the second walk write what passes, and kernels of both derive it, by bits.

    Written by the first one, it would be read by both, and non-temporal stores could not write it.
    """
    cdef bint is_linear = job.activation.kind == LINEAR
    cdef bint has_bits = job.activation.kind == RELU and job.alive != NULL
    has_bits = has_bits and job.cut.n * job.cut.s >= PRODUCTS_MIN  # else sums need the product
    if (job.raw_dy == NULL or not (is_linear or has_bits) or not job.kernels.writes_passed
            or job.mask != NULL or job.apply == NULL or not job.in_float32 or job.in_float64
            or job.dy == job.out):  # nobody asks for it
        return
    if not is_linear or job.dy != job.raw_dy:
        job.passed = <char *>job.dy
    job.dy, job.raw_dy = job.raw_dy, NULL


cdef bint sums_need_derived(const Job *job, const Block *block, Py_ssize_t count) noexcept nogil:
    """Tell whether kernels cannot sum a block of so many positions by bits: where it is small."""
    if not passes_by_bits(job):
        return False
    if count < PRODUCTS_MIN:
        return True
    if not job.cut.column_layout:  # the last part of a run of 2^26 elements may be so short
        return block.length < LANES
    return folded_matrix(job, block).len < LANES


cdef Job with_derived(const Job *job, const Block *block) noexcept nogil:
    """A job that derives by bits, as one that reads the product, which is written for a block.

    The memory is that of the second walk's. It may be dy, since to pass twice is to pass once.
    """
    cdef Job derived = job[0]
    derived.raw_dy, derived.dy, derived.passed = job.dy, job.passed, NULL
    derive_block(&derived, block)
    derived.raw_dy = NULL
    return derived


cdef void find_gate_bounds(const Job *job, int threads) noexcept nogil:
    """Find the bounds of the gates of all channels."""
    cdef Py_ssize_t tasks = job.cut.batches * ceil_div(job.cut.c, COLUMNS)
    if job.has_gate:
        parallel_for(job, find_some_gate_bounds, 0, tasks, tasks, threads)


cdef void find_some_gate_bounds(const Job *job, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t t,
                                Py_ssize_t before) noexcept nogil:
    """Find the bounds of COLUMNS channels of a batch."""
    cdef Affine affine, first
    cdef Py_ssize_t c, strips = ceil_div(job.cut.c, COLUMNS)
    cdef Block block = some_channels(t % strips, job.cut.c)
    cdef double *low
    cdef double *high
    cdef bint is_scaled
    block.batch = t // strips
    affine_with(job, &block, &job.gate_weight, &job.gate_bias, &affine)
    is_scaled = scale_down_first(job, &block, &affine, &first)
    low = results_of(job, job.gate_bounds, &block)
    high = low + job.cut.batches * job.cut.c
    job.kernels.gate_bounds(&affine, &job.activation, block.c1 - block.c0, low, high)
    if is_scaled:
        for c in range(block.c1 - block.c0):
            low[c] /= first.scale[c]
            high[c] /= first.scale[c]


cdef void derive_block(const Job *job, const Block *block) noexcept nogil:
    """Write the dy of a block."""
    walk_pieces(job, block, derive_piece)


cdef void derive_piece(const Job *job, Py_ssize_t at, Py_ssize_t count) noexcept nogil:
    """Write the dy of a piece."""
    cdef const char *y = job.y
    if y != NULL:
        y += at
    job.kernels.activation_gradient(job.raw_dy + at, y, job.alive, number_of(job, at), count,
                                    &job.activation, <char *>job.dy + at)
