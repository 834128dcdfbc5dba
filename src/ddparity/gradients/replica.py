"""One object for each replicated model: what was asked for, and its part in DDP's reduction."""

from __future__ import annotations

import collections
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import Room
from ..comm.allreduce import gathers, mean_later, mean_over_ranks
from ..compat import (
    GradBucket,
    broadcast_buffers,
    disarm,
    order_buckets,
    register_comm_hook,
    uncompiled,
    unwrapped,
    used_anywhere,
)

logger = logging.getLogger(__name__)

Reduction = Literal["fast", "strict"]
Statistics = Literal["all", "rank0"]

# What `replicate` was asked for, as words in the model's attributes: they survive copy.deepcopy and torch.save, and a
# pickle of the model needs no ddparity.
_WORDS = "_ddparity_terms"

# The life of each replicated model, for as long as the model lives. A model inside of another model's loss is found
# here: its DDP would reduce in the middle of the other one's step.
_replicas: weakref.WeakKeyDictionary[nn.Module, Replica] = weakref.WeakKeyDictionary()
_made: collections.Counter[tuple[int, ...] | None] = collections.Counter()

CHECK_EVERY = 100  # steps
# DDP has one bucket for a model up to here, and so no backward to overlap its reduction with.
ONE_BUCKET_BYTES = 2**20


class Phase(Enum):
    """What the communication hook does with a bucket."""

    AVERAGE = "outside of accumulate: average it, as DDP does"
    KEEP = "in accumulate, in all micro-batches but the last: keep this rank's gradients"
    OVERLAP = "in the last micro-batch: average all buckets but the last one, which waits for the end of the loop"


class Order(Enum):
    """The order of DDP's buckets, which the ranks must change together."""

    DEFAULT = "that of construction, as far as every rank knows: the next reduction finds a better one"
    OWN = "that of a backward"
    LOST = "this rank had to reset DDP: all find a new one after the next step, in which they learn of it"


class Holder(Protocol):
    """A step of other models, which reduces this one after its loop, too."""

    def let_go(self, replica: Replica) -> None: ...

    def take_up(self, replica: Replica) -> None: ...


class Replica:
    """The state of one replicated model.

    Attributes:
        reduction, batchnorm_statistics: what `replicate` was asked for; of a foreign DDP, what DDP does.
        check_every: so often `accumulate` compares the ranks' parameters and gradients, in steps.
        ranks: of its group; None in a world of one.
        number: counts the replicas of these ranks; the same on every one of them, since making one is collective.
        hooked: the DDP module has our hook; False where the user registered another one, and without DDP.
        buffers_equal: the last step left the same buffers on all ranks.
        room: see `RunningStatistics`.
        supersede: ends the hold of the step of `accumulate` that is at work on this model.
        agreed: what the ranks compared last, so that they do it once an epoch.
        held: a step of `accumulate` holds its reduction back, of this model or of another one. holder: of another one.
        order: what this rank knows of DDP's order of buckets.
        overlapped: parameters whose gradients the last backward has averaged. reduced: it has done so with all.
        present: with find_unused_parameters, whether parameters had a gradient before DDP wrote averages, by their ids.
        had_gradients: ids of the parameters that had a gradient after the last step, the same on every rank. A loop
            that freezes and unfreezes parts of a model may give them one again, though frozen when the next begins.
        told_compiled, told_old: a warning was given.
    """

    def __init__(self, model: nn.Module, words: tuple[Reduction, Statistics, int], equal: bool) -> None:
        self._model = weakref.ref(model)
        self.reduction, self.batchnorm_statistics, self.check_every = words
        self.buffers_equal = equal
        self.room = Room()
        self.held = self.reduced = False
        self.order = Order.DEFAULT
        self.holder: Holder | None = None
        self.supersede: Callable[[], None] | None = None
        self.told_compiled = self.told_old = False
        self.agreed: object = None
        self.overlapped: list[torch.Tensor] = []
        self.present: dict[int, bool] = {}
        self.had_gradients: set[int] = set()
        self._phase = Phase.AVERAGE
        self._averaged: State | None = None
        self._kept: list[int] = []
        self._broadcasts = False
        self._steps = 0
        self._old: tuple[nn.Parameter, int, tuple[int, int]] | None = None
        ddp = self.ddp
        self.group = ddp.process_group if ddp is not None and ddp.process_group.size() > 1 else None
        self.ranks = None if self.group is None else tuple(dist.get_process_group_ranks(self.group))
        self.number = _made[self.ranks]
        _made[self.ranks] += 1
        self.hooked = ddp is not None and register_comm_hook(ddp, self, reduce_bucket)
        known = self.parameters() if ddp is not None else []
        self._known = [id(parameter) for parameter in known]
        self._bytes = sum(parameter.nbytes for parameter in known)
        self._sparse = any(getattr(module, "sparse", False) is True for module in self.module.modules())

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The DDP module; None in a world of one."""
        model = self._model()
        return model if isinstance(model, DistributedDataParallel) else None

    @property
    def module(self) -> nn.Module:
        """The user's module."""
        model = self._model()
        assert model is not None, "a replica does not outlive its model"
        return unwrapped(model)

    def all_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters, those that are not trained, too, in an order that is the same on every rank."""
        ignored = self.ddp.parameters_to_ignore if self.ddp is not None else ()
        named = named_parameters(self.module)
        return [(name, one) for name, one in named if name not in ignored] if ignored else named

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained now."""
        return [parameter for _, parameter in self.all_parameters() if parameter.requires_grad]

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether a step may give a parameter a gradient, as far as is known when it begins."""
        return parameter.requires_grad or id(parameter) in self.had_gradients

    def overlaps(self, parameters: list[int], frozen: bool) -> bool:
        """Whether DDP reduces in the last backward: there is something to overlap, and DDP knows what is trained now.

        `parameters`: the ids of those that the step may train; `frozen`: some of them are frozen now. A DDP module with
        options that its own reduction serves (a communication hook, sparse gradients, static_graph, mixed_precision)
        keeps it.
        """
        ddp = self.ddp
        if ddp is None or (not self.hooked and parameters == self._known):
            return ddp is not None
        if parameters != self._known or (frozen and not ddp.find_unused_parameters):
            return False
        if self._sparse or ddp.static_graph or getattr(ddp, "mixed_precision", None) is not None:
            return True
        cap = getattr(ddp, "bucket_bytes_cap", ONE_BUCKET_BYTES)
        return len(parameters) > 1 and self._bytes > min(cap, ONE_BUCKET_BYTES)

    def hold(self) -> None:
        """Let no backward reduce, and no forward run a collective, until `release`."""
        ddp = self.ddp
        self.held = True
        if ddp is not None:
            if ddp.require_forward_param_sync or ddp.find_unused_parameters or self.order is not Order.OWN:
                # A forward outside of the loop may have armed DDP, perhaps on this rank only. DDP does not tell: its
                # flag is False again after a forward without gradients. With find_unused_parameters DDP would also
                # remember what the backwards of the last step used, if that step summed after the loop.
                self._disarm()
            self._broadcasts, ddp.broadcast_buffers = ddp.broadcast_buffers, False
        self._switch(Phase.KEEP, reduces=False)

    def release(self) -> None:
        """Let the model be plain DDP again. Until then no forward broadcasts buffers; `hold` and a step see to that."""
        self.held = False
        if self.ddp is not None:
            self.ddp.broadcast_buffers = self._broadcasts
        self._switch(Phase.AVERAGE, reduces=True)

    def share_buffers(self) -> None:
        """Broadcast the buffers, if the model has any to broadcast, as DDP does in a forward."""
        ddp = self.ddp
        if ddp is not None:
            ddp.broadcast_buffers = self._broadcasts
            broadcast_buffers(ddp)
            ddp.broadcast_buffers = ddp.require_forward_param_sync = False

    def give_up(self) -> None:
        """After a step that was left: forget what its last backward had begun to reduce."""
        if self._phase is Phase.OVERLAP:
            self._disarm()

    def _disarm(self) -> None:
        assert self.ddp is not None, "only DDP reduces"
        disarm(self.ddp)
        if self.order is Order.OWN:
            self.order = Order.LOST

    def _finds_order(self) -> bool:
        ddp = self.ddp
        return self.order is Order.DEFAULT and self.hooked and ddp is not None and not ddp.find_unused_parameters

    def reorder(self) -> None:
        """Let the next step find a new order of buckets. Every rank calls it."""
        self._disarm()
        self.order = Order.DEFAULT

    def _switch(self, phase: Phase, reduces: bool) -> None:
        self._phase = phase
        ddp = self.ddp
        if ddp is not None:
            ddp.require_backward_grad_sync, ddp.require_forward_param_sync = reduces, False

    def overlap(self) -> None:
        """Let the next backward reduce."""
        self.overlapped, self.reduced, self._averaged, self._kept, self.present = [], False, None, [], {}
        if self._finds_order() and self.ddp is not None and not self.ddp.static_graph:
            self._disarm()  # so that every rank finds a new order, also one that had some before
        self._switch(Phase.OVERLAP, reduces=True)

    def keep(self) -> None:
        """Let no backward reduce any more."""
        self._switch(Phase.KEEP, reduces=False)

    def averaged(self) -> list[torch.Tensor]:
        """Return the parameters whose gradients the last backward has averaged; the same on every rank.

        With find_unused_parameters DDP leaves the gradient as it is where no rank's backward has used the parameter in
        this step: one that the loop has set itself is still this rank's own.
        """
        ddp = self.ddp
        assert ddp is not None, "only DDP overlaps"
        if not ddp.find_unused_parameters:
            return self.overlapped
        used = used_anywhere(ddp)
        by_ddp = {id(parameter) for parameter, some in zip(self.parameters(), used, strict=True) if some}
        return [parameter for parameter in self.overlapped if id(parameter) in by_ddp]

    def changed(self) -> bool:
        """Whether gradients have changed since the last backward averaged them."""
        averaged, self._averaged = self._averaged, None  # which keeps gradients alive
        return bool(self.overlapped) and (averaged is None or averaged.marks != State(self.overlapped).marks)

    def finished(self, parameters: list[nn.Parameter], buffers_equal: bool) -> None:
        """Note what a step has left."""
        self._steps += 1
        self.buffers_equal = buffers_equal
        self.note_gradients(parameters)
        probe = next((one for one in parameters if one.grad is not None), None)
        self._old = None if probe is None or probe.grad is None else (probe, probe._version, _written(probe.grad))

    def note_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        self.had_gradients = {id(one) for one in parameters if one.grad is not None}

    def compares(self) -> bool:
        """Whether the ranks compare their parameters after this step."""
        return self.check_every > 0 and self._steps % self.check_every == 0

    def warn_of_old_gradients(self) -> None:
        """Warn, once, where an optimizer has stepped since the last step and its gradients are still there."""
        if self._old is None or self.told_old:
            return
        probe, version, written = self._old
        if probe.grad is not None and _written(probe.grad) == written and probe._version != version:
            self.told_old = True
            logger.warning(
                "the gradients of the step before are still there after optimizer.step(), and this step's are added to "
                "them: call optimizer.zero_grad() after optimizer.step(). This is said once"
            )

    def backward_of_zeros(self) -> None:
        """Run a backward that adds nothing to any gradient, so that DDP reduces what this rank has.

        The other ranks' backwards wait for this rank's part of each bucket.
        """
        ddp, parameters = self.ddp, self.parameters()
        assert ddp is not None, "only DDP overlaps"
        with torch.enable_grad():
            nothing = _Nothing.apply(*reversed(parameters))
            ddp.reducer.prepare_for_backward([nothing])
            nothing.backward()

    def _settled(self) -> None:
        """At the end of the backward that reduced, on every rank, after DDP has written the averages."""
        ddp = self.ddp
        assert ddp is not None, "only DDP overlaps"
        if self.order is Order.LOST:
            self._disarm()
        elif self._finds_order():
            # Here, since DDP would do it in the next forward, which not every rank need run.
            order_buckets(ddp)
            self.order = Order.OWN
        self._averaged = State(self.overlapped)
        if self._kept and any(
            before == after[1] >= 0 for before, after in zip(self._kept, self._averaged.marks, strict=True)
        ):
            self._averaged = None  # DDP does not write to a gradient set by hand where no backward used the parameter


class _Nothing(torch.autograd.Function):
    """A zero that depends on parameters, with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


NO_GRADIENT = (0, -1)


class State:
    """What changes when gradients do: which tensors they are, and how often they were written.

    It keeps the gradients alive, so that a new one cannot have the identity of one that is gone.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._gradients = [parameter.grad for parameter in parameters]
        self.marks = [NO_GRADIENT if one is None else (id(one), one._version) for one in self._gradients]


def _written(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def reduce_bucket(replica: Replica, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks, or keep it: DDP's communication hook.

    One collective a bucket, of its bytes. Source: https://pytorch.org/docs/stable/ddp_comm_hooks.html
    """
    buffer = bucket.buffer()
    if replica._phase is Phase.KEEP:
        return _done(buffer)
    group = replica.group
    if replica._phase is Phase.OVERLAP:
        ddp = replica.ddp
        assert ddp is not None, "DDP calls this"
        ddp.require_backward_grad_sync = False  # a further forward in this micro-batch must not reduce again
        parameters = bucket.parameters()
        if ddp.find_unused_parameters:
            replica.present |= {id(one): one.grad is not None for one in parameters}
        if bucket.is_last():
            replica.reduced = True
            # DDP queues a callback, after this one, that writes all averages into the gradients; then ours follows.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(replica._settled))
            if buffer.layout == torch.strided:
                return _done(buffer)
        replica.overlapped += parameters
        if ddp.find_unused_parameters:
            dense = buffer.layout == torch.strided
            replica._kept += [one.grad._version if dense and one.grad is not None else -1 for one in parameters]
    if bucket.is_last() or gathers(buffer.numel(), buffer, group):
        # Waiting here costs less than a callback. The last bucket has no backward left to overlap with, and small ones
        # are sooner sent than overlapped.
        return _done(mean_over_ranks(buffer, group))
    return mean_later(buffer, group)


def _done(value: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(value)
    return future


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return what `module.named_parameters()` yields, in a third of its time: a step of a small model takes as long."""
    if type(module).named_parameters is not nn.Module.named_parameters:  # a model may name them otherwise
        return list(module.named_parameters())
    found: dict[int, tuple[str, nn.Parameter]] = {}
    visited: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in found:
                found[id(parameter)] = (prefix + name, parameter)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    visit(module, "")
    return list(found.values())


def refuse_nested(module: nn.Module, what: str) -> None:
    """Raise TypeError if a module holds a DDP module, which would reduce in the middle of a step."""
    for name, one in module.named_modules():
        if isinstance(one, DistributedDataParallel):
            raise TypeError(
                f"{what}, {name}: replicate the whole module once, with plain modules inside (for a DDP module, its "
                f".module)"
            )


def replica_of(model: nn.Module) -> Replica | None:
    """Return a model's replica; None for a plain module that `replicate` was not asked for, or asked "fast".

    A DDP module that `replicate` did not make gets our communication hook here, unless it has one.
    """
    model = uncompiled(model)
    words = model.__dict__.get(_WORDS)
    if words is None and not isinstance(model, DistributedDataParallel):
        return None
    replica = _replicas.get(model)
    if replica is None:
        replica = _replicas[model] = Replica(model, words or ("fast", "rank0", CHECK_EVERY), equal=False)
    return replica


def asked(model: nn.Module, words: tuple[Reduction, Statistics, int], equal: bool) -> None:
    """Note on a model what `replicate` was asked for."""
    model.__dict__[_WORDS] = words
    _replicas[model] = Replica(model, words, equal)


def forget(model: nn.Module) -> None:
    """Let a model be one that `replicate` was not asked for."""
    model.__dict__.pop(_WORDS, None)
    _replicas.pop(model, None)


def others_than(own: Sequence[Replica]) -> list[Replica]:
    """Return the living replicas besides `own` that no step holds yet, in the order in which they were made."""
    if len(_replicas) == len(own):
        return []
    found = [one for one in _replicas.values() if one not in own and not one.held]
    return sorted(found, key=lambda one: one.number)


def made_so_far(ranks: tuple[int, ...] | None) -> int:
    """Return how many replicas of these ranks this process has made, the same number on every one of them."""
    return _made[ranks]
