"""What the trainings share: data, networks, the order of the samples for a training by hand, and results."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ddparity as dp

Replicate = Callable[..., nn.Module]
State = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plan(samples: int, global_batch: int = 10, micro_batch: int = 2) -> dp.BatchPlan:
    """Steps of 5 micro-batches, in a random order.

    With 21 samples the last step has one micro-batch, so that ranks are left without. A batch norm over samples alone
    needs micro-batches of several: of one there is no variance, and of two the gradient all but vanishes.
    """
    return dp.BatchPlan(samples, global_batch, micro_batch, seed=7)


def steps_by_hand(plan: dp.BatchPlan, epoch: int) -> Iterator[list[tuple[Tensor, float, int]]]:
    """Yield each step of an epoch as its micro-batches: samples, share of the step's samples, seed."""
    for micros in plan.steps(epoch):
        samples = sum(len(micro.samples) for micro in micros)
        yield [(torch.from_numpy(m.samples), len(m.samples) / samples, m.seed) for m in micros]


def seed_by_hand(seed: int) -> None:
    """Set the streams as a micro-batch's are."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mlp(*widths: int, norm: bool = False, seed: int = 1) -> nn.Sequential:
    """Linear layers with tanh between, and with `norm` a batch norm."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        layers += [nn.Linear(before, after, bias=last or not norm)]
        if not last:
            layers += ([nn.BatchNorm1d(after)] if norm else []) + [nn.Tanh()]
    return nn.Sequential(*layers).double()


def state(**parts: Any) -> State:
    """What a training leaves: all parameters and buffers of modules, and tensors."""
    found: State = {}
    for name, part in parts.items():
        values = part.state_dict() if isinstance(part, nn.Module) else {"": part}
        found |= {f"{name} {key}".rstrip(): value.detach().clone() for key, value in values.items()}
    return found
