/* Registers, and how elements of each dtype come into them and out.
 *
 * This file has what all instruction sets have in common, and includes the file of one of them. The
 * kernels are the same text for all. A file of an instruction set offers these names:
 *
 *   vd, vf                         a register of doubles, and one of floats: types that +, -, * and
 *                                  {0} work on, with gcc and clang vector types
 *   VD, VF                         how many lanes they have; VD is at most LANES, a power of 2
 *   widen_float32(p)               a vd from VD floats at p
 *   widen_lanes(vf, k)             a vd from the k-th VD lanes of a vf
 *   load_float16(p)                a vf from VF elements at p, which need not be aligned
 *   widen_float16(p)               a vd from VD elements at p
 *   store_float16(p, vf)           rounds to nearest even; NaNs stay NaNs
 *   load_, widen_, store_bfloat16  the same for bfloat16
 *   masked_vd(mask, vd),           the register, with zeros in the lanes for which the mask has 0
 *   masked_vf(mask, vf)            and not 255; lane i has byte i; MASK_BYTES bytes may be read
 *   pick_bytes(from, index, to)    LANES bytes, to[i] = from[index[i]]; indices are below LANES,
 *                                  and so many bytes may be read
 *   greater_vd(a, b), less_vd(a, b)  lane by lane: a where it is greater, or less, than b; b
 *                                  elsewhere, also where one of them is NaN
 *   if_outside_vd(v, low, high, yes, no)  lane by lane: `yes` where v < low or v > high, and `no`
 *                                  elsewhere, also where one of them is NaN
 *   zero_outside_vd(v, low, high, no)  the same with zeros for `yes`. All of these for vf, too
 *   if_bits_vd(bits, yes, no)      lane by lane: `yes` where bit i of an integer is 1, and `no`
 *                                  elsewhere. The same for vf
 *   bits_inside_vd(v, low, high)   an integer of which bit i is 0 where v < low or v > high in lane
 *                                  i, and 1 where not, also where one of them is NaN. For vf, too
 *   multiply_add_vd(a, b, c)       a * b + c for a and b whose product is exact, so that one
 *                                  instruction and two give the same bits
 *   sums_of_lanes(v)               lane k has the sum of the lanes of v[k], one of VD registers:
 *                                  lane i is added to lane i + VD / 2, then to lane i + VD / 4, ...
 *   HAS_NONTEMPORAL                1 or 0; where it is 1,
 *   copy_register_nontemporal(to, from)  copies sizeof(vf) bytes by a non-temporal store, to an
 *                                  aligned address, and
 *   fence_nontemporal()            makes such stores visible to other threads
 *
 * The file may use what stands above the line that includes it.
 */
#ifndef FASTBN_KERNELS_REGISTERS_H
#define FASTBN_KERNELS_REGISTERS_H

#include "kernels.h"

#include <math.h>
#include <stdint.h>
#include <string.h>
#if !defined(__GNUC__)
#  include <intrin.h>
#endif

#if defined(__GNUC__)
#  define ALWAYS_INLINE static inline __attribute__((always_inline))
/* For what would be long where it is inlined. Not every dtype uses each. */
#  define NOT_INLINE static __attribute__((noinline, unused))
/* Of this library alone, so that calls go straight to it. */
#  define HIDDEN __attribute__((visibility("hidden")))
#  define CACHE_ALIGNED __attribute__((aligned(64)))
#  define UNROLL _Pragma("GCC unroll 16")
#  define NO_UNROLL _Pragma("GCC unroll 1")
#  define PREFETCH(p) __builtin_prefetch(p)
#  define PREFETCH_TO_WRITE(p) __builtin_prefetch(p, 1)
#else
#  define ALWAYS_INLINE static __inline
#  define NOT_INLINE static
#  define HIDDEN
#  define CACHE_ALIGNED __declspec(align(64))
#  define UNROLL
#  define NO_UNROLL
#  define PREFETCH(p)
#  define PREFETCH_TO_WRITE(p)
#endif

enum {
    LANES = FASTBN_LANES,
    MASK_BYTES = FASTBN_MASK_BYTES,
    CACHE_LINE = 64,
};

/* Single elements. Those of float16 and bfloat16 are the integers that hold their bits. */

ALWAYS_INLINE double decode_float64(double x) { return x; }
ALWAYS_INLINE double encode_float64(double x) { return x; }
ALWAYS_INLINE float decode_float32(float x) { return x; }
ALWAYS_INLINE float encode_float32(float x) { return x; }

ALWAYS_INLINE float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

ALWAYS_INLINE uint32_t bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ALWAYS_INLINE float decode_float16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, size = h & 0x7fff; /* without its sign */
    if (size < 0x0400) /* subnormal: a multiple of 2^-24 */
        return sign ? -(float)size * 0x1p-24f : (float)size * 0x1p-24f;
    return float_of_bits(sign | ((size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23)));
}

ALWAYS_INLINE uint16_t encode_float16(float x)
{
    const uint32_t sign = bits_of_float(x) >> 16 & 0x8000, size = bits_of_float(x) & 0x7fffffff;
    if (size > 0x7f800000) /* NaN */
        return (uint16_t)(sign | 0x7e00 | (size >> 13 & 0x3ff));
    if (size >= 0x477ff000) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) /* subnormal: a multiple of 2^-24 */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(size) * 0x1p24f + 0x1p23f) & 0x7fff));
    return (uint16_t)(sign | (((size + 0xfff + (size >> 13 & 1)) >> 13) - (112u << 10)));
}

ALWAYS_INLINE float decode_bfloat16(uint16_t h) { return float_of_bits((uint32_t)h << 16); }

ALWAYS_INLINE uint16_t encode_bfloat16(float x)
{
    const uint32_t bits = bits_of_float(x);
    if (x != x)
        return (uint16_t)(bits >> 16 | 0x40); /* rounding could carry a NaN into an infinity */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__)
#  include "registers_avx512.h"
#elif defined(__AVX2__)
#  include "registers_avx2.h"
#else
#  include "registers_generic.h"
#endif

/* The registers of doubles, and of floats, that make up a step of LANES elements. */
enum { STEPS = LANES / VD, FLOAT_STEPS = LANES / VF };

ALWAYS_INLINE vd load_float64(const double *p)
{
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS_INLINE vd itself(vd v, int k)
{
    (void)k;
    return v;
}

ALWAYS_INLINE void store_float64(double *p, vd v) { memcpy(p, &v, sizeof v); }

ALWAYS_INLINE vd widen_float64(const double *p) { return load_float64(p); }

ALWAYS_INLINE vf load_float32(const float *p)
{
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS_INLINE void store_float32(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* Keeps a value that is used twice in its register. gcc would load it from memory twice, and a load
 * that crosses a cache line takes as long as two. */
#if defined(__SSE2__) && defined(__GNUC__)
#  define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#  define IN_REGISTER(v) (void)(v)
#endif

/* How many elements after the i-th memory is prefetched. */
ALWAYS_INLINE ptrdiff_t prefetch_distance(fastbn_ahead ahead, ptrdiff_t i)
{
    return i < ahead.border ? ahead.near : ahead.jump;
}

/* Whether an output lies a little behind an input, in the low 12 bits of their addresses. Loads
 * that follow a store to such an address wait, as if they might read what it has stored. Arrays of
 * whole pages often lie one behind the other in the heap, 16 bytes apart. */
ALWAYS_INLINE int follows_closely(const void *to, const void *from)
{
    const uintptr_t distance = ((uintptr_t)to - (uintptr_t)from) % 4096;
    return 0 < distance && distance <= 256;
}

/* Copies memory by non-temporal stores, which do not read first what they overwrite. A cache line
 * that is stored in pieces, or in both ways, costs more than an ordinary store: the bytes of the
 * first and the last line, where they are not whole, are stored ordinarily. */
ALWAYS_INLINE void copy_nontemporal(char *to, const char *from, size_t bytes)
{
#if HAS_NONTEMPORAL
    const size_t head = -(uintptr_t)to % CACHE_LINE;
    if (head < bytes) {
        memcpy(to, from, head);
        to += head, from += head, bytes -= head;
        for (; bytes >= CACHE_LINE; to += CACHE_LINE, from += CACHE_LINE, bytes -= CACHE_LINE)
            UNROLL for (int i = 0; i < CACHE_LINE; i += (int)sizeof(vf))
                copy_register_nontemporal(to + i, from + i);
    }
#endif
    memcpy(to, from, bytes);
}

#if HAS_NONTEMPORAL
#  define FENCE_NONTEMPORAL fence_nontemporal
#else
#  define FENCE_NONTEMPORAL NULL
#endif

/* The two sums of each lane of a step. */

typedef struct {
    vd first[STEPS], second[STEPS];
} step_sums;

ALWAYS_INLINE step_sums load_sums(const double *first, const double *second)
{
    step_sums r;
    UNROLL for (int j = 0; j < STEPS; j++) {
        r.first[j] = load_float64(first + j * VD);
        r.second[j] = load_float64(second + j * VD);
    }
    return r;
}

ALWAYS_INLINE step_sums no_sums(void)
{
    step_sums r;
    UNROLL for (int j = 0; j < STEPS; j++)
        r.first[j] = r.second[j] = (vd){0};
    return r;
}

ALWAYS_INLINE step_sums add_sums(step_sums a, step_sums b)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        a.first[j] += b.first[j];
        a.second[j] += b.second[j];
    }
    return a;
}

ALWAYS_INLINE void store_sums(double *first, double *second, step_sums r)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        store_float64(first + j * VD, r.first[j]);
        store_float64(second + j * VD, r.second[j]);
    }
}

/* A value for each lane of a step. */
typedef struct {
    vd at[STEPS];
} step;

ALWAYS_INLINE step load_step(const double *p)
{
    step s;
    UNROLL for (int j = 0; j < STEPS; j++)
        s.at[j] = load_float64(p + j * VD);
    return s;
}

ALWAYS_INLINE step same_step(double value)
{
    step s;
    UNROLL for (int j = 0; j < STEPS; j++)
        s.at[j] = (vd){0} + value;
    return s;
}

/* Which lanes of a step are valid: those from `skip` on, except those whose byte of the mask, where
 * the step is masked, is 0. That of the next step, or of the same one of the next row, is `pitch`
 * bytes further on. */
typedef struct {
    int masked;
    const uint8_t *mask;
    ptrdiff_t pitch;
    long long skip;
} valid_lanes;

/* Those of a later step. */
ALWAYS_INLINE valid_lanes lanes_of_next(valid_lanes lanes, ptrdiff_t t)
{
    if (lanes.masked)
        lanes.mask += t * lanes.pitch;
    return lanes;
}

/* Whether all lanes of the j-th register of a step have been added before; it has `count` lanes. */
ALWAYS_INLINE int is_skipped(valid_lanes lanes, int j, int count)
{
    return lanes.skip >= (j + 1) * count;
}

/* Zeros the lanes below `skip` in the j-th register of a step. */
#if defined(__GNUC__)
#  define ZERO_BELOW(name, v_type, int_type, count) \
    ALWAYS_INLINE v_type name(long long skip, int j, v_type v) \
    { \
        static const int_type lanes[LANES] = {0, 1, 2,  3,  4,  5,  6,  7, \
                                              8, 9, 10, 11, 12, 13, 14, 15}; \
        typedef int_type vi __attribute__((vector_size(sizeof(v_type)))); \
        vi lane; \
        memcpy(&lane, lanes + j * count, sizeof lane); \
        return (v_type)((vi)v & (lane >= (int_type)skip)); \
    }
#else
#  define ZERO_BELOW(name, v_type, int_type, count) \
    ALWAYS_INLINE v_type name(long long skip, int j, v_type v) { return j >= skip ? v : 0; }
#endif
ZERO_BELOW(zero_vd_below, vd, long long, VD)
ZERO_BELOW(zero_vf_below, vf, int, VF)
#undef ZERO_BELOW

/* The j-th register of a step, with zeros in the lanes that are not valid. */
#define ONLY_VALID(name, v_type, masked_v, zero_v_below, count) \
    ALWAYS_INLINE v_type name(valid_lanes lanes, int j, v_type v) \
    { \
        if (lanes.masked) \
            v = masked_v(lanes.mask + j * count, v); \
        return lanes.skip ? zero_v_below(lanes.skip, j, v) : v; \
    }
ONLY_VALID(only_valid, vd, masked_vd, zero_vd_below, VD)
ONLY_VALID(only_valid_floats, vf, masked_vf, zero_vf_below, VF)
#undef ONLY_VALID

/* Sums, with zeros in the lanes below `skip`. */
ALWAYS_INLINE step_sums sums_from_lane(step_sums sums, ptrdiff_t skip)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        sums.first[j] = zero_vd_below(skip, j, sums.first[j]);
        sums.second[j] = zero_vd_below(skip, j, sums.second[j]);
    }
    return sums;
}

/* The two sums of a tree, for the lanes of a register and for all lanes of a step. */
typedef struct {
    vf first, second;
} tree_sum;

typedef struct {
    tree_sum of[FLOAT_STEPS];
} tree_sums;

ALWAYS_INLINE tree_sums no_tree(void)
{
    tree_sums r;
    UNROLL for (int j = 0; j < FLOAT_STEPS; j++)
        r.of[j].first = r.of[j].second = (vf){0};
    return r;
}

ALWAYS_INLINE tree_sum add_tree_sums(tree_sum a, tree_sum b)
{
    return (tree_sum){a.first + b.first, a.second + b.second};
}

ALWAYS_INLINE step_sums add_tree(step_sums sums, tree_sums tree)
{
    enum { PIECES = VF / VD };
    UNROLL for (int j = 0; j < STEPS; j++) {
        sums.first[j] += widen_lanes(tree.of[j / PIECES].first, j % PIECES);
        sums.second[j] += widen_lanes(tree.of[j / PIECES].second, j % PIECES);
    }
    return sums;
}

/* A float for each lane of a step. */
typedef struct {
    vf at[FLOAT_STEPS];
} float_step;

ALWAYS_INLINE float_step same_float_step(double value)
{
    float_step s;
    UNROLL for (int j = 0; j < FLOAT_STEPS; j++)
        s.at[j] = (vf){0} + (float)value;
    return s;
}

ALWAYS_INLINE float_step load_float_step(const float *p)
{
    float_step s;
    UNROLL for (int j = 0; j < FLOAT_STEPS; j++)
        s.at[j] = load_float32(p + j * VF);
    return s;
}

#endif
