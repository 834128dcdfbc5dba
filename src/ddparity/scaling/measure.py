"""Measure the parts of a Task's training step on the processes at hand."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..comm.allreduce import PART_BYTES, cut
from ..comm.broadcast import broadcast
from ..comm.gather import gather
from ..compat import grad_dtype
from ..data.loader import Loader
from ..data.step import Step
from ..gradients.early import CAP_BYTES, cut_early, sends_strict_early
from ..runtime.world import World
from ..task.task import Task
from ..task.train import build
from .collectives import LEAST, MOST, Clock, agreed_block, agreed_rounds, collectives, median
from .links import Kind, Machine
from .model import Part, Variant, Work
from .training import Training, trained, trainings_of

_WARM_UP = 4  # steps; the first ones of a model compare values
_KEPT = 4  # steps whose data stay in memory
_ALIGNED_BYTES = 64  # of gradients in the strict reduction's buffer


@dataclass(frozen=True)
class Stages:
    """One rank's seconds of a step of the fast reduction, medians. `reduce_s`: what the slowest rank waits for the
    collectives after its backward. `waiting_s`: what this rank waits for slower ones. `between_s`: the rest."""

    load_s: float
    forward_s: float
    backward_s: float
    reduce_s: float
    waiting_s: float
    update_s: float
    between_s: float

    @property
    def total_s(self) -> float:
        return float(sum(dataclasses.astuple(self)))


@dataclass(frozen=True)
class Measurement:
    """What was measured. `steps_s`: of each variant, a step's seconds on the slowest rank, in each round.

    `collectives`: by kind, pairs of bytes that a rank sends and seconds. `refused`: a variant, and why it cannot run.
    """

    shares: tuple[int, ...]
    device: str
    parameters: int
    work: Work
    machine: Machine
    steps_s: dict[Variant, list[float]]
    stages: list[Stages]
    collectives: dict[Kind, list[tuple[float, float]]]
    refused: dict[Variant, str]

    def median_s(self, variant: Variant) -> float:
        return float(np.median(self.steps_s[variant]))


def measure(task: Task, here: World, train_set: Any, workers: int, seconds: float) -> Measurement:
    """Measure a Task on all ranks. Every rank calls it; the result is rank 0's.

    Args:
        workers: of the loader. seconds: how long it may take, about, beside the warm-up.

    Raises:
        ValueError: the data set has no full step, or the model has sparse gradients.

    Collectives: those of the steps and of the sums that are measured.
    """
    net, loader = build(task, here, train_set, workers, task.collate_fn)
    _refuse_sparse(net)
    steps, loads = _loaded(loader, here, seconds * 0.1)
    clock = Clock(here)
    trainings, refused = trainings_of(task, net, steps, clock)
    alone = Training(task, copy.deepcopy(net), clock, None)
    for one in (alone, *trainings.values()):
        with one.apart():
            for number in range(_WARM_UP):
                one.run(steps[number % len(steps)])
    solo_micro: list[float] = []
    solo_update: list[float] = []
    if here.rank == 0:
        solo_micro, solo_update = _run_alone(alone, steps, seconds * 0.15)
    clock.together()
    alone.forget()
    times = _rounds(alone, trainings, steps, seconds * 0.5, clock)
    stages = _stages(trainings["fast"], steps, loads, seconds * 0.1, clock)
    ready = alone.readiness(steps[0])
    sizes = [one.nbytes for one in trained(net)]
    exchanged, machine = collectives(here, sum(sizes), seconds * 0.15, clock)
    everyones = gather({"micro": np.array(alone.micro_s), "update": np.array(alone.update_s)}, to="all")
    backward_s, order = broadcast([float(ready[0]), [int(one) for one in ready[1]]])
    fractions = broadcast([float(one) for one in ready[2]])
    synced = trainings.get("SyncBatchNorm")
    work = Work(
        micro_s=tuple(everyones["micro"].tolist()),
        alone_s=median(solo_micro),
        update_s=median(everyones["update"].tolist()),
        update_alone_s=median(solo_update),
        load_s=median(loads),
        workers=workers,
        backward_s=backward_s,
        parts=parts_of(trained(net), order, fractions),
        strict_parts=strict_parts_of(trained(net), order, fractions),
        layers=() if synced is None else synced.channels(steps[0]),
        statistics_bytes=statistics_bytes_of(net),
        micro_batches=sum(steps[0].shares),
    )
    return Measurement(
        steps[0].shares, here.device.type, sum(one.numel() for one in trained(net)), work, machine,
        times, stages, exchanged, refused,
    )  # fmt: skip


# The Task


def _refuse_sparse(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if getattr(module, "sparse", False) is True:
            raise ValueError(
                f"{name} has sparse gradients, whose size depends on the data: bench has no prediction for them. Use "
                f"sparse=False"
            )


def _loaded(loader: Loader, here: World, seconds: float) -> tuple[list[Step], list[float]]:
    """Return some full steps with their data, and the seconds to load a micro-batch, one after the other."""
    kept: list[Step] = []
    times: list[float] = []
    end = time.perf_counter() + seconds
    for step in loader.epoch(0):
        full = not kept or step.shares == kept[0].shares
        for index in range(len(step)):
            began = time.perf_counter()
            step.load(index)
            times.append(time.perf_counter() - began)
        if full and min(step.shares) > 0 and len(kept) < _KEPT:
            kept.append(step)
        if len(kept) == _KEPT and time.perf_counter() > end:
            break
    count = min(gather(len(kept), to="all"))
    if count == 0:
        raise ValueError("the training set has no step with a micro-batch for each rank: use fewer processes")
    return kept[:count], times[1:] or times  # the first one starts the workers


def parts_of(parameters: Sequence[nn.Parameter], order: Sequence[int], ready: Sequence[float]) -> tuple[Part, ...]:
    """Return what the fast reduction reduces in one collective each, as `EarlyPlan` and `reduce_gradients` cut it.

    Args:
        order: the numbers of the parameters, as their gradients arrive. ready: of each parameter, see `Part`.
    """
    fractions = {id(one): at for one, at in zip(parameters, ready, strict=True)}
    arriving = [parameters[number] for number in order]
    parts = cut_early(arriving, CAP_BYTES)
    if len(parts) > 1:
        last = len(parts) - 1
        return tuple(
            Part(_flat_bytes(part), max(fractions[id(one)] for one in part), number < last)
            for number, part in enumerate(parts)
        )
    return tuple(Part(_flat_bytes(part), 1.0, False) for part in cut(parameters, PART_BYTES))


def _flat_bytes(part: Sequence[nn.Parameter]) -> int:
    """Return the bytes of gradients, and of one number a parameter."""
    return sum((one.numel() + 1) * grad_dtype(one).itemsize for one in part)


def strict_parts_of(
    parameters: Sequence[nn.Parameter], order: Sequence[int], ready: Sequence[float]
) -> tuple[Part, ...]:
    """Return what the strict reduction exchanges together; arguments as in `parts_of`."""
    fractions = {id(one): at for one, at in zip(parameters, ready, strict=True)}
    parts = cut_early([parameters[number] for number in order], CAP_BYTES)
    if len(parts) > 1 and sends_strict_early(parameters):
        return tuple(
            Part(_row_bytes(part), max(fractions[id(one)] for one in part), number < len(parts) - 1)
            for number, part in enumerate(parts)
        )
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for one in parameters:
        kinds.setdefault(grad_dtype(one), []).append(one)
    return tuple(Part(_row_bytes(part), 1.0, False) for part in kinds.values())


def _row_bytes(part: Sequence[nn.Parameter]) -> int:
    """Return the bytes of gradients of one dtype in the strict reduction's buffers, and of one number a parameter."""
    size = grad_dtype(part[0]).itemsize
    return _aligned(len(part) * size) + sum(_aligned(one.numel() * size) for one in part)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES


def statistics_bytes_of(net: nn.Module) -> tuple[int, int]:
    """Return what `RunningStatistics` exchanges of plain batch norms: fixed bytes, and bytes for each micro-batch."""
    fixed = each = 0
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            size = 2 * layer.running_mean.nbytes
            fixed, each = fixed + 16 + size, each + size
    return fixed, each


# Times


def _run_alone(alone: Training, steps: Sequence[Step], seconds: float) -> tuple[list[float], list[float]]:
    """Return the times of micro-batches and updates while the other ranks wait."""
    alone.forget()
    end, done = time.perf_counter() + seconds, 0
    while done < LEAST or (done < MOST and time.perf_counter() < end):
        alone.run(steps[done % len(steps)])
        done += 1
    return alone.micro_s, alone.update_s


def _rounds(
    alone: Training, trainings: dict[Variant, Training], steps: Sequence[Step], seconds: float, clock: Clock
) -> dict[Variant, list[float]]:
    """Return the seconds of a step of each training on the slowest rank, in each round.

    They take turns, with the training without other ranks, which keeps its own times.
    """
    clock.together()
    contenders = [alone, *trainings.values()]
    began = time.perf_counter()
    for one in contenders:
        one.run(steps[0])
    each = (time.perf_counter() - began) / len(contenders)
    block = agreed_block(each)
    rounds = agreed_rounds(each * block * len(contenders), seconds)
    times: list[list[float]] = [[] for _ in contenders]
    alone.forget()
    for number in range(rounds):
        for turn in range(len(contenders)):
            which = (number + turn) % len(contenders)
            clock.together()
            with contenders[which].apart():
                start = clock.now()
                for step in range(block):
                    contenders[which].run(steps[(number + step) % len(steps)])
                times[which].append((clock.now() - start) / block)
    slowest = gather(np.array([times]), to="all").max(0)
    return {variant: slowest[number].tolist() for number, variant in enumerate(trainings, 1)}


def _stages(
    training: Training, steps: Sequence[Step], loads: Sequence[float], seconds: float, clock: Clock
) -> list[Stages]:
    """Return the stages of a step on each rank."""
    clock.together()
    found = []
    with training.apart():
        began = time.perf_counter()
        training.stages(steps[0])
        for number in range(agreed_rounds(time.perf_counter() - began, seconds)):
            clock.together()
            found.append(training.stages(steps[number % len(steps)]))
    everyones = gather(np.array([found]), to="all")  # (ranks, rounds, 5)
    load_s = gather(median(loads) * len(steps[0]), to="all")
    shortest = everyones[:, :, 3].min(0)
    stages = []
    for rank, own in enumerate(everyones):
        between, forward, backward, gap, updated = np.median(own, 0).tolist()
        waiting = float(np.median(own[:, 3] - shortest))
        stages.append(Stages(load_s[rank], forward, backward, max(0.0, gap - waiting), waiting, updated, between))
    return stages
