# cython: language_level=3, cdivision=True, freethreading_compatible=True
"""What Python calls of the core, and the order of the core's parts.

How the work is cut into blocks depends on the shape, and on whether a mask leaves out anything, and
partial sums merge in a fixed order, so the result has the same bits for every number of threads.

The functions trust their caller: arrays have the right shapes, dtypes and layouts.
"""

import os

cimport cython
cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.pystate cimport PyThreadState
from cpython.ref cimport Py_INCREF, PyTypeObject
from cython.parallel cimport prange
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.math cimport INFINITY, fabs, fmod, isfinite, isnan, sqrt
from libc.stdint cimport INT32_MAX, INT64_MAX, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset


cdef extern from "Python.h":
    PyThreadState *PyEval_SaveThread()
    void PyEval_RestoreThread(PyThreadState *state)


include "core/kernels.pxi"

# ------------------------------------------------------------------ the instruction set in use

cdef const Isa *isa_in_use
isa_names = []


cdef void choose_isa() except *:
    """Take the best instruction set there is, or the one that FASTBN_ISA names."""
    global isa_in_use
    cdef const Isa *isas[8]
    cdef int count = fastbn_supported_isas(isas, 8)
    for i in range(count):
        isa_names.append(isas[i].name.decode())
    wanted = os.environ.get("FASTBN_ISA") or isa_names[-1]
    if wanted not in isa_names:
        raise ImportError(
            f"FASTBN_ISA is {wanted!r}, but this build on this machine has {', '.join(isa_names)}"
        )
    isa_in_use = isas[<int>isa_names.index(wanted)]


choose_isa()


def platform():
    """The compiler, the OpenMP runtime and the instruction sets, for show_config."""
    return {
        "compiler": fastbn_compiler().decode(),
        "openmp": fastbn_openmp().decode(),
        "isa": isa_in_use.name.decode(),
        "isas": tuple(isa_names),
    }


def omp_max_threads():
    """The threads that the OpenMP runtime would start."""
    return fastbn_omp_max_threads()


def omp_pause():
    """End the threads that OpenMP keeps idle for this one; tell whether that could be done."""
    return fastbn_omp_pause()


def borrow_threads(library):
    """Let the threads of the OpenMP runtime that a library is loaded with do the work.

    Tell whether it has one.
    """
    return fastbn_borrow_threads(os.fsencode(library))


include "core/threads.pxi"
include "core/trials.pxi"
include "core/caches.pxi"
include "core/cut.pxi"
include "core/vectors.pxi"
include "core/job.pxi"
include "core/coefficients.pxi"
include "core/running.pxi"
include "core/huge_means.pxi"
include "core/valid.pxi"
include "core/activation.pxi"
include "core/sums.pxi"
include "core/row_layout.pxi"
include "core/pieces.pxi"
include "core/column_layout.pxi"
include "core/layouts.pxi"
include "core/schedule.pxi"
include "core/stores.pxi"
include "core/trials_of_jobs.pxi"
include "core/arrays.pxi"


# ------------------------------------------------------------------ the entry points
#
# x has a layout that is not 0, dy and out the same layout, shape and dtype. A batch has so many
# samples, the last one the remaining ones; 0 stands for all of them. Where there is more than one
# batch, what is written per channel has the shape (batches, c), and what is read may have it. A
# mask is None or a C-contiguous array of the shape of x without its channels, of 255 and 0, behind
# which are mask_padding more bytes.
#
# An activation is None or its name. A residual has x's layout, shape and dtype; `alive` is None, or
# an array of alive_bytes(x) zeros that takes the bits of which a backward can tell the derivatives:
# one for each element, and bits_padding bytes behind them.

mask_padding = MASK_BYTES
bits_padding = BITS_PADDING


def stats(cnp.ndarray x not None, cnp.ndarray mask, Py_ssize_t batch_size,
          cnp.ndarray mean not None, cnp.ndarray m2 not None):
    """Write the mean and m2 of every channel of x."""
    cdef Job job
    cdef Vector unread
    init_job_on(&job, x, mask, batch_size)
    reduce_to_moments(&job, output_vector(mean, &job.mean), output_vector(m2, &unread), NULL)
    execute(&job)


def elemt(cnp.ndarray x not None, cnp.ndarray mask, cnp.ndarray mean, cnp.ndarray invstd,
          cnp.ndarray var, double eps, cnp.ndarray weight, cnp.ndarray bias,
          cnp.ndarray out not None, activation=None, double slope=0.0,
          cnp.ndarray residual=None, cnp.ndarray alive=None):
    """Write x, normalized by mean and either invstd or var and eps, into out."""
    cdef Job job
    init_job_on(&job, x, mask, 0)
    job.mean, job.invstd, job.var = vector_of(mean, 0), vector_of(invstd, 1), vector_of(var, 1)
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = eps
    apply_normalize(&job, cnp.PyArray_BYTES(out))
    set_epilogue(&job, activation_of(activation, slope), residual, alive)
    execute(&job)


def forward(cnp.ndarray x not None, cnp.ndarray mask, Py_ssize_t batch_size, cnp.ndarray weight,
            cnp.ndarray bias, double eps, cnp.ndarray out not None, cnp.ndarray mean not None,
            cnp.ndarray m2 not None, cnp.ndarray invstd not None, activation=None,
            double slope=0.0, cnp.ndarray residual=None, cnp.ndarray alive=None):
    """Write x, normalized by its own statistics, into out, and those statistics."""
    cdef Job job
    cdef Statistics found = statistics_in(mean, m2, invstd)
    init_job_on(&job, x, mask, batch_size)
    normalize_by(&job, &found)
    job.weight, job.bias = vector_of(weight, 1), vector_of(bias, 0)
    job.eps = eps
    sum_in_float32(&job)
    apply_normalize(&job, cnp.PyArray_BYTES(out))
    set_epilogue(&job, activation_of(activation, slope), residual, alive)
    execute(&job)


def move_towards(cnp.ndarray running not None, cnp.ndarray batches not None, divisors, factors):
    """Set running to (1 - factor) * running + factor * batch / divisor, batch after batch.

    Running statistics that have the shape of the batches take one batch's values each.
    """
    cdef Vector moved = vector_of(running, 0), target = vector_of(batches, 0)
    cdef Py_ssize_t k, channels = cnp.PyArray_DIMS(running)[cnp.PyArray_NDIM(running) - 1]
    for k in range(len(factors)):
        move_batch(&moved, &target, k, channels, divisors[k], factors[k])


cdef void init_backward_job_on(Job *job, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray mask,
                               Py_ssize_t batch_size, cnp.ndarray mean,
                               cnp.ndarray invstd) noexcept:
    init_job_on(job, x, mask, batch_size)
    job.dy = cnp.PyArray_BYTES(dy)
    job.mean, job.invstd = vector_of(mean, 0), vector_of(invstd, 1)


def backward_reduce(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
                    cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray sum_dy not None,
                    cnp.ndarray sum_dy_xhat not None):
    """Write the sums of dy and of dy * xhat of every channel."""
    cdef Job job
    init_backward_job_on(&job, dy, x, mask, 0, mean, invstd)
    reduce_to_products(&job, output_vector(sum_dy, &job.sum_dy),
                       output_vector(sum_dy_xhat, &job.sum_dy_xhat))
    execute(&job)


def backward_elemt(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
                   cnp.ndarray mean, cnp.ndarray invstd, cnp.ndarray weight, cnp.ndarray sum_dy,
                   cnp.ndarray sum_dy_xhat, double count, cnp.ndarray out not None):
    """Write the gradient of x into out, by the given sums over count elements."""
    cdef Job job
    init_backward_job_on(&job, dy, x, mask, 0, mean, invstd)
    job.sum_dy, job.sum_dy_xhat = vector_of(sum_dy, 0), vector_of(sum_dy_xhat, 0)
    job.weight = vector_of(weight, 1)
    job.count = count
    apply_gradient(&job, cnp.PyArray_BYTES(out))
    execute(&job)


def backward(cnp.ndarray dy not None, cnp.ndarray x not None, cnp.ndarray mask,
             Py_ssize_t batch_size, cnp.ndarray weight, cnp.ndarray mean, cnp.ndarray invstd,
             cnp.ndarray out not None, cnp.ndarray sum_dy not None,
             cnp.ndarray sum_dy_xhat not None, gate=None):
    """Write the gradient of x into out, and the sums of dy and of dy * xhat."""
    cdef Job job
    init_backward_job_on(&job, dy, x, mask, batch_size, mean, invstd)
    reduce_to_products(&job, output_vector(sum_dy, &job.sum_dy),
                       output_vector(sum_dy_xhat, &job.sum_dy_xhat))
    job.weight = vector_of(weight, 1)
    sum_in_float32(&job)
    apply_gradient(&job, cnp.PyArray_BYTES(out))
    set_gate(&job, gate)
    execute(&job)


def activation_gradient(cnp.ndarray dy not None, cnp.ndarray y, cnp.ndarray alive, activation,
                        double slope, cnp.ndarray out not None):
    """Write dy times the derivative of the activation, which the bits or its output tell."""
    cdef Job job
    cdef GateOfJob gate = gate_with(activation_of(activation, slope), dy, y, alive)
    init_job_on(&job, dy, None, 0)
    job.dy = cnp.PyArray_BYTES(out)
    pass_gate(&job, &gate)
    job.apply = derive_block
    execute(&job)


include "core/recovery.pxi"
include "core/probes.pxi"
include "core/saved.pxi"
include "core/channel_groups.pxi"
include "core/results.pxi"
include "core/tensors.pxi"
include "core/plain.pxi"
include "core/quick_forward.pxi"
include "core/quick_backward.pxi"
