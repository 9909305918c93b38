"""A few calls of every kernel, on arrays that end where their memory ends, for valgrind."""

import itertools

import numpy as np

import fastbn
from fastbn import functional as F

SHAPES = [
    (2, 3, 5, 7),
    (3, 5, 2),
    (33, 2),
    (0, 3, 2),
    (1, 70, 3),
    (2, 2, 17, 31),
    (600, 3),
    (520, 17),
]
DTYPES = ["float16", "float32", "float64"]


def new(rng, shape, dtype, channels_last):
    array = rng.standard_normal(shape).astype(dtype)
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1) if channels_last else array


def call_all(x, dy, **options):
    vectors = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, mean, invstd = F.batch_norm_forward(x, *vectors, **options)
    dx = F.batch_norm_backward(dy, x, vectors[0], mean, invstd, **options)[0]
    F.batch_norm(x, vectors[1], vectors[0], *vectors, out=y, **options)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()


rng = np.random.default_rng(0)
for case in itertools.product(SHAPES, DTYPES, (False, True)):
    for threads in (1, 2):
        fastbn.set_num_threads(threads)
        x, dy = new(rng, *case), new(rng, *case)
        mask = rng.random((x.shape[0], 1, *x.shape[2:])) < 0.5
        call_all(x, dy)
        call_all(x, dy, mask=mask)
        call_all(x, dy, mask=mask, ghost_batch_size=2)
        norm = fastbn.GroupNorm(1, x.shape[1])
        assert np.isfinite(norm(x, mask=mask)).all()
        assert np.isfinite(norm.backward(dy)).all()
