"""What sees the training forwards of layers while they are recalibrated.

Layers that have their running statistics in common are recorded together, whichever of them is
passed: layers that share arrays, as `copy.copy` makes them, or have views of the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from fastbn import _checks as checks
from fastbn import _normalize as normalize
from fastbn._overlap import same_elements
from fastbn._types import Array, Statistics
from fastbn.backends import backend_of

if TYPE_CHECKING:
    from fastbn.layers.base import Norm

# What recalibration writes. Twins may have counters of their own.
STATISTICS = "running_mean", "running_var"
COUNTER = "num_batches_tracked"


class Recorder(Protocol):
    """What sees the training forwards of layers in place of their running statistics."""

    def record(self, layer: Norm, call: normalize.Forward) -> tuple[Array, Statistics, Statistics]:
        """Do the forward of a layer, whose running statistics are left alone."""


class Twins:
    """Layers, by the memory of their running statistics."""

    def __init__(self, layers: Iterable[Norm] = ()) -> None:
        # The arrays are held: while a layer is known by their memory, no other array may get it.
        self._arrays: dict[Norm, tuple[Any, ...]] = {}
        self._owners: dict[int, tuple[Norm, str]] = {}
        for layer in layers:
            self.add(layer)

    def add(self, layer: Norm) -> None:
        self._arrays[layer] = arrays = _arrays_of(layer)
        for name, array in _named(arrays).items():
            self._owners.setdefault(_place(array), (layer, name))

    def are(self, layers: tuple[Norm, ...]) -> bool:
        """Tell whether these are all layers, and none of their arrays has been replaced."""
        return tuple(self._arrays) == layers and all(
            mine is now
            for layer, arrays in self._arrays.items()
            for mine, now in zip(arrays, _arrays_of(layer), strict=True)
        )

    def of(self, layer: Norm) -> Norm | None:
        """The first layer with which one has its running statistics in common, if there is one.

        Layers that have a part of them in common are refused. One without channels, or that does
        not know them yet, has nothing in common.
        """
        if not layer.num_features:
            return None
        owners = {
            name: self._owners[place]
            for name, array in _named(_arrays_of(layer)).items()
            for place in [_place(array)]
            if place in self._owners
        }
        if not owners:
            return None
        other = next(iter(owners.values()))[0]
        shared = {name: owner for name, owner in owners.items() if name != COUNTER}
        is_twin = shared == {name: (other, name) for name in STATISTICS} and all(
            _is_same(getattr(layer, name), getattr(other, name)) for name in STATISTICS
        )
        if not is_twin or owners.get(COUNTER, (other, COUNTER))[1] != COUNTER:
            raise RuntimeError(
                f"layers have both running statistics in common, or nothing, if one of them is "
                f"recalibrated: {layer!r} has only {' and '.join(owners)} in common with "
                f"{other!r}; give it arrays of its own, by copy()"
            )
        if layer._family != other._family:
            raise RuntimeError(
                f"{layer!r} has its running statistics in common with {other!r}, which computes "
                f"them in another way: give it arrays of its own, by copy()"
            )
        return other


def _arrays_of(layer: Norm) -> tuple[Any, ...]:
    """The running statistics and the counter; a lazy layer has none yet."""
    return tuple(getattr(layer, name, None) for name in (*STATISTICS, COUNTER))


def _named(values: tuple[Any, ...]) -> dict[str, Array]:
    """Those that are arrays, and have memory."""
    pairs = zip((*STATISTICS, COUNTER), values, strict=True)
    return {name: value for name, value in pairs if checks.is_array(value) and value.size}


def _place(array: Array) -> int:
    """The address of an array, which no array of another device has."""
    address: int = backend_of(array).addresses(array).__array_interface__["data"][0]
    return address


def _is_same(mine: Array, theirs: Array) -> bool:
    """Tell whether two arrays are views of the same elements."""
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype and same_elements(mine, theirs)


# What records the layers that are recalibrated. Threads may do that at the same time: this dict is
# what they agree on, and the twins are found by its keys alone.
recorders: dict[Norm, Recorder] = {}
_twins = Twins()


def stop(layer: Norm) -> None:
    """Let a layer track its running statistics again."""
    global _twins
    del recorders[layer]
    _twins = Twins()


def twin_of(layer: Norm) -> Norm | None:
    """The first of the recorded layers that has its running statistics in common with a layer."""
    global _twins
    twins, layers = _twins, tuple(recorders)
    if not twins.are(layers):
        _twins = twins = Twins(layers)
    return twins.of(layer)


def recorder_of(layer: Norm) -> Recorder | None:
    """What records a layer, or another one that has its running statistics in common with it."""
    if not recorders:
        return None
    if layer in recorders:
        return recorders[layer]
    twin = twin_of(layer)
    return None if twin is None else recorders[twin]
