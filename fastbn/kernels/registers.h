/* Registers, and how elements of each dtype come into them and out.
 *
 * vd is a register of doubles, vf one of floats. Vectors of the target's own width compile to what
 * one would write by hand; a compiler without them works on registers of one element. What it has
 * no good code for is done by intrinsics.
 */
#ifndef FASTBN_KERNELS_REGISTERS_H
#define FASTBN_KERNELS_REGISTERS_H

#include "kernels.h"

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#  include <immintrin.h>
#endif

#if defined(__GNUC__)
#  if defined(__AVX512F__)
#    define REGISTER 64
#  elif defined(__AVX2__)
#    define REGISTER 32
#  else
#    define REGISTER 16
#  endif
#  define ALWAYS_INLINE static inline __attribute__((always_inline))
#  define UNROLL _Pragma("GCC unroll 16")
#  define UNROLL_TWICE _Pragma("GCC unroll 2")
#  define PREFETCH(p) __builtin_prefetch(p)
typedef double vd __attribute__((vector_size(REGISTER)));
typedef float vf __attribute__((vector_size(REGISTER)));
typedef long long vi __attribute__((vector_size(REGISTER)));
#else
#  define ALWAYS_INLINE static __inline
#  define UNROLL
#  define UNROLL_TWICE
#  define PREFETCH(p)
typedef double vd;
typedef float vf;
#endif

enum {
    LANES = FASTBN_LANES,
    MASK_BYTES = FASTBN_MASK_BYTES,
    VD = sizeof(vd) / sizeof(double),
    VF = sizeof(vf) / sizeof(float),
    STEPS = LANES / VD, /* registers of doubles that make up a step of LANES elements */
    CACHE_LINE = 64,
};

/* How many elements after the i-th memory is prefetched. */
ALWAYS_INLINE ptrdiff_t distance(fastbn_ahead ahead, ptrdiff_t i)
{
    return i < ahead.border ? ahead.near : ahead.jump;
}

/* float64 and float32 */

ALWAYS_INLINE double get_float64(double x) { return x; }
ALWAYS_INLINE double put_float64(double x) { return x; }
ALWAYS_INLINE float get_float32(float x) { return x; }
ALWAYS_INLINE float put_float32(float x) { return x; }

ALWAYS_INLINE vd load_float64(const double *p)
{
    vd v;
    memcpy(&v, p, sizeof v);
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

ALWAYS_INLINE vd widen_float32(const float *p)
{
#if defined(__AVX512F__)
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
    return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p));
#elif defined(__SSE2__)
    return (vd)_mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)));
#else
    double wide[VD];
    vd v;
    for (int i = 0; i < VD; i++)
        wide[i] = p[i];
    memcpy(&v, wide, sizeof v);
    return v;
#endif
}

/* float16 and bfloat16, as the integers that hold their bits */

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

ALWAYS_INLINE float get_float16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x0400) /* subnormal: a multiple of 2^-24 */
        return sign ? -(float)rest * 0x1p-24f : (float)rest * 0x1p-24f;
    return float_of_bits(sign | ((rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23)));
}

ALWAYS_INLINE uint16_t put_float16(float x)
{
    const uint32_t sign = bits_of_float(x) >> 16 & 0x8000, rest = bits_of_float(x) & 0x7fffffff;
    if (rest > 0x7f800000) /* NaN */
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* subnormal: a multiple of 2^-24 */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) * 0x1p24f + 0x1p23f) & 0x7fff));
    return (uint16_t)(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10)));
}

ALWAYS_INLINE float get_bfloat16(uint16_t h) { return float_of_bits((uint32_t)h << 16); }

ALWAYS_INLINE uint16_t put_bfloat16(float x)
{
    const uint32_t bits = bits_of_float(x);
    if (x != x)
        return (uint16_t)(bits >> 16 | 0x40); /* rounding could carry a NaN into an infinity */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* A register of floats from VF elements at p, and a register of doubles from VD elements. */
#if defined(__AVX512F__)

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

#elif defined(__AVX2__)

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

#else

/* One by one. */
#  define BY_ELEMENT(dtype) \
      ALWAYS_INLINE vf load_##dtype(const uint16_t *p) \
      { \
          float wide[VF]; \
          for (int i = 0; i < VF; i++) \
              wide[i] = get_##dtype(p[i]); \
          return load_float32(wide); \
      } \
      ALWAYS_INLINE vd widen_##dtype(const uint16_t *p) \
      { \
          double wide[VD]; \
          for (int i = 0; i < VD; i++) \
              wide[i] = get_##dtype(p[i]); \
          return load_float64(wide); \
      } \
      ALWAYS_INLINE void store_##dtype(uint16_t *p, vf v) \
      { \
          float wide[VF]; \
          store_float32(wide, v); \
          for (int i = 0; i < VF; i++) \
              p[i] = put_##dtype(wide[i]); \
      }
BY_ELEMENT(float16)
BY_ELEMENT(bfloat16)
#  undef BY_ELEMENT

#endif

/* A register with zeros where the mask has 0, and as it is where it has 255. Lane i has byte i of
 * the mask or, if there is an index, byte index[i]. MASK_BYTES bytes of both may be read. */

#if defined(__AVX2__)

ALWAYS_INLINE __m128i mask_bytes(const uint8_t *mask, const uint8_t *index, int lanes)
{
    int32_t four;
    if (index != NULL)
        return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)mask),
                                _mm_loadu_si128((const __m128i *)index));
    if (lanes > 8)
        return _mm_loadu_si128((const __m128i *)mask);
    if (lanes > 4)
        return _mm_loadl_epi64((const __m128i *)mask);
    memcpy(&four, mask, sizeof four);
    return _mm_cvtsi32_si128(four);
}

#endif
#if defined(__AVX512F__)

ALWAYS_INLINE vd masked_vd(const uint8_t *mask, const uint8_t *index, vd v)
{
    return (vd)_mm512_and_si512((__m512i)v, _mm512_cvtepi8_epi64(mask_bytes(mask, index, VD)));
}

ALWAYS_INLINE vf masked_vf(const uint8_t *mask, const uint8_t *index, vf v)
{
    return (vf)_mm512_and_si512((__m512i)v, _mm512_cvtepi8_epi32(mask_bytes(mask, index, VF)));
}

#elif defined(__AVX2__)

ALWAYS_INLINE vd masked_vd(const uint8_t *mask, const uint8_t *index, vd v)
{
    return (vd)_mm256_and_si256((__m256i)v, _mm256_cvtepi8_epi64(mask_bytes(mask, index, VD)));
}

ALWAYS_INLINE vf masked_vf(const uint8_t *mask, const uint8_t *index, vf v)
{
    return (vf)_mm256_and_si256((__m256i)v, _mm256_cvtepi8_epi32(mask_bytes(mask, index, VF)));
}

#else

ALWAYS_INLINE signed char mask_byte(const uint8_t *mask, const uint8_t *index, int i)
{
    return (signed char)mask[index == NULL ? i : index[i]];
}

#  if defined(__GNUC__) /* registers of two doubles, of four floats */

typedef int vw __attribute__((vector_size(REGISTER)));

ALWAYS_INLINE vd masked_vd(const uint8_t *mask, const uint8_t *index, vd v)
{
    const vi wide = {mask_byte(mask, index, 0), mask_byte(mask, index, 1)};
    return (vd)((vi)v & wide);
}

ALWAYS_INLINE vf masked_vf(const uint8_t *mask, const uint8_t *index, vf v)
{
    const vw wide = {mask_byte(mask, index, 0), mask_byte(mask, index, 1),
                     mask_byte(mask, index, 2), mask_byte(mask, index, 3)};
    return (vf)((vw)v & wide);
}

#  else

ALWAYS_INLINE vd masked_vd(const uint8_t *mask, const uint8_t *index, vd v)
{
    return mask_byte(mask, index, 0) ? v : 0.0;
}

ALWAYS_INLINE vf masked_vf(const uint8_t *mask, const uint8_t *index, vf v)
{
    return mask_byte(mask, index, 0) ? v : 0.0f;
}

#  endif
#endif

/* Copies memory with stores around the cache: what is written there is not read first. A line that
 * is stored in part, or in both ways, costs more than an ordinary one. */
ALWAYS_INLINE void stream(char *to, const char *from, size_t bytes)
{
#if defined(__SSE2__)
    const size_t head = -(uintptr_t)to % CACHE_LINE;
    if (head < bytes) {
        memcpy(to, from, head);
        to += head, from += head, bytes -= head;
        for (; bytes >= CACHE_LINE; to += CACHE_LINE, from += CACHE_LINE, bytes -= CACHE_LINE)
            UNROLL for (int i = 0; i < CACHE_LINE; i += (int)sizeof(vf))
#  if defined(__AVX512F__)
                _mm512_stream_si512((__m512i *)(to + i), _mm512_loadu_si512(from + i));
#  elif defined(__AVX2__)
                _mm256_stream_si256((__m256i *)(to + i),
                                    _mm256_loadu_si256((const __m256i *)(from + i)));
#  else
                _mm_stream_si128((__m128i *)(to + i),
                                 _mm_loadu_si128((const __m128i *)(from + i)));
#  endif
    }
#endif
    memcpy(to, from, bytes);
}

/* Such stores are not ordered: this comes before another thread may look. NULL where there are
 * none. */
#if defined(__SSE2__)
static void end_streaming_stores(void) { _mm_sfence(); }
#  define END_STREAMING end_streaming_stores
#else
#  define END_STREAMING NULL
#endif

/* Sums */

typedef struct {
    vd first[STEPS], second[STEPS];
} registers;

ALWAYS_INLINE registers load_sums(const double *first, const double *second)
{
    registers r;
    UNROLL for (int j = 0; j < STEPS; j++) {
        r.first[j] = load_float64(first + j * VD);
        r.second[j] = load_float64(second + j * VD);
    }
    return r;
}

ALWAYS_INLINE registers no_sums(void)
{
    registers r;
    UNROLL for (int j = 0; j < STEPS; j++)
        r.first[j] = r.second[j] = (vd){0};
    return r;
}

ALWAYS_INLINE registers add_sums(registers a, registers b)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        a.first[j] += b.first[j];
        a.second[j] += b.second[j];
    }
    return a;
}

ALWAYS_INLINE void store_sums(double *first, double *second, registers r)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        store_float64(first + j * VD, r.first[j]);
        store_float64(second + j * VD, r.second[j]);
    }
}

/* The sum of a register's lanes: its halves are added up, then those of the sum. */
#if defined(__GNUC__)
typedef double vd2 __attribute__((vector_size(16)));

ALWAYS_INLINE double sum_of_2(vd2 v) { return v[0] + v[1]; }

#  if REGISTER >= 32
typedef double vd4 __attribute__((vector_size(32)));

ALWAYS_INLINE double sum_of_4(vd4 v)
{
    vd2 halves[2];
    memcpy(halves, &v, sizeof halves);
    return sum_of_2(halves[0] + halves[1]);
}

#  endif
#  if REGISTER == 64

ALWAYS_INLINE double sum_of_lanes(vd v)
{
    vd4 halves[2];
    memcpy(halves, &v, sizeof halves);
    return sum_of_4(halves[0] + halves[1]);
}

#  elif REGISTER == 32
#    define sum_of_lanes sum_of_4
#  else
#    define sum_of_lanes sum_of_2
#  endif
#else
#  define sum_of_lanes(v) (v)
#endif

/* The sum of a step's lanes: lane i is added to lane i + 8, then to lane i + 4 and so on, whatever
 * the width of a register is. */
ALWAYS_INLINE double collapse(vd *v)
{
    UNROLL for (int half = STEPS / 2; half > 0; half /= 2)
        UNROLL for (int j = 0; j < half; j++)
            v[j] += v[j + half];
    return sum_of_lanes(v[0]);
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

/* Which lanes of a step count: not those below `skip`, nor those that a mask has not. */
typedef struct {
    int masked;
    const uint8_t *mask, *index;
    long long skip;
} counted;

/* Zeros the lanes below `skip` in the j-th register of a step. */
ALWAYS_INLINE vd drop_below(long long skip, int j, vd v)
{
    static const long long lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#if defined(__GNUC__)
    vi lane;
    memcpy(&lane, lanes + j * VD, sizeof lane);
    return (vd)((vi)v & (lane >= skip));
#else
    return lanes[j] >= skip ? v : 0.0;
#endif
}

/* The j-th register of a step, with zeros in the lanes that do not count. */
ALWAYS_INLINE vd counted_of(counted which, int j, vd v)
{
    if (which.masked && which.index == NULL)
        v = masked_vd(which.mask + j * VD, NULL, v);
    else if (which.masked)
        v = masked_vd(which.mask, which.index + j * VD, v);
    return which.skip ? drop_below(which.skip, j, v) : v;
}

#endif
