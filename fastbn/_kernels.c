/* Compiled once per instruction set, with ISA set to its name. */
#include "_kernels.h"

#include <string.h>
#if defined(__SSE2__)
#  include <immintrin.h>
#endif

#define LANES FASTBN_LANES

/* vd is a register of doubles, vf one of floats. Vectors of the target's own width compile to what
 * one would write by hand; a compiler without them works on registers of one element. */
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
typedef double vd __attribute__((vector_size(REGISTER)));
typedef float vf __attribute__((vector_size(REGISTER)));
typedef long long vi __attribute__((vector_size(REGISTER)));
#else
#  define ALWAYS_INLINE static __inline
#  define UNROLL
typedef double vd;
typedef float vf;
#endif

enum { VD = sizeof(vd) / sizeof(double), STEPS = LANES / VD };

/* A step of LANES elements on its way to the sums, in registers. */
typedef struct {
    vd first[STEPS], second[STEPS];
} registers;

ALWAYS_INLINE registers load_sums(const fastbn_sums *sums)
{
    registers r;
    UNROLL for (int j = 0; j < STEPS; j++) {
        memcpy(&r.first[j], sums->first + j * VD, sizeof(vd));
        memcpy(&r.second[j], sums->second + j * VD, sizeof(vd));
    }
    return r;
}

ALWAYS_INLINE void store_sums(fastbn_sums *sums, registers r)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        memcpy(sums->first + j * VD, &r.first[j], sizeof(vd));
        memcpy(sums->second + j * VD, &r.second[j], sizeof(vd));
    }
}

ALWAYS_INLINE vd widen_float64(const double *p)
{
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* By intrinsics, since gcc 12 converts in halves what it could convert at once. */
ALWAYS_INLINE vd widen_float32(const float *p)
{
#if defined(__AVX512F__)
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
    return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p));
#elif defined(__SSE2__)
    return (vd)_mm_cvtps_pd(_mm_castpd_ps(_mm_load_sd((const double *)p)));
#elif defined(__GNUC__)
    float half __attribute__((vector_size(REGISTER / 2)));
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, vd);
#else
    return *p;
#endif
}

static const long long lane_numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Zeros the lanes below `skip` in the j-th register of a step. */
ALWAYS_INLINE vd drop_below(long long skip, int j, vd v)
{
#if defined(__GNUC__)
    vi lane;
    memcpy(&lane, lane_numbers + j * VD, sizeof lane);
    return (vd)((vi)v & (lane >= skip));
#else
    return lane_numbers[j] >= skip ? v : 0.0;
#endif
}

#define PASTE(a, b) a##b
#define NAMED(a, b) PASTE(a, b)

#define T float
#define VT vf
#define NAME(f) f##_float32
#include "_kernels_rows.h"

#define T double
#define VT vd
#define NAME(f) f##_float64
#include "_kernels_rows.h"

#define STRING_(a) #a
#define STRING(a) STRING_(a)

const fastbn_isa NAMED(fastbn_isa_, ISA) = {
    STRING(ISA),
    {pivots_float32, moments_float32, products_float32, normalize_float32, gradient_float32},
    {pivots_float64, moments_float64, products_float64, normalize_float64, gradient_float64},
};
