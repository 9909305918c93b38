/* Moments of some channels while results of others are streamed, for one dtype; dtype.h includes this
 * file. Non-temporal stores wait for memory, and additions for one another: in turns they take less
 * time than one after the other. */

/* Adds the moments of INTERLEAVED elements of a run, around a pivot by trees or raw. */
ALWAYS_INLINE step_sums NAME(add_stretch)(int by_trees, step_sums sums, const T *x, ptrdiff_t ahead,
                                          float_step pivot)
{
    const NAME(terms) terms = NAME(terms_of_run)(0, x, x, NULL, 0, ahead, NULL);
    if (by_trees)
        return NAME(add_whole_tree)(NAME(moment_term), sums, &terms, pivot);
    NO_UNROLL for (ptrdiff_t i = 0; i < INTERLEAVED; i += LANES)
        sums = NAME(add_raw_moments)(sums, x, x + i, ahead, same_step(0), NULL, terms.lanes);
    return sums;
}

/* Adds those of the end of a run, from the i-th element on. */
ALWAYS_INLINE step_sums NAME(add_last_stretch)(int by_trees, step_sums sums, const T *x,
                                               ptrdiff_t len, ptrdiff_t i, ptrdiff_t ahead,
                                               float_step pivot)
{
    T buffer[LANES];
    valid_lanes lanes = {0, NULL, 0, 0};
    if (by_trees)
        return add_tree(sums, NAME(add_end)(NAME(moment_term), no_tree(), 0, x, x, NULL, len, i,
                                            ahead, NULL, pivot));
    for (; i + LANES <= len; i += LANES)
        sums = NAME(add_raw_moments)(sums, x, x + i, ahead, same_step(0), NULL, lanes);
    lanes.skip = LANES - (len - i);
    if (i < len)
        sums = NAME(add_raw_moments)(sums, x, last_step(x, len, sizeof(T), buffer), 0, same_step(0),
                                     NULL, lanes);
    return sums;
}

/* Behind each stretch of a run that is summed as much of another one is written, as STREAM_RUNS
 * writes it. Sums are those of sum_runs and of sum_runs_by_trees. */
ALWAYS_INLINE void NAME(sum_beside_results)(int by_trees, int fused, const T *x,
                                            const fastbn_runs *runs, const double *pivot,
                                            double *first, double *second,
                                            const fastbn_results *results)
{
    enum { LINE = NAME(LINE) };
    const ptrdiff_t channels = runs->channels, len = runs->len, whole = channels * len;
    double sums[FASTBN_GROUP][2][LANES];
    T begin[LINE], end[LINE];
    NAME(affine) coefficients;
    NAME(activation) activation;
    NAME(narrow_affine)(results->affine, channels, &coefficients);
    if (fused == NAME(ACTIVATED)) {
        activation = NAME(activation_of)(results->activation);
        activation.is_clamped = 1; /* the compiler does not know it */
    }
#define OF(c) NAME(affine_of)(&coefficients, c)
#define NORMALIZED(k, i) Y(NAME(load)(from + (i)), (k).centre, (k).scale, (k).shift)
#define AT(k, i) \
    (fused == NAME(PLAIN) ? NORMALIZED(k, i) : NAME(activate)(NORMALIZED(k, i), &activation))
#define WRITE_UP_TO(stop) \
    NO_UNROLL for (; written + VA_LANES <= (stop); written += VA_LANES) \
        NAME(stream)(to + written, AT(k, written))
    for (ptrdiff_t n = 0; n < runs->samples; n++, x += runs->stride - whole) {
        const T *from = (const T *)results->x + n * results->stride;
        T *to = (T *)results->y + n * results->stride;
        const ptrdiff_t head = (ptrdiff_t)(-(uintptr_t)to % CACHE_LINE / sizeof(T));
        const ptrdiff_t tail = (whole - head) % LINE;
        const NAME(affine_of_run) of_first = OF(0), of_last = OF(channels - 1);
        fastbn_ahead ahead = runs->ahead;
        ptrdiff_t written = head;
        UNROLL for (ptrdiff_t i = 0; i < LINE; i += VA_LANES) {
            NAME(store)(begin + i, AT(of_first, i));
            NAME(store)(end + i, AT(of_last, whole - LINE + i));
        }
        for (ptrdiff_t c = 0; c < channels; c++, x += len, ahead.border -= len) {
            const NAME(affine_of_run) k = OF(c);
            const float_step around = same_float_step(by_trees ? pivot[c] : 0);
            const ptrdiff_t border = (c + 1) * len, stop = smaller(border, whole - tail);
            step_sums s = n == 0 ? no_sums() : load_sums(sums[c][0], sums[c][1]);
            ptrdiff_t i = 0;
            for (; i + INTERLEAVED <= len; i += INTERLEAVED) {
                s = NAME(add_stretch)(by_trees, s, x + i,
                                      prefetch_distance(ahead, by_trees ? i : 0), around);
                WRITE_UP_TO(smaller(c * len + i + INTERLEAVED, stop));
            }
            if (i < len)
                s = NAME(add_last_stretch)(by_trees, s, x, len, i,
                                           prefetch_distance(ahead, by_trees ? i : 0), around);
            store_sums(sums[c][0], sums[c][1], s);
            WRITE_UP_TO(stop);
            if (written < border && c + 1 < channels) { /* a register with results of both runs */
                const uint32_t bits = ((uint32_t)1 << (border - written)) - 1;
                const NAME(affine_of_run) next = OF(c + 1);
                NAME(stream)(to + written, IF_BITS_A(bits, AT(k, written), AT(next, written)));
                written += VA_LANES;
            }
        }
        memcpy(to, begin, (size_t)head * sizeof(T));
        memcpy(to + whole - tail, end + LINE - tail, (size_t)tail * sizeof(T));
    }
#undef WRITE_UP_TO
#undef AT
#undef NORMALIZED
#undef OF
    COMMON(add_lanes)(sums, channels, first, second);
}

static void NAME(moments_beside_results)(const void *x, const fastbn_runs *runs, const double *pivot,
                                         double *first, double *second,
                                         const fastbn_results *results)
{
    const int activates = results->activation != NULL;
    if (pivot == NULL && activates)
        NAME(sum_beside_results)(0, NAME(ACTIVATED), x, runs, NULL, first, second, results);
    else if (pivot == NULL)
        NAME(sum_beside_results)(0, NAME(PLAIN), x, runs, NULL, first, second, results);
    else if (activates)
        NAME(sum_beside_results)(1, NAME(ACTIVATED), x, runs, pivot, first, second, results);
    else
        NAME(sum_beside_results)(1, NAME(PLAIN), x, runs, pivot, first, second, results);
}
