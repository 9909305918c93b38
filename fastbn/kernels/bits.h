/* Bits of an array's elements, in the order of memory. */
#ifndef FASTBN_KERNELS_BITS_H
#define FASTBN_KERNELS_BITS_H

#include "common.h"

/* So many bytes are read at a time: bits for all lanes of a register, from any bit of a byte on. */
enum { BITS_BYTES = 4 };

/* The bits from the i-th on, the first of them in the lowest place. */
ALWAYS_INLINE uint32_t bits_from(const uint8_t *bits, size_t i)
{
    const uint8_t *p = bits + i / 8;
    const uint32_t low = (uint32_t)(p[0] | p[1] << 8), high = (uint32_t)(p[2] | p[3] << 8);
    return (low | high << 16) >> i % 8;
}

/* Sets so many bits, at least one, which are zeros, from bytes, before which those of the first one's
 * byte have room, too. Other threads may set bits of the first and the last byte at the same time. */
HIDDEN void COMMON(gather_bits)(uint8_t *bytes, ptrdiff_t first, ptrdiff_t count, uint8_t *bits);

#endif
