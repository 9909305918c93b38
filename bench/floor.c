/* The least that memory asks for: a copy (read x, write y), a sum (read dy and x, write dx), and a
   change in place. Each by ordinary and by streaming stores where the machine has them; which is
   better depends on the size. Stores are of whole cache lines, wherever an array begins. Repeats
   happen here, so that no caller's overhead is in the figures.
 */

#include <omp.h>
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

/* A loop over a range of floats. */
typedef void range_loop(float *out, const float *a, const float *b, size_t count);

/* How many floats there are before the first cache line that begins in the range. */
static size_t before_line(const float *out, size_t count)
{
    size_t head = -((uintptr_t)out / sizeof(float)) % LINE;
    return head < count ? head : count;
}

/* A loop that stores a value, which it has of element i by load. */
#define RANGE(name, store, value, finish)                                                          \
    static void name##_range(float *out, const float *a, const float *b, size_t count)             \
    {                                                                                              \
        size_t i = 0, head = before_line(out, count);                                              \
        (void)a;                                                                                   \
        (void)b;                                                                                   \
        for (; i < head; i++)                                                                      \
            out[i] = value(LOAD_ONE);                                                              \
        for (; i + WIDTH <= count; i += WIDTH)                                                     \
            store(out + i, value(LOAD));                                                           \
        for (; i < count; i++)                                                                     \
            out[i] = value(LOAD_ONE);                                                              \
        finish;                                                                                    \
    }

#define LOAD_ONE(from) (*(from))
#define COPY(load) load(a + i)
#define SUM(load) (load(a + i) + load(b + i))
#define NEGATIVE(load) (-load(out + i))

RANGE(copy_plain, STORE, COPY, )
RANGE(add_plain, STORE, SUM, )
RANGE(inplace_plain, STORE, NEGATIVE, )
#ifdef STREAM
RANGE(copy_stream, STREAM, COPY, _mm_sfence())
RANGE(add_stream, STREAM, SUM, _mm_sfence())
#endif

static void copy_memcpy_range(float *out, const float *a, const float *b, size_t count)
{
    (void)b;
    memcpy(out, a, count * sizeof(float));
}

/* Every thread takes an equal range of whole cache lines of out, the first also what is before. */
static void execute(range_loop *loop, float *out, const float *a, const float *b, size_t count,
                    int threads, long repeats)
{
    size_t head = before_line(out, count), lines = (count - head + LINE - 1) / LINE;
    for (long r = 0; r < repeats; r++) {
        if (threads == 1) {
            loop(out, a, b, count);
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
                loop(out + begin, a + begin, b + begin, end - begin);
        }
    }
}

#define FLOOR(name)                                                                                \
    void name(float *out, const float *a, const float *b, size_t count, int threads, long repeats) \
    {                                                                                              \
        execute(name##_range, out, a, b, count, threads, repeats);                                 \
    }

FLOOR(copy_memcpy)
FLOOR(copy_plain)
FLOOR(add_plain)
FLOOR(inplace_plain)
#ifdef STREAM
FLOOR(copy_stream)
FLOOR(add_stream)
#endif
