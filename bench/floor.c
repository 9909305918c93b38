/* The least that memory asks for: a copy (read x, write y), a sum (read dy and x, write dx), and a
   change in place. Each by ordinary and by streaming stores where the machine has them; which is
   better depends on the size. Repeats happen here, so that no caller's overhead is in the figures.
 */

#include <omp.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vector;
#define LOAD _mm512_loadu_ps
#define STREAM _mm512_stream_ps
#define ADD _mm512_add_ps
#elif defined(__AVX__)
#include <immintrin.h>
typedef __m256 vector;
#define LOAD _mm256_loadu_ps
#define STREAM _mm256_stream_ps
#define ADD _mm256_add_ps
#elif defined(__SSE2__)
#include <immintrin.h>
typedef __m128 vector;
#define LOAD _mm_loadu_ps
#define STREAM _mm_stream_ps
#define ADD _mm_add_ps
#endif

enum { LINE = 16 /* floats in a cache line; arrays begin at one */ };

/* A loop over a range of floats. */
typedef void range_loop(float *out, const float *a, const float *b, size_t count);

static void copy_memcpy_range(float *out, const float *a, const float *b, size_t count)
{
    (void)b;
    memcpy(out, a, count * sizeof(float));
}

static void copy_plain_range(float *restrict out, const float *restrict a, const float *b,
                             size_t count)
{
    (void)b;
    for (size_t i = 0; i < count; i++)
        out[i] = a[i];
}

static void add_plain_range(float *restrict out, const float *restrict a, const float *restrict b,
                            size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = a[i] + b[i];
}

static void inplace_plain_range(float *out, const float *a, const float *b, size_t count)
{
    (void)a;
    (void)b;
    for (size_t i = 0; i < count; i++)
        out[i] = -out[i];
}

#ifdef STREAM
enum { WIDTH = sizeof(vector) / sizeof(float) };

static void copy_stream_range(float *out, const float *a, const float *b, size_t count)
{
    size_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH)
        STREAM(out + i, LOAD(a + i));
    copy_plain_range(out + i, a + i, b, count - i);
    _mm_sfence();
}

static void add_stream_range(float *out, const float *a, const float *b, size_t count)
{
    size_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH)
        STREAM(out + i, ADD(LOAD(a + i), LOAD(b + i)));
    add_plain_range(out + i, a + i, b + i, count - i);
    _mm_sfence();
}
#endif

/* Every thread takes an equal range of whole cache lines. */
static void execute(range_loop *loop, float *out, const float *a, const float *b, size_t count,
                    int threads, long repeats)
{
    for (long r = 0; r < repeats; r++) {
        if (threads == 1) {
            loop(out, a, b, count);
            continue;
        }
#pragma omp parallel num_threads(threads)
        {
            size_t team = (size_t)omp_get_num_threads(), me = (size_t)omp_get_thread_num();
            size_t lines = (count + LINE - 1) / LINE;
            size_t begin = lines * me / team * LINE, end = lines * (me + 1) / team * LINE;
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
