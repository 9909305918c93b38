"""The refusals that layers alone have: of options, of inputs, of a backward, of state dicts.

As in `_checks`, none of the functions writes, and what they return is trusted from there on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, ItemsView, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastbn import _checks as checks
from fastbn import _scalars as scalars
from fastbn._core import SavedForBackward
from fastbn._interchange import on_host
from fastbn._overlap import share_memory
from fastbn._types import Array
from fastbn.backends import CUDA_DEVICE, backend_of, cuda_backend

# Options.


def as_num_features(value: Any) -> int:
    """A number of channels."""
    return scalars.as_count(value, "num_features")


def refuse_channels(eps: Any, layer: str) -> None:
    """Refuse a number of channels in the place of eps, which comes first in a lazy layer."""
    eps = scalars.scalar_of(eps)
    if isinstance(eps, int | np.integer) and not isinstance(eps, bool) and eps > 0:
        raise TypeError(
            f"{layer} takes no num_features, which the first input decides: what comes first is "
            f"eps, got {eps}; if that is meant, write it as {float(eps)}"
        )


# What to pass for a dtype, by its name.
DTYPES = {
    "float32": "np.float32",
    "float64": "np.float64",
    "float16": "np.float16",
    "bfloat16": "ml_dtypes.bfloat16",
}


def as_dtype(value: Any) -> np.dtype[Any]:
    """One of the four dtypes; float32 for None."""
    try:
        dtype = np.dtype(np.float32 if value is None else value)
    except TypeError:  # "bfloat16", for one, is known after an import of ml_dtypes only
        dtype = np.dtype(object)
    if not checks.is_float(dtype) or not dtype.isnative:
        # That of torch.float32, or of another byte order.
        name = str(value).rpartition(".")[2] if dtype.kind == "O" else dtype.name
        mend = f"; pass {DTYPES[name]}" if name in DTYPES else ""
        raise TypeError(
            f"dtype must be np.float32, np.float64, np.float16 or ml_dtypes.bfloat16, in native "
            f"byte order, got {value!r}{mend}"
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
        if axis == 0 and x.ndim > 1 and x.shape[1] == num_features:
            hint = f"; without an axis of samples, axis 0 has them: a batch is {x.ndim + 1}D here"
            if x.ndim > 2:
                hint += f", and {x.ndim}D for a {SPATIAL_AXES[x.ndim]}d layer"
        elif x.shape[-1] == num_features:
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


def check_gradients_apart(gradients: dict[str, Array | None], **others: Any) -> None:
    """Refuse to add to gradients that share memory, with each other or with arrays of the layer."""
    for name, gradient in gradients.items():
        for other, array in {**others, **gradients}.items():
            if gradient is None or name == other or not checks.is_array(array):
                continue
            if backend_of(array) is backend_of(gradient) and share_memory(gradient, array):
                raise ValueError(
                    f"{name} and {other} share memory, and different values are written to them: "
                    f"give {name} an array of its own, such as {name}.copy(), or begin new "
                    f"gradients with zero_grad()"
                )


# State dicts.


FROM_TORCH = (
    "; only torch reads its files: pass torch.load(path) or, to load them without torch, what "
    "np.savez has saved of {k: v.numpy() for k, v in torch.load(path).items()}"
)


def check_parameters(**parameters: Any) -> None:
    """Refuse what a forward can read, such as a list, but what has no dtype for a gradient."""
    for name, value in parameters.items():
        if value is not None and not checks.is_array(value):
            raise TypeError(
                f"{checks.not_an_array(value, name)}, which has no dtype for {name}_grad: "
                f"layer.{name} = np.asarray(layer.{name}, np.float32)"
            )


def is_file_of_torch(state: Any) -> bool:
    """Tell whether it is a file of torch.save's, by its name or its parts, which np.load lists."""
    if isinstance(state, bytes | bytearray):
        return state.startswith(b"PK") and b"/data.pkl" in state
    if isinstance(state, Mapping):
        return any(key.endswith("/data.pkl") for key in state)
    name = state if isinstance(state, str | os.PathLike) else getattr(state, "name", "")
    return str(name).endswith((".pt", ".pth"))


def check_state(state: Any) -> None:
    """Refuse what is not a mapping from names."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        hint = ""
        if not isinstance(state, Mapping) and is_file_of_torch(state):
            hint = FROM_TORCH
        elif isinstance(state, str | os.PathLike):
            hint = "; np.load and safetensors.numpy.load_file read files"
        elif isinstance(state, bytes | bytearray):
            hint = (
                "; np.load(io.BytesIO(state_dict)) and safetensors.numpy.load(state_dict) read it"
            )
        elif hasattr(state, "read"):
            hint = "; np.load(state_dict) and safetensors.numpy.load(state_dict.read()) read it"
        elif isinstance(state, list | tuple | ItemsView):
            hint = "; dict(state_dict) makes one of pairs"
        elif hasattr(state, "state_dict"):
            hint = "; pass its state_dict()"
        raise TypeError(
            f"state_dict must be a mapping of str to arrays, got {type(state).__name__}{hint}"
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

# From the longest to the shortest: "x_input_mean" ends in two of them.
KNOWN_NAMES = sorted({**FOREIGN_NAMES, **OPTIONS}, key=len, reverse=True)


class ForeignKey(NamedTuple):
    """A key of a state, or of a mapping in it, that ends in a name of a layer's array."""

    shown: str  # as an error shows it
    layer: str  # what stands before the name
    name: str  # what it is called here
    is_foreign: bool  # whether that is another name
    is_nested: bool


def state_hint(
    state: Mapping[str, Any], prefix: str, expected: list[str], lacking: list[str]
) -> str:
    """Suggest the prefix or the names under which a state has a layer, the options with which the
    layer would have what it lacks, another way to read a file, or not to be strict.
    """
    if is_file_of_torch(state):
        return FROM_TORCH
    prefixes = _other_prefixes(state, prefix, expected)
    if prefixes:
        return f"; perhaps with prefix={' or '.join(map(repr, prefixes))}"
    foreign = _foreign_layers(state, prefix, expected)
    if foreign:
        return _renaming_hint(foreign, prefix, expected, lacking)
    options = _options([name for name in lacking if prefix + name in state])
    if options:
        return f"; a layer with {options} has them"
    if any(key in state for key in expected):
        return "; strict=False loads those that fit"
    return f"; the names that it knows are {', '.join(expected)}"


def _other_prefixes(state: Mapping[str, Any], prefix: str, expected: list[str]) -> list[str]:
    """Other prefixes, a few of them, under which a state has all arrays that a layer needs."""
    names = [key.removeprefix(prefix) for key in expected]
    needed = [name for name in names if name != "num_batches_tracked"]
    found = dict.fromkeys(
        key.removesuffix(needed[0]) for key in state if needed and key.endswith(needed[0])
    )
    return [
        other
        for other in found
        if other != prefix
        and all(len(np.shape(state.get(other + name, 0))) == 1 for name in needed)
    ][:3]


def _foreign_layers(
    state: Mapping[str, Any], prefix: str, expected: list[str]
) -> dict[str, list[ForeignKey]]:
    """The keys of the layers that a state has under names of other libraries."""
    layers: dict[str, list[ForeignKey]] = {}
    keys = [key for key in state if key.startswith(prefix)]
    for path, shown in _paths({key: state[key] for key in keys or state}, ()):
        key = _foreign_key(path, shown)
        is_own = len(path) == 1 and path[0] in expected
        if key is None or is_own or (key.is_foreign and prefix + key.name in state):
            continue
        layers.setdefault(key.layer, []).append(key)
    layers = {
        layer: keys
        for layer, keys in layers.items()
        if any(key.is_foreign or key.is_nested for key in keys)
    }
    most = max(map(len, layers.values()), default=0)  # the others are of another kind
    return {layer: keys for layer, keys in layers.items() if len(keys) == most}


def _paths(
    state: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The paths to the entries of mappings in mappings, and how these are read."""
    for key, value in state.items():
        path = (*above, str(key))
        if isinstance(value, Mapping):
            yield from _paths(value, path)
        else:
            shown = "".join(f"[{part!r}]" for part in path)
            yield path, f"state_dict{shown}" if above else repr(key)


def _foreign_key(path: tuple[str, ...], shown: str) -> ForeignKey | None:
    """What a path ends in, if that is a name of an array."""
    key = "/".join(path).removesuffix(":0")
    for known in KNOWN_NAMES:
        before = key.removesuffix(known)
        if before != key and (not before or before[-1] in "/._"):
            # Flax has the arrays of one layer in two collections.
            parts = re.split(r"(?<=[/.])", before)
            layer = "".join(p for p in parts if p[:-1] not in ("params", "batch_stats"))
            name = FOREIGN_NAMES.get(known, known)
            return ForeignKey(shown, layer, name, name != known, len(path) > 1)
    return None


def _renaming_hint(
    layers: dict[str, list[ForeignKey]], prefix: str, expected: list[str], lacking: list[str]
) -> str:
    """Suggest what to make of the keys of a layer."""
    keys = next(iter(layers.values()))
    known = [key for key in keys if prefix + key.name in expected]
    others = [key for key in keys if prefix + key.name not in expected]
    hint = ""
    if known and any(key.is_nested for key in keys):
        pairs = ", ".join(f"{prefix + key.name!r}: {key.shown}" for key in known)
        hint = f"; pass {{{pairs}}}"
    elif known:
        hint = "; rename " + ", ".join(f"{key.shown} to {prefix + key.name!r}" for key in known)
    if len(layers) > 1:
        names = " and ".join(repr(name) for name in list(layers)[:2])
        hint = f"; of its {len(layers)} layers, {names}{' ...' * (len(layers) > 2)}, take one{hint}"
    if others:
        shown = ", ".join(key.shown for key in others)
        options = _options([key.name for key in others if key.name in lacking])
        hint += f"; a layer with {options} has {shown}" if options else f"; leave out {shown}"
    return hint


def _options(names: list[str]) -> str:
    """The options with which a layer has arrays of these names."""
    options = [OPTIONS[name] for name in names]
    if OPTIONS["weight"] in options and OPTIONS["bias"] in options:
        options.remove(OPTIONS["bias"])  # An affine layer has one.
    return ", ".join(dict.fromkeys(options))


def as_entry(value: Any, key: str, array: Array, other_layers: Callable[[int], str]) -> Array:
    """An entry of a layer's state as an array that can be copied into the given one."""
    entry = on_host(value, key)
    if array.dtype.kind == "i":
        return as_counter(entry, key, array)
    if not is_real(entry):
        hint = "; .npz does not keep bfloat16, safetensors does" if entry.dtype == "V2" else ""
        raise TypeError(f"{key} must hold real numbers, got {entry.dtype}{hint}")
    if entry.shape != array.shape:
        fits = array.ndim == entry.ndim == 1
        hint = f": {other_layers(entry.size)}" if fits else ""
        raise RuntimeError(f"{key} must have the shape {array.shape}, got {entry.shape}{hint}")
    return entry


def is_real(entry: Array) -> bool:
    """Tell whether an array holds real numbers, of NumPy's dtypes or of those that it is taught."""
    if entry.dtype.kind != "V":
        return entry.dtype.kind in "iuf"
    try:  # ml_dtypes' are of this kind, and so are bytes without a meaning.
        np.zeros((), entry.dtype).astype(np.float64)
    except (TypeError, ValueError):
        return False
    return entry.dtype.names is None


def as_counter(entry: Array, key: str, counter: Array) -> Array:
    """A number of batches of a state, which averages and casts may have made a float."""
    if entry.dtype.kind != "b" and not is_real(entry):
        raise TypeError(f"{key} must hold a real number, got {entry.dtype}")
    if entry.shape not in ((), (1,)):
        raise RuntimeError(f"{key} must have the shape (), got {entry.shape}")
    number = entry.reshape(()).item()
    if entry.dtype.kind == "V":  # Such scalars compare in their own range.
        number = float(number)
    if not 0 <= number <= np.iinfo(counter.dtype).max:
        raise ValueError(f"{key} must be a number of batches, got {number}")
    return np.array(int(number), counter.dtype)
