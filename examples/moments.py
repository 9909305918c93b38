"""Mean and standard deviation of the pixels of a data set that is never in memory as a whole.

The 1,797 digits of scikit-learn stand for the data set. It is read in pieces, in three ways: one
piece after the other, from a generator; by a pool of processes; and, where Dask is installed, as a
`dask.array`, on a local cluster of several processes, by a tree of additions. What is sent around
and added up are `fastbn.Moments`, three numbers for each channel.

The script prints the statistics of the three ways. Its exit status is 0 if they are those of the
whole array, to the last digits of float64.

Run it in the root of the repository, after ``pip install .[examples]``::

    python examples/moments.py
"""

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import fastbn
from fastbn import Moments

PIECE = 100  # images that are in memory at a time
PROCESSES = 2
FAN_IN = 4  # how many moments one task of the tree adds up


def images(start: int, stop: int) -> np.ndarray:
    """A piece of the data set, (N, 1, 8, 8): a file or a query in real life."""
    return load_digits().images[start:stop, np.newaxis].astype(np.float32)


def bounds() -> list[tuple[int, int]]:
    n = len(load_digits().images)
    return [(start, min(start + PIECE, n)) for start in range(0, n, PIECE)]


def pieces() -> Iterator[np.ndarray]:
    for start, stop in bounds():
        yield images(start, stop)


def moments_of_piece(piece: tuple[int, int]) -> Moments:
    return Moments.of(images(*piece))


def by_generator() -> Moments:
    return sum((Moments.of(piece) for piece in pieces()), Moments())


def by_processes() -> Moments:
    with ProcessPoolExecutor(PROCESSES) as pool:
        return sum(pool.map(moments_of_piece, bounds()), Moments())


def tree_sum(array: Any) -> Moments:
    """The moments of a `dask.array` (N, C, ...), whose chunks hold all channels."""
    import dask

    of, add = dask.delayed(Moments.of), dask.delayed(sum)
    level = [of(chunk) for chunk in array.to_delayed().ravel()]
    while len(level) > 1:
        level = [add(level[i : i + FAN_IN]) for i in range(0, len(level), FAN_IN)]
    total: Moments = level[0].compute()
    return total


def by_dask() -> Moments:
    import dask.array
    from dask.distributed import Client, LocalCluster

    array = dask.array.from_array(images(0, sys.maxsize), chunks=(PIECE, -1, 4, -1))
    with (
        LocalCluster(n_workers=PROCESSES, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        return tree_sum(array)


def main() -> int:
    ways = {"generator": by_generator, "processes": by_processes}
    if importlib.util.find_spec("distributed"):
        ways["Dask"] = by_dask
    x = images(0, sys.maxsize).astype(np.longdouble)
    mean, std = float(x.mean()), float(x.std())
    wrong = False
    for name, way in ways.items():
        total = way()
        print(
            f"{name:9}  {total.count} pixels  mean {total.mean[0]:.14f}  std {total.std()[0]:.14f}"
        )
        wrong |= not np.allclose([total.mean[0], total.std()[0]], [mean, std], rtol=1e-15, atol=0)

    # What a first layer needs to normalize its input by the whole data set.
    norm = fastbn.BatchNorm2d(1, affine=False).eval()
    norm.running_mean[:], norm.running_var[:] = total.mean, total.var(correction=1)
    y = norm(images(0, sys.maxsize))
    print(f"normalized: mean {y.mean(dtype=np.float64):.1e}, std {y.std(dtype=np.float64):.6f}")
    if wrong:
        print("these are not the statistics of the whole array", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
