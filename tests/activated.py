"""What normalization with a residual and an activation should give, and how far it may be off.

Of all kinds: by batch, by ghost batch, by instance, by group, by constants; with masks.
"""

from typing import NamedTuple

import numpy as np
import reference
import strategies
import support
from hypothesis import strategies as st

ACTIVATIONS = [
    (None, 0.01),
    ("relu", 0.01),
    ("relu6", 0.01),
    ("leaky_relu", 0.01),
    ("leaky_relu", 0.0),
    ("leaky_relu", 1.5),
    ("leaky_relu", -0.3),
]


class Case(NamedTuple):
    """The arguments of a forward; what is normalized together is a part of the samples."""

    x: np.ndarray
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float = 1e-5
    activation: str | None = None
    slope: float = 0.01
    residual: np.ndarray | None = None
    mask: np.ndarray | None = None  # of the shape (N, 1, ...)
    batch_size: int | None = None  # samples of a part; None for all of them
    groups: int | None = None  # into which the channels of each sample are divided
    running: tuple | None = None  # mean and variance, where they are constants


class Part(NamedTuple):
    """The valid positions of a part, of the shape (n, C) or, for groups, (1, C, n)."""

    where: np.ndarray  # of the shape (N, ...)
    x: np.ndarray
    mean: np.ndarray  # of each channel
    var: np.ndarray
    z: np.ndarray  # before the activation
    z_bound: np.ndarray


class Step(NamedTuple):
    """The results of a forward and its backward, or bounds of their errors."""

    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dresidual: np.ndarray


def parts(case):
    """The parts of a case that have valid positions."""
    n = len(case.x)
    size = 1 if case.groups else case.batch_size or n
    valid = np.ones((n, *case.x.shape[2:]), bool) if case.mask is None else case.mask[:, 0]
    for first in range(0, n, size):
        where = np.zeros_like(valid)
        where[first : first + size] = valid[first : first + size]
        if where.any():
            yield part(case, where)


def part(case, where):
    x, weight, bias = gathered(case, case.x, where), case.weight, case.bias
    if case.running is not None:
        mean, var = map(reference.wide, case.running)
    elif case.groups:
        mean, var = (v[0] for v in reference.group_moments(x, case.groups))
    else:
        _, mean, var = reference.moments(x)
    z = reference.normalize(x, mean, var, weight, bias, case.eps)
    with np.errstate(divide="ignore"):
        offset = np.where(var + case.eps > 0, np.abs(mean) / np.sqrt(var + case.eps), 0)
    bound = reference.forward_bound(z, x.dtype, weight, bias, offset)
    if case.residual is not None:
        residual = reference.wide(gathered(case, case.residual, where))
        bound = bound + rounding(np.maximum(np.abs(z), np.abs(residual)), x.dtype)
        z = z + residual
    return Part(where, x, mean, var, z, bound)


def rounding(size, dtype):
    """What an operation in the dtype of the arithmetic, and rounding to another, may lose."""
    arithmetic = np.float64 if dtype.itemsize == 8 else np.float32
    lost = reference.ulp(size, arithmetic)
    return lost + reference.ulp(size, dtype) / 2 if dtype.itemsize == 2 else lost


def gathered(case, a, where):
    """The values of an array at some positions."""
    values = np.moveaxis(a.astype(a.dtype.newbyteorder("=")), 1, -1)[where]
    return values.T[np.newaxis] if case.groups else values


def scattered(case, pieces):
    """An array of zeros but at some positions, from pairs of positions and values."""
    result = np.zeros(case.x.shape, np.longdouble)
    for where, values in pieces:
        np.moveaxis(result, 1, -1)[where] = values[0].T if case.groups else values
    return result


def decided(case, dy):
    """dy, but 0 where rounding decides on which side of a kink of the activation a value lies."""
    dy = dy.copy(order="K")
    for p in parts(case):
        near = np.abs(p.z) <= 2 * p.z_bound
        near |= np.abs(p.z - 6) <= 2 * p.z_bound
        values = np.moveaxis(dy, 1, -1)[p.where]
        values[near[0].T if case.groups else near] = 0
        np.moveaxis(dy, 1, -1)[p.where] = values
    return dy


def expected(case, dy):
    """The results of a step, and how far each may be off."""
    results, bounds = [], []
    for p in parts(case):
        own_dy = gathered(case, dy, p.where)
        results.append((p.where, results_of(case, p, own_dy)))
        bounds.append((p.where, bounds_of(case, p, own_dy)))
    return joined(case, results), joined(case, bounds)


def joined(case, steps):
    """The step of all parts."""
    values = []
    for name in Step._fields:
        pieces = [(where, getattr(step, name)) for where, step in steps]
        if name in ("dweight", "dbias"):
            values.append(sum(value for _, value in pieces))
        else:
            values.append(scattered(case, pieces))
    return Step(*values)


def results_of(case, p, dy):
    options = case.activation, case.slope
    y = reference.activate(p.z, *options)
    dresidual = reference.wide(dy) * reference.derivative(p.z, *options)
    if case.running is not None:
        gradients = reference.backward_frozen(dresidual, p.x, p.mean, p.var, case.weight, case.eps)
    elif case.groups:
        arguments = dresidual, p.x, case.groups, case.weight, case.eps
        gradients = reference.group_norm_backward(*arguments)
    else:
        gradients = reference.backward(dresidual, p.x, case.weight, case.eps)
    return Step(y, *gradients, dresidual)


def bounds_of(case, p, dy):
    dtype = p.x.dtype
    y = reference.activate(p.z, case.activation, case.slope)
    dresidual = reference.wide(dy) * reference.derivative(p.z, case.activation, case.slope)
    steepest = max(1.0, abs(case.slope)) if case.activation == "leaky_relu" else 1.0
    # The gradients may be those of a dresidual that has been rounded to its dtype.
    lost = 2 * rounding(dresidual, dtype)
    bounds = reference.gradient_bounds(dresidual, p.x, dtype, p.mean, p.var, case.weight, case.eps)
    more = reference.gradient_bounds(
        lost, p.x, dtype, p.mean, p.var, case.weight, case.eps, relative=2.0
    )
    dx, dweight, dbias = (one + other for one, other in zip(bounds, more, strict=True))
    dx = np.broadcast_to(dx.max() if case.groups else dx, p.x.shape)
    return Step(steepest * p.z_bound + rounding(y, dtype), dx, dweight, dbias, lost)


# Values near the largest of a dtype: its arithmetic may not hold how far they are from their mean.
# Squares of that must be numbers in float64.

NEAR_THE_LARGEST = {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38, "float64": 1e150}


def near_the_largest(rng, shape, dtype, **options):
    """A case of such values in every other channel, whose results are of usual sizes, and a dy."""
    size, huge = NEAR_THE_LARGEST[dtype.name], np.arange(shape[1]) % 2 == 0
    over = reference.over_channels(huge, len(shape)) != 0
    values = np.where(rng.random(shape) < 0.25, -size, size)
    x = np.where(over, values, support.some(rng, shape)).astype(dtype)
    weight, bias = (np.where(huge, size / 1000, 1.0) * v for v in support.parameters(shape[1]))
    return Case(x, weight, bias, **options), support.some(rng, shape, dtype)


def statistics_near_the_largest(channels, dtype):
    """A mean, negative where it is huge, and a variance for such a case."""
    size, huge = NEAR_THE_LARGEST[dtype.name], np.arange(channels) % 2 == 0
    return np.where(huge, -size, 0.5), np.where(huge, size, 1.0) ** 2


# What hypothesis draws.

# Runs of all lengths beside a register, several blocks of columns, strips.
SHAPES = [
    *[(2, 3), (9, 4), (40, 17), (65, 70)],
    *[(2, 3, 5), (6, 2, 40)],
    *[(4, 3, 5, 7), (3, 66, 2, 3), (5, 2, 33, 9), (2, 5, 1, 1)],
    (3, 4, 2, 3, 5),
]
# Layouts of x, and of each other array beside it.
LAYOUTS = [
    *[support.contiguous, support.channels_last] * 3,
    *[support.sliced, support.negative_strides, support.fortran, support.unaligned],
    *[support.batch_slice, support.byte_swapped],
]


@st.composite
def cases(draw, kinds=("batch", "ghost", "instance", "group", "running"), shapes=SHAPES):
    """A case, and a dy of which no element depends on how a value beside a kink is rounded."""
    kind = draw(st.sampled_from(kinds))
    least = 3 if kind == "instance" else 2
    shape = draw(st.sampled_from([s for s in shapes if len(s) >= least and fits(s, kind)]))
    dtype = draw(strategies.DTYPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    activation, slope = draw(st.sampled_from(ACTIVATIONS))
    x, dy, residual = (
        laid_out(draw, support.some(rng, shape, dtype, mean)) for mean in (0.5, 0.0, 0.3)
    )
    case = Case(x, activation=activation, slope=slope)
    case = case._replace(
        residual=residual if draw(st.booleans()) else None,
        mask=draw(masks(shape, kind, rng)),
        batch_size={"ghost": draw(st.sampled_from([2, 3])), "instance": 1}.get(kind),
        groups=shape[1] if shape[1] % 2 else 2,
    )
    if kind != "group":
        case = case._replace(groups=None)
    if kind == "ghost" and len(x) % case.batch_size == 1:  # A sample may be a single value.
        case = case._replace(batch_size=None)
    if kind == "running":
        case = case._replace(running=(rng.normal(0, 1, shape[1]), rng.uniform(0.5, 4, shape[1])))
    weight, bias = support.parameters(shape[1], np.float64)
    case = case._replace(
        weight=3 * weight if draw(st.integers(0, 3)) else None,
        bias=3 * bias if draw(st.integers(0, 3)) else None,
    )
    return case, decided(case, dy)


def fits(shape, kind):
    """Tell whether there are several values to normalize by."""
    values = int(np.prod(shape[2:]))
    return values > 1 if kind == "instance" else kind != "group" or values * (shape[1] // 2) > 1


def laid_out(draw, a):
    """The same values in a layout that is drawn; some have no form for every rank."""
    layout = draw(st.sampled_from(LAYOUTS))
    if layout is support.byte_swapped and a.dtype.name == "bfloat16":
        layout = support.contiguous
    return layout(a)


@st.composite
def masks(draw, shape, kind, rng):
    """A mask that leaves two values of each part at least, or none."""
    if draw(st.booleans()):
        return None
    mask = rng.random((shape[0], 1, *shape[2:])) < 0.7
    if len(shape) == 2:
        mask[...] = True  # Whole samples are all that there is to leave out.
        mask[-1] = kind not in ("batch", "running") or shape[0] < 3
    mask.reshape(shape[0], -1)[:, :2] = True
    return mask


@st.composite
def outputs(draw, x, residual):
    """Where to write: nowhere that is given, elsewhere, over x or over the residual."""
    new = np.empty(x.shape, x.dtype.newbyteorder("="))
    given = [a for a in (x, residual) if a is not None and a.dtype.isnative]
    return draw(st.sampled_from([None, new, *given]))


# What tests have in common.


def assert_step(actual, expected, bounds):
    """Asserts the results of a step; the last ones, and those that are None, need not be there."""
    for name, value, exact, bound in zip(Step._fields, actual, expected, bounds, strict=False):
        if value is not None:
            try:
                support.assert_within(value, exact, bound)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def inverted(bounds, dtype):
    """Bounds of gradients where what was normalized is recovered from a rounded output."""
    factor = {"float16": 3e3, "bfloat16": 2e4}.get(dtype.name, 1)
    return bounds._replace(dx=factor * bounds.dx, dweight=factor * bounds.dweight)


def stored(bounds, expected, dtype):
    """Bounds of gradients where those of the parameters are stored in a dtype."""
    dweight = bounds.dweight + reference.ulp(expected.dweight, dtype)
    return bounds._replace(
        dweight=dweight, dbias=bounds.dbias + reference.ulp(expected.dbias, dtype)
    )
