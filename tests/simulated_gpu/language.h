/* What CUDA's C++ has and a host compiler's lacks, as far as `kernels.cu` needs it. */

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
/* Static, and apart from all else that is: the scheduler fills, keeps and swaps it. */
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct Index {
    unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
double __shfl_sync(unsigned mask, double value, int lane);
double __shfl_xor_sync(unsigned mask, double value, int lanes);
unsigned __ballot_sync(unsigned mask, bool predicate);
unsigned __activemask();
bool __all_sync(unsigned mask, bool predicate);

struct alignas(16) int4 {
    int x, y, z, w;
};

inline void __stcs(int4 *to, const int4 &value)
{
    std::memcpy(to, &value, sizeof value);
}

inline int __popc(unsigned bits)
{
    return __builtin_popcount(bits);
}

inline int __ffs(unsigned bits)
{
    return __builtin_ffs(bits);
}

inline unsigned __float_as_uint(float value)
{
    return std::bit_cast<unsigned>(value);
}

inline float __uint_as_float(unsigned bits)
{
    return std::bit_cast<float>(bits);
}

/* The instructions. */

#define SIMULATED

inline float float_of_half(unsigned short bits)
{
    return std::bit_cast<_Float16>(bits);
}

inline unsigned short half_of_float(float value)
{
    return std::bit_cast<unsigned short>(_Float16(value));
}

inline unsigned two_halves_of_floats(float low, float high)
{
    return half_of_float(low) | unsigned(half_of_float(high)) << 16;
}

/* A NaN becomes the one that the instruction gives. */
inline unsigned short nearest_bfloat16(float value)
{
    const unsigned bits = __float_as_uint(value);
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline unsigned two_bfloat16_of_floats(float low, float high)
{
    return nearest_bfloat16(low) | unsigned(nearest_bfloat16(high)) << 16;
}

void copy_later(void *to, const void *from);
void finish_copies();

template <typename Bytes> void begin_copy(Bytes *to, const Bytes *from, long long index)
{
    static_assert(sizeof(Bytes) == 16);
    copy_later(to, from + index);
}

void cluster_arrive();
void cluster_wait();
double read_from_block(const double *address, int rank);
