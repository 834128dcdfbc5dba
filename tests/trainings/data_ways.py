"""Where a step's data come from: two loaders, mixed samples, rollouts of the model itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddparity as dp

from .parts import Replicate, State, mlp, normal, plan, seed_by_hand, state, steps_by_hand

X = normal(21, 5)
Y = X[:, :2].sin()
PLAN = plan(21)
DATA = torch.utils.data.TensorDataset(X, Y)

# --- two tasks, each with data of its own ---

# As many steps and micro-batches as the first, in other sizes.
OTHER_X = normal(32, 5, seed=3)
OTHER_Y = (OTHER_X[:, 0] * OTHER_X[:, 1] > 0).long()
OTHER_PLAN = dp.BatchPlan(32, global_batch=15, micro_batch=3, seed=8)
OTHER_DATA = torch.utils.data.TensorDataset(OTHER_X, OTHER_Y)


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(5, 4, 4)
        self.heads = nn.ModuleList([mlp(4, 2, seed=2), mlp(4, 2, seed=3)])

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.trunk(x))


def two_loops(replicate: Replicate) -> State:
    """A loop for each task before one optimizer step. Each task's loss is the mean over its own samples."""
    net = TwoTasks()
    model = replicate(net, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loaders = dp.Loader(DATA, PLAN), dp.Loader(OTHER_DATA, OTHER_PLAN)
    for epoch in range(2):
        for step, other_step in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            for micro in dp.accumulate(model, step):
                x, y = micro.data
                (F.mse_loss(model(x, 0), y) * micro.weight).backward()
            for micro in dp.accumulate(model, other_step):
                x, y = micro.data
                (F.cross_entropy(model(x, 1), y) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def two_loops_by_hand() -> State:
    """One backward of each task's mean over a whole step."""
    net = TwoTasks()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for epoch in range(2):
        for step, other_step in zip(steps_by_hand(PLAN, epoch), steps_by_hand(OTHER_PLAN, epoch), strict=True):
            batch, other = (torch.cat([samples for samples, _, _ in one]) for one in (step, other_step))
            F.mse_loss(net(X[batch], 0), Y[batch]).backward()
            F.cross_entropy(net(OTHER_X[other], 1), OTHER_Y[other]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


# Only whole steps, so that micro-batches of both are the same share of their step, and one weight is right for both.
WHOLE, OTHER_WHOLE = (dataclasses.replace(one, drop_last=True) for one in (PLAN, OTHER_PLAN))


def one_loop(replicate: Replicate) -> State:
    """A micro-batch of each task in one turn of the loop, with one backward."""
    net = TwoTasks()
    model = replicate(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loaders = dp.Loader(DATA, WHOLE), dp.Loader(OTHER_DATA, OTHER_WHOLE)
    for epoch in range(2):
        for step, other_step in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            for micro, other in zip(dp.accumulate(model, step), other_step, strict=True):
                (x, y), (other_x, other_y) = micro.data, other.data
                loss = F.mse_loss(model(x, 0), y) + F.cross_entropy(model(other_x, 1), other_y)
                (loss * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def one_loop_by_hand() -> State:
    """One backward of both means over a whole step."""
    net = TwoTasks()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for epoch in range(2):
        for step, other_step in zip(steps_by_hand(WHOLE, epoch), steps_by_hand(OTHER_WHOLE, epoch), strict=True):
            batch, other = (torch.cat([samples for samples, _, _ in one]) for one in (step, other_step))
            loss = F.mse_loss(net(X[batch], 0), Y[batch]) + F.cross_entropy(net(OTHER_X[other], 1), OTHER_Y[other])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


# --- mixed samples ---


def _mixed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss of samples mixed with others of their micro-batch (Zhang et al., mixup, 2017)."""
    much = float(np.random.beta(0.4, 0.4))
    others = torch.randperm(len(x))
    given = model(much * x + (1 - much) * x[others])
    return much * F.mse_loss(given, y) + (1 - much) * F.mse_loss(given, y[others])


def mixup(replicate: Replicate) -> State:
    net = mlp(5, 6, 2)
    net.insert(1, nn.Dropout(0.2))
    model = replicate(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = dp.Loader(DATA, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(model, step):
                (_mixed(model, *micro.data) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def mixup_by_hand() -> State:
    net = mlp(5, 6, 2)
    net.insert(1, nn.Dropout(0.2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, seed in step:
                seed_by_hand(seed)
                (_mixed(net, X[samples], Y[samples]) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


# --- rollouts ---


class Policy(nn.Module):
    """Scales what it sees by buffers, and gives logits of three actions and the state's value."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((5,), 0.5, dtype=torch.float64))
        self.trunk = mlp(5, 6, 6)
        self.actor, self.critic = mlp(6, 3, seed=2), mlp(6, 1, seed=3)

    def forward(self, x: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        hidden = self.trunk(x * self.scale)
        return torch.distributions.Categorical(logits=self.actor(hidden)), self.critic(hidden).squeeze(-1)


def _moved(x: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The environment: where an action leads, and its reward."""
    return x.roll(1, dims=-1) + (action.unsqueeze(-1) - 1) / 4, -x[..., 0].abs() + action / 10


@torch.no_grad()
def _rollout(policy: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Three moves from each state: states, actions, their log-probabilities, returns."""
    seen, actions, chances, rewards = [], [], [], []
    for _ in range(3):
        choice, _ = policy(x)
        action = choice.sample()
        seen.append(x)
        actions.append(action)
        chances.append(choice.log_prob(action))
        x, reward = _moved(x, action)
        rewards.append(reward)
    _, value = policy(x)
    returns = []
    for reward in reversed(rewards):
        value = reward + 0.9 * value
        returns.insert(0, value)
    return tuple(torch.cat(one) for one in (seen, actions, chances, returns))


def _policy_loss(policy: nn.Module, x: Tensor, action: Tensor, before: Tensor, returns: Tensor) -> Tensor:
    choice, value = policy(x)
    ratio = (choice.log_prob(action) - before).exp()
    gain = returns - value.detach()
    clipped = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    return -clipped.mean() + F.mse_loss(value, returns) - 0.01 * choice.entropy().mean()


def rollouts(replicate: Replicate) -> State:
    """Proximal policy optimization: play with the policy, then two passes over what it saw.

    Outside of the loop the module inside plays: there a replicated model is plain DDP, whose forward may broadcast its
    buffers, and ranks play unequally often. A critic's value is computed with a graph that no backward uses, outside of
    the loop and inside.
    """
    net = Policy()
    policy = replicate(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loader = dp.Loader(X, PLAN)
    seen = []
    for epoch in range(2):
        for step in loader.epoch(epoch):
            played = [_rollout(net, micro.data) for micro in step]
            for _ in range(2):
                for micro in dp.accumulate(policy, played):
                    policy(micro.data[0])[1].mean()  # a metric, with a graph
                    (_policy_loss(policy, *micro.data) * micro.weight).backward()
                optimizer.step()
                optimizer.zero_grad()
            seen.append(policy(X[:2])[1].detach())  # a validation, with a graph
    return state(net=net, values=torch.stack(seen))


def rollouts_by_hand() -> State:
    net = Policy()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    seen = []
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            played = []
            for samples, _, seed in step:
                seed_by_hand(seed)
                played.append(_rollout(net, X[samples]))
            for _ in range(2):
                for (_, share, _), data in zip(step, played, strict=True):
                    (_policy_loss(net, *data) * share).backward()
                optimizer.step()
                optimizer.zero_grad()
            seen.append(net(X[:2])[1].detach())
    return state(net=net, values=torch.stack(seen))


def reinforce(replicate: Replicate) -> State:
    """Play and learn in one loop: the policy plays under no_grad in each micro-batch."""
    net = Policy()
    policy = replicate(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = dp.Loader(X, PLAN)
    for epoch in range(2):
        for step in loader.epoch(epoch):
            for micro in dp.accumulate(policy, step):
                (_policy_loss(policy, *_rollout(policy, micro.data)) * micro.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)


def reinforce_by_hand() -> State:
    net = Policy()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(2):
        for step in steps_by_hand(PLAN, epoch):
            for samples, share, seed in step:
                seed_by_hand(seed)
                (_policy_loss(net, *_rollout(net, X[samples])) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return state(net=net)
