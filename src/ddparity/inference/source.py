"""Batches of a data set, cut where one process cuts them, and who runs which: a contiguous share, or the next chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch.utils.data import DataLoader

from ..data.dataset import Fetch, KeyedDataset, loaded, sized_length
from ..data.plan import checked_integer, share
from ..data.rng import derive, numbered

Balance = Literal["contiguous", "dynamic"]
# A free rank takes 1/8 of an even share of what is left: at the end, when ranks wait, little is left.
_PARTS_OF_A_SHARE = 8
# predict() decides these.
_DECIDED = ("shuffle", "sampler", "batch_sampler", "drop_last", "in_order")


class Source(Protocol):
    """What `Batches` and `Shards` are to the rest: `len` things that ranks share out, run as batches of samples.

    `length`: samples; None: known when all have been run. `shards`: of the data set; None: it has none.
    """

    @property
    def length(self) -> int | None: ...
    @property
    def shards(self) -> int | None: ...
    def __len__(self) -> int: ...
    def loaded(self, chunks: Iterator[range]) -> Iterator[tuple[range, Any]]: ...
    def seed(self, samples: range) -> int: ...
    def where(self, samples: range) -> str: ...
    def settled(self, ran: Sequence[range]) -> tuple[int, Callable[[int], int]]: ...


class Batches:
    """The batches of a map-style data set: batch b is samples b * batch_size and following.

    `length`: samples. `__len__`: batches, of all ranks.
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
        self.batch_size = checked_batch_size(batch_size)
        self._key = derive(seed, "predict")
        self._order = _Order(self)
        self._dataloader: DataLoader[Any] = DataLoader(
            KeyedDataset(dataset),  # type: ignore[arg-type]
            batch_sampler=self._order,
            num_workers=num_workers,
            collate_fn=collate_fn,
            **loader_options(num_workers, dataloader_options),
        )

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def __getitem__(self, number: int) -> range:
        """The samples of a batch."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.length))

    def seed(self, samples: range) -> int:
        """Keys the model's random streams in the batch of these samples; the one above, the loading's."""
        return numbered(self._key, samples.start)

    def loaded(self, chunks: Iterator[range]) -> Iterator[tuple[range, Any]]:
        """The batches of these ranges of batch numbers: their samples, and what the collate function made of them.

        Raises:
            SampleError: the data set, the collate function or a worker failed; names the samples.
        """
        issued = self._order.restart(chunks)
        for data in loaded(self._dataloader, lambda: self.where(issued[0]) if issued else "its first batch"):
            yield issued.popleft(), data
            del data

    def where(self, samples: range) -> str:
        return f"data-set indices {samples.start} to {samples.stop - 1}"

    def settled(self, ran: Sequence[range]) -> tuple[int, Callable[[int], int]]:
        """The number of samples, and where one of the numbers that `loaded` gave stands among them."""
        return self.length, lambda start: start


class _Order:
    """A DataLoader's batch sampler, noting each batch as it is issued."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._chunks: Iterator[range] = iter(())
        self._issued: deque[range] = deque()

    def restart(self, chunks: Iterator[range]) -> deque[range]:
        self._chunks, self._issued = chunks, deque()
        return self._issued

    def __iter__(self) -> Iterator[Fetch]:
        issued = self._issued
        for chunk in self._chunks:
            for number in chunk:
                samples = self._batches[number]
                issued.append(samples)
                yield Fetch(list(samples), self._batches.seed(samples) + 1)


def checked_batch_size(batch_size: int) -> int:
    size = checked_integer(batch_size, "batch_size")
    if size < 1:
        raise ValueError(f"predict(batch_size={batch_size}): must be at least 1")
    return size


def loader_options(num_workers: int, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a DataLoader: what the user gave over our defaults."""
    if decided := [name for name in _DECIDED if name in given]:
        raise TypeError(f"predict() got {', '.join(decided)}: it runs each sample once, in data-set order")
    return {
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # A generator of its own: the DataLoader draws a seed from it each time.
        "generator": torch.Generator(),
        **given,
    }


def check_balance(balance: str) -> None:
    if balance not in get_args(Balance):
        raise ValueError(f'predict(balance={balance!r}) is unknown: use "contiguous" or "dynamic"')


def cut(count: int, world_size: int, balance: Balance) -> list[range]:
    """`count` things in contiguous ranges: one a rank, or many, large ones first, to be taken one after the other."""
    if balance == "contiguous":
        return [share(count, rank, world_size) for rank in range(world_size)]
    chunks, start = [], 0
    while start < count:
        size = max(1, (count - start) // (_PARTS_OF_A_SHARE * world_size))
        chunks.append(range(start, start + size))
        start += size
    return chunks


def assigned(
    chunks: Sequence[range], rank: int, world_size: int, balance: Balance, next_number: Callable[[], int]
) -> Iterator[range]:
    """This rank's chunks: a contiguous share of them, or those whose numbers `next_number` gives to whoever asks."""
    if balance == "contiguous":
        yield from (chunks[number] for number in share(len(chunks), rank, world_size))
        return
    while (number := next_number()) < len(chunks):
        yield chunks[number]
