/* The least that memory asks for: a copy (read x, write y), a sum (read dy and x, write dx), a pair
   of results (read dy and x, write dx and the gradient of a residual), and a change in place. Each
   by ordinary and by streaming stores where the machine has them; which is better depends on the
   size. Stores are of whole cache lines, wherever an array begins. Repeats happen here, so that no
   caller's overhead is in the figures. And how far the CPUs of two threads are from each other.
 */

#include <omp.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vector;
#define LOAD _mm512_loadu_ps
#define STORE _mm512_store_ps
#define STREAM _mm512_stream_ps
#elif defined(__AVX__)
#include <immintrin.h>
typedef __m256 vector;
#define LOAD _mm256_loadu_ps
#define STORE _mm256_store_ps
#define STREAM _mm256_stream_ps
#elif defined(__SSE2__)
#include <immintrin.h>
typedef __m128 vector;
#define LOAD _mm_loadu_ps
#define STORE _mm_store_ps
#define STREAM _mm_stream_ps
#else
typedef float vector;
#define LOAD(from) (*(from))
#define STORE(to, value) (*(to) = (value))
#endif

enum { WIDTH = sizeof(vector) / sizeof(float), LINE = 16 /* floats in a cache line */ };

/* Results and operands. Both results begin at the same place of a cache line. */
typedef struct {
    float *out, *second;
    const float *a, *b;
} arrays;

/* A loop over a range of floats. */
typedef void range_loop(arrays of, size_t count);

static arrays behind(arrays of, size_t begin)
{
    return (arrays){of.out + begin, of.second + begin, of.a + begin, of.b + begin};
}

/* How many floats there are before the first cache line that begins in the range. */
static size_t before_line(const float *out, size_t count)
{
    size_t head = -((uintptr_t)out / sizeof(float)) % LINE;
    return head < count ? head : count;
}

/* A loop that makes a step for every element, or for the elements of a vector. */
#define RANGE(name, step, store, finish)                                                           \
    static void name##_range(arrays of, size_t count)                                              \
    {                                                                                              \
        size_t i = 0, head = before_line(of.out, count);                                           \
        for (; i < head; i++)                                                                      \
            step(LOAD_ONE, STORE_ONE);                                                             \
        for (; i + WIDTH <= count; i += WIDTH)                                                     \
            step(LOAD, store);                                                                     \
        for (; i < count; i++)                                                                     \
            step(LOAD_ONE, STORE_ONE);                                                             \
        finish;                                                                                    \
    }

#define LOAD_ONE(from) (*(from))
#define STORE_ONE(to, value) (*(to) = (value))
#define COPY(load, store) store(of.out + i, load(of.a + i))
#define SUM(load, store) store(of.out + i, load(of.a + i) + load(of.b + i))
#define NEGATIVE(load, store) store(of.out + i, -load(of.out + i))
#define SUM_AND_DIFFERENCE(load, store)                                                            \
    (store(of.out + i, load(of.a + i) + load(of.b + i)),                                           \
     store(of.second + i, load(of.a + i) - load(of.b + i)))

RANGE(copy_plain, COPY, STORE, )
RANGE(add_plain, SUM, STORE, )
RANGE(pair_plain, SUM_AND_DIFFERENCE, STORE, )
RANGE(inplace_plain, NEGATIVE, STORE, )
#ifdef STREAM
RANGE(copy_stream, COPY, STREAM, _mm_sfence())
RANGE(add_stream, SUM, STREAM, _mm_sfence())
RANGE(pair_stream, SUM_AND_DIFFERENCE, STREAM, _mm_sfence())
#endif

static void copy_memcpy_range(arrays of, size_t count)
{
    memcpy(of.out, of.a, count * sizeof(float));
}

/* Every thread takes an equal range of whole cache lines of out, the first also what is before. */
static void execute(range_loop *loop, arrays of, size_t count, int threads, long repeats)
{
    size_t head = before_line(of.out, count), lines = (count - head + LINE - 1) / LINE;
    for (long r = 0; r < repeats; r++) {
        if (threads == 1) {
            loop(of, count);
            continue;
        }
#pragma omp parallel num_threads(threads)
        {
            size_t team = (size_t)omp_get_num_threads(), me = (size_t)omp_get_thread_num();
            size_t begin = me ? head + lines * me / team * LINE : 0;
            size_t end = head + lines * (me + 1) / team * LINE;
            if (end > count)
                end = count;
            if (begin < end)
                loop(behind(of, begin), end - begin);
        }
    }
}

#define FLOOR(name)                                                                                \
    void name(float *out, float *second, const float *a, const float *b, size_t count,             \
              int threads, long repeats)                                                           \
    {                                                                                              \
        execute(name##_range, (arrays){out, second, a, b}, count, threads, repeats);               \
    }

FLOOR(copy_memcpy)
FLOOR(copy_plain)
FLOOR(add_plain)
FLOOR(pair_plain)
FLOOR(inplace_plain)
#ifdef STREAM
FLOOR(copy_stream)
FLOOR(add_stream)
FLOOR(pair_stream)
#endif

/* The nanoseconds in which a cache line goes from one thread to another and back: the mean of so
   many round trips, or 0 where there is one thread. */
double round_trip_ns(long count)
{
    static _Alignas(128) atomic_long trips;
    double seconds = 0;
    atomic_store(&trips, 0);
#pragma omp parallel num_threads(2) reduction(+ : seconds)
    if (omp_get_num_threads() == 2) {
        const long me = omp_get_thread_num();
#pragma omp barrier
        const double start = omp_get_wtime();
        for (long i = 0; i < count; i++) {
            while (atomic_load(&trips) != 2 * i + me)
                ;
            atomic_store(&trips, 2 * i + me + 1);
        }
        seconds = me == 0 ? omp_get_wtime() - start : 0;
    }
    return 1e9 * seconds / (double)count;
}
