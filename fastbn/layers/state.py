"""The state of a layer: its arrays, modes and options; state dicts, devices, pickles, repr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from fastbn import _checks as checks
from fastbn import _layer_checks as layer_checks
from fastbn._types import Array, DTypeLike
from fastbn.backends import backend_for, backend_of
from fastbn.layers.saved import NO_FORWARD

if TYPE_CHECKING:
    from fastbn.layers.saved import SavedForBackward


class LoadedKeys(NamedTuple):
    """What `load_state_dict` returns."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class LayerState:
    """What the state of a layer has in common with that of every other one."""

    _state_names: ClassVar[tuple[str, ...]] = (
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    unbiased: bool
    activation: str | None
    negative_slope: float
    training: bool
    frozen: bool
    num_batches_tracked: Array | Any
    _device: str
    _dtype: np.dtype[Any]
    _has_bias: bool
    _saved: SavedForBackward | str

    def _full(self, shape: tuple[int, ...], value: int, dtype: DTypeLike) -> Array:
        """A new array of one and the same value, on the layer's device."""
        return backend_for(self._device).asarray(np.full(shape, value, dtype), dtype, self._device)

    def _allocate(self, num_features: int) -> None:
        """Make the arrays, now that the number of channels is known."""
        self.num_features = num_features
        # Not by track_running_stats, which may be False around the first forward of a lazy layer.
        tracked = self.num_batches_tracked is not None
        shape, dtype = (num_features,), self._dtype
        self.weight = self._full(shape, 1, dtype) if self.affine else None
        self.bias = self._full(shape, 0, dtype) if self._has_bias else None
        self.running_mean = self._full(shape, 0, dtype) if tracked else None
        self.running_var = self._full(shape, 1, dtype) if tracked else None

    def to(self, device: str) -> Self:
        """Move parameters, buffers and gradients to a device; return the layer.

        What a forward has left for its backward stays behind: a backward then needs another one.

        Parameters
        ----------
        device : "cpu", "cuda" or "cuda:" and a number
            "cpu" has NumPy arrays, the others CuPy's; "cuda" is CuPy's current device.

        Raises
        ------
        ValueError
            If there is no such name of a device.
        ImportError, RuntimeError
            If there is no CuPy for a GPU, or no such GPU.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm2d(3).to("cpu").weight
        array([1., 1., 1.], dtype=float32)
        """
        device = layer_checks.as_device(device)
        if device != self._device:
            names = (*self._state_names, "weight_grad", "bias_grad")
            arrays = {name: getattr(self, name, None) for name in names}
            asarray = backend_for(device).asarray
            moved = {
                name: asarray(array, array.dtype, device)
                for name, array in arrays.items()
                if array is not None
            }
            self.__dict__.update(moved, _device=device, _saved=NO_FORWARD)
        return self

    def reset_running_stats(self) -> None:
        """Set running_mean to zeros, running_var to ones, num_batches_tracked to 0, in place."""
        self._reset(running_mean=0, running_var=1, num_batches_tracked=0)

    def reset_parameters(self) -> None:
        """Set weight to ones, bias to zeros and the running statistics to their initial values."""
        self._reset(running_mean=0, running_var=1, num_batches_tracked=0, weight=1, bias=0)

    def _reset(self, **values: int) -> None:
        """Set those arrays that there are, all of them or, after an error, none."""
        given = {name: getattr(self, name, None) for name in values}
        arrays = {name: array for name, array in given.items() if array is not None}
        for name, array in arrays.items():
            checks.check_ndarray(array, name, writeable=True)
        checks.check_running_apart(arrays.get("running_mean"), arrays.get("running_var"))
        for name, array in arrays.items():
            array[...] = values[name]

    # Modes.

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or with ``mode=False`` evaluation mode; return the layer."""
        if not isinstance(mode, bool):
            raise ValueError(f"training mode is expected to be boolean, got {mode!r}")
        self.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode: normalize by the running statistics; return the layer."""
        return self.train(False)

    def freeze(self) -> Self:
        """Normalize by the running statistics in training mode too; return the layer.

        The statistics are not updated any more, and the backward takes them for constants, while
        weight and bias still get gradients. The usual choice for fine-tuning with small batches.
        Lasts until `unfreeze`, through `train` and `eval`.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics.
        """
        if any(getattr(self, name, "to come") is None for name in ("running_mean", "running_var")):
            raise RuntimeError(
                "freeze() needs running statistics, and this layer tracks none: "
                "make it with track_running_stats=True"
            )
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`; return the layer."""
        self.frozen = False
        return self

    # State dicts and pickles.

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """Return copies of the parameters and buffers under torch's names.

        Parameters
        ----------
        prefix : str, default ""
            What the names begin with, such as ``"layer1.0.bn1."``.

        Returns
        -------
        dict of str to ndarray
            weight, bias, running_mean, running_var and num_batches_tracked, those that there are.

        Raises
        ------
        RuntimeError
            If the layer is lazy and has not seen its first input.
        """
        if self.has_uninitialized_params():
            raise RuntimeError(
                f"{type(self).__name__} has no state yet: the first input, or load_state_dict(), "
                f"decides num_features"
            )
        return {prefix + name: array.copy() for name, array in self._state().items()}

    def _state(self) -> dict[str, Array]:
        """The arrays that make up the state, those that are there."""
        state = {name: getattr(self, name, None) for name in self._state_names}
        return {name: array for name, array in state.items() if array is not None}

    def _uninitialized(self) -> list[str]:
        """The names of the arrays whose shape is not known yet."""
        return [name for name in self._state_names if not hasattr(self, name)]

    def _lacking(self) -> list[str]:
        """The names of the arrays that the layer's options leave out."""
        return [name for name in self._state_names if getattr(self, name, "to come") is None]

    def has_uninitialized_params(self) -> bool:
        """Tell whether the first input is still to decide the arrays of this layer."""
        return bool(self._uninitialized())

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> LoadedKeys:
        """Copy parameters and buffers into the arrays that are there; all or nothing.

        Parameters
        ----------
        state_dict : mapping of str to array_like
            A `state_dict`, one of torch's (tensors), or what ``np.load`` or
            ``safetensors.numpy.load_file`` returns. num_batches_tracked may be absent,
            and be a number of any real dtype, which is truncated, of the shape () or (1,).
        strict : bool, default True
            Whether a missing or an unexpected name is an error.
        prefix : str, default ""
            What the names begin with. If not empty, other names are ignored.

        Returns
        -------
        named tuple of missing_keys and unexpected_keys : list of str
            Names with their prefix.

        Raises
        ------
        RuntimeError
            If a shape does not fit or, with `strict`, a name is missing or unexpected.
        TypeError
            If state_dict is no mapping, or an entry does not hold real numbers.
        ValueError
            If num_batches_tracked is negative or not finite, or an array of the layer is read-only.
        """
        layer_checks.check_state(state_dict)
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be a bool, got {strict!r}; the prefix comes after it")
        own, waiting = self._state(), self._uninitialized()
        expected = [prefix + name for name in self._state_names if name in own or name in waiting]
        unexpected = [key for key in state_dict if key.startswith(prefix) and key not in expected]
        missing = [key for key in expected if key not in state_dict]
        with contextlib.suppress(ValueError):  # torch before 1.0 had no counter
            missing.remove(prefix + "num_batches_tracked")
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"state does not fit {type(self).__name__}: "
                f"missing keys {missing}, unexpected keys {unexpected}"
                f"{layer_checks.state_hint(state_dict, prefix, expected, self._lacking())}"
            )
        for name in own:
            if prefix + name in state_dict:
                checks.check_ndarray(own[name], name, writeable=True)
        entries = {
            name: layer_checks.as_entry(
                state_dict[prefix + name], prefix + name, array, self._other_layers
            )
            for name, array in own.items()
            if prefix + name in state_dict
        }
        for name in waiting:
            if prefix + name in state_dict:
                shape = np.shape(state_dict[prefix + name])
                raise RuntimeError(f"{prefix + name} must have the shape (C,), got {shape}")
        checks.check_running_apart(own.get("running_mean"), own.get("running_var"))
        with np.errstate(all="ignore"):  # What an array's dtype cannot hold is inf there.
            copies = {
                name: backend_of(own[name]).asarray(entry, own[name].dtype, self._device)
                for name, entry in entries.items()
            }
        for name, copy in copies.items():
            own[name][...] = copy
        return LoadedKeys(missing, unexpected)

    def __getstate__(self) -> dict[str, Any]:
        # What a forward left for its backward is as large as a batch, and of no use elsewhere.
        return {**self.__dict__, "_saved": NO_FORWARD}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of version 0.1.0 have no unbiased, and _memory in place of _saved.
        state = {"unbiased": True, **state, "_saved": NO_FORWARD}
        state.pop("_memory", None)
        self.__dict__.update(state)

    # What is shown.

    def extra_repr(self) -> str:
        """Return the arguments as `repr` shows them; the last ones if they are not the default."""
        shown = self._options_repr()
        if self.activation is not None:
            shown += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            shown += f", negative_slope={self.negative_slope}"
        if not self.unbiased:
            shown += f", unbiased={self.unbiased}"
        if self._device != "cpu":
            shown += f", device={self._device}"
        if self._dtype != np.float32:
            shown += f", dtype={self._dtype.name}"
        return shown

    def _options_repr(self) -> str:
        """The arguments that torch has too, and those that other families do not have."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self._has_bias}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _other_layers(self, num_features: int) -> str:
        """Suggest layers that take another number of channels."""
        layer = getattr(self, "_becomes", type(self))
        lazy_forms = dict.fromkeys(_lazy_forms(layer, LayerState))
        return ", or ".join([f"{layer.__name__}({num_features})", *lazy_forms])


def _lazy_forms(layer: type[LayerState], family: type[LayerState]) -> Iterator[str]:
    """The names of the layers of a family that become the given one."""
    for lazy in family.__subclasses__():
        if getattr(lazy, "_becomes", None) is layer:
            yield lazy.__name__
        yield from _lazy_forms(layer, lazy)
