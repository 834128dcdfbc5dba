"""One object for each replicated model: what was asked for, and its part in DDP's reduction."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import Room
from ..comm.allreduce import gathers, mean_later, mean_over_ranks
from ..compat import GradBucket, broadcast_buffers, disarm, order_buckets, register_comm_hook, uncompiled, unwrapped

logger = logging.getLogger(__name__)

Reduction = Literal["fast", "strict"]
Statistics = Literal["all", "rank0"]

# What `replicate` was asked for, as words in the model's attributes: they survive copy.deepcopy and torch.save, and a
# pickle of the model needs no ddparity.
_WORDS = "_ddparity_terms"

# The life of each replicated model, for as long as the model lives. A model inside of another model's loss is found
# here: its DDP would reduce in the middle of the other one's step.
_replicas: weakref.WeakKeyDictionary[nn.Module, Replica] = weakref.WeakKeyDictionary()
_made = 0

CHECK_EVERY = 100  # steps
# DDP has one bucket for a model up to here, and so no backward to overlap its reduction with.
ONE_BUCKET_BYTES = 2**20


# In DDP's attribute require_forward_param_sync, until a forward writes a truth value there.
_NO_FORWARD: Any = None


class Phase(Enum):
    """What the communication hook does with a bucket."""

    AVERAGE = "outside of accumulate: average it, as DDP does"
    KEEP = "in accumulate, in all micro-batches but the last: keep this rank's gradients"
    OVERLAP = "in the last micro-batch: average all buckets but the last one, which waits for the end of the loop"


class Replica:
    """The state of one replicated model.

    Attributes:
        reduction, batchnorm_statistics: what `replicate` was asked for; of a foreign DDP, what DDP does.
        check_every: so often `accumulate` compares the ranks' parameters and gradients, in steps.
        number: counts the replicas of this process; the same on every rank, since making one is collective.
        hooked: the DDP module has our hook; False where the user registered another one, and without DDP.
        buffers_equal: the last step left the same buffers on all ranks.
        room: see `RunningStatistics`.
        open: a step of `accumulate` is at work on this model.
        agreed: what the ranks compared last, so that they do it once an epoch.
        ordered: DDP has its order of buckets.
        overlapped: parameters whose gradients the last backward has averaged. reduced: it has done so with all.
        told, told_compiled, told_old: a warning was given.
    """

    def __init__(self, model: nn.Module, words: tuple[Reduction, Statistics, int], equal: bool) -> None:
        self._model = weakref.ref(model)
        self.reduction, self.batchnorm_statistics, self.check_every = words
        global _made
        self.number, _made = _made, _made + 1
        self.buffers_equal = equal
        self.room = Room()
        self.open = self.ordered = self.reduced = False
        self.told = self.told_compiled = self.told_old = False
        self.agreed: object = None
        self.overlapped: list[torch.Tensor] = []
        self._phase = Phase.AVERAGE
        self._broadcasts = True
        self._versions: list[int] = []
        self._before: list[tuple[torch.Tensor, tuple[int, int]]] = []
        self._steps = 0
        self._old: tuple[nn.Parameter, int, tuple[int, int]] | None = None
        ddp = self.ddp
        self.group = ddp.process_group if ddp is not None and ddp.process_group.size() > 1 else None
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

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained now, in an order that is the same on every rank."""
        ignored = self.ddp.parameters_to_ignore if self.ddp is not None else ()
        return [
            (name, one) for name, one in self.module.named_parameters() if one.requires_grad and name not in ignored
        ]

    def parameters(self) -> list[nn.Parameter]:
        """As `named_parameters`, without names, in less time."""
        if self.ddp is not None and self.ddp.parameters_to_ignore:
            return [parameter for _, parameter in self.named_parameters()]
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def overlaps(self, parameters: list[int]) -> bool:
        """Whether DDP reduces in the last backward: there is something to overlap, and DDP knows what is trained now.

        `parameters`: the ids of those that are trained now. A DDP module with options that its own reduction serves
        (a communication hook, sparse gradients, static_graph, mixed_precision) keeps it.
        """
        ddp = self.ddp
        if ddp is None or (not self.hooked and parameters == self._known):
            return ddp is not None
        if parameters != self._known:
            return False
        if self._sparse or ddp.static_graph or getattr(ddp, "mixed_precision", None) is not None:
            return True
        cap = getattr(ddp, "bucket_bytes_cap", ONE_BUCKET_BYTES)
        return len(parameters) > 1 and self._bytes > min(cap, ONE_BUCKET_BYTES)

    def hold(self) -> None:
        """Let no backward reduce, and no forward run a collective, until `release`."""
        ddp = self.ddp
        armed = False
        if ddp is not None:
            # A forward outside of the loop may have armed DDP, perhaps on this rank only; one without gradients after
            # it leaves a False.
            armed = ddp.require_forward_param_sync is not _NO_FORWARD
            if self._phase is Phase.AVERAGE:
                self._broadcasts, ddp.broadcast_buffers = ddp.broadcast_buffers, False
        self._switch(Phase.KEEP, reduces=False)
        if ddp is None or not armed:
            return
        if not self.ordered or ddp.find_unused_parameters or list(map(id, self.parameters())) != self._known:
            disarm(ddp)
            return
        # To disarm would forget the order of buckets, on this rank only.
        without = [parameter for parameter in self.parameters() if parameter.grad is None]
        self.backward_of_zeros()
        for parameter in without:
            parameter.grad = None

    def release(self) -> None:
        """Let the model be plain DDP again. Until then no forward broadcasts buffers; `hold` and a step see to that."""
        self._switch(Phase.AVERAGE, reduces=True)
        if self.ddp is not None:
            self.ddp.broadcast_buffers = self._broadcasts
            self.ddp.require_forward_param_sync = _NO_FORWARD

    def share_buffers(self) -> None:
        """Broadcast the buffers, as DDP does in a forward, after `hold`."""
        ddp = self.ddp
        if ddp is not None and self._broadcasts:
            ddp.broadcast_buffers = True
            broadcast_buffers(ddp)
            ddp.broadcast_buffers = ddp.require_forward_param_sync = False

    def _switch(self, phase: Phase, reduces: bool) -> None:
        self._phase = phase
        ddp = self.ddp
        if ddp is not None:
            ddp.require_backward_grad_sync, ddp.require_forward_param_sync = reduces, False

    def overlap(self) -> None:
        """Let the next backward reduce."""
        self.overlapped, self.reduced, self._versions = [], False, []
        self._before = [(one, _written_gradient(one)) for one in self.parameters()]
        self._switch(Phase.OVERLAP, reduces=True)

    def keep(self) -> None:
        """Let no backward reduce any more."""
        self._switch(Phase.KEEP, reduces=False)

    def changed(self) -> bool:
        """Whether gradients have changed since the last backward averaged them."""
        return self._versions != _versions(self.overlapped)

    def finished(self, parameters: list[nn.Parameter], buffers_equal: bool) -> None:
        """Note what a step has left."""
        self._steps += 1
        self.buffers_equal = buffers_equal
        probe = next((one for one in parameters if one.grad is not None), None)
        self._old = None if probe is None or probe.grad is None else (probe, probe._version, _written(probe.grad))

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
        if ddp.find_unused_parameters:  # the others count as not used
            dummy = torch.zeros((), requires_grad=True, device=parameters[0].device)
            parameters = [dummy, *(one for one in parameters if one.grad is not None)]  # type: ignore[list-item]
        with torch.enable_grad():
            nothing = _Nothing.apply(*reversed(parameters))
            ddp.reducer.prepare_for_backward([nothing])
            nothing.backward()

    def complete_backward(self) -> None:
        """Run a backward of zeros for the parameters that the last backward left out, after it has averaged some."""
        left_out = [one for one, written in self._before if _written_gradient(one) == written]
        if left_out:
            with torch.enable_grad():
                _Nothing.apply(*reversed(left_out)).backward()

    def _settled(self) -> None:
        if not self.ordered:  # now, as a further forward on some ranks would do it
            ddp = self.ddp
            assert ddp is not None, "only DDP overlaps"
            order_buckets(ddp)
            self.ordered = True
        self._versions = _versions(self.overlapped)


class _Nothing(torch.autograd.Function):
    """A zero that depends on parameters, with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _written(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def _written_gradient(parameter: torch.Tensor) -> tuple[int, int]:
    return (0, 0) if parameter.grad is None else _written(parameter.grad)


def _versions(parameters: Iterable[torch.Tensor]) -> list[int]:
    return [-1 if (gradient := parameter.grad) is None else gradient._version for parameter in parameters]


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
        if bucket.is_last():
            replica.reduced = True
            # DDP queues a callback, after this one, that writes all averages into the gradients; then ours follows.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(replica._settled))
            if buffer.layout == torch.strided:
                return _done(buffer)
        replica.overlapped += bucket.parameters()
    if bucket.is_last() or gathers(buffer.numel(), buffer, group):
        # Waiting here costs less than a callback. The last bucket has no backward left to overlap with, and small ones
        # are sooner sent than overlapped.
        return _done(mean_over_ranks(buffer, group))
    return mean_later(buffer, group)


def _done(value: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(value)
    return future


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


def others_than(own: Iterable[Replica]) -> list[Replica]:
    """Return the living replicas besides `own`, in the order in which they were made."""
    numbers = {replica.number for replica in own}
    return sorted((one for one in _replicas.values() if one.number not in numbers), key=lambda one: one.number)


def made_so_far() -> int:
    """Return how many replicas this process has made, the same number on every rank."""
    return _made
