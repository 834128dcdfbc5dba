"""Iterable data sets that can be cut into shards; others are refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

import ddparity as dp
from tests.ranks import outcomes, run_ranks

SIZES = (5, 0, 3, 8, 1)


class Sharded(IterableDataset):
    """A stream like datasets.IterableDataset, with shards of different sizes."""

    num_shards = len(SIZES)

    def __init__(self, shards: range = range(len(SIZES)), broken: int = -1) -> None:
        self.shards, self.broken = shards, broken

    def shard(self, num_shards: int, index: int) -> Sharded:
        assert num_shards == len(SIZES)
        return Sharded(self.shards[index : index + 1], self.broken)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        for shard in self.shards:
            for number in range(SIZES[shard]):
                value = 10 * shard + number
                if value == self.broken:
                    raise OSError("truncated")
                yield torch.tensor([value + torch.rand(()).item() / 10]), f"sample {value}"


def _model(batch: list[Any]) -> dict[str, Any]:
    x, names = batch
    return {"x": x, "noise": torch.rand(len(x)), "names": list(names)}


def _predicts(num_workers: int, to: Any) -> Any:
    outputs = dp.predict(_model, Sharded(), 2, to, num_workers=num_workers)
    metric = dp.predict(_model, Sharded(), 2, to, num_workers=num_workers, metric=lambda o, b: len(o["names"]))
    return outputs and (outputs["x"].tolist(), outputs["noise"].tolist(), outputs["names"], metric)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_do_not_depend_on_processes_and_workers(world_size: int, num_workers: int) -> None:
    expected = _predicts(0, 0)
    assert expected[2] == [name for _, name in Sharded()]
    assert [round(value - 0.05) for (value,) in expected[0]] == [int(name[7:]) for name in expected[2]]
    assert len(set(expected[1])) == expected[3] == sum(SIZES)
    for to in (0, "all"):
        received = run_ranks(_predicts, world_size, num_workers, to)
        assert received == [expected if to in ("all", rank) else None for rank in range(world_size)]


def _broken(num_workers: int) -> None:
    dp.predict(_model, Sharded(broken=34), 2, num_workers=num_workers)


@dataclasses.dataclass
class Seeded:
    """A stream that a function gives, which draws by `sample_seed`; here an object, or a method of it."""

    num_shards: int = 3

    def __call__(self, reader: int, readers: int, epoch: int) -> Iterator[torch.Tensor]:
        for number in range(reader, 20, readers):
            yield torch.tensor([number, dp.sample_seed() % 2**53], dtype=torch.float64)


def _predict_seeded(num_workers: int, batch_size: int = 4) -> list:
    partial = functools.partial(Seeded())
    partial.num_shards = 3  # type: ignore[attr-defined]
    found = [
        dp.predict(lambda batch: batch, one, batch_size, "all", num_workers=num_workers) for one in (Seeded(), partial)
    ]
    assert torch.equal(*found)
    return found[0].tolist()


def test_a_callable_object_with_seeds_of_its_samples() -> None:
    """They are those of the samples, for any batch size, number of processes and of workers."""
    expected = _predict_seeded(0, 5)
    assert [int(number) for number, _ in expected] == [*range(0, 20, 3), *range(1, 20, 3), *range(2, 20, 3)]
    assert len({seed for _, seed in expected}) == 20
    assert run_ranks(_predict_seeded, 2, 1) == [expected] * 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_fails_is_named_on_every_rank(num_workers: int) -> None:
    for outcome in outcomes(_broken, 2, num_workers):
        assert "the data set failed in shard 3, from sample 4 on: OSError: truncated" in outcome.error
        assert outcome.seconds < 10


def _divides(batch: list[Any]) -> torch.Tensor:
    return batch[0] * (1 // (33 - int(batch[0].max())))


def _model_fails() -> None:
    dp.predict(_divides, Sharded(), 2)


def test_a_model_that_fails_names_the_shard() -> None:
    for outcome in outcomes(_model_fails, 2):
        assert "the model failed for the samples 2 to 3 of shard 3: ZeroDivisionError" in outcome.error


class Differs(Sharded):
    """A stream with another number of shards on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.num_shards = len(SIZES) - dist.get_rank()

    def shard(self, num_shards: int, index: int) -> Sharded:
        return super().shard(len(SIZES), index)


def _of_different_numbers(options: dict[str, Any]) -> None:
    dp.predict(_model, Differs(), 2, **options)


def _one(output: Any, batch: Any) -> int:
    return 1


def _of_different_kinds() -> None:
    dp.predict(lambda x: x, Sharded() if dist.get_rank() else torch.arange(8), 2, metric=_one)


@pytest.mark.parametrize("options", [{}, {"to": "all"}, {"metric": _one}, {"num_workers": 1}])
def test_numbers_of_shards_that_differ_are_refused_on_every_rank(options: dict[str, Any]) -> None:
    ended = outcomes(_of_different_numbers, 2, options)
    for outcome in ended:
        assert re.search("the data set's num_shards differs between ranks: [45] on rank [01], [45] on", outcome.error)
        assert outcome.seconds < 10


def test_a_stream_on_one_rank_alone_is_refused() -> None:
    for outcome in outcomes(_of_different_kinds, 2):
        assert "the data set's length differs between ranks" in outcome.error
        assert outcome.seconds < 10


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(int, 1)


def test_what_cannot_be_shared_out_is_refused(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match=r"Endless.*map-style.*num_shards"):
        dp.predict(_model, Endless(), 2)
    with pytest.raises(ValueError, match=r'balance="dynamic"\) needs a map-style data set'):
        dp.predict(_model, Sharded(), 2, balance="dynamic")
    with pytest.raises(TypeError, match="can only be iterated"):
        dp.predict(_model, Sharded(), 2, tmp_path / "out")
