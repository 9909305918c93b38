"""A few calls of every kernel, on arrays that end where their memory ends, for valgrind."""

import itertools

import numpy as np

import fastbn
from fastbn import functional as F

SHAPES = [(2, 3, 5, 7), (3, 5, 2), (33, 2), (0, 3, 2), (1, 70, 3), (2, 2, 17, 31), (600, 3)]
DTYPES = ["float16", "float32", "float64"]


def new(rng, shape, dtype, channels_last):
    array = rng.standard_normal(shape).astype(dtype)
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1) if channels_last else array


def call_all(x, dy):
    vectors = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, mean, invstd = F.batch_norm_forward(x, *vectors)
    dx = F.batch_norm_backward(dy, x, vectors[0], mean, invstd)[0]
    F.batch_norm(x, mean, invstd, *vectors, out=y)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()


rng = np.random.default_rng(0)
for case in itertools.product(SHAPES, DTYPES, (False, True)):
    for threads in (1, 2):
        fastbn.set_num_threads(threads)
        call_all(new(rng, *case), new(rng, *case))
