# The valid positions of a mask in each block.


cdef BlockValid valid_of(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """The valid positions of block b of group g."""
    cdef BlockValid valid
    cdef Block block = block_of(&job.cut, g, b)
    if job.mask != NULL:
        return job.valid[block.batch * job.cut.blocks + b]
    valid.count = samples_of(job, &block) * block.length
    valid.first = sample_of(job, &block, block.n0) * job.cut.s + block.s0
    return valid


cdef double count_of(const Job *job, Py_ssize_t batch) noexcept nogil:
    """The valid positions of a batch: the elements of a channel that its sums are over."""
    return job.count if job.counts == NULL else job.counts[batch]


cdef void find_valid(const Job *job) noexcept nogil:
    """Look up the valid positions of all blocks, and count those of each batch."""
    cdef Py_ssize_t k, b
    cdef BlockValid valid
    for k in range(job.cut.batches):
        job.counts[k] = 0.0
        for b in range(job.cut.blocks):
            valid = valid_in_mask(job, k * job.cut.groups, b)
            job.valid[k * job.cut.blocks + b] = valid
            job.counts[k] += <double>valid.count


cdef BlockValid valid_in_mask(const Job *job, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    cdef BlockValid valid
    cdef Block block = block_of(&job.cut, g, b)
    cdef Py_ssize_t _n, count, length = block.length, samples = samples_of(job, &block)
    cdef const unsigned char *mask = mask_of(job, &block, block.n0)
    cdef const void *found
    valid.count, valid.first = 0, -1
    if length == job.cut.s:  # the samples of the mask lie one behind the other
        length, samples = length * samples, 1
    for _n in range(samples):
        count = isa_in_use.common.count_valid(mask, length)
        if count > 0 and valid.first < 0:
            found = memchr(mask, 255, length)
            valid.first = <const unsigned char *>found - job.mask
        valid.count += count
        mask += job.cut.s
    return valid
