"""The refusals of arguments, and their messages: here the arguments of a call become checked ones.

None of the functions writes. What they return is trusted from there on. What layers alone refuse is
in `_layer_checks`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn import _core
from fastbn import _scalars as scalars
from fastbn._interchange import from_dlpack, is_masked, mask_is_lost, memory_hint, refuse_meta
from fastbn._normalize import Backward, Forward, values_of_batches, values_per_channel
from fastbn._overlap import overlaps_itself, same_elements, share_memory
from fastbn._types import Array, Epilogue, Gate
from fastbn.backends import backend_of, is_cupy
from fastbn.backends.common import batches_of

# Calls.

NOT_GIVEN: Any = object()
NO_EPILOGUE = None, 0.01, None  # activation, its negative_slope, residual


def forward_call(
    x: Array,
    weight: Any,
    bias: Any,
    eps: Any,
    out: Any,
    mask: Any,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    moves: bool = False,
    zero_eps: bool = False,
    epilogue: tuple[Any, Any, Any] = NO_EPILOGUE,
) -> Forward:
    """The arguments of a forward, but for those of training; `moves` updates the statistics."""
    vectors = as_vectors(x, weight=weight, bias=bias)
    vectors |= as_running(running_mean, running_var, x, moves=moves)
    follows = as_epilogue(epilogue, x)
    residual = None if follows is None else follows.residual
    out = check_out(out, x, residual=residual, **vectors)
    in_place = out is not None and share_memory(out, x)
    mask = as_mask(mask, x)
    eps = scalars.as_eps(eps, zero=zero_eps)
    return Forward(x, eps=eps, out=out, in_place=in_place, mask=mask, epilogue=follows, **vectors)


def training_call(
    x: Array,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    momentum: Any,
    eps: Any,
    *,
    counter: Any = None,
    out: Any,
    mask: Any,
    unbiased: Any = True,
    batch_size: int = 0,
    by_instance: bool = False,
    epilogue: tuple[Any, Any, Any] = NO_EPILOGUE,
) -> Forward:
    """The arguments of a forward by the statistics of batches of so many samples, 0 for one batch.

    A momentum of None stands for 1 / counter. Instances are batches of one sample.
    """
    arrays = weight, bias, eps, out, mask, running_mean, running_var
    call = forward_call(x, *arrays, moves=True, zero_eps=by_instance, epilogue=epilogue)
    batch_size = 1 if by_instance else batch_size
    counts = checked_counts(x, call.mask, batch_size, by_instance=by_instance)
    if counter is not None:
        check_counter(counter, len(counts))
    if momentum is not None:
        momentum = scalars.as_real(momentum, "momentum")
    return call._replace(
        momentum=momentum,
        counter=counter,
        unbiased=scalars.as_bool(unbiased, "unbiased"),
        batch_size=batch_size,
        counts=counts,
    )


def group_call(
    x: Array,
    num_groups: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    *,
    out: Any,
    mask: Any,
    epilogue: tuple[Any, Any, Any] = NO_EPILOGUE,
) -> Forward:
    """The arguments of a forward by the statistics of groups of channels of each sample."""
    num_groups = scalars.as_num_groups(num_groups, x.shape[1])
    call = forward_call(x, weight, bias, eps, out, mask, zero_eps=True, epilogue=epilogue)
    if x.size == num_groups:  # torch looks at all samples together
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}, of "
            f"which each of {num_groups} groups is a single value; fewer groups have more values"
        )
    return call._replace(num_groups=num_groups)


def running_call(
    x: Array,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    *,
    out: Any,
    mask: Any,
    without: str = "outside training, got None; training=True normalizes by the batch",
    epilogue: tuple[Any, Any, Any] = NO_EPILOGUE,
) -> Forward:
    """The arguments of a forward by running statistics; `without` tells what to do without them."""
    if running_mean is None and running_var is None:
        raise ValueError(f"running_mean and running_var are needed {without}")
    arrays = weight, bias, eps, out, mask, running_mean, running_var
    return forward_call(x, *arrays, zero_eps=True, epilogue=epilogue)


def backward_call(
    dy: Any,
    x: Array,
    weight: Any,
    mean: Any,
    invstd: Any,
    *,
    out: Any,
    mask: Any,
    batch_size: int,
    bias: Any = NOT_GIVEN,
    residual: Any = None,
    y: Any = None,
    activation: Any = None,
    negative_slope: Any = 0.01,
    residual_out: Any = None,
) -> Backward:
    """The arguments of a backward of `batch_norm_forward`."""
    dy = as_gradient(dy, x)
    name, slope = scalars.as_activation(activation, negative_slope, x.dtype)
    if name is not None and y is None and bias is NOT_GIVEN:
        raise TypeError(
            f"bias is needed with activation={name!r} and without y: pass the forward's, "
            f"bias=None if it had none"
        )
    vectors = {
        **as_vectors(x, weight=weight),
        "mean": as_statistics(mean, "mean", batch_size, x),
        "invstd": as_statistics(invstd, "invstd", batch_size, x),
    }
    given = as_vectors(x, bias=None if bias is NOT_GIVEN else bias)
    y = None if y is None else as_array_like(x, y, "y")
    residual = None if residual is None else as_residual(residual, x)
    if y is not None and slope < 0.0 and name == "leaky_relu":
        raise ValueError(
            f"y does not tell the derivatives of a negative_slope below 0, got {slope}: pass "
            f"bias, and the residual if there was one, instead of y"
        )
    out = check_out(out, x, dy, y=y, residual=residual, **vectors, **given)
    derived = check_residual_out(
        residual_out, x, dy, x, out=out, y=y, residual=residual, **vectors, **given
    )
    gate = None
    if name is not None or residual is not None or derived is not None:
        is_new = derived is None and residual is not None
        if is_new:
            derived = backend_of(x).empty_like(x)
        gate = Gate(
            name,
            slope,
            vectors["weight"],
            given["bias"],
            residual,
            y=dy if name is None else y,
            derived=derived,
            derived_is_new=is_new,
        )
    arguments = {"out": out, "mask": as_mask(mask, x), "batch_size": batch_size, "gate": gate}
    return Backward(dy, x, **vectors, **arguments)


def checked_counts(
    x: Array, mask: Array | None, batch_size: int, *, by_instance: bool
) -> list[int]:
    """The number of valid values of each batch, if there is something to normalize by.

    An empty batch is legal, and so is an instance of which a mask leaves nothing or one value.
    While a graph is captured, a mask has no values that can be counted.
    """
    if mask is not None and not backend_of(x).readable():
        return values_of_batches(x, None, batch_size)
    counts = values_of_batches(x, mask, batch_size)
    if by_instance and mask is not None:
        return counts
    masked = "" if mask is None else " and a mask"
    values = "spatial element" if by_instance else "value per channel"
    samples = _samples_of_instance if by_instance else _samples_of_ghost_batch
    if 1 in counts:
        mend = "evaluation mode by running statistics takes single values"
        if len(counts) > 1 and not by_instance:
            mend = "drop or join it, or choose another size"
        raise ValueError(
            f"Expected more than 1 {values} when training, got input size {x.shape}{masked}"
            f"{samples(counts, 1, batch_size, len(x))}; {mend}"
        )
    if mask is not None and 0 in counts and x.size:
        raise ValueError(
            f"mask leaves no value per channel, expected at least 2 when training, got input size "
            f"{x.shape}{samples(counts, 0, batch_size, len(x))}; leave out a batch of which "
            f"nothing counts"
        )
    return counts


def as_values_count(count: Any, x: Array, mask: Array | None) -> float:
    """The number of values per channel that the sums of a backward are over.

    While a graph is captured, a mask has no values that can be counted.
    """
    number = scalars.as_real(count, "count")
    if not 0.0 <= number < np.inf:
        raise ValueError(f"count must be a number of values, got {number:g}")
    is_known = mask is None or backend_of(x).readable()
    if number == 0.0 and x.size and is_known and (values := values_per_channel(x, mask)):
        raise ValueError(
            f"count must be the number of values per channel of all parts of the batch together, "
            f"of which x alone has {values}, got 0"
        )
    return number


def _samples_of_instance(counts: list[int], count: int, *_: int) -> str:
    """Which is the first sample of so many values, for a message."""
    return f", in which sample {counts.index(count)} is normalized by itself"


def _samples_of_ghost_batch(counts: list[int], count: int, batch_size: int, n: int) -> str:
    """Which samples the first ghost batch of so many values has; nothing if it is all of them."""
    if len(counts) == 1:
        return ""
    batch = counts.index(count)
    which = "the last" if batch == len(counts) - 1 else "a"
    first, last = batch * batch_size, min((batch + 1) * batch_size, n) - 1
    samples = f"is sample {first} alone" if first == last else f"has samples {first} to {last}"
    return f", of which {which} ghost batch, by ghost_batch_size={batch_size}, {samples}"


# Inputs.

NATIVE_FLOATS = frozenset(np.dtype(code) for code in "efd")


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether it is one of the four dtypes, in any byte order."""
    if dtype in NATIVE_FLOATS or dtype.char in "efd":
        return True
    if dtype.name != "bfloat16":
        return False
    _core.know_bfloat16(dtype)  # From now on, the quick path takes it.
    return True


def is_array(value: Any) -> bool:
    """Tell whether it is an array of NumPy's or CuPy's."""
    return isinstance(value, np.ndarray) or is_cupy(value)


def as_array(value: Any, name: str) -> Array:
    """An array-like or DLPack object as an ndarray of one of the four dtypes."""
    if type(value) is np.ndarray and value.dtype in NATIVE_FLOATS:
        return value
    given = value
    if is_cupy(value):
        backend_of(value).check(value, name)
    elif type(value) is not np.ndarray:
        if is_masked(value):
            raise TypeError(mask_is_lost(name))
        if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
            value = from_dlpack(value, name)
        value = as_ndarray(value, name)
    if not is_float(value.dtype):
        got, mend = f"{value.dtype}", ""
        if isinstance(given, list | tuple):
            got = f"a {type(given).__name__} of {value.dtype}"
        elif value.ndim == 0 and value is not given and value.dtype.kind in "OSU":
            got = type(given).__name__
        if value.dtype == bool and name not in ("x", "dy"):
            mend = "; a mask is passed by name: mask=..."
        elif value.dtype.kind in "biu":
            mend = "; convert it, for example by astype(np.float32)"
            if isinstance(given, list | tuple):
                mend = f"; convert it: np.asarray({name}, np.float32)"
        elif value.dtype.kind == "c":
            mend = "; pass its real and imaginary parts"
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {got}{mend}")
    return value  # type: ignore[no-any-return]


def as_ndarray(value: Any, name: str) -> Array:
    """An array-like as an ndarray of any dtype."""
    try:
        return np.asarray(value)
    except ValueError as error:
        if not isinstance(value, list | tuple):
            raise
        mend = ": pad them, and pass mask= for what is not padding" if name in ("x", "dy") else ""
        raise ValueError(
            f"{name} must be an array, or lists that make one, got a {type(value).__name__} whose "
            f"parts have different lengths{mend}"
        ) from error


def as_input(x: Any) -> Array:
    """x as an ndarray of shape (N, C, ...)."""
    x = as_array(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must have the shape (N, C, ...), got {x.shape}")
    return x  # type: ignore[no-any-return]


def as_array_beside(x: Array, value: Any, name: str) -> Array:
    """An array-like as an array of the kind that x is, NumPy's or CuPy's."""
    value = as_array(value, name)
    check_beside(x, value, name)
    return value  # type: ignore[no-any-return]


def check_beside(x: Array, array: Array, name: str) -> None:
    """Refuse an array of another kind than x: NumPy's beside CuPy's."""
    if isinstance(array, np.ndarray) != isinstance(x, np.ndarray):
        kind, other, device = ("CuPy", "NumPy", "cuda") if is_cupy(x) else ("NumPy", "CuPy", "cpu")
        convert = "cupy.asarray" if is_cupy(x) else "cupy.asnumpy"
        raise TypeError(
            f"{name} must be a {kind} array, as x is, got a {other} array: {convert}({name}), or "
            f"to({device!r}) for a layer"
        )


def as_gradient(dy: Any, x: Array) -> Array:
    """dy as an array of x's shape."""
    dy = as_array_beside(x, dy, "dy")
    if dy.shape != x.shape:
        raise ValueError(f"dy must have x's shape {x.shape}, got {dy.shape}")
    return dy  # type: ignore[no-any-return]


def as_array_like(x: Array, value: Any, name: str) -> Array:
    """An array of x's shape and dtype."""
    given, value = value, as_array_beside(x, value, name)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {x.shape}, got {value.shape}")
    if value.dtype.newbyteorder("=") != x.dtype.newbyteorder("="):
        got, mend = f"{value.dtype}", f"{name}.astype(x.dtype)"
        if isinstance(given, list | tuple):
            got, mend = f"a {type(given).__name__} of {got}", f"np.asarray({name}, x.dtype)"
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {got}; convert it: {mend}")
    return value  # type: ignore[no-any-return]


def as_residual(residual: Any, x: Array) -> Array:
    """A residual: an array of x's shape and dtype."""
    return as_array_like(x, residual, "residual")


# Activations and residuals.


def as_epilogue(epilogue: tuple[Any, Any, Any], x: Array) -> Epilogue | None:
    """What follows a normalization of x, or None."""
    activation, negative_slope, residual = epilogue
    name, slope = scalars.as_activation(activation, negative_slope, x.dtype)
    if residual is not None:
        residual = as_residual(residual, x)
    return None if name is None and residual is None else Epilogue(name, slope, residual)


def check_residual_out(
    residual_out: Any, like: Array, dy: Array, x: Array | None, **read: Any
) -> Array | None:
    """Refuse a `residual_out` that cannot hold the gradient, or overlaps what is read."""
    if residual_out is None:
        return None
    target = check_target(residual_out, like, "residual_out")
    if x is not None and share_memory(target, x):
        raise ValueError("residual_out must not overlap x, which is read after it is written")
    check_same_or_apart(target, "residual_out", dy=dy)
    _check_apart(target, "residual_out", read)
    return target  # type: ignore[no-any-return]


def as_vector(value: Any, name: str, c: int, x: Array) -> Array:
    """One value per channel, as an array beside x, of native byte order."""
    if type(value) is type(x) and value.dtype in NATIVE_FLOATS and value.shape == (c,):
        return value
    value = as_array_beside(x, value, name)
    if value.shape != (c,):
        raise ValueError(
            f"{name} must have the shape ({c},), one value per channel of x, got {value.shape}"
        )
    return native(value)


def as_optional_vector(value: Any, name: str, c: int, x: Array) -> Array | None:
    """One value per channel, as an array beside x, or None."""
    return None if value is None else as_vector(value, name, c, x)


def as_vectors(x: Array, **values: Any) -> dict[str, Any]:
    """One value per channel, by name; only weight and bias may be None."""
    c = x.shape[1]
    return {
        name: (as_optional_vector if name in ("weight", "bias") else as_vector)(value, name, c, x)
        for name, value in values.items()
    }


def as_statistics(value: Any, name: str, batch_size: int, x: Array) -> Array:
    """One value per channel or, with a batch size, per batch and channel."""
    c = x.shape[1]
    if not batch_size:
        return as_vector(value, name, c, x)
    value = as_array_beside(x, value, name)
    shape = (batches_of(x, batch_size), c)
    if value.shape != shape:
        raise ValueError(
            f"{name} must have the shape {shape}, one value per batch and channel of x, "
            f"got {value.shape}"
        )
    return native(value)


def native(array: Array) -> Array:
    """An array in native byte order: itself or a copy."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def as_mask(mask: Any, x: Array) -> Array | None:
    """The valid positions of x, as a boolean array of shape (N, 1, ...)."""
    if mask is None:
        return None
    if is_masked(mask):
        raise TypeError(
            "mask is a masked array, whose own mask would be lost: pass mask.filled(False)"
        )
    if is_cupy(mask):
        backend_of(mask).check(mask, "mask")
    else:
        refuse_meta(mask, "mask")
        mask = as_ndarray(mask, "mask")
    check_beside(x, mask, "mask")
    if mask.dtype != bool:
        hint = "compare it, for example mask != 0"
        if mask.dtype.kind in "iu" and x.ndim == 3 and mask.shape == x.shape[:1]:
            positions = f"np.arange({x.shape[2]})"
            hint = f"if these are lengths, pass {positions} < mask[:, np.newaxis, np.newaxis]"
        raise TypeError(f"mask must be boolean, True where x counts, got {mask.dtype}; {hint}")
    shape = (x.shape[0], 1, *x.shape[2:])
    mask = mask.view(np.uint8) != 0  # True may be any byte but 0 in another array's view
    if mask.shape == shape:
        return mask  # type: ignore[no-any-return]
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        hint = ""
        if mask.shape == shape[:1] + shape[2:]:
            hint = "; pass mask[:, np.newaxis]"
        elif mask.shape == (*shape[:1], *shape[2:], 1):
            hint = "; pass np.moveaxis(mask, -1, 1)"
        elif mask.shape in (shape[:1], shape[:2]):
            hint = (
                f"; for whole samples, pass mask.reshape({', '.join(['-1', *'1' * (x.ndim - 1)])})"
            )
        elif mask.shape == x.shape:
            hint = "; it is the same for all channels: pass that of one, mask[:, :1]"
        raise ValueError(
            f"mask must broadcast to the shape {shape}, x's with one channel, "
            f"got {mask.shape}{hint}"
        ) from None


# Arrays that are written to.


def not_an_array(value: Any, name: str) -> str:
    """What is wrong with what is no array and should be written to."""
    if name == "num_batches_tracked" and isinstance(value, int | float | np.number):
        return (
            f"num_batches_tracked must be an ndarray of shape (), got the number {value}, as "
            f"`num_batches_tracked + 1` is one: `num_batches_tracked += 1` changes the array, and "
            f"np.array({value:.0f}) makes one"
        )
    return f"{name} must be an ndarray, got {type(value).__name__}{memory_hint(value, name)}"


def as_running(
    running_mean: Any, running_var: Any, x: Array, *, moves: bool
) -> dict[str, Array | None]:
    """Running statistics, both or none: as vectors or, if they shall move, as they are."""
    running = {"running_mean": running_mean, "running_var": running_var}
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or both be None")
    for name, value in running.items():
        if value is not None:
            vector = as_vector(value, name, x.shape[1], x)
            if moves:
                check_ndarray(value, name, writeable=True)
            else:
                running[name] = vector
    if moves:
        check_running_apart(running_mean, running_var)
    return running


def check_running_apart(running_mean: Array | None, running_var: Array | None) -> None:
    """Refuse to write to running statistics that share memory."""
    if running_mean is None or running_var is None:
        return
    if share_memory(running_mean, running_var):
        raise ValueError(
            "running_mean and running_var share memory, and different values are written to them: "
            "give running_var an array of its own, such as running_var.copy()"
        )


def check_ndarray(value: Any, name: str, *, writeable: bool) -> None:
    """Refuse what cannot be updated in place."""
    if not is_array(value):
        raise TypeError(not_an_array(value, name))
    if writeable and not backend_of(value).writeable(value):
        raise ValueError(f"{name} must be writeable, got a read-only array")


def check_counter(counter: Any, batches: int = 1) -> None:
    """Refuse what cannot count more batches. A value on a GPU is not read: that would wait."""
    check_ndarray(counter, "num_batches_tracked", writeable=True)
    if not is_counter(counter) or not _counts_on(counter, batches):
        raise ValueError(
            f"num_batches_tracked must be a non-negative integer array of shape (), and less than "
            f"the largest of its dtype, got {counter!r}"
        )


def is_counter(counter: Array) -> bool:
    """Tell whether an array is a single integer."""
    return counter.shape == () and counter.dtype.kind in "iu"


def _counts_on(counter: Array, batches: int) -> bool:
    """Tell whether a counter is not negative and its dtype has the number after more batches."""
    if is_cupy(counter):
        return True
    value = int(counter)
    bits = 8 * counter.itemsize - (counter.dtype.kind == "i")
    return value >= 0 and (value + batches).bit_length() <= bits


def check_out(
    out: Any, x: Array, dy: Array | None = None, /, residual: Array | None = None, **vectors: Any
) -> Array | None:
    """Refuse an `out` that cannot hold the result, or whose writing would spoil the reading.

    The vectors are what it must not overlap at all.
    """
    if out is None:
        return None
    out = check_target(out, x, "out")
    check_same_or_apart(out, "out", x=x, dy=dy, residual=residual)
    if vectors:
        _check_apart(out, "out", vectors)
    return out  # type: ignore[no-any-return]


def check_target(out: Any, x: Array, target: str) -> Any:
    """Refuse what cannot hold an array like x; `target` is its name."""
    if type(out) is not np.ndarray or type(x) is not np.ndarray:
        if not is_array(out) or is_masked(out):
            raise TypeError(not_an_array(out, target))
        check_beside(x, out, target)
    if out.shape != x.shape:
        raise ValueError(f"{target} must have x's shape {x.shape}, got {out.shape}")
    dtype = x.dtype if x.dtype.isnative else x.dtype.newbyteorder("=")
    if out.dtype != dtype:
        order = "" if out.dtype.isnative else ", whose byte order is not that of this machine"
        raise TypeError(f"{target} must have x's dtype {dtype}, got {out.dtype}{order}")
    if not backend_of(out).writeable(out):
        raise ValueError(f"{target} must be writeable, got a read-only array")
    if not out.flags.c_contiguous and overlaps_itself(out):
        raise ValueError(f"{target} must have elements of its own, got the strides {out.strides}")
    return out


def check_same_or_apart(out: Array, target: str, **arrays: Array | None) -> None:
    """Refuse an array to be written that overlaps one in part."""
    for name, array in arrays.items():
        if array is not None and share_memory(out, array) and not same_elements(out, array):
            raise ValueError(
                f"{target} must be {name}, or not overlap it; it overlaps {name} in part"
            )


def _check_apart(out: Array, target: str, vectors: dict[str, Array | None]) -> None:
    """Refuse an array to be written that overlaps another one."""
    base = out.base
    owner = out if base is None else base
    known = base is None or getattr(base, "base", base) is None
    for name, vector in vectors.items():
        # Arrays that own their memory have none in common, which is the cheapest proof.
        if vector is None or (known and vector.base is None and vector is not owner):
            continue
        if share_memory(out, vector):
            raise ValueError(f"{target} must not overlap {name}")
