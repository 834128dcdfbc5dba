"""Sum and average gradients and small numbers over the ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from .. import system
from ..compat import all_gather_single, all_to_all_single, compares_calls, flatten, grad_dtype, unflatten
from .buffers import Buffers

# Gloo's all-gather passes a tensor from rank to rank, in two messages each. Its all-to-all sends as many bytes, but
# directly and in one message. An all-to-all with a local sum is also faster than the all-reduce, as long as the bytes
# of one rank and those of all ranks together stay below these limits. Measured alone it is faster up to a quarter or
# half of them (benchmarks/collectives.py), in a training step up to these limits (benchmarks/step_overhead.py). It
# sends large tensors slower than the link allows (benchmarks/strict.py).
SHORT_BYTES = 2**19
SHORT_BYTES_OF_ALL = 2**21

PART_BYTES = 2**25  # of gradients, or somewhat more, that are copied into one tensor
YIELDS = 400  # before a rank that waits for a small exchange goes to sleep; about a microsecond each


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum of a tensor over the ranks; the tensor itself may be overwritten.

    Collectives: one, of the tensor's bytes; all ranks call it.
    """
    total, finish = _start(tensor, group, average=False)
    finish()
    return total


def mean_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the mean of a tensor over the ranks, perhaps in place; one collective of its bytes. All ranks call it.

    As DDP does, a large tensor is divided before the sum, so that float16 does not overflow.
    """
    mean, finish = _start(tensor, group, average=True)
    finish()
    return mean


def _start(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, average: bool
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Return the tensor of the sum or the mean, and what waits for its values.

    Of a short tensor the copies are on their way meanwhile. They are added in rank order: the same bits on every rank.
    """
    if not gathers(tensor.numel(), tensor, group):
        dist.all_reduce(tensor.div_(_size(group)) if average else tensor, group=group)
        return tensor, lambda: None
    if average and tensor.dtype == torch.float16:
        tensor, average = tensor / _size(group), False
    total, arrive = torch.empty_like(tensor), _start_copies(tensor, group)

    def finish() -> None:
        copies = arrive()
        if 2 <= len(copies) <= 8:
            torch.add(copies[0], copies[1], out=total)  # in half of the time of sum(0)
            for copy in copies[2:]:
                total.add_(copy)
        else:
            torch.sum(torch.stack(tuple(copies)), 0, out=total)
        if average:
            total.div_(len(copies))

    return total, finish


def start_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Start to sum a tensor over the ranks, in place; return the work to wait for. All ranks call it."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None, "this rank is in the group"
    return work


def parts_of_sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return tensors, of shape (parts, *shape), whose sum over the first dimension is the sum over the ranks.

    For callers that add up the parts themselves. Collectives as `sum_over_ranks`.
    """
    if gathers(tensor.numel(), tensor, group):
        return copies_of_ranks(tensor, group)
    return sum_over_ranks(tensor, group).unsqueeze(0)


def copies_of_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the ranks' tensors, which have one shape and dtype, as (world size, *shape).

    Collectives: one, which sends a rank's bytes to each other rank; all ranks call it. It is an all-gather, or for
    short tensors on the CPU an all-to-all.
    """
    ranks = _size(group)
    if tensor.is_complex():  # Gloo has no complex numbers
        return torch.view_as_complex(copies_of_ranks(torch.view_as_real(tensor.resolve_conj()), group))
    if tensor.dim() != 1:
        return copies_of_ranks(tensor.reshape(-1), group).view(ranks, *tensor.shape)
    if _is_short(tensor):
        return torch.stack(tuple(_start_copies(tensor, group)()))
    copies = tensor.new_empty(ranks * tensor.numel())
    work = all_gather_single(copies, tensor.contiguous(), group, async_op=tensor.is_cpu)
    if work is not None:
        _wait(work)
    return copies.view(ranks, tensor.numel())


def _start_copies(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> Callable[[], Sequence[torch.Tensor]]:
    """Return what waits for the ranks' tensors, in rank order; this rank's own is the tensor itself.

    As `copies_of_ranks`; only the all-to-all of a short tensor of one dimension is on its way meanwhile.
    """
    if tensor.dim() != 1 or tensor.is_complex() or not _is_short(tensor):
        return copies_of_ranks(tensor, group).unbind
    ranks = _size(group)
    if ranks == 1:
        return lambda: [tensor]
    rank = dist.get_rank() if group is None else group.rank()
    rows = [1] * ranks  # one for each other rank: from the width the launcher sees where ranks differ
    rows[rank] = 0
    sent = tensor.unsqueeze(0) if ranks == 2 else tensor.repeat(ranks - 1, 1)
    received = torch.empty_like(sent)
    work = all_to_all_single(received, sent, rows, group)

    def arrive() -> Sequence[torch.Tensor]:
        _wait(work)
        copies = list(received.unbind())
        copies.insert(rank, tensor)
        return copies

    return arrive


def _is_short(tensor: torch.Tensor) -> bool:
    """Return whether an all-to-all is faster than an all-gather."""
    short = tensor.is_cpu and 0 < tensor.numel() * tensor.element_size() <= SHORT_BYTES
    return short and not compares_calls()  # torch compares an all-gather's sizes, not an all-to-all's


def _wait(work: dist.Work) -> None:
    """Wait until an exchange is done: yield the core for less than half a millisecond of its time, then sleep.

    If all ranks call at the same time, the exchange is done soon. Sleeping and waking up would take as long as the
    exchange itself (benchmarks/RESULTS.md, "Scheduling"). Ranks that share a core must not yield for longer: each
    would keep the core from the other.
    """
    # Not work.is_completed(): it holds Python's lock while it waits for another lock. A profiler may hold that one
    # while it waits for Python's.
    done = work.get_future().done
    for _ in range(YIELDS if system.YIELDS else 0):
        if done():
            break
        system.yield_core()
    work.wait()


def exchange(
    sent: Sequence[Sequence[torch.Tensor]], received: Sequence[Sequence[torch.Tensor]], group: dist.ProcessGroup
) -> None:
    """As `start_exchange`, to its end."""
    for work in start_exchange(sent, received, group):
        work.wait()


def start_exchange(
    sent: Sequence[Sequence[torch.Tensor]],
    received: Sequence[Sequence[torch.Tensor]],
    group: dist.ProcessGroup,
    tag: int = 0,
) -> list[dist.Work]:
    """Send the tensors `sent[i]` to rank i of the group, and fill those of `received[i]` from rank i, all at once.

    This rank's own tensors are not touched, and an empty tensor is not sent. Gloo's own all-to-all and all-gather take
    longer, especially the all-to-all over a slow link (benchmarks/strict.py). Gloo matches messages by their tag.

    Collectives: none; a point-to-point message for each tensor. All ranks call it, with numbers and sizes that agree.
    """
    rank, world_size = dist.get_rank(group), len(sent)
    operations = []
    for distance in range(1, world_size):
        source, target = (rank - distance) % world_size, (rank + distance) % world_size
        for move, tensors, peer in ((dist.irecv, received[source], source), (dist.isend, sent[target], target)):
            for tensor in tensors:
                if tensor.numel():
                    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                    operations.append(dist.P2POp(move, parts, dist.get_global_rank(group, peer), group, tag))
    return dist.batch_isend_irecv(operations) if operations else []


def reduce_gradients(
    parameters: Iterable[torch.Tensor],
    group: dist.ProcessGroup | None,
    average: bool,
    buffers: Buffers,
    sparse: Container[int] = (),
) -> None:
    """Average the gradients over the ranks, or sum them, in place.

    Collectives: for each dtype and device, and for each 32 MiB of it, one of the gradients' bytes and of one number a
    parameter, which says whether any rank has a gradient. A parameter without one on every rank keeps None. One for
    each parameter whose gradient is sparse. All ranks call it, with the same parameters.

    Args:
        sparse: ids of the parameters whose gradients are sparse, the same parameters on every rank.

    Raises:
        TypeError: another gradient is sparse.
    """
    listed = list(parameters)
    separate(listed)
    dense = [one for one in listed if id(one) not in sparse] if sparse else listed
    for part in cut(dense, PART_BYTES):
        if gathers(len(part) + sum(one.numel() for one in part), part[0], group):
            flat = FlatGradients(part)
            reduced, finish = _start(flat.tensor, group, average)
            write = flat.writes(reduced)  # while the copies are on their way
            finish()
            write()
        else:
            flat = FlatGradients(part, _size(group) if average else 1, buffers)
            dist.all_reduce(flat.tensor, group=group)
            flat.writes(flat.tensor)()
    if sparse:
        for one in listed:
            if id(one) in sparse:
                _reduce_sparse(one, group, average)


def separate(parameters: Sequence[torch.Tensor]) -> None:
    """Give each gradient memory of its own, and no graph: `own_memory`."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter, old, new in zip(parameters, gradients, own_memory(gradients), strict=True):
        if new is not old:
            parameter.grad = new


def own_memory(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return gradients without their graphs, and copies of those that share memory, so that each can be written alone.

    `autograd.grad` may give two parameters one tensor, or one with strides of 0. A graph would be this rank's alone.
    """
    found: list[torch.Tensor | None] = []
    addresses: set[int] = set()
    for gradient in gradients:
        if gradient is not None and gradient.layout == torch.strided:
            if gradient.requires_grad:
                gradient = gradient.detach()
            gradient = gradient.resolve_conj().resolve_neg()  # torch cannot add to one that is only marked as such
            address = gradient.data_ptr()
            if address in addresses or 0 in gradient.stride():
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            addresses.add(address)
        found.append(gradient)
    return found


T = TypeVar("T", bound=torch.Tensor)


def cut(parameters: Sequence[T], part_bytes: int) -> list[list[T]]:
    """Cut parameters into parts of one dtype and device. As in DDP's buckets, the one that fills a part is its last."""
    parts: list[list[T]] = []
    last: dict[tuple[torch.dtype, torch.device], tuple[list[T], int]] = {}  # of each kind: the last part, and its room
    for parameter in parameters:
        dtype = grad_dtype(parameter)
        kind = dtype, parameter.device
        part, room = last.get(kind, ([], 0))
        if room <= 0:
            part, room = [], part_bytes
            parts.append(part)
        part.append(parameter)
        last[kind] = part, room - parameter.numel() * dtype.itemsize
    return parts


class FlatGradients:
    """The gradients of parameters of one dtype and device, copied into one tensor.

    Args:
        divisor: of the values. As DDP does, a mean is divided before the sum, so that float16 does not overflow.
        buffers: where the tensor is from; None: a new one.

    Attributes:
        tensor: of shape (elements + parameters,): the values, then one number a parameter, 1 where it has a gradient.

    Raises:
        TypeError: a gradient is sparse.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], divisor: int = 1, buffers: Buffers | None = None) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.numel()]
        gradients = [parameter.grad for parameter in self._parameters]
        for gradient in gradients:
            if gradient is not None and gradient.layout is not torch.strided:
                raise TypeError(
                    f"a parameter of shape {tuple(gradient.shape)} has a {gradient.layout} gradient, but its "
                    f"module has no sparse=True that would tell so on every rank: use dense gradients"
                )
        dtype = grad_dtype(parameters[0])
        exist = flags(tuple(gradient is not None for gradient in gradients), dtype, parameters[0].device)
        if buffers is None or not parameters[0].is_cpu:  # a kernel for each parameter would take longer
            pairs = zip(self._parameters, gradients, strict=True)
            pieces = [one.new_zeros(one.shape, dtype=dtype) if value is None else value for one, value in pairs]
            self.tensor = flatten([*pieces, exist])
            if divisor != 1:
                self.tensor.div_(divisor)
            return
        size = sum(parameter.numel() for parameter in self._parameters) + len(gradients)
        self.tensor = buffers.take(size, parameters[0].new_empty(0, dtype=dtype))
        self.tensor[size - len(gradients) :] = exist
        for value, gradient in zip(self._values(self.tensor), gradients, strict=True):
            if gradient is None:
                value.zero_()
            elif divisor == 1:
                value.copy_(gradient)
            else:
                torch.div(gradient, divisor, out=value)

    def _values(self, flat: torch.Tensor) -> Sequence[torch.Tensor]:
        return unflatten(flat, self._parameters) if self._parameters else ()

    def writes(self, reduced: torch.Tensor) -> Callable[[], None]:
        """Return what sets the gradients to the values of `reduced`; None stays where no rank has a gradient.

        `reduced`: what `tensor` becomes; its values may come later.
        """
        parameters, values = self._parameters, self._values(reduced)
        own, theirs, missing = [], [], False
        for parameter, value in zip(parameters, values, strict=True):
            if parameter.grad is None:
                missing = True
            else:
                own.append(parameter.grad)
                theirs.append(value)

        def write() -> None:
            if own:
                torch._foreach_copy_(own, theirs)
            if missing:
                exists = reduced[-len(parameters) :]
                for parameter, some, value in zip(parameters, exists.tolist(), values, strict=True):
                    if some and parameter.grad is None:
                        parameter.grad = torch.empty_like(parameter, dtype=reduced.dtype).copy_(value)

        return write


@functools.lru_cache(maxsize=64)
def flags(which: tuple[bool, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ones and zeros, which nobody writes into: a new tensor in each step takes longer."""
    with torch.inference_mode(False):
        return torch.tensor(which, dtype=dtype, device=device)


def _reduce_sparse(parameter: torch.Tensor, group: dist.ProcessGroup | None, average: bool) -> None:
    gradient = parameter.grad
    if gradient is None:  # rows of none
        indices = torch.zeros(1, 0, dtype=torch.int64, device=parameter.device)
        total = torch.sparse_coo_tensor(indices, parameter.new_zeros(0, *parameter.shape[1:]), parameter.shape)
    else:
        total = (gradient if gradient.layout == torch.sparse_coo else gradient.to_sparse(1)).coalesce().clone()
    dist.all_reduce(total, group=group)
    total = total.coalesce()
    if average:
        total = total / _size(group)
    if gradient is not None and gradient.layout == torch.strided:
        gradient.copy_(total.to_dense())
    elif gradient is not None or total.values().numel():
        parameter.grad = total


def gathers(numel: int, like: torch.Tensor, group: dist.ProcessGroup | None) -> bool:
    """Return True if gathering `numel` elements of each rank is faster than an all-reduce of them.

    The elements have the dtype and device of the tensor `like`.
    """
    if not like.is_cpu or like.layout != torch.strided:
        return False
    own = numel * like.element_size()
    return own <= SHORT_BYTES and own * _size(group) <= SHORT_BYTES_OF_ALL


def _size(group: dist.ProcessGroup | None) -> int:
    """Return the group's size by its own method: `dist.get_world_size` takes longer."""
    return dist.get_world_size() if group is None else group.size()
