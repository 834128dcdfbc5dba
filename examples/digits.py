"""Train a small convolutional network on scikit-learn's handwritten digits, 8 by 8 pixels. The default example."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

import ddparity as dp


class Digits(Dataset):
    """1,797 digits; every fifth is held out. Training images are shifted at random, by up to one pixel."""

    def __init__(self, split: str) -> None:
        digits = load_digits()
        held_out = torch.arange(len(digits.target)) % 5 == 0
        chosen = held_out if split == "test" else ~held_out
        self.images = torch.tensor(digits.images, dtype=torch.float32)[chosen].unsqueeze(1) / 16
        self.targets = torch.tensor(digits.target)[chosen]
        self.shifts = split == "train"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.shifts:
            down, right = torch.randint(-1, 2, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, 1 + down : 9 + down, 1 + right : 9 + right]
        return image, self.targets[index]


def net() -> nn.Module:
    # Smooth functions on purpose. Runs on different numbers of processes add in a different order. If rounding makes a
    # ReLU or a maximum switch sides, their weights diverge.
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 10),
    )


def loss(model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
    images, targets = data
    return F.cross_entropy(model(images), targets, label_smoothing=0.1)


def accuracy(logits: torch.Tensor, dataset: Digits) -> dict[str, float]:
    return {"accuracy": (logits.argmax(1).cpu() == dataset.targets).double().mean().item()}


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    # With the default eps of 1e-8, a gradient that is rounding only moves its weight by a whole step.
    adam = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5)
    adam.register_step_post_hook(decay)
    return adam


def decay(adam: torch.optim.Optimizer, *_: Any) -> None:
    """Lower the learning rate after a step. It is in the optimizer's state, so a checkpoint has it."""
    for group in adam.param_groups:
        group["lr"] *= 0.997


digits = dp.Task(
    model=net,
    dataset=Digits,
    loss=loss,
    optimizer=optimizer,
    global_batch=64,
    micro_batch=8,
    epochs=25,
    metric=accuracy,
)
