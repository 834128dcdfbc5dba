"""The life of one optimizer step inside `accumulate`: what is held back, what is reduced, and what is checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from ..batchnorm import RunningStatistics, equal_buffers
from ..comm.allreduce import copies_of_ranks, reduce_gradients, separate
from ..comm.bits import words_of
from ..comm.buffers import Buffers
from ..data.step import Step
from ..errors import DDParityError
from ..runtime.agreement import agreed
from . import strangers
from .aside import Aside
from .early import Average, EarlyParts, finish_averages, sends_strict_early
from .incomplete import (
    allow_late,
    close_loop,
    forget_left,
    note_left,
    open_loop,
    refuse_late,
    refuse_superseded,
    scale_of_rest,
    tell_skipped,
)
from .recheck import Recheck, Rechecks
from .replica import Holder, Replica, Walk, gone, most_alive, note_gone, others_than
from .state import NO_GRADIENT, NOTHING, State
from .strict import StrictReduction, deterministic

logger = logging.getLogger(__name__)

_MOST_SETS = 32  # of trained parameters, which are compared: a model may freeze other layers in each step
_MOST_OTHERS = 16  # replicas that a step's losses may run besides those that the step is of

Named = list[tuple[str, nn.Parameter]]


class Window:
    """One step over some models. Every rank opens it, takes its micro-batches, and finishes it.

    How gradients are reduced:

    - strict: each micro-batch's gradients are taken out, and summed along the tree after the loop; of one large model
      on the CPU the exchange starts in the last micro-batch's backward (`EarlyParts`).
    - early, for one large fast model: averages of copies start in the last micro-batch's backward (`EarlyParts`).
    - by DDP, for one model with options that only DDP's own reduction serves (a user's communication hook,
      static_graph, mixed_precision): in the last micro-batch's backward, as in plain DDP.
    - after the loop, for all others: one average of what the loop left in the gradients, whatever it did; one sum where
      a rank has no micro-batch, or where weights are dropped.

    Replicas that are not given, but that the losses run, reduce nothing meanwhile. What the loop left in their
    gradients and batch norms is reduced after it, too.

    Args:
        replicas: of the models that the losses are of.
        numbers: micro-batches of each rank. rank: this one.
        drops: the weights of micro-batches without a backward are taken out of the step.
        careful: make the checks that take time.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        numbers: Sequence[int],
        rank: int,
        drops: bool,
        careful: bool,
    ) -> None:
        self._own = replicas
        self._numbers, self._rank, self._drops = numbers, rank, drops
        self._group, self._ranks = replicas[0].group, replicas[0].ranks
        self._strict = replicas[0].reduction == "strict"
        # A sum needs what the parameters had before to be put aside. An average leaves that as it is.
        self._sums = not self._strict and (drops or 0 in numbers)
        walks = [replica.walk() for replica in replicas]
        self._named, frozen = trained_by(replicas, walks)
        self._buffered = [buffered for _, buffered, _ in walks]
        self._parameters = [parameter for _, parameter in self._named]
        self._by_ddp: Replica | None = None
        self._early: EarlyParts[Any] | None = None
        averages = self._group is not None and not self._strict and not self._sums
        if averages and len(self._own) == 1 and self._own[0].by_ddp(self._parameters):
            self._by_ddp = self._own[0]
        self._alive: list[tuple[Replica, nn.Module]] = []
        self._others: dict[tuple[tuple[int, ...] | None, int], _Other] = {}
        self._careful = careful or drops or self._by_ddp is not None
        self._frozen = _Frozen(frozen)
        self._weights = [*self._named, *frozen]
        self._skipped: list[int] = []
        self._dropped: list[float] = []
        self._ran = True
        self._finished = self._superseded = self._paused = False
        self._statistics: list[RunningStatistics | None] = []
        self._held: list[Replica] = []
        self._inside: list[tuple[Holder, Replica]] = []
        self._reduction: _Reduction | None = None
        self._opened = False
        self._contexts: contextlib.ExitStack | None = None  # of what not every step needs: to make one takes long

    def agree(self) -> None:
        """Compare with the other ranks which parameters the step reduces, where that is new. Every rank calls it.

        Collectives: requests to the group's store, for the first sets of parameters of a model.

        Raises:
            ValueError: another rank trains other parameters.
        """
        known, key = self._own[0].compared, tuple(map(id, self._parameters))
        if self._group is None or key in known or len(known) >= _MOST_SETS:
            return
        before, now = set(next(reversed(known), key)), set(key)
        changed = [(name, id(one) in now) for name, one in self._weights if (id(one) in before) != (id(one) in now)]
        why = "".join(f" ({name} newly {'trained' if new else 'frozen'})" for name, new in changed[:1])
        with agreed(f"accumulate(){why}", self._group) as agreement:
            assert agreement is not None, "a group of several ranks"
            agreement.all_same(*names_of(self._named))
        known[key] = None

    @property
    def scale(self) -> int:
        """What shares are multiplied by, since an average over the ranks divides by their number."""
        return self._group.size() if self._group is not None and not self._strict and not self._sums else 1

    @property
    def waits(self) -> bool:
        """Whether the gradients are not complete before `finish`."""
        return self._strict or self._sums or self._group is not None

    def open(self, device: torch.device | None) -> None:
        """Hold back what DDP would do in the loop, until `close`."""
        try:
            self._open(device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Set what was set before."""
        contexts, self._contexts = self._contexts, None
        try:
            if contexts is not None:
                contexts.close()
        finally:
            if self._opened:
                self._opened = False
                self._close()

    def _enter(self, context: contextlib.AbstractContextManager[object]) -> None:
        if self._contexts is None:
            self._contexts = contextlib.ExitStack()
        self._contexts.enter_context(context)

    def _open(self, device: torch.device | None) -> None:
        for replica in self._own:
            if replica.supersede is not None:
                replica.supersede()  # a loop that was left, or one of a zip(), which finds out when it goes on
            replica.warn_of_old_gradients()
        self._device = device
        forget_left(self._parameters)
        if self._group is not None:
            strangers.watch()
        self._opened = True
        for replica in self._own:
            if replica.holder is not None:  # a loop inside of another model's
                self._inside.append((replica.holder, replica))
                replica.holder.let_go(replica)
        for replica in self._own:
            replica.hold(replica is self._by_ddp)
            self._held.append(replica)
            open_loop(replica, self)
            if self.waits:
                replica.supersede = self.supersede
        for replica, buffered in zip(self._own, self._buffered, strict=True):
            self._statistics.append(_statistics(replica, buffered, self._strict))
        self._share_buffers()
        for statistics in self._statistics:
            if statistics is not None:
                self._enter(statistics.recording())
        if self._strict:
            self._enter(deterministic(device))
        self._reduction = self._make(self._named)
        if len(self._own) == 1 and self._group is not None and self._by_ddp is None:
            self._early = self._reduction.start_early(self._own[0])
        if self.waits:
            self._alive = others_than(self._own)
            for replica, _ in self._alive:
                self._adopt(replica)
        watched = self._named if self._careful else self._named[:1]  # an optimizer writes into all
        # A lazy layer writes its parameters in its first forward.
        self._written = [(name, one, -1 if is_lazy(one) else one._version) for name, one in watched]

    def _close(self) -> None:
        """Let go of all; after a loop that was left, give the gradients back that were put aside."""
        for other in self._others.values():
            close_loop(other.replica, self)
            if not self._finished:
                other.reduction.restore()
            other.stack.close()
            other.replica.holder = None
        self._others.clear()
        if self._early is not None:
            self._early.end()
        if not self._finished and self._reduction is not None:
            self._reduction.restore()
            if self.waits and not self._superseded:
                note_left(self._parameters)
        for replica in self._held:
            if self.waits:
                replica.supersede = None
            close_loop(replica, self)
            replica.release()
        for holder, replica in self._inside:
            holder.take_up(replica)

    def _make(self, named: Named, *others: Replica) -> _Reduction:
        buffers = (others or self._own)[0].buffers
        tree = StrictReduction(named, self._numbers, self._rank, self._group, buffers) if self._strict else None
        sparse = {one for replica in (*self._own, *others) for one in replica.sparse}
        watched = tree is None and (self._careful or bool(others))
        parameters = [parameter for _, parameter in named]
        return _Reduction(parameters, self._group, tree, self._sums, buffers, sparse, watched, 0 in self._numbers)

    def _adopt(self, replica: Replica) -> None:
        """Hold back what a replica does that is not given, and see what the loop does with it."""
        walk = replica.walk()
        named, frozen = trained_by([replica], [walk])
        known = {id(parameter) for parameter in self._parameters}
        known.update(id(one) for other in self._others.values() for one in other.parameters)
        named = [(name, one) for name, one in named if id(one) not in known]  # a parameter is reduced once
        parameters = [parameter for _, parameter in named]
        same_ranks = replica.ranks == self._ranks
        allow_late(parameters)
        with contextlib.ExitStack() as stack:
            stack.callback(replica.release)
            replica.hold()
            statistics = _statistics(replica, walk[1], self._strict) if same_ranks else None
            if statistics is not None:
                stack.enter_context(statistics.recording())
            if same_ranks:
                reduction = self._make(named, replica)
            else:
                reduction = _Reduction(parameters, None, None, False, replica.buffers)
            other = _Other(replica, named, walk[1], _Frozen(frozen, known), reduction, statistics, stack.pop_all())
        if same_ranks:
            open_loop(replica, self, reduction.touched)
        self._others[(replica.ranks, replica.number)], replica.holder = other, self

    def let_go(self, replica: Replica) -> None:
        """Leave a replica to a loop of its own, inside of this one. That loop reduces what this one did, too."""
        if self._paused:
            raise RuntimeError(
                "accumulate() of a replicated model inside of the loop of one with recheck_every: it would take a step "
                "more where the loop runs another rank's micro-batch. Skip it where micro.recheck is True"
            )
        if self._strict or self._sums:  # what its gradients were before is put aside, where zero_grad() finds nothing
            raise RuntimeError(
                f"accumulate() of a replicated model inside of another one's loop, which is "
                f"{'strict' if self._strict else 'summed after the loop'}: give both to one, "
                f"accumulate([first, second], …)"
            )
        other = self._others.pop((replica.ranks, replica.number))
        close_loop(replica, self)
        other.reduction.restore()
        other.stack.close()
        replica.holder = None

    def take_up(self, replica: Replica) -> None:
        """Hold a replica again after a loop of its own."""
        self._adopt(replica)

    def _share_buffers(self) -> None:
        """Broadcast buffers that may differ between ranks, as DDP does in a step's first forward."""
        self._stay_equal = []
        for replica, buffered, statistics in zip(self._own, self._buffered, self._statistics, strict=True):
            were_equal, replica.buffers_equal = replica.buffers_equal, False  # until the step is over
            stay_equal = equal_buffers(buffered, statistics)
            self._stay_equal.append(stay_equal)
            if replica.ddp is not None and not (were_equal and stay_equal):
                replica.share_buffers()

    def recheck(self, rechecks: Rechecks, step: Step | None, device: torch.device | None) -> Recheck:
        """Return the recheck of this step. Every rank calls it.

        Raises:
            ValueError: nobody else can run this step's micro-batches, or their gradients are not to be had alone.
        """
        if step is None or step.load_again is None:
            what = "foreign batches" if step is None else "a step of a stream"
            raise ValueError(
                f"accumulate() got {what} for a model with replicate(recheck_every=…), and another rank cannot load it "
                f"again: give it the steps of a Loader over a map-style data set, or leave recheck_every out"
            )
        if self._by_ddp is not None:
            raise ValueError(
                "accumulate(): replicate(recheck_every=…) compares the gradients of one micro-batch, and with a "
                "communication hook, static_graph or mixed_precision DDP reduces them in the backward: leave one out"
            )
        modules = [replica.module for replica in (*self._own, *(one for one, _ in others_than(self._own)))]
        return Recheck(rechecks, step, self._weights, self._named, modules, self.paused, device)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let what the body does to gradients and batch statistics not count, and put gradients back at its end."""
        others = list(self._others.values())
        if self._early is not None:
            self._early.end()
        parameters = [*self._parameters, *(one for other in others for one in other.parameters)]
        for reduction in (self._reduction, *(other.reduction for other in others)):
            if reduction is not None:
                reduction.settle()
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with contextlib.ExitStack() as stack:
            for statistics in self._all_statistics():
                stack.enter_context(statistics.forgetting())
            self._paused = True
            try:
                yield
            finally:
                self._paused = False
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient

    def _all_statistics(self) -> list[RunningStatistics]:
        found = (*self._statistics, *(other.statistics for other in self._others.values()))
        return [statistics for statistics in found if statistics is not None]

    def supersede(self) -> None:
        """End this step's hold on its models, for another one."""
        self._superseded = True
        self.close()

    def begin_last(self) -> None:
        """Let reductions start: the next micro-batch is this rank's last."""
        if self._early is not None:
            self._early.begin()
        if self._by_ddp is not None:
            self._by_ddp.let_reduce(True)

    def take(self, index: int, share: float) -> None:
        """After a micro-batch.

        Raises:
            RuntimeError: another loop over a model of this step has begun.
        """
        if self._superseded:
            refuse_superseded()
        for replica in self._own:
            if replica is not self._by_ddp and replica.reduces():
                raise RuntimeError(
                    "accumulate(): require_backward_grad_sync was set inside of the loop, which reduces by itself: "
                    "leave it out"
                )
        if not self._careful and not self._strict:
            return
        assert self._reduction is not None
        self._ran = self._reduction.take()
        if not self._ran:
            self._dropped.append(share)
            if torch.is_grad_enabled():  # without, the loop is one of forwards alone, as for batch norms' statistics
                self._skipped.append(index)
        if self._strict:
            for other in self._others.values():
                other.reduction.take()

    def finish(self) -> None:
        """Reduce. Every rank calls it.

        Raises:
            RuntimeError: the parameters have changed in the loop, or frozen ones have got gradients.
            DDParityError: the ranks' gradients differ, found in a step that compares them.
        """
        with torch.no_grad():
            self._finish()

    def _finish(self) -> None:
        self._check_unchanged()
        self._frozen.check()
        tell_skipped(self._own[0], self._skipped, self._drops)
        self._finished = True
        for statistics in self._all_statistics():
            statistics.count()
        left = scale_of_rest(self._dropped, self._numbers, self._group, self._device) if self._drops else 1.0
        assert self._reduction is not None
        if self._by_ddp is not None:
            self._complete(self._by_ddp)
        else:
            self._reduction.reduce(left)
        most = max(self._numbers)
        kept = [statistics is None or statistics.replay(most) for statistics in self._statistics]
        others = self._reduce_others(left)
        reduced = self._reduction.reduced()
        for replica, *stay_equal in zip(self._own, self._stay_equal, kept, strict=True):
            replica.finished(self._parameters, reduced, all(stay_equal))
        if self._strict and self._group is not None and self._skipped:
            refuse_late(self._parameters)
        if self._group is not None and any(replica.compares() for replica in self._own):
            beside = [(f"another model's {name}", one) for other in others for name, one in other.named]
            check_equal([*self._named, *beside], self._group)

    def _complete(self, replica: Replica) -> None:
        """Let DDP finish its reduction, which the other ranks' backwards wait for; see that it is complete."""
        assert self._group is not None, "only DDP reduces by itself"
        if not self._ran:
            replica.backward_of_zeros()
        replica.let_reduce(False)
        check_equal([(name, parameter.grad) for name, parameter in self._named], self._group)

    def _reduce_others(self, left: float) -> list[_Other]:
        """Reduce the replicas that the losses have run besides those that the step is of; return these."""
        others = [other for other in self._others.values() if other.replica.ranks == self._ranks]
        if len(others) < len(self._others):
            for other in self._others.values():
                if other.replica.ranks != self._ranks and other.touched():
                    raise RuntimeError(
                        "accumulate(): the losses run a replicated model of another process group, whose ranks need "
                        "not run this loop: replicate the models of one loop over one group"
                    )
        for other in others:
            other.frozen.check()
        if most_alive(self._ranks) <= len(self._own):
            return []
        touched = [other.replica.number for other in others if other.touched()]
        if self._group is not None:
            touched = self._touched_anywhere(self._group, touched)
        known = {other.replica.number for other in others}
        if missing := [number for number in touched if number not in known]:
            raise RuntimeError(
                f"accumulate(): another rank's losses run replicated model {missing[0]}, counted from 0 in the order "
                f"of replicate(), which this rank has not: run the same models on every rank"
            )
        for other in others:
            replica, statistics = other.replica, other.statistics
            replica.buffers.next_step()
            if replica.number not in touched:
                other.reduction.restore()
                continue
            other.reduction.reduce(left)
            replica.note_gradients(other.reduction.reduced())
            kept = statistics is None or statistics.replay(max(self._numbers))
            replica.buffers_equal = replica.buffers_equal and kept and equal_buffers(other.buffered, statistics)
        return [other for other in others if other.replica.number in touched]

    def _touched_anywhere(self, group: dist.ProcessGroup, touched: list[int]) -> list[int]:
        if len(touched) > _MOST_OTHERS:
            raise ValueError(
                f"accumulate(): the losses run {len(touched)} replicated models besides those of the step, more than "
                f"{_MOST_OTHERS}: give them in the list, accumulate([model, …], step)"
            )
        sent = torch.full((1 + _MOST_OTHERS,), -1, dtype=torch.int64)
        sent[0] = gone(self._ranks)
        sent[1 : 1 + len(touched)] = torch.tensor(touched, dtype=torch.int64)
        found = copies_of_ranks(sent.to(self._device), group)
        note_gone(self._ranks, int(found[:, 0].min()))
        return sorted(set(found[:, 1:].flatten().tolist()) - {-1})

    def _check_unchanged(self) -> None:
        changed = [name for name, one, before in self._written if before not in (-1, one._version)]
        if not changed:
            return
        # A fast process alone may write into some of its parameters in a forward; an optimizer writes into all.
        with_gradient = {name for name, parameter in self._named if parameter.grad is not None}
        if self._group is None and not self._strict and (not with_gradient or not with_gradient <= set(changed)):
            return
        raise RuntimeError(
            f"accumulate(): {changed[0]} has changed inside of the loop over the micro-batches, before the step's "
            f"gradients were complete: move optimizer.step() behind the loop. A forward that writes into its own "
            f"parameters (an embedding with max_norm) writes other values on each rank"
        )


@dataclasses.dataclass
class _Other:
    """A replica that the step is not of."""

    replica: Replica
    named: Named
    buffered: list[nn.Module]
    frozen: _Frozen
    reduction: _Reduction
    statistics: RunningStatistics | None
    stack: contextlib.ExitStack

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    def touched(self) -> bool:
        """Whether this rank's losses have run it."""
        return self.reduction.touched() or (self.statistics is not None and self.statistics.moved())


class _Frozen:
    """Parameters that the step does not reduce, since they were frozen when it began."""

    def __init__(self, named: Named, but: Container[int] = ()) -> None:
        self._named = [(name, one) for name, one in named if id(one) not in but] if named else named
        self._before = State([one for _, one in self._named]) if named else NOTHING

    def check(self) -> None:
        """Raise where one has got a gradient."""
        if self._named:
            after = State([one for _, one in self._named])
            for (name, _), old, new in zip(self._named, self._before.marks, after.marks, strict=True):
                if old != new and new != NO_GRADIENT:
                    raise RuntimeError(
                        f"accumulate(): {name} was frozen when the loop began and has got a gradient in it, which is "
                        f"not reduced: set requires_grad before the loop"
                    )


class _Reduction:
    """The gradients of some parameters in one step, and how they are reduced after the loop."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        group: dist.ProcessGroup | None,
        tree: StrictReduction | None,
        sums: bool,
        buffers: Buffers,
        sparse: Container[int] = (),
        watched: bool = True,
        empty: bool = False,
    ) -> None:
        """`empty`: a rank has no micro-batch."""
        self._empty, self._buffers = empty, buffers
        self._parameters, self._group, self._tree, self._sparse = parameters, group, tree, sparse
        self._touched = False
        self._reduced: list[nn.Parameter] | None = None
        self._early: EarlyParts[Average] | None = None
        self._aside = Aside(parameters) if sums else None
        self._first = self._last = State(parameters) if watched else NOTHING

    def start_early(self, replica: Replica) -> EarlyParts[Any] | None:
        """Reduce parts of this replica in the step's last backward, and return them; None where that does not pay."""
        if self._group is None or self._empty or self._aside is not None:
            return None
        if self._tree is None:
            start = functools.partial(Average, self._group, self._buffers)
            self._early = replica.early_parts(self._parameters, start)
            return self._early
        if sends_strict_early(self._parameters):
            self._tree.early = replica.early_parts(self._parameters, self._tree.start)
        return self._tree.early

    def take(self) -> bool:
        """Return True if the micro-batch has changed a gradient."""
        if self._tree is not None:
            changed = self._tree.take()
            self._touched = self._touched or changed
            return changed
        last, self._last = self._last, State(self._parameters)
        return self._last.differs(last)

    def touched(self) -> bool:
        """Return True if the loop has changed a gradient."""
        if self._tree is not None:
            return self._touched or self._tree.has_gradients()
        return State(self._parameters).differs(self._first)

    def reduce(self, scale: float) -> None:
        """Leave the step's gradient, times `scale`, on top of what the parameters had before. Every rank calls it."""
        if self._tree is not None:
            self._tree.finish(scale)
            return
        if self._early is not None and self._group is not None:
            finish_averages(self._early, self._group, self._buffers)
            return
        self.settle()
        if self._aside is not None and self._group is not None and self._empty and self._parameters:
            self._aside.agree(self._group)
        if self._group is not None:
            reduce_gradients(self._parameters, self._group, self._aside is None, self._buffers, self._sparse)
        if scale != 1.0:
            separate(self._parameters)
            if gradients := [one.grad for one in self._parameters if one.grad is not None]:
                torch._foreach_mul_(gradients, scale)
        self._reduced = self._with_gradients()  # what is put back may differ between ranks
        self.restore()

    def reduced(self) -> list[nn.Parameter]:
        """Return the parameters that the step has given a gradient, the same on every rank."""
        if self._tree is not None:
            return self._tree.summed
        return self._with_gradients() if self._reduced is None else self._reduced

    def _with_gradients(self) -> list[nn.Parameter]:
        return [one for one in self._parameters if one.grad is not None]

    def settle(self) -> None:
        """Let the gradients be this step's alone, where what was there before is put aside."""
        if self._aside is not None:
            self._aside.settle()

    def restore(self) -> None:
        """Put back what the parameters had before."""
        if self._tree is not None:
            self._tree.restore()
        if self._aside is not None:
            self._aside.put_back()


def names_of(trained: Named) -> tuple[dict[str, object], dict[str, Callable[[list[str]], str]]]:
    """Return what ranks compare of the parameters that a step trains, and what is said where they differ."""
    names = [name for name, _ in trained]

    def said(theirs: list[str]) -> str:
        name = next(iter(sorted(set(names) ^ set(theirs))), "a parameter")
        where = "here and not on another rank" if name in names else "on another rank and not here"
        return f"{name} is trained {where}: set requires_grad alike on all ranks, before the same step"

    return {"the trained parameters": names}, {"the trained parameters": said}


def check_equal(named: Iterable[tuple[str, torch.Tensor | None]], group: dist.ProcessGroup) -> None:
    """Raise on every rank where the ranks' tensors differ, or what optimizers train beside all replicated models.

    Collectives: one of 8 bytes a tensor and 24 bytes.

    Raises:
        DDParityError: names the first tensor that differs, and the rank.
    """
    tensors = [(name, one) for name, one in named if one is not None and one.layout == torch.strided]
    if not tensors:
        return
    words = [*words_of([one for _, one in tensors]), *strangers.words()]
    everyones = copies_of_ranks(torch.tensor(words, device=tensors[0][1].device), group)
    different = (everyones != everyones[0])[:, : len(tensors)].nonzero().tolist()
    if different:
        rank, number = different[0]
        raise DDParityError(
            f"accumulate(): {tensors[number][0]} differs between rank {rank} and rank 0 after the step, so the ranks "
            f"train different models: look for code that runs on some ranks only and changes gradients or weights"
        )
    strangers.check(everyones[:, len(tensors) :].tolist())


def trained_by(replicas: Sequence[Replica], walks: Sequence[Walk]) -> tuple[Named, Named]:
    """Return the parameters of the models that a step may train, each once, and the others."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    frozen: Named = []
    for position, (replica, (own, *_)) in enumerate(zip(replicas, walks, strict=True)):
        if position:
            own = [(f"model {position}: {name}", parameter) for name, parameter in own]
        had = replica.had_gradients  # they may get one again, though frozen now
        for named in own:
            parameter = named[1]
            if parameter.requires_grad or id(parameter) in had:
                found.setdefault(id(parameter), named)
            else:
                frozen.append(named)
    return list(found.values()), frozen


def _statistics(replica: Replica, buffered: list[nn.Module], strict: bool) -> RunningStatistics | None:
    """Return what keeps a replica's running statistics in this step; None where every forward moves them itself."""
    if replica.batchnorm_statistics == "rank0":
        return None
    statistics = RunningStatistics(replica.module, buffered, replica.group, replica.room, strict)
    return statistics if len(statistics) else None
