"""The life of one optimizer step inside `accumulate`: what is held back, what is reduced, and what is checked."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..batchnorm import RunningStatistics, compiled_layers, equal_buffers
from ..comm.allreduce import copies_of_ranks, reduce_gradients
from ..errors import DDParityError
from .replica import Replica, made_so_far, others_than
from .strict import StrictReduction, deterministic

logger = logging.getLogger(__name__)

_MOST_OTHERS = 16  # replicas that a step's losses may run besides those that the step is of

Named = list[tuple[str, nn.Parameter]]


class Window:
    """One step over some models. Every rank opens it, takes its micro-batches, and finishes it.

    How gradients are reduced:

    - strict: each micro-batch's gradients are taken out, and summed along the tree after the loop.
    - overlapped, for one fast model of several buckets: DDP averages its buckets in the last micro-batch's backward,
      but for the last bucket, which has no backward left to overlap with; that one is averaged after the loop.
    - after the loop, for all others: one average of what the loop left in the gradients, whatever it did; one sum where
      a rank has no micro-batch, or where weights are dropped.

    Replicas that are not given, but that the losses run, reduce nothing meanwhile. What the loop left in their
    gradients and batch norms is reduced after it, too.

    Args:
        models: what the losses are of. replicas: theirs; None for a plain module in a world of one.
        numbers: micro-batches of each rank. rank: this one.
        drops: the weights of micro-batches without a backward are taken out of the step.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        replicas: Sequence[Replica | None],
        numbers: Sequence[int],
        rank: int,
        drops: bool,
    ) -> None:
        self._own = [replica for replica in replicas if replica is not None]
        self._numbers, self._rank, self._drops = numbers, rank, drops
        self._group = next((replica.group for replica in self._own), None)
        self._strict = any(replica.reduction == "strict" for replica in self._own)
        # A sum needs what the parameters had before to be put aside. An average leaves that as it is.
        self._sums = not self._strict and (drops or 0 in numbers)
        self._named = _trained(models, replicas)
        self._parameters = [parameter for _, parameter in self._named]
        self._overlapped = self._own[0] if len(self._own) == 1 and self._overlaps(self._own[0]) else None
        self._others = others_than(self._own) if self._own else []
        self._taken = 0
        self._skipped: list[int] = []
        self._dropped: list[float] = []
        self._ran = True
        self._finished = False

    def _overlaps(self, replica: Replica) -> bool:
        if self._group is None or self._strict or self._sums:
            return False
        return replica.overlaps([id(parameter) for parameter in self._parameters])

    @property
    def scale(self) -> int:
        """What shares are multiplied by, since an average over the ranks divides by their number."""
        return self._group.size() if self._group is not None and not self._strict and not self._sums else 1

    @property
    def waits(self) -> bool:
        """Whether the gradients are not complete before `finish`."""
        return self._strict or self._sums or self._group is not None

    @contextlib.contextmanager
    def opened(self, device: torch.device | None) -> Iterator[None]:
        """Hold back what DDP would do in the loop. What was set before is set again at the end."""
        for replica in self._own:
            if replica.open:
                raise RuntimeError(
                    "accumulate() is at work on this model already: two loops over one model, as in zip(), would "
                    "reduce its gradients twice. Give both batches of a micro-batch in one: "
                    "accumulate(model, zip(a, b)). A loop that was left is ended by its iterator's close()"
                )
            replica.warn_of_old_gradients()
        with contextlib.ExitStack() as stack:
            for replica in (*self._own, *self._others):
                stack.callback(replica.release)
                replica.hold()
            for replica in self._own:
                stack.callback(setattr, replica, "open", False)
                replica.open = True
            self._statistics = [self._recorded(replica, stack) for replica in self._own]
            self._share_buffers()
            if self._strict:
                stack.enter_context(deterministic(device))
            self._reduction = self._make(self._named)
            self._reductions_of_others = [self._make(other.named_parameters()) for other in self._others]
            stack.callback(self._restore)
            self._statistics_of_others = [self._recorded(other, stack) for other in self._others]
            self._written = [parameter._version for parameter in self._parameters]
            yield

    def _restore(self) -> None:
        """After a loop that was left, give the gradients back that were put aside."""
        if not self._finished:
            for reduction in (self._reduction, *self._reductions_of_others):
                reduction.restore()

    def _make(self, named: Named) -> _Reduction:
        tree = StrictReduction(named, self._numbers, self._rank, self._group) if self._strict else None
        return _Reduction([parameter for _, parameter in named], self._group, tree, self._sums)

    def _recorded(self, replica: Replica, stack: contextlib.ExitStack) -> RunningStatistics | None:
        statistics = _statistics(replica, self._strict)
        if statistics is not None:
            stack.enter_context(statistics.recording())
        return statistics

    def _share_buffers(self) -> None:
        """Broadcast buffers that may differ between ranks, as DDP does in a step's first forward."""
        self._stay_equal = []
        for replica, statistics in zip(self._own, self._statistics, strict=True):
            were_equal, replica.buffers_equal = replica.buffers_equal, False  # until the step is over
            stay_equal = equal_buffers(replica.module, statistics is not None)
            self._stay_equal.append(stay_equal)
            if replica.ddp is not None and not (were_equal and stay_equal):
                replica.share_buffers()

    def begin(self, last: bool) -> None:
        """Before a micro-batch."""
        if last and self._overlapped is not None:
            self._overlapped.overlap()

    def take(self, index: int, share: float) -> None:
        """After a micro-batch."""
        self._ran = self._reduction.take()
        for reduction in self._reductions_of_others:
            reduction.take()
        if not self._ran:
            self._skipped.append(index)
            self._dropped.append(share)

    def finish(self) -> None:
        """Reduce. Every rank calls it.

        Raises:
            RuntimeError: the parameters have changed in the loop.
            DDParityError: the ranks' gradients differ, found in a step that compares them.
        """
        self._check_unchanged()
        self._tell_skipped()
        self._finished = True
        left = self._left()
        if self._overlapped is not None:
            self._complete(self._overlapped)
        else:
            self._reduction.reduce(left)
        for replica, statistics in zip(self._own, self._statistics, strict=True):
            if statistics is not None:
                statistics.replay(max(self._numbers), replica.room)
        self._reduce_others(left)
        for replica, stay_equal in zip(self._own, self._stay_equal, strict=True):
            replica.finished(self._parameters, stay_equal)
            if self._group is not None and replica.compares():
                check_equal(replica.named_parameters(), self._group)

    def _left(self) -> float:
        """What the gradients are multiplied by, so that the weights that are left sum to one."""
        if not self._drops:
            return 1.0
        dropped = torch.zeros(max(self._numbers), dtype=torch.float64)
        dropped[: len(self._dropped)] = torch.tensor(self._dropped, dtype=torch.float64)
        if self._group is not None:
            dropped = copies_of_ranks(dropped.to(self._parameters[0].device), self._group)
        left = 1.0 - math.fsum(dropped.flatten().tolist())  # fsum: its bits do not depend on who ran which
        return 1.0 / left if left > 1e-9 else 1.0

    def _complete(self, replica: Replica) -> None:
        """Average what the last backward has not averaged, or not as it is now."""
        ddp, group = replica.ddp, self._group
        assert ddp is not None and group is not None, "only DDP overlaps"
        present = [parameter.grad is not None for parameter in self._parameters]
        if not (replica.reduced if replica.hooked else self._ran):
            if replica.overlapped:
                replica.complete_backward()
            else:
                replica.backward_of_zeros()
            if replica.hooked and not replica.reduced:
                missing = [name for name, one in self._named if one.grad is None]
                raise RuntimeError(
                    f"accumulate(): the last backward gave gradients to some parameters only, so that DDP reduced some "
                    f"(without a gradient: {', '.join(missing[:5]) or 'none in this step'}): pass "
                    f"find_unused_parameters=True to replicate()"
                )
        replica.keep()
        if not replica.hooked:  # we do not see what the user's hook did
            check_equal([(name, parameter.grad) for name, parameter in self._named], group)
            return
        # A parameter that no rank has a gradient for keeps none: an optimizer decays one of zeros.
        facts = torch.tensor([replica.changed(), *present], dtype=torch.uint8, device=self._parameters[0].device)
        changed, *some = copies_of_ranks(facts, group).amax(0).tolist()
        if not all(some):
            for parameter, one in zip(self._parameters, some, strict=True):
                if not one:
                    parameter.grad = None
            if not any(some):
                return
        averaged = {id(parameter) for parameter in replica.overlapped}
        reduce_gradients([one for one in self._parameters if id(one) not in averaged], group, average=True)
        if changed:
            reduce_gradients(replica.overlapped, group, average=True)

    def _reduce_others(self, left: float) -> None:
        """Reduce the replicas that the losses have run besides those that the step is of."""
        if not self._own or made_so_far() < 2:
            return
        touched = [
            other.number
            for other, reduction, statistics in zip(
                self._others, self._reductions_of_others, self._statistics_of_others, strict=True
            )
            if reduction.touched or (statistics is not None and statistics.moved())
        ]
        if self._group is not None:
            touched = self._touched_anywhere(self._group, touched)
        known = {other.number: position for position, other in enumerate(self._others)}
        if missing := [number for number in touched if number not in known]:
            raise RuntimeError(
                f"accumulate(): another rank's losses run replicated model {missing[0]}, counted from 0 in the order "
                f"of replicate(), which this rank has not: run the same models on every rank"
            )
        for number, position in known.items():
            reduction, statistics = self._reductions_of_others[position], self._statistics_of_others[position]
            if number not in touched:
                reduction.restore()
                continue
            other = self._others[position]
            reduction.reduce(left)
            if statistics is not None:
                statistics.replay(max(self._numbers), other.room)
            other.buffers_equal = other.buffers_equal and equal_buffers(other.module, statistics is not None)

    def _touched_anywhere(self, group: dist.ProcessGroup, touched: list[int]) -> list[int]:
        if len(touched) > _MOST_OTHERS:
            raise ValueError(
                f"accumulate(): the losses run {len(touched)} replicated models besides those of the step, more than "
                f"{_MOST_OTHERS}: give them in the list, accumulate([model, …], step)"
            )
        device = self._parameters[0].device if self._parameters else None
        sent = torch.full((_MOST_OTHERS,), -1, dtype=torch.int64)
        sent[: len(touched)] = torch.tensor(touched, dtype=torch.int64)
        found = copies_of_ranks(sent.to(device), group)
        return sorted(set(found.flatten().tolist()) - {-1})

    def _check_unchanged(self) -> None:
        changed = [
            name for (name, one), before in zip(self._named, self._written, strict=True) if one._version != before
        ]
        if not changed:
            return
        # A process alone may write into some of its parameters in a forward; an optimizer writes into all of them.
        with_gradient = {name for name, parameter in self._named if parameter.grad is not None}
        if self._group is None and (not with_gradient or not with_gradient <= set(changed)):
            return
        raise RuntimeError(
            f"accumulate(): {changed[0]} has changed inside of the loop over the micro-batches, before the step's "
            f"gradients were complete: move optimizer.step() behind the loop. A forward that writes into its own "
            f"parameters (an embedding with max_norm) writes other values on each rank"
        )

    def _tell_skipped(self) -> None:
        if self._skipped and torch.is_grad_enabled():
            which = ", ".join(map(str, self._skipped[:5]))
            for replica in self._own[:1]:
                if replica.told:
                    return
                replica.told = True
            logger.warning(
                "accumulate(): micro-batch %s had no backward: %s. This is said once",
                which,
                "its weight is taken out of the step" if self._drops else "its gradient counts as zero",
            )


class _Reduction:
    """The gradients of some parameters in one step, and how they are reduced after the loop.

    `touched`: the loop has changed a gradient.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        group: dist.ProcessGroup | None,
        tree: StrictReduction | None,
        sums: bool,
    ) -> None:
        self._parameters, self._group, self._tree = parameters, group, tree
        self.touched = False
        self._before: list[torch.Tensor | None] | None = None
        if sums:
            self._before = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
        self._state = _state(parameters)

    def take(self) -> bool:
        """Return whether the micro-batch has changed a gradient."""
        if self._tree is not None:
            changed = self._tree.take()
        else:
            state = _state(self._parameters)
            changed, self._state = state != self._state, state
        self.touched = self.touched or changed
        return changed

    def reduce(self, scale: float) -> None:
        """Leave the step's gradient, times `scale`, on top of what the parameters had before. Every rank calls it."""
        if self._tree is not None:
            self._tree.finish(scale)
            return
        if self._group is not None:
            reduce_gradients(self._parameters, self._group, average=self._before is None)
        if scale != 1.0:
            torch._foreach_mul_([one.grad for one in self._parameters if one.grad is not None], scale)
        self.restore()

    def restore(self) -> None:
        """Put back what the parameters had before."""
        if self._tree is not None:
            self._tree.restore()
        for parameter, before in zip(self._parameters, self._before or (), strict=self._before is not None):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)


def check_equal(named: Iterable[tuple[str, torch.Tensor | None]], group: dist.ProcessGroup) -> None:
    """Raise on every rank where the ranks' tensors differ.

    Collectives: one of 8 bytes a tensor.

    Raises:
        DDParityError: names the first tensor that differs, and the rank.
    """
    tensors = [(name, one) for name, one in named if one is not None and one.layout == torch.strided]
    if not tensors:
        return
    sums = torch.stack([_bits(one) for _, one in tensors])
    everyones = copies_of_ranks(sums, group)
    different = (everyones != everyones[0]).nonzero().tolist()
    if different:
        rank, number = different[0]
        raise DDParityError(
            f"accumulate(): {tensors[number][0]} differs between rank {rank} and rank 0 after the step, so the ranks "
            f"train different models: look for code that runs on some ranks only and changes gradients or weights"
        )


def bits_of(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor's bits."""
    return int(_bits(tensor))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    value = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.contiguous().view(width).sum(dtype=torch.int64)


def _trained(models: Sequence[nn.Module], replicas: Sequence[Replica | None]) -> Named:
    """The trained parameters of the models, each once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for position, (model, replica) in enumerate(zip(models, replicas, strict=True)):
        named = replica.named_parameters() if replica is not None else list(model.named_parameters())
        for name, parameter in named:
            if parameter.requires_grad:
                found.setdefault(id(parameter), (f"model {position}: {name}" if position else name, parameter))
    return list(found.values())


def _state(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int]]:
    """What changes when a gradient does: which tensor it is, and how often it was written."""
    return [
        (0, 0) if (gradient := parameter.grad) is None else (id(gradient), gradient._version)
        for parameter in parameters
    ]


def _statistics(replica: Replica, strict: bool) -> RunningStatistics | None:
    """What keeps a replica's running statistics in this step; None where every forward moves them itself."""
    if replica.batchnorm_statistics == "rank0":
        return None
    statistics = RunningStatistics(replica.module, replica.group)
    if not statistics.layers:
        return None
    if compiled_layers(replica.module):
        problem = "the model is compiled, and a batch norm inside of a graph does not tell a batch's statistics"
        if strict:
            raise ValueError(
                f"accumulate(): {problem}: compile parts without batch norms, or take rank 0's running statistics, by "
                f'replicate(model, reduction="strict", batchnorm_statistics="rank0")'
            )
        if not replica.told_compiled and dist.get_rank(replica.group) == 0:
            logger.warning("%s: its running statistics are rank 0's", problem)
        replica.told_compiled = True
        return None
    return statistics
