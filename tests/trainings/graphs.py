"""Unusual graphs: gradients inside of the forward, activations computed again, compiled forwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, seed_by_hand, state, steps_by_hand

X = normal(21, 5)
Y = X[:, :2].sin()
PLAN = plan(21)
DATA = torch.utils.data.TensorDataset(X, Y)


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def _trained(net: nn.Module, model: nn.Module, loss: Loss = _squares) -> State:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                (loss(model, *micro.data) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def _trained_by_hand(net: nn.Module, loss: Loss = _squares) -> State:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, seed in step:
                seed_by_hand(seed)
                (loss(net, X[samples], Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


# --- physics ---


class Field(nn.Module):
    """A function of place and time, with its slopes: derivatives inside of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 6, 1)

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            value = self.net(point)
            (first,) = torch.autograd.grad(value.sum(), point, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 0].sum(), point, create_graph=True)
        return value, first, second[:, 0]


def _heat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The heat equation u_t = u_xx, and the values that were measured."""
    value, first, bend = model(x[:, :2])
    return (first[:, 1] - bend).square().mean() + F.mse_loss(value, y[:, :1])


def physics(replicate: Replicate) -> State:
    net = Field()
    return _trained(net, replicate(net), _heat)


def physics_by_hand() -> State:
    return _trained_by_hand(Field(), _heat)


# --- activation checkpointing ---


class Checkpointed(nn.Module):
    """A convolution, a batch norm and dropout, whose activations are computed again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        conv = nn.Conv1d(1, 3, 2, bias=False)
        self.reentrant = reentrant
        self.first = nn.Linear(5, 5)
        self.block = nn.Sequential(nn.Unflatten(1, (1, 5)), conv, nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2))
        self.last = nn.Linear(12, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant).flatten(1))


def checkpointing(replicate: Replicate) -> State:
    net = Checkpointed(reentrant=False)
    return _trained(net, replicate(net))


def checkpointing_by_hand() -> State:
    return _trained_by_hand(Checkpointed(reentrant=False))


def reentrant_checkpointing(replicate: Replicate) -> State:
    net = Checkpointed(reentrant=True)
    return _trained(net, replicate(net))


def reentrant_checkpointing_by_hand() -> State:
    return _trained_by_hand(Checkpointed(reentrant=True))


# --- torch.compile ---


def compiled_outside(replicate: Replicate) -> State:
    """`torch.compile(replicate(net))`, as torch's notes on DDP advise."""
    net = mlp(5, 6, 2)
    return _trained(net, torch.compile(replicate(net), backend="eager"))


def compiled_inside(replicate: Replicate) -> State:
    net = mlp(5, 6, 2)
    return _trained(net, replicate(torch.compile(net, backend="eager")))


def compiled_by_hand() -> State:
    return _trained_by_hand(mlp(5, 6, 2))
