"""Test resuming: exactly the next samples follow, and the model is that of an uninterrupted training."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import ddparity as dp
from ddparity import cli
from ddparity.task.train import CheckpointOptions, train
from tests.data.test_loader import Noise
from tests.ranks import kill_self, outcomes, run_ranks
from tests.test_cli import ONE

PLAN = dp.BatchPlan(40, 12, 3, seed=5)  # 4 steps an epoch; the last has 4 samples

Seen = list[tuple[int, int, int, list]]


def _take(loader: dp.Loader, epochs: int, seen: Seen, stop: tuple[int, int] | None = None) -> None:
    """Loop over the remaining epochs, or up to the end of step `stop`."""
    for epoch in loader.epochs(epochs):
        for step in loader.epoch(epoch):
            seen += [(epoch, step.number, micro.index, micro.data.tolist()) for micro in step]
            if (epoch, step.number) == stop:
                return


def _before(path: str, num_workers: int, stop: tuple[int, int]) -> Seen:
    seen: Seen = []
    loader = dp.Loader(Noise(), PLAN, num_workers)
    _take(loader, 2, seen, stop)
    dp.save_checkpoint(path, loader=loader)
    return seen


def _after(path: str, num_workers: int) -> Seen:
    seen: Seen = []
    loader = dp.Loader(Noise(), PLAN, num_workers)
    dp.load_checkpoint(path, loader=loader)
    _take(loader, 2, seen)
    return seen


@pytest.fixture(scope="module")
def undisturbed() -> Seen:
    seen: Seen = []
    _take(dp.Loader(Noise(), PLAN), 2, seen)
    return seen


@pytest.mark.parametrize(
    ("first", "second", "stop"),
    [
        ((1, 0), (2, 2), (0, 0)),
        ((2, 2), (3, 0), (0, 2)),
        ((3, 0), (1, 2), (0, 3)),
        ((2, 0), (2, 0), (1, 1)),
        ((1, 2), (4, 0), (1, 3)),
    ],
)
def test_the_samples_that_follow_on_any_world_size(
    first: tuple[int, int], second: tuple[int, int], stop: tuple[int, int], undisturbed: Seen, tmp_path: Path
) -> None:
    """The loaded data continues exactly, with its augmentation, whatever workers loaded ahead."""
    path = str(tmp_path / "c")
    before = sorted(part for rank in run_ranks(_before, first[0], path, first[1], stop) for part in rank)
    after = sorted(part for rank in run_ranks(_after, second[0], path, second[1]) for part in rank)
    assert before + after == undisturbed


def test_where_a_save_in_the_loop_goes_on() -> None:
    model = nn.Linear(1, 1)
    loader = dp.Loader(range(40), PLAN)
    assert loader.position == (0, 0)
    for epoch in loader.epochs(2):
        for step in loader.epoch(epoch):
            here = (epoch, step.number)
            step[0], step[-1], step[:]  # to look at the data does not end the step
            assert loader.position == here
            for _ in dp.accumulate(model, step) if step.number % 2 else step:
                assert loader.position == here
            assert loader.position == (epoch, step.number + 1)  # after optimizer.step()
        # The epoch has no step left, and a scheduler's step after it is not repeated.
        assert loader.position == (epoch + 1, 0)
    assert loader.epochs(2) == range(2, 2)


def test_a_step_that_was_left_counts_with_the_next() -> None:
    loader = dp.Loader(range(40), PLAN)
    first, *_ = itertools.islice(loader.epoch(0), 2)
    assert loader.position == (0, 1)
    list(first)  # later than its turn: the position does not move back
    assert loader.position == (0, 1)
    loader.epoch(0)
    assert loader.position == (0, 0)
    list(first)  # a step of an iterator that has ended
    assert loader.position == (0, 0)


def _at(epoch: int, step: int, plan: dp.BatchPlan = PLAN) -> dp.Loader:
    loader = dp.Loader(range(plan.num_samples), plan)
    loader.load_state_dict({**dp.Loader(range(40), PLAN).state_dict(), "epoch": epoch, "step": step})
    return loader


def test_an_epoch_that_was_trained_but_not_ended_is_empty() -> None:
    """The checkpoint is saved after the last step and before the work that follows an epoch. Only that work remains."""
    loader = _at(1, 4)
    assert loader.epochs(3) == range(1, 3)
    assert list(loader.epoch(1)) == []
    assert loader.position == (2, 0)
    assert len(list(loader.epoch(2))) == 4


def test_beginning_elsewhere_is_refused_unless_it_is_asked_for() -> None:
    loader = _at(1, 2)
    with pytest.raises(ValueError, match=r"epoch\(0\): the checkpoint of this Loader continues with epoch 1, step 2"):
        loader.epoch(0)
    assert [step.number for step in loader.epoch(1)] == [2, 3]
    assert len(list(_at(1, 2).epoch(0, start_step=0))) == 4
    early = loader.epoch(2)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="epoch 2 of this Loader has ended"):
        next(early)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dp.BatchPlan(41, 12, 3, seed=5), "num_samples=40 in the checkpoint and 41 here"),
        (
            dp.BatchPlan(40, 16, 4, seed=5),
            "global_batch=12 in the checkpoint and 16 here, micro_batch=3 in the checkpoint and 4 here",
        ),
        (dp.BatchPlan(40, 12, 3, seed=6), "seed=5 in the checkpoint and 6 here"),
        (
            dp.BatchPlan(40, 12, 3, 5, False, True),
            "shuffle=True .* False here, drop_last=False in the checkpoint and True here",
        ),
    ],
)
def test_another_plan_is_refused_by_name(plan: dp.BatchPlan, message: str, tmp_path: Path) -> None:
    dp.save_checkpoint(tmp_path / "c", loader=dp.Loader(range(40), PLAN))
    with pytest.raises(ValueError, match=rf"c does not fit loader, a Loader: .*{message}"):
        dp.load_checkpoint(tmp_path / "c", loader=dp.Loader(range(plan.num_samples), plan))


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, 5), (0, -1)])
def test_a_position_that_the_plan_does_not_have(epoch: int, step: int) -> None:
    with pytest.raises(ValueError, match=rf"no step {step} of epoch {epoch}"):
        _at(epoch, step)


class _Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 60  # a short step would have micro-batches of one sample, which batch norm refuses

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        clean = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return clean + 0.1 * torch.randn(6), index % 3


def _wide() -> nn.Module:
    """Return a model with gradients that are large enough for an all-reduce.

    With 3 or more ranks the rounding of an all-reduce depends on DDP's buckets.
    """
    return nn.Sequential(nn.Linear(6, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 3))


class _Dies:
    """The loss of a Task. Its `count`-th call ends the process with SIGKILL or an exception."""

    def __init__(self, count: int | None, kill: bool) -> None:
        self.left = count
        self.kill = kill

    def __call__(self, model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left == 0 and self.kill:
                kill_self()
            if self.left == 0:
                raise OSError("lost")
        return F.cross_entropy(model(data[0]), data[1])


def _normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))


class _Smooth(nn.Sequential):
    """A model in float64 without a batch norm, whose gradients for two samples would be rounding errors only."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())


def _task(
    dies: int | None = None, kill: bool = True, epochs: int = 3, model: Callable[[], nn.Module] = _normed
) -> dp.Task:
    return dp.Task(
        model=model,
        dataset=lambda split: _Data(),
        loss=_Dies(dies, kill),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        metric=lambda outputs, dataset: outputs.mean(),
        global_batch=12,
        micro_batch=2,
        epochs=epochs,
    )


def _train(path: str, num_workers: int, dies: int | None = None, model: Callable[[], nn.Module] = _normed) -> str:
    """Train and return the fingerprint.

    `dies`: rank 0 is killed in this forward. With workers it raises an exception, because the workers of a killed
    process live on for 5 s.
    """
    task = _task(dies if dist.get_rank() == 0 else None, num_workers == 0, model=model)
    return train(task, Path(path), num_workers, saving=CheckpointOptions(every=2, resume=True)).fingerprint


@pytest.mark.parametrize(
    ("world_size", "num_workers", "model"), [(1, 2, _normed), (2, 0, _normed), (3, 0, _normed), (3, 1, _wide)]
)
def test_a_training_that_was_killed_ends_as_one_that_was_not(
    world_size: int, num_workers: int, model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """The weights have equal bits."""
    expected = run_ranks(_train, world_size, str(tmp_path / "undisturbed"), 0, None, model)
    # 90 micro-batches in all, 30 an epoch, 6 a step; the file is written every 2 steps and after each epoch.
    for forward in (40 // world_size, 20 // world_size):
        ended = outcomes(_train, world_size, str(tmp_path / "killed"), num_workers, forward, model)
        assert ended[0].exitcode == -9 or ended[0].error == "OSError: lost"
        assert all("RankFailure: rank 0" in o.error or "Connection" in o.error for o in ended[1:]), ended
        assert max(o.seconds for o in ended) < 30
    assert run_ranks(_train, world_size, str(tmp_path / "killed"), num_workers, None, model) == expected


def _train_strictly(path: str, dies: int | None = None) -> str:
    task = _task(dies if dist.get_rank() == 0 else None)
    return train(task, Path(path), reduction="strict", saving=CheckpointOptions(every=2, resume=True)).fingerprint


@pytest.mark.parametrize("forward", [3, 8, 11])
def test_strict_on_another_world_size_it_ends_with_the_same_bits(forward: int, tmp_path: Path) -> None:
    """The running statistics of the batch norm have equal bits, too."""
    (expected,) = run_ranks(_train_strictly, 1, str(tmp_path / "undisturbed"))
    for world_size, dies in ((3, forward), (2, 20)):
        assert outcomes(_train_strictly, world_size, str(tmp_path / "killed"), dies)[0].exitcode == -9
    assert run_ranks(_train_strictly, 4, str(tmp_path / "killed")) == [expected] * 4


class _Preempted:
    """The loss of a Task. Its `count`-th call sends this process the signal of a scheduler."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, model: nn.Module, data: list[torch.Tensor]) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return F.cross_entropy(model(data[0]), data[1])


def _train_preempted(path: str, forwards: list[int]) -> object:
    task = _task()
    task.loss = _Preempted(forwards[dist.get_rank()])
    try:
        train(task, Path(path), reduction="strict", saving=CheckpointOptions(resume=True))
    except SystemExit as ending:
        return ending.code
    return "ended"


@pytest.mark.parametrize("forwards", [[4], [7, 2], [3, 9, 4]])
def test_a_training_that_a_scheduler_stops_goes_on_where_it_was(forwards: list[int], tmp_path: Path) -> None:
    """The ranks get the signal in different steps. The resumed training gets it again."""
    (expected,) = run_ranks(_train_strictly, 1, str(tmp_path / "undisturbed"))
    for _ in range(2):
        assert run_ranks(_train_preempted, len(forwards), str(tmp_path / "stopped"), forwards) == [138] * len(forwards)
    assert run_ranks(_train_strictly, 2, str(tmp_path / "stopped")) == [expected] * 2


def test_on_another_world_size_it_ends_the_same_to_rounding(tmp_path: Path) -> None:
    run_ranks(_train, 1, str(tmp_path / "undisturbed"), 0, None, _Smooth)
    for world_size, forward in ((3, 8), (2, 20)):
        assert outcomes(_train, world_size, str(tmp_path / "killed"), 0, forward, _Smooth)[0].exitcode == -9
    run_ranks(_train, 1, str(tmp_path / "killed"), 0, None, _Smooth)
    models = [_Smooth() for _ in range(2)]
    for model, name in zip(models, ("undisturbed", "killed"), strict=True):
        dp.load_checkpoint(tmp_path / name, model=model)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert ((one - two).abs().max() / one.abs().max()).item() <= 1e-12


def test_resuming_what_is_complete_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(_task(epochs=1), tmp_path / "c", saving=CheckpointOptions(resume=True))
    assert f"no checkpoint at {tmp_path}/c yet: training from the start" in capsys.readouterr().out
    again = train(_task(epochs=1), tmp_path / "c", saving=CheckpointOptions(resume=True))
    assert f"resumed from {tmp_path}/c: 1 epochs and 0 of 5 steps are done" in capsys.readouterr().out
    assert (again.fingerprint, again.metrics, again.samples_per_second) == (first.fingerprint, first.metrics, 0)
    longer = train(_task(epochs=2), tmp_path / "c", saving=CheckpointOptions(resume=True))
    assert longer.fingerprint != first.fingerprint
    with pytest.raises(ValueError, match="a training of 2 epochs and 0 steps, but the Task has only 1 epochs"):
        train(_task(epochs=1), tmp_path / "c", saving=CheckpointOptions(resume=True))


def test_the_commands_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "t", raising=False)  # absent again at the end
    (tmp_path / "t.py").write_text(ONE)
    command = "train t.py --checkpoint c --save-every 1 --keep 2 --resume --nproc"
    for number, said in enumerate(("no checkpoint at c yet", "resumed from c: 1 epochs and 0 of 3 steps")):
        done = CliRunner().invoke(cli.app, [*command.split(), "1"])
        assert done.exit_code == 0 and said in done.output, (number, done.output)
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["c", "c.1", "c.metrics.jsonl"]
    started = []
    monkeypatch.setattr(cli, "run_command", lambda arguments, count: started.append((arguments, count)) or 0)
    assert CliRunner().invoke(cli.app, [*command.split(), "2"]).exit_code == 0
    ((arguments, count),) = started
    assert count == 2
    assert re.search("--checkpoint c .*--resume --save-every 1 --keep 2$", " ".join(arguments))
