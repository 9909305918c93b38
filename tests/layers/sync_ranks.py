"""What the ranks run in the tests of synchronized layers.

In a shell: ``mpiexec -n 3 python -m mpi4py sync_ranks.py CASE...``.
"""

import copy
import itertools
import pickle
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import reference
import support
from mpi4py import MPI
from support import channels_last, contiguous, parameters, same_bits, some

import fastbn

WORLD = MPI.COMM_WORLD
SHAPES = [(9, 3), (9, 3, 7), (9, 3, 5, 2), (9, 3, 5, 2, 3)]
SPLITS = {1: [[9]], 2: [[4, 5], [0, 9]], 3: [[2, 6, 1], [9, 0, 0]], 4: [[1, 4, 3, 1], [0, 5, 0, 4]]}


def generator():
    """The same on all ranks, so that each of them knows the whole batch."""
    return np.random.default_rng(7)


def part(x, sizes):
    """This rank's samples."""
    stops = np.cumsum(sizes)
    return x[stops[WORLD.rank] - sizes[WORLD.rank] : stops[WORLD.rank]]


def pair(batch_norm=fastbn.BatchNorm2d, **kwargs):
    """A synchronized layer, and the plain one for all of the batch."""
    plain = batch_norm(3, **kwargs)
    plain.weight[:], plain.bias[:] = parameters(3)
    return fastbn.convert_sync_batchnorm(copy.deepcopy(plain)), plain


def plain_class(shape):
    return {2: fastbn.BatchNorm1d, 3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}.get(
        len(shape), fastbn.BatchNorm3d
    )


def assert_within_2_ulp(actual, expected, weight):
    """At the size of a channel's largest value."""
    axes = (0, *range(2, expected.ndim))
    size = np.abs(reference.wide(expected)).max(axis=axes, keepdims=True, initial=0)
    size = np.maximum(size, np.abs(reference.over_channels(weight, expected.ndim)))
    # In float64 the statistics have no digits to spare: 1e-14 is the bound for one process, too.
    bound = 1e-14 * size if actual.dtype == np.float64 else 2 * reference.ulp(size, actual.dtype)
    support.assert_within(actual, expected, bound)


def check_step(shape, sizes, dtype, layout, in_place, momentum, **options):
    rng = generator()
    sync, plain = pair(plain_class(shape), momentum=momentum, **options)
    for _ in range(2):
        x = some(rng, shape, dtype, mean=3.0)
        dy = some(rng, shape, dtype, mean=0.0)
        y, dx = plain(contiguous(x)), plain.backward(contiguous(dy))
        mine, gradient = layout(part(x, sizes)), layout(part(dy, sizes))
        output = sync(mine, out=mine if in_place else None)
        assert_within_2_ulp(output, part(y, sizes), plain.weight)
        result = sync.backward(gradient, out=gradient if in_place else None)
        assert_within_2_ulp(result, part(dx, sizes), np.zeros(3))
        assert (output is mine) == (result is gradient) == in_place
    for name in ("running_mean", "running_var"):
        expected = getattr(plain, name)
        bound = 2 * reference.ulp(expected, expected.dtype)
        support.assert_within(getattr(sync, name), expected, bound)
    assert sync.num_batches_tracked == 2
    for name in ("weight_grad", "bias_grad"):
        total = WORLD.allreduce(getattr(sync, name).astype(np.float64))
        support.assert_close(total, getattr(plain, name), 1e-5)


def equal():
    for sizes in SPLITS[WORLD.size]:
        for shape in SHAPES:
            for dtype in ("float16", "float32", "float64"):
                check_step(shape, sizes, dtype, contiguous, False, 0.1)
        for layout in (support.channels_last, support.sliced, support.fortran):
            for in_place in (False, True):
                check_step((9, 3, 5, 2), sizes, "float32", layout, in_place, None)
        check_step((9, 3), sizes, "float32", contiguous, False, 0.1, unbiased=False)


def activated():
    """Residuals and activations follow as they follow the batch normalization of one process."""
    rng = generator()
    activations = [(None, 0.01), ("relu", 0.01), ("relu6", 0.01), ("leaky_relu", -0.3)]
    for sizes, (name, slope) in itertools.product(SPLITS[WORLD.size], activations):
        for in_place, masked in itertools.product([False, True], repeat=2):
            sync, plain = pair(activation=name, negative_slope=slope, dtype=np.float64)
            x, dy, residual = (some(rng, (9, 3, 5, 2), np.float64) for _ in range(3))
            mask = rng.random((9, 1, 5, 2)) < 0.7 if masked else np.ones((9, 1, 5, 2), bool)
            y = plain(x, mask=mask, residual=residual)
            expected = plain.backward(dy)
            mine, gradient = part(x, sizes).copy(), part(dy, sizes).copy()
            options = {"mask": part(mask, sizes), "residual": part(residual, sizes)}
            output = sync(mine, out=mine if in_place else None, **options)
            support.assert_close(output, part(y, sizes), 1e-13)
            results = sync.backward(gradient, residual_out=gradient if in_place else None)
            for actual, exact in zip(results, expected, strict=True):
                support.assert_within(actual, part(exact, sizes), 1e-12)
            for gradient_name in ("weight_grad", "bias_grad"):
                total = WORLD.allreduce(getattr(sync, gradient_name))
                support.assert_close(total, getattr(plain, gradient_name), 1e-12)


def bits():
    """Print bits that must be the same in every run."""
    rng = generator()
    sync, _ = pair()
    sizes = SPLITS[WORLD.size][0]
    x = part(some(rng, (9, 3, 5, 2), mean=1e3), sizes)
    y = sync(x)
    dx = sync.backward(part(some(rng, (9, 3, 5, 2), mean=0.0), sizes))
    arrays = [y, dx, sync.running_mean, sync.running_var]
    everything = WORLD.gather([array.tobytes().hex() for array in arrays])
    if WORLD.rank == 0:
        statistics = {tuple(of_rank[2:]) for of_rank in everything}
        assert len(statistics) == 1
        print(everything)


def nowhere():
    """An empty batch on all ranks touches nothing; a single value on all of them is an error."""
    sync, _ = pair()
    empty = np.empty((0, 3, 5, 2), np.float32)
    with support.untouched(sync):
        assert same_bits(sync(empty), empty)
    assert same_bits(sync.backward(empty), empty)
    assert same_bits(sync.weight_grad, np.zeros(3, np.float32))
    nothing, x = fastbn.SyncBatchNorm(0), np.empty((2, 0, 5, 2), np.float32)
    assert same_bits(nothing(x), x)
    assert nothing.num_batches_tracked == 0
    single = np.ones((int(WORLD.rank == 0), 3, 1, 1), np.float32)
    with support.refused(ValueError, "more than 1 value", intact=[sync]):
        sync(single)


@contextmanager
def refused_everywhere(culprit, error, words, layer):
    """The culprit raises its own error, the others one that names it; nothing changes."""
    expected = error if WORLD.rank == culprit else RuntimeError
    names = [words] if WORLD.rank == culprit else [f"rank {culprit} ", words]
    with support.refused(expected, *names, intact=[layer]):
        yield


def failing():
    """A rank that raises before a reduction ends the call on all of them; the next one works."""
    x = some(generator(), (4, 3, 5, 2))
    dy = some(generator(), (4, 3, 5, 2))
    for culprit in range(WORLD.size):
        guilty = WORLD.rank == culprit
        sync, _ = pair()
        for bad, error, words in (
            (x[:, :2], ValueError, "2 channels"),
            (x[0, 0, 0], ValueError, "1D input"),
            (x.astype(int), TypeError, "int64"),
            (None, TypeError, "NoneType"),
        ):
            with refused_everywhere(culprit, error, words, sync):
                sync(bad if guilty else x)
        with refused_everywhere(culprit, ValueError, "overlap", sync):
            sync(x, out=x[::-1] if guilty else None)
        for name, bad, words in (
            ("weight", np.ones(2), "weight must have the shape"),
            ("running_var", support.read_only(sync.running_var), "read-only"),
            ("num_batches_tracked", np.array(-1), "non-negative"),
            ("eps", -1.0, "eps"),
        ):
            good = getattr(sync, name)
            setattr(sync, name, bad if guilty else good)
            with refused_everywhere(culprit, ValueError, words, sync):
                sync(x)
            setattr(sync, name, good)
        mine = x.copy()
        sync(mine)
        memory = sync._saved
        with refused_everywhere(culprit, ValueError, "dy must have", sync):
            sync.backward(dy[:1] if guilty else dy)
        if guilty:
            np.maximum(mine, 0, out=mine)
        with refused_everywhere(culprit, RuntimeError, "written to since", sync):
            sync.backward(dy)
        mine[...] = x
        sync.backward(dy)
        with refused_everywhere(culprit, RuntimeError, "has run", sync):
            if not guilty:  # as if these had forgotten their backward
                sync._saved = memory
            sync.backward(dy)


def disagreeing():
    """Ranks that have another dtype, another number of axes or are elsewhere stop together."""
    sync, _ = pair()
    x = some(generator(), (4, 3, 5, 2))
    last = WORLD.rank == WORLD.size - 1
    for other in (x.astype(np.float64), x[..., 0]):
        odd, common = (f"a forward of {each.ndim} axes of {each.dtype}" for each in (other, x))
        words = f"rank {WORLD.size - 1} has {odd}, rank", f" {common}"
        with support.refused(RuntimeError, *words, intact=[sync]):
            sync(other if last else x)
    sync(x)
    with support.refused(RuntimeError, f"rank {WORLD.size - 1} has a backward", intact=[sync]):
        sync.backward(x) if last else sync(x)
    narrow = fastbn.SyncBatchNorm(2 if last else 3)
    with support.refused(ValueError, f"rank {WORLD.size - 1} has a layer of 2 channels"):
        narrow(x[:, : narrow.num_features])


def modes():
    """Evaluation and frozen layers need no other rank."""
    sync, plain = pair()
    x = some(generator(), (4, 3, 5, 2))
    if WORLD.rank == 0:
        assert same_bits(sync.eval()(x), plain.eval()(x))
        sync.train().freeze()
        plain.train().freeze()
        y = x.copy()
        assert same_bits(sync(y, out=y), plain(x))
        support.assert_close(sync.backward(x), plain.backward(x), 1e-5)
    WORLD.Barrier()


def communicators():
    """Only the ranks of its communicator take part in a layer."""
    half = WORLD.Split(WORLD.rank % 2, WORLD.rank)
    sync = fastbn.SyncBatchNorm(1, eps=1e-12, dtype=np.float64, comm=half)
    x = np.array([[1.0 + WORLD.rank], [3.0 + WORLD.rank]])
    mean = np.mean(half.allgather(x))
    sync(x)
    support.assert_close(sync.running_mean, [0.1 * mean], 1e-14)


def recalibrated():
    """Recalibrated statistics are those of the data of all ranks."""
    sync, _ = pair()
    rng = generator()
    batches = [some(rng, (9, 3, 5, 2), mean=10.0 * i) for i in range(3)]
    with fastbn.recalibrate(sync):
        for x in batches:
            sync(part(x, SPLITS[WORLD.size][-1]))
    count, mean, var = reference.moments(np.concatenate(batches))
    support.assert_close(sync.running_mean, mean, 1e-7)
    support.assert_close(sync.running_var, var * count / (count - 1), 1e-7)
    assert sync.num_batches_tracked == 3


def masked():
    """Masks leave out what they leave out of the same batch on one process, all of a rank too."""
    rng = generator()
    mask = rng.random((9, 1, 5, 2)) < 0.5
    for sizes in SPLITS[WORLD.size]:
        sync, plain = pair()
        x, dy = some(rng, (9, 3, 5, 2)), some(rng, (9, 3, 5, 2))
        mask[: sizes[0] - 1] = WORLD.size == 1
        mask[-1] = True
        y, dx = plain(x, mask=mask), plain.backward(dy)
        spoilt = np.where(mask, x, np.nan)
        assert_within_2_ulp(
            sync(part(spoilt, sizes), mask=part(mask, sizes)), part(y, sizes), plain.weight
        )
        assert_within_2_ulp(sync.backward(part(dy, sizes)), part(dx, sizes), np.zeros(3))
        support.assert_close(sync.running_var, plain.running_var, 1e-6)


def masked_away():
    """Masks that leave nothing are an error if they do so on all ranks, and on all of them."""
    sync, plain = pair()
    x, dy = some(generator(), (4, 3, 5, 2)), some(generator(), (4, 3, 5, 2))
    nothing = np.zeros((4, 1, 5, 2), bool)
    for here in (x, x[: 4 * (WORLD.rank == 0)]):  # on the others an empty part, without a mask
        mask = nothing if len(here) else None
        out = here.copy()
        with support.refused(ValueError, "masks leave no value", intact=[sync, here, out]):
            sync(here, out=out, mask=mask)
    if WORLD.size > 1:
        first = WORLD.rank == 0
        others = WORLD.size - 1
        y, dx = plain(np.concatenate([x] * others)), plain.backward(np.concatenate([dy] * others))
        mine, gradient = sync(x, mask=nothing if first else None), sync.backward(dy)
        assert_within_2_ulp(mine, np.zeros_like(x) if first else y[:4], plain.weight)
        assert_within_2_ulp(gradient, np.zeros_like(x) if first else dx[:4], np.zeros(3))
        support.assert_close(sync.running_var, plain.running_var, 1e-6)


def failed(call, starving):
    """Lets each allocation of a call on one rank fail in turn; yields what each attempt raised."""
    for number in itertools.count(1):
        try:
            with support.failing_allocation(number) if starving else nullcontext():
                call()
        except (MemoryError, RuntimeError) as error:
            yield error
        else:
            return


def starved():
    """A rank without memory for its arrays fails on all of them, and nothing changes."""
    x, dy = some(generator(), (4, 3, 5, 2)), some(generator(), (4, 3, 5, 2))
    for culprit, layout in itertools.product(range(WORLD.size), (contiguous, channels_last)):
        sync, _ = pair()
        x, dy, starving = layout(x), layout(dy), WORLD.rank == culprit
        for call in (partial(sync, x), partial(sync.backward, dy)):
            before = support.bits_of(sync)
            attempts = 0
            for error in failed(call, starving):
                attempts += 1
                assert type(error) is (MemoryError if starving else RuntimeError)
                assert starving or f"rank {culprit} failed with MemoryError" in str(error)
                assert support.bits_of(sync) == before
            assert set(WORLD.allgather(attempts)) == {attempts}
            assert attempts > 2


def copies():
    """Copies synchronize as their original does."""
    sync, plain = pair()
    x = some(generator(), (9, 3, 5, 2))
    expected = part(plain(x), SPLITS[WORLD.size][0])
    mine = part(x, SPLITS[WORLD.size][0])
    sync(mine)
    for twin in (copy.copy(sync), copy.deepcopy(sync), pickle.loads(pickle.dumps(sync))):
        assert type(twin) is fastbn.SyncBatchNorm
        assert_within_2_ulp(twin(mine), expected, plain.weight)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        if WORLD.rank == 0:
            print("---", case, file=sys.stderr, flush=True)
        globals()[case]()
