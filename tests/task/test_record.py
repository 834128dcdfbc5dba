"""The file of metrics where something goes wrong, TensorBoard's events, and the plot."""

from __future__ import annotations

import builtins
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ddparity.task.curves import check_picture, draw_curves
from ddparity.task.record import Record, beside, need_tensorboard
from ddparity.task.train import train
from tests.ranks import outcomes
from tests.task.test_train import _task, lines_of


def _record(
    path: Path, said: list[str], done: int = 0, events: Path | None = None, state: dict[str, Any] | None = None
) -> Record:
    return Record(path, events, 0, done, said.append, state)


def _step(record: Record, *losses: tuple[float, float]) -> None:
    for loss, share in losses:
        record.take(torch.tensor(loss), share)
    record.end_step(0, 0.5)


def test_names_beside_a_checkpoint(tmp_path: Path) -> None:
    assert beside(tmp_path / "checkpoint.safetensors", "metrics.jsonl") == tmp_path / "metrics.jsonl"
    assert beside(tmp_path / "last.safetensors", "metrics.jsonl") == tmp_path / "last.metrics.jsonl"


def test_a_resumed_training_leaves_no_line_twice(tmp_path: Path) -> None:
    """A checkpoint in the last step of an epoch: its evaluation may have ended, and comes again."""
    said: list[str] = []
    record = _record(tmp_path / "m", said)
    _step(record, (1.0, 0.75), (3.0, 0.25))
    record.metrics(0, {"loss": math.inf})
    first = lines_of(tmp_path / "m")
    assert first == [
        {"step": 1, "epoch": 1, "lr": 0.5, "loss": 1.5},
        {"step": 1, "epoch": 1, "test/loss": None},  # not finite, which JSON does not have
    ]
    with open(tmp_path / "m", "a") as file:
        file.write('[1]\n{"step": "2"}\nno line\n{"step": 2, "time": 2e9, "loss": 1}\n')
    record = _record(tmp_path / "m", said, done=1)
    record.metrics(0, {"loss": math.inf})
    assert lines_of(tmp_path / "m") == first
    _step(record)  # a step in which no rank had anything
    assert lines_of(tmp_path / "m")[2:] == [{"step": 2, "epoch": 1, "lr": 0.5, "loss": 0.0}]
    assert not said


def test_a_new_training_keeps_the_file_of_the_one_before(tmp_path: Path) -> None:
    """Also of one whose checkpoint is then resumed, since the new one ended before its first checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    path, events = tmp_path / "m", tmp_path / "events"
    old = _record(path, said, events=events)
    states = []
    for loss in (1.0, 2.0, 3.0):
        _step(old, (loss, 1.0))
        old.exchange()
        states.append(old.state)
    old.close()
    state = states[1]  # of the checkpoint
    record = _record(path, said, events=events)
    assert not lines_of(path)
    _step(record, (9.0, 1.0))
    record.exchange()
    record.close()
    assert [line["loss"] for line in lines_of(tmp_path / "m.1")] == [1.0, 2.0, 3.0]
    resumed = _record(path, said, done=2, events=events, state=state)
    assert [line["loss"] for line in lines_of(path)] == [1.0, 2.0]
    assert [line["loss"] for line in lines_of(tmp_path / "m.1")] == [9.0]
    assert resumed.state == state
    resumed.close()
    shown = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in shown] == [(1, 1.0), (2, 2.0)]
    assert said == ["m of an earlier training is now m.1"] * 2
    path.write_text('{"step": 1, "time": 2e9, "loss": 5.0}\n')
    (tmp_path / "m.1").unlink()
    _record(path, said, done=2, state=state)
    assert not lines_of(path)  # no file is the checkpoint's
    assert [line["loss"] for line in lines_of(tmp_path / "m.1")] == [5.0]


def test_a_file_that_cannot_be_written_is_told_and_the_training_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    record = _record(tmp_path / "m", said)
    (tmp_path / "m").unlink()
    (tmp_path / "m").mkdir()
    for _ in range(2):
        _step(record, (1.0, 1.0))
        record.exchange()
    (line,) = said
    assert line.startswith("metrics are no longer written, the training goes on: [Errno 21] Is a directory")


def _without_folder(folder: str) -> None:
    train(_task(), Path(folder) / "c")


def test_a_file_that_cannot_be_made_fails_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "c.metrics.jsonl").mkdir()
    for outcome in outcomes(_without_folder, 2, str(tmp_path)):
        assert "c.metrics.jsonl" in outcome.error
        assert "IsADirectoryError" in outcome.error
        assert outcome.seconds < 10


def test_events_and_a_plot(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = _task(epochs=2)
    train(task, tmp_path / "checkpoint", tensorboard=True, picture=tmp_path / "curves.svg")
    _record(tmp_path / "metrics.jsonl", [], done=3, events=tmp_path / "tensorboard").close()
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("test/metric", "test/metric")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
    text = (tmp_path / "curves.svg").read_text()
    assert text.count('id="axes_') == 2
    draw_curves(tmp_path / "gone", tmp_path / "empty.png", "nothing yet")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_what_is_missing_is_named_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_picture(tmp_path / "a.PNG")
    for name, message in (("a.txt", "ends in .png, .svg or another of"), ("b/a.png", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            check_picture(tmp_path / name)
    real: Any = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ddparity\[plot\]', or leave --plot out"):
        check_picture(tmp_path / "a.png")
    with pytest.raises(ImportError, match=r"pip install 'ddparity\[tensorboard\]', or leave --tensorboard out"):
        need_tensorboard()
