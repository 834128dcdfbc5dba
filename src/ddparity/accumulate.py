"""Gradient accumulation: one gradient reduction a step, with exact weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .batches import LoadedMicroBatch, Step, to_device
from .batchnorm import synchronises
from .compat import forward_collectives, forward_collectives_due
from .reduction import sum_gradients, sum_over_ranks
from .replicate import averages
from .seeds import seed_streams

logger = logging.getLogger(__name__)


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    count: Callable[[Any], float] | None = None,
    equal_counts: bool = False,
) -> Iterator[LoadedMicroBatch]:
    """Yield the micro-batches of one optimizer step; the gradients are reduced once, in the backward of the last.

    Multiply the mean loss of each micro-batch by its `.weight` before `backward`. The gradient after the loop is then
    that of the mean loss over the whole global batch, on every rank, however micro-batches are sized and spread:

        sum over micro-batches i of (units_i / units) * d(mean loss_i)  =  d(sum of all units' losses / units)

    With a `Step`, Python's, NumPy's and torch's streams are set to each micro-batch's key, and after the last to the
    step's, the same on every rank.

    Args:
        model: what `replicate` gave, any DistributedDataParallel, or a plain module in a world of one. A DDP that
            averages over ranks gets weights larger by the world size; otherwise they sum to one over all ranks.
        batches: a step of a `Loader`, or any batches, whose number may differ between ranks.
        count: units (samples, unmasked tokens) that the mean loss of a batch's data is over; None: for a `Step` the
            plan's samples, else the first dimension of the first tensor. Batches without units are left out: their
            mean loss is undefined.
        equal_counts: a promise that every rank passes the same number of batches, all with the same count.

    Yields:
        Micro-batches with `.data` (on the model's device), `.weight` and `.index`.

    Collectives: the gradients once, in DDP's buckets, overlapped with the last backward, or in one flat collective
    where a rank has no micro-batch. For foreign batches, or with `count`, one of 32 bytes more, before the first
    micro-batch; none with `equal_counts`. Every rank must call it and run a backward for each micro-batch.

    Raises:
        TypeError: a plain module in a world of several processes, or a batch whose units cannot be counted.
        ValueError: no rank has a unit, a count is negative or not finite, or the DDP module has static_graph=True and
            not one micro-batch, or the model has synchronised batch norms and the ranks not equally many micro-batches.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> for micro in accumulate(model, [torch.ones(3, 2), torch.ones(1, 2)]):
        ...     (model(micro.data).mean() * micro.weight).backward()
        >>> model.weight.grad
        tensor([[1., 1.]])
    """
    if isinstance(model, DistributedDataParallel):
        replicated, group = model, model.process_group
    elif dist.is_initialized() and dist.get_world_size() > 1:
        raise TypeError(
            f"accumulate() got a plain {type(model).__name__} in a world of {dist.get_world_size()} processes, whose "
            f"gradients nobody would reduce: wrap the model in ddparity.replicate(model) first"
        )
    else:
        replicated, group = None, None
    return _accumulate(model, replicated, group, batches, count, equal_counts)


def _accumulate(
    model: nn.Module,
    replicated: DistributedDataParallel | None,
    group: dist.ProcessGroup | None,
    batches: Iterable[Any],
    count: Callable[[Any], float] | None,
    equal_counts: bool,
) -> Iterator[LoadedMicroBatch]:
    micros: Iterator[LoadedMicroBatch]
    device = next((parameter.device for parameter in model.parameters()), None)
    step = batches if isinstance(batches, Step) else None
    if step is not None and count is None:
        size, flat, even = len(step), step.ranks_without, step.even
        micros = map(step.load, range(size))
    else:
        weighted, flat, even = _weighted(batches, count or first_dimension, replicated, device, equal_counts)
        size, micros = len(weighted), iter(weighted)
    if replicated is None:
        flat = False
    elif replicated.static_graph and (size > 1 or flat):
        raise ValueError(
            f"accumulate() got {size} micro-batches for a DDP module with static_graph=True, whose backwards must "
            f"all reduce: leave static_graph out, or give each rank one micro-batch a step"
        )
    if not even and synchronises(model):
        raise ValueError(
            f"accumulate(): this rank has {size} micro-batches in this step and others have more or fewer, but the "
            f"model has synchronised batch norms, which every rank must run equally often: give each rank as many "
            f"micro-batches (a BatchPlan's short last step is left out with drop_last=True)"
        )
    # DDP's own path divides by the world size; our sum of flat gradients does not.
    scale = dist.get_world_size(group) if replicated is not None and not flat and averages(replicated) else 1

    if replicated is not None and flat:
        forward_collectives(replicated)
    target = device if device is not None and device.type != "cpu" else None
    position = -1
    try:
        for position, micro in enumerate(micros):
            if micro.seed is not None:
                seed_streams(micro.seed)
            if target is not None or scale != 1:
                data = to_device(micro.data, target) if target is not None else micro.data
                micro = LoadedMicroBatch(data, micro.weight * scale, micro.index, micro.seed)
            if replicated is None or (position == size - 1 and not flat):
                yield micro
            else:
                with replicated.no_sync():
                    yield micro
        if replicated is not None and flat:
            sum_gradients(replicated.module.parameters(), group)
        if step is not None:
            seed_streams(step.seed)
            step.end()
    except GeneratorExit:
        if flat or position < size - 1:
            logger.warning("left accumulate() in micro-batch %d of %d: gradients are not reduced", position + 1, size)
        raise
    finally:
        if replicated is not None and flat:
            forward_collectives_due(replicated)


def _listed(batches: Iterable[Any]) -> list[LoadedMicroBatch]:
    if isinstance(batches, Step):
        return [batches.load(index) for index in range(len(batches))]
    return [LoadedMicroBatch(data, 1.0, index) for index, data in enumerate(batches)]


def _weighted(
    batches: Iterable[Any],
    count: Callable[[Any], float],
    replicated: DistributedDataParallel | None,
    device: torch.device | None,
    equal_counts: bool,
) -> tuple[list[LoadedMicroBatch], bool, bool]:
    """The micro-batches that have units, weighted over all ranks; whether some rank has none, and all equally many."""
    world_size = dist.get_world_size(replicated.process_group) if replicated is not None else 1
    if equal_counts:
        micros = _listed(batches)
        if not micros:
            raise ValueError("accumulate(equal_counts=True) got no batches")
        return _reweighted(micros, [1 / (len(micros) * world_size)] * len(micros)), False, True
    # A rank that cannot load or count tells the others by a NaN, since they would wait for it.
    problem: Exception | None = None
    micros, counts = [], []
    try:
        micros = _listed(batches)
        counts = [_checked_count(count(micro.data), micro.index) for micro in micros]
        number = sum(map(bool, counts))
        total = [sum(counts), float(number == 0), float(number), float(number**2)]
    except Exception as error:
        problem, total = error, [float("nan"), 0.0, 0.0, 0.0]
    if replicated is not None:
        sums = sum_over_ranks(torch.tensor(total, dtype=torch.float64, device=device), replicated.process_group)
        total = sums.tolist()
    if problem is not None:
        raise problem
    units, ranks_without, numbers, squares = total
    if units != units:
        raise ValueError("accumulate(): another rank could not load or count its batches; its own error says why")
    if units == 0:
        raise ValueError(
            "accumulate(): no batch on any rank has a unit to take the mean over; skip this step on all ranks"
        )
    # Numbers are all equal where the mean of their squares is the square of their mean.
    even = world_size * squares == numbers**2
    return _reweighted(micros, [own / units for own in counts]), ranks_without > 0, even


def _reweighted(micros: list[LoadedMicroBatch], weights: list[float]) -> list[LoadedMicroBatch]:
    """The micro-batches that weigh something, with these weights."""
    return [
        LoadedMicroBatch(micro.data, weight, micro.index, micro.seed)
        for micro, weight in zip(micros, weights, strict=True)
        if weight
    ]


def _checked_count(value: float, index: int) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"accumulate(): count gave {value!r} for batch {index}: it must be finite and at least 0")
    return number


def first_dimension(data: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor, found depth first."""
    found = _first_tensor(data)
    if found is None or found.ndim == 0:
        raise TypeError(
            f"accumulate() cannot count the samples of a {type(data).__name__} without a tensor that has a first "
            f"dimension: pass count=, a function from a batch to its number of units"
        )
    return found.shape[0]


def _first_tensor(data: Any) -> torch.Tensor | None:
    if isinstance(data, torch.Tensor):
        return data
    values: Sequence[Any] = ()
    if hasattr(data, "values") and callable(data.values):
        values = list(data.values())
    elif isinstance(data, (list, tuple)):
        values = data
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)
