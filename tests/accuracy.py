"""How far results lie from the exact ones, in ulp, beside torch's where that is installed.

``python tests/accuracy.py`` prints the tables that docs/accuracy.md shows, and
``python tests/accuracy.py docs/accuracy.md`` puts them there. Every instruction set that this
machine has is measured in a process of its own.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import reference
import support
from internals import core

import fastbn

LAYOUTS = {"NCHW": support.contiguous, "channels-last": support.channels_last}
# Large, small and odd channels; single elements; a channel of many blocks.
SHAPES = [(32, 3, 28, 28), (5, 3, 7, 7), (64, 17, 1, 1), (2, 2, 200, 201)]
# The larger one is the default; the smaller one leaves small variances their say.
EPS = [1e-5, 1e-12]
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
QUANTITIES = ["mean", "variance", "y", "dx", "dweight", "dbias"]


def normal(mean, std):
    return lambda rng, shape, dtype: mean + std * rng.standard_normal(shape)


def one_outlier(rng, shape, dtype):
    x = rng.standard_normal(shape)
    x[-1, :, -1, 0] = 1e6
    return x


def in_turns(rng, shape, dtype):
    """Two values: all squared deviations are equal, and rounded to the same side."""
    return np.resize([0.1, -0.1], shape)


def subnormal(rng, shape, dtype):
    """Mostly below the smallest normal number of the dtype."""
    smallest = 2.0 ** reference.FORMATS[dtype.name][1]
    return smallest / 4 * rng.standard_normal(shape)


DISTRIBUTIONS = {
    "N(0,1)": normal(0.0, 1.0),
    "N(1e3,1)": normal(1e3, 1.0),
    "N(1e4,0.1²)": normal(1e4, 0.1),
    "N(1e6,1)": normal(1e6, 1.0),
    "N(1,1e-4²)": normal(1.0, 1e-4),
    "one outlier": one_outlier,
    "constant": normal(1e4 / 7, 0.0),
    "N(0,1e30²)": normal(0.0, 1e30),
    "±0.1 in turns": in_turns,
    "subnormal": subnormal,
}


def sample(rng, distribution, shape, dtype, layout=support.contiguous):
    """An array of `dtype`; where that cannot hold a value, it is inf."""
    with np.errstate(over="ignore"):
        x = DISTRIBUTIONS[distribution](rng, shape, np.dtype(dtype)).astype(dtype)
    return layout(x)


def bounds(dtype, distribution=None):
    """The largest errors that are allowed, in the units of `errors`."""
    # 1e-14 is 45 ulp of a number just below a power of two, and 90 of one just above.
    y = {2: 0.51, 4: 4.0, 8: 45.0}[dtype.itemsize]
    statistic = variance = 45.0 if dtype.itemsize == 8 else 1.0
    if distribution == "one outlier" and dtype.itemsize < 8:
        variance = 2.0  # One square is all of it, and nothing averages out the rounding of that.
    return dict(zip(QUANTITIES, [statistic, variance, y, y, statistic, statistic], strict=True))


def parameter_dtype(dtype):
    """The dtype of the layer that takes an input."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def step_of_fastbn(x, dy, weight, bias, eps):
    """Mean, unbiased variance, y, dx, dweight and dbias of one training step."""
    bn = fastbn.BatchNorm2d(x.shape[1], eps=eps, momentum=1.0, dtype=weight.dtype)
    bn.weight[:], bn.bias[:] = weight, bias
    with np.errstate(over="ignore"):
        y = bn(x)
    dx = bn.backward(dy)
    return bn.running_mean, bn.running_var, y, dx, bn.weight_grad, bn.bias_grad


def step_of_torch(x, dy, weight, bias, eps):
    """The same, by torch."""
    import torch

    def tensor(array):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(tensor):
        return tensor.detach().double().numpy()

    bn = torch.nn.BatchNorm2d(x.shape[1], eps=eps, momentum=1.0, dtype=tensor(weight).dtype)
    with torch.no_grad():
        bn.weight[:], bn.bias[:] = tensor(weight), tensor(bias)
    source = tensor(x).requires_grad_()
    y = bn(source)
    y.backward(tensor(dy))
    results = bn.running_mean, bn.running_var, y, source.grad, bn.weight.grad, bn.bias.grad
    return tuple(map(array, results))


def errors(results, x, dy, weight, bias, eps):
    """The largest error of each of `results`, in ulp.

    An ulp is the distance of neighbouring numbers of the result's dtype at the size of: for the
    mean, the larger one of |mean| and the standard deviation; for the variance, itself; for y, the
    largest of |y|, |weight| and |bias|; for dx, the larger one of |dx| and the channel's largest
    |weight invstd dy|; for dweight and dbias, the sums of magnitudes. For float64 it is multiplied
    by 1 + |mean| / std.
    """
    count, mean, var = reference.moments(x)
    std = np.sqrt(var)
    unbiased = var * count / (count - 1)
    y = reference.forward(x, weight, bias, eps)
    wide_dy, axes = reference.wide(dy), reference.channel_axes(x)
    xhat = reference.normalize(x, mean, var, eps=eps)
    scaled = np.abs(wide_dy * reference.scale(var, weight, eps, x.ndim))
    per_channel = [np.abs(reference.over_channels(a, x.ndim)) for a in (weight, bias)]
    exact = mean, unbiased, y, *reference.backward(dy, x, weight, eps)
    sizes = [
        np.maximum(np.abs(mean), std),
        unbiased,
        np.maximum(np.abs(y), np.maximum(*per_channel)),
        np.maximum(np.abs(exact[3]), scaled.max(axis=axes, keepdims=True)),
        np.abs(wide_dy * xhat).sum(axis=axes),
        np.abs(wide_dy).sum(axis=axes),
    ]
    dtypes = [weight.dtype, weight.dtype, x.dtype, x.dtype, weight.dtype, weight.dtype]
    allowed = np.ones_like(mean)
    if x.dtype.itemsize == 8:
        np.divide(np.abs(mean), std, out=allowed, where=std > 0)
        allowed += std > 0
    found = {}
    for name, *of_result in zip(QUANTITIES, results, exact, sizes, dtypes, strict=True):
        found[name] = largest_error(*of_result, allowed)
    return found


def largest_error(result, exact, size, dtype, allowed):
    """The largest error in ulp; an infinity for what is beyond the dtype has none."""
    if exact.ndim > 1:
        allowed = reference.over_channels(allowed, exact.ndim)
    result = reference.wide(result)
    error = np.abs(result - exact) / (reference.ulp(size, dtype) * allowed)
    beyond = np.isinf(result) & (np.abs(exact) > reference.largest(dtype))
    beyond &= (result > 0) == (exact > 0)
    return float(np.max(np.where(beyond, 0, error)))


def measure(step, distribution, dtype, layout, shapes=SHAPES):
    """The largest errors over shapes and eps; None where the dtype cannot hold the data."""
    rng = np.random.default_rng(7)
    worst = dict.fromkeys(QUANTITIES, 0.0)
    for shape in shapes:
        x = sample(rng, distribution, shape, dtype, LAYOUTS[layout])
        if not np.isfinite(x.astype(np.float64)).all():
            return None
        dy = LAYOUTS[layout](support.some(rng, shape, dtype, mean=0.1, std=1.0))
        weight, bias = support.parameters(shape[1], parameter_dtype(dtype))
        for eps in EPS:
            results = step(x, dy, weight, bias, eps)
            for name, error in errors(results, x, dy, weight, bias, eps).items():
                worst[name] = error if np.isnan(error) else max(worst[name], error)
    return worst


def measure_all(step):
    """By dtype, distribution and layout."""
    return {
        name: {
            distribution: {
                layout: measure(step, distribution, support.dtype_of(name), layout)
                for layout in LAYOUTS
            }
            for distribution in DISTRIBUTIONS
        }
        for name in support.DTYPES
    }


def measure_elsewhere(isa):
    """All errors of fastbn, from a process that uses this instruction set."""
    done = subprocess.run(
        [sys.executable, __file__, "--json"],
        env=os.environ | {"FASTBN_ISA": isa},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def shown(error):
    """A number of ulp, as short as it can be."""
    if not error <= 1e9:
        return "> 1e9"
    return f"{error:.2f}" if error < 100 else f"{error:.0e}".replace("e+0", "e")


def cells(ours, theirs):
    """The columns of one row: fastbn's error and, in brackets, torch's."""
    for quantity in QUANTITIES:
        cell = shown(ours[quantity])
        yield cell if theirs is None else f"{cell} ({shown(theirs[quantity])})"


def table(ours, theirs, name):
    """The Markdown table of one dtype."""
    allowed = bounds(support.dtype_of(name))
    yield f"| {name} | layout | " + " | ".join(QUANTITIES) + " |"
    yield "|---|---|" + "---|" * len(QUANTITIES)
    yield "| bound | | " + " | ".join(f"{allowed[q]:g}" for q in QUANTITIES) + " |"
    for distribution in DISTRIBUTIONS:
        for layout in LAYOUTS:
            errors = ours[name][distribution][layout]
            if errors is not None:
                others = theirs and theirs[name][distribution][layout]
                row = " | ".join(cells(errors, others))
                yield f"| {distribution} | {layout} | {row} |"


def cpu():
    """What the system calls this processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.machine()


def report():
    """The tables, with the machine and the versions that they come from."""
    by_isa = {isa: measure_elsewhere(isa) for isa in core.platform()["isas"]}
    first, *others = by_isa.values()
    versions = [f"fastbn {fastbn.__version__}", f"NumPy {np.__version__}"]
    theirs = None
    try:
        import torch

        theirs = measure_all(step_of_torch)
        versions.append(f"in brackets torch {torch.__version__}")
    except ImportError:
        pass
    yield f"Measured on {cpu()}, Python {platform.python_version()}; {', '.join(versions)}."
    if all(other == first for other in others):
        yield f"The figures are the same for {', '.join(by_isa)}."
        by_isa = {None: first}
    for isa, ours in by_isa.items():
        if isa:
            yield f"\n{isa}:"
        for name in support.DTYPES:
            yield ""
            yield from table(ours, theirs, name)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, help="the Markdown page to put the tables in")
    parser.add_argument("--json", action="store_true", help="print all errors of this process")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(measure_all(step_of_fastbn)))
        return
    text = "\n".join(report())
    if options.page is None:
        print(text)
        return
    page = options.page.read_text(encoding="utf-8")
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->"
    before, rest = page.split(begin)
    options.page.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


if __name__ == "__main__":
    main()
