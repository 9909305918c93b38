/* The registers of registers.h for AVX-512 (F, BW, DQ, VL) and F16C. */
#ifndef FASTBN_KERNELS_REGISTERS_AVX512_H
#define FASTBN_KERNELS_REGISTERS_AVX512_H

#include <immintrin.h>

/* Registers of 64 bytes. */
typedef double vd __attribute__((vector_size(64)));
typedef float vf __attribute__((vector_size(64)));
enum { VD = 8, VF = 16 };

ALWAYS_INLINE vd widen_float32(const float *p)
{
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
}

ALWAYS_INLINE vd widen_lanes(vf v, int k)
{
    return (vd)_mm512_cvtps_pd(k == 0 ? _mm512_castps512_ps256((__m512)v)
                                      : _mm512_extractf32x8_ps((__m512)v, 1));
}

ALWAYS_INLINE vf load_float16(const uint16_t *p)
{
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

ALWAYS_INLINE vd widen_float16(const uint16_t *p)
{
    return (vd)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
}

ALWAYS_INLINE __m256i pack_float16(vf v)
{
    return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

ALWAYS_INLINE vf load_bfloat16(const uint16_t *p)
{
    const __m256i h = _mm256_loadu_si256((const __m256i *)p);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}

ALWAYS_INLINE vd widen_bfloat16(const uint16_t *p)
{
    const __m128i h = _mm_loadu_si128((const __m128i *)p);
    return (vd)_mm512_cvtps_pd((__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

ALWAYS_INLINE __m256i pack_bfloat16(vf v)
{
    const __m512i bits = (__m512i)v, high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i carry = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, carry), 16);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

ALWAYS_INLINE void store_float16(uint16_t *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, pack_float16(v));
}

ALWAYS_INLINE void store_bfloat16(uint16_t *p, vf v)
{
    _mm256_storeu_si256((__m256i *)p, pack_bfloat16(v));
}

ALWAYS_INLINE void pick_bytes(const uint8_t *from, const uint8_t *index, uint8_t *to)
{
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from),
                                                     _mm_loadu_si128((const __m128i *)index)));
}

/* The bytes of a mask for so many lanes, as masked_vd and masked_vf take them. */
ALWAYS_INLINE __m128i mask_bytes(const uint8_t *mask, int lanes)
{
    if (lanes > 8)
        return _mm_loadu_si128((const __m128i *)mask);
    return _mm_loadl_epi64((const __m128i *)mask);
}

ALWAYS_INLINE vd masked_vd(const uint8_t *mask, vd v)
{
    return (vd)_mm512_and_si512((__m512i)v, _mm512_cvtepi8_epi64(mask_bytes(mask, VD)));
}

ALWAYS_INLINE vf masked_vf(const uint8_t *mask, vf v)
{
    return (vf)_mm512_and_si512((__m512i)v, _mm512_cvtepi8_epi32(mask_bytes(mask, VF)));
}

#define COMPARISONS(v_type, suffix, mask) \
    ALWAYS_INLINE v_type greater_##v_type(v_type a, v_type b) \
    { \
        return _mm512_max_##suffix(a, b); \
    } \
    ALWAYS_INLINE v_type less_##v_type(v_type a, v_type b) { return _mm512_min_##suffix(a, b); } \
    ALWAYS_INLINE mask inside_##v_type(v_type v, v_type low, v_type high) \
    { \
        return _mm512_mask_cmp_##suffix##_mask(_mm512_cmp_##suffix##_mask(v, low, _CMP_NLT_UQ), v, \
                                               high, _CMP_NGT_UQ); \
    } \
    ALWAYS_INLINE v_type if_outside_##v_type(v_type v, v_type low, v_type high, v_type yes, \
                                             v_type no) \
    { \
        return _mm512_mask_blend_##suffix(inside_##v_type(v, low, high), yes, no); \
    } \
    ALWAYS_INLINE v_type zero_outside_##v_type(v_type v, v_type low, v_type high, v_type no) \
    { \
        return _mm512_maskz_mov_##suffix(inside_##v_type(v, low, high), no); \
    } \
    ALWAYS_INLINE uint32_t bits_inside_##v_type(v_type v, v_type low, v_type high) \
    { \
        return inside_##v_type(v, low, high); \
    }
COMPARISONS(vd, pd, __mmask8)
COMPARISONS(vf, ps, __mmask16)
#undef COMPARISONS

ALWAYS_INLINE vf if_bits_vf(uint32_t bits, vf yes, vf no)
{
    return _mm512_mask_blend_ps((__mmask16)bits, no, yes);
}

ALWAYS_INLINE vd if_bits_vd(uint32_t bits, vd yes, vd no)
{
    return _mm512_mask_blend_pd((__mmask8)bits, no, yes);
}

ALWAYS_INLINE vd multiply_add_vd(vd a, vd b, vd c)
{
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

ALWAYS_INLINE vd sums_of_lanes(const vd *v)
{
#define QUARTERS(a, b, which) ((vd)_mm512_shuffle_f64x2((__m512d)(a), (__m512d)(b), which))
#define ADD_HALVES(a, b) (QUARTERS(a, b, 0x44) + QUARTERS(a, b, 0xee))
#define ADD_QUARTERS(a, b) (QUARTERS(a, b, 0x88) + QUARTERS(a, b, 0xdd))
    const vd even = ADD_QUARTERS(ADD_HALVES(v[0], v[2]), ADD_HALVES(v[4], v[6]));
    const vd odd = ADD_QUARTERS(ADD_HALVES(v[1], v[3]), ADD_HALVES(v[5], v[7]));
#undef ADD_QUARTERS
#undef ADD_HALVES
#undef QUARTERS
    return (vd)_mm512_unpacklo_pd((__m512d)even, (__m512d)odd) +
           (vd)_mm512_unpackhi_pd((__m512d)even, (__m512d)odd);
}

#define HAS_NONTEMPORAL 1

ALWAYS_INLINE void copy_register_nontemporal(char *to, const char *from)
{
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}

static void fence_nontemporal(void) { _mm_sfence(); }

#endif
