/* Activations and their derivatives, for one dtype; dtype.h includes this file. */

typedef struct {
    int kind, capped;
    A slope, inverse, cap;
} NAME(activation);

ALWAYS_INLINE NAME(activation) NAME(activation_of)(const fastbn_activation *activation)
{
    const A slope = (A)activation->slope;
    return (NAME(activation)){activation->kind, activation->cap < (double)INFINITY, slope, 1 / slope,
                              (A)activation->cap};
}

/* The same number in all lanes: taking 0 from it changes none, not even -0. */
ALWAYS_INLINE VA NAME(all_lanes)(A a) { return a - (VA){0}; }

ALWAYS_INLINE A NAME(first_lane)(VA v)
{
    A a;
    memcpy(&a, &v, sizeof a);
    return a;
}

/* z may be NaN, which comparisons leave as it is. */
ALWAYS_INLINE VA NAME(activate)(VA z, const NAME(activation) *activation)
{
    const VA zero = {0}, cap = zero + activation->cap;
    if (activation->kind == FASTBN_LINEAR)
        return z;
    if (activation->kind != FASTBN_RELU)
        return IF_LESS_A(zero, z, z, z * activation->slope);
    z = IF_LESS_A(z, zero, zero, z);
    return activation->capped ? IF_LESS_A(cap, z, cap, z) : z;
}

/* dy times the derivative of the activation at z. */
ALWAYS_INLINE VA NAME(derive)(VA dy, VA z, const NAME(activation) *activation)
{
    const VA zero = {0}, cap = zero + activation->cap;
    if (activation->kind == FASTBN_LINEAR)
        return dy;
    if (activation->kind != FASTBN_RELU)
        return IF_LESS_A(zero, z, dy, dy * activation->slope);
    dy = ZERO_IF_AT_MOST_A(z, zero, dy);
    return activation->capped ? ZERO_IF_AT_MOST_A(cap, z, dy) : dy;
}

/* 255 for each lane at which the derivative is 1, and 0 for the others. */
ALWAYS_INLINE void NAME(find_alive)(VA z, const NAME(activation) *activation, uint8_t *alive)
{
    const VA zero = {0};
    VA set;
    memset(&set, 255, sizeof set); /* all bits of all lanes */
    if (activation->kind == FASTBN_RELU)
        STORE_BYTES_A(alive, NAME(derive)(set, z, activation));
    else
        STORE_BYTES_A(alive, IF_LESS_A(zero, z, set, zero));
}

/* A normalized value, with the residual if there is one, through the activation; notes where the
 * derivative is 1, unless `alive` is NULL. */
ALWAYS_INLINE VA NAME(finish)(VA z, int has_residual, VA residual,
                              const NAME(activation) *activation, uint8_t *alive)
{
    if (has_residual)
        z += residual;
    if (alive != NULL)
        NAME(find_alive)(z, activation, alive);
    return NAME(activate)(z, activation);
}

/* ------------------------------------------------------------------ gates */

/* A gate for a step of elements. Before dy is used it passes through the derivative of the activation
 * at z = (x - mean) * scale + shift, computed as the forward does; the mean is high + low. */
enum { NAME(GATE_STEPS) = LANES / (sizeof(VA) / sizeof(A)) };

typedef struct {
    NAME(activation) activation;
    VA high[NAME(GATE_STEPS)], low[NAME(GATE_STEPS)];
    VA scale[NAME(GATE_STEPS)], shift[NAME(GATE_STEPS)];
} NAME(gate);

typedef struct {
    VA dy, x, deviation;
} NAME(passed);

ALWAYS_INLINE NAME(passed) NAME(pass)(VA dy, VA x, const NAME(activation) *activation, VA high,
                                      VA low, VA scale, VA shift)
{
    const VA zero = {0};
    if (activation->kind == FASTBN_LEAKY_RELU_INVERTED) {
        dy = NAME(derive)(dy, x, activation);
        x = IF_LESS_A(zero, x, x, x * activation->inverse);
        return (NAME(passed)){dy, x, (x - high) - low};
    }
    const VA deviation = (x - high) - low;
    return (NAME(passed)){NAME(derive)(dy, deviation * scale + shift, activation), x, deviation};
}

/* The j-th register of a step. */
ALWAYS_INLINE NAME(passed) NAME(pass_gate)(VA dy, VA x, const NAME(gate) *gate, int j)
{
    return NAME(pass)(dy, x, &gate->activation, gate->high[j], gate->low[j], gate->scale[j],
                      gate->shift[j]);
}

/* The gates of the channels of runs. */
typedef struct {
    NAME(activation) activation;
    A high[FASTBN_GROUP], low[FASTBN_GROUP], scale[FASTBN_GROUP], shift[FASTBN_GROUP];
} NAME(run_gates);

ALWAYS_INLINE void NAME(narrow_gates)(const fastbn_gate *gate, const double *mean,
                                      ptrdiff_t channels, NAME(run_gates) *to)
{
    to->activation = NAME(activation_of)(&gate->activation);
    for (ptrdiff_t c = 0; c < channels; c++) {
        to->high[c] = (A)mean[c];
        to->low[c] = (A)(mean[c] - (double)to->high[c]);
        to->scale[c] = (A)gate->scale[c], to->shift[c] = (A)gate->shift[c];
    }
}

ALWAYS_INLINE NAME(gate) NAME(gate_of_run)(const NAME(run_gates) *gates, ptrdiff_t c)
{
    NAME(gate) r;
    r.activation = gates->activation;
    UNROLL for (int j = 0; j < NAME(GATE_STEPS); j++) {
        r.high[j] = NAME(all_lanes)(gates->high[c]), r.low[j] = NAME(all_lanes)(gates->low[c]);
        r.scale[j] = NAME(all_lanes)(gates->scale[c]);
        r.shift[j] = NAME(all_lanes)(gates->shift[c]);
    }
    return r;
}

/* The gates of columns, from their tables. */
typedef struct {
    NAME(activation) activation;
    A high[LANES + COLUMNS], low[LANES + COLUMNS];
    A scale[LANES + COLUMNS], shift[LANES + COLUMNS];
} NAME(gates);

ALWAYS_INLINE void NAME(spread_gate)(const fastbn_matrix *matrix, const fastbn_gate *gate,
                                     const double *mean, NAME(gates) *to)
{
    A of_channel[4][COLUMNS];
    for (ptrdiff_t c = 0; c < matrix->channels; c++) {
        of_channel[0][c] = (A)mean[c];
        of_channel[1][c] = (A)(mean[c] - (double)of_channel[0][c]);
        of_channel[2][c] = (A)gate->scale[c], of_channel[3][c] = (A)gate->shift[c];
    }
    to->activation = NAME(activation_of)(&gate->activation);
    memset(to->high, 0, sizeof(A) * LANES); /* a step that reaches back before the first column */
    memset(to->low, 0, sizeof(A) * LANES);
    memset(to->scale, 0, sizeof(A) * LANES);
    memset(to->shift, 0, sizeof(A) * LANES);
    SPREAD_A(matrix, of_channel[0], to->high + LANES);
    SPREAD_A(matrix, of_channel[1], to->low + LANES);
    SPREAD_A(matrix, of_channel[2], to->scale + LANES);
    SPREAD_A(matrix, of_channel[3], to->shift + LANES);
}

ALWAYS_INLINE NAME(gate) NAME(load_gate)(const NAME(gates) *gates, ptrdiff_t i)
{
    NAME(gate) r;
    r.activation = gates->activation;
    UNROLL for (int j = 0; j < NAME(GATE_STEPS); j++) {
        const ptrdiff_t at = LANES + i + j * VA_LANES;
        r.high[j] = LOAD_A(gates->high + at), r.low[j] = LOAD_A(gates->low + at);
        r.scale[j] = LOAD_A(gates->scale + at), r.shift[j] = LOAD_A(gates->shift + at);
    }
    return r;
}
