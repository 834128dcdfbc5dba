"""What is trained changes on the way: fine-tuning in two phases, adapters, distillation from a frozen teacher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, state, steps_by_hand

X = normal(40, 5) * 2 + 1
Y = X[:, :2].sin()
PLAN = plan(40, global_batch=20, micro_batch=4)
DATA = torch.utils.data.TensorDataset(X, Y)


class Pretrained(nn.Module):
    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.backbone = mlp(5, 6, 4, norm=True).requires_grad_(not frozen)
        self.head = mlp(4, 2, seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def two_phases(replicate: Replicate) -> State:
    """First the head alone, then all of it, with a learning rate of its own for the backbone."""
    net = Pretrained(frozen=True)
    model = replicate(net)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)
    for epoch in range(3):
        if epoch == 1:
            net.backbone.requires_grad_(True)
            optimizer.add_param_group({"params": net.backbone.parameters(), "lr": 0.01})
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                (F.mse_loss(model(x), y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def two_phases_by_hand() -> State:
    net = Pretrained(frozen=True)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        if epoch == 1:
            net.backbone.requires_grad_(True)
            optimizer.add_param_group({"params": net.backbone.parameters(), "lr": 0.01})
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, _ in step:
                (F.mse_loss(net(X[samples]), Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


class Adapted(nn.Module):
    """A linear layer that stays as it is, and a trained update of low rank (Hu et al., LoRA, 2021)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features, dtype=layer.weight.dtype) / math.sqrt(2))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2, dtype=layer.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def _adapt(net: nn.Sequential) -> None:
    torch.manual_seed(5)  # the same on every rank
    for number, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            net[number] = Adapted(layer)


def adapters(replicate: Replicate) -> State:
    """Train an epoch, then freeze the layers and add adapters to the replicated model, then train these."""
    net = mlp(5, 6, 2)
    model = replicate(net)
    loader = dp.Loader(DATA, PLAN)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        if epoch == 1:
            _adapt(net)
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                (F.mse_loss(model(x), y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def adapters_by_hand() -> State:
    net = mlp(5, 6, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        if epoch == 1:
            _adapt(net)
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, _ in step:
                (F.mse_loss(net(X[samples]), Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


class Student(nn.Module):
    """Gives its hidden layer, too, and is trained with one exit more than it is used with."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.body = mlp(5, width, 4, norm=True, seed=seed)
        self.exit = mlp(4, 2, seed=seed + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return hidden, self.exit(hidden.tanh())


def _distilled(given: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    hint, soft = (
        F.mse_loss(given[0], wanted[0]),
        F.kl_div(F.log_softmax(given[1] / 2, 1), F.softmax(wanted[1] / 2, 1), reduction="batchmean"),
    )
    return F.mse_loss(given[1], y) + hint + 4 * soft


def _teacher() -> nn.Module:
    teacher = Student(8, seed=5).eval().requires_grad_(False)
    teacher.body[1].running_mean.add_(0.5)
    return teacher


def distillation(replicate: Replicate) -> State:
    """The teacher is a plain module: nothing of it is trained."""
    net, teacher = Student(6, seed=1), _teacher()
    model = replicate(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                with torch.no_grad():
                    wanted = teacher(x)
                (_distilled(model(x), wanted, y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net, teacher=teacher)


def distillation_by_hand() -> State:
    net, teacher = Student(6, seed=1), _teacher()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, _ in step:
                with torch.no_grad():
                    wanted = teacher(X[samples])
                (_distilled(net(X[samples]), wanted, Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net, teacher=teacher)
