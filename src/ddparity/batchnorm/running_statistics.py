"""Running statistics of plain batch norms, updated as in one process: by all micro-batches, in their order."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..comm.allreduce import copies_of_ranks
from ..compat import is_compiled, recomputation_ended
from .layer import SyncBatchNorm

Moments = tuple[Tensor, Tensor]  # the mean and the unbiased variance of one batch
LayerState = tuple[Tensor, Tensor, Tensor | None, float | None]  # running mean and variance, batch count, momentum
Saved = tuple[LayerState, Moments]  # and the copies that a forward writes to

_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class RunningStatistics:
    """Update the running statistics of a model's plain batch norms once a step, by the micro-batches of all ranks.

    Inside `recording`, each forward of a layer writes the batch's own statistics to copies of its buffers, with
    momentum 1. The real buffers do not change: every micro-batch of a step sees the running statistics of the step's
    start, also in a subclass that computes with them in training. Then `replay` updates them batch by batch in rank
    order, equally on all ranks:

        running = (1 - momentum) * running + momentum * statistics of the batch

    Every forward of a layer counts, as in one process: also a second one in the same micro-batch, and one that
    activation checkpointing recomputes in the backward. The class does not change layers in eval mode, layers without
    running statistics, synchronised layers, and norms that are not torch batch norms: no rank sends the buffers of
    these.

    Collectives: `replay` runs one all-gather. A rank sends 16 bytes for each layer, the bytes of the running means and
    variances, and these bytes again for each micro-batch of the rank that has most. In the first step in which a rank
    runs its layers more than once a micro-batch, there is one more all-gather. In a world of one, or without such a
    layer, there is no collective.
    """

    def __init__(self, modules: Iterable[nn.Module], group: dist.ProcessGroup | None) -> None:
        self.layers = [module for module in modules if _is_tracked(module) and module.training]
        self._group = group
        self._records: list[list[Moments]] = [[] for _ in self.layers]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forwards inside the context. On exit, also by an exception, the layers are as before."""
        saved: dict[_BatchNorm, Saved] = {}
        handles = []
        try:
            for layer, records in zip(self.layers, self._records, strict=True):
                handles.append(layer.register_forward_pre_hook(functools.partial(_before_forward, saved)))
                after = functools.partial(_after_forward, saved, records)
                # always_call: checkpointing may end a recomputed forward by an exception after the normalisation.
                # prepend: two contexts can be active, as an exception may keep the loop of the first one alive. The
                # inner context must then end first.
                handles.append(layer.register_forward_hook(after, prepend=True, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in list(saved):  # KeyboardInterrupt ends a forward without the hook
                _restore(saved, layer)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget the forwards inside the context, within `recording`."""
        lengths = [len(records) for records in self._records]
        try:
            yield
        finally:
            for records, length in zip(self._records, lengths, strict=True):
                del records[length:]

    def moved(self) -> bool:
        """Return True if a layer has run on this rank since the recording began."""
        return any(self._records)

    def replay(self, micro_batches: int, room: Room) -> None:
        """Update the running statistics by what all ranks recorded. All ranks call it.

        Args:
            micro_batches: the largest number of micro-batches that a rank has in this step.
            room: how many forwards fit into the message; the same object in every step.
        """
        with torch.no_grad():
            of_ranks = [self._records]
            if self._group is not None:
                of_ranks = self._gather(self._group, micro_batches, room)
            batches = [
                [moments for records in of_ranks for moments in records[number]] for number in range(len(self.layers))
            ]
            _update(self.layers, batches)

    def _gather(self, group: dist.ProcessGroup, micro_batches: int, room: Room) -> list[list[list[Moments]]]:
        """Return the records of all ranks, by rank and layer. Set the running statistics to rank 0's, as DDP does.

        A rank sends for each layer the number of its records and of the batches counted so far, then the running
        statistics, then the records.
        """
        running = [_running(layer) for layer in self.layers]
        tracked = [layer.num_batches_tracked for layer in self.layers]
        device = running[0][0].device
        sizes = [sum(value.nbytes for value in moments) for moments in running]
        lengths = torch.tensor([len(records) for records in self._records])
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        counted = torch.cat([zero if count is None else count.view(1).to(device) for count in tracked])
        recorded = [moments for records in self._records for moments in records]
        own = torch.cat([*_pack([(lengths, counted)], device), *_pack(running, device), *_pack(recorded, device)])
        header = 2 * lengths.nbytes
        fixed, capacity = header + sum(sizes), micro_batches * sum(sizes) * room.forwards
        copies = copies_of_ranks(_resized(own, fixed + capacity), group)
        numbers = copies[:, :header].reshape(-1).cpu().view(torch.int64).view(len(copies), 2, -1)
        counts = numbers[:, 0].tolist()
        needs = [sum(map(operator.mul, counts_of_rank, sizes)) for counts_of_rank in counts]
        if max(needs) > capacity:  # the same on every rank
            room.forwards = -(-max(needs) // (micro_batches * sum(sizes)))
            copies = copies_of_ranks(_resized(own, fixed + max(needs)), group)
        if dist.get_rank(group) != 0:
            _copy_from_rank_0(running, tracked, copies[0, header:fixed], numbers[0, 1])
        return [_unpack(copy[fixed:], running, its) for copy, its in zip(copies, counts, strict=True)]


class Room:
    """The number of forwards for each layer and micro-batch that fit into the message; equal on all ranks."""

    def __init__(self) -> None:
        self.forwards = 1


def equal_buffers(modules: Iterable[nn.Module], tracked: bool) -> bool:
    """Return True if all buffers of a model's modules stay equal on all ranks without a broadcast.

    These are the running statistics of batch norms in training that are synchronised over all ranks. If `tracked`, they
    also include the running statistics that `RunningStatistics` updates.
    """
    return all(
        (_is_synchronised(module) or (tracked and _is_tracked(module))) and names <= _STATISTICS
        for module in modules
        # `module.buffers()` takes several times as long as `_buffers`.
        if (names := {name for name, buffer in module._buffers.items() if buffer is not None})
    )


def compiled_layers(model: nn.Module) -> bool:
    """Return True if a compiled graph contains a layer with running statistics. Hooks would recompile it each step."""
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
    over_all_ranks = isinstance(module, SyncBatchNorm) and module.process_group in (None, dist.group.WORLD)
    return over_all_ranks and module.training


def _running(layer: _BatchNorm) -> Moments:
    assert layer.running_mean is not None and layer.running_var is not None, "_is_tracked selected the layer"
    return layer.running_mean, layer.running_var


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


# --- the hooks of a layer ---


def _before_forward(saved: dict[_BatchNorm, Saved], layer: _BatchNorm, _: Any) -> None:
    """Replace the layer's buffers by copies, which a forward of the user's own may read, and set momentum to 1."""
    if not layer.training:
        return
    mean, var = _running(layer)
    count = layer.num_batches_tracked
    copies = mean.clone(), var.clone()
    saved[layer] = (mean, var, count, layer.momentum), copies
    _set_state(layer, *copies, None if count is None else count.clone(), 1.0)


def _after_forward(
    saved: dict[_BatchNorm, Saved], records: list[Moments], layer: _BatchNorm, _inputs: Any, output: Any
) -> None:
    """Record the batch's statistics, if the forward wrote them, and put the layer's own buffers back."""
    if layer not in saved:
        return
    before = saved[layer]
    after, count = _running(layer), layer.num_batches_tracked
    _restore(saved, layer)
    # Momentum 1 leaves exactly the batch's statistics. A frozen layer, and one that failed before, writes nothing.
    if _wrote(before, after, count, failed=output is None and not recomputation_ended()):
        records.append(after)


def _wrote(before: Saved, after: Moments, count: Tensor | None, failed: bool) -> bool:
    """Return True if a forward wrote new running statistics.

    torch's batch norm writes into the tensors without a new version of them, but the layer counts the batch in the
    line before. Where that says nothing, compare the values; a device must then be waited for.
    """
    (mean, var, *_), copies = before
    counts = not copies[0].is_inference()  # torch.inference_mode() makes copies that count no writes
    if any(new is not old or (counts and new._version) for new, old in zip(after, copies, strict=True)):
        return True
    if count is not None and counts and not failed:
        return count._version > 0
    return not (torch.equal(after[0], mean) and torch.equal(after[1], var))


def _restore(saved: dict[_BatchNorm, Saved], layer: _BatchNorm) -> None:
    state, _ = saved.pop(layer)
    _set_state(layer, *state)


def _set_state(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor | None, momentum: float | None) -> None:
    buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    if buffers.keys() <= layer._buffers.keys():
        layer._buffers.update(buffers)  # Module.__setattr__ takes as long as the forward of a small layer
    else:  # the user replaced a buffer by another attribute
        for name, value in buffers.items():
            if value is not None:
                setattr(layer, name, value)
    layer.momentum = momentum


def _update(layers: Sequence[_BatchNorm], batches: Sequence[Sequence[Moments]]) -> None:
    """Update each layer's running statistics by its batches, one after the other.

    Each update rounds three times to the buffers' dtype. A fused multiply-add would give other bits on other
    processors. Layers with the same dtype, device, momentum and number of batches are updated together.
    """
    groups: dict[Any, list[tuple[Moments, Sequence[Moments]]]] = {}
    tracked, numbers = [], []
    for layer, recorded in zip(layers, batches, strict=True):
        running, count, momentum = _running(layer), layer.num_batches_tracked, layer.momentum
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
