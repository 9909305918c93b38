"""Arguments of every kind, valid or not: a right result, or a clear error and nothing changed."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support import assert_close, parameters, refused, some

import fastbn
from fastbn import functional as F

# What an argument is now and then instead of what it should be. Some of them serve as some.
JUNK = [
    lambda: None,
    lambda: "text",
    lambda: b"bytes",
    lambda: True,
    lambda: 3,
    lambda: 10**400,
    lambda: -1.0,
    lambda: 0.0,
    lambda: np.inf,
    lambda: np.nan,
    lambda: 1j,
    lambda: np.float32(0.5),
    lambda: [],
    lambda: [1.0],
    lambda: [[1.0, 2.0], [3.0]],
    lambda: [[1.0, 2.0], [3.0, 4.5]],
    lambda: {},
    object,
    lambda: np.float64,
    lambda: np.array(0.5),
    lambda: np.array("a"),
    lambda: np.arange(3),
    lambda: np.zeros((2, 3), np.complex64),
    lambda: np.full((2, 3), None),
    lambda: np.ma.masked_array(np.ones((2, 3))),
    lambda: np.zeros((2, 3), bool),
    lambda: np.zeros((2, 3), "datetime64[s]"),
    lambda: np.zeros(3, [("a", float)]),
    lambda: np.zeros((2, 3)),
    lambda: np.zeros((0, 3)),
    lambda: np.zeros((1,) * 20),
    lambda: np.broadcast_to(np.float32(1), (2, 3)),
]
ARRAYS, RUNNING = ("input", "x", "dy"), ("running_mean", "running_var")
NORMS, GHOSTS = ("batch_norm", "instance_norm"), "ghost_batch_size"


@st.composite
def outputs(draw, x, dy):
    """Something to write to: often good, or one of the inputs, or in the way of one."""
    kind = draw(st.sampled_from(["none", "new", "x", "dy", "view", "shifted", "dtype", "locked"]))
    if kind == "none":
        return None
    if kind == "x" or not isinstance(x, np.ndarray) or x.ndim < 2 or x.dtype.hasobject:
        return x
    if kind == "dy":
        return dy
    if kind == "view":
        return x[...]
    if kind == "shifted":
        return x[::-1] if x.shape[0] > 1 else x[..., ::-1]
    dtype = draw(strategies.DTYPES) if kind == "dtype" else x.dtype.newbyteorder("=")
    out = draw(strategies.laid_out(np.zeros(x.shape, dtype), writeable=True))
    out.flags.writeable = kind != "locked"
    return out


@st.composite
def masks(draw, shape, rng):
    """Often none; else one that broadcasts, with anything from nothing to everything."""
    if draw(st.integers(0, 2)) > 0:
        return None
    full = (shape[0], 1, *shape[2:])
    shape = [draw(st.sampled_from([1, n])) for n in full][draw(st.integers(0, len(full) - 1)) :]
    return rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))


# What test_activations.py draws.
FUSED = ("activation", "negative_slope", "residual", "y", "residual_out")


@st.composite
def calls(draw, function):
    """The arguments of a function, by name."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = draw(strategies.shapes(most=2000))
    channels = shape[1]

    def array(shape, low=None):
        a = some(rng, shape, draw(strategies.DTYPES), mean=0.2, std=1.0)
        a = np.abs(a) + a.dtype.type(low) if low else a
        return draw(strategies.laid_out(a))

    arguments = {}
    names = [name for name in inspect.signature(function).parameters if name not in FUSED]
    ghosts = draw(st.sampled_from([None, None, 1, 2, 3, 50])) if GHOSTS in names else None
    rows = () if ghosts is None else (max(-(-shape[0] // ghosts), 1),)
    for name in names:
        if draw(st.integers(0, 11)) == 0:
            value = draw(st.sampled_from(JUNK))()
        elif name in ARRAYS:
            value = array(shape)
        elif name == "out":
            x = arguments.get("x", arguments.get("input"))
            value = draw(outputs(x, arguments.get("dy")))
        elif name == GHOSTS:
            value = ghosts
        elif name == "mask":
            value = draw(masks(shape, rng))
        elif name == "eps":
            value = draw(strategies.EPS)
        elif name == "momentum":
            value = draw(strategies.MOMENTA)
        elif name in ("training", "use_input_stats"):
            value = draw(st.booleans())
        elif name == "count":
            value = max(int(np.prod(shape[:1] + shape[2:])), 1)
        elif name in (*RUNNING, "weight", "bias") and draw(st.integers(0, 3)) == 0:
            value = None
        else:
            of_batches = rows if name in ("mean", "invstd") else ()
            low = 0.5 if name in ("invstd", "running_var") else None
            value = array((*of_batches, channels), low)
        arguments[name] = value
    return arguments


def gathered(a, mask):
    """The positions of an array that count, of shape (n, C), if it has positions at all."""
    if mask is None or np.ndim(a) < 2:
        return a
    return np.moveaxis(a, 1, -1)[mask[:, 0]]


def batch_size_of(a):
    """How many samples a call normalizes together, None for all."""
    return 1 if a.get("use_input_stats", False) else a.get(GHOSTS)


def parts_of(a):
    """The arguments of each batch that a call normalizes by itself, of what counts in it."""
    key = "input" if "input" in a else "x"
    x, mask, size = np.asarray(a[key]), a.get("mask"), batch_size_of(a)
    if size is None or not a.get("training", True):
        size = max(len(x), 1)
    if mask is not None:
        mask = np.broadcast_to(mask, (x.shape[0], 1, *x.shape[2:]))
    for k, start in enumerate(range(0, max(len(x), 1), size)):
        part = slice(start, start + size)
        m = None if mask is None else mask[part]
        arrays = {name: gathered(np.asarray(a[name])[part], m) for name in ARRAYS if name in a}
        rows = {n: a[n][k] for n in ("mean", "invstd") if np.ndim(a.get(n, 0)) == 2}
        yield a | arrays | rows


def joined(name, batch_size, parts):
    """The results of a call from those of its batches."""
    if batch_size is None:
        return parts[0]
    if name in NORMS:
        return np.concatenate(parts)
    arrays, *others = zip(*parts, strict=True)
    join = np.stack if name == "batch_norm_forward" else sum
    return np.concatenate(arrays), *(join(values) for values in others)


def expected(name, a):
    """The results of a call with valid arguments, in wide arithmetic."""
    x = np.asarray(a.get("x", a.get("input")))
    dy = None if "dy" not in a else np.asarray(a["dy"]).astype(x.dtype)
    weight, bias = a.get("weight"), a.get("bias")
    count = int(np.prod(x.shape[:1] + x.shape[2:]))
    axes, ndim = reference.channel_axes(x), x.ndim
    if name == "batch_norm_stats":
        _, mean, var = reference.moments(x)
        return count, mean, var * count
    if name == "batch_norm_forward" or a.get("training") or a.get("use_input_stats"):
        _, mean, var = reference.moments(x)
        y = reference.forward(x, weight, bias, a["eps"])
        invstd = 1 / np.sqrt(var + a["eps"])
        return y if name in NORMS else (y, mean, invstd)
    if name in NORMS:
        running = a["running_mean"], a["running_var"]
        return reference.normalize(x, *running, weight, bias, a["eps"])
    mean, invstd = (reference.over_channels(a[key], ndim) for key in ("mean", "invstd"))
    weight = reference.over_channels(np.ones(x.shape[1]) if weight is None else weight, ndim)
    xhat = (reference.wide(x) - mean) * invstd
    if name == "batch_norm_elemt":
        return xhat * weight + (0 if bias is None else reference.over_channels(bias, ndim))
    dy = reference.wide(dy)
    sums = dy.sum(axis=axes), (dy * xhat).sum(axis=axes)
    if name == "batch_norm_backward_reduce":
        return sums
    given_sums = [a[key] for key in ("sum_dy", "sum_dy_xhat")] if "sum_dy" in a else sums
    shares = [reference.over_channels(s, ndim) / a.get("count", count) for s in given_sums]
    dx = (dy - shares[0] - xhat * shares[1]) * invstd * weight
    return dx if name == "batch_norm_backward_elemt" else (dx, sums[1], sums[0])


def agree(result, exact):
    """Whether a result is right to the precision of its dtype, roughly."""
    if isinstance(exact, tuple):
        return len(result) == len(exact) and all(map(agree, result, exact))
    result = np.asarray(result)
    tolerance = 2e-2 if result.dtype.itemsize == 2 else 1e-4
    exact = np.asarray(exact, np.float64)
    finite = np.abs(exact[np.isfinite(exact)])
    size = 1 + finite.max(initial=0)
    return result.shape == exact.shape and np.allclose(
        result.astype(np.float64), exact, rtol=tolerance, atol=tolerance * size, equal_nan=True
    )


def counted(result, a):
    """A result, of an array only what counts; the rest must be 0."""
    x, mask = np.asarray(a.get("x", a.get("input"))), a.get("mask")
    if mask is None:
        return result
    if isinstance(result, tuple):
        return tuple(counted(r, a) if np.shape(r) == x.shape else r for r in result)
    if np.shape(result) != x.shape:
        return result
    mask = np.broadcast_to(mask, (x.shape[0], 1, *x.shape[2:]))
    assert (gathered(result, ~mask) == 0).all()
    return gathered(result, mask)


def bits(value):
    """What an argument holds, to compare later."""
    plain = type(value) is np.ndarray and not value.dtype.hasobject
    return value.tobytes() if plain else None


@pytest.mark.parametrize("name", F.__all__)
@given(st.data())
def test_a_function_gives_the_right_result_or_changes_nothing(name, data):
    function = getattr(F, name)
    arguments = data.draw(calls(function))
    before = {key: bits(value) for key, value in arguments.items()}
    kept = {k: v.copy() if type(v) is np.ndarray else v for k, v in arguments.items()}
    out = arguments.get("out")
    kinds = {key: p.kind for key, p in inspect.signature(function).parameters.items()}
    only = inspect.Parameter.KEYWORD_ONLY
    keyword = {key: value for key, value in arguments.items() if kinds[key] == only}
    positional = [value for key, value in arguments.items() if key not in keyword]
    try:
        result = function(*positional, **keyword)
    except (TypeError, ValueError):
        assert {key: bits(value) for key, value in arguments.items()} == before
        return
    updates = arguments.get("training") or arguments.get("use_input_stats")
    written = {"out"} | (set(RUNNING) if updates else set())
    for key, value in arguments.items():
        in_place = isinstance(out, np.ndarray) and np.may_share_memory(value, out)
        if key not in written and not (isinstance(value, np.ndarray) and in_place):
            assert bits(value) == before[key], key
    if out is not None:
        assert (result[0] if isinstance(result, tuple) else result) is out
    parts = list(parts_of(kept))
    if all(np.size(part.get("x", part.get("input"))) for part in parts):
        with np.errstate(all="ignore"):
            exact = joined(name, batch_size_of(kept), [expected(name, part) for part in parts])
            assert agree(counted(result, kept), exact)


class LayerMachine(RuleBasedStateMachine):
    """A layer through any sequence of calls, beside what it should hold."""

    @initialize(channels=st.integers(1, 5), momentum=st.sampled_from([0.1, None, 1.0]))
    def begin(self, channels, momentum):
        self.bn = fastbn.LazyBatchNorm2d(momentum=momentum, dtype="float64")
        self.channels = channels
        self.rng = np.random.default_rng(channels)
        self.bn.eval()(np.zeros((0, channels, 2, 2)))  # tells the channels, and nothing else
        self.bn.train()
        self.bn.weight[:], self.bn.bias[:] = parameters(channels, np.float64)
        self.running = np.zeros(channels), np.ones(channels)
        self.batches = 0
        self.gradients = None
        self.remembered = None
        self.frozen = False

    def statistics(self, x):
        """Mean and variance that the layer should use now."""
        by_batch = self.bn.training and not self.frozen
        return reference.moments(x)[1:] if by_batch else self.running

    @rule(samples=st.integers(1, 4), in_place=st.booleans())
    def forward(self, samples, in_place):
        x = some(self.rng, (samples, self.channels, 2, 3), np.float64)
        kept, (mean, var) = x.copy(), self.statistics(x)
        y = self.bn(x, out=x if in_place else None)
        exact = reference.normalize(kept, mean, var, self.bn.weight, self.bn.bias)
        assert_close(y, exact, 1e-12)
        if self.bn.training and not self.frozen:
            self.batches += 1
            momentum = 1 / self.batches if self.bn.momentum is None else self.bn.momentum
            self.running = reference.updated(kept, *self.running, momentum)
        self.remembered = (kept, mean, var, self.frozen) if self.bn.training else None

    @rule(in_place=st.booleans())
    def backward(self, in_place):
        if self.remembered is None:
            with refused(RuntimeError, "forward", intact=[self.bn]):
                self.bn.backward(np.ones((1, self.channels, 2, 3)))
            return
        x, mean, var, frozen = self.remembered
        dy = some(self.rng, x.shape, np.float64)
        if frozen:
            dx, *gradients = reference.backward_frozen(dy, x, mean, var, self.bn.weight)
        else:
            dx, *gradients = reference.backward(dy, x, self.bn.weight)
        assert_close(self.bn.backward(dy, out=dy if in_place else None), dx, 1e-9)
        before = self.gradients or (0, 0)
        self.gradients = [a + b for a, b in zip(before, gradients, strict=True)]
        self.remembered = None

    @rule(mode=st.sampled_from(["train", "eval", "freeze", "unfreeze"]))
    def change_mode(self, mode):
        getattr(self.bn, mode)()
        if "freeze" in mode:
            self.frozen = mode == "freeze"

    @rule()
    def zero_grad(self):
        self.bn.zero_grad()
        self.gradients = None

    @rule(axes=st.sampled_from([(2, 7, 2, 2), (2, 3), (1,), (2, 2, 2, 2, 2)]))
    def refuse_an_input(self, axes):
        with refused(ValueError, intact=[self.bn]):
            self.bn(np.ones(axes))

    @rule(keys=st.sampled_from([["weight"], ["bias", "running_var"], ["nothing"]]))
    def refuse_a_state(self, keys):
        state = self.bn.state_dict() | {key: np.ones(self.channels + 1) for key in keys}
        with refused((ValueError, RuntimeError), intact=[self.bn]):
            self.bn.load_state_dict(state)

    @rule(duplicate=st.sampled_from([copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))]))
    def go_on_with_a_duplicate(self, duplicate):
        # What a forward has remembered is not duplicated.
        self.bn = duplicate(self.bn)
        self.remembered = None

    @rule()
    def go_on_with_the_state_in_another_layer(self):
        bn = fastbn.LazyBatchNorm2d(momentum=self.bn.momentum, dtype="float64")
        bn.load_state_dict(self.bn.state_dict())
        self.bn = bn.train(self.bn.training)
        if self.frozen:
            bn.freeze()
        self.remembered = self.gradients = None

    @invariant()
    def holds_what_it_should(self):
        assert self.bn.num_batches_tracked == self.batches
        assert_close(self.bn.running_mean, self.running[0], 1e-12)
        assert_close(self.bn.running_var, self.running[1], 1e-12)
        if self.gradients is None:
            assert self.bn.weight_grad is self.bn.bias_grad is None
        else:
            assert_close(self.bn.weight_grad, self.gradients[0], 1e-9)
            assert_close(self.bn.bias_grad, self.gradients[1], 1e-9)


def test_a_layer_is_right_through_any_sequence_of_calls():
    run_state_machine_as_test(LayerMachine)
