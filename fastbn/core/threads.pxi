# How many threads a call uses.

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #  define FASTBN_THREAD_LOCAL __declspec(thread)
    #else
    #  define FASTBN_THREAD_LOCAL _Thread_local
    #endif
    static FASTBN_THREAD_LOCAL int fastbn_threads_here;
    static FASTBN_THREAD_LOCAL double fastbn_call_began, fastbn_last_end;
    static FASTBN_THREAD_LOCAL double fastbn_saved, fastbn_credit;
    static FASTBN_THREAD_LOCAL double fastbn_alone, fastbn_alone_since, fastbn_caution;
    """
    # Each of these belongs to the calling thread of Python, which has OpenMP threads of its own.
    # The number of threads that is set for its calls; 0 for none, -1 for the default.
    int threads_here "fastbn_threads_here"
    # Of calls that several threads could share: when this one began, and when the last one ended.
    double call_began "fastbn_call_began"
    double last_end "fastbn_last_end"
    # The seconds that sharing has saved in this call, and of late, at most MOST_CREDIT.
    double saved "fastbn_saved"
    double credit "fastbn_credit"
    # The seconds for which calls shall use one thread, and when the present one began, or 0.
    double alone "fastbn_alone"
    double alone_since "fastbn_alone_since"
    # How many seconds alone the last second lost has cost; 0 if that was long ago.
    double caution "fastbn_caution"


cdef enum:
    # With less to read and write, a thread brings a few microseconds at best, and costs
    # milliseconds where another process has its CPU.
    BYTES_PER_THREAD = 524288
    # Where such calls follow each other, OpenMP's threads have not gone to sleep: less is enough.
    BYTES_PER_AWAKE_THREAD = 131072


# The seconds for which a call counts as the one before: OpenMP's threads stay awake for longer.
cdef double SOON = 2e-4

# Where a region lasts so many seconds longer than this thread's work, another one had no CPU;
# threads that wake up come sooner.
cdef double LONG_WAIT = 2e-4

# What the last calls have saved covers a wait for a CPU, for a slice of the scheduler or two. What
# a single call seems to have saved may be a slice that its own thread has waited: it counts less.
cdef double MOST_CREDIT = 2e-2
cdef double MOST_SAVED = 2e-3

# Each second that is lost beyond that costs so many on one thread, and twice as many each time,
# until the credit has been full again.
cdef double LEAST_CAUTION = 4.0
cdef double MOST_CAUTION = 256.0

# For all calls of the process, 0 for none: the number that is set, the CPUs that the system grants,
# and a limit above which even a number that is set does not go.
cdef int threads_fixed = 0
cdef int threads_cpus = 0
cdef int threads_limit = 0


def set_thread_policy(int fixed, int cpus, int limit):
    """Set the number of threads, the most by default, and the most in any case; 0 for none."""
    global threads_fixed, threads_cpus, threads_limit
    threads_fixed, threads_cpus, threads_limit = fixed, cpus, limit


def set_threads_here(int n):
    """Set the number of threads for calls of this Python thread; return what was set before.

    0 stands for none, -1 for the default, whatever is set for the process.
    """
    global threads_here
    cdef int previous = threads_here
    threads_here = n
    return previous


def num_threads():
    """The number of threads that a call of this Python thread uses at most."""
    return num_threads_now()


cdef int num_threads_now() noexcept nogil:
    cdef int threads = threads_here or threads_fixed
    if threads <= 0:
        threads = fastbn_omp_max_threads()
        if threads_cpus > 0:
            threads = min(threads, threads_cpus)
    if threads_limit > 0:
        threads = min(threads, threads_limit)
    return max(threads, 1)


cdef bint avoids_waits() noexcept nogil:
    """Whether calls may use one thread because others waited: not where their number is set."""
    return (threads_here or threads_fixed) <= 0


cdef void note_begin() noexcept nogil:
    """Remember when a call begins that several threads could share."""
    global call_began
    call_began = fastbn_seconds()


cdef int threads_for(Py_ssize_t moved, int most) noexcept nogil:
    """The number of threads for a call that reads and writes so many bytes."""
    global alone_since
    cdef int threads = threads_worth_it(moved, most)
    if threads == 1 or alone <= 0.0 or not avoids_waits():
        return threads
    alone_since = call_began
    return 1


cdef int threads_worth_it(Py_ssize_t moved, int most) noexcept nogil:
    """How many threads so many bytes are worth, if none has to wait for its CPU."""
    cdef Py_ssize_t least = BYTES_PER_THREAD
    if is_shared(moved) and call_began - last_end < SOON:
        least = BYTES_PER_AWAKE_THREAD
    return <int>min(<Py_ssize_t>most, max(moved // least, 1))


cdef bint may_share(Py_ssize_t moved, int most) noexcept nogil:
    """Whether several threads are worth it, and one may take their place."""
    return avoids_waits() and alone <= 0.0 and threads_worth_it(moved, most) > 1


cdef bint is_shared(Py_ssize_t moved) noexcept nogil:
    """Whether a call reads and writes enough for several threads."""
    return moved >= 2 * BYTES_PER_AWAKE_THREAD


cdef void note_shared(int threads, double busy, double part, double idle) noexcept nogil:
    """Add up what sharing saves a call: in a region, this thread was busy for so long, then idle.

    A region of OpenMP ends when all threads have come to its end, and where another process has a
    thread's CPU that takes a slice of the scheduler, many times a small array's time. Then this
    thread has done most of the work: alone it would have been busy for all of it, not for its part.
    """
    global saved
    cdef double by_others = (threads - 1) * busy
    if idle > LONG_WAIT and part > 0.0:
        by_others = busy / part - busy
    saved += by_others - idle


cdef void note_end() noexcept nogil:
    """Remember when it ended, and let the next ones use one thread if sharing has cost much."""
    global last_end, saved, alone, alone_since
    last_end = fastbn_seconds()
    if alone_since > 0.0:
        alone -= last_end - alone_since
        alone_since = 0.0
    elif avoids_waits():
        balance(saved)
    saved = 0.0


cdef void balance(double seconds) noexcept nogil:
    """Add what sharing has saved to the credit or, where it has lost, take that from it."""
    global credit, alone, caution
    credit += min(seconds, MOST_SAVED)
    if credit >= MOST_CREDIT:
        credit, caution = MOST_CREDIT, 0.0
    elif credit < 0.0:
        caution = min(max(2.0 * caution, LEAST_CAUTION), MOST_CAUTION)
        credit, alone = 0.0, -credit * caution
