"""Synchronized layers, on real ranks: equal to one process, deterministic, failing together."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from internals import alone_on_its_rank, core
from kinds import OneRank, synchronized
from support import (
    channels_last,
    contiguous,
    failures_without_a_trace,
    output_of,
    parameters,
    refused,
    same_bits,
    sliced,
    some,
)

import fastbn

RANKS = [1, 2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))]
PROGRAM = Path(__file__).with_name("sync_ranks.py")
PYTHON = [sys.executable, "-m", "mpi4py"]  # where an exception on one rank ends all of them
MPIEXEC = Path(sys.executable).with_name("mpiexec")

with_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec in this environment")


def run_ranks(ranks, *cases):
    """Runs cases of the program on so many ranks; a rank that hangs fails the test."""
    pytest.importorskip("mpi4py")
    done = subprocess.run(
        [MPIEXEC, "-n", str(ranks), *PYTHON, PROGRAM, *cases],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@with_mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_on_ranks(ranks):
    run_ranks(  # together: an interpreter for each rank takes longer than most of the cases
        ranks,
        *["equal", "nowhere", "failing", "modes", "communicators"],
        *["recalibrated", "masked", "masked_away", "starved", "copies", "activated"],
    )


@with_mpi
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_ranks_that_disagree_stop_together(ranks):
    run_ranks(ranks, "disagreeing")


@with_mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_every_run_with_so_many_ranks_gives_the_same_bits(ranks):
    assert run_ranks(ranks, "bits") == run_ranks(ranks, "bits")


def trained_alone(rng):
    """A layer of this process alone, with something in every array."""
    MPI = pytest.importorskip("mpi4py.MPI")
    sync = fastbn.SyncBatchNorm(3, momentum=None, comm=MPI.COMM_SELF)
    sync.weight[:], sync.bias[:] = parameters(3)
    sync(some(rng, (4, 3, 6, 5)))
    sync.backward(some(rng, (4, 3, 6, 5)))
    return sync


@pytest.mark.parametrize("make", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("in_place", [False, True])
def test_without_memory_a_step_changes_nothing(rng, make, in_place):
    sync = trained_alone(rng)
    x, dy = make(some(rng, (4, 3, 6, 5))), make(some(rng, (4, 3, 6, 5)))
    intact = sync, x, dy
    assert failures_without_a_trace(lambda: sync(x, out=x if in_place else None), *intact)
    assert failures_without_a_trace(
        lambda: sync.backward(dy, out=dy if in_place else None), *intact
    )


def test_an_interrupt_after_the_reduction_changes_nothing(rng, monkeypatch):
    sync, x, dy = trained_alone(rng), some(rng, (4, 3, 6, 5)), some(rng, (4, 3, 6, 5))

    def interrupt(*_):
        raise KeyboardInterrupt

    for kernel, call in (
        ("elemt", lambda: sync(x, out=x)),
        ("backward_elemt", lambda: sync.backward(dy, out=dy)),
    ):
        with monkeypatch.context() as patched, refused(KeyboardInterrupt, intact=[sync, x, dy]):
            patched.setattr(core, kernel, interrupt)
            call()
        call()


def test_mpi4py_is_not_imported_before_it_is_needed(tmp_path):
    code = "import sys, fastbn; fastbn.BatchNorm2d(3); print('mpi4py' in sys.modules)"
    assert output_of(code, tmp_path).strip() == "False"


def test_without_mpi4py_the_error_names_the_extra(tmp_path):
    code = """
import sys
sys.modules["mpi4py"] = None
import fastbn
try:
    fastbn.SyncBatchNorm(3)
except ImportError as error:
    print(error)
"""
    told = output_of(code, tmp_path)
    assert "pip install 'fastbn[mpi]' mpich, in a clone pip install -e '.[mpi]' mpich" in told


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        (None, TypeError),
        (fastbn.InstanceNorm2d(3), TypeError),
        (fastbn.LazyInstanceNorm2d(), TypeError),
        (fastbn.LazyBatchNorm2d(), RuntimeError),
        (fastbn.BatchNorm2d(3, ghost_batch_size=4), ValueError),
    ],
)
def test_what_cannot_be_converted_is_refused(layer, error):
    with pytest.raises(error):
        fastbn.convert_sync_batchnorm(layer)


@pytest.mark.parametrize("comm", [5, "world", 0], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda comm: fastbn.SyncBatchNorm(3, comm=comm),
        lambda comm: fastbn.convert_sync_batchnorm(fastbn.BatchNorm2d(3), comm),
    ],
    ids=["constructed", "converted"],
)
def test_what_is_no_communicator_is_refused(make, comm):
    with refused(TypeError, "comm must be an mpi4py.MPI.Intracomm", type(comm).__name__):
        make(comm)


@pytest.mark.torch
def test_the_module_of_a_layer_that_cannot_be_converted_is_named():
    torch = pytest.importorskip("torch")
    with refused(TypeError, "fastbn's", "torch.nn.modules.batchnorm.BatchNorm2d"):
        fastbn.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))


@pytest.mark.parametrize("size", [2, 0])
def test_ghost_batches_that_are_set_later_are_refused(rng, monkeypatch, size):
    alone_on_its_rank(monkeypatch, OneRank())
    sync, x = synchronized(), some(rng, (4, 3, 5, 2))
    sync.ghost_batch_size = size
    with refused(ValueError, "ghost_batch_size", "None", intact=[sync, x]):
        sync(x, out=x)
    y = sync.freeze()(x)  # by running statistics it has no effect, as for every layer
    assert same_bits(sync.eval()(x), y)


class Counted(OneRank):
    """A rank that counts its reductions."""

    def __init__(self):
        self.reductions = 0

    def Allreduce(self, *_):
        self.reductions += 1


def test_a_communicator_that_is_set_later_is_that_of_the_next_forward(rng, monkeypatch):
    first, second = Counted(), Counted()
    alone_on_its_rank(monkeypatch, first)
    sync, x = fastbn.SyncBatchNorm(3, comm=first), some(rng, (4, 3, 5, 2))
    sync(x)
    sync.comm = second
    sync.backward(x)
    assert (first.reductions, second.reductions) == (2, 0)
    sync(x)
    sync.backward(x)
    assert (first.reductions, second.reductions) == (2, 2)


def test_a_converted_layer_shares_the_arrays_and_keeps_the_mode(rng):
    MPI = pytest.importorskip("mpi4py.MPI")
    bn = fastbn.BatchNorm2d(3, 1e-3, None, dtype=np.float64, bias=False)
    bn(some(rng, (4, 3, 5, 2)))
    sync = fastbn.convert_sync_batchnorm(bn.freeze(), MPI.COMM_SELF)
    assert repr(sync) == "Sync" + repr(bn).replace("BatchNorm2d", "BatchNorm")
    assert sync.weight is bn.weight
    assert sync.running_var is bn.running_var
    assert sync.frozen
    assert sync.comm is MPI.COMM_SELF
    sync.unfreeze()(some(rng, (4, 3, 5, 2)))
    assert bn.num_batches_tracked == 2
    assert same_bits(bn.running_mean, sync.running_mean)
