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
    kept : KeptChannels or None
    mask : ndarray or None
    shape : tuple of int
        That of x at the time of the forward.
    batch_size : int
        The samples of a ghost batch; 0 for a single batch.
    """

    cdef readonly object x, mean, invstd, kept, mask
    cdef int ndim
    cdef cnp.npy_intp dims[MAX_NDIM]
    cdef readonly bint in_place, frozen
    cdef readonly Py_ssize_t batch_size

    def __init__(self, x, mean, invstd, bint in_place=False, bint frozen=False, kept=None,
                 mask=None, Py_ssize_t batch_size=0):
        self.x, self.mean, self.invstd = x, mean, invstd
        self.in_place, self.frozen = in_place, frozen
        self.kept, self.mask, self.batch_size = kept, mask, batch_size
        self.ndim = len(x.shape)
        for i in range(self.ndim):
            self.dims[i] = x.shape[i]

    @property
    def shape(self):
        return tuple([self.dims[i] for i in range(self.ndim)])

    cdef void save(self, cnp.ndarray x) noexcept:
        """Save the input or the output, and its shape."""
        self.x, self.ndim = x, cnp.PyArray_NDIM(x)
        memcpy(self.dims, cnp.PyArray_DIMS(x), self.ndim * sizeof(cnp.npy_intp))

    cdef bint has_its_shape(self) noexcept:
        """Tell whether nobody has given x, a plain array, another shape since the forward."""
        cdef cnp.ndarray x = <cnp.ndarray>self.x
        return self.ndim == cnp.PyArray_NDIM(x) and memcmp(
            self.dims, cnp.PyArray_DIMS(x), self.ndim * sizeof(cnp.npy_intp)) == 0
