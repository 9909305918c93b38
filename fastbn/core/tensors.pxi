# The memory of torch's tensors as arrays. Between the layers of a model, whose arrays fill the
# caches, NumPy's and torch's own ways take ten times as long as in a loop.

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArray_Descr:
        pass
    object PyArray_NewFromDescr(PyTypeObject *subtype, PyArray_Descr *descr, int nd,
                                const cnp.npy_intp *dims, const cnp.npy_intp *strides, void *data,
                                int flags, PyObject *obj)

cdef enum:
    # The axes of a tensor at most, for which fastbn has a layout or makes one.
    AXES_MAX = 32

# Where the elements of an empty array would be.
cdef char no_memory


def array_at(size_t address, shape, strides, cnp.dtype dtype not None, owner):
    """The elements of a tensor as an array that keeps it alive; strides are in elements."""
    cdef cnp.npy_intp dims[AXES_MAX]
    cdef cnp.npy_intp steps[AXES_MAX]
    cdef int i, ndim = <int>len(shape)
    cdef bint is_empty = False
    cdef void *data = <void *>address
    cdef cnp.ndarray array
    if ndim > AXES_MAX:
        raise TypeError(f"a tensor of {ndim} axes is no array")
    for i in range(ndim):
        dims[i], steps[i] = shape[i], <cnp.npy_intp>strides[i] * dtype.itemsize
        is_empty |= dims[i] == 0
    if address == 0:
        if not is_empty:
            raise TypeError("a tensor without memory is no array")
        data = &no_memory
    Py_INCREF(dtype)  # NewFromDescr takes over a reference.
    array = <cnp.ndarray>PyArray_NewFromDescr(<PyTypeObject *>cnp.ndarray, <PyArray_Descr *>dtype,
                                              ndim, dims, steps, data, cnp.NPY_ARRAY_WRITEABLE,
                                              NULL)
    cnp.set_array_base(array, owner)
    return array


def new_tensor_memory(cnp.ndarray x not None, bint channels_last):
    """A new array of x's shape in one of torch's memory formats, from that of freed results."""
    if not channels_last:
        return new_like(x, None, cnp.NPY_CORDER)
    return transposed(new_like(transposed(x, True), None, cnp.NPY_CORDER), False)


cdef cnp.ndarray transposed(cnp.ndarray x, bint channels_last):
    """A view of x with its second axis last, or with its last axis second."""
    cdef cnp.npy_intp axes[AXES_MAX]
    cdef cnp.PyArray_Dims order
    cdef int i, ndim = cnp.PyArray_NDIM(x)
    axes[0] = 0
    for i in range(1, ndim):
        if channels_last:
            axes[i] = 1 if i == ndim - 1 else i + 1
        else:
            axes[i] = ndim - 1 if i == 1 else i - 1
    order.ptr, order.len = axes, ndim
    return cnp.PyArray_Transpose(x, &order)
