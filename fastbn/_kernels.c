/* Compiled once per instruction set, with ISA set to its name. */
#include "_kernels_registers.h"

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

enum {
    COLUMNS = FASTBN_COLUMNS,
    ROWS_AT_A_TIME = 8,
    CACHE_LINE = 64,
    BUFFER_BYTES = 4096,
};

static void collapse_sums(const fastbn_sums *sums, ptrdiff_t rows, fastbn_pair *pairs)
{
    for (ptrdiff_t r = 0; r < rows; r++) {
        registers s = load_sums(sums[r].first, sums[r].second);
        pairs[r].first = collapse(s.first);
        pairs[r].second = collapse(s.second);
    }
}

#define DTYPE float32
#define T float
#define A float
#define VA vf
#define LOAD_A load_float32
#include "_kernels_dtype.h"

#define DTYPE float64
#define T double
#define A double
#define VA vd
#define LOAD_A load_float64
#include "_kernels_dtype.h"

#define DTYPE float16
#define T uint16_t
#define A float
#define VA vf
#define LOAD_A load_float32
#include "_kernels_dtype.h"

#define DTYPE bfloat16
#define T uint16_t
#define A float
#define VA vf
#define LOAD_A load_float32
#include "_kernels_dtype.h"

#define KERNELS(dtype) \
    { \
        element_##dtype, moments_##dtype, products_##dtype, normalize_##dtype, gradient_##dtype, \
            column_moments_##dtype, column_products_##dtype, column_normalize_##dtype, \
            column_gradient_##dtype, collapse_sums, end_streaming \
    }

const fastbn_isa PASTE(fastbn_isa_, ISA) = {
    STRING(ISA), KERNELS(float32), KERNELS(float64), KERNELS(float16), KERNELS(bfloat16),
};
