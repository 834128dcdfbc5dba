"""The default example, started by `ddparity train examples/digits.py`, on one process and on two."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ddparity as dp

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.py"
# Not in a test, because scikit-learn sets environment variables when it is first imported.
TASK = runpy.run_path(str(EXAMPLE))["digits"]


@dataclass
class Run:
    """The output of a training, and the rows of the table at its end."""

    folder: Path
    output: str
    table: dict[str, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    return {nproc: _train(tmp_path_factory.mktemp(f"nproc-{nproc}"), nproc) for nproc in (1, 2)}


def _train(folder: Path, nproc: int) -> Run:
    output = _ddparity(folder, "train", EXAMPLE, "--nproc", nproc)
    return Run(folder, output, _table(output))


def _ddparity(folder: Path, *arguments: object) -> str:
    command = [sys.executable, "-m", "ddparity", *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def _table(output: str) -> dict[str, str]:
    return dict(re.findall(r"^│ (.+?) +│ (.+?) +│$", output, re.MULTILINE))


@pytest.mark.parametrize("nproc", [1, 2])
def test_each_epoch_is_shown_once(nproc: int, runs: dict[int, Run]) -> None:
    shown = re.findall(r"^epoch (\d+)/(\d+): accuracy \d+\.\d\d %$", runs[nproc].output, re.MULTILINE)
    assert shown == [(str(epoch), str(TASK.epochs)) for epoch in range(1, TASK.epochs + 1)]


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_table_at_the_end(nproc: int, runs: dict[int, Run]) -> None:
    run = runs[nproc]
    assert run.output.count("trained on") == 1
    assert f"trained on {nproc} process" in run.output
    named = ["accuracy", "time", "samples a second", "fingerprint", "checkpoint", "losses and metrics"]
    assert list(run.table) == named
    assert float(run.table["accuracy"].removesuffix(" %")) >= 98
    assert float(run.table["samples a second"].replace(",", "")) > 0
    assert Path(run.table["checkpoint"]) == run.folder / "runs/digits/checkpoint.safetensors"
    assert run.table["fingerprint"] == dp.fingerprint(_trained(run))


def test_one_and_two_processes_end_with_the_same_model(runs: dict[int, Run]) -> None:
    assert runs[1].table["accuracy"] == runs[2].table["accuracy"]
    others = _trained(runs[2]).state_dict()
    for name, weights in _trained(runs[1]).state_dict().items():
        # Measured after 460 steps: at most 8e-7. With ReLU and MaxPool2d it is 0.1.
        assert (weights - others[name]).abs().max() <= 1e-4 * weights.abs().max(), name


def test_predict_finds_the_same_accuracy_and_the_same_logits(runs: dict[int, Run]) -> None:
    run = runs[1]
    checkpoint = ("--checkpoint", run.table["checkpoint"])
    table = _table(_ddparity(run.folder, "predict", EXAMPLE, *checkpoint))
    assert list(table) == ["samples", "accuracy", "time", "samples a second"]
    assert (table["samples"], table["accuracy"]) == ("360", run.table["accuracy"])
    out = run.folder / "logits"
    table = _table(_ddparity(run.folder, "predict", EXAMPLE, *checkpoint, "--nproc", 2, "--to", out, "--metric"))
    assert list(table) == ["samples", "accuracy", "time", "samples a second", "outputs"]
    assert (table["accuracy"], table["outputs"]) == (run.table["accuracy"], str(out))
    with torch.inference_mode():
        torch.testing.assert_close(dp.read_predictions(out), _trained(run).eval()(TASK.dataset("test").images))


def _trained(run: Run) -> torch.nn.Module:
    model = TASK.model()
    dp.load_checkpoint(run.table["checkpoint"], model=model)
    return model
