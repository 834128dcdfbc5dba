"""`train` and `predict_task` in a world of one and on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.task.train import predict_task, train
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
    task = _task(metric=None, sums=lambda output, batch: {"mean": (output.sum(), len(output))})
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


def _strict(folder: str) -> tuple[str, int]:
    data = torch.randn(13, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    task = _task(model=_net, dataset=lambda split: data, global_batch=8, epochs=2)
    torch.set_num_threads(2)
    result = train(task, Path(folder) / "c", num_workers=1, reduction="strict")
    return result.fingerprint, torch.get_num_threads()


def test_strict_gives_the_same_fingerprint_on_any_number_of_processes(tmp_path: Path) -> None:
    found = [end for world_size in (1, 2, 3, 4) for end in run_ranks(_strict, world_size, str(tmp_path))]
    assert {threads for _, threads in found} == {1}
    assert len({fingerprint for fingerprint, _ in found}) == 1
