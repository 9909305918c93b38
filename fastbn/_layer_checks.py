"""The refusals that layers alone have: of options, of inputs, of a backward, of state dicts.

As in `_checks`, none of the functions writes, and what they return is trusted from there on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, ItemsView, Mapping
from typing import Any

import numpy as np

from fastbn import _checks as checks
from fastbn import _scalars as scalars
from fastbn._core import SavedForBackward
from fastbn._interchange import on_host
from fastbn._types import Array
from fastbn.backends import CUDA_DEVICE, cuda_backend

# Options.


def as_num_features(value: Any) -> int:
    """A number of channels."""
    return scalars.as_count(value, "num_features")


def as_dtype(value: Any) -> np.dtype[Any]:
    """One of the four dtypes; float32 for None."""
    try:
        dtype = np.dtype(np.float32 if value is None else value)
    except TypeError:  # "bfloat16", for one, is known after an import of ml_dtypes only
        dtype = np.dtype(object)
    if not checks.is_float(dtype) or not dtype.isnative:
        raise TypeError(
            f"dtype must be float32, float64, float16 or ml_dtypes.bfloat16, got {value!r}"
        )
    return dtype


def as_device(device: Any) -> str:
    """The full name of a device: "cpu", or "cuda:" and a number; "cpu" for None."""
    name = "cpu" if device is None else str(device)
    if CUDA_DEVICE.fullmatch(name):
        return cuda_backend().named_device(name)
    if name != "cpu":
        raise ValueError(f"device must be None, 'cpu', 'cuda' or 'cuda:0' and so on, got {name!r}")
    return name


# Inputs, and what a forward saved.

# The layers for inputs of so many axes end in this number and a "d".
SPATIAL_AXES = {2: 1, 3: 1, 4: 2, 5: 3}


def as_input_of_rank(x: Any, ranks: tuple[int, ...], family: str) -> Array:
    """x as an array of a rank that a layer of a family takes."""
    x = checks.as_array(x, "x")
    if x.ndim not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        hint = ""
        if x.ndim + 1 == ranks[-1]:
            hint = "; x[np.newaxis] is a batch of one sample"
        if x.ndim in SPATIAL_AXES:
            hint += f"; {family}{SPATIAL_AXES[x.ndim]}d takes {x.ndim}D"
        raise ValueError(f"expected {expected} input, got {x.ndim}D input of shape {x.shape}{hint}")
    return x  # type: ignore[no-any-return]


def check_channels(
    x: Array, axis: int, num_features: int, other_layers: Callable[[int], str]
) -> None:
    """Refuse an input of another number of channels than a layer has; suggest other layers."""
    channels = x.shape[axis]
    if channels != num_features:
        hint = f"; use {other_layers(channels)}"
        if x.shape[-1] == num_features:
            hint = f"; if they come last, pass np.moveaxis(x, -1, {axis})"
        raise ValueError(
            f"x has {channels} channels (axis {axis} of the shape {x.shape}), "
            f"this layer {num_features}{hint}"
        )


def check_saved(saved: SavedForBackward, *, is_read: bool) -> None:
    """Refuse a backward of an array of another shape or, if it is read, of other elements."""
    if saved.x.shape != saved.shape:
        raise RuntimeError(
            f"the forward saved an array of the shape {saved.shape}, and its shape has been set to "
            f"{saved.x.shape} since: pass a reshaped view instead"
        )
    if is_read and saved.has_changed():
        name = "output in place" if saved.in_place else "input"
        raise RuntimeError(
            f"the forward's {name} has been written to since, by an activation in place for "
            f"example, and backward() needs it: write to another array, such as np.maximum(h, 0) "
            f"without out=h, and run the forward again"
        )


# State dicts.


def check_state(state: Any) -> None:
    """Refuse what is not a mapping from names."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        hint = ""
        if isinstance(state, str | os.PathLike):
            hint = "; np.load and safetensors.numpy.load_file read files"
        elif isinstance(state, bytes | bytearray):
            hint = "; np.load(io.BytesIO(state)) and safetensors.numpy.load(state) read it"
        elif hasattr(state, "read"):
            hint = "; np.load(state) and safetensors.numpy.load(state.read()) read it"
        elif isinstance(state, list | tuple | ItemsView):
            hint = "; dict(state) makes one of pairs"
        elif hasattr(state, "state_dict"):
            hint = "; pass its state_dict()"
        raise TypeError(
            f"state must be a mapping of str to arrays, got {type(state).__name__}{hint}"
        )


# What other libraries call weight, bias, running_mean and running_var.
FOREIGN_NAMES = {
    **dict.fromkeys(("gamma", "scale"), "weight"),
    **dict.fromkeys(("beta", "B", "offset"), "bias"),
    **dict.fromkeys(("moving_mean", "input_mean", "mean"), "running_mean"),
    **dict.fromkeys(("moving_variance", "moving_var", "input_var", "var"), "running_var"),
}


# With which option a layer has an array that it lacks.
OPTIONS = {
    "weight": "affine=True",
    "bias": "bias=True",
    "running_mean": "track_running_stats=True",
    "running_var": "track_running_stats=True",
    "num_batches_tracked": "track_running_stats=True",
}


def state_hint(
    state: Mapping[str, Any], prefix: str, expected: list[str], lacking: list[str]
) -> str:
    """Suggest the prefix or the names under which a state has a layer, the options with which the
    layer would have what it lacks, or not to be strict.
    """
    for key in state:
        other = key.removesuffix("weight")
        if other not in (key, prefix) and other + "running_mean" in state:
            return f"; perhaps with prefix={other!r}"
    last = {k: re.split(r"[/.]", k.removesuffix(":0"))[-1] for k in state if k not in expected}
    if any(name in FOREIGN_NAMES for name in last.values()):
        names = {**FOREIGN_NAMES, **{key.removeprefix(prefix): key for key in expected}}
        renamed = {k: prefix + names[n].removeprefix(prefix) for k, n in last.items() if n in names}
        return "; rename " + ", ".join(f"{old!r} to {new!r}" for old, new in renamed.items())
    options = [OPTIONS[name] for name in lacking if prefix + name in state]
    if options:
        if OPTIONS["weight"] in options and OPTIONS["bias"] in options:
            options.remove(OPTIONS["bias"])  # An affine layer has one.
        return f"; a layer with {', '.join(dict.fromkeys(options))} has them"
    if any(key in state for key in expected):
        return "; strict=False loads those that fit"
    return f"; the names that it knows are {', '.join(expected)}"


def as_entry(value: Any, key: str, array: Array, other_layers: Callable[[int], str]) -> Array:
    """An entry of a layer's state as an array that can be copied into the given one."""
    entry = on_host(value, key)
    if array.dtype.kind == "i":
        return as_counter(entry, key, array)
    if entry.dtype.kind not in "iu" and not checks.is_float(entry.dtype):
        hint = "; .npz does not keep bfloat16, safetensors does" if entry.dtype == "V2" else ""
        raise TypeError(f"{key} must hold real numbers, got {entry.dtype}{hint}")
    if entry.shape != array.shape:
        fits = array.ndim == entry.ndim == 1
        hint = f": {other_layers(entry.size)}" if fits else ""
        raise RuntimeError(f"{key} must have the shape {array.shape}, got {entry.shape}{hint}")
    return entry


def as_counter(entry: Array, key: str, counter: Array) -> Array:
    """A number of batches of a state, which averages and casts may have made a float."""
    if entry.dtype.kind not in "biu" and not checks.is_float(entry.dtype):
        raise TypeError(f"{key} must hold a real number, got {entry.dtype}")
    if entry.shape not in ((), (1,)):
        raise RuntimeError(f"{key} must have the shape (), got {entry.shape}")
    number = entry.reshape(()).item() if entry.dtype.kind in "biu" else float(entry.reshape(()))
    if not 0 <= number <= np.iinfo(counter.dtype).max:
        raise ValueError(f"{key} must be a number of batches, got {number}")
    return np.array(int(number), counter.dtype)
