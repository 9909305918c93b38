/* Bits of an array's elements, in the order of memory. */
#ifndef FASTBN_KERNELS_BITS_H
#define FASTBN_KERNELS_BITS_H

#include "common.h"

/* The bits from the i-th on, the first of them in the lowest place: those for all lanes of a
 * register, from any bit of a byte on, and more. */
ALWAYS_INLINE uint32_t bits_from(const uint8_t *bits, size_t i)
{
    const uint8_t *p = bits + i / 8;
    const uint32_t low = (uint32_t)(p[0] | p[1] << 8), high = (uint32_t)(p[2] | p[3] << 8);
    return (low | high << 16) >> i % 8;
}

/* Writes bits one behind the other, from any bit of a byte on. They were zeros. Other threads may
 * write bits of the first and of the last byte at the same time. */
typedef struct {
    uint8_t *to;      /* the byte of the first bit that waits to be written */
    uint64_t waiting; /* less than 32 bits */
    int count;
    int shares; /* whether others write to the byte at `to` */
} bit_writer;

ALWAYS_INLINE bit_writer begin_bits(uint8_t *bits, ptrdiff_t first)
{
    return (bit_writer){bits + first / 8, 0, (int)(first % 8), first % 8 != 0};
}

/* Sets bits of a byte of which other threads may set others at the same time. */
ALWAYS_INLINE void or_atomically(uint8_t *byte, uint8_t bits)
{
#if defined(__GNUC__)
    __atomic_fetch_or(byte, bits, __ATOMIC_RELAXED);
#else
    _InterlockedOr8((char *)byte, (char)bits);
#endif
}

ALWAYS_INLINE void store_32_bits(uint8_t *to, uint32_t bits)
{
    for (int k = 0; k < 4; k++) /* compilers make one store of four */
        to[k] = (uint8_t)(bits >> 8 * k);
}

NOT_INLINE void store_32_bits_beside_others(uint8_t *to, uint32_t bits)
{
    or_atomically(to, (uint8_t)bits);
    for (int k = 1; k < 4; k++)
        to[k] = (uint8_t)(bits >> 8 * k);
}

/* Writes the lowest bits of an integer, up to 32, the others of which are 0. */
ALWAYS_INLINE void write_bits(bit_writer *w, uint32_t bits, int count)
{
    w->waiting |= (uint64_t)bits << w->count;
    w->count += count;
    if (w->count < 32)
        return;
    if (w->shares)
        store_32_bits_beside_others(w->to, (uint32_t)w->waiting);
    else
        store_32_bits(w->to, (uint32_t)w->waiting);
    w->to += 4;
    w->waiting >>= 32;
    w->count -= 32;
    w->shares = 0;
}

ALWAYS_INLINE void end_bits(bit_writer *w)
{
    for (; w->count > 0; w->count -= 8, w->waiting >>= 8, w->shares = 0, w->to++)
        if (w->shares || w->count < 8)
            or_atomically(w->to, (uint8_t)w->waiting);
        else
            *w->to = (uint8_t)w->waiting;
}

#endif
