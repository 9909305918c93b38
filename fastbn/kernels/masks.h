/* Masks: the bytes that belong to columns. */
#ifndef FASTBN_KERNELS_MASKS_H
#define FASTBN_KERNELS_MASKS_H

#include "common.h"

/* How columns heed a mask: step by step or, where a row is valid or not as a whole, by leaving rows
 * out. */
enum { UNMASKED, MASKED, WHOLE_ROWS };

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
static inline ptrdiff_t next_row(const fastbn_matrix *matrix, int mode, ptrdiff_t r)
{
    if (mode == WHOLE_ROWS)
        while (r < matrix->rows && leaves_out(matrix, r))
            r++;
    return r;
}

/* The mask of LANES neighbouring columns: lane i has byte offset + index[i] of a row of the mask.
 * Runs are shorter than LANES, so that the bytes of LANES columns span no more. */
typedef struct {
    ptrdiff_t offset;
    uint8_t index[LANES + MASK_BYTES];
} mask_step;

/* The masks of all whole steps of columns, and behind them that of the columns from `last`
 * on. Lanes that are no columns have some other column's mask. */
HIDDEN void COMMON(find_masks)(const fastbn_matrix *matrix, ptrdiff_t last, mask_step *steps);

/* The mask of a row, a byte for each of its columns; up to LANES bytes are written behind them. */
static inline void spread_mask(const uint8_t *mask, const mask_step *steps, ptrdiff_t len, uint8_t *to)
{
    for (ptrdiff_t i = 0; i < len; i += LANES, steps++)
        for (int j = 0; j < LANES; j++)
            to[i + j] = mask[steps->offset + steps->index[j]];
}

#endif
