"""Gradient accumulation: one gradient reduction a step, with exact weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import RunningStatistics, compiled_layers, equal_buffers, synchronises
from ..comm.allreduce import copies_of_ranks, sum_gradients
from ..comm.nesting import to_device
from ..compat import forward_collectives, forward_collectives_due, no_forward_collectives
from ..data.rng import seed_streams
from ..data.step import LoadedMicroBatch, Step
from .replicate import Terms, averages, terms_of
from .strict import StrictReduction, deterministic

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

    After `replicate(reduction="strict")` each micro-batch's gradient is taken out of the parameters after its backward,
    and the sum, whose bits do not depend on the number of ranks, is put back after the loop. Running statistics of
    plain batch norms move after the loop, too, unless `replicate` was asked otherwise. Micro-batches are numbered by
    the `Step`; foreign batches in rank order, as if one process ran rank 0's, then rank 1's.

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
    where a rank has no micro-batch; strict: those of `StrictReduction`. For running statistics one small exchange,
    see `RunningStatistics`. For foreign batches, or with `count`, one of 16 bytes more, before the first micro-batch;
    none with `equal_counts`. Every rank must call it and run a backward for each micro-batch.

    Raises:
        TypeError: a plain module in a world of several processes, a batch whose units cannot be counted, or in strict
            mode a sparse gradient.
        ValueError: no rank has a unit, a count is negative or not finite, or the DDP module has static_graph=True and
            not one micro-batch, or the model has synchronised batch norms and the ranks not equally many micro-batches,
            or a `Step` is shared among another number of ranks than the model, or the model is strict and compiled with
            batch norms inside.

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
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if replicated is not None else (0, 1)
    device = next((parameter.device for parameter in model.parameters()), None)
    step = batches if isinstance(batches, Step) else None
    # How many micro-batches each rank has.
    if step is not None and count is None:
        numbers = step.shares
        if len(numbers) != world_size:
            raise ValueError(
                f"accumulate(): this step is shared among {len(numbers)} ranks, but the model's process group has "
                f"{world_size}: a Loader shares a step among all ranks, so replicate the model over all of them"
            )
        micros = map(step.load, range(numbers[rank]))
    else:
        weighted, numbers = _weighted(batches, count or first_dimension, replicated, device, equal_counts)
        micros = iter(weighted)
    size = numbers[rank]
    terms = terms_of(model)
    strict = terms is not None and terms.reduction == "strict"
    # Reduced after the loop, and not in the last backward.
    after = replicated is not None and (strict or 0 in numbers)
    _check_shares(model, replicated, numbers, size, after)
    # DDP's own path divides by the world size; our sums do not.
    scale = world_size if replicated is not None and not after and averages(replicated) else 1
    target = device if device is not None and device.type != "cpu" else None

    statistics = _statistics(model, terms, group)
    position = -1
    with ExitStack() as window:
        were_equal = stay_equal = False
        if replicated is not None and terms is not None:
            were_equal, terms.buffers_equal = terms.buffers_equal, False  # until the step is over
            stay_equal = equal_buffers(replicated.module, statistics is not None)
        if replicated is not None and (after or stay_equal):
            window.callback(forward_collectives_due, replicated)
            if were_equal and stay_equal:
                no_forward_collectives(replicated)
        if replicated is not None and after:
            forward_collectives(replicated)
        gradients = None
        if strict:
            named = replicated.module.named_parameters() if replicated is not None else model.named_parameters()
            gradients = StrictReduction(named, numbers, rank, group)
            window.enter_context(deterministic(device))
        if statistics:
            window.enter_context(statistics.recording())
        try:
            for position, micro in enumerate(micros):
                if micro.seed is not None:
                    seed_streams(micro.seed)
                if target is not None or scale != 1:
                    data = to_device(micro.data, target) if target is not None else micro.data
                    micro = LoadedMicroBatch(data, micro.weight * scale, micro.index, micro.seed)
                if replicated is None or (position == size - 1 and not after):
                    yield micro
                else:
                    with replicated.no_sync():
                        yield micro
                if gradients is not None:
                    gradients.take()
        except GeneratorExit:
            if after or strict or position < size - 1:
                lost = "gradients are not reduced"
            elif statistics:
                lost = "running statistics have not moved"
            else:
                raise
            logger.warning("left accumulate() in micro-batch %d of %d: %s", position + 1, size, lost)
            raise
        if gradients is not None:
            gradients.finish()
        elif replicated is not None and after:
            sum_gradients(replicated.module.parameters(), group)
        if statistics and terms is not None:
            statistics.replay(max(numbers), terms.room)
        if terms is not None:
            terms.buffers_equal = stay_equal
        if step is not None:
            seed_streams(step.seed)
            step.end()


def _check_shares(
    model: nn.Module, replicated: DistributedDataParallel | None, numbers: Sequence[int], size: int, after: bool
) -> None:
    """Refuse what cannot run these numbers of micro-batches; every rank with a model of this kind does."""
    if replicated is not None and replicated.static_graph and (size > 1 or after):
        raise ValueError(
            f"accumulate() got {size} micro-batches for a DDP module with static_graph=True, whose backwards must "
            f"all reduce: leave static_graph out, or give each rank one micro-batch a step"
        )
    if len(set(numbers)) > 1 and synchronises(model):
        raise ValueError(
            f"accumulate(): this rank has {size} micro-batches in this step and others have more or fewer, but the "
            f"model has synchronised batch norms, which every rank must run equally often: give each rank as many "
            f"micro-batches (a BatchPlan's short last step is left out with drop_last=True)"
        )


def _statistics(model: nn.Module, terms: Terms | None, group: dist.ProcessGroup | None) -> RunningStatistics | None:
    """What keeps the running statistics in this step; None where every forward moves them itself."""
    if terms is None or terms.batchnorm_statistics == "rank0":
        return None
    statistics = RunningStatistics(model, group)
    if not statistics.layers:
        return None
    if compiled_layers(model):
        problem = "the model is compiled, and a batch norm inside of a graph does not tell a batch's statistics"
        if terms.reduction == "strict":
            raise ValueError(
                f"accumulate(): {problem}: compile parts without batch norms, or take rank 0's running statistics, by "
                f'replicate(model, reduction="strict", batchnorm_statistics="rank0")'
            )
        if dist.get_rank(group) == 0:
            logger.warning("%s: its running statistics are rank 0's", problem)
        terms.batchnorm_statistics = "rank0"  # on every rank alike
        return None
    return statistics


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
) -> tuple[list[LoadedMicroBatch], tuple[int, ...]]:
    """The micro-batches that have units, weighted over all ranks; how many of these each rank has."""
    world_size = dist.get_world_size(replicated.process_group) if replicated is not None else 1
    if equal_counts:
        micros = _listed(batches)
        if not micros:
            raise ValueError("accumulate(equal_counts=True) got no batches")
        weights = [1 / (len(micros) * world_size)] * len(micros)
        return _reweighted(micros, weights), (len(micros),) * world_size
    # A rank that cannot load or count tells the others by a NaN, since they would wait for it.
    problem: Exception | None = None
    micros, counts = [], []
    try:
        micros = _listed(batches)
        counts = [_checked_count(count(micro.data), micro.index) for micro in micros]
        own = [sum(counts), float(sum(map(bool, counts)))]
    except Exception as error:
        problem, own = error, [float("nan"), 0.0]
    everyones = [own]
    if replicated is not None:
        mine = torch.tensor(own, dtype=torch.float64, device=device)
        everyones = copies_of_ranks(mine, replicated.process_group).tolist()
    if problem is not None:
        raise problem
    units = math.fsum(units for units, _ in everyones)
    if units != units:
        raise ValueError("accumulate(): another rank could not load or count its batches; its own error says why")
    if units == 0:
        raise ValueError(
            "accumulate(): no batch on any rank has a unit to take the mean over; skip this step on all ranks"
        )
    return _reweighted(micros, [own / units for own in counts]), tuple(int(number) for _, number in everyones)


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
