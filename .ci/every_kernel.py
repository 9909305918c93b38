"""A few calls of every kernel, on arrays that end where their memory ends, for valgrind."""

import itertools

import ml_dtypes
import numpy as np

import fastbn
from fastbn import _core
from fastbn import functional as F

SHAPES = [
    (2, 3, 5, 7),
    (3, 5, 2),
    (33, 2),
    (0, 3, 2),
    (1, 70, 3),
    (2, 2, 29, 31),  # runs that are streamed
    (600, 3),
    (520, 17),
]
DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]


def new(rng, shape, dtype, channels_last):
    array = rng.standard_normal(shape).astype(dtype)
    return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1) if channels_last else array


def call_all(x, dy, **options):
    vectors = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, mean, invstd = F.batch_norm_forward(x, *vectors, **options)
    dx = F.batch_norm_backward(dy, x, vectors[0], mean, invstd, **options)[0]
    F.batch_norm(x, vectors[1], vectors[0], *vectors, out=y, **options)
    F.batch_norm_forward(x, *vectors, out=x, **options)
    assert all(np.isfinite(array).all() for array in (x, y, dx))


def call_fused(x, dy):
    vectors = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    kind = fastbn.BatchNorm2d if x.ndim == 4 else fastbn.BatchNorm1d
    for activation in (None, "relu", "relu6", "leaky_relu"):
        y, mean, invstd = F.batch_norm_forward(x, *vectors, activation=activation)
        dx = F.batch_norm_backward(
            dy, x, vectors[0], mean, invstd, bias=vectors[1], activation=activation
        )[0]
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()
        if x.size == 0:  # a layer in training refuses an empty batch
            continue
        layer = kind(x.shape[1], activation=activation)
        for name in (None, "out", "residual_out"):  # what takes the place of dy
            assert np.isfinite(layer(x, residual=dy)).all()
            gradient = dy.copy(order="K")
            places = {} if name is None else {name: gradient}
            assert all(np.isfinite(result).all() for result in layer.backward(gradient, **places))


rng = np.random.default_rng(0)
for *case, nontemporal in itertools.product(SHAPES, DTYPES, (False, True), (False, True)):
    ordinary = _core.set_nontemporal_bytes(0) if nontemporal else None
    for threads in (1, 2):
        fastbn.set_num_threads(threads)
        x, dy = new(rng, *case), new(rng, *case)
        mask = rng.random((x.shape[0], 1, *x.shape[2:])) < 0.5
        call_all(x, dy)
        call_all(x, dy, mask=mask)
        call_all(x, dy, mask=mask, ghost_batch_size=2)
        call_fused(x, dy)
        norm = fastbn.GroupNorm(1, x.shape[1])
        assert np.isfinite(norm(x, mask=mask)).all()
        assert np.isfinite(norm.backward(dy)).all()
    if nontemporal:
        _core.set_nontemporal_bytes(ordinary)

# Groups in turns, two on one thread, by all kinds of sums: of float32, by non-temporal stores.
_core.set_nontemporal_bytes(0)
fastbn.set_num_threads(1)
for shape, activation in itertools.product([(1, 300, 12, 11), (1, 80, 29, 31)], (None, "relu")):
    x, dy = new(rng, shape, "float32", False), new(rng, shape, "float32", False)
    y, mean, invstd = F.batch_norm_forward(x, activation=activation)
    dx = F.batch_norm_backward(dy, x, None, mean, invstd, bias=None, activation=activation)[0]
    assert all(np.isfinite(array).all() for array in (x, y, dx))
