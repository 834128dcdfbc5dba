"""Streams and data sets of other libraries: Hugging Face datasets, WebDataset, torchdata."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ddparity as dp
from tests.ranks import run_ranks

PLAN = dp.StreamPlan(8, 3, seed=1, shuffle_buffer=3)


def _rows(batch: Any) -> list:
    return batch["x"].tolist() if isinstance(batch, dict) else [int(one) for one in batch]


def _hugging_face(buffer: int = 0) -> Any:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": list(range(50))}).to_iterable_dataset(num_shards=5)
    if buffer:  # it reads in threads, whose random numbers nobody can seed
        return data.shuffle(seed=3, buffer_size=buffer)
    return data.map(lambda row: {"x": row["x"] + 0.5 * torch.rand(()).item()})


def _nodes(reader: int, readers: int, epoch: int) -> Any:
    nodes = pytest.importorskip("torchdata.nodes")
    return nodes.IterableWrapper(range(reader, 50, readers))


def _stream(kind: str) -> Any:
    return {"hugging face": _hugging_face, "shuffled": lambda: _hugging_face(7), "nodes": lambda: _nodes}[kind]()


def _read(kind: str, workers: int, stop: int, path: str = "", resume: bool = False) -> list:
    loader = dp.Loader(_stream(kind), PLAN, workers)
    if resume:
        dp.load_checkpoint(path, loader=loader)
    seen = []
    for step in loader.steps(stop):
        seen += [(step.epoch, step.number, micro.index, _rows(micro.data)) for micro in step]
    if path and not resume:
        dp.save_checkpoint(path, loader=loader)
    return seen


KINDS = ["hugging face", "shuffled", "nodes"]


def _read_all(workers: int, stop: int, folder: str = "", resume: bool = False) -> list[list]:
    return [_read(kind, workers, stop, f"{folder}/{kind}" if folder else "", resume) for kind in KINDS]


def test_streams_that_have_a_state(tmp_path: Path) -> None:
    alone = _read_all(0, 9)
    before = run_ranks(_read_all, 2, 1, 4, str(tmp_path))
    after = run_ranks(_read_all, 3, 0, 9, str(tmp_path), True)
    for number, steps in enumerate(alone):
        first = [value for epoch, *_, rows in steps for value in rows if epoch == 0]
        assert sorted(map(int, first)) == list(range(50))
        parts = [sorted(one for rank in ranks for one in rank[number]) for ranks in (before, after)]
        assert parts[0] + parts[1] == sorted(steps)


def _tars(folder: Path) -> list[str]:
    urls = []
    for number in range(6):
        urls.append(str(folder / f"{number}.tar"))
        with tarfile.open(urls[-1], "w") as tar:
            for one in range(5 + number % 2):
                info = tarfile.TarInfo(f"{number * 10 + one}.txt")
                content = str(number * 10 + one).encode()
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return urls


def _read_tars(urls: list[str], workers: int) -> list:
    wds = pytest.importorskip("webdataset")

    def stream(reader: int, readers: int, epoch: int) -> Any:
        own = wds.WebDataset(urls[reader::readers], shardshuffle=False, nodesplitter=lambda urls: urls)
        return own.decode().to_tuple("txt").map(lambda row: int(row[0]))

    loader = dp.Loader(stream, dp.StreamPlan(6, 2, shuffle_buffer=4), workers)
    return [(step.number, micro.index, _rows(micro.data)) for step in loader for micro in step]


@pytest.mark.filterwarnings("ignore")  # of the library
def test_tar_files_of_webdataset(tmp_path: Path) -> None:
    urls = _tars(tmp_path)
    alone = _read_tars(urls, 0)
    assert sorted(x for *_, rows in alone for x in rows) == sorted(
        10 * number + one for number in range(6) for one in range(5 + number % 2)
    )
    ranks = run_ranks(_read_tars, 2, urls, 2)
    assert sorted(one for rank in ranks for one in rank) == alone


def _transformed(workers: int) -> list:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": list(range(20))})
    # The function gets a dict of columns, several samples at once.
    data.set_transform(lambda rows: {"x": [x + torch.rand(()).item() / 2 for x in rows["x"]]})
    loader = dp.Loader(data, None, workers, global_batch=8, micro_batch=2)
    return [(step.number, micro.index, micro.data["x"].tolist()) for step in loader for micro in step]


def test_a_data_set_of_hugging_face_with_a_transform() -> None:
    alone = _transformed(0)
    assert sorted(int(x) for *_, rows in alone for x in rows) == list(range(20))
    ranks = run_ranks(_transformed, 2, 1)
    assert sorted(one for rank in ranks for one in rank) == alone


def _predict(workers: int) -> Any:
    return dp.predict(lambda batch: batch["x"].floor(), _hugging_face(), 4, num_workers=workers)


def test_predictions_of_a_stream_with_workers() -> None:
    """In a worker a stream of Hugging Face would read only the worker's part of a shard."""
    assert run_ranks(_predict, 2, 2)[0].tolist() == list(range(50))
