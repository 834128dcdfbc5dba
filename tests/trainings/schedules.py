"""Schedulers by step and by sample, dataclasses as outputs, evaluation every some steps, an early stop of all."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, seed_by_hand, state, steps_by_hand

X = normal(22, 5)
Y = X[:, :2].sin()
HELD_OUT = normal(7, 5, seed=5)
PLAN = plan(22)  # a last step of one micro-batch
EPOCHS, LAST_STEP, EVERY = 4, 8, 3


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Net(nn.Module):
    """A model whose output is a dataclass that has the loss, as those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(5, 6, 2, norm=True)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        logits = self.dropout(self.inner(x))
        return Output(None if y is None else F.mse_loss(logits, y), logits)


def _optimizer(net: nn.Module) -> tuple[torch.optim.Optimizer, list[torch.optim.lr_scheduler.LRScheduler]]:
    """By step: a warm-up. By sample: a decay that a short step advances less."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    by_step = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return optimizer, [by_step]


def _decay(samples: int) -> float:
    return 0.98**samples


# Losses are added in rank order, so their last bits depend on the number of ranks.


def by_step_and_sample(replicate: Replicate) -> State:
    net = Net()
    model = replicate(net)
    optimizer, (by_step,) = _optimizer(net)
    loader = dp.Loader(torch.utils.data.TensorDataset(X, Y), PLAN)
    assert len(loader) == 3
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    samples, seen, losses, stop = 0, [], [], False
    while loader.position[0] < EPOCHS and not stop:
        for step in loader:  # the rest of the epoch
            loss = torch.zeros((), dtype=torch.float64)
            for micro in dp.accumulate(model, step):
                output = model(*micro.data)
                (output.loss * micro.weight).backward()
                loss += output.loss.detach() * micro.share
            for group in optimizer.param_groups:
                group["lr"] = by_step.get_last_lr()[0] * _decay(samples)
            optimizer.step()
            optimizer.zero_grad()
            by_step.step()
            samples += sum(PLAN.sizes(step.epoch, step.number))
            losses.append(dp.reduce(loss, "sum"))
            if loader.steps_done % EVERY == 0:
                seen.append(dp.predict(model, HELD_OUT, batch_size=2, to="all").logits)
            # One rank alone wants to stop; all do, after the same step.
            stop = dp.reduce(rank == world_size - 1 and loader.steps_done == LAST_STEP, "max")
            if stop:
                break
    return state(net=net, losses=torch.stack(losses).round(decimals=9), evaluated=torch.stack(seen))


def by_step_and_sample_by_hand() -> State:
    net = Net()
    optimizer, (by_step,) = _optimizer(net)
    samples, done, seen, losses = 0, 0, [], []
    for epoch in range(EPOCHS):
        for step in steps_by_hand(PLAN, epoch):
            if done == LAST_STEP:
                continue
            loss = torch.zeros((), dtype=torch.float64)
            for rows, share, seed in step:
                seed_by_hand(seed)
                output = net(X[rows], Y[rows])
                (output.loss * share).backward()
                loss += output.loss.detach() * share
            for group in optimizer.param_groups:
                group["lr"] = by_step.get_last_lr()[0] * _decay(samples)
            optimizer.step()
            optimizer.zero_grad()
            by_step.step()
            samples += sum(len(rows) for rows, *_ in step)
            losses.append(loss)
            done += 1
            if done % EVERY == 0:
                net.eval()
                with torch.no_grad():
                    seen.append(torch.cat([net(batch).logits for batch in HELD_OUT.split(2)]))
                net.train()
    return state(net=net, losses=torch.stack(losses).round(decimals=9), evaluated=torch.stack(seen))
