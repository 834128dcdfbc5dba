"""One object for each replicated model: what was asked for, and its part in DDP's reduction."""

from __future__ import annotations

import collections
import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..batchnorm import Room
from ..comm.buffers import Buffers
from ..compat import broadcast_buffers, disarm, has_built_in_hook, put_on, set_flags, take_off, uncompiled, unwrapped
from .early import CAP_BYTES, CAREFUL_STEPS, EarlyParts, EarlyPlan, S
from .recheck import Rechecks

logger = logging.getLogger(__name__)

Reduction = Literal["fast", "strict"]
Statistics = Literal["all", "rank0"]
Words = tuple[Reduction, Statistics, int, int]  # and check_every, and recheck_every, 0 for never

# What `replicate` was asked for, as words in the model's attributes: they survive copy.deepcopy and torch.save, and a
# pickle of the model needs no ddparity.
_WORDS = "_ddparity_terms"

# The life of each replicated model, for as long as the model lives. A model inside of another model's loss is found
# here: its DDP would reduce in the middle of the other one's step.
_replicas: weakref.WeakKeyDictionary[nn.Module, Replica] = weakref.WeakKeyDictionary()
_made: collections.Counter[tuple[int, ...] | None] = collections.Counter()
# How many of those made are gone on every rank: the garbage collector takes a model at another time on each.
_gone: collections.Counter[tuple[int, ...] | None] = collections.Counter()

CHECK_EVERY = 100  # steps
# Parameters by name, modules with buffers, and ids of parameters with sparse gradients.
Walk = tuple[list[tuple[str, nn.Parameter]], list[nn.Module], set[int]]


class Holder(Protocol):
    """A step of other models, which reduces this one after its loop, too."""

    def let_go(self, replica: Replica) -> None: ...

    def take_up(self, replica: Replica) -> None: ...


class Replica:
    """The state of one replicated model.

    Attributes:
        reduction, batchnorm_statistics: what `replicate` was asked for; of a foreign DDP, what DDP does.
        rechecks: those of `replicate(recheck_every=…)`; None without.
        check_every: so often `accumulate` compares the ranks' parameters and gradients, in steps.
        ranks: of its group; None in a world of one.
        number: counts the replicas of these ranks; the same on every one of them, since making one is collective.
        buffers_equal: the last step left the same buffers on all ranks.
        room: see `RunningStatistics`. buffers: for reductions of large gradients.
        supersede: ends the hold of the step of `accumulate` that is at work on this model.
        agreed: plans, and the epoch of each that the ranks compared last, so that they do it once an epoch.
        compared: the sets of trained parameters that all ranks have had, by the parameters' ids; the newest is last.
        held: a step of `accumulate` holds its reduction back, of this model or of another one. holder: of another one.
        sparse: ids of the parameters with sparse gradients.
        had_gradients: ids of the parameters that had a gradient after the last step, the same on every rank. A loop
            that freezes and unfreezes parts of a model may give them one again, though frozen when the next begins.
        told_old, told_skipped: a warning was given.
    """

    def __init__(self, model: nn.Module, words: Words, equal: bool) -> None:
        self._model = weakref.ref(model)
        self.reduction, self.batchnorm_statistics, self.check_every, recheck_every = words
        self.buffers_equal = equal
        self.room = Room()
        self.buffers = Buffers()
        self.held = False
        self.holder: Holder | None = None
        self.supersede: Callable[[], None] | None = None
        self.told_old = self.told_skipped = False
        self.agreed: dict[object, tuple[object, int | None]] = {}
        self.compared: dict[tuple[int, ...], None] = {}
        self.had_gradients: set[int] = set()
        self._warning: Any = None  # the hook that gives it
        self._built_in_hook: bool | None = None
        self._broadcasts = self._taken_off = False
        self._steps = 0
        self._old: _Old | None = None
        ddp = self.ddp
        self.group = ddp.process_group if ddp is not None and ddp.process_group.size() > 1 else None
        self.rechecks = Rechecks(recheck_every, self.group) if recheck_every and self.group is not None else None
        self.ranks = None if self.group is None else tuple(dist.get_process_group_ranks(self.group))
        self.number = _made[self.ranks]
        _made[self.ranks] += 1
        cap = getattr(ddp, "bucket_bytes_cap", CAP_BYTES)
        self._early = EarlyPlan(self.group, cap, self.number) if self.group is not None else None
        self._known = [id(parameter) for parameter in self.parameters()]

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The DDP module; None in a world of one."""
        model = self._model()
        return model if isinstance(model, DistributedDataParallel) else None

    @property
    def alone(self) -> bool:
        """A plain module in a world of one, whose gradients are complete without us."""
        return self.group is None and self.reduction == "fast" and self.ddp is None

    @property
    def module(self) -> nn.Module:
        """The user's module."""
        model = self._model()
        assert model is not None, "a replica does not outlive its model"
        return unwrapped(model)

    def walk(self) -> Walk:
        """Return the parameters, those that are not trained, too, and the modules with buffers, as on every rank."""
        ddp = self.ddp
        named, buffered, self.sparse = walk(self.module)
        if ddp is not None and ddp.parameters_to_ignore:
            named = [(name, one) for name, one in named if name not in ddp.parameters_to_ignore]
        return named, buffered, self.sparse

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained now."""
        return [parameter for _, parameter in self.walk()[0] if parameter.requires_grad]

    def by_ddp(self, parameters: list[nn.Parameter]) -> bool:
        """Return True if DDP's own reduction is asked for by an option that no other serves, and it can reduce these.

        The options are a user's communication hook, static_graph and mixed_precision. DDP cannot reduce parameters that
        were frozen when it was made.
        """
        ddp = self.ddp
        if ddp is None or not (ddp.static_graph or getattr(ddp, "mixed_precision", None) or self._has_hook(ddp)):
            return False
        return [id(one) for one in parameters if one.requires_grad] == self._known

    def _has_hook(self, ddp: DistributedDataParallel) -> bool:
        if getattr(ddp, "_comm_hooks", None):
            return True
        if self._built_in_hook is None:
            self._built_in_hook = has_built_in_hook(ddp)
        return self._built_in_hook

    def early_parts(
        self, parameters: list[nn.Parameter], start: Callable[[list[nn.Parameter]], S]
    ) -> EarlyParts[S] | None:
        """Return the parts of these parameters' gradients that `start` is to reduce in the last backward.

        None where that does not pay. With find_unused_parameters, backwards differ between ranks: averages that start
        in them could meet the collectives of synchronised batch norms in another order on another rank.
        """
        ddp = self.ddp
        if self._early is None or self.sparse or (ddp is not None and ddp.find_unused_parameters):
            return None
        return self._early.next(parameters, start)

    def hold(self, by_ddp: bool = False) -> None:
        """Let no backward reduce, and no forward run a collective, until `release`. `by_ddp`: DDP is to reduce."""
        self.held = True
        ddp = self.ddp
        if ddp is not None:
            disarm(ddp)  # a forward outside of the loop may have armed it, perhaps on this rank only
            self._broadcasts = ddp.broadcast_buffers
            set_flags(ddp, False, False)
            if not (by_ddp or ddp.static_graph or getattr(ddp, "mixed_precision", None)):
                self._taken_off = take_off(ddp)

    def release(self) -> None:
        """Let the model be plain DDP again. Until then no forward broadcasts buffers; `hold` and a step see to that."""
        self.held = False
        self.end_warning()
        ddp = self.ddp
        if ddp is not None:
            if self._taken_off:
                put_on(ddp)
                self._taken_off = False
            if ddp.require_backward_grad_sync:  # a loop that was left after DDP began to reduce
                disarm(ddp)
            set_flags(ddp, True, self._broadcasts)

    def let_reduce(self, reduces: bool) -> None:
        """Let DDP reduce in the next backward, or not."""
        if self.ddp is not None:
            set_flags(self.ddp, reduces, False)

    def reduces(self) -> bool:
        """Return True if DDP would reduce in the next backward."""
        ddp = self.ddp
        return ddp is not None and ddp.require_backward_grad_sync

    def share_buffers(self) -> None:
        """Broadcast the buffers, if the model has any to broadcast, as DDP does in a forward."""
        ddp = self.ddp
        if ddp is not None:
            ddp.broadcast_buffers = self._broadcasts
            broadcast_buffers(ddp)
            set_flags(ddp, False, False)

    def careful(self) -> bool:
        """Return True if the next step makes the checks that take time: one of the first, and some later ones."""
        return self._steps < CAREFUL_STEPS or self.compares(ahead=1)

    def skip(self) -> None:
        """Count a step that nothing was done for."""
        self._steps += 1

    def finished(self, parameters: list[nn.Parameter], reduced: list[nn.Parameter], buffers_equal: bool) -> None:
        """Note what a step has left. `reduced`: the parameters to which it has given a gradient, on any rank."""
        self._steps += 1
        self.buffers.next_step()
        if self._early is not None:
            self._early.next_step()
        self.buffers_equal = buffers_equal
        self.note_gradients(reduced)
        self._old = None
        for probe in parameters:
            if probe.grad is not None:
                self._old = _Old(probe)
                break

    def note_gradients(self, reduced: Iterable[nn.Parameter]) -> None:
        self.had_gradients = set(map(id, reduced))

    def compares(self, ahead: int = 0) -> bool:
        """Return True if the ranks compare their parameters after the last step, or after one so many steps ahead."""
        return self.check_every > 0 and (self._steps + ahead) % self.check_every == 0

    def warn_of_old_gradients(self) -> None:
        """Warn, once, where an optimizer has stepped since the last step and its gradients are still there."""
        if self._old is None or self.told_old:
            return
        old = self._old
        if not old.is_there() or not old.probe.requires_grad:
            return

        def tell(_: torch.Tensor) -> None:  # zero_grad() may be called inside of the loop
            if self._warning is not None and old.is_there():
                self.told_old = True
                logger.warning(
                    "the gradients of the step before are still there after optimizer.step(), and this step's are "
                    "added to them: call optimizer.zero_grad() after optimizer.step(). This is said once"
                )
            self._warning = None

        self._warning = old.probe.register_hook(tell)

    def end_warning(self) -> None:
        """Warn of old gradients no more."""
        if self._warning is not None:
            self._warning.remove()
            self._warning = None

    def backward_of_zeros(self) -> None:
        """Run a backward that adds nothing to any gradient, so that DDP reduces what this rank has.

        The other ranks' backwards wait for this rank's part of each bucket.
        """
        ddp, parameters = self.ddp, self.parameters()
        assert ddp is not None, "only DDP reduces by itself"
        with torch.enable_grad():
            nothing = _Nothing.apply(*reversed(parameters))
            ddp.reducer.prepare_for_backward([nothing])
            nothing.backward()


class _Nothing(torch.autograd.Function):
    """A zero that depends on parameters, with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class _Old:
    """A parameter, and its gradient after a step."""

    def __init__(self, probe: nn.Parameter) -> None:
        assert probe.grad is not None, "a parameter with a gradient"
        self.probe, self._version = probe, probe._version
        # Not its id, which a later gradient may have.
        self._gradient, self._written = weakref.ref(probe.grad), probe.grad._version

    def is_there(self) -> bool:
        """Return True if an optimizer has stepped since, and the step's gradient is still there."""
        gradient = self.probe.grad
        if gradient is None or gradient is not self._gradient():
            return False
        return gradient._version == self._written and self.probe._version != self._version


def walk(module: nn.Module) -> Walk:
    """Return what `module.named_parameters()` yields, in a third of its time, and what else a step asks for."""
    named: list[tuple[str, nn.Parameter]] = []
    buffered: list[nn.Module] = []
    sparse: set[int] = set()
    _visit(module, "", (named, buffered, sparse), set())
    if type(module).named_parameters is not nn.Module.named_parameters:  # a model may name them otherwise
        return list(module.named_parameters()), buffered, sparse
    return named, buffered, sparse


def _visit(module: nn.Module, prefix: str, found: Walk, visited: set[int]) -> None:
    """Add what a module and those below it have. No function within `walk`: it would be a cycle, anew in each step."""
    named, buffered, sparse = found
    visited.add(id(module))  # and parameters
    parameters = module._parameters
    if parameters:
        for name, parameter in parameters.items():
            if parameter is not None and id(parameter) not in visited:
                visited.add(id(parameter))
                named.append((prefix + name, parameter))
        if module.__dict__.get("sparse") is True and parameters.get("weight") is not None:
            sparse.add(id(parameters["weight"]))
    if module._buffers:
        buffered.append(module)
    children = module._modules
    if children:
        for name, child in children.items():
            if child is not None and id(child) not in visited:
                _visit(child, prefix + name + ".", found, visited)


def refuse_nested(module: nn.Module, what: str) -> None:
    """Raise TypeError if a module holds a DDP module, which would reduce in the middle of a step."""
    for name, one in module.named_modules():
        if isinstance(one, DistributedDataParallel):
            raise TypeError(
                f"{what}, {name}: replicate the whole module once, with plain modules inside (for a DDP module, its "
                f".module)"
            )


def replica_of(model: nn.Module) -> Replica:
    """Return a model's replica; of a model that `replicate` was not asked for, one that does what DDP does."""
    model = uncompiled(model)
    replica = _replicas.get(model)
    if replica is None:
        words: Words = model.__dict__.get(_WORDS) or ("fast", "rank0", CHECK_EVERY, 0)
        replica = _replicas[model] = Replica(model, words, equal=False)
    return replica


def known_replica(model: nn.Module) -> Replica | None:
    """Return a model's replica, if it has one already."""
    return _replicas.get(model)


def asked(model: nn.Module, words: Words, equal: bool) -> None:
    """Note on a model what `replicate` was asked for."""
    model.__dict__[_WORDS] = words
    _replicas[model] = Replica(model, words, equal)


def forget(model: nn.Module) -> None:
    """Let a model be one that `replicate` was not asked for."""
    model.__dict__.pop(_WORDS, None)
    _replicas.pop(model, None)


def others_than(own: Sequence[Replica]) -> list[tuple[Replica, nn.Module]]:
    """Return the living replicas besides `own` that no step holds yet, in the order in which they were made.

    With their models: without a reference to these, the garbage collector may take them at any time.
    """
    if len(_replicas) == len(own):
        return []
    found = [(one, model) for model, one in list(_replicas.items()) if one not in own and not one.held]
    return sorted(found, key=lambda pair: pair[0].number)


def replicated_models() -> list[nn.Module]:
    """Return the living replicated models."""
    return list(_replicas)


@contextlib.contextmanager
def only(model: nn.Module) -> Iterator[None]:
    """Let this be the one model that this process has replicated, so that a measurement of it has no cost of others.

    Every rank enters it, with the same model.
    """
    replicas, made, gone_before = dict(_replicas), dict(_made), dict(_gone)
    own = replicas[model]
    number, own.number = own.number, 0
    for one in (_replicas, _made, _gone):
        one.clear()
    _replicas[model], _made[own.ranks] = own, 1
    try:
        yield
    finally:
        own.number = number
        _replicas.update(replicas)
        _made.update(made)
        _gone.clear()
        _gone.update(gone_before)


def most_alive(ranks: tuple[int, ...] | None) -> int:
    """Return how many replicas of these ranks may be alive on one of them, the same number on every one."""
    return _made[ranks] - _gone[ranks]


def gone(ranks: tuple[int, ...] | None) -> int:
    """Return how many replicas of these ranks that this process has made are gone here."""
    return _made[ranks] - sum(one.ranks == ranks for one in list(_replicas.values()))


def note_gone(ranks: tuple[int, ...] | None, number: int) -> None:
    """Note how many are gone on each rank. Every rank calls it, with the same number."""
    _gone[ranks] = number
