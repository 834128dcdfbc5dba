"""Which rank runs which batches, and in which pieces outputs travel: functions of numbers, in one process."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ddparity as dp
from ddparity.data.rng import derive_seed, numbered_seed, preserve_streams, seed_streams
from ddparity.inference import collect
from ddparity.inference.collect import merged
from ddparity.inference.samples import digest_of
from ddparity.inference.source import Batches, Shards, assigned, check_balance, cut, is_stream
from tests.ranks import kill_self

BOTH = st.sampled_from(["contiguous", "dynamic"])


@given(count=st.integers(0, 3000), world_size=st.integers(1, 9), balance=BOTH)
def test_each_batch_is_in_one_chunk(count: int, world_size: int, balance: Any) -> None:
    chunks = cut(count, world_size, balance)
    assert [number for chunk in chunks for number in chunk] == list(range(count))
    sizes = [len(chunk) for chunk in chunks]
    if balance == "contiguous":
        assert len(chunks) == world_size and max(sizes) - min(sizes) <= 1
    else:
        # Large ones first: each is an eighth of an even share of what is left, at least one batch.
        left = count
        for size in sizes:
            assert size == max(1, left // (8 * world_size))
            left -= size


@settings(max_examples=30)
@given(count=st.integers(0, 300), world_size=st.integers(1, 5), data=st.data())
def test_each_chunk_is_run_by_one_rank(count: int, world_size: int, data: st.DataObject) -> None:
    chunks = cut(count, world_size, "contiguous")
    ran = [list(assigned(chunks, rank, world_size, "contiguous", lambda: 0)) for rank in range(world_size)]
    assert ran == [[chunk] for chunk in chunks]
    # Ranks take the next chunk in any order.
    chunks = cut(count, world_size, "dynamic")
    numbers = iter(range(10**6))
    takers = {rank: assigned(chunks, rank, world_size, "dynamic", lambda: next(numbers)) for rank in range(world_size)}
    taken: list[range] = []
    while takers:
        rank = data.draw(st.sampled_from(sorted(takers)))
        chunk = next(takers[rank], None)
        if chunk is None:
            del takers[rank]
        else:
            taken.append(chunk)
    assert taken == chunks


def test_a_balance_that_does_not_exist_is_refused() -> None:
    check_balance("contiguous"), check_balance("dynamic")
    with pytest.raises(ValueError, match=r"balance='even'.*\"contiguous\" or \"dynamic\""):
        check_balance("even")


def test_batches_are_those_of_one_process() -> None:
    batches = Batches(torch.arange(7), 3, 5, 0, None, {})
    assert [batches[number] for number in range(len(batches))] == [range(3), range(3, 6), range(6, 7)]
    assert (batches.length, batches.shards) == (7, None)
    assert batches.where(range(3, 6)) == "data-set indices 3 to 5"
    assert batches.seed(range(3, 6)) == numbered_seed(derive_seed(5, "predict"), 3)
    length, position = batches.settled([range(3)])
    assert (length, position(4)) == (7, 4)
    loaded = list(batches.loaded(iter([range(2, 3), range(0, 2)])))
    assert [(samples, data.tolist()) for samples, data in loaded] == [
        (range(6, 7), [6]),
        (range(3), [0, 1, 2]),
        (range(3, 6), [3, 4, 5]),
    ]


class _Stream:
    """Shard s has s + 1 samples: 10 s, 10 s + 1, ..."""

    n_shards = 3

    def shard(self, num_shards: int, index: int) -> list[int]:
        assert num_shards == 3
        return [10 * index + number for number in range(index + 1)]


def test_batches_of_shards_have_the_positions_of_the_whole() -> None:
    stream = _Stream()
    shards = Shards(stream, 2, 5, 0, None, {})
    assert (len(shards), shards.shards, shards.length) == (3, 3, None) and shards.dataset is stream
    loaded = list(shards.loaded(iter([range(3)])))
    assert [data.tolist() for _, data in loaded] == [[0], [10, 11], [20, 21], [22]]
    assert [len(samples) for samples, _ in loaded] == [1, 2, 2, 1]
    assert [shards.where(samples) for samples, _ in loaded] == [
        "samples 0 to 0 of shard 0",
        "samples 0 to 1 of shard 1",
        "samples 0 to 1 of shard 2",
        "samples 2 to 2 of shard 2",
    ]
    length, position = shards.settled([samples for samples, _ in reversed(loaded)])
    assert length == 6
    assert [position(samples.start) for samples, _ in loaded] == [0, 1, 3, 5]
    seeds = [shards.seed(samples) for samples, _ in loaded]
    assert len(set(seeds)) == 4 and all(seed % 2 == 0 for seed in seeds)
    # If these numbers change, a prediction with random numbers changes.
    assert [seeds[0], seeds[1], seeds[3]] == [5380022565049359998, 8771846743706179342, 7832349006041755858]


def test_outputs_of_a_stream_are_in_its_order() -> None:
    assert dp.predict(torch.nn.Identity(), _Stream(), 2).tolist() == [0, 10, 11, 20, 21, 22]


class _InWhom(torch.utils.data.Dataset[int]):
    """Samples 0, 10, 20, ... It notes what this process reads."""

    def __init__(self) -> None:
        self.process, self.read = os.getpid(), list[int]()

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        if os.getpid() == self.process:
            self.read.append(index)
        return 10 * index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_are_compared_before_the_first_batch(num_workers: int) -> None:
    """With workers it is a worker that reads them: this process opens no file of the data set."""
    dataset, compared = _InWhom(), list[dict[int, str | None]]()
    batches = Batches(dataset, 2, 5, num_workers, None, {"persistent_workers": False})
    for number, (samples, data) in enumerate(batches.loaded(iter([range(3)]), compared.append)):
        assert compared == [{index: digest_of(range(0, 50, 10), index, tensors_alone=True) for index in (0, 2, 4)}]
        assert data.tolist() == [10 * index for index in samples] and samples == batches[number]
    assert sorted(set(dataset.read)) == ([] if num_workers else [0, 1, 2, 3, 4])


class _Noisy:
    num_shards = 2

    def shard(self, num_shards: int, index: int) -> Iterator[torch.Tensor]:
        return (torch.rand(()) for _ in range(3))


def test_a_streams_samples_draw_from_the_key_after_the_batchs() -> None:
    shards = Shards(_Noisy(), 2, 5, 0, None, {})
    for samples, data in shards.loaded(iter([range(2)])):
        with preserve_streams():
            seed_streams(shards.seed(samples) + 1)
            assert torch.equal(data, torch.rand(len(samples), 1).flatten())


def test_a_batch_of_a_stream_that_fails_is_named() -> None:
    def collate(batch: list[int]) -> list[int]:
        if 22 in batch:
            raise OSError("no memory")
        return batch

    shards = Shards(_Stream(), 2, 5, 0, collate, {})
    with pytest.raises(dp.SampleError, match=r"^the collate function failed for the samples 2 to 2 of shard 2: OSErr"):
        list(shards.loaded(iter([range(3)])))


class _Killed(_Stream):
    def shard(self, num_shards: int, index: int) -> Iterator[int]:
        for sample in super().shard(num_shards, index):
            if sample == 22:
                kill_self()
            yield sample


def test_a_worker_of_a_stream_that_is_killed_is_told_with_what_came_before() -> None:
    shards = Shards(_Killed(), 2, 5, 1, None, {"prefetch_factor": 1})
    with pytest.raises(
        dp.SampleError, match=r"before it returned what follows (the beginning|samples \d to \d of shard \d): R"
    ):
        list(shards.loaded(iter([range(3)])))


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"num_shards": 2, "shard": len}, True),
        ({"n_shards": 2, "shard": len}, True),
        ({"num_shards": 2, "shard": 7}, False),
        ({"num_shards": "2", "shard": len}, False),
        ({"shard": len}, False),
        ({"num_shards": 2}, False),
        ({"num_shards": 2, "shard": len, "__getitem__": len}, False),
    ],
)
def test_what_is_a_stream(attributes: dict[str, Any], expected: bool) -> None:
    assert is_stream(type("Data", (), attributes)()) == expected


def test_a_stream_of_torch_may_have_items() -> None:
    attributes = {"num_shards": 2, "shard": len, "__getitem__": len}
    assert is_stream(type("Data", (torch.utils.data.IterableDataset,), {**attributes, "__iter__": len})())


@given(st.lists(st.integers(0, 3), max_size=20), st.randoms())
def test_ranges_are_merged(steps: list[int], random: Any) -> None:
    """`steps`: how many numbers are in a range; 0 leaves one out."""
    ranges, start = [], 0
    for size in steps:
        if size:
            ranges.append(range(start, start + size))
        start += max(size, 1)
    shuffled = random.sample(ranges, len(ranges))
    found = merged(shuffled)
    assert [number for part in found for number in part] == [number for part in ranges for number in part]
    assert all(before.stop < after.start for before, after in itertools.pairwise(found))


@dataclasses.dataclass
class _Costs:
    cost: int


def test_small_batches_are_sent_together() -> None:
    """A piece has at most 4 MiB, or one batch."""
    mib = 2**20
    held = deque(_Costs(cost) for cost in (mib, 3 * mib, 1, 9 * mib, 4 * mib, 0, 1))
    pieces = collect._pieces(held)  # type: ignore[arg-type]
    assert [[one.cost for one in piece] for piece in pieces] == [[mib, 3 * mib], [1], [9 * mib], [4 * mib, 0], [1]]
    assert not held


def test_outputs_for_no_samples_are_an_empty_tensor() -> None:
    assert dp.predict(torch.nn.Identity(), torch.arange(0), 2).shape == (0,)
