"""Load whole batches of a data set with random streams that depend on what is loaded: here, or in a worker."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from ..compat import end_workers, ended_worker, is_plain_tensor, show_dataset
from ..errors import DDParityError, SampleError
from .plan import MicroBatch, Plan
from .rng import numbered_seed, seed_streams

_END_S = 2.0  # for a worker whose connection is closed to end


class SeededIndices(list[int]):
    """The data-set indices of one batch, and the seeds while a worker loads them.

    Attributes:
        seed: of the random streams.
        sample_seeds: the key and the number of the first sample's own seed; the other samples have the next numbers.
    """

    __slots__ = ("sample_seeds", "seed")

    def __init__(self, samples: list[int], seed: int, sample_seeds: tuple[int, int]) -> None:
        self[:] = samples
        self.seed = seed
        self.sample_seeds = sample_seeds

    def __reduce__(self) -> tuple[type[SeededIndices], tuple[list[int], int, tuple[int, int]]]:
        return SeededIndices, (list(self), self.seed, self.sample_seeds)


class MicroBatchSampler:
    """The batch sampler of the DataLoader: a rank's micro-batches of an epoch. It records each that it issues."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.run = 0  # the number of the current iterator; an iterator with another number has ended
        self.issued: deque[MicroBatch] = deque()
        self._range = (0, 0, 0, 1)

    def restart(self, epoch: int, start_step: int, rank: int, world_size: int) -> None:
        self.run += 1
        self.issued = deque()
        self._range = (epoch, start_step, rank, world_size)

    def __iter__(self) -> Iterator[SeededIndices]:
        epoch, start_step, rank, world_size = self._range
        issued = self.issued
        for step in self.plan.steps(epoch, start_step, None, rank, world_size):
            for micro in step:
                issued.append(micro)
                yield seeded(self.plan, epoch, micro)


def seeded(plan: Plan, epoch: int, micro: MicroBatch) -> SeededIndices:
    """Return what a worker gets to load a micro-batch of a plan."""
    return SeededIndices(micro.samples.tolist(), micro.seed + 1, plan.sample_seeds(epoch, micro.position))


class _Loading(threading.local):
    """What this thread loads: a batch, and the number in it of the sample that `__getitem__` is asked for."""

    batch: SeededIndices | None = None
    number: int | None = None


_loading = _Loading()


def sample_seed(number: int | None = None) -> int:
    """Return the seed of the sample that a `Loader` or `predict` is loading, for a generator of the data set's own.

    The seed depends on the plan's seed, the epoch and the sample's position in the epoch's order. It does not depend
    on the number of processes and workers or on the sizes of batches, and differs for each sample and epoch: the lowest
    32 bits repeat after 2**31 samples at the earliest. It is even, so `sample_seed() + 1` is free for a second
    generator.

    Args:
        number: None in `__getitem__`. In a `__getitems__`, which loads many samples in one call: the number of the
            sample in its list.

    Returns:
        An integer of 63 bits. For a generator that takes 32, use `sample_seed() % 2**32`.

    Raises:
        RuntimeError: this thread is not inside of a data set that a Loader or predict reads; or it is inside of a
            `__getitems__`, and no number is given.
        IndexError: there is no sample of this number.

    Collectives: none.

    Example:
        >>> class Noise(torch.utils.data.Dataset):
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return index + np.random.default_rng(sample_seed()).random()
    """
    batch = _loading.batch
    if batch is None:
        raise RuntimeError(
            "sample_seed() is called outside of a Loader and of predict(): call it in the data set's __getitem__, in "
            "the thread that loads the sample, and give the seed to what runs elsewhere"
        )
    if number is None:
        number = _loading.number
        if number is None:
            raise RuntimeError(
                "sample_seed() is called in a __getitems__, which loads several samples in one call: give the number "
                "of the sample in its list, sample_seed(number)"
            )
    if not 0 <= number < len(batch):
        raise IndexError(f"sample_seed({number}): the batch has {len(batch)} samples")
    key, first = batch.sample_seeds
    return numbered_seed(key, first + number)


@contextmanager
def reading_sample(key: int, number: int) -> Iterator[None]:
    """Let `sample_seed()` return the seed of this number of the series `key`, while the body reads one sample."""
    before = _loading.batch, _loading.number
    _loading.batch, _loading.number = SeededIndices([number], 0, (key, number)), 0
    try:
        yield
    finally:
        _loading.batch, _loading.number = before


class KeyedDataset:
    """Load whole batches of `dataset` for a DataLoader. Before each, seed the streams of Python, NumPy and torch.

    The collate function runs after that in the same worker, and draws from the same streams.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: SeededIndices) -> list[Any]:
        seed_streams(indices.seed)
        before = _loading.batch, _loading.number  # of a data set that reads another Loader
        _loading.batch, _loading.number = indices, None
        try:
            get_many = own_getitems(self.dataset)
            return self._one_by_one(indices) if get_many is None else _together(get_many, indices)
        finally:
            _loading.batch, _loading.number = before

    def _one_by_one(self, indices: SeededIndices) -> list[Any]:
        dataset, items, index, loading = self.dataset, [], None, _loading
        try:
            for loading.number, index in enumerate(indices):
                items.append(dataset[index])
        except Exception as error:
            raise SampleError(_message(f"index {index}", error)) from error
        return items


def own_getitems(dataset: Any) -> Callable[[list[int]], Any] | None:
    """Return the method of a data set that loads many samples, if it has one.

    A Subset has one in any case. Without one in the data set inside, it would only loop over the samples.
    """
    inner = dataset
    while type(inner) is Subset:
        inner = inner.dataset
    return getattr(dataset, "__getitems__", None) if getattr(inner, "__getitems__", None) is not None else None


def _together(get_many: Callable[[list[int]], Any], indices: SeededIndices) -> Any:
    try:
        given = get_many(list(indices))
    except Exception as error:
        raise SampleError(_message(f"one of the indices {list(indices)}", error)) from error
    # Other types may be a whole batch, such as a dict of columns. Their number of samples is unknown.
    if isinstance(given, (list, torch.Tensor, np.ndarray)) and len(given) != len(indices):
        raise SampleError(
            f"the data set's __getitems__ returned {len(given)} samples for the {len(indices)} indices "
            f"{list(indices)}: it must return one sample for each index, in their order"
        )
    return given


class WorkerInit:
    """In a worker, before it loads anything: let torch's `get_worker_info().dataset` be the user's data set.

    It is that of a DataLoader's `worker_init_fn`, and calls the user's.
    """

    def __init__(self, user: Callable[[int], None] | None) -> None:
        self._user = user

    def __call__(self, worker_id: int) -> None:
        show_dataset(lambda wrapper: wrapper.dataset)
        if self._user is not None:
            self._user(worker_id)


def worker_options(num_workers: int, worker_init_fn: Callable[[int], None] | None) -> dict[str, Any]:
    """Return the `worker_init_fn` of a DataLoader whose workers see the user's data set, and not our wrapper."""
    return {"worker_init_fn": WorkerInit(worker_init_fn) if num_workers > 0 else worker_init_fn}


def load_batches(dataloader: DataLoader[Any], waiting_for: Callable[[], str] | None = None) -> Generator[Any]:
    """Yield the batches of a DataLoader. Its workers end at once if something fails or if no more batches are needed.

    Args:
        waiting_for: returns the name of the next batch, for the error; None: errors are raised as they are.

    Raises:
        SampleError: with `waiting_for`, if anything fails.
    """
    iterator = None
    try:
        iterator = _iterate_in_process(dataloader) if _is_simple(dataloader) else iter(dataloader)
        try:
            yield from iterator
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            # The connection to a worker broke: a worker that is killed closes it before torch sees its end. An error
            # that the user's code raised in a worker says so.
            if "DataLoader worker" not in str(error) and (said := ended_worker(iterator, _END_S)):
                raise RuntimeError(said) from error
            raise
    except BaseException as error:
        if iterator is not None and not (isinstance(error, GeneratorExit) and dataloader.persistent_workers):
            end_workers(dataloader, iterator)
        if waiting_for is None or not isinstance(error, Exception) or isinstance(error, DDParityError):
            raise
        # The collate function raised it, or a worker was killed or could not start.
        message = f"the data loader failed before it returned {waiting_for()}: {type(error).__name__}: {error}"
        raise SampleError(message) from error


def sized_length(dataset: Any, user: str, otherwise: str = "") -> int:
    """Return the length of a map-style data set.

    Args:
        user: the name of the function that got the data set, for the error.
        otherwise: what else the caller could give, for the error.

    Raises:
        TypeError: the data set is iterable, or has no `__getitem__` or no `__len__`.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{user} got a {type(dataset).__name__}, which cannot return sample i on request, so the samples of a step "
            f"would depend on the number of processes and workers. Give a map-style data set (__len__ and "
            f"__getitem__), for example by writing the stream's items to a file with an index first{otherwise}"
        )
    return len(dataset)


def _message(where: str, error: Exception) -> str:
    return f"the data set failed at {where}: {type(error).__name__}: {error}"


def _is_simple(dataloader: DataLoader[Any]) -> bool:
    """Return whether the DataLoader's own iterator would only fetch and collate."""
    in_process = dataloader.num_workers == 0 and not dataloader.pin_memory
    return in_process and isinstance(dataloader.dataset, KeyedDataset)


def _iterate_in_process(dataloader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a simple DataLoader without the bookkeeping of its own iterator for workers and profiles.

    It saves 27 µs a batch: benchmarks/predict.py, outputs (20,000, 10).
    """
    dataset, collate, batch_sampler = dataloader.dataset, dataloader.collate_fn, dataloader.batch_sampler
    assert isinstance(dataset, KeyedDataset) and batch_sampler is not None, "ddparity's DataLoaders load whole batches"
    if collate is default_collate and _is_table(dataset.dataset):
        for indices in batch_sampler:
            rows = torch.tensor(list(indices))
            yield [tensor[rows] for tensor in dataset.dataset.tensors]
        return
    for indices in batch_sampler:
        yield collate(dataset.__getitems__(indices))  # type: ignore[arg-type]  # torch types samplers by their indices


def _is_table(dataset: Any) -> bool:
    """Return whether collated samples are just rows of plain tensors. Such samples draw no random numbers.

    Taking all rows at once saves about 100 µs for a batch of 64: the same row of benchmarks/predict.py.
    """
    if type(dataset) is not TensorDataset:
        return False
    return all(
        is_plain_tensor(one) and one.layout is torch.strided and not one.requires_grad for one in dataset.tensors
    )
