"""A backward notices what has been written to since its forward, and then writes nothing."""

import numpy as np
import pytest
from cases import each
from internals import alone_on_its_rank
from kinds import KINDS, OneRank
from support import (
    byte_swapped,
    channels_last,
    contiguous,
    dtype_of,
    fortran,
    gathered,
    negative_strides,
    same_bits,
    sliced,
    some,
    some_mask,
    unaligned,
    untouched,
)

import fastbn

pytestmark = pytest.mark.wheel

LAYOUTS = [contiguous, channels_last, sliced, negative_strides, fortran, unaligned, byte_swapped]
WRITTEN_TO = "has been written to since, by an activation in place"


def alone(channels):
    """A SyncBatchNorm of this process alone."""
    return fastbn.SyncBatchNorm(channels, comm=pytest.importorskip("mpi4py.MPI").COMM_SELF)


LAYERS = {
    "1d": (fastbn.BatchNorm1d, (16, 6, 10)),
    "2d": (fastbn.BatchNorm2d, (6, 6, 5, 8)),
    "3d": (fastbn.BatchNorm3d, (4, 6, 5, 2, 4)),
    "lazy": (lambda _: fastbn.LazyBatchNorm2d(), (6, 6, 5, 8)),
    "ghost": (lambda c: fastbn.BatchNorm2d(c, ghost_batch_size=4), (6, 6, 5, 8)),
    "frozen": (lambda c: fastbn.BatchNorm2d(c).freeze(), (6, 6, 5, 8)),
    "instance": (lambda c: fastbn.InstanceNorm2d(c, affine=True), (6, 6, 5, 8)),
    "sample": (lambda c: fastbn.InstanceNorm2d(c), (6, 15, 16)),
    "group": (lambda c: fastbn.GroupNorm(2, c), (6, 6, 5, 8)),
    "sync": (alone, (6, 6, 5, 8)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def relu_in_place(h):
    np.maximum(h, 0, out=h)


def assert_refused(layer, dy):
    """The backward raises, and everything is as before it."""
    out = np.full_like(dy, 7)
    with untouched(layer, dy, out), pytest.raises(RuntimeError, match=WRITTEN_TO):
        layer.backward(dy, out=out)


@layers
def test_an_activation_in_place_on_the_input_is_noticed(rng, quick, make, shape):
    layer, x, dy = make(6), some(rng, shape), some(rng, shape)
    layer(x)
    relu_in_place(x)
    assert_refused(layer, dy)
    assert layer.weight_grad is None


@layers
def test_an_activation_in_place_on_the_output_that_took_its_place_is_noticed(
    rng, quick, make, shape
):
    layer, x, dy = make(6), some(rng, shape), some(rng, shape)
    layer(x, out=x)
    relu_in_place(x)
    if isinstance(layer, fastbn.SyncBatchNorm):  # It keeps a copy of its input.
        layer.backward(dy)
    else:
        assert_refused(layer, dy)


@each("layout", LAYOUTS)
@each("in_place", [False, True])
def test_it_is_noticed_in_every_layout(rng, dtype, quick, layout, in_place):
    bn, dy = fastbn.BatchNorm2d(5), some(rng, (6, 5, 4, 7), dtype)
    x = layout(some(rng, dy.shape, dtype))
    if not x.dtype.isnative:
        in_place = False  # Results are of native byte order.
    bn(x, out=x if in_place else None)
    x[...] = np.maximum(x, 0)
    assert_refused(bn, dy)


@pytest.mark.parametrize("in_place", [False, True])
@layers
def test_it_is_noticed_with_a_mask(rng, make, shape, in_place):
    layer, x, dy = make(6), some(rng, shape), some(rng, shape)
    samples = 1 if shape == LAYERS["sample"][1] else shape[0]
    mask = rng.random((samples, 1, *shape[1 if samples == 1 else 2 :])) < 0.1
    mask[:, :, :2] = True
    layer(x, mask=mask, out=x if in_place else None)
    relu_in_place(x)
    if in_place and isinstance(layer, fastbn.SyncBatchNorm):
        return
    assert_refused(layer, dy)


# Layers and inputs of all layouts of the core: rows and long rows, columns, folded ones with rows
# left over, strips; ghost batches with samples left over. All are large enough for threads.
IN_PLACE = {
    "rows": (fastbn.BatchNorm2d, (8, 8, 30, 31), contiguous),
    "long rows": (fastbn.BatchNorm1d, (1, 2, 40000), contiguous),
    "columns": (fastbn.BatchNorm2d, (300, 40, 3, 3), contiguous),
    "columns, then rows": (fastbn.BatchNorm2d, (200, 6, 8, 9), contiguous),
    "folded columns": (fastbn.BatchNorm2d, (61, 12, 9, 11), channels_last),
    "strips": (fastbn.BatchNorm2d, (12, 700, 3, 3), channels_last),
    "ghosts": (lambda c: fastbn.BatchNorm2d(c, ghost_batch_size=4), (18, 8, 20, 19), contiguous),
    "channels-last ghosts": (
        lambda c: fastbn.BatchNorm2d(c, ghost_batch_size=4), (18, 8, 20, 19), channels_last
    ),
    "small ghosts": (
        lambda c: fastbn.BatchNorm2d(c, ghost_batch_size=2), (3001, 5, 2, 2), contiguous
    ),
    "instances": (fastbn.InstanceNorm2d, (12, 8, 24, 25), contiguous),
    "channels-last instances": (fastbn.InstanceNorm2d, (12, 8, 24, 25), channels_last),
    "groups": (lambda c: fastbn.GroupNorm(2, c), (12, 8, 24, 25), contiguous),
    "channels-last groups": (lambda c: fastbn.GroupNorm(2, c), (12, 8, 24, 25), channels_last),
    "frozen": (lambda c: fastbn.BatchNorm2d(c).freeze(), (16, 8, 24, 25), contiguous),
    "inverted": (
        lambda c: fastbn.BatchNorm2d(c, activation="leaky_relu"), (8, 8, 30, 31), contiguous
    ),
    "kept": (lambda c: fastbn.BatchNorm2d(c, activation="relu"), (8, 8, 30, 31), contiguous),
}  # fmt: skip


@pytest.mark.parametrize(
    ("threads", "dtype"), [(1, "float32"), (2, "float32"), (7, "float32"), (3, "float16")]
)
@pytest.mark.parametrize(("make", "shape", "layout"), IN_PLACE.values(), ids=IN_PLACE)
def test_an_element_of_each_part_of_an_output_in_place_is_compared(
    rng, set_num_threads, make, shape, layout, threads, dtype
):
    set_num_threads(threads)
    layer, x = make(shape[1]), layout(some(rng, shape, dtype))
    layer(x, out=x)
    saved, elements = layer._saved, memory_of(x)
    assert np.shares_memory(elements, x)
    noticed = []
    for i in range(x.size):
        before, elements[i] = elements[i], elements[i] + 1
        if saved.has_changed():
            noticed.append(i)
        elements[i] = before
    assert not saved.has_changed()
    assert [i * 64 // x.size for i in noticed] == list(range(64))


def memory_of(x):
    """The elements of a dense array in the order of its memory, as a view."""
    axes = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    return x.transpose(axes).reshape(-1)


def corner(shape):
    """A mask with valid positions in a corner of the last sample."""
    mask = np.zeros((shape[0], 1, *shape[2:]), bool)
    mask[-1, :, :8, :3] = True
    return mask


def one_sample(shape):
    mask = np.zeros((shape[0], 1, 1, 1), bool)
    mask[3] = True
    return mask


def scattered(shape):
    """A mask with ten valid positions, so many as Fortran's order has them."""
    mask = np.zeros((shape[0], 1, *shape[2:]), bool, order="F")
    mask[::2, 0, 7, ::20] = True
    return mask


@pytest.mark.parametrize("valid", [corner, one_sample, scattered])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["2d", "instance", "group"])
def test_it_is_noticed_where_valid_positions_lie_close_together_or_are_few(
    rng, kind, in_place, valid
):
    make, _ = LAYERS[kind]
    for _ in range(8):  # A single sample would notice it in half of them.
        layer, x = make(6), some(rng, (10, 6, 20, 30))
        layer(x, mask=valid(x.shape), out=x if in_place else None)
        relu_in_place(x)
        assert_refused(layer, x)


@pytest.mark.parametrize("memory", [np.ascontiguousarray, np.asfortranarray])
def test_a_change_of_any_element_is_noticed_where_few_positions_are_valid(rng, memory):
    mask = np.zeros((4, 1, 500, 3), bool)
    mask[1, :, 20:36] = mask[3, 0, 499, 2] = mask[0, 0, 0, 0] = True
    mask[1, :, 21] = False
    bn, x = fastbn.BatchNorm2d(1), some(rng, mask.shape)
    for position in np.argwhere(mask):
        bn(x, mask=memory(mask))
        x[tuple(position)] += 1
        assert_refused(bn, x)


def test_a_change_of_an_eighth_of_the_valid_elements_is_noticed(rng):
    bn, x = fastbn.BatchNorm1d(64), some(rng, (16, 64, 300))
    mask = np.arange(300) < rng.integers(5, 100, 16)[:, None, None]
    for part in (np.s_[:, ::8], np.s_[3:5], np.s_[..., :6]):
        bn(x, mask=mask)
        x[part] += 1
        assert_refused(bn, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_invalid_positions_may_be_written_to(rng, layout):
    bn, dy, mask = fastbn.BatchNorm2d(3), some(rng, (8, 3, 5, 4)), some_mask(rng, (8, 3, 5, 4))
    x = layout(some(rng, dy.shape))
    bn(x, mask=mask)
    np.copyto(x, np.nan, where=~mask)
    dx = bn.backward(dy)
    expected = fastbn.BatchNorm1d(3)
    expected(gathered(x, mask))
    np.testing.assert_allclose(gathered(dx, mask), expected.backward(gathered(dy, mask)), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (8, 1, 1, 1), (1, 1, 1, 4)])
def test_masks_that_are_broadcast_are_followed(rng, shape):
    bn, x, mask = fastbn.BatchNorm2d(3), some(rng, (8, 3, 5, 4)), np.zeros(shape, bool)
    mask.flat[1] = True
    bn(x, mask=mask)
    np.copyto(x, -1, where=~mask)
    bn.backward(x)
    bn(x, mask=mask)
    np.copyto(x, -2, where=mask)
    assert_refused(bn, x)


def test_a_change_of_any_element_of_a_small_array_is_noticed(rng, quick):
    for i in range(64):
        bn, x = fastbn.BatchNorm1d(4), some(rng, (16, 4))
        bn(x)
        x.flat[i] += 1
        assert_refused(bn, x)


@pytest.mark.parametrize("shape", [(2, 64, 32, 32), (64, 1024), (1, 256, 1, 4096)])
def test_a_change_of_a_tenth_of_a_large_array_is_noticed(rng, quick, shape):
    # Borders of zeros, or a channel: a regular distance of samples would meet them too often.
    tenth = np.zeros(shape, bool)
    tenth[:, ::8] = True
    bn = (fastbn.BatchNorm2d if len(shape) == 4 else fastbn.BatchNorm1d)(shape[1])
    x = some(rng, shape)
    bn(x)
    np.copyto(x, 0, where=tenth)
    assert_refused(bn, x)


def test_what_is_as_before_is_not_refused_nan_included(rng, dtype, quick):
    bn, x = fastbn.BatchNorm1d(3), some(rng, (8, 3), dtype)
    x[2, 1], x[3, 2], x[4, 0] = np.nan, -np.inf, -0.0
    bn(x)
    before = x.copy()
    x[...] = 3
    assert_refused(bn, x)
    x[...] = before
    bn.backward(before)  # after the error, and with the array as it was, it can be tried again


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_backward_that_does_not_depend_on_the_array_does_not_look(rng, affine, in_place):
    bn, x, dy = fastbn.BatchNorm2d(3, affine=affine), some(rng, (4, 3, 5, 5)), None
    dy = some(rng, x.shape)
    bn.freeze()(x, out=x if in_place else None)
    x[...] = 3
    if affine:
        assert_refused(bn, dy)
    else:
        np.testing.assert_allclose(bn.backward(dy), dy / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_a_copy_of_all_channels_makes_the_output_free(rng):
    bn, x, dy = fastbn.BatchNorm2d(3), some(rng, (4, 3, 5, 5)), some(rng, (4, 3, 5, 5))
    bn.weight[...] = 0
    bn(x, out=x)
    relu_in_place(x)
    bn.backward(dy)


@each("in_place", [False, True])
@each("kept", [False, True])
@layers
def test_parameters_may_be_updated_between_a_forward_and_its_backward(
    rng, quick, make, shape, kept, in_place
):
    layers = make(6), make(6)
    x, dy = some(rng, shape), some(rng, shape)
    first, second = layers
    for layer in layers:
        layer(np.array(x))  # A lazy one has its arrays from now on.
        if layer.weight is not None:
            layer.weight[:], layer.bias[:] = np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)
            if kept:
                layer.weight[2] = 0
        y = x.copy()
        layer(y, out=y if in_place else None)
    if second.weight is not None:
        second.weight *= -3
        second.weight[4] = 0
        second.bias += 5
    dx = [layer.backward(dy) for layer in layers]
    assert same_bits(*dx)
    if first.weight is not None:
        assert same_bits(first.weight_grad, second.weight_grad)
        assert same_bits(first.bias_grad, second.bias_grad)


@pytest.mark.parametrize("in_place", [False, True])
def test_parameters_that_share_memory_with_running_statistics_are_those_of_the_forward(
    rng, quick, in_place
):
    alike, shared = fastbn.BatchNorm1d(3), fastbn.BatchNorm1d(3)
    shared.weight, shared.bias = shared.running_var, shared.running_mean
    x, dy = some(rng, (8, 3)), some(rng, (8, 3))
    gradients = []
    for bn in (alike, shared):
        y = x.copy()
        bn(y, out=y if in_place else None)
        gradients.append(bn.backward(dy))
    assert same_bits(*gradients)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_an_array_of_another_shape_is_refused_as_before(rng, quick, name):
    bn, x = fastbn.BatchNorm2d(3), some(rng, (4, 3, 2, 2), dtype_of(name))
    bn(x)
    with np.errstate(all="ignore"):
        x.shape = (4, 3, 4, 1)
    with pytest.raises(RuntimeError, match="shape"):
        bn.backward(x)


OTHERS = {
    **{"eps": 7.0, "momentum": None, "unbiased": False, "activation": None, "negative_slope": 9.0},
    **{"ghost_batch_size": 1, "num_groups": 3, "track_running_stats": False, "affine": False},
    **{"training": False, "frozen": True, "running_mean": None, "running_var": None, "comm": None},
}


@pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)
@each("in_place", [False, True])
@each("options", [{}, {"activation": "leaky_relu", "negative_slope": 0.3}])
def test_a_backward_depends_on_the_forward_alone(rng, make, shape, in_place, options, monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())
    x, dy, mask = some(rng, shape), some(rng, shape), some_mask(rng, shape)
    for valid in (None, mask):
        layer, other = make(**options), make(**options)
        for one in (layer, other):
            a = x.copy()
            one(a, out=a if in_place else None, mask=valid)
        for name, value in OTHERS.items():
            if hasattr(other, name):
                setattr(other, name, value)
        assert same_bits(other.backward(dy), layer.backward(dy))
        assert same_bits(other.weight_grad, layer.weight_grad)
        assert same_bits(other.bias_grad, layer.bias_grad)


def test_a_frozen_forward_in_place_of_16_bits_keeps_values_that_overflow():
    x, found = np.array([[300.0], [-200.0], [1.0]], np.float16), []
    for in_place in False, True:
        bn, given = fastbn.BatchNorm1d(1).freeze(), x.copy()
        bn.running_var[:] = 0.0
        bn(given, out=given if in_place else None, mask=np.ones((3, 1), bool))
        bn.backward(np.ones_like(x))
        found.append(bn.weight_grad)
    np.testing.assert_array_equal(*found)


def test_a_change_is_noticed_with_a_mask_of_many_positions(rng):
    x = some(rng, (3, 1, 700, 1000))
    bn = fastbn.BatchNorm2d(1)
    bn(x, mask=rng.random(x.shape) < 0.5)
    assert not bn._saved.has_changed()
    x[-1, :, -400:] += 1
    with pytest.raises(RuntimeError, match="written to"):
        bn.backward(x)


def test_a_change_of_all_signs_is_noticed(rng, dtype):
    bn, x = fastbn.BatchNorm1d(4), some(rng, (16, 4), dtype)
    bn(x)
    np.negative(x, out=x)
    with pytest.raises(RuntimeError, match="written to"):
        bn.backward(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_input_that_has_got_another_axis_is_noticed(rng):
    bn, x = fastbn.BatchNorm1d(3), some(rng, (4, 3))
    bn(x)
    x.shape = 4, 3, 1
    for dy in some(rng, (4, 3)), x:
        with pytest.raises(RuntimeError, match="shape"):
            bn.backward(dy)
