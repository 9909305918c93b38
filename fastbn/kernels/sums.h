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

#if ARITHMETIC_BITS == 32
/* The j-th piece of a step in double; a register of 16-bit elements is converted once for both of
 * its pieces. */
ALWAYS_INLINE vd NAME(widen_piece)(const T *x, int j)
{
    enum { PIECES = VF / VD };
    if (sizeof(T) == sizeof(A))
        return NAME(widen)(x + j * VD);
    return widen_lanes(NAME(load)(x + j / PIECES * VF), j % PIECES);
}

/* The squares are exact, so that only their addition rounds. */
ALWAYS_INLINE step_sums NAME(add_raw_moments)(step_sums sums, const T *dy, const T *x,
                                              ptrdiff_t ahead, step centre, const NAME(gate) *gate,
                                              valid_lanes lanes)
{
    (void)dy, (void)centre, (void)gate;
    PREFETCH(x + ahead);
    UNROLL for (int j = 0; j < STEPS; j++) {
        if (is_skipped(lanes, j, VD))
            continue;
        const vd v = only_valid(lanes, j, NAME(widen_piece)(x, j));
        sums.first[j] += v;
        sums.second[j] = multiply_add_vd(v, v, sums.second[j]);
    }
    return sums;
}
#endif

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
        vd g = only_valid(lanes, j, NAME(widen)(dy + j * VD));
        const vd d = only_valid(lanes, j, NAME(widen)(x + j * VD) - mean.at[j]);
        IN_REGISTER(g);
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
        VA v = NAME(load)(x + k * VA_LANES);
        IN_REGISTER(v);
        const NAME(dy_and_x) passed = NAME(pass)(kind, NAME(load)(dy + k * VA_LANES), v,
                                               gate->activation, gate->low[k], gate->high[k]);
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

/* Sums stay in registers for a run, and in memory from a sample to the next. Raw moments have no
 * centre. All steps of short runs prefetch as far ahead as the first one. */
ALWAYS_INLINE void NAME(sum_runs)(NAME(add_step) *add, int masked, int short_runs, const T *dy,
                                  const T *x, const fastbn_runs *runs, const double *centre,
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
            const step around = same_step(centre == NULL ? 0 : centre[c]);
            NAME(gate) own;
            if (gate != NULL)
                own = NAME(gate_of_run)(&gates, c);
            step_sums s = begins ? no_sums() : load_sums(sums[c][0], sums[c][1]);
            step_sums total = n < samples ? no_sums() : load_sums(totals[c][0], totals[c][1]);
            ptrdiff_t i = 0;
            while (len - i > CHUNK) {
                for (const ptrdiff_t end = i + CHUNK; i < end; i += LANES)
                    s = add(s, dy + i, x + i, prefetch_distance(ahead, i), around, &own,
                            (valid_lanes){masked, masked ? mask + i : NULL, 0, 0});
                total = add_sums(total, s);
                s = no_sums();
            }
            for (; i + LANES <= len; i += LANES)
                s = add(s, dy + i, x + i, prefetch_distance(ahead, short_runs ? 0 : i), around,
                        &own, (valid_lanes){masked, masked ? mask + i : NULL, 0, 0});
            if (i < len)
                s = add(s, last_step(dy, len, sizeof(T), dy_buffer),
                        last_step(x, len, sizeof(T), x_buffer), 0, around, &own,
                        (valid_lanes){masked, masked ? last_step(mask, len, 1, mask_buffer) : NULL,
                                      0, LANES - (len - i)});
            ahead.border -= len;
            if (NAME(CHUNKED) && ends)
                s = add_sums(total, s);
            if (NAME(CHUNKED) && ends && !last)
                store_sums(totals[c][0], totals[c][1], s);
            else
                store_sums(sums[c][0], sums[c][1], s);
        }
    }
    COMMON(add_lanes)(sums, runs->channels, first, second);
}

static void NAME(moments)(const void *x, const fastbn_runs *runs, const double *pivot,
                          double *first, double *second)
{
    if (runs->mask == NULL)
        NAME(sum_runs)(NAME(add_moments), 0, 0, x, x, runs, pivot, NULL, first, second);
    else
        NAME(sum_runs)(NAME(add_moments), 1, 0, x, x, runs, pivot, NULL, first, second);
}

#if ARITHMETIC_BITS == 32
static void NAME(raw_moments)(const void *x, const fastbn_runs *runs, const double *pivot,
                              double *first, double *second)
{
    (void)pivot;
    if (runs->mask == NULL)
        NAME(sum_runs)(NAME(add_raw_moments), 0, 1, x, x, runs, NULL, NULL, first, second);
    else
        NAME(sum_runs)(NAME(add_raw_moments), 1, 1, x, x, runs, NULL, NULL, first, second);
}
#endif

static void NAME(products)(const void *dy, const void *x, const fastbn_runs *runs,
                           const double *mean, const fastbn_gate *gate, double *first,
                           double *second)
{
    const int kind = NAME(kind_of_gate)(gate);
    if (kind == FASTBN_RELU)
        NAME(sum_runs)(NAME(add_relu_products), 0, 0, dy, x, runs, mean, gate, first, second);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(sum_runs)(NAME(add_leaky_products), 0, 0, dy, x, runs, mean, gate, first, second);
    else if (runs->mask == NULL)
        NAME(sum_runs)(NAME(add_products), 0, 0, dy, x, runs, mean, NULL, first, second);
    else
        NAME(sum_runs)(NAME(add_products), 1, 0, dy, x, runs, mean, NULL, first, second);
}

/* ------------------------------------------------------------------ the column layout */

/* Adds some rows to LANES of their columns, from the i-th one on: to their sums, or to their
 * trees, which are kept from the place `i_tree` on. */
typedef void NAME(add_rows)(column_sums *sums, column_trees *trees, row_set rows, ptrdiff_t i,
                            ptrdiff_t i_tree, const T *dy, const T *x, const NAME(gate) *gate,
                            valid_lanes lanes);

ALWAYS_INLINE void NAME(add_rows_to_sums)(NAME(add_step) *add, column_sums *sums,
                                          column_trees *trees, row_set rows, ptrdiff_t i,
                                          ptrdiff_t i_tree, const T *dy, const T *x,
                                          const NAME(gate) *gate, valid_lanes lanes)
{
    (void)trees, (void)i_tree;
    double *first = sums->first + LANES + i, *second = sums->second + LANES + i;
    const step around = load_step(sums->centre + LANES + i);
    step_sums s = load_sums(first, second);
    UNROLL for (int t = 0; t < ROWS_MOST; t++)
        if (t < rows.count)
            s = add(s, dy + t * rows.stride, x + t * rows.stride,
                    rows.ahead + t * rows.ahead_of_next, around, gate, lanes_of_next(lanes, t));
    store_sums(first, second, s);
}

/* The same of moments, of products, and of products behind gates. */
#define ADD_ROWS(name, add_rows, add) \
    ALWAYS_INLINE void NAME(name)(column_sums *sums, column_trees *trees, row_set rows, \
                                  ptrdiff_t i, ptrdiff_t i_tree, const T *dy, const T *x, \
                                  const NAME(gate) *gate, valid_lanes lanes) \
    { \
        NAME(add_rows)(NAME(add), sums, trees, rows, i, i_tree, dy, x, gate, lanes); \
    }
ADD_ROWS(add_row_moments, add_rows_to_sums, add_moments)
#if ARITHMETIC_BITS == 32
ADD_ROWS(add_row_raw_moments, add_rows_to_sums, add_raw_moments)
#endif
ADD_ROWS(add_row_products, add_rows_to_sums, add_products)
ADD_ROWS(add_row_relu_products, add_rows_to_sums, add_relu_products)
ADD_ROWS(add_row_leaky_products, add_rows_to_sums, add_leaky_products)

/* Adds some rows to all of their columns. */
ALWAYS_INLINE void NAME(add_rows_to_columns)(NAME(add_rows) *add, column_sums *sums,
                                             column_trees *trees, row_set rows, const T *dy,
                                             const T *x, ptrdiff_t len, const valid_columns *valid,
                                             const NAME(gates) *gates)
{
    const ptrdiff_t whole = len / LANES * LANES, end = len - LANES;
    T dy_buffer[ROWS_MOST][LANES], x_buffer[ROWS_MOST][LANES];
    NAME(gate) gate;
#define ADD(i, i_tree, dy, x, skip) \
    do { \
        if (gates != NULL) \
            gate = NAME(gate_of_columns)(gates, i); \
        add(sums, trees, rows, i, i_tree, dy, x, &gate, valid_lanes_of_columns(valid, i, skip)); \
    } while (0)
    for (ptrdiff_t i = 0; i < whole; i += LANES, rows.ahead += rows.ahead_grows)
        ADD(i, i, dy + i, x + i, 0);
    if (whole < len) {
        const T *dy_end = last_step(dy, len, sizeof(T), dy_buffer[0]);
        const T *x_end = last_step(x, len, sizeof(T), x_buffer[0]);
        if (rows.count > 1 && len < LANES) { /* all rows are in the buffers */
            for (int t = 1; t < rows.count; t++) {
                last_step(dy + t * rows.stride, len, sizeof(T), dy_buffer[t]);
                last_step(x + t * rows.stride, len, sizeof(T), x_buffer[t]);
            }
            rows.stride = LANES;
        }
        ADD(end, whole, dy_end, x_end, whole - end);
    }
#undef ADD
}

/* Some rows at a time, `together`, so that sums are loaded and stored less often. A mask, if there
 * is one, leaves out whole rows or, where it `masks_some` of their columns, these. */
ALWAYS_INLINE void NAME(sum_columns)(NAME(add_rows) *add, int by_trees, int together,
                                     int masks_some, const T *dy, const T *x,
                                     const fastbn_matrix *matrix,
                                     const double *centre_of_channel, const fastbn_gate *gate,
                                     run_bits bits, double *first_of_channel,
                                     double *second_of_channel)
{
    column_sums sums;
    column_trees trees;
    valid_columns valid;
    NAME(gates) gates;
    const ptrdiff_t len = matrix->len, stride = matrix->stride, rows = matrix->rows;
    ptrdiff_t in_trees = 0;
    begin_column_sums(&sums, matrix, centre_of_channel);
    if (by_trees)
        begin_column_trees(&trees, &sums, len);
    if (gate != NULL)
        NAME(spread_gates)(matrix, gate, &gates);
    if (masks_some)
        COMMON(begin_valid_columns)(&valid, matrix);
    for (ptrdiff_t r = next_row(matrix, 0), last; r < rows; r = next_row(matrix, last + 1)) {
        const ptrdiff_t distance = distance_of_rows(matrix, r, together);
        const int count = distance > 0 ? together : 1;
        /* Trees, which take two rows at a time, are filled exactly: a single row is the last
         * one. */
        const int begins = in_trees == 0, ends = in_trees + count == TREE;
        last = r + distance * (count - 1);
        if (masks_some)
            COMMON(spread_masks)(&valid, matrix, r, count);
/* A loop for each case: a branch for every step would take time. */
#define WALK(count, begin, end) \
    NAME(add_rows_to_columns)(add, &sums, &trees, \
                              row_set_of(count, begin, end, \
                                         (count > 1 ? distance : 1) * stride, len, \
                                         skip_bits(bits, r * stride)), \
                              dy + r * stride, x + r * stride, len, \
                              masks_some ? &valid : NULL, gate == NULL ? NULL : &gates)
        if (count == 1)
            WALK(1, begins, ends);
        else if (masks_some && by_trees) /* one for all is less code: masks take time anyway */
            WALK(together, begins, ends);
        else if (!by_trees || begins)
            WALK(together, 1, 0);
        else if (!ends)
            WALK(together, 0, 0);
        else
            WALK(together, 0, 1);
#undef WALK
        in_trees = (in_trees + count) % TREE;
    }
    if (by_trees && in_trees > 0)
        COMMON(end_column_trees)(&trees, &sums, len);
    COMMON(add_columns_to_channels)(matrix, &sums, first_of_channel, second_of_channel);
}

/* The sums of columns with the mask that the matrix has. */
ALWAYS_INLINE void NAME(sum_matrix)(NAME(add_rows) *add, int by_trees, int together,
                                    const void *dy, const void *x, const fastbn_matrix *matrix,
                                    const double *centre, double *first, double *second)
{
    if (masks_columns(matrix))
        NAME(sum_columns)(add, by_trees, together, 1, dy, x, matrix, centre, NULL, no_bits(),
                          first, second);
    else
        NAME(sum_columns)(add, by_trees, together, 0, dy, x, matrix, centre, NULL, no_bits(),
                          first, second);
}

static void NAME(column_moments)(const void *x, const fastbn_matrix *matrix, const double *pivot,
                                 double *first, double *second)
{
    NAME(sum_matrix)(NAME(add_row_moments), 0, 2, x, x, matrix, pivot, first, second);
}

#if ARITHMETIC_BITS == 32
static void NAME(column_raw_moments)(const void *x, const fastbn_matrix *matrix,
                                     const double *pivot, double *first, double *second)
{
    (void)pivot;
    NAME(sum_matrix)(NAME(add_row_raw_moments), 0, ROWS_MOST, x, x, matrix, NULL, first, second);
}
#endif

static void NAME(column_products)(const void *dy, const void *x, const fastbn_matrix *matrix,
                                  const double *mean, const fastbn_gate *gate, double *first,
                                  double *second)
{
    const int kind = NAME(kind_of_gate)(gate);
    if (kind == FASTBN_RELU)
        NAME(sum_columns)(NAME(add_row_relu_products), 0, 2, 0, dy, x, matrix, mean, gate,
                          no_bits(), first, second);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(sum_columns)(NAME(add_row_leaky_products), 0, 2, 0, dy, x, matrix, mean, gate,
                          no_bits(), first, second);
    else
        NAME(sum_matrix)(NAME(add_row_products), 0, 2, dy, x, matrix, mean, first, second);
}

#undef CHUNK
