# By which stores a job writes its output: ordinary ones, which leave it in the caches, or
# non-temporal ones, which do not read the lines first. What is written does not depend on that.
#
# Which of them win depends on the processor, on what the neighbours of a virtual machine leave of
# the third-level cache, on the size, and on whether the output takes the place of an input. So the
# first calls of a job of some size try both, and those that follow use the faster ones.

cdef enum:
    # Shorter runs of an output are not written by non-temporal stores.
    NONTEMPORAL_RUN_BYTES = 1024
    # Of more bytes, no cache keeps an output for its next reader.
    LARGER_THAN_CACHES = 100663296
    # The calls that try a kind of stores, of which the first half is not timed: it finds in the
    # caches what other calls have left. What fits the third-level cache is there to the full after
    # some ten calls: all arrays or, with non-temporal stores, the inputs alone.
    CALLS_OF_WAY = 4
    CALLS_OF_WAY_IN_CACHE = 16

# Of inputs and output together: fewer bytes stay in the cache, and are not worth a trial.
cdef Py_ssize_t trial_bytes = min(l3_bytes // 4, 8388608)

# Of more bytes, non-temporal stores are likely to win; some cloud machines report the cache of a
# whole socket.
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
    return (job.out == job.x or job.out == job.dy
            or job.residual != NULL and job.out == job.residual)


cdef Py_ssize_t bytes_in_caches(const Job *job) noexcept nogil:
    """The bytes of inputs and output, which may be one of them."""
    return input_bytes(job) + (0 if overwrites_input(job) else array_bytes(job))


cdef Trial *trial_of(const Job *job, int threads) noexcept nogil:
    """The trial of jobs like this one; NULL where its size decides, or a limit that is set."""
    cdef Py_ssize_t of_all = bytes_in_caches(job)
    cdef bint fits_cache = input_bytes(job) <= l3_bytes
    cdef uint64_t key = 1
    if (nontemporal_bytes >= 0 or of_all < trial_bytes or not allows_nontemporal(job)
            or of_all > LARGER_THAN_CACHES and not overwrites_input(job)):
        return NULL
    mix(&key, <uint64_t>job.apply)
    mix(&key, <uint64_t>job.schedule)
    mix(&key, <uint64_t>job.kernels)
    mix(&key, job.cut.batches)
    mix(&key, job.cut.n)
    mix(&key, job.cut.c)
    mix(&key, job.cut.s)
    mix(&key, threads)
    mix(&key, (job.reduce != NULL) + 2 * overwrites_input(job) + 4 * job.cut.column_layout
        + 8 * job.has_gate + 16 * (job.residual != NULL) + 32 * (job.alive != NULL)
        + 64 * (job.kept != NULL) + 128 * (job.raw_dy != NULL) + 256 * (job.mask != NULL)
        + 512 * job.has_epilogue)
    return trial_with(key, CALLS_OF_WAY_IN_CACHE if fits_cache else CALLS_OF_WAY)


cdef bint uses_nontemporal(const Job *job) noexcept nogil:
    """Tell whether to write the output by non-temporal stores."""
    cdef Py_ssize_t of_all = bytes_in_caches(job)
    if not allows_nontemporal(job):
        return False
    if job.trial != NULL:
        return job.way
    return of_all > (likely_bytes if nontemporal_bytes < 0 else nontemporal_bytes)


cdef bint allows_nontemporal(const Job *job) noexcept nogil:
    """Tell whether non-temporal stores may win.

    Strips that are not the whole width of a matrix are short runs. So are groups of runs where
    there are many threads; but ordinary stores take longer there, too: for runs of 64 to 800 bytes
    up to 1.8 times the CPU time of a training forward. In place, where they do not save a read,
    they must be made without a buffer, or for long stretches of the column layout.
    """
    cdef Py_ssize_t channels = job.cut.group if job.cut.column_layout else job.cut.c
    cdef Py_ssize_t run = channels * job.cut.s * job.itemsize
    if (job.out == NULL or job.kernels.fence_nontemporal == NULL
            or job.cut.groups > 1 and run < NONTEMPORAL_RUN_BYTES):
        return False
    if not overwrites_input(job):
        return True
    return (job.itemsize >= <Py_ssize_t>sizeof(float) and job.alive == NULL
            and (job.cut.column_layout or job.cut.s * job.itemsize >= STREAM_BYTES))


cdef int likely_way(const Job *job) noexcept nogil:
    """1 if non-temporal stores are likely to win, 0 otherwise."""
    return not overwrites_input(job) and bytes_in_caches(job) > likely_bytes
