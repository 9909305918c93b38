/* Activations and their derivatives, for one dtype; dtype.h includes this file. */

/* The numbers in their order, as integers: -0 comes before 0, and behind infinity there are
 * NaNs. */
ALWAYS_INLINE ORDER_A NAME(order_of)(A value)
{
    ORDER_A bits;
    memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? bits ^ ORDER_MAX_A : bits;
}

ALWAYS_INLINE A NAME(value_of)(ORDER_A order)
{
    const ORDER_A bits = order < 0 ? order ^ ORDER_MAX_A : order;
    A value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Values before the activation, or after it, are inside from `low` to `high`, and so are NaNs: of
 * FASTBN_RELU those at which its derivative is 1, of FASTBN_LEAKY_RELU those at which it is the
 * slope. A backward multiplies x there by `inverse`, which is 1 unless x is the output of
 * FASTBN_LEAKY_RELU. */
typedef struct {
    int kind;
    A slope, inverse, low, high;
    int is_clamped;
    A gain, floor, cap;
} NAME(activation);

ALWAYS_INLINE int NAME(is_clamped)(const fastbn_activation *activation)
{
    return fastbn_is_clamped(activation->kind, (double)(A)activation->slope);
}

ALWAYS_INLINE NAME(activation) NAME(activation_of)(const fastbn_activation *activation)
{
    const A slope = (A)activation->slope, cap = (A)activation->cap;
    NAME(activation) r = {activation->kind, slope, 1, -(A)INFINITY, 0,
                          NAME(is_clamped)(activation), slope, -(A)INFINITY, cap};
    if (activation->kind == FASTBN_LEAKY_RELU_INVERTED)
        r.inverse = 1 / slope;
    if (activation->kind == FASTBN_LINEAR || activation->kind == FASTBN_RELU)
        r.gain = 1;
    if (activation->kind == FASTBN_RELU) {
        r.floor = 0;
        r.low = NAME(value_of)(1); /* the least one above 0 */
        r.high = cap < (A)INFINITY ? NAME(value_of)(NAME(order_of)(cap) - 1) : cap;
    }
    return r;
}

/* The same number in all lanes: taking 0 from it changes none, not even -0. */
ALWAYS_INLINE VA NAME(all_lanes)(A a) { return a - (VA){0}; }

ALWAYS_INLINE A NAME(first_lane)(VA v)
{
    A a;
    memcpy(&a, &v, sizeof a);
    return a;
}

/* A NaN stays one. */
ALWAYS_INLINE VA NAME(activate)(VA z, const NAME(activation) *activation)
{
    const VA product = z * activation->gain;
    if (!activation->is_clamped)
        return IF_OUTSIDE_A(z, NAME(all_lanes)(activation->low), NAME(all_lanes)(activation->high),
                            z, product);
    return LESS_A(NAME(all_lanes)(activation->cap),
                  GREATER_A(NAME(all_lanes)(activation->floor), GREATER_A(product, z)));
}

/* dy times the derivative at v, which is inside the bounds or outside. */
ALWAYS_INLINE VA NAME(derive)(int is_relu, VA dy, VA v, const NAME(activation) *activation, VA low,
                              VA high)
{
    return is_relu ? ZERO_OUTSIDE_A(v, low, high, dy)
                   : IF_OUTSIDE_A(v, low, high, dy, dy * activation->slope);
}

/* A bit for each lane, the first one's in the lowest place: 1 where the derivative at z is 1. */
ALWAYS_INLINE uint32_t NAME(alive_bits)(VA z, const NAME(activation) *activation)
{
    const uint32_t all = ((uint32_t)1 << VA_LANES) - 1;
    const uint32_t inside = BITS_INSIDE_A(z, NAME(all_lanes)(activation->low),
                                          NAME(all_lanes)(activation->high));
    return inside ^ (activation->kind == FASTBN_RELU ? 0 : all);
}

/* ------------------------------------------------------------------ gates */

enum { NAME(GATE_STEPS) = LANES / (sizeof(VA) / sizeof(A)) };

/* Kernels are made for each kind of gate, since a branch for each register would take as long as
 * what it decides: FASTBN_LINEAR, which all of dy passes, FASTBN_RELU and FASTBN_LEAKY_RELU, of
 * which x tells, sums BY_BITS, and gradients that write what passes BESIDE_DX. */
enum { BY_BITS = FASTBN_LEAKY_RELU_INVERTED + 1, BESIDE_DX };

ALWAYS_INLINE int NAME(kind_of_gate)(const fastbn_gate *gate)
{
    if (gate == NULL || gate->activation.kind == FASTBN_LINEAR)
        return FASTBN_LINEAR;
    if (WRITES_PASSED && gate->alive != NULL)
        return BY_BITS;
    return gate->activation.kind == FASTBN_RELU ? FASTBN_RELU : FASTBN_LEAKY_RELU;
}

/* A gate for a step of elements. It has no copy of the activation, which would be made anew on the
 * stack for each step. */
typedef struct {
    const NAME(activation) *activation;
    VA low[NAME(GATE_STEPS)], high[NAME(GATE_STEPS)];
} NAME(gate);

typedef struct {
    VA dy, x;
} NAME(dy_and_x);

/* dy through a gate of this kind, and the x that it belongs to, which is recovered from the output
 * of FASTBN_LEAKY_RELU. */
ALWAYS_INLINE NAME(dy_and_x) NAME(pass)(int kind, VA dy, VA x, const NAME(activation) *activation,
                                        VA low, VA high)
{
    const VA derived = NAME(derive)(kind == FASTBN_RELU, dy, x, activation, low, high);
    if (kind == FASTBN_LEAKY_RELU)
        x = IF_OUTSIDE_A(x, low, high, x, x * activation->inverse);
    return (NAME(dy_and_x)){derived, x};
}

/* dy, from the i-th element of a run on, where the bit of an element is set, and 0 elsewhere. */
ALWAYS_INLINE VA NAME(if_alive)(run_bits run, ptrdiff_t i, VA dy)
{
    return IF_BITS_A(bits_from(run.alive, (size_t)(run.first + i)), dy, (VA){0});
}

/* The gates of the channels of runs, or of columns behind LANES zeros. */
typedef struct {
    NAME(activation) activation;
    A low[LANES + COLUMNS], high[LANES + COLUMNS];
} NAME(gates);

NOT_INLINE void NAME(narrow_gates)(const fastbn_gate *gate, ptrdiff_t channels, NAME(gates) *to)
{
    to->activation = NAME(activation_of)(&gate->activation);
    for (ptrdiff_t c = 0; c < channels; c++)
        to->low[c] = (A)gate->low[c], to->high[c] = (A)gate->high[c];
}

ALWAYS_INLINE NAME(gate) NAME(gate_of_run)(const NAME(gates) *gates, ptrdiff_t c)
{
    NAME(gate) r;
    r.activation = &gates->activation;
    UNROLL for (int j = 0; j < NAME(GATE_STEPS); j++) {
        r.low[j] = NAME(all_lanes)(gates->low[c]);
        r.high[j] = NAME(all_lanes)(gates->high[c]);
    }
    return r;
}

ALWAYS_INLINE void NAME(spread_gates)(const fastbn_matrix *matrix, const fastbn_gate *gate,
                                      NAME(gates) *to)
{
    NAME(gates) of_channels;
    NAME(narrow_gates)(gate, matrix->channels, &of_channels);
    to->activation = of_channels.activation;
    memset(to->low, 0, sizeof(A) * LANES);
    memset(to->high, 0, sizeof(A) * LANES);
    SPREAD_A(matrix, of_channels.low, to->low + LANES);
    SPREAD_A(matrix, of_channels.high, to->high + LANES);
}

ALWAYS_INLINE NAME(gate) NAME(gate_of_columns)(const NAME(gates) *gates, ptrdiff_t i)
{
    NAME(gate) r;
    r.activation = &gates->activation;
    UNROLL for (int j = 0; j < NAME(GATE_STEPS); j++) {
        r.low[j] = LOAD_A(gates->low + LANES + i + j * VA_LANES);
        r.high[j] = LOAD_A(gates->high + LANES + i + j * VA_LANES);
    }
    return r;
}
