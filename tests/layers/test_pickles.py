"""Pickles of an earlier version load, whatever files the classes have moved to since."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from support import assert_close, output_of, same_bits

FOLDER = Path(__file__).parents[1]
ENTRIES = pickle.loads((FOLDER / "golden" / "pickles.pkl").read_bytes())


def loaded(name):
    """What was pickled, and what is known of it (see golden/make_pickles.py)."""
    if "bfloat16" in name:
        pytest.importorskip("ml_dtypes")
    entry = pickle.loads(ENTRIES[name])
    return pickle.loads(entry["pickle"]), entry


def same(a, b):
    """Whether two values are equal, to the bit and of one type."""
    if isinstance(a, np.ndarray):
        return same_bits(a, b) and isinstance(b, np.ndarray)
    return type(a) is type(b) and a == b


def check(name):
    """Compares what was pickled with what it was."""
    thing, entry = loaded(name)
    assert repr(thing) == entry["repr"]
    values = {key: getattr(thing, key) for key in entry["values"]}
    assert [key for key, value in values.items() if not same(value, entry["values"][key])] == []
    if "y" in entry:  # versions may round differently
        y, expected = thing.eval()(entry["x"]), entry["y"]
        assert y.dtype == expected.dtype
        assert_close(y, expected, 2.0**-8 if y.itemsize == 2 else 2.0**-22)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "SyncBatchNorm"])
def test_values_repr_and_output_are_those_of_the_version_that_pickled(name):
    check(name)


def test_a_synchronized_layer_loads_too(tmp_path):
    # In a process of its own, for MPI begins when it is loaded.
    pytest.importorskip("mpi4py")
    code = f"""
import runpy, sys
sys.path.insert(0, {str(FOLDER)!r})
try:
    from mpi4py import MPI
except (ImportError, RuntimeError):
    print("no MPI")
else:
    runpy.run_path({__file__!r})["check"]("SyncBatchNorm")
"""
    if output_of(code, tmp_path):
        pytest.skip("there is no MPI library")


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.startswith("BatchNorm2d")])
def test_a_layer_that_was_loaded_trains_on(name, rng):
    layer, _ = loaded(name)
    y = layer.train()(rng.standard_normal((4, 3, 2, 5)))
    assert layer.backward(y).shape == y.shape


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.startswith("Lazy")])
def test_a_lazy_layer_that_was_loaded_takes_its_channels_from_an_input(name, rng):
    layer, entry = loaded(name)
    x = rng.standard_normal((4, 3, *[2] * int(name[name.index("d,") - 1])))
    assert layer(x).shape == x.shape
    assert layer.num_features == 3
    assert type(layer).__name__ == entry["repr"].split("(")[0].removeprefix("Lazy")


@pytest.mark.parametrize("name", [name for name in ENTRIES if "forward in training" in name])
def test_what_a_forward_left_for_its_backward_was_not_pickled(name):
    layer, entry = loaded(name)
    with pytest.raises(RuntimeError, match="forward in training mode"):
        layer.backward(entry["x"])
