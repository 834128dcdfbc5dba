from __future__ import annotations

import io
import re

import pytest
import rich.console

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


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """In output that is not a terminal, long values are neither cut nor folded."""
    progress.show_table("trained", [("accuracy", "98.00 %"), ("checkpoint", "/long" * 30)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "trained"
    assert any(re.search(r"accuracy .*98\.00 %", line) for line in lines)
    assert any("/long" * 30 in line for line in lines)
