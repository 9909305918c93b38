/* Results of each element, for one dtype; dtype.h includes this file. */

/* What rounding to type A takes from a mean. */
ALWAYS_INLINE double NAME(rest)(double mean) { return mean - (double)(A)mean; }

ALWAYS_INLINE void NAME(narrow)(const double *from, ptrdiff_t count, A *to)
{
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = (A)from[c];
}

#define Y(x, centre, scale, shift) (((x) - (centre)) * (scale) + (shift))
#define DX(dy, x, dy_mean, rest, x_mean, slope, scale) \
    (((((dy) - (dy_mean)) - (rest)) - ((x) - (x_mean)) * (slope)) * (scale))

/* The coefficients of Y for some channels; the shift takes up the rest of the mean. */
typedef struct {
    A centre[COLUMNS], scale[COLUMNS], shift[COLUMNS];
} NAME(affine);

/* Those of one channel. */
typedef struct {
    A centre, scale, shift;
} NAME(affine_of_run);

ALWAYS_INLINE NAME(affine_of_run) NAME(affine_of)(const NAME(affine) *k, ptrdiff_t c)
{
    return (NAME(affine_of_run)){k->centre[c], k->scale[c], k->shift[c]};
}

NOT_INLINE void NAME(narrow_affine)(const fastbn_affine *affine, ptrdiff_t count, NAME(affine) *to)
{
    NAME(narrow)(affine->centre, count, to->centre);
    NAME(narrow)(affine->scale, count, to->scale);
    for (ptrdiff_t c = 0; c < count; c++) {
        const double rest = NAME(rest)(affine->centre[c]);
        /* Of an infinite scale 0 would be NaN. The product is computed in any case: no branch. */
        const double product = rest * affine->scale[c];
        to->shift[c] = (A)(affine->shift[c] - (rest == 0 ? 0 : product));
    }
}

/* Those of DX; `rest` has those of both means. */
typedef struct {
    A dy_mean[COLUMNS], rest[COLUMNS], x_mean[COLUMNS], slope[COLUMNS], scale[COLUMNS];
} NAME(gradient_coefficients);

NOT_INLINE void NAME(narrow_gradient)(const fastbn_gradient *gradient, ptrdiff_t count,
                                      NAME(gradient_coefficients) *to)
{
    NAME(narrow)(gradient->dy_mean, count, to->dy_mean);
    NAME(narrow)(gradient->x_mean, count, to->x_mean);
    NAME(narrow)(gradient->slope, count, to->slope);
    NAME(narrow)(gradient->scale, count, to->scale);
    for (ptrdiff_t c = 0; c < count; c++)
        to->rest[c] = (A)(NAME(rest)(gradient->dy_mean[c]) -
                          NAME(rest)(gradient->x_mean[c]) * gradient->slope[c]);
}

/* Loads a register; the first one of as many elements as a cache line has prefetches what lies
 * `ahead` elements further on. */
ALWAYS_INLINE VA NAME(fetch)(const T *p, int is_first, ptrdiff_t ahead)
{
    if (is_first)
        PREFETCH(p + ahead);
    return NAME(load)(p);
}

enum {
    NAME(LINE) = CACHE_LINE / sizeof(T),
    NAME(REGISTERS) = NAME(LINE) / (sizeof(VA) / sizeof(A)), /* of a line */
    /* What a loop over a run stores before it branches: a line, two registers at least. With one
     * register it would take half as long again wherever the branch happens to cross 32 bytes of
     * code. */
    NAME(STRETCH) = sizeof(VA) / sizeof(A) * 2 > CACHE_LINE / sizeof(T)
                        ? sizeof(VA) / sizeof(A) * 2
                        : CACHE_LINE / sizeof(T),
};

/* The elements before the next address that stores are aligned to. A store that crosses a cache
 * line costs two. */
ALWAYS_INLINE ptrdiff_t NAME(unaligned)(const T *to)
{
    return (ptrdiff_t)(-(uintptr_t)to % (VA_LANES * sizeof(T)) / sizeof(T));
}

/* The elements before the next cache line. */
ALWAYS_INLINE ptrdiff_t NAME(before_line)(const T *to)
{
    return (ptrdiff_t)(-(uintptr_t)to % CACHE_LINE / sizeof(T));
}

/* How a register of results is written: a part of it, or all of it, stored or streamed. */
enum { NAME(PART), NAME(STORED), NAME(STREAMED) };

/* Stores a run. AT(i, is_first) is a register of values at i, loaded with a prefetch or without.
 * RESULT(how, v, i, from, count) makes results of it, and may write something else about `count`
 * lanes from lane `from` on: also where registers overlap, here and in all that follows, it is
 * called for each element once and, unless it goes backwards, in the order of memory. A whole
 * register is the one that AT has loaded last. ONE(i) is a single result.
 *
 * All stores are aligned but those of the first and the last register, which overlap others. What
 * they store is loaded before the loop, and all results are made before the first of the two is
 * stored: in place, they overwrite some of these elements. */
#define STORE_RUN(to, len, AT, ONE, RESULT) \
    do { \
        const ptrdiff_t last = (len)-VA_LANES; \
        if (last < 0) { \
            for (ptrdiff_t i = 0; i < (len); i++) \
                (to)[i] = NAME(encode)(ONE(i)); \
            break; \
        } \
        ptrdiff_t i = NAME(unaligned)(to); \
        const VA begin = AT(0, 1), end = AT(last, 0); \
        const VA begin_results = RESULT(NAME(PART), begin, 0, 0, i); \
        NO_UNROLL for (; i + NAME(STRETCH) - VA_LANES < last; i += NAME(STRETCH)) \
            UNROLL for (ptrdiff_t j = 0; j < NAME(STRETCH); j += VA_LANES) \
                NAME(store)((to) + i + j, RESULT(NAME(STORED), AT(i + j, j % NAME(LINE) == 0), \
                                                 i + j, 0, VA_LANES)); \
        NO_UNROLL for (; i < last; i += VA_LANES) \
            NAME(store)((to) + i, RESULT(NAME(STORED), AT(i, 1), i, 0, VA_LANES)); \
        const VA end_results = RESULT(NAME(PART), end, last, i - last, (len)-i); \
        NAME(store)(to, begin_results); \
        NAME(store)((to) + last, end_results); \
    } while (0)

/* Values that are results already. */
#define AS_IT_IS(how, v, i, from, count) ((void)(from), (void)(count), (v))

/* Stores the runs of several channels, one behind the other, of at least a register each, from an
 * element up to a stop in the last run, between which there are whole registers. OF(c) are the
 * coefficients of channel c, a struct of type `type`. AT(k, i, is_first) is the register at i,
 * counted from the first run on, with coefficients k, and STORE(to, v) stores its results. A
 * register that reaches over the end of a run into the next one has the values of both. The
 * coefficients are local values: what is stored cannot change them, so that they stay in registers.
 */
#define EACH_RUN(to, channels, len, start, stop, type, OF, AT, RESULT, STORE, HOW) \
    do { \
        ptrdiff_t i = (start); \
        for (ptrdiff_t c = 0, border = (len); c < (channels); c++, border += (len)) { \
            const ptrdiff_t end = smaller(border, stop); \
            const type of_run = OF(c); \
            NO_UNROLL for (; i + NAME(STRETCH) <= end; i += NAME(STRETCH)) \
                UNROLL for (ptrdiff_t j = 0; j < NAME(STRETCH); j += VA_LANES) \
                    STORE((to) + i + j, RESULT(HOW, AT(of_run, i + j, j % NAME(LINE) == 0), i + j, \
                                               0, VA_LANES)); \
            NO_UNROLL for (; i + VA_LANES <= end; i += VA_LANES) \
                STORE((to) + i, RESULT(HOW, AT(of_run, i, 1), i, 0, VA_LANES)); \
            if (i < border && c + 1 < (channels)) { \
                const uint32_t of_this_run = ((uint32_t)1 << (border - i)) - 1; \
                const type of_next = OF(c + 1); \
                const VA v = IF_BITS_A(of_this_run, AT(of_run, i, 1), AT(of_next, i, 0)); \
                STORE((to) + i, RESULT(HOW, v, i, 0, VA_LANES)); \
                i += VA_LANES; \
            } \
        } \
    } while (0)

/* Stores such runs as a whole, aligned like STORE_RUN. */
#define STORE_RUNS(to, channels, len, type, OF, AT, RESULT) \
    do { \
        const ptrdiff_t whole = (channels) * (len), last = whole - VA_LANES; \
        const ptrdiff_t head = NAME(unaligned)(to), tail = (whole - head) % VA_LANES; \
        const type of_first = OF(0), of_last = OF((channels)-1); \
        const VA begin = AT(of_first, 0, 1), end = AT(of_last, last, 0); \
        const VA begin_results = RESULT(NAME(PART), begin, 0, 0, head); \
        EACH_RUN(to, channels, len, head, whole, type, OF, AT, RESULT, NAME(store), \
                 NAME(STORED)); \
        const VA end_results = RESULT(NAME(PART), end, last, VA_LANES - tail, tail); \
        NAME(store)(to, begin_results); \
        NAME(store)((to) + last, end_results); \
    } while (0)

/* How many of the lanes of a register are among the first `count` elements. */
ALWAYS_INLINE ptrdiff_t NAME(lanes_among)(ptrdiff_t count)
{
    return count < 0 ? 0 : smaller(count, VA_LANES);
}

/* Stores a run like STORE_RUN, but whole cache lines by non-temporal stores, from the last to the
 * first if it goes backwards; the elements before the first of them, and behind the last, by
 * ordinary ones. These are computed first: in place, they share lines with what is streamed. A run
 * has several lines. */
#if HAS_NONTEMPORAL
ALWAYS_INLINE void NAME(stream)(T *to, VA v)
{
    copy_register_nontemporal((char *)to, (const char *)&v);
}

/* The elements before the first whole line, from the first registers of the run, and those behind
 * the last one, from its last registers. */
#  define STORE_HEAD(to, head, first, RESULT) \
    do { \
        T line[NAME(LINE)]; \
        UNROLL for (ptrdiff_t i = 0; i < NAME(LINE); i += VA_LANES) \
            NAME(store)(line + i, RESULT(NAME(PART), (first)[i / VA_LANES], i, 0, \
                                         NAME(lanes_among)((head)-i))); \
        memcpy(to, line, (size_t)(head) * sizeof(T)); \
    } while (0)
#  define STORE_TAIL(to, len, tail, last, RESULT) \
    do { \
        const ptrdiff_t skipped = NAME(LINE) - (tail), start = (len)-NAME(LINE); \
        T line[NAME(LINE)]; \
        UNROLL for (ptrdiff_t i = 0; i < NAME(LINE); i += VA_LANES) { \
            const ptrdiff_t from = NAME(lanes_among)(skipped - i); \
            NAME(store)(line + i, RESULT(NAME(PART), (last)[i / VA_LANES], start + i, from, \
                                         VA_LANES - from)); \
        } \
        memcpy((to) + start + skipped, line + skipped, (size_t)(tail) * sizeof(T)); \
    } while (0)

#  define STREAM_RUN(to, len, backwards, AT, RESULT) \
    do { \
        const ptrdiff_t head = NAME(before_line)(to); \
        const ptrdiff_t tail = ((len)-head) % NAME(LINE); \
        VA first[NAME(REGISTERS)], last[NAME(REGISTERS)]; \
        PREFETCH_TO_WRITE((to) + (len)-1); \
        UNROLL for (ptrdiff_t i = 0; i < NAME(LINE); i += VA_LANES) { \
            first[i / VA_LANES] = AT(i, 0); \
            last[i / VA_LANES] = AT((len)-NAME(LINE) + i, 0); \
        } \
        STORE_HEAD(to, head, first, RESULT); \
        STREAM_LINES(to, head, (len)-tail, backwards, AT, RESULT); \
        STORE_TAIL(to, len, tail, last, RESULT); \
    } while (0)
#  define STREAM_LINES(to, begin, end, backwards, AT, RESULT) \
    for (ptrdiff_t i = (backwards) ? (end)-NAME(LINE) : (begin), \
                   left = ((end) - (begin)) / NAME(LINE); \
         left > 0; i += (backwards) ? -NAME(LINE) : NAME(LINE), left--) { \
        VA v[NAME(REGISTERS)]; \
        UNROLL for (ptrdiff_t j = 0; j < NAME(LINE); j += VA_LANES) \
            v[j / VA_LANES] = RESULT(NAME(STREAMED), AT(i + j, j == 0), i + j, 0, VA_LANES); \
        UNROLL for (ptrdiff_t j = 0; j < NAME(LINE); j += VA_LANES) \
            copy_register_nontemporal((char *)((to) + i + j), (const char *)&v[j / VA_LANES]); \
    }

/* Stores runs of several channels like STORE_RUNS, but whole lines like STREAM_RUN, forwards. A run
 * has a line, or more. */
#  define STREAM_RUNS(to, channels, len, type, OF, AT, RESULT) \
    do { \
        const type of_first = OF(0), of_last = OF((channels)-1); \
        const ptrdiff_t whole = (channels) * (len); \
        const ptrdiff_t head = NAME(before_line)(to); \
        const ptrdiff_t tail = (whole - head) % NAME(LINE); \
        VA first[NAME(REGISTERS)], last[NAME(REGISTERS)]; \
        UNROLL for (ptrdiff_t i = 0; i < NAME(LINE); i += VA_LANES) { \
            first[i / VA_LANES] = AT(of_first, i, 0); \
            last[i / VA_LANES] = AT(of_last, whole - NAME(LINE) + i, 0); \
        } \
        STORE_HEAD(to, head, first, RESULT); \
        EACH_RUN(to, channels, len, head, whole - tail, type, OF, AT, RESULT, NAME(stream), \
                 NAME(STREAMED)); \
        STORE_TAIL(to, whole, tail, last, RESULT); \
    } while (0)
#else
#  define STREAM_RUN(to, len, backwards, AT, RESULT) (void)0
#  define STREAM_RUNS(to, channels, len, type, OF, AT, RESULT) (void)0
#endif

/* Where a kernel writes: straight to the output or, where non-temporal stores of what it writes at
 * a time would not be whole lines, into a buffer that is copied there in whole lines when it is
 * full. */
enum {
    NAME(BUFFER) = BUFFER_BYTES / sizeof(T),
    /* A register of results that are not narrower fills a non-temporal store. */
    NAME(MAY_STREAM) = HAS_NONTEMPORAL && sizeof(T) == sizeof(A),
};

typedef struct {
    T *to;
    int streams, buffers, backwards;
    ptrdiff_t capacity, filled; /* elements of the buffer; PTRDIFF_MAX without one */
    T buffer[NAME(BUFFER)];
} NAME(writer);

/* For runs of `len` elements, whose lines are streamed backwards or not, if they may be. */
ALWAYS_INLINE void NAME(init_writer)(NAME(writer) *w, int may_stream, int nontemporal,
                                     ptrdiff_t len, int backwards)
{
    w->backwards = backwards;
    w->streams = may_stream && nontemporal && len * (ptrdiff_t)sizeof(T) >= STREAM_BYTES;
    w->buffers = nontemporal && !w->streams;
}

/* Writes from another place of the output on. */
ALWAYS_INLINE void NAME(start)(NAME(writer) *w, T *to)
{
    w->to = to;
    w->capacity = w->buffers ? NAME(BUFFER) - (ptrdiff_t)((uintptr_t)to % CACHE_LINE / sizeof(T))
                             : PTRDIFF_MAX;
    w->filled = 0;
}

ALWAYS_INLINE T *NAME(position)(NAME(writer) *w)
{
    return (w->buffers ? w->buffer : w->to) + w->filled;
}

ALWAYS_INLINE void NAME(flush)(NAME(writer) *w)
{
    if (!w->buffers)
        return;
    copy_nontemporal((char *)w->to, (const char *)w->buffer, (size_t)w->filled * sizeof(T));
    w->to += w->filled;
    w->capacity = NAME(BUFFER);
    w->filled = 0;
}

/* Writes zeros straight to the output. */
ALWAYS_INLINE void NAME(write_zeros)(NAME(writer) *w, ptrdiff_t count)
{
    NAME(flush)(w);
    T *to = w->to + w->filled;
    memset(to, 0, (size_t)count * sizeof(T));
    NAME(start)(w, to + count);
}

ALWAYS_INLINE void NAME(advance)(NAME(writer) *w, ptrdiff_t count)
{
    w->filled += count;
    if (w->filled == w->capacity)
        NAME(flush)(w);
}

/* How many elements are written next. Where only a part of them is streamed, it ends with a line,
 * and what is left has several lines, too. */
ALWAYS_INLINE ptrdiff_t NAME(fitting)(const NAME(writer) *w, int may_stream, ptrdiff_t left)
{
    const ptrdiff_t n = smaller(left, w->capacity - w->filled);
    if (!may_stream || !w->streams || n == left)
        return n;
    const ptrdiff_t part = smaller(n, left / 2);
    return part - (ptrdiff_t)((uintptr_t)(w->to + w->filled + part) % CACHE_LINE / sizeof(T));
}

/* Whether the runs of a sample are stored as a whole. */
ALWAYS_INLINE int NAME(stores_runs)(const NAME(writer) *w, const fastbn_runs *runs)
{
    return !w->streams && !w->buffers && runs->len >= VA_LANES;
}

/* Whether they are streamed as a whole, instead of one by one or through the buffer. */
ALWAYS_INLINE int NAME(streams_runs)(const NAME(writer) *w, const fastbn_runs *runs)
{
    return NAME(MAY_STREAM) && (w->streams || w->buffers) && !w->backwards &&
           runs->len >= NAME(LINE);
}

/* Writes a run, as many elements at a time as there is room for; they begin at `i0`. */
#define WRITE_RUN(w, may_stream, len, AT, ONE, RESULT) \
    for (ptrdiff_t i0 = 0, n; i0 < (len); i0 += n) { \
        T *to = NAME(position)(w); \
        n = NAME(fitting)(w, may_stream, (len)-i0); \
        if ((may_stream) && (w)->streams) \
            STREAM_RUN(to, n, (w)->backwards, AT, RESULT); \
        else \
            STORE_RUN(to, n, AT, ONE, RESULT); \
        NAME(advance)(w, n); \
    }

/* A register of results at i of a run, and a single result, with 0 at invalid positions. */
#define MASKED_LANES(v, i) (masked ? MASKED_A(mask + (i), v) : (v))
#define MASKED_LANE(a, i) NAME(if_valid)(a, !masked || mask[i])

ALWAYS_INLINE A NAME(if_valid)(A a, int valid) { return valid ? a : (A)0; }

/* What a kernel is fused with: nothing; an activation that a clamp computes, alone, after a
 * residual, or after one and with bits; or an epilogue of any kind, with a mask or without, at the
 * price of branches. */
enum { NAME(PLAIN), NAME(ACTIVATED), NAME(ADDED), NAME(NOTED), NAME(WHOLE) };

#define ADDS(fused) \
    (fused == NAME(ADDED) || fused == NAME(NOTED) || \
     (fused == NAME(WHOLE) && epilogue->residual != NULL))
#define KEEPS_BITS(fused) \
    (fused == NAME(NOTED) || (fused == NAME(WHOLE) && epilogue->alive != NULL))

/* The bits of an epilogue from an element of x on. */
#define BEGIN_BITS(fused, bits, at) \
    if (KEEPS_BITS(fused)) \
        bits = begin_bits(epilogue->alive, epilogue->first + (at))
#define END_BITS(fused, bits) \
    if (KEEPS_BITS(fused)) \
        end_bits(&bits)

/* Its residual. */
ALWAYS_INLINE const T *NAME(residual_from)(int fused, const fastbn_epilogue *epilogue, ptrdiff_t at)
{
    return ADDS(fused) ? (const T *)epilogue->residual + at : NULL;
}

/* Normalized values at i of a run, as registers and as single ones, with the residual. */
#define PLUS_RESIDUAL(fused, z, i, is_first, ahead) \
    (ADDS(fused) ? (z) + NAME(fetch)(residual + i0 + (i), is_first, ahead) : (z))
#define ONE_PLUS_RESIDUAL(fused, z, i) (ADDS(fused) ? (z) + NAME(decode)(residual[i0 + (i)]) : (z))

/* Such values through the activation. If bits are kept, they tell of so many lanes from one on. */
ALWAYS_INLINE VA NAME(finish)(int fused, int keeps_bits, VA z, const NAME(activation) *activation,
                              bit_writer *bits, ptrdiff_t from, ptrdiff_t count)
{
    if (keeps_bits) {
        const uint32_t alive = NAME(alive_bits)(z, activation);
        write_bits(bits, alive >> from & (((uint32_t)1 << count) - 1), (int)count);
    }
    return fused == NAME(PLAIN) ? z : NAME(activate)(z, activation);
}
#define FINISHED(fused, z, from, count) \
    NAME(finish)(fused, KEEPS_BITS(fused), z, &activation, &bits, from, count)
#define ONE_FINISHED(fused, z) NAME(first_lane)(FINISHED(fused, NAME(all_lanes)(z), 0, 1))

/* Without prefetches, runs are of a register or more, and there is nothing but ordinary stores. */
ALWAYS_INLINE void NAME(normalize_runs)(int masked, int fused, int prefetches, const void *x_,
                                        void *y_, const fastbn_runs *runs,
                                        const fastbn_affine *affine,
                                        const fastbn_epilogue *epilogue, int nontemporal)
{
    NAME(affine) coefficients;
    NAME(activation) activation;
    NAME(writer) w;
    bit_writer bits;
    NAME(init_writer)(&w, NAME(MAY_STREAM), nontemporal, runs->len,
                      !KEEPS_BITS(fused) && follows_closely(y_, x_));
    NAME(narrow_affine)(affine, runs->channels, &coefficients);
    if (fused != NAME(PLAIN))
        activation = NAME(activation_of)(&epilogue->activation);
    if (fused != NAME(WHOLE)) /* the compiler does not know it */
        activation.is_clamped = 1;
#define OF(c) NAME(affine_of)(&coefficients, c)
    for (ptrdiff_t n = 0; n < runs->samples; n++) {
        const T *x = (const T *)x_ + n * runs->stride;
        T *y = (T *)y_ + n * runs->stride;
        const T *residual = NAME(residual_from)(fused, epilogue, n * runs->stride);
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead, residual_ahead = runs->residual_ahead;
        const int streams_runs = NAME(streams_runs)(&w, runs);
        const ptrdiff_t channels = runs->channels, len = runs->len;
        BEGIN_BITS(fused, bits, n * runs->stride);
#define AHEAD(i) prefetch_distance(ahead, i0 + (i))
#define RESIDUAL_AHEAD(i) prefetch_distance(residual_ahead, i0 + (i))
#define Z_AT(k, i, is_first) \
    PLUS_RESIDUAL(fused, \
                  Y(NAME(fetch)(x + i0 + (i), prefetches && (is_first), AHEAD(i)), (k).centre, \
                    (k).scale, (k).shift), \
                  i, is_first, RESIDUAL_AHEAD(i))
        if (!prefetches || fused == NAME(NOTED) ||
            (!masked && fused != NAME(WHOLE) && (streams_runs || NAME(stores_runs)(&w, runs)))) {
            enum { i0 = 0 };
#define RESULT(how, z, i, from, count) FINISHED(fused, z, from, count)
            if (NAME(MAY_STREAM) && streams_runs)
                STREAM_RUNS(y, channels, len, NAME(affine_of_run), OF, Z_AT, RESULT);
            else
                STORE_RUNS(y, channels, len, NAME(affine_of_run), OF, Z_AT, RESULT);
#undef RESULT
            END_BITS(fused, bits);
            continue;
        }
        NAME(start)(&w, y);
        for (ptrdiff_t c = 0; c < channels; c++) {
            const NAME(affine_of_run) k = OF(c);
#define AT(i, is_first) Z_AT(k, i, is_first)
#define ONE(i) \
    MASKED_LANE(ONE_FINISHED(fused, ONE_PLUS_RESIDUAL(fused, \
                                                      Y(NAME(decode)(x[i0 + (i)]), k.centre, \
                                                        k.scale, k.shift), i)), \
                i0 + (i))
#define RESULT(how, z, i, from, count) MASKED_LANES(FINISHED(fused, z, from, count), i0 + (i))
            WRITE_RUN(&w, NAME(MAY_STREAM), len, AT, ONE, RESULT)
#undef RESULT
#undef ONE
#undef AT
            x += len, residual += ADDS(fused) ? len : 0;
            ahead.border -= len, residual_ahead.border -= len;
        }
        NAME(flush)(&w);
        END_BITS(fused, bits);
#undef Z_AT
#undef RESIDUAL_AHEAD
#undef AHEAD
    }
#undef OF
}

/* How an epilogue is fused. */
ALWAYS_INLINE int NAME(fused_with)(const fastbn_epilogue *epilogue)
{
    if (epilogue == NULL)
        return NAME(PLAIN);
    if (!NAME(is_clamped)(&epilogue->activation))
        return NAME(WHOLE);
    if (epilogue->residual != NULL)
        return epilogue->alive == NULL ? NAME(ADDED) : NAME(NOTED);
    return epilogue->alive == NULL ? NAME(ACTIVATED) : NAME(WHOLE);
}

static void NAME(normalize)(const void *x, void *y, const fastbn_runs *runs,
                            const fastbn_affine *affine, const fastbn_epilogue *epilogue,
                            int nontemporal)
{
    int fused = NAME(fused_with)(epilogue);
    /* A kernel of its own is made of runs that are stored or streamed as a whole. */
    if (fused == NAME(NOTED) && (runs->len < NAME(LINE) || (nontemporal && !NAME(MAY_STREAM))))
        fused = NAME(WHOLE);
    if (fused == NAME(WHOLE) || (runs->mask != NULL && fused != NAME(PLAIN)))
        NAME(normalize_runs)(runs->mask != NULL, NAME(WHOLE), 1, x, y, runs, affine, epilogue,
                             nontemporal);
    else if (runs->mask != NULL)
        NAME(normalize_runs)(1, NAME(PLAIN), 1, x, y, runs, affine, NULL, nontemporal);
    else if (fused == NAME(NOTED))
        NAME(normalize_runs)(0, NAME(NOTED), 1, x, y, runs, affine, epilogue, nontemporal);
    else if (fused == NAME(ADDED))
        NAME(normalize_runs)(0, NAME(ADDED), 1, x, y, runs, affine, epilogue, nontemporal);
    else if (fused == NAME(ACTIVATED))
        NAME(normalize_runs)(0, NAME(ACTIVATED), 1, x, y, runs, affine, epilogue, nontemporal);
    else if (runs->ahead.near == 0 && !nontemporal && runs->len >= VA_LANES)
        NAME(normalize_runs)(0, NAME(PLAIN), 0, x, y, runs, affine, NULL, 0);
    else
        NAME(normalize_runs)(0, NAME(PLAIN), 1, x, y, runs, affine, NULL, nontemporal);
}

/* A dy that passes as a whole or by bits, and where it is written then. */
typedef struct {
    const T *dy;
    run_bits bits;
    T *to;
    int streams;  /* whether what lies beside streamed lines of dx is streamed, too */
    VA of_loaded; /* what has passed of the register that was loaded last */
} NAME(passing);

ALWAYS_INLINE int NAME(kind_of_gradient)(const fastbn_gate *gate)
{
    const int is_written = WRITES_PASSED && gate != NULL && gate->passed != NULL;
    return is_written ? BESIDE_DX : NAME(kind_of_gate)(gate);
}

/* That which begins `at` elements behind the first one of the gate, beside a dx. */
ALWAYS_INLINE NAME(passing) NAME(passing_from)(const fastbn_gate *gate, const T *dy, ptrdiff_t at,
                                               const T *dx)
{
    T *to = (T *)gate->passed + at;
    const int fits = ((uintptr_t)to - (uintptr_t)dx) % CACHE_LINE == 0;
    return (NAME(passing)){dy, skip_bits(bits_of_gate(gate), at), to, to != dy && fits, {0}};
}

ALWAYS_INLINE void NAME(advance_passing)(NAME(passing) *run, ptrdiff_t count)
{
    run->dy += count;
    run->bits = skip_bits(run->bits, count);
    run->to += count;
}

/* What passes of the register at i. */
ALWAYS_INLINE VA NAME(passing_at)(const NAME(passing) *run, ptrdiff_t i, VA dy)
{
    return run->bits.alive == NULL ? dy : NAME(if_alive)(run->bits, i, dy);
}

/* The same of one that has just been loaded. */
ALWAYS_INLINE VA NAME(pass_loaded)(NAME(passing) *run, ptrdiff_t i, VA dy)
{
    run->of_loaded = NAME(passing_at)(run, i, dy);
    return run->of_loaded;
}

/* Writes what has passed of the register at i, or of `count` of its lanes from lane `from` on. */
ALWAYS_INLINE void NAME(write_passed)(const NAME(passing) *run, int how, ptrdiff_t i,
                                      ptrdiff_t from, ptrdiff_t count)
{
    if (how == NAME(PART)) {
        T lanes[VA_LANES];
        NAME(store)(lanes, NAME(passing_at)(run, i, NAME(load)(run->dy + i)));
        memcpy(run->to + i + from, lanes + from, (size_t)count * sizeof(T));
        return;
    }
#if HAS_NONTEMPORAL
    if (how == NAME(STREAMED) && run->streams) {
        NAME(stream)(run->to + i, run->of_loaded);
        return;
    }
#endif
    NAME(store)(run->to + i, run->of_loaded);
}

/* What passes of a single element, which is written. */
ALWAYS_INLINE A NAME(pass_one)(const NAME(passing) *run, ptrdiff_t i)
{
    const VA dy = NAME(all_lanes)(NAME(decode)(run->dy[i]));
    const A passed = NAME(first_lane)(NAME(passing_at)(run, i, dy));
    run->to[i] = NAME(encode)(passed);
    return passed;
}

/* dy at i of a run, or what passes of it, as a register and as a single one. */
#define DY_OR_PASSED(kind, dy, i) \
    (kind == BESIDE_DX ? NAME(pass_loaded)(&passing, i0 + (i), dy) : (dy))
#define ONE_DY_OR_PASSED(kind, dy, i) \
    (kind == BESIDE_DX ? NAME(pass_one)(&passing, i0 + (i)) : NAME(decode)((dy)[i0 + (i)]))

/* A register of results; before it, what has passed is written. */
ALWAYS_INLINE VA NAME(after_passed)(int kind, int how, VA v, const NAME(passing) *run, ptrdiff_t i,
                                    ptrdiff_t from, ptrdiff_t count)
{
    if (kind == BESIDE_DX)
        NAME(write_passed)(run, how, i, from, count);
    return v;
}
#define AFTER_PASSED(kind, how, v, i, from, count) \
    NAME(after_passed)(kind, how, v, &passing, i0 + (i), from, count)

/* Whether x tells what passes. */
#define HAS_BOUNDS(kind) (kind == FASTBN_RELU || kind == FASTBN_LEAKY_RELU)

/* dx from what has passed a gate. */
ALWAYS_INLINE VA NAME(gated_dx)(NAME(dy_and_x) passed, VA dy_mean, VA rest, VA x_mean, VA slope,
                                VA scale)
{
    return DX(passed.dy, passed.x, dy_mean, rest, x_mean, slope, scale);
}

/* The coefficients of one channel; without a gate, its bounds are 0. */
typedef struct {
    A dy_mean, rest, x_mean, slope, scale, low, high;
} NAME(gradient_of_run);

ALWAYS_INLINE NAME(gradient_of_run) NAME(gradient_of)(const NAME(gradient_coefficients) *k,
                                                      const NAME(gates) *gates, ptrdiff_t c)
{
    return (NAME(gradient_of_run)){k->dy_mean[c],
                                   k->rest[c],
                                   k->x_mean[c],
                                   k->slope[c],
                                   k->scale[c],
                                   gates == NULL ? 0 : gates->low[c],
                                   gates == NULL ? 0 : gates->high[c]};
}

/* dx of what passes the gate of one channel. */
ALWAYS_INLINE VA NAME(gated_dx_of_run)(int kind, VA dy, VA x, const NAME(activation) *activation,
                                       NAME(gradient_of_run) k)
{
    return NAME(gated_dx)(NAME(pass)(kind, dy, x, activation, NAME(all_lanes)(k.low),
                                     NAME(all_lanes)(k.high)),
                          NAME(all_lanes)(k.dy_mean), NAME(all_lanes)(k.rest),
                          NAME(all_lanes)(k.x_mean), NAME(all_lanes)(k.slope),
                          NAME(all_lanes)(k.scale));
}

ALWAYS_INLINE void NAME(gradient_runs)(int masked, int kind, const void *dy_, const void *x_,
                                       void *dx_, const fastbn_runs *runs,
                                       const fastbn_gradient *gradient, const fastbn_gate *gate,
                                       int nontemporal)
{
    const int gated = HAS_BOUNDS(kind);
    NAME(gradient_coefficients) coefficients;
    NAME(gates) gates;
    NAME(writer) w;
    NAME(init_writer)(&w, NAME(MAY_STREAM), nontemporal, runs->len,
                      follows_closely(dx_, x_) || follows_closely(dx_, dy_));
    NAME(narrow_gradient)(gradient, runs->channels, &coefficients);
    if (gated)
        NAME(narrow_gates)(gate, runs->channels, &gates);
    for (ptrdiff_t n = 0; n < runs->samples; n++) {
        const T *dy = (const T *)dy_ + n * runs->stride, *x = (const T *)x_ + n * runs->stride;
        const uint8_t *mask = masked ? runs->mask + n * runs->mask_stride : NULL;
        fastbn_ahead ahead = runs->ahead;
        NAME(passing) passing;
        if (kind == BESIDE_DX)
            passing = NAME(passing_from)(gate, dy, n * runs->stride, (T *)dx_ + n * runs->stride);
#define AHEAD(i) prefetch_distance(ahead, i0 + (i))
#define DY_AT(i, is_first) NAME(fetch)(dy + i0 + (i), is_first, AHEAD(i))
#define X_AT(i, is_first) NAME(fetch)(x + i0 + (i), is_first, AHEAD(i))
#define GATED(k, dy, x) NAME(gated_dx_of_run)(kind, dy, x, &gates.activation, k)
#define OF(c) NAME(gradient_of)(&coefficients, gated ? &gates : NULL, c)
#define DX_AT(k, i, is_first) \
    (gated ? GATED(k, DY_AT(i, is_first), X_AT(i, is_first)) \
           : DX(DY_OR_PASSED(kind, DY_AT(i, is_first), i), X_AT(i, is_first), (k).dy_mean, \
                (k).rest, (k).x_mean, (k).slope, (k).scale))
#define RESULT(how, v, i, from, count) AFTER_PASSED(kind, how, v, i, from, count)
        const int streams_runs = NAME(streams_runs)(&w, runs);
        const ptrdiff_t channels = runs->channels, len = runs->len;
        if (!masked && (streams_runs || NAME(stores_runs)(&w, runs))) {
            enum { i0 = 0 };
            T *dx = (T *)dx_ + n * runs->stride;
            if (NAME(MAY_STREAM) && streams_runs)
                STREAM_RUNS(dx, channels, len, NAME(gradient_of_run), OF, DX_AT, RESULT);
            else
                STORE_RUNS(dx, channels, len, NAME(gradient_of_run), OF, DX_AT, RESULT);
            continue;
        }
        NAME(start)(&w, (T *)dx_ + n * runs->stride);
        for (ptrdiff_t c = 0; c < channels; c++, dy += len, x += len) {
            const NAME(gradient_of_run) k = OF(c);
#define AT(i, is_first) MASKED_LANES(DX_AT(k, i, is_first), i0 + (i))
#define ONE(i) \
    (gated ? NAME(first_lane)(GATED(k, NAME(all_lanes)(NAME(decode)(dy[i0 + (i)])), \
                                    NAME(all_lanes)(NAME(decode)(x[i0 + (i)])))) \
           : MASKED_LANE(DX(ONE_DY_OR_PASSED(kind, dy, i), NAME(decode)(x[i0 + (i)]), k.dy_mean, \
                            k.rest, k.x_mean, k.slope, k.scale), i0 + (i)))
            WRITE_RUN(&w, NAME(MAY_STREAM), len, AT, ONE, RESULT)
#undef AT
#undef ONE
            ahead.border -= len;
            if (kind == BESIDE_DX)
                NAME(advance_passing)(&passing, len);
        }
        NAME(flush)(&w);
#undef RESULT
#undef DX_AT
#undef OF
#undef GATED
#undef X_AT
#undef DY_AT
#undef AHEAD
    }
}

static void NAME(gradient)(const void *dy, const void *x, void *dx, const fastbn_runs *runs,
                           const fastbn_gradient *gradient, const fastbn_gate *gate,
                           int nontemporal)
{
    const int kind = NAME(kind_of_gradient)(gate);
    if (kind == FASTBN_RELU)
        NAME(gradient_runs)(0, FASTBN_RELU, dy, x, dx, runs, gradient, gate, nontemporal);
    else if (kind == FASTBN_LEAKY_RELU)
        NAME(gradient_runs)(0, FASTBN_LEAKY_RELU, dy, x, dx, runs, gradient, gate, nontemporal);
    else if (WRITES_PASSED && kind == BESIDE_DX)
        NAME(gradient_runs)(0, BESIDE_DX, dy, x, dx, runs, gradient, gate, nontemporal);
    else if (runs->mask == NULL)
        NAME(gradient_runs)(0, FASTBN_LINEAR, dy, x, dx, runs, gradient, NULL, nontemporal);
    else
        NAME(gradient_runs)(1, FASTBN_LINEAR, dy, x, dx, runs, gradient, NULL, nontemporal);
}

/* The column layout: a row is a run whose coefficients differ from column to column. */

/* Finds the rows from the r-th one on that are written at once, and returns how many they are.
 * Several are taken as one if nothing lies between them and there is no mask: the ends of rows cost
 * less then. */
ALWAYS_INLINE ptrdiff_t NAME(rows_from)(const fastbn_matrix *matrix, ptrdiff_t r,
                                        fastbn_matrix *rows)
{
    ptrdiff_t count = matrix->rows - r;
    *rows = *matrix;
    rows->rows = count;
    if (matrix->mask == NULL && matrix->len == matrix->stride) {
        const ptrdiff_t together = smaller(COLUMNS / matrix->len, count);
        rows->len *= together, rows->stride *= together, rows->rows /= together;
        count -= count % together;
    }
    return count;
}

/* Coefficients of the columns lie so many elements further on, for those of aligned stores to be
 * aligned. */
ALWAYS_INLINE ptrdiff_t NAME(padding)(const T *to)
{
    return (VA_LANES - NAME(unaligned)(to)) % VA_LANES;
}

/* How far ahead rows that lie apart are prefetched: whole rows, of `prefetched` elements or
 * more. */
ALWAYS_INLINE ptrdiff_t NAME(rows_ahead)(const fastbn_matrix *matrix, ptrdiff_t prefetched)
{
    return matrix->stride * (prefetched / matrix->len + 1);
}

/* Whether the rows of a matrix, which have the same place in their lines, are streamed. */
ALWAYS_INLINE int NAME(streams_rows)(const fastbn_matrix *matrix, int nontemporal)
{
    return NAME(MAY_STREAM) && nontemporal && matrix->mask == NULL &&
           matrix->len >= NAME(LINE) && matrix->stride % NAME(LINE) == 0 &&
           matrix->rows * matrix->len * (ptrdiff_t)sizeof(T) >= STREAM_BYTES;
}

/* Writes such rows like STREAM_RUN. Where they lie one behind the other, lines reach over the end
 * of a row into the next one: behind the coefficients of the last column there are those of the
 * first ones. Those of a strip of a wider matrix lie apart, and each has ends of its own. */
#if HAS_NONTEMPORAL
#  define STREAM_ROWS(matrix, out, prefetched, backwards, AT, RESULT, BEGIN, END) \
    do { \
        const ptrdiff_t len = (matrix)->len, rows = (matrix)->rows, i0 = 0; \
        const int apart = len != (matrix)->stride; \
        const ptrdiff_t ahead = apart ? NAME(rows_ahead)(matrix, prefetched) : prefetched; \
        const uint8_t *mask = NULL; /* there is none */ \
        const ptrdiff_t head = NAME(before_line)(out); \
        const ptrdiff_t tail = ((apart ? len : rows * len) - head) % NAME(LINE); \
        for (ptrdiff_t n = 0; n < rows; n++) { \
            const ptrdiff_t r = (backwards) ? rows - 1 - n : n, row = r * (matrix)->stride; \
            const int begins = apart || r == 0, ends = apart || r + 1 == rows; \
            T *to = (T *)(out) + row; \
            BEGIN(row, begins); \
            if (begins && head > 0) { \
                VA first[NAME(REGISTERS)]; \
                UNROLL for (ptrdiff_t i = 0; i < NAME(LINE); i += VA_LANES) \
                    first[i / VA_LANES] = AT(i, 0); \
                STORE_HEAD(to, head, first, RESULT); \
            } \
            STREAM_LINES(to, head, ends ? len - tail : head + len, backwards, AT, RESULT); \
            if (ends && tail > 0) { \
                VA last[NAME(REGISTERS)]; \
                UNROLL for (ptrdiff_t i = 0; i < NAME(LINE); i += VA_LANES) \
                    last[i / VA_LANES] = AT(len - NAME(LINE) + i, 0); \
                STORE_TAIL(to, len, tail, last, RESULT); \
            } \
            END(ends); \
        } \
    } while (0)
#else
#  define STREAM_ROWS(matrix, out, prefetched, backwards, AT, RESULT, BEGIN, END) (void)0
#endif

/* Writes the rows of a matrix, and prefetches so many elements ahead. The mask of a row is spread
 * over its columns; one that is left out as a whole is zeros. BEGIN(row, begins) goes before a row,
 * which is so many elements behind the first one, and END(ends) behind it: one that begins does not
 * go on where the last one has ended. */
#define WRITE_ROWS(matrix, masked, out, nontemporal, prefetched, backwards, AT, ONE, RESULT, \
                   BEGIN, END) \
    if (!(masked) && NAME(streams_rows)(matrix, nontemporal)) \
        STREAM_ROWS(matrix, out, prefetched, backwards, AT, RESULT, BEGIN, END); \
    else \
        WRITE_ROWS_ONE_BY_ONE(matrix, masked, out, nontemporal, prefetched, AT, ONE, RESULT, \
                              BEGIN, END)
#define WRITE_ROWS_ONE_BY_ONE(matrix, masked, out, nontemporal, prefetched, AT, ONE, RESULT, \
                              BEGIN, END) \
    do { \
        const ptrdiff_t len = (matrix)->len, stride = (matrix)->stride; \
        const ptrdiff_t ahead = NAME(rows_ahead)(matrix, prefetched); \
        mask_step masks[COLUMNS / LANES]; \
        uint8_t mask[COLUMNS + LANES]; \
        NAME(writer) w; \
        NAME(init_writer)(&w, 0, nontemporal, len, 0); \
        if (masked) \
            COMMON(find_masks)(matrix, masks); \
        for (ptrdiff_t r = 0; r < (matrix)->rows; r++) { \
            const ptrdiff_t row = r * stride; \
            if (r == 0 || len != stride) \
                NAME(start)(&w, (T *)(out) + row); \
            if (!masked && leaves_out(matrix, r)) { \
                NAME(write_zeros)(&w, len); \
                continue; \
            } \
            BEGIN(row, 1); \
            if (masked) \
                spread_mask(matrix, r, masks, mask); \
            WRITE_RUN(&w, 0, len, AT, ONE, RESULT) \
            END(1); \
            if (r + 1 == (matrix)->rows || len != stride) \
                NAME(flush)(&w); \
        } \
    } while (0)

/* The coefficients of columns, and zeros for the lanes of a register that are no columns. */
ALWAYS_INLINE void NAME(spread)(const fastbn_matrix *matrix, const A *of_channel, A *to)
{
    memset(to, 0, sizeof(VA));
    SPREAD_A(matrix, of_channel, to);
    if (matrix->len >= (ptrdiff_t)(CACHE_LINE / sizeof(A)))
        memcpy(to + matrix->len, to, CACHE_LINE); /* for lines that reach into the next row */
}

ALWAYS_INLINE void NAME(normalize_rows)(int masked, int fused, const T *x, T *y,
                                        const fastbn_matrix *matrix, const fastbn_affine *affine,
                                        const fastbn_epilogue *epilogue, ptrdiff_t at,
                                        int nontemporal)
{
    CACHE_ALIGNED A k[3][COLUMNS + 2 * CACHE_LINE / sizeof(A)];
    const ptrdiff_t padding = NAME(padding)(y);
    A *centre = k[0] + padding, *scale = k[1] + padding, *shift = k[2] + padding;
    NAME(affine) of_channel;
    NAME(activation) activation;
    const T *residual;
    bit_writer bits;
    if (fused != NAME(PLAIN))
        activation = NAME(activation_of)(&epilogue->activation);
    if (fused != NAME(WHOLE)) /* the compiler does not know it */
        activation.is_clamped = 1;
    NAME(narrow_affine)(affine, matrix->channels, &of_channel);
    NAME(spread)(matrix, of_channel.centre, centre);
    NAME(spread)(matrix, of_channel.scale, scale);
    NAME(spread)(matrix, of_channel.shift, shift);
#define AT(i, is_first) \
    PLUS_RESIDUAL(fused, \
                  Y(NAME(fetch)(x + row + i0 + (i), is_first, ahead), LOAD_A(centre + i0 + (i)), \
                    LOAD_A(scale + i0 + (i)), LOAD_A(shift + i0 + (i))), \
                  i, is_first, ahead)
#define ONE(i) \
    MASKED_LANE(ONE_FINISHED(fused, \
                             ONE_PLUS_RESIDUAL(fused, \
                                               Y(NAME(decode)(x[row + i0 + (i)]), \
                                                 centre[i0 + (i)], scale[i0 + (i)], \
                                                 shift[i0 + (i)]), i)), \
                i0 + (i))
#define RESULT(how, z, i, from, count) MASKED_LANES(FINISHED(fused, z, from, count), i0 + (i))
#define BEGIN(row, begins) \
    residual = NAME(residual_from)(fused, epilogue, at + (row)); \
    if (begins) \
    BEGIN_BITS(fused, bits, at + (row))
#define END(ends) \
    if (ends) \
    END_BITS(fused, bits)
    WRITE_ROWS(matrix, masked, y, nontemporal, PREFETCHED,
               !KEEPS_BITS(fused) && follows_closely(y, x), AT, ONE, RESULT, BEGIN, END);
#undef END
#undef BEGIN
#undef RESULT
#undef ONE
#undef AT
}

static void NAME(column_normalize)(const void *x_, void *y_, const fastbn_matrix *matrix,
                                   const fastbn_affine *affine, const fastbn_epilogue *epilogue,
                                   int nontemporal)
{
    fastbn_matrix rows;
    const int fused = NAME(fused_with)(epilogue);
    for (ptrdiff_t r = 0, count; r < matrix->rows; r += count) {
        const ptrdiff_t at = r * matrix->stride;
        const T *x = (const T *)x_ + at;
        T *y = (T *)y_ + at;
        count = NAME(rows_from)(matrix, r, &rows);
        if (fused == NAME(WHOLE) || (masks_columns(&rows) && fused != NAME(PLAIN)))
            NAME(normalize_rows)(masks_columns(&rows), NAME(WHOLE), x, y, &rows, affine, epilogue,
                                 at, nontemporal);
        else if (masks_columns(&rows))
            NAME(normalize_rows)(1, NAME(PLAIN), x, y, &rows, affine, NULL, at, nontemporal);
        else if (fused == NAME(NOTED))
            NAME(normalize_rows)(0, NAME(NOTED), x, y, &rows, affine, epilogue, at, nontemporal);
        else if (fused == NAME(ADDED))
            NAME(normalize_rows)(0, NAME(ADDED), x, y, &rows, affine, epilogue, at, nontemporal);
        else if (fused == NAME(ACTIVATED))
            NAME(normalize_rows)(0, NAME(ACTIVATED), x, y, &rows, affine, epilogue, at,
                                 nontemporal);
        else
            NAME(normalize_rows)(0, NAME(PLAIN), x, y, &rows, affine, NULL, at, nontemporal);
    }
}

ALWAYS_INLINE void NAME(gradient_rows)(int masked, int kind, const T *dy, const T *x, T *dx,
                                       const fastbn_matrix *matrix,
                                       const fastbn_gradient *gradient, const fastbn_gate *gate,
                                       ptrdiff_t at, int nontemporal)
{
    const int gated = HAS_BOUNDS(kind);
    CACHE_ALIGNED A k[7][COLUMNS + 2 * CACHE_LINE / sizeof(A)];
    const ptrdiff_t padding = NAME(padding)(dx);
    A *dy_mean = k[0] + padding, *rest = k[1] + padding, *x_mean = k[2] + padding;
    A *slope = k[3] + padding, *scale = k[4] + padding;
    A *low = k[5] + padding, *high = k[6] + padding;
    NAME(gradient_coefficients) of_channel;
    NAME(gates) gates;
    NAME(activation) activation;
    NAME(passing) passing;
    NAME(narrow_gradient)(gradient, matrix->channels, &of_channel);
    NAME(spread)(matrix, of_channel.dy_mean, dy_mean);
    NAME(spread)(matrix, of_channel.rest, rest);
    NAME(spread)(matrix, of_channel.x_mean, x_mean);
    NAME(spread)(matrix, of_channel.slope, slope);
    NAME(spread)(matrix, of_channel.scale, scale);
    if (gated) {
        NAME(narrow_gates)(gate, matrix->channels, &gates);
        NAME(spread)(matrix, gates.low, low);
        NAME(spread)(matrix, gates.high, high);
        activation = gates.activation;
    }
#define DY_AT(i, is_first) NAME(fetch)(dy + row + i0 + (i), is_first, ahead)
#define X_AT(i, is_first) NAME(fetch)(x + row + i0 + (i), is_first, ahead)
#define GATED(dy, x, COEFFICIENT, i) \
    NAME(gated_dx)(NAME(pass)(kind, dy, x, &activation, COEFFICIENT(low, i), \
                              COEFFICIENT(high, i)), \
                   COEFFICIENT(dy_mean, i), COEFFICIENT(rest, i), COEFFICIENT(x_mean, i), \
                   COEFFICIENT(slope, i), COEFFICIENT(scale, i))
#define LOADED(table, i) LOAD_A(table + i0 + (i))
#define REPEATED(table, i) NAME(all_lanes)(table[i0 + (i)])
#define AT(i, is_first) \
    (gated ? GATED(DY_AT(i, is_first), X_AT(i, is_first), LOADED, i) \
           : MASKED_LANES(DX(DY_OR_PASSED(kind, DY_AT(i, is_first), i), X_AT(i, is_first), \
                             LOADED(dy_mean, i), LOADED(rest, i), LOADED(x_mean, i), \
                             LOADED(slope, i), LOADED(scale, i)), i0 + (i)))
#define ONE(i) \
    (gated ? NAME(first_lane)(GATED(NAME(all_lanes)(NAME(decode)(dy[row + i0 + (i)])), \
                                    NAME(all_lanes)(NAME(decode)(x[row + i0 + (i)])), \
                                    REPEATED, i)) \
           : MASKED_LANE(DX(ONE_DY_OR_PASSED(kind, dy + row, i), \
                            NAME(decode)(x[row + i0 + (i)]), dy_mean[i0 + (i)], rest[i0 + (i)], \
                            x_mean[i0 + (i)], slope[i0 + (i)], scale[i0 + (i)]), i0 + (i)))
#define RESULT(how, v, i, from, count) AFTER_PASSED(kind, how, v, i, from, count)
#define BEGIN(row, begins) \
    if (kind == BESIDE_DX) \
    passing = NAME(passing_from)(gate, dy + (row), at + (row), dx + (row))
#define END(ends) (void)0
    WRITE_ROWS(matrix, masked, dx, nontemporal, PREFETCHED_OF_TWO,
               follows_closely(dx, x) || follows_closely(dx, dy), AT, ONE, RESULT, BEGIN, END);
#undef END
#undef BEGIN
#undef RESULT
#undef AT
#undef ONE
#undef REPEATED
#undef LOADED
#undef GATED
#undef X_AT
#undef DY_AT
}

static void NAME(column_gradient)(const void *dy_, const void *x_, void *dx_,
                                  const fastbn_matrix *matrix, const fastbn_gradient *gradient,
                                  const fastbn_gate *gate, int nontemporal)
{
    fastbn_matrix rows;
    const int kind = NAME(kind_of_gradient)(gate);
    for (ptrdiff_t r = 0, count; r < matrix->rows; r += count) {
        const ptrdiff_t at = r * matrix->stride;
        const T *dy = (const T *)dy_ + at, *x = (const T *)x_ + at;
        T *dx = (T *)dx_ + at;
        count = NAME(rows_from)(matrix, r, &rows);
        if (kind == FASTBN_RELU)
            NAME(gradient_rows)(0, FASTBN_RELU, dy, x, dx, &rows, gradient, gate, at, nontemporal);
        else if (kind == FASTBN_LEAKY_RELU)
            NAME(gradient_rows)(0, FASTBN_LEAKY_RELU, dy, x, dx, &rows, gradient, gate, at,
                                nontemporal);
        else if (WRITES_PASSED && kind == BESIDE_DX)
            NAME(gradient_rows)(0, BESIDE_DX, dy, x, dx, &rows, gradient, gate, at, nontemporal);
        else if (!masks_columns(&rows))
            NAME(gradient_rows)(0, FASTBN_LINEAR, dy, x, dx, &rows, gradient, NULL, at,
                                nontemporal);
        else
            NAME(gradient_rows)(1, FASTBN_LINEAR, dy, x, dx, &rows, gradient, NULL, at,
                                nontemporal);
    }
}

/* ------------------------------------------------------------------ activations by themselves */

/* For LANES channels from c0 on, the first of the numbers, in their order, at which the value
 * before the activation is greater than a limit, or a NaN if `nans` says so; one behind infinity if
 * it is nowhere. In this order, or for a negative scale in the opposite one, the values do not
 * decrease: each operation of Y keeps the order, rounding included. An infinite scale makes a NaN
 * of the mean alone, and infinities of what is on its two sides. */
ALWAYS_INLINE void NAME(find_crossings)(const NAME(affine) *k, ptrdiff_t c0, A limit, int nans,
                                        ORDER_A *crossing)
{
    /* What the rounding of the operations of Y may move it by, relative to their operands. */
    const A near = sizeof(A) == sizeof(float) ? (A)0x1p-22 : (A)0x1p-51;
    const ORDER_A first = NAME(order_of)(-(A)INFINITY), behind = NAME(order_of)((A)INFINITY) + 1;
    A low[LANES], high[LANES];
    ORDER_A begin[LANES], end[LANES], open = 1;
#define VALUE(u) Y(k->scale[c0 + i] < 0 ? -(u) : (u), k->centre[c0 + i], k->scale[c0 + i], \
                   k->shift[c0 + i])
#define ABOVE(u) (-(ORDER_A)(nans ? !(VALUE(u) <= limit) : VALUE(u) > limit))
    for (int i = 0; i < LANES; i++) {
        const A centre = k->centre[c0 + i];
        const A x = centre + (limit - k->shift[c0 + i]) / k->scale[c0 + i];
        const A u = k->scale[c0 + i] < 0 ? -x : x;
        const A reach = (centre < 0 ? -centre : centre) * near + (u < 0 ? -u : u) * near;
        low[i] = u - reach, high[i] = u + reach;
    }
    for (int i = 0; i < LANES; i++) /* by itself: gcc would make a branch of `~a & b` */
        begin[i] = ABOVE(low[i]);
    for (int i = 0; i < LANES; i++) {
        const ORDER_A is_near = ~begin[i] & ABOVE(high[i]);
        begin[i] = (NAME(order_of)(low[i]) & is_near) | (first & ~is_near);
        end[i] = (NAME(order_of)(high[i]) & is_near) | (behind & ~is_near);
    }
    /* All bits of a choice are set, or none: compilers make masked stores, which take long, of
     * `?:`. */
    while (open) {
        open = 0;
        for (int i = 0; i < LANES; i++) {
            const ORDER_A from = begin[i], to = end[i];
            const ORDER_A middle = (from & to) + ((from ^ to) >> 1);
            const ORDER_A is_open = -(ORDER_A)(from < to), is_above = ABOVE(NAME(value_of)(middle));
            end[i] = (middle & is_above & is_open) | (to & ~(is_above & is_open));
            begin[i] = ((middle + 1) & ~is_above & is_open) | (from & ~(~is_above & is_open));
            open |= is_open;
        }
    }
    memcpy(crossing + c0, begin, sizeof begin);
#undef ABOVE
#undef VALUE
}

static void NAME(gate_bounds)(const fastbn_affine *affine, const fastbn_activation *activation_,
                              ptrdiff_t count, double *low, double *high)
{
    const NAME(activation) activation = NAME(activation_of)(activation_);
    const int is_relu = activation.kind == FASTBN_RELU;
    const int is_capped = is_relu && activation.cap < (A)INFINITY;
    const ORDER_A last = NAME(order_of)((A)INFINITY);
    NAME(affine) k;
    ORDER_A begin[COLUMNS], behind[COLUMNS];
    NAME(narrow_affine)(affine, count, &k);
    for (ptrdiff_t c = count; c % LANES != 0; c++) /* channels whose bounds are found at once */
        k.centre[c] = k.shift[c] = 0, k.scale[c] = 1;
    for (ptrdiff_t c = 0; c < count; c += LANES) {
        if (is_relu)
            NAME(find_crossings)(&k, c, 0, 1, begin);
        if (!is_relu || is_capped)
            NAME(find_crossings)(&k, c, activation.high, 0, behind);
    }
    for (ptrdiff_t c = 0; c < count; c++) {
        const A first = !is_relu          ? -(A)INFINITY
                        : begin[c] > last ? (A)INFINITY
                                          : NAME(value_of)(begin[c]);
        const A end = !is_relu || is_capped ? NAME(value_of)(behind[c] - 1) : (A)INFINITY;
        low[c] = k.scale[c] < 0 ? -end : first;
        high[c] = k.scale[c] < 0 ? -first : end;
    }
}

/* to = dy times the derivative at a value of which a bit tells, the first of these being the one at
 * `from`, or y, the output of the activation. */
ALWAYS_INLINE void NAME(derive_run)(int by_bits, int is_relu, const T *dy, const T *y,
                                    const uint8_t *bits, size_t from, ptrdiff_t count,
                                    const NAME(activation) *activation, T *to)
{
    const VA low = NAME(all_lanes)(activation->low), high = NAME(all_lanes)(activation->high);
    const VA zeros = {0};
#define DERIVE(dy, y, i) \
    (by_bits ? IF_BITS_A(bits_from(bits, from + (size_t)(i)), dy, \
                         is_relu ? zeros : (dy)*activation->slope) \
             : NAME(derive)(is_relu, dy, y, activation, low, high))
#define AT(i, is_first) \
    DERIVE(NAME(load)(dy + (i)), by_bits ? zeros : NAME(load)(y + (i)), i)
#define ONE(i) \
    NAME(first_lane)(DERIVE(NAME(all_lanes)(NAME(decode)(dy[i])), \
                            NAME(all_lanes)(by_bits ? (A)0 : NAME(decode)(y[i])), i))
    STORE_RUN(to, count, AT, ONE, AS_IT_IS);
#undef ONE
#undef AT
#undef DERIVE
}

/* Of FASTBN_LINEAR the derivative is 1. */
static void NAME(activation_gradient)(const void *dy_, const void *y_, const unsigned char *alive,
                                      ptrdiff_t first, ptrdiff_t count,
                                      const fastbn_activation *activation_, void *to_)
{
    const NAME(activation) activation = NAME(activation_of)(activation_);
    const int is_relu = activation.kind == FASTBN_RELU;
    const T *dy = dy_, *y = y_;
    T *to = to_;
    if (activation.kind == FASTBN_LINEAR) {
        memmove(to, dy, (size_t)count * sizeof(T));
        return;
    }
    if (alive == NULL) {
        NAME(derive_run)(0, is_relu, dy, y, NULL, 0, count, &activation, to);
        return;
    }
    if (is_relu)
        NAME(derive_run)(1, 1, dy, NULL, alive, (size_t)first, count, &activation, to);
    else
        NAME(derive_run)(1, 0, dy, NULL, alive, (size_t)first, count, &activation, to);
}

#undef ONE_FINISHED
#undef FINISHED
#undef ONE_PLUS_RESIDUAL
#undef PLUS_RESIDUAL
#undef END_BITS
#undef BEGIN_BITS
#undef KEEPS_BITS
#undef ADDS
#undef MASKED_LANES
#undef MASKED_LANE
#undef WRITE_ROWS_ONE_BY_ONE
#undef WRITE_ROWS
#undef STREAM_ROWS
#undef STREAM_LINES
#undef STORE_TAIL
#undef STORE_HEAD
#undef WRITE_RUN
#undef STREAM_RUN
#undef STREAM_RUNS
#undef STORE_RUNS
#undef EACH_RUN
#undef AS_IT_IS
#undef STORE_RUN
