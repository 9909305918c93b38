# What a forward leaves for its backward. It is a class of the core, which makes one in every
# training forward of the quick path; layers/saved.py tells what is done with it.

cdef enum:
    MAX_NDIM = 64                 # of an array of NumPy's


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
        Boolean, a byte of 1 or 0 per position; C-contiguous, if x is an array of NumPy's.
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
    cdef int probes               # elements of x that are compared before the backward
    cdef Py_ssize_t offsets[PROBES]
    cdef uint64_t bits[PROBES]
    cdef bint has_bits            # whether the forward's threads have read them

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
            self.probe()

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

    cdef void probe(self) noexcept:
        """Choose elements of x, an ndarray, by which `has_changed` will know it, and read them."""
        cdef cnp.ndarray x = <cnp.ndarray>self.x
        if self.mask is None:
            self.probes = spread(x, self.offsets)
        else:
            self.probes = spread_over_valid(x, <cnp.ndarray>self.mask, self.offsets)
        if not self.has_bits:
            read_bits(x, self.offsets, self.probes, self.bits)

    cdef bint is_unchanged(self) noexcept:
        """Tell whether x, which has its shape, has the elements that were noted."""
        cdef uint64_t bits[PROBES]
        if self.probes == 0:  # x may be an array of CuPy's.
            return True
        read_bits(<cnp.ndarray>self.x, self.offsets, self.probes, bits)
        return memcmp(bits, self.bits, self.probes * sizeof(uint64_t)) == 0

    def has_changed(self):
        """Tell whether x, which has its shape, has been written to since the forward.

        Some of its elements tell, all of them if there are few.
        """
        return not self.is_unchanged()
