"""The seed of each sample, for generators that a data set keeps itself."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset

import ddparity as dp
from tests.ranks import run_ranks

SIZE = 40


class Own(Dataset):
    """A data set with generators of its own. A sample: its index, its seed's halves, a number from each generator."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        seed = dp.sample_seed()
        assert dp.sample_seed() == seed
        drawn = np.random.default_rng(seed).random()
        also = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
        return torch.tensor([index, seed >> 32, seed % 2**32, drawn, also], dtype=torch.float64)


class OwnTogether(Own):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        rows = []
        for number, index in reversed(list(enumerate(indices))):
            seed = dp.sample_seed(number)
            drawn = np.random.default_rng(seed).random()
            also = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
            rows.append(torch.tensor([index, seed >> 32, seed % 2**32, drawn, also], dtype=torch.float64))
        return rows[::-1]


def _rows(dataset: Dataset, num_workers: int, sizes: tuple[int, int] = (12, 3), epochs: int = 2) -> list[list[float]]:
    """Return the samples that this rank loads, in order, each with its epoch."""
    loader = dp.Loader(dataset, dp.BatchPlan(SIZE, *sizes, seed=5), num_workers)
    return [
        [epoch, *row]
        for epoch in range(epochs)
        for step in loader.epoch(epoch)
        for micro in step
        for row in micro.data.tolist()
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[float]]:
    return _rows(Own(), 0)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (3, 1)])
def test_it_is_the_same_for_any_workers_and_processes(
    world_size: int, num_workers: int, alone: list[list[float]]
) -> None:
    ranks = run_ranks(_rows, world_size, Own(), num_workers)
    assert sorted(row for rank in ranks for row in rank) == sorted(alone)


@pytest.mark.parametrize("sizes", [(12, 12), (7, 1), (40, 16)])
def test_it_is_the_same_for_any_sizes_of_batches(sizes: tuple[int, int], alone: list[list[float]]) -> None:
    assert _rows(Own(), 0, sizes) == alone


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "dataset",
    [
        OwnTogether(),
        Subset(Own(), range(SIZE)),
        Subset(Subset(Own(), range(SIZE)), range(SIZE)),
        Subset(OwnTogether(), range(SIZE)),
        ConcatDataset([Subset(Own(), range(SIZE))]),
    ],
    ids=["together", "subset", "subset of a subset", "subset together", "concatenated"],
)
def test_kinds_of_data_sets(dataset: Dataset, num_workers: int, alone: list[list[float]]) -> None:
    assert _rows(dataset, num_workers) == alone


def test_it_never_repeats() -> None:
    rows = np.array(_rows(Own(), 0, epochs=25))
    assert len(rows) == 25 * SIZE
    for column in (3, 4, 5):
        assert len(np.unique(rows[:, column])) == len(rows)
    low = rows[:, 3].astype(np.int64)
    assert not np.any(low % 2)  # the seeds after them are free
    other = dp.BatchPlan(SIZE, 12, 3, seed=6)
    steps = dp.Loader(Own(), other).epoch(0)
    theirs = {tuple(row[1:3]) for step in steps for micro in step for row in micro.data.tolist()}
    assert len(theirs) == SIZE and not theirs & {(row[2], row[3]) for row in rows}


def test_it_is_no_seed_of_a_micro_batch() -> None:
    plan = dp.BatchPlan(SIZE, 12, 3, seed=5)
    micros = {
        micro.seed + more for epoch in range(2) for step in plan.steps(epoch) for micro in step for more in (0, 1)
    }
    samples = {(int(high) << 32) + int(low) for _, _, high, low, *_ in _rows(Own(), 0)}
    assert len(samples) == 2 * SIZE and not samples & micros


@pytest.mark.parametrize("num_workers", [0, 2])
def test_predictions_have_it(num_workers: int) -> None:
    def predicted(batch_size: int) -> torch.Tensor:
        return dp.predict(torch.nn.Identity(), Own(), batch_size, num_workers=num_workers)

    rows = predicted(7)
    assert torch.equal(rows, predicted(16))
    assert rows[:, 0].tolist() == list(range(SIZE))
    assert len(rows[:, 3].unique()) == SIZE


def test_outside_of_a_loader_it_is_refused() -> None:
    message = r"sample_seed\(\) is called outside of a Loader and of predict\(\): call it in the data set's __getitem__"
    with pytest.raises(RuntimeError, match=message):
        dp.sample_seed()
    with pytest.raises(RuntimeError, match=message):
        Own()[0]
    steps = dp.Loader(Own(), dp.BatchPlan(SIZE, 12, 3)).epoch(0)
    for _ in next(steps):
        with pytest.raises(RuntimeError, match=message):
            dp.sample_seed()


class _Broken(Own):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise OSError("truncated file")


def test_after_a_sample_that_failed_it_is_refused() -> None:
    with pytest.raises(dp.SampleError, match="truncated"):
        list(dp.Loader(_Broken(), dp.BatchPlan(SIZE, 12, 3)).epoch(0))
    with pytest.raises(RuntimeError, match="outside of a Loader"):
        dp.sample_seed()


class _InAThread(Own):
    def __getitem__(self, index: int) -> torch.Tensor:
        errors: list[str] = []

        def work() -> None:
            try:
                dp.sample_seed()
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "in the thread that loads the sample" in errors[0]
        return torch.zeros(1)


def test_another_thread_is_given_the_seed() -> None:
    for _ in next(dp.Loader(_InAThread(), dp.BatchPlan(SIZE, 12, 3)).epoch(0)):
        pass


class _Numbered(Own):
    def __init__(self, number: int) -> None:
        self.number = number

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        dp.sample_seed(self.number)
        return [torch.zeros(1) for _ in indices]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (StackDataset(Own()), r"RuntimeError: sample_seed\(\) is called in a __getitems__.*sample_seed\(number\)"),
        (_Numbered(3), r"IndexError: sample_seed\(3\): the batch has 3 samples"),
        (_Numbered(-1), r"IndexError: sample_seed\(-1\)"),
    ],
)
def test_where_it_is_not_known_which_sample_it_is_refused(dataset: Dataset, message: str) -> None:
    with pytest.raises(dp.SampleError, match=message):
        list(dp.Loader(dataset, dp.BatchPlan(SIZE, 12, 3)).epoch(0))


class _Nested(Own):
    """A data set that reads another loader, as one that draws a batch of negatives for each sample."""

    def __getitem__(self, index: int) -> torch.Tensor:
        seed = dp.sample_seed()
        inner = next(dp.Loader(Own(), dp.BatchPlan(SIZE, 4, 4, seed=9)).epoch(0))[0].data
        assert dp.sample_seed() == seed
        assert seed not in {(int(row[1]) << 32) + int(row[2]) for row in inner}
        return torch.tensor(index)


def test_loaders_nest() -> None:
    assert len(list(dp.Loader(_Nested(), dp.BatchPlan(SIZE, 12, 3)).epoch(0))) == 4
