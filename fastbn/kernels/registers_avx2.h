/* The registers of registers.h for AVX2 and F16C. */
#ifndef FASTBN_KERNELS_REGISTERS_AVX2_H
#define FASTBN_KERNELS_REGISTERS_AVX2_H

#include <immintrin.h>

/* Registers of 32 bytes. */
typedef double vd __attribute__((vector_size(32)));
typedef float vf __attribute__((vector_size(32)));
enum { VD = 4, VF = 8 };

ALWAYS_INLINE vd widen_float32(const float *p)
{
    return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p));
}

ALWAYS_INLINE vd widen_lanes(vf v, int k)
{
    return (vd)_mm256_cvtps_pd(k == 0 ? _mm256_castps256_ps128((__m256)v)
                                      : _mm256_extractf128_ps((__m256)v, 1));
}

ALWAYS_INLINE vf load_float16(const uint16_t *p)
{
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

ALWAYS_INLINE vd widen_float16(const uint16_t *p)
{
    return (vd)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)));
}

ALWAYS_INLINE __m128i pack_float16(vf v)
{
    return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

ALWAYS_INLINE vf load_bfloat16(const uint16_t *p)
{
    const __m128i h = _mm_loadu_si128((const __m128i *)p);
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
}

ALWAYS_INLINE vd widen_bfloat16(const uint16_t *p)
{
    const __m128i h = _mm_loadl_epi64((const __m128i *)p);
    return (vd)_mm256_cvtps_pd((__m128)_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16));
}

ALWAYS_INLINE __m128i pack_bfloat16(vf v)
{
    const __m256i bits = (__m256i)v, high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i carry = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, carry), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}

ALWAYS_INLINE void store_float16(uint16_t *p, vf v)
{
    _mm_storeu_si128((__m128i *)p, pack_float16(v));
}

ALWAYS_INLINE void store_bfloat16(uint16_t *p, vf v)
{
    _mm_storeu_si128((__m128i *)p, pack_bfloat16(v));
}

ALWAYS_INLINE void pick_bytes(const uint8_t *from, const uint8_t *index, uint8_t *to)
{
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from),
                                                     _mm_loadu_si128((const __m128i *)index)));
}

/* The bytes of a mask for so many lanes, as masked_vd and masked_vf take them. */
ALWAYS_INLINE __m128i mask_bytes(const uint8_t *mask, int lanes)
{
    int32_t four;
    if (lanes > 4)
        return _mm_loadl_epi64((const __m128i *)mask);
    memcpy(&four, mask, sizeof four);
    return _mm_cvtsi32_si128(four);
}

ALWAYS_INLINE vd masked_vd(const uint8_t *mask, vd v)
{
    return (vd)_mm256_and_si256((__m256i)v, _mm256_cvtepi8_epi64(mask_bytes(mask, VD)));
}

ALWAYS_INLINE vf masked_vf(const uint8_t *mask, vf v)
{
    return (vf)_mm256_and_si256((__m256i)v, _mm256_cvtepi8_epi32(mask_bytes(mask, VF)));
}

#define COMPARISONS(v_type, suffix) \
    ALWAYS_INLINE v_type greater_##v_type(v_type a, v_type b) \
    { \
        return _mm256_max_##suffix(a, b); \
    } \
    ALWAYS_INLINE v_type less_##v_type(v_type a, v_type b) { return _mm256_min_##suffix(a, b); } \
    ALWAYS_INLINE v_type outside_##v_type(v_type v, v_type low, v_type high) \
    { \
        return _mm256_or_##suffix(_mm256_cmp_##suffix(v, low, _CMP_LT_OQ), \
                                  _mm256_cmp_##suffix(v, high, _CMP_GT_OQ)); \
    } \
    ALWAYS_INLINE v_type if_outside_##v_type(v_type v, v_type low, v_type high, v_type yes, \
                                             v_type no) \
    { \
        return _mm256_blendv_##suffix(no, yes, outside_##v_type(v, low, high)); \
    } \
    ALWAYS_INLINE v_type zero_outside_##v_type(v_type v, v_type low, v_type high, v_type no) \
    { \
        return _mm256_andnot_##suffix(outside_##v_type(v, low, high), no); \
    } \
    ALWAYS_INLINE uint32_t bits_inside_##v_type(v_type v, v_type low, v_type high) \
    { \
        const int outside = _mm256_movemask_##suffix(outside_##v_type(v, low, high)); \
        return (uint32_t)outside ^ ((1u << sizeof(v) / sizeof(v[0])) - 1); \
    }
COMPARISONS(vd, pd)
COMPARISONS(vf, ps)
#undef COMPARISONS

/* The bit of each lane comes to the place of its sign. */
ALWAYS_INLINE vf if_bits_vf(uint32_t bits, vf yes, vf no)
{
    const __m256i places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const __m256i signs = _mm256_sllv_epi32(_mm256_set1_epi32((int)bits), places);
    return _mm256_blendv_ps(no, yes, (__m256)signs);
}

ALWAYS_INLINE vd if_bits_vd(uint32_t bits, vd yes, vd no)
{
    const __m256i places = _mm256_setr_epi64x(63, 62, 61, 60);
    const __m256i signs = _mm256_sllv_epi64(_mm256_set1_epi64x(bits), places);
    return _mm256_blendv_pd(no, yes, (__m256d)signs);
}

ALWAYS_INLINE vd multiply_add_vd(vd a, vd b, vd c)
{
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

ALWAYS_INLINE vd sums_of_lanes(const vd *v)
{
#define HALVES(a, b, which) ((vd)_mm256_permute2f128_pd((__m256d)(a), (__m256d)(b), which))
#define ADD_HALVES(a, b) (HALVES(a, b, 0x20) + HALVES(a, b, 0x31))
    const vd even = ADD_HALVES(v[0], v[2]), odd = ADD_HALVES(v[1], v[3]);
#undef ADD_HALVES
#undef HALVES
    return (vd)_mm256_unpacklo_pd((__m256d)even, (__m256d)odd) +
           (vd)_mm256_unpackhi_pd((__m256d)even, (__m256d)odd);
}

#define HAS_NONTEMPORAL 1

ALWAYS_INLINE void copy_register_nontemporal(char *to, const char *from)
{
    _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
}

static void fence_nontemporal(void) { _mm_sfence(); }

#endif
