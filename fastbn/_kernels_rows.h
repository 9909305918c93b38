/* The kernels of _kernels.h for one dtype. Included by _kernels.c, which defines
 *   T         the type of an element
 *   VT        a register of T, in which element-wise arithmetic is done
 *   NAME(f)   f's name for this dtype, with NAME(widen) there already
 */

enum { NAME(VT_LANES) = sizeof(VT) / sizeof(T) };

static void NAME(pivots)(const void *x_, ptrdiff_t rows, ptrdiff_t len, double *pivot)
{
    const T *x = x_;
    for (ptrdiff_t r = 0; r < rows; r++)
        pivot[r] = (double)x[r * len];
}

/* The last LANES elements of a run. Of a shorter run, all it has, behind something finite. */
ALWAYS_INLINE const T *NAME(tail)(const T *x, ptrdiff_t len, T *buffer)
{
    if (len >= LANES)
        return x + len - LANES;
    memset(buffer, 0, LANES * sizeof(T));
    memcpy(buffer + LANES - len, x, (size_t)len * sizeof(T));
    return buffer;
}

ALWAYS_INLINE registers NAME(add_moments)(const T *x, double pivot, long long skip, registers sums)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        vd d = NAME(widen)(x + j * VD) - pivot;
        if (skip)
            d = drop_below(skip, j, d);
        sums.first[j] += d;
        sums.second[j] += d * d;
    }
    return sums;
}

static void NAME(moments)(const void *x_, ptrdiff_t rows, ptrdiff_t len, const double *pivot,
                          fastbn_sums *sums)
{
    const T *x = x_;
    T buffer[LANES];
    for (ptrdiff_t r = 0; r < rows; r++, x += len) {
        registers s = load_sums(sums + r);
        ptrdiff_t i = 0;
        for (; i + LANES <= len; i += LANES)
            s = NAME(add_moments)(x + i, pivot[r], 0, s);
        if (i < len)
            s = NAME(add_moments)(NAME(tail)(x, len, buffer), pivot[r], LANES - (len - i), s);
        store_sums(sums + r, s);
    }
}

ALWAYS_INLINE registers NAME(add_products)(const T *dy, const T *x, double mean, long long skip,
                                           registers sums)
{
    UNROLL for (int j = 0; j < STEPS; j++) {
        vd g = NAME(widen)(dy + j * VD), d = NAME(widen)(x + j * VD) - mean;
        if (skip) {
            g = drop_below(skip, j, g);
            d = drop_below(skip, j, d);
        }
        sums.first[j] += g;
        sums.second[j] += g * d;
    }
    return sums;
}

static void NAME(products)(const void *dy_, const void *x_, ptrdiff_t rows, ptrdiff_t len,
                           const double *mean, fastbn_sums *sums)
{
    const T *dy = dy_, *x = x_;
    T dy_buffer[LANES], x_buffer[LANES];
    for (ptrdiff_t r = 0; r < rows; r++, dy += len, x += len) {
        registers s = load_sums(sums + r);
        ptrdiff_t i = 0;
        for (; i + LANES <= len; i += LANES)
            s = NAME(add_products)(dy + i, x + i, mean[r], 0, s);
        if (i < len)
            s = NAME(add_products)(NAME(tail)(dy, len, dy_buffer), NAME(tail)(x, len, x_buffer),
                                   mean[r], LANES - (len - i), s);
        store_sums(sums + r, s);
    }
}

ALWAYS_INLINE VT NAME(load)(const T *p)
{
    VT v;
    memcpy(&v, p, sizeof v);
    return v;
}

ALWAYS_INLINE void NAME(store)(T *p, VT v)
{
    memcpy(p, &v, sizeof v);
}

/* A number as the sum of two T: the second keeps what the first rounds away. */
typedef struct {
    T hi, lo;
} NAME(two);

ALWAYS_INLINE NAME(two) NAME(split)(double value)
{
    NAME(two) s;
    s.hi = (T)value;
    s.lo = (T)(value - (double)s.hi);
    return s;
}

#define CENTRED(v, mean) (((v) - (mean).hi) - (mean).lo)

/* Element-wise kernels end a run with a register that overlaps the one before it. It is loaded
 * first, since in place the loop overwrites a part of it. */

static void NAME(normalize)(const void *x_, void *y_, ptrdiff_t rows, ptrdiff_t len,
                            const fastbn_affine *affine)
{
    const T *x = x_;
    T *y = y_;
    const ptrdiff_t last = len - NAME(VT_LANES);
    for (ptrdiff_t r = 0; r < rows; r++, x += len, y += len) {
        const NAME(two) mean = NAME(split)(affine[r].centre);
        const T scale = (T)affine[r].scale, shift = (T)affine[r].shift;
#define NORMALIZED(v) (CENTRED(v, mean) * scale + shift)
        if (last < 0) {
            for (ptrdiff_t i = 0; i < len; i++)
                y[i] = NORMALIZED(x[i]);
            continue;
        }
        const VT end = NAME(load)(x + last);
        for (ptrdiff_t i = 0; i < last; i += NAME(VT_LANES))
            NAME(store)(y + i, NORMALIZED(NAME(load)(x + i)));
        NAME(store)(y + last, NORMALIZED(end));
#undef NORMALIZED
    }
}

static void NAME(gradient)(const void *dy_, const void *x_, void *dx_, ptrdiff_t rows,
                           ptrdiff_t len, const fastbn_gradient *gradient)
{
    const T *dy = dy_, *x = x_;
    T *dx = dx_;
    const ptrdiff_t last = len - NAME(VT_LANES);
    for (ptrdiff_t r = 0; r < rows; r++, dy += len, x += len, dx += len) {
        const NAME(two) dy_mean = NAME(split)(gradient[r].dy_mean);
        const NAME(two) x_mean = NAME(split)(gradient[r].x_mean);
        const T slope = (T)gradient[r].slope, scale = (T)gradient[r].scale;
#define GRADIENT(g, v) ((CENTRED(g, dy_mean) - CENTRED(v, x_mean) * slope) * scale)
        if (last < 0) {
            for (ptrdiff_t i = 0; i < len; i++)
                dx[i] = GRADIENT(dy[i], x[i]);
            continue;
        }
        const VT dy_end = NAME(load)(dy + last), x_end = NAME(load)(x + last);
        for (ptrdiff_t i = 0; i < last; i += NAME(VT_LANES))
            NAME(store)(dx + i, GRADIENT(NAME(load)(dy + i), NAME(load)(x + i)));
        NAME(store)(dx + last, GRADIENT(dy_end, x_end));
#undef GRADIENT
    }
}

#undef CENTRED
#undef T
#undef VT
#undef NAME
