"""Average gradients while the step's last backward still runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm.allreduce import FlatGradients, copies_of_ranks, cut, reduce_gradients, separate, start_sum
from ..comm.bits import is_same
from ..comm.buffers import Buffers
from .state import State

CAP_BYTES = 25 * 2**20  # of a part, as DDP's default
SMALL_BYTES = 2**23  # up to here one exchange of all gradients after the loop is faster than several in its backward
SAMPLED = 64  # values of a part, about, which are compared in every step
PARTS = 8  # of a model
CAREFUL_STEPS = 3  # with checks that take time: a loop that is wrong is mostly wrong in its first steps
LATE_STEPS = 100  # without early averages, after one that was in vain


def cut_early(order: list[nn.Parameter], cap: int) -> list[list[nn.Parameter]]:
    """Return the parts to average early, in this order; none where the gradients are small. `cap`: of one, in bytes."""
    size = sum(parameter.nbytes for parameter in order)
    return [] if size <= min(cap, SMALL_BYTES) else cut(order, min(cap, -(-size // PARTS)))


class EarlyAverages:
    """The early averages of a model, one a step, and what each tells of the next.

    Args:
        group: of at least 2 ranks. cap: of a part, in bytes. buffers: the model's.
    """

    def __init__(self, group: dist.ProcessGroup, cap: int, buffers: Buffers) -> None:
        self._group, self._cap, self._buffers = group, cap, buffers
        self._late = 0  # steps
        self._early = 0
        self._parameters: list[nn.Parameter] = []
        self._parts: list[list[nn.Parameter]] = []

    def next(self, parameters: list[nn.Parameter], careful: bool) -> EarlyAverage | None:
        """Return the average of a step; None where one after the loop is better. `careful`: compare values."""
        if self._late:
            self._late -= 1
            return None
        if list(map(id, parameters)) != list(map(id, self._parameters)):
            self._parameters, self._early = parameters, 0
            self._parts = cut_early(parameters[::-1], self._cap)
        if len(self._parts) < 2:
            return None
        careful = careful or self._early < CAREFUL_STEPS
        return EarlyAverage(self, self._parts, self._group, self._buffers, careful)

    def finished(self, order: list[nn.Parameter], anew: bool) -> None:
        """Note how one went, and cut the next ones in the order of rank 0's backward. Every rank calls it.

        Collectives: after the first step of some parameters, one of 8 bytes a parameter.
        """
        if anew:  # this loop changes gradients after its first backward
            self._late, self._early = LATE_STEPS, 0
            return
        self._early += 1
        if self._early == 1:
            place = {id(one): number for number, one in enumerate(self._parameters)}
            numbers = [place.pop(id(one)) for one in order]
            numbers += sorted(place.values(), reverse=True)
            sent = torch.tensor(numbers, device=self._parameters[0].device)
            dist.broadcast(sent, dist.get_global_rank(self._group, 0), group=self._group)
            self._parts = cut_early([self._parameters[number] for number in sent.tolist()], self._cap)


class EarlyAverage:
    """The averages of one step's gradients over the ranks, started in the last micro-batch's backward.

    As soon as the backward has given every parameter of a part a gradient, the part is copied and the average of the
    copy is started. The gradients themselves stay this rank's own until `finish`, whatever the loop does with them. A
    part that has not started by then is started there; one whose gradients have changed since, on any rank, is
    averaged anew. So the result is that of one average after the loop, and every rank starts the parts in one order.

    Memory: one copy of the gradients, in buffers.

    Args:
        plan: is told how it went.
        parts: parameters of one dtype and device each, in the order in which to start, the same on every rank. The last
            part has no backward left to overlap with and starts after the loop.
        careful: compare all values, too, not a sample of each part: what is written through `gradient.data` leaves no
            other trace. It takes a second copy.
    """

    def __init__(
        self,
        plan: EarlyAverages,
        parts: Sequence[list[nn.Parameter]],
        group: dist.ProcessGroup,
        buffers: Buffers,
        careful: bool,
    ) -> None:
        self._plan, self._parts, self._group, self._careful = plan, parts, group, careful
        self._buffers = buffers
        self._missing: list[set[int]] = []
        self._started: list[_Started] = []
        self._hooks: list[Any] = []
        self._order: list[nn.Parameter] = []

    def begin(self) -> None:
        """Start parts from here on, before the last micro-batch."""
        for number, part in enumerate(self._parts):
            ready = functools.partial(self._ready, number)
            trained = [parameter for parameter in part if parameter.requires_grad]
            self._missing.append(set(map(id, trained)))
            self._hooks += [parameter.register_post_accumulate_grad_hook(ready) for parameter in trained]

    def end(self) -> None:
        """Start nothing any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _ready(self, number: int, parameter: nn.Parameter) -> None:
        missing = self._missing[number]
        if id(parameter) in missing:
            missing.remove(id(parameter))
            self._order.append(parameter)
            while len(self._started) < len(self._parts) - 1 and not self._missing[len(self._started)]:
                self._start()

    @torch.no_grad()
    def _start(self) -> None:
        part = self._parts[len(self._started)]
        copy = FlatGradients(part).tensor if self._careful else None
        sample, state = _sample(part).clone(), State(part)
        flat = FlatGradients(part, self._group.size(), self._buffers)
        self._started.append(_Started(part, flat, state, sample, copy, start_sum(flat.tensor, self._group)))

    @torch.no_grad()
    def finish(self) -> None:
        """Set the gradients to their averages. Every rank calls it.

        Collectives: those of the parts, and one of 4 bytes a part.
        """
        self.end()
        separate([parameter for part in self._parts for parameter in part])
        while len(self._started) < len(self._parts) - 1:
            self._start()
        changed = torch.tensor([float(one.changed()) for one in self._started], device=self._parts[0][0].device)
        anew = copies_of_ranks(changed, self._group).sum(0).tolist()
        rest = list(self._parts[-1])
        for one, again in zip(self._started, anew, strict=True):
            one.work.wait()
            if again:
                rest += one.part
            else:
                one.flat.writes(one.flat.tensor)()
        self._started = []
        reduce_gradients(rest, self._group, average=True, buffers=self._buffers)
        self._plan.finished(self._order, any(anew))


@dataclasses.dataclass
class _Started:
    """A part whose average was started."""

    part: list[nn.Parameter]
    flat: FlatGradients
    state: State
    sample: torch.Tensor
    copy: torch.Tensor | None
    work: dist.Work

    def changed(self) -> bool:
        if self.state.marks != State(self.part).marks or not is_same(self.sample, _sample(self.part)):
            return True
        return self.copy is not None and not is_same(self.copy, FlatGradients(self.part).tensor)


def _sample(part: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return some values of the largest gradient."""
    gradients = [one.grad for one in part if one.grad is not None]
    if not gradients:
        return part[0].new_zeros(0)
    largest = max(gradients, key=torch.Tensor.numel)
    # In the order of memory, so that a channels_last gradient is not copied.
    largest = largest.permute(sorted(range(largest.dim()), key=largest.stride, reverse=True)).flatten()
    return largest[:: max(1, largest.numel() // SAMPLED)]
