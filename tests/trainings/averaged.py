"""Averages of a model's weights: a BYOL target, a mean teacher, stochastic weight averaging."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, seed_by_hand, state, steps_by_hand

X = normal(40, 5) * 2 + 1
Y = X[:, :2].sin() + normal(40, 2, seed=3) / 10
PLAN = plan(40, global_batch=20, micro_batch=4)


class Byol(nn.Module):
    """Online and target network in one module, so that the batch norms of both belong to the replicated model."""

    def __init__(self) -> None:
        super().__init__()
        self.online = mlp(5, 6, 4, norm=True)
        self.predictor = mlp(4, 6, 4, norm=True, seed=2)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.target(second), self.target(first)
        given = self.predictor(self.online(first)), self.predictor(self.online(second))
        return sum(2 - 2 * F.cosine_similarity(one, other).mean() for one, other in zip(given, wanted, strict=True))

    @torch.no_grad()
    def move_target(self) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, 0.1)


def _view(x: Tensor) -> Tensor:
    return x + torch.randn_like(x) / 10


def byol(replicate: Replicate) -> State:
    net = Byol()
    model = replicate(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(X, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                (model(_view(micro.data), _view(micro.data)) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            net.move_target()
    return state(net=net)


def byol_by_hand() -> State:
    net = Byol()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, seed in step:
                seed_by_hand(seed)
                (net(_view(X[samples]), _view(X[samples])) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
            net.move_target()
    return state(net=net)


def _average(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def _consistency(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher(_view(x))
    given = student(_view(x))
    return F.mse_loss(given, y) + F.mse_loss(given, wanted)


def mean_teacher(replicate: Replicate) -> State:
    """The teacher is torch's AveragedModel of the replicated model, running statistics included."""
    net = mlp(5, 6, 2, norm=True)
    model = replicate(net)
    teacher = _average(model).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(torch.utils.data.TensorDataset(X, Y), PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                (_consistency(model, teacher, x, y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update_parameters(model)
    return state(student=net, **dict(enumerated(teacher)))


def enumerated(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by number: their names depend on the wrapper."""
    return [(f"teacher{number}", value) for number, value in enumerate(module.state_dict().values())]


def mean_teacher_by_hand() -> State:
    net = mlp(5, 6, 2, norm=True)
    teacher = _average(net).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, seed in step:
                seed_by_hand(seed)
                (_consistency(net, teacher, X[samples], Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update_parameters(net)
    return state(student=net, **dict(enumerated(teacher)))


def swa(replicate: Replicate) -> State:
    """Average the weights, then take the batch norms' statistics anew: `update_bn` over all processes."""
    net = mlp(5, 6, 2, norm=True)
    model = replicate(net)
    swa_model = AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(torch.utils.data.TensorDataset(X, Y), PLAN)
    for epoch in range(3):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                (F.mse_loss(model(x), y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch > 0:
            swa_model.update_parameters(net)

    averaged = replicate(swa_model.module)
    norms = [module for module in averaged.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    averaged.train()
    with torch.no_grad():
        for step in loader.epoch(0):
            for micro in dp.accumulate(averaged, step):
                averaged(micro.data[0])
    return state(net=net, swa=swa_model)


def swa_by_hand() -> State:
    net = mlp(5, 6, 2, norm=True)
    swa_model = AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, _ in step:
                (F.mse_loss(net(X[samples]), Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch > 0:
            swa_model.update_parameters(net)
    update_bn([X[samples] for step in steps_by_hand(PLAN, 0) for samples, _, _ in step], swa_model)
    return state(net=net, swa=swa_model)
