/* Compiled once per instruction set, with ISA set to its name. */
#include "registers.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

enum {
    COLUMNS = FASTBN_COLUMNS,
    /* The rows of a matrix that are walked while sums stay in registers. */
    ROWS_SUMMED = FASTBN_TREE,
    /* Columns are prefetched about so many elements ahead. */
    PREFETCHED = 512,
    BUFFER_BYTES = 4096,
    STREAM_BYTES = FASTBN_STREAM_BYTES,
    /* The terms of a lane that are added in float32. */
    TREE = FASTBN_TREE,
    /* The elements of which bytes tell, before these become bits, where derivatives are 1. */
    ALIVE_BYTES = 4096,
};

static void invstd(const double *m2, double n, double eps, ptrdiff_t count, double *to)
{
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = 1.0 / sqrt(m2[c] / n + eps);
}

/* Counts the valid positions. Sums of bytes are widened before they overflow. */
static ptrdiff_t count_valid(const unsigned char *mask, ptrdiff_t len)
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

static ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

#if defined(__GNUC__) && !defined(__clang__)
/* gcc warns of arrays of one value per channel, that there might be no channels. */
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

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
    static void spread_##type(const fastbn_matrix *matrix, const type *from, type *to) \
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

/* Adds one value per column to one per channel. */
static void add_columns_to_channels(const fastbn_matrix *matrix, const double *from, double *to)
{
    const ptrdiff_t channels = matrix->channels;
#define ADD(run) add_runs(channels, run, from + j, to)
    for (ptrdiff_t j = 0; j < matrix->len; j += channels * matrix->run)
        FOR_RUNS_OF(matrix->run, ADD)
#undef ADD
}

/* How sums of columns heed a mask: step by step or, where a row is valid or not as a whole, by a
 * list of the valid rows. */
enum { UNMASKED, MASKED, LISTED };

/* A few rows of a matrix that are added up together: `count` neighbouring ones or, where they are
 * listed, valid ones, which begin at the elements `at`. */
typedef struct {
    ptrdiff_t count, stride, mask_stride;
    int listed;
    ptrdiff_t at[ROWS_SUMMED];
} row_set;

/* Lists the next valid rows, at most `rows->count` of the `left` ones; returns how many rows that
 * takes. */
static ptrdiff_t list_valid_rows(row_set *rows, const uint8_t *mask, ptrdiff_t left)
{
    const ptrdiff_t most = rows->count;
    ptrdiff_t r = 0;
    for (rows->count = 0; r < left && rows->count < most; r++) {
        rows->at[rows->count] = r * rows->stride;
        rows->count += mask[r] & 1;
    }
    return r;
}

/* Repeats the first `len` of some numbers up to `end`, each time increased by `by` more. */
static void repeat(int16_t *numbers, ptrdiff_t len, ptrdiff_t end, int16_t by)
{
    for (; len < end; len *= 2, by *= 2)
        for (ptrdiff_t i = 0; i < smaller(len, end - len); i++)
            numbers[len + i] = numbers[i] + by;
}

/* The number of the byte, in a row of the mask, that belongs to each column. */
static void bytes_of_columns(const fastbn_matrix *matrix, int16_t *to)
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

static mask_step mask_step_of(const int16_t *bytes)
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
static void find_masks(const fastbn_matrix *matrix, ptrdiff_t last, mask_step *steps)
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
static void spread_mask(const uint8_t *mask, const mask_step *steps, ptrdiff_t len, uint8_t *to)
{
    for (ptrdiff_t i = 0; i < len; i += LANES, steps++)
        for (int j = 0; j < LANES; j++)
            to[i + j] = mask[steps->offset + steps->index[j]];
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

/* Bits of an array's elements, in the order of memory. In `bytes` those of the first one's byte that
 * come before it have room, too. */

/* A byte, 255 or 0, for each of so many bits. */
static void spread_bits(const uint8_t *bits, ptrdiff_t first, ptrdiff_t count, uint8_t *bytes)
{
    const uint64_t ones = 0x0101010101010101u, diagonal = 0x8040201008040201u;
    for (ptrdiff_t k = first / 8; k < (first + count + 7) / 8; k++, bytes += 8) {
        const uint64_t bit = bits[k] * ones & diagonal;
        const uint64_t byte = ((bit + 0x7f * ones) >> 7 & ones) * 255;
        memcpy(bytes, &byte, sizeof byte);
    }
}

/* Sets so many bits, which are zeros, from bytes. Other threads may set bits of the first and the
 * last byte at the same time. */
static void gather_bits(uint8_t *bytes, ptrdiff_t first, ptrdiff_t count, uint8_t *bits)
{
    const uint64_t ones = 0x0101010101010101u, diagonal = 0x8040201008040201u;
    const ptrdiff_t begin = first / 8, end = (first + count + 7) / 8;
    memset(bytes, 0, (size_t)(first % 8));
    memset(bytes + first % 8 + count, 0, 8);
    for (ptrdiff_t k = begin; k < end; k++, bytes += 8) {
        uint64_t eight;
        memcpy(&eight, bytes, sizeof eight);
        const uint8_t byte = (uint8_t)((eight & diagonal) * ones >> 56);
        if (k > begin && k + 1 < end)
            bits[k] = byte;
        else if (byte != 0)
            or_atomically(bits + k, byte);
    }
}

#define DTYPE float32
#define TREES 1
#define MASKED_A masked_vf
#define T float
#define A float
#define ORDER_A int32_t
#define ORDER_MAX_A INT32_MAX
#define VA vf
#define LOAD_A load_float32
#define WIDEN_A widen_lanes
#define GREATER_A greater_vf
#define LESS_A less_vf
#define IF_OUTSIDE_A if_outside_vf
#define ZERO_OUTSIDE_A zero_outside_vf
#define STORE_BYTES_A store_bytes_vf
#define SPREAD_A spread_float
#include "dtype.h"

#define DTYPE float64
#define TREES 0
#define MASKED_A masked_vd
#define T double
#define A double
#define ORDER_A int64_t
#define ORDER_MAX_A INT64_MAX
#define VA vd
#define LOAD_A load_float64
#define WIDEN_A itself
#define GREATER_A greater_vd
#define LESS_A less_vd
#define IF_OUTSIDE_A if_outside_vd
#define ZERO_OUTSIDE_A zero_outside_vd
#define STORE_BYTES_A store_bytes_vd
#define SPREAD_A spread_double
#include "dtype.h"

#define DTYPE float16
#define TREES 1
#define MASKED_A masked_vf
#define T uint16_t
#define A float
#define ORDER_A int32_t
#define ORDER_MAX_A INT32_MAX
#define VA vf
#define LOAD_A load_float32
#define WIDEN_A widen_lanes
#define GREATER_A greater_vf
#define LESS_A less_vf
#define IF_OUTSIDE_A if_outside_vf
#define ZERO_OUTSIDE_A zero_outside_vf
#define STORE_BYTES_A store_bytes_vf
#define SPREAD_A spread_float
#include "dtype.h"

#define DTYPE bfloat16
#define TREES 1
#define MASKED_A masked_vf
#define T uint16_t
#define A float
#define ORDER_A int32_t
#define ORDER_MAX_A INT32_MAX
#define VA vf
#define LOAD_A load_float32
#define WIDEN_A widen_lanes
#define GREATER_A greater_vf
#define LESS_A less_vf
#define IF_OUTSIDE_A if_outside_vf
#define ZERO_OUTSIDE_A zero_outside_vf
#define STORE_BYTES_A store_bytes_vf
#define SPREAD_A spread_float
#include "dtype.h"

#define KERNELS(dtype, tree, pivots) \
    { \
        load_as_double_##dtype, store_from_double_##dtype, moments_##dtype, products_##dtype, \
            column_moments_##dtype, column_products_##dtype, tree##moments_##dtype, \
            tree##products_##dtype, column_##tree##moments_##dtype, \
            column_##tree##products_##dtype, pivots, normalize_##dtype, gradient_##dtype, \
            column_normalize_##dtype, column_gradient_##dtype, gate_bounds_##dtype, \
            activation_gradient_##dtype, count_valid, invstd, FENCE_NONTEMPORAL \
    }

const fastbn_isa PASTE(fastbn_isa_, ISA) = {
    STRING(ISA),
    KERNELS(float32, tree_, pivots_float32),
    KERNELS(float64, , NULL),
    KERNELS(float16, tree_, pivots_float16),
    KERNELS(bfloat16, tree_, pivots_bfloat16),
};
