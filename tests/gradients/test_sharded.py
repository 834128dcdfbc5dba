"""Training models of torch's `fully_shard`: exact on any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

import ddparity as dp
from ddparity.compat import whole_tensor
from tests.ranks import outcomes, run_ranks

DATA = torch.randn(22, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
# Of two ranks, the first plan gives uneven shares; of three, it leaves one without a micro-batch in the last step.
PLANS = {"uneven": dp.BatchPlan(22, 9, 3, seed=0), "even": dp.BatchPlan(18, 18, 3, seed=0)}


class Net(nn.Module):
    """A layer that no input uses, one that some use, a tied weight and a batch norm; no size is even for 2 or 3."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7, bias=False)  # a bias before a batch norm has a gradient of rounding alone
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.second = nn.Linear(7, 7)
        self.some = nn.Parameter(torch.ones(7))
        self.unused = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(7, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(torch.tanh(self.norm(self.first(x))))
        if x[0, 0] > 0.5:
            h = h * self.some
        return self.last(torch.relu(h))


def _sharded(norm: bool = True, **options: Any) -> Net:
    net = Net(norm)
    if dist.is_initialized():
        for layer in (net.first, net.second, net.last):
            fully_shard(layer, **options)
        fully_shard(net, **options)
    return net


def _loader(plan: str) -> dp.Loader:
    return dp.Loader(list(DATA[: PLANS[plan].num_samples]), PLANS[plan])


def _whole(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [*net.state_dict().values(), *(v for s in optimizer.state_dict()["state"].values() for v in s.values())]
    return [whole_tensor(value).detach().clone() for value in state]


def _train(plan: str, epochs: int = 2, **options: Any) -> Any:
    net = _sharded(**options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    norms = []
    for _ in range(epochs):
        for step in _loader(plan).epoch(0):
            for micro in dp.accumulate(net, step):
                (net(micro.data).square().mean() * micro.weight).backward()
            norms.append(float(whole_tensor(nn.utils.clip_grad_norm_(net.parameters(), 0.05))))
            optimizer.step()
            optimizer.zero_grad()
    return _whole(net, optimizer), norms, dp.fingerprint(net)


def _by_hand(plan: str, epochs: int = 2) -> Any:
    """The same in one process without ddparity's loop: micro-batches by hand, batch norms as they run."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    norms = []
    for _ in range(epochs):
        for step in _loader(plan).epoch(0):
            for micro in step:
                (net(micro.data).square().mean() * micro.weight).backward()
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
    return _whole(net, optimizer), norms


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_those_of_one_process(world_size: int, plan: str) -> None:
    expected = _by_hand(plan)
    found = run_ranks(_train, world_size, plan)
    for state, norms, _ in found:
        torch.testing.assert_close((state, norms), expected, rtol=1e-12, atol=1e-12)
    assert len({fingerprint for *_, fingerprint in found}) == 1
