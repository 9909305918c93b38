/* Compiled once per instruction set, with ISA set to its name. */
#include "_kernels_registers.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

enum {
    COLUMNS = FASTBN_COLUMNS,
    /* of a matrix, while sums or coefficients stay in registers */
    ROWS_SUMMED = 8,
    ROWS_WRITTEN = 4,
    BUFFER_BYTES = 4096,
    /* bytes of a row of columns of a mask: before the first one a step may begin; behind the last
     * row as many may be overwritten */
    MASK_ROW = FASTBN_LANES + FASTBN_COLUMNS,
};

static void invstd(const double *m2, double n, double eps, ptrdiff_t count, double *to)
{
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = 1.0 / sqrt(m2[c] / n + eps);
}

/* Sums of bytes are widened before they overflow. */
static ptrdiff_t count(const unsigned char *mask, ptrdiff_t len)
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

/* One value per column, from one per channel. */
#define SPREAD(type) \
    static void spread_##type(const fastbn_matrix *matrix, const type *from, type *to) \
    { \
        const ptrdiff_t channels = matrix->channels, run = matrix->run; \
        for (ptrdiff_t j = 0; j < matrix->len; j += channels * run) \
            for (ptrdiff_t i = 0; i < run; i++) \
                for (ptrdiff_t c = 0; c < channels; c++) \
                    to[j + c * run + i] = from[c]; \
    }
SPREAD(float)
SPREAD(double)

/* Adds one value per column to one per channel. */
static void gather(const fastbn_matrix *matrix, const double *from, double *to)
{
    for (ptrdiff_t j = 0; j < matrix->len; j += matrix->channels * matrix->run)
        for (ptrdiff_t i = 0; i < matrix->run; i++)
            for (ptrdiff_t c = 0; c < matrix->channels; c++)
                to[c] += from[j + c * matrix->run + i];
}

/* A few rows of a matrix that are added up together: the next ones, or those of them that count,
 * which begin at the elements that are listed. */
typedef struct {
    ptrdiff_t count, stride;
    int listed;
    ptrdiff_t at[ROWS_SUMMED];
} some_rows;

static int mode_of(const fastbn_matrix *matrix)
{
    if (matrix->mask == NULL)
        return UNMASKED;
    return matrix->mask_stride == 1 ? MASKED_BY_ROW : MASKED_BY_ELEMENT;
}

/* Lists the next rows that count, as many as there shall be; returns how many rows that takes. */
static ptrdiff_t list_rows(some_rows *rows, const uint8_t *mask, ptrdiff_t left)
{
    const ptrdiff_t most = rows->count;
    ptrdiff_t r = 0;
    for (rows->count = 0; r < left && rows->count < most; r++) {
        rows->at[rows->count] = r * rows->stride;
        rows->count += mask[r] & 1;
    }
    return r;
}

/* A byte per column, from those of a row of the mask. */
static void spread_mask(const fastbn_matrix *matrix, const uint8_t *mask, uint8_t *to)
{
    const ptrdiff_t run = matrix->run, columns = matrix->channels * run;
    const ptrdiff_t step = run == 1 ? LANES : run; /* runs are shorter than LANES */
    if (matrix->channels == 1) {
        memcpy(to, mask, (size_t)matrix->len);
        return;
    }
    for (ptrdiff_t j = 0; j < matrix->len; j += columns, mask += run) {
        uint8_t bytes[LANES] = {0};
        if (run == 1)
            memset(bytes, *mask, LANES);
        else
            memcpy(bytes, mask, (size_t)run);
        /* Whatever goes too far is overwritten by what comes next. */
        for (ptrdiff_t i = 0; i < columns; i += step)
            memcpy(to + j + i, bytes, LANES);
    }
}

/* Where the mask of `rows` rows from row r on is: by row in its own memory, a byte each; by element
 * in a buffer, MASK_ROW bytes each, with LANES bytes of 0 before them. */
ALWAYS_INLINE const uint8_t *mask_of_rows(int masked, const fastbn_matrix *matrix, ptrdiff_t r,
                                          ptrdiff_t rows, uint8_t *buffer)
{
    if (masked == UNMASKED)
        return NULL;
    if (masked == MASKED_BY_ROW)
        return matrix->mask + r;
    for (ptrdiff_t i = 0; i < rows; i++) {
        memset(buffer + i * MASK_ROW, 0, LANES);
        spread_mask(matrix, matrix->mask + (r + i) * matrix->mask_stride,
                    buffer + i * MASK_ROW + LANES);
    }
    return buffer + LANES;
}

/* The mask of column i, and how far it is to that of the next row. */
ALWAYS_INLINE const uint8_t *mask_of_column(int masked, const uint8_t *mask, ptrdiff_t i)
{
    return masked == MASKED_BY_ELEMENT ? mask + i : mask;
}

ALWAYS_INLINE ptrdiff_t mask_pitch(int masked)
{
    return masked == MASKED_BY_ELEMENT ? MASK_ROW : masked == MASKED_BY_ROW ? 1 : 0;
}

/* The last LANES elements of a run. Of a shorter run, all it has, behind something finite. */
ALWAYS_INLINE const void *last_step(const void *x, ptrdiff_t len, size_t size, void *buffer)
{
    if (len >= LANES)
        return (const char *)x + (size_t)(len - LANES) * size;
    memset(buffer, 0, LANES * size);
    memcpy((char *)buffer + (size_t)(LANES - len) * size, x, (size_t)len * size);
    return buffer;
}

#define DTYPE float32
#define MASKED_A masked_vf
#define ROW_MASKED_A row_masked_vf
#define T float
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define DTYPE float64
#define MASKED_A masked_vd
#define ROW_MASKED_A row_masked_vd
#define T double
#define A double
#define VA vd
#define LOAD_A load_float64
#define SPREAD_A spread_double
#include "_kernels_dtype.h"

#define DTYPE float16
#define MASKED_A masked_vf
#define ROW_MASKED_A row_masked_vf
#define T uint16_t
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define DTYPE bfloat16
#define MASKED_A masked_vf
#define ROW_MASKED_A row_masked_vf
#define T uint16_t
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define KERNELS(dtype) \
    { \
        elements_##dtype, put_elements_##dtype, moments_##dtype, products_##dtype, \
            normalize_##dtype, gradient_##dtype, column_moments_##dtype, column_products_##dtype, \
            column_normalize_##dtype, column_gradient_##dtype, count, invstd, END_STREAMING \
    }

const fastbn_isa PASTE(fastbn_isa_, ISA) = {
    STRING(ISA), KERNELS(float32), KERNELS(float64), KERNELS(float16), KERNELS(bfloat16),
};
