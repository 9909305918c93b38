# What the first calls of a job try, in two ways: kinds of stores or, where arrays are too small for
# these to matter, numbers of threads. What is written depends on neither.
#
# Whether several threads pay for small arrays depends on how far the caches of their cores are from
# each other. On one machine two threads took less time than one where 256 KiB are read and written,
# on another one they took more where it is 1 MiB.

cdef enum:
    NOTHING
    STORES     # way 0: ordinary ones; way 1: non-temporal ones
    THREADS    # way 0: as many as the bytes are worth; way 1: one thread

cdef enum:
    # The calls that try a way, of which the first half is not timed: it finds in the caches what
    # other calls have left. What fits the third-level cache is there to the full after some ten
    # calls: all arrays or, with non-temporal stores, the inputs alone.
    CALLS_OF_WAY = 4
    CALLS_OF_WAY_IN_CACHE = 16


cdef int what_it_tries(const Job *job, int threads) noexcept nogil:
    """Which of these a job of up to so many threads tries."""
    if tries_stores(job):
        return STORES
    if footprint_bytes(job) < trial_bytes and may_share(bytes_moved(job), threads):
        return THREADS
    return NOTHING


cdef int calls_of_way(const Job *job) noexcept nogil:
    return CALLS_OF_WAY_IN_CACHE if input_bytes(job) <= l3_bytes else CALLS_OF_WAY


cdef int likely_way(const Job *job) noexcept nogil:
    """The way that is tried first."""
    if job.tries == THREADS:
        return 0
    return not overwrites_input(job) and footprint_bytes(job) > likely_bytes


cdef uint64_t key_of(const Job *job, int threads) noexcept nogil:
    """A number that jobs of one kind, shape and dtype have in common."""
    cdef uint64_t key = 1
    mix(&key, <uint64_t>job.apply)
    mix(&key, <uint64_t>job.schedule)
    mix(&key, <uint64_t>job.kernels)
    mix(&key, job.cut.batches)
    mix(&key, job.cut.n)
    mix(&key, job.cut.c)
    mix(&key, job.cut.s)
    mix(&key, job.leftover_samples)
    mix(&key, threads)
    mix(&key, (job.reduce != NULL) + 2 * overwrites_input(job) + 4 * job.cut.column_layout
        + 8 * job.has_gate + 16 * (job.residual != NULL) + 32 * (job.alive != NULL)
        + 64 * (job.kept != NULL) + 128 * (job.raw_dy != NULL) + 256 * (job.mask != NULL)
        + 512 * job.has_epilogue + 1024 * (job.dy != NULL) + 2048 * (job.out != NULL)
        + 4096 * (job.passed != NULL) + 8192 * (job.passed != NULL and job.passed == job.dy))
    return key
