/* Results of each element, for one dtype; dtype.h includes this file. */

/* A mean is the sum of two numbers of type A: the second has what rounding takes from the first. */
ALWAYS_INLINE void NAME(high_and_low)(const double *mean, ptrdiff_t count, A *high, A *low)
{
    for (ptrdiff_t c = 0; c < count; c++) {
        high[c] = (A)mean[c];
        low[c] = (A)(mean[c] - (double)high[c]);
    }
}

ALWAYS_INLINE void NAME(narrow)(const double *from, ptrdiff_t count, A *to)
{
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = (A)from[c];
}

#define Y(x, high, low, scale, shift) ((((x) - (high)) - (low)) * (scale) + (shift))
#define DX(dy, x, dy_high, dy_low, x_high, x_low, slope, scale) \
    (((((dy) - (dy_high)) - (dy_low)) - (((x) - (x_high)) - (x_low)) * (slope)) * (scale))

ALWAYS_INLINE VA NAME(fetch)(const T *p, ptrdiff_t ahead)
{
    PREFETCH(p + ahead);
    return NAME(load)(p);
}

/* The elements before the next address that stores are aligned to. A store that crosses a cache line
 * costs two. */
ALWAYS_INLINE ptrdiff_t NAME(unaligned)(const T *to)
{
    return (ptrdiff_t)(-(uintptr_t)to % (VA_LANES * sizeof(T)) / sizeof(T));
}

/* Stores a run: AT(i) is the register of results at i, ONE(i) a single result.
 *
 * All stores are aligned but those of the first and the last register, which overlap others. They
 * are computed before the loop: in place, it overwrites some of the elements that they are computed
 * from. With one register at a time the loop would take half as long again wherever its branch
 * happens to cross 32 bytes of code. */
#define STORE_RUN(to, len, AT, ONE) \
    do { \
        const ptrdiff_t last = (len)-VA_LANES; \
        if (last < 0) { \
            for (ptrdiff_t i = 0; i < (len); i++) \
                (to)[i] = NAME(encode)(ONE(i)); \
            break; \
        } \
        const VA begin = AT(0), end = AT(last); \
        UNROLL_TWICE for (ptrdiff_t i = NAME(unaligned)(to); i < last; i += VA_LANES) \
            NAME(store)((to) + i, AT(i)); \
        NAME(store)(to, begin); \
        NAME(store)((to) + last, end); \
    } while (0)

/* Where a kernel writes: straight to the output or, for non-temporal stores, into a buffer that is
 * copied to the output in whole cache lines when it is full. */
enum { NAME(BUFFER) = BUFFER_BYTES / sizeof(T) };

typedef struct {
    T *to;
    int nontemporal;
    ptrdiff_t capacity, filled; /* elements of the buffer; PTRDIFF_MAX without one */
    T buffer[NAME(BUFFER)];
} NAME(writer);

ALWAYS_INLINE void NAME(start)(NAME(writer) *w, T *to, int nontemporal)
{
    w->to = to;
    w->nontemporal = nontemporal;
    w->capacity = nontemporal ? NAME(BUFFER) - (ptrdiff_t)((uintptr_t)to % CACHE_LINE / sizeof(T))
                      : PTRDIFF_MAX;
    w->filled = 0;
}

ALWAYS_INLINE T *NAME(position)(NAME(writer) *w)
{
    return (w->nontemporal ? w->buffer : w->to) + w->filled;
}

ALWAYS_INLINE void NAME(flush)(NAME(writer) *w)
{
    if (!w->nontemporal)
        return;
    copy_nontemporal((char *)w->to, (const char *)w->buffer, (size_t)w->filled * sizeof(T));
    w->to += w->filled;
    w->capacity = NAME(BUFFER);
    w->filled = 0;
}

ALWAYS_INLINE void NAME(advance)(NAME(writer) *w, ptrdiff_t count)
{
    w->filled += count;
    if (w->filled == w->capacity)
        NAME(flush)(w);
}

ALWAYS_INLINE ptrdiff_t NAME(fitting)(const NAME(writer) *w, ptrdiff_t left)
{
    return left < w->capacity - w->filled ? left : w->capacity - w->filled;
}

/* Writes a run, as many elements at a time as fit into the writer; they begin at `i0`. */
#define WRITE_RUN(w, len, AT, ONE) \
    for (ptrdiff_t i0 = 0, n; i0 < (len); i0 += n) { \
        T *to = NAME(position)(w); \
        n = NAME(fitting)(w, (len)-i0); \
        STORE_RUN(to, n, AT, ONE); \
        NAME(advance)(w, n); \
    }

/* A register of results at i of a run, and a single result, with 0 at invalid positions. */
#define MASKED_LANES(v, i) (masked ? MASKED_A(mask + (i), NULL, v) : (v))
#define MASKED_LANE(a, i) (masked && !mask[i] ? (A)0 : (a))

ALWAYS_INLINE void NAME(normalize_runs)(int masked, const void *x_, void *y_,
                                        const fastbn_runs *runs, const fastbn_affine *affine,
                                        int nontemporal)
{
    A high[COLUMNS], low[COLUMNS], scale[COLUMNS], shift[COLUMNS];
    NAME(high_and_low)(affine->centre, runs->channels, high, low);
    NAME(narrow)(affine->scale, runs->channels, scale);
    NAME(narrow)(affine->shift, runs->channels, shift);
    for (ptrdiff_t n = 0; n < runs->samples; n++) {
        const T *x = (const T *)x_ + n * runs->stride;
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead;
        NAME(writer) w;
        NAME(start)(&w, (T *)y_ + n * runs->stride, nontemporal);
        for (ptrdiff_t c = 0; c < runs->channels; c++, x += runs->len) {
#define AT(i) \
    MASKED_LANES(Y(NAME(fetch)(x + i0 + (i), prefetch_distance(ahead, i0 + (i))), high[c], low[c], \
                   scale[c], shift[c]), i0 + (i))
#define ONE(i) \
    MASKED_LANE(Y(NAME(decode)(x[i0 + (i)]), high[c], low[c], scale[c], shift[c]), i0 + (i))
            WRITE_RUN(&w, runs->len, AT, ONE)
#undef AT
#undef ONE
            ahead.border -= runs->len;
        }
        NAME(flush)(&w);
    }
}

static void NAME(normalize)(const void *x, void *y, const fastbn_runs *runs,
                            const fastbn_affine *affine, int nontemporal)
{
    if (runs->mask == NULL)
        NAME(normalize_runs)(0, x, y, runs, affine, nontemporal);
    else
        NAME(normalize_runs)(1, x, y, runs, affine, nontemporal);
}

ALWAYS_INLINE void NAME(gradient_runs)(int masked, const void *dy_, const void *x_, void *dx_,
                                       const fastbn_runs *runs, const fastbn_gradient *gradient,
                                       int nontemporal)
{
    A dy_high[COLUMNS], dy_low[COLUMNS], x_high[COLUMNS], x_low[COLUMNS];
    A slope[COLUMNS], scale[COLUMNS];
    NAME(high_and_low)(gradient->dy_mean, runs->channels, dy_high, dy_low);
    NAME(high_and_low)(gradient->x_mean, runs->channels, x_high, x_low);
    NAME(narrow)(gradient->slope, runs->channels, slope);
    NAME(narrow)(gradient->scale, runs->channels, scale);
    for (ptrdiff_t n = 0; n < runs->samples; n++) {
        const T *dy = (const T *)dy_ + n * runs->stride, *x = (const T *)x_ + n * runs->stride;
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead;
        NAME(writer) w;
        NAME(start)(&w, (T *)dx_ + n * runs->stride, nontemporal);
        for (ptrdiff_t c = 0; c < runs->channels; c++, dy += runs->len, x += runs->len) {
#define AT(i) \
    MASKED_LANES(DX(NAME(fetch)(dy + i0 + (i), prefetch_distance(ahead, i0 + (i))), \
                    NAME(fetch)(x + i0 + (i), prefetch_distance(ahead, i0 + (i))), dy_high[c], \
                    dy_low[c], x_high[c], x_low[c], slope[c], scale[c]), i0 + (i))
#define ONE(i) \
    MASKED_LANE(DX(NAME(decode)(dy[i0 + (i)]), NAME(decode)(x[i0 + (i)]), dy_high[c], dy_low[c], \
                   x_high[c], x_low[c], slope[c], scale[c]), i0 + (i))
            WRITE_RUN(&w, runs->len, AT, ONE)
#undef AT
#undef ONE
            ahead.border -= runs->len;
        }
        NAME(flush)(&w);
    }
}

static void NAME(gradient)(const void *dy, const void *x, void *dx, const fastbn_runs *runs,
                           const fastbn_gradient *gradient, int nontemporal)
{
    if (runs->mask == NULL)
        NAME(gradient_runs)(0, dy, x, dx, runs, gradient, nontemporal);
    else
        NAME(gradient_runs)(1, dy, x, dx, runs, gradient, nontemporal);
}

/* The column layout: a row is a run whose coefficients differ from column to column. */

/* Takes several rows as one, if nothing lies between them and there is no mask: the ends of rows
 * cost less then. The second matrix has the rows behind those. */
ALWAYS_INLINE void NAME(long_rows)(const fastbn_matrix *matrix, fastbn_matrix *rows)
{
    rows[0] = rows[1] = *matrix;
    rows[1].rows = 0;
    if (matrix->mask == NULL && matrix->len == matrix->stride && matrix->rows > 0) {
        const ptrdiff_t count = smaller(COLUMNS / matrix->len, matrix->rows);
        rows[0].len *= count, rows[0].stride *= count, rows[0].rows /= count;
        rows[1].rows = matrix->rows % count;
    }
}

/* Coefficients of the columns lie so many elements further on, for those of aligned stores to be
 * aligned. */
ALWAYS_INLINE ptrdiff_t NAME(padding)(const T *to)
{
    return (VA_LANES - NAME(unaligned)(to)) % VA_LANES;
}

/* Writes the rows of a matrix. The mask of a row is spread over its columns. */
#define WRITE_ROWS(matrix, masked, out, nontemporal, AT, ONE) \
    do { \
        const ptrdiff_t len = (matrix)->len, stride = (matrix)->stride; \
        const ptrdiff_t ahead = stride * (PREFETCHED / len + 1); \
        mask_step masks[COLUMNS / LANES + 1]; \
        uint8_t mask[COLUMNS + LANES]; \
        NAME(writer) w; \
        if (masked) \
            find_masks(matrix, len / LANES * LANES, masks); \
        for (ptrdiff_t r = 0; r < (matrix)->rows; r++) { \
            const ptrdiff_t row = r * stride; \
            if (r == 0 || len != stride) \
                NAME(start)(&w, (T *)(out) + row, nontemporal); \
            if (masked) \
                spread_mask((matrix)->mask + r * (matrix)->mask_stride, masks, len, mask); \
            WRITE_RUN(&w, len, AT, ONE) \
            if (r + 1 == (matrix)->rows || len != stride) \
                NAME(flush)(&w); \
        } \
    } while (0)

/* The coefficients of columns, and zeros for the lanes of a register that are no columns. */
ALWAYS_INLINE void NAME(spread)(const fastbn_matrix *matrix, const double *of_channel, A *to)
{
    A narrow[COLUMNS];
    NAME(narrow)(of_channel, matrix->channels, narrow);
    memset(to, 0, sizeof(VA));
    SPREAD_A(matrix, narrow, to);
}

ALWAYS_INLINE void NAME(spread_high_and_low)(const fastbn_matrix *matrix, const double *mean,
                                             A *high, A *low)
{
    A high_of_channel[COLUMNS], low_of_channel[COLUMNS];
    NAME(high_and_low)(mean, matrix->channels, high_of_channel, low_of_channel);
    memset(high, 0, sizeof(VA));
    memset(low, 0, sizeof(VA));
    SPREAD_A(matrix, high_of_channel, high);
    SPREAD_A(matrix, low_of_channel, low);
}

ALWAYS_INLINE void NAME(normalize_rows)(int masked, const T *x, T *y, const fastbn_matrix *matrix,
                                        const fastbn_affine *affine, int nontemporal)
{
    CACHE_ALIGNED A k[4][COLUMNS + 2 * CACHE_LINE / sizeof(A)];
    const ptrdiff_t padding = NAME(padding)(y);
    A *high = k[0] + padding, *low = k[1] + padding;
    A *scale = k[2] + padding, *shift = k[3] + padding;
    if (matrix->rows == 0)
        return;
    NAME(spread_high_and_low)(matrix, affine->centre, high, low);
    NAME(spread)(matrix, affine->scale, scale);
    NAME(spread)(matrix, affine->shift, shift);
#define AT(i) \
    MASKED_LANES(Y(NAME(fetch)(x + row + i0 + (i), ahead), LOAD_A(high + i0 + (i)), \
                   LOAD_A(low + i0 + (i)), LOAD_A(scale + i0 + (i)), \
                   LOAD_A(shift + i0 + (i))), i0 + (i))
#define ONE(i) \
    MASKED_LANE(Y(NAME(decode)(x[row + i0 + (i)]), high[i0 + (i)], low[i0 + (i)], \
                  scale[i0 + (i)], shift[i0 + (i)]), i0 + (i))
    WRITE_ROWS(matrix, masked, y, nontemporal, AT, ONE);
#undef AT
#undef ONE
}

static void NAME(column_normalize)(const void *x, void *y, const fastbn_matrix *matrix,
                                   const fastbn_affine *affine, int nontemporal)
{
    fastbn_matrix rows[2];
    NAME(long_rows)(matrix, rows);
    if (matrix->mask != NULL)
        NAME(normalize_rows)(1, x, y, matrix, affine, nontemporal);
    else
        for (ptrdiff_t k = 0, at = 0; k < 2; at += rows[k].rows * rows[k].stride, k++)
            NAME(normalize_rows)(0, (const T *)x + at, (T *)y + at, &rows[k], affine, nontemporal);
}

ALWAYS_INLINE void NAME(gradient_rows)(int masked, const T *dy, const T *x, T *dx,
                                       const fastbn_matrix *matrix,
                                       const fastbn_gradient *gradient, int nontemporal)
{
    CACHE_ALIGNED A k[6][COLUMNS + 2 * CACHE_LINE / sizeof(A)];
    const ptrdiff_t padding = NAME(padding)(dx);
    A *dy_high = k[0] + padding, *dy_low = k[1] + padding;
    A *x_high = k[2] + padding, *x_low = k[3] + padding;
    A *slope = k[4] + padding, *scale = k[5] + padding;
    if (matrix->rows == 0)
        return;
    NAME(spread_high_and_low)(matrix, gradient->dy_mean, dy_high, dy_low);
    NAME(spread_high_and_low)(matrix, gradient->x_mean, x_high, x_low);
    NAME(spread)(matrix, gradient->slope, slope);
    NAME(spread)(matrix, gradient->scale, scale);
#define AT(i) \
    MASKED_LANES(DX(NAME(fetch)(dy + row + i0 + (i), ahead), NAME(fetch)(x + row + i0 + (i), ahead), \
                    LOAD_A(dy_high + i0 + (i)), LOAD_A(dy_low + i0 + (i)), \
                    LOAD_A(x_high + i0 + (i)), LOAD_A(x_low + i0 + (i)), \
                    LOAD_A(slope + i0 + (i)), LOAD_A(scale + i0 + (i))), i0 + (i))
#define ONE(i) \
    MASKED_LANE(DX(NAME(decode)(dy[row + i0 + (i)]), NAME(decode)(x[row + i0 + (i)]), \
                   dy_high[i0 + (i)], dy_low[i0 + (i)], x_high[i0 + (i)], x_low[i0 + (i)], \
                   slope[i0 + (i)], scale[i0 + (i)]), i0 + (i))
    WRITE_ROWS(matrix, masked, dx, nontemporal, AT, ONE);
#undef AT
#undef ONE
}

static void NAME(column_gradient)(const void *dy, const void *x, void *dx,
                                  const fastbn_matrix *matrix, const fastbn_gradient *gradient,
                                  int nontemporal)
{
    fastbn_matrix rows[2];
    NAME(long_rows)(matrix, rows);
    if (matrix->mask != NULL)
        NAME(gradient_rows)(1, dy, x, dx, matrix, gradient, nontemporal);
    else
        for (ptrdiff_t k = 0, at = 0; k < 2; at += rows[k].rows * rows[k].stride, k++)
            NAME(gradient_rows)(0, (const T *)dy + at, (const T *)x + at, (T *)dx + at, &rows[k],
                                gradient, nontemporal);
}

#undef MASKED_LANES
#undef MASKED_LANE
#undef WRITE_ROWS
#undef WRITE_RUN
#undef STORE_RUN
#undef DX
#undef Y
