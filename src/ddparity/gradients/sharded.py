"""One optimizer step of models that torch's `fully_shard` shards, inside of `accumulate`."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..batchnorm import Room, RunningStatistics, equal_buffers
from ..comm.allreduce import copies_of_ranks
from ..compat import FullySharded, averages_scattered, holds_old_fsdp, sharded_modules, version
from . import strangers
from .aside import Aside
from .early import CAREFUL_STEPS
from .incomplete import (
    close_loop,
    forget_left,
    note_left,
    open_loop,
    refuse_superseded,
    scale_of_rest,
    tell_skipped,
)
from .replica import CHECK_EVERY, walk

logger = logging.getLogger(__name__)

_KEY = "_ddparity_sharded"  # in the model's attributes
_UNREDUCED, _HAS_ONE = 1, 2  # what a rank says of a parameter's gradient


class Sharded:
    """The state of one model of `fully_shard`. It has what `Replica` has for a replicated one.

    Raises:
        ValueError: a part of the model cannot be trained exactly.

    Collectives: one of 4 bytes a rank when it is made, see `averages_scattered`.
    """

    reduction = "sharded"
    batchnorm_statistics = "all"
    rechecks = None
    alone = False
    ddp = None

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.shards = FullySharded(model)
        _check_trainable(model, self.shards)
        self.group = _group_of(self.shards)
        group = self.group
        if group is not None and self.shards.averages and not averages_scattered(group, self.shards.device):
            raise ValueError(
                f"accumulate(): fully_shard() of torch {torch.__version__} asks {dist.get_backend(group)} for "
                f"averages and gets sums, so its gradients would be too large: use a later torch, or NCCL"
            )
        self.ranks = None if self.group is None else tuple(dist.get_process_group_ranks(self.group))
        size = 1 if self.group is None else self.group.size()
        self.scale = self.shards.divisor or size
        self.agreed: dict[object, tuple[object, int | None]] = {}
        self.room = Room()
        self.supersede: Callable[[], None] | None = None
        self.told_skipped = self.told_gathered = False
        self._steps = 0

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The shards of the parameters that are trained now, by name."""
        return [(name, parameter) for name, parameter in self.shards.parameters if parameter.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """The shards of the parameters that are trained now."""
        return [parameter for _, parameter in self.trained()]

    @property
    def held(self) -> bool:
        """Whether a step of `accumulate` is at work on it."""
        return self.supersede is not None

    def hold(self) -> None:
        """Do nothing, since forwards of `fully_shard` broadcast no buffers."""

    def release(self) -> None:
        """Do nothing."""

    def careful(self) -> bool:
        """Return True if the next step makes the checks that take time."""
        return self._steps < CAREFUL_STEPS

    def skip(self) -> None:
        """Count a step."""
        self._steps += 1

    def compares(self) -> bool:
        """Return True if the ranks compare, after the last step, what optimizers train beside all models."""
        return self._steps % CHECK_EVERY == 0


def sharded_of(model: nn.Module) -> Sharded | None:
    """Return the state of a model of `fully_shard`; None for another model. In the first call, prepare torch's state.

    Raises:
        TypeError: parts of the model are sharded, but not the model itself, or by FSDP1.
    """
    known: Sharded | None = model.__dict__.get(_KEY)
    if known is not None:
        return known
    if holds_old_fsdp(model):
        raise TypeError(
            "accumulate() got a model of FullyShardedDataParallel (FSDP1), which torch replaces by FSDP2: shard it "
            "with torch.distributed.fsdp.fully_shard"
        )
    modules = sharded_modules(model)
    if not modules:
        return None
    if modules[0] is not model:
        raise TypeError(
            "accumulate() got a model with parts that fully_shard() has sharded, but the parameters outside of them "
            "would not be reduced: call fully_shard(model) on the whole model, too, after its parts"
        )
    model.__dict__[_KEY] = made = Sharded(model)
    return made


def _check_trainable(model: nn.Module, shards: FullySharded) -> None:
    """Refuse what would be wrong in silence. Every rank has the same model."""
    sharded = {id(parameter) for _, parameter in shards.parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in sharded:
            raise ValueError(
                f"accumulate(): fully_shard() has left {name} out (ignored_params), so that nobody would reduce its "
                f"gradient: shard it, too, or freeze it"
            )
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.max_norm is not None or module.sparse:
            option = "sparse=True" if module.sparse else f"max_norm={module.max_norm}"
            what = (
                "gives gradients that fully_shard() cannot reduce" if module.sparse else "writes into gathered copies"
            )
            raise ValueError(
                f"accumulate(): {name} has {option}, which {what}: leave it out, or use ddparity.replicate"
            )


def _group_of(shards: FullySharded) -> dist.ProcessGroup | None:
    """Return the ranks among which a step is shared; None in a world of one."""
    mesh = shards.mesh
    if mesh.size() == 1:
        return None
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        group: dist.ProcessGroup = mesh.get_group()
        return group
    raise ValueError(
        f"accumulate(): the model is sharded over {mesh}, {mesh.size()} of {dist.get_world_size()} ranks: give "
        f"fully_shard() a mesh of one dimension, or one over all ranks"
    )


class ShardedWindow:
    """One step over models of `fully_shard`. Every rank opens it, takes its micro-batches, and finishes it.

    No backward reduces before the last one. Where all ranks have as many micro-batches, parameters are gathered and
    freed as `fully_shard` was told to; every rank must then run the same forwards and backwards. Where a rank has
    fewer, or weights are dropped, all parameters are gathered for the whole step, and the loop runs no collective.

    Gradients are reduced in the last micro-batch's backward where torch can do so exactly, else after the loop. Either
    way the ranks tell each other after the loop which parameters have a gradient, so that one without on every rank
    keeps None, as on one process.

    Args:
        models: all over the same ranks.
        numbers: micro-batches of each rank. rank: this one.
        drops: the weights of micro-batches without a backward are taken out of the step.

    Collectives: those of `fully_shard` in forwards and backwards; one reduce-scatter for each part of the model; one
    of a byte a parameter. In the first step of a model that has one micro-batch a rank, one all-gather for each part
    more. Where parameters stay gathered, one all-gather for each part instead of those in the loop.
    Where modules have other buffers than running statistics, one broadcast for each dtype of these. For running
    statistics see `RunningStatistics`. Every 100 steps one of 24 bytes.
    """

    def __init__(self, models: Sequence[Sharded], numbers: Sequence[int], rank: int, drops: bool) -> None:
        self._models, self._numbers, self._drops = models, numbers, drops
        self._group, self._device = models[0].group, models[0].shards.device
        self._gathers = drops or len(set(numbers)) > 1
        self._last_alone = numbers[rank] == 1
        self._parameters = [parameter for one in models for _, parameter in one.shards.parameters]
        self._seen: set[int] = set()
        self._skipped: list[int] = []
        self._dropped: list[float] = []
        self._aside: Aside | None = None
        self._kept: list[torch.Tensor | None] = []
        self._finished = self._superseded = False
        self._stack = contextlib.ExitStack()

    @property
    def scale(self) -> float:
        """What shares are multiplied by, since the reduction divides by it."""
        return self._models[0].scale

    waits = True  # gradients are not complete before `finish`

    def open(self, device: torch.device | None) -> None:
        """Hold back the reductions in the loop, until `close`."""
        for one in self._models:
            if one.supersede is not None:
                one.supersede()
        forget_left(self._parameters)
        if self._group is not None:
            strangers.watch()
        try:
            for one in self._models:
                self._stack.enter_context(one.shards.holding())
                self._stack.callback(close_loop, one, self)
                open_loop(one, self)
                self._stack.callback(setattr, one, "supersede", None)
                one.supersede = self.supersede
            self._statistics = [self._recorded(one, self._stack) for one in self._models]
            if self._gathers:
                for one in self._models:
                    self._tell_gathered(one)
                    self._stack.enter_context(one.shards.gathered())
        except BaseException:
            self.close()
            raise
        if self._gathers:
            self._aside = Aside(self._parameters)
        self._had = [parameter.grad is not None for parameter in self._parameters]
        self._marks = self._marked()

    def close(self) -> None:
        """Set what was set before. After a loop that was left, drop its gradients."""
        if not self._finished and not self._superseded:
            self._drop()
            note_left(self._parameters, dropped=True)
        self._stack.close()

    def _drop(self) -> None:
        for one in self._models:
            one.shards.drop()
        if self._aside is not None:
            self._aside.restore()

    def supersede(self) -> None:
        """End this step's hold on its models, for another one."""
        self._superseded = True
        self._drop()
        self._stack.close()

    def begin_last(self) -> None:
        """Let reductions start: the next micro-batch is this rank's last."""
        if self._gathers or not all(one.shards.can_reduce_early(self._last_alone) for one in self._models):
            return
        self._kept = []  # torch frees a part's gradients as soon as they are reduced
        start = 0
        for one in self._models:
            one.shards.make_whole_parameters()  # for the hooks below
            unreduced = one.shards.unreduced()
            self._seen.update(start + number for number, gradient in enumerate(unreduced) if gradient is not None)
            for handle in one.shards.on_gradient(functools.partial(self._see, start)):
                self._stack.callback(handle.remove)
            one.shards.let_reduce(True)
            start += len(unreduced)

    def _see(self, start: int, number: int) -> None:
        self._seen.add(start + number)

    def take(self, index: int, share: float) -> None:
        """After a micro-batch.

        Raises:
            RuntimeError: another loop over a model of this step has begun.
        """
        if self._superseded:
            refuse_superseded()
        marks = self._marked()
        if marks == self._marks:
            self._dropped.append(share)
            if torch.is_grad_enabled():
                self._skipped.append(index)
        self._marks = marks

    def _marked(self) -> list[tuple[int, int]]:
        """Return what changes when gradients do."""
        found: list[torch.Tensor | None] = []
        if self._aside is None:  # the last backward reduces into these; else zero_grad() alone changes them
            found += [parameter.grad for parameter in self._parameters]
        found += [gradient for one in self._models for gradient in one.shards.unreduced()]
        self._kept = found  # no new gradient may have the identity of one that is gone
        return [(0, -1) if one is None else (id(one), version(one)) for one in found]

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what is not reduced. Every rank calls it."""
        tell_skipped(self._models[0], self._skipped, self._drops)
        unreduced = [gradient is not None for one in self._models for gradient in one.shards.unreduced()]
        self._seen.update(number for number, is_left in enumerate(unreduced) if is_left)
        own = [
            _UNREDUCED * is_left + _HAS_ONE * (number in self._seen or (self._had[number] and self._aside is None))
            for number, is_left in enumerate(unreduced)
        ]
        said = torch.tensor(own, dtype=torch.uint8, device=self._device).unsqueeze(0)
        if self._group is not None:
            said = copies_of_ranks(said[0], self._group)
        left = (said & _UNREDUCED).amax(0).tolist()
        has_one = (said & _HAS_ONE).amax(0).tolist()
        if self._aside is not None:
            self._aside.settle()
            if self._group is not None and 0 in self._numbers:
                self._aside.agree(self._group)
        start = 0
        for one in self._models:
            stop = start + len(one.shards.parameters)
            one.shards.reduce([bool(some) for some in left[start:stop]])
            start = stop
        for parameter, some in zip(self._parameters, has_one, strict=True):
            if not some:
                parameter.grad = None
        self._scale_what_is_left()
        if self._aside is not None:
            self._aside.put_back()
        self._finished = True
        recorded = [statistics for statistics in self._statistics if statistics is not None]
        for statistics in recorded:
            statistics.count()
        for statistics in recorded:
            statistics.replay(max(self._numbers))
        for one in self._models:
            one.skip()
        if self._group is not None and any(one.compares() for one in self._models):
            strangers.compare(self._group, self._device)

    def _scale_what_is_left(self) -> None:
        if not self._drops:
            return
        scale = scale_of_rest(self._dropped, self._numbers, self._group, self._device)
        for parameter in self._parameters:
            if parameter.grad is not None and scale != 1.0:
                parameter.grad.mul_(scale)

    def _recorded(self, one: Sharded, stack: contextlib.ExitStack) -> RunningStatistics | None:
        """Return what keeps a model's running statistics in this step. Make other buffers those of rank 0."""
        _, buffered, _ = walk(one.module)
        statistics = RunningStatistics(one.module, buffered, self._group, one.room) if self._group is not None else None
        if self._group is not None and not equal_buffers(buffered, statistics):
            _broadcast([buffer for module in buffered for buffer in module._buffers.values()], self._group)
        if statistics is None or not len(statistics):
            return None
        stack.enter_context(statistics.recording())
        return statistics

    def _tell_gathered(self, one: Sharded) -> None:
        if not one.told_gathered and len(set(self._numbers)) > 1:
            one.told_gathered = True
            logger.info(
                "accumulate(): the ranks have %s micro-batches in a step, so this and other such steps gather the "
                "whole model, which takes its memory on every rank",
                " and ".join(map(str, sorted(set(self._numbers)))),
            )


@torch.no_grad()
def _broadcast(buffers: Sequence[torch.Tensor | None], group: dist.ProcessGroup) -> None:
    """Set buffers to those of the group's rank 0, as DDP does in a forward. One broadcast for each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], dict[int, torch.Tensor]] = {}
    for one in buffers:
        if one is not None and one.numel():
            kinds.setdefault((one.dtype, one.device), {})[id(one)] = one
    for kind in sorted(kinds, key=str):
        tensors = list(kinds[kind].values())
        flat = torch.cat([one.reshape(-1) for one in tensors])
        dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
        for one, value in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
            one.copy_(value.view(one.shape))
