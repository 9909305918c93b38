/* The inner loops: what is done to runs of memory, for every dtype and instruction set.
 *
 * A kernel knows neither channels nor threads, takes any alignment and allocates nothing. Every
 * instruction set gives the same bits.
 *
 * Row kernels walk `rows` runs of `len` elements that lie one behind the other; each run has sums
 * or coefficients of its own. Column kernels walk `rows` runs that begin `stride` elements apart,
 * of at most FASTBN_COLUMNS elements; each column has sums or coefficients of its own.
 *
 * `ahead` tells where memory is read next: what lies there is prefetched, as hardware does not
 * foresee the jump from one sample to the next. It need not be there.
 *
 * Outputs may be one of the inputs. `stream` asks for stores around the cache, into another array
 * whose elements are aligned.
 */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include <stddef.h>

enum {
    /* Element i of a run is added to lane i modulo this, whatever the width of a register is; the
     * elements of a shorter last step to the last lanes. */
    FASTBN_LANES = 16,
    FASTBN_COLUMNS = 256,
};

/* The two sums of a run, lane by lane. In double, which has 29 bits to spare for floats. */
typedef struct {
    double first[FASTBN_LANES];
    double second[FASTBN_LANES];
} fastbn_sums;

/* The two sums of a run in all. */
typedef struct {
    double first, second;
} fastbn_pair;

/* y = (x - centre) * scale + shift */
typedef struct {
    double centre, scale, shift;
} fastbn_affine;

/* dx = ((dy - dy_mean) - (x - x_mean) * slope) * scale */
typedef struct {
    double dy_mean, x_mean, slope, scale;
} fastbn_gradient;

/* While one of the first `border` elements is read, the one `near` further on is prefetched, later
 * the one `jump` further on. */
typedef struct {
    ptrdiff_t near, border, jump;
} fastbn_ahead;

typedef struct {
    /* x[i] */
    double (*element)(const void *x, ptrdiff_t i);

    /* first += x - pivot, second += (x - pivot)^2 */
    void (*moments)(const void *x, ptrdiff_t rows, ptrdiff_t len, fastbn_ahead ahead,
                    const double *pivot, fastbn_sums *sums);
    /* first += dy, second += dy * (x - mean) */
    void (*products)(const void *dy, const void *x, ptrdiff_t rows, ptrdiff_t len,
                     fastbn_ahead ahead, const double *mean, fastbn_sums *sums);
    void (*normalize)(const void *x, void *y, ptrdiff_t rows, ptrdiff_t len, fastbn_ahead ahead,
                      const fastbn_affine *affine, int stream);
    void (*gradient)(const void *dy, const void *x, void *dx, ptrdiff_t rows, ptrdiff_t len,
                     fastbn_ahead ahead, const fastbn_gradient *gradient, int stream);

    /* The same for columns. The sums of moments and products read and write up to FASTBN_LANES
     * values before `pivot` or `mean`, `first` and `second`, without changing them. */
    void (*column_moments)(const void *x, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len,
                           const double *pivot, double *first, double *second);
    void (*column_products)(const void *dy, const void *x, ptrdiff_t rows, ptrdiff_t stride,
                            ptrdiff_t len, const double *mean, double *first, double *second);
    void (*column_normalize)(const void *x, void *y, ptrdiff_t rows, ptrdiff_t stride,
                             ptrdiff_t len, const fastbn_affine *affine, int stream);
    void (*column_gradient)(const void *dy, const void *x, void *dx, ptrdiff_t rows,
                            ptrdiff_t stride, ptrdiff_t len, const fastbn_gradient *gradient,
                            int stream);

    /* pairs = the sums over all lanes, in an order of their own */
    void (*collapse)(const fastbn_sums *sums, ptrdiff_t rows, fastbn_pair *pairs);
    /* Makes what was stored around the cache visible to other threads. */
    void (*end_streaming)(void);
} fastbn_kernels;

typedef struct {
    const char *name;
    fastbn_kernels float32, float64, float16, bfloat16;
} fastbn_isa;

#endif
