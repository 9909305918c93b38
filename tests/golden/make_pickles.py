"""Pickles layers and statistics as this version does, for later versions to load.

    python tests/golden/make_pickles.py

`pickles.pkl` was made by the commit a81b144, on a machine with mpi4py and ml_dtypes. It holds, for
each name, a pickle, what `repr` shows, the arrays, an input, and what evaluation mode makes of it.
A new file is no replacement for an old one, whose pickles must go on loading.
"""

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np

import fastbn

FILE = Path(__file__).parent / "pickles.pkl"
PROTOCOL = 4
SHAPES = {"1d": (4, 3, 5), "2d": (4, 3, 2, 5), "3d": (4, 3, 2, 2, 3)}
ARRAYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
OPTIONS = {
    "of float64": {"eps": 1e-3, "momentum": None, "dtype": np.float64},
    "of bfloat16": {"dtype": ml_dtypes.bfloat16},
    "not affine": {"affine": False},
    "without bias": {"bias": False},
    "untracked": {"track_running_stats": False},
    "with ghost batches": {"ghost_batch_size": 3},
}


def drawn(shape):
    return np.random.default_rng(8).normal(2, 3, shape).astype(np.float32)


def trained(layer, shape):
    """The layer after a step that changes all of its arrays."""
    x = drawn(shape)
    y = layer(x)
    layer.backward(y[::-1])
    for name, added in [("weight", 0.25), ("bias", -0.5)]:
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] += added
    return layer


def things():
    """What is pickled, by name, and the shape of an input for it."""
    for kind, shape in SHAPES.items():
        for family in ["BatchNorm", "InstanceNorm"]:
            name = f"{family}{kind}"
            layer, lazy = getattr(fastbn, name), getattr(fastbn, f"Lazy{name}")
            yield f"{name}, new", layer(3), shape
            yield (
                f"{name}, trained",
                trained(layer(3, affine=True, track_running_stats=True), shape),
                shape,
            )
            yield f"Lazy{name}, new", lazy(momentum=0.3), None
            yield f"Lazy{name}, trained", trained(lazy(), shape), shape
    for name, options in OPTIONS.items():
        layer = trained(fastbn.BatchNorm2d(3, **options), SHAPES["2d"])
        yield f"BatchNorm2d {name}", layer, SHAPES["2d"]
    layer = trained(fastbn.BatchNorm2d(3), SHAPES["2d"])
    layer(drawn(SHAPES["2d"]))
    yield "BatchNorm2d, after a forward in training mode", layer, SHAPES["2d"]
    layer = trained(fastbn.BatchNorm2d(3), SHAPES["2d"]).freeze()
    yield "BatchNorm2d, frozen", layer, SHAPES["2d"]
    layer = trained(fastbn.BatchNorm2d(3), SHAPES["2d"]).eval()
    yield "BatchNorm2d, in evaluation mode", layer, SHAPES["2d"]
    yield "SyncBatchNorm", trained(fastbn.SyncBatchNorm(3), SHAPES["2d"]), SHAPES["2d"]
    yield "Moments", fastbn.Moments.of(drawn(SHAPES["2d"])), None
    yield "Moments, new", fastbn.Moments(), None


def entry(thing, shape):
    """A pickle, and what must hold of what it loads."""
    names = ["count", "mean", "m2"]
    if not isinstance(thing, fastbn.Moments):
        names = [*ARRAYS, "weight_grad", "bias_grad", "training", "frozen", "eps", "momentum"]
        names += ["num_features", "affine", "track_running_stats"]
    result = {
        "pickle": pickle.dumps(thing, PROTOCOL),
        "repr": repr(thing),
        "values": {name: getattr(thing, name) for name in names if hasattr(thing, name)},
    }
    if shape is not None:
        x = drawn(shape)
        result |= {"x": x, "y": thing.eval()(x)}
    return result


def main():
    entries = {name: entry(thing, shape) for name, thing, shape in things()}
    # What a reader without ml_dtypes cannot load lies in a pickle of its own.
    FILE.write_bytes(
        pickle.dumps({name: pickle.dumps(e, PROTOCOL) for name, e in entries.items()}, PROTOCOL)
    )


if __name__ == "__main__":
    main()
