"""Gradient accumulation: one gradient reduction a step, with exact weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import shared_layers, synchronises
from ..comm.allreduce import copies_of_ranks
from ..comm.bits import words_of
from ..comm.nesting import to_device
from ..compat import joins, uncompiled
from ..data.loader import Loader
from ..data.rng import seed_streams
from ..data.step import LoadedMicroBatch, Step
from ..runtime.agreement import agreed
from . import strangers
from .incomplete import close_loop, open_loop
from .replica import Replica, known_replica, refuse_nested, replica_of
from .sharded import Sharded, ShardedWindow, sharded_of
from .window import Named, Window, names_of, trained_by

logger = logging.getLogger(__name__)

_MOST_PLANS = 4  # that a model is known to be trained with, in turn: they stay in memory


def accumulate(
    model: nn.Module | Sequence[nn.Module],
    batches: Iterable[Any],
    count: Callable[[Any], float] | None = None,
    equal_counts: bool = False,
    skipped: Literal["zero", "drop"] = "zero",
) -> Iterator[LoadedMicroBatch]:
    """Yield the micro-batches of one optimizer step; reduce the gradients once, whatever the loop does.

    Multiply the mean loss of each micro-batch by its `.weight` before `backward`. The gradient after the loop is then
    that of the mean loss over the whole global batch, on every rank, however micro-batches are sized and spread:

        sum over micro-batches i of (units_i / units) * d(mean loss_i)  =  d(sum of all units' losses / units)

    `.share` is units_i / units; the shares of a step sum to one over all ranks. `.weight` is the share times the number
    of ranks where gradients are averaged over them, as DDP does. It is the share itself where they are summed: in the
    strict mode, in a step that leaves a rank without a micro-batch, with `skipped="drop"`, and in a world of one.

    The loop may do more than one forward and one backward: a forward without a backward, several backwards, gradients
    set by hand (`torch.autograd.grad`), a `continue`. Call `optimizer.step()` after the loop. It raises RuntimeError
    after a loop that was left early. Put a penalty into the loss of each micro-batch. A backward after the loop is that
    of plain DDP: it averages if its forward went through the DDP module. If not, it adds this rank's gradients alone.

    With a `Step`, Python's, NumPy's and torch's streams are set to each micro-batch's key, and after the last to the
    step's, the same on every rank.

    After `replicate(reduction="strict")` each micro-batch's gradient is taken out of the parameters after its backward,
    and the sum, whose bits do not depend on the number of ranks, is put back after the loop. Running statistics of
    plain batch norms move after the loop, too, unless `replicate` was asked otherwise. Micro-batches are numbered by
    the `Step`; foreign batches in rank order, as if one process ran rank 0's, then rank 1's.

    Args:
        model: what `replicate` returned, any DistributedDataParallel, a model of torch's `fully_shard`, or a plain
            module in a world of one; or a list of these, whose gradients the loop's losses give together (a generator
            and a discriminator). Another replicated model that a loss runs is reduced after the loop, too.
        batches: a step of a `Loader`, or any batches, whose number may differ between ranks.
        count: units (samples, unmasked tokens) that the mean loss of a batch's data is over; None: for a `Step` the
            plan's samples, else the first dimension of the first tensor. Batches without units are left out: their
            mean loss is undefined.
        equal_counts: a promise that every rank passes the same number of batches, all with the same count. The ranks
            compare their numbers of batches in the model's first step.
        skipped: what a micro-batch counts whose loop body ran no backward: "zero", a gradient of zero; "drop", nothing:
            the other weights are scaled up so that they sum to one.

    Yields:
        Micro-batches with `.data` (on the model's device), `.weight`, `.share` and `.index`.

    Collectives: the gradients once: of a large model in parts that start in the last backward, and one of 4 bytes a
    part; else, and where a rank has no micro-batch or several models are given, flat after the loop, about 32 MiB in
    one; strict: those of `StrictReduction`. For running statistics one small exchange, see `RunningStatistics`. For
    foreign batches, or with `count`, one of 16 bytes more, before the first micro-batch; none with `equal_counts`.
    Where this process has replicated several models, and the others are not gone on every rank, one of 136 bytes. In
    some steps (`replicate(check_every=…)`) one of 8 bytes a parameter and 24 bytes. In a step that leaves a rank
    without a micro-batch, one of a byte a parameter. In the first step of an epoch, and where other parameters are
    trained than before, requests to the group's store. Of sharded models those of `ShardedWindow`. Every rank must run
    the loop.

    Raises:
        TypeError: a plain module in a world of several processes, a model of which `fully_shard` has sharded parts
            alone, a batch whose units cannot be counted, or in strict mode a sparse gradient.
        ValueError: no rank has a unit, a count is negative or not finite, or the DDP module has static_graph=True and
            not one micro-batch, or the model has synchronised batch norms and the ranks not equally many micro-batches,
            or a `Step` is shared among another number of ranks than the model, or the model is strict and has a batch
            norm that is compiled or updates otherwise than torch's, or models of one list differ in reduction or ranks,
            or ranks differ in their plan, step, arguments or model.
        RuntimeError: another loop over this model is not finished, or parameters, or a batch norm's momentum, have
            changed inside of the loop.
        DDParityError: the ranks' parameters differ.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> for micro in accumulate(model, [torch.ones(3, 2), torch.ones(1, 2)]):
        ...     (model(micro.data).mean() * micro.weight).backward()
        >>> model.weight.grad
        tensor([[1., 1.]])
    """
    check_batches(batches, "accumulate()")
    models = [model] if isinstance(model, nn.Module) else list(model)
    if skipped not in ("zero", "drop"):
        raise ValueError(f'accumulate(skipped={skipped!r}) is unknown: use "zero" or "drop"')
    if not models:
        raise ValueError("accumulate() got an empty list of models")
    return _accumulate(models, list(map(state_of, models)), batches, count, equal_counts, skipped == "drop")


def check_batches(batches: object, who: str) -> None:
    """Refuse what is iterable, but is no sequence of batches.

    Raises:
        TypeError: it is a Loader, one batch as a dict, or text.
    """
    if isinstance(batches, Loader):
        raise TypeError(f"{who} got a Loader: loop over its steps, `for step in loader:`, and give each step")
    if not isinstance(batches, list) and isinstance(batches, (Mapping, str, bytes)):
        kind = type(batches).__name__
        raise TypeError(f"{who} got a {kind}, which is one batch: give a step of a Loader, or a list of batches")


def state_of(model: nn.Module) -> Replica | Sharded:
    """Return what is kept of a model between its steps.

    Raises:
        TypeError: its gradients would not be reduced, or would be by somebody else.
    """
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        if joins(inner):
            raise ValueError(
                "accumulate() inside of DistributedDataParallel.join(), which would wait for collectives that the loop "
                "does not run: leave join() out. accumulate takes other numbers of batches on each rank by itself"
            )
    else:
        several = dist.is_initialized() and dist.get_world_size() > 1
        known = known_replica(inner)
        # To look for shards takes long in a large model that has none.
        if (several or known is None or known.careful()) and (sharded := sharded_of(inner)) is not None:
            return sharded
        if several:
            raise TypeError(
                f"accumulate() got a plain {type(model).__name__} in a world of {dist.get_world_size()} processes, "
                f"whose gradients nobody would reduce: wrap the model in ddparity.replicate(model) first"
            )
    replica = replica_of(inner)
    if replica.careful() and inner is not replica.module:
        refuse_nested(replica.module, "accumulate() got a DistributedDataParallel that holds another one")
    return replica


def _accumulate(
    models: list[nn.Module],
    replicas: Sequence[Replica | Sharded],
    batches: Iterable[Any],
    count: Callable[[Any], float] | None,
    equal_counts: bool,
    drops: bool,
) -> Iterator[LoadedMicroBatch]:
    group = _common_group(replicas)
    rank, world_size = (group.rank(), group.size()) if group is not None else (0, 1)
    sharded = [one for one in replicas if isinstance(one, Sharded)]
    device = sharded[0].shards.device if sharded else _device(models[0])
    step = batches if isinstance(batches, Step) else None
    if step is not None and len(step.shares) != world_size:
        raise ValueError(
            f"accumulate(): this step is shared among {len(step.shares)} ranks, but the model's process group has "
            f"{world_size}: a Loader shares a step among all ranks, so replicate the model over all of them"
        )
    number = None
    if equal_counts:
        batches = list(batches) if step is None else step
        number = len(batches)
    _agree(models, replicas, step, number, count is not None, group)
    micros: Iterator[LoadedMicroBatch]
    if step is not None and count is None:
        numbers = step.shares
        micros = map(step.load, range(numbers[rank]))
    else:
        if number is not None:
            weighted, numbers = _equal(batches, number, world_size)
        else:
            weighted, numbers = _weighted(batches, count or first_dimension, group, device)
        micros = iter(weighted)
    _check_shares(models, replicas, numbers, numbers[rank])

    careful = any(replica.careful() for replica in replicas)
    if not careful and not drops and all(replica.alone for replica in replicas):
        for replica in replicas:
            open_loop(replica, micros)
        try:
            yield from _loaded(micros, 1, device)  # nothing to reduce
        finally:
            for replica in replicas:
                close_loop(replica, micros)
                replica.skip()
    else:
        window: Window | ShardedWindow
        if sharded:
            window = ShardedWindow(sharded, numbers, rank, drops)
        else:
            window = Window([one for one in replicas if isinstance(one, Replica)], numbers, rank, drops, careful)
            window.agree()
        rechecks = next((one.rechecks for one in replicas if one.rechecks is not None), None)
        recheck = None
        if rechecks is not None and rechecks.due(numbers) and isinstance(window, Window):
            recheck = window.recheck(rechecks, step, device)
        position, last = -1, numbers[rank] - 1
        window.open(device)
        try:
            try:
                if last == 0:
                    window.begin_last()
                for position, micro in enumerate(_loaded(micros, window.scale, device)):
                    if recheck is not None and position == 0:
                        recheck.begin(micro.data)
                    yield micro
                    if recheck is not None and step is not None and position == 0:
                        recheck.keep(micro, micro.index - sum(step.shares[:rank]))
                    window.take(micro.index, micro.share)
                    if position + 1 == last:
                        window.begin_last()
                if recheck is not None:
                    yield from recheck.run()
            except GeneratorExit:
                if window.waits or position < last:
                    logger.warning(
                        "left accumulate() in micro-batch %d of %d: gradients are not reduced", position + 1, last + 1
                    )
                raise
            window.finish()
        finally:
            if recheck is not None:
                recheck.close()
            window.close()
    if step is not None:
        seed_streams(step.seed)
        step.end()


def _device(module: nn.Module) -> torch.device | None:
    """Return the first parameter's device; `next(module.parameters())` takes several times as long."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter.device
    for child in module._modules.values():
        if child is not None and (device := _device(child)) is not None:
            return device
    return None


def _loaded(
    micros: Iterable[LoadedMicroBatch], scale: float, device: torch.device | None
) -> Iterator[LoadedMicroBatch]:
    """Yield micro-batches on their device, with their weights, each after its random streams are set."""
    for micro in micros:
        if micro.seed is not None:
            seed_streams(micro.seed)
        data = micro.data if device is None or device.type == "cpu" else to_device(micro.data, device)
        if data is micro.data and scale == 1:
            yield micro
        else:
            yield LoadedMicroBatch(data, micro.share * scale, micro.index, micro.seed, micro.share)


def _common_group(replicas: Sequence[Replica | Sharded]) -> dist.ProcessGroup | None:
    """Return the process group of all models of a step; None in a world of one."""
    if len(replicas) == 1:
        return replicas[0].group
    ranks = {one.ranks for one in replicas}
    kinds = sorted({one.reduction for one in replicas})
    if len(ranks) > 1 or len(kinds) > 1:
        what = f"reductions ({' and '.join(kinds)})" if len(kinds) > 1 else "process groups"
        raise ValueError(
            f"accumulate() got models of different {what}: replicate the models of one loop with the same arguments"
        )
    return replicas[0].group


def _agree(
    models: Sequence[nn.Module],
    replicas: Sequence[Replica | Sharded],
    step: Step | None,
    batches: int | None,
    counted: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Compare with the other ranks, once an epoch of each loader, what a step depends on."""
    replica = replicas[0]
    if group is None:
        return
    plan, epoch = (None, None) if step is None else (step.plan, step.epoch)
    key = (id(plan), batches is None, counted)
    known = replica.agreed
    if key in known and known[key][1] == epoch:
        return
    named = _trained(replicas)
    names, said = ({}, {}) if known else names_of(named)
    known.pop(key, None)
    known[key] = plan, epoch  # with the plan, so that no other gets its id
    if len(known) > _MOST_PLANS:
        del known[next(iter(known))]
    trained = [parameter for _, parameter in named]
    values: dict[str, object] = {
        "the number of models given to accumulate()": len(models),
        **names,
        "accumulate(count=…), given or not": counted,
        "the batches with accumulate(equal_counts=True)": batches,
        "the number of synchronised batch norms in training": sum(map(_shared_in_training, models)),
    }
    if replica.rechecks is None or replica.rechecks.off:
        words = enumerate(words_of(trained), 1)
        values["the digest of the parameters' bits"] = sum(number * word for number, word in words)
    else:
        replica.rechecks.soon()  # it compares them, too, and names the rank that is wrong
    if step is None:
        values["the kind of batches"] = "foreign batches"
    else:
        values |= {"the kind of batches": "a Loader's step", "the epoch": step.epoch, "the step": step.number}
    with agreed("accumulate()", group) as agreement:
        assert agreement is not None, "a group of several ranks"
        if step is not None and step.plan is not None:
            values |= {f"the plan's {name}": repr(value) for name, value in step.plan.description(step.epoch).items()}
        agreement.all_same(values, said)
        strangers.check_by_store(agreement)
    if isinstance(replica, Replica):
        replica.compared[tuple(map(id, trained))] = None


def _trained(replicas: Sequence[Replica | Sharded]) -> Named:
    """Return the trained parameters by name, without those that DDP was told to ignore: ranks may differ in these."""
    own = [one for one in replicas if isinstance(one, Replica)]
    named, _ = trained_by(own, [one.walk() for one in own])
    return [*named, *(each for one in replicas if isinstance(one, Sharded) for each in one.trained())]


def _shared_in_training(model: nn.Module) -> int:
    return sum(layer.training for _, layer in shared_layers(model))


def _check_shares(
    models: Sequence[nn.Module], replicas: Sequence[Replica | Sharded], numbers: Sequence[int], size: int
) -> None:
    """Refuse what cannot run these numbers of micro-batches; every rank with models of this kind does."""
    if (size > 1 or 0 in numbers) and any(one.ddp is not None and one.ddp.static_graph for one in replicas):
        raise ValueError(
            f"accumulate() got {size} micro-batches for a DDP module with static_graph=True, whose backwards must "
            f"all reduce: leave static_graph out, or give each rank one micro-batch a step"
        )
    if len(set(numbers)) > 1 and any(map(synchronises, models)):
        raise ValueError(
            f"accumulate(): this rank has {size} micro-batches in this step and others have more or fewer, but the "
            f"model has synchronised batch norms, which every rank must run equally often: give each rank as many "
            f"micro-batches (a BatchPlan's short last step is left out with drop_last=True)"
        )


def _listed(batches: Iterable[Any], weight: float = 1.0) -> list[LoadedMicroBatch]:
    if isinstance(batches, Step):
        return [batches.load(index) for index in range(len(batches))]
    return [LoadedMicroBatch(data, weight, index) for index, data in enumerate(batches)]


def _equal(batches: Iterable[Any], number: int, world_size: int) -> tuple[list[LoadedMicroBatch], tuple[int, ...]]:
    """The micro-batches, of which every rank has this number, and all weigh the same; how many each rank has."""
    if not number:
        raise ValueError("accumulate(equal_counts=True) got no batches")
    weight = 1 / (number * world_size)
    micros = _listed(batches, weight)
    if isinstance(batches, Step):
        micros = _reweighted(micros, [weight] * number)
    return micros, (number,) * world_size


def _weighted(
    batches: Iterable[Any],
    count: Callable[[Any], float],
    group: dist.ProcessGroup | None,
    device: torch.device | None,
) -> tuple[list[LoadedMicroBatch], tuple[int, ...]]:
    """The micro-batches that have units, weighted over all ranks; how many of these each rank has."""
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
    if group is not None:
        mine = torch.tensor(own, dtype=torch.float64, device=device)
        everyones = copies_of_ranks(mine, group).tolist()
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
