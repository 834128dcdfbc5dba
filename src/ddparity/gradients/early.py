"""Reduce gradients while the step's last backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..comm.allreduce import FlatGradients, copies_of_ranks, cut, reduce_gradients, separate, start_sum
from ..comm.bits import marks_of
from ..comm.buffers import Buffers
from ..compat import untraced
from .state import State

CAP_BYTES = 25 * 2**20  # of a part, as DDP's default
SMALL_BYTES = 2**23  # up to here one exchange of all gradients after the loop is faster than several in its backward
PARTS = 8  # of a model
CAREFUL_STEPS = 3  # with checks that take time: a loop that is wrong is mostly wrong in its first steps
LATE_STEPS = 100  # in which nothing starts early, after a step in which it was in vain


def cut_early(order: list[nn.Parameter], cap: int) -> list[list[nn.Parameter]]:
    """Return the parts to reduce early, in this order; none where the gradients are small. `cap`: of one, in bytes."""
    size = sum(parameter.nbytes for parameter in order)
    return [] if size <= min(cap, SMALL_BYTES) else cut(order, min(cap, -(-size // PARTS)))


S = TypeVar("S")  # the reduction of a part, under way


def sends_strict_early(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether the strict reduction sends these parameters' parts in the last backward, if there are several."""
    return all(one.is_cpu for one in parameters)


class EarlyPlan:
    """Which parts of a model are reduced early, and what each step tells of the next.

    Loops may be left at other places on other ranks. So what ranks must agree in changes where a step is finished.

    Args:
        group: of at least 2 ranks. cap: of a part, in bytes. number: of the model, in its group.
    """

    def __init__(self, group: dist.ProcessGroup, cap: int, number: int) -> None:
        self.group, self._cap, self.number = group, cap, number
        self._late = 0  # steps
        self._early = 0
        self._known: list[tuple[int, torch.dtype]] = []
        self._parameters: list[nn.Parameter] = []
        self._parts: list[list[nn.Parameter]] = []
        self.attempts = 0  # of steps to start early
        self.pending = False  # a loop was left with parts on their way, and no step has been finished since

    def next(self, parameters: list[nn.Parameter], start: Callable[[list[nn.Parameter]], S]) -> EarlyParts[S] | None:
        """Return the parts of a step; None where it is better to reduce after the loop."""
        if self._late:
            return None
        known = [(id(one), one.dtype) for one in parameters]
        if known != self._known:
            self._known, self._parameters, self._early = known, parameters, 0
            self._parts = cut_early(parameters[::-1], self._cap)
        if len(self._parts) < 2:
            return None
        self.attempts += 1
        return EarlyParts(self, self._parts, start)

    def next_step(self) -> None:
        """Count a finished step, also one without parts. Every rank calls it."""
        self._late = max(0, self._late - 1)

    def finished(self, order: list[nn.Parameter], anew: bool) -> None:
        """Note how a step went, and cut the next ones in the order of rank 0's backward. Every rank calls it.

        Collectives: after the first step of some parameters, one of 8 bytes a parameter.
        """
        self.pending = False
        if anew:  # this loop changes gradients after its first backward
            self._late, self._early, self._known = LATE_STEPS + 1, 0, []
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
        start: begins a part.
    """

    def __init__(
        self, plan: EarlyPlan, parts: Sequence[list[nn.Parameter]], start: Callable[[list[nn.Parameter]], S]
    ) -> None:
        self.plan, self._start_one = plan, start
        self.parts, self.last = parts[:-1], parts[-1]  # all but the last one, and this one
        self._missing: list[set[int]] = []
        self._watched: list[_Watched] = []
        self.started: list[S] = []
        self._hooks: list[Any] = []
        self._order: list[nn.Parameter] = []

    def begin(self) -> None:
        """Start parts from here on, before the last micro-batch."""
        if self.plan.pending:
            return
        for number, part in enumerate([*self.parts, self.last]):
            ready = untraced(self._ready, number)
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
        self.started.append(self._start_one(part))
        self._watched.append(_Watched(part))

    def complete(self) -> None:
        """Start the parts that have not been. Every rank calls it."""
        self.end()
        while len(self.started) < len(self.parts):
            self._start()

    def changed(self) -> list[bool]:
        """Return, for each part, whether its gradients have changed since it was started."""
        return [one.changed() for one in self._watched]

    def changed_anywhere(self, changed: list[bool], key: int) -> list[bool] | None:
        """Return, for each part, whether they have on any rank; None where the ranks' keys differ or one is 0.

        Collectives: one of 8 bytes a part and 16 more. Every rank calls it.
        """
        own = [key, self.plan.attempts, *([True] * len(self.parts) if key == 0 else changed)]
        sent = torch.tensor(own, dtype=torch.int64, device=self.last[0].device)
        keys, attempts, *flags = copies_of_ranks(sent, self.plan.group).t().tolist()
        self.plan.attempts = max(attempts)
        agree = key != 0 and set(keys) == {key}
        self._anew = not agree or any(map(any, flags))
        return [any(of_ranks) for of_ranks in flags] if agree else None

    def finished(self) -> None:
        """Tell the plan, once all parts are reduced. Every rank calls it; see `EarlyPlan.finished`."""
        self.started.clear()
        self.plan.finished(self._order, self._anew)


class _Watched:
    """The gradients of a part, as they were when it was started."""

    def __init__(self, part: list[nn.Parameter]) -> None:
        self._part, self._state, self._marks = part, State(part), self._now(part)

    def changed(self) -> bool:
        """Whether one is another tensor, was written, or has other bits: `gradient.data` leaves no other trace."""
        if self._state.marks != State(self._part).marks:
            return True
        return not all(map(torch.equal, self._marks, self._now(self._part)))

    @staticmethod
    def _now(part: list[nn.Parameter]) -> list[torch.Tensor]:
        return marks_of([parameter.grad for parameter in part if parameter.grad is not None])


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
    separate([parameter for part in (*early.parts, early.last) for parameter in part])
    early.complete()
    anew = early.changed_anywhere(early.changed(), 1)
    assert anew is not None, "one key on every rank"
    rest = list(early.last)
    for part, one, again in zip(early.parts, early.started, anew, strict=True):
        one.wait()
        if again:
            rest += part
        else:
            one.write()
    reduce_gradients(rest, group, average=True, buffers=buffers)
    early.finished()
