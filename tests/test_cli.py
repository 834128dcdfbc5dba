"""What a user types wrong: one clear line and exit code 2, no traceback, no process started."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ddparity as dp
from ddparity.cli import app
from ddparity.task import load_task

TASK = """
import torch
from torch import nn
import ddparity as dp

def loss(model, data):
    return model(data).square().mean()

parts = dict(
    model=lambda: nn.Linear(2, 1), dataset=lambda split: torch.ones(10, 2), loss=loss,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), global_batch=4, micro_batch=2,
)
"""
ONE = TASK + "small = dp.Task(**parts)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "t", raising=False)  # absent again at the end
    return tmp_path


WRONG = [
    ("", "train missing.py", "there is no file missing.py: TASK is file.py:name"),
    ("", "train no.such.module", "there is no module no.such.module"),
    ("x = 1", "train t.py", "t.py has no Task: name one"),
    (
        TASK + "a = dp.Task(**parts)\nb = dp.Task(**parts)",
        "train t.py",
        "several Tasks (a, b): name one, as in t.py:NAME",
    ),
    (ONE, "train t.py:other", "t.py has no 'other': its Tasks are small"),
    (ONE, "train t.py:loss", "t.py:loss is a function, not a ddparity.Task: its Tasks are small"),
    ("import nowhere", "train t.py", "cannot import t.py: No module named 'nowhere'"),
    ("\n\n1 / 0", "train t.py", "cannot import t.py: ZeroDivisionError: division by zero (line 3)"),
    ("def f(:", "train t.py", "cannot import t.py: SyntaxError"),
    (TASK + "t = dp.Task(**{**parts, 'global_batch': 0})", "train t.py", "Task(global_batch=0): must be at least 1"),
    (TASK + "t = dp.Task(**{**parts, 'micro_batch': 0})", "train t.py", "Task(micro_batch=0): must be at least 1"),
    (TASK + "t = dp.Task(**{**parts, 'epochs': 1.5})", "train t.py", "epochs=1.5 is a float"),
    (TASK + "t = dp.Task(lr=1, **parts)", "train t.py", "Task() has no lr: it has model, dataset"),
    (TASK + "t = dp.Task(model=parts['model'])", "train t.py", "Task() lacks dataset, loss, optimizer"),
    (TASK + "class T(dp.Task):\n    epochs = 3", "train t.py:T", "t.py:T: Task() lacks model"),
    (ONE, "train t.py --nproc 3", "3 ranks but only 2 micro-batches in a step (global batch 4, micro-batch 2)"),
    (ONE, "train t.py --nproc 0", "--nproc 0: start at least 1 process"),
    (ONE, "predict t.py --checkpoint gone", "there is no checkpoint at gone: train one with `ddparity train t.py`"),
    (
        ONE,
        "train t.py --reduction strict --sync-batchnorm",
        "synchronised statistics depend on the number of processes",
    ),
    ("", "verify missing.py", "there is no file missing.py"),
    (ONE, "verify t.py --nproc 3", "3 ranks but only 2 micro-batches in a step (global batch 4, micro-batch 2)"),
    (ONE, "verify t.py --nproc 0", "--nproc 0: start at least 1 process"),
    (ONE, "verify t.py --world-sizes 1,x", "--world-sizes 1,x: give numbers of processes, as in 1,2,4"),
    (ONE, "verify t.py --world-sizes 1,0", "--world-sizes 1,0: numbers of processes are at least 1"),
    (ONE, "verify t.py --nproc 2 --world-sizes 1,2", "--nproc 2 --world-sizes 1,2: give one of the two"),
    (
        ONE,
        "verify t.py --reduction strict --sync-batchnorm",
        "synchronised statistics depend on the number of processes",
    ),
    ("", "run missing.py", "there is no script missing.py"),
    ("", "run --nproc 0 t.py", "--nproc 0: start at least 1 process"),
]


@pytest.mark.parametrize(("source", "arguments", "message"), WRONG, ids=[row[1] + ": " + row[2][:30] for row in WRONG])
def test_one_line_and_exit_code_2(folder: Path, source: str, arguments: str, message: str) -> None:
    (folder / "t.py").write_text(source)
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("ddparity: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        "train",
        "train t.py --nproc two",
        "train t.py --unknown",
        "train t.py --reduction loose",
        "train t.py --threads 0",
        "verify t.py --steps 0",
        "verify t.py --permutations 1",
        "nothing",
        "predict t.py",
    ],
)
def test_usage_errors_exit_with_2(folder: Path, arguments: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_plot_without_matplotlib_is_refused_with_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t.py").write_text(ONE)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":  # torchmetrics may have imported it
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    result = CliRunner().invoke(app, ["verify", "t.py", "--plot", "out.png"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'ddparity[plot]', or leave --plot out" in result.stderr


def test_a_broken_launchers_variables_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    (folder / "t.py").write_text(ONE)
    for command in ("train t.py --nproc 2", "run t.py"):
        result = CliRunner().invoke(app, command.split())
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert "RANK='x' is not an integer" in result.stderr


def test_inside_a_launched_job_run_does_not_launch_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    (folder / "t.py").write_text("")
    result = CliRunner().invoke(app, ["run", "t.py"])
    assert result.exit_code == 2
    assert "torchrun started this process already, as rank 1 of 2" in result.stderr
    (folder / "t.py").write_text(ONE)
    result = CliRunner().invoke(app, ["train", "t.py", "--nproc", "2"])
    assert (result.exit_code, result.stderr) == (2, "ddparity: --nproc 2: torchrun started 2 processes already\n")


@pytest.mark.parametrize(("command", "words"), [
    ("", ["run", "train", "predict", "Train on one process or on a thousand"]),
    ("run", ["SCRIPT", "--nproc", "elastic agent", "--rendezvous HOST:PORT", "--slurm", "--rdzv-conf"]),
    ("doctor", ["--rendezvous"]),
    ("train", ["TASK", "--nproc", "--checkpoint", "--workers", "--reduction", "--threads"]),
    ("train", ["--resume", "--save-every", "--keep"]),
    ("verify", ["TASK", "--nproc", "--world-sizes", "--steps", "--reduction", "--json", "--plot", "Exit code 0"]),
    ("predict", ["TASK", "--nproc", "--checkpoint", "--to", "--metric", "--workers"]),
])  # fmt: skip
def test_help(command: str, words: list[str]) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    for word in words:
        assert word in result.stdout


def test_a_task_may_be_a_subclass(folder: Path) -> None:
    source = TASK + (
        "class Base(dp.Task):\n    global_batch = 4\n    micro_batch = 2\n    epochs = 3\n"
        "    def model(self): return nn.Linear(2, 1)\n    def dataset(self, split): return torch.ones(10, 2)\n"
        "    def loss(self, model, data): return loss(model, data)\n"
        "    def optimizer(self, parameters): return torch.optim.SGD(parameters, lr=0.1)\n"
    )
    (folder / "t.py").write_text(source)
    task = load_task("t.py")
    assert isinstance(task, dp.Task)
    assert task.epochs == 3
    assert task.plan(10).steps_per_epoch == 3


FAILS = ONE.replace("def loss(model, data):\n", "def loss(model, data):\n    import os, signal\n    {fault}\n")


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("if os.environ['RANK'] == '1': raise OSError('lost')", 1, "ddparity: rank 1 failed: OSError: lost"),
        ("if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 failed: ended by SIGKILL"),
    ],
)
def test_a_rank_that_fails_in_training_is_named(folder: Path, fault: str, code: int, message: str) -> None:
    (folder / "t.py").write_text(FAILS.format(fault=fault))
    command = [sys.executable, "-m", "ddparity", "train", "t.py", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    end = done.stderr[done.stderr.index("ddparity: rank 1 failed") :]
    assert message in end
    assert "Traceback" not in end or "typer" not in end


def test_a_wrong_task_in_a_real_process(folder: Path) -> None:
    command = [sys.executable, "-m", "ddparity", "train", "missing.py", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ddparity: there is no file missing.py: TASK is file.py:name or package.module:name\n"
