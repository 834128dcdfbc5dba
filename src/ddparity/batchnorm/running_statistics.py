"""Running statistics of plain batch norms: those of all micro-batches, in the order in which one process runs them."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..comm.allreduce import copies_of_ranks
from ..compat import is_compiled
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

    Collectives: `replay` runs one exchange, of 16 bytes a layer, the bytes of the running means and variances, and
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
        running = [_running(layer) for layer in self.layers]
        tracked = [layer.num_batches_tracked for layer in self.layers]
        device = running[0][0].device
        sizes = [sum(value.nbytes for value in own) for own in running]
        lengths = torch.tensor([len(records) for records in self._records])
        none = torch.zeros(1, dtype=torch.int64, device=device)
        counted = torch.cat([none if count is None else count.view(1).to(device) for count in tracked])
        recorded = [moments for records in self._records for moments in records]
        own = torch.cat([*_bytes([(lengths, counted)], device), *_bytes(running, device), *_bytes(recorded, device)])
        header = 2 * lengths.nbytes
        fixed, capacity = header + sum(sizes), micro_batches * sum(sizes) * room.forwards
        copies = copies_of_ranks(_padded(own, fixed + capacity), group)
        numbers = copies[:, :header].reshape(-1).cpu().view(torch.int64).view(len(copies), 2, -1)
        counts = numbers[:, 0].tolist()
        needs = [sum(map(operator.mul, numbers_of_rank, sizes)) for numbers_of_rank in counts]
        if max(needs) > capacity:  # every rank sees it
            room.forwards = -(-max(needs) // (micro_batches * sum(sizes)))
            copies = copies_of_ranks(_padded(own, fixed + max(needs)), group)
        if dist.get_rank(group) != 0:
            _take_over(running, tracked, copies[0, header:fixed], numbers[0, 1])
        return [_from_bytes(copy[fixed:], running, its) for copy, its in zip(copies, counts, strict=True)]


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


def _bytes(values: Sequence[Moments], device: torch.device) -> list[Tensor]:
    """The values' bytes, one after the other, on the device."""
    kinds = itertools.groupby(itertools.chain.from_iterable(values), key=_kind)
    return [torch.cat(list(alike)).view(torch.uint8).to(device) for _, alike in kinds]


def _from_bytes(packed: Tensor, like: Sequence[Moments], counts: Sequence[int]) -> list[list[Moments]]:
    """What `_bytes` packed, as many for each of `like` as `counts` says."""
    found: list[list[Moments]] = []
    start = 0
    for (dtype, device), alike in itertools.groupby(zip(like, counts, strict=True), key=lambda pair: _kind(pair[0][0])):
        layers = [(mean.numel(), count) for (mean, _), count in alike]
        stop = start + sum(2 * channels * count for channels, count in layers) * dtype.itemsize
        # A copy, since the bytes may not lie as the dtype needs them.
        flat = packed[start:stop].clone().view(dtype).to(device)
        values = iter(flat.split([channels for channels, count in layers for _ in range(2 * count)]))
        found += [[(next(values), next(values)) for _ in range(count)] for _, count in layers]
        start = stop
    return found


def _kind(value: Tensor) -> tuple[torch.dtype, torch.device]:
    return value.dtype, value.device


def _take_over(running: Sequence[Moments], tracked: Sequence[Tensor | None], packed: Tensor, counted: Tensor) -> None:
    """Make another rank's running statistics one's own."""
    theirs = [moments for (moments,) in _from_bytes(packed, running, [1] * len(running))]
    torch._foreach_copy_(list(itertools.chain(*running)), list(itertools.chain(*theirs)))
    both = [(own, their) for own, their in zip(tracked, counted.unbind(), strict=True) if own is not None]
    if both:
        torch._foreach_copy_([own for own, _ in both], [their for _, their in both])


def _padded(packed: Tensor, size: int) -> Tensor:
    """The first `size` bytes, of which the last may not be anybody's."""
    if packed.numel() >= size:
        return packed[:size]
    return torch.cat([packed, packed.new_zeros(size - packed.numel())])


def _before_forward(swapped: dict[_BatchNorm, tuple[Any, ...]], layer: _BatchNorm, _: Any) -> None:
    if not layer.training:
        return
    mean, var = _running(layer)
    count = layer.num_batches_tracked
    swapped[layer] = mean, var, count, layer.momentum
    none = None if count is None else torch.zeros_like(count)
    _put(layer, torch.zeros_like(mean), torch.full_like(var, _NOT_RUN), none, 1.0)


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
    _put(layer, *swapped.pop(layer))


def _put(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor | None, momentum: float | None) -> None:
    buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    if buffers.keys() <= layer._buffers.keys():
        layer._buffers.update(buffers)  # Module.__setattr__ takes as long as a small layer's forward
    else:  # somebody made them something else
        for name, value in buffers.items():
            if value is not None:
                setattr(layer, name, value)
    layer.momentum = momentum


def _move(layers: Sequence[_BatchNorm], batches: Sequence[Sequence[Moments]]) -> None:
    """Move each layer's running statistics by its batches', one after the other.

    In three roundings of their dtype: a fused multiply and add would give other bits on other processors.
    """
    alike: dict[Any, list[tuple[Moments, Sequence[Moments]]]] = {}
    present, numbers = [], []
    for layer, own in zip(layers, batches, strict=True):
        running, count, momentum = _running(layer), layer.num_batches_tracked, layer.momentum
        before = None
        if count is not None:
            before = int(count) if momentum is None else None
            present.append(count)
            numbers.append(len(own))
        alike.setdefault((_kind(running[0]), momentum, before, len(own)), []).append((running, own))
    for (_, momentum, before, number), members in alike.items():
        values = [value for running, _ in members for value in running]
        moving = torch.cat(values)
        for position in range(number):
            part = momentum
            if part is None:  # the mean over all batches; none, as in torch, where nobody counts them
                part = 0.0 if before is None else 1.0 / (before + position + 1)
            steps = torch.cat([value for _, own in members for value in own[position]])
            moving.mul_(1 - part).add_(steps.mul_(part))
        if number:
            torch._foreach_copy_(values, moving.split([value.numel() for value in values]))
    if present:
        torch._foreach_add_(present, numbers)
