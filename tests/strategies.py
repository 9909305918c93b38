"""What hypothesis draws: shapes, values, memory layouts, parameters."""

import numpy as np
import support
from hypothesis import strategies as st

# Nothing, one, primes, and what steps of 16 elements divide or just miss.
LENGTHS = [0, 1, 1, 2, 2, 3, 4, 5, 7, 13, 16, 17, 31, 32, 37, 67]
MOST_ELEMENTS = 30_000

DTYPES = st.sampled_from(["float16", "float32", "float64"])
try:
    import ml_dtypes
except ImportError:
    pass
else:
    DTYPES = DTYPES | st.just(ml_dtypes.bfloat16)
DTYPES = DTYPES.map(np.dtype)

EPS = st.sampled_from([1e-5, 1e-3, 1e-12, 0.75, 10.0])
MOMENTA = st.sampled_from([0.1, 0.0, 1.0, 0.999, 1e-8, -0.5, 1.5])
WEIGHTS = st.sampled_from([1.0, -1.0, 0.0, -0.0, 0.1, -2.5, 100.0, 1e-6, 1e-30, np.nan, np.inf])
BIASES = st.sampled_from([0.0, 1.0, -0.5, 30.0, 1e-6, 1e-30, np.nan, -np.inf])
VARIANCES = st.sampled_from([1.0, 0.0, 4.0, 1e-6, 1e4, 1e-30, -1.0, np.inf, np.nan])


@st.composite
def shapes(draw, lengths=LENGTHS, most=MOST_ELEMENTS):
    """(N, C, ...) of rank 2 to 5."""
    shape = []
    for _ in range(draw(st.integers(2, 5))):
        room = most // max(int(np.prod(shape)), 1)
        shape.append(draw(st.sampled_from([n for n in lengths if n <= room])))
    return tuple(shape)


@st.composite
def values(draw, shape, dtype):
    """An array of numbers around one of several means, or of one and the same."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mean = draw(st.sampled_from([0.0, 0.5, -3.0, 1000.0]))
    std = draw(st.sampled_from([1.0, 0.0, 1e-3, 100.0]))
    return support.some(rng, shape, dtype, mean, std)


@st.composite
def laid_out(draw, a, writeable=False):
    """The same values with other strides, alignment, byte order, flags.

    A broadcast axis repeats its first element, so the values may change, but for `writeable`.
    """
    if not writeable and draw(st.integers(0, 9)) == 0:
        axis = draw(st.integers(0, a.ndim - 1))
        return np.broadcast_to(a[(slice(None),) * axis + (slice(0, 1),)], a.shape)
    # Mostly a layout that is read as it lies, where the axes are in memory as they are counted
    # or the channels come last.
    last = [0, *range(2, a.ndim), 1][: a.ndim]
    order = draw(st.sampled_from([list(range(a.ndim)), last]) | st.permutations(range(a.ndim)))
    steps = draw(
        st.just([1] * a.ndim)
        | st.lists(st.sampled_from([1, 1, 2, -1, -3]), min_size=a.ndim, max_size=a.ndim)
    )
    shift = draw(st.sampled_from([0, 0, 0, 1, a.itemsize]))
    lengths = [a.shape[axis] * abs(steps[axis]) for axis in order]
    buffer = np.zeros(int(np.prod(lengths)) * a.itemsize + shift, np.uint8)
    view = buffer[shift:].view(a.dtype).reshape(lengths)
    view = view.transpose(np.argsort(order))[tuple(slice(None, None, step) for step in steps)]
    view[...] = a
    if not writeable:
        if a.dtype.name != "bfloat16" and draw(st.integers(0, 9)) == 0:
            view = view.view(a.dtype.newbyteorder())
            view[...] = a
        view.flags.writeable = draw(st.booleans())
    return view


@st.composite
def inputs(draw, **kwargs):
    """An input of any shape, dtype and memory layout."""
    return draw(laid_out(draw(values(draw(shapes(**kwargs)), draw(DTYPES)))))


@st.composite
def like(draw, x, dtype=None):
    """Another array of x's shape, in a memory layout of its own."""
    native = x.dtype.newbyteorder("=")
    return draw(laid_out(draw(values(x.shape, dtype or native))))


@st.composite
def vectors(draw, channels, elements):
    """(channels,) numbers of any of the dtypes, rounded to it."""
    drawn = draw(st.lists(elements, min_size=1, max_size=5))
    with np.errstate(over="ignore"):
        return np.resize(drawn, channels).astype(draw(DTYPES))
