"""Normalization by batch, by instance and by running statistics, and their gradients.

What functions and layers share. The arguments have been checked (`_checks`); nothing here looks at
them again. The work is done by the backend of x's array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastbn._types import Array, Epilogue, Gate, Statistics
from fastbn.backends import backend_of
from fastbn.backends.common import batches_of
from fastbn.backends.composed import hand_over, own_memory

if TYPE_CHECKING:
    from fastbn.backends.protocol import Backend


class Forward(NamedTuple):
    """The checked arguments of a forward."""

    x: Array
    weight: Array | None
    bias: Array | None
    eps: float
    out: Array | None
    in_place: bool  # whether out has x's elements
    mask: Array | None  # of shape (N, 1, ...)
    running_mean: Array | None
    running_var: Array | None
    momentum: float | None = 0.0  # None stands for 1 / counter, or for 0 without a counter
    counter: Array | None = None
    unbiased: bool = True  # whether running_var takes the unbiased variance
    batch_size: int = 0  # samples of a ghost batch; 0 for a single batch
    counts: Sequence[int] = ()  # valid positions of each batch, in training
    num_groups: int = 0  # into which the channels of a sample are divided
    epilogue: Epilogue | None = None


class Backward(NamedTuple):
    """The checked arguments of a backward."""

    dy: Array
    x: Array
    weight: Array | None
    mean: Array
    invstd: Array
    out: Array | None
    mask: Array | None = None
    batch_size: int = 0
    gate: Gate | None = None


def by_batch(call: Forward) -> tuple[Array, Statistics, Statistics]:
    """Normalize by the statistics of the batch, then move the running ones towards them.

    The counter of batches is increased. Returns y and, for the backward, mean and invstd.
    """
    return _forward(backend_of(call.x), call)


def by_instance(call: Forward) -> tuple[Array, Statistics, Statistics]:
    """Normalize each sample by its own statistics; the running ones move towards their means.

    Samples of which a mask leaves less than two values move nothing.
    """
    x, running_mean, running_var = call.x, call.running_mean, call.running_var
    if running_mean is None or running_var is None or not x.size:
        return _forward_of_samples(call._replace(running_mean=None, running_var=None))
    # One vector for each sample moves towards the sample's statistics.
    mean, var = (np.tile(v.astype(np.float64), (len(x), 1)) for v in (running_mean, running_var))
    means = [np.empty_like(mean, shape=x.shape[1]) for _ in range(2)]  # before anything is written
    result = _forward_of_samples(call._replace(running_mean=mean, running_var=var))
    moved = [sample for sample, count in enumerate(call.counts) if count > 1]
    if not moved:
        return result
    with np.errstate(all="ignore"):  # What a dtype cannot hold is inf there.
        for values, mean_of_samples in zip((mean, var), means, strict=True):
            if len(moved) == len(x):
                values.mean(axis=0, out=mean_of_samples)
            else:  # without a further array
                mean_of_samples[...] = 0.0
                for sample in moved:
                    mean_of_samples += values[sample]
                np.divide(mean_of_samples, len(moved), out=mean_of_samples)
        running_mean[...], running_var[...] = means
    return result


def by_group(call: Forward) -> tuple[Array, Statistics, Statistics]:
    """Normalize groups of channels of each sample by their own statistics.

    Returns y and, for each sample and channel, mean and invstd of its group.
    """
    x, backend = call.x, backend_of(call.x)
    if not x.size:
        mean = np.zeros_like(x, np.float64, shape=x.shape[:2])
        return backend.empty_like(x) if call.out is None else call.out, mean, np.ones_like(mean)
    parameters = call.num_groups, call.weight, call.bias, call.eps
    return backend.group_forward(x, *parameters, call.out, mask=call.mask, epilogue=call.epilogue)


def by_running(call: Forward) -> Array:
    """Normalize by the running statistics."""
    assert call.running_mean is not None
    return backend_of(call.x).elemt(
        call.x,
        call.running_mean,
        None,
        call.weight,
        call.bias,
        call.out,
        var=call.running_var,
        eps=call.eps,
        mask=call.mask,
        epilogue=call.epilogue,
    )


def frozen(call: Forward) -> tuple[Array, Statistics, Statistics]:
    """Normalize by the running statistics, as constants; return what the backward needs, too."""
    assert call.running_mean is not None
    assert call.running_var is not None
    statistics = running_statistics(call.running_mean, call.running_var, call.eps)
    return by_running(call), *statistics


def running_statistics(
    running_mean: Array, running_var: Array, eps: float
) -> tuple[Statistics, Statistics]:
    """Mean and invstd, in float64, of running statistics."""
    with np.errstate(all="ignore"):  # A variance below -eps gives NaN, as in torch.
        invstd = 1.0 / np.sqrt(running_var.astype(np.float64) + eps)
    return running_mean.astype(np.float64), invstd


def backward(call: Backward) -> tuple[Array, Statistics, Statistics]:
    """The gradients of `by_batch` and `by_instance`: of input, weight and bias."""
    asked = call.gate
    call = _with_known_derivatives(call, computes=backend_of(call.x).gates(call.mask))
    gradients = _backward(call)
    if call.gate is None:
        hand_over(asked, call.dy)
    return gradients


def _backward(call: Backward) -> tuple[Array, Statistics, Statistics]:
    """`backward`, where the derivatives are known or the backend computes them."""
    dy, x, weight, mean, invstd, out, mask, batch_size, gate = call
    run = backend_of(x).backward
    if not batch_size:
        dx, sum_dy, sum_dy_xhat = run(dy, x, weight, mean, invstd, out, mask=mask, gate=gate)
        return dx, sum_dy_xhat, sum_dy
    # Before anything is written: memory for the sums over batches.
    totals = [np.empty_like(mean, shape=x.shape[1]) for _ in range(2)]
    if batch_size == 1 and mask is None and _is_flat(x, dy, out, *_arrays_of(gate)):
        flat = _flat_shape(x)
        target = None if out is None else out.reshape(flat)
        factor = None if weight is None else _tiled(weight, x)
        mean, invstd = _tiled(mean, x), _tiled(invstd, x)
        arrays = dy.reshape(flat), x.reshape(flat)
        dx, *sums = run(*arrays, factor, mean, invstd, target, gate=_flat_gate(gate, x))
        dx = dx.reshape(x.shape) if out is None else out
    else:
        dx, *sums = run(
            dy, x, weight, mean, invstd, out, mask=mask, batch_size=batch_size, gate=gate
        )
    with np.errstate(all="ignore"):  # Infinities of two batches may be of either sign.
        for of_batches, total in zip(sums, totals, strict=True):
            of_batches.reshape(batches_of(x, batch_size), x.shape[1]).sum(axis=0, out=total)
    return dx, totals[1], totals[0]


def group_backward(
    call: Backward, num_groups: int, weight: Array | None
) -> tuple[Array, Statistics, Statistics]:
    """The gradients of `by_group`; the weight of the call is the factor of dy."""
    asked, backend = call.gate, backend_of(call.x)
    if not call.x.size:
        zeros = np.zeros_like(call.mean, shape=call.x.shape[1])
        dx = backend.empty_like(call.x) if call.out is None else call.out
        return dx, zeros, zeros.copy()
    takes_gate = backend.group_gates(call.x, weight)
    call = _with_known_derivatives(call, computes=takes_gate and backend.gates(call.mask))
    if not takes_gate:
        call = through_activation(call)
    dy, x, factor, mean, invstd, out, mask, _, gate = call
    dx, dbias, dweight = backend.group_backward(
        dy, x, num_groups, weight, factor, mean, invstd, out, mask=mask, gate=gate
    )
    if gate is None:
        hand_over(asked, dy)
    return dx, dweight, dbias


def frozen_backward(call: Backward, scale: Statistics) -> tuple[Array, Statistics, Statistics]:
    """The gradients where the statistics are constants: ``dx = dy * scale``."""
    backend = backend_of(call.x)
    dy, x, _, mean, invstd, out, mask, _, _ = through_activation(call)
    dbias, dweight = backend.backward_reduce(dy, x, mean, invstd, mask)
    if out is None:
        out = backend.empty_like(x)
    with np.errstate(all="ignore"):  # What x's dtype cannot hold is inf there.
        converted = dy.astype(x.dtype, copy=False)
    dx = backend.elemt(converted, np.zeros_like(scale), scale, None, None, out, mask=mask)
    hand_over(call.gate, dy)
    return dx, dweight, dbias


# Activations in a backward of several calls of the backend: the first one writes dy times the
# derivatives to memory of its own, since a later one may fail.


def through_activation(call: Backward) -> Backward:
    """The call with dy times the derivatives, which are known, in place of dy."""
    if call.gate is None:
        return call
    backend = backend_of(call.x)
    memory = own_memory(backend, call.gate, call.x)
    dy = backend.activation_gradient(call.dy, call.x, call.gate, memory)
    return _with_derived(call, dy)


def _with_derived(call: Backward, dy: Array) -> Backward:
    """The call with dy times the derivatives, in memory of its own, in place of dy and gate."""
    gate, out = call.gate, call.out
    assert gate is not None
    if out is None and gate.derived is None:
        out = dy
    return call._replace(dy=dy, out=out, gate=None)


def _with_known_derivatives(call: Backward, *, computes: bool) -> Backward:
    """The call with derivatives that are known, if the backend does not compute them."""
    gate, backend = call.gate, backend_of(call.x)
    if gate is None or gate.is_known:
        return call
    if gate.residual is None and gate.derived is None and computes:
        return call
    dy = own_memory(backend, gate, call.x)
    for batch in _batches_of_call(call._replace(gate=gate._replace(derived=dy))):
        _recompute(batch)
    return _with_derived(call, dy)


def _batches_of_call(call: Backward) -> list[Backward]:
    """The calls on each batch."""
    size, gate = call.batch_size or max(len(call.x), 1), call.gate
    assert gate is not None
    batches = []
    for k in range(batches_of(call.x, call.batch_size)):
        part = slice(k * size, (k + 1) * size)
        residual, derived = (None if a is None else a[part] for a in (gate.residual, gate.derived))
        own = gate._replace(residual=residual, derived=derived)
        mean, invstd = (v[k] if v.ndim == 2 else v for v in (call.mean, call.invstd))
        mask = None if call.mask is None else call.mask[part]
        arguments = call.weight, mean, invstd, None, mask, 0, own
        batches.append(Backward(call.dy[part], call.x[part], *arguments))
    return batches


def _recompute(call: Backward) -> None:
    """Write dy times the derivatives, which another forward of a batch tells."""
    backend, gate = backend_of(call.x), call.gate
    assert gate is not None
    assert gate.derived is not None
    alive = backend.new_alive(call.x)
    options = gate.activation, gate.negative_slope
    epilogue = Epilogue(*options, gate.residual, alive)
    vectors = call.mean, call.invstd, gate.weight, gate.bias
    backend.elemt(call.x, *vectors, gate.derived, mask=call.mask, epilogue=epilogue)
    backend.activation_gradient(call.dy, call.x, gate._replace(alive=alive), gate.derived)


def invalid_positions(mask: Array | None) -> Array | None:
    """The positions that a mask leaves out, if there is one."""
    return None if mask is None else ~mask


def clear(array: Array, invalid: Array | None) -> Array:
    """The array, with zeros at invalid positions. It takes no memory, and so cannot fail."""
    if invalid is not None:
        np.copyto(array, array.dtype.type(0), where=invalid)
    return array


# Numbers of values.


def values_per_channel(x: Array, mask: Array | None = None) -> int:
    """The number of values of a channel, those at valid positions."""
    if mask is not None:
        return int(np.count_nonzero(mask))
    return math.prod(x.shape[:1] + x.shape[2:])


def values_of_batches(x: Array, mask: Array | None, batch_size: int) -> list[int]:
    """`values_per_channel` of each batch of so many samples; none where there are no channels."""
    if not x.shape[1]:
        return [0] * batches_of(x, batch_size)
    if not batch_size:
        return [values_per_channel(x, mask)]
    n = len(x)
    if mask is None:
        (full, remainder), positions = divmod(n, batch_size), math.prod(x.shape[2:])
        return [batch_size * positions] * full + [remainder * positions] * (remainder > 0)
    of_samples = np.count_nonzero(mask, axis=tuple(range(1, mask.ndim)))
    of_samples = backend_of(x).to_host(of_samples)
    if not n:
        return []
    return [int(count) for count in np.add.reduceat(of_samples, range(0, n, batch_size))]


# The backend's forward. A C-contiguous array of the shape (N, C, ...) is also one sample of N * C
# channels, of which the core walks many together where they are short.


def _forward(backend: Backend, call: Forward) -> tuple[Array, Statistics, Statistics]:
    return backend.forward(
        call.x,
        call.weight,
        call.bias,
        call.eps,
        call.out,
        call.running_mean,
        call.running_var,
        call.momentum,
        call.counter,
        unbiased=call.unbiased,
        mask=call.mask,
        batch_size=call.batch_size,
        counts=call.counts,
        epilogue=call.epilogue,
    )


def _forward_of_samples(call: Forward) -> tuple[Array, Statistics, Statistics]:
    """A backend's forward of each sample by itself."""
    x, out, backend = call.x, call.out, backend_of(call.x)
    residual = None if call.epilogue is None else call.epilogue.residual
    if call.mask is not None or not _is_flat(x, out, residual):
        y, mean, invstd = _forward(backend, call)
        if call.mask is not None and call.eps == 0.0:
            for sample, count in enumerate(call.counts):
                if count == 0:  # Sums over nothing, times infinity, would be NaN.
                    invstd[sample] = 0.0
        return y, mean, invstd
    flat = call._replace(
        x=x.reshape(_flat_shape(x)),
        out=None if out is None else out.reshape(_flat_shape(x)),
        weight=None if call.weight is None else _tiled(call.weight, x),
        bias=None if call.bias is None else _tiled(call.bias, x),
        running_mean=None if call.running_mean is None else call.running_mean.reshape(-1),
        running_var=None if call.running_var is None else call.running_var.reshape(-1),
        batch_size=0,
        counts=call.counts[:1],
        epilogue=_flat_epilogue(call.epilogue, x),
    )
    y, mean, invstd = _forward(backend, flat)
    y = y.reshape(x.shape) if out is None else out
    return y, mean.reshape(x.shape[:2]), invstd.reshape(x.shape[:2])


def _is_flat(*arrays: Array | None) -> bool:
    """Tell whether arrays of one shape, and not empty, can be seen as one sample."""
    return all(a is None or (a.flags.c_contiguous and len(a) > 0) for a in arrays)


def _flat_shape(x: Array) -> tuple[int, ...]:
    """The shape of x as one sample."""
    return (1, x.shape[0] * x.shape[1], *x.shape[2:])


def _flat_epilogue(epilogue: Epilogue | None, x: Array) -> Epilogue | None:
    """The epilogue for x as one sample."""
    if epilogue is None or epilogue.residual is None:
        return epilogue
    return epilogue._replace(residual=epilogue.residual.reshape(_flat_shape(x)))


def _flat_gate(gate: Gate | None, x: Array) -> Gate | None:
    """The gate for x as one sample."""
    if gate is None:
        return None
    weight, bias = (None if v is None else _tiled(v, x) for v in (gate.weight, gate.bias))
    y, derived = (None if a is None else a.reshape(_flat_shape(x)) for a in _arrays_of(gate))
    return gate._replace(weight=weight, bias=bias, y=y, derived=derived)


def _arrays_of(gate: Gate | None) -> tuple[Array | None, Array | None]:
    """The arrays of x's shape that a gate with known derivatives has."""
    return (None, None) if gate is None else (gate.y, gate.derived)


def _tiled(vector: Array, x: Array) -> Array:
    """One value per channel, or per sample and channel, for x as one sample."""
    return vector.reshape(-1) if vector.ndim == 2 else np.tile(vector, len(x))
