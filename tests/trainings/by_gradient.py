"""Trainings that handle gradients themselves: PCGrad, sharpness-aware minimisation, L-BFGS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, seed_by_hand, state, steps_by_hand

X = normal(21, 5)
Y = torch.stack([X[:, 0].sin(), -X[:, 0].sin() + X[:, 1]], dim=1)  # two tasks that disagree
PLAN = plan(21)
DATA = torch.utils.data.TensorDataset(X, Y)

Gradients = Sequence[Tensor]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(5, 4, 4)
        self.heads = nn.ModuleList([mlp(4, 1, seed=2), mlp(4, 1, seed=3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [head(hidden).squeeze(1) for head in self.heads]


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [F.mse_loss(given, wanted) for given, wanted in zip(model(x), y.unbind(1), strict=True)]


def _surgery(first: Gradients, second: Gradients) -> list[Tensor]:
    """Return the sum of both, each without its part against the other (Yu et al., Gradient Surgery, 2020)."""
    a, b = (torch.cat([one.reshape(-1) for one in gradients]) for gradients in (first, second))
    dot = torch.dot(a, b)
    if dot < 0:
        a, b = a - dot / b.dot(b) * b, b - dot / a.dot(a) * a
    both = (a + b).split([one.numel() for one in first])
    return [part.view_as(one) for part, one in zip(both, first, strict=True)]


def pcgrad(replicate: Replicate) -> State:
    """Project in each micro-batch, and add the results.

    The step is the mean of the micro-batches' projections. It is the same on any number of processes. It is not the
    projection of the whole batch's gradients, since a projection is not linear: see `pcgrad_of_the_batch`.
    """
    net = TwoHeads()
    model = replicate(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                gradients = [
                    torch.autograd.grad(loss * micro.weight, parameters, retain_graph=True, materialize_grads=True)
                    for loss in _losses(model, *micro.data)
                ]
                for parameter, gradient in zip(parameters, _surgery(*gradients), strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def pcgrad_by_hand() -> State:
    net = TwoHeads()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            optimizer.zero_grad(set_to_none=False)
            total = [torch.zeros_like(parameter) for parameter in parameters]
            for samples, share, _ in step:
                gradients = [
                    torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
                    for loss in _losses(net, X[samples], Y[samples])
                ]
                for sum_, gradient in zip(total, _surgery(*gradients), strict=True):
                    sum_ += share * gradient
            for parameter, sum_ in zip(parameters, total, strict=True):
                parameter.grad = sum_
            optimizer.step()
    return state(net=net)


def pcgrad_of_the_batch(replicate: Replicate) -> State:
    """Project the whole batch's gradients: a loop for each task, and the projection after them."""
    net = TwoHeads()
    model = replicate(net, find_unused_parameters=True)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            gradients = []
            for task in range(2):
                for micro in dp.accumulate(model, step):
                    (_losses(model, *micro.data)[task] * micro.weight).backward()
                gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
                optimizer.zero_grad()
            for parameter, gradient in zip(parameters, _surgery(*gradients), strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def pcgrad_of_the_batch_by_hand() -> State:
    """One backward of each task over the whole batch."""
    net = TwoHeads()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            batch = torch.cat([samples for samples, _, _ in step])
            gradients = [
                torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
                for loss in _losses(net, X[batch], Y[batch])
            ]
            for parameter, gradient in zip(parameters, _surgery(*gradients), strict=True):
                parameter.grad = gradient
            optimizer.step()
    return state(net=net)


def _noisy_net() -> nn.Sequential:
    """With dropout, whose mask is to be the same in both passes, and a batch norm that may see a single image."""
    torch.manual_seed(1)
    conv = nn.Conv1d(1, 3, 2, bias=False)
    layers = (nn.Unflatten(1, (1, 5)), conv, nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 2)).double()


@torch.no_grad()
def _climb(parameters: Sequence[nn.Parameter], radius: float = 0.05) -> list[Tensor]:
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()  # type: ignore[union-attr]
    steps = [p.grad * (radius / norm) for p in parameters]  # type: ignore[operator]
    for parameter, step in zip(parameters, steps, strict=True):
        parameter.add_(step)
    return steps


@torch.no_grad()
def _descend(parameters: Sequence[nn.Parameter], steps: Sequence[Tensor]) -> None:
    for parameter, step in zip(parameters, steps, strict=True):
        parameter.sub_(step)


@contextlib.contextmanager
def _still_norms(net: nn.Module) -> Iterator[None]:
    """The second pass must not move the running statistics (davda54/sam, bypass_bn.py)."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def sam(replicate: Replicate) -> State:
    """Two passes over a step; between them all weights move to where the loss is highest nearby."""
    net = _noisy_net()
    model = replicate(net)
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)

    def backward(step: dp.Step) -> None:
        for micro in dp.accumulate(model, step):
            x, y = micro.data
            (F.mse_loss(model(x), y) * micro.weight).backward()

    for epoch in range(2):
        for step in loader.epoch(epoch):
            backward(step)
            moved = _climb(parameters)
            optimizer.zero_grad()
            with _still_norms(net):
                backward(step)
            _descend(parameters, moved)
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def sam_by_hand() -> State:
    net = _noisy_net()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def backward(step: list[tuple[Tensor, float, int]]) -> None:
        for samples, share, seed in step:
            seed_by_hand(seed)
            (F.mse_loss(net(X[samples]), Y[samples]) * share).backward()

    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            backward(step)
            moved = _climb(parameters)
            optimizer.zero_grad()
            with _still_norms(net):
                backward(step)
            _descend(parameters, moved)
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


WHOLE = plan(21, global_batch=21, micro_batch=4)


def _lbfgs(net: nn.Module) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


def lbfgs(replicate: Replicate) -> State:
    """A step is the whole data set, and the optimizer asks for its loss and gradient several times.

    The loss must be the same number on all ranks, since it decides how often the optimizer asks. It is added in the
    order of the micro-batches, so that its bits do not depend on the number of processes.
    """
    net = mlp(5, 4, 2)
    model = replicate(net)
    optimizer = _lbfgs(net)
    loader = dp.Loader(DATA, WHOLE)

    def closure_of(step: dp.Step) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = []
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                loss = F.mse_loss(model(x), y)
                (loss * micro.weight).backward()
                losses.append(loss.detach() * micro.share)
            return dp.gather(torch.stack(losses), to="all").sum()

        return closure

    for epoch in range(2):
        for step in loader.epoch(epoch):
            optimizer.step(closure_of(step))
    return state(net=net)


def lbfgs_by_hand() -> State:
    net = mlp(5, 4, 2)
    optimizer = _lbfgs(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(X), Y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return state(net=net)
