/* Sums in float32, for one dtype; dtype.h includes this file. Moments of columns are raw ones, in
 * sums.h.
 *
 * Up to TREE terms of a lane are added in float32: those of a run pair after pair if they are TREE,
 * fewer of them, and those of columns, one after the other. These sums are added in double. Lanes
 * and trees are the same for every width of a register. */

/* The terms of a tree: steps of LANES elements, `pitch` elements apart. Each prefetches what lies
 * `ahead` elements further on, the next one `ahead_of_next` more. */
typedef struct {
    const T *dy, *x;
    ptrdiff_t pitch, ahead, ahead_of_next;
    valid_lanes lanes;
    const NAME(gate) *gate;
    run_bits bits;
} NAME(terms);

/* The j-th register of the t-th term; the first one prefetches. */
typedef tree_sum NAME(term)(const NAME(terms) *terms, ptrdiff_t t, int j, float_step centre);

ALWAYS_INLINE tree_sum NAME(moment_term)(const NAME(terms) *terms, ptrdiff_t t, int j,
                                         float_step pivot)
{
    const T *x = terms->x + t * terms->pitch;
    if (j == 0)
        PREFETCH(x + terms->ahead + t * terms->ahead_of_next);
    const vf d =
        only_valid_floats(lanes_of_next(terms->lanes, t), j, NAME(load)(x + j * VF) - pivot.at[j]);
    return (tree_sum){d, d * d};
}

ALWAYS_INLINE tree_sum NAME(product_term)(const NAME(terms) *terms, ptrdiff_t t, int j,
                                          float_step mean)
{
    const T *dy = terms->dy + t * terms->pitch, *x = terms->x + t * terms->pitch;
    const valid_lanes lanes = lanes_of_next(terms->lanes, t);
    if (j == 0) {
        PREFETCH(dy + terms->ahead + t * terms->ahead_of_next);
        PREFETCH(x + terms->ahead + t * terms->ahead_of_next);
    }
    vf g = only_valid_floats(lanes, j, NAME(load)(dy + j * VF));
    const vf d = only_valid_floats(lanes, j, NAME(load)(x + j * VF) - mean.at[j]);
    IN_REGISTER(g);
    return (tree_sum){g, g * d};
}

/* The same of what has passed a gate. */
ALWAYS_INLINE tree_sum NAME(gated_product_term)(int kind, const NAME(terms) *terms, ptrdiff_t t,
                                                int j, float_step mean)
{
    const T *dy = terms->dy + t * terms->pitch, *x = terms->x + t * terms->pitch;
    const valid_lanes lanes = lanes_of_next(terms->lanes, t);
    if (j == 0) {
        PREFETCH(dy + terms->ahead + t * terms->ahead_of_next);
        PREFETCH(x + terms->ahead + t * terms->ahead_of_next);
    }
    vf v = NAME(load)(x + j * VF);
    IN_REGISTER(v);
    const NAME(dy_and_x) passed =
        NAME(pass)(kind, NAME(load)(dy + j * VF), v, terms->gate->activation,
                   terms->gate->low[j], terms->gate->high[j]);
    const vf g = only_valid_floats(lanes, j, passed.dy);
    const vf d = only_valid_floats(lanes, j, passed.x - mean.at[j]);
    return (tree_sum){g, g * d};
}

#define GATED_PRODUCT_TERM(name, kind) \
    ALWAYS_INLINE tree_sum NAME(name)(const NAME(terms) *terms, ptrdiff_t t, int j, \
                                      float_step mean) \
    { \
        return NAME(gated_product_term)(kind, terms, t, j, mean); \
    }
GATED_PRODUCT_TERM(relu_product_term, FASTBN_RELU)
GATED_PRODUCT_TERM(leaky_product_term, FASTBN_LEAKY_RELU)
#undef GATED_PRODUCT_TERM

/* And of what has passed a gate of bits. */
ALWAYS_INLINE tree_sum NAME(bits_product_term)(const NAME(terms) *terms, ptrdiff_t t, int j,
                                                float_step mean)
{
    const ptrdiff_t at = t * terms->pitch;
    const T *dy = terms->dy + at, *x = terms->x + at;
    const valid_lanes lanes = lanes_of_next(terms->lanes, t);
    if (j == 0) {
        PREFETCH(dy + terms->ahead + t * terms->ahead_of_next);
        PREFETCH(x + terms->ahead + t * terms->ahead_of_next);
    }
    const VA passed = NAME(if_alive)(terms->bits, at + j * VF, NAME(load)(dy + j * VF));
    const vf g = only_valid_floats(lanes, j, passed);
    const vf d = only_valid_floats(lanes, j, NAME(load)(x + j * VF) - mean.at[j]);
    return (tree_sum){g, g * d};
}

/* Adds TREE terms, pair after pair: memory is read in its order, and little waits in registers. */
ALWAYS_INLINE step_sums NAME(add_whole_tree)(NAME(term) *term, step_sums sums,
                                             const NAME(terms) *terms, float_step centre)
{
    tree_sums tree = no_tree();
    NO_UNROLL for (ptrdiff_t t = 0; t < TREE; t += 2)
        UNROLL for (int j = 0; j < FLOAT_STEPS; j++)
            tree.of[j] = add_tree_sums(tree.of[j], add_tree_sums(term(terms, t, j, centre),
                                                                 term(terms, t + 1, j, centre)));
    return add_tree(sums, tree);
}

/* Adds a few terms to a tree, one after the other: a tree for each number of them would be long. */
ALWAYS_INLINE tree_sums NAME(add_in_turn)(NAME(term) *term, tree_sums tree,
                                          const NAME(terms) *terms, ptrdiff_t count,
                                          float_step centre)
{
    for (ptrdiff_t t = 0; t < count; t++)
        UNROLL for (int j = 0; j < FLOAT_STEPS; j++)
            if (!is_skipped(terms->lanes, j, VF))
                tree.of[j] = add_tree_sums(tree.of[j], term(terms, t, j, centre));
    return tree;
}

/* A pivot for each channel: of the elements `at`, which those of the next channel follow `stride`
 * elements further on, the one that is next to their mean. Deviations from an element are exact for
 * numbers of few digits, such as 16-bit ones. */
static void NAME(pivots)(const void *x_, const ptrdiff_t *at, ptrdiff_t count, ptrdiff_t stride,
                         ptrdiff_t channels, double *pivot)
{
    const T *x = x_;
    const A share = (A)1 / (A)count;
    for (ptrdiff_t c = 0; c < channels; c++) {
#define ELEMENT(i) NAME(decode)(x[at[i] + c * stride])
        const A first = ELEMENT(0);
        A mean = first, nearest = first, distance;
        for (ptrdiff_t i = 1; i < count; i++)
            mean += (ELEMENT(i) - first) * share;
        distance = (A)fabs(first - mean);
        for (ptrdiff_t i = 1; i < count; i++) {
            const A element = ELEMENT(i), d = (A)fabs(element - mean);
            nearest = d < distance ? element : nearest;
            distance = d < distance ? d : distance;
        }
#undef ELEMENT
        pivot[c] = isfinite(nearest) ? nearest : 0;
    }
}

/* ------------------------------------------------------------------ the row layout */

/* The terms of a run from the i-th element on. */
ALWAYS_INLINE NAME(terms) NAME(terms_of_run)(int masked, const T *dy, const T *x,
                                             const uint8_t *mask, ptrdiff_t i, ptrdiff_t ahead,
                                             const NAME(gate) *gate, run_bits bits)
{
    return (NAME(terms)){dy + i, x + i, LANES, ahead, 0,
                         {masked, masked ? mask + i : NULL, LANES, 0}, gate,
                         skip_bits(bits, i)};
}

/* Adds the end of a run to a tree, from the i-th element on: less than TREE whole steps, and a step
 * that overlaps the one before it. */
ALWAYS_INLINE tree_sums NAME(add_end)(NAME(term) *term, tree_sums tree, int masked, const T *dy,
                                      const T *x, const uint8_t *mask, ptrdiff_t len, ptrdiff_t i,
                                      ptrdiff_t ahead, const NAME(gate) *gate, run_bits bits,
                                      float_step centre)
{
    const ptrdiff_t steps = (len - i) / LANES, rest = (len - i) % LANES;
    const NAME(terms) whole = NAME(terms_of_run)(masked, dy, x, mask, i, ahead, gate, bits);
    T dy_buffer[LANES], x_buffer[LANES];
    uint8_t mask_buffer[LANES + MASK_BYTES];
    tree = NAME(add_in_turn)(term, tree, &whole, steps, centre);
    if (rest == 0)
        return tree;
    NAME(terms) last = NAME(terms_of_run)(masked, last_step(dy, len, sizeof(T), dy_buffer),
                                          last_step(x, len, sizeof(T), x_buffer),
                                          masked ? last_step(mask, len, 1, mask_buffer) : NULL, 0,
                                          0, gate, skip_bits(bits, len - LANES));
    last.lanes.skip = LANES - rest;
    return NAME(add_in_turn)(term, tree, &last, 1, centre);
}

/* Of how many samples short runs of this length make up a tree. */
ALWAYS_INLINE ptrdiff_t NAME(samples_of_tree)(ptrdiff_t len)
{
    const ptrdiff_t steps = (len + LANES - 1) / LANES;
    return steps < TREE ? TREE / steps : 1;
}

ALWAYS_INLINE void NAME(sum_runs_by_trees)(NAME(term) *term, int masked, const T *dy, const T *x,
                                           const fastbn_runs *runs, const double *centre,
                                           const fastbn_gate *gate, run_bits bits,
                                           double *first, double *second)
{
    double sums[FASTBN_GROUP][2][LANES];
    NAME(gates) gates;
    const ptrdiff_t len = runs->len, stride = runs->stride;
    const ptrdiff_t samples_of_tree = NAME(samples_of_tree)(len);
    if (gate != NULL)
        NAME(narrow_gates)(gate, runs->channels, &gates);
    for (ptrdiff_t n = 0, count; n < runs->samples; n += count) {
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead;
        count = smaller(samples_of_tree, runs->samples - n);
        for (ptrdiff_t c = 0; c < runs->channels; c++) {
            const ptrdiff_t at = n * stride + c * len;
            const T *dy_run = dy + at, *x_run = x + at;
            const run_bits bits_of_run = skip_bits(bits, at);
            const float_step around = same_float_step(centre[c]);
            NAME(gate) own;
            if (gate != NULL)
                own = NAME(gate_of_run)(&gates, c);
            step_sums s = n == 0 ? no_sums() : load_sums(sums[c][0], sums[c][1]);
            ptrdiff_t i = 0;
            for (; i + TREE * LANES <= len; i += TREE * LANES) {
                const NAME(terms) terms = NAME(terms_of_run)(masked, dy_run, x_run, mask, i,
                                                             prefetch_distance(ahead, i), &own,
                                                             bits_of_run);
                s = NAME(add_whole_tree)(term, s, &terms, around);
            }
            if (i < len) {
                tree_sums tree = no_tree();
                for (ptrdiff_t m = 0; m < count; m++)
                    tree = NAME(add_end)(term, tree, masked, dy_run + m * stride,
                                         x_run + m * stride,
                                         masked ? mask + m * runs->mask_stride : NULL, len, i,
                                         prefetch_distance(ahead, i), &own,
                                         skip_bits(bits_of_run, m * stride), around);
                s = add_tree(s, tree);
            }
            ahead.border -= len;
            store_sums(sums[c][0], sums[c][1], s);
        }
    }
    COMMON(add_lanes)(sums, runs->channels, first, second);
}

static void NAME(tree_moments)(const void *x, const fastbn_runs *runs, const double *pivot,
                               double *first, double *second)
{
    if (runs->mask == NULL)
        NAME(sum_runs_by_trees)(NAME(moment_term), 0, x, x, runs, pivot, NULL, no_bits(), first,
                                second);
    else
        NAME(sum_runs_by_trees)(NAME(moment_term), 1, x, x, runs, pivot, NULL, no_bits(), first,
                                second);
}

static void NAME(tree_products)(const void *dy, const void *x, const fastbn_runs *runs,
                                const double *mean, const fastbn_gate *gate, double *first,
                                double *second)
{
    const int kind = NAME(kind_of_gate)(gate);
    if (kind == FASTBN_RELU)
        NAME(sum_runs_by_trees)(NAME(relu_product_term), 0, dy, x, runs, mean, gate, no_bits(),
                                first, second);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(sum_runs_by_trees)(NAME(leaky_product_term), 0, dy, x, runs, mean, gate, no_bits(),
                                first, second);
    else if (WRITES_PASSED && kind == BY_BITS)
        NAME(sum_runs_by_trees)(NAME(bits_product_term), 0, dy, x, runs, mean, NULL,
                                bits_of_gate(gate), first, second);
    else if (runs->mask == NULL)
        NAME(sum_runs_by_trees)(NAME(product_term), 0, dy, x, runs, mean, NULL, no_bits(), first,
                                second);
    else
        NAME(sum_runs_by_trees)(NAME(product_term), 1, dy, x, runs, mean, NULL, no_bits(), first,
                                second);
}

/* ------------------------------------------------------------------ the column layout */

/* Adds some rows, one after the other, to trees. */
ALWAYS_INLINE void NAME(add_rows_to_trees)(NAME(term) *term, column_sums *sums,
                                           column_trees *trees, row_set rows, ptrdiff_t i,
                                           ptrdiff_t i_tree, const T *dy, const T *x,
                                           const NAME(gate) *gate, valid_lanes lanes)
{
    const NAME(terms) terms = {dy, x, rows.stride, rows.ahead, rows.ahead_of_next, lanes, gate,
                               skip_bits(rows.bits, i)};
    const float_step around = load_float_step(trees->centre + LANES + i);
    tree_sums tree = rows.begin_trees ? no_tree() : load_tree(trees, i_tree);
    UNROLL for (int j = 0; j < FLOAT_STEPS; j++)
        UNROLL for (int t = 0; t < ROWS_MOST; t++)
            if (t < rows.count)
                tree.of[j] = add_tree_sums(tree.of[j], term(&terms, t, j, around));
    if (rows.end_trees)
        add_tree_to_columns(tree, sums, i);
    else
        store_tree(trees, i_tree, tree);
}

ADD_ROWS(add_products_of_rows, add_rows_to_trees, product_term)
ADD_ROWS(add_relu_products_of_rows, add_rows_to_trees, relu_product_term)
ADD_ROWS(add_leaky_products_of_rows, add_rows_to_trees, leaky_product_term)
ADD_ROWS(add_bits_products_of_rows, add_rows_to_trees, bits_product_term)

static void NAME(column_tree_products)(const void *dy, const void *x, const fastbn_matrix *matrix,
                                       const double *mean, const fastbn_gate *gate, double *first,
                                       double *second)
{
    const int kind = NAME(kind_of_gate)(gate);
    if (kind == FASTBN_RELU)
        NAME(sum_columns)(NAME(add_relu_products_of_rows), 1, 2, 0, dy, x, matrix, mean, gate,
                          no_bits(), first, second);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(sum_columns)(NAME(add_leaky_products_of_rows), 1, 2, 0, dy, x, matrix, mean, gate,
                          no_bits(), first, second);
    else if (WRITES_PASSED && kind == BY_BITS)
        NAME(sum_columns)(NAME(add_bits_products_of_rows), 1, 2, 0, dy, x, matrix, mean, NULL,
                          bits_of_gate(gate), first, second);
    else
        NAME(sum_matrix)(NAME(add_products_of_rows), 1, 2, dy, x, matrix, mean, first, second);
}
