/* Sums in double, for one dtype; dtype.h includes this file.
 *
 * Elements come in steps of LANES. A run, or the columns, end with a step that overlaps the one
 * before it: `skip` tells how many of its lanes have been added already. */

/* Adds a step to its sums, and prefetches what lies `ahead` elements further on. */
typedef step_sums NAME(add_step)(step_sums sums, const T *dy, const T *x, ptrdiff_t ahead,
                                 step centre, const NAME(gate) *gate, valid_lanes lanes);

ALWAYS_INLINE step_sums NAME(add_moments)(step_sums sums, const T *dy, const T *x, ptrdiff_t ahead,
                                          step pivot, const NAME(gate) *gate, valid_lanes lanes)
{
    (void)dy, (void)gate;
    PREFETCH(x + ahead);
    UNROLL for (int j = 0; j < STEPS; j++) {
        if (is_skipped(lanes, j, VD))
            continue;
        const vd d = only_valid(lanes, j, NAME(widen)(x + j * VD) - pivot.at[j]);
        sums.first[j] += d;
        sums.second[j] += d * d;
    }
    return sums;
}

ALWAYS_INLINE step_sums NAME(add_products)(step_sums sums, const T *dy, const T *x,
                                           ptrdiff_t ahead, step mean, const NAME(gate) *gate,
                                           valid_lanes lanes)
{
    (void)gate;
    PREFETCH(dy + ahead);
    PREFETCH(x + ahead);
    UNROLL for (int j = 0; j < STEPS; j++) {
        if (is_skipped(lanes, j, VD))
            continue;
        const vd g = only_valid(lanes, j, NAME(widen)(dy + j * VD));
        const vd d = only_valid(lanes, j, NAME(widen)(x + j * VD) - mean.at[j]);
        sums.first[j] += g;
        sums.second[j] += g * d;
    }
    return sums;
}

/* The same of what has passed a gate. */
ALWAYS_INLINE step_sums NAME(add_gated_products)(int kind, step_sums sums, const T *dy, const T *x,
                                                 ptrdiff_t ahead, step mean,
                                                 const NAME(gate) *gate, valid_lanes lanes)
{
    enum { PIECES = sizeof(VA) / sizeof(A) / VD };
    PREFETCH(dy + ahead);
    PREFETCH(x + ahead);
    UNROLL for (int k = 0; k < NAME(GATE_STEPS); k++) {
        const NAME(passed) passed =
            NAME(pass)(kind, NAME(load)(dy + k * VA_LANES), NAME(load)(x + k * VA_LANES),
                       &gate->activation, gate->low[k], gate->high[k]);
        UNROLL for (int i = 0; i < PIECES; i++) {
            const int j = k * PIECES + i;
            if (is_skipped(lanes, j, VD))
                continue;
            const vd g = only_valid(lanes, j, WIDEN_A(passed.dy, i));
            const vd d = only_valid(lanes, j, WIDEN_A(passed.x, i) - mean.at[j]);
            sums.first[j] += g;
            sums.second[j] += g * d;
        }
    }
    return sums;
}

#define ADD_GATED_PRODUCTS(name, kind) \
    ALWAYS_INLINE step_sums NAME(name)(step_sums sums, const T *dy, const T *x, ptrdiff_t ahead, \
                                       step mean, const NAME(gate) *gate, valid_lanes lanes) \
    { \
        return NAME(add_gated_products)(kind, sums, dy, x, ahead, mean, gate, lanes); \
    }
ADD_GATED_PRODUCTS(add_relu_products, FASTBN_RELU)
ADD_GATED_PRODUCTS(add_leaky_products, FASTBN_LEAKY_RELU)
#undef ADD_GATED_PRODUCTS

/* Doubles are summed in chunks of FASTBN_ADDITIONS for each lane; the sums of chunks are then added
 * up. */
enum { NAME(CHUNKED) = sizeof(T) == sizeof(double) };
#define CHUNK (NAME(CHUNKED) ? (ptrdiff_t)(FASTBN_ADDITIONS * LANES) : PTRDIFF_MAX)

/* The samples of a chunk, whose runs take `len` elements each, rounded up to whole steps. */
ALWAYS_INLINE ptrdiff_t NAME(samples_of_chunk)(ptrdiff_t len)
{
    return len < CHUNK ? CHUNK / ((len + LANES - 1) / LANES * LANES) : 1;
}

/* ------------------------------------------------------------------ the row layout */

/* Sums stay in registers for a run, and in memory from a sample to the next. */
ALWAYS_INLINE void NAME(sum_runs)(NAME(add_step) *add, int masked, const T *dy, const T *x,
                                  const fastbn_runs *runs, const double *centre,
                                  const fastbn_gate *gate, double *first, double *second)
{
    double sums[FASTBN_GROUP][2][LANES], totals[FASTBN_GROUP][2][LANES];
    T dy_buffer[LANES], x_buffer[LANES];
    uint8_t mask_buffer[LANES + MASK_BYTES];
    NAME(gates) gates;
    const ptrdiff_t len = runs->len, down = runs->stride - runs->channels * len;
    const ptrdiff_t samples = NAME(CHUNKED) ? NAME(samples_of_chunk)(len) : runs->samples;
    if (gate != NULL)
        NAME(narrow_gates)(gate, runs->channels, &gates);
    for (ptrdiff_t n = 0, of_chunk = 0; n < runs->samples; n++, dy += down, x += down) {
        const int begins = of_chunk++ == 0, last = n + 1 == runs->samples;
        const int ends = last || of_chunk == samples;
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead;
        of_chunk = ends ? 0 : of_chunk;
        for (ptrdiff_t c = 0; c < runs->channels; c++, dy += len, x += len) {
            const step around = same_step(centre[c]);
            NAME(gate) own;
            if (gate != NULL)
                own = NAME(gate_of_run)(&gates, c);
            step_sums s = begins ? no_sums() : load_sums(sums[c][0], sums[c][1]);
            step_sums total = n < samples ? no_sums() : load_sums(totals[c][0], totals[c][1]);
            ptrdiff_t i = 0;
            while (len - i > CHUNK) {
                for (const ptrdiff_t end = i + CHUNK; i < end; i += LANES)
                    s = add(s, dy + i, x + i, prefetch_distance(ahead, i), around, &own,
                            (valid_lanes){masked, masked ? mask + i : NULL, NULL, 0});
                total = add_sums(total, s);
                s = no_sums();
            }
            for (; i + LANES <= len; i += LANES)
                s = add(s, dy + i, x + i, prefetch_distance(ahead, i), around, &own,
                        (valid_lanes){masked, masked ? mask + i : NULL, NULL, 0});
            if (i < len)
                s = add(s, last_step(dy, len, sizeof(T), dy_buffer),
                        last_step(x, len, sizeof(T), x_buffer), 0, around, &own,
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
        NAME(sum_runs)(NAME(add_moments), 0, x, x, runs, pivot, NULL, first, second);
    else
        NAME(sum_runs)(NAME(add_moments), 1, x, x, runs, pivot, NULL, first, second);
}

static void NAME(products)(const void *dy, const void *x, const fastbn_runs *runs,
                           const double *mean, const fastbn_gate *gate, double *first,
                           double *second)
{
    const int kind = NAME(kind_of_gate)(gate);
    if (kind == FASTBN_RELU)
        NAME(sum_runs)(NAME(add_relu_products), 0, dy, x, runs, mean, gate, first, second);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(sum_runs)(NAME(add_leaky_products), 0, dy, x, runs, mean, gate, first, second);
    else if (runs->mask == NULL)
        NAME(sum_runs)(NAME(add_products), 0, dy, x, runs, mean, NULL, first, second);
    else
        NAME(sum_runs)(NAME(add_products), 1, dy, x, runs, mean, NULL, first, second);
}

/* ------------------------------------------------------------------ the column layout */

/* Adds a few rows to the sums of LANES of their columns. */
typedef step_sums NAME(add_rows)(step_sums sums, const T *dy, const T *x, const row_set *rows,
                                 const double *centre, const NAME(gate) *gate, valid_lanes lanes);

ALWAYS_INLINE step_sums NAME(add_rows_one_by_one)(NAME(add_step) *add, step_sums sums, const T *dy,
                                                  const T *x, const row_set *rows,
                                                  const double *centre, const NAME(gate) *gate,
                                                  valid_lanes lanes)
{
    const step around = load_step(centre);
    const ptrdiff_t stride = rows->stride, ahead = rows->ahead;
    for (ptrdiff_t r = 0; r < rows->count; r++) {
        const ptrdiff_t at = rows->listed ? rows->at[r] : r * stride;
        sums = add(sums, dy + at, x + at, ahead, around, gate, lanes);
        lanes.mask += lanes.masked ? rows->mask_stride : 0;
    }
    return sums;
}

/* The same of moments, of products, and of products behind gates. */
#define ADD_ROWS(name, add_rows, add) \
    ALWAYS_INLINE step_sums NAME(name)(step_sums sums, const T *dy, const T *x, \
                                       const row_set *rows, const double *centre, \
                                       const NAME(gate) *gate, valid_lanes lanes) \
    { \
        return NAME(add_rows)(NAME(add), sums, dy, x, rows, centre, gate, lanes); \
    }
ADD_ROWS(add_row_moments, add_rows_one_by_one, add_moments)
ADD_ROWS(add_row_products, add_rows_one_by_one, add_products)
ADD_ROWS(add_row_relu_products, add_rows_one_by_one, add_relu_products)
ADD_ROWS(add_row_leaky_products, add_rows_one_by_one, add_leaky_products)

/* A few rows are summed at a time, so that sums are loaded and stored once for all of them, and
 * memory is read at a few places at once. */
ALWAYS_INLINE void NAME(sum_columns)(NAME(add_rows) *add, int mode, const T *dy, const T *x,
                                     const fastbn_matrix *matrix, const double *centre_of_channel,
                                     const fastbn_gate *gate, double *first_of_channel,
                                     double *second_of_channel)
{
    /* A last step that overlaps the one before reaches, of few columns, back before the first. */
    double centre_[LANES + COLUMNS], first_[LANES + COLUMNS], second_[LANES + COLUMNS];
    double *centre = centre_ + LANES, *first = first_ + LANES, *second = second_ + LANES;
    mask_step masks[COLUMNS / LANES + 1];
    NAME(gates) gates;
    NAME(gate) own;
    const ptrdiff_t len = matrix->len, stride = matrix->stride, end = len - LANES;
    const uint8_t *mask = matrix->mask;
    row_set rows = {
        .stride = stride, .mask_stride = matrix->mask_stride, .ahead = rows_ahead(stride),
        .listed = mode == LISTED};
#define ADD(dy, x, rows, i, lanes) \
    do { \
        if (gate != NULL) \
            own = NAME(gate_of_columns)(&gates, i); \
        store_sums(first + (i), second + (i), \
                   add(load_sums(first + (i), second + (i)), dy, x, rows, centre + (i), &own, \
                       lanes)); \
    } while (0)
#define VALID_LANES(i, skip) \
    (mode == MASKED ? (valid_lanes){1, mask + masks[i].offset, masks[i].index, skip} \
                    : (valid_lanes){0, NULL, NULL, skip})
    memset(centre_, 0, sizeof(double) * LANES);
    memset(first_, 0, sizeof(double) * (size_t)(LANES + len));
    memset(second_, 0, sizeof(double) * (size_t)(LANES + len));
    spread_double(matrix, centre_of_channel, centre);
    if (gate != NULL)
        NAME(spread_gates)(matrix, gate, &gates);
    if (mode == MASKED)
        find_masks(matrix, end, masks);
    for (ptrdiff_t r = 0, n; r < matrix->rows; r += n, dy += n * stride, x += n * stride) {
        ptrdiff_t i = 0;
        rows.count = n = smaller(matrix->rows - r, ROWS_SUMMED);
        if (rows.listed)
            n = list_valid_rows(&rows, mask, matrix->rows - r);
        for (; i <= end; i += LANES)
            ADD(dy + i, x + i, &rows, i, VALID_LANES(i / LANES, 0));
        if (i < len && rows.count > 0) {
            const T *dy_end = dy + end, *x_end = x + end;
            T dy_buffer[ROWS_SUMMED][LANES], x_buffer[ROWS_SUMMED][LANES];
            row_set last = rows;
            if (end < 0) { /* as many rows as of wide strips: sums must not depend on the width */
                for (ptrdiff_t j = 0; j < rows.count; j++) {
                    const ptrdiff_t at = rows.listed ? rows.at[j] : j * stride;
                    last_step(dy + at, len, sizeof(T), dy_buffer[j]);
                    last_step(x + at, len, sizeof(T), x_buffer[j]);
                    last.at[j] = j * LANES;
                }
                last.stride = LANES;
                dy_end = dy_buffer[0], x_end = x_buffer[0];
            }
            ADD(dy_end, x_end, &last, end, VALID_LANES(len / LANES, i - end));
        }
        if (mode != UNMASKED)
            mask += n * matrix->mask_stride;
    }
#undef VALID_LANES
#undef ADD
    add_columns_to_channels(matrix, first, first_of_channel);
    add_columns_to_channels(matrix, second, second_of_channel);
}

/* The sums of columns with the mask that the matrix has. */
ALWAYS_INLINE void NAME(sum_matrix)(NAME(add_rows) *add, const void *dy, const void *x,
                                    const fastbn_matrix *matrix, const double *centre,
                                    double *first, double *second)
{
    if (matrix->mask == NULL)
        NAME(sum_columns)(add, UNMASKED, dy, x, matrix, centre, NULL, first, second);
    else if (matrix->mask_stride == 1)
        NAME(sum_columns)(add, LISTED, dy, x, matrix, centre, NULL, first, second);
    else
        NAME(sum_columns)(add, MASKED, dy, x, matrix, centre, NULL, first, second);
}

static void NAME(column_moments)(const void *x, const fastbn_matrix *matrix, const double *pivot,
                                 double *first, double *second)
{
    NAME(sum_matrix)(NAME(add_row_moments), x, x, matrix, pivot, first, second);
}

static void NAME(column_products)(const void *dy, const void *x, const fastbn_matrix *matrix,
                                  const double *mean, const fastbn_gate *gate, double *first,
                                  double *second)
{
    const int kind = NAME(kind_of_gate)(gate);
    if (kind == FASTBN_RELU)
        NAME(sum_columns)(NAME(add_row_relu_products), UNMASKED, dy, x, matrix, mean, gate, first,
                          second);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(sum_columns)(NAME(add_row_leaky_products), UNMASKED, dy, x, matrix, mean, gate, first,
                          second);
    else
        NAME(sum_matrix)(NAME(add_row_products), dy, x, matrix, mean, first, second);
}

#undef CHUNK
