/* What the kernels of all dtypes share, compiled once per instruction set, with ISA set to its
 * name: sums of lanes and columns, masks, and numbers of channels. */
#include "common.h"
#include "masks.h"

/* ------------------------------------------------------------------ sums of lanes */

/* The sums of a step, added up to those of one register: lane i is added to lane i + 8, then to
 * lane i + 4 and so on, whatever the width of a register is. */
ALWAYS_INLINE vd fold_step(const double *sums)
{
    vd v[STEPS];
    UNROLL for (int j = 0; j < STEPS; j++)
        v[j] = load_float64(sums + j * VD);
    UNROLL for (int half = STEPS / 2; half > 0; half /= 2)
        UNROLL for (int j = 0; j < half; j++)
            v[j] += v[j + half];
    return v[0];
}

ALWAYS_INLINE double sum_of_step(const double *sums)
{
    double lanes[VD];
    store_float64(lanes, fold_step(sums));
    UNROLL for (int half = VD / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

/* One of both sums, of as many channels as a register has lanes. */
ALWAYS_INLINE vd sums_of_channels(double sums[][2][LANES], int which)
{
    vd folded[VD];
    UNROLL for (int k = 0; k < VD; k++)
        folded[k] = fold_step(sums[k][which]);
    return sums_of_lanes(folded);
}

void COMMON(add_lanes)(double sums[][2][LANES], ptrdiff_t channels, double *first, double *second)
{
    ptrdiff_t c = 0;
    for (; c + VD <= channels; c += VD) {
        store_float64(first + c, sums_of_channels(sums + c, 0));
        store_float64(second + c, sums_of_channels(sums + c, 1));
    }
    for (; c < channels; c++) {
        first[c] = sum_of_step(sums[c][0]);
        second[c] = sum_of_step(sums[c][1]);
    }
}

/* ------------------------------------------------------------------ columns */

/* Where the length of a run is known at compile time, it takes no loop. */
#define FOR_RUNS_OF(run, DO) \
    switch (run) { \
    case 1: DO(1); break; \
    case 2: DO(2); break; \
    case 4: DO(4); break; \
    default: DO(run); \
    }

/* One value per column, from one per channel. */
#define SPREAD(type) \
    ALWAYS_INLINE void spread_over_runs_##type(ptrdiff_t channels, ptrdiff_t run, \
                                               const type *from, type *to) \
    { \
        for (ptrdiff_t c = 0; c < channels; c++) { \
            const type value = from[c]; /* which no store changes, as far as the compiler knows */ \
            for (ptrdiff_t i = 0; i < run; i++) \
                to[c * run + i] = value; \
        } \
    } \
    void COMMON(spread_##type)(const fastbn_matrix *matrix, const type *from, type *to) \
    { \
        const ptrdiff_t channels = matrix->channels, len = matrix->len; \
        FOR_RUNS_OF(matrix->run, SPREAD_##type) \
        for (ptrdiff_t done = channels * matrix->run; done < len; done *= 2) \
            memcpy(to + done, to, sizeof(type) * (size_t)smaller(done, len - done)); \
    }
#define SPREAD_float(run) spread_over_runs_float(channels, run, from, to)
#define SPREAD_double(run) spread_over_runs_double(channels, run, from, to)
SPREAD(float)
SPREAD(double)

ALWAYS_INLINE void add_runs(ptrdiff_t channels, ptrdiff_t run, const double *from, double *to)
{
    for (ptrdiff_t c = 0; c < channels; c++) {
        double sum = to[c];
        for (ptrdiff_t i = 0; i < run; i++)
            sum += from[c * run + i];
        to[c] = sum;
    }
}

/* Adds the sums of the columns from the j-th one on, of channels that have a step or more each.
 * Those of the lanes of a channel are added up like those of a run. */
static void add_long_runs(const fastbn_matrix *matrix, const column_sums *sums, ptrdiff_t j,
                          double *first_of_channel, double *second_of_channel)
{
    double of_lanes[COLUMNS / LANES][2][LANES], first[COLUMNS / LANES], second[COLUMNS / LANES];
    const ptrdiff_t channels = matrix->channels, run = matrix->run;
    for (ptrdiff_t c = 0; c < channels; c++) {
        const double *at = sums->first + LANES + j + c * run;
        const double *at_second = sums->second + LANES + j + c * run;
        step_sums s = no_sums();
        for (ptrdiff_t i = 0; i < run; i += LANES) {
            const ptrdiff_t begin = smaller(i, run - LANES); /* the last step overlaps another */
            s = add_sums(s, sums_from_lane(load_sums(at + begin, at_second + begin), i - begin));
        }
        store_sums(of_lanes[c][0], of_lanes[c][1], s);
    }
    COMMON(add_lanes)(of_lanes, channels, first, second);
    for (ptrdiff_t c = 0; c < channels; c++) {
        first_of_channel[c] += first[c];
        second_of_channel[c] += second[c];
    }
}

/* The same of channels that have fewer columns each, of one of both sums. */
static void add_short_runs(const fastbn_matrix *matrix, const double *from, double *to)
{
    const ptrdiff_t channels = matrix->channels;
#define ADD(run) add_runs(channels, run, from + j, to)
    for (ptrdiff_t j = 0; j < matrix->len; j += channels * matrix->run)
        FOR_RUNS_OF(matrix->run, ADD)
#undef ADD
}

void COMMON(add_columns_to_channels)(const fastbn_matrix *matrix, const column_sums *sums,
                                     double *first_of_channel, double *second_of_channel)
{
    if (matrix->run < LANES) {
        add_short_runs(matrix, sums->first + LANES, first_of_channel);
        add_short_runs(matrix, sums->second + LANES, second_of_channel);
        return;
    }
    for (ptrdiff_t j = 0; j < matrix->len; j += matrix->channels * matrix->run)
        add_long_runs(matrix, sums, j, first_of_channel, second_of_channel);
}

void COMMON(end_column_trees)(const column_trees *trees, column_sums *sums, ptrdiff_t len)
{
    const ptrdiff_t whole = len / LANES * LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES)
        add_tree_to_columns(load_tree(trees, i), sums, i);
    if (whole < len)
        add_tree_to_columns(load_tree(trees, whole), sums, len - LANES);
}

/* ------------------------------------------------------------------ masks */

/* Repeats the first `len` of some numbers up to `end`, each time increased by `by` more. */
static void repeat(int16_t *numbers, ptrdiff_t len, ptrdiff_t end, int16_t by)
{
    for (; len < end; len *= 2, by *= 2)
        for (ptrdiff_t i = 0; i < smaller(len, end - len); i++)
            numbers[len + i] = numbers[i] + by;
}

/* The number of the byte, in a row of the mask, that belongs to each column. */
static void bytes_of_columns(const fastbn_matrix *matrix, int16_t *to)
{
    const ptrdiff_t run = matrix->run, group = matrix->channels * run;
    to[0] = 0;
    repeat(to, 1, run, 1);
    repeat(to, run, group, 0);
    repeat(to, group, matrix->len, (int16_t)run);
}

static mask_step mask_step_of(const int16_t *bytes)
{
    mask_step step = {0};
    int16_t least = bytes[0];
    for (int i = 1; i < LANES; i++)
        least = bytes[i] < least ? bytes[i] : least;
    for (int i = 0; i < LANES; i++)
        step.index[i] = (uint8_t)(bytes[i] - least);
    step.offset = least;
    return step;
}

void COMMON(find_masks)(const fastbn_matrix *matrix, mask_step *steps)
{
    const ptrdiff_t len = matrix->len;
    int16_t bytes[COLUMNS + LANES];
    if (matrix->run >= LANES)
        return;
    bytes_of_columns(matrix, bytes);
    for (int i = 0; i < LANES; i++)
        bytes[len + i] = bytes[len - 1];
    for (ptrdiff_t i = 0; i < len; i += LANES)
        *steps++ = mask_step_of(bytes + i);
}

void COMMON(begin_valid_columns)(valid_columns *valid, const fastbn_matrix *matrix)
{
    COMMON(find_masks)(matrix, valid->steps);
    for (int t = 0; t < ROWS_MOST; t++)
        memset(valid->of_row[t], 0, LANES);
}

void COMMON(spread_masks)(valid_columns *valid, const fastbn_matrix *matrix, ptrdiff_t r,
                          ptrdiff_t count)
{
    for (ptrdiff_t t = 0; t < count; t++)
        spread_mask(matrix, r + t, valid->steps, valid->of_row[t] + LANES);
}

/* Counts the valid positions by their lowest bits, which 255 and 1 have in common. Sums of bytes
 * are widened before they overflow. */
static ptrdiff_t count_valid(const unsigned char *mask, ptrdiff_t len)
{
    enum { WIDTH = 64, MOST = 255 };
    ptrdiff_t total = 0;
    while (len >= WIDTH) {
        unsigned char sums[WIDTH] = {0};
        for (int i = 0; i < MOST && len >= WIDTH; i++, mask += WIDTH, len -= WIDTH)
            for (int j = 0; j < WIDTH; j++)
                sums[j] += mask[j] & 1;
        for (int j = 0; j < WIDTH; j++)
            total += sums[j];
    }
    for (ptrdiff_t i = 0; i < len; i++)
        total += mask[i] & 1;
    return total;
}

/* ------------------------------------------------------------------ numbers of channels */

static void invstd(const double *m2, double n, double eps, ptrdiff_t count, double *to)
{
    if (n == 1.0) { /* m2 is a variance: a third of the time is that of a division */
        for (ptrdiff_t c = 0; c < count; c++)
            to[c] = 1.0 / sqrt(m2[c] + eps);
        return;
    }
    for (ptrdiff_t c = 0; c < count; c++)
        to[c] = 1.0 / sqrt(m2[c] / n + eps);
}

static void mean_and_m2(const double *pivot, const double *first, const double *second,
                        double n, ptrdiff_t count, double *mean, double *m2)
{
    for (ptrdiff_t c = 0; c < count; c++) {
        const double shift = first[c] / n, around_mean = second[c] - first[c] * shift;
        mean[c] = pivot[c] + shift;
        /* Rounding can take a variance of nearly zero below it. */
        m2[c] = around_mean < 0 ? 0 : around_mean;
    }
}

/* Whether sums in float32 have not overflowed, and lack nothing that has underflowed: the second is
 * at least `tiny`, or both are 0. */
ALWAYS_INLINE int stays_in_float32(double first, double second, double tiny)
{
    const int is_finite = (fabs(first) < INFINITY) & (fabs(second) < INFINITY);
    return is_finite & ((fabs(second) >= tiny) | ((first == 0) & (second == 0)));
}

static int float32_mean_and_m2(const double *pivot, const double *first, const double *second,
                               double n, ptrdiff_t count, double *mean, double *m2)
{
    long long lost = 0; /* as wide as a double, and without branches: the loop is vectorized */
    mean_and_m2(pivot, first, second, n, count, mean, m2);
    for (ptrdiff_t c = 0; c < count; c++) {
        const int is_near = first[c] / n * first[c] <= m2[c];
        const int keeps = stays_in_float32(first[c], second[c], n * FASTBN_TINY) & is_near;
        m2[c] = keeps ? m2[c] : NAN;
        lost |= keeps ? 0 : 1;
    }
    return lost != 0;
}

static int float32_products(const double *mean, const double *first, double n, ptrdiff_t count,
                            double *second)
{
    long long lost = 0; /* as in float32_mean_and_m2 */
    for (ptrdiff_t c = 0; c < count; c++) {
        const double rest = mean[c] - (double)(float)mean[c];
        const int keeps = stays_in_float32(first[c], second[c], n * FASTBN_TINY);
        second[c] = keeps ? second[c] - rest * first[c] : NAN;
        lost |= keeps ? 0 : 1;
    }
    return lost != 0;
}

static int raw_mean_and_m2(const double *first, const double *second, double n,
                           ptrdiff_t count, double *mean, double *m2)
{
    long long lost = 0; /* as in float32_mean_and_m2 */
    for (ptrdiff_t c = 0; c < count; c++) {
        const double of_channel = first[c] / n, square = first[c] * of_channel;
        const double around_mean = second[c] - square;
        const int keeps = square <= FASTBN_RAW_MOST * around_mean;
        mean[c] = of_channel;
        m2[c] = keeps ? around_mean : NAN;
        lost |= keeps ? 0 : 1;
    }
    return lost != 0;
}

static void move_towards(const double *target, double divisor, double factor,
                         ptrdiff_t count, double *moved)
{
    if (divisor == 1.0) {
        for (ptrdiff_t c = 0; c < count; c++)
            moved[c] = (1 - factor) * moved[c] + factor * target[c];
        return;
    }
    for (ptrdiff_t c = 0; c < count; c++)
        moved[c] = (1 - factor) * moved[c] + factor * (target[c] / divisor);
}

static void multiply(const double *by, ptrdiff_t count, double *multiplied)
{
    for (ptrdiff_t c = 0; c < count; c++)
        multiplied[c] *= by[c];
}

static void gradient_coefficients(const double *invstd, double n, ptrdiff_t count, double *dy_mean,
                                  double *slope, double *scale)
{
    for (ptrdiff_t c = 0; c < count; c++) {
        dy_mean[c] /= n;
        slope[c] = invstd[c] * (slope[c] / n);
        scale[c] *= invstd[c];
    }
}

static int any_huge(const double *mean, ptrdiff_t count)
{
    long long found = 0; /* as in float32_mean_and_m2 */
    for (ptrdiff_t c = 0; c < count; c++) {
        const double size = fabs(mean[c]);
        found |= (size >= FASTBN_HUGE) & (size < INFINITY) ? 1 : 0;
    }
    return found != 0;
}

static int all_recoverable(const double *weight, const double *bias, double slope,
                           const fastbn_recovery *recovery, ptrdiff_t count)
{
    const fastbn_recovery of = *recovery;
    long long lost = 0; /* as in float32_mean_and_m2 */
    for (ptrdiff_t c = 0; c < count; c++) {
        const double w = fabs(slope * weight[c]), b = fabs(slope * bias[c]);
        const int keeps = (w >= of.least) & (w * of.reach <= of.greatest) & (b <= of.ratio * w);
        lost |= keeps ? 0 : 1;
    }
    return lost == 0;
}

const fastbn_common_kernels PASTE(fastbn_common_kernels_, ISA) = {
    count_valid,     invstd,           mean_and_m2,  float32_mean_and_m2,
    raw_mean_and_m2, float32_products, move_towards, multiply,
    gradient_coefficients, any_huge, all_recoverable, FENCE_NONTEMPORAL,
};
