# What a forward leaves for its backward. It is a class of the core, which makes one in every
# training forward of the quick path; layers/saved.py tells what is done with it.

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
    batch_size : int
        The samples of a ghost batch; 0 for a single batch.
    """

    cdef readonly object x, mean, invstd, kept, mask
    cdef readonly bint in_place, frozen
    cdef readonly Py_ssize_t batch_size

    def __init__(self, x, mean, invstd, bint in_place=False, bint frozen=False, kept=None,
                 mask=None, Py_ssize_t batch_size=0):
        self.x, self.mean, self.invstd = x, mean, invstd
        self.in_place, self.frozen = in_place, frozen
        self.kept, self.mask, self.batch_size = kept, mask, batch_size
