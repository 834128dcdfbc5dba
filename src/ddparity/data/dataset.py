"""A data set whose random streams are keyed by what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from ..compat import end_workers, is_plain_tensor
from ..errors import DDParityError, SampleError
from .rng import seed_streams


class Fetch(list[int]):
    """What a worker is asked to load as a whole: data-set indices, and the key of the streams while it loads them."""

    __slots__ = ("seed",)

    def __init__(self, samples: list[int], seed: int) -> None:
        self[:] = samples
        self.seed = seed

    def __reduce__(self) -> tuple[type[Fetch], tuple[list[int], int]]:
        return Fetch, (list(self), self.seed)


class KeyedDataset:
    """Gives a DataLoader whole micro-batches of `dataset`, seeding Python's, NumPy's and torch's streams before each.

    The collate function runs after it in the same worker, and draws from the same streams. A `worker_init_fn` finds
    the user's data set as `get_worker_info().dataset.dataset`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, fetch: Fetch) -> list[Any]:
        seed_streams(fetch.seed)
        together = getattr(self.dataset, "__getitems__", None)
        if together is not None:
            try:
                given = together(list(fetch))
            except Exception as error:
                raise SampleError(_message(f"one of the indices {list(fetch)}", error)) from error
            # Of what may be a whole batch, as a dict of columns, the number of samples is not known.
            if isinstance(given, (list, torch.Tensor, np.ndarray)) and len(given) != len(fetch):
                raise SampleError(
                    f"the data set's __getitems__ gave {len(given)} samples for the {len(fetch)} indices "
                    f"{list(fetch)}: it must give one for each, in their order"
                )
            return given  # type: ignore[no-any-return]  # the data set's own method
        dataset, items, index = self.dataset, [], None
        try:
            for index in fetch:
                items.append(dataset[index])
        except Exception as error:
            raise SampleError(_message(f"index {index}", error)) from error
        return items


def _message(where: str, error: Exception) -> str:
    return f"the data set failed at {where}: {type(error).__name__}: {error}"


def loaded(dataloader: DataLoader[Any], waiting_for: Callable[[], str] | None = None) -> Iterator[Any]:
    """What a DataLoader gives; its workers end at once where the data set fails, or where nobody needs them again.

    Args:
        waiting_for: names what comes next, for the error.

    Raises:
        SampleError: with `waiting_for`, where anything fails.
    """
    iterator = None
    try:
        iterator = _in_this_process(dataloader) if _is_plain(dataloader) else iter(dataloader)
        yield from iterator
    except BaseException as error:
        if iterator is not None and not (isinstance(error, GeneratorExit) and dataloader.persistent_workers):
            end_workers(dataloader, iterator)
        if waiting_for is None or not isinstance(error, Exception) or isinstance(error, DDParityError):
            raise
        # Of the collate function, or of a worker that was killed or could not be started.
        message = f"the data loader failed before it gave {waiting_for()}: {type(error).__name__}: {error}"
        raise SampleError(message) from error


def _is_plain(dataloader: DataLoader[Any]) -> bool:
    """Whether a DataLoader's own iterator would do nothing but fetch and collate."""
    in_process = dataloader.num_workers == 0 and not dataloader.pin_memory
    return in_process and isinstance(dataloader.dataset, KeyedDataset)


def _in_this_process(dataloader: DataLoader[Any]) -> Iterator[Any]:
    """What a plain DataLoader gives, without what its iterator keeps for workers and profiles.

    It saves 27 µs a batch: benchmarks/predict.py, outputs (20,000, 10).
    """
    dataset, collate, order = dataloader.dataset, dataloader.collate_fn, dataloader.batch_sampler
    assert isinstance(dataset, KeyedDataset) and order is not None, "the loaders here give whole batches"
    if collate is default_collate and _is_table(dataset.dataset):
        for fetch in order:
            rows = torch.tensor(list(fetch))
            yield [tensor[rows] for tensor in dataset.dataset.tensors]
        return
    for fetch in order:
        yield collate(dataset.__getitems__(fetch))  # type: ignore[arg-type]  # torch types samplers by their indices


def _is_table(dataset: Any) -> bool:
    """Whether collating single samples gives no more than rows of plain tensors; they take no random numbers.

    Taking the rows at once saves about 100 µs a batch of 64: the same row of benchmarks/predict.py.
    """
    if type(dataset) is not TensorDataset:
        return False
    return all(
        is_plain_tensor(one) and one.layout is torch.strided and not one.requires_grad for one in dataset.tensors
    )


def sized_length(dataset: Any, user: str, otherwise: str = "") -> int:
    """The length of a map-style data set. `otherwise`: what else the user could give.

    Raises:
        TypeError: it is iterable only, or has no length.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{user} got a {type(dataset).__name__}, which cannot be asked for sample i: what a step has would "
            f"depend on the number of processes and workers. Give a map-style data set (__len__ and __getitem__), for "
            f"example by writing the stream's items to a file with an index first{otherwise}"
        )
    return len(dataset)
