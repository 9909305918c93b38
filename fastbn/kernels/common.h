/* What the kernels of all dtypes have in common: limits, values of channels and of their columns, sums
 * of columns, the ends of runs. */
#ifndef FASTBN_KERNELS_COMMON_H
#define FASTBN_KERNELS_COMMON_H

#include "registers.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

enum {
    COLUMNS = FASTBN_COLUMNS,
    /* Columns are prefetched about so many elements ahead. */
    PREFETCHED = 512,
    /* Sums of rows prefetch so many elements ahead, or more. */
    SUMS_PREFETCHED = 2048,
    BUFFER_BYTES = 4096,
    /* The rows of a matrix that are added to the sums of its columns together. */
    ROWS_MOST = 4,
    STREAM_BYTES = FASTBN_STREAM_BYTES,
    /* How many doubles, or floats, lie between two values of a column; LANES + COLUMNS have to fit.
     * That is 5.1 or 3 KiB: if two were a multiple of 4 KiB apart, or a little more, loads of the
     * next columns would wait for what has just been stored. */
    DOUBLES_APART = 656,
    FLOATS_APART = 768,
    /* The terms of a lane that are added in float32. */
    TREE = FASTBN_TREE,
    /* The elements of which bytes tell, before these become bits, where derivatives are 1. */
    ALIVE_BYTES = 4096,
};

#if defined(__GNUC__) && !defined(__clang__)
/* gcc warns of arrays of one value per channel, that there might be no channels. */
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

static inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

static inline void invstd(const double *m2, double n, double eps, ptrdiff_t count, double *to)
{
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = 1.0 / sqrt(m2[c] / n + eps);
}

static inline void mean_and_m2(const double *pivot, const double *first, const double *second,
                               double n, ptrdiff_t count, double *mean, double *m2)
{
    for (ptrdiff_t c = 0; c < count; c++) {
        const double shift = first[c] / n, around_mean = second[c] - first[c] * shift;
        mean[c] = pivot[c] + shift;
        /* Rounding can take a variance of nearly zero below it. */
        m2[c] = around_mean < 0 ? 0 : around_mean;
    }
}

static inline int raw_mean_and_m2(const double *first, const double *second, double n,
                                  ptrdiff_t count, double *mean, double *m2)
{
    long long lost = 0; /* as wide as a double, and without branches: the loop is vectorized */
    for (ptrdiff_t c = 0; c < count; c++) {
        const double of_channel = first[c] / n, square = first[c] * of_channel;
        const double around_mean = second[c] - square;
        const int keeps = square <= FASTBN_RAW_MOST * around_mean;
        mean[c] = of_channel;
        m2[c] = keeps ? around_mean : NAN;
        lost |= keeps ? 0 : 1;
    }
    return lost != 0;
}

static inline void move_towards(const double *target, double divisor, double factor,
                                ptrdiff_t count, double *moved)
{
    for (ptrdiff_t c = 0; c < count; c++)
        moved[c] = (1 - factor) * moved[c] + factor * (target[c] / divisor);
}

/* The last LANES elements of a run; those of a shorter run behind zeros, in the buffer. */
ALWAYS_INLINE const void *last_step(const void *x, ptrdiff_t len, size_t size, void *buffer)
{
    if (len >= LANES)
        return (const char *)x + (size_t)(len - LANES) * size;
    memset(buffer, 0, LANES * size);
    memcpy((char *)buffer + (size_t)(LANES - len) * size, x, (size_t)len * size);
    return buffer;
}

/* Where the length of a run is known at compile time, it takes no loop. */
#define FOR_RUNS_OF(run, DO) \
    switch (run) { \
    case 1: DO(1); break; \
    case 2: DO(2); break; \
    case 4: DO(4); break; \
    default: DO(run); \
    }

/* One value per column, from one per channel. */
#define SPREAD(type) \
    ALWAYS_INLINE void spread_over_runs_##type(ptrdiff_t channels, ptrdiff_t run, \
                                               const type *from, type *to) \
    { \
        for (ptrdiff_t c = 0; c < channels; c++) \
            for (ptrdiff_t i = 0; i < run; i++) \
                to[c * run + i] = from[c]; \
    } \
    NOT_INLINE void spread_##type(const fastbn_matrix *matrix, const type *from, type *to) \
    { \
        const ptrdiff_t channels = matrix->channels, len = matrix->len; \
        FOR_RUNS_OF(matrix->run, SPREAD_##type) \
        for (ptrdiff_t done = channels * matrix->run; done < len; done *= 2) \
            memcpy(to + done, to, sizeof(type) * (size_t)smaller(done, len - done)); \
    }
#define SPREAD_float(run) spread_over_runs_float(channels, run, from, to)
#define SPREAD_double(run) spread_over_runs_double(channels, run, from, to)
SPREAD(float)
SPREAD(double)

ALWAYS_INLINE void add_runs(ptrdiff_t channels, ptrdiff_t run, const double *from, double *to)
{
    for (ptrdiff_t c = 0; c < channels; c++) {
        double sum = to[c];
        for (ptrdiff_t i = 0; i < run; i++)
            sum += from[c * run + i];
        to[c] = sum;
    }
}

/* The sums of columns, behind LANES more: of few columns, the last step, which overlaps the one
 * before it, reaches back before the first. */
typedef struct {
    double centre[DOUBLES_APART], first[DOUBLES_APART], second[DOUBLES_APART];
} column_sums;

/* Raw moments have no centres: those of the columns are left as they are then, and not used. */
static inline void begin_column_sums(column_sums *sums, const fastbn_matrix *matrix,
                                     const double *centre_of_channel)
{
    memset(sums->centre, 0, sizeof(double) * LANES);
    memset(sums->first, 0, sizeof(double) * (size_t)(LANES + matrix->len));
    memset(sums->second, 0, sizeof(double) * (size_t)(LANES + matrix->len));
    if (centre_of_channel != NULL)
        spread_double(matrix, centre_of_channel, sums->centre + LANES);
}

/* Adds the sums of the columns from the j-th one on, of channels that have a step or more each. Those
 * of the lanes of a channel are added up like those of a run. */
static inline void add_long_runs(const fastbn_matrix *matrix, const column_sums *sums, ptrdiff_t j,
                                 double *first_of_channel, double *second_of_channel)
{
    double of_lanes[COLUMNS / LANES][2][LANES], first[COLUMNS / LANES], second[COLUMNS / LANES];
    const ptrdiff_t channels = matrix->channels, run = matrix->run;
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double *at = sums->first + LANES + j + c * run;
        const double *at_second = sums->second + LANES + j + c * run;
        step_sums s = no_sums();
        for (ptrdiff_t i = 0; i < run; i += LANES) {
            const ptrdiff_t begin = smaller(i, run - LANES); /* the last step overlaps another */
            s = add_sums(s, sums_from_lane(load_sums(at + begin, at_second + begin), i - begin));
        }
        store_sums(of_lanes[c][0], of_lanes[c][1], s);
    }
    add_lanes(of_lanes, channels, first, second);
    for (ptrdiff_t c = 0; c < channels; c++) {
        first_of_channel[c] += first[c];
        second_of_channel[c] += second[c];
    }
}

/* The same of channels that have fewer columns each, of one of both sums. */
NOT_INLINE void add_short_runs(const fastbn_matrix *matrix, const double *from, double *to)
{
    const ptrdiff_t channels = matrix->channels;
#define ADD(run) add_runs(channels, run, from + j, to)
    for (ptrdiff_t j = 0; j < matrix->len; j += channels * matrix->run)
        FOR_RUNS_OF(matrix->run, ADD)
#undef ADD
}

/* Adds the sums of columns to those of their channels. */
NOT_INLINE void add_columns_to_channels(const fastbn_matrix *matrix, const column_sums *sums,
                                        double *first_of_channel, double *second_of_channel)
{
    if (matrix->run < LANES) {
        add_short_runs(matrix, sums->first + LANES, first_of_channel);
        add_short_runs(matrix, sums->second + LANES, second_of_channel);
        return;
    }
    for (ptrdiff_t j = 0; j < matrix->len; j += matrix->channels * matrix->run)
        add_long_runs(matrix, sums, j, first_of_channel, second_of_channel);
}

/* The sums in float32 of columns, to which up to TREE rows are added before they go to the sums in
 * double. Those of the last step, which overlaps the one before it, have a place of their own. */
typedef struct {
    float centre[FLOATS_APART], first[FLOATS_APART], second[FLOATS_APART];
} column_trees;

/* Rows of a matrix that are added up together. */
typedef struct {
    int count, begin_trees, end_trees;
    ptrdiff_t stride;
    /* Memory is prefetched so many elements ahead, more for each next row, and more with each step.
     * Of rows that follow each other it is read in its order then. */
    ptrdiff_t ahead, ahead_of_next, ahead_grows;
} row_set;

ALWAYS_INLINE row_set row_set_of(int count, int begin_trees, int end_trees, ptrdiff_t stride,
                                 ptrdiff_t len)
{
    const ptrdiff_t set = count * stride, ahead = set * ((SUMS_PREFETCHED + set - 1) / set);
    row_set rows = {count, begin_trees, end_trees, stride, ahead, 0, 0};
    if (count > 1 && len == stride)
        rows.ahead_of_next = LANES - stride, rows.ahead_grows = (count - 1) * LANES;
    return rows;
}

static inline void begin_column_trees(column_trees *trees, const column_sums *sums, ptrdiff_t len)
{
    for (ptrdiff_t i = 0; i < LANES + len; i++)
        trees->centre[i] = (float)sums->centre[i];
}

ALWAYS_INLINE tree_sums load_tree(const column_trees *trees, ptrdiff_t i)
{
    tree_sums r;
    UNROLL for (int j = 0; j < FLOAT_STEPS; j++) {
        r.of[j].first = load_float32(trees->first + i + j * VF);
        r.of[j].second = load_float32(trees->second + i + j * VF);
    }
    return r;
}

ALWAYS_INLINE void store_tree(column_trees *trees, ptrdiff_t i, tree_sums tree)
{
    UNROLL for (int j = 0; j < FLOAT_STEPS; j++) {
        store_float32(trees->first + i + j * VF, tree.of[j].first);
        store_float32(trees->second + i + j * VF, tree.of[j].second);
    }
}

ALWAYS_INLINE void add_tree_to_columns(tree_sums tree, column_sums *sums, ptrdiff_t i)
{
    double *first = sums->first + LANES + i, *second = sums->second + LANES + i;
    store_sums(first, second, add_tree(load_sums(first, second), tree));
}

static inline void end_column_trees(const column_trees *trees, column_sums *sums, ptrdiff_t len)
{
    const ptrdiff_t whole = len / LANES * LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES)
        add_tree_to_columns(load_tree(trees, i), sums, i);
    if (whole < len)
        add_tree_to_columns(load_tree(trees, whole), sums, len - LANES);
}

#endif
