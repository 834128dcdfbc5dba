"""Running statistics of plain batch norms: those of all micro-batches, in the order in which one process runs them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..compat import is_compiled
from ..reduction import copies_of_ranks
from .layer import SyncBatchNorm

Moments = tuple[Tensor, Tensor]  # one batch's mean and unbiased variance

# What no variance is: a layer that was called but did not come to its normalisation leaves it.
_NOT_RUN = -1.0

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class RunningStatistics:
    """Moves the running statistics of a model's plain batch norms once a step, over all ranks' micro-batches.

    While `recording`, a layer's forward leaves the batch's own statistics in buffers of its own, by momentum 1; its
    real ones do not move. `replay` then moves them batch by batch in rank order, on every rank alike:

        running = (1 - momentum) * running + momentum * batch's

    A layer that runs several times in a micro-batch counts as often, one that activation checkpointing runs again in
    the backward too, as in one process. Layers in eval mode, without running statistics, and synchronised ones are left
    alone; so are norms that are no torch batch norm, whose buffers nobody exchanges.

    Collectives: `replay` runs one all-gather, of 16 bytes a layer, the bytes of the running means and variances, and
    these again for each micro-batch of the largest share; none in a world of one or without such a layer. In the first
    step in which a rank's layers run more often than once a micro-batch, one more.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.layers = [module for module in model.modules() if _is_tracked(module) and module.training]
        self._group = group
        self._records: list[list[Moments]] = [[] for _ in self.layers]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forwards inside. The layers are afterwards as before, also on an exception."""
        swapped: dict[_BatchNorm, tuple[Any, ...]] = {}
        handles = []
        try:
            for layer, records in zip(self.layers, self._records, strict=True):
                handles.append(layer.register_forward_pre_hook(functools.partial(_before_forward, swapped)))
                after = functools.partial(_after_forward, swapped, records)
                # Activation checkpointing may leave a recomputed forward by an exception, behind the normalisation.
                # In front of the other hooks: of two recordings (an exception keeps a loop's alive), the inner ends
                # first.
                handles.append(layer.register_forward_hook(after, prepend=True, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in list(swapped):  # a forward that KeyboardInterrupt left
                _put_back(swapped, layer)

    def replay(self, micro_batches: int, room: Room) -> None:
        """Move the running statistics by what all ranks recorded. All ranks call it.

        `micro_batches`: of the largest share. `room`: what the ranks have found to need in the steps before.
        """
        with torch.no_grad():
            everyones = [self._records]
            if self._group is not None:
                everyones = self._exchanged(self._group, micro_batches, room)
            batches = [
                [moments for records in everyones for moments in records[number]] for number in range(len(self.layers))
            ]
            _move(self.layers, batches)

    def _exchanged(self, group: dist.ProcessGroup, micro_batches: int, room: Room) -> list[list[list[Moments]]]:
        """All ranks' records. The running statistics themselves become rank 0's, as by DDP's broadcast.

        A rank sends for each layer the number of its records and of the batches counted so far, then the running
        statistics, then the records.
        """
        device = _running(self.layers[0])[0].device
        sizes = [_moments_bytes(layer) for layer in self.layers]
        lengths = torch.tensor([len(records) for records in self._records], dtype=torch.int64)
        counted = [
            lengths.new_zeros(1) if layer.num_batches_tracked is None else layer.num_batches_tracked.view(1)
            for layer in self.layers
        ]
        running = [value for layer in self.layers for value in _running(layer)]
        recorded = [value for records in self._records for moments in records for value in moments]
        packed = [value.to(device).view(torch.uint8) for value in (lengths, *counted, *running, *recorded)]
        own = torch.cat(packed)
        header = 2 * lengths.nbytes
        fixed, capacity = header + sum(sizes), micro_batches * sum(sizes) * room.forwards
        copies = copies_of_ranks(_padded(own, fixed + capacity), group)
        numbers = copies[:, :header].reshape(-1).cpu().view(torch.int64).view(len(copies), 2, -1).tolist()
        needs = [sum(map(operator.mul, counts, sizes)) for counts, _ in numbers]
        if max(needs) > capacity:  # every rank sees it
            room.forwards = -(-max(needs) // (micro_batches * sum(sizes)))
            copies = copies_of_ranks(_padded(own, fixed + max(needs)), group)
        if dist.get_rank(group) != 0:
            self._take_over(numbers[0][1], copies[0, header:fixed])
        return [self._unpacked(copy[fixed:], counts) for copy, (counts, _) in zip(copies, numbers, strict=True)]

    def _take_over(self, counted: Sequence[int], packed: Tensor) -> None:
        """Make another rank's running statistics one's own."""
        theirs = self._unpacked(packed, [1] * len(self.layers))
        for layer, count, moments in zip(self.layers, counted, theirs, strict=True):
            torch._foreach_copy_(list(_running(layer)), list(moments[0]))
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(count)

    def _unpacked(self, packed: Tensor, counts: Sequence[int]) -> list[list[Moments]]:
        found: list[list[Moments]] = []
        start = 0
        for layer, count in zip(self.layers, counts, strict=True):
            mean, _ = _running(layer)
            stop = start + count * _moments_bytes(layer)
            # A copy, since the bytes may not lie as the dtype needs them.
            values = packed[start:stop].clone().view(mean.dtype).view(count, 2, mean.numel()).to(mean.device)
            found.append([(moments[0], moments[1]) for moments in values])
            start = stop
        return found


class Room:
    """How many forwards a layer and micro-batch the exchange has room for; the ranks change it alike."""

    def __init__(self) -> None:
        self.forwards = 1


def equal_buffers(model: nn.Module, tracked: bool) -> bool:
    """Whether all buffers of a model are running statistics that move alike on all ranks, with no broadcast.

    Those of batch norms that are synchronised over all ranks, in training, do; where they are `tracked`, those that
    `RunningStatistics` moves, too.
    """
    return all(
        (_is_synchronised(module) or (tracked and _is_tracked(module))) and names <= _STATISTICS
        for module in model.modules()
        # `buffers()` takes several times as long
        if (names := {name for name, buffer in module._buffers.items() if buffer is not None})
    )


def compiled_layers(model: nn.Module) -> bool:
    """Whether a layer with running statistics is in a compiled graph, which each step's hooks would compile anew."""
    compiled = [module for module in model.modules() if is_compiled(module)]
    return any(_is_tracked(layer) for module in compiled for layer in module.modules())


def _is_tracked(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm))
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
        and not is_lazy(module.running_mean)
    )


def _is_synchronised(module: nn.Module) -> bool:
    everyone = isinstance(module, SyncBatchNorm) and module.process_group in (None, dist.group.WORLD)
    return everyone and module.training


def _running(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None and layer.running_var is not None, "only such layers are kept"
    return layer.running_mean, layer.running_var


def _moments_bytes(layer: _BatchNorm) -> int:
    return sum(value.nbytes for value in _running(layer))


def _padded(packed: Tensor, size: int) -> Tensor:
    """The first `size` bytes, of which the last may not be anybody's."""
    if packed.numel() >= size:
        return packed[:size]
    return torch.cat([packed, packed.new_zeros(size - packed.numel())])


def _before_forward(swapped: dict[_BatchNorm, tuple[Any, ...]], layer: _BatchNorm, _: Any) -> None:
    if not layer.training:
        return
    mean, var = _running(layer)
    swapped[layer] = mean, var, layer.num_batches_tracked, layer.momentum
    layer.running_mean, layer.running_var = torch.zeros_like(mean), torch.full_like(var, _NOT_RUN)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked = torch.zeros_like(layer.num_batches_tracked)
    layer.momentum = 1.0


def _after_forward(
    swapped: dict[_BatchNorm, tuple[Any, ...]], records: list[Moments], layer: _BatchNorm, _: Any, output: Any
) -> None:
    if layer not in swapped:
        return
    mean, var = _running(layer)
    _put_back(swapped, layer)
    if output is not None or bool((var != _NOT_RUN).any()):
        records.append((mean, var))


def _put_back(swapped: dict[_BatchNorm, tuple[Any, ...]], layer: _BatchNorm) -> None:
    layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum = swapped.pop(layer)


def _move(layers: Sequence[_BatchNorm], batches: Sequence[Sequence[Moments]]) -> None:
    """Move each layer's running statistics by its batches', one after the other.

    In three roundings of their dtype: a fused multiply and add would give other bits on other processors.
    """
    counted = [layer.num_batches_tracked for layer in layers]
    before = [
        int(count) if count is not None and layer.momentum is None else 0
        for layer, count in zip(layers, counted, strict=True)
    ]
    for number in range(max(map(len, batches))):
        moving: list[Tensor] = []
        steps: list[Tensor] = []
        momenta: list[float] = []
        for layer, count, start, own in zip(layers, counted, before, batches, strict=True):
            momentum = layer.momentum
            if momentum is None:  # the mean over all batches; none, as in torch, where nobody counts them
                momentum = 1.0 / (start + number + 1) if count is not None else 0.0
            if number < len(own):
                moving += _running(layer)
                steps += own[number]
                momenta += [momentum, momentum]
        torch._foreach_mul_(moving, [1 - momentum for momentum in momenta])
        torch._foreach_add_(moving, torch._foreach_mul(steps, momenta))
    for count, own in zip(counted, batches, strict=True):
        if count is not None:
            count.add_(len(own))
