/* Masks: the bytes that belong to columns. */
#ifndef FASTBN_KERNELS_MASKS_H
#define FASTBN_KERNELS_MASKS_H

#include "common.h"

/* A row of one column for each channel has one byte. */
static inline int masks_rows(const fastbn_matrix *matrix)
{
    return matrix->mask != NULL && matrix->run == 1 && matrix->len == matrix->channels;
}

/* Whether a row is left out as a whole. */
static inline int leaves_out(const fastbn_matrix *matrix, ptrdiff_t r)
{
    return masks_rows(matrix) && !matrix->mask[r * matrix->mask_stride];
}

static inline int masks_columns(const fastbn_matrix *matrix)
{
    return matrix->mask != NULL && !masks_rows(matrix);
}

/* The first row from the r-th one on that is not left out; their number if there is none. */
static inline ptrdiff_t next_row(const fastbn_matrix *matrix, ptrdiff_t r)
{
    while (r < matrix->rows && leaves_out(matrix, r))
        r++;
    return r;
}

/* How far apart so many rows are, from the r-th one on, of which none is left out: two may be any
 * distance apart, more have to follow each other. 0 if there are not so many. */
static inline ptrdiff_t distance_of_rows(const fastbn_matrix *matrix, ptrdiff_t r, int count)
{
    const ptrdiff_t distance = count == 2 ? next_row(matrix, r + 1) - r : 1;
    if (r + distance * (count - 1) >= matrix->rows)
        return 0;
    for (int t = 1; t < count; t++)
        if (leaves_out(matrix, r + t * distance))
            return 0;
    return distance;
}

/* The mask of LANES neighbouring columns of runs shorter than that: lane i has byte offset +
 * index[i] of a row of the mask. Such runs' columns have bytes that span no more than LANES. */
typedef struct {
    ptrdiff_t offset;
    uint8_t index[LANES];
} mask_step;

/* The masks of all steps of columns. Lanes that are no columns have some other column's mask. */
HIDDEN void COMMON(find_masks)(const fastbn_matrix *matrix, mask_step *steps);

/* The mask of a row, a byte for each of its columns; up to LANES bytes are written behind them. */
static inline void spread_mask(const fastbn_matrix *matrix, ptrdiff_t r, const mask_step *steps,
                               uint8_t *to)
{
    const uint8_t *mask = matrix->mask + r * matrix->mask_stride;
    const ptrdiff_t run = matrix->run;
    if (run < LANES) {
        for (ptrdiff_t i = 0; i < matrix->len; i += LANES, steps++)
            pick_bytes(mask + steps->offset, steps->index, to + i);
        return;
    }
    for (ptrdiff_t i = 0; i < matrix->len; mask += run)
        for (ptrdiff_t c = 0; c < matrix->channels; c++, i += run)
            for (ptrdiff_t j = 0; j < run; j += LANES)
                memcpy(to + i + j, mask + j, LANES);
}

/* The masks of some rows that are added up together, behind LANES bytes: of few columns, the last
 * step, which overlaps the one before it, reaches back before the first. */
typedef struct {
    mask_step steps[COLUMNS / LANES];
    uint8_t of_row[ROWS_MOST][LANES + COLUMNS + LANES];
} valid_columns;

HIDDEN void COMMON(begin_valid_columns)(valid_columns *valid, const fastbn_matrix *matrix);
HIDDEN void COMMON(spread_masks)(valid_columns *valid, const fastbn_matrix *matrix, ptrdiff_t r,
                                 ptrdiff_t count);

/* The valid lanes of a step of the first of these rows; all where there is no mask, and NULL. */
ALWAYS_INLINE valid_lanes valid_lanes_of_columns(const valid_columns *valid, ptrdiff_t i,
                                                 long long skip)
{
    if (valid == NULL)
        return (valid_lanes){0, NULL, 0, skip};
    return (valid_lanes){1, valid->of_row[0] + LANES + i, sizeof valid->of_row[0], skip};
}

#endif
