/* The build and the machine: instruction sets, the cache, OpenMP. */
#ifndef FASTBN_PLATFORM_H
#define FASTBN_PLATFORM_H

#include "kernels.h"

#include <stdint.h>

/* The instruction sets that both have, the best one last, at most `capacity`. Returns their
 * number. */
int fastbn_supported_isas(const fastbn_isa *isas[], int capacity);

/* The size of a third-level cache; 0 where the system does not tell. */
ptrdiff_t fastbn_l3_bytes(void);

/* The threads that OpenMP would start; 1 in a build without OpenMP. */
int fastbn_omp_max_threads(void);

/* Ends the idle threads that OpenMP keeps for the calling one; it starts new ones when it needs
 * them. Returns whether that could be done. */
int fastbn_omp_pause(void);

/* Numbers from a first one up to an end, below 2^31, that several threads take from both sides. */
typedef struct {
    int64_t first_and_end;
} fastbn_range;

void fastbn_set_range(fastbn_range *range, ptrdiff_t first, ptrdiff_t end);

/* Each returns a number that no other call returns; -1 when there are no more. */
ptrdiff_t fastbn_take_first(fastbn_range *range);
ptrdiff_t fastbn_take_last(fastbn_range *range);

/* A clock; it stands still in a build without OpenMP. */
double fastbn_seconds(void);

const char *fastbn_compiler(void);

/* The date of the OpenMP specification, and the file of the library in use where the system tells;
 * "none" in a build without OpenMP. */
const char *fastbn_openmp(void);

#endif
