"""Train on one image at a time: batch normalization or group normalization?

The network and the data are those of ``digits.py``, and each step of the training sees a single
image. Batch normalization then normalizes by the statistics of that image and evaluates by running
statistics, which are those of no image. Group normalization does the same in both.

The script prints the share of the held-out digits that each of the two networks gets right after
each epoch, on average over some seeds. Its exit status is 0 if group normalization is the better
one in the end.

Run it in the root of the repository, after ``pip install .[examples]``::

    python examples/groups.py
"""

import argparse
import sys

import digits
import numpy as np
from digits import Data, Network, load_data, train

import fastbn

BATCH_SIZE = 1
GROUPS = 4  # of 4 to 16 channels
KINDS = ("batch", "group")

digits.LEARNING_RATE = 0.005


def network_of(kind: str, seed: int) -> Network:
    """The network of the digits, with one of the two normalizations."""
    network = Network(batch_norm=True, seed=seed)
    if kind == "group":
        for block in network.blocks:
            channels = len(block.conv.weight)
            block.norm = fastbn.GroupNorm(GROUPS, channels, activation="relu")
    return network


def run(data: Data, epochs: int, seed: int) -> list[list[float]]:
    """The accuracies of the two networks after each epoch."""
    return [
        train(network_of(kind, seed), data, epochs, BATCH_SIZE, seed, f"{kind} norm").accuracies
        for kind in KINDS
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.epochs < 1 or options.seeds < 1:
        parser.error("--epochs and --seeds take numbers from 1 on")

    data = load_data()
    results = np.array([run(data, options.epochs, seed) for seed in range(options.seeds)])
    print("test accuracy, epoch by epoch:  batch norm  group norm")
    for epoch, (batch, group) in enumerate(results.mean(axis=0).T, 1):
        print(f"{epoch:29}:  {batch:10.2%}  {group:10.2%}")
    batch, group = results.mean(axis=0)[:, -1]
    if group < batch:
        print("group normalization was expected to be the better one", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
