"""Against results that torch computed once (see golden/make_golden.py); needs no torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import support

import fastbn

pytestmark = pytest.mark.isa

FOLDER = Path(__file__).parents[1] / "golden"


def load(name):
    with np.load(FOLDER / name) as file:
        return {key: file[key] for key in file.files}


GOLDEN = load("cases.npz")
CASES = json.loads(str(GOLDEN["cases"]))
ARRAYS = ["weight", "bias", "running_mean", "running_var"]


def start(layer, channels):
    for name in ARRAYS:
        if getattr(layer, name) is not None:
            getattr(layer, name)[:] = GOLDEN[f"start.{name}"][:channels]


def frozen_step(bn, x, dy):
    """What torch's backward in eval mode gives: the running statistics are constants."""
    bn.train().freeze()
    y = bn(x)
    dx = bn.backward(dy)
    bn.unfreeze()
    return y, dx


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("spec", CASES, ids=[spec["name"] for spec in CASES])
def test_agrees_with_torch(spec, dtype, relative):
    bn = getattr(fastbn, spec["layer"])(**spec["kwargs"], dtype=dtype)
    start(bn, bn.num_features)
    label = "x".join(map(str, spec["shape"]))
    data = zip(GOLDEN[f"x.{label}"].astype(dtype), GOLDEN[f"dy.{label}"].astype(dtype), strict=True)
    row = 0
    for step in spec["script"]:
        if step == "reset":
            bn.reset_running_stats()
            continue
        x, dy = next(data)
        found = {}
        bn.zero_grad()
        if step == "train":
            found["y"] = bn.train()(x)
            found["dx"] = bn.backward(dy)
        else:
            found["y"] = bn.eval()(x)
            if bn.running_mean is not None:
                frozen_y, found["dx"] = frozen_step(bn, x, dy)
                assert support.same_bits(frozen_y, found["y"])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            found[name] = getattr(bn, name)
        if "dx" in found:
            found |= {"weight_grad": bn.weight_grad, "bias_grad": bn.bias_grad}
        for name, value in found.items():
            key = f"{spec['name']}.{name}"
            assert (value is None) == (key not in GOLDEN)
            if value is not None:
                support.assert_close(value, GOLDEN[key][row], relative)
        row += 1


@pytest.mark.parametrize("layer", [lambda: fastbn.BatchNorm2d(4), fastbn.LazyBatchNorm2d])
def test_a_state_dict_that_torch_trained_gives_torchs_output(layer):
    bn = layer()
    bn.load_state_dict(load("trained_state.npz"))
    data = load("trained_eval.npz")
    support.assert_close(bn.eval()(data["x"]), data["y"], 1e-5)
    assert bn.num_batches_tracked == 20
