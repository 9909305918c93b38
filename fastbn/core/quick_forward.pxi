# The forwards of the quick path.

def try_evaluate(x, out, running_mean, running_var, weight, bias, eps, activation, slope,
                 residual, tuple ranks, num_features, cnp.ndarray alive=None, /):
    """Normalize by running statistics; None if the call is not plain."""
    if (not is_plain_input(x, ranks, num_features)
            or not is_plain_forward(x, out, weight, bias, eps, activation, slope, residual)
            or not are_plain_statistics(running_mean, running_var, x, out)):
        return None
    return by_running(x, out, running_mean, running_var, weight, bias, eps,
                      activation_of(activation, PyFloat_AS_DOUBLE(slope)), residual, alive, None)


def try_layer_frozen(x, out, running_mean, running_var, weight, bias, eps, activation, slope,
                     residual, tuple ranks, num_features, /):
    """Normalize by running statistics, which are constants; None if the call is not plain.

    Returns y and what the backward needs. See `try_layer_train` about forwards in place.
    """
    cdef SavedForBackward saved
    cdef cnp.ndarray y
    if (not is_plain_input(x, ranks, num_features)
            or not is_plain_forward(x, out, weight, bias, eps, activation, slope, residual)
            or not are_plain_statistics(running_mean, running_var, x, out)):
        return None
    follows = activation_of(activation, PyFloat_AS_DOUBLE(slope))
    saved = SavedForBackward.__new__(SavedForBackward)
    saved.frozen, saved.in_place = True, is_in_place(x, out)
    # The output does not determine x behind an activation or a residual. Nor does it in 16 bits,
    # which do not hold every normalized value: running statistics set these no bound.
    if saved.in_place and (follows.kind != LINEAR or residual is not None
                           or cnp.PyArray_ITEMSIZE(<cnp.ndarray>x) == 2):
        saved.kept = new_like(x, None)
    saved.allocate(1, cnp.PyArray_DIMS(x)[1])
    save_options(saved, x, weight, bias, activation, &follows, residual)
    if saved.in_place and saved.kept is None and not all_recoverable(
            x, saved, &follows, values_per_channel(x)):
        return None
    means, variances = vector_of(running_mean, 0), vector_of(running_var, 0)
    read_all(&means, saved.channels, saved.mean_memory())
    read_all(&variances, saved.channels, saved.invstd_memory())
    isa_in_use.common.invstd(saved.invstd_memory(), 1.0, PyFloat_AS_DOUBLE(eps), saved.channels,
                             saved.invstd_memory())
    y = by_running(x, out, running_mean, running_var, weight, bias, eps, follows, residual,
                   saved.alive, saved)
    save_array(saved, x, y)
    return y, saved


def try_train(x, out, running_mean, running_var, weight, bias, momentum, eps, unbiased,
              activation, slope, residual, cnp.ndarray alive=None, /):
    """Normalize by the batch and move the running statistics; None if the call is not plain.

    Returns y, mean and invstd.
    """
    cdef Statistics found
    cdef cnp.ndarray mean, invstd, y
    cdef Py_ssize_t channels
    if not is_plain_input(x, None, None) or not is_plain_forward(
            x, out, weight, bias, eps, activation, slope, residual):
        return None
    channels = cnp.PyArray_DIMS(x)[1]
    mean = new_vector(channels, cnp.NPY_FLOAT64)
    invstd = new_vector(channels, cnp.NPY_FLOAT64)
    found.mean = <double *>cnp.PyArray_BYTES(mean)
    found.invstd = <double *>cnp.PyArray_BYTES(invstd)
    found.m2 = new_doubles(channels)
    try:
        y = train(x, out, running_mean, running_var, None, weight, bias, momentum, eps, unbiased,
                  activation, slope, residual, alive, &found, None, False, False)
    finally:
        free(found.m2)
    return None if y is None else (y, mean, invstd)


def try_layer_train(x, out, running_mean, running_var, counter, weight, bias, momentum, eps,
                    unbiased, activation, slope, residual, tuple ranks, num_features,
                    batch_size, bint by_instance, bint keeps, /):
    """Normalize by the batch and move the running statistics; None if the call is not plain.

    Returns y and, if it keeps that, what the backward needs. A forward in place is plain if its
    backward can recover all channels, or none: then it keeps a copy of x. Instances are batches of
    one sample, without running statistics.
    """
    cdef Statistics found
    cdef SavedForBackward saved
    cdef cnp.ndarray y
    if not is_plain_input(x, ranks, num_features) or not is_plain_forward(
            x, out, weight, bias, eps, activation, slope, residual):
        return None
    if not is_plain_batch_size(batch_size):
        return None
    saved = SavedForBackward.__new__(SavedForBackward)
    saved.batch_size = 0 if batch_size is None else batch_size
    saved.allocate(batches_of(x, saved.batch_size), cnp.PyArray_DIMS(x)[1])
    found = statistics_of(saved)
    y = train(x, out, running_mean, running_var, counter, weight, bias, momentum, eps, unbiased,
              activation, slope, residual, None, &found, saved, by_instance, keeps)
    if y is None:
        return None
    if keeps:
        save_array(saved, x, y)
    return y, saved


def try_groups(x, out, num_groups, weight, bias, eps, activation, slope, residual, num_features,
               bint keeps, /):
    """Normalize groups of channels of each sample; None if the call is not plain.

    Returns y and, if it keeps that, what the backward needs.
    """
    cdef Statistics found
    cdef Vector weights
    cdef SavedForBackward saved
    cdef cnp.ndarray array, y
    cdef Py_ssize_t groups, channels
    if not is_plain_input(x, None, num_features) or not is_plain_forward(
            x, out, weight, bias, eps, activation, slope, residual):
        return None
    array = <cnp.ndarray>x
    channels = cnp.PyArray_DIMS(array)[1]
    if not PyLong_CheckExact(num_groups) or not 1 <= num_groups <= channels:
        return None
    groups = num_groups
    if channels % groups != 0 or cnp.PyArray_SIZE(array) == groups:
        return None
    follows = activation_of(activation, PyFloat_AS_DOUBLE(slope))
    saved = SavedForBackward.__new__(SavedForBackward)
    saved.num_groups = groups
    saved.allocate(cnp.PyArray_DIMS(array)[0], channels)
    if keeps:
        saved.in_place = is_in_place(x, out)
        weights = vector_of(weight, 1)
        save_options(saved, array, weight, bias, activation, &follows, residual)
        if saved.in_place and (
                follows.kind != LINEAR or residual is not None
                or not has_group_gates(array, &weights)
                or not all_recoverable(array, saved, &follows, values_per_group(array, groups))):
            saved.kept = new_like(array, None)
    y, found = result_like(array, out), statistics_of(saved)
    normalize_groups(array, None, groups, weight, bias, PyFloat_AS_DOUBLE(eps), y, &found, follows,
                     residual, saved.alive, saved)
    if keeps:
        save_array(saved, array, y)
    return y, saved


# ------------------------------------------------------------------ what is saved

cdef Statistics statistics_of(SavedForBackward saved) noexcept:
    """Where a forward writes those that are saved."""
    cdef Statistics found
    found.m2, found.mean = saved.m2_memory(), saved.mean_memory()
    found.invstd = saved.invstd_memory()
    return found


cdef bint is_in_place(cnp.ndarray x, object out) noexcept:
    return out is not None and is_same(<cnp.ndarray>out, x)


cdef Py_ssize_t values_per_channel(cnp.ndarray x) noexcept:
    return cnp.PyArray_SIZE(x) // cnp.PyArray_DIMS(x)[1]


cdef Py_ssize_t values_per_group(cnp.ndarray x, Py_ssize_t groups) noexcept:
    return cnp.PyArray_SIZE(x) // (cnp.PyArray_DIMS(x)[0] * groups)


cdef int save_options(SavedForBackward saved, cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias,
                      object activation, const Activation *follows, object residual) except -1:
    """Save the parameters and what follows the normalization, before the forward."""
    cdef Vector weights = vector_of(weight, 1), biases = vector_of(bias, 0)
    saved.has_weight = weight is not None
    if saved.has_weight:
        read_all(&weights, saved.channels, saved.weight_memory())
    saved.has_bias = bias is not None and (saved.in_place or follows.kind != LINEAR)
    if saved.has_bias:
        read_all(&biases, saved.channels, saved.bias_memory())
    saved.activation, saved.negative_slope = activation, follows.slope
    saved.has_residual = residual is not None
    if (saved.has_residual or saved.frozen) and follows.kind != LINEAR:
        saved.alive = new_bits(cnp.PyArray_SIZE(x))
    return 0


cdef void save_array(SavedForBackward saved, cnp.ndarray x, cnp.ndarray y) noexcept:
    """Save the input or the output, by reference, after the forward."""
    saved.save(y if saved.in_place else x)
    saved.probe()


cdef void save_in_pass(Job *job, cnp.ndarray out, SavedForBackward saved) noexcept:
    """Let the job write what its pass over memory can save: a copy of x, and probes of out."""
    if saved is None:
        return
    keep(job, saved.kept)
    if saved.in_place and reads_probes(job):
        job.probed, job.probe_bits = cnp.PyArray_SIZE(out), saved.bits
        saved.has_bits = True


cdef bint is_invertible(const Activation *activation, cnp.ndarray x) noexcept:
    """Tell whether an activation's result, in x's arithmetic, tells what was before it."""
    cdef double least = DBL_MIN if cnp.PyArray_ITEMSIZE(x) == 8 else FLT_MIN
    if activation.kind != LEAKY_RELU:
        return activation.kind == LINEAR
    return least <= activation.slope <= 1.0 / least


cdef bint all_recoverable(cnp.ndarray x, SavedForBackward saved, const Activation *activation,
                          Py_ssize_t count) noexcept:
    """Tell whether the output of a forward in place determines all channels."""
    cdef Recovery recovery = recovery_of(cnp.PyArray_ITEMSIZE(x), cnp.PyArray_TYPE(x),
                                         <double>count)
    cdef Vector weights = saved.weights(), biases = saved.biases()
    cdef double slope = 1.0 if activation.kind == LINEAR else activation.slope
    if not saved.has_weight and not saved.has_bias and activation.kind == LINEAR:
        return True
    return next_unrecoverable(&recovery, slope, &weights, &biases, 0,
                              saved.channels) == saved.channels


# ------------------------------------------------------------------ by running statistics

cdef cnp.ndarray by_running(cnp.ndarray x, object out, cnp.ndarray running_mean,
                            cnp.ndarray running_var, cnp.ndarray weight, cnp.ndarray bias,
                            object eps, Activation activation, cnp.ndarray residual,
                            cnp.ndarray alive, SavedForBackward saved):
    """A plain x, normalized by running statistics."""
    cdef Job job
    cdef cnp.ndarray target = result_like(x, out)
    init_job_on(&job, x, None, 0)
    job.mean, job.var = vector_of(running_mean, 0), vector_of(running_var, 1)
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = PyFloat_AS_DOUBLE(eps)
    apply_normalize(&job, cnp.PyArray_BYTES(target))
    set_epilogue(&job, activation, residual, alive)
    save_in_pass(&job, target, saved)
    execute(&job)
    return target


# ------------------------------------------------------------------ by the batch's own statistics

cdef cnp.ndarray train(cnp.ndarray x, object out, object running_mean, object running_var,
                       object counter, object weight, object bias, object momentum, object eps,
                       object unbiased, object activation, object slope, object residual,
                       cnp.ndarray alive, const Statistics *found, SavedForBackward saved,
                       bint by_instance, bint keeps):
    """The forward of a plain input in training; None if anything else is not plain.

    The statistics are written. The batch size is what is saved of it, if anything is saved, and the
    bits are those that are saved if what the backward needs is kept.
    """
    cdef Activation follows
    cdef Running running
    cdef cnp.ndarray target
    cdef Py_ssize_t samples = cnp.PyArray_DIMS(x)[0], channels = cnp.PyArray_DIMS(x)[1]
    cdef Py_ssize_t size = 0 if saved is None else saved.batch_size, batches, leftover, b
    cdef Py_ssize_t positions = values_per_channel(x) // samples
    if ((running_mean is None) != (running_var is None)
            or not (momentum is None or PyFloat_CheckExact(momentum))
            or not (unbiased is True or unbiased is False)
            or not is_plain_target(running_mean, x, out)
            or not is_plain_target(running_var, x, out)
            or (running_mean is not None
                and not (is_apart(<cnp.ndarray>running_mean, <cnp.ndarray>running_var)
                         and is_apart_from_inputs(running_mean, x, weight, bias, residual)
                         and is_apart_from_inputs(running_var, x, weight, bias, residual)))):
        return None
    batches, leftover = batches_of(x, size), 0 if size == 0 else samples % size
    if (not is_plain_counter(counter, batches)
            or positions * (samples if size == 0 else min(size, samples)) < 2
            or 0 < positions * leftover < 2):
        return None
    follows = activation_of(activation, PyFloat_AS_DOUBLE(slope))
    if keeps:
        saved.in_place = is_in_place(x, out)
        save_options(saved, x, weight, bias, activation, &follows, residual)
        alive = saved.alive
        if saved.in_place:
            if residual is not None or not is_invertible(&follows, x):
                saved.kept = new_like(x, None)
            elif not all_recoverable(x, saved, &follows, values_per_channel(x)):
                return None
    target = result_like(x, out)
    if running_mean is not None:
        running.mean, running.var = vector_of(running_mean, 0), vector_of(running_var, 0)
        aim_at_batch(&running, x, size, 0, momentum, counter, unbiased)
    normalize_batches(x, weight, bias, PyFloat_AS_DOUBLE(eps), target, follows, residual, alive,
                      found, saved, by_instance, NULL if running_mean is None else &running)
    if running_mean is not None and batches > 1:  # one batch after the other
        for b in range(batches):
            aim_at_batch(&running, x, size, b, momentum, counter, unbiased)
            move_all_channels(&running, channels, found.mean + b * channels,
                              found.m2 + b * channels)
    if counter is not None:
        counter_of(counter)[0] += batches
    return target


cdef int normalize_batches(cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, double eps,
                           cnp.ndarray out, Activation activation, cnp.ndarray residual,
                           cnp.ndarray alive, const Statistics *found, SavedForBackward saved,
                           bint by_instance, const Running *running) except -1:
    """Normalize batches of a plain x by their statistics, which are written.

    Running statistics move towards those of a single batch.
    """
    cdef Job job
    cdef double *memory = NULL
    cdef Py_ssize_t batch_size = 0 if saved is None else saved.batch_size
    cdef Py_ssize_t batches = batches_of(x, batch_size), channels = cnp.PyArray_DIMS(x)[1]
    cdef Vector weights = vector_of(weight, 1), biases = vector_of(bias, 0)
    if by_instance and is_flat(x):
        memory = new_doubles(2 * batches * channels)
        weights = repeated(&weights, channels, batches, memory)
        biases = repeated(&biases, channels, batches, memory + batches * channels)
    try:
        init_job_of_batches(&job, x, batch_size, by_instance)
        normalize_by(&job, found)
        job.weight, job.bias = weights, biases
        job.eps = eps
        job.running = running if batches == 1 else NULL
        sum_in_float32(&job)
        apply_normalize(&job, cnp.PyArray_BYTES(out))
        set_epilogue(&job, activation, residual, alive)
        save_in_pass(&job, out, saved)
        return execute(&job)
    finally:
        free(memory)


cdef bint is_flat(cnp.ndarray x) noexcept:
    """Tell whether x can be seen as one sample, each channel of which is one of a sample of x.

    The core walks many of them together where they are short.
    """
    return cnp.PyArray_CHKFLAGS(x, cnp.NPY_ARRAY_C_CONTIGUOUS)


cdef void init_job_of_batches(Job *job, cnp.ndarray x, Py_ssize_t batch_size,
                              bint by_instance) noexcept:
    """Make a job on batches of a plain x, or on its instances, that has no steps yet."""
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[0] * cnp.PyArray_DIMS(x)[1]
    if not by_instance or not is_flat(x):
        init_job_on(job, x, None, batch_size)
        return
    init_job(job, cnp.PyArray_BYTES(x), 1, channels, cnp.PyArray_SIZE(x) // channels,
             cnp.PyArray_ITEMSIZE(x), cnp.PyArray_TYPE(x), False, 0)


cdef bint is_apart_from_inputs(cnp.ndarray running, cnp.ndarray x, object weight, object bias,
                               object residual) noexcept:
    """Tell whether a vector can be moved before all of a forward's inputs have been read."""
    return (is_apart(running, x) and (weight is None or is_apart(running, <cnp.ndarray>weight))
            and (bias is None or is_apart(running, <cnp.ndarray>bias))
            and (residual is None or is_apart(running, <cnp.ndarray>residual)))


cdef void aim_at_batch(Running *running, cnp.ndarray x, Py_ssize_t batch_size, Py_ssize_t batch,
                       object momentum, object counter, bint unbiased) noexcept:
    """Let running statistics move towards those of a batch next."""
    cdef Py_ssize_t samples = cnp.PyArray_DIMS(x)[0], size = batch_size or samples
    cdef double count = <double>(
        min(size, samples - batch * size) * (values_per_channel(x) // samples))
    running.divisor, running.factor = count - 1.0 if unbiased else count, 0.0
    if momentum is not None:
        running.factor = PyFloat_AS_DOUBLE(momentum)
    elif counter is not None:
        running.factor = 1.0 / <double>(counter_of(counter)[0] + batch + 1)
