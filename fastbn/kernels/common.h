/* What the kernels of all dtypes have in common: limits, values of columns and their sums, the ends
 * of runs. Functions that are long, and know no dtype, are in common.c. */
#ifndef FASTBN_KERNELS_COMMON_H
#define FASTBN_KERNELS_COMMON_H

#include "registers.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
/* The name of a function of common.c, which is compiled once per instruction set. */
#define COMMON(f) PASTE(PASTE(f, _), PASTE(ISA, _common))

enum {
    COLUMNS = FASTBN_COLUMNS,
    /* Columns are prefetched about so many elements ahead; those of two arrays less, for hardware
     * does most of it: the backward took 0.96 of the time that it takes with 512, on a Zen 5. */
    PREFETCHED = 512,
    PREFETCHED_OF_TWO = 64,
    /* Sums of rows prefetch so many elements ahead, or more: 8 KiB of float32. On two cores of a
     * Zen 3 4 KiB gained nothing, 16 KiB half as much. */
    SUMS_PREFETCHED = 2048,
    /* A page: what kernels do not stream as it is computed is put together there to whole lines. */
    BUFFER_BYTES = 4096,
    /* The rows of a matrix that are added to the sums of its columns together. */
    ROWS_MOST = 4,
    STREAM_BYTES = FASTBN_STREAM_BYTES,
    INTERLEAVED = FASTBN_INTERLEAVED,
    /* How many doubles, or floats, lie between two values of a column; LANES + COLUMNS have to fit.
     * That is 5.1 or 3 KiB: if two were a multiple of 4 KiB apart, or a little more, loads of the
     * next columns would wait for what has just been stored. */
    DOUBLES_APART = 656,
    FLOATS_APART = 768,
    /* The terms of a lane that are added in float32. */
    TREE = FASTBN_TREE,
};

#if defined(__GNUC__) && !defined(__clang__)
/* gcc warns of arrays of one value per channel, that there might be no channels. */
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

static inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* Both sums of the lanes of each channel. */
HIDDEN void COMMON(add_lanes)(double sums[][2][LANES], ptrdiff_t channels, double *first,
                              double *second);

/* The last LANES elements of a run; those of a shorter run behind zeros, in the buffer. */
ALWAYS_INLINE const void *last_step(const void *x, ptrdiff_t len, size_t size, void *buffer)
{
    if (len >= LANES)
        return (const char *)x + (size_t)(len - LANES) * size;
    memset(buffer, 0, LANES * size);
    memcpy((char *)buffer + (size_t)(LANES - len) * size, x, (size_t)len * size);
    return buffer;
}

/* One value per column, from one per channel. */
HIDDEN void COMMON(spread_float)(const fastbn_matrix *matrix, const float *from, float *to);
HIDDEN void COMMON(spread_double)(const fastbn_matrix *matrix, const double *from, double *to);

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
        COMMON(spread_double)(matrix, centre_of_channel, sums->centre + LANES);
}

/* Adds the sums of columns to those of their channels. */
HIDDEN void COMMON(add_columns_to_channels)(const fastbn_matrix *matrix, const column_sums *sums,
                                            double *first_of_channel, double *second_of_channel);

/* The sums in float32 of columns, to which up to TREE rows are added before they go to the sums in
 * double. Those of the last step, which overlaps the one before it, have a place of their own. */
typedef struct {
    float centre[FLOATS_APART], first[FLOATS_APART], second[FLOATS_APART];
} column_trees;

/* The bits of a run of elements, or NULL, and the number of its first element. */
typedef struct {
    const uint8_t *alive;
    ptrdiff_t first;
} run_bits;

ALWAYS_INLINE run_bits no_bits(void) { return (run_bits){NULL, 0}; }

ALWAYS_INLINE run_bits bits_of_gate(const fastbn_gate *gate)
{
    return (run_bits){gate->alive, gate->first};
}

/* The same so many elements further on. */
ALWAYS_INLINE run_bits skip_bits(run_bits run, ptrdiff_t i)
{
    return (run_bits){run.alive, run.first + i};
}

/* Rows of a matrix that are added up together. */
typedef struct {
    int count, begin_trees, end_trees;
    ptrdiff_t stride;
    /* Memory is prefetched so many elements ahead, more for each next row, and more with each step.
     * Of rows that follow each other it is read in its order then. */
    ptrdiff_t ahead, ahead_of_next, ahead_grows;
    run_bits bits;
} row_set;

ALWAYS_INLINE row_set row_set_of(int count, int begin_trees, int end_trees, ptrdiff_t stride,
                                 ptrdiff_t len, run_bits bits)
{
    const ptrdiff_t set = count * stride, ahead = set * ((SUMS_PREFETCHED + set - 1) / set);
    row_set rows = {count, begin_trees, end_trees, stride, ahead, 0, 0, bits};
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

/* Adds all trees to the sums of their columns. */
HIDDEN void COMMON(end_column_trees)(const column_trees *trees, column_sums *sums, ptrdiff_t len);

#endif
