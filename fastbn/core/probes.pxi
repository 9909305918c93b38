# Elements of an array, its probes, by which a change of the array is noticed.

# Where the probes lie: one in each of so many equal parts, at no regular distance, since a regular
# one may be a multiple of a row's length, and borders of images are often alike.

cdef double probe_places[PROBES]    # as fractions of the elements of an array


cdef void choose_probe_places() noexcept:
    cdef int i
    for i in range(PROBES):
        probe_places[i] = (i + fmod(i * 0.6180339887498949, 1.0)) / PROBES


choose_probe_places()


cdef Py_ssize_t probed_element(int i, Py_ssize_t size) noexcept nogil:
    """The i-th probe of so many elements; if these are few, each is one."""
    return i if size <= PROBES else <Py_ssize_t>(probe_places[i] * <double>size)


cdef int choose_elements(Py_ssize_t size, Py_ssize_t *elements) noexcept:
    """Choose the probes among so many elements; return how many."""
    cdef int i, probes = <int>min(size, <Py_ssize_t>PROBES)
    for i in range(probes):
        elements[i] = probed_element(i, size)
    return probes


cdef int spread(cnp.ndarray x, Py_ssize_t *offsets) noexcept:
    """Choose elements of x, as bytes from its first one; return how many."""
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef int i, probes = choose_elements(cnp.PyArray_SIZE(x), offsets)
    if layout_of(x) != UNFIT:
        for i in range(probes):
            offsets[i] *= itemsize
    else:
        for i in range(probes):
            offsets[i] = offset_of_element(x, offsets[i])
    return probes


cdef enum:
    MASK_PARTS = 512              # whose valid positions are counted
    SHORTEST_MASK_PART = 1024     # positions


cdef struct ValidPositions:
    const unsigned char *ones     # of a boolean mask: 1 at valid positions, 0 at invalid ones
    Py_ssize_t size
    Py_ssize_t part_size          # positions of a part, of which the last one may have fewer
    Py_ssize_t counts[MASK_PARTS]
    # Where the search is: in which part, how many are valid up to its end, from which position on,
    # and how many are valid before that.
    Py_ssize_t part, up_to_end, position, before


cdef Py_ssize_t count_in_parts(ValidPositions *valid, cnp.ndarray mask) noexcept:
    """Count the valid positions of a C-contiguous boolean mask; begin a search."""
    cdef Py_ssize_t start, part = 0, total = 0
    valid.ones, valid.size = <const unsigned char *>cnp.PyArray_BYTES(mask), cnp.PyArray_SIZE(mask)
    valid.part_size = max((valid.size + MASK_PARTS - 1) // MASK_PARTS, SHORTEST_MASK_PART)
    for start in range(0, valid.size, valid.part_size):
        valid.counts[part] = isa_in_use.common.count_valid(
            valid.ones + start, min(valid.part_size, valid.size - start))
        total += valid.counts[part]
        part += 1
    valid.part, valid.up_to_end, valid.position, valid.before = -1, 0, 0, 0
    return total


cdef Py_ssize_t find_valid_position(ValidPositions *valid, Py_ssize_t n) noexcept:
    """The position that n valid ones come before; n is at least that of the last search."""
    cdef Py_ssize_t position, count
    while n >= valid.up_to_end:
        valid.part += 1
        valid.position, valid.before = valid.part * valid.part_size, valid.up_to_end
        valid.up_to_end += valid.counts[valid.part]
    while valid.position + 8 <= valid.size:
        count = valid_of_eight(valid.ones + valid.position)
        if n < valid.before + count:
            break
        valid.position += 8
        valid.before += count
    position, count = valid.position, valid.before
    while count < n or valid.ones[position] == 0:
        count += valid.ones[position]
        position += 1
    return position


cdef Py_ssize_t valid_of_eight(const unsigned char *ones) noexcept:
    """How many of eight positions are valid: the sum of their bytes."""
    cdef cnp.npy_uint64 bytes
    memcpy(&bytes, ones, 8)
    return <Py_ssize_t>((bytes * <cnp.npy_uint64>0x0101010101010101) >> 56)


cdef int spread_over_valid(cnp.ndarray x, cnp.ndarray mask, Py_ssize_t *offsets) noexcept:
    """Choose elements of x at valid positions of a boolean mask: nobody reads the others.

    They are counted with the channels last, so that neighbouring probes are of several channels.
    """
    cdef ValidPositions valid
    cdef Py_ssize_t channels = cnp.PyArray_DIMS(x)[1], channel, position
    cdef int i, probes = choose_elements(count_in_parts(&valid, mask) * channels, offsets)
    for i in range(probes):
        position = find_valid_position(&valid, offsets[i] // channels)
        channel = offsets[i] % channels
        offsets[i] = (offset_of_element(x, position, skip_channels=True)
                      + channel * cnp.PyArray_STRIDES(x)[1])
    return probes


cdef Py_ssize_t offset_of_element(cnp.ndarray array, Py_ssize_t element,
                                  bint skip_channels=False) noexcept:
    """The bytes from an array's first element to that of a number, counted in C order."""
    cdef const cnp.npy_intp *shape = cnp.PyArray_DIMS(array)
    cdef const cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    cdef Py_ssize_t offset = 0
    cdef int axis
    for axis in range(cnp.PyArray_NDIM(array) - 1, -1, -1):
        if axis == 1 and skip_channels:
            continue
        offset += element % shape[axis] * strides[axis]
        element //= shape[axis]
    return offset


cdef uint64_t bits_of(const char *element, Py_ssize_t itemsize) noexcept nogil:
    """An element as an integer. The sizes are constants, so that each copy is an instruction."""
    cdef uint64_t bits = 0
    if itemsize == 4:
        memcpy(&bits, element, 4)
    elif itemsize == 2:
        memcpy(&bits, element, 2)
    else:
        memcpy(&bits, element, 8)
    return bits


cdef void read_bits(cnp.ndarray x, const Py_ssize_t *offsets, int count, uint64_t *bits) noexcept:
    """Read some elements."""
    cdef const char *start = cnp.PyArray_BYTES(x)
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
    cdef int i
    for i in range(count):
        bits[i] = bits_of(start + offsets[i], itemsize)


# ------------------------------------------------------------------ read by the threads of a job

cdef bint reads_probes(const Job *job) noexcept:
    """Tell whether the threads that write an output shall read its probes, too.

    If the calling thread did, the cores of the others would have to take their lines back from it
    in the next forward in place. Where the caches do not hold the output, that is no matter.
    """
    return (is_shared(bytes_moved(job)) and array_bytes(job) <= LARGER_THAN_CACHES
            and num_threads_now() > 1)


cdef void read_probes(const Job *job, const Block *block) noexcept nogil:
    """Read the probes of a block's output, which mostly is in the caches of this thread's core."""
    cdef Py_ssize_t row = job.cut.c * job.cut.s * job.cut.fold
    cdef Py_ssize_t len = (block.c1 - block.c0) * block.length * job.cut.fold
    cdef Py_ssize_t extent = samples_of(job, block) * job.cut.c * job.cut.s
    cdef Py_ssize_t start = offset_of(job, block, block.n0), at
    cdef Py_ssize_t first = job.first_element + start // job.itemsize
    cdef int i
    # In each of PROBES equal parts lies one: there are more elements than that.
    for i in range(max(first * PROBES // job.probed - 1, 0), PROBES):
        at = probed_element(i, job.probed) - first
        if at >= extent:
            return
        if at >= 0 and at % row < len:
            job.probe_bits[i] = bits_of(job.out + start + at * job.itemsize, job.itemsize)
