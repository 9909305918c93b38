# NumPy arrays as the core takes them: layouts, and pointers into a job.

cnp.import_array()


cdef enum:
    # What `layout` returns.
    UNFIT = 0
    C_CONTIGUOUS = 1
    CHANNELS_LAST = 2


cdef int layout_of(cnp.ndarray array) noexcept:
    if not cnp.PyArray_CHKFLAGS(array, cnp.NPY_ARRAY_ALIGNED) or cnp.PyArray_ISBYTESWAPPED(array):
        return UNFIT
    if cnp.PyArray_CHKFLAGS(array, cnp.NPY_ARRAY_C_CONTIGUOUS):
        return C_CONTIGUOUS
    return CHANNELS_LAST if is_channels_last(array) else UNFIT


cdef bint is_channels_last(cnp.ndarray array) noexcept:
    """Tell whether the array is C-contiguous as (n, ..., c)."""
    cdef const cnp.npy_intp *shape = cnp.PyArray_DIMS(array)
    cdef const cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    cdef Py_ssize_t expected = cnp.PyArray_ITEMSIZE(array)
    cdef int i, axis, ndim = cnp.PyArray_NDIM(array)
    for i in range(ndim):
        # The channels, then the axes behind them from the last one, then the samples.
        axis = 1 if i == 0 else (0 if i == ndim - 1 else ndim - i)
        if shape[axis] > 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def layout(cnp.ndarray array not None):
    """Tell how the core sees an array of shape (n, c, ...).

    1 if it is C-contiguous, 2 if it is so with the channels last; 0 if neither, unaligned or
    byte-swapped: then the core cannot take it.
    """
    return layout_of(array)


cdef const Kernels *kernels_of(Py_ssize_t itemsize, int type_num) noexcept nogil:
    """The kernels of a dtype. The 2-byte float that is not NumPy's is ml_dtypes' bfloat16."""
    if itemsize == 8:
        return isa_in_use.float64
    if itemsize == 4:
        return isa_in_use.float32
    return isa_in_use.float16 if type_num == cnp.NPY_FLOAT16 else isa_in_use.bfloat16


cdef const Kernels *kernels_of_array(cnp.ndarray array) noexcept:
    return kernels_of(cnp.PyArray_ITEMSIZE(array), cnp.PyArray_TYPE(array))


cdef Statistics statistics_in(cnp.ndarray mean, cnp.ndarray m2, cnp.ndarray invstd) noexcept:
    """New float64 arrays of one value per channel, or per batch and channel."""
    cdef Statistics found
    found.mean, found.m2 = <double *>cnp.PyArray_BYTES(mean), <double *>cnp.PyArray_BYTES(m2)
    found.invstd = <double *>cnp.PyArray_BYTES(invstd)
    return found


cdef void init_job_on(Job *job, cnp.ndarray x, cnp.ndarray mask, Py_ssize_t batch_size) noexcept:
    """Make a job on x that has no steps yet. Its layout must not be 0."""
    cdef const cnp.npy_intp *shape = cnp.PyArray_DIMS(x)
    cdef Py_ssize_t s = 1
    cdef int axis
    for axis in range(2, cnp.PyArray_NDIM(x)):
        s *= shape[axis]
    init_job(job, cnp.PyArray_BYTES(x), shape[0], shape[1], s, cnp.PyArray_ITEMSIZE(x),
             cnp.PyArray_TYPE(x), not cnp.PyArray_CHKFLAGS(x, cnp.NPY_ARRAY_C_CONTIGUOUS),
             batch_size)
    if mask is not None:
        job.mask = <const unsigned char *>cnp.PyArray_BYTES(mask)


cdef Py_ssize_t batches_of(cnp.ndarray x, Py_ssize_t batch_size) noexcept:
    """The batches of so many samples, of which the last may have fewer; 0 stands for all."""
    cdef Py_ssize_t samples = cnp.PyArray_DIMS(x)[0]
    return 1 if batch_size == 0 or batch_size >= samples else ceil_div(samples, batch_size)
