"""Train a ResNet-20 on torchvision's CIFAR-10. It needs the extra `vision`.

Run it with `ddparity train examples/cifar10.py --nproc 2`, or as a script that takes the same options: `python
examples/cifar10.py --nproc 2 --sync-batchnorm`. The data set is in ./data; if not, it is downloaded (170 MB).
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.datasets import CIFAR10

import ddparity as dp
from ddparity.cli import main

DATA = Path("data")

# Crop and flip draw from torch's global random stream. The loader seeds it for each micro-batch, so the images are the
# same on any number of ranks.
PLAIN = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
AUGMENTED = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *PLAIN]


def dataset(split: str) -> CIFAR10:
    """Load a split. The trainer calls this inside `first("node")`: one process of each node downloads the files."""
    transform = transforms.Compose(AUGMENTED if split == "train" else PLAIN)
    try:
        return CIFAR10(DATA, split == "train", transform, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"CIFAR-10 is not in {DATA.resolve()} and its download failed ({error}): extract {CIFAR10.url} there, as "
            f"{CIFAR10.base_folder}"
        ) from error


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet20() -> nn.Module:
    """Return a ResNet-20: three stages of three blocks, He et al., 2015, section 4.2 (https://arxiv.org/abs/1512.03385)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1), Block(outputs, outputs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def loss(model: nn.Module, data: Any) -> torch.Tensor:
    images, targets = data
    return F.cross_entropy(model(images), targets)


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    sgd.register_step_post_hook(decay)
    return sgd


def decay(sgd: torch.optim.Optimizer, *_: Any) -> None:
    """Lower the learning rate, to a tenth in 5,000 steps. It is in the optimizer's state, so a checkpoint has it."""
    for group in sgd.param_groups:
        group["lr"] *= 0.1 ** (1 / 5000)


def accuracy(logits: torch.Tensor, dataset: CIFAR10) -> dict[str, float]:
    return {"accuracy": (logits.argmax(1).cpu() == torch.tensor(dataset.targets)).double().mean().item()}


cifar10 = dp.Task(
    model=resnet20,
    dataset=dataset,
    loss=loss,
    optimizer=optimizer,
    global_batch=128,
    micro_batch=32,
    epochs=30,
    metric=accuracy,
)

if __name__ == "__main__":
    sys.argv[1:1] = ["train", __file__]
    main()
