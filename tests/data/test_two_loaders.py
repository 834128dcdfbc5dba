"""Steps that consume samples of two loaders, labelled and unlabelled. A resumed training is the undisturbed one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ddparity as dp
from ddparity.data.step import LoadedMicroBatch, Step
from tests.ranks import run_ranks

LABELLED = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
UNLABELLED = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
# 3 steps an epoch, all of 3 micro-batches.
WHOLE = dp.BatchPlan(20, 6, 2, seed=1, drop_last=True), dp.BatchPlan(40, 12, 4, seed=2, drop_last=True)
# 4 steps an epoch, the last with 1 micro-batch of 2; 3 steps, the last with 2 micro-batches of 5.
SHORT = dp.BatchPlan(20, 6, 2, seed=1), dp.BatchPlan(40, 15, 5, seed=2)
STEPS = 9


def _endless(loader: dp.Loader) -> Iterator[dp.Step]:
    for epoch in loader.epochs(10**9):
        yield from loader.epoch(epoch)


def _together(model: nn.Module, labelled: dp.Step, unlabelled: dp.Step) -> None:
    for micro, other in zip(dp.accumulate(model, labelled), unlabelled, strict=False):
        loss = model(micro.data).square().mean() + (model(other.data) - 1).square().mean()
        (loss * micro.weight).backward()


def _one_after_the_other(model: nn.Module, labelled: dp.Step, unlabelled: dp.Step) -> None:
    for micro in dp.accumulate(model, labelled):
        (model(micro.data).square().mean() * micro.weight).backward()
    for micro in dp.accumulate(model, unlabelled):
        ((model(micro.data) - 1).square().mean() * micro.weight).backward()


WAYS = {"together": (_together, WHOLE), "one after the other": (_one_after_the_other, SHORT)}


def _train(folder: str, way: str, resumed: int, saved: tuple[int, ...]) -> tuple[list, list]:
    """Train from step `resumed`, and save after some steps. Return the weights, and both positions after each step."""
    train_step, plans = WAYS[way]
    torch.manual_seed(0)
    model = dp.replicate(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loaders = [dp.Loader(list(rows), plan) for rows, plan in zip((LABELLED, UNLABELLED), plans, strict=True)]
    states = {"model": model, "optimizer": optimizer, "labelled": loaders[0], "unlabelled": loaders[1]}
    positions = []
    if resumed:
        dp.load_checkpoint(f"{folder}/{resumed}", **states)
    for number, steps in enumerate(zip(*map(_endless, loaders), strict=True), start=resumed + 1):
        train_step(model, *steps)
        optimizer.step()
        optimizer.zero_grad()
        positions.append([loader.position for loader in loaders])
        if number in saved:
            dp.save_checkpoint(f"{folder}/{number}", **states)
        if number == STEPS:
            break
    return [parameter.tolist() for parameter in model.parameters()], positions


def _undisturbed_positions(way: str) -> list:
    plans = WAYS[way][1]
    each = [[(e, s + 1) for e in range(STEPS) for s in range(plan.steps_per_epoch)][:STEPS] for plan in plans]
    return [list(pair) for pair in zip(*each, strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_resumed_on_any_world_size_it_is_the_undisturbed_training(way: str, tmp_path: Path) -> None:
    positions = _undisturbed_positions(way)
    ((expected, seen_alone),) = run_ranks(_train, 1, str(tmp_path), way, 0, (2,))
    assert seen_alone == positions
    for resumed, world_size, saved in ((0, 3, (6,)), (2, 2, (4,)), (4, 3, ()), (6, 1, ())):
        for weights, seen in run_ranks(_train, world_size, str(tmp_path), way, resumed, saved):
            assert seen == positions[resumed:]
            for ours, theirs in zip(weights, expected, strict=True):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-12, atol=1e-14)


def _pair() -> tuple[dp.Loader, dp.Loader]:
    return dp.Loader(LABELLED, WHOLE[0]), dp.Loader(UNLABELLED, WHOLE[1])


def test_a_loop_without_accumulate_ends_both_steps() -> None:
    one, other = _pair()
    for number, (a, b) in enumerate(zip(one.epoch(0), other.epoch(0), strict=True)):
        for _ in zip(a, b, strict=False):
            assert one.position == other.position == (0, number)
        assert one.position == other.position == (0, number + 1)
    assert one.position == other.position == (1, 0)


def test_a_step_that_was_not_taken_to_its_end_is_not_done() -> None:
    one, other = _pair()
    a, b = next(one.epoch(0)), next(other.epoch(0))
    for _ in zip(dp.accumulate(nn.Linear(3, 1).double(), a), itertools.islice(b, 2), strict=False):
        pass
    assert other.position == (0, 0)
    looked_at = b[0], b[-1]
    list(a)
    assert one.position == (0, 1)
    assert other.position == (0, 0)
    assert len(looked_at[1].data) == 4
    b.end()  # what a script calls that only indexes a step
    assert other.position == (0, 1)


def test_a_step_without_micro_batches_is_done_with_the_other() -> None:
    """A rank may have none in a short step. No loop takes the last of them."""
    one, _ = _pair()
    first, second = itertools.islice(one.epoch(0), 2)
    ended: list[str] = []
    empty = Step(0, 0, 0, lambda: 1 / 0, (3, 0), 7)
    single = Step(0, 0, 1, lambda: LoadedMicroBatch(None, 1.0, 0, 4), (1, 0), 7)
    empty.on_end, single.on_end = (lambda: ended.append("empty")), (lambda: ended.append("single"))
    assert len(empty) == 0 and empty[:] == []
    with pytest.raises(IndexError, match="micro-batch 0 is out of range: the step has 0"):
        empty[0]
    Step(0, 0, 0, lambda: 1 / 0, (3, 0), 7).end()  # nobody asked to be told of its end
    assert ended == ["empty"]
    list(first)
    assert ended == ["empty"]
    single[0]  # looked at, not taken
    list(second)
    assert ended == ["empty"]
    next(iter(single))
    first.end()
    assert ended == ["empty", "single"]


def test_a_share_is_the_weight_where_it_is_not_given() -> None:
    assert LoadedMicroBatch(None, 0.75, 0).share == 0.75
    assert LoadedMicroBatch(None, 0.75, 0, share=0.25).share == 0.25


def test_a_step_that_is_in_the_middle_stays_so_when_another_ends() -> None:
    """A script may train on one loader inside of a loop over a step of another."""
    one, other = _pair()
    a = next(one.epoch(0))
    inner = other.epoch(0)
    for micro in a:
        list(next(inner))
        if micro.index < 2:
            assert one.position == (0, 0)
    assert one.position == (0, 1) and other.position == (0, 3)
