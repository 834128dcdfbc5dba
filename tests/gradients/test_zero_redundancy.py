"""Training with torch's ZeroRedundancyOptimizer: exact on any number of processes, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

import ddparity as dp
from tests.gradients.test_sharded import Net, loader_of
from tests.ranks import run_ranks


def _both(path: str, first: int, last: int) -> dict[str, list[torch.Tensor]]:
    return {reduction: _zero_redundancy(path + reduction, reduction, first, last) for reduction in ("fast", "strict")}


def _zero_redundancy(path: str, reduction: Any, first: int, last: int) -> list[torch.Tensor]:
    """Parts of the optimizer's state on each rank. Without a group, the optimizer itself."""
    model = dp.replicate(Net(), reduction=reduction)
    if dist.is_initialized():
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    loader = loader_of("uneven")
    if first:
        dp.load_checkpoint(path, model=model, optimizer=optimizer, loader=loader)
    for step in loader.steps(last):
        for micro in dp.accumulate(model, step):
            (model(micro.data).square().mean() * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    dp.save_checkpoint(path, model=model, optimizer=optimizer, loader=loader)
    return [value.clone() for value in model.state_dict().values()]


def test_a_zero_redundancy_optimizer_trains_alike(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    alone = _both(str(tmp_path / "alone"), 0, 5)
    whole = [found for world_size in (1, 2, 3) for found in run_ranks(_both, world_size, path, 0, 5)]
    run_ranks(_both, 3, path, 0, 2)
    for found in (*whole, *run_ranks(_both, 2, path, 2, 5)):
        torch.testing.assert_close(found["fast"], alone["fast"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["strict"], alone["strict"], rtol=0.0, atol=0.0)
