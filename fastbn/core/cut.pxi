# How the work is cut: arithmetic on shapes.
#
# An array is one or more batches, each with statistics of its own, of n samples of c channels of s
# elements each. Every batch is cut in the same way. It has one of two layouts.
#
# Row layout: a channel of a sample is one run of memory. Short runs of neighbouring channels are
# walked together, as a group.
#
# Column layout: memory is seen as a matrix whose columns belong to one channel each: the first s
# columns to the first channel, the next s to the second, and so on. Channels-last arrays are such
# matrices, of one column per channel, and so are NCHW arrays of few elements per channel and
# sample, or of more where there are many samples. If the matrix is narrow, several of its rows are
# folded into one. Columns are walked in strips: a group of channels is a strip of columns.
#
# A block is what one thread sums into one partial sum for each channel of a group. The blocks and
# the order in which they merge depend on the shape alone. Groups depend on the number of threads,
# too, and so do the blocks of results where these are cut anew; but no result depends on them.

cdef enum:
    # Elements of a channel that are summed before they merge: few enough for the rounding of the
    # sums not to matter in float64, enough for the merge to cost nothing.
    ROW_LAYOUT_BLOCK = 32768
    # Rows of a matrix that are summed before they merge, or down to half as many; more where there
    # are many. Of rows that have RUN_MIN elements of a channel or more: so many of these, but no
    # fewer than so many rows, or half as many.
    COLUMN_LAYOUT_BLOCK = 512
    COLUMN_LAYOUT_BLOCK_ELEMENTS = 4096
    COLUMN_LAYOUT_BLOCK_MIN = 64
    COLUMN_LAYOUT_BLOCKS_MAX = 256
    # The columns of a strip. The last one may have a cache line more, which COLUMNS allows for.
    STRIP = 512
    # A group of channels that is walked twice should stay in a cache of the second level, but its
    # runs should not be much shorter than a page.
    GROUP_BYTES = 524288
    GROUP_RUN_BYTES = 2048
    # A group of a single sample, no sums of which wait for the next one, may have more channels
    # than kernels take at a time, up to so many bytes.
    SAMPLE_BYTES = 131072
    # A group that is walked once may have long runs, and coefficients that serve so many elements
    # of a channel or, in the column layout, so many rows.
    LONG_RUN_BYTES = 524288
    COEFFICIENT_ELEMENTS = 1024
    COEFFICIENT_ROWS = 64
    # Shorter runs are columns in any case.
    RUN_MIN = LANES
    # Shorter ones are columns for sums where 3 n > 2 s: what a run costs the row layout beside its
    # elements, a column costs the column layout. So training takes 0.3 to 0.9 of what it takes in
    # rows, on two cores of a Zen 3.
    RUN_MIN_OF_SUMS = 129
    # From this length on, a job without sums has the row layout.
    RUN_MIN_OF_RESULTS = 48
    # From this length on, results after sums in columns are walked run by run, unless rows are
    # folded: a run needs no table of coefficients.
    RUN_MIN_AFTER_SUMS = 64
    # The columns of a folded row at most. Narrow rows are folded since a row that is added to sums
    # in memory waits for the one before it.
    FOLDED_WIDTH = 256
    # Where there are few rows, an eighth of them is folded into one at most, or as many as have so
    # many columns, if that is more.
    FOLDED_WIDTH_LEAST = 96
    # Where a mask leaves out whole rows, rows of more channels are unfolded again.
    MASKED_WIDTH = 64
    # A few rows are several blocks, too: of so many elements, if rows are folded, or else of so
    # many rows, if that makes four blocks, and no row is wider than a strip; wide ones have strips.
    # Four such blocks took 0.7 to 1.02 of the time that strips took, on two cores of a Zen 5.
    FOLDED_BLOCK_ELEMENTS = 32768
    SHORT_BLOCK = 96
    CACHE_LINE = 64


cdef struct Cut:
    bint column_layout
    Py_ssize_t batches
    Py_ssize_t n, c, s
    Py_ssize_t group, groups      # channels that are walked together; groups of all channels
    Py_ssize_t period             # channels after which groups begin anew
    Py_ssize_t earlier            # channels by which groups, but the first one, begin earlier
    Py_ssize_t block_n            # samples, or folded rows of the matrix, of a block
    Py_ssize_t block_s            # elements of a run that belong to a block
    Py_ssize_t blocks_along_s     # 1, or more where runs are longer than a block
    Py_ssize_t blocks             # of each group
    Py_ssize_t fold               # rows of the matrix in a folded one; 1 in the row layout
    Py_ssize_t width              # columns of a folded row; 0 in the row layout
    # Rows behind the last folded one, which go with the last block; 0 in the row layout.
    Py_ssize_t leftover_rows


# A block of a group: the channels [c0, c1) of the samples, or folded rows, [n0, n1) of a batch. In
# the row layout it has the elements [s0, s0 + length) of each run, in the column layout all columns
# of the channels, and `leftover_rows` more rows of the matrix.
cdef struct Block:
    Py_ssize_t batch, n0, n1, c0, c1, s0, length, leftover_rows


cdef Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef Cut cut_work(Py_ssize_t batches, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s,
                  bint channels_last) noexcept nogil:
    """Cut batches of n samples into blocks; the groups are chosen later."""
    cdef Cut cut
    memset(&cut, 0, sizeof(Cut))
    if channels_last:
        n, s = n * s, 1
    cut.batches, cut.n, cut.c, cut.s, cut.period = batches, n, c, s, c
    if s < RUN_MIN or s < RUN_MIN_OF_SUMS and 2 * s < 3 * n:
        cut_column_layout(&cut)
    else:
        cut_row_layout(&cut)
    return cut


cdef void cut_row_layout(Cut *cut) noexcept nogil:
    cdef Py_ssize_t s = cut.s
    cut.column_layout, cut.fold, cut.width, cut.leftover_rows = False, 1, 0, 0
    cut.group = 1
    cut.block_n = max(ROW_LAYOUT_BLOCK // max(s, 1), 1)
    # Long runs are cut at whole steps, into blocks of nearly the same length.
    cut.block_s = ceil_div(s, max(ceil_div(s, ROW_LAYOUT_BLOCK), 1))
    cut.block_s = max(ceil_div(cut.block_s, LANES) * LANES, LANES)
    cut.blocks_along_s = ceil_div(s, cut.block_s)
    cut.blocks = ceil_div(cut.n, cut.block_n) * cut.blocks_along_s


cdef void cut_column_layout(Cut *cut) noexcept nogil:
    cdef Py_ssize_t width = cut.c * cut.s, height
    cut.column_layout = True
    cut.fold = fold_of(max(width, 1), cut.n)
    cut.width = width * cut.fold
    height = cut.n // cut.fold
    cut.leftover_rows = cut.n % cut.fold
    cut.block_n = ceil_div(height, blocks_of(height, rows_of_block(cut, height)))
    # Two rows that follow each other stay in one block, if they are not folded: where they lie
    # equally far on both sides of the mean, the sums of a block are exact then.
    cut.block_n += cut.block_n % 2
    cut.blocks = 0 if cut.n * cut.s == 0 else max(ceil_div(height, max(cut.block_n, 1)), 1)
    cut.block_s = cut.s
    cut.blocks_along_s = 1


cdef Py_ssize_t fold_of(Py_ssize_t width, Py_ssize_t rows) noexcept nogil:
    """How many of the rows of a matrix are folded into one: if possible, of whole steps."""
    cdef Py_ssize_t fold, most = min(FOLDED_WIDTH // width, rows // 8)
    most = max(most, FOLDED_WIDTH_LEAST // width, 1)
    for fold in range(most, 0, -1):
        if width * fold % LANES == 0:
            return fold
    return most


cdef Py_ssize_t blocks_of(Py_ssize_t height, Py_ssize_t rows) noexcept nogil:
    """How many blocks to aim at for so many rows in each: a power of 2, not above a limit.

    Threads, of which there mostly are 2, 4 or 8, then have nearly the same share of the rows each.
    """
    cdef Py_ssize_t blocks = 1
    while blocks * rows < height and blocks < COLUMN_LAYOUT_BLOCKS_MAX:
        blocks *= 2
    return blocks


cdef Py_ssize_t rows_of_block(const Cut *cut, Py_ssize_t height) noexcept nogil:
    """The folded rows that are summed before they merge, if there are not very many."""
    cdef Py_ssize_t rows
    if cut.s < RUN_MIN:
        if cut.fold > 1:
            rows = max(ceil_div(height, 4), FOLDED_BLOCK_ELEMENTS // max(cut.width, 1))
        elif height >= 4 * SHORT_BLOCK and cut.width <= STRIP:
            rows = ceil_div(height, 4)
        else:
            rows = height
        return min(rows, COLUMN_LAYOUT_BLOCK)
    rows = max(COLUMN_LAYOUT_BLOCK_ELEMENTS // cut.s, COLUMN_LAYOUT_BLOCK_MIN)
    # Wide rows have strips enough for many threads.
    rows = min(rows * max(cut.width // (4 * STRIP), 1), max(rows, COLUMN_LAYOUT_BLOCK))
    return max(rows // cut.fold, 1)


cdef void group_runs(Cut *cut, Py_ssize_t itemsize, int inputs, int threads,
                     Py_ssize_t tasks) noexcept nogil:
    """Choose how many channels are summed together in the row layout."""
    cdef Py_ssize_t run = max(cut.s * itemsize, 1)
    cdef Py_ssize_t long_runs = ceil_div(GROUP_RUN_BYTES, run)
    cdef Py_ssize_t most = GROUP
    if cut.n == 1:
        most = max(min(SAMPLE_BYTES // (run * inputs), STRIP), GROUP)
    cut.group = min(max(GROUP_BYTES // max(cut.n * run * inputs, 1), long_runs), most)
    if threads > 1:  # enough groups for all threads to be busy to the end, if runs stay long
        cut.group = min(cut.group, max(cut.batches * cut.c // tasks, long_runs))
        cut.group = min(cut.group, ceil_div(cut.batches * cut.c, threads))
    if cut.blocks_along_s > 1:  # a block of a channel does not end where the next channel begins
        cut.group = 1
    cut.group = max(cut.group, 1)
    cut.groups = ceil_div(cut.c, cut.group)
    if cut.batches == 1 and cut.groups > 1:  # as many groups for every thread, of nearly one size
        cut.groups = ceil_div(cut.groups, threads) * threads
        cut.group = ceil_div(cut.c, cut.groups)
        cut.groups = ceil_div(cut.c, cut.group)


cdef void recut_runs(Cut *cut, Py_ssize_t itemsize, Py_ssize_t tasks) noexcept nogil:
    """Cut the row layout, where no sums are asked for, into blocks of long stretches of memory."""
    cdef Py_ssize_t run = max(cut.s * itemsize, 1), samples, blocks
    cut.group = 1
    if cut.blocks_along_s <= 1:
        # All channels of as many samples as are a long stretch; for the threads' sake of fewer
        # samples and, where coefficients would not serve enough elements, of fewer channels.
        cut.group = max(min(LONG_RUN_BYTES // run, min(cut.c, STRIP)), 1)
        samples = cut.n * cut.batches * ceil_div(cut.c, cut.group) // tasks
        samples = min(LONG_RUN_BYTES // (cut.group * run), samples)
        cut.block_n = max(samples, COEFFICIENT_ELEMENTS // max(cut.s, 1), 1)
        blocks = max(cut.batches * ceil_div(cut.n, cut.block_n), 1)
        cut.group = max(min(cut.group, ceil_div(cut.c, ceil_div(tasks, blocks))), 1)
    cut.groups = ceil_div(cut.c, cut.group)
    cut.blocks = ceil_div(cut.n, cut.block_n) * cut.blocks_along_s


cdef void group_columns(Cut *cut, int threads) noexcept nogil:
    """Choose how wide the strips of the column layout are."""
    cdef Py_ssize_t most = max(STRIP // (max(cut.s, 1) * cut.fold), 1)
    cdef Py_ssize_t strips = max(ceil_div(cut.c, most), 1)
    cdef Py_ssize_t step = LANES if cut.s < LANES else 1  # channels
    # Enough strips for all threads, if there are few blocks. A folded row is one strip.
    if cut.batches * cut.blocks < 2 * threads and threads > 1 and cut.fold == 1:
        strips = max(strips, ceil_div(2 * threads, max(cut.batches * cut.blocks, 1)))
    # Strips have nearly the same width, in whole steps.
    cut.group = max(min(ceil_div(ceil_div(cut.c, strips), step) * step, most), 1)
    cut.groups = ceil_div(cut.c, cut.group)


cdef void recut_columns(Cut *cut, Py_ssize_t itemsize, Py_ssize_t groups, int threads,
                        Py_ssize_t tasks) noexcept nogil:
    """Cut so many groups of columns, where no sums are asked for, into blocks of long stretches."""
    cdef Py_ssize_t wanted, shares, height = cut.n // cut.fold
    cdef Py_ssize_t row = cut.group * cut.s * cut.fold * itemsize
    cut.blocks = max(ceil_div(height * row, LONG_RUN_BYTES), 1)
    if threads > 1:  # enough blocks for all of them, if coefficients still serve a few rows
        wanted = min(tasks, max(height // (2 * COEFFICIENT_ROWS * threads), 1) * threads)
        cut.blocks = max(cut.blocks, min(ceil_div(wanted, max(groups, 1)),
                                         ceil_div(height, COEFFICIENT_ROWS)))
        # The same share of the rows for each thread, which it may have in its caches.
        shares = ceil_div(cut.blocks, threads) * threads
        if shares * COEFFICIENT_ROWS <= height:
            cut.blocks = shares
    cut.block_n = max(ceil_div(height, cut.blocks), 1)
    cut.blocks = 0 if cut.n * cut.s == 0 else max(ceil_div(height, cut.block_n), 1)


cdef void begin_on_lines(Cut *cut, const char *out, Py_ssize_t itemsize) noexcept nogil:
    """Let strips begin on cache lines of the output: two threads shall not write to one line."""
    cdef Py_ssize_t lead = <Py_ssize_t>(<size_t>out % CACHE_LINE) // itemsize
    if cut.groups > 1 and cut.s == 1 and cut.c * itemsize % CACHE_LINE == 0 and lead < cut.group:
        cut.earlier = lead


cdef Block block_of(const Cut *cut, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """Block b of group g; the groups of the first batch come first, then those of the next."""
    cdef Block block
    cdef Py_ssize_t blocks_along_s = max(cut.blocks_along_s, 1), row = b // blocks_along_s
    cdef Py_ssize_t first = 0, groups = cut.groups
    block.batch = g // cut.groups
    g -= block.batch * cut.groups
    if cut.period < cut.c:
        groups = ceil_div(cut.period, cut.group)
        first = g // groups * cut.period
        g %= groups
    block.c0 = first + max(g * cut.group - cut.earlier, 0)
    block.c1 = first + (cut.period if g == groups - 1 else (g + 1) * cut.group - cut.earlier)
    block.n0 = row * cut.block_n
    block.n1 = min(block.n0 + cut.block_n, cut.n // cut.fold)
    block.s0 = (b - row * blocks_along_s) * cut.block_s
    block.length = min(cut.block_s, cut.s - block.s0)
    block.leftover_rows = 0
    if cut.column_layout and b == cut.blocks - 1:
        block.leftover_rows = cut.leftover_rows
    return block


cdef Block mirrored_block(const Cut *cut, Py_ssize_t g, Py_ssize_t b) noexcept nogil:
    """Of the row layout: what lies as far from the ends of samples and runs as block b from their
    beginnings."""
    cdef Block block = block_of(cut, g, b)
    block.n0, block.n1 = cut.n - block.n1, cut.n - block.n0
    block.s0 = cut.s - block.s0 - block.length
    return block


cdef bint have_as_many_channels(const Cut *cut, Py_ssize_t g, Py_ssize_t h) noexcept nogil:
    cdef Block one = block_of(cut, g, 0), other = block_of(cut, h, 0)
    return one.c1 - one.c0 == other.c1 - other.c0
