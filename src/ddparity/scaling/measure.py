"""Measure the parts of a Task's training step on the processes at hand."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..batchnorm import convert_sync_batchnorm, shared_layers, synchronises
from ..comm.allreduce import PART_BYTES, cut
from ..comm.broadcast import broadcast
from ..comm.gather import gather
from ..comm.nesting import to_device
from ..compat import grad_dtype
from ..data.loader import Loader
from ..data.step import Step
from ..gradients.accumulate import accumulate
from ..gradients.early import CAP_BYTES, PARTS, SMALL_BYTES
from ..gradients.replicate import replicate
from ..runtime.world import World
from ..task.task import Task
from ..task.train import build, loss_of, update
from .collectives import LEAST, MOST, Clock, agreed_block, agreed_rounds, collectives, median
from .links import Kind, Machine
from .model import Part, Variant, Work

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
    trainings, refused = _trainings(task, net, steps, clock)
    alone = _Training(task, copy.deepcopy(net), clock, None)
    for one in (alone, *trainings.values()):
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
    sizes = [one.nbytes for one in _trained(net)]
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
        parts=parts_of(_trained(net), order, fractions),
        strict_sizes=strict_sizes_of(_trained(net)),
        layers=() if synced is None else synced.channels(steps[0]),
        statistics_bytes=_statistics_bytes(net),
        micro_batches=sum(steps[0].shares),
    )
    return Measurement(
        steps[0].shares, here.device.type, sum(one.numel() for one in _trained(net)), work, machine,
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


def _trained(net: nn.Module) -> list[nn.Parameter]:
    return [one for one in net.parameters() if one.requires_grad]


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


class _Training:
    """A copy of the model, trained in one way. `run` takes a step."""

    def __init__(self, task: Task, net: nn.Module, clock: Clock, reduction: Any) -> None:
        self._task, self._clock = task, clock
        self._plain = reduction is None
        self._device = next((one.device for one in net.parameters()), torch.device("cpu"))
        self.model = net if self._plain else replicate(net, reduction)
        self.model.train()
        self._optimizer = task.optimizer(self.model.parameters())
        self.forget()

    def forget(self) -> None:
        """Forget the times of steps."""
        self.micro_s: list[float] = []
        self.update_s: list[float] = []

    def run(self, step: Step) -> None:
        if self._plain:
            self._run_plain(step)
            return
        for micro in accumulate(self.model, step, self._task.count):
            (loss_of(self._task, self.model, micro.data) * micro.weight).backward()
        self._update()

    def _run_plain(self, step: Step) -> None:
        """Take a step without the other ranks, and keep the times."""
        last = self._clock.now()
        for index in range(len(step)):
            micro = step[index]
            (loss_of(self._task, self.model, to_device(micro.data, self._device)) * micro.weight).backward()
            now = self._clock.now()
            self.micro_s.append(now - last)
            last = now
        self._update()
        self.update_s.append(self._clock.now() - last)

    def _update(self) -> None:
        update(self._task, self.model, self._optimizer, None)
        self._optimizer.zero_grad()

    def stages(self, step: Step) -> list[float]:
        """Take a step, and return the seconds between micro-batches, of forwards, of backwards, from the last one's
        end to that of the loop, and of the update."""
        now = self._clock.now
        between = forward = backward = 0.0
        last = now()
        for micro in accumulate(self.model, step, self._task.count):
            begin = now()
            loss = loss_of(self._task, self.model, micro.data)
            middle = now()
            (loss * micro.weight).backward()
            end = now()
            between, forward, backward = between + begin - last, forward + middle - begin, backward + end - middle
            last = end
        reduced = now()
        self._update()
        return [between, forward, backward, reduced - last, now() - reduced]

    def readiness(self, step: Step) -> tuple[float, list[int], list[float]]:
        """Return the seconds of a backward, the order of the parameters' gradients in it, and when each is there.

        The last is a part of the backward's time, for each parameter that is trained.
        """
        parameters = _trained(self.model)
        seen: list[dict[int, float]] = []
        took: list[float] = []
        stamp: Callable[[], Any] = time.perf_counter
        if self._device.type == "cuda":  # the backward has only queued its work when a hook runs

            def stamp() -> torch.cuda.Event:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                return event

        for number in range(LEAST):
            micro = step[number % len(step)]
            loss = loss_of(self._task, self.model, to_device(micro.data, self._device))
            self._clock.now()
            marks: dict[int, Any] = {}

            def mark(parameter: torch.Tensor, marks: dict[int, Any] = marks) -> None:
                marks[id(parameter)] = stamp()

            hooks = [one.register_post_accumulate_grad_hook(mark) for one in parameters]
            begin, started = stamp(), time.perf_counter()
            loss.backward()
            took.append(self._clock.now() - started)
            for hook in hooks:
                hook.remove()
            self._optimizer.zero_grad()
            since = {
                key: at - begin if isinstance(at, float) else begin.elapsed_time(at) / 1e3 for key, at in marks.items()
            }
            seen.append({key: min(1.0, after / took[-1]) for key, after in since.items()})
        fractions = [median([one.get(id(parameter), 1.0) for one in seen]) for parameter in parameters]
        order = sorted(range(len(parameters)), key=lambda number: (fractions[number], -number))
        return median(took), order, fractions

    def channels(self, step: Step) -> tuple[int, ...]:
        """Return the channels of each synchronised batch norm that a micro-batch runs. Every rank calls it."""
        found: list[int] = []
        hooks = [
            layer.register_forward_hook(lambda layer, *_: found.append(int(layer.num_features)))
            for _, layer in shared_layers(self.model)
        ]
        with torch.no_grad():
            loss_of(self._task, self.model, to_device(step[0].data, self._device))
        for hook in hooks:
            hook.remove()
        return tuple(found)


def _trainings(
    task: Task, net: nn.Module, steps: Sequence[Step], clock: Clock
) -> tuple[dict[Variant, _Training], dict[Variant, str]]:
    """Return the model in each way of training, and the ways that it refuses."""
    made: dict[Variant, _Training] = {"fast": _Training(task, copy.deepcopy(net), clock, "fast")}
    refused: dict[Variant, str] = {}
    try:
        made["strict"] = _Training(task, copy.deepcopy(net), clock, "strict")
    except ValueError as error:  # on every rank, for the same reason
        refused["strict"] = str(error)
    converted = convert_sync_batchnorm(copy.deepcopy(net))
    if not synchronises(converted):
        refused["SyncBatchNorm"] = "the model has no batch norm"
    elif len(set(steps[0].shares)) > 1:
        refused["SyncBatchNorm"] = f"the ranks have {steps[0].shares} micro-batches in a step, not equally many"
    else:
        made["SyncBatchNorm"] = _Training(task, converted, clock, "fast")
    return made, refused


def parts_of(parameters: Sequence[nn.Parameter], order: Sequence[int], ready: Sequence[float]) -> tuple[Part, ...]:
    """Return what the fast reduction reduces in one collective each, as `EarlyAverages` and `reduce_gradients` cut it.

    Args:
        order: the numbers of the parameters, as their gradients arrive. ready: of each parameter, see `Part`.
    """
    fractions = {id(one): at for one, at in zip(parameters, ready, strict=True)}
    arriving = [parameters[number] for number in order]
    size = sum(one.nbytes for one in arriving)
    if size > SMALL_BYTES:
        parts = cut(arriving, min(CAP_BYTES, max(SMALL_BYTES, size // PARTS)))
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


def strict_sizes_of(parameters: Sequence[nn.Parameter]) -> tuple[int, ...]:
    """Return the bytes of one row of gradients in the strict reduction's buffers, by dtype."""
    sizes: dict[torch.dtype, int] = {}
    counts: dict[torch.dtype, int] = {}
    for one in parameters:
        kind = grad_dtype(one)
        sizes[kind] = sizes.get(kind, 0) + _aligned(one.numel() * kind.itemsize)
        counts[kind] = counts.get(kind, 0) + 1
    return tuple(size + _aligned(counts[kind] * kind.itemsize) for kind, size in sizes.items())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _statistics_bytes(net: nn.Module) -> tuple[int, int]:
    """Return what `RunningStatistics` exchanges of plain batch norms: fixed bytes, and bytes for each micro-batch."""
    fixed = each = 0
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            size = 2 * layer.running_mean.nbytes
            fixed, each = fixed + 16 + size, each + size
    return fixed, each


# Times


def _run_alone(alone: _Training, steps: Sequence[Step], seconds: float) -> tuple[list[float], list[float]]:
    """Return the times of micro-batches and updates while the other ranks wait."""
    alone.forget()
    end, done = time.perf_counter() + seconds, 0
    while done < LEAST or (done < MOST and time.perf_counter() < end):
        alone.run(steps[done % len(steps)])
        done += 1
    return alone.micro_s, alone.update_s


def _rounds(
    alone: _Training, trainings: dict[Variant, _Training], steps: Sequence[Step], seconds: float, clock: Clock
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
            start = clock.now()
            for step in range(block):
                contenders[which].run(steps[(number + step) % len(steps)])
            times[which].append((clock.now() - start) / block)
    slowest = gather(np.array([times]), to="all").max(0)
    return {variant: slowest[number].tolist() for number, variant in enumerate(trainings, 1)}


def _stages(
    training: _Training, steps: Sequence[Step], loads: Sequence[float], seconds: float, clock: Clock
) -> list[Stages]:
    """Return the stages of a step on each rank."""
    clock.together()
    began = time.perf_counter()
    training.stages(steps[0])
    rounds = agreed_rounds(time.perf_counter() - began, seconds)
    found = []
    for number in range(rounds):
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
