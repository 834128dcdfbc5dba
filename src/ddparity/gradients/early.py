"""Reduce gradients while the step's last backward still runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

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
LATE_STEPS = 100  # in which nothing starts early, after a step in which it was in vain


def cut_early(order: list[nn.Parameter], cap: int) -> list[list[nn.Parameter]]:
    """Return the parts to reduce early, in this order; none where the gradients are small. `cap`: of one, in bytes."""
    size = sum(parameter.nbytes for parameter in order)
    return [] if size <= min(cap, SMALL_BYTES) else cut(order, min(cap, -(-size // PARTS)))


S = TypeVar("S")  # the reduction of a part, under way


class EarlyPlan:
    """Which parts of a model are reduced early, and what each step tells of the next.

    Args:
        group: of at least 2 ranks. cap: of a part, in bytes.
    """

    def __init__(self, group: dist.ProcessGroup, cap: int) -> None:
        self.group, self._cap = group, cap
        self._late = 0  # steps
        self._early = 0
        self._parameters: list[nn.Parameter] = []
        self._parts: list[list[nn.Parameter]] = []
        self._steps = 0
        self.left: list[
            object
        ] = []  # on their way, though their loop was left: to drop one now could end the connection

    def next(
        self, parameters: list[nn.Parameter], careful: bool, start: Callable[[list[nn.Parameter]], S]
    ) -> EarlyParts[S] | None:
        """Return the parts of a step; None where it is better to reduce after the loop. `careful`: compare values."""
        if self._late:
            self._late -= 1
            return None
        if list(map(id, parameters)) != list(map(id, self._parameters)):
            self._parameters, self._early = parameters, 0
            self._parts = cut_early(parameters[::-1], self._cap)
        if len(self._parts) < 2:
            return None
        self._steps += 1
        return EarlyParts(self, self._parts, self._steps, careful or self._early < CAREFUL_STEPS, start)

    def finished(self, order: list[nn.Parameter], anew: bool) -> None:
        """Note how a step went, whose parts are done, and cut the next in the order of rank 0's backward. All call it.

        Collectives: after the first step of some parameters, one of 8 bytes a parameter.
        """
        self.left.clear()  # messages from before are done, too, or will never be asked for
        if anew:  # this loop changes gradients after its first backward
            self._late, self._early = LATE_STEPS, 0
            return
        self._early += 1
        if self._early == 1:
            place = {id(one): number for number, one in enumerate(self._parameters)}
            numbers = [place.pop(id(one)) for one in order]
            numbers += sorted(place.values(), reverse=True)
            sent = torch.tensor(numbers, device=self._parameters[0].device)
            dist.broadcast(sent, dist.get_global_rank(self.group, 0), group=self.group)
            self._parts = cut_early([self._parameters[number] for number in sent.tolist()], self._cap)


class EarlyParts(Generic[S]):
    """Parts of a step's gradients whose reductions start in the last micro-batch's backward.

    As soon as the backward has given every parameter of a part a gradient, `start` copies the part and starts to reduce
    the copy. The gradients themselves stay this rank's own, whatever the loop does with them. A part that has not
    started by the end of the loop is started there; one whose gradients have changed since, on any rank, is reduced
    anew. So the result is that of a reduction after the loop, and every rank starts the parts in one order.

    Args:
        plan: is told how it went.
        parts: parameters of one dtype and device each, in the order in which to start, the same on every rank. The last
            part has no backward left to overlap with, and is left to the caller.
        step: the number of steps before it that had parts, and 1; the same on every rank.
        careful: compare all values, too, not a sample of each part: what is written through `gradient.data` leaves no
            other trace. It takes a second copy.
        start: begins a part.
    """

    def __init__(
        self,
        plan: EarlyPlan,
        parts: Sequence[list[nn.Parameter]],
        step: int,
        careful: bool,
        start: Callable[[list[nn.Parameter]], S],
    ) -> None:
        self.step = step
        self._plan, self._careful, self._start_one = plan, careful, start
        self.parts, self.last = parts[:-1], parts[-1]  # all but the last one, and this one
        self._missing: list[set[int]] = []
        self._watched: list[_Watched] = []
        self.started: list[S] = []
        self._anew: list[bool] = []
        self._hooks: list[Any] = []
        self._order: list[nn.Parameter] = []

    def begin(self) -> None:
        """Start parts from here on, before the last micro-batch."""
        for number, part in enumerate([*self.parts, self.last]):
            ready = functools.partial(self._ready, number)
            trained = [parameter for parameter in part if parameter.requires_grad]
            self._missing.append(set(map(id, trained)))
            self._hooks += [parameter.register_post_accumulate_grad_hook(ready) for parameter in trained]

    def end(self) -> None:
        """Start nothing in a backward any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _ready(self, number: int, parameter: nn.Parameter) -> None:
        missing = self._missing[number]
        if id(parameter) in missing:
            missing.remove(id(parameter))
            self._order.append(parameter)
            while len(self.started) < len(self.parts) and not self._missing[len(self.started)]:
                self._start()

    @torch.no_grad()
    def _start(self) -> None:
        part = self.parts[len(self.started)]
        self._watched.append(_Watched(part, self._careful))
        self.started.append(self._start_one(part))

    def complete(self) -> None:
        """Start the parts that have not been. Every rank calls it."""
        self.end()
        while len(self.started) < len(self.parts):
            self._start()

    def changed(self) -> list[bool]:
        """Return, for each part, whether its gradients have changed since it was started."""
        return [one.changed() for one in self._watched]

    def changed_anywhere(self, changed: list[bool]) -> list[bool]:
        """Return, for each part, whether they have on any rank. Every rank calls it.

        Collectives: one of 4 bytes a part.
        """
        own = torch.tensor([float(one) for one in changed], device=self.last[0].device)
        self._anew = [bool(count) for count in copies_of_ranks(own, self._plan.group).sum(0).tolist()]
        return self._anew

    def finished(self) -> None:
        """Tell the plan, once all parts are reduced. Every rank calls it; see `EarlyPlan.finished`."""
        self.started.clear()
        self._plan.finished(self._order, any(self._anew))

    def leave(self) -> None:
        """End without a result, in a loop that is left.

        Where one part is on its way, the others follow: the other ranks may have started them.
        """
        if self.started:
            with contextlib.suppress(Exception):  # the loop's own error is told
                self.complete()
        self.end()
        self._plan.left += self.started


class _Watched:
    """The gradients of a part, as they were when it was started."""

    def __init__(self, part: list[nn.Parameter], careful: bool) -> None:
        self._part = part
        self._copy = FlatGradients(part).tensor if careful else None
        self._sample, self._state = _sample(part).clone(), State(part)

    def changed(self) -> bool:
        if self._state.marks != State(self._part).marks or not is_same(self._sample, _sample(self._part)):
            return True
        return self._copy is not None and not is_same(self._copy, FlatGradients(self._part).tensor)


class Average:
    """The average over the ranks of a copy of some gradients, under way."""

    def __init__(self, group: dist.ProcessGroup, buffers: Buffers, parameters: list[nn.Parameter]) -> None:
        self._flat = FlatGradients(parameters, group.size(), buffers)
        self._work = start_sum(self._flat.tensor, group)

    def wait(self) -> None:
        self._work.wait()

    def write(self) -> None:
        """Set the gradients to their average."""
        self._flat.writes(self._flat.tensor)()


@torch.no_grad()
def finish_averages(early: EarlyParts[Average], group: dist.ProcessGroup, buffers: Buffers) -> None:
    """Set the gradients of all parts to their averages. Every rank calls it.

    Collectives: those of the parts, of `EarlyParts.changed_anywhere` and of `EarlyPlan.finished`.
    """
    early.end()
    separate([parameter for part in (*early.parts, early.last) for parameter in part])
    early.complete()
    anew = early.changed_anywhere(early.changed())
    rest = list(early.last)
    for part, one, again in zip(early.parts, early.started, anew, strict=True):
        one.wait()
        if again:
            rest += part
        else:
            one.write()
    reduce_gradients(rest, group, average=True, buffers=buffers)
    early.finished()


def _sample(part: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return some values of the largest gradient."""
    gradients = [one.grad for one in part if one.grad is not None]
    if not gradients:
        return part[0].new_zeros(0)
    largest = max(gradients, key=torch.Tensor.numel)
    # In the order of memory, so that a channels_last gradient is not copied.
    largest = largest.permute(sorted(range(largest.dim()), key=largest.stride, reverse=True)).flatten()
    return largest[:: max(1, largest.numel() // SAMPLED)]
