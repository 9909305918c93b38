# Memory for results. A large array that is freed goes back to the system, and the system hands its
# memory out again zeroed, page by page, which takes longer than the call. So results have an
# allocator of their own (results.c), by the protocol of NumPy: an array remembers it, and frees by
# it. Nothing else about the array is different.

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMem_Handler:
        pass
    PyObject *PyDataMem_DefaultHandler
    object PyDataMem_GetHandler()
    object PyDataMem_SetHandler(object handler)
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, PyObject *dtype,
                                bint subok)

cdef extern from "results.h":
    enum:
        SMALLEST_BLOCK "FASTBN_SMALLEST_BLOCK"
    PyDataMem_Handler *fastbn_results_handler(PyDataMem_Handler *below)
    void fastbn_limit_free_blocks(size_t bytes) nogil
    size_t fastbn_release_free_blocks() nogil


cdef object default_handler = <object>PyDataMem_DefaultHandler
cdef object results_handler = PyCapsule_New(
    fastbn_results_handler(
        <PyDataMem_Handler *>PyCapsule_GetPointer(default_handler, "mem_handler")),
    "mem_handler", NULL)
cdef Py_ssize_t free_bytes_limit = 0


def limit_free_memory(Py_ssize_t limit):
    """Keep so many bytes of freed results at most; return the limit before."""
    global free_bytes_limit
    cdef Py_ssize_t previous = free_bytes_limit
    free_bytes_limit = limit
    with nogil:
        fastbn_limit_free_blocks(limit)
    return previous


def release_free_memory():
    """Give the memory of freed results back to the system; return how many bytes."""
    cdef size_t released
    with nogil:
        released = fastbn_release_free_blocks()
    return released


cpdef bint reuses_memory(Py_ssize_t nbytes) noexcept:
    """Tell whether a result of so many bytes takes the memory of a freed one, if there is one."""
    return <Py_ssize_t>SMALLEST_BLOCK <= nbytes <= free_bytes_limit


def empty_like(cnp.ndarray x not None, cnp.dtype dtype=None):
    """A new array in the layout of another one, from the memory of freed results."""
    return new_like(x, dtype)


cdef cnp.ndarray result_like(cnp.ndarray x, object out):
    """out, or a new array of x's dtype and layout."""
    return new_like(x, None) if out is None else <cnp.ndarray>out


cdef cnp.ndarray new_like(cnp.ndarray x, cnp.dtype dtype, cnp.NPY_ORDER order=cnp.NPY_KEEPORDER):
    """A new array of x's layout; a program's own allocator goes on allocating all arrays."""
    cdef object handler
    if not reuses_memory(cnp.PyArray_NBYTES(x)):
        return new_from_handler(x, dtype, order)
    handler = PyDataMem_GetHandler()
    if handler is not default_handler:
        return new_from_handler(x, dtype, order)
    PyDataMem_SetHandler(results_handler)
    try:
        return new_from_handler(x, dtype, order)
    finally:
        PyDataMem_SetHandler(handler)


cdef cnp.ndarray new_from_handler(cnp.ndarray x, cnp.dtype dtype, cnp.NPY_ORDER order):
    if dtype is not None:
        Py_INCREF(dtype)  # NewLikeArray takes over a reference.
    return <cnp.ndarray>PyArray_NewLikeArray(
        x, order, NULL if dtype is None else <PyObject *>dtype, False)
