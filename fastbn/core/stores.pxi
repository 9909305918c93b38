# By which stores a job writes its output: ordinary ones, which leave it in the caches, or
# non-temporal ones, which do not read the lines first. What is written does not depend on that.
#
# Which of them win depends on the processor, on what the neighbours of a virtual machine leave of
# the third-level cache, on the size, and on whether the output takes the place of an input. So the
# first calls of a job of some size try both, and those that follow use the faster ones.

cdef enum:
    # Shorter runs of an output are not written by non-temporal stores.
    NONTEMPORAL_RUN_BYTES = 1024

# Of inputs and output together: fewer bytes stay in the cache, and are not worth a trial. On a
# Zen 3 with 32 MiB of third-level cache non-temporal stores won from 19 MiB on, if not in place.
cdef Py_ssize_t trial_bytes = min(l3_bytes // 4, 8388608)

# Of more bytes, non-temporal stores are likely to win. With a third-level cache of 8 MiB they won
# from 10 MiB on, and lost at 6; for the limit see LARGER_THAN_CACHES.
cdef Py_ssize_t likely_bytes = min(l3_bytes - l3_bytes // 8, 50331648)

# Where inputs and output have more bytes, stores are non-temporal; -1 if trials decide.
cdef Py_ssize_t nontemporal_bytes = -1


cdef void read_nontemporal_bytes() except *:
    """Take the limit that the environment sets."""
    global nontemporal_bytes
    wanted = os.environ.get("FASTBN_NONTEMPORAL_BYTES")
    if not wanted:
        return
    if not wanted.isdecimal():
        raise ImportError(f"FASTBN_NONTEMPORAL_BYTES is {wanted!r}, but must be a number of bytes")
    nontemporal_bytes = min(int(wanted), PY_SSIZE_T_MAX)


read_nontemporal_bytes()


def set_nontemporal_bytes(Py_ssize_t limit):
    """Set what inputs and output have more of where stores are non-temporal; return what it was.

    -1 lets trials decide.
    """
    global nontemporal_bytes
    before = nontemporal_bytes
    nontemporal_bytes = limit
    return before


cdef bint overwrites_input(const Job *job) noexcept nogil:
    return job.out != NULL and (
        job.out == job.x or job.out == job.dy or job.out == job.residual)


cdef Py_ssize_t footprint_bytes(const Job *job) noexcept nogil:
    """The bytes of all inputs, and of the outputs that do not take the place of one."""
    cdef int outputs = job.out != NULL and not overwrites_input(job)
    outputs += job.passed != NULL and job.passed != job.dy
    return input_bytes(job) + outputs * array_bytes(job)


cdef bint tries_stores(const Job *job) noexcept nogil:
    """Tell whether trials decide, not the size of a job or a limit that is set."""
    cdef Py_ssize_t of_all = footprint_bytes(job)
    return (nontemporal_bytes < 0 and of_all >= trial_bytes and allows_nontemporal(job)
            and (of_all <= LARGER_THAN_CACHES or overwrites_input(job)))


cdef bint uses_nontemporal(const Job *job) noexcept nogil:
    """Tell whether to write the output by non-temporal stores."""
    cdef Py_ssize_t of_all = footprint_bytes(job)
    if not allows_nontemporal(job):
        return False
    if job.tries == STORES:
        return job.way
    return of_all > (likely_bytes if nontemporal_bytes < 0 else nontemporal_bytes)


cdef bint allows_nontemporal(const Job *job) noexcept nogil:
    """Tell whether non-temporal stores may win.

    Strips that are not the whole width of a matrix are short runs. So are groups of runs where
    there are many threads; but ordinary stores take longer there, too: for runs of 64 to 800 bytes
    up to 1.8 times the CPU time of a training forward. In place, where they do not save a read,
    only long runs, and long stretches of the column layout, are worth a trial.
    """
    cdef Py_ssize_t channels = job.cut.group if job.cut.column_layout else job.cut.c
    cdef Py_ssize_t run = channels * job.cut.s * job.itemsize
    if (job.out == NULL or isa_in_use.common.fence_nontemporal == NULL
            or job.cut.groups > 1 and run < NONTEMPORAL_RUN_BYTES):
        return False
    if not overwrites_input(job):
        return True
    return (job.itemsize >= <Py_ssize_t>sizeof(float) and job.alive == NULL
            and (job.cut.column_layout or job.cut.s * job.itemsize >= STREAM_BYTES))
