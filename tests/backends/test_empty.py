"""What has no elements, or no channels, goes through every layer and changes nothing."""

import numpy as np
import pytest
from cases import each, in_pairs
from internals import alone_on_its_rank
from kinds import KINDS, TRACKING, OneRank
from support import LAYER_ARRAYS, some_mask

import fastbn
from fastbn import functional as F

EMPTY = [(5, 0), (0, 0), (0, 3), (2, 3, 0), (5, 0, 2)]  # the last axis stands for all further ones


def shape_of(kind, like):
    """An empty shape of as many axes as a layer takes."""
    axes = len(KINDS[kind][1])
    return (*like, *[1] * (2 - len(like)), *[2] * (axes - max(len(like), 2)))[:axes]


BOTH, FUSED = [False, True], [(None, False), ("relu", True), ("leaky_relu", False)]


@pytest.mark.parametrize("kind", KINDS)
@each("in_place, masked, fused", in_pairs(BOTH, BOTH, FUSED))
def test_layers(backend, kind, in_place, masked, fused, monkeypatch):
    alone_on_its_rank(monkeypatch, OneRank())
    make = KINDS[kind][0]
    for like in EMPTY:
        shape = shape_of(kind, like)
        mask = backend.array(np.ones((shape[0], 1, *shape[2:]), bool)) if masked else None
        activation, adds = fused
        layer = make(shape[1], device=backend.device, activation=activation)
        x, residual = (backend.array(np.ones(shape, np.float32)) for _ in range(2))
        arguments = {"out": x if in_place else None, "mask": mask}
        y = layer(x, **arguments, residual=residual if adds else None)
        assert y.shape == shape
        dx = layer.backward(y)
        assert (dx[0] if adds else dx).shape == shape
        assert_unchanged(backend, layer, shape[1])
        if kind in TRACKING:
            y = layer.freeze()(x, mask=mask)
            assert layer.backward(y).shape == shape
        assert layer.eval()(x, mask=mask).shape == shape


def assert_unchanged(backend, layer, channels):
    """Asserts that all arrays of a layer are those of a new one, and its gradients zeros."""
    initial = dict.fromkeys(LAYER_ARRAYS, 0) | {"weight": 1, "running_var": 1}
    for name, value in initial.items():
        array = getattr(layer, name)
        if array is not None:
            shape = () if name == "num_batches_tracked" else (channels,)
            np.testing.assert_array_equal(backend.host(array), np.full(shape, value))


@each("shape", [(5, 0), (0, 0, 2), (5, 0, 2), (0, 3, 2)])
@each("ghost_batch_size", [None, 1, 2])
@each("masked", [False, True])
def test_functions(backend, shape, ghost_batch_size, masked, rng):
    x = backend.array(np.ones(shape, np.float32))
    mask = backend.array(some_mask(rng, shape)) if masked and len(x) else None
    options = {"mask": mask, "ghost_batch_size": ghost_batch_size}
    y, mean, invstd = F.batch_norm_forward(x, **options)
    arguments = x, x, None, mean, invstd
    for fused in ({}, {"activation": "relu", "bias": None}):
        dx, dweight, dbias = F.batch_norm_backward(*arguments, **options, **fused)
        assert y.shape == dx.shape == shape
        assert dweight.shape == dbias.shape == shape[1:2]
        assert not backend.host(dweight).any()
        assert not backend.host(dbias).any()
    if not ghost_batch_size:
        for function in (F.instance_norm, lambda x, mask: F.group_norm(x, 1, mask=mask)):
            assert function(x, mask=mask).shape == shape


def test_more_groups_than_channels(backend):
    norm = fastbn.GroupNorm(2, 0, device=backend.device)
    x = backend.array(np.ones((5, 0, 2), np.float32))
    assert norm.backward(norm(x, out=x)).shape == (5, 0, 2)
