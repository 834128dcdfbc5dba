"""Iterable data sets that can be cut into shards, as those of Hugging Face datasets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..comm.transfer import exchange
from ..data.dataset import loaded
from ..data.plan import share
from ..data.rng import derive, seed_streams
from ..errors import SampleError
from .source import checked_batch_size, loader_options

_SHARD_SAMPLES = 2**40  # sample i of shard s is number s * _SHARD_SAMPLES + i until all shards' lengths are known


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be iterated, and be cut into a number of shards that is its own.

    It has `num_shards` (or `n_shards`), and `shard(num_shards=n, index=i)` gives the i-th part, in the order of the
    whole; as datasets.IterableDataset does.
    """
    return (
        (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"))
        and callable(getattr(dataset, "shard", None))
        and isinstance(_shards_of(dataset), int)
    )


def _shards_of(dataset: Any) -> Any:
    return getattr(dataset, "num_shards", None) or getattr(dataset, "n_shards", None)


class Shards:
    """The batches of a stream: each shard's samples, cut from its beginning; whole shards are shared out.

    So batches depend on the number of shards, which belongs to the data set, and not on that of processes or workers.
    """

    length = None

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        dataloader_options: dict[str, Any],
    ) -> None:
        self.dataset = dataset
        self.shards = int(_shards_of(dataset))
        self._key = derive(seed, "predict")
        joined = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        options = (checked_batch_size(batch_size), self._key, collate_fn or default_collate)
        self._dataloader: DataLoader[Any] = DataLoader(
            _Stream(dataset, self.shards, share(self.shards, rank, world_size), *options),
            batch_size=None,
            num_workers=num_workers,
            **loader_options(num_workers, dataloader_options),
        )

    def __len__(self) -> int:
        return self.shards

    def seed(self, samples: range) -> int:
        return _seed(self._key, samples.start)

    def loaded(self, chunks: Iterator[range]) -> Iterator[tuple[range, Any]]:
        """This rank's batches; `chunks` is its contiguous share of the shards, as the data loader's workers know."""
        before = [""]  # of the last batch
        for start, size, data in loaded(self._dataloader, lambda: f"what follows {before[0] or 'the beginning'}"):
            yield range(start, start + size), data
            before[0] = self.where(range(start, start + size))

    def where(self, samples: range) -> str:
        return _where(samples)

    def settled(self, ran: Sequence[range]) -> tuple[int, Callable[[int], int]]:
        """As of `Batches`; two all-gathers. All ranks call it."""
        mine = Counter[int]()
        for samples in ran:
            mine[samples.start // _SHARD_SAMPLES] += len(samples)
        sizes = [0] * self.shards
        for theirs in exchange(sorted(mine.items())):
            for shard, size in theirs:
                sizes[shard] += size
        firsts = list(itertools.accumulate(sizes, initial=0))
        return firsts[-1], lambda start: firsts[start // _SHARD_SAMPLES] + start % _SHARD_SAMPLES


class _Stream(IterableDataset[Any]):
    """In a worker: the collated batches of its part of the rank's shards, with the number of their first sample."""

    def __init__(
        self, dataset: Any, count: int, shards: range, batch_size: int, key: int, collate: Callable[[list[Any]], Any]
    ) -> None:
        self.dataset = dataset
        self._count, self._shards = count, shards
        self._batch_size, self._key, self._collate = batch_size, key, collate

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        worker = get_worker_info()
        mine = self._shards if worker is None else self._shards[worker.id :: worker.num_workers]
        for shard in mine:
            start = shard * _SHARD_SAMPLES
            try:
                samples = iter(self.dataset.shard(num_shards=self._count, index=shard))
            except Exception as error:
                raise SampleError(
                    f"the data set failed to give shard {shard}: {type(error).__name__}: {error}"
                ) from error
            while batch := self._next_batch(samples, start, shard):
                yield start, len(batch), self._collated(batch, start)
                start += len(batch)

    def _next_batch(self, samples: Iterator[Any], start: int, shard: int) -> list[Any]:
        seed_streams(_seed(self._key, start) + 1)
        try:
            return list(itertools.islice(samples, self._batch_size))
        except Exception as error:
            first = start % _SHARD_SAMPLES
            raise SampleError(
                f"the data set failed in shard {shard}, from sample {first} on: {type(error).__name__}: {error}"
            ) from error

    def _collated(self, batch: list[Any], start: int) -> Any:
        try:
            return self._collate(batch)
        except Exception as error:
            where = _where(range(start, start + len(batch)))
            raise SampleError(
                f"the collate function failed for the {where}: {type(error).__name__}: {error}"
            ) from error


def _where(samples: range) -> str:
    shard, first = divmod(samples.start, _SHARD_SAMPLES)
    return f"samples {first} to {first + len(samples) - 1} of shard {shard}"


def _seed(key: int, start: int) -> int:
    return derive(key, start) & ~1
