"""Streams and data sets of other libraries: Hugging Face datasets, WebDataset, torchdata.

All of them are read in one start of processes for each number of ranks, since each process imports the libraries.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets
import datasets.distributed
import pytest
import torch
import torchdata.nodes
import webdataset

import ddparity as dp
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
PLAN = dp.StreamPlan(8, 3, seed=1, shuffle_buffer=3)
TARS = [range(10 * number, 10 * number + 5 + number % 2) for number in range(6)]


def _rows(batch: Any) -> list:
    return batch["x"].tolist() if isinstance(batch, dict) else [float(one) for one in batch]


def _augmented(value: float) -> float:
    return value + 0.5 * torch.rand(()).item()


def _hugging_face(rows: int = 50) -> Any:
    data = datasets.Dataset.from_dict({"x": list(range(rows))}).to_iterable_dataset(num_shards=5)
    return data.map(lambda row: {"x": _augmented(row["x"])})


def _shuffled() -> Any:
    # A buffer of the library's own. It reads in threads, whose random numbers nobody can seed.
    data = datasets.Dataset.from_dict({"x": list(range(50))}).to_iterable_dataset(num_shards=5)
    return data.shuffle(seed=3, buffer_size=7)


def _nodes() -> Any:
    def stream(reader: int, readers: int, epoch: int) -> Any:
        numbers = torchdata.nodes.IterableWrapper(range(reader, 50, readers))
        return torchdata.nodes.Mapper(numbers, _augmented)

    stream.num_shards = 3  # type: ignore[attr-defined]  # for predictions
    return stream


def _tars(folder: Path) -> Any:
    urls = sorted(map(str, folder.glob("*.tar")))

    def stream(reader: int, readers: int, epoch: int) -> Any:
        own = webdataset.WebDataset(urls[reader::readers], shardshuffle=False, nodesplitter=lambda urls: urls)
        return own.decode().to_tuple("txt").map(lambda row: _augmented(int(row[0])))

    stream.num_shards = 3  # type: ignore[attr-defined]
    return stream


def _write_tars(folder: Path) -> None:
    for number, samples in enumerate(TARS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for one in samples:
                info = tarfile.TarInfo(f"{one}.txt")
                info.size = len(content := str(one).encode())
                tar.addfile(info, io.BytesIO(content))


def _streams(folder: Path) -> dict[str, Any]:
    return {"hugging face": _hugging_face(), "shuffled": _shuffled(), "nodes": _nodes(), "tars": _tars(folder)}


SAMPLES = {
    "hugging face": list(range(50)),
    "shuffled": list(range(50)),
    "nodes": list(range(50)),
    "tars": [one for samples in TARS for one in samples],
}


def _read(stream: Any, workers: int, stop: int, path: Path, resume: bool) -> list:
    loader = dp.Loader(stream, PLAN, workers)
    if resume:
        dp.load_checkpoint(path, loader=loader)
    seen = []
    for step in loader.steps(stop):
        seen += [(step.epoch, step.number, micro.index, _rows(micro.data)) for micro in step]
    if not resume:
        dp.save_checkpoint(path, loader=loader)
    return seen


def _transformed(workers: int) -> list:
    data = datasets.Dataset.from_dict({"x": list(range(20))})
    # The function gets a dict of columns, several samples at once.
    data.set_transform(lambda rows: {"x": [_augmented(x) for x in rows["x"]]})
    loader = dp.Loader(data, None, workers, global_batch=8, micro_batch=2)
    return [(step.number, micro.index, micro.data["x"].tolist()) for step in loader for micro in step]


def _whole(batch: Any) -> torch.Tensor:
    return torch.as_tensor(batch["x"] if isinstance(batch, dict) else batch, dtype=torch.float64)


def _read_all(folder: Path, workers: int, stop: int, resume: bool = False) -> dict[str, list]:
    streams = _streams(folder)
    found = {name: _read(one, workers, stop, folder / name.replace(" ", "_"), resume) for name, one in streams.items()}
    found["transformed"] = _transformed(workers)
    found["predictions"] = [
        dp.predict(_whole, one, 4, "all", num_workers=workers) for name, one in streams.items() if name != "shuffled"
    ]
    return found


@pytest.fixture(scope="module")
def alone_and_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[list]]:
    """What one process has; what two ranks have until step 4, with a worker; and three from there, without."""
    folder, other = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("alone")
    _write_tars(folder), _write_tars(other)
    before = run_ranks(_read_all, 2, folder, 1, 4)
    after = run_ranks(_read_all, 3, folder, 0, 9, True)
    return _read_all(other, 0, 9), [before, after]


@pytest.mark.parametrize("name", SAMPLES)
def test_streams_continue_on_another_number_of_ranks(name: str, alone_and_ranks: Any) -> None:
    alone, (before, after) = alone_and_ranks
    first = [value for epoch, *_, rows in alone[name] for value in rows if epoch == 0]
    assert sorted(map(int, first)) == SAMPLES[name], "each sample once"
    parts = [sorted(one for rank in ranks for one in rank[name]) for ranks in (before, after)]
    assert parts[0] + parts[1] == sorted(alone[name])


def test_a_data_set_of_hugging_face_with_a_transform(alone_and_ranks: Any) -> None:
    alone, groups = alone_and_ranks
    assert sorted(int(x) for *_, rows in alone["transformed"] for x in rows) == list(range(20))
    for ranks in groups:
        assert sorted(one for rank in ranks for one in rank["transformed"]) == alone["transformed"]


def test_predictions_of_streams(alone_and_ranks: Any) -> None:
    """In a worker a stream of Hugging Face would read only the worker's part of a shard."""
    alone, groups = alone_and_ranks
    names = [name for name in SAMPLES if name != "shuffled"]
    for name, outputs in zip(names, alone["predictions"], strict=True):
        assert sorted(outputs.long().tolist()) == SAMPLES[name]
    for ranks in groups:
        for rank in ranks:
            torch.testing.assert_close(rank["predictions"], alone["predictions"], rtol=0, atol=0)


def test_a_part_of_a_stream_of_hugging_face_is_refused() -> None:
    """The readers would cut it once more: half of the samples were lost on two ranks."""
    part = datasets.distributed.split_dataset_by_node(_hugging_face(), 1, 2).map(lambda row: row)
    with pytest.raises(ValueError, match=r"Loader got a stream that split_dataset_by_node\(rank=1, world_size=2\)"):
        dp.Loader(part, PLAN)
    with pytest.raises(ValueError, match="predict got a stream that split_dataset_by_node"):
        dp.predict(_whole, part, 4)
    whole = datasets.distributed.split_dataset_by_node(_hugging_face(), 0, 1)
    assert len(dp.predict(_whole, whole, 4)) == 50


def test_a_stream_of_hugging_face_reads_little_again_at_any_position() -> None:
    read = []

    def noted(row: dict) -> dict:
        read.append(row["x"])
        return row

    def loader() -> dp.Loader:
        data = datasets.Dataset.from_dict({"x": list(range(20_000))}).to_iterable_dataset(num_shards=4)
        return dp.Loader(data.map(noted), dp.StreamPlan(16, 4, shuffle_buffer=10))

    first, again = loader(), loader()
    for _ in first.steps(400):
        pass
    again.load_state_dict(first.state_dict())
    expected = [_rows(micro.data) for micro in next(first.steps(401))]
    read.clear()
    assert [_rows(micro.data) for micro in next(again.steps(401))] == expected
    assert len(read) <= 4 * (2 * 10 + 2 * 4 + 1)  # of each reader two buffers, and two micro-batches
