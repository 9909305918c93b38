/* The kernels of _kernels.h for one dtype. Included by _kernels.c, which defines
 *   DTYPE   the name of the dtype
 *   T       the type of an element
 *   A, VA   the type in which element-wise arithmetic is done, and a register of it
 *   LOAD_A  what loads such a register
 */
#define NAME(f) PASTE(f##_, DTYPE)
#define VA_LANES ((ptrdiff_t)(sizeof(VA) / sizeof(A)))

static double NAME(element)(const void *x, ptrdiff_t i)
{
    return (double)NAME(get)(((const T *)x)[i]);
}

/* ------------------------------------------------------------------ sums
 *
 * Elements come in steps of LANES. A run, or the columns, end with a step that overlaps the one
 * before it: `skip` tells how many of its lanes have been counted. */

/* The last LANES elements of a run. Of a shorter run, all it has, behind something finite. */
ALWAYS_INLINE const T *NAME(end)(const T *x, ptrdiff_t len, T *buffer)
{
    if (len >= LANES)
        return x + len - LANES;
    memset(buffer, 0, LANES * sizeof(T));
    memcpy(buffer + LANES - len, x, (size_t)len * sizeof(T));
    return buffer;
}

ALWAYS_INLINE registers NAME(add_moments)(registers sums, const T *x, step pivot, long long skip)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        vd d = NAME(widen)(x + j * VD) - pivot.at[j];
        if (skip)
            d = drop_below(skip, j, d);
        sums.first[j] += d;
        sums.second[j] += d * d;
    }
    return sums;
}

ALWAYS_INLINE registers NAME(add_products)(registers sums, const T *dy, const T *x, step mean,
                                           long long skip)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        vd g = NAME(widen)(dy + j * VD), d = NAME(widen)(x + j * VD) - mean.at[j];
        if (skip) {
            g = drop_below(skip, j, g);
            d = drop_below(skip, j, d);
        }
        sums.first[j] += g;
        sums.second[j] += g * d;
    }
    return sums;
}

static void NAME(moments)(const void *x_, ptrdiff_t rows, ptrdiff_t len, fastbn_ahead ahead,
                          const double *pivot, fastbn_sums *sums)
{
    const T *x = x_;
    T buffer[LANES];
    for (ptrdiff_t r = 0; r < rows; r++, x += len) {
        const step h = same_step(pivot[r]);
        registers s = load_sums(sums[r].first, sums[r].second);
        ptrdiff_t i = 0;
        for (; i + LANES <= len; i += LANES) {
            PREFETCH(x + i + distance(ahead, i));
            s = NAME(add_moments)(s, x + i, h, 0);
        }
        if (i < len)
            s = NAME(add_moments)(s, NAME(end)(x, len, buffer), h, LANES - (len - i));
        store_sums(sums[r].first, sums[r].second, s);
        ahead.border -= len;
    }
}

static void NAME(products)(const void *dy_, const void *x_, ptrdiff_t rows, ptrdiff_t len,
                           fastbn_ahead ahead, const double *mean, fastbn_sums *sums)
{
    const T *dy = dy_, *x = x_;
    T dy_buffer[LANES], x_buffer[LANES];
    for (ptrdiff_t r = 0; r < rows; r++, dy += len, x += len) {
        const step m = same_step(mean[r]);
        registers s = load_sums(sums[r].first, sums[r].second);
        ptrdiff_t i = 0;
        for (; i + LANES <= len; i += LANES) {
            PREFETCH(dy + i + distance(ahead, i));
            PREFETCH(x + i + distance(ahead, i));
            s = NAME(add_products)(s, dy + i, x + i, m, 0);
        }
        if (i < len)
            s = NAME(add_products)(s, NAME(end)(dy, len, dy_buffer), NAME(end)(x, len, x_buffer),
                                   m, LANES - (len - i));
        store_sums(sums[r].first, sums[r].second, s);
        ahead.border -= len;
    }
}

/* Columns: a few rows at a time, so that sums are loaded and stored once for all of them, and
 * memory is read in a few streams. */

ALWAYS_INLINE void NAME(column_moments_step)(const T *x, ptrdiff_t rows, ptrdiff_t stride,
                                             const double *pivot, double *first, double *second,
                                             long long skip)
{
    const step h = load_step(pivot);
    registers s = load_sums(first, second);
    for (ptrdiff_t r = 0; r < rows; r++) {
        PREFETCH(x + (r + ROWS_AT_A_TIME) * stride);
        s = NAME(add_moments)(s, x + r * stride, h, skip);
    }
    store_sums(first, second, s);
}

static void NAME(column_moments)(const void *x_, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t len,
                                 const double *pivot, double *first, double *second)
{
    const T *x = x_;
    const ptrdiff_t end = len - LANES;
    if (end < 0) {
        T buffer[LANES];
        for (; rows > 0; rows--, x += stride)
            NAME(column_moments_step)(NAME(end)(x, len, buffer), 1, 0, pivot + end, first + end,
                                      second + end, -end);
        return;
    }
    for (; rows > 0; rows -= ROWS_AT_A_TIME, x += ROWS_AT_A_TIME * stride) {
        const ptrdiff_t n = rows < ROWS_AT_A_TIME ? rows : ROWS_AT_A_TIME;
        ptrdiff_t i = 0;
        for (; i <= end; i += LANES)
            NAME(column_moments_step)(x + i, n, stride, pivot + i, first + i, second + i, 0);
        if (i < len)
            NAME(column_moments_step)(x + end, n, stride, pivot + end, first + end, second + end,
                                      i - end);
    }
}

ALWAYS_INLINE void NAME(column_products_step)(const T *dy, const T *x, ptrdiff_t rows,
                                              ptrdiff_t stride, const double *mean, double *first,
                                              double *second, long long skip)
{
    const step m = load_step(mean);
    registers s = load_sums(first, second);
    for (ptrdiff_t r = 0; r < rows; r++) {
        PREFETCH(dy + (r + ROWS_AT_A_TIME) * stride);
        PREFETCH(x + (r + ROWS_AT_A_TIME) * stride);
        s = NAME(add_products)(s, dy + r * stride, x + r * stride, m, skip);
    }
    store_sums(first, second, s);
}

static void NAME(column_products)(const void *dy_, const void *x_, ptrdiff_t rows,
                                  ptrdiff_t stride, ptrdiff_t len, const double *mean,
                                  double *first, double *second)
{
    const T *dy = dy_, *x = x_;
    const ptrdiff_t end = len - LANES, down = ROWS_AT_A_TIME * stride;
    if (end < 0) {
        T dy_buffer[LANES], x_buffer[LANES];
        for (; rows > 0; rows--, dy += stride, x += stride)
            NAME(column_products_step)(NAME(end)(dy, len, dy_buffer), NAME(end)(x, len, x_buffer),
                                       1, 0, mean + end, first + end, second + end, -end);
        return;
    }
    for (; rows > 0; rows -= ROWS_AT_A_TIME, dy += down, x += down) {
        const ptrdiff_t n = rows < ROWS_AT_A_TIME ? rows : ROWS_AT_A_TIME;
        ptrdiff_t i = 0;
        for (; i <= end; i += LANES)
            NAME(column_products_step)(dy + i, x + i, n, stride, mean + i, first + i, second + i,
                                       0);
        if (i < len)
            NAME(column_products_step)(dy + end, x + end, n, stride, mean + end, first + end,
                                       second + end, i - end);
    }
}

/* ------------------------------------------------------------------ element by element */

/* A mean is carried as the sum of two A: the second keeps what the first rounds away. */
#define HIGH(mean) ((A)(mean))
#define LOW(mean) ((A)((mean) - (double)(A)(mean)))

#define Y(x, high, low, scale, shift) ((((x) - (high)) - (low)) * (scale) + (shift))
#define DX(dy, x, dy_high, dy_low, x_high, x_low, slope, scale) \
    (((((dy) - (dy_high)) - (dy_low)) - (((x) - (x_high)) - (x_low)) * (slope)) * (scale))

ALWAYS_INLINE VA NAME(fetch)(const T *p, ptrdiff_t ahead)
{
    PREFETCH(p + ahead);
    return NAME(load)(p);
}

/* Writes a run: AT(i) is the register of results at i, ONE(i) a single result.
 *
 * The last register overlaps the one before it, and is computed first, since in place the loop
 * overwrites a part of what it is computed from. */
#define RUN(to, len, AT, ONE) \
    do { \
        const ptrdiff_t last = (len)-VA_LANES; \
        if (last < 0) { \
            for (ptrdiff_t i = 0; i < (len); i++) \
                (to)[i] = NAME(put)(ONE(i)); \
            break; \
        } \
        const VA end = AT(last); \
        for (ptrdiff_t i = 0; i < last; i += VA_LANES) \
            NAME(store)((to) + i, AT(i)); \
        NAME(store)((to) + last, end); \
    } while (0)

/* Where a kernel writes: at once to where the results shall be or, to stream them, into a buffer
 * that goes there in whole cache lines when it is full. */
enum { NAME(BUFFER) = BUFFER_BYTES / sizeof(T) };

typedef struct {
    T *to;
    int streams;
    ptrdiff_t room, filled; /* of the buffer; without one, there is room for everything */
    T buffer[NAME(BUFFER)];
} NAME(writer);

ALWAYS_INLINE void NAME(start)(NAME(writer) *w, T *to, int streams)
{
    w->to = to;
    w->streams = streams;
    w->room = streams ? NAME(BUFFER) - (ptrdiff_t)((uintptr_t)to % CACHE_LINE / sizeof(T))
                      : PTRDIFF_MAX;
    w->filled = 0;
}

ALWAYS_INLINE T *NAME(position)(NAME(writer) *w)
{
    return (w->streams ? w->buffer : w->to) + w->filled;
}

ALWAYS_INLINE void NAME(flush)(NAME(writer) *w)
{
    if (!w->streams)
        return;
    stream((char *)w->to, (const char *)w->buffer, (size_t)w->filled * sizeof(T));
    w->to += w->filled;
    w->room = NAME(BUFFER);
    w->filled = 0;
}

ALWAYS_INLINE void NAME(advance)(NAME(writer) *w, ptrdiff_t count)
{
    w->filled += count;
    if (w->filled == w->room)
        NAME(flush)(w);
}

ALWAYS_INLINE ptrdiff_t NAME(piece)(const NAME(writer) *w, ptrdiff_t left)
{
    return left < w->room - w->filled ? left : w->room - w->filled;
}

/* Writes the runs of a kernel piece by piece; `i0` is where a piece begins. */
#define WRITE(w, len, AT, ONE) \
    for (ptrdiff_t i0 = 0, n; i0 < (len); i0 += n) { \
        T *to = NAME(position)(w); \
        n = NAME(piece)(w, (len)-i0); \
        RUN(to, n, AT, ONE); \
        NAME(advance)(w, n); \
    }

static void NAME(normalize)(const void *x_, void *y, ptrdiff_t rows, ptrdiff_t len,
                            fastbn_ahead ahead, const fastbn_affine *affine, int streams)
{
    const T *x = x_;
    NAME(writer) w;
    NAME(start)(&w, y, streams);
    for (ptrdiff_t r = 0; r < rows; r++, x += len) {
        const A high = HIGH(affine[r].centre), low = LOW(affine[r].centre);
        const A scale = (A)affine[r].scale, shift = (A)affine[r].shift;
#define AT(i) Y(NAME(fetch)(x + i0 + (i), distance(ahead, i0 + (i))), high, low, scale, shift)
#define ONE(i) Y(NAME(get)(x[i0 + (i)]), high, low, scale, shift)
        WRITE(&w, len, AT, ONE)
#undef AT
#undef ONE
        ahead.border -= len;
    }
    NAME(flush)(&w);
}

static void NAME(gradient)(const void *dy_, const void *x_, void *dx, ptrdiff_t rows,
                           ptrdiff_t len, fastbn_ahead ahead, const fastbn_gradient *gradient,
                           int streams)
{
    const T *dy = dy_, *x = x_;
    NAME(writer) w;
    NAME(start)(&w, dx, streams);
    for (ptrdiff_t r = 0; r < rows; r++, dy += len, x += len) {
        const A dy_high = HIGH(gradient[r].dy_mean), dy_low = LOW(gradient[r].dy_mean);
        const A x_high = HIGH(gradient[r].x_mean), x_low = LOW(gradient[r].x_mean);
        const A slope = (A)gradient[r].slope, scale = (A)gradient[r].scale;
#define AT(i) \
    DX(NAME(fetch)(dy + i0 + (i), distance(ahead, i0 + (i))), \
       NAME(fetch)(x + i0 + (i), distance(ahead, i0 + (i))), dy_high, dy_low, x_high, x_low, slope, \
       scale)
#define ONE(i) \
    DX(NAME(get)(dy[i0 + (i)]), NAME(get)(x[i0 + (i)]), dy_high, dy_low, x_high, x_low, slope, \
       scale)
        WRITE(&w, len, AT, ONE)
#undef AT
#undef ONE
        ahead.border -= len;
    }
    NAME(flush)(&w);
}

static void NAME(column_normalize)(const void *x_, void *y_, ptrdiff_t rows, ptrdiff_t stride,
                                   ptrdiff_t len, const fastbn_affine *affine, int streams)
{
    const T *x = x_;
    T *y = y_;
    NAME(writer) w;
    const ptrdiff_t ahead = ROWS_AT_A_TIME * stride;
    A high[COLUMNS], low[COLUMNS], scale[COLUMNS], shift[COLUMNS];
    for (ptrdiff_t i = 0; i < len; i++) {
        high[i] = HIGH(affine[i].centre), low[i] = LOW(affine[i].centre);
        scale[i] = (A)affine[i].scale, shift[i] = (A)affine[i].shift;
    }
    NAME(start)(&w, y, streams);
    for (ptrdiff_t r = 0; r < rows; r++, x += stride, y += stride) {
        if (len < stride) {
            NAME(flush)(&w);
            NAME(start)(&w, y, streams);
        }
#define AT(i) \
    Y(NAME(fetch)(x + i0 + (i), ahead), LOAD_A(high + i0 + (i)), LOAD_A(low + i0 + (i)), \
      LOAD_A(scale + i0 + (i)), LOAD_A(shift + i0 + (i)))
#define ONE(i) \
    Y(NAME(get)(x[i0 + (i)]), high[i0 + (i)], low[i0 + (i)], scale[i0 + (i)], shift[i0 + (i)])
        WRITE(&w, len, AT, ONE)
#undef AT
#undef ONE
    }
    NAME(flush)(&w);
}

static void NAME(column_gradient)(const void *dy_, const void *x_, void *dx_, ptrdiff_t rows,
                                  ptrdiff_t stride, ptrdiff_t len,
                                  const fastbn_gradient *gradient, int streams)
{
    const T *dy = dy_, *x = x_;
    T *dx = dx_;
    NAME(writer) w;
    A dy_high[COLUMNS], dy_low[COLUMNS], x_high[COLUMNS], x_low[COLUMNS];
    A slope[COLUMNS], scale[COLUMNS];
    for (ptrdiff_t i = 0; i < len; i++) {
        dy_high[i] = HIGH(gradient[i].dy_mean), dy_low[i] = LOW(gradient[i].dy_mean);
        x_high[i] = HIGH(gradient[i].x_mean), x_low[i] = LOW(gradient[i].x_mean);
        slope[i] = (A)gradient[i].slope, scale[i] = (A)gradient[i].scale;
    }
    NAME(start)(&w, dx, streams);
    for (ptrdiff_t r = 0; r < rows; r++, dy += stride, x += stride, dx += stride) {
        if (len < stride) {
            NAME(flush)(&w);
            NAME(start)(&w, dx, streams);
        }
#define AT(i) \
    DX(NAME(load)(dy + i0 + (i)), NAME(load)(x + i0 + (i)), LOAD_A(dy_high + i0 + (i)), \
       LOAD_A(dy_low + i0 + (i)), LOAD_A(x_high + i0 + (i)), LOAD_A(x_low + i0 + (i)), \
       LOAD_A(slope + i0 + (i)), LOAD_A(scale + i0 + (i)))
#define ONE(i) \
    DX(NAME(get)(dy[i0 + (i)]), NAME(get)(x[i0 + (i)]), dy_high[i0 + (i)], dy_low[i0 + (i)], \
       x_high[i0 + (i)], x_low[i0 + (i)], slope[i0 + (i)], scale[i0 + (i)])
        WRITE(&w, len, AT, ONE)
#undef AT
#undef ONE
    }
    NAME(flush)(&w);
}

#undef WRITE
#undef RUN
#undef DX
#undef Y
#undef LOW
#undef HIGH
#undef VA_LANES
#undef NAME
#undef LOAD_A
#undef VA
#undef A
#undef T
#undef DTYPE
