/* The kernels of the CUDA backend, for every dtype.
 *
 * The text is compiled for one dtype of x at a time (FORMAT) and, for the kernels that keep a
 * channel on chip, for one number of blocks that work on it together (CLUSTER); and again for calls
 * with a mask (WITH_MASK) and for those of several batches (WITH_BATCHES). It includes nothing.
 *
 * Words: a block is one of CUDA's. A piece is as much of a channel, or of the rows of a matrix, as
 * a block sums into one partial sum. A run is the contiguous elements of one channel of one sample.
 * A chunk is 16 bytes, a tile a few chunks that a thread has in registers. A strip is neighbouring
 * columns that a block walks together.
 *
 * Memory is read and written in chunks of 16 bytes, aligned as the elements are counted from the
 * array's first. Which thread takes which elements depends on the shape alone, and sums merge in a
 * fixed order, so the result has the same bits in every run, in place or not, at any alignment.
 */

#define FLOAT32 0
#define FLOAT64 1
#define FLOAT16 2
#define BFLOAT16 3

typedef long long i64;

/* ------------------------------------------------------------------ instructions
 *
 * Those that C++ has no word for; a simulation of a GPU brings its own. */

#ifndef SIMULATED
__device__ float float_of_half(unsigned short half)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

__device__ unsigned short half_of_float(float value)
{
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

#if __CUDA_ARCH__ >= 800
__device__ unsigned two_halves_of_floats(float low, float high)
{
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ unsigned short nearest_bfloat16(float value)
{
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ unsigned two_bfloat16_of_floats(float low, float high)
{
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

/* Begins to copy the 16 bytes of `from[index]` to shared memory, where this thread alone reads them
 * after `finish_copies`. */
template <typename Bytes> __device__ void begin_copy(Bytes *to, const Bytes *from, i64 index)
{
    const unsigned address = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from + index)
                 : "memory");
}

__device__ void finish_copies()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}
#endif

#if CLUSTER > 1
__device__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ double read_from_block(const double *address, int rank)
{
    double value;
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there)
                 : "r"((unsigned)__cvta_generic_to_shared(address)), "r"(rank));
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(there) : "memory");
    return value;
}
#endif
#endif

/* ------------------------------------------------------------------ numbers */

#if FORMAT == FLOAT32
typedef float Storage;
typedef float Real;
#elif FORMAT == FLOAT64
typedef double Storage;
typedef double Real;
#else
typedef unsigned short Storage;
typedef float Real;
#endif

__device__ float float_of_bfloat16(unsigned short bits)
{
    return __uint_as_float((unsigned)bits << 16);
}

__device__ unsigned short bfloat16_of_float(float value)
{
#if __CUDA_ARCH__ >= 800
    return nearest_bfloat16(value);
#else
    unsigned bits = __float_as_uint(value);
    if (value != value)
        return (unsigned short)((bits >> 16) | 0x40);
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

__device__ Real decode(Storage stored)
{
#if FORMAT == FLOAT16
    return float_of_half(stored);
#elif FORMAT == BFLOAT16
    return float_of_bfloat16(stored);
#else
    return stored;
#endif
}

__device__ Storage encode(Real value)
{
#if FORMAT == FLOAT16
    return half_of_float(value);
#elif FORMAT == BFLOAT16
    return bfloat16_of_float(value);
#else
    return value;
#endif
}

/* Two neighbouring elements, which in 16 bits each take one instruction. */
__device__ void encode(Real first, Real second, Storage *to)
{
#if __CUDA_ARCH__ >= 800 && (FORMAT == FLOAT16 || FORMAT == BFLOAT16)
#if FORMAT == FLOAT16
    const unsigned both = two_halves_of_floats(first, second);
#else
    const unsigned both = two_bfloat16_of_floats(first, second);
#endif
    to[0] = (Storage)both;
    to[1] = (Storage)(both >> 16);
#else
    to[0] = encode(first);
    to[1] = encode(second);
#endif
}

/* One value per channel, of any dtype and stride: `kind` is 4 * stride in bytes + dtype. */
struct Vector {
    char *data;
    i64 kind;
};

__device__ double at(const Vector &vector, i64 channel, double otherwise = 0.0)
{
    if (vector.data == nullptr)
        return otherwise;
    const char *p = vector.data + (vector.kind >> 2) * channel;
    switch (vector.kind & 3) {
    case FLOAT32:
        return *(const float *)p;
    case FLOAT64:
        return *(const double *)p;
    case FLOAT16:
        return float_of_half(*(const unsigned short *)p);
    default:
        return float_of_bfloat16(*(const unsigned short *)p);
    }
}

__device__ void put(const Vector &vector, i64 channel, double value)
{
    char *p = vector.data + (vector.kind >> 2) * channel;
    switch (vector.kind & 3) {
    case FLOAT32:
        *(float *)p = (float)value;
        break;
    case FLOAT64:
        *(double *)p = value;
        break;
    case FLOAT16:
        *(unsigned short *)p = half_of_float((float)value);
        break;
    default:
        *(unsigned short *)p = bfloat16_of_float((float)value);
    }
}

/* ------------------------------------------------------------------ what a launch is told
 *
 * The fields are those of the launches, in the same order, and of 8 bytes each.
 *
 * An array is n samples of c channels of s elements each; channels-last arrays are (n * s, c, 1).
 */
struct Job {
    const Storage *x, *dy;
    Storage *out;
    i64 aligned; /* whether all of them begin at a multiple of 16 bytes */
    i64 n, c, s;
    i64 size;                      /* elements in all */
    i64 splits;                    /* pieces of a channel, or of the rows of a matrix */
    i64 chunks;                    /* chunks that a run can touch, or of a strip that stays on chip */
    i64 step, step_chunks;         /* row layout: elements of whole samples, and chunks, that as
                                      many chunks as a block has threads are */
    i64 width, height;             /* columns: of the matrix; a row is a multiple of a chunk */
    i64 non_temporal;              /* whether out is written by non-temporal stores */
    double *partials;
    double *mean_out, *m2_out, *invstd_out, *sum_dy_out, *sum_dy_xhat_out;
    double eps, count;
    Vector weight, bias, mean, invstd, var, sum_dy, sum_dy_xhat;
    Vector running_mean, running_var;
    i64 *counter;   /* counts the batches in the running statistics, or null */
    i64 cumulative; /* whether the factor of a batch is 1 / (counter + 1) instead of momentum */
    double momentum;
    double correction; /* taken from the count that the running variance is divided by */
#if WITH_MASK
    const unsigned char *valid; /* which of the s positions of each sample are valid */
    const double *valid_count;  /* how many, or null, where `count` is it */
#endif
#if WITH_BATCHES
    i64 steps[9];      /* bytes from the vectors of a batch to those of the next */
    i64 partials_size; /* doubles of a batch */
    i64 batch_count;   /* batches that `follow` takes one after the other */
    double last_count; /* `count` of the last batch */
#endif
};

/* Batches of one size are side by side in a launch, each at a `y` of the grid. The launch is told of
 * the first. */
#if WITH_BATCHES
__device__ Job of_batch(Job job, i64 k)
{
    const i64 elements = k * job.size;
    job.aligned = job.aligned && elements * i64(sizeof(Storage)) % 16 == 0;
    job.x += elements;
    job.dy = job.dy == nullptr ? nullptr : job.dy + elements;
    job.out = job.out == nullptr ? nullptr : job.out + elements;
    job.partials += k * job.partials_size;
    double **results[] = {&job.mean_out, &job.m2_out, &job.invstd_out, &job.sum_dy_out,
                          &job.sum_dy_xhat_out};
    for (double **result : results)
        if (*result != nullptr)
            *result += k * job.c;
    Vector *vectors[] = {&job.weight, &job.bias, &job.mean, &job.invstd, &job.var, &job.sum_dy,
                         &job.sum_dy_xhat, &job.running_mean, &job.running_var};
    for (int i = 0; i < 9; i++)
        if (vectors[i]->data != nullptr)
            vectors[i]->data += k * job.steps[i];
#if WITH_MASK
    job.valid += k * job.n * job.s;
    if (job.valid_count != nullptr)
        job.valid_count += k;
#endif
    return job;
}

#define LAUNCHED_JOB const Job launched
#define OWN_JOB const Job job = of_batch(launched, blockIdx.y);
#else
#define LAUNCHED_JOB const Job job
#define OWN_JOB
#endif

/* ------------------------------------------------------------------ chunks */

constexpr int V = 16 / sizeof(Storage);
constexpr unsigned FULL = (1u << V) - 1;

struct alignas(16) Chunk {
    Storage of[V];
};

__device__ unsigned mask_between(i64 low, i64 high)
{
    low = low < 0 ? 0 : low > V ? V : low;
    high = high < 0 ? 0 : high > V ? V : high;
    return high <= low ? 0 : ((1u << high) - 1) & ~((1u << low) - 1);
}

/* How many chunks can be read and written whole. */
__device__ i64 whole_chunks(const Job &job)
{
    return job.aligned ? job.size / V : 0;
}

__device__ i64 quotient(i64 a, i64 b)
{
    return (a | b) >> 32 ? a / b : i64(unsigned(a) / unsigned(b));
}

#if WITH_MASK
/* Those elements of a chunk's mask whose positions are valid. */
__device__ unsigned valid_of(const Job &job, i64 index, unsigned mask)
{
    const i64 first = index * V, sample_size = job.c * job.s;
    const i64 sample = quotient(first, sample_size);
    const unsigned char *valid = job.valid + sample * job.s;
    i64 position = first - quotient(first, job.s) * job.s;
    i64 left = (sample + 1) * sample_size - first; /* elements to the next sample */
    for (int i = 0; i < V; i++) {
        if (mask >> i & 1 && !valid[position])
            mask &= ~(1u << i);
        if (++position == job.s)
            position = 0;
        if (--left == 0)
            valid += job.s, left = sample_size;
    }
    return mask;
}

/* A result, with zeros at invalid positions. */
__device__ Chunk zero_invalid(const Job &job, i64 index, Chunk chunk, unsigned mask)
{
    const unsigned valid = valid_of(job, index, mask);
#pragma unroll
    for (int i = 0; i < V; i++)
        if (!(valid >> i & 1))
            chunk.of[i] = Storage(0);
    return chunk;
}

/* How many valid values a channel has. */
__device__ double count_of(const Job &job)
{
    return job.valid_count == nullptr ? job.count : *job.valid_count;
}

/* Whether they are enough to move the running statistics. The host does not know, as it would have
 * to wait for the mask. */
__device__ bool enough(const Job &job)
{
    return count_of(job) > 1.0;
}
#else
__device__ unsigned valid_of(const Job &, i64, unsigned mask)
{
    return mask;
}

__device__ const Chunk &zero_invalid(const Job &, i64, const Chunk &chunk, unsigned)
{
    return chunk;
}

__device__ double count_of(const Job &job)
{
    return job.count;
}

__device__ bool enough(const Job &)
{
    return true;
}
#endif

__device__ Chunk load(const Job &job, const Storage *from, i64 index)
{
    if (index < whole_chunks(job))
        return reinterpret_cast<const Chunk *>(from)[index];
    Chunk chunk;
    for (int i = 0; i < V; i++)
        chunk.of[i] = index * V + i < job.size ? from[index * V + i] : Storage(0);
    return chunk;
}

__device__ void write(const Job &job, i64 index, const Chunk &chunk)
{
    if (job.non_temporal)
        __stcs(reinterpret_cast<int4 *>(job.out) + index, *reinterpret_cast<const int4 *>(&chunk));
    else
        reinterpret_cast<Chunk *>(job.out)[index] = chunk;
}

__device__ void write(const Job &job, i64 index, const Chunk &chunk, unsigned mask)
{
    if (job.aligned && mask == FULL) {
        write(job, index, chunk);
        return;
    }
#pragma unroll
    for (int i = 0; i < V; i++)
        if (mask >> i & 1)
            job.out[index * V + i] = chunk.of[i];
}

__device__ void store(const Job &job, i64 index, const Chunk &chunk)
{
    write(job, index, zero_invalid(job, index, chunk, FULL));
}

__device__ void store(const Job &job, i64 index, const Chunk &chunk, unsigned mask)
{
    write(job, index, zero_invalid(job, index, chunk, mask), mask);
}

/* The elements `of(i)`, for i from 0 on. */
template <typename Element> __device__ Chunk chunk_of(Element of)
{
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < V; i += 2)
        encode(of(i), of(i + 1), chunk.of + i);
    return chunk;
}

/* Begins to copy a chunk to shared memory, where this thread alone reads it after `arrived`. */
__device__ void fetch(const Job &job, Chunk *to, const Storage *from, i64 index)
{
#if __CUDA_ARCH__ >= 800
    if (index < whole_chunks(job)) {
        begin_copy(to, reinterpret_cast<const Chunk *>(from), index);
        return;
    }
#endif
    *to = load(job, from, index);
}

__device__ void arrived()
{
#if __CUDA_ARCH__ >= 800
    finish_copies();
#endif
}

/* ------------------------------------------------------------------ sums, and how they merge */

/* Count, mean and sum of the squared deviations from the mean. */
struct Moments {
    double count, mean, m2;
};

/* The sums of dy and of dy * xhat. */
struct Products {
    double dy, dy_xhat;
};

/* The formula of Chan, Golub and LeVeque. */
__device__ Moments merge(const Moments &a, const Moments &b)
{
    if (b.count == 0.0)
        return a;
    const double count = a.count + b.count, fraction = b.count / count, delta = b.mean - a.mean;
    return {count, a.mean + delta * fraction, a.m2 + b.m2 + delta * (delta * (a.count * fraction))};
}

__device__ Products merge(const Products &a, const Products &b)
{
    return {a.dy + b.dy, a.dy_xhat + b.dy_xhat};
}

/* The sum over a warp, the same bits in every lane. */
__device__ double warp_sum(double value)
{
#pragma unroll
    for (int lane = 16; lane; lane >>= 1)
        value += __shfl_xor_sync(~0u, value, lane);
    return value;
}

/* Moments as sums around a pivot, which merge by addition. If the pivot is the mean of one of n
 * alike, the squares grow no more than n times. */
struct Around {
    double count, sum, squares;

    __device__ Around(const Moments &moments, double pivot) : count(moments.count), sum(0), squares(0)
    {
        if (count != 0.0) {
            const double delta = moments.mean - pivot;
            sum = count * delta;
            squares = moments.m2 + sum * delta;
        }
    }

    __device__ void add(const Around &other)
    {
        count += other.count;
        sum += other.sum;
        squares += other.squares;
    }

    __device__ Moments moments(double pivot) const
    {
        if (count == 0.0)
            return {};
        const double shift = sum / count, m2 = squares - sum * shift;
        return {count, pivot + shift, m2 < 0.0 ? 0.0 : m2}; /* but a NaN stays one */
    }
};

/* All lanes of a warp merged. A constant remains one: around its own mean all sums are zero. */
__device__ Moments merge_warp(const Moments &own)
{
#if WITH_MASK
    const int with_values = __ffs(__ballot_sync(~0u, own.count != 0.0));
    const int lane = with_values == 0 ? 0 : with_values - 1;
#else
    constexpr int lane = 0; /* it has values, if any lane has */
#endif
    const double pivot = __shfl_sync(~0u, own.mean, lane);
    Around sums(own, pivot);
    sums.count = warp_sum(sums.count);
    sums.sum = warp_sum(sums.sum);
    sums.squares = warp_sum(sums.squares);
    return sums.moments(pivot);
}

__device__ Products merge_warp(const Products &own)
{
    return {warp_sum(own.dy), warp_sum(own.dy_xhat)};
}

/* All threads of a block merged, in the first warp. */
template <typename Sums> __device__ Sums merge_block(const Sums &own)
{
    __shared__ Sums warps[32];
    Sums merged = merge_warp(own);
    if (blockDim.x == 32)
        return merged;
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = merged;
    __syncthreads();
    if (threadIdx.x < 32)
        merged = merge_warp(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : Sums{});
    return merged;
}

/* ------------------------------------------------------------------ clusters: blocks that work
 * on a channel together and see each other's shared memory */

#if CLUSTER > 1
#define CLUSTER_OF_BLOCKS __cluster_dims__(CLUSTER, 1, 1)

template <typename Sums> __device__ Sums read_sums_from_block(const Sums *sums, int rank)
{
    constexpr int DOUBLES = sizeof(Sums) / sizeof(double);
    Sums other;
#pragma unroll
    for (int i = 0; i < DOUBLES; i++)
        reinterpret_cast<double *>(&other)[i] =
            read_from_block(reinterpret_cast<const double *>(sums) + i, rank);
    return other;
}

/* All blocks of a cluster merged, in the first warp of each. No block may end, nor merge again,
 * before `leave_cluster`. */
template <typename Sums> __device__ Sums merge_cluster(const Sums &own)
{
    __shared__ Sums mine;
    if (threadIdx.x == 0)
        mine = own;
    cluster_arrive();
    cluster_wait();
    Sums other = {};
    if (threadIdx.x < CLUSTER)
        other = read_sums_from_block(&mine, threadIdx.x);
    cluster_arrive();
    return threadIdx.x < 32 ? merge_warp(other) : other;
}

/* One thread of each block merges what it has of a column with what the others have. */
__device__ Moments merge_from_blocks(const Moments *own)
{
    const Moments first = read_sums_from_block(own, 0);
    Around sums(first, first.mean);
#pragma unroll
    for (int rank = 1; rank < CLUSTER; rank++)
        sums.add(Around(read_sums_from_block(own, rank), first.mean));
    return sums.moments(first.mean);
}

__device__ Products merge_from_blocks(const Products *own)
{
    Products sums = read_sums_from_block(own, 0);
#pragma unroll
    for (int rank = 1; rank < CLUSTER; rank++)
        sums = merge(sums, read_sums_from_block(own, rank));
    return sums;
}

/* The same as `merge_cluster` of each of the first `count` threads by itself, COUNT at most. */
template <int COUNT, typename Sums> __device__ Sums merge_cluster_each(const Sums &own, int count)
{
    __shared__ Sums mine[COUNT];
    if (threadIdx.x < count)
        mine[threadIdx.x] = own;
    cluster_arrive();
    cluster_wait();
    const Sums sums = threadIdx.x < count ? merge_from_blocks(mine + threadIdx.x) : own;
    cluster_arrive();
    return sums;
}

__device__ void leave_cluster()
{
    cluster_wait();
}
#else
#define CLUSTER_OF_BLOCKS

template <typename Sums> __device__ Sums merge_cluster(const Sums &own)
{
    return own;
}

template <int COUNT, typename Sums> __device__ Sums merge_cluster_each(const Sums &own, int)
{
    return own;
}

__device__ void leave_cluster() {}
#endif

/* ------------------------------------------------------------------ sums of a tile
 *
 * Masks tell which elements of its chunks are summed. */

constexpr int TILE = 4;

/* Squares of what exceeds 1e19 overflow in a float. Such values are scaled by a power of two. */
constexpr float DOWN = 0x1p-100f;
constexpr double UP = 0x1p100;

template <bool SCALED> __device__ Real scaled(Storage stored)
{
    return SCALED ? decode(stored) * Real(DOWN) : decode(stored);
}

__device__ bool overflown(const Moments &moments)
{
    return sizeof(Real) < sizeof(double) && !(moments.m2 < 1e300);
}

/* What a thread sums: deviations from the mean of its first tile, and their squares; in Real over a
 * tile, in double from tile to tile.
 *
 * The sum of the squares around the mean p of r of n elements is at most 1 + n / r times that
 * around the mean of all, since r of the squares alone make up r (p - mean)^2. A thread takes some
 * hundred elements, so little is lost. The pivot is found as an element plus the mean deviation from
 * it, which for a constant is that constant, and all sums are zero. */
struct Deviations {
    Real pivot;
    int count;
    double sum, squares;

    template <bool SCALED> __device__ Moments moments() const
    {
        if (count == 0)
            return {};
        const double shift = sum / count;
        double mean = double(pivot) + shift, m2 = squares - sum * shift;
        m2 = m2 < 0.0 ? 0.0 : m2; /* but a NaN stays one */
        if (SCALED)
            mean *= UP, m2 *= UP * UP;
        return {double(count), mean, m2};
    }
};

/* Adds a tile of LENGTH chunks, of each its WIDTH elements from element i on. */
template <bool MASKED, bool SCALED, int LENGTH, int WIDTH>
__device__ void add(Deviations &sums, const Chunk (&tile)[LENGTH], const unsigned (&masks)[LENGTH],
                    int i = 0)
{
    int count = LENGTH * WIDTH;
    if (MASKED) {
        count = 0;
#pragma unroll
        for (int u = 0; u < LENGTH; u++)
            count += __popc(masks[u] & ((1u << WIDTH) - 1) << i);
    }
    if (sums.count == 0) {
        if (count == 0)
            return;
        Real first = scaled<SCALED>(tile[0].of[i]), sum = Real(0);
        if (MASKED) {
#pragma unroll
            for (int u = LENGTH - 1; u >= 0; u--)
#pragma unroll
                for (int j = WIDTH - 1; j >= 0; j--)
                    if (masks[u] >> (i + j) & 1)
                        first = scaled<SCALED>(tile[u].of[i + j]);
        }
#pragma unroll
        for (int u = 0; u < LENGTH; u++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++)
                if (!MASKED || masks[u] >> (i + j) & 1)
                    sum += scaled<SCALED>(tile[u].of[i + j]) - first;
        sums.pivot = first + sum / Real(count);
    }
    Real sum[4] = {}, squares[4] = {};
#pragma unroll
    for (int u = 0; u < LENGTH; u++)
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            Real deviation = scaled<SCALED>(tile[u].of[i + j]) - sums.pivot;
            if (MASKED)
                deviation = masks[u] >> (i + j) & 1 ? deviation : Real(0);
            sum[u % 4] += deviation;
            squares[u % 4] += deviation * deviation;
        }
    sums.sum += double((sum[0] + sum[1]) + (sum[2] + sum[3]));
    sums.squares += double((squares[0] + squares[1]) + (squares[2] + squares[3]));
    sums.count += count;
}

/* (x - mean) * factor, where the mean is two numbers: high + low.
 *
 * From a mean of 2^103, half a unit in the last place of the greatest float, or more, an x of a
 * float's range may deviate by more than a float holds. Then deviations are scaled down by a power of
 * two, which loses nothing that counts beside such a mean, and the factor up. Others are scaled by 1:
 * with the subtraction that is one instruction, and it gives the bits that it gives alone. */
struct FromMean {
    static constexpr bool SCALES = FORMAT == FLOAT32 || FORMAT == BFLOAT16;
    Real high, low, scale, factor;

    __device__ Real operator()(Storage x) const
    {
        return (((SCALES ? decode(x) * scale : decode(x)) - high) - low) * factor;
    }

    __device__ static FromMean of(double mean, double factor)
    {
        const bool huge = SCALES && fabs(mean) >= 0x1p103;
        const double scaled = huge ? mean * 0x1p-24 : mean;
        const Real high = Real(scaled);
        return {high, Real(scaled - double(high)), huge ? Real(0x1p-24) : Real(1),
                Real(huge ? factor * 0x1p24 : factor)};
    }
};

template <bool MASKED>
__device__ Products products_of(const Chunk (&dy)[TILE], const Chunk (&x)[TILE],
                                const unsigned (&masks)[TILE], const FromMean &xhat)
{
    Products sums = {};
#pragma unroll
    for (int u = 0; u < TILE; u++) {
        Real first = Real(0), second = Real(0);
#pragma unroll
        for (int i = 0; i < V; i++)
            if (!MASKED || masks[u] >> i & 1) {
                const Real gradient = decode(dy[u].of[i]);
                first += gradient;
                second += gradient * xhat(x[u].of[i]);
            }
        sums = merge(sums, {double(first), double(second)});
    }
    return sums;
}

/* ------------------------------------------------------------------ results for an element */

/* y = (x - mean) * (invstd * weight) + shift */
struct Affine {
    static constexpr int INPUTS = 1;
    FromMean scaled;
    Real shift;

    __device__ Real operator()(Storage x, Storage = Storage()) const
    {
        return scaled(x) + shift;
    }

    __device__ static Affine of(double mean, double invstd, double weight, double bias)
    {
        return {FromMean::of(mean, invstd * weight), Real(bias)};
    }

    __device__ static Affine of(const Job &job, i64 channel)
    {
        const double invstd = job.var.data == nullptr
                                  ? at(job.invstd, channel)
                                  : 1.0 / sqrt(at(job.var, channel) + job.eps);
        return of(at(job.mean, channel), invstd, at(job.weight, channel, 1.0),
                  at(job.bias, channel));
    }
};

/* dx = ((dy - dy_mean) - (x - mean) * slope) * scale */
struct Gradient {
    static constexpr int INPUTS = 2;
    FromMean sloped;
    Real dy_mean, scale;

    __device__ Real operator()(Storage x, Storage dy) const
    {
        return ((decode(dy) - dy_mean) - sloped(x)) * scale;
    }

    __device__ static Gradient of(const Job &job, i64 channel, const Products &sums)
    {
        const double invstd = at(job.invstd, channel);
        const double slope = invstd * (sums.dy_xhat / count_of(job));
        return {FromMean::of(at(job.mean, channel), slope), Real(sums.dy / count_of(job)),
                Real(invstd * at(job.weight, channel, 1.0))};
    }

    __device__ static Gradient of(const Job &job, i64 channel)
    {
        return of(job, channel, {at(job.sum_dy, channel), at(job.sum_dy_xhat, channel)});
    }
};

/* ------------------------------------------------------------------ results for a channel */

__device__ double invstd_of(const Job &job, const Moments &moments)
{
    return 1.0 / sqrt(moments.m2 / count_of(job) + job.eps);
}

/* The running statistics of a channel, before it is published. */
struct Running {
    double mean, var;

    __device__ static Running of(const Job &job, i64 channel)
    {
        return {at(job.running_mean, channel), at(job.running_var, channel)};
    }
};

/* Moves the running statistics towards those of a batch. */
__device__ void move_running(const Job &job, i64 channel, const Moments &moments,
                             const Running &running, double factor)
{
    const double variance = moments.m2 / (count_of(job) - job.correction);
    put(job.running_mean, channel, (1.0 - factor) * running.mean + factor * moments.mean);
    put(job.running_var, channel, (1.0 - factor) * running.var + factor * variance);
}

/* One thread of a channel writes its statistics, and moves the running ones towards them. */
__device__ void publish(const Job &job, i64 channel, const Moments &moments,
                        const Running &running)
{
    job.mean_out[channel] = moments.mean;
    if (job.m2_out != nullptr)
        job.m2_out[channel] = moments.m2;
    if (job.invstd_out != nullptr)
        job.invstd_out[channel] = invstd_of(job, moments);
    if (job.running_mean.data != nullptr && enough(job)) {
        const double factor = job.cumulative ? 1.0 / double(*job.counter + 1) : job.momentum;
        move_running(job, channel, moments, running, factor);
    }
    /* Not where other channels may still read it. */
    if (channel == 0 && job.counter != nullptr && !job.cumulative && enough(job))
        *job.counter += 1;
}

__device__ void publish(const Job &job, i64 channel, const Products &sums)
{
    job.sum_dy_out[channel] = sums.dy;
    job.sum_dy_xhat_out[channel] = sums.dy_xhat;
}

/* ------------------------------------------------------------------ row layout: a channel is a
 * run in every sample */

/* The chunks of a piece of a channel that a thread takes, one after the other. */
struct Walk {
    i64 left;  /* chunks from here to the end of the piece */
    i64 begin; /* the element at which the channel's run of this sample begins */
    i64 chunk; /* of the run */

    __device__ Walk(const Job &job, i64 channel, i64 piece, i64 pieces)
    {
        const i64 all = job.n * job.chunks;
        const i64 first = quotient(all * piece, pieces) + threadIdx.x;
        left = quotient(all * (piece + 1), pieces) - first;
        const i64 sample = quotient(first, job.chunks);
        begin = (sample * job.c + channel) * job.s;
        chunk = first - sample * job.chunks;
    }

    __device__ bool more() const
    {
        return left > 0;
    }

    __device__ void next(const Job &job)
    {
        left -= blockDim.x;
        begin += job.step;
        chunk += job.step_chunks;
        if (chunk >= job.chunks) {
            chunk -= job.chunks;
            begin += job.c * job.s;
        }
    }

    /* The index of the chunk in the array, and which of its elements are the channel's. */
    __device__ i64 index() const
    {
        return i64((unsigned long long)begin / V) + chunk;
    }

    __device__ unsigned mask(const Job &job) const
    {
        if (job.s % V == 0)
            return FULL;
        const i64 low = (begin & (V - 1)) - chunk * V;
        return mask_between(low, low + job.s);
    }
};

/* Whether all threads of a warp that are here have whole tiles. */
__device__ bool whole(unsigned common)
{
    return __all_sync(__activemask(), common == FULL);
}

/* The sums of what a thread takes of a piece, read by `read(array, walk, slot)`. */
template <bool SCALED, typename Read>
__device__ Moments moments_of_walk(const Job &job, Walk walk, Read read)
{
    Deviations sums = {};
    for (int slot = threadIdx.x; walk.more();) {
        Chunk tile[TILE];
        unsigned masks[TILE], common = FULL;
#pragma unroll
        for (int u = 0; u < TILE; u++, slot += blockDim.x) {
            tile[u] = {};
            masks[u] = 0;
            if (walk.more()) {
                tile[u] = read(job.x, walk, slot);
                masks[u] = valid_of(job, walk.index(), walk.mask(job));
                walk.next(job);
            }
            common &= masks[u];
        }
        if (whole(common))
            add<false, SCALED, TILE, V>(sums, tile, masks);
        else
            add<true, SCALED, TILE, V>(sums, tile, masks);
    }
    return sums.moments<SCALED>();
}

template <typename Read>
__device__ Moments moments_of_walk(const Job &job, const Walk &walk, Read read)
{
    const Moments moments = moments_of_walk<false>(job, walk, read);
    return overflown(moments) ? moments_of_walk<true>(job, walk, read) : moments;
}

template <typename Read>
__device__ Products products_of_walk(const Job &job, Walk walk, const FromMean &xhat, Read read)
{
    Products sums = {};
    for (int slot = threadIdx.x; walk.more();) {
        Chunk dy[TILE], x[TILE];
        unsigned masks[TILE], common = FULL;
#pragma unroll
        for (int u = 0; u < TILE; u++, slot += blockDim.x) {
            masks[u] = 0;
            if (walk.more()) {
                dy[u] = read(job.dy, walk, slot);
                x[u] = read(job.x, walk, slot);
                masks[u] = valid_of(job, walk.index(), walk.mask(job));
                walk.next(job);
            }
            common &= masks[u];
        }
        sums = merge(sums, whole(common) ? products_of<false>(dy, x, masks, xhat)
                                         : products_of<true>(dy, x, masks, xhat));
    }
    return sums;
}

/* How many chunks of a piece there can be, and so where a second array begins in shared memory. */
__device__ int slots_of(const Job &job)
{
    return int(job.n * job.chunks / CLUSTER) + 1;
}

/* A channel is read once: a cluster of blocks keeps it in shared memory. Without an `out`, its
 * statistics are all that is asked for. */
extern "C" __global__ void CLUSTER_OF_BLOCKS __launch_bounds__(512, 2)
forward_resident(LAUNCHED_JOB)
{
    OWN_JOB
    extern __shared__ Chunk resident[];
    const i64 channel = blockIdx.x / CLUSTER;
    const int rank = blockIdx.x % CLUSTER;
    const Walk start(job, channel, rank, CLUSTER);
    int slot = threadIdx.x;
    for (Walk walk = start; walk.more(); walk.next(job), slot += blockDim.x)
        fetch(job, resident + slot, job.x, walk.index());
    /* What thread 0 will need is read while the elements are on their way. */
    __shared__ double weight, bias;
    __shared__ Running running;
    if (threadIdx.x == 0) {
        weight = at(job.weight, channel, 1.0);
        bias = at(job.bias, channel);
        running = Running::of(job, channel);
    }
    arrived();
    const auto read = [&](const Storage *, const Walk &, int slot) { return resident[slot]; };
    const Moments moments = merge_cluster(merge_block(moments_of_walk(job, start, read)));
    __shared__ Affine coefficients;
    if (threadIdx.x == 0 && job.out != nullptr)
        coefficients = Affine::of(moments.mean, invstd_of(job, moments), weight, bias);
    __syncthreads();
    if (job.out != nullptr) {
        const Affine affine = coefficients;
        slot = threadIdx.x;
        for (Walk walk = start; walk.more(); walk.next(job), slot += blockDim.x) {
            const Chunk x = resident[slot];
            const Chunk y = chunk_of([&](int i) { return affine(x.of[i]); });
            store(job, walk.index(), y, walk.mask(job));
        }
    }
    if (rank == 0 && threadIdx.x == 0)
        publish(job, channel, moments, running);
    leave_cluster();
}

extern "C" __global__ void CLUSTER_OF_BLOCKS __launch_bounds__(512, 2)
backward_resident(LAUNCHED_JOB)
{
    OWN_JOB
    extern __shared__ Chunk resident[];
    const i64 channel = blockIdx.x / CLUSTER;
    const int rank = blockIdx.x % CLUSTER, slots = slots_of(job);
    const Walk start(job, channel, rank, CLUSTER);
    int slot = threadIdx.x;
    for (Walk walk = start; walk.more(); walk.next(job), slot += blockDim.x) {
        const i64 index = walk.index();
        fetch(job, resident + slot, job.dy, index);
        fetch(job, resident + slots + slot, job.x, index);
    }
    /* Read while the elements are on their way. */
    const FromMean xhat = FromMean::of(at(job.mean, channel), at(job.invstd, channel));
    arrived();
    const auto read = [&](const Storage *array, const Walk &, int slot) {
        return resident[array == job.x ? slots + slot : slot];
    };
    const Products sums = merge_cluster(merge_block(products_of_walk(job, start, xhat, read)));
    __shared__ Gradient coefficients;
    if (threadIdx.x == 0 && job.out != nullptr)
        coefficients = Gradient::of(job, channel, sums);
    __syncthreads();
    if (job.out != nullptr) {
        const Gradient gradient = coefficients;
        slot = threadIdx.x;
        for (Walk walk = start; walk.more(); walk.next(job), slot += blockDim.x) {
            const Chunk dy = resident[slot], x = resident[slots + slot];
            const Chunk dx = chunk_of([&](int i) { return gradient(x.of[i], dy.of[i]); });
            store(job, walk.index(), dx, walk.mask(job));
        }
    }
    if (rank == 0 && threadIdx.x == 0)
        publish(job, channel, sums);
    leave_cluster();
}

/* A channel that is too large is read twice: here piece by piece, for its sums. */

__device__ void put_partial(const Job &job, i64 index, const Moments &moments)
{
    reinterpret_cast<Moments *>(job.partials)[index] = moments;
}

__device__ void put_partial(const Job &job, i64 index, const Products &sums)
{
    reinterpret_cast<Products *>(job.partials)[index] = sums;
}

extern "C" __global__ void __launch_bounds__(256, 4) moments_of_runs(LAUNCHED_JOB)
{
    OWN_JOB
    const i64 channel = quotient(blockIdx.x, job.splits);
    const i64 piece = blockIdx.x - channel * job.splits;
    const auto read = [&](const Storage *array, const Walk &walk, int) {
        return load(job, array, walk.index());
    };
    const Walk walk(job, channel, piece, job.splits);
    const Moments moments = merge_block(moments_of_walk(job, walk, read));
    if (threadIdx.x == 0)
        put_partial(job, piece * job.c + channel, moments);
}

extern "C" __global__ void __launch_bounds__(256, 4) products_of_runs(LAUNCHED_JOB)
{
    OWN_JOB
    const i64 channel = quotient(blockIdx.x, job.splits), piece = blockIdx.x % job.splits;
    const auto read = [&](const Storage *array, const Walk &walk, int) {
        return load(job, array, walk.index());
    };
    const FromMean xhat = FromMean::of(at(job.mean, channel), at(job.invstd, channel));
    const Walk walk(job, channel, piece, job.splits);
    const Products sums = merge_block(products_of_walk(job, walk, xhat, read));
    if (threadIdx.x == 0)
        put_partial(job, piece * job.c + channel, sums);
}

/* ------------------------------------------------------------------ columns: memory is a matrix
 * whose columns belong to a channel each, s neighbouring ones to the first, s to the next. Rows of
 * fewer elements than a strip has are folded, so that `width` is several times c * s. */

__device__ i64 channel_of(const Job &job, i64 column)
{
    const i64 unfolded = column - quotient(column, job.c * job.s) * (job.c * job.s);
    return quotient(unfolded, job.s);
}

/* A strip of columns is as many chunks wide; the other threads of a block take further rows. */
constexpr int STRIP = 8;
constexpr int STRIP_TILE = V == 8 ? 4 : 8; /* more would not fit the registers */

/* Where a thread of a strip is. */
struct Strip {
    i64 column;   /* of its chunk, in chunks */
    i64 row, end; /* its first row, and where the rows of the block end */
    int lanes;    /* threads that take rows of one chunk's columns, in turn */
    bool inside;

    __device__ Strip(const Job &job)
    {
        const i64 columns = job.width / V, strips = (columns + STRIP - 1) / STRIP;
        const i64 piece = quotient(blockIdx.x, strips), strip = blockIdx.x - piece * strips;
        column = strip * STRIP + threadIdx.x % STRIP;
        lanes = blockDim.x / STRIP;
        row = quotient(job.height * piece, job.splits) + threadIdx.x / STRIP;
        end = quotient(job.height * (piece + 1), job.splits);
        inside = column < columns;
    }

    __device__ i64 index(const Job &job, i64 row) const
    {
        return row * (job.width / V) + column;
    }

    /* The elements of a chunk that the array has. */
    __device__ unsigned mask(const Job &job, i64 row) const
    {
        return row < end ? mask_between(0, job.size - index(job, row) * V) : 0;
    }

    __device__ unsigned valid_mask(const Job &job, i64 row) const
    {
        return valid_of(job, index(job, row), mask(job, row));
    }
};

__device__ Moments merge_some(const Moments *some, int count, int stride)
{
    int first = 0; /* one that has values, if any has */
#if WITH_MASK
    while (first < count - 1 && some[first * stride].count == 0.0)
        first++;
#endif
    const double pivot = some[first * stride].mean;
    Around sums(some[0], pivot);
    for (int i = 1; i < count; i++)
        sums.add(Around(some[i * stride], pivot));
    return sums.moments(pivot);
}

__device__ Products merge_some(const Products *some, int count, int stride)
{
    Products sums = some[0];
    for (int i = 1; i < count; i++)
        sums = merge(sums, some[i * stride]);
    return sums;
}

/* Merges what the threads of a block have of the same columns, a column at a time, and writes it. */
template <typename Sums>
__device__ void put_columns(const Job &job, const Strip &strip, const Sums (&sums)[V])
{
    __shared__ Sums threads[256];
    __shared__ Sums warps[8][STRIP];
    const i64 columns = job.width / V, strips = (columns + STRIP - 1) / STRIP;
    const i64 piece = quotient(blockIdx.x, strips);
#pragma unroll
    for (int i = 0; i < V; i++) {
        threads[threadIdx.x] = sums[i];
        __syncthreads();
        /* Four threads of a column become one, then eight. */
        if (threadIdx.x < 8 * STRIP)
            warps[threadIdx.x / STRIP][threadIdx.x % STRIP] =
                merge_some(threads + threadIdx.x / STRIP * 4 * STRIP + threadIdx.x % STRIP, 4,
                           STRIP);
        __syncthreads();
        if (threadIdx.x < STRIP && strip.inside)
            put_partial(job, piece * job.width + strip.column * V + i,
                        merge_some(&warps[0][threadIdx.x], 8, STRIP));
    }
}

/* The moments of a thread's columns; scaled, of those that have overflown: the squares of others would
 * vanish. */
template <bool SCALED> __device__ void moments_of_strip(const Job &job, const Strip &strip,
                                                        Moments (&moments)[V])
{
    Deviations sums[V] = {};
    for (i64 row = strip.row; row < strip.end; row += STRIP_TILE * strip.lanes) {
        Chunk tile[STRIP_TILE];
        unsigned masks[STRIP_TILE], common = FULL;
#pragma unroll
        for (int u = 0; u < STRIP_TILE; u++) {
            tile[u] = {};
            masks[u] = strip.valid_mask(job, row + u * strip.lanes);
            if (masks[u])
                tile[u] = load(job, job.x, strip.index(job, row + u * strip.lanes));
            common &= masks[u];
        }
        const bool all = whole(common);
#pragma unroll
        for (int i = 0; i < V; i++)
            if (all)
                add<false, SCALED, STRIP_TILE, 1>(sums[i], tile, masks, i);
            else
                add<true, SCALED, STRIP_TILE, 1>(sums[i], tile, masks, i);
    }
#pragma unroll
    for (int i = 0; i < V; i++)
        if (!SCALED || overflown(moments[i]))
            moments[i] = sums[i].moments<SCALED>();
}

extern "C" __global__ void __launch_bounds__(256, 2) moments_of_columns(LAUNCHED_JOB)
{
    OWN_JOB
    const Strip strip(job);
    Moments sums[V] = {};
    if (strip.inside) {
        moments_of_strip<false>(job, strip, sums);
        bool again = false;
#pragma unroll
        for (int i = 0; i < V; i++)
            again |= overflown(sums[i]);
        if (again)
            moments_of_strip<true>(job, strip, sums);
    }
    put_columns(job, strip, sums);
}

extern "C" __global__ void __launch_bounds__(256, 2) products_of_columns(LAUNCHED_JOB)
{
    OWN_JOB
    const Strip strip(job);
    Products sums[V] = {};
    if (strip.inside) {
        FromMean xhat[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            const i64 channel = channel_of(job, strip.column * V + i);
            xhat[i] = FromMean::of(at(job.mean, channel), at(job.invstd, channel));
        }
        for (i64 row = strip.row; row < strip.end; row += TILE * strip.lanes) {
            Chunk dy[TILE], x[TILE];
            unsigned masks[TILE];
#pragma unroll
            for (int u = 0; u < TILE; u++) {
                masks[u] = strip.valid_mask(job, row + u * strip.lanes);
                if (masks[u]) {
                    dy[u] = load(job, job.dy, strip.index(job, row + u * strip.lanes));
                    x[u] = load(job, job.x, strip.index(job, row + u * strip.lanes));
                }
            }
#pragma unroll
            for (int i = 0; i < V; i++) {
                Real first = Real(0), second = Real(0);
#pragma unroll
                for (int u = 0; u < TILE; u++)
                    if (masks[u] >> i & 1) {
                        const Real gradient = decode(dy[u].of[i]);
                        first += gradient;
                        second += gradient * xhat[i](x[u].of[i]);
                    }
                sums[i] = merge(sums[i], {double(first), double(second)});
            }
        }
    }
    put_columns(job, strip, sums);
}

/* ------------------------------------------------------------------ strips that stay on chip
 *
 * Where every column is a channel, a cluster of blocks reads a strip of columns once: each block
 * keeps a piece of their rows in shared memory. Column t of the strip is merged by thread t. */

#if !WITH_MASK
constexpr int STRIP_COLUMNS = STRIP * V;

/* Where a thread is, in a strip of job.chunks chunks. */
struct ResidentStrip {
    int width;      /* of the strip, in chunks: a power of two */
    int lanes;      /* threads that take rows of one chunk's columns, in turn */
    i64 column;     /* of its chunk, in chunks */
    i64 first, end; /* rows of the block */
    i64 row;        /* the first of the thread; `end` if its chunk is beyond the array */
    i64 channel;    /* that it merges, if any */
    bool inside, merges;
    int slots; /* chunks of an array that a block can have */

    __device__ ResidentStrip(const Job &job)
    {
        const i64 strip = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
        width = int(job.chunks);
        lanes = blockDim.x / width;
        column = strip * width + threadIdx.x % width;
        inside = column < job.width / V;
        first = quotient(job.height * rank, CLUSTER);
        end = quotient(job.height * (rank + 1), CLUSTER);
        row = inside ? first + threadIdx.x / width : end;
        channel = strip * columns() + threadIdx.x;
        merges = threadIdx.x < columns() && channel < job.c;
        slots = (int(quotient(job.height, CLUSTER)) + 1) * width;
    }

    __device__ int columns() const
    {
        return width * V;
    }

    __device__ i64 index(const Job &job, i64 row) const
    {
        return row * (job.width / V) + column;
    }
};

template <typename Value> __device__ Value of_other_lane(Value value, int lanes_away)
{
    return Value(__shfl_xor_sync(~0u, value, lanes_away));
}

/* Adds up what the lanes of a warp have of the same columns; the first of each chunk puts it where
 * `sums_of_warps` finds it. */
template <typename Sum>
__device__ void put_sums(const ResidentStrip &strip, Sum (&sums)[V], Sum *of_warps)
{
#pragma unroll
    for (int lane = 16; lane; lane >>= 1)
        if (lane >= strip.width)
#pragma unroll
            for (int i = 0; i < V; i++)
                sums[i] += of_other_lane(sums[i], lane);
    const int lane = threadIdx.x % 32;
    if (lane < strip.width)
#pragma unroll
        for (int i = 0; i < V; i++)
            of_warps[(threadIdx.x / 32 * strip.width + lane) * V + i] = sums[i];
}

template <typename Sum>
__device__ Sum sums_of_warps(const ResidentStrip &strip, int column, const Sum *of_warps)
{
    Sum sum = Sum(0);
    for (int warp = 0; warp < blockDim.x / 32; warp++)
        sum += of_warps[warp * strip.columns() + column];
    return sum;
}

/* Calls `take(slot)` for every row of a thread, of TAKEN rows at most between two `pause()`. */
template <int TAKEN, typename Take, typename Pause>
__device__ void for_rows(const ResidentStrip &strip, Take take, Pause pause)
{
    int slot = threadIdx.x;
    for (i64 row = strip.row; row < strip.end;) {
#pragma unroll
        for (int u = 0; u < TAKEN; u++, row += strip.lanes, slot += blockDim.x)
            if (row < strip.end)
                take(slot);
        pause();
    }
}

/* The moments of the column that a thread merges, around the mean of the first rows of all threads.
 * `start` is the first row of the block. */
template <bool SCALED>
__device__ Moments moments_of_resident(const Job &job, const ResidentStrip &strip,
                                       Chunk *resident, const Chunk &start)
{
    const int warps = blockDim.x / 32;
    double *sums_at = reinterpret_cast<double *>(resident + strip.slots);
    double *squares_at = sums_at + warps * strip.columns();
    Real *starts_at = reinterpret_cast<Real *>(squares_at + warps * strip.columns());
    __shared__ Real pivots[STRIP_COLUMNS];
    Real pivot[V], sum[V] = {}, squares[V] = {};
    int slot = threadIdx.x;
#pragma unroll
    for (int u = 0; u < TILE; u++, slot += blockDim.x)
        if (strip.row + u * strip.lanes < strip.end)
#pragma unroll
            for (int i = 0; i < V; i++)
                sum[i] += scaled<SCALED>(resident[slot].of[i]) - scaled<SCALED>(start.of[i]);
    put_sums(strip, sum, starts_at);
    __syncthreads();
    const i64 rows = strip.end - strip.first, started = TILE * strip.lanes;
#pragma unroll
    for (int i = 0; i < V; i++) {
        const int column = threadIdx.x % strip.width * V + i;
        pivot[i] = scaled<SCALED>(start.of[i]) +
                   sums_of_warps(strip, column, starts_at) / Real(rows < started ? rows : started);
        if (threadIdx.x < strip.width)
            pivots[column] = pivot[i];
        sum[i] = Real(0);
    }
    double sum_all[V] = {}, squares_all[V] = {};
    for_rows<STRIP_TILE>(
        strip,
        [&](int slot) {
            const Chunk x = resident[slot];
#pragma unroll
            for (int i = 0; i < V; i++) {
                const Real deviation = scaled<SCALED>(x.of[i]) - pivot[i];
                sum[i] += deviation;
                squares[i] += deviation * deviation;
            }
        },
        [&] {
#pragma unroll
            for (int i = 0; i < V; i++) {
                sum_all[i] += double(sum[i]), squares_all[i] += double(squares[i]);
                sum[i] = squares[i] = Real(0);
            }
        });
    put_sums(strip, sum_all, sums_at);
    put_sums(strip, squares_all, squares_at);
    __syncthreads();
    Moments own = {};
    if (threadIdx.x < strip.columns()) {
        const double up = SCALED ? UP : 1.0;
        Around sums({double(rows)}, 0.0);
        sums.sum = sums_of_warps(strip, threadIdx.x, sums_at) * up;
        sums.squares = sums_of_warps(strip, threadIdx.x, squares_at) * up * up;
        own = sums.moments(pivots[threadIdx.x] * up);
    }
    return merge_cluster_each<STRIP_COLUMNS>(own, strip.columns());
}

extern "C" __global__ void CLUSTER_OF_BLOCKS __launch_bounds__(512, 1)
forward_of_strip(LAUNCHED_JOB)
{
    OWN_JOB
    extern __shared__ Chunk resident[];
    const ResidentStrip strip(job);
    int slot = threadIdx.x;
    for (i64 row = strip.row; row < strip.end; row += strip.lanes, slot += blockDim.x)
        fetch(job, resident + slot, job.x, strip.index(job, row));
    Chunk start = {};
    if (strip.inside && strip.first < strip.end)
        start = load(job, job.x, strip.index(job, strip.first));
    /* What the merging threads will need is read while the elements are on their way. */
    double weight = 1.0, bias = 0.0;
    Running running = {};
    if (strip.merges) {
        weight = at(job.weight, strip.channel, 1.0);
        bias = at(job.bias, strip.channel);
        running = Running::of(job, strip.channel);
    }
    __shared__ bool again;
    if (threadIdx.x == 0)
        again = false;
    arrived();
    __shared__ Affine coefficients[STRIP_COLUMNS];
    const auto finish = [&](const Moments &moments) {
        if (strip.merges)
            coefficients[threadIdx.x] =
                Affine::of(moments.mean, invstd_of(job, moments), weight, bias);
        __syncthreads();
    };
    Moments moments = moments_of_resident<false>(job, strip, resident, start);
    if (strip.merges && overflown(moments))
        again = true;
    finish(moments);
    if (again) { /* in all blocks of the cluster, which have the same bits */
        leave_cluster();
        const Moments scaled = moments_of_resident<true>(job, strip, resident, start);
        moments = overflown(moments) ? scaled : moments; /* the squares of others would vanish */
        finish(moments);
    }
    if (job.out != nullptr) {
        Affine affine[V];
#pragma unroll
        for (int i = 0; i < V; i++)
            affine[i] = coefficients[threadIdx.x % strip.width * V + i];
        slot = threadIdx.x;
        for (i64 row = strip.row; row < strip.end; row += strip.lanes, slot += blockDim.x) {
            const Chunk x = resident[slot];
            const Chunk y = chunk_of([&](int i) { return affine[i](x.of[i]); });
            store(job, strip.index(job, row), y, FULL);
        }
    }
    if (blockIdx.x % CLUSTER == 0 && strip.merges)
        publish(job, strip.channel, moments, running);
    leave_cluster();
}

extern "C" __global__ void CLUSTER_OF_BLOCKS __launch_bounds__(512, 1)
backward_of_strip(LAUNCHED_JOB)
{
    OWN_JOB
    extern __shared__ Chunk resident[];
    const ResidentStrip strip(job);
    Chunk *of_x = resident + strip.slots;
    int slot = threadIdx.x;
    for (i64 row = strip.row; row < strip.end; row += strip.lanes, slot += blockDim.x) {
        const i64 index = strip.index(job, row);
        fetch(job, resident + slot, job.dy, index);
        fetch(job, of_x + slot, job.x, index);
    }
    FromMean xhat[V] = {};
    if (strip.inside)
#pragma unroll
        for (int i = 0; i < V; i++) {
            const i64 channel = strip.column * V + i;
            xhat[i] = FromMean::of(at(job.mean, channel), at(job.invstd, channel));
        }
    arrived();
    Real first[V] = {}, second[V] = {};
    double dy_all[V] = {}, dy_xhat_all[V] = {};
    for_rows<TILE>(
        strip,
        [&](int slot) {
            const Chunk dy = resident[slot], x = of_x[slot];
#pragma unroll
            for (int i = 0; i < V; i++) {
                const Real gradient = decode(dy.of[i]);
                first[i] += gradient;
                second[i] += gradient * xhat[i](x.of[i]);
            }
        },
        [&] {
#pragma unroll
            for (int i = 0; i < V; i++) {
                dy_all[i] += double(first[i]), dy_xhat_all[i] += double(second[i]);
                first[i] = second[i] = Real(0);
            }
        });
    double *dy_at = reinterpret_cast<double *>(of_x + strip.slots);
    double *dy_xhat_at = dy_at + blockDim.x / 32 * strip.columns();
    put_sums(strip, dy_all, dy_at);
    put_sums(strip, dy_xhat_all, dy_xhat_at);
    __syncthreads();
    Products own = {};
    if (threadIdx.x < strip.columns())
        own = {sums_of_warps(strip, threadIdx.x, dy_at),
               sums_of_warps(strip, threadIdx.x, dy_xhat_at)};
    const Products sums = merge_cluster_each<STRIP_COLUMNS>(own, strip.columns());
    __shared__ Gradient coefficients[STRIP_COLUMNS];
    if (strip.merges)
        coefficients[threadIdx.x] = Gradient::of(job, strip.channel, sums);
    __syncthreads();
    if (job.out != nullptr) {
        Gradient gradient[V];
#pragma unroll
        for (int i = 0; i < V; i++)
            gradient[i] = coefficients[threadIdx.x % strip.width * V + i];
        slot = threadIdx.x;
        for (i64 row = strip.row; row < strip.end; row += strip.lanes, slot += blockDim.x) {
            const Chunk dy = resident[slot], x = of_x[slot];
            const Chunk dx = chunk_of([&](int i) { return gradient[i](x.of[i], dy.of[i]); });
            store(job, strip.index(job, row), dx, FULL);
        }
    }
    if (blockIdx.x % CLUSTER == 0 && strip.merges)
        publish(job, strip.channel, sums);
    leave_cluster();
}
#endif

/* ------------------------------------------------------------------ merging the pieces
 *
 * A block for each channel. Pieces lie as the columns of a channel do, of which it has s in each of
 * the folds of a row; pieces of runs lie as if it had one. */

template <typename Sums> __device__ Sums merged_partials(const Job &job, i64 channel)
{
    const i64 s = job.width == 0 ? 1 : job.s, unfolded = job.c * s;
    const i64 folds = job.width == 0 ? 1 : quotient(job.width, unfolded);
    const i64 entries = job.splits * folds * s;
    Sums sums = {};
    for (i64 entry = threadIdx.x; entry < entries; entry += blockDim.x) {
        const i64 row = quotient(entry, s); /* piece and fold */
        const i64 index = row * unfolded + channel * s + (entry - row * s);
        sums = merge(sums, reinterpret_cast<const Sums *>(job.partials)[index]);
    }
    return merge_block(sums);
}

extern "C" __global__ void __launch_bounds__(256) merge_moments(LAUNCHED_JOB)
{
    OWN_JOB
    const Moments moments = merged_partials<Moments>(job, blockIdx.x);
    if (threadIdx.x == 0)
        publish(job, blockIdx.x, moments, Running::of(job, blockIdx.x));
}

extern "C" __global__ void __launch_bounds__(256) merge_products(LAUNCHED_JOB)
{
    OWN_JOB
    const Products sums = merged_partials<Products>(job, blockIdx.x);
    if (threadIdx.x == 0)
        publish(job, blockIdx.x, sums);
}

#if WITH_BATCHES
/* Moves the running statistics towards those of one batch after the other. A thread for each
 * channel. */
extern "C" __global__ void __launch_bounds__(256) follow(const Job launched)
{
    const i64 channel = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (channel >= launched.c)
        return;
    i64 seen = launched.cumulative ? *launched.counter : 0;
    for (i64 k = 0; k < launched.batch_count; k++) {
        Job job = of_batch(launched, k);
        if (k == launched.batch_count - 1)
            job.count = launched.last_count;
        if (!enough(job))
            continue;
        const double factor = launched.cumulative ? 1.0 / double(++seen) : launched.momentum;
        const Moments moments = {count_of(job), job.mean_out[channel], job.m2_out[channel]};
        move_running(job, channel, moments, Running::of(job, channel), factor);
    }
}
#endif

/* ------------------------------------------------------------------ element by element
 *
 * Every array is taken for a matrix of columns. A thread stays in its columns, whose coefficients
 * it has in registers; those of all channels of a strip are computed once, while the first elements
 * are on their way. Blocks run from the array's end to its beginning: what was read last for the
 * sums may still be in the cache. */

/* Rows that are on their way to a thread at the same time. */
constexpr int AHEAD = 4;
/* Channels that a block can meet: strips are of 32 chunks where a chunk can meet several. */
constexpr int CHANNELS = 264;

/* Where a thread is: its column, in chunks, and its rows, `lanes` apart. */
struct Columns {
    i64 column, row, end;
    i64 first, channels; /* of the strip; counted on from one fold to the next */
    int lanes;

    __device__ Columns(const Job &job, int strip_chunks)
    {
        const i64 columns = job.width / V;
        const i64 block = gridDim.x - 1 - blockIdx.x;
        const i64 strip = quotient(block, job.splits), piece = block - strip * job.splits;
        const i64 begin = strip * strip_chunks;
        const i64 last = begin + strip_chunks < columns ? begin + strip_chunks : columns;
        column = begin + threadIdx.x % strip_chunks;
        lanes = blockDim.x / strip_chunks;
        row = quotient(job.height * piece, job.splits) + threadIdx.x / strip_chunks;
        end = column < columns ? quotient(job.height * (piece + 1), job.splits) : 0;
        first = quotient(begin * V, job.s);
        channels = quotient(last * V - 1, job.s) - first + 1;
    }
};

/* Computes all elements of a strip's rows. COEFFICIENTS is 1 where a chunk never has elements of
 * two channels, else V. */
template <int COEFFICIENTS, typename Coefficients>
__device__ void compute_columns(const Job &job)
{
    __shared__ Coefficients table[CHANNELS];
    constexpr int LAST = Coefficients::INPUTS - 1;
    const Columns columns(job, COEFFICIENTS == 1 ? blockDim.x : 32);
    const i64 whole = whole_chunks(job), step = job.width / V * columns.lanes;
    i64 row = columns.row, index = row * (job.width / V) + columns.column;
    Chunk inputs[Coefficients::INPUTS][AHEAD];
    Coefficients own[COEFFICIENTS];
    const auto all_whole = [&] {
        return row + (AHEAD - 1) * columns.lanes < columns.end &&
               index + (AHEAD - 1) * step < whole;
    };
    const auto read = [&] {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            inputs[0][u] = reinterpret_cast<const Chunk *>(job.x)[index + u * step];
            if (LAST > 0)
                inputs[LAST][u] = reinterpret_cast<const Chunk *>(job.dy)[index + u * step];
        }
    };
    const auto compute = [&](int u) {
        return chunk_of([&](int i) {
            return own[COEFFICIENTS == 1 ? 0 : i](inputs[0][u].of[i], inputs[LAST][u].of[i]);
        });
    };
    bool in_flight = all_whole();
    if (in_flight)
        read();
    for (int i = threadIdx.x; i < columns.channels; i += blockDim.x) {
        const i64 channel = columns.first + i;
        table[i] = Coefficients::of(job, channel - quotient(channel, job.c) * job.c);
    }
    __syncthreads();
    if (row < columns.end) {
#pragma unroll
        for (int i = 0; i < COEFFICIENTS; i++)
            own[i] = table[quotient(columns.column * V + i, job.s) - columns.first];
    }
    while (in_flight) {
        const i64 here = index;
        Chunk outputs[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            outputs[u] = compute(u);
        row += AHEAD * columns.lanes;
        index += AHEAD * step;
        in_flight = all_whole();
        if (in_flight)
            read();
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            store(job, here + u * step, outputs[u]);
    }
    for (; row < columns.end; row += columns.lanes, index += step) {
        inputs[0][0] = load(job, job.x, index);
        if (LAST > 0)
            inputs[LAST][0] = load(job, job.dy, index);
        store(job, index, compute(0), mask_between(0, job.size - index * V));
    }
}

extern "C" __global__ void __launch_bounds__(256, 4) normalize(LAUNCHED_JOB)
{
    OWN_JOB
    compute_columns<1, Affine>(job);
}

extern "C" __global__ void __launch_bounds__(256, 2) normalize_mixed(LAUNCHED_JOB)
{
    OWN_JOB
    compute_columns<V, Affine>(job);
}

extern "C" __global__ void __launch_bounds__(256, 3) differentiate(LAUNCHED_JOB)
{
    OWN_JOB
    compute_columns<1, Gradient>(job);
}

extern "C" __global__ void __launch_bounds__(256, 2) differentiate_mixed(LAUNCHED_JOB)
{
    OWN_JOB
    compute_columns<V, Gradient>(job);
}
