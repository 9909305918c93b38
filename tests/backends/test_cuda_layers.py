"""What composes from layers and functions does on a GPU what it does on the CPU."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import support
from cases import each
from gpu import SIMULATED, assert_alike, cuda, cupy, on_both, simulated, step, to_gpu
from internals import alone_on_its_rank
from kinds import OneRank
from support import channels_last, contiguous, parameters, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.usefixtures("device")
BOTH = each("layout", [contiguous, channels_last])


@BOTH
@each("in_place", [False, True])
@each("options", [{}, {"affine": True, "track_running_stats": True}])
@each("shape", [(4, 3, 30), (3, 20, 7, 6), (2, 3, 4, 3, 5), (3, 4)])
def test_instance_normalization(rng, shape, options, in_place, layout):
    kinds = {2: fastbn.InstanceNorm1d, 3: fastbn.InstanceNorm1d}
    kinds |= {4: fastbn.InstanceNorm2d, 5: fastbn.InstanceNorm3d}
    layer = kinds[len(shape)](shape[-2] if len(shape) == 2 else shape[1], **options)
    if layer.affine:
        layer.weight[:], layer.bias[:] = parameters(layer.num_features)
    x, dy = layout(some(rng, shape)), layout(some(rng, shape))
    assert_alike(step(*each, in_place=in_place) for each in on_both(layer, x, dy))


@BOTH
@each("in_place", [False, True])
@each("momentum", [0.3, None])
def test_ghost_batches(rng, momentum, in_place, layout):
    layer = fastbn.BatchNorm2d(5, momentum=momentum, ghost_batch_size=4)
    layer.weight[:], layer.bias[:] = parameters(5)
    layer.weight[2] = 0  # cannot be recovered from the output
    x, dy = layout(some(rng, (11, 5, 6, 7))), layout(some(rng, (11, 5, 6, 7)))
    assert_alike(step(*each, in_place=in_place) for each in on_both(layer, x, dy))


# In blocks, in clusters, in strips of columns and, on the second simulated device, in pieces;
# batches that begin at a multiple of 16 bytes or not.
BATCHES = [
    (0, (11, 40)),
    (0, (11, 5, 6, 7)),
    (0, (11, 3, 5)),
    (0, (203, 1, 32, 32)),
    (0, (401, 70, 3)),
    *([(1, (67, 2, 40, 41))] if SIMULATED else [(0, (150, 2, 160, 160))]),
]


by_batches = pytest.mark.parametrize(("device", "shape"), BATCHES, indirect=["device"], ids=str)


@BOTH
@pytest.mark.parametrize("grid", [65535, 2])
def test_the_number_of_launches_is_that_of_grids_not_of_batches(rng, grid, layout, monkeypatch):
    monkeypatch.setattr(cuda.batches, "BATCHES_MAX", grid)
    launches, launch = [], cupy.cuda.driver.launchKernel
    counting = SimpleNamespace(launchKernel=lambda *a: launches.append(launch(*a)))
    x = to_gpu(layout(some(rng, (40, 5, 6, 7))))
    bn = fastbn.BatchNorm2d(5, ghost_batch_size=2, device="cuda")
    norm = fastbn.InstanceNorm2d(5, track_running_stats=True, device="cuda")
    for layer in (bn, norm):
        expected = copy.deepcopy(layer)(x)
        with monkeypatch.context() as patch:
            patch.setattr(cuda.batches, "BATCHES_MAX", grid)
            patch.setattr(cuda.launch, "driver", counting)
            launches.clear()
            y = layer(x)
            layer.backward(y)
        assert same_bits(y.get(), expected.get())
        if grid == 65535:
            assert len(launches) <= 7  # three each way, and one for the running statistics
        elif layer is bn:
            assert len(launches) >= 20


@pytest.mark.slow
@simulated
@by_batches
def test_the_order_of_threads_and_blocks_changes_no_bit_of_batches(rng, device, shape):
    x = to_gpu(some(rng, shape))
    results = []
    for number in range(3):
        with cupy.schedule(number):
            y, mean, invstd = F.batch_norm_forward(x, ghost_batch_size=shape[0] // 3)
            gradients = F.batch_norm_backward(
                x, x, None, mean, invstd, ghost_batch_size=shape[0] // 3
            )
        results.append([a.get() for a in (y, mean, invstd, *gradients)])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@pytest.mark.parametrize(
    "layer",
    [
        fastbn.BatchNorm2d(3),
        fastbn.BatchNorm2d(3, ghost_batch_size=3),
        fastbn.InstanceNorm2d(3, track_running_stats=True),
    ],
    ids=["batch", "ghost", "instance"],
)
def test_recalibration(rng, layer):
    data = some(rng, (10, 3, 5, 5))
    results = []
    for own, x in on_both(layer, data):
        with fastbn.recalibrate(own):
            own(x[:6])
            own(x[6:])
        results.append([own.running_mean, own.running_var, own.num_batches_tracked])
    assert_alike(results)


@pytest.mark.parametrize("passed", [0, 1])
def test_recalibration_of_layers_with_views_of_the_same_memory(rng, passed):
    x, statistics = to_gpu(some(rng, (6, 3, 5, 5))), to_gpu(np.array([[0, 0, 0], [1, 1, 1]], "f"))
    twins = [fastbn.BatchNorm2d(3, device="cuda") for _ in range(2)]
    other, alone = fastbn.BatchNorm2d(3, device="cuda"), fastbn.BatchNorm2d(3, device="cuda")
    for layer in twins:
        layer.running_mean, layer.running_var = statistics
    with fastbn.recalibrate(twins[passed]):
        for layer, batch in zip((*twins, other), (x, x + 10, x), strict=True):
            layer(batch)
    with fastbn.recalibrate(alone):
        alone(x)
        alone(x + 10)
    assert same_bits(statistics.get(), [alone.running_mean.get(), alone.running_var.get()])
    assert [int(layer.num_batches_tracked) for layer in (*twins, other)] == [2, 2, 1]


def test_moments_of_parts_add_up(rng, dtype):
    x = some(rng, (9, 4, 5, 5), dtype)
    total = sum(fastbn.Moments.of(part) for part in (to_gpu(x)[:4], to_gpu(x)[4:]))
    expected = fastbn.Moments.of(x)
    assert total.count == expected.count
    support.assert_close(total.mean, expected.mean, 1e-6)
    support.assert_close(total.m2, expected.m2, 1e-6)
    assert fastbn.Moments(2, cupy.ones(3), cupy.zeros(3)) == fastbn.Moments(2, [1] * 3, [0] * 3)


@each("in_place", [False, True])
@each("frozen", [False, True])
@each("momentum", [0.3, None])
def test_a_synchronized_layer_of_one_rank(rng, momentum, frozen, in_place, monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())
    layer = fastbn.BatchNorm2d(5, momentum=momentum)
    layer.weight[:], layer.bias[:] = parameters(5)
    if frozen:
        layer.freeze()
    x, dy = some(rng, (4, 5, 6, 7)), some(rng, (4, 5, 6, 7))
    expected, actual = on_both(layer, x, dy)
    sync = fastbn.convert_sync_batchnorm(actual[0], OneRank())
    assert_alike([step(*expected, in_place), step(sync, *actual[1:], in_place)], 1e-4)


def test_fold_takes_layers_and_weights_on_a_gpu(rng):
    layer = fastbn.BatchNorm1d(3)
    layer(some(rng, (10, 3)))
    weight, bias = some(rng, (3, 4)), some(rng, 3)
    expected = fastbn.fold(layer, weight, bias)
    for actual in (
        fastbn.fold(layer.to("cuda"), weight, bias),
        fastbn.fold(layer, to_gpu(weight), to_gpu(bias)),
    ):
        assert all(map(same_bits, actual, expected))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_channels_that_the_output_does_not_determine(rng, half, frozen, in_place):
    layer = fastbn.BatchNorm2d(4)
    layer.weight[:], layer.bias[:] = [0, 1, 1, 0.5], [1, 0, 100, 3]
    if frozen:
        layer.freeze()
    x, dy = some(rng, (6, 4, 5, 5), half), some(rng, (6, 4, 5, 5), half)
    assert_alike((step(*each, in_place=in_place) for each in on_both(layer, x, dy)), 3e-2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize(
    ("activation", "in_place"),
    [(None, True), ("relu", True), ("relu", False), ("leaky_relu", False)],
)
def test_parameters_may_be_updated_between_a_forward_and_its_backward(
    rng, activation, in_place, weight, frozen
):
    x, dy, results = some(rng, (4, 3, 5, 6)), cupy.asarray(some(rng, (4, 3, 5, 6))), []
    for change in (0, 1):
        layer = fastbn.BatchNorm2d(3, device="cuda", activation=activation)
        y = cupy.asarray(x)
        layer.frozen = frozen
        layer.weight[1] = weight
        layer(y, out=y if in_place else None)
        layer.weight += change
        layer.bias += change
        results.append((layer.backward(dy), layer.weight_grad, layer.bias_grad))
    for actual, expected in zip(*results, strict=True):
        assert same_bits(actual.get(), expected.get())


def test_what_was_saved_is_not_looked_at(rng):
    layer, x = fastbn.BatchNorm2d(3, device="cuda"), cupy.asarray(some(rng, (4, 3, 5, 6)))
    layer(x)
    x[...] = 0
    layer.backward(x)


@BOTH
def test_some_channels_are_copied_in_any_layout(rng, layout):
    x, channels = layout(some(rng, (3, 5, 4, 2))), np.array([3, 0])
    copied = cuda.channels_of(to_gpu(x), cupy.array(channels))
    assert same_bits(copied.get(), x[:, channels])


def test_evaluation_without_running_statistics(rng):
    layer = fastbn.BatchNorm2d(3, track_running_stats=False).eval()
    assert_alike([each(x)] for each, x in on_both(layer, some(rng, (4, 3, 5, 5))))


def test_a_gradient_of_another_dtype_is_converted(rng):
    layer, x = fastbn.BatchNorm2d(3), some(rng, (4, 3, 5, 5))
    dy = some(rng, x.shape, np.float64)
    assert_alike(step(*each) for each in on_both(layer, x, dy))


def test_lists_of_numbers_are_no_cupy_arrays(rng):
    x = to_gpu(some(rng, (4, 3, 5, 5)))
    with pytest.raises(TypeError, match="weight must be a CuPy array"):
        F.batch_norm_forward(x, [1.0, 1.0, 1.0])


def test_arrays_of_another_device_are_refused(rng):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    bn, x = fastbn.BatchNorm2d(3, device="cuda:1"), some(rng, (4, 3, 5, 5))
    assert bn.weight.data.device_id == 1
    assert "device=cuda:1" in repr(bn)
    here = to_gpu(x)
    with cupy.cuda.Device(1):
        with pytest.raises(ValueError, match="x is on CUDA device 0, the current one is 1"):
            bn(here)
        y = bn(to_gpu(x))
        assert y.data.device_id == 1
        support.assert_close(y.get(), fastbn.BatchNorm2d(3)(x), 1e-6)
    assert bn.to("cuda").weight.data.device_id == 0


# What has to wait for the device fails while a graph is captured.


@simulated
@each("in_place", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"ghost_batch_size": 3}, {"affine": False}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["train", "eval", "freeze"])
def test_a_step_reads_nothing_while_a_graph_is_captured(rng, mode, options, in_place):
    bn = fastbn.BatchNorm2d(3, device="cuda", **options)
    x, dy = to_gpu(some(rng, (8, 3, 5, 5))), to_gpu(some(rng, (8, 3, 5, 5)))
    getattr(bn, mode)()
    expected = copy.deepcopy(bn)(x.copy())
    with cupy.capturing():
        y = bn(x, out=x if in_place else None)
        if mode != "eval":
            bn.backward(dy)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            y.get()
    assert same_bits(y.get(), expected.get())


@simulated
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_instance_normalization_reads_nothing_while_a_graph_is_captured(rng, layout):
    norm = fastbn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cuda")
    x = to_gpu(layout(some(rng, (8, 3, 5, 5))))
    with cupy.capturing():
        norm.backward(norm(x))
