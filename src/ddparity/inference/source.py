"""The batches of a data set, cut as one process cuts them, and which rank runs which.

`Batches` is for a map-style data set, `Shards` for one that can only be iterated.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..comm.transfer import gather_json
from ..compat import hide_worker
from ..data.dataset import KeyedDataset, SeededIndices, load_batches, reading_sample, sized_length, worker_options
from ..data.rng import derive_seed, numbered_seed, seed_streams
from ..data.sizes import checked_integer, share
from ..data.stream import check_whole, has_shards, opening_seed
from ..errors import SampleError
from .samples import comparable_digest_of, few_of

Balance = Literal["contiguous", "dynamic"]
# A rank that is free takes 1/8 of an even share of the rest. At the end, when ranks wait, little is left.
_PARTS_OF_A_SHARE = 8
Compare = Callable[[dict[int, str | None]], None]  # takes digests of a few samples, by index
_DECIDED = ("shuffle", "sampler", "batch_sampler", "drop_last", "in_order")  # options that predict() decides


class Source(Protocol):
    """What `Batches` and `Shards` have in common: `len` items that ranks share out, run as batches of samples.

    `length`: number of samples; None: known after all are run. `shards`: of the data set; None: it has none.
    """

    @property
    def length(self) -> int | None: ...
    @property
    def shards(self) -> int | None: ...
    def __len__(self) -> int: ...
    def loaded(self, chunks: Iterator[range], compare: Compare | None) -> Iterator[tuple[range, Any]]: ...
    def seed(self, samples: range) -> int: ...
    def where(self, samples: range) -> str: ...
    def settled(self, ran: Sequence[range]) -> tuple[int, Callable[[int], int]]: ...


# Which rank runs which


def check_balance(balance: str) -> None:
    if balance not in get_args(Balance):
        raise ValueError(f'predict(balance={balance!r}) is unknown: use "contiguous" or "dynamic"')


def cut(count: int, world_size: int, balance: Balance) -> list[range]:
    """Return `count` items as contiguous ranges: one for each rank, or many that ranks take one after the other."""
    if balance == "contiguous":
        return [share(count, rank, world_size) for rank in range(world_size)]
    chunks, start = [], 0
    while start < count:  # large ones first
        size = max(1, (count - start) // (_PARTS_OF_A_SHARE * world_size))
        chunks.append(range(start, start + size))
        start += size
    return chunks


def assigned(
    chunks: Sequence[range], rank: int, world_size: int, balance: Balance, next_number: Callable[[], int]
) -> Iterator[range]:
    """Yield this rank's chunks: a contiguous share of them, or each whose number it gets from `next_number`."""
    if balance == "contiguous":
        yield from (chunks[number] for number in share(len(chunks), rank, world_size))
        return
    while (number := next_number()) < len(chunks):
        yield chunks[number]


# Options of both kinds of data set


def _checked_batch_size(batch_size: int) -> int:
    size = checked_integer(batch_size, "batch_size")
    if size < 1:
        raise ValueError(f"predict(batch_size={batch_size}): must be at least 1")
    return size


def _loader_options(num_workers: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a DataLoader: the user's, and our defaults for the others."""
    if decided := [name for name in _DECIDED if name in given]:
        raise TypeError(f"predict() got {', '.join(decided)}: it runs each sample once, in data-set order")
    return {
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # A generator of its own: the DataLoader draws a seed from it each time.
        "generator": torch.Generator(),
        **given,
        **worker_options(num_workers, given.get("worker_init_fn")),
    }


# Map-style data sets


class Batches:
    """The batches of a map-style data set: batch b is samples b * batch_size and following.

    `length`: number of samples. `__len__`: number of batches, of all ranks.
    """

    shards = None

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
        streams = "; or a stream that has num_shards and shard(num_shards=, index=)"
        self.length = sized_length(dataset, "predict", streams)
        self.batch_size = _checked_batch_size(batch_size)
        self._key, self.sample_key = derive_seed(seed, "predict"), derive_seed(seed, "predict", "samples")
        self._order = _Order(self)
        self._dataloader: DataLoader[Any] = DataLoader(
            # torch types data sets by one index, and these take many.
            KeyedDataset(dataset) if num_workers == 0 else _InWorkers(dataset),  # type: ignore[arg-type]
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=collate_fn if num_workers == 0 else _Collate(collate_fn or default_collate),
            **_loader_options(num_workers, dataloader_options),
        )

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def __getitem__(self, number: int) -> range:
        """Return the samples of a batch."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.length))

    def seed(self, samples: range) -> int:
        """Return the key of the model's random streams for this batch. The batch's loading uses the next key."""
        return numbered_seed(self._key, samples.start)

    def loaded(self, chunks: Iterator[range], compare: Compare | None = None) -> Iterator[tuple[range, Any]]:
        """Yield the samples and the collated data of each batch in these ranges of batch numbers.

        Args:
            compare: is called before the first batch with digests of a few samples.

        Raises:
            SampleError: the data set, the collate function or a worker fails; names the samples.
        """
        in_workers = self._dataloader.num_workers > 0
        if compare is not None and not in_workers:
            compare(_digests(self.dataset, few_of(self.length)))
        issued = self._order.restart(chunks, few_of(self.length) if compare is not None and in_workers else [])
        for data in load_batches(self._dataloader, lambda: self.where(issued[0]) if issued else "its first batch"):
            if type(data) is _Digests:
                assert compare is not None, "digests are asked for to be compared"
                compare(data)
            else:
                yield issued.popleft(), data
            del data

    def where(self, samples: range) -> str:
        """Return how errors name these samples."""
        return f"data-set indices {samples.start} to {samples.stop - 1}"

    def settled(self, ran: Sequence[range]) -> tuple[int, Callable[[int], int]]:
        """Return the number of samples, and a function from a sample's number in `loaded` to its final position."""
        return self.length, lambda start: start


class _Order:
    """The batch sampler of a DataLoader. It keeps the samples of each batch from its issue until it is loaded."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._chunks: Iterator[range] = iter(())
        self._issued: deque[range] = deque()
        self._digested: list[int] = []

    def restart(self, chunks: Iterator[range], digested: list[int]) -> deque[range]:
        """Start again with these chunks, after digests of the samples `digested`."""
        self._chunks, self._issued, self._digested = chunks, deque(), digested
        return self._issued

    def __iter__(self) -> Iterator[SeededIndices | _ToDigest]:
        issued = self._issued
        if self._digested:
            yield _ToDigest(self._digested)
        for chunk in self._chunks:
            for number in chunk:
                samples = self._batches[number]
                issued.append(samples)
                sample_seeds = (self._batches.sample_key, samples.start)
                yield SeededIndices(list(samples), self._batches.seed(samples) + 1, sample_seeds)


# Digests of samples. With workers it is a worker that reads the samples: what a data set opens at its first sample, for
# example a file, must not be open in this process when it forks a worker.


class _ToDigest(list[int]):
    """Indices of samples whose digests are wanted instead of a batch."""


class _Digests(dict[int, str | None]):
    """Digests by the samples' indices."""


def _digests(dataset: Any, indices: Sequence[int]) -> _Digests:
    return _Digests((index, comparable_digest_of(dataset, index)) for index in indices)


class _InWorkers(KeyedDataset):
    """A data set that also returns digests."""

    def __getitems__(self, indices: SeededIndices | _ToDigest) -> list[Any]:
        if isinstance(indices, _ToDigest):
            return [_digests(self.dataset, indices)]
        return super().__getitems__(indices)


class _Collate:
    """The user's collate function. Digests pass it by."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        if type(samples) is list and samples and type(samples[0]) is _Digests:
            return samples[0]
        return self._collate(samples)


# Data sets that can only be iterated

_END = object()
_SHARD_SAMPLES = 2**40  # sample i of shard s has the number s * _SHARD_SAMPLES + i until all shards' lengths are known


def is_stream(dataset: Any) -> bool:
    """Return whether a data set can only be iterated, and can be cut into a fixed number of shards.

    It has `num_shards` (or `n_shards`), and `shard(num_shards=n, index=i)` returns shard i, as
    datasets.IterableDataset does; or it is a function `stream(reader, readers, epoch)`, as a `Loader` takes, with an
    attribute `num_shards`. The shards in order are the whole.
    """
    shards = has_shards(dataset) or callable(dataset)
    iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    return iterable and shards and isinstance(_shards_of(dataset), int)


def _shards_of(dataset: Any) -> Any:
    return getattr(dataset, "num_shards", None) or getattr(dataset, "n_shards", None)


class Shards:
    """The batches of a stream. Each shard is cut from its beginning; ranks and workers run whole shards.

    So batches depend on the number of shards, which belongs to the data set, and not on the number of processes or
    workers.
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
        check_whole(dataset, "predict")
        self.dataset = dataset
        self.shards = int(_shards_of(dataset))
        self._key = derive_seed(seed, "predict")
        joined = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        options = (_checked_batch_size(batch_size), self._key, collate_fn or default_collate)
        self._dataloader: DataLoader[Any] = DataLoader(
            _Stream(dataset, self.shards, share(self.shards, rank, world_size), *options),
            batch_size=None,
            num_workers=num_workers,
            **_loader_options(num_workers, dataloader_options),
        )

    def __len__(self) -> int:
        return self.shards

    def seed(self, samples: range) -> int:
        return _seed_of_batch(self._key, samples.start)

    def loaded(self, chunks: Iterator[range], compare: Compare | None = None) -> Iterator[tuple[range, Any]]:
        """Yield this rank's batches. `chunks` is its contiguous share of the shards, which the workers know already.

        Samples are not compared: a rank reads its own shards alone.
        """
        before = [""]  # the samples of the last batch, in words
        for start, size, data in load_batches(self._dataloader, lambda: f"what follows {before[0] or 'the beginning'}"):
            yield range(start, start + size), data
            before[0] = self.where(range(start, start + size))

    def where(self, samples: range) -> str:
        return _samples_of_shard(samples)

    def settled(self, ran: Sequence[range]) -> tuple[int, Callable[[int], int]]:
        """As of `Batches`. Every rank calls it. Collectives: two all-gathers."""
        mine = Counter[int]()
        for samples in ran:
            mine[samples.start // _SHARD_SAMPLES] += len(samples)
        sizes = [0] * self.shards
        for theirs in gather_json(sorted(mine.items())):
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
        if worker is not None:
            hide_worker()  # streams would share out their samples among workers once more
        for shard in mine:
            start = shard * _SHARD_SAMPLES
            seed_streams(opening_seed(self._key, 0))
            try:
                if has_shards(self.dataset):
                    samples = iter(self.dataset.shard(num_shards=self._count, index=shard))
                else:
                    samples = iter(self.dataset(shard, self._count, 0))
            except Exception as error:
                raise SampleError(
                    f"the data set failed to give shard {shard}: {type(error).__name__}: {error}"
                ) from error
            while batch := self._next_batch(samples, start, shard):
                yield start, len(batch), self._collated(batch, start)
                start += len(batch)

    def _next_batch(self, samples: Iterator[Any], start: int, shard: int) -> list[Any]:
        batch: list[Any] = []
        key, first = derive_seed(self._key, "samples", shard), start % _SHARD_SAMPLES
        opens = first == 0 and not has_shards(self.dataset)  # a generator function has run no line yet
        seed_streams(opening_seed(self._key, 0) if opens else _seed_of_batch(self._key, start) + 1)
        try:
            for number in range(first, first + self._batch_size):
                with reading_sample(key, number):
                    sample = next(samples, _END)
                if sample is _END:
                    break
                batch.append(sample)
        except Exception as error:
            raise SampleError(
                f"the data set failed in shard {shard}, from sample {first} on: {type(error).__name__}: {error}"
            ) from error
        return batch

    def _collated(self, batch: list[Any], start: int) -> Any:
        try:
            return self._collate(batch)
        except Exception as error:
            samples = _samples_of_shard(range(start, start + len(batch)))
            raise SampleError(
                f"the collate function failed for the {samples}: {type(error).__name__}: {error}"
            ) from error


def _samples_of_shard(samples: range) -> str:
    shard, first = divmod(samples.start, _SHARD_SAMPLES)
    return f"samples {first} to {first + len(samples) - 1} of shard {shard}"


def _seed_of_batch(key: int, start: int) -> int:
    return derive_seed(key, start) & ~1  # even: the loading of the batch uses the next one
