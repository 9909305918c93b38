"""Recalibration ("precise batch norm"): running statistics that are those of a whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastbn import _checks as checks
from fastbn import _normalize as normalize
from fastbn._types import Array, Statistics
from fastbn.backends import backend_for, backend_of
from fastbn.layers.base import Norm, recorders
from fastbn.layers.batchnorm import BatchNorm
from fastbn.layers.syncbatchnorm import SyncBatchNorm
from fastbn.moments import Moments

__all__ = ["recalibrate"]


@contextmanager
def recalibrate(*layers: BatchNorm) -> Iterator[None]:
    """Set the running statistics of layers to those of all that they see in a ``with`` block.

    Running statistics are a moving average over the last batches, of weights that have changed
    since, and the average of variances within batches misses the variance between them. Inside the
    block the forwards of the layers in training mode leave the running statistics alone and add up
    the exact mean and variance of all their input (`Moments`). At its end the running statistics
    become these, with the unbiased variance (that of the population for a layer with
    ``unbiased=False``), and num_batches_tracked the number of batches. If an exception ends the
    block, they stay as they were. Layers that have their running statistics in common, such as
    ``copy.copy`` makes them, are recalibrated together, by all that any of them sees, whichever of
    them is passed. At the end of the block nothing is saved for a backward any more.

    The block has the user's own loop: forwards over the training set, or a good part of it, in
    batches of the size of the training, and no updates of the weights. Each forward reads its input
    once more than usual.

    Parameters
    ----------
    *layers : BatchNorm1d, BatchNorm2d, BatchNorm3d, lazy or SyncBatchNorm
        In training mode during the block, and not frozen.

    Raises
    ------
    TypeError
        If one of them is not such a layer.
    ValueError
        If there are none.
    RuntimeError
        If a layer has no running statistics, is frozen, or is being recalibrated; or, at the end,
        if one has seen no batch in training mode. Nothing has been changed then.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm1d(1, dtype=np.float64)
    >>> data = np.array([[1.0], [2.0], [3.0], [6.0]])
    >>> with fastbn.recalibrate(bn):
    ...     for batch in np.split(data, 2):
    ...         y = bn(batch)
    >>> bn.running_mean, bn.running_var, data.var(ddof=1)
    (array([3.]), array([4.66666667]), np.float64(4.666666666666667))
    """
    started = _recorders_of(_checked(layers))
    for recorder in started:
        recorder.start()
    try:
        yield
    finally:
        for recorder in started:
            recorder.stop()
    for recorder in started:
        recorder.check()
    for recorder in started:
        recorder.write()


def _checked(layers: tuple[Any, ...]) -> tuple[BatchNorm, ...]:
    """The layers, each once, if all of them can be recalibrated."""
    if not layers:
        raise ValueError("recalibrate() needs at least one layer")
    for layer in layers:
        if not isinstance(layer, BatchNorm):
            hint = ": recalibrate(*layers)" if isinstance(layer, Iterable) else ""
            raise TypeError(
                f"recalibrate() takes batch normalization layers, got {type(layer).__name__}{hint}"
            )
        if not layer.track_running_stats:
            raise RuntimeError(
                f"recalibrate() needs running statistics, {layer!r} tracks none: "
                f"make it with track_running_stats=True"
            )
        if layer.frozen:
            raise RuntimeError(
                f"recalibrate() needs the statistics of batches, {layer!r} is frozen: "
                f"unfreeze() it first"
            )
        if layer._recorder is not None:
            raise RuntimeError(f"{layer!r} is being recalibrated already")
    return tuple(dict.fromkeys(layers))


def _recorders_of(layers: tuple[BatchNorm, ...]) -> list[_Recorder]:
    """A recorder for each array of running means, and for each lazy layer."""
    of_keys: dict[int, _Recorder] = {}
    for layer in layers:
        of_keys.setdefault(_key_of(layer), _Recorder(layer))
    return list(of_keys.values())


def _key_of(layer: BatchNorm) -> int:
    """What tells which layers are recorded together."""
    return id(layer if layer.has_uninitialized_params() else layer.running_mean)


class _Recorder:
    """Adds up what layers with common running statistics see, in place of these."""

    def __init__(self, layer: BatchNorm) -> None:
        self.layer = layer
        self.seen: dict[int, Norm] = {}  # the layers that have made a forward
        self.keys: list[int] = []
        self.total = Moments()
        self.batches = 0

    def start(self) -> None:
        self.listen_to(_key_of(self.layer))

    def listen_to(self, key: int) -> None:
        if key not in self.keys:
            self.keys.append(key)
            recorders[key] = self

    def stop(self) -> None:
        for key in self.keys:
            del recorders[key]
        for layer in self.seen.values():
            layer.release()

    def record(self, layer: Norm, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        """A layer's own forward, with its running statistics left alone."""
        self.listen_to(id(layer.running_mean))  # It was lazy, and may have twins from now on.
        self.seen[id(layer)] = layer
        x, mask = call.x, call.mask
        # Before `out` may take the place of x.
        count, sums = normalize.values_per_channel(x, mask), backend_of(x).stats(x, mask)
        result = layer._forward_train(call)
        batch = layer._total if isinstance(layer, SyncBatchNorm) else Moments(count, *sums)
        self.total += batch
        self.batches += normalize.batches_of(x, call.batch_size) if batch.count else 0
        return result

    def check(self) -> None:
        """Refuse to go on if the running statistics cannot be written."""
        layer = self.layer
        if not self.batches:
            raise RuntimeError(
                f"{layer!r} has seen no batch in training mode; its forward must run inside "
                f"the block, after train()"
            )
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            checks.check_ndarray(getattr(layer, name), name, writeable=True)

    def write(self) -> None:
        """Set the running statistics."""
        values = {
            "running_mean": self.total.mean,
            "running_var": self.total.var(correction=int(self.layer.unbiased)),
            "num_batches_tracked": np.array(self.batches),
        }
        asarray = backend_for(self.layer._device).asarray
        for name, value in values.items():
            array = getattr(self.layer, name)
            with np.errstate(all="ignore"):  # What the layer's dtype cannot hold is inf there.
                array[...] = asarray(value, array.dtype, self.layer._device)
