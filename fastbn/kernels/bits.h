/* Bits of an array's elements, in the order of memory. */
#ifndef FASTBN_KERNELS_BITS_H
#define FASTBN_KERNELS_BITS_H

#include "common.h"

#if defined(__SSE2__) || defined(_M_X64)
#  include <emmintrin.h>
#endif

/* So many bytes are read at a time: bits for all lanes of a register, from any bit of a byte on. */
enum { BITS_BYTES = 4 };

/* The bits from the i-th on, the first of them in the lowest place. */
ALWAYS_INLINE uint32_t bits_from(const uint8_t *bits, size_t i)
{
    const uint8_t *p = bits + i / 8;
    const uint32_t low = (uint32_t)(p[0] | p[1] << 8), high = (uint32_t)(p[2] | p[3] << 8);
    return (low | high << 16) >> i % 8;
}

/* A bit for each of 16 bytes, which are 255 or 0. */
static inline int bits_of_16(const uint8_t *bytes)
{
#if defined(__SSE2__) || defined(_M_X64)
    return _mm_movemask_epi8(_mm_loadu_si128((const __m128i *)bytes));
#else
    const uint64_t ones = 0x0101010101010101u, diagonal = 0x8040201008040201u;
    uint64_t eight[2];
    memcpy(eight, bytes, sizeof eight);
    return (int)((eight[0] & diagonal) * ones >> 56 | (eight[1] & diagonal) * ones >> 56 << 8);
#endif
}

/* Sets so many bits, at least one, which are zeros, from bytes, before which those of the first one's
 * byte have room, too. Other threads may set bits of the first and the last byte at the same time. */
NOT_INLINE void gather_bits(uint8_t *bytes, ptrdiff_t first, ptrdiff_t count, uint8_t *bits)
{
    const ptrdiff_t begin = first / 8, end = (first + count + 7) / 8;
    ptrdiff_t k = begin + 1;
    memset(bytes, 0, (size_t)(first % 8));
    memset(bytes + first % 8 + count, 0, 16);
    or_atomically(bits + begin, (uint8_t)bits_of_16(bytes));
    for (bytes += 8; k + 2 < end; k += 2, bytes += 16) {
        const int sixteen = bits_of_16(bytes);
        bits[k] = (uint8_t)sixteen;
        bits[k + 1] = (uint8_t)(sixteen >> 8);
    }
    for (; k < end; k++, bytes += 8)
        or_atomically(bits + k, (uint8_t)bits_of_16(bytes));
}

#endif
