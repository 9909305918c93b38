"""What the core computes on each of its paths, and a hash of that to compare between processes.

As a script it prints a line for every path and dtype: a hash, and what it is of.
"""

import hashlib

import numpy as np

import fastbn
from fastbn import functional as F

DTYPES = ["float16", "bfloat16", "float32", "float64"]

# The shape of an array, and whether the channels are last. All but the first three are large
# enough for several threads; those called "streamed" for stores around the cache, where the third
# level is not larger than 32 MB.
PATHS = {
    "tails of rows": ((3, 5, 7, 7), False),
    "tails of a strip": ((2, 67, 3, 5), True),
    "a few columns": ((1, 7, 1, 3), False),
    "groups of short runs": ((32, 590, 7, 7), False),
    "more channels than a page of runs": ((1, 257, 60, 61), False),
    "channels of several blocks": ((8, 5, 151, 153), False),
    "pieces of a channel": ((2, 1, 1000, 517), False),
    "streamed rows": ((15, 40, 60, 59), False),
    "rounds of channels, streamed": ((3, 2, 512, 700), False),
    "folded columns with a rest": ((160_005, 6), False),
    "folded channels-last": ((8, 5, 151, 153), True),
    "one strip of columns, streamed": ((32, 64, 35, 34), True),
    "strips of short runs": ((38, 6000, 2, 2), False),
    "strips of columns": ((40, 700, 6, 7), True),
}


def dtype_of(name):
    """The dtype called `name`."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def arguments(path, dtype):
    """x, dy, weight and bias for a path, the same in every process."""
    shape, last = PATHS[path]
    rng = np.random.default_rng(5)
    if last:
        shape = (shape[0], *shape[2:], shape[1])
    arrays = []
    for mean, std in [(2.0, 3.0), (0.1, 1.0)]:
        a = (std * rng.standard_normal(shape, np.float32) + np.float32(mean)).astype(dtype)
        arrays.append(np.moveaxis(a, -1, 1) if last else a)
    return (*arrays, *rng.standard_normal((2, arrays[0].shape[1])))


def results(x, dy, weight, bias):
    """Everything that can be computed from these, by name."""
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = F.batch_norm_backward(dy, x, weight, mean, invstd)
    _, stats_mean, m2 = F.batch_norm_stats(x)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd)
    gradient = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, x.size)
    running = np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
    in_place = x.copy(order="K")
    F.batch_norm(in_place, *running, weight, bias, training=True, out=in_place)
    return {
        "y": y,
        "mean": mean,
        "invstd": invstd,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "mean of stats": stats_mean,
        "m2": m2,
        "sum_dy": sums[0],
        "sum_dy_xhat": sums[1],
        "dx of given sums": gradient,
        "eval": F.batch_norm(x, mean, 1 / invstd**2, weight, bias),
        "in place": in_place,
        "running_mean": running[0],
        "running_var": running[1],
    }


def fingerprint(path, name):
    """A hash of all results on a path, for the dtype called `name`."""
    digest = hashlib.sha256()
    for array in results(*arguments(path, dtype_of(name))).values():
        digest.update(array.tobytes())
    return digest.hexdigest()


def main():
    """Print the hashes, for the instruction set and the threads that the environment sets."""
    fastbn.show_config()
    for path in PATHS:
        for name in DTYPES:
            try:
                dtype_of(name)
            except ImportError:
                continue
            print(fingerprint(path, name), f"{path}, {name}")


if __name__ == "__main__":
    main()
