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
    /* bytes of a row of columns of a mask: before the first one a step may begin */
    MASK_ROW = FASTBN_LANES + FASTBN_COLUMNS,
};

static void invstd(const double *m2, double n, double eps, ptrdiff_t count, double *to)
{
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = 1.0 / sqrt(m2[c] / n + eps);
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

/* A byte per column, from those of a row of the mask. */
static void spread_mask(const fastbn_matrix *matrix, const uint8_t *mask, uint8_t *to)
{
    const ptrdiff_t channels = matrix->channels, run = matrix->run;
    for (ptrdiff_t j = 0; j < matrix->len; j += channels * run, mask += run)
        if (run == 1)
            memset(to + j, *mask, (size_t)channels);
        else
            for (ptrdiff_t c = 0; c < channels; c++)
                memcpy(to + j + c * run, mask, (size_t)run);
}

/* The same for `rows` rows from row r on, each after LANES bytes of 0. */
static void spread_mask_rows(const fastbn_matrix *matrix, ptrdiff_t r, ptrdiff_t rows, uint8_t *to)
{
    for (ptrdiff_t i = 0; i < rows; i++, to += MASK_ROW) {
        memset(to, 0, LANES);
        spread_mask(matrix, matrix->mask + (r + i) * matrix->mask_stride, to + LANES);
    }
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
#define T float
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define DTYPE float64
#define MASKED_A masked_vd
#define T double
#define A double
#define VA vd
#define LOAD_A load_float64
#define SPREAD_A spread_double
#include "_kernels_dtype.h"

#define DTYPE float16
#define MASKED_A masked_vf
#define T uint16_t
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define DTYPE bfloat16
#define MASKED_A masked_vf
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
            column_normalize_##dtype, column_gradient_##dtype, invstd, END_STREAMING \
    }

const fastbn_isa PASTE(fastbn_isa_, ISA) = {
    STRING(ISA), KERNELS(float32), KERNELS(float64), KERNELS(float16), KERNELS(bfloat16),
};
