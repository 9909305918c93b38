# The quick path: it takes a call as it came if all of it is plain, and returns None otherwise.
#
# Plain are exact ndarrays, aligned and of native byte order, C-contiguous or channels-last, of the
# right shapes and dtypes, and options of the types float and None. What is read and what is written
# is the same memory, or apart. A call that is declined takes the checked path, which converts it or
# tells what is wrong; both paths give the same bits. All memory is taken before anything is
# written. The caller owns a reference to every array.

cdef bint quick_path = os.environ.get("FASTBN_QUICK_PATH") != "0"


def set_quick_path(bint on):
    """Switch the quick path on or off; return whether it was on."""
    global quick_path
    cdef bint was_on = quick_path
    quick_path = on
    return was_on


# ------------------------------------------------------------------ what is plain

# The type number of ml_dtypes' bfloat16, which the checked path has recognized by its name.
cdef int bfloat16_type_num = -1


def know_bfloat16(cnp.dtype dtype not None):
    """Let the quick path take a dtype for bfloat16."""
    global bfloat16_type_num
    bfloat16_type_num = dtype.type_num


cdef bint is_plain(object value) noexcept:
    """Tell whether it is an ndarray, of one of the four dtypes, that can be read as it is."""
    cdef int type_num
    if not cnp.PyArray_CheckExact(value):
        return False
    type_num = cnp.PyArray_TYPE(<cnp.ndarray>value)
    return cnp.PyArray_ISBEHAVED_RO(<cnp.ndarray>value) and (
        type_num == cnp.NPY_FLOAT32 or type_num == cnp.NPY_FLOAT64
        or type_num == cnp.NPY_FLOAT16 or type_num == bfloat16_type_num)


cdef bint is_plain_input(object x, tuple ranks, object num_features) except -1:
    """Tell whether it is a plain array of shape (N, C, ...) that fits a layer, if there is one."""
    cdef cnp.ndarray array
    if not quick_path or not is_plain(x):
        return False
    array = <cnp.ndarray>x
    if cnp.PyArray_NDIM(array) < 2 or cnp.PyArray_SIZE(array) == 0 or layout_of(array) == UNFIT:
        return False
    if ranks is None:
        return True
    return (PyLong_CheckExact(num_features)
            and cnp.PyArray_DIMS(array)[1] == <Py_ssize_t>num_features
            and has_rank(ranks, cnp.PyArray_NDIM(array)))


cdef bint has_rank(tuple ranks, int ndim) except -1:
    cdef object rank
    for rank in ranks:
        if <int>rank == ndim:
            return True
    return False


cdef bint is_plain_beside(object value, cnp.ndarray x) noexcept:
    """Tell whether it is a plain array of x's shape, dtype and layout."""
    cdef cnp.ndarray array
    if value is x:
        return True
    if not is_plain(value):
        return False
    array = <cnp.ndarray>value
    return (cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(array, x)
            and layout_of(array) == layout_of(x))


cdef bint is_plain_output(object out, cnp.ndarray x, cnp.ndarray dy) noexcept:
    """Tell whether it is None, or a plain array that is x or dy, or apart from both."""
    if out is None:
        return True
    return (is_plain_beside(out, x) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)
            and is_same_or_apart(<cnp.ndarray>out, x) and is_same_or_apart(<cnp.ndarray>out, dy))


cdef bint is_plain_residual_out(object out, cnp.ndarray x, cnp.ndarray dy, object dx) noexcept:
    """Tell whether it is None, or a plain array that is dy, or apart from all others."""
    if out is None:
        return True
    return (is_plain_beside(out, x) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out)
            and is_apart(<cnp.ndarray>out, x) and is_same_or_apart(<cnp.ndarray>out, dy)
            and (dx is None or is_apart(<cnp.ndarray>out, <cnp.ndarray>dx)))


cdef bint is_same_or_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Tell whether arrays of one shape, dtype and layout are the same memory, or apart."""
    return is_same(a, b) or is_apart(a, b)


cdef bint is_same(cnp.ndarray a, cnp.ndarray b) noexcept:
    return cnp.PyArray_BYTES(a) == cnp.PyArray_BYTES(b)


cdef bint is_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Tell whether dense arrays, or vectors of positive strides, have no memory in common."""
    cdef const char *start_a = cnp.PyArray_BYTES(a)
    cdef const char *start_b = cnp.PyArray_BYTES(b)
    return start_a + extent_of(a) <= start_b or start_b + extent_of(b) <= start_a


cdef Py_ssize_t extent_of(cnp.ndarray array) noexcept:
    """The bytes from the start of the first element to the end of the last one."""
    if cnp.PyArray_NDIM(array) != 1:
        return cnp.PyArray_NBYTES(array)
    return (cnp.PyArray_STRIDES(array)[0] * (cnp.PyArray_DIMS(array)[0] - 1)
            + cnp.PyArray_ITEMSIZE(array))


cdef bint is_plain_vector(object value, cnp.ndarray x, object out) noexcept:
    """Tell whether it is None, or a plain vector of a value per channel, apart from out."""
    cdef cnp.ndarray vector
    if value is None:
        return True
    if not is_plain(value):
        return False
    vector = <cnp.ndarray>value
    if (cnp.PyArray_NDIM(vector) != 1 or cnp.PyArray_DIMS(vector)[0] != cnp.PyArray_DIMS(x)[1]
            or cnp.PyArray_STRIDES(vector)[0] <= 0):
        return False
    return out is None or is_apart(vector, <cnp.ndarray>out)


cdef bint is_plain_target(object value, cnp.ndarray x, object out) noexcept:
    """Tell whether it is None, or a plain vector that can be written to."""
    return is_plain_vector(value, x, out) and (
        value is None or cnp.PyArray_ISWRITEABLE(<cnp.ndarray>value))


cdef bint is_plain_gradient(object gradient, object parameter, cnp.ndarray x,
                            object out) noexcept:
    """Tell whether it is a sum of gradients that can be added to, or None for a new one.

    NumPy rounds sums from float64, kernels round those of 16 bits from float32.
    """
    if parameter is None:
        return gradient is None
    if not is_plain_target(gradient, x, out):
        return False
    return cnp.PyArray_ITEMSIZE(<cnp.ndarray>(parameter if gradient is None else gradient)) > 2


cdef bint is_plain_counter(object counter) noexcept:
    """Tell whether it is None, or an int64 that can count on."""
    cdef cnp.ndarray array
    if counter is None:
        return True
    if not cnp.PyArray_CheckExact(counter):
        return False
    array = <cnp.ndarray>counter
    if (cnp.PyArray_NDIM(array) != 0 or cnp.PyArray_TYPE(array) != cnp.NPY_INT64
            or not cnp.PyArray_ISBEHAVED(array)):
        return False
    return 0 <= counter_of(array)[0] < INT64_MAX


cdef cnp.npy_int64 *counter_of(object counter) noexcept:
    return <cnp.npy_int64 *>cnp.PyArray_BYTES(<cnp.ndarray>counter)


cdef bint is_plain_eps(object eps) noexcept:
    return PyFloat_CheckExact(eps) and PyFloat_AS_DOUBLE(eps) > 0.0


# The names of activations are interned strings, and so are those that programs write down.

cdef bint is_plain_activation(object activation, object slope, cnp.ndarray x) except -1:
    """Tell whether it is None or the name of an activation, with a slope that x can take."""
    cdef double greatest = DBL_MAX if cnp.PyArray_ITEMSIZE(x) == 8 else FLT_MAX
    if not PyFloat_CheckExact(slope) or not fabs(PyFloat_AS_DOUBLE(slope)) <= greatest:
        return False
    return (activation is None or activation is RELU_NAME or activation is RELU6_NAME
            or activation is LEAKY_RELU_NAME)


cdef bint is_plain_residual(object residual, cnp.ndarray x, object out) noexcept:
    """Tell whether it is None, or a plain array that is out, or apart from it."""
    if residual is None:
        return True
    return is_plain_beside(residual, x) and (
        out is None or is_same_or_apart(<cnp.ndarray>residual, <cnp.ndarray>out))


# ------------------------------------------------------------------ memory

cdef cnp.ndarray new_vector(Py_ssize_t channels, int type_num):
    """A new vector of one value per channel."""
    cdef cnp.npy_intp shape = channels
    return <cnp.ndarray>cnp.PyArray_SimpleNew(1, &shape, type_num)


cdef cnp.ndarray new_bits(Py_ssize_t count):
    """So many bits, zeros."""
    cdef cnp.npy_intp shape = bytes_of_bits(count)
    return <cnp.ndarray>cnp.PyArray_ZEROS(1, &shape, cnp.NPY_UINT8, 0)


cdef object doubles_of(cnp.ndarray vector):
    """A copy of weight or bias, or None."""
    cdef Vector values
    cdef cnp.ndarray copy
    if vector is None:
        return None
    copy, values = new_vector(cnp.PyArray_DIMS(vector)[0], cnp.NPY_FLOAT64), vector_of(vector, 0)
    values.kernels.load_as_double(values.data, values.stride, cnp.PyArray_DIMS(vector)[0],
                                  <double *>cnp.PyArray_BYTES(copy))
    return copy


cdef double *new_doubles(Py_ssize_t count) except NULL:
    cdef double *doubles = <double *>malloc(count * sizeof(double))
    if doubles == NULL:
        raise MemoryError("no memory for sums of the channels")
    return doubles


cdef Vector vector_of_doubles(const double *values) noexcept nogil:
    """A vector of one double per channel."""
    cdef Vector vector = constant(0.0)
    vector.data, vector.stride = <const char *>values, sizeof(double)
    vector.kernels = isa_in_use.float64
    return vector


# ------------------------------------------------------------------ forwards

def try_evaluate(x, out, running_mean, running_var, weight, bias, eps, activation, slope,
                 residual, tuple ranks, num_features, /):
    """Normalize by running statistics; None if the call is not plain."""
    cdef cnp.ndarray array, target
    cdef Job job
    if not is_plain_input(x, ranks, num_features):
        return None
    array = <cnp.ndarray>x
    if (running_mean is None or running_var is None or not is_plain_eps(eps)
            or not is_plain_output(out, array, array)
            or not is_plain_vector(running_mean, array, out)
            or not is_plain_vector(running_var, array, out)
            or not is_plain_vector(weight, array, out)
            or not is_plain_vector(bias, array, out)
            or not is_plain_activation(activation, slope, array)
            or not is_plain_residual(residual, array, out)):
        return None
    target = result_like(array, out)
    init_job_on(&job, array, None, 0)
    job.mean, job.var = vector_of(running_mean, 0), vector_of(running_var, 1)
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = PyFloat_AS_DOUBLE(eps)
    apply_normalize(&job, cnp.PyArray_BYTES(target))
    set_epilogue(&job, activation_of(activation, PyFloat_AS_DOUBLE(slope)), residual, None)
    execute(&job)
    return target


def try_train(x, out, running_mean, running_var, weight, bias, momentum, eps, unbiased,
              activation, slope, residual, /):
    """Normalize by the batch and move the running statistics; None if the call is not plain.

    Returns y, mean and invstd.
    """
    cdef SavedForBackward saved
    cdef cnp.ndarray y
    if not is_plain_input(x, None, None):
        return None
    saved = SavedForBackward.__new__(SavedForBackward)
    y = train(<cnp.ndarray>x, out, running_mean, running_var, None, weight, bias, momentum, eps,
              unbiased, activation, slope, residual, saved, False)
    return None if y is None else (y, saved.mean, saved.invstd)


def try_layer_train(x, out, running_mean, running_var, counter, weight, bias, momentum, eps,
                    unbiased, activation, slope, residual, tuple ranks, num_features, /):
    """Normalize by the batch and move the running statistics; None if the call is not plain.

    Returns y and what the backward needs. A forward in place is plain if its backward can recover
    all channels, or none: then it keeps a copy of x.
    """
    cdef SavedForBackward saved
    cdef cnp.ndarray y
    if not is_plain_input(x, ranks, num_features):
        return None
    saved = SavedForBackward.__new__(SavedForBackward)
    y = train(<cnp.ndarray>x, out, running_mean, running_var, counter, weight, bias, momentum, eps,
              unbiased, activation, slope, residual, saved, True)
    if y is None:
        return None
    saved.sample()
    return y, saved


cdef cnp.ndarray train(cnp.ndarray array, object out, object running_mean, object running_var,
                       object counter, object weight, object bias, object momentum, object eps,
                       object unbiased, object activation, object slope, object residual,
                       SavedForBackward saved, bint is_layer):
    """The forward of a plain input in training; None if anything else is not plain."""
    cdef Activation follows
    cdef cnp.ndarray target
    cdef Py_ssize_t channels
    cdef double count, factor = 0.0
    cdef double *m2
    if ((running_mean is None) != (running_var is None) or not is_plain_eps(eps)
            or not (momentum is None or PyFloat_CheckExact(momentum))
            or not (unbiased is True or unbiased is False)
            or not is_plain_counter(counter)
            or not is_plain_output(out, array, array)
            or not is_plain_target(running_mean, array, out)
            or not is_plain_target(running_var, array, out)
            or (running_mean is not None
                and not is_apart(<cnp.ndarray>running_mean, <cnp.ndarray>running_var))
            or not is_plain_vector(weight, array, out)
            or not is_plain_vector(bias, array, out)
            or not is_plain_activation(activation, slope, array)
            or not is_plain_residual(residual, array, out)):
        return None
    channels = cnp.PyArray_DIMS(array)[1]
    follows = activation_of(activation, PyFloat_AS_DOUBLE(slope))
    count = <double>(cnp.PyArray_SIZE(array) // channels)
    saved.in_place = out is not None and is_same(<cnp.ndarray>out, array)
    if count < 2.0:
        return None
    if saved.in_place and is_layer:
        if residual is not None or not is_invertible(&follows, array):
            saved.kept = new_like(array, None)
        elif not all_recoverable(array, weight, bias, &follows, count):
            return None
    if momentum is not None:
        factor = PyFloat_AS_DOUBLE(momentum)
    elif counter is not None:
        factor = 1.0 / <double>(counter_of(counter)[0] + 1)
    target = result_like(array, out)
    saved.save(target if saved.in_place else array)
    saved.mean = new_vector(channels, cnp.NPY_FLOAT64)
    saved.invstd = new_vector(channels, cnp.NPY_FLOAT64)
    if is_layer:  # now: running statistics may share memory with them
        saved.weight = doubles_of(weight)
    if is_layer and (saved.in_place or follows.kind != LINEAR):
        saved.bias = doubles_of(bias)
    if is_layer:
        saved.activation, saved.negative_slope = activation, follows.slope
        saved.has_residual = residual is not None
        if saved.has_residual and follows.kind != LINEAR:
            saved.alive = new_bits(cnp.PyArray_SIZE(array))
    m2 = new_doubles(channels)
    try:
        normalize_batch(array, weight, bias, PyFloat_AS_DOUBLE(eps), target, follows, residual,
                        saved, m2)
        if running_mean is not None:  # not before: they may share memory with weight and bias
            move_to_batch(running_mean, <const double *>cnp.PyArray_BYTES(saved.mean), 1.0,
                          factor)
            move_to_batch(running_var, m2, count - 1.0 if unbiased is True else count, factor)
        if counter is not None:
            counter_of(counter)[0] += 1
    finally:
        free(m2)
    return target


cdef bint is_invertible(const Activation *activation, cnp.ndarray x) noexcept:
    """Tell whether an activation's result, in x's arithmetic, tells what was before it."""
    cdef double least = DBL_MIN if cnp.PyArray_ITEMSIZE(x) == 8 else FLT_MIN
    if activation.kind != LEAKY_RELU:
        return activation.kind == LINEAR
    return least <= activation.slope <= 1.0 / least


cdef bint all_recoverable(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias,
                          const Activation *activation, double count) noexcept:
    """Tell whether the output of a forward in place determines all channels."""
    cdef Limits limits = limits_of(cnp.PyArray_ITEMSIZE(x), cnp.PyArray_TYPE(x))
    cdef Vector weights = vector_of(weight, 1), biases = vector_of(bias, 0)
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[1]
    cdef double slope = 1.0 if activation.kind == LINEAR else activation.slope
    if weight is None and activation.kind == LINEAR:
        return True
    return next_unrecoverable(&limits, count, slope, &weights, &biases, 0, channels) == channels


cdef int normalize_batch(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, double eps,
                         cnp.ndarray out, Activation activation, cnp.ndarray residual,
                         SavedForBackward saved, double *m2) except -1:
    cdef Job job
    init_job_on(&job, x, None, 0)
    reduce_to_moments(&job, output_vector(saved.mean, &job.mean), m2,
                      output_vector(saved.invstd, &job.invstd))
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = eps
    sum_in_float32(&job)
    apply_normalize(&job, cnp.PyArray_BYTES(out))
    set_epilogue(&job, activation, residual, saved.alive)
    if saved.kept is not None:
        job.kept = cnp.PyArray_BYTES(saved.kept)
    return execute(&job)


cdef void move_to_batch(cnp.ndarray running, const double *batch, double divisor,
                        double factor) noexcept:
    """Move running statistics towards those of a batch."""
    cdef Vector moved = vector_of(running, 0), target = vector_of_doubles(batch)
    move_once(&moved, &target, 0, cnp.PyArray_DIMS(running)[0], divisor, factor)


# ------------------------------------------------------------------ backwards

def try_backward(dy, x, weight, mean, invstd, out, bias, activation, slope, /):
    """The gradients of `batch_norm_forward`; None if the call is not plain."""
    cdef cnp.ndarray array, target, dweight, dbias
    cdef Vector weights, means, invstds
    cdef GateOfJob gate
    cdef Py_ssize_t channels
    if not is_plain_input(x, None, None):
        return None
    array = <cnp.ndarray>x
    if (mean is None or invstd is None or not is_plain_beside(dy, array)
            or not is_plain_output(out, array, <cnp.ndarray>dy)
            or not is_plain_vector(weight, array, out)
            or not is_plain_vector(mean, array, out)
            or not is_plain_vector(invstd, array, out)
            or not is_plain_activation(activation, slope, array)
            or (activation is not None and not is_plain_vector(bias, array, out))):
        return None
    channels = cnp.PyArray_DIMS(array)[1]
    target = result_like(array, out)
    dweight = new_vector(channels, cnp.NPY_FLOAT64)
    dbias = new_vector(channels, cnp.NPY_FLOAT64)
    weights, means, invstds = vector_of(weight, 1), vector_of(mean, 0), vector_of(invstd, 1)
    gate = gate_with(activation_of(activation, PyFloat_AS_DOUBLE(slope)), None, None, None)
    if activation is not None:
        gate.weight, gate.bias = weights, vector_of(bias, 0)
    differentiate(<cnp.ndarray>dy, array, &weights, &means, &invstds, &gate, target,
                  <double *>cnp.PyArray_BYTES(dbias), <double *>cnp.PyArray_BYTES(dweight))
    return target, dweight, dbias


def try_layer_backward(dy, SavedForBackward saved not None, weight, bias, weight_grad, bias_grad,
                       out, residual_out, /):
    """The gradients of a layer's input and residual, and the sums of those of weight and bias.

    None if it is not plain, or where a residual_out is without a residual.
    """
    cdef cnp.ndarray array, target, derived = None
    cdef Py_ssize_t channels
    cdef double *doubles
    if (saved.frozen or saved.kept_channels is not None or saved.mask is not None
            or saved.batch_size != 0
            or (residual_out is not None and not saved.has_residual)
            or not is_plain_input(saved.x, None, None) or not saved.has_its_shape()):
        return None
    array = <cnp.ndarray>saved.x
    if (not is_plain_beside(dy, array)
            or not is_plain_output(out, array, <cnp.ndarray>dy)
            or not is_plain_vector(weight, array, out)
            or not is_plain_vector(bias, array, out)
            or not is_plain_gradient(weight_grad, weight, array, out)
            or not is_plain_gradient(bias_grad, bias, array, out)
            or not is_plain_residual_out(residual_out, array, dy, out)
            or not is_plain_vector(weight, array, residual_out)
            or not is_plain_vector(bias, array, residual_out)
            or not is_plain_gradient(weight_grad, weight, array, residual_out)
            or not is_plain_gradient(bias_grad, bias, array, residual_out)
            or not (saved.kept is not None or saved.is_unchanged())):
        return None
    channels = cnp.PyArray_DIMS(array)[1]
    target = result_like(array, out)
    if saved.has_residual:
        derived = result_like(array, residual_out)
    of_weight = new_gradient(weight_grad, weight)
    of_bias = new_gradient(bias_grad, bias)
    doubles = new_doubles(5 * channels)  # two sums, three vectors
    try:
        layer_backward(<cnp.ndarray>dy, saved, target, derived, doubles)
        add_gradient(of_weight, doubles + channels, weight_grad is None)
        add_gradient(of_bias, doubles, bias_grad is None)
    finally:
        free(doubles)
    return target, derived, of_weight, of_bias


cdef int layer_backward(cnp.ndarray dy, SavedForBackward saved, cnp.ndarray out,
                        cnp.ndarray derived, double *doubles) except -1:
    """The gradient of the input, and the two sums in the first of five doubles per channel.

    The gradient of the residual, if there was one, is written to `derived`.
    """
    cdef cnp.ndarray x = saved.x if saved.kept is None else saved.kept
    cdef Vector weights = vector_of(saved.weight, 1), biases = vector_of(saved.bias, 0)
    cdef Vector means = vector_of(saved.mean, 0), invstds = vector_of(saved.invstd, 1)
    cdef GateOfJob gate
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[1]
    gate = gate_with(activation_of(saved.activation, saved.negative_slope), None, None, None)
    gate.weight, gate.bias = weights, biases
    if saved.in_place and saved.kept is None:
        if gate.activation.kind == LEAKY_RELU:
            gate.activation.kind = LEAKY_RELU_INVERTED
        recovered_operands(channels, &invstds, &weights, &biases, doubles + 2 * channels)
        means = vector_of_doubles(doubles + 2 * channels)
        invstds = vector_of_doubles(doubles + 3 * channels)
        weights = vector_of_doubles(doubles + 4 * channels)
    if derived is not None:  # without an activation the residual gets dy
        gate = gate_with(gate.activation, dy, dy if saved.alive is None else None, saved.alive)
        dy = derived
    return differentiate(dy, x, &weights, &means, &invstds, &gate, out, doubles,
                         doubles + channels)


cdef void recovered_operands(Py_ssize_t channels, const Vector *invstd, const Vector *weight,
                             const Vector *bias, double *to) noexcept nogil:
    """What takes the place of mean, invstd and weight where x is the output.

    xhat = (y - bias) / weight: the output, normalized by bias and 1 / weight.
    """
    cdef double *means = to
    cdef double *invstds = to + channels
    cdef double *weights = to + 2 * channels
    cdef Block block
    cdef Py_ssize_t c, i
    for i in range(ceil_div(channels, COLUMNS)):
        block = some_channels(i, channels)
        read_vector(bias, &block, means + block.c0)
        read_vector(weight, &block, weights + block.c0)
        read_vector(invstd, &block, invstds + block.c0)
    for c in range(channels):
        invstds[c], weights[c] = 1.0 / weights[c], invstds[c] * weights[c] * weights[c]


cdef int differentiate(cnp.ndarray dy, cnp.ndarray x, const Vector *weight, const Vector *mean,
                       const Vector *invstd, const GateOfJob *gate, cnp.ndarray out,
                       double *sum_dy, double *sum_dy_xhat) except -1:
    cdef Job job
    init_job_on(&job, x, None, 0)
    job.dy = cnp.PyArray_BYTES(dy)
    job.mean, job.invstd, job.weight = mean[0], invstd[0], weight[0]
    reduce_to_products(&job, sum_dy, sum_dy_xhat)
    job.sum_dy, job.sum_dy_xhat = vector_of_doubles(sum_dy), vector_of_doubles(sum_dy_xhat)
    sum_in_float32(&job)
    apply_gradient(&job, cnp.PyArray_BYTES(out))
    pass_gate(&job, gate)
    return execute(&job)


cdef object new_gradient(object gradient, object parameter):
    """The sum of gradients that is there, or a new one of the parameter's dtype."""
    if gradient is not None or parameter is None:
        return gradient
    return new_vector(cnp.PyArray_DIMS(<cnp.ndarray>parameter)[0],
                      cnp.PyArray_TYPE(<cnp.ndarray>parameter))


cdef void add_gradient(cnp.ndarray gradient, const double *added, bint is_new) noexcept:
    """Add to a sum of gradients, or begin it."""
    cdef Vector total
    cdef double sums[COLUMNS]
    cdef Block block
    cdef Py_ssize_t c, i, channels
    if gradient is None:
        return
    total, channels = vector_of(gradient, 0), cnp.PyArray_DIMS(gradient)[0]
    for i in range(ceil_div(channels, COLUMNS)):
        block = some_channels(i, channels)
        if is_new:
            memcpy(sums, added + block.c0, (block.c1 - block.c0) * sizeof(double))
        else:
            read_vector(&total, &block, sums)
            for c in range(block.c1 - block.c0):
                sums[c] += added[block.c0 + c]
        total.kernels.store_from_double(sums, total.stride, block.c1 - block.c0,
                                        <char *>start_of_vector(&total, &block))
