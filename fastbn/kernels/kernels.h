/* The inner loops over memory, for every dtype and instruction set.
 *
 * A kernel knows no threads and allocates nothing. Every instruction set gives the same bits.
 * Elements are aligned, except those of vectors of one value per channel.
 *
 * The kernels of the row layout walk runs: contiguous elements of one channel of one sample. Those
 * of the column layout walk a matrix each of whose columns belongs to one channel. An output may be
 * one of the inputs. With `nontemporal`, results are written by non-temporal stores. A mask has 255
 * at valid positions and 0 at invalid ones, which add nothing to a sum and where results are 0;
 * where it is NULL, every position is valid.
 */
#ifndef FASTBN_KERNELS_H
#define FASTBN_KERNELS_H

#include <stddef.h>

enum {
    /* Element i of a run is added to lane i modulo this, whatever the width of a register is; the
     * elements of a shorter last step to the last lanes. */
    FASTBN_LANES = 16,
    /* So many doubles are added one after the other; these sums are then added up. The rounding
     * errors of a sum of n equal numbers may all have one sign, and take n * 2^-55 of it. Narrower
     * elements leave bits to spare. */
    FASTBN_ADDITIONS = 128,
    /* So many terms are added in float32 at most, where sums are trees. */
    FASTBN_TREE = 8,
    /* So many elements of a run are summed, then as many of another one are written, in turns:
     * those of a tree. Runs have as many at least. */
    FASTBN_INTERLEAVED = FASTBN_TREE * FASTBN_LANES,
    /* Raw moments are used where the square of the mean is at most so many times the variance.
     * Their difference has the relative error of the sums, so many times. After 4,096 additions to
     * a lane, or column, each of which may round by 2^-54 in the same direction, the variance has
     * an error below 2^-25, and one about 2^-33 where rounding errors average out. */
    FASTBN_RAW_MOST = 65536,
    /* The most columns of a strip, and channels of a block of results: 512, and a cache line of
     * 16-bit elements. */
    FASTBN_COLUMNS = 544,
    /* The most channels whose runs are summed at a time in the row layout. */
    FASTBN_GROUP = 64,
    /* A mask is read so many bytes at a time: as many bytes behind its end can be read, too. */
    FASTBN_MASK_BYTES = 16,
    /* Bits of elements are read four bytes at a time; three of them may lie behind the last one. */
    FASTBN_BITS_PADDING = 3,
    /* Non-temporal stores of shorter runs, where each is written by itself, go through a buffer,
     * since the lines at their ends cost more; and those of 16 bits, of which a register does not
     * fill one. */
    FASTBN_STREAM_BYTES = 3072,
};

/* From this mean on, x - mean may leave the range of float32: half a unit in the last place of its
 * greatest number. To take a smaller one from that number changes nothing. */
#define FASTBN_HUGE 0x1p103

/* Sums of squares, or of products, below this, for each element, have lost bits of terms that
 * float32 does not hold. */
#define FASTBN_TINY 0x1p-100

/* y = (x - centre) * scale + shift, for each channel */
typedef struct {
    double centre[FASTBN_COLUMNS], scale[FASTBN_COLUMNS], shift[FASTBN_COLUMNS];
} fastbn_affine;

/* dx = ((dy - dy_mean) - (x - x_mean) * slope) * scale, for each channel */
typedef struct {
    double dy_mean[FASTBN_COLUMNS], x_mean[FASTBN_COLUMNS];
    double slope[FASTBN_COLUMNS], scale[FASTBN_COLUMNS];
} fastbn_gradient;

/* What is done to z, a normalized value with its residual added. */
enum {
    FASTBN_LINEAR,     /* nothing */
    FASTBN_RELU,       /* max(z, 0) or, with a finite cap, min(max(z, 0), cap) */
    FASTBN_LEAKY_RELU, /* z where it is positive, z * slope elsewhere */
    /* Of a backward after a forward in place: its x is the output of FASTBN_LEAKY_RELU. */
    FASTBN_LEAKY_RELU_INVERTED,
};

typedef struct {
    int kind;
    double slope, cap;
} fastbn_activation;

/* Whether the activation of z is max(z * gain, z), from a floor to a cap, with a slope in the type
 * of element-wise arithmetic. Infinity times 0 is a NaN, which would not be the greater one. */
static inline int fastbn_is_clamped(int kind, double slope)
{
    return kind == FASTBN_LINEAR || kind == FASTBN_RELU || (0 < slope && slope <= 1);
}

/* What follows a normalization, in the same walk: a residual, unless it is NULL, is added in the
 * type of element-wise arithmetic, and the activation is applied before the result is rounded.
 *
 * Unless `alive` is NULL, bit i of it, which was 0, is set if the derivative of the activation at
 * the i-th element of the array, in the order of memory, is 1; at invalid positions it may be set
 * or not. `first` is the number of the first element of x. */
typedef struct {
    fastbn_activation activation;
    const void *residual;
    unsigned char *alive;
    ptrdiff_t first;
} fastbn_epilogue;

/* What dy passes before a backward uses it: it is multiplied by the derivative of the activation,
 * which changes where x leaves the interval from `low` to `high` of its channel; see gate_bounds.
 *
 * Unless `alive` is NULL, its bits tell, instead of x, where the derivative is 1, and elsewhere it
 * is 0; `first` is the number of the first element of dy. Sums in float32 take them, of rows, or
 * runs, of FASTBN_LANES elements or more, and of a single shorter row behind these. Kernels that
 * write dx take them with `passed`: what has passed is written there, too, or all of dy if there
 * are no bits. It may be dy. */
typedef struct {
    fastbn_activation activation;
    const double *low, *high;
    const unsigned char *alive;
    ptrdiff_t first;
    void *passed;
} fastbn_gate;

/* While one of the first `border` elements of a sample is read, the one `near` further on is
 * prefetched, later the one `jump` further on: hardware does not foresee the way to the next
 * sample. The addresses need not be memory of the process. Where `near` is 0, caches have what is
 * read, and nothing has to be prefetched. */
typedef struct {
    ptrdiff_t near, border, jump;
} fastbn_ahead;

/* In each of the samples, `stride` elements apart (less than 0 to walk backwards), a run of `len`
 * elements for each of the channels, one behind the other. There are at most FASTBN_GROUP channels
 * for sums, FASTBN_COLUMNS for results. The mask is the same for all channels; its samples are
 * `mask_stride` apart. */
typedef struct {
    ptrdiff_t samples, stride, channels, len;
    fastbn_ahead ahead;
    fastbn_ahead residual_ahead; /* no earlier walk has read the residual */
    const unsigned char *mask;
    ptrdiff_t mask_stride;
} fastbn_runs;

/* `rows` rows of `len` columns, at most FASTBN_COLUMNS; rows begin `stride` elements apart. The
 * first `run` columns belong to the first channel, the next to the second, and after so many
 * `channels` it begins again with the first. The mask has `run` bytes for the columns of every
 * channel, and as many whenever it begins again; its rows are `mask_stride` apart. */
typedef struct {
    ptrdiff_t rows, len, stride, channels, run;
    const unsigned char *mask;
    ptrdiff_t mask_stride;
} fastbn_matrix;

typedef void fastbn_moments(const void *x, const fastbn_runs *runs, const double *pivot,
                            double *first, double *second);
typedef void fastbn_products(const void *dy, const void *x, const fastbn_runs *runs,
                             const double *mean, const fastbn_gate *gate, double *first,
                             double *second);
typedef void fastbn_column_moments(const void *x, const fastbn_matrix *matrix, const double *pivot,
                                   double *first, double *second);
typedef void fastbn_column_products(const void *dy, const void *x, const fastbn_matrix *matrix,
                                    const double *mean, const fastbn_gate *gate, double *first,
                                    double *second);

/* What is written beside sums, of as many channels and samples as are summed, with runs of the same
 * length; the samples are `stride` elements apart. Beside moments y = affine(x), through an
 * activation that a clamp computes, unless that is NULL; beside products dx = gradient(dy, x),
 * where dy passes a gate, unless that is NULL. */
typedef struct {
    const void *dy, *x;
    void *to;
    ptrdiff_t stride;
    const fastbn_affine *affine;
    const fastbn_activation *activation;
    const fastbn_gradient *gradient;
    const fastbn_gate *gate;
} fastbn_results;

typedef struct {
    /* Whether a gate may have `alive` and `passed`. */
    int writes_passed;
    /* to[i] = the element i * stride bytes after x */
    void (*load_as_double)(const void *x, ptrdiff_t stride, ptrdiff_t count, double *to);
    /* the element i * stride bytes after to = from[i] */
    void (*store_from_double)(const double *from, ptrdiff_t stride, ptrdiff_t count, void *to);

    /* first, second = the sums of x - pivot and of (x - pivot)^2 of each channel */
    fastbn_moments *moments;
    /* first, second = the sums of dy and of dy * (x - mean); with a gate, unless it is NULL, there
     * is no mask */
    fastbn_products *products;
    /* The same in the column layout; sums are added to those in first and second. */
    fastbn_column_moments *column_moments;
    fastbn_column_products *column_products;
    /* The same in float32: pivot and mean are rounded to it, and up to FASTBN_TREE terms of a lane
     * are added in it. For float64 they are the ones above. */
    fastbn_moments *tree_moments;
    fastbn_products *tree_products;
    fastbn_column_products *column_tree_products;
    /* The sums of x and of x^2, whatever the pivot, which may be NULL. The squares of float64 are
     * not exact: for it they are the ones above. */
    fastbn_moments *raw_moments;
    fastbn_column_moments *column_raw_moments;

    /* pivot = a finite number near the mean of each channel, found in `count` of its elements:
     * those of the first channel are the elements `at` of x, of the next one the elements `stride`
     * further on. NULL for float64. */
    void (*pivots)(const void *x, const ptrdiff_t *at, ptrdiff_t count, ptrdiff_t stride,
                   ptrdiff_t channels, double *pivot);
    /* tree_moments or, if the pivot is NULL, raw_moments, or tree_products; and results of other
     * channels, by non-temporal stores. There is no mask; gates are of FASTBN_RELU, or both
     * NULL. NULL where there are no such stores, and for all dtypes but float32: 16 bits do not
     * fill one, and sums of float64 come in chunks. */
    void (*moments_beside_results)(const void *x, const fastbn_runs *runs, const double *pivot,
                                   double *first, double *second, const fastbn_results *results);
    void (*products_beside_results)(const void *dy, const void *x, const fastbn_runs *runs,
                                    const double *mean, const fastbn_gate *gate, double *first,
                                    double *second, const fastbn_results *results);

    /* The epilogue and the gate may be NULL; with a gate there is no mask. */
    void (*normalize)(const void *x, void *y, const fastbn_runs *runs, const fastbn_affine *affine,
                      const fastbn_epilogue *epilogue, int nontemporal);
    void (*gradient)(const void *dy, const void *x, void *dx, const fastbn_runs *runs,
                     const fastbn_gradient *gradient, const fastbn_gate *gate, int nontemporal);
    void (*column_normalize)(const void *x, void *y, const fastbn_matrix *matrix,
                             const fastbn_affine *affine, const fastbn_epilogue *epilogue,
                             int nontemporal);
    void (*column_gradient)(const void *dy, const void *x, void *dx, const fastbn_matrix *matrix,
                            const fastbn_gradient *gradient, const fastbn_gate *gate,
                            int nontemporal);
    /* low, high = the least and the greatest x at which the value before the activation, as
     * normalize computes it, is on one side: on that where the derivative is 1 or, for
     * FASTBN_LEAKY_RELU, on the other. Of the output of the activation likewise, for
     * FASTBN_LEAKY_RELU_INVERTED. */
    void (*gate_bounds)(const fastbn_affine *affine, const fastbn_activation *activation,
                        ptrdiff_t count, double *low, double *high);
    /* to = dy times the derivative of the activation: of so many elements, of which the bits of
     * `alive` from the first one on tell or, if that is NULL, those of y, the activation's
     * output */
    void (*activation_gradient)(const void *dy, const void *y, const unsigned char *alive,
                                ptrdiff_t first, ptrdiff_t count,
                                const fastbn_activation *activation, void *to);
} fastbn_kernels;

/* What tells whether a backward can recover a channel from the output of a forward in place: the
 * weight is a normal number of the output's dtype, and so is the greatest value that it is
 * multiplied by, `reach`; and the bias is at most `ratio` times as large. */
typedef struct {
    double least, greatest, reach, ratio;
} fastbn_recovery;

/* What knows no dtype. */
typedef struct {
    /* How many of the first `len` positions are valid, of a mask of 255 and 0, or of a boolean one
     * of 1 and 0. */
    ptrdiff_t (*count_valid)(const unsigned char *mask, ptrdiff_t len);
    /* invstd = 1 / sqrt(m2 / n + eps) */
    void (*invstd)(const double *m2, double n, double eps, ptrdiff_t count, double *invstd);
    /* mean, m2 = those of n elements, of whose deviations from the pivot, and of the squares of
     * these, first and second are the sums */
    void (*mean_and_m2)(const double *pivot, const double *first, const double *second, double n,
                        ptrdiff_t count, double *mean, double *m2);
    /* The same of sums in float32. m2 is NaN where they have left its range, and where the pivot is
     * further from the mean than a standard deviation: there rounding errors, which are of the size
     * of the deviations from the pivot, would count; returns whether any is. */
    int (*float32_mean_and_m2)(const double *pivot, const double *first, const double *second,
                               double n, ptrdiff_t count, double *mean, double *m2);
    /* The same of raw moments. m2 is NaN where it would have lost digits, since the square of the
     * mean is more than FASTBN_RAW_MOST times the variance; returns whether any is. */
    int (*raw_mean_and_m2)(const double *first, const double *second, double n, ptrdiff_t count,
                           double *mean, double *m2);
    /* Corrects the second sums of n products in float32, which take the mean for its first 24 bits.
     * They are NaN where sums have left float32's range; returns whether any have. */
    int (*float32_products)(const double *mean, const double *first, double n, ptrdiff_t count,
                            double *second);
    /* moved = (1 - factor) * moved + factor * target / divisor */
    void (*move_towards)(const double *target, double divisor, double factor, ptrdiff_t count,
                         double *moved);
    /* multiplied *= by */
    void (*multiply)(const double *by, ptrdiff_t count, double *multiplied);
    /* Coefficients of the gradient of x: from the sum of dy in dy_mean, that of dy * xhat in slope,
     * and the weight in scale. */
    void (*gradient_coefficients)(const double *invstd, double n, ptrdiff_t count, double *dy_mean,
                                  double *slope, double *scale);
    /* Whether any mean is finite and FASTBN_HUGE or more. */
    int (*any_huge)(const double *mean, ptrdiff_t count);
    /* Whether all channels can be recovered whose outputs were multiplied by a slope. */
    int (*all_recoverable)(const double *weight, const double *bias, double slope,
                           const fastbn_recovery *recovery, ptrdiff_t count);
    /* Makes non-temporal stores visible to other threads; NULL where there are no such stores, and
     * `nontemporal` changes nothing. */
    void (*fence_nontemporal)(void);
} fastbn_common_kernels;

typedef struct {
    const char *name;
    const fastbn_common_kernels *common;
    const fastbn_kernels *float32, *float64, *float16, *bfloat16;
} fastbn_isa;

#endif
