"""Training with torch's ZeroRedundancyOptimizer: exact on any number of processes, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

import ddparity as dp
from tests.gradients.test_sharded import Net, loader_of
from tests.ranks import run_ranks


def _zero_redundancy(path: str, reduction: Any, first: int, last: int) -> Any:
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


@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_a_zero_redundancy_optimizer_trains_alike(reduction: str, tmp_path: Path) -> None:
    rtol = 0.0 if reduction == "strict" else 1e-12
    alone = _zero_redundancy(str(tmp_path / "alone"), reduction, 0, 5)
    for world_size in (1, 2, 3):
        for found in run_ranks(_zero_redundancy, world_size, str(tmp_path / "c"), reduction, 0, 5):
            torch.testing.assert_close(found, alone, rtol=rtol, atol=rtol)
    run_ranks(_zero_redundancy, 3, str(tmp_path / "c"), reduction, 0, 2)
    for found in run_ranks(_zero_redundancy, 2, str(tmp_path / "c"), reduction, 2, 5):
        torch.testing.assert_close(found, alone, rtol=rtol, atol=rtol)
