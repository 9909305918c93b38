"""Normalize two real photographs in place.

The two photographs that come with scikit-learn, 427x640 pixels in three colours, become one batch
of float32. A picture keeps the colours of a pixel side by side, (N, H, W, C); a transpose, which
moves no data, shows the same memory as the (N, C, H, W) that batch normalization takes.

The script prints what it did. Its exit status is 0 if the result lies where the photographs lay,
and every colour has a mean of 0 and a standard deviation of 1.

Run it in the root of the repository, after ``pip install .[examples]``::

    python examples/photos.py
"""

import statistics
import sys
import time

import numpy as np
from sklearn.datasets import load_sample_images

import fastbn

COLOURS = ("red", "green", "blue")
TOLERANCE = 1e-6


def mean_and_std(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The statistics of each channel of (N, C, H, W), summed up in float64."""
    axes = (0, 2, 3)
    return x.mean(axis=axes, dtype=np.float64), x.std(axis=axes, dtype=np.float64)


def print_table(title: str, means: np.ndarray, stds: np.ndarray) -> None:
    print(title)
    for colour, mean, std in zip(COLOURS, means, stds, strict=True):
        print(f"  {colour:5}  mean {mean:13.8f}  std {std:12.8f}")


def milliseconds_per_pass(x: np.ndarray, passes: int = 20) -> float:
    """The median over some passes in place, each of which overwrites the result of the last."""
    norm = fastbn.BatchNorm2d(len(COLOURS), affine=False)
    durations = []
    for _ in range(passes):
        start = time.perf_counter()
        norm(x, out=x)
        durations.append(time.perf_counter() - start)
    return 1e3 * statistics.median(durations)


def main() -> int:
    photos = np.stack(load_sample_images().images).astype(np.float32)
    x = photos.transpose(0, 3, 1, 2)
    print(f"{len(x)} photographs as a batch of shape {x.shape}, {x.nbytes / 1e6:.1f} MB")
    print_table("before", *mean_and_std(x))

    # Without weight and bias: the result has mean 0 and standard deviation 1. With momentum=None,
    # the running statistics are the average over all batches so far: here, those of this one (the
    # standard deviation a trifle above that of the pixels, because its variance is unbiased).
    norm = fastbn.BatchNorm2d(len(COLOURS), affine=False, momentum=None)
    y = norm(x, out=x)

    mean, std = mean_and_std(x)
    print_table("after", mean, std)
    print_table("running statistics", norm.running_mean, np.sqrt(norm.running_var))
    print(f"address: {photos.ctypes.data:#x} before, {y.ctypes.data:#x} after")
    print(f"time: {milliseconds_per_pass(x):.2f} ms per pass, {fastbn.get_num_threads()} threads")

    if y.ctypes.data != photos.ctypes.data:
        print("the result lies elsewhere in memory", file=sys.stderr)
        return 1
    if np.abs(mean).max() > TOLERANCE or np.abs(std - 1).max() > TOLERANCE:
        print(f"mean and std are not within {TOLERANCE} of 0 and 1", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
