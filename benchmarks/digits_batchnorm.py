"""Measure the accuracy on digits with local and with synchronised batch norms, with 2 samples a rank.

python benchmarks/digits_batchnorm.py [--nproc 4] [--epochs 5] [--seeds 3]

It trains a small convolutional network with local and with synchronised statistics. Both have the same data in the same
order, the same initial weights and the same steps. It writes a section of RESULTS.md and docs/sync_batchnorm.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from results import machine, table, write_section

ROOT = Path(__file__).parent.parent
SAMPLES = 2  # samples of a rank in each step


def net() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    # A hidden layer with batch norm, as in projection heads. On one rank its statistics are computed from two values.
    head = [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def train(synchronised: bool, epochs: int, seed: int) -> list[float]:
    """Train on each rank. Return the held-out accuracy after each epoch; zeros on ranks other than 0."""
    sys.path.insert(0, str(ROOT / "examples"))
    from digits import Digits, accuracy

    torch.set_num_threads(1)
    with dp.world(device="cpu") as world:
        train_set, test_set = Digits("train"), Digits("test")
        dp.seed_everything(seed)
        model = net()
        model = dp.replicate(dp.convert_sync_batchnorm(model) if synchronised else model)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
        batch = SAMPLES * world.world_size
        loader = dp.Loader(train_set, dp.BatchPlan(len(train_set), batch, SAMPLES, seed=seed, drop_last=True))
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs * len(loader))
        found = []
        for epoch in range(epochs):
            model.train()
            for step in loader.epoch(epoch):
                for micro in dp.accumulate(model, step):
                    images, targets = micro.data
                    (F.cross_entropy(model(images), targets) * micro.weight).backward()
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
            logits = dp.predict(model, test_set, batch_size=64)
            found.append(accuracy(logits, test_set)["accuracy"] if world.rank == 0 else 0.0)
        return found


def _cell(accuracies: np.ndarray) -> str:
    return f"{accuracies.mean():.1f} ({accuracies.min():.1f} to {accuracies.max():.1f})"


def plot(curves: dict[str, np.ndarray], nproc: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, values), colour in zip(curves.items(), ("tab:orange", "tab:blue"), strict=True):
        epochs = np.arange(1, values.shape[1] + 1)
        axes.plot(epochs, 100 * values.mean(0), marker="o", color=colour, label=name)
        axes.fill_between(epochs, 100 * values.min(0), 100 * values.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xticks(epochs)
    axes.set_xlabel("epoch")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title(f"Digits, {nproc} processes, {SAMPLES} samples a process")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", title=f"batch norm (mean and range of {len(values)} seeds)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    facts = machine("scikit-learn")
    curves = {
        name: np.array(
            [
                dp.launch(train, synchronised, options.epochs, seed, nproc=options.nproc)[0]
                for seed in range(options.seeds)
            ]
        )
        for name, synchronised in (("local", False), ("synchronised", True))
    }
    rows = [[name, *map(_cell, 100 * values.T)] for name, values in curves.items()]
    text = "\n\n".join(
        [
            "## Accuracy at 2 samples a process",
            facts,
            f"`digits_batchnorm.py`, {options.nproc} processes, {SAMPLES} samples a process and step, SGD, held-out "
            f"accuracy in per cent: the mean of {options.seeds} seeds and their range.",
            table(["batch norm", *(f"epoch {number + 1}" for number in range(options.epochs))], rows),
        ]
    )
    print(text)
    write_section("digits_batchnorm", text)
    plot(curves, options.nproc, ROOT / "docs" / "sync_batchnorm.png")


if __name__ == "__main__":
    main()
