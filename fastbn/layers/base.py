"""Batch normalization as layers: parameters, buffers, modes, momentum, lazy initialization, state.

The semantics are those of ``torch.nn.BatchNorm1d`` to ``BatchNorm3d`` and their lazy forms, on
NumPy arrays and, on a GPU, CuPy's.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Never, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn import functional as F
from fastbn.backends import as_device, backend_for, backend_of

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

Array = NDArray[Any]

# The backward of a forward in place recovers the normalized input from the output, as
# (y - bias) / weight. Where |bias| exceeds this many times |weight|, too many digits are lost;
# bfloat16 has fewer of them to lose. Nor may the output underflow or overflow.
RECOVERABLE = 16.0
RECOVERABLE_BFLOAT16 = 4.0


class Aside(NamedTuple):
    """The input of the channels that cannot be recovered from the output."""

    channels: NDArray[np.intp] | slice
    x: Array


class Memory(NamedTuple):
    """What a forward leaves for its backward."""

    x: Array  # the input or, where the output took its place, the output
    mean: F.Statistics
    invstd: F.Statistics
    frozen: bool
    in_place: bool
    aside: Aside | None
    mask: Array | None
    batch_size: int  # as the functions take it: 0 for a single batch


# The layers for inputs of so many axes end in this number and a "d".
SPATIAL_AXES = {2: 1, 3: 1, 4: 2, 5: 3}

# What a layer has in its place when it has none: why a backward cannot be.
NO_FORWARD = "backward() needs a forward in training mode before it"
NO_BACKWARD_IN_EVAL = (
    "backward() needs a forward in training mode, and the last one was in evaluation mode; "
    "freeze() trains with running statistics"
)
NO_SECOND_BACKWARD = "backward() has run for the last forward, and each serves once"


class Room(NamedTuple):
    """Memory for a sum: the gradient that is added to, or a new one, and its wider total."""

    gradient: Array
    total: F.Statistics | None  # None for a new one


class View(NamedTuple):
    """What was normalized, as a backward sees it: ``xhat = (x - mean) * invstd``."""

    x: Array
    mean: F.Statistics
    invstd: F.Statistics
    weight: Array | None  # such that weight * invstd is the factor of dx
    scale: F.Statistics | None  # that factor, where the statistics are constants


class _BatchNorm:
    """What the layers have in common; they differ in the ranks of input that they take."""

    _family: ClassVar[str] = "BatchNorm"
    _ranks: ClassVar[tuple[int, ...]]
    _state_names: ClassVar[tuple[str, ...]] = (
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )

    num_features: int
    # Any stands for None: which of them are None, one knows from the arguments, a type checker
    # does not.
    weight: Array | Any
    bias: Array | Any
    running_mean: Array | Any
    running_var: Array | Any
    num_batches_tracked: NDArray[np.int64] | Any
    weight_grad: Array | Any
    bias_grad: Array | Any

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
        ghost_batch_size: int | None = None,
    ) -> None:
        self._set_options(eps, momentum, affine, track_running_stats, device, dtype, bias)
        self._set_ghosts(ghost_batch_size)
        self._allocate(_as_num_features(num_features))

    def _set_ghosts(self, ghost_batch_size: int | None) -> None:
        """Check and keep the size of ghost batches."""
        self.ghost_batch_size = F.as_batch_size(ghost_batch_size) or None

    def _set_options(
        self,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: str | None,
        dtype: DTypeLike | None,
        bias: bool,
    ) -> None:
        """Check and keep everything but the number of channels."""
        self.eps = F.as_eps(eps)
        self.momentum = None if momentum is None else F.as_real(momentum, "momentum")
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self._device = as_device(device)
        self._dtype = _as_dtype(dtype)
        self._has_bias = self.affine and bool(bias)
        self.training = True
        self.frozen = False
        self.num_features = 0
        self.num_batches_tracked = self._full((), 0, np.int64) if self.track_running_stats else None
        self.weight_grad = self.bias_grad = None
        self._memory: Memory | str = NO_FORWARD

    def _allocate(self, num_features: int) -> None:
        """Make the arrays, now that the number of channels is known."""
        self.num_features = num_features
        shape, dtype, tracked = (num_features,), self._dtype, self.track_running_stats
        self.weight = self._full(shape, 1, dtype) if self.affine else None
        self.bias = self._full(shape, 0, dtype) if self._has_bias else None
        self.running_mean = self._full(shape, 0, dtype) if tracked else None
        self.running_var = self._full(shape, 1, dtype) if tracked else None

    def _full(self, shape: tuple[int, ...], value: int, dtype: DTypeLike) -> Array:
        """A new array of one and the same value, on the layer's device."""
        array: Array = backend_for(self._device).asarray(
            np.full(shape, value, dtype), dtype, self._device
        )
        return array

    # Devices.

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
        device = as_device(device)
        if device != self._device:
            names = (*self._state_names, "weight_grad", "bias_grad")
            arrays = {name: getattr(self, name, None) for name in names}
            asarray = backend_for(device).asarray
            moved = {
                name: asarray(array, array.dtype, device)
                for name, array in arrays.items()
                if array is not None
            }
            self.__dict__.update(moved, _device=device, _memory=NO_FORWARD)
        return self

    # Initial values.

    def reset_running_stats(self) -> None:
        """Set running_mean to zeros, running_var to ones, num_batches_tracked to 0, in place."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            array = getattr(self, name, None)
            if array is not None:
                array[...] = value

    def reset_parameters(self) -> None:
        """Set weight to ones, bias to zeros and the running statistics to their initial values."""
        self.reset_running_stats()
        for name, value in (("weight", 1), ("bias", 0)):
            array = getattr(self, name, None)
            if array is not None:
                array[...] = value

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

    # Forward.

    def __call__(
        self,
        x: ArrayLike,
        *others: Never,
        out: Array | None = None,
        mask: ArrayLike | None = None,
    ) -> Array:
        """Normalize a batch, as `forward` does; `out` and `mask` are passed by name."""
        if others:
            raise TypeError(
                f"{type(self).__name__} is called with x alone by position, got {1 + len(others)} "
                f"arguments; pass out and mask by name: layer(x, out=..., mask=...)"
            )
        return self.forward(x, out=out, mask=mask)

    def forward(
        self, x: ArrayLike, *, out: Array | None = None, mask: ArrayLike | None = None
    ) -> Array:
        """Normalize a batch.

        In training mode by its own statistics, towards which the running ones then move; what the
        backward needs is kept, by reference. In evaluation mode, and in training mode if frozen,
        by the running statistics; evaluation mode keeps nothing for a backward. An empty batch
        changes nothing.

        Parameters
        ----------
        x : array_like of shape (N, C, ...)
            float32, float64, float16 or bfloat16, whatever the dtype of the layer.
        out : ndarray of shape (N, C, ...), optional
            Where to write the result: `x`, a view of exactly its elements, or an array that does
            not overlap it, of x's dtype. With ``out=x`` a training step allocates nothing of x's
            size, but a copy of channels that the output does not determine: those with a weight of
            0, or one that the bias exceeds 16 times (4 in bfloat16). For the gradients of these,
            unless they are all channels, the backward allocates as much again. It needs the output,
            weight and bias as they are now.
        mask : array_like of bool, optional
            Which positions count, of a shape that broadcasts to (N, 1, ...): valid pixels, or the
            part of each sequence that is not padding. What x holds where it is False counts for
            nothing, neither here nor in the backward, and output and gradient are 0 there. The
            backward has a copy.

        Returns
        -------
        ndarray of shape (N, C, ...)
            `out`, or a new array of x's dtype and memory layout.

        Raises
        ------
        ValueError
            If x has a wrong rank or number of channels, a single value per channel in training or
            none that counts, or `out` or `mask` cannot serve. Nothing has been changed then.
        TypeError
            If the dtype of x is not one of the four, `out` has another, or `mask` is not boolean.
        """
        x = self._checked(x)
        mask = F.as_mask(mask, x)
        if not self.training:
            y = self._forward_eval(x, out, mask)
            self._memory = NO_BACKWARD_IN_EVAL
            return y
        out = F.check_out(out, x)
        in_place = out is not None and F.share_memory(out, x)
        aside = self._set_aside(x) if in_place else None
        forward = self._forward_frozen if self.frozen else self._forward_train
        y, mean, invstd = forward(x, out, mask)
        size = 0 if self.frozen else self._batch_size()
        kept = y if in_place else x
        self._memory = Memory(kept, mean, invstd, self.frozen, in_place, aside, mask, size)
        return y

    def _batch_size(self) -> int:
        """The samples that are normalized together in training, 0 for all."""
        return F.as_batch_size(self.ghost_batch_size)

    def _checked(self, x: ArrayLike) -> Array:
        """x as an array of a rank and a number of channels that fit."""
        x = self._of_rank(x)
        axis = self._channel_axis(x)
        channels = x.shape[axis]
        if channels != self.num_features:
            hint = f"; use {_other_layers(type(self), channels)}"
            if x.shape[-1] == self.num_features:
                hint = f"; if they come last, pass np.moveaxis(x, -1, {axis})"
            raise ValueError(
                f"x has {channels} channels (axis {axis} of the shape {x.shape}), "
                f"this layer {self.num_features}{hint}"
            )
        return x

    def _of_rank(self, x: ArrayLike) -> Array:
        """x as an array of a rank that fits."""
        x = F.as_array(x, "x")
        if x.ndim not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            hint = ""
            if x.ndim + 1 == self._ranks[-1]:
                hint = "; x[np.newaxis] is a batch of one sample"
            if x.ndim in SPATIAL_AXES:
                hint += f"; {self._family}{SPATIAL_AXES[x.ndim]}d takes {x.ndim}D"
            raise ValueError(
                f"expected {expected} input, got {x.ndim}D input of shape {x.shape}{hint}"
            )
        return x

    def _channel_axis(self, x: Array) -> int:
        """The axis of channels of an array of a rank that fits."""
        return 1

    def _forward_eval(self, x: Array, out: Array | None, mask: Array | None) -> Array:
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        if self.running_mean is None and self.running_var is None:
            return F.forward_by_batch(x, *parameters, 0.0, self.eps, out=out, mask=mask)[0]
        return F.forward_by_running(x, *parameters, self.eps, out=out, mask=mask)

    def _forward_frozen(
        self, x: Array, out: Array | None, mask: Array | None
    ) -> tuple[Array, F.Statistics, F.Statistics]:
        mean, var = self.running_mean, self.running_var
        F.check_running(mean, var, x, writeable=False)
        statistics = F.running_statistics(mean, var, self.eps)
        weight, bias, eps = self.weight, self.bias, self.eps
        y = F.forward_by_running(x, mean, var, weight, bias, eps, out=out, mask=mask)
        return y, *statistics

    def _forward_train(
        self, x: Array, out: Array | None, mask: Array | None
    ) -> tuple[Array, F.Statistics, F.Statistics]:
        tracks = self.track_running_stats
        counter = self.num_batches_tracked if tracks else None
        return F.forward_by_batch(
            x,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            None if self.momentum is None else F.as_real(self.momentum, "momentum"),
            self.eps,
            counter=counter,
            out=out,
            mask=mask,
            batch_size=self._batch_size(),
        )

    def _set_aside(self, x: Array) -> Aside | None:
        """A copy of the channels of x that could not be recovered from the output."""
        if self.frozen and x.itemsize == 2:
            # Running statistics bound no normalized value; 16 bits would not hold every one.
            return Aside(slice(None), x.copy(order="K"))
        if self.weight is None:
            return None
        if not backend_of(x).readable():
            return Aside(slice(None), x.copy(order="K"))
        weight = np.abs(self._vector("weight", 1.0, x))
        bias = np.abs(self._vector("bias", 0.0, x))
        smallest, greatest = _limits(x.dtype)
        far = RECOVERABLE if x.dtype.kind == "f" else RECOVERABLE_BFLOAT16
        # No normalized value of n exceeds sqrt(n).
        largest = weight * (F.values_per_channel(x) ** 0.5 + far)
        recoverable = (weight >= smallest) & (largest <= greatest) & (bias <= far * weight)
        channels = np.flatnonzero(~recoverable)
        if not channels.size:
            return None
        if channels.size == self.num_features:
            return Aside(slice(None), x.copy(order="K"))
        return Aside(channels, backend_of(x).channels_of(x, channels))

    def _vector(self, name: str, default: float, x: Array) -> F.Statistics:
        """A float64 copy of weight or bias, or what stands for None."""
        vector = F.as_optional_vector(getattr(self, name), name, self.num_features, x)
        if vector is None:
            return np.full_like(x, default, np.float64, shape=self.num_features)
        return vector.astype(np.float64)

    # Backward.

    def zero_grad(self) -> Self:
        """Set weight_grad and bias_grad to None; return the layer."""
        self.weight_grad = self.bias_grad = None
        return self

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the gradient of the last forward's input; add to weight_grad and bias_grad.

        Uses up what the forward in training mode left: a reference to its input or, after a forward
        in place, to its output. If that array has been written to since then, by an activation in
        place for example, the gradient is silently wrong; after a forward in place the same holds
        for weight and bias.

        Parameters
        ----------
        dy : array_like of the input's shape
            The gradient of the output. Of another float dtype than the input it is converted.
        out : ndarray of the input's shape, optional
            Where to write the result: `dy`, the remembered array, a view of exactly the elements
            of one of them, or an array that overlaps neither, of the input's dtype.

        Returns
        -------
        ndarray of the input's shape
            `out`, or a new array of the input's dtype and memory layout.

        Raises
        ------
        RuntimeError
            If the last forward was not in training mode, or its backward has run.
        ValueError, TypeError
            If `dy` or `out` cannot serve. The backward can then be tried again.
        """
        memory = self._memory
        if isinstance(memory, str):
            raise RuntimeError(memory)
        dy = F.as_gradient(dy, memory.x)
        self._check_gradients(memory.x)
        if out is not None:
            out = F.check_out(out, memory.x, dy, **self._vectors(memory.x))
        rooms = self._rooms(memory.mean)
        dx, dweight, dbias = self._gradients(memory, dy, out)
        self._accumulate(rooms, dweight, dbias)
        self._memory = NO_SECOND_BACKWARD
        return dx

    def _gradients(
        self, memory: Memory, dy: Array, out: Array | None
    ) -> tuple[Array, F.Statistics, F.Statistics]:
        """The gradients of input, weight and bias."""
        if memory.aside is None:
            return _gradients(dy, self._view(memory), memory, out)
        channels, x = memory.aside
        view = self._view_aside(memory, channels, x)
        if isinstance(channels, slice):
            return _gradients(dy, view, memory, out)
        # Before dy may be overwritten, and in the memory of its copy.
        copy = backend_of(x).channels_of(dy, channels)
        aside = _gradients(copy, view, memory, copy if copy.dtype == x.dtype else None)
        dx, dweight, dbias = _gradients(dy, self._view(memory), memory, out)
        dx[:, channels], dweight[channels], dbias[channels] = aside
        return dx, dweight, dbias

    def _rooms(self, like: F.Statistics) -> tuple[Room | None, Room | None]:
        """The memory that adding to weight_grad and bias_grad takes, before anything is written."""
        return (
            _room(self.weight_grad, self.weight, like),
            _room(self.bias_grad, self.bias, like),
        )

    def _accumulate(
        self, rooms: tuple[Room | None, Room | None], dweight: Array, dbias: Array
    ) -> None:
        """Add to weight_grad and bias_grad."""
        self.weight_grad = _accumulated(rooms[0], dweight)
        self.bias_grad = _accumulated(rooms[1], dbias)

    def _check_gradients(self, x: Array) -> None:
        """Refuse gradients that cannot be added to."""
        for name in ("weight_grad", "bias_grad"):
            gradient = getattr(self, name)
            if gradient is not None:
                F.as_vector(gradient, name, self.num_features, x)
                F.check_ndarray(gradient, name, writeable=True)

    def _vectors(self, x: Array) -> dict[str, Array | None]:
        """What a gradient of x must not be written over."""
        names = ("weight", "bias", "weight_grad", "bias_grad")
        return {
            name: F.as_optional_vector(getattr(self, name), name, self.num_features, x)
            for name in names
        }

    def _view(self, memory: Memory) -> View:
        """How the backward sees what was remembered."""
        x, mean, invstd = memory.x, memory.mean, memory.invstd
        if not memory.in_place and not memory.frozen:
            weight = F.as_optional_vector(self.weight, "weight", self.num_features, x)
            return View(x, mean, invstd, weight, None)
        weight = self._vector("weight", 1.0, x)
        scale = invstd * weight
        if not memory.in_place:
            return View(x, mean, invstd, weight, scale)
        bias = self._vector("bias", 0.0, x)
        if memory.aside is not None:  # These get their gradients from what was set aside.
            weight[memory.aside.channels], bias[memory.aside.channels] = 1.0, 0.0
        # xhat = (y - bias) / weight: the output, normalized by bias and 1 / weight.
        return View(x, bias, 1.0 / weight, scale * weight, scale)

    def _view_aside(self, memory: Memory, channels: NDArray[np.intp] | slice, x: Array) -> View:
        """How the backward sees the channels that were set aside."""
        mean, invstd = memory.mean[..., channels], memory.invstd[..., channels]
        weight = self._vector("weight", 1.0, x)[channels]
        return View(x, mean, invstd, weight, invstd * weight)

    # State.

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

    def has_uninitialized_params(self) -> bool:
        """Tell whether the first input is still to decide the arrays of this layer."""
        return bool(self._uninitialized())

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> tuple[list[str], list[str]]:
        """Copy parameters and buffers into the arrays that are there; all or nothing.

        Parameters
        ----------
        state : mapping of str to array_like
            A `state_dict`, one of torch's (tensors), or what ``np.load`` or
            ``safetensors.numpy.load_file`` returns. num_batches_tracked may be absent.
        strict : bool, default True
            Whether a missing or an unexpected name is an error.
        prefix : str, default ""
            What the names begin with. If not empty, other names are ignored.

        Returns
        -------
        missing_keys, unexpected_keys : list of str
            Names with their prefix.

        Raises
        ------
        RuntimeError
            If a shape does not fit or, with `strict`, a name is missing or unexpected.
        TypeError
            If state is no mapping, or an entry does not hold real numbers.
        ValueError
            If num_batches_tracked is negative, or an array of the layer is read-only.
        """
        _check_state(state)
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be a bool, got {strict!r}; the prefix comes after it")
        own, waiting = self._state(), self._uninitialized()
        expected = [prefix + name for name in self._state_names if name in own or name in waiting]
        unexpected = [key for key in state if key.startswith(prefix) and key not in expected]
        missing = [key for key in expected if key not in state]
        with contextlib.suppress(ValueError):  # torch before 1.0 had no counter
            missing.remove(prefix + "num_batches_tracked")
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"state does not fit {type(self).__name__}: "
                f"missing keys {missing}, unexpected keys {unexpected}{_state_hint(state, prefix)}"
            )
        entries = {
            name: _as_entry(state[prefix + name], prefix + name, array, type(self))
            for name, array in own.items()
            if prefix + name in state
        }
        for name in waiting:
            if prefix + name in state:
                shape = np.shape(state[prefix + name])
                raise RuntimeError(f"{prefix + name} must have the shape (C,), got {shape}")
        for name in entries:
            F.check_ndarray(own[name], name, writeable=True)
        with np.errstate(all="ignore"):  # What an array's dtype cannot hold is inf there.
            copies = {
                name: backend_of(own[name]).asarray(entry, own[name].dtype, self._device)
                for name, entry in entries.items()
            }
        for name, copy in copies.items():
            own[name][...] = copy
        return missing, unexpected

    def __getstate__(self) -> dict[str, Any]:
        # What a forward left for its backward is as large as a batch, and of no use elsewhere.
        return {**self.__dict__, "_memory": NO_FORWARD}

    def extra_repr(self) -> str:
        """Return the arguments as `repr` shows them; device and dtype if not the default."""
        shown = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self._has_bias}, "
            f"track_running_stats={self.track_running_stats}"
            + (f", ghost_batch_size={self.ghost_batch_size}" if self.ghost_batch_size else "")
        )
        if self._device != "cpu":
            shown += f", device={self._device}"
        if self._dtype != np.float32:
            shown += f", dtype={self._dtype.name}"
        return shown

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class _LazyBatchNorm(_BatchNorm):
    """A layer that takes its number of channels from the first input, or the first state."""

    _becomes: ClassVar[type[_BatchNorm]]

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
        ghost_batch_size: int | None = None,
    ) -> None:
        self._set_options(eps, momentum, affine, track_running_stats, device, dtype, bias)
        self._set_ghosts(ghost_batch_size)
        if not self.affine:
            self.weight = None
        if not self._has_bias:
            self.bias = None
        if not self.track_running_stats:
            self.running_mean = self.running_var = None

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there: the arrays whose shape is not known yet.
        if name in self._state_names:
            raise AttributeError(
                f"{type(self).__name__} has no {name} yet: the first input, or load_state_dict(), "
                f"decides num_features"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def forward(
        self, x: ArrayLike, *, out: Array | None = None, mask: ArrayLike | None = None
    ) -> Array:
        """Take the number of channels from x, then do what the layer that this becomes does."""
        x = self._of_rank(x)
        num_features = x.shape[self._channel_axis(x)]
        y: Array = self._initialized(num_features, "forward", x, out=out, mask=mask)
        return y

    def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> tuple[list[str], list[str]]:
        """Take the number of channels from an entry, then load as `BatchNorm2d` does."""
        _check_state(state)
        for name in self._state_names:
            shape = np.shape(state.get(prefix + name, 0))
            if len(shape) == 1:
                keys: tuple[list[str], list[str]] = self._initialized(
                    shape[0], "load_state_dict", state, strict, prefix
                )
                return keys
        return super().load_state_dict(state, strict, prefix)

    def _initialized(self, num_features: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Become the class of `_becomes`, and call its method; if that fails, be lazy again."""
        lazy_class, lazy_attributes = type(self), dict(self.__dict__)
        self.__class__ = self._becomes  # type: ignore[assignment]
        try:
            self._allocate(num_features)
            return getattr(self, method)(*args, **kwargs)
        except BaseException:
            self.__class__ = lazy_class
            self.__dict__ = lazy_attributes
            raise


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) arrays, with the semantics of torch.nn.BatchNorm2d.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, channel by channel. In training mode, the
    mode of a new layer, mean and var are those of the batch, and the running ones move towards
    them: ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance. In
    evaluation mode they are the running ones.

    A layer is called like a function, and has a `backward` and `zero_grad`; `train`, `eval`,
    `freeze` and `unfreeze` set its mode; `state_dict`, `load_state_dict`, `reset_parameters` and
    `reset_running_stats` are about its arrays, and `to` about where they are.

    Parameters
    ----------
    num_features : int
        The number of channels C, at least 0.
    eps : float, default 1e-5
        Added to the variance. Greater than 0.
    momentum : float or None, default 0.1
        The factor of the batch in the running statistics. None is the cumulative average: the
        factor is ``1 / num_batches_tracked``.
    affine : bool, default True
        Whether there are a weight and a bias.
    track_running_stats : bool, default True
        Whether there are running statistics. Without them, evaluation mode uses the statistics of
        the batch as well.
    device : None, "cpu", "cuda" or "cuda:" and a number, optional
        Where the arrays are: None and "cpu" stand for NumPy arrays, the others for CuPy's, which
        input and output then are as well.
    dtype : dtype, default float32
        That of the parameters and buffers: float32, float64, float16 or ml_dtypes' bfloat16. The
        dtype of the input may be another, and is the dtype of the output.
    bias : bool, default True
        Whether an affine layer has a bias.
    ghost_batch_size : int, optional
        In training, normalize each so many samples by themselves, and what is left over at the end
        as well, as if the layer were called for one after the other: the noise of small batches at
        the speed of large ones (Hoffer, Hubara and Soudry 2017).

    Attributes
    ----------
    weight, bias : ndarray of shape (C,) or None
        The parameters: ones and zeros at first. Plain arrays, to be changed in place or replaced.
    weight_grad, bias_grad : ndarray of shape (C,) or None
        To what `backward` adds, in the parameter's dtype. None before the first one.
    running_mean, running_var : ndarray of shape (C,) or None
        Zeros and ones at first.
    num_batches_tracked : ndarray of shape (), int64, or None
        The number of batches that the running statistics have seen.
    training, frozen : bool
        What `train` and `eval`, and `freeze` and `unfreeze`, set.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of its range or of a wrong kind.
    ImportError, RuntimeError
        If the device is a GPU, and there is no CuPy or no such GPU.

    Notes
    -----
    On a GPU a layer runs on CuPy's current stream and waits for nothing, so that its calls can be
    captured in a graph. The exceptions are training forwards in place, where weight and bias decide
    which channels cannot be recovered from the output, and with a mask, whose values are counted.
    While a graph is captured, the former keep a copy of the whole input instead, and the latter
    refuse no mask: where it leaves less than two values, the running statistics stay as they are.

    Several threads may share a layer in evaluation mode. A layer in training mode belongs to one
    thread at a time.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm2d(3)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-3)
    (True, True)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.bias_grad
    array([128., 128., 128.], dtype=float32)
    >>> y = bn.eval()(x, out=x)
    >>> y is x
    True
    """

    _ranks = (4,)


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) and (N, C, L) arrays; otherwise a `BatchNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm1d(2, affine=False, eps=1e-12)
    >>> bn(np.array([[1.0, 5.0], [3.0, 9.0]])).round(6)
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    _ranks = (2, 3)


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays; otherwise a `BatchNorm2d`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> fastbn.BatchNorm3d(2)(np.zeros((1, 2, 3, 4, 5), np.float32)).shape
    (1, 2, 3, 4, 5)
    """

    _ranks = (5,)


class LazyBatchNorm2d(_LazyBatchNorm):
    """A `BatchNorm2d` that takes num_features from the first input, ``x.shape[1]``.

    Its other parameters are those of `BatchNorm2d`. It becomes a `BatchNorm2d`, class and all, at
    the first forward, or at the first `load_state_dict` that tells the number of channels. Until
    then its arrays are not there: reading one raises AttributeError.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.LazyBatchNorm2d(momentum=None)
    >>> bn.has_uninitialized_params()
    True
    >>> y = bn(np.zeros((2, 5, 4, 4), np.float32))
    >>> bn
    BatchNorm2d(5, eps=1e-05, momentum=None, affine=True, bias=True, track_running_stats=True)
    """

    _ranks = BatchNorm2d._ranks
    _becomes = BatchNorm2d


class LazyBatchNorm1d(_LazyBatchNorm):
    """A `BatchNorm1d` that takes num_features from the first input; see `LazyBatchNorm2d`."""

    _ranks = BatchNorm1d._ranks
    _becomes = BatchNorm1d


class LazyBatchNorm3d(_LazyBatchNorm):
    """A `BatchNorm3d` that takes num_features from the first input; see `LazyBatchNorm2d`."""

    _ranks = BatchNorm3d._ranks
    _becomes = BatchNorm3d


def _gradients(
    dy: Array, view: View, memory: Memory, out: Array | None
) -> tuple[Array, F.Statistics, F.Statistics]:
    """The gradients of input, weight and bias."""
    x, mean, invstd, weight, scale = view
    mask, batch_size = memory.mask, memory.batch_size
    if not memory.frozen or scale is None:
        return F.backward_by_batch(
            dy, x, weight, mean, invstd, out=out, mask=mask, batch_size=batch_size
        )
    # The statistics are constants: dx = dy * weight * invstd.
    dbias, dweight = F.batch_norm_backward_reduce(dy, x, mean, invstd, mask=mask)
    if out is None:
        out = _room_like(x)
    with np.errstate(all="ignore"):  # What x's dtype cannot hold is inf there.
        dy = dy.astype(x.dtype, copy=False)
    dx = F.batch_norm_elemt(dy, np.zeros_like(scale), scale, out=out, mask=mask)
    return dx, dweight, dbias


@functools.cache
def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The smallest normal number and the greatest; bfloat16's exponents are those of float32."""
    limits = np.finfo(dtype if dtype.kind == "f" else np.float32)
    return float(limits.smallest_normal), float(limits.max)


def _room_like(x: Array) -> Array:
    """Memory for a result, in x's layout and in native byte order."""
    return np.empty_like(x, dtype=x.dtype.newbyteorder("="))


def _room(gradient: Array | None, parameter: Array | None, like: F.Statistics) -> Room | None:
    """What adding to the gradient of a parameter writes to; None without one."""
    if parameter is None:
        return None
    if gradient is None:
        return Room(np.empty_like(like, dtype=parameter.dtype, shape=parameter.shape), None)
    return Room(gradient, np.empty_like(like, shape=parameter.shape))


def _accumulated(room: Room | None, added: Array) -> Array | None:
    """The gradient of a parameter after adding to it, in place if it was there."""
    if room is None:
        return None
    gradient, total = room
    with np.errstate(all="ignore"):  # What the gradient's dtype cannot hold is inf there.
        if total is not None:
            total[...] = gradient
            total += added
        gradient[...] = added if total is None else total
    return gradient


def _as_num_features(value: Any) -> int:
    """A non-negative integer, which a bool is not."""
    if isinstance(value, bool):
        raise TypeError("num_features must be an integer, got a bool")
    try:
        num_features = operator.index(value)
    except TypeError:
        raise TypeError(f"num_features must be an integer, got {type(value).__name__}") from None
    if num_features < 0:
        raise ValueError(f"num_features must not be negative, got {num_features}")
    return num_features


def _as_dtype(value: Any) -> np.dtype[Any]:
    """One of the four dtypes; float32 for None."""
    try:
        dtype = np.dtype(np.float32 if value is None else value)
    except TypeError:  # "bfloat16", for one, is known after an import of ml_dtypes only
        dtype = np.dtype(object)
    if not F.is_float(dtype) or not dtype.isnative:
        raise TypeError(
            f"dtype must be float32, float64, float16 or ml_dtypes.bfloat16, got {value!r}"
        )
    return dtype


def _check_state(state: Any) -> None:
    """Refuse what is not a mapping from names."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise TypeError(f"state must be a mapping of str to arrays, got {type(state).__name__}")


def _other_layers(layer: type[_BatchNorm], num_features: int) -> str:
    """Suggest layers that take another number of channels."""
    return ", or ".join([f"{layer.__name__}({num_features})", *_lazy_forms(layer, _LazyBatchNorm)])


def _lazy_forms(layer: type[_BatchNorm], family: type[_LazyBatchNorm]) -> Iterator[str]:
    """The names of the layers of a family that become the given one."""
    for lazy in family.__subclasses__():
        if getattr(lazy, "_becomes", None) is layer:
            yield lazy.__name__
        yield from _lazy_forms(layer, lazy)


def _state_hint(state: Mapping[str, Any], prefix: str) -> str:
    """Suggest the prefix under which a state has a layer, or not to be strict."""
    for key in state:
        other = key.removesuffix("weight")
        if other not in (key, prefix) and other + "running_mean" in state:
            return f"; perhaps with prefix={other!r}"
    return "; strict=False loads those that fit"


def _as_entry(value: Any, key: str, array: Array, layer: type[_BatchNorm]) -> Array:
    """An entry of a layer's state as an array that can be copied into the given one."""
    entry = F.on_host(value, key)
    if array.dtype.kind == "i" and entry.dtype.kind not in "iu":
        raise TypeError(f"{key} must hold integers, got {entry.dtype}")
    if entry.dtype.kind not in "iu" and not F.is_float(entry.dtype):
        hint = "; .npz does not keep bfloat16, safetensors does" if entry.dtype == "V2" else ""
        raise TypeError(f"{key} must hold real numbers, got {entry.dtype}{hint}")
    if entry.shape != array.shape:
        fits = array.ndim == entry.ndim == 1
        hint = f": {_other_layers(layer, entry.size)}" if fits else ""
        raise RuntimeError(f"{key} must have the shape {array.shape}, got {entry.shape}{hint}")
    if array.dtype.kind == "i" and not 0 <= int(entry) <= np.iinfo(array.dtype).max:
        raise ValueError(f"{key} must be a number of batches, got {int(entry)}")
    return entry
