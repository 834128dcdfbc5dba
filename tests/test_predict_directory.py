"""Outputs on disk: the same files from any number of processes, also after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import ddparity as dp
from tests.ranks import kill_self, outcomes, run_ranks

LENGTH = 53


@dataclasses.dataclass
class Found:
    boxes: Any
    names: Any


def _model(x: torch.Tensor) -> dict[str, Any]:
    numbers = x.tolist()
    return {
        "logits": x[:, None].float() * torch.tensor([0.1, 1.0, 10.0]),
        "half": x.to(torch.bfloat16),
        "noise": torch.rand(len(x)),
        "text": [f"sample {n}" if n % 5 else None for n in numbers],
        "found": Found([torch.full((n % 3, 4), float(n)) for n in numbers], [["a"] * (n % 3) for n in numbers]),
    }


def _writes(path: str, balance: str = "contiguous", model: Any = _model, **options: Any) -> Any:
    return dp.predict(model, torch.arange(LENGTH), 3, path, balance=balance, rows_per_file=6, **options)


def _digests(path: Path) -> dict[str, str]:
    """Of all that a run leaves but the name that it gave the directory."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.iterdir())
        if file.name != "_run.json"
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "out"
    assert _writes(str(path)) == path
    return path


@pytest.mark.parametrize("balance", ["contiguous", "dynamic"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_files_are_the_same_bytes(world_size: int, balance: str, alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert run_ranks(_writes, world_size, str(path), balance) == [path] * world_size
    assert _digests(path) == _digests(alone)


def test_any_reader_finds_one_row_a_sample_in_order(alone: Path) -> None:
    for table in (pq.read_table(alone), pyarrow.dataset.dataset(alone).to_table()):
        assert table.column_names == ["index", "logits", "half", "noise", "text", "found.boxes", "found.names"]
        assert table["index"].to_pylist() == list(range(LENGTH))
        assert table["text"].to_pylist() == [f"sample {n}" if n % 5 else None for n in range(LENGTH)]
        assert table["half"].to_pylist() == torch.arange(LENGTH).to(torch.bfloat16).tolist()
        assert table["found.boxes"].to_pylist() == [[[float(n)] * 4] * (n % 3) for n in range(LENGTH)]


def test_they_can_be_read_back_as_they_were(alone: Path) -> None:
    read = dp.read_predictions(alone)
    expected = dp.predict(_model, torch.arange(LENGTH), 3)
    for name in ("logits", "half", "noise"):
        assert read[name].dtype == expected[name].dtype and torch.equal(read[name], expected[name]), name
    assert read["text"] == expected["text"]
    assert read["found"]["names"] == expected["found"].names
    assert all(torch.equal(a, b) for a, b in zip(read["found"]["boxes"], expected["found"].boxes, strict=True))


class Dies(nn.Module):
    """On the way, once: the first process to come to sample 31 is killed, or fails."""

    def __init__(self, how: str, marker: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.how, self.marker = how, marker

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        if 31 in x.tolist() and not os.path.exists(self.marker):
            Path(self.marker).touch()
            if self.how == "kill":
                kill_self()
            raise OSError("lost")
        return _model(x)


def _dies(path: str, balance: str, how: str, marker: str) -> None:
    _writes(path, balance, Dies(how, marker))


@pytest.mark.parametrize("balance", ["contiguous", "dynamic"])
@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("before", [1, 3])
def test_a_run_that_was_interrupted_resumes_at_another_world_size(
    before: int, how: str, balance: str, alone: Path, tmp_path: Path
) -> None:
    path, marker = tmp_path / "out", str(tmp_path / "marker")
    ended = outcomes(_dies, before, str(path), balance, how, marker)
    assert all(outcome.error or outcome.exitcode == -9 for outcome in ended)
    assert all(outcome.seconds < 10 for outcome in ended)
    with pytest.raises(ValueError, match=r"is not complete: \d of 9 files are missing.*The same predict\(\) again"):
        dp.read_predictions(path)
    whole = {name: (path / name).stat().st_mtime_ns for name in _digests(path) if name.startswith("part-")}
    if before == 1:
        assert len(whole) == 5
    run_ranks(_dies, 2, str(path), balance, how, marker)
    assert _digests(path) == _digests(alone)
    assert all((path / name).stat().st_mtime_ns == time for name, time in whole.items()), "a file was written again"
    run_ranks(_dies, 2, str(path), balance, how, marker)  # there is nothing left to do
    assert all((path / name).stat().st_mtime_ns == time for name, time in whole.items())


def test_a_damaged_file_is_written_again(alone: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    _writes(str(path))
    file = path / "part-000000000012.parquet"
    file.write_bytes(file.read_bytes()[:-5])
    _writes(str(path))
    assert _digests(path) == _digests(alone)


def _other(path: str, what: str) -> None:
    data = torch.arange(LENGTH)
    options: dict[str, Any] = {"rows_per_file": 6}
    model: Any = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0 if what == "model" else 2.0)
    nn.init.zeros_(model.bias)
    if what == "data":
        data = torch.cat([data[:-1], torch.tensor([7])])
    if what == "length":
        data = data[:-1]
    if what == "inputs":
        options["inputs"] = lambda batch: -batch
    if what == "seed":
        options["seed"] = 1
    if what == "rows":
        options["rows_per_file"] = 9
    if what == "function":
        model = lambda batch: batch  # noqa: E731
    dp.predict(model, data[:, None].float(), 4 if what == "batch" else 3, path, **options)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("model", "its model is Linear"),
        ("function", "its model is Linear"),
        ("data", "its data set is Tensor of 53 samples"),
        ("length", "its data set is Tensor of 53 samples"),
        ("inputs", "its inputs is None"),
        ("seed", "its seed is 0, and here it is 1"),
        ("rows", "its rows_per_file is 6, and here it is 9"),
        ("batch", "rows_per_file=6): give a multiple of the batch size, 4"),
    ],
)
def test_a_directory_of_another_run_is_refused(what: str, named: str, tmp_path: Path) -> None:
    _other(str(tmp_path / "out"), "same")
    before = _digests(tmp_path / "out")
    refused, other = outcomes(_other, 2, str(tmp_path / "out"), what)
    assert "ValueError: " in refused.error and named in refused.error
    assert "RankFailure: rank 0 failed in predict" in other.error
    assert max(refused.seconds, other.seconds) < 10
    assert _digests(tmp_path / "out") == before
    _other(str(tmp_path / "out"), "same")


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis.tex, which is no result of predict\(\)"):
        _writes(str(tmp_path))
    with pytest.raises(ValueError, match="is no result of predict"):
        dp.read_predictions(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_data_set_is_a_data_set(tmp_path: Path) -> None:
    path = dp.predict(_model, torch.arange(0), 3, tmp_path / "out")
    assert pq.read_table(path).to_pydict() == {"index": []}
    assert dp.read_predictions(path).shape == (0,)
    assert dp.predict(_model, torch.arange(0), 3, tmp_path / "out") == path


def _late_type(path: str, schema: Any) -> None:
    dp.predict(
        lambda x: {"note": [None if n < 4 else f"n{n}" for n in x.tolist()]}, torch.arange(9), 2, path, schema=schema
    )


def test_a_type_that_the_first_batch_does_not_show_can_be_given(tmp_path: Path) -> None:
    ended = outcomes(_late_type, 2, str(tmp_path / "a"), None)
    assert any("column 'note'" in outcome.error and "schema=" in outcome.error for outcome in ended)
    assert all(outcome.error and outcome.seconds < 10 for outcome in ended)
    run_ranks(_late_type, 2, str(tmp_path / "b"), pa.schema([("note", pa.string())]))
    assert pq.read_table(tmp_path / "b")["note"].to_pylist() == [None] * 4 + [f"n{n}" for n in range(4, 9)]


def test_files_have_a_size_of_their_own(tmp_path: Path) -> None:
    path = dp.predict(lambda x: x, torch.arange(1000), 2, tmp_path / "out")
    files = sorted(name for name in os.listdir(path) if name.startswith("part-"))
    assert len(files) == 125 and files[1] == "part-000000000008.parquet"
    assert json.loads((path / "_run.json").read_text())["run"]["rows_per_file"] == 8
    with pytest.raises(ValueError, match="a run that resumes does not see all outputs"):
        dp.predict(lambda x: x, torch.arange(4), 2, tmp_path / "two", metric=lambda o, b: 1)
