"""What the library computes, and hashes of that to compare between processes and versions.

As a script it prints a line for every case and dtype: a hash, and what it is of. Only public
names are used, so that the same file runs with any version.
"""

import functools
import hashlib
import itertools
import zlib

import numpy as np

import fastbn
from fastbn import functional as F

DTYPES = ["float16", "bfloat16", "float32", "float64"]

# The shape of an array, and whether the channels are last. All but the first three are large
# enough for several threads; those called "streamed" for stores around the cache in float32, where
# the third level is not larger than 12 MB.
PATHS = {
    "tails of rows": ((3, 5, 7, 7), False),
    "tails of a strip": ((2, 67, 3, 5), True),
    "a few columns": ((1, 7, 1, 3), False),
    "groups of short runs": ((32, 590, 7, 7), False),
    "more channels than a page of runs": ((1, 257, 60, 61), False),
    "channels of several blocks": ((8, 5, 151, 153), False),
    "pieces of a channel": ((2, 1, 1000, 517), False),
    "streamed rows": ((15, 40, 60, 59), False),
    "rounds of channels, streamed": ((3, 2, 512, 700), False),
    "folded columns with a rest": ((160_005, 6), False),
    "folded channels-last": ((8, 5, 151, 153), True),
    "folded rows of many channels": ((9, 64, 40, 41), True),
    "a few rows as several blocks": ((3, 256, 7, 21), True),
    "one strip of columns, streamed": ((32, 64, 35, 34), True),
    "strips of short runs": ((38, 6000, 2, 2), False),
    "strips of columns": ((40, 700, 6, 7), True),
    "wide strips of columns": ((24, 1024, 3, 3), True),
    "strips of runs": ((200, 40, 7, 7), False),
    "columns of sums, runs of results": ((150, 24, 9, 9), False),
    "folded runs with a rest": ((1501, 2, 4, 5), False),
    "a narrow last strip": ((513, 200), False),
    "a narrow last strip of short runs": ((515, 40, 1, 5), False),
}


def dtype_of(name):
    """The dtype called `name`."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def arguments(path, dtype):
    """x, dy, weight and bias for a path, the same in every process."""
    shape, last = PATHS[path]
    rng = np.random.default_rng(5)
    if last:
        shape = (shape[0], *shape[2:], shape[1])
    arrays = []
    for mean, std in [(2.0, 3.0), (0.1, 1.0)]:
        a = (std * rng.standard_normal(shape, np.float32) + np.float32(mean)).astype(dtype)
        arrays.append(np.moveaxis(a, -1, 1) if last else a)
    return (*arrays, *rng.standard_normal((2, arrays[0].shape[1])))


def results(x, dy, weight, bias):
    """Everything that can be computed from these, by name."""
    y, mean, invstd = F.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = F.batch_norm_backward(dy, x, weight, mean, invstd)
    _, stats_mean, m2 = F.batch_norm_stats(x)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd)
    gradient = F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, x.size)
    running = np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
    in_place = x.copy(order="K")
    F.batch_norm(in_place, *running, weight, bias, training=True, out=in_place)
    return {
        "y": y,
        "mean": mean,
        "invstd": invstd,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "mean of stats": stats_mean,
        "m2": m2,
        "sum_dy": sums[0],
        "sum_dy_xhat": sums[1],
        "dx of given sums": gradient,
        "eval": F.batch_norm(x, mean, 1 / invstd**2, weight, bias),
        "in place": in_place,
        "running_mean": running[0],
        "running_var": running[1],
    }


def fingerprint(path, name):
    """A hash of all results on a path, for the dtype called `name`."""
    digest = hashlib.sha256()
    for array in results(*arguments(path, dtype_of(name))).values():
        digest.update(array.tobytes())
    return digest.hexdigest()


# Layers, and functions with masks and ghost batches, on smaller arrays.

SHAPES = {
    "1d": [(35, 6), (7, 6, 35)],
    "2d": [(7, 6, 5, 9), (40, 130, 2, 2)],
    "3d": [(5, 6, 3, 4, 5)],
}
LARGE = (9, 6, 61, 63)  # enough for several threads
MANY = (60, 9, 5, 9)  # samples, so that runs are summed in columns
BATCH_NORMS = {kind: getattr(fastbn, f"BatchNorm{kind}") for kind in SHAPES}
INSTANCE_NORMS = {kind: getattr(fastbn, f"InstanceNorm{kind}") for kind in SHAPES}
BATCH_OPTIONS = {
    "defaults": {},
    "momentum None": {"momentum": None},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "untracked": {"track_running_stats": False},
    "ghost batches": {"ghost_batch_size": 3},
    "ghost batches, momentum None": {"ghost_batch_size": 4, "momentum": None},
    "float16 layer": {"dtype": "float16"},
    "float64 layer": {"dtype": "float64"},
}
INSTANCE_OPTIONS = {
    "defaults": {},
    "affine": {"affine": True},
    "tracking": {"track_running_stats": True},
    "float64 layer": {"affine": True, "track_running_stats": True, "dtype": "float64"},
}
MODES = ["training", "frozen", "eval"]
STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def contiguous(a):
    return a.copy()


def channels_last(a):
    return np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1)


def sliced(a):
    buffer = np.zeros([2 * n + 1 for n in a.shape], a.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def reversed_samples(a):
    return a[::-1].copy()[::-1]


LAYOUTS = [contiguous, channels_last, sliced, reversed_samples]


def digest_of(results):
    """A hash of arrays by name: of their values, dtypes, shapes and memory layouts."""
    digest = hashlib.sha256()
    for name, value in results.items():
        array = np.asarray(value) if value is not None else np.zeros(0)
        strides = [s for s, n in zip(array.strides, array.shape, strict=True) if n > 1]
        digest.update(f"{name} {value is None} {array.dtype} {array.shape} {strides}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@functools.cache
def drawn(name, shape, dtype, layout=contiguous):
    """Normally distributed numbers around a mean for each channel; the name seeds them.

    All cases share them, and none overwrites them.
    """
    rng = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode()))
    mean = np.linspace(-2, 3, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    return layout((2 * rng.standard_normal(shape) + mean).astype(dtype))


def mask_for(shape):
    """A mask of shape (N, 1, ...) that leaves two positions of every sample, or most samples."""
    if len(shape) == 2:
        return (np.arange(shape[0]) % 6 != 1)[:, np.newaxis]
    mask = np.random.default_rng(len(shape)).random((shape[0], 1, *shape[2:])) < 0.7
    mask.reshape(shape[0], -1)[:, :2] = True
    return mask


def masks_for(shape):
    """Masks of several shapes that broadcast to (N, 1, ...), by name."""
    full = mask_for(shape)
    return {
        "full": full,
        "of samples": mask_for(shape[:2])[..., np.newaxis, np.newaxis],
        "of positions": full[1:2],
        "of the last axis": full[:1, :, :1],
        "of everything": np.ones((1, 1), bool),
        "sliced": sliced(full),
    }


def set_parameters(layer, lossy):
    """Set weight and bias; `lossy` ones leave outputs that do not determine their inputs."""
    c = layer.num_features
    if layer.weight is not None:
        layer.weight[:] = np.linspace(-1.5, 2.0, c) + 0.1
        layer.weight[1::4] *= not lossy
    if layer.bias is not None:
        layer.bias[:] = np.linspace(1.0, -0.5, c)
        layer.bias[2::4] += 1000 * lossy


def trained(layer, mode, x, dy, way="", layout=contiguous, mask=None):
    """What two steps in a mode give, after a first training step; gradients add up."""
    in_place = "in place" in way
    layer(x)
    if mode == "frozen":
        layer.freeze()
    layer.train(mode != "eval")
    results = {}
    for step in range(2):
        given, gradient = layout(x), layout(dy)
        y = layer(given, out=given if in_place else None, mask=mask)
        results[f"y {step}"] = y.copy(order="K")
        if layer.training:
            results[f"dx {step}"] = layer.backward(gradient, out=gradient if in_place else None)
    return results | {name: getattr(layer, name) for name in [*STATE, "weight_grad", "bias_grad"]}


every = 1  # one of so many cases of layers and activations is computed


def chosen(case, dtype):
    """Whether a case is computed; of each dtype it is others."""
    return zlib.crc32(f"{case} {dtype.name}".encode()) % every == 0


def layer_cases(dtype, layers, options, name):
    """Layers of all options, in all modes, in place and not, masked and not, in all layouts."""
    for kind, option, mode, layout in itertools.product(layers, options, MODES, LAYOUTS):
        for shape in [*SHAPES[kind], *[LARGE] * (kind == "2d" and layout is contiguous)]:
            x, dy = drawn("x", shape, dtype, layout), drawn("dy", shape, dtype, layout)
            for way in WAYS if trains(option, mode, shape, name) else []:
                case = f"{name}{kind} ({option}), {mode}{way}, {layout.__name__} {shape}"
                if not chosen(case, dtype):
                    continue
                layer = layers[kind](shape[1], **options[option])
                set_parameters(layer, lossy="kept" in way)
                mask = mask_for(shape) if "masked" in way else None
                yield case, trained(layer, mode, x, dy, way, layout, mask)


WAYS = ["", ", masked", ", in place", ", in place, masked", ", in place, kept channels"]


def trains(option, mode, shape, name):
    """Whether there is such a mode, and are several values to normalize."""
    tracks = option != "untracked" and (name == "BatchNorm" or option not in ("defaults", "affine"))
    return (tracks or mode != "frozen") and (name == "BatchNorm" or len(shape) > 2)


def unbatched_cases(dtype):
    """InstanceNorm layers with a sample that has no axis of samples."""
    for kind, option, mode in itertools.product(INSTANCE_NORMS, INSTANCE_OPTIONS, MODES):
        shape = SHAPES[kind][-1]
        x, dy = drawn("x", shape, dtype)[0], drawn("dy", shape, dtype, channels_last)[0]
        for way in WAYS if trains(option, mode, shape, "InstanceNorm") else []:
            layer = INSTANCE_NORMS[kind](shape[1], **INSTANCE_OPTIONS[option])
            set_parameters(layer, lossy="kept" in way)
            mask = mask_for(shape)[:1] if "masked" in way else None
            results = trained(layer, mode, x, dy, way, mask=mask)
            yield f"InstanceNorm{kind} ({option}), {mode}{way}, unbatched {shape[1:]}", results


def mixed_cases(dtype):
    """Parameters, statistics and gradients of other dtypes than the input."""
    x, c = drawn("x", (7, 6, 5, 9), dtype), 6
    for other, layout in itertools.product(["float16", "float32", "float64"], LAYOUTS):
        dy = drawn("dy", x.shape, other, layout)
        layer = fastbn.BatchNorm2d(c, dtype=other)
        set_parameters(layer, lossy=False)
        yield f"layer and dy of {other}, {layout.__name__}", trained(layer, "training", x, dy)
        running = np.linspace(-1, 2, 2 * c).astype(other).reshape(2, c)
        vectors = running[1].copy(), running[0].copy()
        results = {"eval": F.batch_norm(x, *running, *vectors)}
        results["training"] = F.batch_norm(x, *running, *vectors, training=True, momentum=0.3)
        results["instances"] = F.instance_norm(x, *running, *vectors, momentum=0.3)
        yield f"statistics of {other}, {layout.__name__}", results | {"running": running}


def everything(x, dy, layout=contiguous, **options):
    """What the functions give that take masks, and ghost batches if any."""
    c = x.shape[1]
    vectors = np.linspace(-1.5, 2, c), np.linspace(1, -0.5, c)
    y, mean, invstd = F.batch_norm_forward(x, *vectors, **options)
    running = np.zeros(c), np.ones(c)
    results = {"y": y, "mean": mean, "invstd": invstd}
    results["training"] = F.batch_norm(x, *running, *vectors, training=True, **options)
    results |= {"running_mean": running[0], "running_var": running[1]}
    gradients = F.batch_norm_backward(dy, x, vectors[0], mean, invstd, **options)
    results |= dict(zip(["dx", "dweight", "dbias"], gradients, strict=True))
    in_place, gradient = layout(x), layout(dy)
    F.batch_norm_backward(gradient, x, vectors[0], mean, invstd, out=gradient, **options)
    F.batch_norm_forward(in_place, *vectors, out=in_place, **options)
    return results | {"y in place": in_place, "dx in place": gradient}


def primitives(x, dy, layout=contiguous, **options):
    """What the functions give that take no ghost batches."""
    c = x.shape[1]
    weight, bias = np.linspace(-1.5, 2, c), np.linspace(1, -0.5, c)
    count, mean, m2 = F.batch_norm_stats(x, **options)
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    sums = F.batch_norm_backward_reduce(dy, x, mean, invstd, **options)
    out, dx, running = dy.copy(), layout(x), np.array([mean, m2 / count])
    F.batch_norm_elemt(x, mean, invstd, weight, out=out, **options)
    F.batch_norm_backward_elemt(dy, x, mean, invstd, None, *sums, count, out=dx, **options)
    return {
        "count": count,
        "mean": mean,
        "m2": m2,
        "sum_dy": sums[0],
        "sum_dy_xhat": sums[1],
        "elemt": F.batch_norm_elemt(x, mean, invstd, weight, bias, **options),
        "elemt out": out,
        "dx": F.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, count, **options),
        "dx out": dx,
        "eval": F.batch_norm(x, *running, weight, bias, **options),
        "by running": F.instance_norm(x, *running, weight, bias, False, **options),
    }


def instances(x, layout=contiguous, **options):
    """What `instance_norm` gives by the statistics of the samples."""
    c = x.shape[1]
    running, vectors = np.array([np.zeros(c), np.ones(c)]), np.linspace(-1.5, 2, 2 * c)
    y = F.instance_norm(x, *running, vectors[:c], vectors[c:], **options)
    in_place = layout(x)
    F.instance_norm(in_place, None, None, vectors[:c], out=in_place, **options)
    return {"y": y, "running": running, "y in place": in_place}


def function_cases(dtype):
    """Functions with masks and ghost batches, the last of which has a remainder."""
    shapes = [*itertools.product([*SHAPES["2d"], LARGE], LAYOUTS), (MANY, contiguous)]
    for shape, layout in shapes:
        x, dy = drawn("x", shape, dtype, layout), drawn("dy", shape, dtype, layout)
        where = f"{layout.__name__} {shape}"
        for size in [1, 2, 4, shape[0]]:
            yield (
                f"ghost batches of {size}, {where}",
                everything(x, dy, layout, ghost_batch_size=size),
            )
        for name, mask in masks_for(shape).items():
            yield f"mask {name}, {where}", everything(x, dy, layout, mask=mask)
            yield f"primitives, mask {name}, {where}", primitives(x, dy, layout, mask=mask)
        for size in [1, 2, 4]:
            results = everything(x, dy, layout, mask=mask_for(shape), ghost_batch_size=size)
            yield f"mask and ghost batches of {size}, {where}", results
        yield f"primitives, {where}", primitives(x, dy, layout)
        yield f"instances, {where}", instances(x, layout)
        yield f"mask and instances, {where}", instances(x, layout, mask=mask_for(shape))
    for shape in [(0, 3, 2, 2), (4, 0, 2, 2), (4, 3, 0, 2)]:
        empty = np.zeros(shape, dtype)
        yield f"nothing {shape}", everything(empty, empty)


def tool_cases(dtype):
    """Moments, folding and recalibration."""
    x, y = drawn("x", (7, 6, 5, 9), dtype), drawn("y", (40, 6, 3), dtype)
    moments = fastbn.Moments.of(x, mask_for(x.shape)) + fastbn.Moments.of(y)
    results = {"count": moments.count, "mean": moments.mean, "m2": moments.m2}
    yield "Moments", results | {"var": moments.var(1), "std": moments.std()}
    layer = fastbn.BatchNorm2d(6)
    set_parameters(layer, lossy=False)
    with fastbn.recalibrate(layer):
        layer(x)
        layer(x[:3])
    yield "recalibrated", {name: getattr(layer, name) for name in STATE}
    weight = np.linspace(-1, 1, 6 * 4 * 9).reshape(6, 4, 3, 3)
    results = dict(zip(["weight", "bias"], fastbn.fold(layer, weight), strict=True))
    yield "folded", results


ACTIVATIONS = {
    "none": {},
    "relu": {"activation": "relu"},
    "relu6": {"activation": "relu6"},
    "leaky_relu": {"activation": "leaky_relu", "negative_slope": 0.2},
    "negative slope": {"activation": "leaky_relu", "negative_slope": -0.3},
}
ACTIVATED = {
    "BatchNorm2d": lambda c, **options: fastbn.BatchNorm2d(c, **options),
    "ghost batches": lambda c, **options: fastbn.BatchNorm2d(c, ghost_batch_size=3, **options),
    "InstanceNorm2d": lambda c, **options: fastbn.InstanceNorm2d(
        c, affine=True, track_running_stats=True, **options
    ),
    "GroupNorm": lambda c, **options: fastbn.GroupNorm(2, c, **options),
}


def activation_cases(dtype):
    """Layers with activations and residuals, in all modes, in place and not, masked and not."""
    kinds = itertools.product(ACTIVATED, ACTIVATIONS, MODES, ["", ", residual"], WAYS[:4])
    for kind, activation, mode, added, way in kinds:
        if mode == "frozen" and kind == "GroupNorm":
            continue
        for shape, layout in itertools.product(SHAPES["2d"], LAYOUTS[:3]):
            where = f"{layout.__name__} {shape}"
            case = f"{kind} ({activation}{added}), {mode}{way}, {where}"
            if not chosen(case, dtype):
                continue
            x, dy = drawn("x", shape, dtype, layout), drawn("dy", shape, dtype, layout)
            residual = drawn("residual", shape, dtype, layout) if added else None
            layer = ACTIVATED[kind](shape[1], **ACTIVATIONS[activation])
            set_parameters(layer, lossy=False)
            mask = mask_for(shape) if "masked" in way else None
            results = activated(layer, mode, x, dy, residual, "in place" in way, layout, mask)
            yield case, results


def activated(layer, mode, x, dy, residual, in_place, layout, mask):
    """What a step in a mode gives, after a first training step."""
    layer(x)
    if mode == "frozen":
        layer.freeze()
    layer.train(mode != "eval")
    given, gradient = layout(x), layout(dy)
    y = layer(given, out=given if in_place else None, mask=mask, residual=residual)
    results = {"y": y.copy(order="K")}
    if layer.training and residual is not None:
        pair = layer.backward(gradient, residual_out=gradient if in_place else None)
        results |= dict(zip(["dx", "dresidual"], pair, strict=True))
    elif layer.training:
        results["dx"] = layer.backward(gradient, out=gradient if in_place else None)
    return results | {name: getattr(layer, name) for name in [*STATE, "weight_grad", "bias_grad"]}


def activation_path_cases(dtype):
    """Functions with activations and residuals, on every path of the kernels."""
    for path in PATHS:
        x, dy, weight, bias = arguments(path, dtype)
        added_ones = ("", None), (", residual", dy)
        for activation, (added, residual) in itertools.product(["relu6", "leaky_relu"], added_ones):
            case, options = f"{path} ({activation}{added})", ACTIVATIONS[activation]
            if not chosen(case, dtype):
                continue
            y, mean, invstd = F.batch_norm_forward(x, weight, bias, residual=residual, **options)
            results = {"y": y, "mean": mean, "invstd": invstd}
            for told in ({"bias": bias, "residual": residual}, {"y": y}):
                gradients = F.batch_norm_backward(dy, x, weight, mean, invstd, **told, **options)
                results |= {f"{list(told)} {i}": a for i, a in enumerate(gradients)}
            yield case, results


def cases(dtype):
    """The names and the results of all cases but the large paths."""
    yield from layer_cases(dtype, BATCH_NORMS, BATCH_OPTIONS, "BatchNorm")
    yield from layer_cases(dtype, INSTANCE_NORMS, INSTANCE_OPTIONS, "InstanceNorm")
    yield from unbatched_cases(dtype)
    yield from mixed_cases(dtype)
    yield from function_cases(dtype)
    yield from tool_cases(dtype)
    if hasattr(fastbn.BatchNorm2d(1), "activation"):  # Earlier versions have none.
        yield from activation_cases(dtype)
        yield from activation_path_cases(dtype)


def main():
    """Print the hashes, for the instruction set and the threads that the environment sets."""
    fastbn.show_config()
    for name in DTYPES:
        try:
            dtype = dtype_of(name)
        except ImportError:
            continue
        for path in PATHS:
            print(fingerprint(path, name), f"{path}, {name}")
        for case, results in cases(dtype):
            print(digest_of(results), f"{case}, {name}")


if __name__ == "__main__":
    main()
