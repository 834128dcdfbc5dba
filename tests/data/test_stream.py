"""Streams: the same steps on any number of ranks and workers, exact epochs, and resumption where a stream can seek."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import IterableDataset, get_worker_info

import ddparity as dp
from ddparity import SampleError
from tests.ranks import kill_self, outcomes, run_ranks

# Parts of different lengths: readers end at different steps.
PARTS = [range(100 * part, 100 * part + size) for part, size in enumerate((17, 12, 9, 14))]


def augmented(index: int) -> torch.Tensor:
    """A sample with a number of each global stream, and of its own seed."""
    own = np.random.default_rng(dp.sample_seed()).random()
    drawn = [np.random.rand(), random.random(), torch.rand(()).item(), own]
    return torch.tensor([index, *drawn], dtype=torch.float64)


def function(reader: int, readers: int, epoch: int) -> Iterator[torch.Tensor]:
    """A stream that cannot seek, and gives other samples in each epoch."""
    assert readers == 4
    return (augmented(index + 1000 * epoch) for index in PARTS[reader])


class Seeking:
    """A stream that can seek, and counts the samples that it reads."""

    def __init__(self, reader: int, epoch: int) -> None:
        self.part, self.epoch, self.place, self.reads = PARTS[reader], epoch, 0, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.place < len(self.part):
            self.place += 1
            self.reads += 1
            yield augmented(self.part[self.place - 1] + 1000 * self.epoch)

    def state_dict(self) -> dict:
        return {"place": self.place, "epoch": self.epoch}

    def load_state_dict(self, state: dict) -> None:
        assert state["epoch"] == self.epoch
        self.place = state["place"]


def seeking(reader: int, readers: int, epoch: int) -> Seeking:
    return Seeking(reader, epoch)


class Sharded(IterableDataset):
    """As datasets.IterableDataset: it reads only a part if it is in a worker and has not been told otherwise."""

    num_shards = 4

    def __init__(self, shard: int | None = None) -> None:
        self.index, self.epoch = shard, 0

    def shard(self, num_shards: int, index: int) -> Sharded:
        assert num_shards == 4
        return Sharded(index)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        if get_worker_info() is None:
            assert self.index is not None
            yield from function(self.index, 4, self.epoch)


STREAMS = {"function": function, "seeking": seeking, "sharded": Sharded()}
PLANS = {
    "in order": dp.StreamPlan(10, 3, seed=1),
    "shuffled": dp.StreamPlan(10, 3, seed=1, shuffle_buffer=5),
    "steps": dp.StreamPlan(10, 3, seed=1, shuffle_buffer=4, steps_per_epoch=3),
}
Seen = list[tuple[int, int, int, list, float, int | None]]


def _note(step: dp.Step, seen: Seen) -> None:
    for micro in step:
        seen.append((step.epoch, step.number, micro.index, micro.data.tolist(), micro.weight, micro.seed))


def _read(stream: str, plan: str, workers: int, stop: int, path: str = "", resume: bool = False) -> tuple[Seen, list]:
    seen: Seen = []
    loader = dp.Loader(STREAMS[stream], PLANS[plan], workers)
    if resume:
        dp.load_checkpoint(path, loader=loader)
    shares = []
    for step in loader.steps(stop):
        _note(step, seen)
        shares.append((step.shares, step.seed))
    if path and not resume:
        dp.save_checkpoint(path, loader=loader)
    assert loader.steps_done == stop
    return seen, shares


def _together(ranks: list[tuple[Seen, list]]) -> Seen:
    return sorted(one for seen, _ in ranks for one in seen)


@pytest.mark.parametrize("plan", PLANS)
def test_any_ranks_and_workers_give_the_steps_of_one_process(plan: str) -> None:
    # Of a function, the first samples of readers draw from the streams in which it is opened.
    alone = {stream: _together([_read(stream, plan, 0, 13)]) for stream in ("function", "sharded")}
    for world_size, workers, stream in ((1, 3, "sharded"), (2, 0, "seeking"), (3, 2, "function"), (4, 0, "sharded")):
        ranks = run_ranks(_read, world_size, stream, plan, workers, 13)
        assert _together(ranks) == alone["sharded" if stream == "sharded" else "function"], (
            world_size,
            workers,
            stream,
        )
        assert [shares for _, shares in ranks] == [ranks[0][1]] * world_size


@pytest.mark.parametrize("plan", ["in order", "shuffled"])
def test_an_epoch_has_each_sample_once_and_ends_with_the_longest_reader(plan: str) -> None:
    loader = dp.Loader(function, PLANS[plan])
    for epoch in range(2):
        seen: Seen = []
        sizes = []
        for step in loader:
            _note(step, seen)
            sizes.append([len(data) for *_, data, _, _ in seen if seen[-1][1] == step.number][-len(step) :])
        samples = [int(row[0]) for *_, data, _, _ in seen for row in data]
        assert sorted(samples) == [index + 1000 * epoch for part in PARTS for index in part]
        # Readers take 3, 3, 2 and 2 samples of their 17, 12, 9 and 14 a step.
        assert sizes == [[3, 3, 2, 2]] * 4 + [[3, 1, 2], [2, 2], [2]]
        for number in range(len(sizes)):
            weights = [weight for _, step, _, _, weight, _ in seen if step == number]
            assert weights == [size / sum(sizes[number]) for size in sizes[number]]
        drawn = np.array([row[1:] for *_, data, _, _ in seen for row in data])
        assert len(np.unique(drawn)) == drawn.size - 3 * 3  # the first samples of 4 readers have 3 draws in common
    assert (loader.position, loader.steps_done) == ((2, 0), 14)
    with pytest.raises(TypeError, match="known when it ends"):
        len(loader)


def test_the_shuffle_mixes_within_two_buffers() -> None:
    def numbers(reader: int, readers: int, epoch: int) -> Any:
        return range(reader, 400, readers)

    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        loader = dp.Loader(numbers, dp.StreamPlan(8, 4, seed=seed, shuffle_buffer=20))
        steps = [[micro.data.tolist() for micro in step] for step in loader.epoch(epoch)]
        orders.append([value for step in steps for value in step[1]])
    places = np.array([(value - 1) // 2 for value in orders[0]])
    assert sorted(places) == list(range(200))
    assert 0 < np.abs(places - np.arange(200)).max() < 40
    assert (places != np.arange(200)).mean() > 0.8
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stream", ["function", "seeking"])
@pytest.mark.parametrize(("first", "second", "stop"), [((1, 0), (3, 1), 3), ((3, 2), (2, 0), 6), ((2, 1), (4, 0), 9)])
def test_it_continues_on_another_number_of_ranks(
    stream: str, plan: str, first: tuple[int, int], second: tuple[int, int], stop: int, tmp_path: Path
) -> None:
    if (stream, plan) in (("function", "in order"), ("seeking", "shuffled"), ("seeking", "steps")):
        path = str(tmp_path / "c")
        alone = _together([_read("function", plan, 0, 12)])
        before = _together(run_ranks(_read, first[0], stream, plan, first[1], stop, path))
        after = _together(run_ranks(_read, second[0], stream, plan, second[1], 12, path, True))
        assert before == alone[: len(before)]
        assert before + after == alone


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stream", STREAMS)
def test_it_continues_after_every_step(stream: str, plan: str) -> None:
    alone, _ = _read(stream, plan, 0, 15)
    for stop in range(15):
        loader, seen = dp.Loader(STREAMS[stream], PLANS[plan]), []
        for step in loader.steps(stop):
            _note(step, seen)
        state = loader.state_dict()
        again = dp.Loader(STREAMS[stream], PLANS[plan])
        again.load_state_dict(state)
        assert again.state_dict() == state
        for step in again.steps(15):
            _note(step, seen)
        assert seen == alone, stop


@pytest.mark.parametrize("buffer", [0, 50])
def test_a_stream_that_seeks_reads_little_again_at_any_position(buffer: int) -> None:
    opened: list[Any] = []

    class Long(Seeking):
        def __init__(self) -> None:
            super().__init__(0, 0)
            self.part = range(100_000)
            opened.append(self)

        def __iter__(self) -> Iterator[int]:
            while self.place < len(self.part):
                self.place += 1
                self.reads += 1
                yield self.place

    loader = dp.Loader(lambda reader, readers, epoch: Long(), dp.StreamPlan(100, 100, shuffle_buffer=buffer))
    following = loader.epoch(0)
    for _ in range(300):
        _last = next(following)[0]
    state = loader.state_dict()
    assert state["step"] == 299
    again = dp.Loader(loader._stream._readers.dataset, loader.plan)  # type: ignore[union-attr]
    again.load_state_dict(state)
    assert next(iter(again))[0].data.tolist() == _last.data.tolist()
    assert opened[-1].reads <= 200 + 2 * buffer + 1  # two micro-batches, since one is read ahead
    assert again.state_dict() == state


def _train(folder: str, steps: tuple[int, int, int], workers: int) -> str:
    """Train from one step to another with strict bits. Save after one, and be killed two steps later."""
    resumed, stop, save = steps
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
    model = dp.replicate(net, reduction="strict")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    loader = dp.Loader(seeking, dp.StreamPlan(10, 3, seed=7, shuffle_buffer=4), workers)
    states = {"model": model, "optimizer": optimizer, "loader": loader}
    if resumed:
        dp.load_checkpoint(f"{folder}/{resumed}", **states)
    for step in loader.steps(stop):
        for micro in dp.accumulate(model, step):
            (model(micro.data.float() / 100).square().mean() * micro.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.steps_done == save:
            dp.save_checkpoint(f"{folder}/{save}", **states)
        if save and loader.steps_done == save + 2:
            kill_self()
    return dp.fingerprint(model)


def test_strict_bits_on_any_number_of_processes_killed_and_resumed_elsewhere(tmp_path: Path) -> None:
    expected = run_ranks(_train, 1, str(tmp_path), (0, 17, 0), 0)[0]
    for world_size in (2, 3, 4):
        assert set(run_ranks(_train, world_size, str(tmp_path), (0, 17, 0), world_size % 2)) == {expected}
    killed = outcomes(_train, 3, str(tmp_path), (0, 17, 6), 1) + outcomes(_train, 2, str(tmp_path), (6, 17, 11), 0)
    assert {outcome.exitcode for outcome in killed} == {-signal.SIGKILL}
    assert set(run_ranks(_train, 4, str(tmp_path), (11, 17, 0), 1)) == {expected}


@pytest.mark.parametrize("plan", PLANS)
def test_draws_between_steps_do_not_depend_on_workers(plan: str) -> None:
    drawn = []
    for workers in (0, 1):
        dp.seed_everything(0)
        for step in dp.Loader(function, PLANS[plan], workers):
            drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
            list(step)
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]
    assert len(set(drawn)) == half


def _predicted(workers: int) -> Any:
    def without_seed(reader: int, readers: int, epoch: int) -> Iterator[torch.Tensor]:
        assert (readers, epoch) == (4, 0)
        return (torch.tensor([index, torch.rand(()).item()]) for index in PARTS[reader])

    without_seed.num_shards = 4  # type: ignore[attr-defined]
    return dp.predict(lambda batch: batch, without_seed, 4, num_workers=workers)


def test_predictions_of_a_function() -> None:
    alone = run_ranks(_predicted, 1, 0)[0]
    assert alone[:, 0].tolist() == [index for part in PARTS for index in part]
    assert torch.equal(run_ranks(_predicted, 2, 2)[0], alone)


def _shuffled_files(reader: int, readers: int, epoch: int) -> list[int]:
    """Each reader shuffles all files, and takes its part."""
    files = [range(6 * number, 6 * number + 6) for number in range(12)]
    random.shuffle(files)
    return [sample for file in files[reader::readers] for sample in file]


def _shuffled_later(reader: int, readers: int, epoch: int) -> Iterator[int]:
    """A generator function runs when its first sample is asked for."""
    yield from _shuffled_files(reader, readers, epoch)


def _orders(workers: int) -> list:
    found = []
    for stream in (_shuffled_files, _shuffled_later):
        loader = dp.Loader(stream, dp.StreamPlan(8, 2), workers)
        for epoch in range(2):
            seen = [(step.number, micro.index, *micro.data.tolist()) for step in loader.epoch(epoch) for micro in step]
            found.append(sorted(tuple(row) for row in dp.gather(torch.tensor(seen), "all").tolist()))
        stream.num_shards = 4  # type: ignore[attr-defined]
        found.append(dp.predict(lambda batch: batch, stream, 5, "all", num_workers=workers).tolist())
    return found


def test_files_that_each_reader_shuffles_come_once() -> None:
    """The global streams are those of the pass while a stream is opened, and not those of a reader or a process."""
    alone = run_ranks(_orders, 1, 0)[0]
    for order in (alone[0], alone[1], alone[3]):
        assert sorted(sample for _, _, *samples in order for sample in samples) == list(range(72))
    assert alone[0] != alone[1], "another order in each epoch"
    assert sorted(alone[2]) == sorted(alone[5]) == list(range(72))
    for world_size, workers in ((2, 1), (3, 0)):
        assert run_ranks(_orders, world_size, workers) == [alone] * world_size


class Live:
    """A stream that gives its own dict as its state, and writes on into what it was given."""

    def __init__(self, reader: int) -> None:
        self.state = {"next": reader}

    def __iter__(self) -> Iterator[int]:
        while self.state["next"] < 80:
            self.state["next"] += 4
            yield self.state["next"] - 4

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


@pytest.mark.parametrize("options", [{}, {"shuffle_buffer": 4}, {"steps_per_epoch": 10}], ids=str)
def test_a_state_that_the_stream_changes_later_is_saved_as_it_was(options: dict[str, int]) -> None:
    plan = dp.StreamPlan(8, 2, **options)
    loader = dp.Loader(lambda reader, readers, epoch: Live(reader), plan)
    before = [[micro.data.tolist() for micro in step] for step in loader.steps(3)]
    state = loader.state_dict()
    after = [[micro.data.tolist() for micro in step] for step in loader.steps(6)]
    for _ in range(2):  # the state can be loaded again
        again = dp.Loader(lambda reader, readers, epoch: Live(reader), plan)
        again.load_state_dict(state)
        assert [[micro.data.tolist() for micro in step] for step in again.steps(6)] == after
    assert len({sample for step in before + after for micro in step for sample in micro}) == 48


def _failing(reader: int, readers: int, epoch: int) -> Iterator[int]:
    yield from range(4)
    if reader == 3:
        raise OSError("the disk is gone")
    yield from range(4)


def _read_failing(workers: int) -> int:
    steps = 0
    for step in dp.Loader(_failing, dp.StreamPlan(8, 2), workers):
        for _ in step:
            pass
        dist.barrier()  # where the others would wait
        steps += 1
    return steps


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_that_fails_is_an_error_on_every_rank(workers: int) -> None:
    first, second = outcomes(_read_failing, 2, workers)
    assert second.error is not None and "sample 4 of reader 3, in pass 0: OSError: the disk is gone" in second.error
    assert first.error is not None and "rank 1 could not read the next step of the stream" in first.error


def _different_plans() -> None:
    plan = dp.StreamPlan(8, 1 + torch.distributed.get_rank())
    for step in dp.Loader(lambda reader, readers, epoch: range(3), plan):
        list(step)


def _different_places() -> None:
    loader = dp.Loader(function, PLANS["in order"])
    list(loader.epoch(0, start_step=dist.get_rank()))


def test_ranks_that_differ_are_told_at_once() -> None:
    for outcome in outcomes(_different_plans, 2):
        assert outcome.error is not None and "the plan's micro_batch" in outcome.error
    for outcome in outcomes(_different_places, 2):
        assert outcome.error is not None and "the step of the stream" in outcome.error
    for outcome in outcomes(_counted_collectives, 3, dp.StreamPlan(8, 4)):
        assert outcome.error is not None and "3 ranks but only 2 micro-batches in a step" in outcome.error


def _counted_collectives(plan: dp.StreamPlan) -> tuple[int, int]:
    from unittest import mock

    from ddparity.data import stream_steps

    loader = dp.Loader(function, plan)
    with mock.patch.object(stream_steps, "all_gather_single", wraps=stream_steps.all_gather_single) as gathers:
        for step in loader:
            list(step)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loader.state_dict()
    return gathers.call_count, sum(e.count for e in profiler.key_averages() if e.key == "gloo:all_gather")


def test_collectives_are_those_that_the_docstring_states() -> None:
    assert run_ranks(_counted_collectives, 2, PLANS["in order"]) == [(8, 2)] * 2  # 7 steps, and the end
    assert run_ranks(_counted_collectives, 2, PLANS["steps"]) == [(0, 2)] * 2


class Odd(Seeking):
    def state_dict(self) -> dict:
        return {"place": (1, 2)}


def _save_odd() -> None:
    loader = dp.Loader(lambda reader, readers, epoch: Odd(reader, epoch), PLANS["in order"])
    next(loader.steps(2))
    list(loader.steps(1))
    loader.state_dict()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_that_cannot_be_saved_is_named(world_size: int) -> None:
    for outcome in outcomes(_save_odd, world_size):
        assert outcome.error is not None and "state_dict of reader" in outcome.error and "tuples" in outcome.error


class Kept:
    """An iterator that can seek."""

    def __init__(self, numbers: range) -> None:
        self.numbers, self.next = numbers, 0

    def __iter__(self) -> Kept:
        return self

    def __next__(self) -> int:
        if self.next == len(self.numbers):
            raise StopIteration
        self.next += 1
        return self.numbers[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def test_an_iterator_that_a_reader_had_already_is_refused() -> None:
    """On one process the readers would share it, and on several each rank would have one; later it is empty."""
    shared, parts = iter(range(40)), [iter(range(reader, 40, 3)) for reader in range(3)]
    with pytest.raises(SampleError, match="range_iterator that reader 0 was given for pass 0: return a new iterable"):
        _first(lambda reader, readers, epoch: shared, dp.StreamPlan(6, 2))
    loader = dp.Loader(lambda reader, readers, epoch: parts[reader], dp.StreamPlan(6, 2))
    assert sum(1 for _ in loader) == 7
    with pytest.raises(SampleError, match="reader 0, in pass 1: TypeError: the stream is the range_iterator"):
        next(iter(loader))
    kept = [Kept(range(4)), Kept(range(2))]  # they can seek, and go on where they stopped, too
    again = dp.Loader(lambda reader, readers, epoch: kept[reader], dp.StreamPlan(4, 2))
    assert sum(1 for _ in again) == 2
    with pytest.raises(SampleError, match="reader 0, in pass 1: TypeError: the stream is the Kept"):
        next(iter(again))
    with pytest.raises(SampleError, match="Kept that reader 0 was given for pass 0"):
        _first(lambda reader, readers, epoch: kept[0], dp.StreamPlan(6, 2))
    lists = [list(part) for part in (range(4), range(2))]  # a list has a new iterator each time
    again = dp.Loader(lambda reader, readers, epoch: lists[reader], dp.StreamPlan(4, 2))
    assert [sum(1 for _ in again) for _ in range(3)] == [2, 2, 2]


def _first(stream: Any, plan: dp.StreamPlan) -> dp.Step:
    return next(iter(dp.Loader(stream, plan)))


def _four(reader: int, readers: int, epoch: int) -> Any:
    return iter(()) if reader == 1 else range(3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dp.StreamPlan(0, 3), ValueError, r"StreamPlan\(global_batch=0\)"),
        (lambda: dp.StreamPlan(4, 3, shuffle_buffer=-1), ValueError, "shuffle_buffer=-1"),
        (lambda: dp.StreamPlan(4, 3, steps_per_epoch=0), ValueError, "steps_per_epoch=0"),
        (lambda: dp.StreamPlan(4, 3, steps_per_epoch=2.5), TypeError, "steps_per_epoch=2.5"),  # type: ignore[arg-type]
        (lambda: dp.Loader(Sharded(), dp.StreamPlan(10, 2)), ValueError, "4 shards, and the plan 5 micro-batches"),
        (lambda: dp.Loader(range(4), dp.StreamPlan(10, 2)), TypeError, "Loader got a range with a StreamPlan"),
        (lambda: dp.Loader(function, PLANS["steps"], seed=3), TypeError, "got a plan, and seed"),
        (lambda: dp.Loader(function, PLANS["steps"], 1, persistent_workers=True), TypeError, "persistent_workers"),
        (lambda: dp.Loader(function, PLANS["steps"], shuffle=True), TypeError, "got shuffle"),
        (lambda: dp.Loader(Sharded(), dp.BatchPlan(4, 2, 1)), TypeError, "or give a StreamPlan"),
        (
            lambda: _first(_four, dp.StreamPlan(4, 1, steps_per_epoch=9))[1],
            dp.SampleError,
            "reader 1 of",
        ),
        (lambda: next(dp.Loader(lambda *_: [], dp.StreamPlan(4, 1)).steps(3)), ValueError, "epoch 0 .* has no steps"),
    ],
)
def test_what_a_stream_cannot_be_is_named(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("plan", ["in order", "steps"])
def test_leaving_a_loop_and_old_loops(plan: str) -> None:
    """A loop that is left early goes on where it was left; a loop from before another one is refused."""
    alone, seen = _read("function", plan, 0, 8)[0], []
    loader = dp.Loader(function, PLANS[plan])
    old = loader.epoch(0)
    for step in old:
        _note(step, seen)
        if step.number == 1:
            break
    new = loader.steps(8)
    for step in new:
        _note(step, seen)
    assert seen == alone
    with pytest.raises(RuntimeError, match="one iterator at a time"):
        [list(step) for step in old]
