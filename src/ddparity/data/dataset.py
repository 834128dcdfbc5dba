"""Load whole batches of a data set with random streams that depend on what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from ..compat import end_workers, is_plain_tensor
from ..errors import DDParityError, SampleError
from .rng import seed_streams


class SeededIndices(list[int]):
    """The data-set indices of one batch, and the seed of the random streams while a worker loads them."""

    __slots__ = ("seed",)

    def __init__(self, samples: list[int], seed: int) -> None:
        self[:] = samples
        self.seed = seed

    def __reduce__(self) -> tuple[type[SeededIndices], tuple[list[int], int]]:
        return SeededIndices, (list(self), self.seed)


class KeyedDataset:
    """Load whole batches of `dataset` for a DataLoader. Before each, seed the streams of Python, NumPy and torch.

    The collate function runs after that in the same worker, and draws from the same streams. In a `worker_init_fn` the
    user's data set is `get_worker_info().dataset.dataset`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: SeededIndices) -> list[Any]:
        seed_streams(indices.seed)
        get_many = getattr(self.dataset, "__getitems__", None)
        if get_many is not None:
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
            return given  # type: ignore[no-any-return]  # the data set's own method
        dataset, items, index = self.dataset, [], None
        try:
            for index in indices:
                items.append(dataset[index])
        except Exception as error:
            raise SampleError(_message(f"index {index}", error)) from error
        return items


def load_batches(dataloader: DataLoader[Any], waiting_for: Callable[[], str] | None = None) -> Iterator[Any]:
    """Yield the batches of a DataLoader. Its workers end at once if something fails or if no more batches are needed.

    Args:
        waiting_for: returns the name of the next batch, for the error; None: errors are raised as they are.

    Raises:
        SampleError: with `waiting_for`, if anything fails.
    """
    iterator = None
    try:
        iterator = _iterate_in_process(dataloader) if _is_simple(dataloader) else iter(dataloader)
        yield from iterator
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
