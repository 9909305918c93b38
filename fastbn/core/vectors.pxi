# Values of channels: vectors, and how they are made, read and written.

# One value per channel, or per batch and channel, of any of the four dtypes, alignment and strides.
cdef struct Vector:
    const char *data              # NULL stands for a vector of one and the same value
    Py_ssize_t stride
    Py_ssize_t batch_stride       # 0 if all batches have the same values
    const Kernels *kernels
    double value


cdef Vector constant(double value) noexcept nogil:
    """A vector of one and the same value."""
    cdef Vector vector
    memset(&vector, 0, sizeof(Vector))
    vector.value = value
    return vector


cdef Vector vector_of(cnp.ndarray array, double default) noexcept:
    """An array of one value per channel, or per batch and channel; the default for None."""
    cdef Vector vector
    cdef const cnp.npy_intp *strides
    cdef int ndim
    if array is None:
        return constant(default)
    strides, ndim = cnp.PyArray_STRIDES(array), cnp.PyArray_NDIM(array)
    vector.data = cnp.PyArray_BYTES(array)
    vector.stride = strides[ndim - 1]
    vector.batch_stride = strides[0] if ndim == 2 else 0
    vector.kernels = kernels_of_array(array)
    vector.value = default
    return vector


cdef double *output_vector(cnp.ndarray array, Vector *vector) noexcept:
    """The data of a new float64 array, which the job's later steps read as the vector."""
    vector[0] = vector_of(array, 0.0)
    return <double *>vector.data


cdef Vector vector_of_doubles(const double *values) noexcept nogil:
    """A vector of one double per channel."""
    cdef Vector vector = constant(0.0)
    vector.data, vector.stride = <const char *>values, sizeof(double)
    vector.kernels = isa_in_use.float64
    return vector


cdef Vector vector_of_batches(const double *values, Py_ssize_t channels) noexcept nogil:
    """A vector of one double per batch and channel."""
    cdef Vector vector = vector_of_doubles(values)
    vector.batch_stride = channels * sizeof(double)
    return vector


cdef Vector repeated(const Vector *vector, Py_ssize_t channels, Py_ssize_t batches,
                     double *to) noexcept nogil:
    """A vector of one double per batch and channel, the same ones for each batch."""
    cdef Py_ssize_t b
    if vector.data == NULL:
        return vector[0]
    read_all(vector, channels, to)
    for b in range(1, batches):
        memcpy(to + b * channels, to, channels * sizeof(double))
    return vector_of_batches(to, channels)


cdef const char *start_of_vector(const Vector *vector, const Block *block) noexcept nogil:
    """Where the value of a block's first channel is."""
    return vector.data + block.batch * vector.batch_stride + block.c0 * vector.stride


cdef void read_vector(const Vector *vector, const Block *block, double *to) noexcept nogil:
    """The values of a block's channels."""
    cdef Py_ssize_t c, count = block.c1 - block.c0
    if vector.data != NULL:
        vector.kernels.load_as_double(start_of_vector(vector, block), vector.stride, count, to)
        return
    for c in range(count):
        to[c] = vector.value


cdef void read_all(const Vector *vector, Py_ssize_t channels, double *to) noexcept nogil:
    """Read the values of all channels, which may be more than a block has."""
    cdef Block block
    memset(&block, 0, sizeof(Block))
    block.c1 = channels
    read_vector(vector, &block, to)


cdef void write_vector(const Vector *vector, const Block *block,
                       const double *values) noexcept nogil:
    """Write the values of a block's channels."""
    vector.kernels.store_from_double(values, vector.stride, block.c1 - block.c0,
                                     <char *>start_of_vector(vector, block))
