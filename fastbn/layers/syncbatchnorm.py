"""Batch normalization of a batch that is spread over the ranks of an MPI communicator.

It composes from the primitives: each rank sums up its part, the ranks add up what they have
(`_mpi`), and each normalizes its part by the total.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np

from fastbn import _checks as checks
from fastbn import _normalize as normalize
from fastbn import _scalars as scalars
from fastbn._mpi import Ranks, as_communicator
from fastbn._types import Array, ArrayLike, DTypeLike, Statistics
from fastbn.backends import backend_for, backend_of
from fastbn.backends.common import factors_of
from fastbn.backends.composed import hand_over
from fastbn.layers.base import Norm
from fastbn.layers.batchnorm import BatchNorm
from fastbn.layers.saved import KeptChannels, SavedForBackward, keep_all
from fastbn.moments import Moments

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


class SyncBatchNorm(BatchNorm):
    """Batch normalization by the statistics of all ranks of an MPI communicator.

    Each rank has a part of the batch, of any length, none included; output, running statistics and
    gradients of the input are those that `BatchNorm2d` would give for all of it in one process. A
    forward and a backward in training mode are collective: all ranks make them, in the same order.
    Each is one all-reduce of 2 C + 4 float64, and one more where no position is valid on any rank.
    The results have the same bits in every run with so many ranks.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As `BatchNorm2d` takes them.
    bias, unbiased, activation, negative_slope
        As `BatchNorm2d` takes them.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks, ``MPI.COMM_WORLD`` by default.

    Attributes
    ----------
    weight_grad, bias_grad : ndarray of shape (C,) or None
        Those of this rank's part of the batch, as of any other layer: add them up over the ranks.
    weight, bias, running_mean, running_var, num_batches_tracked, training, frozen
        As those of `BatchNorm2d`. They stay alike on all ranks if they are so at first.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of a wrong kind.
    ImportError
        If there is no mpi4py, or no MPI library: ``pip install 'fastbn[mpi]' mpich``.

    Notes
    -----
    Input has 2 to 5 axes, the same number and dtype on all ranks. A mask may leave nothing on some
    ranks, but not on all. Where a call fails on one rank, it fails on all of them, changes nothing
    on any, and the others' RuntimeError names that rank. The exception is a want of memory after
    the all-reduce, for copies of masks and of arrays that are neither C-contiguous nor
    channels-last: it changes nothing on its own rank, while the others are done.

    In place, a training forward keeps a copy of its input. A layer can be pickled if its
    communicator is ``MPI.COMM_WORLD``.

    Examples
    --------
    To be run by ``mpiexec -n 2 python``, say:

    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.SyncBatchNorm(2)  # doctest: +SKIP
    >>> part = np.full((3, 2), bn.comm.rank, np.float32)  # doctest: +SKIP
    >>> y = bn(part)  # close to -1 on rank 0, to 1 on rank 1  # doctest: +SKIP
    >>> bn.running_mean  # doctest: +SKIP
    array([0.05, 0.05], dtype=float32)
    """

    _ranks = _batch_ranks = (2, 3, 4, 5)
    _computes_gates = False
    _group: Ranks | None
    _total: Moments  # of the last forward in training

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        unbiased: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        comm: Any = None,
    ) -> None:
        super().__init__(
            num_features,
            *(eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            unbiased=unbiased,
            activation=activation,
            negative_slope=negative_slope,
        )
        self.comm = as_communicator(comm)
        self._group = None

    # In training, what the core does is one part of what the ranks do.
    _quick_train = Norm._quick_train

    def _quick_backward(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[Array, Array | None] | None:
        return super()._quick_backward(saved, dy, out, residual_out) if saved.frozen else None

    def forward(
        self,
        input: ArrayLike,
        *,
        out: Array | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Normalize this rank's part of a batch; see `BatchNorm2d.forward`.

        Collective in training mode, unless frozen.
        """
        if not self.training or self.frozen:
            return super().forward(input, out=out, mask=mask, residual=residual)
        forward = super().forward
        return self._all_ranks().together(
            lambda: forward(input, out=out, mask=mask, residual=residual)
        )

    def backward(
        self, dy: ArrayLike, *, out: Array | None = None, residual_out: Array | None = None
    ) -> Array | Any:
        """Return the gradient of the last forward's input; see `BatchNorm2d.backward`.

        Collective, unless frozen. The gradients of weight and bias are those of this rank's part.
        """
        if isinstance(self._saved, SavedForBackward) and self._saved.frozen:
            return super().backward(dy, out=out, residual_out=residual_out)
        backward = super().backward
        return self._ranks_of_forward().together(
            lambda: backward(dy, out=out, residual_out=residual_out)
        )

    def _all_ranks(self) -> Ranks:
        """The ranks of the communicator, which meet at their first collective call."""
        if self._group is None or self._group.comm is not self.comm:
            self._group = Ranks(self.comm, self.num_features)
        return self._group

    def _ranks_of_forward(self) -> Ranks:
        """The ranks that have made the last forward in training mode."""
        return self._all_ranks() if self._group is None else self._group

    def _keep_input(self, call: normalize.Forward) -> KeptChannels | None:
        # The other layers recover the input from the output, channel by channel. Here its copy
        # keeps the backward to one reduction.
        return super()._keep_input(call) if self.frozen else keep_all(call.x)

    def _training_call(
        self,
        x: Array,
        out: Array | None,
        mask: ArrayLike | None,
        residual: ArrayLike | None,
    ) -> normalize.Forward:
        """The checked arguments; how many values there are, the other ranks decide."""
        if not self.training:
            return super()._training_call(x, out, mask, residual)
        if self.ghost_batch_size is not None:
            raise ValueError(
                f"a SyncBatchNorm normalizes the batch of all ranks together: ghost_batch_size "
                f"must stay None, got {self.ghost_batch_size!r}"
            )
        running_mean, running_var, counter = self._moving_statistics()
        running, moves = (running_mean, running_var), running_mean is not None
        arrays = self.weight, self.bias, self.eps, out, mask, *running
        epilogue = self._epilogue(residual)
        call = checks.forward_call(x, *arrays, moves=moves, epilogue=epilogue)
        if counter is not None:
            checks.check_counter(counter)
        momentum = self.momentum
        if momentum is not None:
            momentum = scalars.as_real(momentum, "momentum")
        # Memory for the result is taken before the other ranks count on this one.
        out = backend_of(x).empty_like(x) if call.out is None else call.out
        unbiased = scalars.as_bool(self.unbiased, "unbiased")
        return call._replace(momentum=momentum, counter=counter, unbiased=unbiased, out=out)

    def _forward_train(self, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        x, mask = call.x, call.mask
        own = Moments(normalize.values_per_channel(x, mask), *backend_of(x).stats(x, mask))
        total = self._all_ranks().total_moments(x, own)
        if total.count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape} "
                f"and nothing on the other ranks; evaluation mode takes single values"
            )
        if not total.count and self._all_ranks().anywhere(x.size > 0):
            raise ValueError(
                f"masks leave no value per channel on any rank, expected at least 2 in all when "
                f"training, got input size {x.shape} on this one"
            )
        with np.errstate(all="ignore"):
            invstd = 1.0 / np.sqrt(total.m2 / max(total.count, 1) + call.eps)
        mean, invstd = self._beside(x, total.mean), self._beside(x, invstd)
        moved = self._moved(call, total) if total.count and x.shape[1] else []
        vectors = mean, invstd, call.weight, call.bias
        y = backend_of(x).elemt(x, *vectors, call.out, mask=mask, epilogue=call.epilogue)
        for array, value in moved:  # not before: they may share memory with weight and bias
            with np.errstate(all="ignore"):  # What its dtype cannot hold is inf there.
                array[...] = value
        self._total = total
        return y, mean, invstd

    def _moved(self, call: normalize.Forward, total: Moments) -> list[tuple[Array, Any]]:
        """Running statistics and counter, and what they become with this batch."""
        counter = call.counter
        moved = [] if counter is None else [(counter, counter + 1)]
        [factor] = factors_of(call.momentum, counter, 1)
        pairs = (
            (call.running_mean, total.mean),
            (call.running_var, total.var(correction=int(call.unbiased))),
        )
        for running, batch in pairs:
            if running is not None:
                with np.errstate(all="ignore"):
                    kept = (1.0 - factor) * running.astype(np.float64)
                    moved.append((running, kept + factor * self._beside(running, batch)))
        return moved

    def _backward(
        self,
        saved: SavedForBackward,
        dy: ArrayLike,
        out: Array | None,
        residual_out: Array | None,
    ) -> tuple[Array, Array | None]:
        if saved.frozen:
            return super()._backward(saved, dy, out, residual_out)
        dy, parameters, out, gate, buffers = self._backward_arguments(saved, dy, out, residual_out)
        x = saved.x if saved.kept is None else saved.kept
        weight, backend = parameters["weight"], backend_of(x)
        mean, invstd, mask = saved.mean, saved.invstd, saved.mask
        invalid = normalize.invalid_positions(mask)
        call = normalize.Backward(dy, x, weight, mean, invstd, out, mask, gate=gate)
        call = normalize.through_activation(call)
        dy, out = call.dy, backend.empty_like(x) if call.out is None else call.out
        dbias, dweight = backend.backward_reduce(dy, x, mean, invstd, mask)
        own = backend.to_host(dbias), backend.to_host(dweight)
        sum_dy, sum_dy_xhat = map(
            self._beside, (x, x), self._ranks_of_forward().total_sums(x, *own)
        )
        count = max(self._total.count, 1)
        dx = backend.backward_elemt(
            dy, x, mean, invstd, weight, sum_dy, sum_dy_xhat, count, out, mask
        )
        self._add_gradients(buffers, dweight, dbias)
        if gate is None or gate.derived is None:
            return dx, None
        hand_over(gate, dy)
        return dx, normalize.clear(gate.derived, invalid)

    def _beside(self, x: Array, vector: Statistics) -> Array:
        """A vector from the host as an array of the kind that x is."""
        if isinstance(x, np.ndarray):
            return vector
        return backend_for(self._device).asarray(vector, vector.dtype, self._device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy all but the communicator: the copy has the same ranks."""
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.comm): self.comm}
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def convert_sync_batchnorm(layer: BatchNorm, comm: Any = None) -> SyncBatchNorm:
    """Return a `SyncBatchNorm` with the arrays, the arguments and the mode of a layer.

    Parameters
    ----------
    layer : BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm
        It is not changed, but the two share their parameters, gradients and buffers.
    comm : mpi4py.MPI.Intracomm, optional
        The ranks, ``MPI.COMM_WORLD`` by default.

    Returns
    -------
    SyncBatchNorm

    Raises
    ------
    TypeError
        If it is not a batch normalization layer, or comm is no communicator.
    ValueError
        If it has ghost batches.
    RuntimeError
        If it is lazy and has not seen its first input.
    ImportError
        If there is no mpi4py, or no MPI library.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNorm2d(3)
    >>> sync = fastbn.convert_sync_batchnorm(bn)  # doctest: +SKIP
    >>> sync.weight is bn.weight  # doctest: +SKIP
    True
    """
    if not isinstance(layer, BatchNorm):
        raise TypeError(
            f"layer must be one of fastbn's batch normalizations, got "
            f"{scalars.full_name(type(layer))}"
        )
    if layer.ghost_batch_size is not None:
        raise ValueError("a layer with ghost batches normalizes less than its batch, not more")
    if layer.has_uninitialized_params():
        raise RuntimeError(
            f"{type(layer).__name__} cannot be converted yet: the first input, or "
            f"load_state_dict(), decides num_features"
        )
    sync = SyncBatchNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        layer._device,
        layer._dtype,
        bias=layer._has_bias,
        unbiased=layer.unbiased,
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        comm=comm,
    )
    shared = (*layer._state_names, "weight_grad", "bias_grad", "training", "frozen")
    for name in shared:
        setattr(sync, name, getattr(layer, name))
    return sync
