/* Bits of an array's elements, in the order of memory. In `bytes` those of the first one's byte that
 * come before it have room, too. */
#ifndef FASTBN_KERNELS_BITS_H
#define FASTBN_KERNELS_BITS_H

#include "common.h"

/* A byte, 255 or 0, for each of so many bits. */
static inline void spread_bits(const uint8_t *bits, ptrdiff_t first, ptrdiff_t count, uint8_t *bytes)
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
NOT_INLINE void gather_bits(uint8_t *bytes, ptrdiff_t first, ptrdiff_t count, uint8_t *bits)
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

#endif
