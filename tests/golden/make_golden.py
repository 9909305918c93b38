"""Computes the golden files of this folder with torch (made with 2.13.0, CPU, float64).

    python tests/golden/make_golden.py

The tests that read the files need no torch. `cases.npz` holds the list of cases as JSON, the
inputs that all cases of one shape share, and per case one array of each result, a row a step.
Inputs and parameters are float32 numbers, so that a float32 layer starts from the same values.
`trained_state.npz` is the state dict of a layer that torch trained, `trained_eval.npz` an input
and torch's output for it in eval mode.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent

# Parameters and buffers every case starts from; a layer with C channels takes the first C.
START = {
    "weight": [1.5, -0.75, 0.5, 2.0, 1.0],
    "bias": [0.25, -1.0, 0.0, 0.5, 3.0],
    "running_mean": [0.5, -0.25, 1.0, 0.0, 2.0],
    "running_var": [2.0, 0.5, 1.0, 4.0, 0.25],
}


def case(name, layer, shape, script, **kwargs):
    """One layer and what is done with it: a script of train, eval and reset steps."""
    return {"name": name, "layer": layer, "shape": shape, "script": script, "kwargs": kwargs}


def torch_cases():
    """The constructor calls of torch's own tests, and its further cases."""
    names = ["num_features", "eps", "momentum", "affine", "track_running_stats"]
    calls = [
        ("BatchNorm2d", (3,)),
        ("BatchNorm2d_2d_simple_average", (3, 1e-3, None)),
        ("BatchNorm2d_momentum", (3, 1e-3, 0.8)),
        ("BatchNorm2d_not_affine", (3, 1e-3, 0.8, False)),
        ("BatchNorm2d_not_tracking_stats", (3, 1e-3, 0.8, True, False)),
    ]
    for name, call in calls:
        kwargs = dict(zip(names, call, strict=False))
        yield case(name, "BatchNorm2d", (2, 3, 6, 6), ["train", "train", "eval"], **kwargs)
    kwargs = dict(zip(names, (5, 1e-3, 0.3, False), strict=False))
    # Eval, because torch counts an empty training batch in num_batches_tracked.
    yield case("BatchNorm2d_zero_batch", "BatchNorm2d", (0, 5, 2, 2), ["eval"], **kwargs)
    yield case(
        "momentum_none_after_a_reset",
        "BatchNorm2d",
        (2, 3, 2, 3),
        ["train", "train", "train", "reset", "train", "train", "eval"],
        num_features=3,
        momentum=None,
    )


def combinations():
    """All combinations of affine, track_running_stats, momentum and mode."""
    for affine, tracking, momentum, mode in itertools.product(
        [True, False], [True, False], [None, 0.1, 1.0], ["train", "eval"]
    ):
        yield case(
            f"affine={affine}-tracking={tracking}-momentum={momentum}-{mode}",
            "BatchNorm2d",
            (2, 3, 2, 3),
            [mode, mode],
            num_features=3,
            momentum=momentum,
            affine=affine,
            track_running_stats=tracking,
        )


def ranks():
    """The other ranks, and a layer without bias."""
    for name, layer, shape in [
        ("BatchNorm1d_NC", "BatchNorm1d", (5, 3)),
        ("BatchNorm1d_NCL", "BatchNorm1d", (2, 3, 5)),
        ("BatchNorm3d", "BatchNorm3d", (2, 3, 2, 2, 3)),
    ]:
        yield case(name, layer, shape, ["train", "train", "eval"], num_features=3)
    yield case(
        "without_bias", "BatchNorm2d", (2, 3, 2, 3), ["train", "eval"], num_features=3, bias=False
    )


def inputs(shape, rng):
    """x and dy for up to seven steps of one shape; the channels differ in mean and spread."""
    per_channel = (-1,) + (1,) * (len(shape) - 2)
    spread = np.linspace(0.5, 3.0, shape[1]).reshape(per_channel)
    offset = np.linspace(-2.0, 5.0, shape[1]).reshape(per_channel)
    x = offset + spread * rng.standard_normal((7, *shape))
    dy = rng.standard_normal((7, *shape))
    return x.astype(np.float32), dy.astype(np.float32)


def run(spec, x, dy):
    """The results of one case: a dict of lists, one entry a step."""
    layer = getattr(torch.nn, spec["layer"])(**spec["kwargs"], dtype=torch.float64)
    with torch.no_grad():
        for name, values in START.items():
            if getattr(layer, name) is not None:
                start = torch.tensor(values[: layer.num_features], dtype=torch.float64)
                getattr(layer, name).copy_(start)
    results = {}
    steps = [step for step in spec["script"] if step != "reset"]
    data = iter(range(len(steps)))
    for step in spec["script"]:
        if step == "reset":
            layer.reset_running_stats()
            continue
        i = next(data)
        layer.train(step == "train").zero_grad()
        tensor = torch.from_numpy(x[i].astype(np.float64)).requires_grad_()
        y = layer(tensor)
        y.backward(torch.from_numpy(dy[i].astype(np.float64)))
        found = {
            "y": y,
            "dx": tensor.grad,
            "weight_grad": None if layer.weight is None else layer.weight.grad,
            "bias_grad": None if layer.bias is None else layer.bias.grad,
            "running_mean": layer.running_mean,
            "running_var": layer.running_var,
            "num_batches_tracked": layer.num_batches_tracked,
        }
        for name, value in found.items():
            if value is not None:
                results.setdefault(name, []).append(value.detach().numpy().copy())
    return results


def write_cases():
    rng = np.random.default_rng(7)
    cases = [*torch_cases(), *combinations(), *ranks()]
    shared = {}
    for spec in cases:
        if spec["shape"] not in shared:
            shared[spec["shape"]] = inputs(spec["shape"], rng)
    arrays = {f"start.{name}": np.array(values) for name, values in START.items()}
    steps = {}
    for spec in cases:
        used = sum(step != "reset" for step in spec["script"])
        steps[spec["shape"]] = max(used, steps.get(spec["shape"], 0))
    for shape, (x, dy) in shared.items():
        label = "x".join(map(str, shape))
        arrays[f"x.{label}"], arrays[f"dy.{label}"] = x[: steps[shape]], dy[: steps[shape]]
    for spec in cases:
        for name, values in run(spec, *shared[spec["shape"]]).items():
            arrays[f"{spec['name']}.{name}"] = np.stack(values)
    np.savez_compressed(FOLDER / "cases.npz", cases=np.array(json.dumps(cases)), **arrays)


def write_trained():
    torch.manual_seed(7)
    layer = torch.nn.BatchNorm2d(4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(20):
        x = 3 * torch.randn(8, 4, 5, 5) + torch.arange(4.0).reshape(4, 1, 1)
        loss = (layer(x) - torch.tanh(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.savez(
        FOLDER / "trained_state.npz",
        **{k: v.detach().numpy() for k, v in layer.state_dict().items()},
    )
    x = torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        y = layer.eval()(x)
    np.savez(FOLDER / "trained_eval.npz", x=x.numpy(), y=y.numpy())


if __name__ == "__main__":
    write_cases()
    write_trained()
