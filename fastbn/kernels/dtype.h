/* The kernels of kernels.h for one dtype. kernels.c includes this file once for each, and defines
 *   DTYPE     the name of the dtype
 *   T         the type of an element
 *   A, VA     the type of element-wise arithmetic, and a register of it
 *   LOAD_A    the function that loads such a register
 *   MASKED_A  the function that zeros the lanes of such a register that a mask has not
 *   SPREAD_A  the function that copies such values from channels to their columns
 */
#define NAME(f) PASTE(f##_, DTYPE)
#define VA_LANES ((ptrdiff_t)(sizeof(VA) / sizeof(A)))

ALWAYS_INLINE void NAME(load_strided)(const char *x, ptrdiff_t stride, ptrdiff_t count, double *to)
{
    for (ptrdiff_t i = 0; i < count; i++, x += stride) {
        T value;
        memcpy(&value, x, sizeof value);
        to[i] = (double)NAME(decode)(value);
    }
}

static void NAME(load_as_double)(const void *x, ptrdiff_t stride, ptrdiff_t count, double *to)
{
    if (stride == sizeof(T))
        NAME(load_strided)(x, sizeof(T), count, to);
    else
        NAME(load_strided)(x, stride, count, to);
}

static void NAME(store_from_double)(const double *from, ptrdiff_t stride, ptrdiff_t count, void *to)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const T value = NAME(encode)((A)from[i]);
        memcpy((char *)to + i * stride, &value, sizeof value);
    }
}

/* ------------------------------------------------------------------ sums
 *
 * Elements come in steps of LANES. A run, or the columns, end with a step that overlaps the one
 * before it: `skip` tells how many of its lanes have been added already. */

/* Adds a step to its sums, and prefetches what lies `ahead` elements further on. */
typedef step_sums NAME(add_step)(step_sums sums, const T *dy, const T *x, ptrdiff_t ahead,
                                 step centre, valid_lanes lanes);

ALWAYS_INLINE step_sums NAME(add_moments)(step_sums sums, const T *dy, const T *x, ptrdiff_t ahead,
                                          step pivot, valid_lanes lanes)
{
    (void)dy;
    PREFETCH(x + ahead);
    UNROLL for (int j = 0; j < STEPS; j++) {
        const vd d = only_valid(lanes, j, NAME(widen)(x + j * VD) - pivot.at[j]);
        sums.first[j] += d;
        sums.second[j] += d * d;
    }
    return sums;
}

ALWAYS_INLINE step_sums NAME(add_products)(step_sums sums, const T *dy, const T *x,
                                           ptrdiff_t ahead, step mean, valid_lanes lanes)
{
    PREFETCH(dy + ahead);
    PREFETCH(x + ahead);
    UNROLL for (int j = 0; j < STEPS; j++) {
        const vd g = only_valid(lanes, j, NAME(widen)(dy + j * VD));
        const vd d = only_valid(lanes, j, NAME(widen)(x + j * VD) - mean.at[j]);
        sums.first[j] += g;
        sums.second[j] += g * d;
    }
    return sums;
}

/* Doubles are summed in chunks of FASTBN_ADDITIONS for each lane; the sums of chunks are then added
 * up. */
enum { NAME(CHUNKED) = sizeof(T) == sizeof(double) };
#define CHUNK (NAME(CHUNKED) ? (ptrdiff_t)(FASTBN_ADDITIONS * LANES) : PTRDIFF_MAX)

/* The samples of a chunk, whose runs take `len` elements each, rounded up to whole steps. */
ALWAYS_INLINE ptrdiff_t NAME(samples_of_chunk)(ptrdiff_t len)
{
    return len < CHUNK ? CHUNK / ((len + LANES - 1) / LANES * LANES) : 1;
}

/* The row layout: sums stay in registers for a run, and in memory from a sample to the next. */
ALWAYS_INLINE void NAME(sum_runs)(NAME(add_step) *add, int masked, const T *dy, const T *x,
                                  const fastbn_runs *runs, const double *centre, double *first,
                                  double *second)
{
    double sums[FASTBN_GROUP][2][LANES], totals[FASTBN_GROUP][2][LANES];
    T dy_buffer[LANES], x_buffer[LANES];
    uint8_t mask_buffer[LANES + MASK_BYTES];
    const ptrdiff_t len = runs->len, down = runs->stride - runs->channels * len;
    const ptrdiff_t samples = NAME(CHUNKED) ? NAME(samples_of_chunk)(len) : runs->samples;
    for (ptrdiff_t n = 0, of_chunk = 0; n < runs->samples; n++, dy += down, x += down) {
        const int begins = of_chunk++ == 0, last = n + 1 == runs->samples;
        const int ends = last || of_chunk == samples;
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead;
        of_chunk = ends ? 0 : of_chunk;
        for (ptrdiff_t c = 0; c < runs->channels; c++, dy += len, x += len) {
            const step around = same_step(centre[c]);
            step_sums s = begins ? no_sums() : load_sums(sums[c][0], sums[c][1]);
            step_sums total = n < samples ? no_sums() : load_sums(totals[c][0], totals[c][1]);
            ptrdiff_t i = 0;
            while (len - i > CHUNK) {
                for (const ptrdiff_t end = i + CHUNK; i < end; i += LANES)
                    s = add(s, dy + i, x + i, prefetch_distance(ahead, i), around,
                            (valid_lanes){masked, masked ? mask + i : NULL, NULL, 0});
                total = add_sums(total, s);
                s = no_sums();
            }
            for (; i + LANES <= len; i += LANES)
                s = add(s, dy + i, x + i, prefetch_distance(ahead, i), around,
                        (valid_lanes){masked, masked ? mask + i : NULL, NULL, 0});
            if (i < len)
                s = add(s, last_step(dy, len, sizeof(T), dy_buffer),
                        last_step(x, len, sizeof(T), x_buffer), 0, around,
                        (valid_lanes){masked, masked ? last_step(mask, len, 1, mask_buffer) : NULL,
                                  NULL, LANES - (len - i)});
            ahead.border -= len;
            if (NAME(CHUNKED) && ends)
                s = add_sums(total, s);
            if (last) {
                first[c] = sum_of_step(s.first);
                second[c] = sum_of_step(s.second);
            } else if (NAME(CHUNKED) && ends) {
                store_sums(totals[c][0], totals[c][1], s);
            } else {
                store_sums(sums[c][0], sums[c][1], s);
            }
        }
    }
}

static void NAME(moments)(const void *x, const fastbn_runs *runs, const double *pivot,
                          double *first, double *second)
{
    if (runs->mask == NULL)
        NAME(sum_runs)(NAME(add_moments), 0, x, x, runs, pivot, first, second);
    else
        NAME(sum_runs)(NAME(add_moments), 1, x, x, runs, pivot, first, second);
}

static void NAME(products)(const void *dy, const void *x, const fastbn_runs *runs,
                           const double *mean, double *first, double *second)
{
    if (runs->mask == NULL)
        NAME(sum_runs)(NAME(add_products), 0, dy, x, runs, mean, first, second);
    else
        NAME(sum_runs)(NAME(add_products), 1, dy, x, runs, mean, first, second);
}

/* The column layout: a few rows are summed at a time, so that sums are loaded and stored once for
 * all of them, and memory is read at a few places at once. */
ALWAYS_INLINE void NAME(add_rows)(NAME(add_step) *add, const T *dy, const T *x, const row_set *rows,
                                  const double *centre, double *first, double *second,
                                  valid_lanes lanes)
{
    const step around = load_step(centre);
    const ptrdiff_t count = rows->count, stride = rows->stride, ahead = ROWS_SUMMED * stride;
    step_sums s = load_sums(first, second);
    for (ptrdiff_t r = 0; r < count; r++, lanes.mask += lanes.masked ? rows->mask_stride : 0) {
        const ptrdiff_t at = rows->listed ? rows->at[r] : r * stride;
        s = add(s, dy + at, x + at, ahead, around, lanes);
    }
    store_sums(first, second, s);
}

ALWAYS_INLINE void NAME(sum_columns)(NAME(add_step) *add, int mode, const T *dy, const T *x,
                                     const fastbn_matrix *matrix, const double *centre_of_channel,
                                     double *first_of_channel, double *second_of_channel)
{
    /* A last step that overlaps the one before reaches, of few columns, back before the first. */
    double centre_[LANES + COLUMNS], first_[LANES + COLUMNS], second_[LANES + COLUMNS];
    double *centre = centre_ + LANES, *first = first_ + LANES, *second = second_ + LANES;
    mask_step masks[COLUMNS / LANES + 1];
    const ptrdiff_t len = matrix->len, stride = matrix->stride, end = len - LANES;
    const uint8_t *mask = matrix->mask;
    row_set rows = {
        .stride = stride, .mask_stride = matrix->mask_stride, .listed = mode == LISTED};
#define VALID_LANES(i, skip) \
    (mode == MASKED ? (valid_lanes){1, mask + masks[i].offset, masks[i].index, skip} \
                    : (valid_lanes){0, NULL, NULL, skip})
    memset(centre_, 0, sizeof(double) * LANES);
    memset(first_, 0, sizeof(double) * (size_t)(LANES + len));
    memset(second_, 0, sizeof(double) * (size_t)(LANES + len));
    spread_double(matrix, centre_of_channel, centre);
    if (mode == MASKED)
        find_masks(matrix, LANES, end, masks);
    for (ptrdiff_t r = 0, n; r < matrix->rows; r += n, dy += n * stride, x += n * stride) {
        ptrdiff_t i = 0;
        rows.count = n = end < 0 ? 1 : smaller(matrix->rows - r, ROWS_SUMMED);
        if (rows.listed)
            n = list_valid_rows(&rows, mask, matrix->rows - r);
        for (; i <= end; i += LANES)
            NAME(add_rows)(add, dy + i, x + i, &rows, centre + i, first + i, second + i,
                           VALID_LANES(i / LANES, 0));
        if (i < len && rows.count > 0) {
            const T *dy_end = dy + end, *x_end = x + end;
            T dy_buffer[LANES], x_buffer[LANES];
            if (end < 0) { /* of a single row */
                dy_end = last_step(rows.listed ? dy + rows.at[0] : dy, len, sizeof(T), dy_buffer);
                x_end = last_step(rows.listed ? x + rows.at[0] : x, len, sizeof(T), x_buffer);
                rows.at[0] = 0;
            }
            NAME(add_rows)(add, dy_end, x_end, &rows, centre + end, first + end, second + end,
                           VALID_LANES(len / LANES, i - end));
        }
        if (mode != UNMASKED)
            mask += n * matrix->mask_stride;
    }
#undef VALID_LANES
    add_columns_to_channels(matrix, first, first_of_channel);
    add_columns_to_channels(matrix, second, second_of_channel);
}

static void NAME(column_moments)(const void *x, const fastbn_matrix *matrix, const double *pivot,
                                 double *first, double *second)
{
    if (matrix->mask == NULL)
        NAME(sum_columns)(NAME(add_moments), UNMASKED, x, x, matrix, pivot, first, second);
    else if (matrix->mask_stride == 1)
        NAME(sum_columns)(NAME(add_moments), LISTED, x, x, matrix, pivot, first, second);
    else
        NAME(sum_columns)(NAME(add_moments), MASKED, x, x, matrix, pivot, first, second);
}

static void NAME(column_products)(const void *dy, const void *x, const fastbn_matrix *matrix,
                                  const double *mean, double *first, double *second)
{
    if (matrix->mask == NULL)
        NAME(sum_columns)(NAME(add_products), UNMASKED, dy, x, matrix, mean, first, second);
    else if (matrix->mask_stride == 1)
        NAME(sum_columns)(NAME(add_products), LISTED, dy, x, matrix, mean, first, second);
    else
        NAME(sum_columns)(NAME(add_products), MASKED, dy, x, matrix, mean, first, second);
}

/* ------------------------------------------------------------------ element by element */

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

/* Stores a run: AT(i) is the register of results at i, ONE(i) a single result.
 *
 * The last register overlaps the one before it, and is computed first: in place, the loop
 * overwrites some of the elements that it is computed from. With one register at a time the loop
 * would take half as long again wherever its branch happens to cross 32 bytes of code. */
#define STORE_RUN(to, len, AT, ONE) \
    do { \
        const ptrdiff_t last = (len)-VA_LANES; \
        if (last < 0) { \
            for (ptrdiff_t i = 0; i < (len); i++) \
                (to)[i] = NAME(encode)(ONE(i)); \
            break; \
        } \
        const VA end = AT(last); \
        UNROLL_TWICE for (ptrdiff_t i = 0; i < last; i += VA_LANES) \
            NAME(store)((to) + i, AT(i)); \
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

/* The column layout: a register of coefficients serves a few rows. Coefficient j of column i is
 * k[j][i]. */

/* Writes some rows of a strip that is one register wide. There is a mask unless its index is NULL.
 */
typedef void NAME(strip)(const uint8_t *mask, ptrdiff_t mask_stride, const uint8_t *index,
                         const T *dy, const T *x, ptrdiff_t stride, T *to, ptrdiff_t pitch,
                         ptrdiff_t rows, const A *k);

#define MASKED_LANES_OF_ROW(v, r) \
    (index == NULL ? (v) : MASKED_A(mask + (r) * mask_stride, index, v))

ALWAYS_INLINE void NAME(normalize_strip)(const uint8_t *mask, ptrdiff_t mask_stride,
                                         const uint8_t *index, const T *dy, const T *x,
                                         ptrdiff_t stride, T *to, ptrdiff_t pitch, ptrdiff_t rows,
                                         const A *k)
{
    const VA high = LOAD_A(k), low = LOAD_A(k + COLUMNS);
    const VA scale = LOAD_A(k + 2 * COLUMNS), shift = LOAD_A(k + 3 * COLUMNS);
    (void)dy;
    for (ptrdiff_t r = 0; r < rows; r++, x += stride, to += pitch)
        NAME(store)(to, MASKED_LANES_OF_ROW(Y(NAME(fetch)(x, ROWS_SUMMED * stride), high, low,
                                              scale, shift), r));
}

ALWAYS_INLINE void NAME(gradient_strip)(const uint8_t *mask, ptrdiff_t mask_stride,
                                        const uint8_t *index, const T *dy, const T *x,
                                        ptrdiff_t stride, T *to, ptrdiff_t pitch, ptrdiff_t rows,
                                        const A *k)
{
    const VA dy_high = LOAD_A(k), dy_low = LOAD_A(k + COLUMNS);
    const VA x_high = LOAD_A(k + 2 * COLUMNS), x_low = LOAD_A(k + 3 * COLUMNS);
    const VA slope = LOAD_A(k + 4 * COLUMNS), scale = LOAD_A(k + 5 * COLUMNS);
    for (ptrdiff_t r = 0; r < rows; r++, dy += stride, x += stride, to += pitch)
        NAME(store)(to, MASKED_LANES_OF_ROW(DX(NAME(fetch)(dy, ROWS_SUMMED * stride),
                                               NAME(fetch)(x, ROWS_SUMMED * stride), dy_high,
                                               dy_low, x_high, x_low, slope, scale), r));
}

ALWAYS_INLINE void NAME(write_columns)(NAME(strip) *strip, int masked, const T *dy, const T *x,
                                       T *out, const fastbn_matrix *matrix, const A *k,
                                       int nontemporal)
{
    mask_step masks[COLUMNS / VA_LANES + 1];
    const uint8_t *mask = matrix->mask;
    const ptrdiff_t len = matrix->len, stride = matrix->stride, last = len - VA_LANES;
    const ptrdiff_t pitch = nontemporal ? len : stride;
    T buffer[ROWS_WRITTEN * COLUMNS], end[ROWS_WRITTEN * VA_LANES];
#define MASK(i) \
    masked ? mask + masks[i].offset : NULL, matrix->mask_stride, masked ? masks[i].index : NULL
    if (masked)
        find_masks(matrix, VA_LANES, last < 0 ? 0 : last, masks);
    for (ptrdiff_t r = 0, n; r < matrix->rows; r += n) {
        T *to = nontemporal ? buffer : out;
        if (last < 0) {
            T dy_row[VA_LANES] = {0}, x_row[VA_LANES] = {0};
            n = 1;
            memcpy(dy_row, dy, sizeof(T) * (size_t)len);
            memcpy(x_row, x, sizeof(T) * (size_t)len);
            strip(MASK(0), dy_row, x_row, 0, end, VA_LANES, n, k);
            memcpy(to, end, sizeof(T) * (size_t)len);
        } else {
            n = smaller(matrix->rows - r, ROWS_WRITTEN);
            /* The last strip is computed first: it overlaps the one before, which overwrites in
             * place some of the elements that this one is computed from. */
            strip(MASK(len / VA_LANES), dy + last, x + last, stride, end, VA_LANES, n, k + last);
            for (ptrdiff_t i = 0; i < last; i += VA_LANES)
                strip(MASK(i / VA_LANES), dy + i, x + i, stride, to + i, pitch, n, k + i);
            for (ptrdiff_t j = 0; j < n; j++)
                memcpy(to + j * pitch + last, end + j * VA_LANES, sizeof(T) * VA_LANES);
        }
        if (nontemporal && len == stride)
            copy_nontemporal((char *)out, (const char *)buffer, sizeof(T) * (size_t)(n * len));
        else if (nontemporal)
            for (ptrdiff_t j = 0; j < n; j++)
                copy_nontemporal((char *)(out + j * stride), (const char *)(buffer + j * len),
                       sizeof(T) * (size_t)len);
        dy += n * stride, x += n * stride, out += n * stride;
        if (masked)
            mask += n * matrix->mask_stride;
    }
#undef MASK
}

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

static void NAME(column_normalize)(const void *x, void *y, const fastbn_matrix *matrix,
                                   const fastbn_affine *affine, int nontemporal)
{
    A k[4][COLUMNS];
    NAME(spread_high_and_low)(matrix, affine->centre, k[0], k[1]);
    NAME(spread)(matrix, affine->scale, k[2]);
    NAME(spread)(matrix, affine->shift, k[3]);
    if (matrix->mask == NULL)
        NAME(write_columns)(NAME(normalize_strip), 0, x, x, y, matrix, k[0], nontemporal);
    else
        NAME(write_columns)(NAME(normalize_strip), 1, x, x, y, matrix, k[0], nontemporal);
}

static void NAME(column_gradient)(const void *dy, const void *x, void *dx,
                                  const fastbn_matrix *matrix, const fastbn_gradient *gradient,
                                  int nontemporal)
{
    A k[6][COLUMNS];
    NAME(spread_high_and_low)(matrix, gradient->dy_mean, k[0], k[1]);
    NAME(spread_high_and_low)(matrix, gradient->x_mean, k[2], k[3]);
    NAME(spread)(matrix, gradient->slope, k[4]);
    NAME(spread)(matrix, gradient->scale, k[5]);
    if (matrix->mask == NULL)
        NAME(write_columns)(NAME(gradient_strip), 0, dy, x, dx, matrix, k[0], nontemporal);
    else
        NAME(write_columns)(NAME(gradient_strip), 1, dy, x, dx, matrix, k[0], nontemporal);
}

#undef CHUNK
#undef MASKED_LANES
#undef MASKED_LANE
#undef MASKED_LANES_OF_ROW
#undef WRITE_RUN
#undef STORE_RUN
#undef DX
#undef Y
#undef VA_LANES
#undef NAME
#undef LOAD_A
#undef MASKED_A
#undef SPREAD_A
#undef VA
#undef A
#undef T
#undef DTYPE
