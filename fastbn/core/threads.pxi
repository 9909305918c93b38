# How many threads a call uses.

cdef extern from *:
    """
    #if defined(_MSC_VER)
    #  define FASTBN_THREAD_LOCAL __declspec(thread)
    #else
    #  define FASTBN_THREAD_LOCAL _Thread_local
    #endif
    static FASTBN_THREAD_LOCAL int fastbn_threads_here;
    static FASTBN_THREAD_LOCAL Py_ssize_t fastbn_calls_alone, fastbn_next_alone;
    static FASTBN_THREAD_LOCAL double fastbn_last_end;
    """
    # Each of these belongs to the calling thread of Python, which has OpenMP threads of its own.
    # The number of threads that is set for its calls; 0 for none, THREADS_DEFAULT for the default.
    int threads_here "fastbn_threads_here"
    # The calls that shall use one thread, and how many it will be when one has to wait for a CPU.
    Py_ssize_t calls_alone "fastbn_calls_alone"
    Py_ssize_t next_alone "fastbn_next_alone"
    # When the last call ended that several threads could have shared.
    double last_end "fastbn_last_end"


cdef enum:
    THREADS_DEFAULT = -1
    # With less to read and write, a thread brings a few microseconds at best, and costs
    # milliseconds where another process has its CPU.
    BYTES_PER_THREAD = 524288
    # Where such calls follow each other, OpenMP's threads have not gone to sleep: less is enough.
    BYTES_PER_AWAKE_THREAD = 131072
    # The calls that use one thread after one whose threads had to wait for a CPU: few after a rare
    # wait, twice as many after each that comes soon again.
    FEWEST_ALONE = 64
    MOST_ALONE = 2048


# The seconds from which on a wait is one for a CPU: several times what waking a thread takes, less
# than a scheduler's slice.
cdef double LONG_WAIT = 1e-3

# The seconds for which a call counts as the one before: OpenMP's threads stay awake for longer.
cdef double SOON = 2e-4

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


cdef int threads_for(Py_ssize_t moved, int most) noexcept nogil:
    """The number of threads for a call that reads and writes so many bytes."""
    global calls_alone, next_alone
    cdef Py_ssize_t least = BYTES_PER_THREAD
    cdef int threads
    if is_shared(moved) and fastbn_seconds() - last_end < SOON:
        least = BYTES_PER_AWAKE_THREAD
    threads = <int>min(<Py_ssize_t>most, max(moved // least, 1))
    if threads == 1 or not avoids_waits():
        return threads
    if calls_alone > 0:
        calls_alone -= 1
        return 1
    next_alone -= next_alone > 0
    return threads


cdef bint is_shared(Py_ssize_t moved) noexcept nogil:
    """Whether a call reads and writes enough for several threads."""
    return moved >= 2 * BYTES_PER_AWAKE_THREAD


cdef void note_end(Py_ssize_t moved) noexcept nogil:
    """Remember when a call ended."""
    global last_end
    if is_shared(moved):
        last_end = fastbn_seconds()


cdef void note_wait(double idle, double busy) noexcept nogil:
    """Let the next calls use one thread if this call would have been faster so.

    A region of OpenMP ends when all threads have come to its end, and where another process has a
    thread's CPU that takes a slice of the scheduler, many times a small array's time. Such waits
    should be rarer than one call in a hundred.
    """
    global calls_alone, next_alone
    if avoids_waits() and idle > LONG_WAIT and idle > busy:
        calls_alone = max(next_alone, FEWEST_ALONE)
        next_alone = min(2 * calls_alone, MOST_ALONE)
