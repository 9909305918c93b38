"""Layers with activations and residuals: forward and backward, in place, copies, tools."""

import copy
import pickle
import tracemalloc

import activated
import numpy as np
import pytest
import reference
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import core
from support import same_bits, some

import fastbn

BATCH_NORMS = {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}
BATCH_NORMS[5] = fastbn.BatchNorm3d
INSTANCE_NORMS = {3: fastbn.InstanceNorm1d, 4: fastbn.InstanceNorm2d, 5: fastbn.InstanceNorm3d}


def layer_of(case, lazy=False):
    """A layer in training mode, of float64, that does what a case tells."""
    channels, rank = case.x.shape[1], case.x.ndim
    options = {"activation": case.activation, "negative_slope": case.slope, "dtype": np.float64}
    if case.groups:
        layer = fastbn.GroupNorm(case.groups, channels, **options)
    elif case.batch_size == 1:
        layer = INSTANCE_NORMS[rank](channels, affine=True, **options)
    else:
        layer = BATCH_NORMS[rank](channels, ghost_batch_size=case.batch_size, **options)
    if case.weight is None:
        layer.weight = None
    else:
        layer.weight[:] = case.weight
    if case.bias is None:
        layer.bias = None
    else:
        layer.bias[:] = case.bias
    if case.running is not None:
        layer.running_mean[:], layer.running_var[:] = case.running
        layer.freeze()
    return layer


@settings(max_examples=250)
@given(st.data())
def test_a_step_is_that_of_the_formulas(data):
    case, dy = data.draw(activated.cases())
    expected, bounds = activated.expected(case, dy)
    layer, x, residual = layer_of(case), case.x, case.residual
    out = data.draw(activated.outputs(x, residual))
    y = layer(x, out=out, mask=case.mask, residual=residual)
    assert out is None or y is out
    y = y.copy()
    if residual is None:
        dx, dresidual = layer.backward(dy, out=data.draw(activated.outputs(dy, None))), None
    else:
        residual_out = data.draw(activated.outputs(dy, None))
        dx, dresidual = layer.backward(dy, residual_out=residual_out)
        assert residual_out is None or dresidual is residual_out
    if out is x:
        bounds = activated.inverted(bounds, x.dtype)
    gradients = dx, layer.weight_grad, layer.bias_grad, dresidual
    activated.assert_step((y, *gradients), expected, bounds)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 5), (3, 2, 4, 5)], ids=str)
def test_a_sample_without_an_axis_of_samples_is_a_batch_of_one(rng, shape, masked, in_place):
    x, dy, residual = (some(rng, shape) for _ in range(3))
    mask = np.arange(x[0].size).reshape(1, 1, *shape[1:]) > 2 if masked else None
    batch, single = (
        INSTANCE_NORMS[len(shape) + 1](3, affine=True, activation="relu6") for _ in range(2)
    )
    expected = batch(x[np.newaxis], mask=mask, residual=residual[np.newaxis])
    place = x.copy() if in_place else None
    y = single(x if place is None else place, out=place, mask=mask, residual=residual)
    assert same_bits(y, expected[0])
    for into in (None, np.empty_like(x), dy.copy()):
        if into is not None:
            batch(x[np.newaxis], mask=mask, residual=residual[np.newaxis])
            single(x, mask=mask, residual=residual)
        gradient = dy if into is None else into
        gradient[...] = dy
        expected = batch.backward(dy[np.newaxis])
        results = single.backward(gradient, residual_out=into)
        assert into is None or results[1] is into
        assert same_bits(results[0], expected[0][0])
        assert same_bits(results[1], expected[1][0])


# On which side of a kink a value lies is decided before it is rounded.


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kink", [0.0, 6.0])
def test_a_layer_decides_before_it_rounds(
    rng, half, activation, added, masked, frozen, in_place, kink
):
    layer = fastbn.BatchNorm2d(3, activation=activation, negative_slope=0.5, dtype=np.float64)
    layer.frozen = frozen
    # Values so near to the kink that they are rounded to it.
    size = 2e-4 if kink else 1e-42
    layer.weight[:], layer.bias[:] = [size, -size, size], kink
    x = some(rng, (4, 3, 5, 7), half, mean=0.0)
    z = kink + reference.over_channels(layer.weight, 4) * (
        reference.wide(x) if frozen else reference.forward(x)
    )
    mask = np.ones((4, 1, 5, 7), bool) if masked else None
    residual = np.zeros_like(x) if added else None
    y = layer(x, out=x if in_place else None, mask=mask, residual=residual)
    assert (y.astype(float) == kink).all()
    decided = np.abs(z - kink) > (2e-6 if kink else 0)
    layer.backward(decided.astype(half))
    exact = (decided * reference.derivative(z, activation, 0.5)).sum(axis=(0, 2, 3))
    assert same_bits(layer.bias_grad, exact.astype(float))


# In place.


def steps(make, x, dy):
    """Results of a step in place and of one that is not, and the layer of the former."""
    results = []
    for in_place in (True, False):
        layer, a = make(), x.copy(order="K")
        y = layer(a, out=a if in_place else None).copy()
        kept = layer._saved.kept
        results.append([y, layer.backward(dy), layer.weight_grad, layer.bias_grad])
        if in_place:
            kept_in_place = kept
    return *results, kept_in_place


def batch_norm(activation, slope, weight=1.0, bias=0.0, dtype=np.float64):
    layer = fastbn.BatchNorm2d(5, activation=activation, negative_slope=slope, dtype=dtype)
    layer.weight[:] = np.array([1, -1, 2, 0.5, -3]) * weight
    layer.bias[:] = np.array([0, 1, -1, 0.3, 2]) * bias
    return layer


INVERTIBLE = [1e-3, 0.01, 0.2, 1.0, 1.5, 30.0]


@pytest.mark.parametrize("slope", INVERTIBLE)
@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last, support.sliced])
def test_in_place_leaky_relu_is_inverted(rng, dtype, slope, weight, layout):
    if dtype.name == "float16" and weight != 1.0:
        pytest.skip("outputs are beyond the normal numbers of float16")
    x, dy = (layout(some(rng, (6, 5, 7, 8), dtype)) for _ in range(2))
    actual, expected, kept = steps(lambda: batch_norm("leaky_relu", slope, weight, weight), x, dy)
    assert kept is None
    assert same_bits(actual[0], expected[0])
    relative = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-5, "float64": 1e-13}[dtype.name]
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        support.assert_close(gradient, exact, relative)


LOST = [
    ("leaky_relu", 0.0, 1.0, 1.0),
    ("leaky_relu", -0.0, 1.0, 1.0),
    ("leaky_relu", -0.5, 1.0, 1.0),
    ("leaky_relu", 1e-42, 1.0, 1.0),
    ("leaky_relu", 1e-30, 1e-10, 1e-10),
    ("leaky_relu", 1e-310, 1e10, 1e10),
    ("leaky_relu", 0.1, 0.0, 1.0),
    ("leaky_relu", 1e30, 1e10, 1.0),
    ("relu", 0.01, 1.0, 1.0),
    ("relu6", 0.01, 1.0, 1.0),
]


@pytest.mark.parametrize(("activation", "slope", "weight", "bias"), LOST)
@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last, support.sliced])
def test_what_in_place_activations_lose_is_kept(rng, activation, slope, weight, bias, layout):
    x, dy = (layout(some(rng, (6, 5, 7, 8))) for _ in range(2))
    with np.errstate(all="ignore"):
        actual, expected, kept = steps(lambda: batch_norm(activation, slope, weight, bias), x, dy)
    assert same_bits(kept, x)
    assert all(map(same_bits, actual, expected))


@pytest.mark.parametrize("lost", [[1], [0, 3]])
@pytest.mark.parametrize("by", ["weight", "slope", "bias"])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last, support.sliced])
def test_of_leaky_relu_in_place_the_lost_channels_alone_are_kept(rng, layout, quick, by, lost):
    def make():
        layer = batch_norm("leaky_relu", 0.01)
        if by == "bias":
            layer.bias[lost] = 100.0
        else:  # With a factor of the slope, the latter is below the normal numbers of float32.
            layer.weight[lost] = {"weight": 0.0, "slope": 1e-37}[by]
        return layer

    x, dy = (layout(some(rng, (6, 5, 7, 8))) for _ in range(2))
    was_on = core.set_quick_path(quick)
    try:
        actual, expected, kept = steps(make, x, dy)
    finally:
        core.set_quick_path(was_on)
    assert same_bits(kept, x[:, lost])
    assert same_bits(actual[0], expected[0])
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        support.assert_close(gradient, exact, 1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
def test_in_place_with_a_residual_keeps_a_copy(rng, activation):
    x, dy, residual = (some(rng, (6, 5, 7, 8)) for _ in range(3))
    results = []
    for in_place in (True, False):
        layer, a = batch_norm(activation, 0.01, bias=1.0), x.copy()
        y = layer(a, out=a if in_place else None, residual=residual)
        assert (layer._saved.kept is not None) == in_place
        results.append([y.copy(), *layer.backward(dy), layer.weight_grad, layer.bias_grad])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(("activation", "copies"), [("leaky_relu", 0), ("relu", 1), ("relu6", 1)])
def test_the_memory_of_a_step_in_place(rng, activation, copies):
    layer, x = fastbn.BatchNorm2d(8, activation=activation), some(rng, (16, 8, 40, 40))
    dy = some(rng, x.shape)
    tracemalloc.start()
    try:
        layer(x, out=x)
        layer.backward(dy, out=dy)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert copies * x.nbytes <= peak < (copies + 0.1) * x.nbytes


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_parameters_may_be_updated_before_the_backward_in_place(rng, activation, in_place):
    x, dy, results = some(rng, (4, 5, 6, 7)), some(rng, (4, 5, 6, 7)), []
    for change in (0.0, 1.0):
        layer, a = batch_norm(activation, 0.01, bias=1.0), x.copy()
        layer(a, out=a if in_place else None)
        layer.bias += change
        if in_place:
            layer.weight += change
        results.append([layer.backward(dy), layer.weight_grad, layer.bias_grad])
    assert all(map(same_bits, *results))


def test_the_residual_and_the_output_may_be_overwritten_before_the_backward(rng):
    x, dy, residual = (some(rng, (4, 5, 6, 7)) for _ in range(3))
    results = []
    for overwrite in (False, True):
        layer, added = batch_norm("relu6", 0.01), residual.copy()
        y = layer(x, residual=added)
        if overwrite:
            y[...] = added[...] = np.nan
        results.append([*layer.backward(dy), layer.weight_grad, layer.bias_grad])
    assert all(map(same_bits, *results))


# Modes, copies and tools.


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}])
@pytest.mark.parametrize(("activation", "slope"), activated.ACTIVATIONS)
def test_evaluation_is_followed_by_the_activation(rng, options, activation, slope):
    plain = fastbn.BatchNorm2d(5, **options)
    plain(some(rng, (4, 5, 6, 7)))
    layer = copy.copy(plain)
    layer.activation, layer.negative_slope = activation, slope
    x, residual = some(rng, (4, 5, 6, 7)), some(rng, (4, 5, 6, 7))
    z = plain.eval()(x)
    one = np.float32(slope)
    for added, before in ((None, z), (residual, z + residual)):
        expected = {
            None: before,
            "relu": np.where(before < 0, np.float32(0), before),
            "relu6": np.clip(before, np.float32(0), np.float32(6)),
            "leaky_relu": np.where(before > 0, before, before * one),
        }[activation]
        assert same_bits(layer.eval()(x, residual=added), expected)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        layer.backward(x)


@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
def test_a_lazy_layer_keeps_its_activation(rng, kind):
    lazy = getattr(fastbn, f"Lazy{kind}2d")(activation="leaky_relu", negative_slope=0.3)
    layer = getattr(fastbn, f"{kind}2d")(
        3, affine=True, track_running_stats=True, activation="leaky_relu", negative_slope=0.3
    )
    assert repr(lazy).endswith("activation=leaky_relu, negative_slope=0.3)")
    x, dy, residual = (some(rng, (4, 3, 5, 6)) for _ in range(3))
    results = [[each(x, residual=residual), *each.backward(dy)] for each in (lazy, layer)]
    assert all(map(same_bits, *results))
    assert repr(lazy) == repr(layer)


def of_every_kind(**options):
    return [
        fastbn.BatchNorm1d(4, **options),
        fastbn.BatchNorm2d(4, ghost_batch_size=2, **options),
        fastbn.InstanceNorm2d(4, **options),
        fastbn.GroupNorm(2, 4, **options),
        fastbn.LazyBatchNorm3d(**options),
    ]


DUPLICATES = [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_keep_the_activation(duplicate):
    for layer in of_every_kind(activation="leaky_relu", negative_slope=0.25):
        twin = duplicate(layer)
        assert (twin.activation, twin.negative_slope) == ("leaky_relu", 0.25)
        assert repr(twin) == repr(layer)


@pytest.mark.parametrize("duplicate", DUPLICATES[1:])
def test_a_layer_that_was_pickled_before_there_were_activations_has_none(rng, duplicate):
    for layer in of_every_kind():
        del layer.activation, layer.negative_slope
        twin = duplicate(layer)
        assert (twin.activation, twin.negative_slope) == (None, 0.01)
    bn = fastbn.BatchNorm2d(4)
    x = some(rng, (3, 4, 5, 6))
    expected = bn(x)
    del bn.activation, bn.negative_slope
    assert same_bits(duplicate(bn)(x), expected)


def test_repr_shows_what_is_not_the_default():
    for layer in of_every_kind():
        assert "activation" not in repr(layer)
        assert "negative_slope" not in repr(layer)
    for layer in of_every_kind(activation="relu6"):
        assert "activation=relu6" in repr(layer)
        assert "negative_slope" not in repr(layer)


def test_state_dicts_know_no_activation(rng):
    plain, layer = fastbn.BatchNorm2d(4), fastbn.BatchNorm2d(4, activation="relu")
    plain(some(rng, (3, 4, 5, 6)))
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert layer.load_state_dict(plain.state_dict()) == ([], [])
    assert layer.activation == "relu"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_recalibration_is_by_what_comes_before_the_activation(rng, added, in_place):
    batches = [some(rng, (6, 4, 5, 6), mean=i) for i in range(3)]
    residual = some(rng, (6, 4, 5, 6)) if added else None
    for make in (
        fastbn.BatchNorm2d,
        lambda c, **o: fastbn.InstanceNorm2d(c, track_running_stats=True, **o),
    ):
        plain, layer = make(4), make(4, activation="relu")
        with fastbn.recalibrate(plain, layer):
            for x in batches:
                plain(x)
                a = x.copy()
                y = layer(a, out=a if in_place else None, residual=residual)
                assert (y >= 0).all()
        assert same_bits(layer.running_mean, plain.running_mean)
        assert same_bits(layer.running_var, plain.running_var)


def test_a_converted_layer_keeps_its_activation(rng):
    comm = pytest.importorskip("mpi4py.MPI").COMM_SELF
    bn = fastbn.BatchNorm2d(4, activation="leaky_relu", negative_slope=0.3)
    sync = fastbn.convert_sync_batchnorm(copy.deepcopy(bn), comm)
    assert (sync.activation, sync.negative_slope) == ("leaky_relu", 0.3)
    x, dy, residual = (some(rng, (6, 4, 5, 6)) for _ in range(3))
    for layer in (bn, sync):
        layer.weight[:], layer.bias[:] = support.parameters(4)
    expected, actual = (
        [each(x, residual=residual), *each.backward(dy), each.weight_grad, each.bias_grad]
        for each in (bn, sync)
    )
    for one, other in zip(actual, expected, strict=True):
        support.assert_close(one, other, 1e-6)


# Against torch.


@pytest.mark.torch
@pytest.mark.parametrize(("activation", "slope"), activated.ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "frozen", "InstanceNorm2d", "GroupNorm"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_is_that_of_torch(rng, activation, slope, added, kind, in_place):
    torch = pytest.importorskip("torch")
    name = kind if kind != "frozen" else "BatchNorm2d"
    options = {"affine": True, "track_running_stats": True} if kind == "InstanceNorm2d" else {}
    sizes = (2, 4) if kind == "GroupNorm" else (4,)
    theirs = getattr(torch.nn, name)(*sizes, **options).double()
    ours = getattr(fastbn, name)(
        *sizes, **options, activation=activation, negative_slope=slope, dtype=np.float64
    )
    for parameter in theirs.parameters():
        parameter.data.copy_(support.tensor(rng.standard_normal(parameter.shape) + 1))
    if kind == "frozen":
        theirs.running_mean[:], theirs.running_var[:] = 0.3, 2.0
        theirs.eval()
        ours.freeze()
    ours.load_state_dict(theirs.state_dict())
    x, dy, residual = (3 * rng.standard_normal((5, 4, 6, 7)) for _ in range(3))
    a, b = support.tensor(x).requires_grad_(), support.tensor(residual).requires_grad_()
    z = theirs(a) + b if added else theirs(a)
    functional = torch.nn.functional
    y = {
        None: lambda z: z,
        "relu": functional.relu,
        "relu6": functional.relu6,
        "leaky_relu": lambda z: functional.leaky_relu(z, slope),
    }[activation](z)
    y.backward(support.tensor(dy))
    given = x.copy()
    actual = ours(given, out=given if in_place else None, residual=residual if added else None)
    support.assert_close(actual, y.detach().numpy(), 1e-12)
    gradients = ours.backward(dy)
    expected = [a.grad.numpy()]
    if added:
        expected.append(b.grad.numpy())
    else:
        gradients = [gradients]
    for gradient, exact in zip(gradients, expected, strict=True):
        support.assert_close(gradient, exact, 1e-12)
    support.assert_close(ours.weight_grad, theirs.weight.grad.numpy(), 1e-12)
    support.assert_close(ours.bias_grad, theirs.bias.grad.numpy(), 1e-12)
