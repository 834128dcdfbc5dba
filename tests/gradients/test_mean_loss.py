"""`backward` is the loop of `accumulate` that a plain training has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ddparity as dp
from tests.ranks import run_ranks

DATA = torch.randn(10, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _loss(model: Any, data: torch.Tensor) -> torch.Tensor:
    return (model(data) - 1).square().mean()


def _weights(data: torch.Tensor) -> torch.Tensor:
    return (data[:, 0] > 0).sum()


def _step(counted: bool) -> tuple[torch.Tensor, float]:
    """Return the gradient and the loss of the short step: 2 samples, in one micro-batch."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    model = dp.replicate(net)
    loader = dp.Loader(list(DATA), global_batch=8, micro_batch=3, seed=0, shuffle=False)
    losses = []
    for step in loader:
        model.zero_grad()
        losses.append(dp.reduce(dp.backward(model, step, _loss, _weights if counted else None)).item())
    return net.weight.grad, losses[1]


def _steps() -> list[tuple[torch.Tensor, float]]:
    return [_step(counted) for counted in (False, True)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_and_loss_are_those_of_one_batch(world_size: int) -> None:
    """Two of three ranks have no micro-batch."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    expected = _loss(net, DATA[8:])
    expected.backward()
    for found in run_ranks(_steps, world_size):
        for gradient, value in found:
            torch.testing.assert_close(gradient, net.weight.grad)
            assert value == pytest.approx(expected.item(), rel=1e-6)


def test_units_weigh_the_parts() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    batches = [torch.full((3, 1), 2.0), torch.zeros(1, 1)]
    part = dp.backward(net, batches, lambda model, x: model(x).mean(), count=lambda x: 4 - len(x))
    assert part.item() == pytest.approx(0.25 * 2)
    assert not part.requires_grad


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda model, x: 1.0, TypeError, "loss gave a float"),
        (lambda model, x: model(x), ValueError, r"loss gave a tensor of shape \(2, 1\)"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dp.backward(nn.Linear(3, 1), [torch.ones(2, 3)], loss)
