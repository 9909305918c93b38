"""The simulated GPU: no result hangs on an order or on contraction, and it tells broken kernels."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import support
from gpu import SIMULATED, cupy, to_gpu
from internals import CUDA_SOURCE
from support import channels_last, contiguous, parameters, same_bits, some

from fastbn import functional as F
from fastbn.backends.cuda import launch, plan

if not SIMULATED:
    pytest.skip("a real GPU is under test", allow_module_level=True)

# In blocks, in clusters, in pieces, in strips of columns, element by element with chunks that have
# several channels, and in strips that stay on chip.
CASES = [
    (0, (5, 33, 7, 7)),
    (0, (68, 2, 32, 32)),
    (1, (68, 2, 32, 32)),
    (0, (260, 70, 1, 1)),
    (0, (90, 70, 3, 3)),
    (0, (5, 512, 3, 3)),
]
OTHER_CLUSTERS = [(0, (8, 8, 32, 32))]
IN_ORDER, BACKWARDS, SHUFFLED, SHUFFLED_AGAIN = range(4)


def forget():
    """Let nothing that has been compiled serve any more."""
    plans = plan.reduction_of, plan.element_wise, plan.follower, plan.fused
    for cached in (launch.module, launch.kernel, *plans):
        cached.cache_clear()


@pytest.fixture
def broken(monkeypatch):
    """A function that replaces a part of the source by another, for one test."""

    read = Path.read_text

    def replace(part, other):
        def read_broken(path):
            text = read(path)
            if path.name != CUDA_SOURCE.name:
                return text
            assert part in text
            return text.replace(part, other, 1)

        monkeypatch.setattr(Path, "read_text", read_broken)
        forget()

    yield replace
    forget()
    cupy.cuda.memory.check_all()


def results(x, dy):
    """Those of all kernels that an array's shape asks for."""
    weight, bias = map(to_gpu, parameters(x.shape[1]))
    running = cupy.zeros(x.shape[1]), cupy.ones(x.shape[1])
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    F.batch_norm(x, *running, weight, bias, training=True)
    eval_y = F.batch_norm(x, *running, weight, bias)
    arrays = [y, mean, invstd, *running, eval_y]
    return [a.get() for a in (*arrays, *F.batch_norm_backward(dy, x, weight, mean, invstd))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("device", "shape"), [*CASES, *OTHER_CLUSTERS], ids=str)
def test_the_order_of_threads_and_blocks_changes_no_bit(rng, device, shape, layout):
    x, dy = layout(some(rng, shape)), layout(some(rng, shape))
    with cupy.cuda.Device(device):
        x, dy = to_gpu(x), to_gpu(dy)
        expected = results(x, dy)
        for number in (BACKWARDS, SHUFFLED, SHUFFLED_AGAIN):
            with cupy.schedule(number):
                assert all(map(same_bits, results(x, dy), expected))
    assert not cupy.cuda.memory.check_all()


@pytest.fixture
def contraction(monkeypatch):
    """Kernels whose multiplications and additions are fused, as those of a GPU are."""
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no fused multiply-add")
    monkeypatch.setattr(cupy.RawModule, "options_of_module", ("-mfma", "-ffp-contract=fast"))
    forget()
    yield
    forget()


@pytest.mark.slow
@pytest.mark.usefixtures("contraction")
@pytest.mark.parametrize(("device", "shape"), CASES, ids=str)
def test_fused_multiply_adds_change_little(rng, device, shape):
    x, dy = some(rng, shape), some(rng, shape)
    weight, bias = parameters(shape[1])
    with cupy.cuda.Device(device):
        y, mean, invstd, _, _, _, dx, dweight, dbias = results(to_gpu(x), to_gpu(dy))
        constant = F.batch_norm_stats(cupy.full(shape, 0.1, np.float32))
    assert not constant[2].get().any()
    expected_y, *statistics = F.batch_norm_forward(x, weight, bias)
    support.assert_close(y, expected_y, 1e-6)
    support.assert_close(mean, statistics[0], 1e-7)
    support.assert_close(invstd, statistics[1], 1e-7)
    expected = F.batch_norm_backward(dy, x, weight, *statistics)
    for actual, exact in zip((dx, dweight, dbias), expected, strict=True):
        support.assert_close(actual, exact, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("in_batches", [False, True])
def test_the_argument_of_a_kernel_is_as_long_as_its_structure(masked, in_batches):
    function = launch.module(0, 1, masked, in_batches).get_function("normalize")
    packed = launch.JOB.size + masked * launch.MASK.size + in_batches * launch.BATCHES.size
    assert ctypes.c_longlong.in_dll(function.own.library, "job_bytes").value == packed


# A device with clusters, and one without.
@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("kind", ["moments", "products"])
def test_strips_of_channels_stay_on_chip_where_all_fit_the_multiprocessors(kind, device):
    def stays(rows, channels, *, masked=False):
        x = channels_last(np.zeros((rows, channels, 1, 1), np.float32))
        g = plan.geometry(to_gpu(x), None)._replace(row_layout=False, masked=masked)
        return plan.reduction_of(kind, g).resident is not None

    with cupy.cuda.Device(device):
        assert stays(45, 512)
        assert stays(500, 1024)
        assert not stays(45, 512, masked=True)
        assert not stays(45, 510)  # where a row is no multiple of a chunk
        assert not stays(45, 64)  # which few multiprocessors would compute
        assert not stays(9000, 512)


# What is broken, where it runs, and what tells.
BREAKS = {
    "a barrier is missing": (
        "warps[threadIdx.x / 32] = merged;\n    __syncthreads();",
        "warps[threadIdx.x / 32] = merged;",
        "values",
    ),
    "not all threads come to a barrier": (
        "coefficients = Affine::of(moments.mean, invstd_of(job, moments), weight, bias);\n"
        "    __syncthreads();",
        "coefficients = Affine::of(moments.mean, invstd_of(job, moments), weight, bias);\n"
        "    if (threadIdx.x)\n        __syncthreads();",
        "different barriers",
    ),
    "a copy is read before it has arrived": (
        "    arrived();\n    const auto read = [&](const Storage *, const Walk &, int slot)",
        "    const auto read = [&](const Storage *, const Walk &, int slot)",
        "copies",
    ),
    "an output is too long": (
        "if (job.aligned && mask == FULL)",
        "if (job.aligned)",
        "memory",
    ),
    "shared memory is too short": (
        "resident + slot, job.x",
        "resident + slot + 2, job.x",
        "shared memory",
    ),
    "blocks of a cluster do not wait": (
        "    cluster_arrive();\n    cluster_wait();\n    Sums other",
        "    cluster_arrive();\n    Sums other",
        "barrier of its cluster",
    ),
    "blocks of a cluster end too early": (
        "    publish(job, channel, moments, running);\n    leave_cluster();",
        "    publish(job, channel, moments, running);",
        "block that has ended",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_told(rng, broken, name):
    part, other, sign = BREAKS[name]
    # A channel that a cluster shares, or one of several warps that end within a chunk.
    x = some(rng, (68, 2, 32, 32) if "cluster" in name else (51, 33, 7, 7))
    expected = F.batch_norm_forward(x)[0]
    broken(part, other)
    told = []
    for number in range(4):
        with cupy.schedule(number):
            try:
                y = F.batch_norm_forward(to_gpu(x))[0].get()
            except RuntimeError as error:
                told.append(str(error))
            else:
                close = np.allclose(y, expected, rtol=0, atol=1e-5)
                told += [] if close else ["values"]
    told += ["memory" for _ in cupy.cuda.memory.check_all()]
    assert any(sign in each for each in told), told
