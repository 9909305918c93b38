"""Recalibration ("precise batch norm"): running statistics that are those of a whole data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np

from fastbn import _checks as checks
from fastbn import _normalize as normalize
from fastbn._types import Array, Statistics
from fastbn.backends import backend_for, backend_of
from fastbn.backends.common import batches_of
from fastbn.layers import recording
from fastbn.layers.base import Norm
from fastbn.layers.batchnorm import BatchNorm
from fastbn.layers.instancenorm import InstanceNorm
from fastbn.layers.recording import COUNTER, STATISTICS, Twins
from fastbn.layers.syncbatchnorm import SyncBatchNorm
from fastbn.moments import Moments

__all__ = ["recalibrate"]


@contextmanager
def recalibrate(*layers: BatchNorm | InstanceNorm) -> Iterator[None]:
    """Set the running statistics of layers to those of all that they see in a ``with`` block.

    Running statistics are a moving average over the last batches, of weights that have changed
    since, and the average of variances within batches misses the variance between them. Inside the
    block the forwards of the layers in training mode leave the running statistics alone and add up
    the exact mean and variance of all their input (`Moments`). At its end the running statistics
    become these, with the unbiased variance (that of the population for a layer with
    ``unbiased=False``), and num_batches_tracked the number of batches. If an exception ends the
    block, they stay as they were. A forward while ``track_running_stats`` is False adds nothing.

    Layers that have their running statistics in common, the same arrays as after ``copy.copy`` or
    views of the same memory, are recalibrated together, by all that any of them sees, whichever of
    them is passed. Counters of their own are all set. Those of an instance normalization become the
    means, over all samples, of mean and unbiased variance; it does not count batches. At the end of
    the block, or after an exception, none of the layers that were passed or recorded has anything
    saved for a backward any more.

    The block has the user's own loop: forwards over the training set, or a good part of it, in
    batches of the size of the training, and no updates of the weights. Each forward reads its input
    once more than usual.

    Parameters
    ----------
    *layers : BatchNorm1d, BatchNorm2d, BatchNorm3d, InstanceNorm1d to 3d, lazy or SyncBatchNorm
        In training mode, and not frozen. After ``eval()`` inside the block their forwards add
        nothing, until ``train()``.

    Raises
    ------
    TypeError
        If one of them is not such a layer.
    ValueError
        If there are none.
    RuntimeError
        If a layer has no running statistics, is frozen, is in evaluation mode, or is being
        recalibrated, or has a part of them in common with another layer, one that is passed or
        makes a forward in the block; or, at the end, if one has seen no batch in training mode.
        Nothing has been changed then.

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
        for recorder in started:
            recorder.check()
    finally:
        for recorder in started:
            recorder.stop()
    for recorder in started:
        recorder.write()


def _checked(layers: tuple[Any, ...]) -> dict[BatchNorm | InstanceNorm, str]:
    """The layers, each once, and what they are called, if all of them can be recalibrated."""
    if not layers:
        raise ValueError("recalibrate() needs at least one layer")
    names: dict[Any, str] = {}
    for i, layer in enumerate(layers):
        if not isinstance(layer, BatchNorm | InstanceNorm):
            hint = ": recalibrate(*layers)" if isinstance(layer, Iterable) else ""
            if checks.is_array(layer):
                hint = ": call the layers with it in the block"
            raise TypeError(
                f"recalibrate() takes batch normalization layers, and instance normalization "
                f"layers with running statistics, got {type(layer).__name__}{hint}"
            )
        name = f"{layer!r}" if len(layers) == 1 else f"{layer!r}, argument {i} of {len(layers)},"
        if not layer.track_running_stats:
            raise RuntimeError(
                f"recalibrate() needs running statistics, {name} tracks none: "
                f"make it with track_running_stats=True"
            )
        if layer.frozen:
            raise RuntimeError(
                f"recalibrate() needs the statistics of batches, {name} is frozen: "
                f"unfreeze() it first"
            )
        if not layer.training:
            raise RuntimeError(
                f"recalibrate() needs forwards in training mode, {name} is in evaluation mode: "
                f"train() it first"
            )
        if layer._recorder is not None:
            raise RuntimeError(f"{name} is being recalibrated already")
        names.setdefault(layer, name)
    return names


def _recorders_of(names: dict[BatchNorm | InstanceNorm, str]) -> list[_Recorder]:
    """A recorder for all layers that have their running statistics in common."""
    twins, of_layers = Twins(), dict[Any, _Recorder]()
    for layer, name in names.items():
        twin = twins.of(layer)
        if twin is None:
            kind = _InstanceRecorder if isinstance(layer, InstanceNorm) else _Recorder
            of_layers[layer] = kind(name)
        else:
            of_layers[layer] = of_layers[twin]
        of_layers[layer].layers.append(layer)
        twins.add(layer)
    return list(dict.fromkeys(of_layers.values()))


class _Recorder:
    """Adds up what layers with common running statistics see, in place of these."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the first layer
        self.layers: list[Norm] = []  # those that have been passed
        self.seen: WeakSet[Norm] = WeakSet()  # those that have made a forward, twins among them
        self.written: list[Norm] = []
        self.total = Moments()
        self.batches = 0

    def start(self) -> None:
        for layer in self.layers:
            recording.recorders[layer] = self

    def stop(self) -> None:
        for layer in self.layers:
            recording.stop(layer)
        for layer in (*self.layers, *self.seen):
            layer.release()

    def record(self, layer: Norm, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        """A layer's own forward, with its running statistics left alone."""
        self.seen.add(layer)
        return self.add(layer, call)

    def add(self, layer: Norm, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        """A layer's own forward, whose statistics are added."""
        x, mask = call.x, call.mask
        # Before `out` may take the place of x.
        count, sums = normalize.values_per_channel(x, mask), backend_of(x).stats(x, mask)
        result = layer._forward_train(call)
        batch = layer._total if isinstance(layer, SyncBatchNorm) else Moments(count, *sums)
        self.total += batch
        if batch.count and x.shape[1]:
            self.batches += batches_of(x, call.batch_size)
        return result

    def check(self) -> None:
        """Refuse to go on if the running statistics cannot be written."""
        first = self.layers[0]
        if not self.batches and (first.num_features or first.has_uninitialized_params()):
            raise RuntimeError(
                f"{self.name} has seen no batch in training mode; its forward must run inside "
                f"the block, after train()"
            )
        # Those of twins, too: each may have a counter of its own.
        twins = [twin for twin in self.seen if recording.recorder_of(twin) is self]
        self.written = list(dict.fromkeys([*self.layers, *twins]))
        for layer in self.written:
            for name in STATISTICS:
                check_statistics(getattr(layer, name), name, layer.num_features)
            self.check_counter(layer)
            checks.check_running_apart(layer.running_mean, layer.running_var)
            twin = recording.twin_of(layer)
            if twin is not None and recording.recorders[twin] is not self:
                raise RuntimeError(
                    f"{layer!r} has been given the running statistics of {twin!r} while both were "
                    f"recalibrated: do that before the block"
                )

    def check_counter(self, layer: Norm) -> None:
        """Refuse a counter that cannot count the batches."""
        counter = getattr(layer, COUNTER)
        checks.check_ndarray(counter, COUNTER, writeable=True)
        # It is set to their number, whatever it has been.
        if not checks.is_counter(counter) or self.batches > np.iinfo(counter.dtype).max:
            raise ValueError(
                f"{COUNTER} must be an integer array of shape () whose dtype has {self.batches}, "
                f"got {counter!r}"
            )

    def results(self) -> dict[str, Any]:
        """What the running statistics become."""
        return {
            "running_mean": self.total.mean,
            "running_var": self.total.var(correction=int(self.layers[0].unbiased)),
            COUNTER: np.array(self.batches),
        }

    def write(self) -> None:
        """Set the running statistics."""
        if not self.layers[0].num_features:
            return
        results = self.results()
        for layer in self.written:
            asarray = backend_for(layer._device).asarray
            for name, value in results.items():
                array = getattr(layer, name)
                with np.errstate(all="ignore"):  # What the layer's dtype cannot hold is inf there.
                    array[...] = asarray(value, array.dtype, layer._device)


class _InstanceRecorder(_Recorder):
    """Averages mean and variance over the samples that instance normalizations see."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.variances = Moments()  # the moments, over samples, of their variances

    def add(self, layer: Norm, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        x = call.x
        # With a momentum of 1 they become the means over the samples of the batch.
        mean, var = (np.zeros_like(x, np.float64, shape=x.shape[1]) for _ in range(2))
        averages = call._replace(running_mean=mean, running_var=var, momentum=1.0)
        result = layer._forward_train(averages)
        samples = sum(count > 1 for count in call.counts) if x.size else 0
        if samples:
            self.total += _equal(samples, backend_of(x).to_host(mean))
            self.variances += _equal(samples, backend_of(x).to_host(var))
            self.batches += 1
        return result

    def check_counter(self, layer: Norm) -> None:
        """It is left alone, as by a forward."""

    def results(self) -> dict[str, Any]:
        return {"running_mean": self.total.mean, "running_var": self.variances.mean}


def check_statistics(array: Any, name: str, num_features: int) -> None:
    """Refuse what cannot take running statistics."""
    checks.check_ndarray(array, name, writeable=True)
    if not checks.is_float(array.dtype):
        raise TypeError(f"{name} must be of a floating dtype, got {array.dtype}")
    if array.shape != (num_features,):
        raise ValueError(
            f"{name} must have the shape ({num_features},), one value per channel, "
            f"got {array.shape}"
        )


def _equal(count: int, values: Statistics) -> Moments:
    """The moments of so many values that are all the same, of each channel."""
    return Moments(count, values, np.zeros_like(values))
