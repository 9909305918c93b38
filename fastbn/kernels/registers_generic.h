/* The registers of registers.h where no better ones are known: 16 bytes in the vector types of gcc
 * and clang, with what SSE2 has beside them, and one element where a compiler has no such types. */
#ifndef FASTBN_KERNELS_REGISTERS_GENERIC_H
#define FASTBN_KERNELS_REGISTERS_GENERIC_H

#if defined(__SSE2__)
#  include <immintrin.h>
#endif

#if defined(__GNUC__)
/* Registers of 16 bytes. */
typedef double vd __attribute__((vector_size(16)));
typedef float vf __attribute__((vector_size(16)));
enum { VD = 2, VF = 4 };
#else
/* "Registers" of one element. */
typedef double vd;
typedef float vf;
enum { VD = 1, VF = 1 };
#endif

#if defined(__SSE2__)

ALWAYS_INLINE vd widen_float32(const float *p)
{
    return (vd)_mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)));
}

ALWAYS_INLINE vd widen_lanes(vf v, int k)
{
    return (vd)_mm_cvtps_pd(k == 0 ? (__m128)v : _mm_movehl_ps((__m128)v, (__m128)v));
}

#else

ALWAYS_INLINE vd widen_float32(const float *p)
{
    double wide[VD];
    vd v;
    for (int i = 0; i < VD; i++)
        wide[i] = p[i];
    memcpy(&v, wide, sizeof v);
    return v;
}

ALWAYS_INLINE vd widen_lanes(vf v, int k)
{
    float lanes[VF];
    memcpy(lanes, &v, sizeof v);
    return widen_float32(lanes + k * VD);
}

#endif

/* The 16-bit dtypes are converted element by element, by functions that are too long for inlining.
 */
#define BY_ELEMENT(dtype) \
    NOT_INLINE vf load_##dtype(const uint16_t *p) \
    { \
        float wide[VF]; \
        vf v; \
        for (int i = 0; i < VF; i++) \
            wide[i] = decode_##dtype(p[i]); \
        memcpy(&v, wide, sizeof v); \
        return v; \
    } \
    NOT_INLINE vd widen_##dtype(const uint16_t *p) \
    { \
        double wide[VD]; \
        vd v; \
        for (int i = 0; i < VD; i++) \
            wide[i] = decode_##dtype(p[i]); \
        memcpy(&v, wide, sizeof v); \
        return v; \
    } \
    NOT_INLINE void store_##dtype(uint16_t *p, vf v) \
    { \
        float wide[VF]; \
        memcpy(wide, &v, sizeof wide); \
        for (int i = 0; i < VF; i++) \
            p[i] = encode_##dtype(wide[i]); \
    }
BY_ELEMENT(float16)
BY_ELEMENT(bfloat16)
#undef BY_ELEMENT

ALWAYS_INLINE void pick_bytes(const uint8_t *from, const uint8_t *index, uint8_t *to)
{
    for (int i = 0; i < LANES; i++)
        to[i] = from[index[i]];
}

ALWAYS_INLINE signed char mask_byte(const uint8_t *mask, int i) { return (signed char)mask[i]; }

#if defined(__GNUC__)

typedef long long lanes_of_vd __attribute__((vector_size(16)));
typedef int lanes_of_vf __attribute__((vector_size(16)));

NOT_INLINE vd masked_vd(const uint8_t *mask, vd v)
{
    const lanes_of_vd wide = {mask_byte(mask, 0), mask_byte(mask, 1)};
    return (vd)((lanes_of_vd)v & wide);
}

NOT_INLINE vf masked_vf(const uint8_t *mask, vf v)
{
    const lanes_of_vf wide = {mask_byte(mask, 0), mask_byte(mask, 1), mask_byte(mask, 2),
                              mask_byte(mask, 3)};
    return (vf)((lanes_of_vf)v & wide);
}

/* A bit for each lane, of which all bits are 1, or none. */
#  if defined(__SSE2__)
ALWAYS_INLINE uint32_t bits_of_vd(lanes_of_vd v) { return (uint32_t)_mm_movemask_pd((__m128d)v); }
ALWAYS_INLINE uint32_t bits_of_vf(lanes_of_vf v) { return (uint32_t)_mm_movemask_ps((__m128)v); }
#  else
ALWAYS_INLINE uint32_t bits_of_vd(lanes_of_vd v) { return (uint32_t)((v[0] & 1) | (v[1] & 2)); }
ALWAYS_INLINE uint32_t bits_of_vf(lanes_of_vf v)
{
    return (uint32_t)((v[0] & 1) | (v[1] & 2) | (v[2] & 4) | (v[3] & 8));
}
#  endif

#define COMPARISONS(v_type, lanes_of_v) \
    ALWAYS_INLINE v_type if_##v_type(lanes_of_v choice, v_type yes, v_type no) \
    { \
        return (v_type)(((lanes_of_v)yes & choice) | ((lanes_of_v)no & ~choice)); \
    } \
    ALWAYS_INLINE v_type greater_##v_type(v_type a, v_type b) { return if_##v_type(a > b, a, b); } \
    ALWAYS_INLINE v_type less_##v_type(v_type a, v_type b) { return if_##v_type(a < b, a, b); } \
    ALWAYS_INLINE v_type if_outside_##v_type(v_type v, v_type low, v_type high, v_type yes, \
                                             v_type no) \
    { \
        return if_##v_type((v < low) | (v > high), yes, no); \
    } \
    ALWAYS_INLINE v_type zero_outside_##v_type(v_type v, v_type low, v_type high, v_type no) \
    { \
        return (v_type)((lanes_of_v)no & ~(lanes_of_v)((v < low) | (v > high))); \
    } \
    ALWAYS_INLINE uint32_t bits_inside_##v_type(v_type v, v_type low, v_type high) \
    { \
        return bits_of_##v_type(~((v < low) | (v > high))); \
    }
COMPARISONS(vd, lanes_of_vd)
COMPARISONS(vf, lanes_of_vf)
#undef COMPARISONS

ALWAYS_INLINE vf if_bits_vf(uint32_t bits, vf yes, vf no)
{
    const lanes_of_vf of_lane = {1, 2, 4, 8};
    return if_vf((of_lane & (int)bits) != 0, yes, no);
}

ALWAYS_INLINE vd if_bits_vd(uint32_t bits, vd yes, vd no)
{
    const lanes_of_vd of_lane = {1, 2};
    return if_vd((of_lane & (long long)bits) != 0, yes, no);
}

ALWAYS_INLINE vd sums_of_lanes(const vd *v) { return (vd){v[0][0] + v[0][1], v[1][0] + v[1][1]}; }

#else

NOT_INLINE vd masked_vd(const uint8_t *mask, vd v)
{
    return mask_byte(mask, 0) ? v : 0.0;
}

NOT_INLINE vf masked_vf(const uint8_t *mask, vf v)
{
    return mask_byte(mask, 0) ? v : 0.0f;
}

#define COMPARISONS(v_type) \
    ALWAYS_INLINE v_type greater_##v_type(v_type a, v_type b) { return a > b ? a : b; } \
    ALWAYS_INLINE v_type less_##v_type(v_type a, v_type b) { return a < b ? a : b; } \
    ALWAYS_INLINE v_type if_outside_##v_type(v_type v, v_type low, v_type high, v_type yes, \
                                             v_type no) \
    { \
        return v < low || v > high ? yes : no; \
    } \
    ALWAYS_INLINE v_type zero_outside_##v_type(v_type v, v_type low, v_type high, v_type no) \
    { \
        return v < low || v > high ? 0 : no; \
    } \
    ALWAYS_INLINE uint32_t bits_inside_##v_type(v_type v, v_type low, v_type high) \
    { \
        return !(v < low || v > high); \
    }
COMPARISONS(vd)
COMPARISONS(vf)
#undef COMPARISONS

ALWAYS_INLINE vf if_bits_vf(uint32_t bits, vf yes, vf no) { return bits & 1 ? yes : no; }
ALWAYS_INLINE vd if_bits_vd(uint32_t bits, vd yes, vd no) { return bits & 1 ? yes : no; }

ALWAYS_INLINE vd sums_of_lanes(const vd *v) { return v[0]; }

#endif

ALWAYS_INLINE vd multiply_add_vd(vd a, vd b, vd c) { return a * b + c; }

#if defined(__SSE2__)
#  define HAS_NONTEMPORAL 1

ALWAYS_INLINE void copy_register_nontemporal(char *to, const char *from)
{
    _mm_stream_si128((__m128i *)to, _mm_loadu_si128((const __m128i *)from));
}

static void fence_nontemporal(void) { _mm_sfence(); }
#else
#  define HAS_NONTEMPORAL 0
#endif

#endif
