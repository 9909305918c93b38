"""Layers with activations and residuals: forward and backward, in place, copies, tools."""

import copy
import pickle
import tracemalloc

import activated
import numpy as np
import pytest
import reference
import support
from cases import each
from hypothesis import given, settings
from hypothesis import strategies as st
from internals import core
from support import same_bits, some, some_mask

import fastbn

ACTIVATED = ["relu", "relu6", "leaky_relu"]
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


@each("activation", ["relu", "relu6", "leaky_relu"])
@each("added", [False, True])
@each("masked", [False, True])
@each("frozen", [False, True])
@each("in_place", [False, True])
@each("kink", [0.0, 6.0])
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


@each("slope", INVERTIBLE)
@each("weight", [1.0, 1e-3, 1e3])
@each("layout", [support.contiguous, support.channels_last, support.sliced])
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


@each("activation, slope, weight, bias", LOST)
@each("layout", [support.contiguous, support.channels_last, support.sliced])
def test_what_in_place_activations_lose_is_kept(rng, activation, slope, weight, bias, layout):
    x, dy = (layout(some(rng, (6, 5, 7, 8))) for _ in range(2))
    with np.errstate(all="ignore"):
        actual, expected, kept = steps(lambda: batch_norm(activation, slope, weight, bias), x, dy)
    assert same_bits(kept, x)
    assert all(map(same_bits, actual, expected))


@each("lost", [[1], [0, 3]])
@each("by", ["weight", "slope", "bias"])
@pytest.mark.parametrize("quick", [False, True])
@each("layout", [support.contiguous, support.channels_last, support.sliced])
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
        # The output has served, as the copy tells: the gradient of the residual may take its place.
        gradients = layer.backward(dy, residual_out=y if in_place else None)
        results.append([*gradients, layer.weight_grad, layer.bias_grad])
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


# Calls that are seldom made.


def step_of(layer, x, dy, mask=None, residual=None, out=None):
    """Copies of the results of a step."""
    y = layer(x, mask=mask, residual=residual, out=out).copy(order="K")
    gradients = layer.backward(dy)
    gradients = [gradients] if residual is None else list(gradients)
    return [y, *gradients, layer.weight_grad.copy(), layer.bias_grad.copy()]


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("added", [False, True])
def test_a_cumulative_average_is_of_what_comes_before_the_activation(rng, activation, added):
    plain, layer = (
        fastbn.BatchNorm2d(5, momentum=None, activation=of) for of in (None, activation)
    )
    for _ in range(3):
        x, residual = some(rng, (6, 5, 7, 8)), some(rng, (6, 5, 7, 8)) if added else None
        z, y = plain(x, residual=residual), layer(x, residual=residual)
        exact = {"relu": z.clip(0), "relu6": z.clip(0, 6)}
        exact["leaky_relu"] = np.where(z > 0, z, z * np.float32(0.01))
        np.testing.assert_array_equal(y, exact[activation])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(layer, name), getattr(plain, name))


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("layout", [support.contiguous, support.channels_last])
def test_a_mask_of_nothing_but_true_changes_nothing(rng, activation, added, layout):
    x, dy, residual = (layout(some(rng, (6, 5, 7, 8))) for _ in range(3))
    mask = np.ones((6, 1, 7, 8), bool)
    plain, masked = (
        step_of(batch_norm(activation, 0.01), x, dy, of, residual if added else None)
        for of in (None, mask)
    )
    assert all(map(same_bits, plain, masked))


@each("activation", [None, *ACTIVATED])
@each("in_place", [False, True])
@each("layout", [support.contiguous, support.channels_last, support.sliced])
def test_a_residual_may_be_the_input(rng, activation, in_place, layout):
    x, dy = (layout(some(rng, (6, 5, 7, 8))) for _ in range(2))
    expected = step_of(batch_norm(activation, 0.01), x, dy, residual=x.copy())
    actual = step_of(batch_norm(activation, 0.01), x, dy, residual=x, out=x if in_place else None)
    assert all(map(same_bits, actual, expected))


KINDS = {
    "batch": fastbn.BatchNorm2d,
    "ghost": lambda c, **options: fastbn.BatchNorm2d(c, ghost_batch_size=2, **options),
    "frozen": lambda c, **options: fastbn.BatchNorm2d(c, **options).freeze(),
    "instance": lambda c, **options: fastbn.InstanceNorm2d(c, affine=True, **options),
    "group": lambda c, **options: fastbn.GroupNorm(2, c, **options),
}


@each("activation", [None, *ACTIVATED])
@pytest.mark.parametrize("kind", KINDS)
@each("shape", [(0, 4, 3, 3), (3, 4, 0, 3)])
@each("in_place", [False, True])
def test_an_empty_batch_has_an_empty_step(activation, kind, shape, in_place):
    layer = KINDS[kind](4, activation=activation)
    x, dy, residual = (np.zeros(shape, np.float32) for _ in range(3))
    state = copy.deepcopy(layer.state_dict())
    y, *gradients, dweight, dbias = step_of(layer, x, dy, None, residual, x if in_place else None)
    assert [a.shape for a in (y, *gradients)] == [shape] * 3
    assert not dweight.any()
    assert not dbias.any()
    for name, value in layer.state_dict().items():
        assert same_bits(value, state[name])


@each("in_place", [False, True])
@each("added", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@each("activation", [None, "relu", "leaky_relu"])
def test_the_backward_is_that_of_the_options_of_its_forward(rng, activation, kind, added, in_place):
    results = []
    for changes in (False, True):
        x, dy, residual = (some(np.random.default_rng(1), (6, 4, 5, 7)) for _ in range(3))
        layer = KINDS[kind](4, activation=activation, negative_slope=0.3)
        y = layer(x, residual=residual if added else None, out=x if in_place else None)
        if changes:
            layer.activation, layer.negative_slope = "relu6", 0.7
            layer.eval()
        dx = layer.backward(dy)
        results.append([y, *(dx if added else [dx]), layer.weight_grad, layer.bias_grad])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("activation", ACTIVATED)
@each("added", [False, True])
@each("in_place", [False, True])
@each("layout", [support.contiguous, support.channels_last])
def test_one_process_is_a_layer_of_its_own(rng, activation, added, in_place, layout):
    comm = pytest.importorskip("mpi4py.MPI").COMM_SELF
    plain = fastbn.BatchNorm2d(4, activation=activation)
    plain.weight[:], plain.bias[:] = support.parameters(4)
    sync = fastbn.convert_sync_batchnorm(copy.deepcopy(plain), comm)
    x, dy, residual = (layout(some(rng, (6, 4, 5, 6))) for _ in range(3))
    added = {"residual": residual} if added else {}
    expected = step_of(plain, x, dy, **added)
    actual = step_of(sync, x, dy, **added, out=x if in_place else None)
    for one, other in zip(actual, expected, strict=True):
        support.assert_close(one, other, 1e-5)


# Against torch.


@pytest.mark.torch
@pytest.mark.parametrize("activation", [None, *ACTIVATED])
@each("masked", [False, True])
@each("size", [None, 3])
@each("layout", [support.contiguous, support.channels_last])
@each("in_place", [False, True])
def test_a_step_of_valid_positions_is_that_of_torch(
    rng, activation, masked, size, layout, in_place
):
    torch = pytest.importorskip("torch")
    x, dy, residual = (layout(some(rng, (6, 4, 5, 7), std=1.0)) for _ in range(3))
    mask = some_mask(rng, x.shape) if masked else np.ones((6, 1, 5, 7), bool)
    ours = fastbn.BatchNorm2d(4, activation=activation, ghost_batch_size=size)
    ours.weight[:], ours.bias[:] = support.parameters(4)
    leaves = [support.tensor(a.copy(order="K")) for a in (x, residual, ours.weight, ours.bias)]
    theirs_x, theirs_residual, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    valid, follow = torch.from_numpy(mask), torch.nn.functional
    parts = []
    for part in range(0, 6, size or 6):
        of = slice(part, part + (size or 6))
        # Channels first, and of each the valid positions.
        where = valid[of].movedim(1, 0)[0]
        values = theirs_x[of].movedim(1, 0)[:, where].T
        z = follow.batch_norm(values, None, None, weight, bias, training=True)
        placed = torch.zeros_like(theirs_x[of]).movedim(1, 0).clone()
        placed[:, where] = z.T
        parts.append(placed.movedim(0, 1))
    y = (torch.cat(parts) + theirs_residual) * valid
    if activation is not None:
        y = getattr(follow, activation)(y)
    y.backward(support.tensor(dy))
    actual = step_of(ours, x, dy, mask if masked else None, residual, x if in_place else None)
    exact = [y.detach(), *(leaf.grad for leaf in leaves)]
    for one, other in zip(actual, exact, strict=True):
        support.assert_close(one, other.numpy(), 2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("activation", [None, *ACTIVATED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_may_be_a_tensor_on_the_memory_of_the_output(rng, activation, kind):
    torch = pytest.importorskip("torch")
    x, dy, residual = (some(rng, (6, 4, 5, 7)) for _ in range(3))
    expected = step_of(KINDS[kind](4, activation=activation), x, dy, residual=residual)
    added = torch.from_numpy(residual)
    actual = step_of(KINDS[kind](4, activation=activation), x, dy, residual=added, out=residual)
    assert same_bits(added.numpy(), actual[0])
    assert all(map(same_bits, actual, expected))


@pytest.mark.torch
@each("activation, slope", activated.ACTIVATIONS)
@each("added", [False, True])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "frozen", "InstanceNorm2d", "GroupNorm"])
@each("in_place", [False, True])
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
