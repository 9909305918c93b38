# What a forward leaves for its backward. It is a class of the core, which makes one in every
# training forward of the quick path; layers/saved.py tells what is done with it.

cdef enum:
    MAX_NDIM = 64                 # of an array of NumPy's
    SAMPLES = 64                  # elements by which a change of what was saved is noticed
    MASK_PARTS = 512              # whose valid positions are counted
    SHORTEST_MASK_PART = 1024     # positions


@cython.final
@cython.freelist(16)
cdef class SavedForBackward:
    """What a forward in training mode leaves for its backward.

    Attributes
    ----------
    x : ndarray
        The input or, where the output took its place, the output.
    mean, invstd : ndarray of float64
    in_place, frozen : bool
    kept : ndarray or None
        A copy of the input, of all channels or of `kept_channels`, that the output does not tell.
    kept_channels : ndarray of int or None
    mask : ndarray or None
        C-contiguous, if x is an array of NumPy's.
    shape : tuple of int
        That of x at the time of the forward.
    batch_size : int
        The samples of a ghost batch; 0 for a single batch.
    num_groups : int
        Into which the channels were divided; 0 if they were not.
    weight, bias : ndarray of float64 or None
        Those of the forward; the bias, and on a GPU the weight too, if it was in place or had an
        activation.
    activation, negative_slope
        Those of the forward.
    has_residual : bool
    alive : ndarray or None
        What the forward has noted about the derivatives of its activation.
    """

    cdef readonly object x, kept, kept_channels, mask, activation, alive
    # mean, invstd, weight and bias are arrays that were given, or lie in memory that is allocated
    # once for all of them, behind m2, which the forward alone needs.
    cdef object given_mean, given_invstd, given_weight, given_bias
    cdef cnp.ndarray memory
    cdef Py_ssize_t batches, channels
    cdef bint has_weight, has_bias
    cdef readonly double negative_slope
    cdef readonly bint has_residual
    cdef int ndim
    cdef cnp.npy_intp dims[MAX_NDIM]
    cdef readonly bint in_place, frozen
    cdef readonly Py_ssize_t batch_size, num_groups
    cdef int samples              # elements of x that are compared before the backward
    cdef Py_ssize_t offsets[SAMPLES]
    cdef cnp.npy_uint64 bits[SAMPLES]

    def __init__(self, x, mean, invstd, bint in_place=False, bint frozen=False, kept=None,
                 mask=None, Py_ssize_t batch_size=0, weight=None, bias=None, epilogue=None,
                 Py_ssize_t num_groups=0):
        self.x, self.given_mean, self.given_invstd = x, mean, invstd
        self.in_place, self.frozen = in_place, frozen
        if kept is not None:
            self.kept_channels, self.kept = kept
        self.given_weight, self.given_bias = weight, bias
        self.mask, self.batch_size, self.num_groups = mask, batch_size, num_groups
        if epilogue is not None:
            self.activation, self.negative_slope = epilogue.activation, epilogue.negative_slope
            self.has_residual, self.alive = epilogue.residual is not None, epilogue.alive
        self.ndim = len(x.shape)
        for i in range(self.ndim):
            self.dims[i] = x.shape[i]
        if cnp.PyArray_Check(x):
            self.sample()

    @property
    def shape(self):
        return tuple([self.dims[i] for i in range(self.ndim)])

    @property
    def mean(self):
        return self.given_mean if self.memory is None else self.in_memory(self.mean_memory())

    @property
    def invstd(self):
        return self.given_invstd if self.memory is None else self.in_memory(self.invstd_memory())

    @property
    def weight(self):
        if self.memory is None:
            return self.given_weight
        return self.row_in_memory(self.weight_memory()) if self.has_weight else None

    @property
    def bias(self):
        if self.memory is None:
            return self.given_bias
        return self.row_in_memory(self.bias_memory()) if self.has_bias else None

    cdef object in_memory(self, const double *values):
        """A view of one double per channel or, with ghost batches or groups, per batch as well."""
        cdef Py_ssize_t start = values - self.m2_memory()
        view = self.memory[start : start + self.batches * self.channels]
        return view.reshape(self.batches, self.channels) if self.has_batches() else view

    cdef object row_in_memory(self, const double *values):
        cdef Py_ssize_t start = values - self.m2_memory()
        return self.memory[start : start + self.channels]

    cdef int allocate(self, Py_ssize_t batches, Py_ssize_t channels) except -1:
        """Take memory for the four vectors, and for m2."""
        self.batches, self.channels = batches, channels
        self.memory = new_vector((3 * batches + 2) * channels, cnp.NPY_FLOAT64)
        return 0

    cdef double *m2_memory(self) noexcept:
        return <double *>cnp.PyArray_BYTES(self.memory)

    cdef double *mean_memory(self) noexcept:
        return self.m2_memory() + self.batches * self.channels

    cdef double *invstd_memory(self) noexcept:
        return self.mean_memory() + self.batches * self.channels

    cdef double *weight_memory(self) noexcept:
        return self.invstd_memory() + self.batches * self.channels

    cdef double *bias_memory(self) noexcept:
        return self.weight_memory() + self.channels

    cdef bint has_batches(self) noexcept:
        """Tell whether there are a mean and an invstd of each batch, or sample."""
        return self.batch_size > 0 or self.num_groups > 0

    cdef Vector means(self) noexcept:
        if self.memory is None:
            return vector_of(self.given_mean, 0)
        return self.vector_in_memory(self.mean_memory())

    cdef Vector invstds(self) noexcept:
        if self.memory is None:
            return vector_of(self.given_invstd, 0)
        return self.vector_in_memory(self.invstd_memory())

    cdef Vector weights(self) noexcept:
        if self.memory is None:
            return vector_of(self.given_weight, 1)
        return vector_of_doubles(self.weight_memory()) if self.has_weight else constant(1.0)

    cdef Vector biases(self) noexcept:
        if self.memory is None:
            return vector_of(self.given_bias, 0)
        return vector_of_doubles(self.bias_memory()) if self.has_bias else constant(0.0)

    cdef Vector vector_in_memory(self, const double *values) noexcept:
        if self.has_batches():
            return vector_of_batches(values, self.channels)
        return vector_of_doubles(values)

    cdef void save(self, cnp.ndarray x) noexcept:
        """Save the input or the output, and its shape."""
        self.x, self.ndim = x, cnp.PyArray_NDIM(x)
        memcpy(self.dims, cnp.PyArray_DIMS(x), self.ndim * sizeof(cnp.npy_intp))

    cdef bint has_its_shape(self) noexcept:
        """Tell whether nobody has given x, a plain array, another shape since the forward."""
        cdef cnp.ndarray x = <cnp.ndarray>self.x
        return self.ndim == cnp.PyArray_NDIM(x) and memcmp(
            self.dims, cnp.PyArray_DIMS(x), self.ndim * sizeof(cnp.npy_intp)) == 0

    cdef void sample(self) noexcept:
        """Note some elements of x, an ndarray, by which `has_changed` will know it."""
        cdef cnp.ndarray x = <cnp.ndarray>self.x
        if self.mask is None:
            self.samples = spread(x, self.offsets)
        else:
            self.samples = spread_over_valid(x, <cnp.ndarray>self.mask, self.offsets)
        read_bits(x, self.offsets, self.samples, self.bits)

    cdef bint is_unchanged(self) noexcept:
        """Tell whether x, which has its shape, has the elements that were noted."""
        cdef cnp.npy_uint64 bits[SAMPLES]
        if self.samples == 0:  # x may be an array of CuPy's.
            return True
        read_bits(<cnp.ndarray>self.x, self.offsets, self.samples, bits)
        return memcmp(bits, self.bits, self.samples * sizeof(cnp.npy_uint64)) == 0

    def has_changed(self):
        """Tell whether x, which has its shape, has been written to since the forward.

        Some of its elements tell, all of them if there are few.
        """
        return not self.is_unchanged()


# Where the samples lie: one in each of so many equal parts, at no regular distance, since a regular
# one may be a multiple of a row's length, and borders of images are often alike.

cdef double sample_places[SAMPLES]    # as fractions of the elements of an array


cdef void choose_sample_places() noexcept:
    cdef int i
    for i in range(SAMPLES):
        sample_places[i] = (i + fmod(i * 0.6180339887498949, 1.0)) / SAMPLES


choose_sample_places()


cdef int choose_elements(Py_ssize_t size, Py_ssize_t *elements) noexcept:
    """Choose the samples among so many elements, all if there are few; return how many."""
    cdef double count = <double>size
    cdef int i
    if size <= SAMPLES:
        for i in range(size):
            elements[i] = i
        return <int>size
    for i in range(SAMPLES):
        elements[i] = <Py_ssize_t>(sample_places[i] * count)
    return SAMPLES


cdef int spread(cnp.ndarray x, Py_ssize_t *offsets) noexcept:
    """Choose elements of x, as bytes from its first one; return how many."""
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef int i, samples = choose_elements(cnp.PyArray_SIZE(x), offsets)
    if layout_of(x) != UNFIT:
        for i in range(samples):
            offsets[i] *= itemsize
    else:
        for i in range(samples):
            offsets[i] = offset_of_element(x, offsets[i])
    return samples


cdef struct ValidPositions:
    const unsigned char *mask
    Py_ssize_t size
    Py_ssize_t part_size          # positions of a part, of which the last one may have fewer
    Py_ssize_t counts[MASK_PARTS]
    # Where the search is: in which part, how many are valid up to its end, from which position on,
    # and how many are valid before that.
    Py_ssize_t part, up_to_end, position, before


cdef Py_ssize_t count_in_parts(ValidPositions *valid, cnp.ndarray mask) noexcept:
    """Count the valid positions of a C-contiguous mask; begin a search."""
    cdef Py_ssize_t start, part = 0, total = 0
    valid.mask, valid.size = <const unsigned char *>cnp.PyArray_BYTES(mask), cnp.PyArray_SIZE(mask)
    valid.part_size = max((valid.size + MASK_PARTS - 1) // MASK_PARTS, SHORTEST_MASK_PART)
    for start in range(0, valid.size, valid.part_size):
        valid.counts[part] = isa_in_use.common.count_valid(
            valid.mask + start, min(valid.part_size, valid.size - start))
        total += valid.counts[part]
        part += 1
    valid.part, valid.up_to_end, valid.position, valid.before = -1, 0, 0, 0
    return total


cdef Py_ssize_t find_valid_position(ValidPositions *valid, Py_ssize_t n) noexcept:
    """The position that n valid ones come before; n is at least that of the last search."""
    cdef Py_ssize_t position, count
    while n >= valid.up_to_end:
        valid.part += 1
        valid.position, valid.before = valid.part * valid.part_size, valid.up_to_end
        valid.up_to_end += valid.counts[valid.part]
    while valid.position + 8 <= valid.size:
        count = valid_of_eight(valid.mask + valid.position)
        if n < valid.before + count:
            break
        valid.position += 8
        valid.before += count
    position, count = valid.position, valid.before
    while count < n or valid.mask[position] == 0:
        count += valid.mask[position]
        position += 1
    return position


cdef Py_ssize_t valid_of_eight(const unsigned char *mask) noexcept:
    """How many of eight positions are valid: a sum of bytes that are 0 or 1."""
    cdef cnp.npy_uint64 bytes
    memcpy(&bytes, mask, 8)
    return <Py_ssize_t>((bytes * <cnp.npy_uint64>0x0101010101010101) >> 56)


cdef int spread_over_valid(cnp.ndarray x, cnp.ndarray mask, Py_ssize_t *offsets) noexcept:
    """Choose elements of x at valid positions: nobody reads the others.

    They are counted with the channels last, so that neighbouring samples are of several channels.
    """
    cdef ValidPositions valid
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[1], channel, position
    cdef int i, samples = choose_elements(count_in_parts(&valid, mask) * channels, offsets)
    for i in range(samples):
        position = find_valid_position(&valid, offsets[i] // channels)
        channel = offsets[i] % channels
        offsets[i] = (offset_of_element(x, position, skip_channels=True)
                      + channel * cnp.PyArray_STRIDES(x)[1])
    return samples


cdef Py_ssize_t offset_of_element(cnp.ndarray array, Py_ssize_t element,
                                  bint skip_channels=False) noexcept:
    """The bytes from an array's first element to that of a number, counted in C order."""
    cdef const cnp.npy_intp *shape = cnp.PyArray_DIMS(array)
    cdef const cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    cdef Py_ssize_t offset = 0
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(array) - 1, -1, -1):
        if axis == 1 and skip_channels:
            continue
        offset += element % shape[axis] * strides[axis]
        element //= shape[axis]
    return offset


cdef void read_bits(cnp.ndarray x, const Py_ssize_t *offsets, int count,
                    cnp.npy_uint64 *bits) noexcept:
    """Read some elements, as integers."""
    cdef const char *start = cnp.PyArray_BYTES(x)
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef int i
    memset(bits, 0, count * sizeof(cnp.npy_uint64))
    if itemsize == 4:  # The sizes are constants, so that each copy is an instruction.
        for i in range(count):
            memcpy(bits + i, start + offsets[i], 4)
    elif itemsize == 2:
        for i in range(count):
            memcpy(bits + i, start + offsets[i], 2)
    else:
        for i in range(count):
            memcpy(bits + i, start + offsets[i], 8)
