from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import ddparity as dp
from ddparity.data.converted import options_of
from ddparity.data.dataset import KeyedDataset, SeededIndices, load_batches
from ddparity.data.fitting import check_even_shares, check_world_size
from ddparity.data.loader import ShardSampler
from tests.ranks import outcomes, run_ranks


class Mosaic(Dataset):
    """A data set whose sample comes with three random others, as in mosaic augmentation."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *random.sample(range(40), 3)])


class Noise(Dataset):
    """A data set whose sample has a number from each global stream. NumPy's is the stream that workers often repeat."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, np.random.rand(), random.random(), torch.rand(()).item()], dtype=torch.float64)


class NoiseTogether(Noise):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert type(indices) is list
        return [super(NoiseTogether, self).__getitem__(index) for index in indices]


def _epochs(dataset: Dataset, num_workers: int, epochs: int = 2) -> list[tuple[int, int, int, list]]:
    """Return (epoch, step, micro-batch, data) for each micro-batch of this rank."""
    loader = dp.Loader(dataset, dp.BatchPlan(40, 12, 3, seed=5), num_workers)
    return [
        (epoch, step.number, micro.index, micro.data.tolist())
        for epoch in range(epochs)
        for step in loader.epoch(epoch)
        for micro in step
    ]


@pytest.mark.parametrize("dataset", [Mosaic(), Noise(), NoiseTogether()], ids=["mosaic", "noise", "together"])
def test_augmentation_is_the_same_for_any_workers_and_world_size(dataset: Dataset) -> None:
    alone = run_ranks(_epochs, 1, dataset, 0)[0]
    for world_size, num_workers in ((1, 1), (1, 4), (2, 0), (2, 2), (3, 1)):
        parts = run_ranks(_epochs, world_size, dataset, num_workers)
        assert sorted(part for rank in parts for part in rank) == alone, (world_size, num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_never_repeats(num_workers: int) -> None:
    parts = [part for rank in run_ranks(_epochs, 2, Noise(), num_workers, 3) for part in rank]
    rows = np.array([row for *_, data in parts for row in data])
    assert len(rows) == 3 * 40
    for column in (1, 2, 3):
        assert len(np.unique(rows[:, column])) == 3 * 40


class First(Noise):
    """A sample is the first number of each stream."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[1:]


def _forward(batch: torch.Tensor) -> torch.Tensor:
    """Return the first numbers while the batch was loaded, and while it is in the forward."""
    drawn = [np.random.rand(), random.random(), torch.rand(()).item()]
    return torch.cat([batch, torch.tensor([drawn], dtype=torch.float64)], 1)


class Streamed:
    """A stream of the same, in two shards."""

    num_shards = 2

    def shard(self, num_shards: int, index: int):
        return (First()[number] for number in range(4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_augmentation_and_dropout_draw_different_numbers(num_workers: int) -> None:
    """With one key for both, an image that was flipped would always lose the same units."""
    plan = dp.BatchPlan(40, 4, 1)
    rows = [_forward(micro.data) for step in dp.Loader(First(), plan, num_workers).epoch(0) for micro in step]
    for numbers in (
        torch.cat(rows),
        dp.predict(_forward, First(), 1, num_workers=num_workers),
        dp.predict(_forward, Streamed(), 1, num_workers=num_workers),
    ):
        assert len(numbers) in (40, 8)
        assert len(numbers.unique()) == numbers.numel()


def _direct_draws(num_workers: int) -> list[float]:
    loader = dp.Loader(Noise(), dp.BatchPlan(40, 12, 3), num_workers)
    return [torch.rand(()).item() + random.random() + np.random.rand() for step in loader.epoch(0) for _ in step]


def test_draws_outside_of_accumulate_do_not_depend_on_workers() -> None:
    drawn = _direct_draws(0)
    assert drawn == _direct_draws(2)
    assert len(set(drawn)) == len(drawn)


def test_a_step_is_a_sequence() -> None:
    plan = dp.BatchPlan(10, 4, 2, shuffle=False)
    loader = dp.Loader(range(10), plan)
    first, second, last = loader.epoch(3)
    assert (second.epoch, second.number, second.shares, second.plan) == (3, 1, (2,), plan)
    assert second.seed == plan.seed_after(3, 1)
    assert [len(step) for step in (first, second, last)] == [2, 2, 1]
    assert len(loader) == 3
    # In another order, and after the later steps were taken.
    assert second[1].data.tolist() == [6, 7]
    assert second[0].data.tolist() == [4, 5]
    assert [micro.data.tolist() for micro in second[:]] == [[4, 5], [6, 7]]
    assert second[-1].index == 1
    assert second[-2].index == 0
    assert [(micro.data.tolist(), micro.weight) for micro in last] == [([8, 9], 1.0)]
    assert [micro.data.tolist() for micro in first] == [[0, 1], [2, 3]]
    with pytest.raises(IndexError, match="micro-batch 2 is out of range: the step has 2"):
        second[2]
    with pytest.raises(IndexError, match="micro-batch -3 is out of range: the step has 2"):
        second[-3]


def test_start_step_seeks() -> None:
    loader = dp.Loader(Noise(), dp.BatchPlan(40, 12, 3))
    whole = [[micro.data.tolist() for micro in step] for step in loader.epoch(1)]
    assert [[micro.data.tolist() for micro in step] for step in loader.epoch(1, start_step=2)] == whole[2:]
    assert list(loader.epoch(1, start_step=4)) == []
    for out_of_range in (5, -1):
        with pytest.raises(ValueError, match=f"start_step={out_of_range}"):
            loader.epoch(1, start_step=out_of_range)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_leaving_an_epoch_early_leaves_the_next_whole(num_workers: int) -> None:
    loader = dp.Loader(range(40), dp.BatchPlan(40, 12, 3, shuffle=False), num_workers)
    early = loader.epoch(0)
    next(early)
    whole = [sample for step in loader.epoch(1) for micro in step for sample in micro.data.tolist()]
    assert whole == list(range(40))
    with pytest.raises(RuntimeError, match="epoch 0 of this Loader has ended"):
        list(early)


def test_an_epoch_that_was_not_begun_ends_with_the_next() -> None:
    loader = dp.Loader(range(8), dp.BatchPlan(8, 4, 2, shuffle=False))
    early, late = loader.epoch(0), loader.epoch(1)
    assert next(late)[0].data.tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="epoch 0 of this Loader has ended"):
        next(early)


def test_steps_that_are_skipped_are_not_the_next_steps() -> None:
    loader = dp.Loader(range(10), dp.BatchPlan(10, 4, 2, shuffle=False))
    numbers = [step[0].data.tolist() for step in loader.epoch(0) if step.number > 0]
    assert numbers == [[4, 5], [8, 9]]


def test_the_users_objects_stay_theirs() -> None:
    def collate(items: list) -> tuple[list, int | None]:
        worker = get_worker_info()
        return items, None if worker is None else worker.dataset.marker

    dataset = Noise()
    dataset.marker = 7
    loader = dp.Loader(dataset, dp.BatchPlan(40, 12, 3), 1, collate, prefetch_factor=4, timeout=30)
    assert isinstance(loader.dataloader, torch.utils.data.DataLoader)
    assert loader.dataloader.prefetch_factor == 4
    assert not loader.dataloader.persistent_workers
    items, marker = next(loader.epoch(0))[0].data
    assert isinstance(items, list)
    assert marker == 7


class Staged(Dataset):
    """A data set that is told its stage before each epoch, as in a curriculum or progressive resizing."""

    stage = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return self.stage


@pytest.mark.parametrize(
    ("num_workers", "options", "expected"),
    [
        (0, {}, [0, 1, 2]),
        (2, {}, [0, 1, 2]),
        (2, {"persistent_workers": False}, [0, 1, 2]),
        (2, {"persistent_workers": True}, [0, 0, 0]),  # as torch's: such workers keep the data set that they got
    ],
)
def test_a_data_set_may_change_between_epochs(num_workers: int, options: dict, expected: list[int]) -> None:
    dataset, theirs = Staged(), Staged()
    loader = dp.Loader(dataset, dp.BatchPlan(8, 8, 2), num_workers, **options)
    torchs = torch.utils.data.DataLoader(theirs, 2, num_workers=num_workers, **options)
    seen, seen_by_torch = [], []
    for epoch in range(3):
        dataset.stage = theirs.stage = epoch
        seen.append({int(value) for step in loader.epoch(epoch) for micro in step for value in micro.data})
        seen_by_torch.append({int(value) for batch in torchs for value in batch})
    assert seen == seen_by_torch == [{stage} for stage in expected]


def test_workers_end_with_the_epoch() -> None:
    """Also where the script keeps a step, as each loop does with its variable."""
    loader = dp.Loader(range(40), dp.BatchPlan(40, 12, 3), 2)
    whole = []
    for step in loader.epoch(0):
        whole.append(step)
        step[0]  # workers start with the first micro-batch
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    assert [len(micro.data) for step in whole for micro in step] == [3] * 12 + [2, 2]
    left = next(loader.epoch(1))
    left[0]
    assert len(multiprocessing.active_children()) == 2
    steps = loader.epoch(2)
    assert not multiprocessing.active_children()  # those of the epoch that was left
    next(steps)[0]
    assert len(multiprocessing.active_children()) == 2
    loader.load_state_dict(loader.state_dict())
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="epoch 2 of this Loader has ended"):
        next(steps)


class Opened(Dataset):
    """A data set that each worker prepares, as torch's pages advise for files and connections."""

    handle = "none"

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> str:
        return self.handle


class OpenedTogether(Opened):
    def __getitems__(self, indices: list[int]) -> list[str]:
        return [self.handle for _ in indices]


def _open(worker_id: int) -> None:
    worker = get_worker_info()
    assert worker.id == worker_id
    worker.dataset.handle = f"worker {worker_id}"


@pytest.mark.parametrize(
    ("dataset", "context"),
    [(Opened(), "fork"), (OpenedTogether(), "fork"), (OpenedTogether(), "spawn")],
    ids=["one by one", "together", "together, spawned"],
)
def test_a_worker_prepares_the_users_data_set(dataset: Opened, context: str) -> None:
    options = {"num_workers": 2, "worker_init_fn": _open, "multiprocessing_context": context}
    torchs = [value for batch in torch.utils.data.DataLoader(dataset, 2, **options) for value in batch]
    loader = dp.Loader(dataset, dp.BatchPlan(8, 8, 2, shuffle=False), **options)
    ours = [value for step in loader.epoch(0) for micro in step for value in micro.data]
    assert ours == torchs == ["worker 0", "worker 0", "worker 1", "worker 1"] * 2
    predicted = dp.predict(lambda batch: batch, dataset, 2, **options)
    assert predicted == torchs


class Broken(Noise):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 17:
            raise OSError("truncated file")
        return super().__getitem__(index)


class BrokenTogether(Broken):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_sample_is_named(num_workers: int) -> None:
    loader = dp.Loader(Broken(), dp.BatchPlan(40, 12, 3), num_workers)
    with pytest.raises(dp.SampleError, match="index 17: OSError: truncated file"):
        list(loader.epoch(0))
    together = dp.Loader(BrokenTogether(), dp.BatchPlan(40, 12, 3, shuffle=False), num_workers)
    with pytest.raises(dp.SampleError, match=r"one of the indices \[15, 16, 17\]: OSError: truncated file"):
        list(together.epoch(0))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_end_with_an_error(persistent: bool) -> None:
    loader = dp.Loader(Broken(), dp.BatchPlan(40, 12, 3), 2, persistent_workers=persistent)
    with pytest.raises(dp.SampleError, match="index 17") as kept:
        list(loader.epoch(0))
    assert not multiprocessing.active_children()
    assert kept.value is not None  # its traceback holds the iterator, which would end the workers when it is freed


def test_persistent_workers_stay_when_an_epoch_is_left() -> None:
    loader = dp.Loader(range(40), dp.BatchPlan(40, 12, 3), 2, persistent_workers=True)
    next(loader.epoch(0))[0]
    before = {worker.pid for worker in multiprocessing.active_children()}
    assert len(before) == 2
    next(loader.epoch(1))[0]
    assert {worker.pid for worker in multiprocessing.active_children()} == before


@pytest.mark.parametrize(
    ("raised", "waiting_for", "error", "message"),
    [
        (ValueError("no image"), None, ValueError, "^no image"),
        (KeyboardInterrupt(), None, KeyboardInterrupt, "^$"),
        (ValueError("no image"), lambda: "batch 1", dp.SampleError, "before it returned batch 1: ValueError: no image"),
        (KeyboardInterrupt(), lambda: "batch 1", KeyboardInterrupt, "^$"),
        (dp.RankFailure("rank 3 failed", 3), lambda: "batch 1", dp.RankFailure, "^rank 3 failed"),
    ],
)
def test_what_a_collate_function_raises(raised, waiting_for, error: type, message: str) -> None:
    def collate(items: list) -> None:
        raise raised

    batches = [SeededIndices([0, 1], 2, (3, 0))]
    loader = torch.utils.data.DataLoader(KeyedDataset(range(4)), batch_sampler=batches, collate_fn=collate)
    with pytest.raises(error, match=message):
        list(load_batches(loader, waiting_for))


class Killed(Noise):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def _kill_a_worker() -> None:
    list(dp.Loader(Killed(), dp.BatchPlan(40, 12, 3), 1).epoch(0))


def test_a_killed_worker_is_named() -> None:
    """torch's signal handler raises at any point of the process, so only its message is checked."""
    (outcome,) = outcomes(_kill_a_worker, 1)
    assert re.search(r"DataLoader worker \(pid.* \d+\).*(killed by signal: Killed|exited)", outcome.trace)
    assert outcome.seconds < 10


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Both(Stream):
    """torch's DataLoader iterates it."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (Stream(), {}, TypeError, "Stream.*Give a map-style data set"),
        (iter([1]), {}, TypeError, "list_iterator.*Give a map-style data set"),
        (set(range(10)), {}, TypeError, "set.*Give a map-style data set"),
        (Both(), {}, TypeError, "Both.*Give a map-style data set"),
        (range(9), {}, ValueError, r"9 samples and the plan 10.*BatchPlan\(…\) of this"),
        (range(10), {"shuffle": True}, TypeError, "shuffle: the plan decides"),
        (range(10), {"batch_size": 3, "sampler": None}, TypeError, "batch_size, sampler: the plan decides"),
    ],
)
def test_what_cannot_be_loaded_is_refused(dataset, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dp.Loader(dataset, dp.BatchPlan(10, 4, 2), **options)


def _too_many_ranks() -> None:
    dp.Loader(range(10), dp.BatchPlan(10, 4, 2)).epoch(0)


def test_more_ranks_than_micro_batches_are_refused_on_every_rank() -> None:
    for outcome in outcomes(_too_many_ranks, 3):
        assert "ValueError: there are 3 ranks but only 2 micro-batches" in outcome.error
        assert outcome.seconds < 10


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 2), (3, 1), (2, 3)])
def test_the_state_is_the_plan_and_the_position(epoch: int, step: int) -> None:
    plan = dp.BatchPlan(10, 4, 2, seed=3)
    state = {"plan": vars(plan), "epoch": epoch, "step": step}
    loader = dp.Loader(range(10), plan)
    loader.load_state_dict(state)
    own = {"kind": "BatchPlan", **vars(plan)}
    assert loader.state_dict() == {**state, "plan": own, "steps_done": epoch * 3 + step}
    assert loader.position == (epoch, step)
    assert [one.number for one in loader.epoch(epoch)] == list(range(step, 3))


def test_ranks_that_would_never_have_work_are_refused() -> None:
    plan = dp.BatchPlan(10, 4, 2)
    check_world_size(plan, 2)
    with pytest.raises(ValueError, match="3 ranks but only 2 micro-batches"):
        check_world_size(plan, 3)


@pytest.mark.parametrize(
    ("plan", "world_size", "uneven"),
    [
        (dp.BatchPlan(16, 8, 2), 2, None),
        (dp.BatchPlan(16, 8, 2), 3, 0),
        (dp.BatchPlan(18, 8, 2), 2, 2),  # the short last step
        (dp.BatchPlan(18, 8, 2, drop_last=True), 2, None),
        (dp.BatchPlan(4, 8, 2), 2, None),  # the only step is short
        (dp.BatchPlan(14, 6, 2), 2, 0),  # the last step has 1 micro-batch, the others 3
        (dp.BatchPlan(0, 8, 2), 3, None),
    ],
)
def test_shares_that_are_not_even_are_refused(plan: dp.BatchPlan, world_size: int, uneven: int | None) -> None:
    if uneven is None:
        check_even_shares(plan, world_size)
    else:
        with pytest.raises(
            ValueError, match=rf"step {uneven} of an epoch has .* which {world_size} ranks cannot share"
        ):
            check_even_shares(plan, world_size)


def test_the_data_loader_inside_has_the_first_epoch_of_one_process() -> None:
    plan = dp.BatchPlan(10, 4, 2, seed=3)
    inside = [batch.tolist() for batch in dp.Loader(range(10), plan).dataloader]
    assert inside == [micro.samples.tolist() for step in plan.steps(0) for micro in step]


def test_an_empty_data_set_has_no_steps() -> None:
    assert list(dp.Loader([], dp.BatchPlan(0, 4, 2)).epoch(0)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
def test_rows_of_tensors_are_what_the_data_loader_collates(dtype: torch.dtype) -> None:
    """The loader takes all rows of a batch at once, and copies them."""
    images = torch.arange(40 * 3).reshape(40, 3, 1).to(dtype)
    dataset = torch.utils.data.TensorDataset(images, torch.arange(40))
    plan = dp.BatchPlan(40, 12, 3, seed=5)
    for step in dp.Loader(dataset, plan).epoch(0):
        for micro in step:
            samples = next(m.samples for m in plan.step(0, step.number) if m.index == micro.index)
            expected = torch.utils.data.default_collate([dataset[index] for index in samples])
            assert type(micro.data) is type(expected) is list
            assert all(torch.equal(one, other) for one, other in zip(micro.data, expected, strict=True))
            assert [one.dtype for one in micro.data] == [other.dtype for other in expected]
            micro.data[0].zero_()
    assert torch.equal(images, torch.arange(40 * 3).reshape(40, 3, 1).to(dtype))


def test_what_torch_does_not_collate_is_refused_in_its_words() -> None:
    sparse = torch.utils.data.TensorDataset(torch.eye(8).to_sparse())
    with pytest.raises(RuntimeError, match="provide a custom collate_fn"):
        list(dp.Loader(sparse, dp.BatchPlan(8, 4, 2)).epoch(0))


def _drawn(loader: dp.Loader, steps: int) -> list[list[int]]:
    return [[sample for micro in step for sample in micro.data.tolist()] for step in loader.steps(steps)]


def test_a_dataloader_is_converted() -> None:
    """Its batch is the global batch, and its order, collate function and workers hold."""

    def doubled(samples: list[int]) -> torch.Tensor:
        return torch.tensor(samples) * 2

    given = DataLoader(range(10), batch_size=4, shuffle=False, drop_last=True, collate_fn=doubled, num_workers=1)
    loader = dp.Loader(given, micro_batch=2)
    assert (loader.dataloader.num_workers, len(loader), len(given)) == (1, 2, 2)
    assert _drawn(loader, 2) == [batch.tolist() for batch in given]
    assert loader.plan.micro_batches_per_step == 2

    shuffled = dp.Loader(DataLoader(range(10), batch_size=4, shuffle=True), micro_batch=2, seed=3)
    assert shuffled.plan == dp.BatchPlan(10, 4, 2, seed=3)
    assert dp.Loader(DataLoader(range(10), batch_size=4), dp.BatchPlan(10, 5, 5, seed=1)).plan.seed == 1
    assert dp.Loader(DataLoader(range(10), batch_size=4), micro_batch=2).plan == dp.BatchPlan(
        10, 4, 2, 0, shuffle=False
    )
    assert options_of(DataLoader(range(10), pin_memory=True), 0) == {"pin_memory": True}
    draws = dp.Loader(DataLoader(range(6), 2, sampler=WeightedRandomSampler([1.0] * 6, 7)), micro_batch=1)
    assert sum(len(micro.data) for step in draws.epoch(0) for micro in step) == 7


def test_a_micro_batch_is_not_its_batch() -> None:
    with pytest.raises(TypeError, match=r"has its batch in .data: write `for micro in …:` and `x, y = micro.data`"):
        _x, _y = next(iter(dp.Loader(range(4), global_batch=2)))[0]


def test_arguments_win_over_those_of_a_dataloader() -> None:
    workers = {"num_workers": 1, "prefetch_factor": 3, "persistent_workers": True, "timeout": 5}
    given = DataLoader(range(8), batch_size=4, **workers, worker_init_fn=_told)
    as_given = dp.Loader(given, micro_batch=2).dataloader
    assert {name: getattr(as_given, name) for name in workers} == workers
    here = dp.Loader(given, micro_batch=2, num_workers=0)  # without what torch refuses then
    assert (here.dataloader.num_workers, here.dataloader.prefetch_factor) == (0, None)
    assert sorted(sample for step in _drawn(here, 2) for sample in step) == list(range(8))
    two = dp.Loader(given, micro_batch=2, num_workers=2, prefetch_factor=1, collate_fn=len)
    assert (two.dataloader.num_workers, two.dataloader.prefetch_factor, two.dataloader.collate_fn) == (2, 1, len)
    with pytest.raises(ValueError, match="micro_batch=0"):
        dp.Loader(given, micro_batch=0)


def _told(worker: int) -> None:
    raise AssertionError("no worker starts here")


@pytest.mark.parametrize(
    ("sampler", "most"),
    [
        (RandomSampler(range(6), replacement=True, num_samples=10**10), 5),
        (WeightedRandomSampler([0, 0, 1, 1, 0, 0], 10, replacement=True), 3),
        (WeightedRandomSampler([1, 1, 1, 1, 0, 0], 3, replacement=False), 3),
    ],
)
def test_a_dataloader_that_draws_at_random_is_converted(sampler: Sampler, most: int) -> None:
    given = DataLoader(range(6), batch_size=2, sampler=sampler, drop_last=True)
    loader = dp.Loader(given, micro_batch=1, seed=2)
    assert isinstance(loader.plan, dp.WeightedPlan)
    assert len(loader) == len(given)
    drawn = _drawn(loader, 40)
    assert {len(step) for step in drawn} == {2}
    assert max(sample for step in drawn for sample in step) <= most


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (DataLoader(range(4), batch_sampler=[[0, 1], [2, 3]]), "with a batch_sampler"),
        (DataLoader(range(4), sampler=ShardSampler(4, 0, 2)), "with a ShardSampler.*OrderPlan"),
        (DataLoader(range(4), sampler=RandomSampler(range(4), num_samples=2)), "with a RandomSampler"),
        (DataLoader(Stream()), "got a Stream.*give the data set, and a StreamPlan"),
    ],
)
def test_other_dataloaders_are_refused(given: DataLoader, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dp.Loader(given, micro_batch=1)


class EvenFirst(RandomSampler):
    """A sampler that draws otherwise than the one that it is derived from."""


@pytest.mark.parametrize(
    ("sampler", "error", "message"),
    [
        (SequentialSampler(range(3)), ValueError, "SequentialSampler is of 3 samples, and its data set has 6"),
        (RandomSampler(range(3), num_samples=6), ValueError, "RandomSampler is of 3 samples.*Subset"),
        (RandomSampler(range(3), replacement=True), ValueError, "RandomSampler is of 3 samples"),
        (WeightedRandomSampler([1.0, 2.0], 6), ValueError, "data set has 6 samples and the plan 2"),
        (EvenFirst(range(6)), TypeError, "with a EvenFirst.*OrderPlan"),
    ],
)
def test_samplers_of_other_data_are_refused(sampler: Sampler, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dp.Loader(DataLoader(range(6), batch_size=2, sampler=sampler), micro_batch=1)
