/* Masks: what is counted, and the bytes that belong to columns. */
#ifndef FASTBN_KERNELS_MASKS_H
#define FASTBN_KERNELS_MASKS_H

#include "common.h"

/* Counts the valid positions. Sums of bytes are widened before they overflow. */
static inline ptrdiff_t count_valid(const unsigned char *mask, ptrdiff_t len)
{
    enum { WIDTH = 64, MOST = 255 };
    ptrdiff_t total = 0;
    while (len >= WIDTH) {
        unsigned char sums[WIDTH] = {0};
        for (int i = 0; i < MOST && len >= WIDTH; i++, mask += WIDTH, len -= WIDTH)
            for (int j = 0; j < WIDTH; j++)
                sums[j] += mask[j] & 1;
        for (int j = 0; j < WIDTH; j++)
            total += sums[j];
    }
    for (ptrdiff_t i = 0; i < len; i++)
        total += mask[i] & 1;
    return total;
}

/* How columns heed a mask: step by step or, where a row is valid or not as a whole, by leaving rows
 * out. */
enum { UNMASKED, MASKED, WHOLE_ROWS };

static inline int masks_rows(const fastbn_matrix *matrix)
{
    return matrix->mask != NULL && matrix->mask_stride == 1;
}

/* Whether a row is left out as a whole. */
static inline int leaves_out(const fastbn_matrix *matrix, ptrdiff_t r)
{
    return masks_rows(matrix) && !matrix->mask[r];
}

static inline int masks_columns(const fastbn_matrix *matrix)
{
    return matrix->mask != NULL && matrix->mask_stride > 1;
}

/* The first row from the r-th one on that is not left out; their number if there is none. */
static inline ptrdiff_t next_row(const fastbn_matrix *matrix, int mode, ptrdiff_t r)
{
    if (mode == WHOLE_ROWS)
        while (r < matrix->rows && !matrix->mask[r])
            r++;
    return r;
}

/* Repeats the first `len` of some numbers up to `end`, each time increased by `by` more. */
static inline void repeat(int16_t *numbers, ptrdiff_t len, ptrdiff_t end, int16_t by)
{
    for (; len < end; len *= 2, by *= 2)
        for (ptrdiff_t i = 0; i < smaller(len, end - len); i++)
            numbers[len + i] = numbers[i] + by;
}

/* The number of the byte, in a row of the mask, that belongs to each column. */
static inline void bytes_of_columns(const fastbn_matrix *matrix, int16_t *to)
{
    const ptrdiff_t run = matrix->run, group = matrix->channels * run;
    to[0] = 0;
    repeat(to, 1, run, 1);
    repeat(to, run, group, 0);
    repeat(to, group, matrix->len, (int16_t)run);
}

/* The mask of LANES neighbouring columns: lane i has byte offset + index[i] of a row of the mask.
 * Runs are shorter than LANES, so that the bytes of LANES columns span no more. */
typedef struct {
    ptrdiff_t offset;
    uint8_t index[LANES + MASK_BYTES];
} mask_step;

static inline mask_step mask_step_of(const int16_t *bytes)
{
    mask_step step = {0};
    int16_t least = bytes[0];
    for (int i = 1; i < LANES; i++)
        least = bytes[i] < least ? bytes[i] : least;
    for (int i = 0; i < LANES; i++)
        step.index[i] = (uint8_t)(bytes[i] - least);
    step.offset = least;
    return step;
}

/* The masks of all whole steps of columns, and behind them that of the columns from `last`
 * on. Lanes that are no columns have some other column's mask. */
NOT_INLINE void find_masks(const fastbn_matrix *matrix, ptrdiff_t last, mask_step *steps)
{
    const ptrdiff_t len = matrix->len;
    int16_t bytes_[LANES + COLUMNS + LANES], *bytes = bytes_ + LANES;
    bytes_of_columns(matrix, bytes);
    for (int i = 0; i < LANES; i++) {
        bytes_[i] = 0;
        bytes[len + i] = bytes[len - 1];
    }
    for (ptrdiff_t i = 0; i + LANES <= len; i += LANES)
        *steps++ = mask_step_of(bytes + i);
    *steps = mask_step_of(bytes + last);
}

/* The mask of a row, a byte for each of its columns; up to LANES bytes are written behind them. */
static inline void spread_mask(const uint8_t *mask, const mask_step *steps, ptrdiff_t len, uint8_t *to)
{
    for (ptrdiff_t i = 0; i < len; i += LANES, steps++)
        for (int j = 0; j < LANES; j++)
            to[i + j] = mask[steps->offset + steps->index[j]];
}

#endif
