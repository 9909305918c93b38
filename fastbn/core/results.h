/* Memory for results: what arrays have given back is kept for new ones of the same size. */
#ifndef FASTBN_RESULTS_H
#define FASTBN_RESULTS_H

#include <Python.h>

#include <numpy/ndarraytypes.h>

/* Smaller blocks are left to malloc, which keeps them on a heap; NumPy asks for huge pages from
 * this size on, which take next to no time to be offered to the system. */
#define FASTBN_SMALLEST_BLOCK ((size_t)4 << 20)

/* The allocator of results, by NumPy's protocol. Memory comes from `below`, another one, and goes
 * back to it. */
PyDataMem_Handler *fastbn_results_handler(PyDataMem_Handler *below);

/* Keeps so many bytes of free blocks at most, at first 0; what is more goes back. Not on Windows,
 * where nothing is kept. */
void fastbn_limit_free_blocks(size_t bytes);

/* Gives all free blocks back to the system; returns how many bytes they had. */
size_t fastbn_release_free_blocks(void);

#endif
