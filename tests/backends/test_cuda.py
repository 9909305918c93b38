"""What is the CUDA backend's alone: devices, arrays of two kinds, streams and graphs.

On a GPU, or on a simulated one. What it has in common with the others is in test_contract.py.
"""

import copy

import numpy as np
import pytest
import support
from cases import each
from gpu import cuda, cupy, on_hardware, to_gpu
from support import case, same_bits, some

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.usefixtures("device")


def contiguous(a):
    return cupy.array(a, order="C")


def channels_last(a):
    return cupy.moveaxis(cupy.ascontiguousarray(cupy.moveaxis(cupy.array(a), 1, -1)), -1, 1)


by_dense_layout = each("layout", [contiguous, channels_last])


@by_dense_layout
def test_arrays_that_are_stored_around_the_cache_are_right(rng, layout, monkeypatch):
    monkeypatch.setattr(cuda.launch, "NON_TEMPORAL_BYTES", 0)
    x, dy, weight, bias = case(rng, (9, 10, 64, 65))
    y, mean, invstd = F.batch_norm_forward(layout(x), to_gpu(weight), to_gpu(bias))
    dx, _, _ = F.batch_norm_backward(layout(dy), layout(x), to_gpu(weight), mean, invstd)
    cpu_y, cpu_mean, cpu_invstd = F.batch_norm_forward(x, weight, bias)
    cpu_dx, _, _ = F.batch_norm_backward(dy, x, weight, cpu_mean, cpu_invstd)
    support.assert_close(y.get(), cpu_y, 1e-6)
    support.assert_close(dx.get(), cpu_dx, 1e-6)


def test_arrays_of_numpy_and_cupy_do_not_mix(rng):
    x = some(rng, (2, 3, 4, 4))
    weight = np.ones(3, np.float32)
    with pytest.raises(TypeError, match="weight must be a CuPy array"):
        F.batch_norm_forward(to_gpu(x), weight)
    with pytest.raises(TypeError, match="weight must be a NumPy array"):
        F.batch_norm_forward(x, to_gpu(weight))
    with pytest.raises(TypeError, match="must be a NumPy array"):
        fastbn.BatchNorm2d(3, device="cuda")(x)
    with pytest.raises(TypeError, match="dy must be a CuPy array"):
        F.batch_norm_backward(x, to_gpu(x), None, *map(to_gpu, (np.zeros(3), np.ones(3))))


# Layers: what they do on a GPU is what they do on the CPU.


def step(bn, x, dy, in_place=False):
    """y, dx and all arrays of a layer after a training step."""
    y = bn(x, out=x if in_place else None)
    arrays = [y.copy(), bn.backward(dy), bn.weight_grad, bn.bias_grad]
    arrays += [bn.running_mean, bn.running_var]
    return [a if isinstance(a, np.ndarray) else a.get() for a in arrays if a is not None]


@each("in_place", [False, True])
@each("frozen", [False, True])
@each("options", [{}, {"momentum": None}, {"affine": False}, {"bias": False}])
def test_a_layer_does_on_a_gpu_what_it_does_on_the_cpu(rng, dtype, options, frozen, in_place):
    x, dy, weight, bias = case(rng, (9, 6, 9, 9), dtype)
    cpu = fastbn.BatchNorm2d(6, **options)
    if cpu.weight is not None:
        cpu.weight[...] = weight
        cpu.weight[2] = 0.0  # cannot be recovered from the output
    if cpu.bias is not None:
        cpu.bias[...] = bias
    if frozen:
        cpu.freeze()
    gpu = copy.deepcopy(cpu).to("cuda")
    tolerance = {2: 4e-2, 4: 2e-5, 8: 1e-10}[dtype.itemsize]
    for _ in range(2):
        expected = step(cpu, x.copy(), dy, in_place)
        actual = step(gpu, contiguous(x), contiguous(dy), in_place)
        for a, b in zip(actual, expected, strict=True):
            support.assert_close(a, b, tolerance)
    assert int(gpu.num_batches_tracked) == int(cpu.num_batches_tracked)
    support.assert_close(gpu.eval()(contiguous(x)).get(), cpu.eval()(x), tolerance)


def test_a_layer_moves_between_devices_with_all_its_arrays(rng):
    bn = fastbn.BatchNorm2d(3, dtype=np.float64)
    x = some(rng, (4, 3, 5, 5))
    bn.backward(bn(x))
    before = {name: getattr(bn, name).copy() for name in support.LAYER_ARRAYS}
    assert bn.to("cuda") is bn
    for name, value in before.items():
        assert isinstance(getattr(bn, name), cupy.ndarray)
        assert same_bits(getattr(bn, name).get(), value)
    with pytest.raises(RuntimeError):
        bn.backward(to_gpu(x))
    assert bn.to("cuda:0").to("cpu") is bn
    for name, value in before.items():
        assert type(getattr(bn, name)) is np.ndarray
        assert same_bits(getattr(bn, name), value)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda",) * 2])
def test_a_state_dict_loads_across_devices(rng, source, target, lazy):
    bn = fastbn.BatchNorm2d(3, device=source)
    x = some(rng, (4, 3, 5, 5))
    bn(to_gpu(x) if source == "cuda" else x)
    other = fastbn.LazyBatchNorm2d(device=target) if lazy else fastbn.BatchNorm2d(3, device=target)
    assert other.load_state_dict(bn.state_dict()) == ([], [])
    for name, array in other.to("cpu").state_dict().items():
        assert same_bits(array, bn.to("cpu").state_dict()[name])


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device"):
        fastbn.BatchNorm2d(3, device="gpu")
    with pytest.raises(RuntimeError, match="cuda:99"):
        fastbn.BatchNorm2d(3, device="cuda:99")


# Streams and graphs.


@on_hardware
def test_everything_runs_on_the_current_stream(rng):
    x, dy, _, _ = case(rng, (64, 64, 28, 28))
    expected = step(fastbn.BatchNorm2d(64, device="cuda"), to_gpu(x), to_gpu(dy))
    bn, x, dy = fastbn.BatchNorm2d(64, device="cuda"), to_gpu(x), to_gpu(dy)
    cupy.cuda.get_current_stream().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.add(x, 0.0, out=x)  # Work that the layer has to come after.
        actual = step(bn, x, dy)
        stream.synchronize()
    assert all(map(same_bits, actual, expected))


@on_hardware
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(8, 4, 14, 14), (150, 2, 96, 96), (64, 40, 1, 1)], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_training_step_can_be_captured_in_a_graph(rng, momentum, shape, in_place):
    x, dy, _, _ = case(rng, shape)
    make = fastbn.BatchNorm2d
    eager, captured = (make(shape[1], momentum=momentum, device="cuda") for _ in range(2))
    source, gradient = to_gpu(x), to_gpu(dy)
    y, dx, work = (cupy.zeros_like(source) for _ in range(3))

    def train(bn):
        bn.zero_grad()
        cupy.copyto(work, source)
        bn(work, out=work if in_place else y)
        bn.backward(gradient, out=dx)

    for _ in range(3):
        train(eager)
    expected = [a.get() for a in (dx, eager.weight_grad, eager.running_mean, eager.running_var)]
    pool = cupy.cuda.MemoryPool()  # What a graph writes to belongs to it.
    with cupy.cuda.using_allocator(pool.malloc), cupy.cuda.Stream(non_blocking=True) as stream:
        train(captured)
        stream.begin_capture()
        train(captured)
        graph = stream.end_capture()
        dx.fill(0)
        graph.launch(stream)
        graph.launch(stream)
        stream.synchronize()
    actual = [a.get() for a in (dx, captured.weight_grad, captured.running_mean)]
    for a, b in zip([*actual, captured.running_var.get()], expected, strict=True):
        support.assert_close(a, b, 1e-6)
    assert int(captured.num_batches_tracked) == 3
