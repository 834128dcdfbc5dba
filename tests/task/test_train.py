"""`train` and `predict_task` in a world of one and on several ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddparity as dp
from ddparity.task.train import CheckpointOptions, predict_task, train
from tests.ranks import outcomes, run_ranks


def _task(**parts: object) -> dp.Task:
    standard = {
        "model": lambda: nn.Linear(2, 1),
        "dataset": lambda split: torch.ones(8, 2),
        "loss": lambda model, data: model(data).square().mean(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "global_batch": 4,
        "micro_batch": 2,
        "metric": lambda outputs, dataset: outputs.mean(),
    }
    return dp.Task(**{**standard, **parts})


def _raise(*_: object) -> float:
    raise OSError("lost")


def _fails(part: str, folder: str) -> None:
    lengths = {"dataset": lambda split: torch.ones(8 if dist.get_rank() == 0 else 6, 2)}
    empty = {"dataset": lambda split: torch.ones(0, 2)}
    parts = {"lengths": lengths, "empty": empty}.get(part, {part: _raise})
    train(_task(**parts), Path(folder) / "checkpoint")


@pytest.mark.parametrize(
    ("part", "messages"),
    [
        ("lengths", ["the training set's length differs between ranks"] * 2),
        ("empty", ["the training set is empty"] * 2),
        ("dataset", ["OSError: lost"] * 2),
        ("model", ["OSError: lost"] * 2),
        ("metric", ["OSError: lost", "rank 0 failed in the metric: OSError: lost"]),
    ],
)
def test_a_failure_on_one_rank_fails_on_all_and_names_it(part: str, messages: list[str], tmp_path: Path) -> None:
    for outcome, message in zip(outcomes(_fails, 2, part, str(tmp_path)), messages, strict=True):
        assert message in outcome.error
        assert outcome.seconds < 10


def test_a_world_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(_task(epochs=2), tmp_path / "c")
    assert result.checkpoint == tmp_path / "c"
    assert set(result.metrics) == {"metric"}
    out = capsys.readouterr().out
    assert "epoch 2/2: metric" in out
    assert result.fingerprint in out
    shown = f"{result.metrics['metric']:.6g}"
    predict_task(_task(), tmp_path / "c", tmp_path / "out", metric=True)
    assert dp.read_predictions(tmp_path / "out").shape == (8, 1)
    assert shown in capsys.readouterr().out
    predict_task(_task(), tmp_path / "c", None, metric=False)
    assert shown in capsys.readouterr().out


def _with_sums(folder: str) -> dict[str, float]:
    task = _task(metric=None, sums=lambda output, batch: {"mean": dp.Average(sum=output.sum(), weight=len(output))})
    return train(task, Path(folder) / "c", num_workers=1).metrics


def test_a_metric_of_sums_is_that_of_all_outputs(tmp_path: Path) -> None:
    alone = train(_task(), tmp_path / "c").metrics["metric"]
    first, second = run_ranks(_with_sums, 2, str(tmp_path))
    assert first == {"mean": pytest.approx(alone, rel=1e-6)}
    assert second == {}
    with pytest.raises(TypeError, match="got metric and sums: give one"):
        _task(sums=_raise)


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.2), nn.Flatten(), nn.Linear(18, 1))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("time") > 1.6e9 for line in lines)
    return lines


def _strict(folder: str) -> tuple[str, int]:
    data = torch.randn(13, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    task = _task(model=_net, dataset=lambda split: data, global_batch=8, epochs=2)
    torch.set_num_threads(2)
    result = train(task, Path(folder) / "c", num_workers=1, reduction="strict")
    return result.fingerprint, torch.get_num_threads()


def test_strict_gives_the_same_fingerprint_on_any_number_of_processes(tmp_path: Path) -> None:
    found, records = [], []
    for world_size in (1, 2, 3, 4):
        found += run_ranks(_strict, world_size, str(tmp_path))
        records.append(lines_of(tmp_path / "c.metrics.jsonl"))
    assert len(records[0]) == 6  # two epochs of two steps
    assert all(record == records[0] for record in records)
    assert {threads for _, threads in found} == {1}
    assert len({fingerprint for fingerprint, _ in found}) == 1


TOKENS = torch.randint(5, (30, 6), generator=torch.Generator().manual_seed(0))


def _masked(model: nn.Module, data: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(data)[:, :-1].flatten(0, 1), data[:, 1:].flatten(), ignore_index=0)


def _unmasked(data: torch.Tensor) -> float:
    return float((data[:, 1:] != 0).sum())


def _warmed(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)


def _weighted(dataset: torch.Tensor) -> dp.WeightedPlan:
    return dp.WeightedPlan(1.0 + torch.arange(len(dataset)), global_batch=9, micro_batch=3, num_samples=24)


FULL: dict[str, Any] = {
    "model": lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double(),
    "dataset": lambda split: TOKENS,
    "loss": _masked,
    "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    "scheduler": _warmed,
    "count": _unmasked,
    "clip_norm": 0.05,
    "evaluate_every": 2,
    "plan": _weighted,
    "micro_batch": 3,
    "epochs": 2,
    "metric": lambda outputs, dataset: {"size": outputs.square().mean().item()},
    "inputs": lambda batch: batch,
}


def _full(path: str, epochs: int = 2, resume: bool = False, **parts: Any) -> list[torch.Tensor]:
    task = dp.Task(**{**FULL, **parts, "epochs": 2})
    if epochs == 1:  # stopped in the middle of the second epoch
        task.scheduler = lambda optimizer, steps: _Stopping(_warmed(optimizer, steps))
    saving = CheckpointOptions(every=1, resume=resume)
    with contextlib.suppress(InterruptedError):
        train(task, Path(path), saving=saving)
    return load_states(path)


class _Stopping:
    """A scheduler whose fifth step ends the training."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.state_dict, self.load_state_dict = scheduler.state_dict, scheduler.load_state_dict

    def step(self) -> None:
        if self.scheduler.last_epoch == 4:
            raise InterruptedError
        self.scheduler.step()


def load_states(path: str) -> list[torch.Tensor]:
    model = FULL["model"]()
    dp.load_checkpoint(path, model=model)
    return [one.detach().clone() for one in model.parameters()]


def _by_hand() -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """The weights, and the lines of the file of metrics."""
    lines: list[dict[str, Any]] = []
    dp.seed_everything(0)
    model = FULL["model"]()
    optimizer = FULL["optimizer"](model.parameters())
    scheduler = _warmed(optimizer, 6)
    for epoch in range(2):
        for step in range(3):
            data = TOKENS[torch.cat([torch.tensor(m.samples) for m in _weighted(TOKENS).step(epoch, step)])]
            loss = _masked(model, data)
            loss.backward()
            done, lr = len([line for line in lines if "loss" in line]) + 1, optimizer.param_groups[0]["lr"]
            lines.append({"step": done, "epoch": epoch + 1, "lr": lr, "loss": loss.item()})
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if done in (2, 3, 4, 6):
                size = model(TOKENS).square().mean().item()
                lines.append({"step": done, "epoch": epoch + 1, "test/size": size})
    return [one.detach() for one in model.parameters()], lines


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_part_of_a_task_is_used(world_size: int, tmp_path: Path) -> None:
    """Against one big batch; and stopped on other ranks, with the scheduler in the checkpoint."""
    expected, lines = _by_hand()
    for found in run_ranks(_full, world_size, str(tmp_path / "c")):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert lines_of(tmp_path / "c.metrics.jsonl") == [pytest.approx(line, rel=1e-9) for line in lines]
    if world_size == 3:
        run_ranks(_full, 2, str(tmp_path / "stopped"), 1)
        file = tmp_path / "stopped.metrics.jsonl"
        assert len(lines_of(file)) == 7  # four steps are saved, and three evaluations
        with open(file, "a") as more:
            more.write('{"step": 5, "time": 2e9}\n{"step": 4, "loss"')  # not saved, and cut
        for found in run_ranks(_full, 3, str(tmp_path / "stopped"), 2, True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert lines_of(file) == [pytest.approx(line, rel=1e-9) for line in lines]


def test_evaluation_every_some_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(dp.Task(**FULL), tmp_path / "c")
    shown = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if ": size" in line]
    assert shown == ["step 2", "epoch 1/2", "step 4", "epoch 2/2"]  # not after step 6, where the epoch ends


def _autocast(folder: str) -> tuple[str, torch.dtype]:
    seen = []
    task = _task(
        model=_net,
        dataset=lambda split: torch.randn(13, 1, 5, 5, generator=torch.Generator().manual_seed(0)),
        global_batch=8,
        autocast=torch.bfloat16,
        clip_norm=0.1,
        metric=lambda outputs, dataset: seen.append(outputs.dtype) or 0.0,
    )
    return train(task, Path(folder) / "c", reduction="strict").fingerprint, seen[0] if seen else torch.bfloat16


def test_autocast_in_training_and_evaluation(tmp_path: Path) -> None:
    found = {end for world_size in (1, 2, 3) for end in run_ranks(_autocast, world_size, str(tmp_path))}
    assert len(found) == 1
    assert found.pop()[1] == torch.bfloat16


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"global_batch": 9}, TypeError, "got plan and global_batch"),
        ({"clip_norm": 0.0}, ValueError, r"clip_norm=0.0\): must be more than 0"),
        ({"autocast": "bf16"}, TypeError, "autocast='bf16'"),
        ({"autocast": torch.float16}, ValueError, "float16 needs its gradients scaled"),
        ({"evaluate_every": 0}, ValueError, r"evaluate_every=0\): must be at least 1"),
    ],
)
def test_wrong_parts(parts: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dp.Task(**{**FULL, **parts})


def test_wrong_schedulers_and_plans(tmp_path: Path) -> None:
    for part, message in (
        (
            {"scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)},
            "needs a metric",
        ),
        ({"scheduler": lambda optimizer, steps: 0.1}, r"scheduler\(\) returned a float"),
        ({"plan": lambda dataset: dp.StreamPlan(4, 2)}, "returned a StreamPlan"),
    ):
        with pytest.raises(TypeError, match=message):
            train(dp.Task(**{**FULL, **part}), tmp_path / "c")
