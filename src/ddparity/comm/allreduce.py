"""Sum gradients and small tensors over the ranks, and exchange the ranks' copies of a tensor."""

# No `from __future__ import annotations`: DDP reads the hook's annotations as objects.

import itertools
import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..compat import GradBucket, all_gather_single, all_to_all_single, compares_calls

# Gloo's all-gather passes a tensor from rank to rank, in two messages each. Its all-to-all sends as many bytes, but
# directly and in one message. An all-to-all with a local sum is also faster than the all-reduce, as long as the bytes
# of one rank and those of all ranks together stay below these limits. Measured alone it is faster up to a quarter or
# half of them (benchmarks/collectives.py), in a training step up to these limits (benchmarks/step_overhead.py). It
# sends large tensors slower than the link allows (benchmarks/strict.py).
SHORT_BYTES = 2**19
SHORT_BYTES_OF_ALL = 2**21

YIELDS = 400  # how often a rank yields its core before it sleeps in a wait; each takes about a microsecond


def sum_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket over the ranks, as a DDP communication hook; DDP without a hook averages.

    Collectives: one for each bucket, of the bucket's bytes. It exchanges the ranks' copies where that is faster than an
    all-reduce. Source: https://pytorch.org/docs/stable/ddp_comm_hooks.html
    """
    buffer = bucket.buffer()
    if not bucket.is_last() and not gathers(buffer.numel(), buffer, group):
        work = dist.all_reduce(buffer, group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])
    # To wait here costs less than a callback. The last bucket has no backward left to overlap with, and a small bucket
    # is sent in less time than an overlap would save.
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(sum_over_ranks(buffer, group))
    return future


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum of a tensor over the ranks; the tensor itself may be overwritten.

    Collectives: one, of the tensor's bytes; all ranks call it.
    """
    if gathers(tensor.numel(), tensor, group):
        return copies_of_ranks(tensor, group).sum(0)  # in rank order, the same bits on every rank
    dist.all_reduce(tensor, group=group)
    return tensor


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
    if tensor.dim() != 1:
        return copies_of_ranks(tensor.reshape(-1), group).view(ranks, *tensor.shape)
    short = tensor.is_cpu and tensor.numel() * tensor.element_size() <= SHORT_BYTES
    if short and not compares_calls():  # torch compares an all-gather's sizes, not an all-to-all's
        sent = torch.stack((tensor,) * ranks)
        copies = torch.empty_like(sent)
        _wait(all_to_all_single(copies, sent, group))
        return copies
    copies = tensor.new_empty(ranks * tensor.numel())
    work = all_gather_single(copies, tensor.contiguous(), group, async_op=tensor.is_cpu)
    if work is not None:
        _wait(work)
    return copies.view(ranks, tensor.numel())


def _wait(work: dist.Work) -> None:
    """Wait until an exchange is done: yield the core for less than half a millisecond of its time, then sleep.

    Where all ranks call at the same time, the exchange is soon done, and to sleep and wake up takes as long as the
    exchange itself (benchmarks/RESULTS.md, "Scheduling"). Ranks that share a core must not yield for longer, because
    each then keeps the core from the other.
    """
    # Not work.is_completed(): it holds Python's lock while it waits for another lock. A profiler may hold that one
    # while it waits for Python's.
    done = work.get_future().done
    for _ in range(YIELDS if hasattr(os, "sched_yield") else 0):
        if done():
            break
        os.sched_yield()
    work.wait()


def exchange(sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Send tensor i of `sent` to rank i of the group, and fill tensor i of `received` from rank i, all at once.

    This rank's own tensors are not touched, and an empty tensor is not sent. Gloo's own all-to-all and all-gather take
    longer, especially the all-to-all over a slow link (benchmarks/strict.py).

    Collectives: none; a point-to-point message for each tensor. All ranks call it, with sizes that agree.
    """
    rank, world_size = dist.get_rank(group), len(sent)
    operations = []
    for distance in range(1, world_size):
        source, target = (rank - distance) % world_size, (rank + distance) % world_size
        for move, tensor, peer in ((dist.irecv, received[source], source), (dist.isend, sent[target], target)):
            if tensor.numel():
                operations.append(dist.P2POp(move, tensor, dist.get_global_rank(group, peer), group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Sum the gradients over the ranks, in place, in a step in which a rank without a backward kept DDP from it.

    A parameter of which no rank has a gradient keeps None.

    Collectives: one for each pair of dtype and device, of the gradients' bytes and one number for each parameter, which
    says whether any rank has its gradient. All ranks call it.

    Raises:
        TypeError: a gradient is sparse.
    """

    def kind(parameter: nn.Parameter) -> tuple[str, str]:
        return str(parameter.dtype), str(parameter.device)

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for _, members in itertools.groupby(sorted(trained, key=kind), key=kind):
        _sum_flat(list(members), group)


def _sum_flat(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} has a {parameter.grad.layout} gradient, which cannot "
                f"be reduced in a step that leaves a rank without a micro-batch: use sparse=False, or drop_last=True"
            )
    present = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    flat = torch.cat(
        [present.to(parameters[0])]
        + [
            parameter.grad.reshape(-1) if parameter.grad is not None else parameter.new_zeros(parameter.numel())
            for parameter in parameters
        ]
    )
    total = sum_over_ranks(flat, group)
    exists, *sums = total.split([len(parameters)] + [parameter.numel() for parameter in parameters])
    for parameter, some, values in zip(parameters, exists.tolist(), sums, strict=True):
        if some and parameter.grad is not None:
            parameter.grad.copy_(values.view_as(parameter))
        elif some:
            parameter.grad = values.view_as(parameter).clone(memory_format=torch.preserve_format)


def gathers(numel: int, like: torch.Tensor, group: dist.ProcessGroup | None) -> bool:
    """Return True if to gather `numel` elements of each rank is faster than an all-reduce of them.

    The elements have the dtype and device of the tensor `like`.
    """
    if not like.is_cpu or like.layout != torch.strided:
        return False
    own = numel * like.element_size()
    return own <= SHORT_BYTES and own * _size(group) <= SHORT_BYTES_OF_ALL


def _size(group: dist.ProcessGroup | None) -> int:
    """Return the group's size by its own method: `dist.get_world_size` takes longer."""
    return dist.get_world_size() if group is None else group.size()
