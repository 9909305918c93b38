# Steps that know no channels: they walk a block piece by piece.

# A step on so many neighbouring elements, from so many bytes of an array on.
ctypedef void (*Piece)(const Job *job, Py_ssize_t at, Py_ssize_t count) noexcept nogil


cdef void walk_pieces(const Job *job, const Block *block, Piece step) noexcept nogil:
    """Take a step on every piece of a block: what a sample has of it, or a row of its matrix."""
    cdef Matrix folded, leftover
    cdef Py_ssize_t n
    if not job.cut.column_layout:
        for n in range(block.n0, block.n1):
            step(job, offset_of(job, block, n), (block.c1 - block.c0) * block.length)
        return
    folded, leftover = folded_matrix(job, block), leftover_matrix(job, block)
    for n in range(block.n0, block.n1):
        step(job, offset_of(job, block, n), folded.len)
    if leftover.rows > 0:
        step(job, offset_of(job, block, block.n1), leftover.len)


cdef void keep(Job *job, cnp.ndarray kept) noexcept:
    """Let the job copy x there, if it is an array."""
    if kept is not None:
        job.kept = cnp.PyArray_BYTES(kept)


cdef void keep_piece(const Job *job, Py_ssize_t at, Py_ssize_t count) noexcept nogil:
    """Copy a piece of x to where it is kept."""
    memcpy(job.kept + at, job.x + at, count * job.itemsize)
