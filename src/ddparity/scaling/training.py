"""Copies of a Task's model, each trained in one way, whose steps are measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..batchnorm import convert_sync_batchnorm, shared_layers, synchronises
from ..comm.nesting import to_device
from ..data.step import Step
from ..gradients import strangers
from ..gradients.accumulate import accumulate
from ..gradients.replica import only
from ..gradients.replicate import replicate
from ..task.task import Task
from ..task.train import loss_of, update
from .collectives import LEAST, Clock, median
from .model import Variant


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [one for one in net.parameters() if one.requires_grad]


class Training:
    """A copy of the model, trained in one way. `run` takes a step."""

    def __init__(self, task: Task, net: nn.Module, clock: Clock, reduction: Any) -> None:
        self._task, self._clock = task, clock
        self._plain = reduction is None
        self._device = next((one.device for one in net.parameters()), torch.device("cpu"))
        self.model = net if self._plain else replicate(net, reduction)
        self.model.train()
        self._optimizer = task.optimizer(self.model.parameters())
        if self._plain:
            strangers.leave_out(self._optimizer)
        self.forget()

    def forget(self) -> None:
        """Forget the times of steps."""
        self.micro_s: list[float] = []
        self.update_s: list[float] = []

    def apart(self) -> AbstractContextManager[None]:
        """Return a context in which a step has no cost of the other copies, which are replicated, too."""
        return nullcontext() if self._plain else only(self.model)

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
        parameters = trained(self.model)
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


def trainings_of(
    task: Task, net: nn.Module, steps: Sequence[Step], clock: Clock
) -> tuple[dict[Variant, Training], dict[Variant, str]]:
    """Return the model in each way of training, and the ways that it refuses."""
    made: dict[Variant, Training] = {"fast": Training(task, copy.deepcopy(net), clock, "fast")}
    refused: dict[Variant, str] = {}
    try:
        made["strict"] = Training(task, copy.deepcopy(net), clock, "strict")
    except ValueError as error:  # on every rank, for the same reason
        refused["strict"] = str(error)
    has_norms = any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in net.modules())
    converted = convert_sync_batchnorm(copy.deepcopy(net)) if has_norms else net
    if not has_norms or not synchronises(converted):
        refused["SyncBatchNorm"] = "the model has no batch norm"
    elif len(set(steps[0].shares)) > 1:
        refused["SyncBatchNorm"] = f"the ranks have {steps[0].shares} micro-batches in a step, not equally many"
    else:
        made["SyncBatchNorm"] = Training(task, converted, clock, "fast")
    return made, refused
