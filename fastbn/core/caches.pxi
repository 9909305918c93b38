# The sizes of the caches, as far as they count.

# The second-level cache of a core; 0 where the system does not tell.
cdef Py_ssize_t l2_bytes = fastbn_cache_bytes(2)

cdef enum:
    # The third-level cache where the system does not tell.
    L3_BYTES_DEFAULT = 16777216
    # No cache counts for more. A virtual machine may report the cache of a whole socket, of which
    # its neighbours leave it a part: on one that reported 480 MiB, non-temporal copies won from 40
    # to 48 MiB on, and 48 is half of this.
    LARGER_THAN_CACHES = 100663296

# The third-level cache.
cdef Py_ssize_t l3_bytes = min(fastbn_cache_bytes(3) or L3_BYTES_DEFAULT, LARGER_THAN_CACHES)

# What all threads together walk twice should be smaller than this, since others use the cache, too.
cdef Py_ssize_t half_l3_bytes = l3_bytes // 2
