"""What calls leave behind, what they need besides their output, and arrays of any size."""

import os
import sys

import pytest
from support import output_of

pytestmark = [pytest.mark.serial, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

# Every public entry, good calls and refused ones, 100,000 calls in all.
LEAK = """
import gc, itertools, tracemalloc
import numpy as np
import fastbn
from fastbn import functional as F

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), dtype=np.float32)
strided, swapped, half = x[..., ::2], x.astype(">f4"), x.astype(np.float16)
out = np.empty_like(x)
mean, invstd = np.zeros(3), np.ones(3)
bn, frozen, static = (fastbn.BatchNorm2d(3) for _ in range(3))
frozen.freeze(), static.eval()
state = bn.state_dict()

def training(x):
    bn.zero_grad()
    bn(x)
    bn.backward(x)

def in_place():
    frozen(out, out=out)
    frozen.backward(x, out=out)
    np.copyto(out, x)
    bn(out, out=out)
    bn.backward(x, out=out)

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError):
        return
    raise AssertionError("not refused")

def lazy():
    layer = fastbn.LazyBatchNorm2d()
    layer.load_state_dict(state)
    layer(x)
    repr(layer)

CALLS = [
    lambda: training(x),
    lambda: training(strided),
    lambda: training(swapped),
    lambda: training(half),
    in_place,
    lambda: static(x),
    lambda: static(x, out=out),
    lambda: F.batch_norm(x, mean, invstd, training=True, momentum=0.0),
    lambda: F.batch_norm(x, mean, invstd),
    lambda: F.batch_norm_stats(x),
    lambda: F.batch_norm_elemt(x, mean, invstd, out=out),
    lambda: F.batch_norm_forward(x),
    lambda: F.batch_norm_backward(x, x, None, mean, invstd),
    lambda: F.batch_norm_backward_reduce(x, x, mean, invstd),
    lambda: F.batch_norm_backward_elemt(x, x, mean, invstd, None, mean, mean, 40),
    lambda: refused(bn, x[0]),
    lambda: refused(bn, x, out=x[::-1]),
    lambda: refused(F.batch_norm, x, mean, None),
    lambda: refused(fastbn.BatchNorm2d, -1),
    lambda: refused(bn.load_state_dict, {}),
    lambda: bn.load_state_dict(bn.state_dict()),
    lambda: fastbn.BatchNorm2d(3).to("cpu").reset_parameters(),
    lazy,
    fastbn.get_num_threads,
]

def calls(count):
    for call in itertools.islice(itertools.cycle(CALLS), count):
        call()
    gc.collect()

calls(5_000)
before = resident()
calls(100_000)
print(resident() - before)
tracemalloc.start()
calls(1_000)
before = tracemalloc.get_traced_memory()[0]
calls(5_000)
print(tracemalloc.get_traced_memory()[0] - before)
"""


@pytest.mark.slow
def test_nothing_leaks_over_100_000_calls(tmp_path):
    resident, traced = map(int, output_of(LEAK, tmp_path).split())
    assert resident < 2**20  # ten bytes a call
    assert traced < 2**12  # less than a byte a call


# Of an array of 25 MB. A first call has started the threads.
START = """
import resource
import numpy as np
import fastbn

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

def buffer(dtype):
    array = np.random.default_rng(0).standard_normal({shape}, dtype=np.float32).astype(dtype)
    return np.moveaxis(array, -1, 1) if {last} else array

x, dy = buffer({dtype!r}), buffer({dtype!r})
bn = fastbn.BatchNorm2d(x.shape[1])
fastbn.set_num_threads({threads})

def forward(x, dy): bn.train()(x, out=x)
def backward(x, dy): bn.backward(dy, out=dy)
def evaluation(x, dy): bn.eval()(x, out=x)

# First calls map code from files, a megabyte at once on some systems.
warm = [np.array(a[:, :, :64], order="K") for a in (x, dy)]
for call in forward, backward, evaluation:
    call(*warm)
del warm
"""
PEAK = """
for call in forward, backward, evaluation:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = status("VmHWM")
    call(x, dy)
    print(status("VmHWM") - before)
"""
LIMITED = """
limit = status("VmSize") + {allowed}
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
for call in forward, backward, evaluation:
    call(x, dy)
print("done")
"""
# Shape of the buffer, whether the channels are last, and how many blocks a channel is summed in.
SHAPES = {
    "rows": ((32, 64, 56, 56), False, 4),
    "one image": ((1, 3, 1500, 1500), False, 69),
    "columns": ((2048, 256, 3, 4), False, 4),
    "channels last": ((32, 56, 56, 64), True, 196),
    "channels last, few": ((8, 512, 512, 3), True, 256),
    "channels last, many": ((1, 362, 362, 128), True, 256),
}
QUICK = "rows", "channels last"
by_shape = pytest.mark.parametrize(
    ("shape", "last", "blocks"),
    [
        pytest.param(*case, marks=[] if name in QUICK else pytest.mark.slow, id=name)
        for name, case in SHAPES.items()
    ],
)


@by_shape
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_in_place_next_to_nothing_is_allocated(tmp_path, shape, last, blocks, dtype):
    code = (START + PEAK).format(shape=shape, last=last, dtype=dtype, threads=2)
    # What is freed goes back to the system: a new array would hide in it.
    lines = output_of(code, tmp_path, MALLOC_MMAP_THRESHOLD_="131072").split()
    kilobytes = [int(line) / 1024 for line in lines]
    assert max(kilobytes) < 768, kilobytes


@by_shape
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_what_a_call_needs_is_two_sums_for_each_block(tmp_path, shape, last, blocks, dtype):
    # By the address space, which the system counts to the page. The slack is for some vectors of
    # one value per channel.
    channels = shape[-1] if last else shape[1]
    options = {"shape": shape, "last": last, "dtype": dtype, "threads": 2}
    code = (START + LIMITED).format(**options, allowed=16 * channels * blocks + 65536)
    assert output_of(code, tmp_path, MALLOC_MMAP_THRESHOLD_="16384").strip() == "done"


# More elements than 32 bits can count, in 4.3 GB. The values are a mean and as much to either side.
HUGE = """
import numpy as np
import fastbn

n, c, s = 2, 2, 2**29 + 8
buffer = np.empty({shape}, np.float16)
x = np.moveaxis(buffer, -1, 1) if {last} else buffer
mean, deviation = [3, -5], [1, 2]
for channel in 0, 1:
    for i in 0, 1:
        x[:, channel, i::2] = mean[channel] + (-1) ** i * deviation[channel]

bn = fastbn.BatchNorm1d(c, momentum=1.0, dtype=np.float64)
assert bn(x, out=x) is x and x.size > 2**31
print((bn.running_mean == mean).all(), np.allclose(bn.running_var, [1, 4], rtol=1e-9))
print(all((x[:, :, i::2] == (-1) ** i).all() for i in (0, 1)))
bn.backward(x, out=x)  # of y itself: next to nothing
print(np.allclose(bn.weight_grad, n * s, rtol=1e-4), (bn.bias_grad == 0).all())
print(all((abs(x[:, :, i::2]) < 1e-4).all() for i in (0, 1)))
"""


@pytest.mark.skipif("FASTBN_TEST_HUGE" not in os.environ, reason="FASTBN_TEST_HUGE is not set")
@pytest.mark.parametrize(
    ("shape", "last"), [("(n, c, s)", False), ("(n, s, c)", True), ("(n * s // 8, c, 8)", False)]
)
def test_arrays_of_more_than_2_31_elements(tmp_path, shape, last):
    words = output_of(HUGE.format(shape=shape, last=last), tmp_path).split()
    assert words == ["True"] * 6
