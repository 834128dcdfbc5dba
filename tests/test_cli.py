"""A user's mistake gives one clear line and exit code 2, no traceback, and starts no process."""

from __future__ import annotations

import builtins
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ddparity as dp
from ddparity.cli import app, main
from ddparity.task.task import load_task

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
    monkeypatch.delitem(sys.modules, "t", raising=False)  # monkeypatch removes it again at the end
    return tmp_path


WRONG = [
    ("", "train missing.py", "there is no file missing.py: TASK is file.py:name"),
    ("", "train no.such.module", "there is no module no.such.module"),
    ("1 / 0", "train t.py", "t.py has no Task, and was not run: give it a ddparity.Task, or a function task()"),
    ("1 / 0\ndef main(): pass", "verify t.py", "; or a function to verify, as in t.py:main"),
    ("import torch, json\n1 / 0", "train t.py", "t.py has no Task, and was not run"),
    ("Task = 1", "train t.py", "t.py has no Task: name one"),
    (
        TASK + "a = dp.Task(**parts)\nb = dp.Task(**parts)",
        "train t.py",
        "several Tasks (a, b): name one, as in t.py:NAME",
    ),
    ("1 / 0\n" + ONE, "train t.py:other", "t.py has no 'other' at its top level, so it was not run"),
    (ONE + "vars()['a'] = 1", "train t.py:other", "t.py has no 'other': its Tasks are small"),
    (ONE, "train t.py:dp", "t.py:dp is a module, not a ddparity.Task: its Tasks are small"),
    (ONE, "train t.py:loss", "t.py:loss is a function, not a ddparity.Task: only `ddparity verify` takes a function"),
    (ONE, "verify t.py:loss", "loss() needs model, but verify() calls it without"),
    (TASK + "def task(): return parts", "train t.py", "t.py:task() returned a dict, not a ddparity.Task"),
    ("import nowhere", "train t.py", "cannot import t.py: No module named 'nowhere'"),
    ("\nTask = 1\n1 / 0", "train t.py", "cannot import t.py: ZeroDivisionError: division by zero (line 3)"),
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
    (ONE, "verify t.py --world-sizes 1,0", "--world-sizes 1,0: a number of processes must be at least 1"),
    (ONE, "verify t.py --nproc 2 --world-sizes 1,2", "--nproc 2 --world-sizes 1,2: give one of the two"),
    (
        ONE,
        "verify t.py --reduction strict --sync-batchnorm",
        "synchronised statistics depend on the number of processes",
    ),
    (ONE, "bench t.py --nproc 1", "--nproc 1: start at least 2 processes"),
    (ONE, "bench t.py --nproc 3", "3 ranks but only 2 micro-batches in a step (global batch 4, micro-batch 2)"),
    (
        ONE,
        "bench t.py --link 25Gbit",
        "--link 25Gbit: give a bandwidth and the latency of one message, as in 25Gbit,20us",
    ),
    (ONE, "bench t.py --link 25Gib,20us", "--link 25Gib,20us: the unit Gib is unknown"),
    (ONE, "bench t.py --json no/b.json", "no/b.json: there is no folder"),
    (ONE, "bench t.py --plot b.png", "--plot b.png: the picture is an SVG, so give a name that ends in .svg"),
    ("", "bench missing.py", "there is no file missing.py"),
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
        "bench t.py --seconds 0",
        "bench t.py --each 0",
        "verify t.py --permutations 1",
        "nothing",
        "predict t.py",
    ],
)
def test_usage_errors_exit_with_2(folder: Path, arguments: str) -> None:
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_plot_without_matplotlib_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t.py").write_text(ONE)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":  # torchmetrics may have imported it
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for command in ("verify", "train"):
        result = CliRunner().invoke(app, [command, "t.py", "--plot", "out.png"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "pip install 'ddparity[plot]', or leave --plot out" in result.stderr


def test_a_wrong_variable_of_a_launcher_gives_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert (result.exit_code, result.stderr) == (
        2,
        "ddparity: --nproc 2: torchrun started 2 processes already: leave --nproc out\n",
    )


@pytest.mark.parametrize(("command", "words"), [
    ("", ["run", "train", "predict", "Train on one process or on a thousand", "--version"]),
    ("run", ["SCRIPT", "--nproc", "elastic agent", "--rendezvous HOST:PORT", "--slurm", "--rdzv-conf"]),
    ("doctor", ["--rendezvous"]),
    ("train", ["TASK", "--nproc", "--checkpoint", "--workers", "--reduction", "--threads"]),
    ("train", ["--resume", "--save-every", "--keep", "--plot", "--tensorboard"]),
    ("verify", ["TASK", "--nproc", "--world-sizes", "--steps", "--reduction", "--json", "--plot", "Exit code 0"]),
    ("predict", ["TASK", "--nproc", "--checkpoint", "--to", "--metric", "--workers"]),
    ("bench", ["TASK", "--nproc", "--link", "25Gbit,20us", "--each", "--seconds", "--json", "--plot"]),
])  # fmt: skip
def test_help(command: str, words: list[str]) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    for word in words:
        assert word in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"ddparity {dp.__version__}\n", "")
    # Nothing after it is read.
    assert CliRunner().invoke(app, ["--version", "train", "missing.py"]).stdout == result.stdout


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
    assert task.plan(range(10)).steps_per_epoch == 3


WITH_METRIC = ONE.replace("**parts)", "metric=lambda outputs, dataset: outputs.mean(), **parts)")
SUMS = ONE.replace("**parts)", "sums=lambda output, batch: output.sum(), **parts)")


def _checkpoint(source: str = ONE) -> None:
    """Write a Task to `t.py`, and a checkpoint of it to `good`."""
    Path("t.py").write_text(source)
    dp.save_checkpoint("good", model=load_task("t.py").model())


def _bad() -> None:
    Path("good").write_bytes(Path("good").read_bytes()[:-3])


def _of_another_model() -> None:
    dp.save_checkpoint("good", model=torch.nn.Linear(7, 7))


def _of_another_run() -> None:
    dp.predict(torch.nn.Linear(2, 1), torch.ones(10, 2), 2, "out")


def _occupied() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").touch()


REFUSED = [
    (_bad, "good is not a complete checkpoint: its tensors end at byte"),
    (_of_another_model, "good does not fit model, a Linear: RuntimeError: Error(s) in loading state_dict"),
    (_of_another_run, "out holds the results of another run: its model is Linear"),
    (_occupied, "out holds thesis.tex, which is no result of predict(): give a directory that is empty or new"),
    (Path("out").touch, "predict(to='out'): out is a file, and outputs go to a directory"),
]


@pytest.mark.parametrize(("prepare", "message"), REFUSED, ids=[message[:25] for _, message in REFUSED])
def test_an_impossible_prediction_gives_one_line(folder: Path, prepare: Callable[[], None], message: str) -> None:
    _checkpoint()
    prepare()
    result = CliRunner().invoke(app, ["predict", "t.py", "--nproc", "1", "--checkpoint", "good", "--to", "out"])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("ddparity: ") and message in line


@pytest.mark.parametrize("prepare", [_bad, _of_another_run])
def test_an_impossible_prediction_shows_no_traceback_on_several_processes(
    folder: Path, prepare: Callable[[], None]
) -> None:
    _checkpoint()
    prepare()
    done = _predict("--nproc", "2", "--to", "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(line.startswith("ddparity: ") for line in done.stderr.splitlines())
    assert "good is not a complete checkpoint" in done.stderr or "out holds the results of another run" in done.stderr


def _predict(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddparity", "predict", "t.py", "--checkpoint", "good", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_tasks_own_error_keeps_its_traceback(folder: Path) -> None:
    _checkpoint(ONE.replace("torch.ones(10, 2)", "Broken()") + BROKEN)
    done = _predict("--nproc", "1", "--to", "out")
    assert done.returncode == 1
    assert "SampleError: the data set failed at index 0: ValueError: no such image" in done.stderr
    assert "in __getitem__" in done.stderr


BROKEN = """
class Broken:
    def __len__(self): return 10
    def __getitem__(self, index): raise ValueError("no such image")
"""


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (ONE, "--metric", "--metric: t.py has no metric: give the Task one, or leave --metric out"),
        (ONE, "--metric --to out", "--metric: t.py has no metric: give the Task one, or leave --metric out"),
        (
            SUMS,
            "--metric --to out",
            "--metric: t.py has no metric of outputs: give the Task one, or leave --metric out",
        ),
    ],
)
def test_a_metric_that_a_task_does_not_have_is_refused(folder: Path, source: str, arguments: str, message: str) -> None:
    _checkpoint(source)
    result = CliRunner().invoke(app, f"predict t.py --nproc 1 --checkpoint good {arguments}".split())
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"ddparity: {message}\n")
    assert not Path("out").exists()


INTERRUPTED = (
    WITH_METRIC.replace("nn.Linear(2, 1)", "Net()", 1)
    .replace(
        "def loss",
        """class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)

    def forward(self, x):
        import os, pathlib
        if not pathlib.Path("repaired").exists() and x[0, 0] == 8:
            os._exit(9)
        return super().forward(x)

def loss""",
    )
    .replace("torch.ones(10, 2)", "torch.arange(20.0).reshape(10, 2)")
)


def test_the_same_command_completes_a_prediction(folder: Path) -> None:
    """Batches have 2 samples and a file each. The process ends suddenly in the batch of sample 4."""
    _checkpoint(INTERRUPTED)
    assert _predict("--nproc", "1", "--to", "out").returncode == 9
    before = {file.name: file.stat().st_mtime_ns for file in Path("out").glob("part-*")}
    assert sorted(before) == ["part-000000000000.parquet", "part-000000000002.parquet"]
    Path("repaired").touch()
    done = _predict("--nproc", "2", "--to", "out", "--metric")
    assert done.returncode == 0, done.stderr
    after = {file.name: file.stat().st_mtime_ns for file in Path("out").glob("part-*")}
    assert len(after) == 5 and after.items() > before.items()
    task, model = load_task("t.py"), load_task("t.py").model()
    dp.load_checkpoint("good", model=model)
    expected = dp.predict(model, task.dataset("test"), 2)
    assert torch.equal(dp.read_predictions("out"), expected)
    assert f"{expected.mean().item():.6g}" in done.stdout
    Path("t.py").write_text(Path("t.py").read_text() + "\n# the model's code may have changed\n")
    done = _predict("--nproc", "1", "--to", "out")
    assert done.returncode == 2 and "out holds the results of another run: its key is " in done.stderr


SLOW = ONE.replace("nn.Linear(2, 1)", "Net()", 1).replace(
    "def loss",
    """class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)

    def forward(self, x):
        import threading
        print("running", flush=True)
        threading.Event().wait(600)

def loss""",
)


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_ctrl_c_ends_a_prediction(folder: Path, nproc: str) -> None:
    _checkpoint(SLOW)
    command = [sys.executable, "-m", "ddparity", "predict", "t.py", "--checkpoint", "good", "--nproc", nproc]
    with subprocess.Popen(
        [*command, "--to", "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            while "running" not in (line := process.stdout.readline()):
                assert line, process.communicate(timeout=60)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert "Traceback" not in err and "KeyboardInterrupt" not in err
    assert err.splitlines()[-1].startswith("ddparity: ")
    assert not list(Path("out").glob("*part-*")), "an incomplete file is left"


FAILS = ONE.replace("def loss(model, data):\n", "def loss(model, data):\n    import os, signal\n    {fault}\n")


def test_a_rank_that_fails_in_training_is_named(folder: Path) -> None:
    """A rank that is killed is in tests/launcher: `train` starts its ranks as `run` does."""
    (folder / "t.py").write_text(FAILS.format(fault="if os.environ['RANK'] == '1': raise OSError('lost')"))
    command = [sys.executable, "-m", "ddparity", "train", "t.py", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    end = done.stderr[done.stderr.index("ddparity: rank 1 failed") :]
    assert "ddparity: rank 1 failed: OSError: lost" in end
    assert "Traceback" in end and "typer" not in end


def test_a_wrong_task_ends_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddparity", "train", "missing.py", "--nproc", "2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = "ddparity: there is no file missing.py: TASK is file.py:name or package.module:name\n"
    assert capsys.readouterr() == ("", told)
