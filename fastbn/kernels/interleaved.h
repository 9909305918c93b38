/* Sums of some channels while results of others are streamed, for one dtype; dtype.h includes this
 * file. Non-temporal stores wait for memory, and additions for one another: in turns they take less
 * time than one after the other. */

/* What is summed: x and x^2, deviations from a pivot, dy and its products, or those behind a
 * gate. */
enum { NAME(RAW_MOMENTS), NAME(MOMENTS), NAME(PRODUCTS), NAME(RELU_PRODUCTS) };

#define HAS_PRODUCTS(summed) (summed == NAME(PRODUCTS) || summed == NAME(RELU_PRODUCTS))

/* Adds INTERLEAVED elements of a run. */
ALWAYS_INLINE step_sums NAME(add_stretch)(int summed, step_sums sums, const T *dy, const T *x,
                                          ptrdiff_t ahead, const NAME(gate) *gate,
                                          float_step centre)
{
    const NAME(terms) terms = NAME(terms_of_run)(0, dy, x, NULL, 0, ahead, gate, no_bits());
    if (summed == NAME(RELU_PRODUCTS))
        return NAME(add_whole_tree)(NAME(relu_product_term), sums, &terms, centre);
    if (summed == NAME(PRODUCTS))
        return NAME(add_whole_tree)(NAME(product_term), sums, &terms, centre);
    if (summed == NAME(MOMENTS))
        return NAME(add_whole_tree)(NAME(moment_term), sums, &terms, centre);
    NO_UNROLL for (ptrdiff_t i = 0; i < INTERLEAVED; i += LANES)
        sums = NAME(add_raw_moments)(sums, x, x + i, ahead, same_step(0), NULL, terms.lanes);
    return sums;
}

/* Adds the end of a run, from the i-th element on. */
ALWAYS_INLINE step_sums NAME(add_last_stretch)(int summed, step_sums sums, const T *dy, const T *x,
                                               ptrdiff_t len, ptrdiff_t i, ptrdiff_t ahead,
                                               const NAME(gate) *gate, float_step centre)
{
    T buffer[LANES];
    valid_lanes lanes = {0, NULL, 0, 0};
#define END_BY_TREE(term) \
    add_tree(sums, NAME(add_end)(NAME(term), no_tree(), 0, dy, x, NULL, len, i, ahead, gate, \
                                 no_bits(), centre))
    if (summed == NAME(RELU_PRODUCTS))
        return END_BY_TREE(relu_product_term);
    if (summed == NAME(PRODUCTS))
        return END_BY_TREE(product_term);
    if (summed == NAME(MOMENTS))
        return END_BY_TREE(moment_term);
#undef END_BY_TREE
    for (; i + LANES <= len; i += LANES)
        sums = NAME(add_raw_moments)(sums, x, x + i, ahead, same_step(0), NULL, lanes);
    lanes.skip = LANES - (len - i);
    if (i < len)
        sums = NAME(add_raw_moments)(sums, x, last_step(x, len, sizeof(T), buffer), 0, same_step(0),
                                     NULL, lanes);
    return sums;
}

/* The coefficients of results, for all channels and for one: beside moments those of a
 * normalization, beside products those of a gradient. */
typedef struct {
    NAME(affine) affine;
    NAME(gradient_coefficients) gradient;
    NAME(gates) gates;
} NAME(coefficients);

typedef struct {
    NAME(affine_of_run) affine;
    NAME(gradient_of_run) gradient;
} NAME(coefficients_of_run);

ALWAYS_INLINE NAME(coefficients_of_run) NAME(coefficients_of)(int summed,
                                                              const NAME(coefficients) *k,
                                                              ptrdiff_t c)
{
    NAME(coefficients_of_run) r = {{0}, {0}};
    if (summed == NAME(RELU_PRODUCTS))
        r.gradient = NAME(gradient_of)(&k->gradient, &k->gates, c);
    else if (summed == NAME(PRODUCTS))
        r.gradient = NAME(gradient_of)(&k->gradient, NULL, c);
    else
        r.affine = NAME(affine_of)(&k->affine, c);
    return r;
}

/* After each stretch of a run has been summed, as many results of another run are written, in whole
 * lines as by STREAM_RUNS. Sums are those of sum_runs and of sum_runs_by_trees. */
ALWAYS_INLINE void NAME(sum_beside_results)(int summed, int fused, const T *dy, const T *x,
                                            const fastbn_runs *runs, const double *centre,
                                            const fastbn_gate *gate, double *first, double *second,
                                            const fastbn_results *results)
{
    enum { LINE = NAME(LINE) };
    const int by_trees = summed != NAME(RAW_MOMENTS);
    const ptrdiff_t channels = runs->channels, len = runs->len, whole = channels * len;
    double sums[FASTBN_GROUP][2][LANES];
    T begin[LINE], end[LINE]; /* of a sample: what is not whole lines is stored ordinarily */
    NAME(coefficients) coefficients;
    NAME(gates) gates;
    NAME(activation) activation;
    if (summed == NAME(RELU_PRODUCTS)) {
        NAME(narrow_gates)(gate, channels, &gates);
        NAME(narrow_gates)(results->gate, channels, &coefficients.gates);
    }
    if (HAS_PRODUCTS(summed))
        NAME(narrow_gradient)(results->gradient, channels, &coefficients.gradient);
    else
        NAME(narrow_affine)(results->affine, channels, &coefficients.affine);
    if (fused == NAME(ACTIVATED)) {
        activation = NAME(activation_of)(results->activation);
        activation.is_clamped = 1; /* the compiler does not know it */
    }
#define OF(c) NAME(coefficients_of)(summed, &coefficients, c)
#define NORMALIZED(k, i) Y(NAME(load)(from + (i)), (k).centre, (k).scale, (k).shift)
#define GRADIENT(k, dy, x) \
    (summed == NAME(RELU_PRODUCTS) \
         ? NAME(gated_dx_of_run)(FASTBN_RELU, dy, x, &coefficients.gates.activation, k) \
         : DX(dy, x, (k).dy_mean, (k).rest, (k).x_mean, (k).slope, (k).scale))
#define AT(k, i) \
    (HAS_PRODUCTS(summed) \
         ? GRADIENT((k).gradient, NAME(load)(dy_from + (i)), NAME(load)(from + (i))) \
     : fused == NAME(ACTIVATED) ? NAME(activate)(NORMALIZED((k).affine, i), &activation) \
                                : NORMALIZED((k).affine, i))
#define WRITE_UP_TO(stop) \
    NO_UNROLL for (; written + VA_LANES <= (stop); written += VA_LANES) \
        NAME(stream)(to + written, AT(k, written))
    for (ptrdiff_t n = 0; n < runs->samples; n++) {
        const T *from = (const T *)results->x + n * results->stride;
        const T *dy_from =
            HAS_PRODUCTS(summed) ? (const T *)results->dy + n * results->stride : from;
        T *to = (T *)results->to + n * results->stride;
        const ptrdiff_t head = NAME(before_line)(to);
        const ptrdiff_t tail = (whole - head) % LINE;
        const NAME(coefficients_of_run) of_first = OF(0), of_last = OF(channels - 1);
        fastbn_ahead ahead = runs->ahead;
        ptrdiff_t written = head;
        UNROLL for (ptrdiff_t i = 0; i < LINE; i += VA_LANES) {
            NAME(store)(begin + i, AT(of_first, i));
            NAME(store)(end + i, AT(of_last, whole - LINE + i));
        }
        for (ptrdiff_t c = 0; c < channels; c++, ahead.border -= len) {
            const T *dy_run = dy + n * runs->stride + c * len;
            const T *x_run = x + n * runs->stride + c * len;
            const NAME(coefficients_of_run) k = OF(c);
            const float_step around = same_float_step(by_trees ? centre[c] : 0);
            NAME(gate) own;
            if (summed == NAME(RELU_PRODUCTS))
                own = NAME(gate_of_run)(&gates, c);
            const ptrdiff_t border = (c + 1) * len, stop = smaller(border, whole - tail);
            step_sums s = n == 0 ? no_sums() : load_sums(sums[c][0], sums[c][1]);
            ptrdiff_t i = 0;
#define AHEAD prefetch_distance(ahead, by_trees ? i : 0) /* as sum_runs, or sum_runs_by_trees */
            for (; i + INTERLEAVED <= len; i += INTERLEAVED) {
                s = NAME(add_stretch)(summed, s, dy_run + i, x_run + i, AHEAD, &own, around);
                WRITE_UP_TO(smaller(c * len + i + INTERLEAVED, stop));
            }
            if (i < len)
                s = NAME(add_last_stretch)(summed, s, dy_run, x_run, len, i, AHEAD, &own, around);
#undef AHEAD
            store_sums(sums[c][0], sums[c][1], s);
            WRITE_UP_TO(stop);
            if (written < border && c + 1 < channels) { /* a register with results of both runs */
                const uint32_t bits = ((uint32_t)1 << (border - written)) - 1;
                const NAME(coefficients_of_run) next = OF(c + 1);
                NAME(stream)(to + written, IF_BITS_A(bits, AT(k, written), AT(next, written)));
                written += VA_LANES;
            }
        }
        memcpy(to, begin, (size_t)head * sizeof(T));
        memcpy(to + whole - tail, end + LINE - tail, (size_t)tail * sizeof(T));
    }
#undef WRITE_UP_TO
#undef AT
#undef GRADIENT
#undef NORMALIZED
#undef OF
    COMMON(add_lanes)(sums, channels, first, second);
}

static void NAME(moments_beside_results)(const void *x, const fastbn_runs *runs,
                                         const double *pivot, double *first, double *second,
                                         const fastbn_results *results)
{
    const int activates = results->activation != NULL;
    if (pivot == NULL && activates)
        NAME(sum_beside_results)(NAME(RAW_MOMENTS), NAME(ACTIVATED), x, x, runs, NULL, NULL,
                                 first, second, results);
    else if (pivot == NULL)
        NAME(sum_beside_results)(NAME(RAW_MOMENTS), NAME(PLAIN), x, x, runs, NULL, NULL, first,
                                 second, results);
    else if (activates)
        NAME(sum_beside_results)(NAME(MOMENTS), NAME(ACTIVATED), x, x, runs, pivot, NULL, first,
                                 second, results);
    else
        NAME(sum_beside_results)(NAME(MOMENTS), NAME(PLAIN), x, x, runs, pivot, NULL, first,
                                 second, results);
}

static void NAME(products_beside_results)(const void *dy, const void *x, const fastbn_runs *runs,
                                          const double *mean, const fastbn_gate *gate,
                                          double *first, double *second,
                                          const fastbn_results *results)
{
    if (gate == NULL)
        NAME(sum_beside_results)(NAME(PRODUCTS), NAME(PLAIN), dy, x, runs, mean, NULL, first,
                                 second, results);
    else
        NAME(sum_beside_results)(NAME(RELU_PRODUCTS), NAME(PLAIN), dy, x, runs, mean, gate, first,
                                 second, results);
}

#undef HAS_PRODUCTS
