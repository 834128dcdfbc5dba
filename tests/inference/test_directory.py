"""Outputs on disk: the same files from any number of processes, also after an interruption."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import ddparity as dp
from ddparity.inference import directory
from ddparity.inference.content import Contents
from ddparity.inference.identity import identity, identity_of_dataset
from tests.inference import test_directory as directory_tests
from tests.ranks import free_port, kill_self, outcomes, run_ranks, torchrun_env

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


class Callable:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class WithAttribute(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("unsaved", torch.tensor([factor]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.unsaved


def _times(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return x * factor


def _closure(factor: Any) -> Any:
    return lambda x: x * factor


class Holds(nn.Module):
    """Anything, as an attribute."""

    def __init__(self, held: Any, hook: Any = None) -> None:
        super().__init__()
        self.held = held
        if hook is not None:
            self.register_forward_hook(hook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: Any) -> None:
        self.factor = factor


class Labels(list):  # type: ignore[type-arg]
    factor = 0


def _ring(factor: Any) -> list[Any]:
    ring: list[Any] = [factor]
    ring.append({"around": ring})
    return ring


def _edited(source: str) -> Any:
    """A module of the user's class, as a file says at one time and at another."""
    names: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec(f"class Net(nn.Module):\n    {source}", names)
    return names["Net"]()


FACTOR = 2.0
SETTINGS: dict[str, Any] = {"factor": 2.0}
NET: Any = None


def _of_a_global(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


def _in_a_lambda(x: torch.Tensor) -> Any:
    return (lambda y: y * FACTOR)(x)


def _in_a_generator(x: torch.Tensor) -> Any:
    return list(NET(y) for y in x)  # noqa: C400


def _in_a_comprehension(x: torch.Tensor) -> Any:
    return [NET(y) for y in x]


def _of_settings(x: torch.Tensor) -> Any:
    return x * SETTINGS["factor"]


def _of_another_function(x: torch.Tensor) -> Any:
    return _of_a_global(x)


def _of_a_module(x: torch.Tensor) -> Any:
    return directory_tests.FACTOR * x


LINEAR = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 2.0, lambda x: x * 100.0),
        (lambda x: [v for v in x if v in {1, 2}], lambda x: [v for v in x if v in {1, 3}]),
        (functools.partial(_times, factor=2), functools.partial(_times, factor=100)),
        (_closure(2), _closure(100)),
        (_closure(torch.ones(1)), _closure(torch.zeros(1))),
        (_closure(nn.Linear(1, 1)), _closure(nn.Linear(1, 1))),
        (Callable(2), Callable(100)),
        (Callable(2).__call__, Callable(100).__call__),
        (WithAttribute(2), WithAttribute(100)),
        (nn.Sequential(LINEAR, nn.ReLU()), nn.Sequential(LINEAR, nn.Tanh())),
        *[
            (Holds(make(2)), Holds(make(100)))
            for make in (
                lambda n: {"a": n},
                lambda n: {n: "a"},
                lambda n: [[n]],
                lambda n: (1, (n,)),
                lambda n: {1, n},
                lambda n: frozenset([(1, n)]),
                lambda n: [{"a": {n, "b"}}],
                lambda n: Found([n], None),
                lambda n: Callable(Callable(n)),
                lambda n: Slotted(n),
                lambda n: {Slotted(n)},
                lambda n: collections.deque([n]),
                lambda n: collections.OrderedDict(a=n),
                lambda n: types.MappingProxyType({"a": n}),
                lambda n: Labels([n]),
                lambda n: re.compile(str(n)),
                lambda n: random.Random(n),
                lambda n: np.array([n, None], dtype=object),
                lambda n: lambda x: x * n,
                lambda n: functools.cache(_closure(n)),
                lambda n: functools.partial(_times, factor=n),
                lambda n: nn.init.zeros_ if n == 2 else nn.init.ones_,
                lambda n: nn.ReLU if n == 2 else nn.Tanh,
                lambda n: [nn.Linear(1, n)],
                lambda n: _ring(n),
                lambda n: [_ring(1), n],
            )
        ],
        (Holds([1, [2]]), Holds([1, 2, []])),
        (Holds(["a", "b"]), Holds(["a\nstr\n'b'"])),
        (Holds(0, lambda module, x, y: y * 2), Holds(0, lambda module, x, y: y * 3)),
        (_edited("def forward(self, x): return x"), _edited("def forward(self, x): return -x")),
        (_edited("factor = 2"), _edited("factor = 3")),
    ],
)
def test_models_that_compute_something_else_have_another_identity(one: Any, other: Any) -> None:
    assert identity(one) != identity(other)
    assert identity(one) == identity(one)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (_of_a_global, "FACTOR", 3.0),
        (_in_a_lambda, "FACTOR", 3.0),
        (_of_another_function, "FACTOR", 3.0),
        (_of_a_module, "FACTOR", 3.0),
        (_of_settings, "SETTINGS", {"factor": 3.0}),
        (_in_a_generator, "NET", nn.Linear(1, 1)),
        (_in_a_comprehension, "NET", nn.Linear(1, 1)),
    ],
)
def test_a_function_is_known_by_what_it_names(
    function: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity(function)
    assert identity(function) == before
    monkeypatch.setattr(directory_tests, name, value)
    assert identity(function) != before


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


def test_what_cannot_be_looked_into_is_never_the_same(tmp_path: Path) -> None:
    model = Holds(n for n in range(3))
    _writes(str(tmp_path), model=model)
    with pytest.raises(ValueError, match="with a generator, which cannot be compared"):
        _writes(str(tmp_path), model=model)


def test_work_is_bounded_and_what_is_beyond_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[Any] = []
    for _ in range(100_000):  # far beyond what recursion can
        deep = [deep]
    assert identity(Holds(deep)) == identity(Holds(deep))
    assert "cannot be compared" not in str(identity(Holds(deep)))
    monkeypatch.setattr(sys.modules[Contents.__module__], "_OBJECTS", 1000)
    assert "with more than 1,000 objects, which cannot be compared" in str(identity(Holds(deep)))


@pytest.mark.parametrize(
    "held", [threading.Lock(), threading.RLock(), sys.stderr, torch.device("cpu"), weakref.ref(LINEAR)]
)
def test_what_computes_nothing_is_no_reason_to_refuse(held: Any) -> None:
    assert identity(Holds(held)) == identity(Holds(held))
    assert "cannot be compared" not in str(identity(Holds(held)))


def _in_a_world(wrap: bool) -> list[str | None]:
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    replicated = dp.replicate(model) if wrap else model
    with dp.world(device="cpu") as world:
        return [identity(replicated), identity(lambda x: replicated(x.to(world.device)))]


def test_a_model_is_the_same_at_any_world_size() -> None:
    (alone,) = run_ranks(_in_a_world, 1, False)
    assert run_ranks(_in_a_world, 2, True) == [alone] * 2


def _identities() -> list[str | None]:
    words = ["a", "b", "c", "d"]
    models = [_model, lambda x: x in {"a", "b", "c", "d"}, Callable(2), functools.partial(_times, factor=2)]
    models += [Holds([{*words}, {Labels: {(word, word) for word in words}}]), Holds(_ring({Slotted}))]
    models += [Holds({_closure(word) for word in words}), _in_a_generator, _of_a_module]
    return [*map(identity, models), identity_of_dataset([{"image": Pixels(7), "label": i} for i in range(5)], 5)]


def test_identities_are_the_same_in_every_process() -> None:
    first, second = run_ranks(_identities, 2, env=_other_hashes)
    assert first == second == _identities()


def _other_hashes(rank: int) -> dict[str, str]:
    return {"PYTHONHASHSEED": str(rank), **torchrun_env(2, _PORT)(rank)}


_PORT = free_port()


class Pixels:
    """What only a collate function understands, as an image."""

    size = (2, 2)

    def __init__(self, value: int) -> None:
        self.value = value

    def tobytes(self) -> bytes:
        return bytes([self.value] * 4)


def test_a_data_set_is_known_by_what_its_samples_hold() -> None:
    one, other = ([{"image": Pixels(value), "label": 1}] for value in (1, 2))
    assert identity_of_dataset(one, 1) != identity_of_dataset(other, 1)
    assert identity_of_dataset(one, 1) == identity_of_dataset(one, 1)


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("secret")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".part-000000000000.parquet.99999").write_text("a draft of a rank that was killed")
    for _ in range(2):
        _writes(str(tmp_path))
    assert (tmp_path / ".env").read_text() == "secret"
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == [".env", ".ipynb_checkpoints"]


def test_types_that_were_lost_are_taken_from_a_file(alone: Path, tmp_path: Path) -> None:
    _writes(str(tmp_path))
    for name in ("_common_metadata", "part-000000000030.parquet"):
        (tmp_path / name).unlink()
    run_ranks(_writes, 2, str(tmp_path))
    assert {**_digests(tmp_path), "_common_metadata": ""} == {**_digests(alone), "_common_metadata": ""}
    assert dp.read_predictions(tmp_path)["text"] == dp.read_predictions(alone)["text"]


def _full(path: str) -> None:
    with mock.patch.object(pq.ParquetWriter, "write_table", side_effect=OSError(28, "Error writing bytes to file")):
        _writes(path)


def test_a_full_disk_is_told_to_all(tmp_path: Path) -> None:
    for outcome in outcomes(_full, 2, str(tmp_path)):
        assert "Error writing bytes to file, writing" in outcome.error
        assert "part-0000000000" in outcome.error and "with the data-set indices" in outcome.error
        assert outcome.seconds < 10
    assert not [name for name in os.listdir(tmp_path) if "part-" in name]


@pytest.mark.parametrize("to", ["0", ""])
def test_a_string_that_is_hardly_a_path_is_refused(to: str) -> None:
    with pytest.raises(ValueError, match="give a rank as an integer"):
        dp.predict(_model, torch.arange(3), 3, to)


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


def _to(path: str) -> None:
    dp.predict(_model, torch.arange(LENGTH), 3, path)


@pytest.mark.parametrize("below", ["", "/in/side"])
def test_a_file_in_the_way_is_known_to_all(below: str, tmp_path: Path) -> None:
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
    """Batches of 48 KB, of which a rank may hold 100 KB; gives how much it held."""
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
def test_rows_go_to_disk_as_they_come(world_size: int, tmp_path: Path) -> None:
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
