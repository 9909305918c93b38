# The backwards of the quick path.

def try_backward(dy, x, weight, mean, invstd, out, bias, activation, slope,
                 cnp.ndarray alive=None, residual_out=None, bint frozen=False, /):
    """The gradients of `batch_norm_forward`; None if the call is not plain.

    Bits tell the derivatives, if there are any: then what passes is written to residual_out, or
    first to the memory of the result. In a frozen one, mean and invstd are constants, and an
    activation has bits.
    """
    cdef cnp.ndarray array, target, dweight, dbias
    cdef Vector weights, means, invstds
    cdef GateOfJob gate
    cdef Job job
    cdef double *scale
    cdef double *sum_dy
    cdef double *sum_dy_xhat
    cdef Py_ssize_t channels
    if not is_plain_backward(dy, x, weight, mean, invstd, out, activation, slope, alive,
                             residual_out):
        return None
    array = <cnp.ndarray>x
    if activation is not None and (
            not is_plain_vector(bias, array, out) or frozen and alive is None):
        return None
    channels = cnp.PyArray_DIMS(array)[1]
    target = result_like(array, out)
    dweight = new_vector(channels, cnp.NPY_FLOAT64)
    dbias = new_vector(channels, cnp.NPY_FLOAT64)
    weights, means, invstds = vector_of(weight, 1), vector_of(mean, 0), vector_of(invstd, 1)
    gate = gate_with(activation_of(activation, PyFloat_AS_DOUBLE(slope)), None, None, None)
    if alive is not None:
        gate = gate_with(gate.activation, <cnp.ndarray>dy, None, alive)
        dy = target if residual_out is None else residual_out
    elif activation is not None:
        gate.weight, gate.bias = weights, vector_of(bias, 0)
    sum_dy = <double *>cnp.PyArray_BYTES(dbias)
    sum_dy_xhat = <double *>cnp.PyArray_BYTES(dweight)
    if not frozen:
        init_job_on(&job, array, None, 0)
        differentiate(&job, <cnp.ndarray>dy, &weights, &means, &invstds, &gate, target, channels,
                      sum_dy, sum_dy_xhat)
        return target, dweight, dbias
    scale = new_doubles(2 * channels)
    try:
        differentiate_frozen(dy, array, &weights, &invstds, &means, &invstds, &gate, target, NULL,
                             sum_dy, sum_dy_xhat, scale)
    finally:
        free(scale)
    return target, dweight, dbias


cdef bint is_plain_backward(object dy, object x, object weight, object mean, object invstd,
                            object out, object activation, object slope, object alive,
                            object residual_out) except -1:
    """Tell whether what every backward of a function takes is plain.

    What passes by bits must not be written over x, which is read after it; without bits, nothing is
    written to a residual_out.
    """
    cdef cnp.ndarray array
    if not is_plain_input(x, None, None):
        return False
    array = <cnp.ndarray>x
    return (mean is not None and invstd is not None and is_plain_beside(dy, array)
            and is_plain_output(out, array, <cnp.ndarray>dy)
            and is_plain_vector(weight, array, out)
            and is_plain_vector(mean, array, out)
            and is_plain_vector(invstd, array, out)
            and is_plain_activation(activation, slope, array)
            and is_plain_residual_out(residual_out, array, <cnp.ndarray>dy, out)
            and (residual_out is None if alive is None
                 else residual_out is not None or not is_in_place(array, out)))


def try_layer_backward(dy, SavedForBackward saved not None, weight, bias, running_mean, running_var,
                       weight_grad, bias_grad, out, residual_out, /):
    """The gradients of a layer's input and residual, and the sums of those of weight and bias.

    None if it is not plain, or where a residual_out is without a residual.
    """
    cdef cnp.ndarray array, target, derived = None
    cdef Py_ssize_t channels, batches
    cdef GradientSums gradients
    cdef Vector weights
    cdef double *doubles
    if (saved.kept_channels is not None or saved.mask is not None
            or (residual_out is not None and not saved.has_residual)
            or not is_plain_input(saved.x, None, None) or not saved.has_its_shape()):
        return None
    array = <cnp.ndarray>saved.x
    if (not is_plain_beside(dy, array)
            or not is_plain_output(out, array, <cnp.ndarray>dy)
            or not is_plain_vector(weight, array, out)
            or not is_plain_vector(bias, array, out)
            or not is_plain_residual_out(residual_out, array, dy, out)
            or not is_plain_vector(weight, array, residual_out)
            or not is_plain_vector(bias, array, residual_out)
            or not is_plain_gradient(weight_grad, weight, array, dy,
                                     (out, residual_out, weight, bias, running_mean, running_var))
            or not is_plain_gradient(bias_grad, bias, array, dy,
                                     (out, residual_out, weight, bias, running_mean, running_var,
                                      weight_grad))
            or not (saved.kept is not None or saved.is_unchanged())):
        return None
    weights, channels = saved.weights(), cnp.PyArray_DIMS(array)[1]
    batches = batches_of(array, 1 if saved.num_groups > 0 else saved.batch_size)
    # NumPy adds many batches of one channel in another order. In a frozen layer without a residual,
    # what passes the activation is written to the memory of dx before x is read.
    if (batches > 1 and channels == 1
            or saved.frozen and saved.alive is not None and not saved.has_residual
            and saved.kept is None and is_in_place(array, out)
            or saved.num_groups > 0 and not has_group_gates(array, &weights)):
        return None
    target = result_like(array, out)
    if saved.has_residual:
        derived = result_like(array, residual_out)
    of_weight = new_gradient(weight_grad, weight)
    of_bias = new_gradient(bias_grad, bias)
    gradients.weight, gradients.weight_is_new = vector_of(of_weight, 0), weight_grad is None
    gradients.bias, gradients.bias_is_new = vector_of(of_bias, 0), bias_grad is None
    doubles = new_doubles(VECTORS_OF_BACKWARD * batches * channels)
    try:
        layer_backward(<cnp.ndarray>dy, saved, target, derived, &gradients, batches, doubles)
    finally:
        free(doubles)
    return target, derived, of_weight, of_bias


cdef enum:
    # Of one double per batch and channel, which a backward needs: first the sums of dy and of
    # dy * xhat, then those that groups need in their place, what takes the place of mean, invstd
    # and weight after a forward in place, and weight and bias for each batch.
    VECTORS_OF_BACKWARD = 9


cdef int layer_backward(cnp.ndarray dy, SavedForBackward saved, cnp.ndarray out,
                        cnp.ndarray derived, const GradientSums *gradients, Py_ssize_t batches,
                        double *doubles) except -1:
    """The gradient of the input, and the sums of those of weight and bias over all batches.

    The gradient of the residual, if there was one, is written to `derived`.
    """
    cdef cnp.ndarray x = saved.x if saved.kept is None else saved.kept
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[1], size = batches * channels
    cdef Vector weights = saved.weights(), biases = saved.biases()
    cdef Vector means = saved.means(), invstds = saved.invstds()
    cdef Vector sums[4]
    cdef Vector of_groups, of_forward
    cdef GateOfJob gate
    cdef GroupNormJob norm
    cdef Job job
    cdef int i
    # Other jobs read one value per channel for all batches.
    if batches > 1 and (saved.in_place and saved.kept is None
                        or saved.batch_size == 1 and is_flat(x)):
        weights = repeated(&weights, channels, batches, doubles + 7 * size)
        biases = repeated(&biases, channels, batches, doubles + 8 * size)
    of_groups = weights
    gate = gate_with(activation_of(saved.activation, saved.negative_slope), None, None, None)
    gate.weight, gate.bias = weights, biases
    if saved.in_place and saved.kept is None:
        if gate.activation.kind == LEAKY_RELU:
            gate.activation.kind = LEAKY_RELU_INVERTED
        recovered_operands(size, &invstds, &weights, &biases, doubles + 4 * size)
        means = vector_of_batches(doubles + 4 * size, channels)
        invstds = vector_of_batches(doubles + 5 * size, channels)
        weights = vector_of_batches(doubles + 6 * size, channels)
    if derived is not None or saved.alive is not None:  # without an activation the residual gets dy
        gate = gate_with(gate.activation, dy, dy if saved.alive is None else None, saved.alive)
        dy = out if derived is None else derived
    if saved.frozen:
        weights, of_forward = saved.weights(), saved.invstds()
        return differentiate_frozen(dy, x, &weights, &of_forward, &means, &invstds, &gate, out,
                                    gradients, doubles, doubles + size, doubles + 2 * size)
    if saved.num_groups > 0:
        for i in range(4):
            sums[i] = vector_of_batches(doubles + i * size, channels)
        init_group_backward(&norm, dy, x, None, saved.num_groups, &of_groups, &weights, &means,
                            &invstds, out, sums)
        pass_gate(&norm.job, &gate)
        execute(&norm.job)
    else:
        init_job_of_batches(&job, x, saved.batch_size, saved.batch_size == 1)
        job.gradients = gradients if saved.batch_size == 0 else NULL
        differentiate(&job, dy, &weights, &means, &invstds, &gate, out, channels, doubles,
                      doubles + size)
    if saved.num_groups > 0 or saved.batch_size > 0:
        add_batches(doubles, channels, batches)
        add_batches(doubles + size, channels, batches)
        add_all_gradients(gradients, channels, doubles + size, doubles)
    return 0


cdef void recovered_operands(Py_ssize_t channels, const Vector *invstd, const Vector *weight,
                             const Vector *bias, double *to) noexcept nogil:
    """What takes the place of mean, invstd and weight where x is the output.

    xhat = (y - bias) / weight: the output, normalized by bias and 1 / weight.
    """
    cdef double *means = to
    cdef double *invstds = to + channels
    cdef double *weights = to + 2 * channels
    cdef Py_ssize_t c
    read_all(bias, channels, means)
    read_all(weight, channels, weights)
    read_all(invstd, channels, invstds)
    for c in range(channels):
        invstds[c], weights[c] = 1.0 / weights[c], invstds[c] * weights[c] * weights[c]


cdef int differentiate(Job *job, cnp.ndarray dy, const Vector *weight, const Vector *mean,
                       const Vector *invstd, const GateOfJob *gate, cnp.ndarray out,
                       Py_ssize_t channels, double *sum_dy, double *sum_dy_xhat) except -1:
    """Execute a job on x, which has no steps yet; the sums are of (batches, channels)."""
    job.dy = cnp.PyArray_BYTES(dy)
    job.mean, job.invstd, job.weight = mean[0], invstd[0], weight[0]
    reduce_to_products(job, sum_dy, sum_dy_xhat)
    job.sum_dy = vector_of_batches(sum_dy, channels)
    job.sum_dy_xhat = vector_of_batches(sum_dy_xhat, channels)
    sum_in_float32(job)
    apply_gradient(job, cnp.PyArray_BYTES(out))
    pass_gate(job, gate)
    return execute(job)


cdef int differentiate_frozen(cnp.ndarray dy, cnp.ndarray x, const Vector *weights,
                              const Vector *invstds, const Vector *mean, const Vector *invstd,
                              const GateOfJob *gate, cnp.ndarray out,
                              const GradientSums *gradients, double *sum_dy, double *sum_dy_xhat,
                              double *scale) except -1:
    """The gradient of x where the statistics are constants, and the sums of the parameters'.

    The first two vectors are those of the forward; `scale` is memory for two more.
    """
    cdef Job job
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[1]
    cdef double *weight = scale + channels
    read_all(invstds, channels, scale)
    read_all(weights, channels, weight)
    isa_in_use.common.multiply(weight, channels, scale)
    init_job_on(&job, x, None, 0)
    job.dy = cnp.PyArray_BYTES(dy)
    job.mean, job.invstd, job.weight = mean[0], invstd[0], vector_of_doubles(scale)
    reduce_to_products(&job, sum_dy, sum_dy_xhat)
    job.gradients = gradients
    pass_gate(&job, gate)
    if job.raw_dy != NULL or not job.cut.column_layout:
        apply_scale(&job, cnp.PyArray_BYTES(out))
        return execute(&job)
    # By themselves, results have longer stretches than columns that are summed before.
    execute(&job)
    init_job_on(&job, dy, None, 0)
    job.mean, job.invstd = constant(0.0), vector_of_doubles(scale)
    apply_normalize(&job, cnp.PyArray_BYTES(out))
    return execute(&job)


cdef void add_batches(double *values, Py_ssize_t channels, Py_ssize_t batches) noexcept nogil:
    """Replace the values of the first batch by the sums over all batches, as NumPy adds them."""
    cdef Py_ssize_t b, c
    for c in range(channels):
        values[c] += 0.0  # -0 becomes 0
    for b in range(1, batches):
        for c in range(channels):
            values[c] += values[b * channels + c]


cdef object new_gradient(object gradient, object parameter):
    """The sum of gradients that is there, or a new one of the parameter's dtype."""
    if gradient is not None or parameter is None:
        return gradient
    return new_vector(cnp.PyArray_DIMS(<cnp.ndarray>parameter)[0],
                      cnp.PyArray_TYPE(<cnp.ndarray>parameter))
