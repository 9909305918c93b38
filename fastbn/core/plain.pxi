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
    if ranks is None and num_features is None:
        return True
    return (PyLong_CheckExact(num_features) and num_features == cnp.PyArray_DIMS(array)[1]
            and (ranks is None or has_rank(ranks, cnp.PyArray_NDIM(array))))


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


cdef bint are_plain_statistics(object mean, object var, cnp.ndarray x, object out) noexcept:
    """Tell whether running statistics are plain vectors."""
    return (mean is not None and is_plain_vector(mean, x, out)
            and var is not None and is_plain_vector(var, x, out))


cdef bint is_plain_target(object value, cnp.ndarray x, object out) noexcept:
    """Tell whether it is None, or a plain vector that can be written to."""
    return is_plain_vector(value, x, out) and (
        value is None or cnp.PyArray_ISWRITEABLE(<cnp.ndarray>value))


cdef bint is_plain_gradient(object gradient, object parameter, cnp.ndarray x, cnp.ndarray dy,
                            tuple others) noexcept:
    """Tell whether it is a sum of gradients that can be added to, or None for a new one.

    It is added to while x and dy may be read, and is apart from the others, of which some may be
    None. NumPy rounds sums from float64, kernels round those of 16 bits from float32.
    """
    cdef cnp.ndarray array
    if parameter is None:
        return gradient is None
    if gradient is None:
        return cnp.PyArray_ITEMSIZE(<cnp.ndarray>parameter) > 2
    if not is_plain_target(gradient, x, None):
        return False
    array = <cnp.ndarray>gradient
    if cnp.PyArray_ITEMSIZE(array) <= 2 or not is_apart(array, x) or not is_apart(array, dy):
        return False
    for other in others:
        if other is not None and not (
                cnp.PyArray_CheckExact(other) and is_apart(array, <cnp.ndarray>other)):
            return False
    return True


cdef bint is_plain_counter(object counter, Py_ssize_t batches) noexcept:
    """Tell whether it is None, or an int64 that can count so many batches on."""
    cdef cnp.ndarray array
    if counter is None:
        return True
    if not cnp.PyArray_CheckExact(counter):
        return False
    array = <cnp.ndarray>counter
    if (cnp.PyArray_NDIM(array) != 0 or cnp.PyArray_TYPE(array) != cnp.NPY_INT64
            or not cnp.PyArray_ISBEHAVED(array)):
        return False
    return 0 <= counter_of(array)[0] <= INT64_MAX - batches


cdef cnp.npy_int64 *counter_of(object counter) noexcept:
    return <cnp.npy_int64 *>cnp.PyArray_BYTES(<cnp.ndarray>counter)


cdef bint is_plain_batch_size(object size) except -1:
    """Tell whether it is None, or an int of a number of samples."""
    return size is None or (PyLong_CheckExact(size) and 1 <= size <= INT64_MAX)


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


cdef bint is_plain_forward(cnp.ndarray x, object out, object weight, object bias, object eps,
                           object activation, object slope, object residual) except -1:
    """Tell whether what all forwards of a plain input take is plain."""
    return (is_plain_eps(eps) and is_plain_output(out, x, x)
            and is_plain_vector(weight, x, out) and is_plain_vector(bias, x, out)
            and is_plain_activation(activation, slope, x)
            and is_plain_residual(residual, x, out))


# ------------------------------------------------------------------ memory

cdef cnp.ndarray new_vector(Py_ssize_t channels, int type_num):
    """A new vector of one value per channel."""
    cdef cnp.npy_intp shape = channels
    return <cnp.ndarray>cnp.PyArray_SimpleNew(1, &shape, type_num)


cdef cnp.ndarray new_bits(Py_ssize_t count):
    """So many bits, zeros."""
    cdef cnp.npy_intp shape = bytes_of_bits(count)
    return <cnp.ndarray>cnp.PyArray_ZEROS(1, &shape, cnp.NPY_UINT8, 0)


cdef double *new_doubles(Py_ssize_t count) except NULL:
    cdef double *doubles = <double *>malloc(count * sizeof(double))
    if doubles == NULL:
        raise MemoryError("no memory for sums of the channels")
    return doubles
