"""Outputs on disk: the same files from any number of processes, also after an interruption."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddparity as dp
from ddparity.inference import directory
from ddparity.inference.identity import identity
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
    options = {"rows_per_file": 6, "key": None if isinstance(model, nn.Module) else "a", **options}
    return dp.predict(model, torch.arange(LENGTH), 3, path, balance=balance, **options)


def _digests(path: Path) -> dict[str, str]:
    """Return digests of all files of a run but the one with the directory's token."""
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


def test_outputs_are_read_back_as_they_were(alone: Path) -> None:
    read = dp.read_predictions(alone)
    expected = dp.predict(_model, torch.arange(LENGTH), 3)
    for name in ("logits", "half", "noise"):
        assert read[name].dtype == expected[name].dtype and torch.equal(read[name], expected[name]), name
    assert read["text"] == expected["text"]
    assert read["found"]["names"] == expected["found"].names
    assert all(torch.equal(a, b) for a, b in zip(read["found"]["boxes"], expected["found"].boxes, strict=True))


class Dies(nn.Module):
    """Fails once: the first process that gets sample 31 is killed, or raises."""

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


class Holds(nn.Module):
    """A module with any value as an attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Callable:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def _times(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * factor


def _closure(factor: Any) -> Any:
    return lambda x: x * factor


def _saves(model: Any, path: Path, key: Any = None, **options: Any) -> Any:
    return dp.predict(model, torch.ones(4, 1), 2, path, key=key, **options)


LINEAR = nn.Linear(1, 1)


def _scaled(factor: float) -> nn.Module:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, factor), nn.init.zeros_(model.bias)
    return model


def _norm_first(first: bool) -> nn.Module:
    """Return a layer that does not print its options; its weights are always the same."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(1, 1, 1, norm_first=first)


class Adds(nn.Module):
    """A module with a buffer that is not saved."""

    def __init__(self, summand: float) -> None:
        super().__init__()
        self.register_buffer("summand", torch.tensor(summand), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.summand


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_scaled(1.0), _scaled(2.0)),
        (nn.Sequential(LINEAR, nn.ReLU()), nn.Sequential(LINEAR, nn.Tanh())),
        (nn.Sequential(LINEAR, nn.Softmax(0)), nn.Sequential(LINEAR, nn.Softmax(1))),
        (nn.Sequential(LINEAR, nn.Identity()), nn.Sequential(nn.Identity(), LINEAR)),
        (nn.Identity(), Holds(0)),
        (Holds(1), Holds(2)),
        (Holds("gelu"), Holds("relu")),
        (_norm_first(False), _norm_first(True)),
        (Adds(1.0), Adds(2.0)),
    ],
)
def test_other_modules_results_do_not_pass_for_this_ones(one: Any, other: Any, tmp_path: Path) -> None:
    _saves(one, tmp_path)
    for key in (None, "a"):
        with pytest.raises(ValueError, match=f"another run: its model is {type(one).__name__} .{{32}}, and here it is"):
            _saves(other, tmp_path, key)
    _saves(one, tmp_path)
    with pytest.raises(ValueError, match="another run: its key is None, and here it is 'a'"):
        _saves(one, tmp_path, "a")


FUNCTIONS = {
    "lambdas": (lambda x: x * 2.0, lambda x: x * 100.0),
    "partials": (functools.partial(_times, factor=2), functools.partial(_times, factor=100)),
    "closures": (_closure(2), _closure(100)),
    "objects": (Callable(2), Callable(100)),
    "methods": (Callable(2).__call__, Callable(100).__call__),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_other_functions_results_do_not_pass_for_this_ones(kind: str, tmp_path: Path) -> None:
    one, other = FUNCTIONS[kind]
    _saves(one, tmp_path / "no key")
    for key, message in (
        (None, "cannot compare .* model=.*, a function"),
        ("a", "its key is None, and here it is 'a'"),
    ):
        for model in (one, other):
            with pytest.raises(ValueError, match=message):
                _saves(model, tmp_path / "no key", key)
    _saves(one, tmp_path / "keyed", ("a", 1))
    for key, message in ((None, r"written with key=\('a', 1\): pass the same key"), ("b", r"its key is \('a', 1\)")):
        with pytest.raises(ValueError, match=message):
            _saves(other, tmp_path / "keyed", key)
    _saves(one, tmp_path / "keyed", ("a", 1))
    assert torch.equal(dp.read_predictions(tmp_path / "keyed"), one(torch.ones(4, 1)))


@pytest.mark.parametrize(
    "option", [{"inputs": lambda batch: batch}, {"collate_fn": torch.stack}], ids=["inputs", "collate_fn"]
)
def test_a_function_beside_the_model_needs_a_key_to_be_resumed(option: Any, tmp_path: Path) -> None:
    _saves(LINEAR, tmp_path / "no key", **option)
    with pytest.raises(ValueError, match=f"cannot compare what wrote them with {next(iter(option))}=.*, a function"):
        _saves(LINEAR, tmp_path / "no key", **option)
    for _ in range(2):
        _saves(LINEAR, tmp_path / "keyed", 1, **option)


def _without_a_key(path: str) -> None:
    _saves(_times, Path(path))


def test_every_rank_is_told_to_give_a_key(tmp_path: Path) -> None:
    run_ranks(_without_a_key, 2, str(tmp_path))
    before = _digests(tmp_path)
    for outcome in outcomes(_without_a_key, 2, str(tmp_path)):
        assert outcome.error.startswith(f"ValueError: {tmp_path} holds earlier results")
        assert "model=_times, a function" in outcome.error
        assert 'pass key= from the first call on, e.g. key="resnet18 v2, resized to 224"' in outcome.error
        assert outcome.seconds < 10
    assert _digests(tmp_path) == before


@pytest.mark.parametrize("key", [1.5, True, ["a"], ("a", None), b"a", ("a", (1, 2.0))])
def test_what_is_no_key_is_refused(key: Any) -> None:
    with pytest.raises(TypeError, match="give a str, an int, or a tuple of them"):
        dp.predict(LINEAR, torch.ones(4, 1), 2, key=key)


@pytest.mark.parametrize("other", ["1", (1,), ((1,),), "(1,)", 2])
def test_keys_are_equal_or_not(other: Any, tmp_path: Path) -> None:
    _saves(LINEAR, tmp_path, 1)
    with pytest.raises(ValueError, match="its key is 1, and here it is"):
        _saves(LINEAR, tmp_path, other)


def _other_key(path: str) -> None:
    _saves(LINEAR, Path(path), dist.get_rank())


def test_keys_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    for outcome in outcomes(_other_key, 2, str(tmp_path)):
        assert "predict's key" in outcome.error


class Counts(Holds):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held += 1
        return x


def test_a_module_that_counts_its_calls_is_another_model_after_them(tmp_path: Path) -> None:
    """What it counts may be what it computes with."""
    model = Counts(0)
    _writes(str(tmp_path), model=model)
    with pytest.raises(ValueError, match="its model is Counts"):
        _writes(str(tmp_path), model=model)
    _writes(str(tmp_path), model=Counts(0))  # as another process would


class Odd(nn.Linear):
    """A layer with an extra state that has no bytes to compare."""

    def get_extra_state(self) -> Any:
        return {1, 2}


def test_weights_that_cannot_be_compared_need_a_key(tmp_path: Path) -> None:
    _saves(Odd(1, 1), tmp_path)
    with pytest.raises(ValueError, match=r"cannot compare .* with the model's weights .*is a set"):
        _saves(Odd(1, 1), tmp_path)


def _in_a_world(wrap: bool) -> Any:
    model = nn.Sequential(_scaled(1.0), _scaled(2.0))
    with dp.world(device="cpu"):
        return identity(dp.replicate(model) if wrap else model, None, None, torch.ones(4), 4)


def test_a_model_is_the_same_at_any_world_size_and_compiled() -> None:
    (alone,) = run_ranks(_in_a_world, 1, False)
    assert not alone.uncompared
    assert run_ranks(_in_a_world, 2, True) == [alone] * 2
    model = nn.Sequential(_scaled(1.0), _scaled(2.0))
    for compiled in (torch.compile(model), nn.Sequential(torch.compile(model[0]), model[1])):
        assert identity(compiled, None, None, torch.ones(4), 4) == alone


class Pixels:
    """A sample that only a collate function can read, such as an image."""

    def __init__(self, value: int) -> None:
        self.value = value


def _collated(batch: list[Any]) -> torch.Tensor:
    return torch.tensor([[float(sample["image"].value)] for sample in batch])


def test_a_data_set_is_known_by_what_its_samples_hold() -> None:
    one, other = ([{"image": np.full(3, value), "label": ("a", 1)}] for value in (1, 2))
    assert identity(LINEAR, None, None, one, 1) == identity(LINEAR, None, None, one, 1)
    assert (
        identity(LINEAR, None, None, one, 1).values["data set"]
        != identity(LINEAR, None, None, other, 1).values["data set"]
    )


def test_samples_that_cannot_be_compared_need_a_key(tmp_path: Path) -> None:
    data = [{"image": Pixels(value)} for value in range(4)]
    dp.predict(LINEAR, data, 2, tmp_path, collate_fn=_collated)
    with pytest.raises(ValueError, match=r"the data set's samples \(sample 0\['image'\] is a Pixels"):
        dp.predict(LINEAR, data, 2, tmp_path, collate_fn=_collated)


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("secret")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".part-000000000000.parquet.99999").write_text("a draft of a rank that was killed")
    for _ in range(2):
        _writes(str(tmp_path))
    assert (tmp_path / ".env").read_text() == "secret"
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == [".env", ".ipynb_checkpoints"]


def test_a_deleted_schema_is_taken_from_a_file(alone: Path, tmp_path: Path) -> None:
    _writes(str(tmp_path))
    for name in ("_common_metadata", "part-000000000030.parquet"):
        (tmp_path / name).unlink()
    run_ranks(_writes, 2, str(tmp_path))
    assert {**_digests(tmp_path), "_common_metadata": ""} == {**_digests(alone), "_common_metadata": ""}
    assert dp.read_predictions(tmp_path)["text"] == dp.read_predictions(alone)["text"]


def _full(path: str) -> None:
    with mock.patch.object(pq.ParquetWriter, "write_table", side_effect=OSError(28, "Error writing bytes to file")):
        _writes(path)


def test_every_rank_learns_of_a_full_disk(tmp_path: Path) -> None:
    for outcome in outcomes(_full, 2, str(tmp_path)):
        assert "Error writing bytes to file, writing" in outcome.error
        assert "part-0000000000" in outcome.error and "with the data-set indices" in outcome.error
        assert outcome.seconds < 10
    assert not [name for name in os.listdir(tmp_path) if "part-" in name]


@pytest.mark.parametrize("to", ["0", ""])
def test_a_string_that_is_probably_no_path_is_refused(to: str) -> None:
    with pytest.raises(ValueError, match="give a rank as an integer"):
        dp.predict(_model, torch.arange(3), 3, to)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis.tex, which is no result of predict\(\)"):
        _writes(str(tmp_path))
    with pytest.raises(ValueError, match="is no result of predict"):
        dp.read_predictions(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_data_set_is_written(tmp_path: Path) -> None:
    path = dp.predict(_model, torch.arange(0), 3, tmp_path / "out", key="a")
    assert pq.read_table(path).to_pydict() == {"index": []}
    assert dp.read_predictions(path).shape == (0,)
    assert dp.predict(_model, torch.arange(0), 3, tmp_path / "out", key="a") == path


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


def _other_later(path: str, kind: str) -> None:
    def model(x: torch.Tensor) -> Any:
        odd = 4 in x.tolist()
        return {
            "dtype": {"a": x.float() if odd else x},
            "key": {"b" if odd else "a": x},
            "absent": {"a": None if odd else x},
        }[kind]

    dp.predict(model, torch.arange(8), 2, path)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dtype", "index 4: column 'a' is a tensor of float32 with 0 dimensions a sample, not a tensor of int64"),
        (
            "key",
            "index 4: the output is a dict with the keys ['b'], not a dict with the keys ['a'] as in the first batch",
        ),
    ],
)
def test_a_batch_that_is_unlike_the_first_is_refused(kind: str, message: str, world_size: int, tmp_path: Path) -> None:
    ended = outcomes(_other_later, world_size, str(tmp_path / "out"), kind)
    assert message in "".join(outcome.error for outcome in ended)
    assert all(outcome.error and outcome.seconds < 10 for outcome in ended)


def test_an_absent_column_is_like_the_first_batch(tmp_path: Path) -> None:
    _other_later(str(tmp_path), "absent")
    assert pq.read_table(tmp_path)["a"].to_pylist() == [0, 1, 2, 3, None, None, 6, 7]


def test_files_have_a_default_size(tmp_path: Path) -> None:
    path = dp.predict(lambda x: x, torch.arange(1000), 2, tmp_path / "out")
    files = sorted(name for name in os.listdir(path) if name.startswith("part-"))
    assert len(files) == 125 and files[1] == "part-000000000008.parquet"
    assert json.loads((path / "_run.json").read_text())["run"]["rows_per_file"] == 8
    with pytest.raises(ValueError, match="a run that resumes does not see all outputs"):
        dp.predict(lambda x: x, torch.arange(4), 2, tmp_path / "two", metric=lambda o, b: 1)


def _to(path: str) -> None:
    dp.predict(_model, torch.arange(LENGTH), 3, path)


@pytest.mark.parametrize("below", ["", "/in/side"])
def test_every_rank_learns_of_a_file_in_the_way(below: str, tmp_path: Path) -> None:
    file = tmp_path / "out.parquet"
    file.write_text("of somebody")
    for outcome in outcomes(_to, 2, f"{file}{below}"):
        assert "ValueError" in outcome.error and f"{file} is a file, and outputs go to a directory" in outcome.error
        assert "give one that is empty or new" in outcome.error
        assert outcome.seconds < 10
    assert file.read_text() == "of somebody"


def _lists(batch: list[Any]) -> torch.Tensor:
    return torch.stack(batch)


def _negated(batch: list[Any]) -> torch.Tensor:
    return -torch.stack(batch)


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"collate_fn": _lists}, "its collate_fn is None, and here it is _lists"),
        ({"collate_fn": _lists}, {"collate_fn": _negated}, "its collate_fn is _lists"),
        ({"collate_fn": _lists}, {}, "and here it is None"),
        ({}, {"schema": pa.schema([("noise", pa.float64())])}, "its schema is None, and here it is noise: double"),
        ({"schema": pa.schema([("noise", pa.float64())])}, {"schema": None}, "its schema is noise: double"),
    ],
)
def test_other_options_are_another_run(before: Any, now: Any, named: str, tmp_path: Path) -> None:
    _writes(str(tmp_path), **before)
    whole = _digests(tmp_path)
    with pytest.raises(ValueError, match=f"holds the results of another run: .*{named}"):
        _writes(str(tmp_path), **now)
    assert _digests(tmp_path) == whole
    _writes(str(tmp_path), **before)


def _kept_little(path: str) -> int:
    """Write batches of 48 KB, of which a rank may hold 100 KB. Return how much it held."""
    held = [0]
    copied = directory._copied

    def counted(table: pa.Table) -> pa.Table:
        held[0] = max(held[0], table.nbytes)
        return copied(table)

    with mock.patch.multiple(directory, _ROW_GROUP_BYTES=100_000, _copied=counted):
        dp.predict(_wide, torch.arange(96), 4, path, rows_per_file=48)
    return held[0]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x[:, None].float().expand(-1, 3_000).contiguous()


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_are_written_while_batches_run(world_size: int, tmp_path: Path) -> None:
    path = tmp_path / "out"
    batch = max(run_ranks(_kept_little, world_size, str(path)))
    for file in sorted(path.glob("part-*")):
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        assert sum(group.num_rows for group in groups) == 48
        # A group is written with the batch that reaches the limit.
        assert max(group.num_rows for group in groups) * batch / 4 < 100_000 + batch
        assert len(groups) == 4
    assert torch.equal(dp.read_predictions(path), _wide(torch.arange(96)))
