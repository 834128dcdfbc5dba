"""Rechecks find the rank that computes wrong numbers, change nothing else, and do not cry wolf."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.gradients import recheck
from ddparity.gradients.verdict import verdict
from tests.gradients.faults import EVERY, FAULTS, Fault, Net, flip, healthy, loader, recheck_of, silent, train
from tests.ranks import run_ranks


def _finds(faults: list[Fault], reduction: str) -> list[Any]:
    silent()
    return [train(fault, reduction) for fault in faults]


@pytest.mark.parametrize(("world_size", "reduction"), [(3, "fast"), (3, "strict"), (4, "fast")])
def test_a_wrong_rank_is_named_within_as_many_steps_as_asked(world_size: int, reduction: str) -> None:
    faults = FAULTS if world_size == 3 else FAULTS[::3]  # other pairs of ranks
    for found in run_ranks(_finds, world_size, faults, reduction):
        for fault, one in zip(faults, found, strict=True):
            assert one["step"] is not None and fault.step <= one["step"] <= fault.step + EVERY, (fault, one)
            assert one["rank"] == fault.rank and one["record"]["ranks"] == [fault.rank], (fault, one)
            assert f"rank {fault.rank} computes wrong numbers, on {one['record']['host']}" in one["error"], one["error"]
            if fault.what != "weight":
                assert not one["taken"], fault


def _with_and_without() -> dict[str, list[Any]]:
    return {
        reduction: [train(None, reduction, steps=10, every=every) for every in (EVERY, None)]
        for reduction in ("fast", "strict")
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rechecks_change_nothing(world_size: int) -> None:
    """Weights, buffers, the loader's order, random streams and logged losses are as without."""
    ranks = run_ranks(_with_and_without, world_size)
    for reduction in ("fast", "strict"):
        for with_, without in (found[reduction] for found in ranks):
            seen = [index for index, recheck in with_.pop("seen") if not recheck]
            assert seen == [index for index, _ in without.pop("seen")]
            assert with_ == without
        assert sum(found[reduction][0]["shares"] for found in ranks) == pytest.approx(10)


def _between_epochs() -> Any:
    """Flip a bit of a weight after the last step of an epoch, long before the next recheck."""
    silent()
    model = dp.replicate(nn.Linear(6, 1), recheck_every=1000)
    data = loader(dist.get_world_size(), steps=2)
    for epoch in range(2):
        for step in data.epoch(epoch):
            try:
                for micro in dp.accumulate(model, step):
                    (model(micro.data).square().mean() * micro.weight).backward()
            except dp.WrongArithmetic as error:
                return epoch, step.number, error.ranks, error.record["differs"]
            model.zero_grad()
        if dist.get_rank() == 2:
            flip(model.module.weight)
    return None


def test_an_epoch_begins_with_a_recheck() -> None:
    assert run_ranks(_between_epochs, 3) == [(1, 0, [2], "the weight weight")] * 3


TWO = [
    (Fault("gradient", "own", 3), [1]),  # once: the rank does not get its own bits again
    (Fault("activation", "recheck", 3), [1]),
    (Fault("weight", "before", 4), [0, 1]),  # each gets its own bits again
    (Fault("gradient", "always", 4), [0, 1]),
]


def _of_two() -> list[Any]:
    silent()
    return [train(fault, "fast") for fault, _ in TWO]


def test_of_two_ranks_the_one_is_named_that_does_not_repeat_itself() -> None:
    for found in run_ranks(_of_two, 2):
        for (fault, _), one in zip(TWO, found, strict=True):
            once = fault.phase == "own"
            expected = (
                [fault.rank] if once or (fault.phase == "recheck" and one["record"]["repeats"] is False) else [0, 1]
            )
            assert one["ranks"] == expected and one["step"] <= fault.step + EVERY, (fault, one)
            assert one["rank"] == (expected[0] if len(expected) == 1 else -1)


def test_verdicts() -> None:
    agree = {0: {0: 1, 2: 1, 1: 1}, 1: {1: 2, 0: 2, 2: 2}, 2: {2: 3, 1: 3, 0: 3}}

    def votes(*changes: tuple[int, int, int]) -> dict[int, dict[int, int]]:
        copy = {micro_batch: dict(of) for micro_batch, of in agree.items()}
        for micro_batch, rank, value in changes:
            copy[micro_batch][rank] = value
        return copy

    for wrong in range(3):
        always = votes(*((micro_batch, wrong, 9 + micro_batch) for micro_batch in range(3)))
        assert verdict(always, set()).ranks == verdict(always, {wrong}).ranks == [wrong]
        for micro_batch in range(3):
            found = verdict(votes((micro_batch, wrong, 9)), set())
            assert (found.ranks, found.micro_batch, found.wrong, found.agreeing) == ([wrong], micro_batch, wrong, 2)
            assert found.right != wrong
    assert verdict(votes((0, 0, 9)), {1, 2}).ranks == []  # nobody repeats itself
    assert verdict(votes((0, 0, 9)), {1}).ranks == [0, 1]
    assert verdict(votes((0, 0, 9), (1, 1, 9)), set()).ranks == [0, 1]
    assert verdict(votes((0, 0, 8), (0, 1, 9)), set()).ranks == [0, 1, 2]
    two = {0: {0: 1, 1: 2}, 1: {1: 3, 0: 3}}
    assert verdict(two, set()).ranks == [0, 1] and verdict(two, {1}).ranks == [1] and verdict(two, {0, 1}).ranks == []


# What does not repeat itself


def _does_not_repeat(reduction: str, warnings: str) -> Any:
    """Train with a loss that draws from a generator of its own, as a kernel that adds in any order does."""
    logged: list[str] = []
    recheck.logger.warning = lambda text, *args: logged.append(text % args)  # type: ignore[method-assign]
    model = dp.replicate(Net(), reduction=reduction, recheck_every=2)
    own = torch.Generator().manual_seed(dist.get_rank())
    yielded = []
    for step in loader(dist.get_world_size(), steps=5).epoch(0):
        yielded.append(0)
        for micro in dp.accumulate(model, step):
            yielded[-1] += 1
            noise = torch.rand((), generator=own) if warnings == "noise" else 1.0
            (model(micro.data).square().mean() * noise * micro.weight).backward()
        model.zero_grad()
    return yielded, logged


def test_what_does_not_repeat_itself_is_told_at_the_first_use() -> None:
    found = run_ranks(_does_not_repeat, 3, "fast", "noise")
    assert [yielded for yielded, _ in found] == [[4, 2, 2, 2, 2]] * 3
    ((told,), nothing, neither) = (logged for _, logged in found)
    assert "replicate(recheck_every=2) is off from here on" in told and "got other bits the second time" in told
    assert not nothing and not neither


def _on_other_devices() -> Any:
    kind = "another processor" if dist.get_rank() == 2 else "a processor"
    with mock.patch.object(recheck, "computer_of", return_value=kind):
        return _does_not_repeat("fast", "")


def test_other_devices_are_not_compared() -> None:
    found = run_ranks(_on_other_devices, 3)
    assert [yielded for yielded, _ in found] == [[2] * 5] * 3
    ((told,), *_) = (logged for _, logged in found)
    assert "rank 0 computes on a processor, and rank 2 on another processor" in told


# Many rechecks of healthy ranks, in all kinds of loops


class Large(nn.Module):
    """A model whose gradients are averaged early, in the last backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)), nn.Linear(300, 1))
        self.register_buffer("power", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.power = self.power * 1.01  # a new tensor; the loss depends on it
        return self.layers((x * self.power).repeat(1, 50))


class Teacher(nn.Module):
    """A frozen module that the loss runs; each forward moves its buffers, and its output depends on some of them."""

    def __init__(self) -> None:
        super().__init__()
        linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.layers = nn.Sequential(linear, nn.BatchNorm1d(6), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _compiled_teacher() -> Any:
    model, plain = dp.replicate(Net(), recheck_every=1), nn.BatchNorm1d(6).requires_grad_(False)
    teacher = torch.compile(plain, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in loader(dist.get_world_size(), steps=2, micros=2).epoch(0):
            for micro in dp.accumulate(model, step):
                loss = (model(micro.data) - teacher(micro.data).mean()).square().mean()
                (loss * micro.weight).backward()
    return plain.num_batches_tracked.item(), recheck_of(model).done


def test_a_compiled_module_beside_the_model_is_as_without() -> None:
    assert run_ranks(_compiled_teacher, 2, timeout_s=120) == [(4, 2)] * 2


def _draws_alone() -> str:
    silent()
    model = dp.replicate(Net(), recheck_every=1)
    try:
        for step in loader(dist.get_world_size(), steps=2).epoch(0):
            for micro in dp.accumulate(model, step):
                if dist.get_rank() == 1:
                    torch.rand(3)  # for a log
                (model(nn.functional.dropout(micro.data)).square().mean() * micro.weight).backward()
    except dp.WrongArithmetic as error:
        return str(error)
    return "none"


def test_a_loop_that_draws_on_one_rank_alone_is_told_of_it() -> None:
    for told in run_ranks(_draws_alone, 3):
        assert "rank 1 computes wrong numbers" in told
        assert "a loop that draws random numbers on it alone" in told


def _healthy(kind: str, reduction: str, every: int | None) -> Any:
    torch.manual_seed(1)
    make = Large if kind in ("large", "one micro-batch") else Net
    model = dp.replicate(make(), reduction=reduction, recheck_every=every, check_every=0)
    models, second = [model], None
    if kind == "two models":
        second = dp.replicate(nn.Linear(6, 6), reduction=reduction)
        models.append(second)
    if kind == "another model":  # which the loss runs, but accumulate() does not get
        second = dp.replicate(nn.Linear(6, 6), reduction=reduction)
    teacher = Teacher().requires_grad_(False) if kind == "a teacher" else None
    parameters = [one for each in (model, second) if each is not None for one in each.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    micros = 1 if kind == "one micro-batch" else 2
    data = loader(dist.get_world_size(), steps=6, micros=micros, tail=6)
    count = None
    if kind == "count":
        count = lambda batch: 0 if batch[0, 0] > 1 else float(len(batch)) + float(batch[0, 0].abs())  # noqa: E731
    if kind == "workers":
        data = dp.Loader(data.dataloader.dataset.dataset, data.plan, num_workers=2)
    seen = []
    for step in data.epoch(0):
        options = {"skipped": "drop"} if kind == "dropped" else {}
        for micro in dp.accumulate(models if len(models) > 1 else model, step, count, **options):
            if not micro.recheck:
                seen.append(micro.index)
            if kind == "dropped" and micro.index == 1:
                continue
            x = micro.data if second is None else second(micro.data)
            loss = model(x).square().mean()
            if teacher is not None:
                loss = loss + (model(x).mean() - teacher(x).mean()).square()
            if kind == "two backwards":
                (loss * micro.weight).backward(retain_graph=True)
            (loss * micro.weight).backward()
        optimizer.step()
        if kind != "old gradients" or step.number % 2:
            optimizer.zero_grad(set_to_none=kind != "zeros")
    states = [dp.fingerprint(each) for each in (model, second, teacher) if each is not None]
    done = -1 if every is None else recheck_of(model).done
    return states, seen, torch.rand(()).item(), done


KINDS = ["large", "one micro-batch", "two models", "another model", "count", "workers", "dropped", "two backwards",
         "old gradients", "zeros", "a teacher"]  # fmt: skip


def _all_kinds(reduction: str, every: int | None) -> list[Any]:
    return [_healthy(kind, reduction, every) for kind in KINDS]


@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_rechecks_in_all_kinds_of_loops_change_nothing(reduction: str) -> None:
    with_, without = (run_ranks(_all_kinds, 3, reduction, every, timeout_s=120) for every in (2, None))
    for one, other in zip(with_, without, strict=True):
        for kind, (*ours, done), (*expected, _) in zip(KINDS, one, other, strict=True):
            assert ours == expected, kind
            assert done >= 2, kind


def test_healthy_ranks_give_no_alarm() -> None:
    assert run_ranks(healthy, 2, 100) == [100] * 2


# What is refused, and what the launcher says


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = dp.SyncBatchNorm(2)


def _nested(outer: nn.Module, step: dp.Step) -> None:
    inner = dp.replicate(nn.Linear(6, 1))
    for micro in dp.accumulate(outer, step):
        for own in dp.accumulate(inner, [micro.data]):
            (inner(own.data).mean() * own.weight).backward()
        (outer(micro.data).mean() * micro.weight).backward()


def _refused() -> list[str]:
    errors = []
    model = dp.replicate(nn.Linear(6, 1), recheck_every=1)
    static = dp.replicate(nn.Linear(6, 1), recheck_every=1, static_graph=True)
    (step,) = list(loader(2, steps=1, micros=1).epoch(0))
    for refused in (
        lambda: dp.replicate(Doubles(), recheck_every=1),
        lambda: dp.replicate(nn.Linear(1, 1), recheck_every=0),
        lambda: next(dp.accumulate(model, [torch.ones(2, 6)])),
        lambda: next(dp.accumulate(static, step)),
        lambda: _nested(model, step),
        lambda: dp.replicate(nn.Linear(1, 1), recheck_every=1 + dist.get_rank()),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            refused()
        errors.append(str(caught.value))
    return errors


def test_what_cannot_be_checked_is_refused() -> None:
    for norm, number, foreign, by_ddp, nested, differs in run_ranks(_refused, 2):
        assert "norm is a SyncBatchNorm, whose statistics" in norm
        assert "replicate(recheck_every=0): give a number of steps, at least 1" in number
        assert "got foreign batches for a model with replicate(recheck_every=…)" in foreign
        assert "DDP reduces them in the backward: leave one out" in by_ddp
        assert "Skip it where micro.recheck is True" in nested
        assert "replicate(recheck_every=…) differs between ranks" in differs


SCRIPT = """
import ddparity as dp
from tests.gradients.faults import Fault, train
with dp.world(device="cpu"):
    found = train(Fault("activation", "always", 1), "fast", raises=True)
"""


def test_the_launcher_ends_with_an_exit_code_and_names_the_rank(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "ddparity", "run", "--nproc", "3", str(script)]
    environment = {**os.environ, "PYTHONPATH": root}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert ended.returncode == dp.WrongArithmetic.exit_code == 123, ended.stderr
    assert "WrongArithmetic: accumulate(): rank 1 computes wrong numbers, on " in ended.stderr
    (record,) = re.findall(r"wrong arithmetic: (\{.*\})", ended.stderr)
    found = json.loads(record)
    assert found["ranks"] == [1] and found["step"] == EVERY and found["differs"].startswith("the gradient of ")


def _on_a_gpu() -> Any:
    """Train a convolutional network on a GPU that the ranks share."""
    silent()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 1)]
    model = dp.replicate(nn.Sequential(*layers).cuda(), recheck_every=2, check_every=0)
    done, found = 0, None
    rows = torch.randn(24 * 40, 1, 4, 4)
    for step in dp.Loader(rows, dp.BatchPlan(len(rows), 24, 4)).epoch(0):
        if step.number == 30 and dist.get_rank() == 1:
            model.module[0].weight.data.view(torch.int32).view(-1)[3] ^= 1 << 22
        try:
            for micro in dp.accumulate(model, step):
                (model(micro.data).square().mean() * micro.weight).backward()
        except dp.WrongArithmetic as error:
            found = error.ranks, error.device
            break
        model.zero_grad()
        done = recheck_of(model).done
    return done, found


@pytest.mark.gpu
def test_gradients_of_a_gpu_repeat_themselves() -> None:
    for done, found in run_ranks(_on_a_gpu, 3):
        assert done == 15 and found is not None and found[0] == [1] and found[1].startswith("cuda:0 (NVIDIA")
