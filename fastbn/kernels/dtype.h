/* The kernels of kernels.h for one dtype. kernels.c includes this file once for each, and defines
 *   DTYPE     the name of the dtype
 *   T         the type of an element
 *   A, VA     the type of element-wise arithmetic, and a register of it
 *   ORDER_A, ORDER_MAX_A  an integer of as many bits as A, and its greatest value
 *   LOAD_A    the function that loads such a register
 *   WIDEN_A   the function that makes a register of doubles from a piece of such a register
 *   GREATER_A, LESS_A, IF_OUTSIDE_A, ZERO_OUTSIDE_A  those that choose lanes of such registers
 *   STORE_BYTES_A  the function that stores bytes for the lanes of such a register
 *   MASKED_A  the function that zeros the lanes of such a register that a mask has not
 *   SPREAD_A  the function that copies such values from channels to their columns
 *   TREES     1 if sums of this dtype may be in float32, 0 if not
 */
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

static void NAME(store_from_double)(const double *from, ptrdiff_t stride, ptrdiff_t count, void *to)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const T value = NAME(encode)((A)from[i]);
        memcpy((char *)to + i * stride, &value, sizeof value);
    }
}

#include "activation.h"
#include "sums.h"
#if TREES
#  include "trees.h"
#endif
#include "elementwise.h"

#undef ADD_ROWS
#undef VA_LANES
#undef NAME
#undef LOAD_A
#undef WIDEN_A
#undef ORDER_A
#undef ORDER_MAX_A
#undef GREATER_A
#undef LESS_A
#undef IF_OUTSIDE_A
#undef ZERO_OUTSIDE_A
#undef STORE_BYTES_A
#undef MASKED_A
#undef SPREAD_A
#undef VA
#undef A
#undef T
#undef DTYPE
#undef TREES
