/* The kernels of kernels.h for one dtype and one instruction set. The file of a dtype defines
 *   DTYPE            the name of the dtype
 *   T                the type of an element
 *   ELEMENT_BITS     how many bits it has
 *   ARITHMETIC_BITS  64 if results are computed in double; 32 if they are in float, and sums may be
 */
#include "bits.h"
#include "common.h"
#include "masks.h"

/* A, VA are the type of element-wise arithmetic, and a register of it; ORDER_A is an integer of as
 * many bits; LOAD_A loads a register, WIDEN_A makes one of doubles from a piece of it. */
#if ARITHMETIC_BITS == 64
#  define A double
#  define VA vd
#  define ORDER_A int64_t
#  define ORDER_MAX_A INT64_MAX
#  define LOAD_A load_float64
#  define WIDEN_A itself
#else
#  define A float
#  define VA vf
#  define ORDER_A int32_t
#  define ORDER_MAX_A INT32_MAX
#  define LOAD_A load_float32
#  define WIDEN_A widen_lanes
#endif
#define MASKED_A PASTE(masked_, VA)
#define GREATER_A PASTE(greater_, VA)
#define LESS_A PASTE(less_, VA)
#define IF_OUTSIDE_A PASTE(if_outside_, VA)
#define ZERO_OUTSIDE_A PASTE(zero_outside_, VA)
#define IF_BITS_A PASTE(if_bits_, VA)
#define BITS_INSIDE_A PASTE(bits_inside_, VA)
#define SPREAD_A COMMON(PASTE(spread_, A))

#define NAME(f) PASTE(f##_, DTYPE)
#define VA_LANES ((ptrdiff_t)(sizeof(VA) / sizeof(A)))

ALWAYS_INLINE void NAME(load_strided)(const char *x, ptrdiff_t stride, ptrdiff_t count, double *to)
{
    for (ptrdiff_t i = 0; i < count; i++, x += stride) {
        T value;
        memcpy(&value, x, sizeof value);
        to[i] = (double)NAME(decode)(value);
    }
}

static void NAME(load_as_double)(const void *x, ptrdiff_t stride, ptrdiff_t count, double *to)
{
    if (stride == sizeof(T))
        NAME(load_strided)(x, sizeof(T), count, to);
    else
        NAME(load_strided)(x, stride, count, to);
}

ALWAYS_INLINE void NAME(store_strided)(const double *from, ptrdiff_t stride, ptrdiff_t count,
                                       char *to)
{
    for (ptrdiff_t i = 0; i < count; i++, to += stride) {
        const T value = NAME(encode)((A)from[i]);
        memcpy(to, &value, sizeof value);
    }
}

static void NAME(store_from_double)(const double *from, ptrdiff_t stride, ptrdiff_t count, void *to)
{
    if (stride == sizeof(T))
        NAME(store_strided)(from, sizeof(T), count, to);
    else
        NAME(store_strided)(from, stride, count, to);
}

/* Whether gates have bits, and gradients a second output: for more dtypes it would be much code. */
#define WRITES_PASSED (ELEMENT_BITS == 32)

#include "activation.h"
#include "sums.h"
#if ARITHMETIC_BITS == 32
#  include "trees.h"
#endif
#include "elementwise.h"
#define INTERLEAVES (HAS_NONTEMPORAL && ELEMENT_BITS == 32)
#if INTERLEAVES
#  include "interleaved.h"
#endif
#undef DX
#undef Y

const fastbn_kernels PASTE(PASTE(fastbn_kernels_, ISA), PASTE(_, DTYPE)) = {
    WRITES_PASSED,
    NAME(load_as_double),
    NAME(store_from_double),
    NAME(moments),
    NAME(products),
    NAME(column_moments),
    NAME(column_products),
#if ARITHMETIC_BITS == 32
    NAME(tree_moments),
    NAME(tree_products),
    NAME(column_tree_products),
    NAME(raw_moments),
    NAME(column_raw_moments),
    NAME(pivots),
#else
    NAME(moments),
    NAME(products),
    NAME(column_products),
    NAME(moments),
    NAME(column_moments),
    NULL,
#endif
#if INTERLEAVES
    NAME(moments_beside_results),
    NAME(products_beside_results),
#else
    NULL,
    NULL,
#endif
    NAME(normalize),
    NAME(gradient),
    NAME(column_normalize),
    NAME(column_gradient),
    NAME(gate_bounds),
    NAME(activation_gradient),
};
