# Trials: which of two ways to do the same is faster, as the first calls tell. Each thread of Python
# has its own, so that calls need no lock.

cdef extern from *:
    """
    typedef struct {
        uint64_t key;
        double least[2];
        int calls, calls_of_way, calls_until_renewal;
    } fastbn_trial;
    enum { FASTBN_TRIALS = 128 };
    static FASTBN_THREAD_LOCAL fastbn_trial fastbn_trials[FASTBN_TRIALS];
    """
    ctypedef struct Trial "fastbn_trial":
        uint64_t key              # a hash of what is done
        double least[2]           # the least seconds that each way has taken
        int calls                 # since it began; less than 0 while nothing is tried yet
        int calls_of_way          # the calls that try a way, of which the first half is not timed
        int calls_until_renewal   # when both are tried again
    enum:
        TRIALS "FASTBN_TRIALS"
    # Each at one of the places that its key tells; one whose place another takes begins anew.
    Trial *trials "fastbn_trials"

cdef enum:
    PLACES_OF_KEY = 4
    # After so many calls both are tried again: what the machine's other users do may have changed.
    # The first time it is after fewer, as caches may have held something else in the first trial.
    CALLS_UNTIL_RENEWAL = 1024
    CALLS_UNTIL_FIRST_RENEWAL = 128


cdef Trial *trial_with(uint64_t key, int calls_of_way) noexcept nogil:
    """The trial of this thread with a key, which is not 0."""
    cdef Trial *places = &trials[(key >> 32) % (TRIALS // PLACES_OF_KEY) * PLACES_OF_KEY]
    cdef Trial *trial = &places[key % PLACES_OF_KEY]
    cdef int i
    for i in range(PLACES_OF_KEY):
        if places[i].key == key:
            return &places[i]
        if places[i].key == 0:
            trial = &places[i]
    # The first calls of all find memory that nobody has touched, and caches without it.
    trial.key, trial.calls, trial.calls_of_way = key, -calls_of_way, calls_of_way
    trial.calls_until_renewal = CALLS_UNTIL_FIRST_RENEWAL
    return trial


cdef void mix(uint64_t *key, uint64_t value) noexcept nogil:
    """Let a key depend on a value."""
    key[0] = (key[0] ^ value) * <uint64_t>0x9E3779B97F4A7C15
    key[0] ^= key[0] >> 29


cdef int way_of(const Trial *trial, int likely) noexcept nogil:
    """The way, 0 or 1, of the next call: the likely one is tried first, then the other one."""
    if trial.calls < 2 * trial.calls_of_way:
        return likely if trial.calls < trial.calls_of_way else 1 - likely
    if trial.least[0] == trial.least[1]:  # a clock may stand still
        return likely
    return trial.least[1] < trial.least[0]


cdef void note_call(Trial *trial, int way, double seconds) noexcept nogil:
    """Note how long the next call has taken, in the way that it was to take."""
    cdef int call = trial.calls % trial.calls_of_way
    if 0 <= trial.calls < 2 * trial.calls_of_way:
        if call == 0:
            trial.least[way] = INFINITY
        if call >= trial.calls_of_way // 2:
            trial.least[way] = min(trial.least[way], seconds)
    trial.calls += 1
    if trial.calls == trial.calls_until_renewal:
        trial.calls, trial.calls_until_renewal = 0, CALLS_UNTIL_RENEWAL
