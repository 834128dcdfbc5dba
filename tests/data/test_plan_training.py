"""Trainings with every kind of plan: one process by hand, any number of processes, resumed on another number."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import ddparity as dp
from ddparity.runtime.agreement import Agreement
from tests.data.test_loader import Noise
from tests.data.test_plans import LENGTHS, WEIGHTS, _curriculum, _global_order
from tests.ranks import outcomes, run_ranks

X = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLANS = {
    "weighted": dp.WeightedPlan(WEIGHTS, 16, 5, num_samples=40, seed=4),
    "without replacement": dp.WeightedPlan(WEIGHTS, 10, 3, num_samples=20, replacement=False),
    "curriculum": dp.OrderPlan(_curriculum, 8, 2),
    "order": dp.OrderPlan(_global_order, 12, 4),
    "lengths": dp.LengthPlan(LENGTHS[:40], 120, 4, seed=3),
}
STEPS = 8


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x).squeeze(1) - x[:, 0].sin()).square().mean()


def _weights(net: nn.Module) -> list[float]:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).tolist()


def _train(name: str, folder: str = "", resume: bool = False, stop: int = STEPS, workers: int = 0) -> list[float]:
    net = _net()
    model = dp.replicate(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    loader = dp.Loader(X, PLANS[name], workers)
    states = {"model": model, "optimizer": optimizer, "loader": loader}
    if resume:
        dp.load_checkpoint(f"{folder}/c", **states)
    for step in loader.steps(stop):
        for micro in dp.accumulate(model, step):
            (_loss(model, micro.data) * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loader.steps_done == stop
    if folder and not resume:
        dp.save_checkpoint(f"{folder}/c", **states)
    return _weights(net)


def _by_hand(name: str) -> list[float]:
    """One backward of the mean over a step's samples."""
    net, plan, done = _net(), PLANS[name], 0
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    for epoch in range(STEPS):
        for step in plan.steps(epoch):
            if done == STEPS:
                return _weights(net)
            _loss(net, X[np.concatenate([micro.samples for micro in step])]).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    return _weights(net)


def _train_all(folder: str = "", resume: bool = False, stop: int = STEPS, workers: int = 0) -> dict[str, list[float]]:
    return {name: _train(name, f"{folder}/{name}" if folder else "", resume, stop, workers) for name in PLANS}


def test_they_are_trainings_of_one_process_by_hand_and_resume_elsewhere(tmp_path: Path) -> None:
    for name in PLANS:
        (tmp_path / name).mkdir()
    found = [one for world_size in (1, 2, 3) for one in run_ranks(_train_all, world_size)]
    run_ranks(_train_all, 2, str(tmp_path), False, 5)
    found += run_ranks(_train_all, 3, str(tmp_path), True, STEPS, 1)
    for name in PLANS:
        expected = _by_hand(name)
        for weights in found:
            np.testing.assert_allclose(weights[name], expected, rtol=1e-11)


class Endless:
    """A data set without a length, whose samples are drawn at random: nanoGPT's blocks of a long text."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([torch.tensor([index]), torch.randint(0, 10**6, (2,))])


def _drawn(path: str, first: int, stop: int, resume: bool) -> list:
    loader = dp.Loader(Endless(), dp.WeightedPlan(10**12, 6, 2, num_samples=9, seed=1))
    if resume:
        dp.load_checkpoint(path, loader=loader)
    seen = [(*loader.position, m.index, m.data.tolist()) for step in loader.steps(stop) for m in step]
    dp.save_checkpoint(path, loader=loader)
    assert loader.steps_done == stop
    return seen


def test_sampling_without_end_counts_steps_on_any_number_of_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    alone = run_ranks(_drawn, 1, path, 0, 11, False)[0]
    first = [one for rank in run_ranks(_drawn, 2, path, 0, 4, False) for one in rank]
    second = [one for rank in run_ranks(_drawn, 3, path, 4, 11, True) for one in rank]
    assert sorted(first) + sorted(second) == sorted(alone)
    assert len({tuple(row) for *_, data in alone for row in data}) == sum(len(data) for *_, data in alone)


def test_a_loader_without_a_plan() -> None:
    loader = dp.Loader(Noise(), global_batch=12, micro_batch=3, seed=5)
    assert loader.plan == dp.BatchPlan(40, 12, 3, seed=5)
    assert dp.Loader(Noise(), global_batch=12).plan == dp.BatchPlan(40, 12, 12)
    options = {"shuffle": False, "drop_last": True}
    assert dp.Loader(Noise(), global_batch=12, **options).plan == dp.BatchPlan(40, 12, 12, 0, False, True)
    assert len(loader) == 4
    for epoch in range(2):
        assert [(step.epoch, step.number) for step in loader] == [(epoch, number) for number in range(4)]
    assert loader.position == (2, 0)
    assert loader.steps_done == 8


def test_a_loop_that_ended_early_goes_on_in_its_epoch() -> None:
    loader = dp.Loader(Noise(), global_batch=12, micro_batch=3)
    for step in loader:
        for _ in step:
            pass
        if step.number == 1:
            break
    assert (loader.position, loader.steps_done) == ((0, 2), 2)
    assert [step.number for step in loader] == [2, 3]
    assert [(step.epoch, step.number) for step in loader.steps(6)] == [(1, 0), (1, 1)]
    assert (loader.position, loader.steps_done) == ((1, 2), 6)
    assert list(loader.steps(6)) == []
    assert [step.number for step in loader.epoch(5)] == [0, 1, 2, 3]
    assert (loader.position, loader.steps_done) == ((6, 0), 24)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dp.Loader(range(4)), TypeError, "neither a plan nor a global_batch"),
        (lambda: dp.Loader(range(4), seed=1), TypeError, "neither a plan nor a global_batch"),
        (lambda: dp.Loader(range(4), dp.BatchPlan(4, 2, 1), seed=1), TypeError, "got a plan, and seed"),
        (lambda: dp.Loader(range(4), dp.BatchPlan(4, 2, 1), shuffle=True), TypeError, "got shuffle"),
        (lambda: dp.Loader(range(4), dp.WeightedPlan(5, 2, 1)), ValueError, "4 samples and the plan 5: .*WeightedPlan"),
        (lambda: dp.Loader(Endless(), global_batch=4), TypeError, "Loader got a Endless"),
        (lambda: next(dp.Loader([], global_batch=4).steps(3)), ValueError, "epoch 0 of the plan has no steps"),
    ],
)
def test_what_a_loader_cannot_take_is_named(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def _own_order(epoch: int, generator: torch.Generator) -> list[int]:
    return list(range(torch.distributed.get_rank(), 20))


def _different_orders() -> None:
    model = dp.replicate(nn.Linear(5, 1).double())
    for step in dp.Loader(X, dp.OrderPlan(_own_order, 4, 2)):
        for micro in dp.accumulate(model, step):
            (model(micro.data).mean() * micro.weight).backward()


def test_ranks_whose_orders_differ_are_told_at_the_first_step() -> None:
    for outcome in outcomes(_different_orders, 2):
        assert outcome.error is not None
        assert "the plan's order of the epoch" in outcome.error


def _different_kinds() -> None:
    plans: list[dp.Plan] = [dp.BatchPlan(40, 4, 2), dp.WeightedPlan(40, 4, 2)]
    model = dp.replicate(nn.Linear(5, 1).double())
    for step in dp.Loader(X, plans[torch.distributed.get_rank()]):
        for micro in dp.accumulate(model, step):
            (model(micro.data).mean() * micro.weight).backward()


def test_ranks_whose_plans_are_of_different_kinds_are_told() -> None:
    for outcome in outcomes(_different_kinds, 2):
        assert outcome.error is not None
        assert "the plan's kind" in outcome.error


class Unseeded(dp.Plan):
    """It draws its order when it is made, on each rank its own, and is no dataclass."""

    steps_per_epoch, micro_batches_per_step = 10, 2

    def __init__(self) -> None:
        self.order = np.random.default_rng().permutation(40)

    def sizes(self, epoch: int, step: int) -> list[int]:
        return [2, 2]

    def samples(self, epoch: int, step: int, start: int, stop: int) -> Any:
        return self.order[4 * step + start : 4 * step + stop]


def _unseeded() -> None:
    model = dp.replicate(nn.Linear(5, 1).double())
    for step in dp.Loader(X, Unseeded()):
        for micro in dp.accumulate(model, step):
            (model(micro.data).mean() * micro.weight).backward()


def test_a_plan_of_ones_own_that_differs_is_told_and_refused_after_resumption() -> None:
    for outcome in outcomes(_unseeded, 2):
        assert "the plan's first step of the epoch differs" in (outcome.error or "")
    loader = dp.Loader(X, Unseeded())
    list(loader.steps(2))
    state = loader.state_dict()
    with pytest.raises(ValueError, match="first step of the epoch"):
        dp.Loader(X, Unseeded()).load_state_dict(state)
    del state["plan"]["first step of the epoch"]  # as ddparity 0.2.0
    again = dp.Loader(X, loader.plan)
    again.load_state_dict(state)
    assert again.position == (0, 2)


@pytest.mark.parametrize("stop", [3, 5])
def test_samples_that_are_not_as_many_as_their_sizes_are_refused(stop: int) -> None:
    class Fewer(Unseeded):
        def samples(self, epoch: int, step: int, start: int, stop_: int) -> Any:
            return np.arange(stop)

    with pytest.raises(ValueError, match=rf"Fewer.samples\(1, 7, 0, 4\) gave {stop} samples for 4 places"):
        Fewer().step(1, 7)


def _taken_in_turn(number: int) -> int:
    """How often the ranks have compared, in 2 epochs of loaders that a loop takes in turn."""
    with mock.patch.object(Agreement, "all_same", autospec=True) as compared:
        model = dp.replicate(nn.Linear(5, 1).double())
        made = compared.call_count
        plans = [Arrays(np.arange(40)[::-1][shift:].copy()) for shift in range(0, 4 * number, 4)]
        loaders = [dp.Loader(X, plan) for plan in plans]
        for epoch in range(2):
            for steps in zip(*(loader.epoch(epoch) for loader in loaders), strict=False):
                for step in steps:
                    for micro in dp.accumulate(model, step):
                        (model(micro.data).mean() * micro.weight).backward()
                model.zero_grad()
        return compared.call_count - made


@dataclasses.dataclass(frozen=True)
class Arrays(dp.Plan):
    """Two of them cannot be compared by ==."""

    order: Any
    steps_per_epoch, micro_batches_per_step = 3, 2

    def sizes(self, epoch: int, step: int) -> list[int]:
        return [2, 2]

    def samples(self, epoch: int, step: int, start: int, stop: int) -> Any:
        return self.order[4 * step + start : 4 * step + stop]


def test_ranks_compare_once_an_epoch_of_each_loader() -> None:
    for number in (1, 3):
        assert run_ranks(_taken_in_turn, 2, number) == [2 * number] * 2


def test_steps_that_are_done_where_epochs_differ() -> None:
    loader = dp.Loader(X, dp.OrderPlan(lambda epoch, generator: range(4 * (epoch + 1)), 4, 2))
    next(loader.epoch(3))
    assert loader.steps_done == 1 + 2 + 3
    plans: list[dp.Plan] = [dp.WeightedPlan(40, 8, 4), dp.BatchPlan(40, 8, 4)]
    for plan in plans:
        loader = dp.Loader(X, plan)
        next(loader.epoch(3))
        assert loader.steps_done == 15
    stream = dp.Loader(lambda reader, readers, epoch: range(8), dp.StreamPlan(4, 2))
    list(itertools.islice(stream.epoch(0), 3))
    next(stream.epoch(1))  # its epochs end by themselves, so those that are done count
    assert stream.steps_done == 2
    next(stream.epoch(0))
    assert stream.steps_done == 0


def test_an_order_that_is_another_after_resumption_is_refused() -> None:
    orders = [list(range(20)), list(range(20))]
    loader = dp.Loader(X, dp.OrderPlan(lambda epoch, generator: orders[epoch], 4, 2))
    next(loader.steps(3))
    list(loader.steps(2))
    state = loader.state_dict()
    orders[0].reverse()
    again = dp.Loader(X, dp.OrderPlan(loader.plan.order, 4, 2))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="order of the epoch"):
        again.load_state_dict(state)
