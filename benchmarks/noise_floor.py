"""Measure the noise that `ddparity verify` tolerates over 300 steps of the digits example, and a fault above it.

Write the plot to docs/verify.png. Write to RESULTS.md how large the differences of correct runs are beside the noise,
for small Tasks and many seeds.

    python benchmarks/noise_floor.py [--steps 300] [--seeds 30]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from ddparity.parity import Comparison
from ddparity.parity.report import draw
from ddparity.parity.verify import FALSE_ALARM, compare_runs
from ddparity.task.curves import pyplot_of_matplotlib
from ddparity.task.task import load_task
from results import machine, table, write_section

ROOT = Path(__file__).parent.parent

DIGITS = load_task(str(ROOT / "examples" / "digits.py"))


def _second() -> bool:
    return dist.is_initialized() and dist.get_rank() == 1


def too_large(model: nn.Module, data: Any) -> torch.Tensor:
    return DIGITS.loss(model, data) * (1.0001 if _second() else 1.0)


def digits(**parts: Any) -> dp.Task:
    names = ("model", "dataset", "loss", "optimizer", "global_batch", "micro_batch", "epochs", "metric")
    return dp.Task(**{**{name: getattr(DIGITS, name) for name in names}, **parts})


class Points(torch.utils.data.Dataset):
    def __init__(self, split: str) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(200, 1, 6, 6, generator=generator)
        self.y = torch.randint(3, (200,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index] + 0.1 * torch.randn(1, 6, 6), self.y[index]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def cross_entropy(model: nn.Module, data: Any) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


SMALL = {"MLP, dropout, Adam": (mlp, adam), "CNN, batch norm, SGD": (cnn, momentum)}


def correct_runs(seeds: int) -> Iterator[tuple[str, list[Comparison]]]:
    for name, (model, optimizer) in SMALL.items():
        parts = {"dataset": Points, "loss": cross_entropy, "global_batch": 32, "micro_batch": 4}
        tasks = [dp.Task(model=model, optimizer=optimizer, seed=seed, **parts) for seed in range(seeds)]
        yield name, [compare_runs(task, (2, 3), steps=30) for task in tasks]


def closest(found: Comparison) -> float:
    """Return the largest ratio of a difference to its tolerance."""
    kinds = [kind for one in found.checked for kind in (one.weights, one.gradient_norm, one.loss, one.buffers)]
    return max(kind.value / kind.tolerance for kind in kinds if kind.tolerance)


def picture(steps: int, path: Path) -> list[str]:
    found = compare_runs(digits(), (2, 4), steps)
    assert found.parity, found.verdict()
    pyplot = pyplot_of_matplotlib()
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    draw(axes, found)
    lines = [f"correct, 2 and 4 processes: {found.verdict()}; closest to the tolerance: {closest(found):.2f} of it"]
    faulty = compare_runs(digits(loss=too_large), (2,), steps, permutations=2)
    (curve,) = [curve for curve in faulty.curves if curve.kind == "processes"]
    axes.plot(
        curve.steps, curve.values, color="tab:orange", marker=".", label="a fault: rank 1's loss 0.01 % too large"
    )
    lines.append(f"rank 1's loss 0.01 % too large: {faulty.divergences[0]}")
    axes.legend(fontsize="x-small", loc="center", bbox_to_anchor=(0.7, 0.42))  # between the curves
    axes.set_title(f"Digits, {steps:,} steps: rounding, and what is more than that")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=15)
    options = parser.parse_args()
    facts = machine("scikit-learn")
    lines = picture(options.steps, ROOT / "docs" / "verify.png")
    rows = []
    for name, found in correct_runs(options.seeds):
        ratios = sorted(closest(one) for one in found)
        rejected = sum(not one.parity for one in found)
        factor = found[0].factor
        noises = (f"{factor * ratios[len(ratios) // 2]:.2f}", f"{factor * ratios[-1]:.2f}")
        rows.append([name, f"{len(found)}", f"{rejected}", f"{factor:.0f}", *noises])
    text = "\n\n".join(
        [
            "## The noise that verify tolerates",
            facts,
            f"`noise_floor.py`: {options.seeds} seeds of correct Tasks, 30 steps, 2 and 3 processes against one, noise "
            f"of 4 permuted runs, a false alarm in {1 / FALSE_ALARM:,.0f} allowed: how many were rejected, the factor "
            f"by which the noise is tolerated, and the largest difference of a run (weights, gradient norm, loss, "
            f"buffers) in units of the noise, as the median and the largest of all seeds.",
            table(["Task", "runs", "rejected", "factor", "median", "largest"], rows),
            f"Digits, {options.steps:,} steps:\n\n" + "\n".join(f"- {line}" for line in lines),
        ]
    )
    print(text)
    write_section("noise_floor", text)


if __name__ == "__main__":
    main()
