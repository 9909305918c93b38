/* The build and the machine: instruction sets, the cache, OpenMP. */
#ifndef FASTBN_PLATFORM_H
#define FASTBN_PLATFORM_H

#include "kernels.h"

#include <stdint.h>

/* The instruction sets that both have, the best one last, at most `capacity`. Returns their
 * number. */
int fastbn_supported_isas(const fastbn_isa *isas[], int capacity);

/* The size of a cache of the second or the third level; 0 where the system does not tell. */
ptrdiff_t fastbn_cache_bytes(int level);

/* The threads that OpenMP would start; 1 in a build without OpenMP. */
int fastbn_omp_max_threads(void);

/* Ends the idle threads that OpenMP keeps for the calling one, borrowed ones as well; it starts new
 * ones when it needs them. Returns whether that could be done. */
int fastbn_omp_pause(void);

/* Lets the threads of another OpenMP runtime do the work, if the process has loaded it as a
 * library, or with one. Two pools of threads would take turns on the same CPUs: the idle threads of
 * each spin for milliseconds. Returns whether the library has a runtime, which may be the one in
 * use. */
int fastbn_borrow_threads(const char *library);

/* Does every share of some work, below 2^31, on borrowed threads; returns 0 if there are none, and
 * has done nothing then. */
typedef void fastbn_work(void *data, int share);
int fastbn_on_borrowed_threads(fastbn_work *work, void *data, int shares);

/* Numbers from a first one up to an end, below 2^31, that several threads take from both sides. */
typedef struct {
    int64_t first_and_end;
} fastbn_range;

void fastbn_set_range(fastbn_range *range, ptrdiff_t first, ptrdiff_t end);

/* Each returns a number that no other call returns; -1 when only `reserved` ones are left, or
 * fewer. */
ptrdiff_t fastbn_take_first(fastbn_range *range, ptrdiff_t reserved);
ptrdiff_t fastbn_take_last(fastbn_range *range, ptrdiff_t reserved);

/* A clock; it stands still in a build without OpenMP. */
double fastbn_seconds(void);

const char *fastbn_compiler(void);

/* The date of the OpenMP specification, and the file of the library in use where the system tells;
 * "none" in a build without OpenMP. */
const char *fastbn_openmp(void);

#endif
