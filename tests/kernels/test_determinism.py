"""The same bits for every number of threads, for every load and address, in place or not."""

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import fingerprint
import numpy as np
import pytest
from internals import core
from support import channels_last, contiguous, parameters, same_bits, some, some_mask, spoilt

import fastbn
from fastbn import functional as F

pytestmark = pytest.mark.isa

PAGE = 4096
THREADS = [2, 3, 7, 16]  # beside a single one
# They have something to lose by a schedule: pieces, rounds and strips that threads share.
SHARED = ["channels of several blocks", "pieces of a channel", "rounds of channels, streamed"]
SHARED += ["strips of columns", "strips of runs", "columns of sums, runs of results"]
# Whole lines, ends of lines, buffers, strips, folded rows and more columns than one kernel takes.
STORED = ["tails of rows", "tails of a strip", "groups of short runs", "channels of several blocks"]
STORED += ["streamed rows", "folded channels-last", "strips of columns", "a narrow last strip"]
STORED += ["wide strips of columns", "strips of runs", "folded runs with a rest"]
STORED += ["columns of sums, runs of results"]


def at(address, a):
    """The same array, so many bytes behind the beginning of a page."""
    buffer = np.empty(a.nbytes + 2 * PAGE, np.uint8)
    start = -buffer.ctypes.data % PAGE + address
    copy = np.ndarray(a.shape, a.dtype, buffer, start, a.strides)
    copy[...] = a
    return copy


def differences(a, b):
    """The names of the results that differ."""
    return [name for name in a if not same_bits(a[name], b[name])]


@pytest.mark.parametrize("path", fingerprint.PATHS)
def test_any_number_of_threads_gives_the_same_bits(dtype, path, set_num_threads):
    arguments = fingerprint.arguments(path, dtype)

    def results(threads):
        set_num_threads(threads)
        return fingerprint.results(*arguments)

    expected = results(1)
    # Each number with two dtypes of every path, one of two bytes and one of more.
    threads = THREADS[:2] if dtype.name in ("float16", "float32") else THREADS[2:]
    assert {n: differences(results(n), expected) for n in threads} == {n: [] for n in threads}


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((300, 700), False), ((16, 64, 12, 12), False), ((4, 9, 9, 512), True)],
)
def test_a_channel_of_a_huge_mean_leaves_the_others_alone(
    rng, shape, channels_last, set_num_threads
):
    # Its dx is computed in float64. Which channels are walked with it depends on the threads, and
    # on where the output begins.
    def seen(a):
        return np.moveaxis(a, -1, 1) if channels_last else a

    x, dy = seen(some(rng, shape)), seen(some(rng, shape))
    x[:, 3] += np.float32(2.0**110)
    mean, invstd = F.batch_norm_forward(x)[1:]

    def results(threads, shift=0):
        set_num_threads(threads)
        out = seen(at(shift, some(rng, shape)))
        return F.batch_norm_backward(dy, x, None, mean, invstd, out=out)[0]

    expected = results(1)
    for threads, shift in [(2, 0), (4, 0), (7, 0), (1, 16), (1, 32)]:
        assert same_bits(results(threads, shift), expected)


@pytest.mark.parametrize(
    "path",
    [
        "a narrow last strip",
        "a narrow last strip of short runs",
        "strips of runs",
        "columns of sums, runs of results",
        "folded rows of many channels",
        "a few rows as several blocks",
    ],
)
def test_any_number_of_threads_gives_the_same_bits_with_a_mask(rng, dtype, path, set_num_threads):
    x, dy, weight, bias = fingerprint.arguments(path, dtype)
    mask = rng.random((len(x), 1, *x.shape[2:])) < 0.7

    def results(threads):
        set_num_threads(threads)
        y, mean, invstd = F.batch_norm_forward(x, weight, bias, mask=mask)
        return y, mean, *F.batch_norm_backward(dy, x, weight, mean, invstd, mask=mask)

    expected = results(1)
    for threads in THREADS:
        assert all(map(same_bits, results(threads), expected))


@contextmanager
def nontemporal_from(nbytes):
    """Stores are non-temporal where inputs and output together have more bytes than this."""
    before = core.set_nontemporal_bytes(nbytes)
    try:
        yield
    finally:
        core.set_nontemporal_bytes(before)


@pytest.mark.parametrize("path", fingerprint.PATHS)
def test_in_place_gives_the_same_bits(dtype, path):
    x, dy, weight, bias = fingerprint.arguments(path, dtype)
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    dx, *sums = F.batch_norm_backward(dy, x, weight, mean, invstd)
    expected = [y, mean, invstd, dx, *sums]
    with nontemporal_from(0):
        backward = F.batch_norm_backward(dy, x, weight, mean, invstd, out=dy)
        forward = F.batch_norm_forward(x, weight, bias, out=x)
    assert all(map(same_bits, [*forward, *backward], expected))


def written_in_all_ways(x, dy, weight, bias):
    """Each result several times: in an array of its own, then in place of the inputs."""
    _, mean, invstd = F.batch_norm_forward(x, weight, bias)

    def forward(x, out=None):
        return F.batch_norm_forward(x, weight, bias, out=out)[0]

    def backward(dy, x, out=None):
        return F.batch_norm_backward(dy, x, weight, mean, invstd, out=out)[0]

    def fused(x, residual, out=None):
        statistics = mean, 1 / invstd**2
        return F.batch_norm(
            x, *statistics, weight, bias, eps=0.0, activation="relu", residual=residual, out=out
        )

    mask = np.random.default_rng(6).random((len(x), 1, *x.shape[2:])) < 0.7

    def evaluated(x, mask=None, out=None):
        return F.batch_norm_elemt(x, mean, invstd, weight, bias, mask=mask, out=out)

    def gradient(dy, x, mask=None, out=None):
        sums = 0.1 * mean, 0.2 * mean, x.size / len(mean)
        return F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, mask=mask, out=out)

    def copies():
        return x.copy(order="K"), dy.copy(order="K")

    def layer(x, residual, out=None):  # it keeps a bit of each element
        kind = fastbn.BatchNorm2d if x.ndim == 4 else fastbn.BatchNorm1d
        return kind(x.shape[1], activation="relu")(x, residual=residual, out=out)

    (x_1, dy_1), (x_2, dy_2), (x_3, dy_3), (x_4, dy_4) = (copies() for _ in range(4))
    zero = np.zeros((), x.dtype)
    behind = at(x.ctypes.data % PAGE + 16, dy)  # lines are streamed backwards
    return [
        [forward(x), forward(x_1, out=x_1)],
        [backward(dy, x), backward(dy_1, x, out=dy_1), backward(behind, x, out=behind)],
        [fused(x, dy), fused(x_2, dy, out=x_2), fused(x_3, dy_2, out=dy_2)],
        [layer(x, dy), layer(x, dy_3, out=dy_3)],
        [np.where(mask, evaluated(x), zero), evaluated(x, mask), evaluated(x_4, mask, out=x_4)],
        [
            np.where(mask, gradient(dy, x), zero),
            *(gradient(dy, x, mask), gradient(dy_4, x, mask, out=dy_4)),
        ],
    ]


@pytest.mark.sanitize
@pytest.mark.parametrize("path", STORED)
def test_the_kind_of_store_changes_no_bit(dtype, path):
    arguments = fingerprint.arguments(path, dtype)
    with nontemporal_from(2**62):
        expected = [arrays[0] for arrays in written_in_all_ways(*arguments)]
    for limit in (2**62, 0):
        with nontemporal_from(limit):
            results = written_in_all_ways(*arguments)
        assert all(
            same_bits(array, right)
            for arrays, right in zip(results, expected, strict=True)
            for array in arrays
        )


@pytest.mark.sanitize
@pytest.mark.parametrize("channels", [64, 512, 700, 1024, 1040])  # one strip, or several
@pytest.mark.parametrize("dtype", ["float32", "float64"])  # others are not streamed
def test_rows_are_streamed_alike_from_every_element_of_a_line(rng, dtype, channels):
    dtype = np.dtype(dtype)
    x, dy = (np.moveaxis(some(rng, (3, 5, 7, channels), dtype), -1, 1) for _ in range(2))
    weight, bias = parameters(channels)
    _, mean, invstd = F.batch_norm_forward(x, weight, bias)

    def written_at(address):
        arrays = [at(address, np.moveaxis(a, 1, -1)) for a in (x, x, dy)]
        y, same, dx = (np.moveaxis(a, -1, 1) for a in arrays)
        F.batch_norm_elemt(x, mean, invstd, weight, bias, out=y)
        F.batch_norm_elemt(same, mean, invstd, weight, bias, out=same)
        F.batch_norm_backward(dy, x, weight, mean, invstd, out=dx)
        return [y, same, dx]

    with nontemporal_from(2**62):
        expected = written_at(0)
    with nontemporal_from(0):
        for address in range(0, 64, dtype.itemsize):
            assert all(map(same_bits, written_at(address), expected))


# Long and short runs, runs of columns, rows of one strip and of several, all with last parts.
KEPT = {
    "long runs": ((3, 5, 33, 47), False),
    "short runs": ((7, 24, 13, 15), False),
    "strips of runs": ((40, 64, 6, 8), False),
    "rows": ((7, 61, 9, 5), True),
    "strips of rows": ((7, 1040, 5, 3), True),
}


@pytest.mark.sanitize
@pytest.mark.parametrize(("shape", "is_last"), KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 3}], ids=["batch", "ghost batches"])
@pytest.mark.parametrize("stored_from", [0, 2**62])
def test_each_element_has_its_own_bit_behind_a_residual(
    rng, dtype, shape, is_last, options, stored_from, set_num_threads
):
    layout = channels_last if is_last else contiguous
    x, added, dy = (layout(some(rng, shape, dtype, mean=0)) for _ in range(3))
    layer = fastbn.BatchNorm2d(shape[1], activation="relu", **options)
    for threads in (1, 3):
        set_num_threads(threads)
        for address in (0, 3 * dtype.itemsize):
            out = at(address, np.moveaxis(x, 1, -1) if is_last else x)
            out = np.moveaxis(out, -1, 1) if is_last else out
            with nontemporal_from(stored_from):
                y = layer(x, out=out, residual=added)
                _, derived = layer.backward(dy)
            # Only relu's output tells it, where 16 bits have not rounded it to 0.
            is_rounded = (y == 0) & (derived != 0)
            assert same_bits(derived[~is_rounded], np.where(y > 0, dy, dtype.type(0))[~is_rounded])
            assert is_rounded.mean() < 1e-3


# Shapes with ends, of runs, of rows and of folded ones, and with less than kernels take at a time.
BEHIND = {
    **KEPT,
    "several blocks of a run": ((1, 2, 300, 200), False),
    "runs of columns": ((130, 5, 2, 3), False),
    "folded rows and a rest": ((13, 4, 2, 10), True),
    "rows of few columns": ((61, 3, 1, 3), True),
    "one column": ((300, 1, 1, 1), True),
    "few positions": ((2, 4, 3, 7), False),
    "less than two registers": ((4, 6, 1, 1), False),
    "a strip and a narrow one": ((61, 321, 1, 3), True),  # by 7 threads
}
copied = partial(np.array, order="K")
# Where gradients are written: all apart, or one of them over dy.
PLACED = ["apart", "dx over dy", "the residual's over dy", "new arrays"]


def gradients_of(layer, x, added, dy, place, placed, mask=None):
    """Those of a step whose arrays `placed` copies, as results of a forward with a residual."""
    x, gradient, out, residual_out = map(placed, (x, dy, dy, dy))
    if place == "dx over dy":
        out = gradient
    elif place == "the residual's over dy":
        residual_out = gradient
    elif place == "new arrays":
        out = residual_out = None
    layer.zero_grad()
    layer(x, residual=added, mask=mask)
    results = layer.backward(gradient, out=out, residual_out=residual_out)
    return *results, layer.weight_grad, layer.bias_grad


@pytest.mark.sanitize
@pytest.mark.parametrize(("shape", "is_last"), BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 2}], ids=["batch", "ghost batches"])
@pytest.mark.parametrize("stored_from", [0, 2**62])
def test_gradients_behind_a_residual_have_the_bits_of_those_of_what_passes(
    rng, shape, is_last, activation, options, stored_from, set_num_threads
):
    x, added, dy = (some(rng, shape, np.dtype("float32"), mean=0) for _ in range(3))
    layer = fastbn.BatchNorm2d(shape[1], activation=activation, **options)
    plain = fastbn.BatchNorm2d(shape[1], **options)
    y = layer(x, residual=added)
    passes = {None: y == y, "relu": y > 0, "relu6": (y > 0) & (y < 6)}[activation]
    passed = np.where(passes, dy, np.float32(0))
    plain(x)
    expected = plain.backward(passed), passed, plain.weight_grad, plain.bias_grad

    def placed(a):
        a = at(next(addresses), np.moveaxis(a, 1, -1) if is_last else a)
        return np.moveaxis(a, -1, 1) if is_last else a

    with nontemporal_from(stored_from):
        for threads, place in itertools.product((1, 7), PLACED):
            set_num_threads(threads)
            for cycle in ((0, 0, 0, 0), (0, 16, 16, 0), (0, 16, 0, 16)):
                addresses = iter(cycle)
                gradients = gradients_of(layer, x, added, dy, place, placed)
                assert all(map(same_bits, gradients, expected)), (threads, place, cycle)


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("scale", "of_x"), [(2.0**-115, 1), (2.0**60, 1), (1, 1e34)])
def test_gradients_behind_a_residual_may_leave_the_range_of_float32_sums(
    rng, scale, of_x, masked, is_last, place
):
    layout = channels_last if is_last else contiguous
    x, added, dy = (layout(some(rng, (4, 3, 8, 8), mean=0)) for _ in range(3))
    x, dy = x * np.float32(of_x), dy * np.float32(scale)
    mask = rng.random((4, 1, 8, 8)) < 0.9 if masked else None
    layer, plain = fastbn.BatchNorm2d(3, activation="relu"), fastbn.BatchNorm2d(3)
    passed = np.where(layer(x, residual=added, mask=mask) > 0, dy, np.float32(0))
    plain(x, mask=mask)
    expected = plain.backward(passed), passed, plain.weight_grad, plain.bias_grad
    gradients = gradients_of(layer, x, added, dy, place, copied, mask)
    assert all(map(same_bits, gradients, expected))


# Groups of channels of which one is summed while another one's results are streamed.
INTERLEAVED = [
    (40, 46, 11, 12),  # raw moments, and a last group of fewer channels
    (12, 22, 23, 23),
    (70, 8, 23, 23),  # two blocks of samples
    (2, 8, 200, 170),  # two pieces of each run
    (1, 300, 12, 11),  # more channels in a group than a kernel takes
    (8, 130, 12, 12),  # and groups of GroupNorm that are walked in two parts
]


def same_bits_beside_sums(function, like, set_num_threads):
    """Whether a function with an `out` gives the same by both kinds of stores, wherever that is."""
    with nontemporal_from(2**62):
        expected = function(out=at(0, like))
    for threads, address in [(1, 0), (2, 16), (2, 36), (3, 60)]:
        set_num_threads(threads)
        with nontemporal_from(0):
            results = function(out=at(address, like))
        if not all(map(same_bits, results, expected)):
            return False
    return True


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", INTERLEAVED)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_a_forward_beside_sums_has_the_same_bits(rng, shape, activation, set_num_threads):
    x = some(rng, shape)
    x[:, 1] += np.float32(2.0**110)  # its results take two steps
    x[:, 4] += np.float32(1e6)  # summed again
    x[0, 6, 1, 1] = np.inf
    forward = partial(F.batch_norm_forward, x, *parameters(shape[1]), activation=activation)
    assert same_bits_beside_sums(forward, x, set_num_threads)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", INTERLEAVED)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
def test_a_backward_beside_sums_has_the_same_bits(rng, shape, activation, set_num_threads):
    x, dy = some(rng, shape), some(rng, shape)
    dy[:, 1] *= np.float32(1e36)  # summed again
    dy[0, 6, 1, 1] = np.inf
    weight, bias = parameters(shape[1])
    mean, invstd = F.batch_norm_forward(x)[1:]
    backward = partial(
        F.batch_norm_backward, dy, x, weight, mean, invstd, bias=bias, activation=activation
    )
    assert same_bits_beside_sums(backward, x, set_num_threads)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", INTERLEAVED)
def test_a_backward_of_huge_arrays_has_the_same_bits_by_all_stores(rng, shape, set_num_threads):
    # It is in float64.
    x, dy = some(rng, shape) * np.float32(1e34), some(rng, shape) * np.float32(1e36)
    weight, _ = parameters(shape[1])
    mean, invstd = F.batch_norm_forward(x)[1:]
    backward = partial(F.batch_norm_backward, dy, x, weight, mean, invstd)
    assert same_bits_beside_sums(backward, x, set_num_threads)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", INTERLEAVED)
def test_masked_steps_have_the_same_bits_by_all_stores(rng, shape, set_num_threads):
    mask = some_mask(rng, shape)
    x, dy = spoilt(some(rng, shape), mask), spoilt(some(rng, shape), mask)
    weight, bias = parameters(shape[1])
    mean, invstd = F.batch_norm_forward(x, mask=mask)[1:]
    forward = partial(F.batch_norm_forward, x, weight, bias, mask=mask)
    backward = partial(F.batch_norm_backward, dy, x, weight, mean, invstd, mask=mask)
    assert same_bits_beside_sums(forward, x, set_num_threads)
    assert same_bits_beside_sums(backward, x, set_num_threads)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", INTERLEAVED)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_group_norm_beside_sums_has_the_same_bits(rng, shape, activation, set_num_threads):
    x, dy = some(rng, shape), some(rng, shape)
    layer = fastbn.GroupNorm(2, shape[1], activation=activation)

    def backward(out):
        layer(x)
        return [layer.backward(dy, out=out)]

    def forward(out):
        return [layer(x, out=out)]

    assert same_bits_beside_sums(backward, x, set_num_threads)
    x[:, 1] += np.float32(2.0**110)
    x[0, 6, 1, 1] = np.inf
    assert same_bits_beside_sums(forward, x, set_num_threads)


def test_trials_of_stores_change_no_bit(rng, dtype):
    # The first 48 calls of a kind and size, 8 MiB at least, try both kinds of stores.
    shape = 64 // dtype.itemsize, 64, 56, 56
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype)
    y, dx, same = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    bn = fastbn.BatchNorm2d(64)

    def results():
        same[...] = x
        return bn(x, out=y), bn.backward(dy, out=dx), bn(same, out=same)

    with nontemporal_from(-1):
        expected = [array.copy() for array in results()]
        for call in range(49):
            arrays = results()
            if call % 4 == 0:  # four of the sixteen calls that try a kind
                assert all(map(same_bits, arrays, expected))


@pytest.mark.parametrize("last", [False, True])
def test_trials_of_threads_change_no_bit(rng, last):
    # The first 48 calls of a kind and shape that follow each other try all threads, and one.
    x, dy = some(rng, (2, 256, 14, 14), np.float32), some(rng, (2, 256, 14, 14), np.float32)
    x, dy = (channels_last(a) if last else a for a in (x, dy))
    y, dx, same = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    bn = fastbn.BatchNorm2d(256)

    def results():
        same[...] = x
        return bn(x, out=y), bn.backward(dy, out=dx), bn(same, out=same)

    with fastbn.threads(1):
        expected = [array.copy() for array in results()]
    for _ in range(50):
        assert all(map(same_bits, results(), expected))


@contextmanager
def load(processes):
    """Keeps so many other processes busy."""
    code = "print(flush=True)\nwhile True: pass"
    busy = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    try:
        for process in busy:
            process.stdout.readline()
        yield
    finally:
        for process in busy:
            process.kill()
            process.communicate()


@pytest.mark.serial
@pytest.mark.parametrize("path", SHARED)
def test_load_from_other_processes_changes_no_bit(path, set_num_threads):
    arguments = fingerprint.arguments(path, np.dtype(np.float32))
    set_num_threads(1)
    expected = fingerprint.results(*arguments)
    set_num_threads(4)
    with load(2 * os.cpu_count()):
        for _ in range(5):
            assert differences(fingerprint.results(*arguments), expected) == []


def train(x, dy, in_place):
    """What three training steps leave behind, and their outputs; in place, gradients may differ."""
    bn = fastbn.BatchNorm2d(x.shape[1])
    bn.weight[:], bn.bias[:] = parameters(x.shape[1])
    y = []
    for _ in range(3):
        batch = x.copy(order="K")
        y.append(bn(batch, out=batch if in_place else None).copy())
        bn.backward(dy)
    return {"y": np.array(y), "running_mean": bn.running_mean, "running_var": bn.running_var} | (
        {} if in_place else {"weight_grad": bn.weight_grad, "bias_grad": bn.bias_grad}
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_training_steps_give_the_same_bits_from_run_to_run(rng, dtype, in_place, set_num_threads):
    x, dy = some(rng, (8, 5, 151, 153), dtype), some(rng, (8, 5, 151, 153), dtype)
    expected = train(x, dy, in_place=False)
    for threads in THREADS[int(in_place) :: 2]:
        set_num_threads(threads)
        assert differences(train(x, dy, in_place), expected) == []


@pytest.mark.parametrize(
    "shifts", [(0, 0), (4, 8), (16, 12), (0, 16), (4, 68), (60, 300), (300, 0)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_addresses_of_arrays_change_no_bit(rng, shifts, channels_last):
    # Streaming stores begin at a cache line, and what comes before it takes another way. They go
    # backwards where the output lies a little behind an input, but for whole pages between them.
    shape = (15, 60, 59, 40) if channels_last else (15, 40, 60, 59)
    x, dy = some(rng, shape), some(rng, shape)

    def seen(a):
        return np.moveaxis(a, -1, 1) if channels_last else a

    def results(x, dy, out):
        y, mean, invstd = F.batch_norm_forward(seen(x), out=seen(out))
        copy = y.copy()
        dx, *sums = F.batch_norm_backward(seen(dy), seen(x), None, mean, invstd, out=seen(out))
        return copy, dx, mean, invstd, *sums

    expected = results(x, dy, np.empty_like(x))
    in_x, in_out = (at(shift, x) for shift in shifts)
    assert all(map(same_bits, results(in_x, dy, in_out), expected))
    y = F.batch_norm_elemt(seen(x)[:4], expected[2], expected[3])
    assert same_bits(expected[0][:4], y)


@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stored_from", [0, 2**62])
def test_a_last_strip_of_columns_may_be_a_line_wider(rng, dtype, threads, stored_from):
    # Strips of 512 columns, or of fewer, begin on lines of the output.
    shape = (7, 5, 3, 1024)
    x, dy = some(rng, shape, dtype), some(rng, shape, dtype)

    def results(shift):
        def out():
            return np.moveaxis(at(shift, x), -1, 1)

        bn = fastbn.BatchNorm2d(1024, activation="relu")
        y = bn(np.moveaxis(x, -1, 1), out=out())
        dx = bn.backward(np.moveaxis(dy, -1, 1), out=out())
        return y, dx, bn.running_mean, bn.weight_grad, bn.bias_grad

    with fastbn.threads(threads), nontemporal_from(stored_from):
        expected = results(0)
        for shift in (dtype.itemsize, 64 - dtype.itemsize):
            assert all(map(same_bits, results(shift), expected))
