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

#define DTYPE float32
#define T float
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define DTYPE float64
#define T double
#define A double
#define VA vd
#define LOAD_A load_float64
#define SPREAD_A spread_double
#include "_kernels_dtype.h"

#define DTYPE float16
#define T uint16_t
#define A float
#define VA vf
#define LOAD_A load_float32
#define SPREAD_A spread_float
#include "_kernels_dtype.h"

#define DTYPE bfloat16
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
