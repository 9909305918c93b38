"""One batch or several in a call: which of them a launch takes, and the running statistics."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import cupy
import numpy as np

from fastbn.backends.common import batches_of
from fastbn.backends.cuda.arrays import Array, apart
from fastbn.backends.cuda.plan import Geometry, follower, geometry

# As many batches as a grid can have side by side.
BATCHES_MAX = 65535


class BatchRange(NamedTuple):
    """Batches of one size, which a launch takes side by side; or the only batch of a call."""

    geometry: Geometry  # of one of them
    samples: slice | None = None  # None for the only batch
    batches: slice | None = None

    @property
    def number(self) -> int:
        """How many they are, as a launch is told: 0 for the only batch of a call."""
        return 0 if self.batches is None else self.batches.stop - self.batches.start

    def samples_of(self, array: Array | None) -> Array | None:
        """The samples of these batches, of an array or a mask."""
        return array if self.samples is None or array is None else array[self.samples]

    def entries_of(self, array: Array | None) -> Array | None:
        """The entries of these batches, of an array that has one for each batch."""
        return array if self.batches is None or array is None else array[self.batches]

    def vectors_of(self, array: Array | None) -> Array | None:
        """The same, of an array that may also be one vector for all batches."""
        return self.entries_of(array) if array is not None and array.ndim == 2 else array


def ranges_of(x: Array, mask: Array | None, batch_size: int) -> list[BatchRange]:
    """The batches of an array that is packed: whole ones, and the rest; none if it is empty."""
    if not x.size:
        return []
    if not batch_size:
        return [BatchRange(geometry(x, mask))]
    n, ranges = len(x), []
    whole = n // batch_size
    cuts = [*range(0, whole, BATCHES_MAX), whole]
    for first, last in itertools.pairwise(cuts):
        samples = slice(first * batch_size, last * batch_size)
        of_one = geometry(x[samples.start : samples.start + batch_size], mask, in_batches=True)
        ranges.append(BatchRange(of_one, samples, slice(first, last)))
    if n % batch_size:
        samples = slice(whole * batch_size, n)
        rest = geometry(x[samples], mask, in_batches=True)
        ranges.append(BatchRange(rest, samples, slice(whole, whole + 1)))
    return ranges


def valid_counts(valid: Array | None, batch_size: int) -> Array | None:
    """How many positions of each batch are valid, where the kernels read it: nobody waits for it.

    The array has the shape () without a batch size, else (batches,).
    """
    if valid is None or not valid.size:
        return None
    if not batch_size:
        return valid.sum(dtype=np.float64)
    of_samples = valid.reshape(len(valid), -1).sum(axis=1, dtype=np.float64)
    whole = len(valid) // batch_size
    in_whole = whole * batch_size
    counts = cupy.ndarray((batches_of(valid, batch_size),), np.float64)
    counts[:whole] = of_samples[:in_whole].reshape(whole, batch_size).sum(axis=1)
    if in_whole < len(valid):
        counts[whole] = of_samples[in_whole:].sum()
    return counts


class Running(NamedTuple):
    """The running statistics that a forward moves, how fast, and its counter of batches."""

    mean: Array | None
    var: Array | None
    momentum: float | None
    counter: Array | None
    unbiased: bool

    @property
    def cumulative(self) -> bool:
        """Whether they are the mean of all batches that have been counted."""
        return self.momentum is None and self.counter is not None

    @property
    def counted_in_launch(self) -> bool:
        """Whether the launch that moves them can count its batch.

        It cannot where other channels may still read the counter, nor in any dtype.
        """
        return self.counter is not None and not self.cumulative and self.counter.dtype.char == "l"

    def arguments(self, *, count: bool) -> dict[str, Any]:
        """What a launch that moves them is told, and whether it counts its batch if it can."""
        counter = self.counter if count and self.counted_in_launch else None
        if self.cumulative:
            counter = self.counter.astype(np.int64, copy=False)  # type: ignore[union-attr]
        return {
            "running_mean": self.mean,
            "running_var": self.var,
            "counter": counter,
            "cumulative": self.cumulative,
            "momentum": self.momentum or 0.0,
            "correction": float(self.unbiased),
        }

    def apart(self, parameter: Array | None) -> Array | None:
        """A parameter that launches may read while they move the running statistics."""
        return parameter if self.mean is None else apart(parameter, self.mean, self.var)

    def follow(
        self,
        ranges: list[BatchRange],
        x: Array,
        mean: Array,
        m2: Array,
        valid: Array | None,
        valid_count: Array | None,
    ) -> None:
        """Move them towards the statistics of one batch after the other.

        Not before all batches are normalized: they may share memory with weight and bias.
        """
        if self.mean is None:
            return
        first, last = ranges[0].geometry, ranges[-1].geometry
        follower(first)(
            x=x,
            batch_count=len(mean),
            mean_out=mean,
            m2_out=m2,
            count=first.per_channel,
            last_count=last.per_channel,
            valid=valid,
            valid_count=valid_count,
            **self.arguments(count=False),
        )

    def increase_counter(self, batches: int, valid_count: Array | None = None) -> None:
        """Count batches; those that a mask leaves less than two values are not counted."""
        counter = self.counter
        if counter is None:
            return
        if valid_count is None:
            counter += batches
        else:
            counter += (valid_count > 1).sum(dtype=counter.dtype)
