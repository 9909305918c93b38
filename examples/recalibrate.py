"""Evaluate a network that was trained in batches of 4: moving averages or recalibrated statistics?

The network and the data are those of ``digits.py``. It is trained in batches of 4 images, at a
constant learning rate. After each epoch the held-out digits are classified twice: by the running
statistics as training left them, a moving average over the last few batches, and by those that
`fastbn.recalibrate` sets: exact, over the training digits. The bar shows the way through the loop
of the recalibration, which is the user's own.

The script prints the two accuracies after each epoch, on average over some seeds. Its exit status
is 0 if the recalibrated ones are the higher on average.

Run it in the root of the repository, after ``pip install .[examples]``::

    python examples/recalibrate.py
"""

import argparse
import sys

import numpy as np
from digits import SGD, Data, Network, load_data, softmax_cross_entropy
from tqdm import tqdm

import fastbn

BATCH_SIZE = 4
LEARNING_RATE = 0.01


def batches(data: Data, rng: np.random.Generator) -> list[np.ndarray]:
    """The indices of the training images, shuffled; the last batch may be a little larger."""
    return np.array_split(rng.permutation(len(data.train_x)), len(data.train_x) // BATCH_SIZE)


def train_epoch(network: Network, optimizer: SGD, data: Data, rng: np.random.Generator) -> None:
    for batch in batches(data, rng):
        _, gradient = softmax_cross_entropy(network(data.train_x[batch]), data.train_y[batch])
        network.backward(gradient)
        optimizer.step(LEARNING_RATE)


def accuracy(network: Network, data: Data) -> float:
    return float(np.mean(network.predict(data.test_x) == data.test_y))


def recalibrated_accuracy(network: Network, data: Data, rng: np.random.Generator) -> float:
    """The accuracy with exact statistics; the moving averages are put back for the training."""
    states = [norm.state_dict() for norm in network.norms()]
    with fastbn.recalibrate(*network.norms()):
        for batch in tqdm(batches(data, rng), desc="recalibrate", unit="batch", leave=False):
            network(data.train_x[batch])
    result = accuracy(network, data)
    for norm, state in zip(network.norms(), states, strict=True):
        norm.load_state_dict(state)
    return result


def run(data: Data, epochs: int, seed: int) -> list[tuple[float, float]]:
    """The two accuracies after each epoch."""
    network = Network(batch_norm=True, seed=seed)
    optimizer = SGD(network)
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(epochs):
        train_epoch(network, optimizer, data, rng)
        results.append((accuracy(network, data), recalibrated_accuracy(network, data, rng)))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if options.epochs < 1 or options.seeds < 1:
        parser.error("--epochs and --seeds take numbers from 1 on")

    data = load_data()
    results = np.array([run(data, options.epochs, seed) for seed in range(options.seeds)])
    print("test accuracy, epoch by epoch:  moving averages  recalibrated")
    for epoch, (moving, recalibrated) in enumerate(results.mean(axis=0), 1):
        print(f"{epoch:29}:  {moving:15.2%}  {recalibrated:12.2%}")
    moving, recalibrated = results.mean(axis=(0, 1))
    print(f"{'mean':>29}:  {moving:15.2%}  {recalibrated:12.2%}")
    print(f"{'lowest':>29}:  {results[..., 0].min():15.2%}  {results[..., 1].min():12.2%}")
    if recalibrated < moving:
        print("recalibration was expected to help", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
