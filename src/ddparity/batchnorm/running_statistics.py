"""Running statistics of plain batch norms, updated as in one process: by all micro-batches, in their order."""

from __future__ import annotations

import itertools
import logging
import math
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.allreduce import copies_of_ranks
from ..compat import is_compiled
from .layer import SyncBatchNorm
from .norm_forwards import MOMENTA, MOVED, REPLACED, UNLIKE, Moments, NormForwards, adding, is_tracked

logger = logging.getLogger(__name__)

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_HEADER_WORDS = 3  # of a layer: the number of its records, their momentum, and the batches counted so far


class RunningStatistics:
    """Update the running statistics of a model's plain batch norms once a step, by the micro-batches of all ranks.

    Inside `recording`, each forward of a layer writes the batch's own statistics to copies of its buffers, with
    momentum 1. The real buffers do not change: every micro-batch of a step sees the running statistics of the step's
    start, also in a subclass that computes with them in training. Then `replay` updates them batch by batch in rank
    order, equally on all ranks:

        running = (1 - momentum) * running + momentum * statistics of the batch

    Every forward of a layer in training counts, as in one process: also a second one in the same micro-batch, one that
    activation checkpointing recomputes in the backward, and one of a layer that was in eval mode when the loop began.
    The momentum is that of these forwards. The class does not change layers without running statistics, synchronised
    layers, and norms that are not torch batch norms: no rank sends the buffers of these.

    Two kinds of layers cannot be kept, and have rank 0's statistics from then on: one that updates itself without a
    call of its hooks, as inside of a compiled function, and a subclass whose forward updates otherwise than torch's.
    The class finds them in their first step.

    Args:
        model: names its layers in errors. modules: those of its modules that have buffers.
        room: the same object in every step of the model.
        strict: raise an error where a layer cannot be kept.

    Collectives: `replay` runs one all-gather. A rank sends 24 bytes for each layer and, for the layers that ran in the
    last step on any rank (in the first step: for all), the bytes of the running means and variances, and these bytes
    again for each micro-batch of the rank that has most. In a step in which other layers run, or for the first time run
    more than once a micro-batch, there is one more all-gather. In a world of one there is no collective.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[nn.Module],
        group: dist.ProcessGroup | None,
        room: Room,
        strict: bool = False,
    ) -> None:
        self._model, self._group, self._room, self._strict = model, group, room, strict
        self._layers = {module: None for module in modules if is_tracked(module) and module not in room.lost}
        self._forwards: list[NormForwards] = []
        self._numbers: list[int] = []

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._layers)

    def __contains__(self, module: object) -> bool:
        return module in self._layers

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forwards inside the context. On exit, also by an exception, the layers are as before."""
        self._forwards = [NormForwards(layer, self._room.checked) for layer in self._layers]
        in_graphs = self._room.in_graphs
        in_graphs.update(_compiled_layers(self._model))
        try:
            for one in self._forwards:
                if one.layer not in in_graphs:  # a hook would be compiled again in each step
                    one.hook(adding(in_graphs, one.layer))
            yield
        finally:
            for one in self._forwards:
                one.end()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget the forwards inside the context, within `recording`. The caller puts the buffers back."""
        before = [(one, len(one.records), one.moved()) for one in self._forwards]
        try:
            yield
        finally:
            for one, length, moved in before:
                one.cut(length)
                if not moved:
                    one.begin()

    def count(self) -> None:
        """Count the batches of each layer, after the loop and before any model's `replay`: models may share a layer."""
        self._numbers = [one.number() for one in self._forwards]

    def moved(self) -> bool:
        """Return True if a layer has run on this rank, after `count`."""
        return any(self._numbers)

    def replay(self, micro_batches: int) -> bool:
        """Update the running statistics by what all ranks recorded. All ranks call it, after `count`.

        Args:
            micro_batches: the largest number of micro-batches that a rank has in this step.

        Returns:
            Whether the running statistics of all layers are equal on all ranks.

        Raises:
            RuntimeError: a layer's momentum has changed inside of the loop or differs between ranks, or its buffers
                were replaced; on every rank.
            ValueError: strict, and a layer cannot be kept; on every rank.
        """
        with torch.no_grad():
            numbers = self._numbers
            records = [one.records if number > 0 else [] for one, number in zip(self._forwards, numbers, strict=True)]
            momenta = [math.inf if one.momentum is None else float(one.momentum) for one in self._forwards]
            everyones, numbers_of, momenta_of = [records], [numbers], [momenta]
            if self._group is not None:
                everyones, numbers_of, momenta_of = self._gather(self._group, micro_batches, numbers, momenta, records)
            kept, batches, used, lost = [], [], [], []
            for position, one in enumerate(self._forwards):
                its = [of_rank[position] for of_rank in numbers_of]
                found = {m[position] for m, number in zip(momenta_of, its, strict=True) if number > 0}
                state = MOMENTA if len(found) > 1 else min(its)
                if state < 0:
                    lost.append((one.layer, state))
                elif found:
                    kept.append(one)
                    batches.append([moments for of_rank in everyones for moments in of_rank[position]])
                    (momentum,) = found
                    used.append(None if momentum == math.inf else momentum)
            if lost:
                self._lose(lost)
            _update(kept, batches, used)
        return not lost

    def _lose(self, lost: Sequence[tuple[nn.Module, int]]) -> None:
        """Raise an error for layers that cannot be kept, or leave them to rank 0 from now on. The same on all ranks."""
        layer, state = min(lost, key=operator.itemgetter(1))
        name = next((name for name, module in self._model.named_modules() if module is layer), "a batch norm")
        if state == MOMENTA:
            raise RuntimeError(
                f"accumulate(): the momentum of {name} changes inside of the loop over the micro-batches, or differs "
                f"between ranks: set it before the step's first forward, on all ranks alike"
            )
        if state == REPLACED:
            raise RuntimeError(
                f"accumulate(): the running statistics of {name} were replaced by other tensors inside of the loop "
                f"over the micro-batches: do it before the loop, or copy into them after it"
            )
        self._room.lost.update(layer for layer, _ in lost)
        problem = _PROBLEMS[state].format(name=name, kind=type(layer).__name__)
        if self._strict:
            raise ValueError(
                f"accumulate(): {problem}: {_WAYS_OUT[state]}, or take rank 0's running statistics, by "
                f'replicate(model, reduction="strict", batchnorm_statistics="rank0")'
            )
        if not self._room.told and dist.get_rank(self._group) == 0:
            logger.warning("%s: its running statistics are rank 0's. This is said once", problem)
        self._room.told = True

    def _gather(
        self,
        group: dist.ProcessGroup,
        micro_batches: int,
        numbers: list[int],
        momenta: list[float],
        records: list[list[Moments]],
    ) -> tuple[list[list[list[Moments]]], list[list[int]], list[list[float]]]:
        """Return the records, numbers and momenta of all ranks, by rank and layer. Set the statistics to rank 0's.

        A rank sends a header of all layers. Of the layers that ran in the last step, on any rank, follow the running
        statistics, then the records. Where that is too little, all ranks send again.
        """
        room, count = self._room, len(self._forwards)
        running = [one.running for one in self._forwards]
        sizes = [sum(value.nbytes for value in moments) for moments in running]
        device = running[0][0].device
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        counted = [zero if one.counted is None else one.counted.view(1).to(device) for one in self._forwards]
        own = torch.cat([torch.tensor(numbers), torch.tensor(momenta, dtype=torch.float64).view(torch.int64)])
        header = torch.cat(_pack([(own, torch.cat(counted))], device))
        start = header.numel()

        def exchanged(layers: list[int], capacity: int) -> Tensor:
            theirs = [moments for layer in layers for moments in records[layer]]
            packed = [header, *_pack([running[layer] for layer in layers], device), *_pack(theirs, device)]
            return copies_of_ranks(
                _resized(torch.cat(packed), start + sum(sizes[layer] for layer in layers) + capacity), group
            )

        layers = [layer for layer in range(count) if room.layers is None or layer in room.layers]
        capacity = micro_batches * room.forwards * sum(sizes[layer] for layer in layers)
        copies = exchanged(layers, capacity)
        words = copies[:, :start].reshape(-1).cpu().view(torch.int64).view(len(copies), _HEADER_WORDS, count)
        numbers_of: list[list[int]] = words[:, 0].tolist()
        momenta_of: list[list[float]] = words[:, 1].contiguous().view(torch.float64).tolist()
        counts = [[max(number, 0) for number in of_rank] for of_rank in numbers_of]
        needs = max(sum(map(operator.mul, of_rank, sizes)) for of_rank in counts)
        ran = [layer for layer in range(count) if any(of_rank[layer] for of_rank in counts)]
        # The same on every rank, as all that follows.
        if needs > capacity or not set(ran) <= set(layers):
            layers, capacity = ran, needs
            copies = exchanged(layers, capacity)
        room.layers = set(ran)
        if ran:
            room.forwards = max(room.forwards, -(-needs // (micro_batches * sum(sizes[layer] for layer in ran))))
        like = [running[layer] for layer in layers]
        stop = start + sum(sizes[layer] for layer in layers)
        if dist.get_rank(group) != 0 and layers:
            chosen = [self._forwards[layer] for layer in layers]
            _copy_from_rank_0(like, [one.counted for one in chosen], copies[0, start:stop], words[0, 2, layers])
        everyones = []
        for copy, of_rank in zip(copies, counts, strict=True):
            found = dict(zip(layers, _unpack(copy[stop:], like, [of_rank[layer] for layer in layers]), strict=True))
            everyones.append([found.get(layer, []) for layer in range(count)])
        return everyones, numbers_of, momenta_of


_PROBLEMS = {
    MOVED: "{name} has updated its running statistics by itself, as a batch norm inside of a compiled graph does, and "
    "one whose forward() is called without its hooks",
    UNLIKE: "{name} is a {kind}, whose forward does not update running statistics once, by "
    "(1 - momentum) * running + momentum * statistics of the batch",
}
_WAYS_OUT = {
    MOVED: "compile parts without batch norms, and call the layer as a module",
    UNLIKE: "use a batch norm of torch",
}


class Room:
    """What is kept of a model's running statistics between steps.

    Attributes:
        forwards: for each layer and micro-batch, so many fit into the message. layers: the numbers of the layers that
            do; None for all. lost: the layers that cannot be kept. These are equal on all ranks.
        checked: see `NormForwards`. in_graphs: layers that a compiler has seen on this rank. told: a warning was given.
    """

    def __init__(self) -> None:
        self.forwards = 1
        self.layers: set[int] | None = None
        self.lost: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.in_graphs: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.told = False


def equal_buffers(modules: Iterable[nn.Module], statistics: RunningStatistics | None) -> bool:
    """Return True if all buffers of a model's modules stay equal on all ranks without a broadcast.

    These are the running statistics of batch norms in training that are synchronised over all ranks, and those that
    `statistics` updates.
    """
    return all(
        (_is_synchronised(module) or (statistics is not None and module in statistics)) and names <= _STATISTICS
        for module in modules
        # `module.buffers()` takes several times as long as `_buffers`.
        if (names := {name for name, buffer in module._buffers.items() if buffer is not None})
    )


def _compiled_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers with running statistics inside of modules that `torch.compile` compiles."""
    compiled = [module for module in model.modules() if is_compiled(module)]
    return [layer for module in compiled for layer in module.modules() if is_tracked(layer)]


def _is_synchronised(module: nn.Module) -> bool:
    over_all_ranks = isinstance(module, SyncBatchNorm) and module.process_group in (None, dist.group.WORLD)
    return over_all_ranks and module.training


# --- the message of a rank ---


def _pack(values: Sequence[Moments], device: torch.device) -> list[Tensor]:
    """Return the bytes of the values, in their order, as uint8 tensors on the device."""
    groups = itertools.groupby(itertools.chain.from_iterable(values), key=_dtype_and_device)
    return [torch.cat(list(group)).view(torch.uint8).to(device) for _, group in groups]


def _unpack(packed: Tensor, like: Sequence[Moments], counts: Sequence[int]) -> list[list[Moments]]:
    """Return the moments that `_pack` packed: for each layer of `like`, as many as `counts` says."""
    unpacked: list[list[Moments]] = []
    start = 0
    groups = itertools.groupby(zip(like, counts, strict=True), key=lambda pair: _dtype_and_device(pair[0][0]))
    for (dtype, device), group in groups:
        layers = [(mean.numel(), count) for (mean, _), count in group]
        stop = start + sum(2 * channels * count for channels, count in layers) * dtype.itemsize
        # clone: the bytes may not be aligned as the dtype needs.
        flat = packed[start:stop].clone().view(dtype).to(device)
        values = iter(flat.split([channels for channels, count in layers for _ in range(2 * count)]))
        unpacked += [[(next(values), next(values)) for _ in range(count)] for _, count in layers]
        start = stop
    return unpacked


def _dtype_and_device(value: Tensor) -> tuple[torch.dtype, torch.device]:
    return value.dtype, value.device


def _resized(packed: Tensor, size: int) -> Tensor:
    """Return the first `size` bytes, with zeros at the end if there are fewer."""
    if packed.numel() >= size:
        return packed[:size]
    return torch.cat([packed, packed.new_zeros(size - packed.numel())])


def _copy_from_rank_0(
    running: Sequence[Moments], tracked: Sequence[Tensor | None], packed: Tensor, counted: Tensor
) -> None:
    """Overwrite this rank's running statistics and batch counts by those of rank 0."""
    received = [moments for (moments,) in _unpack(packed, running, [1] * len(running))]
    torch._foreach_copy_(list(itertools.chain(*running)), list(itertools.chain(*received)))
    pairs = [(own, count) for own, count in zip(tracked, counted.unbind(), strict=True) if own is not None]
    if pairs:
        torch._foreach_copy_([own for own, _ in pairs], [count for _, count in pairs])


def _update(
    layers: Sequence[NormForwards], batches: Sequence[Sequence[Moments]], momenta: Sequence[float | None]
) -> None:
    """Update each layer's running statistics by its batches, one after the other.

    Each update rounds three times to the buffers' dtype. A fused multiply-add would give other bits on other
    processors. Layers with the same dtype, device, momentum and number of batches are updated together.
    """
    groups: dict[Any, list[tuple[Moments, Sequence[Moments]]]] = {}
    tracked, numbers = [], []
    for layer, recorded, momentum in zip(layers, batches, momenta, strict=True):
        running, count = layer.running, layer.counted
        before = None
        if count is not None:
            before = int(count) if momentum is None else None
            tracked.append(count)
            numbers.append(len(recorded))
        key = (_dtype_and_device(running[0]), momentum, before, len(recorded))
        groups.setdefault(key, []).append((running, recorded))
    for (_, momentum, before, number), members in groups.items():
        values = [value for running, _ in members for value in running]
        updated = torch.cat(values)
        for position in range(number):
            factor = momentum
            if factor is None:  # the mean over all batches; as in torch, no update if the batches are not counted
                factor = 0.0 if before is None else 1.0 / (before + position + 1)
            batch = torch.cat([value for _, recorded in members for value in recorded[position]])
            updated.mul_(1 - factor).add_(batch.mul_(factor))
        if number:
            torch._foreach_copy_(values, updated.split([value.numel() for value in values]))
    if tracked:
        torch._foreach_add_(tracked, numbers)
