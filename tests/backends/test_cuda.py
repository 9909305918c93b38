"""The CUDA backend: the contract of the functions and layers, on CuPy arrays.

On a GPU, or on the two simulated ones: with clusters of blocks and without.
"""

import copy
import pickle

import numpy as np
import pytest
import reference
import support
from gpu import SIMULATED, cupy, on_hardware, to_gpu
from support import dtype_of, parameters, same_bits, some

import fastbn
from fastbn import functional as F

# Channels that fit a block, a cluster of blocks, and neither; runs that are whole chunks of 16
# bytes or not; more and fewer channels than a strip of columns has.
SHAPES = [
    (4, 3),
    (3, 2, 5),
    (2, 3, 4, 5),
    (1, 4, 3, 3),
    (5, 33, 7, 7),
    (16, 48, 7, 7),
    (2, 3, 2, 3, 4),
    (68, 2, 32, 32),
    (5, 1, 131, 127),
    (260, 70, 1, 1),
    (90, 70, 3, 3),
]
# More than a cluster of blocks can keep of a channel; a device without clusters can keep less.
PIECES = [(0, (150, 2, 96, 96))]
if SIMULATED:
    PIECES = [(1, (68, 2, 32, 32)), (1, (9, 2, 81, 79))]
else:
    SHAPES += [(40, 6, 32, 32), (3, 5, 131, 127), (2, 1, 300, 300), (700, 300, 1, 1)]
pytestmark = pytest.mark.usefixtures("device")


def contiguous(a):
    return cupy.array(a, order="C")


def channels_last(a):
    return cupy.moveaxis(cupy.ascontiguousarray(cupy.moveaxis(cupy.array(a), 1, -1)), -1, 1)


def odd_offset(a):
    """Contiguous, but not from a multiple of 16 bytes on."""
    view = cupy.zeros(a.size + 1, a.dtype)[1:].reshape(a.shape)
    view[...] = cupy.array(a)
    return view


def odd_offset_channels_last(a):
    moved = np.moveaxis(a, 1, -1)
    view = cupy.zeros(a.size + 1, a.dtype)[1:].reshape(moved.shape)
    view[...] = cupy.array(np.ascontiguousarray(moved))
    return cupy.moveaxis(view, -1, 1)


def sliced(a):
    view = cupy.zeros([2 * n + 1 for n in a.shape], a.dtype)[(slice(1, None, 2),) * a.ndim]
    view[...] = cupy.array(a)
    return view


DENSE = [contiguous, channels_last]
LAYOUTS = [*DENSE, odd_offset, odd_offset_channels_last, sliced]


def by_shape(*shapes):
    """These shapes on the first device, and those of which channels are summed in pieces."""
    cases = [*((0, shape) for shape in shapes), *PIECES]
    ids = [f"{shape}-gpu{device}" for device, shape in cases]
    return pytest.mark.parametrize(("device", "shape"), cases, indirect=["device"], ids=ids)


by_dense_layout = pytest.mark.parametrize("layout", DENSE)


def case(rng, shape, dtype=np.float32):
    """x, dy, weight and bias, on the host."""
    weight, bias = parameters(shape[1])
    return some(rng, shape, dtype), some(rng, shape, dtype, mean=0.1), weight, bias


def offset_of(x):
    _, mean, var = reference.moments(x)
    return np.abs(mean) / np.sqrt(var)


@by_shape(*SHAPES)
@by_dense_layout
def test_training_forward_normalizes_with_the_statistics_of_the_batch(rng, dtype, shape, layout):
    x, _, weight, bias = case(rng, shape, dtype)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    running = to_gpu(mean), to_gpu(var)
    y = F.batch_norm(layout(x), *running, to_gpu(weight), to_gpu(bias), training=True, momentum=0.3)
    exact = reference.forward(x, weight, bias)
    assert isinstance(y, cupy.ndarray)
    assert y.dtype == dtype
    bound = reference.forward_bound(exact, dtype, weight, bias, offset_of(x))
    support.assert_within(y.get(), exact, bound)
    for moved, expected in zip(running, reference.updated(x, mean, var, 0.3), strict=True):
        support.assert_close(moved.get(), expected, 1e-6 if dtype.itemsize < 8 else 1e-13)


@by_shape(*SHAPES)
@by_dense_layout
def test_eval_forward_normalizes_with_the_running_statistics(rng, dtype, shape, layout):
    x, _, weight, bias = case(rng, shape, dtype)
    mean, var = some(rng, shape[1]), np.abs(some(rng, shape[1])) + 0.1
    y = F.batch_norm(layout(x), *map(to_gpu, (mean, var, weight, bias)))
    exact = reference.normalize(x, mean, var, weight, bias)
    offset = np.abs(mean) / np.sqrt(var)
    bound = reference.forward_bound(exact, dtype, weight, bias, offset)
    support.assert_within(y.get(), exact, bound)


@by_shape(*SHAPES)
@by_dense_layout
def test_backward_gives_the_gradients(rng, dtype, shape, layout):
    x, dy, weight, _ = case(rng, shape, dtype)
    _, mean, invstd = F.batch_norm_forward(layout(x))
    gradients = F.batch_norm_backward(layout(dy), layout(x), to_gpu(weight), mean, invstd)
    _, x_mean, x_var = reference.moments(x)
    expected = reference.backward(dy, x, weight)
    bounds = reference.gradient_bounds(dy, x, dtype, x_mean, x_var, weight)
    for actual, exact, bound in zip(gradients, expected, bounds, strict=True):
        support.assert_within(actual.get(), exact, bound)


@pytest.mark.sanitize
@by_shape(*SHAPES)
@by_dense_layout
def test_fused_functions_give_the_bits_of_the_primitives_they_are_made_of(
    rng, dtype, shape, layout
):
    x, dy, weight, bias = case(rng, shape, dtype)
    x, dy, weight, bias = layout(x), layout(dy), to_gpu(weight), to_gpu(bias)
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = F.batch_norm_backward(dy, x, weight, mean, invstd)
    count, own_mean, m2 = F.batch_norm_stats(x)
    own_invstd = 1.0 / cupy.sqrt(m2 / count + 1e-5)
    sums = F.batch_norm_backward_reduce(dy, x, own_mean, own_invstd)
    composed = [
        *(own_mean, own_invstd, *sums),
        F.batch_norm_elemt(x, own_mean, own_invstd, weight, bias),
        F.batch_norm_backward_elemt(dy, x, own_mean, own_invstd, weight, *sums, count),
    ]
    for one, other in zip([mean, invstd, dbias, dweight, y, dx], composed, strict=True):
        assert same_bits(one.get(), other.get())


@by_shape(*SHAPES)
@by_dense_layout
def test_results_have_the_same_bits_in_place_and_in_every_run(rng, dtype, shape, layout):
    x, dy, weight, bias = case(rng, shape, dtype)
    weight, bias = to_gpu(weight), to_gpu(bias)
    results = []
    for in_place in (False, True, False):
        a, b = layout(x), layout(dy)
        _, mean, invstd = F.batch_norm_forward(a, weight, bias)
        dx = F.batch_norm_backward(b, a, weight, mean, invstd, out=b if in_place else None)[0]
        y = F.batch_norm_forward(a, weight, bias, out=a if in_place else None)[0]
        assert not in_place or (y is a and dx is b)
        results.append([array.get() for array in (y, mean, invstd, dx)])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@by_dense_layout
def test_arrays_that_are_stored_around_the_cache_are_right(rng, layout, monkeypatch):
    monkeypatch.setattr("fastbn._cuda.STREAM_BYTES", 0)
    x, dy, weight, bias = case(rng, (9, 10, 64, 65))
    y, mean, invstd = F.batch_norm_forward(layout(x), to_gpu(weight), to_gpu(bias))
    dx, _, _ = F.batch_norm_backward(layout(dy), layout(x), to_gpu(weight), mean, invstd)
    cpu_y, cpu_mean, cpu_invstd = F.batch_norm_forward(x, weight, bias)
    cpu_dx, _, _ = F.batch_norm_backward(dy, x, weight, cpu_mean, cpu_invstd)
    support.assert_close(y.get(), cpu_y, 1e-6)
    support.assert_close(dx.get(), cpu_dx, 1e-6)


@pytest.mark.parametrize("shape", [(5, 33, 7, 7), (6, 8, 12, 12), (68, 2, 32, 32), (9, 20, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_alignment_change_no_bit(rng, dtype, shape, layout):
    x, dy, weight, bias = case(rng, shape, dtype)
    weight, bias = to_gpu(weight), to_gpu(bias)
    same = channels_last if layout in (channels_last, odd_offset_channels_last) else contiguous

    def results(x, dy, out):
        y, mean, invstd = F.batch_norm_forward(x, weight, bias, out=out)
        return y, mean, invstd, *F.batch_norm_backward(dy, x, weight, mean, invstd)

    expected = results(same(x), same(dy), None)
    for out in (None, odd_offset(x), sliced(x)):
        for a, b in zip(results(layout(x), layout(dy), out), expected, strict=True):
            assert same_bits(a.get(), b.get())


DISTRIBUTIONS = {
    "N(0,1)": lambda rng, shape: rng.standard_normal(shape),
    "N(1e4,0.1)": lambda rng, shape: rng.normal(1e4, 0.1, shape),
    "N(1e6,1)": lambda rng, shape: rng.normal(1e6, 1.0, shape),
    "N(1,1e-4)": lambda rng, shape: rng.normal(1.0, 1e-4, shape),
    "outlier": lambda rng, shape: with_outlier(rng.standard_normal(shape)),
    "1e30": lambda rng, shape: rng.normal(0.0, 1e30, shape),
}


def with_outlier(x):
    x[0, :, 0, 0] = 1e6
    return x


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@by_shape((8, 5, 7, 7), (16, 4, 56, 56), (22, 2, 56, 56))
@by_dense_layout
def test_statistics_are_right_to_the_last_place(rng, distribution, dtype, shape, layout):
    dtype = np.dtype(dtype)
    x = DISTRIBUTIONS[distribution](rng, shape).astype(dtype)
    count, mean, m2 = F.batch_norm_stats(layout(x))
    _, exact_mean, exact_var = reference.moments(x)
    size = np.maximum(np.abs(exact_mean), np.sqrt(exact_var))
    unit = 1.0 if dtype.itemsize == 4 else 20.0
    support.assert_within(mean.get(), exact_mean, unit * reference.ulp(size, dtype))
    relative = (1 + np.abs(exact_mean) / np.sqrt(exact_var)) * 1e-14
    # Deviations are squared in float32; that of an outlier is most of the sum.
    ulps = 2.0 if distribution == "outlier" else 1.0
    bound = (
        ulps * reference.ulp(exact_var.astype(np.float64), dtype)
        if dtype.itemsize == 4 and (distribution != "1e30")
        else exact_var * (relative if dtype.itemsize == 8 else 1.2e-7)
    )
    support.assert_within(m2.get() / count, exact_var, bound)
    y = F.batch_norm_forward(layout(x))[0]
    exact = reference.forward(x)
    bound = reference.forward_bound(exact, dtype, offset=offset_of(x))
    support.assert_within(y.get(), exact, bound)


@by_dense_layout
@by_shape((8, 5, 7, 7), (44, 1, 56, 56))
def test_a_constant_has_no_variance(dtype, shape, layout):
    x = np.full(shape, 0.1, dtype)
    bias = np.linspace(-1, 1, shape[1]).astype(np.float32)
    _, mean, m2 = F.batch_norm_stats(layout(x))
    assert (m2.get() == 0).all()
    assert (mean.get() == x.flat[0].astype(np.float64)).all()
    y = F.batch_norm_forward(layout(x), None, to_gpu(bias))[0].get()
    assert same_bits(y, np.broadcast_to(bias[:, None, None], shape).astype(dtype))


@by_dense_layout
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_or_infinity_stays_in_its_channel(rng, dtype, layout, value):
    x, dy, _, _ = case(rng, (6, 5, 7, 7), dtype)
    clean = [a.get() for a in results_of(layout(x), layout(dy))]
    x[3, 2, 1, 1] = value
    dirty = [a.get() for a in results_of(layout(x), layout(dy))]
    for a, b in zip(clean, dirty, strict=True):
        axis = 0 if a.ndim == 1 else 1
        assert same_bits(np.delete(a, 2, axis), np.delete(b, 2, axis))


def results_of(x, dy):
    y, mean, invstd = F.batch_norm_forward(x)
    return y, mean, invstd, *F.batch_norm_backward(dy, x, None, mean, invstd)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_parameters_may_have_any_dtype_and_stride(rng, name):
    x, _, weight, bias = case(rng, (4, 6, 5, 5))
    other = dtype_of(name)
    weight, bias = weight.astype(other), bias.astype(other)
    buffer = cupy.zeros((6, 3), other)
    buffer[:, 1], buffer[:, 2] = to_gpu(weight), to_gpu(bias)
    running = cupy.zeros((2, 6), other)[:, ::-1]
    y = F.batch_norm(to_gpu(x), *running, buffer[:, 1], buffer[:, 2], training=True, momentum=1.0)
    exact = reference.forward(x, weight, bias)
    support.assert_within(y.get(), exact, reference.forward_bound(exact, x.dtype, weight, bias))
    expected = reference.updated(x, 0.0 * weight, 0.0 * weight, 1.0)
    support.assert_close(running.get(), np.stack(expected), {2: 1e-2}.get(other.itemsize, 1e-6))


def test_running_statistics_may_share_memory_with_the_parameters(rng):
    x, _, weight, bias = case(rng, (8, 4, 6, 6))
    expected = F.batch_norm_forward(to_gpu(x), to_gpu(weight), to_gpu(bias))[0]
    buffer = cupy.stack([to_gpu(weight), to_gpu(bias)])
    y = F.batch_norm(to_gpu(x), buffer[0], buffer[1], buffer[0], buffer[1], training=True)
    assert same_bits(y.get(), expected.get())
    assert not same_bits(buffer[0].get(), weight)


@by_dense_layout
@pytest.mark.parametrize("shape", [(0, 5, 2, 2), (3, 0, 2, 2), (3, 5, 0, 2)], ids=str)
def test_an_empty_batch_is_legal(layout, shape):
    x = layout(np.zeros(shape, np.float32))
    bn = fastbn.BatchNorm2d(shape[1], device="cuda")
    y = bn(x)
    assert y.shape == shape
    dx = bn.backward(y)
    assert dx.shape == shape
    assert int(bn.num_batches_tracked) == (1 if shape == (3, 0, 2, 2) else 0)
    assert (bn.running_var.get() == 1).all()
    assert (bn.weight_grad.get() == 0).all()
    _, mean, m2 = F.batch_norm_stats(x)
    assert not mean.get().any()
    assert not m2.get().any()


@pytest.mark.parametrize("out", ["overlap", "shape", "dtype", "kind"])
def test_an_out_that_cannot_serve_is_refused_before_anything_is_written(rng, out):
    bn = fastbn.BatchNorm2d(3, device="cuda")
    buffer = cupy.zeros(2 * 3 * 16 + 16, np.float32)
    x = buffer[: 2 * 3 * 16].reshape(2, 3, 4, 4)
    x[...] = to_gpu(some(rng, x.shape))
    wrong = {
        "overlap": buffer[16:].reshape(2, 3, 4, 4),
        "shape": cupy.zeros((2, 3, 4, 5), np.float32),
        "dtype": cupy.zeros((2, 3, 4, 4)),
        "kind": np.zeros((2, 3, 4, 4), np.float32),
    }[out]
    before = buffer.get()
    with pytest.raises((ValueError, TypeError)):
        bn(x, out=wrong)
    assert same_bits(buffer.get(), before)
    assert same_bits(bn.running_mean.get(), np.zeros(3, np.float32))
    assert int(bn.num_batches_tracked) == 0


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


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"bias": False}])
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


def test_the_cumulative_average_follows_the_counter_on_the_device(rng):
    bn = fastbn.BatchNorm2d(2, momentum=None, device="cuda")
    means = []
    for _ in range(3):
        x = some(rng, (4, 2, 5, 5))
        bn(to_gpu(x))
        means.append(reference.moments(x)[1])
    support.assert_close(bn.running_mean.get(), np.mean(means, axis=0), 1e-6)
    assert int(bn.num_batches_tracked) == 3


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


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))]
)
def test_copies_and_pickles_keep_state_and_device(rng, duplicate):
    bn = fastbn.BatchNorm2d(3, device="cuda")
    x = to_gpu(some(rng, (4, 3, 5, 5)))
    bn(x)
    other = duplicate(bn)
    assert same_bits(other.eval()(x).get(), bn.eval()(x).get())


def test_a_lazy_layer_takes_its_channels_from_a_cupy_array(rng):
    bn = fastbn.LazyBatchNorm2d(device="cuda")
    bn(to_gpu(some(rng, (4, 3, 5, 5))))
    assert type(bn) is fastbn.BatchNorm2d
    assert isinstance(bn.weight, cupy.ndarray)


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
