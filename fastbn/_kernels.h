/* The inner loops: what is done to runs of memory, for every dtype and instruction set.
 *
 * A kernel walks `rows` runs of `len` elements that lie one behind the other, each with sums or
 * coefficients of its own. It knows neither channels nor threads, takes any alignment and allocates
 * nothing. Every instruction set gives the same bits.
 */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include <stddef.h>

/* Element i of a run is added to lane i modulo this, whatever the width of a register is. */
enum { FASTBN_LANES = 16 };

/* Two running sums. They are in double: float elements then leave 29 bits for the carry. */
typedef struct {
    double first[FASTBN_LANES];
    double second[FASTBN_LANES];
} fastbn_sums;

/* y = (x - centre) * scale + shift */
typedef struct {
    double centre, scale, shift;
} fastbn_affine;

/* dx = ((dy - dy_mean) - (x - x_mean) * slope) * scale */
typedef struct {
    double dy_mean, x_mean, slope, scale;
} fastbn_gradient;

typedef struct {
    /* pivot = the first element of each run */
    void (*pivots)(const void *x, ptrdiff_t rows, ptrdiff_t len, double *pivot);
    /* first += x - pivot, second += (x - pivot)^2 */
    void (*moments)(const void *x, ptrdiff_t rows, ptrdiff_t len, const double *pivot,
                    fastbn_sums *sums);
    /* first += dy, second += dy * (x - mean) */
    void (*products)(const void *dy, const void *x, ptrdiff_t rows, ptrdiff_t len,
                     const double *mean, fastbn_sums *sums);
    /* y may be x */
    void (*normalize)(const void *x, void *y, ptrdiff_t rows, ptrdiff_t len,
                      const fastbn_affine *affine);
    /* dx may be dy or x */
    void (*gradient)(const void *dy, const void *x, void *dx, ptrdiff_t rows, ptrdiff_t len,
                     const fastbn_gradient *gradient);
} fastbn_kernels;

typedef struct {
    const char *name;
    fastbn_kernels float32, float64;
} fastbn_isa;

#endif
