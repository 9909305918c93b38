# Which thread does which task, and in which order; what results are does not depend on it.

cdef enum:
    NO_TASK = -1
    # The most threads of a region, whatever is set: their ranges lie on the stack.
    THREADS_MAX = 1024
    # Calls that read and write less keep Python's lock: to give it up and take it again would be a
    # part of their time that can be felt.
    LET_OTHERS_RUN_BYTES = 32768
    # How many tasks a thread has at least, if these are long enough: others take the last ones of a
    # thread that is slow. Where the second-level caches have all arrays, a task costs more than
    # that saves.
    TASKS_OF_THREAD = 4
    TASKS_OF_THREAD_IN_L2 = 2
    # From so many bytes of one input, or of two, sums wait for memory, too: interleaved, training
    # then took 1.03 to 1.1 of its time, the backward 0.83 to 1.2, on two cores of a Zen 5.
    INTERLEAVED_BYTES = 50331648
    INTERLEAVED_BYTES_OF_TWO = 29360128


cdef int inputs_of(const Job *job) noexcept nogil:
    """The arrays that a job reads in each walk."""
    return 1 if job.dy == NULL else 2


cdef Py_ssize_t batch_bytes(const Job *job) noexcept nogil:
    """The size of a batch of one array."""
    return job.cut.n * job.cut.c * job.cut.s * job.itemsize


cdef Py_ssize_t array_bytes(const Job *job) noexcept nogil:
    """The size of one array."""
    return job.cut.batches * batch_bytes(job)


cdef Py_ssize_t input_bytes(const Job *job) noexcept nogil:
    """The size of all arrays that a job reads in each walk."""
    return inputs_of(job) * array_bytes(job)


cdef Py_ssize_t group_bytes(const Job *job) noexcept nogil:
    """The bytes that a group of one batch reads."""
    return max(job.cut.n * job.cut.group * job.cut.s * job.itemsize * inputs_of(job), 1)


cdef Py_ssize_t bytes_moved(const Job *job) noexcept nogil:
    """The bytes that all steps of a job read and write."""
    cdef int walks = (job.reduce != NULL) + (job.apply != NULL)
    cdef int further = ((job.residual != NULL) + 2 * (job.raw_dy != NULL) + (job.passed != NULL)
                        + (job.kept != NULL))
    return array_bytes(job) * (inputs_of(job) * walks + (job.apply != NULL) + further)


cdef Py_ssize_t groups_of(const Job *job) noexcept nogil:
    """The groups of all batches."""
    return job.cut.batches * job.cut.groups


cdef bint is_in_l2(const Job *job, int threads) noexcept nogil:
    """Tell whether the second-level caches of so many threads have all arrays."""
    return footprint_bytes(job) <= threads * l2_bytes


cdef Py_ssize_t tasks_for(const Job *job, int threads) noexcept nogil:
    """How many tasks so many threads need, if these are long enough."""
    if threads == 1:
        return 1
    return threads * (TASKS_OF_THREAD_IN_L2 if is_in_l2(job, threads) else TASKS_OF_THREAD)


# ------------------------------------------------------------------ tasks

# One of the tasks that threads have in common. Those of blocks are about `groups` groups, from g0
# on. Where tasks are interleaved, one begins while the thread ends the one `before`; either may be
# NO_TASK. Elsewhere `before` is NO_TASK.
ctypedef void (*Task)(const Job *job, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t t,
                      Py_ssize_t before) noexcept nogil


# All tasks, and the range of them that each thread walks. Tasks that follow each other are
# neighbours in memory: threads whose channels alternated would disturb each other's cache lines,
# pages and prefetches at every border between them.
cdef struct Tasks:
    const Job *job
    Task task
    Py_ssize_t g0, groups
    int threads
    bint backwards                # whether each thread walks its range from the last to the first
    bint interleaved
    int reserved                  # how many tasks of a range no other thread takes
    fastbn_range ranges[THREADS_MAX]
    double busy                   # the seconds for which the calling thread has worked,
    Py_ssize_t done               # and the tasks that it has done


cdef void parallel_for(const Job *job, Task task, Py_ssize_t g0, Py_ssize_t groups,
                       Py_ssize_t count, int threads, bint backwards=False,
                       bint interleaved=False) noexcept nogil:
    """Do all tasks. A parallel region of one thread would cost a microsecond."""
    cdef Tasks tasks
    cdef Tasks *shared = &tasks
    cdef Py_ssize_t i, t, before = NO_TASK
    cdef double start
    threads = <int>min(<Py_ssize_t>threads, count)
    if threads <= 1 or count > INT32_MAX:
        for i in range(count):
            t = count - 1 - i if backwards else i
            task(job, g0, groups, t, before)
            before = t if interleaved else NO_TASK
        if before != NO_TASK:
            task(job, g0, groups, NO_TASK, before)
        return
    tasks.backwards, tasks.interleaved = backwards, interleaved
    tasks.job, tasks.task, tasks.g0, tasks.groups = job, task, g0, groups
    tasks.threads, tasks.busy, tasks.done = min(threads, THREADS_MAX), 0.0, 0
    tasks.reserved = tasks_reserved(job, count, tasks.threads)
    for i in range(tasks.threads):
        fastbn_set_range(&tasks.ranges[i], count * i // tasks.threads,
                         count * (i + 1) // tasks.threads)
    start = fastbn_seconds()
    if not fastbn_on_borrowed_threads(walk_range, shared, tasks.threads):
        for i in prange(tasks.threads, schedule="static", chunksize=1, num_threads=tasks.threads):
            walk_range(shared, i)
    note_shared(tasks.threads, tasks.busy, tasks.done / <double>count,
                fastbn_seconds() - start - tasks.busy)


cdef int tasks_reserved(const Job *job, Py_ssize_t count, int threads) noexcept nogil:
    """How many tasks of a range no other thread takes: to fetch memory takes longer than to wait.

    In place it is a quarter of them, one at least. What the last call has overwritten is in the
    cache of the core that did it, and the cores of some machines have caches of their own: if
    others took tasks each time, that memory would go to and fro. Otherwise it is one where each
    thread may have what its tasks are about in its second-level cache.
    """
    if overwrites_input(job) and footprint_bytes(job) <= LARGER_THAN_CACHES:
        return <int>max(count // (4 * threads), 1)
    return count >= 4 * threads and is_in_l2(job, threads)


cdef void take_turns(const Job *job, Task task, Py_ssize_t count, int threads) noexcept nogil:
    """Do tasks of whole groups, interleaved where the job says so."""
    parallel_for(job, task, 0, count, count, threads, False, job.interleaves)


cdef void walk_range(void *tasks_, int own) noexcept nogil:
    """Do the tasks of a range, then those that come last in ranges that are not done."""
    cdef Tasks *tasks = <Tasks *>tasks_
    cdef Py_ssize_t t, before = NO_TASK, done = 0
    cdef int owner = 0
    cdef double start = fastbn_seconds() if own == 0 else 0.0
    while True:
        t = next_task(tasks, own, &owner)
        if t == NO_TASK:
            break
        tasks.task(tasks.job, tasks.g0, tasks.groups, t, before)
        before = t if tasks.interleaved else NO_TASK
        done += 1
    if before != NO_TASK:
        tasks.task(tasks.job, tasks.g0, tasks.groups, NO_TASK, before)
    if own == 0:  # the calling thread's
        tasks.busy = fastbn_seconds() - start
        tasks.done = done


cdef Py_ssize_t next_task(Tasks *tasks, int own, int *owner) noexcept nogil:
    """Take a task of a thread's own range, then those that come last in the ranges that follow it.

    NO_TASK if all are done. `owner`, 0 before the first task, tells how far away the range is that
    tasks are taken from.
    """
    cdef Py_ssize_t t
    while owner[0] < tasks.threads:
        if owner[0] == 0:
            t = take_task(tasks, own, tasks.backwards, 0)
        else:
            t = take_task(tasks, (own + owner[0]) % tasks.threads, not tasks.backwards,
                          tasks.reserved)
        if t >= 0:
            return t
        owner[0] += 1
    return NO_TASK


cdef Py_ssize_t take_task(Tasks *tasks, int owner, bint last, Py_ssize_t reserved) noexcept nogil:
    """Take the first or the last task of a range; less than 0 if all are reserved."""
    if last:
        return fastbn_take_last(&tasks.ranges[owner], reserved)
    return fastbn_take_first(&tasks.ranges[owner], reserved)


cdef void execute_group(const Job *job, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t t,
                        Py_ssize_t before) noexcept nogil:
    """All steps of a group, by one thread while the group sits in that thread's cache.

    Where tasks are interleaved, its results are left to the next one.
    """
    reduce_beside(job, t, before)
    if t != NO_TASK:
        job.merge(job, t)
        if job.apply != NULL and not job.interleaves:
            apply_group(job, t)


cdef void reduce_beside(const Job *job, Py_ssize_t g, Py_ssize_t before) noexcept nogil:
    """Reduce a group while the results of another are written; either may be NO_TASK.

    The last results of a thread are written by themselves, and make all stores visible.
    """
    cdef Block beside
    cdef Py_ssize_t b
    if before != NO_TASK and (g == NO_TASK or not have_as_many_channels(&job.cut, g, before)):
        apply_group(job, before)
        before = NO_TASK
    if g == NO_TASK:
        return
    for b in range(job.cut.blocks):
        if before != NO_TASK:
            beside = mirrored_block(&job.cut, before, b)
        job.reduce(job, g, b, NULL if before == NO_TASK else &beside)


cdef void apply_group(const Job *job, Py_ssize_t g) noexcept nogil:
    """Write the results of a group, backwards: so the walk begins with what is in the cache."""
    cdef Py_ssize_t b
    for b in range(job.cut.blocks - 1, -1, -1):
        apply_block(job, g, b)


cdef void execute_reduce(const Job *job, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t t,
                         Py_ssize_t before) noexcept nogil:
    job.reduce(job, g0 + t % groups, t // groups, NULL)


cdef void execute_apply(const Job *job, Py_ssize_t g0, Py_ssize_t groups, Py_ssize_t t,
                        Py_ssize_t before) noexcept nogil:
    apply_block(job, g0 + t % groups, t // groups)


cdef void apply_block(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(&job.cut, g, b)
    if job.kept != NULL:
        walk_pieces(job, &block, keep_piece)
    job.apply(job, &block)
    if job.nontemporal:
        isa_in_use.common.fence_nontemporal()
    if job.probe_bits != NULL:
        read_probes(job, &block)


# ------------------------------------------------------------------ a whole job


cdef void execute_round(const Job *job, Py_ssize_t g0, Py_ssize_t groups,
                        int threads) noexcept nogil:
    """The blocks of some groups are divided among the threads, one step after the other."""
    cdef Py_ssize_t g
    cdef Job results = job[0]
    if job.reduce != NULL:
        parallel_for(job, execute_reduce, g0, groups, groups * job.cut.blocks, threads)
        for g in range(g0, g0 + groups):
            job.merge(job, g)
    if job.apply != NULL:
        groups = recut_for_results(&results, groups, threads)
        # Backwards after a walk that has left the ends of its ranges in the caches.
        parallel_for(&results, execute_apply, g0, groups, groups * results.cut.blocks, threads,
                     job.reduce != NULL)


cdef Py_ssize_t recut_for_results(Job *job, Py_ssize_t groups, int threads) noexcept nogil:
    """Cut columns anew for a job's results; return how many groups there are then.

    Runs that are walked one by one have no strips: a thread that takes tasks of another's range
    would write beside it in every row.
    """
    cdef Py_ssize_t tasks = tasks_for(job, threads)
    if has_columns_of_results(job):
        recut_columns(&job.cut, job.itemsize, groups, threads, tasks)
    elif job.cut.column_layout:
        cut_row_layout(&job.cut)
        recut_runs(&job.cut, job.itemsize, tasks)
        groups = groups_of(job)
    return groups


cdef void execute_rounds(const Job *job, int threads) noexcept nogil:
    """Rounds of so many groups that the second walk finds them in the third-level cache."""
    cdef Py_ssize_t r, groups = groups_of(job)
    cdef Py_ssize_t most = max(half_l3_bytes // (2 * group_bytes(job)), 1)
    if job.cut.column_layout:
        most = groups  # strips: they are neighbours in memory, of which caches hold the end anyway
    for r in range(ceil_div(groups, most)):
        execute_round(job, r * most, min(most, groups - r * most), threads)


cdef bint interleaves_groups(const Job *job) noexcept nogil:
    """Tell whether a group is summed while the results of another one are written.

    Non-temporal stores wait for memory and sums do not, as long as caches have what is read;
    ordinary stores would take the bandwidth of these caches that sums need. With small second-level
    caches it is not measured, and done only where the kind of stores is set. The blocks of a run
    that is cut have nearly the same length, so that none of them has less than INTERLEAVED either.
    """
    cdef Py_ssize_t most = INTERLEAVED_BYTES if job.dy == NULL else INTERLEAVED_BYTES_OF_TWO
    return (job.nontemporal and (has_large_l2 or nontemporal_bytes >= 0)
            and job.kernels.moments_beside_results != NULL
            and job.in_float32 and not job.in_float64 and job.mask == NULL
            and not overwrites_input(job)
            and job.raw_dy == NULL and job.passed == NULL
            and (not job.has_gate or job.activation.kind == RELU)
            and (not job.has_epilogue or only_clamps(job))
            and not job.cut.column_layout and job.cut.s >= INTERLEAVED
            and input_bytes(job) <= most)


cdef void find_for_walks(Job *job, int threads) noexcept nogil:
    """Find what all walks over a job's groups need to know, once these are chosen."""
    job.nontemporal = uses_nontemporal(job)
    find_gate_bounds(job, threads)
    if job.valid != NULL and job.cut.groups > 0:
        find_valid(job)


cdef void execute_batches(Job *job, int threads) noexcept nogil:
    """Execute a job on at most so many threads, except for its leftover samples."""
    cdef bint group_by_group
    threads = threads_for(bytes_moved(job), threads)
    if job.cut.column_layout:
        group_columns(&job.cut, threads if job.reduce != NULL else 1)
        if job.out != NULL:
            begin_on_lines(&job.cut, job.out, job.itemsize)
    elif job.reduce != NULL:
        group_runs(&job.cut, job.itemsize, inputs_of(job), threads, tasks_for(job, threads))
    else:
        recut_runs(&job.cut, job.itemsize, tasks_for(job, threads))
    find_for_walks(job, threads)
    group_by_group = job.reduce != NULL and (threads == 1 or job.cut.blocks < 2 or (
        groups_of(job) >= tasks_for(job, threads)
        and group_bytes(job) * threads <= half_l3_bytes))
    job.interleaves = group_by_group and groups_of(job) >= 2 * threads and interleaves_groups(job)
    job.reads_ahead = group_by_group and not job.interleaves and prefetches_groups(job, threads)
    job.finds_cached = (job.reduce == NULL or group_by_group) and finds_in_caches(
        job, threads, group_bytes(job))
    if group_by_group:
        take_turns(job, execute_group, groups_of(job), threads)
    elif job.reduce == NULL:
        execute_round(job, 0, groups_of(job), threads)
    else:
        execute_rounds(job, threads)


cdef void settle_layout(const Job *job, Cut *cut) noexcept nogil:
    """Let a cut of a job's samples have rows where runs are not short and there are no sums."""
    if job.reduce == NULL and cut.column_layout and cut.s >= RUN_MIN_OF_RESULTS:
        cut_row_layout(cut)


cdef Cut leftover_cut(const Job *job) noexcept nogil:
    """How the samples after the batches are cut; their layout may be another."""
    cdef Py_ssize_t s = job.cut.n * job.cut.s // max(job.samples, 1)
    cdef Cut cut = cut_work(1, job.leftover_samples, job.cut.c, s, job.channels_last)
    settle_layout(job, &cut)
    return cut


cdef Job leftover_job(const Job *job) noexcept nogil:
    """The job on the samples after the batches, as a batch of its own."""
    cdef Job leftover = job[0]
    cdef Py_ssize_t batches = job.cut.batches, results = batches * job.cut.c
    cdef Py_ssize_t elements = job.cut.n * job.cut.s, done = array_bytes(job)
    cdef Vector *vectors[8]
    cdef int i
    leftover.cut = leftover_cut(job)
    leftover.count = <double>(leftover.cut.n * leftover.cut.s)
    leftover.x += done
    leftover.first_element += done // job.itemsize
    leftover.dy += 0 if job.dy == NULL else done
    leftover.passed += 0 if job.passed == NULL else done
    leftover.raw_dy += 0 if job.raw_dy == NULL else done
    leftover.y += 0 if job.y == NULL else done
    leftover.residual += 0 if job.residual == NULL else done
    leftover.out += 0 if job.out == NULL else done
    leftover.kept += 0 if job.kept == NULL else done
    leftover.mask += 0 if job.mask == NULL else batches * elements
    vectors[:] = [&leftover.weight, &leftover.mean, &leftover.invstd, &leftover.bias,
                  &leftover.sum_dy, &leftover.sum_dy_xhat, &leftover.gate_weight,
                  &leftover.gate_bias]
    for i in range(8):
        vectors[i].data += batches * vectors[i].batch_stride
    if job.mean_out != NULL:
        leftover.mean_out += results
        leftover.m2_out += results
    if job.invstd_out != NULL:
        leftover.invstd_out += results
    if job.sum_dy_out != NULL:
        leftover.sum_dy_out += results
        leftover.sum_dy_xhat_out += results
    return leftover


cdef int execute(Job *job) except -1:
    """Execute a job.

    Nothing but a lack of memory is raised, and nothing has been written then.
    """
    cdef PyThreadState *state = NULL
    cdef int threads = num_threads_now()
    settle_layout(job, &job.cut)
    allocate(job)
    if bytes_moved(job) >= LET_OTHERS_RUN_BYTES:
        state = PyEval_SaveThread()
    execute_steps(job, threads)
    if state != NULL:
        PyEval_RestoreThread(state)
    release(job)
    return 0


cdef void execute_steps(Job *job, int threads) noexcept nogil:
    """Execute a job for which there is memory."""
    cdef Job leftover
    cdef bint may_be_shared = is_shared(bytes_moved(job))  # smaller ones look at no clock
    if may_be_shared:
        note_begin()
    job.in_float64 = needs_float64(job)
    pass_in_second_walk(job)
    job.tries = what_it_tries(job, threads) if may_be_shared else NOTHING
    if job.tries != NOTHING:
        job.trial = trial_with(key_of(job, threads), calls_of_way(job))
        job.way = way_of(job.trial, likely_way(job))
    if job.tries == THREADS and job.way == 1:
        threads = 1
    job.schedule(job, threads)
    if job.leftover_samples > 0:
        leftover = leftover_job(job)
        leftover.schedule(&leftover, threads)
    if may_be_shared:
        note_end()
    if job.tries != NOTHING:
        note_call(job.trial, job.way, last_end - call_began)


cdef int allocate(Job *job) except -1:
    """Get the memory for partial sums, if there are any."""
    cdef Py_ssize_t blocks
    if job.reduce == NULL:
        return 0
    blocks = max(job.cut.batches * job.cut.blocks, leftover_cut(job).blocks)
    job.partial_sums = <double *>malloc((2 * job.cut.c * blocks + 1) * sizeof(double))
    if job.mask != NULL:
        job.valid = <BlockValid *>malloc((blocks + 1) * sizeof(BlockValid))
        job.counts = <double *>malloc((job.cut.batches + 1) * sizeof(double))
    if job.has_gate:
        job.gate_bounds = <double *>malloc((2 * job.cut.c * job.cut.batches + 1) * sizeof(double))
    if (job.partial_sums == NULL or job.has_gate and job.gate_bounds == NULL
            or job.mask != NULL and (job.valid == NULL or job.counts == NULL)):
        release(job)
        raise MemoryError("no memory for the partial sums of the blocks")
    return 0


cdef void release(Job *job) noexcept:
    free(job.partial_sums)
    free(job.valid)
    free(job.counts)
    free(job.gate_bounds)
