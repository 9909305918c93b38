"""What synchronization costs: a training step of SyncBatchNorm beside one of BatchNorm2d.

On so many ranks of one machine, one thread each, float32, milliseconds, the slowest rank, median
of many steps (forward and backward into arrays that are there)::

    mpiexec -n 2 python -m bench.sync
"""

import statistics
import time

import numpy as np
from mpi4py import MPI

import fastbn

SHAPES = [(2, 64, 1, 1), (8, 64, 28, 28), (8, 512, 7, 7), (32, 64, 56, 56)]
STEPS = 50
COMM = MPI.COMM_WORLD


def step_times(layer, x):
    """Milliseconds of each step on the slowest rank."""
    y, dx = np.empty_like(x), np.empty_like(x)
    times = []
    for _ in range(STEPS):
        COMM.Barrier()
        start = time.perf_counter()
        layer(x, out=y)
        layer.backward(x, out=dx)
        times.append(COMM.allreduce(time.perf_counter() - start, MPI.MAX) * 1e3)
    return times


def main():
    fastbn.set_num_threads(1)
    if COMM.rank == 0:
        print(f"| {COMM.size} ranks | BatchNorm2d | SyncBatchNorm |\n| :-- | --: | --: |")
    for shape in SHAPES:
        x = np.random.default_rng(COMM.rank).normal(size=shape).astype(np.float32)
        plain = fastbn.BatchNorm2d(shape[1])
        sync = fastbn.SyncBatchNorm(shape[1])
        row = [statistics.median(step_times(layer, x)) for layer in (plain, sync)]
        if COMM.rank == 0:
            print(f"| {'x'.join(map(str, shape))} | {row[0]:.3f} | {row[1]:.3f} |")


if __name__ == "__main__":
    main()
