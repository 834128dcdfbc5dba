"""Correct Tasks have parity, and each fault in a Task is found, with its stage and cause."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ddparity as dp
from ddparity.cli import app
from ddparity.parity import CheckedStep, Comparison, Difference, show
from ddparity.parity.causes import CAUSES
from ddparity.parity.noise import PermutedSum, envelope, tolerance_factor
from ddparity.parity.notes import checked_steps
from ddparity.parity.recorder import difference, digest
from ddparity.parity.run import _counted
from tests.parity.verify_cases import (
    EVERY_PART,
    FAULTS,
    IMAGES,
    cnn,
    cnn_without_dropout,
    correct_task,
    dropped_micro_batch,
    fails_on_rank_1,
)

ROOT = Path(__file__).parents[2]

# Faults whose stage strict mode finds in another way than fast mode.
BITS = (
    "wrong scale of the loss",
    "wrong scale of gradients",
    "unseeded draw in a later step",
    "learning rate of the world",
    "buffer of the rank",
)


@pytest.mark.parametrize(
    ("fault", "reduction"), [*((fault, "fast") for fault in FAULTS), *((fault, "strict") for fault in BITS)]
)
def test_a_fault_is_caught_with_its_stage_and_cause(fault: str, reduction: str) -> None:
    parts, processes, stage, cause = FAULTS[fault]
    with pytest.raises(dp.ParityError) as caught:
        dp.verify(correct_task(**parts), (1, 2), steps=3, reduction=reduction, permutations=2)
    (found,) = caught.value.comparison.divergences
    assert (found.processes, found.stage, found.cause) == (processes, stage, CAUSES[cause])
    assert found.cause.sentence in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (
            {"global_batch": 8},
            {"world_sizes": (2,), "steps": 1000, "permutations": 2},
        ),  # two micro-batches have only one sum
        ({**IMAGES, "model": cnn}, {"world_sizes": (1, 3), "steps": 12, "num_workers": 1}),
        ({**IMAGES, "model": cnn}, {"world_sizes": (3, 2), "steps": 4, "reduction": "strict"}),
    ],
)
def test_a_correct_task_has_parity(parts: dict, options: dict) -> None:
    found = dp.verify(correct_task(**parts), **options)
    assert found.parity
    sizes = {*options["world_sizes"]} | {1}
    assert set(found.fingerprints) == sizes
    several = max(sizes)
    assert [one.step for one in found.checked if one.processes == several] == checked_steps(options["steps"])
    assert all(one.samples for one in found.checked)
    assert len(set(found.fingerprints.values())) == 1 or options.get("reduction") != "strict"
    assert found.blind_from is None


@pytest.mark.parametrize("reduction", ["fast", "strict"])
def test_every_part_of_a_task_is_verified(reduction: str) -> None:
    found = dp.verify(dp.Task(**EVERY_PART), (2,), steps=4, reduction=reduction, permutations=2)
    assert [one.step for one in found.checked] == [1, 2, 3, 4]
    assert len(set(found.fingerprints.values())) == 1 or reduction == "fast"


def test_units_of_joined_micro_batches() -> None:
    count = _counted(dp.Task(**EVERY_PART), joined=True)
    labels = [torch.tensor([0, 1, 2]), torch.tensor([0, 2])]
    assert count is not None
    assert count([(n, 0.5, [n], (None, one)) for n, one in enumerate(labels)]) == 3


def test_checked_steps_stay_few() -> None:
    assert checked_steps(3) == [1, 2, 3]
    assert checked_steps(1000)[:20] == list(range(1, 21))
    assert checked_steps(1000)[-1] == 1000
    assert len(checked_steps(1000)) == 30
    assert len(checked_steps(10**6)) < 60


def test_synchronised_batch_norms_are_compared_with_joined_micro_batches() -> None:
    parts = {**IMAGES, "model": cnn_without_dropout, "drop_last": True}
    found = dp.verify(correct_task(**parts), (2, 3), steps=4, sync_batchnorm=True, permutations=2)
    assert found.synchronised
    assert "joined" in found.verdict()
    with pytest.raises(dp.ParityError, match=r"in gradients"):  # joined micro-batches hide no fault
        dp.verify(correct_task(**parts, loss=dropped_micro_batch), (2,), steps=3, sync_batchnorm=True, permutations=2)
    with pytest.raises(ValueError, match="draws random numbers in its forward"):
        dp.verify(correct_task(**{**parts, "model": cnn}), (2,), steps=1, sync_batchnorm=True)


@pytest.mark.parametrize("runs", [1, 2, 4, 8])
def test_the_factor_keeps_false_alarms_rare(runs: int) -> None:
    """Draw how often one more difference of the same distribution exceeds the factor times the largest of `runs`."""
    draws, alarm = 2_000_000, 0.01
    numbers = np.abs(np.random.default_rng(0).standard_normal((runs + 1, draws), dtype=np.float32))
    share = np.mean(numbers[-1] > tolerance_factor(runs, 1, alarm) * numbers[:-1].max(0))
    assert share <= 1.02 * alarm  # 20,000 are expected
    assert share > alarm / 4 or runs == 8  # the bound is not far above the probability


def test_the_envelope_grows_with_the_steps_and_is_at_least_one_unit() -> None:
    runs = [{"w": {1: 0.0, 2: 3e-7, 3: 1e-7}}, {"w": {1: 1e-8, 2: 1e-7, 3: 2e-7}}]
    assert envelope(runs, {"w": 1e-7, "n": 0.0}, [1, 2, 3]) == {
        "w": {1: 1e-7, 2: 3e-7, 3: 3e-7},
        "n": {1: 0.0, 2: 0.0, 3: 0.0},
    }


def test_a_permuted_sum_is_the_sum_to_rounding() -> None:
    model = torch.nn.Linear(3, 2)
    for count in (1, 2, 11):  # 11 are more than the parts
        generator = torch.Generator().manual_seed(count)
        gradients = torch.randn(count, 2, 3, generator=generator)
        permuted = PermutedSum(model, generator)
        permuted.begin(count)
        for number, gradient in enumerate(gradients):
            model.weight.grad = gradient.clone()
            permuted.take(number)
        permuted.finish()
        torch.testing.assert_close(model.weight.grad.double(), gradients.double().sum(0), rtol=1e-6, atol=1e-6)
        assert model.bias.grad is None


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 1.0], 0.5),
        ([0.0, 0.0], [0.0, 1e-9], 1.0),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([math.inf, 1.0], [math.inf, 0.5], 0.5),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], math.inf),
    ],
)
def test_differences(value: list[float], reference: list[float], expected: float) -> None:
    assert difference(torch.tensor(value), torch.tensor(reference)) == expected


def test_digests_see_bits_names_and_types() -> None:
    values = [
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), np.zeros(2), [0.0, 0.0], (0.0, 0.0), 0.0, -0.0, 0,
        None, {"a": 0.0}, {"b": 0.0}, ["ab"], ["a", "b"], torch.tensor([0.0, -0.0]), True, 1,
        np.array(["a"], dtype=object),
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"x": torch.arange(4)[::2]}) == digest({"x": torch.tensor([0, 2])})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"verify\(steps=0\): must be at least 1"),
        ({"world_sizes": (1, 0)}, r"world_sizes=\[0, 1\]\): a number of processes must be at least 1"),
        ({"permutations": 1}, r"permutations=1\): must be at least 2"),
        ({"world_sizes": (5,)}, "5 ranks but only 4 micro-batches"),
        ({"reduction": "strict", "sync_batchnorm": True}, "leave one of the two out"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dp.verify(correct_task(), **arguments)


def test_a_task_that_cannot_be_pickled_is_refused() -> None:
    with pytest.raises(TypeError, match="make its parts functions of a module, not lambdas"):
        dp.verify(correct_task(loss=lambda model, data: model(data[0]).sum()))


def test_inside_a_launched_job_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="torchrun started this process, as rank 1 of 2"):
        dp.verify(correct_task())


def test_a_run_that_fails_names_its_rank() -> None:
    with pytest.raises(dp.RankFailure, match=r"rank 1 failed in run_together: .*lost on rank 1") as caught:
        dp.verify(correct_task(loss=fails_on_rank_1), steps=2, reduction="strict")
    assert "fails_on_rank_1" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_stands_on_its_page(name: str) -> None:
    cause = CAUSES[name]
    page = (ROOT / cause.page).read_text()
    assert " ".join(cause.sentence.split()) in " ".join(page.replace("**", "").split())


TASK = """
import torch
import ddparity as dp
from tests.parity import verify_cases

print("a Task may print")
task = verify_cases.correct_task({parts})
"""


def _command(folder: Path, parts: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "t.py").write_text(TASK.format(parts=parts))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "ddparity", "verify", "t.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_command_prints_one_json_document_and_a_picture(tmp_path: Path) -> None:
    done = _command(
        tmp_path, "", "--json", "--nproc", "2", "--steps", "3", "--permutations", "2", "--plot", "p/out.png"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parity"]
    assert set(found["fingerprints"]) == {"1", "2"}
    assert [one["step"] for one in found["checked"]] == [1, 2, 3]
    assert (tmp_path / "p" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_exits_with_1_if_the_runs_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "t", raising=False)  # monkeypatch removes it again at the end
    (tmp_path / "t.py").write_text(TASK.format(parts="collate_fn=verify_cases.duplicating_collate"))
    command = ["verify", str(tmp_path / "t.py"), "--world-sizes", "1,2", "--steps", "2", "--reduction", "strict"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    lines = done.stdout.splitlines()
    assert "differ" in done.stdout
    assert lines[-3] == "no parity"
    assert lines[-2].startswith(
        "the runs on 1 and 2 processes diverge at step 1, in data, micro-batch 2 (rank 1): other data for"
    )
    assert lines[-1] == str(CAUSES["SAMPLES"])


def test_a_table_merges_successive_equal_rows(capsys: pytest.CaptureFixture[str]) -> None:
    zero, some = Difference(0.0, 0.0), Difference(0.5, 0.0, "w")
    steps = [CheckedStep(step, 2, zero, zero, zero, zero, True, True) for step in (1, 2, 3)]
    last = CheckedStep(4, 2, some, zero, zero, zero, False, False)
    show(Comparison(4, "strict", False, {1: "a" * 64, 2: "b" * 64}, 0, 0.0, (*steps, last), (), ()), "t")
    out = capsys.readouterr().out
    assert "│ 1 to 3 │       0 │" in out
    assert "│ 4      │ 5.0e-01 │             0 │    0 │  differ │" in out
    assert "b" * 64 in out
