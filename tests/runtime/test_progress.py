from __future__ import annotations

import io
import os
import re

import pytest
import rich.console
import rich.progress

from ddparity.runtime import progress


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now_s)


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Output that is not a terminal gets a line every five seconds, one for the last step, and each line of `say`."""
    clock = _Clock(monkeypatch)
    with progress.progress(20, 0, "train") as display:
        for step in range(1, 21):
            clock.now_s += 0.4
            if display.due(step):
                display.update(step, 64 * step, f"loss {1 / step:.4f}")
        display.say("epoch 1/1: accuracy 98.00 %")
    assert capsys.readouterr().out.splitlines() == [
        "train: 13/20 steps, 160 samples/s, loss 0.0769, 3 s left",
        "train: 20/20 steps, 160 samples/s, loss 0.0500, 0 s left",
        "epoch 1/1: accuracy 98.00 %",
    ]


def test_progress_of_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress(2, 1, "train") as display:
        assert not display.due(2)  # so the caller does not read the loss, which would wait for the device
        display.update(2, 64, "loss 0.5")
        display.say("epoch")
    assert capsys.readouterr() == ("", "")


def test_progress_of_a_resumed_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate and the time left count only the units of this run."""
    clock = _Clock(monkeypatch)
    with progress.progress(20, 0, "train", start=(10, 640)) as display:
        clock.now_s += 6
        display.update(15, 64 * 15)
    assert capsys.readouterr().out == "train: 15/20 steps, 53 samples/s, 6 s left\n"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(rich.console, "Console", lambda: terminal)
    with progress.progress(20, 0, "train") as display:
        display.update(20, 1280, "loss 0.2500")
        display.say("epoch 1/1")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"train .*20/20 steps · [\d,]+ samples/s · loss 0\.2500 · 0:00:00 left", shown)
    assert "epoch 1/1" in shown


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_shows_all_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(rich.console, "Console", lambda: terminal)
    monkeypatch.setattr(rich.progress.Task, "time_remaining", 3.0)
    clock = _Clock(monkeypatch)
    with progress.progress(575, 0, "t") as display:
        clock.now_s += 5
        display.update(57, 456, "loss 1.25")
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
    assert re.search(r"57/575 steps · 91 samples/s · loss 1\.25 · 0:00:03 left", lines[-1] or lines[-2])
    assert max(map(len, lines)) <= width


def test_progress_in_a_notebook_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = _Clock(monkeypatch)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    with progress.progress(4, 0, "train") as display:
        for step in range(1, 5):
            clock.now_s += 1
            assert display.due(step)
            display.update(step, 10 * step, f"loss {1 / step:.2f}")
            if step == 2:
                display.say("epoch 1")
    assert _as_notebook(capsys.readouterr().out) == [
        "epoch 1",
        "train: 4/4 steps, 10 samples/s, loss 0.25, 0 s left",
        "",
    ]


def _as_notebook(text: str) -> list[str]:
    """The lines that a notebook shows: a return to the start of a line overwrites it."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_rank_that_a_notebook_started_writes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        assert not progress._writes_to_notebook()
        monkeypatch.setenv("JPY_PARENT_PID", "1")
        assert progress._writes_to_notebook()
        with progress.progress(2, 0, "train") as display:
            display.update(2, 2)
    with open(reader, newline="") as shown:
        assert shown.read().startswith("\rtrain: 2/2 steps, ")
    with open(os.devnull, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        assert not progress._writes_to_notebook()


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """In output that is not a terminal, long values are neither cut nor folded."""
    progress.show_table("trained", [("accuracy", "98.00 %"), ("checkpoint", "/long" * 30)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "trained"
    assert any(re.search(r"accuracy .*98\.00 %", line) for line in lines)
    assert any("/long" * 30 in line for line in lines)
