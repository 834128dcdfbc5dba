"""N processes train as one: the parts of the library together."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from tests.ranks import run_ranks

SAMPLES, GLOBAL_BATCH, MICRO_BATCH, STEPS = 97, 24, 4, 20  # 5 steps an epoch; the last has one sample: one micro-batch


class Augmented(torch.utils.data.Dataset):
    """A data set whose samples draw from each of the three global random streams."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(1, 6, 6, dtype=torch.float64) + random.gauss(0, 1) + np.random.standard_normal()
        return self.x[index] + 0.1 * noise, self.y[index]


def _model() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).double()


def _train(num_workers: int) -> tuple[list[torch.Tensor], list[float]]:
    dp.seed_everything(7)
    model = dp.replicate(_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = dp.Loader(Augmented(), dp.BatchPlan(SAMPLES, GLOBAL_BATCH, MICRO_BATCH, seed=1), num_workers)
    outside = []
    for epoch in range(STEPS // len(loader)):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                (F.cross_entropy(model(x), y) * micro.weight).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            outside.append(torch.rand(()).item() + random.random() + np.random.rand())
    return [parameter.detach() for parameter in model.parameters()], outside


@pytest.fixture(scope="module")
def one_process() -> tuple[list[torch.Tensor], list[float]]:
    return run_ranks(_train, 1, 0)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_n_processes_train_as_one(world_size: int, num_workers: int, one_process) -> None:
    weights, outside = one_process
    for other, drawn in run_ranks(_train, world_size, num_workers):
        for a, b in zip(weights, other, strict=True):
            assert ((a - b).abs().max() / a.abs().max()).item() <= 1e-12
        assert drawn == outside  # between steps, the streams are those of one process, on every rank


def test_the_comparison_can_fail(one_process) -> None:
    """One sample more in one micro-batch makes a difference far above the tolerance of the test above."""
    weights, _ = one_process
    other, _ = run_ranks(_train_with_a_wrong_weight, 2)[0]
    assert max((a - b).abs().max() for a, b in zip(weights, other, strict=True)) > 1e-4


def _train_with_a_wrong_weight() -> tuple[list[torch.Tensor], list[float]]:
    original = dp.BatchPlan.steps

    def wrong(self, epoch, start=0, stop=None, rank=0, world_size=1):
        for step in original(self, epoch, start, stop, rank, world_size):
            if rank == 1 and step:
                step[-1].samples = np.append(step[-1].samples, 0)
            yield step

    dp.BatchPlan.steps = wrong
    return _train(0)
