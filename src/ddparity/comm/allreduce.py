"""How gradients and small numbers are summed over the ranks."""

# No `from __future__ import annotations`: DDP reads the hook's annotations as objects.

import itertools
import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..compat import GradBucket, all_gather_single, all_to_all_single, compares_calls

# Gloo's all-gather hands tensors on from rank to rank, in two messages each; its all-to-all sends as many bytes, but
# straight and in one. With a local sum it also beats the all-reduce as long as a rank's bytes, and all ranks' together,
# stay below these: by itself up to a quarter or half of it (benchmarks/collectives.py), in a training step up to here
# (benchmarks/step_overhead.py). Large ones it sends below a link's speed (benchmarks/strict.py).
SHORT_BYTES = 2**19
SHORT_BYTES_OF_ALL = 2**21

YIELDS = 400  # before a rank that waits for a small exchange goes to sleep; about a microsecond each


def sum_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A DDP communication hook that sums a bucket over the ranks, where DDP's own path averages.

    One collective a bucket: an exchange of the ranks' copies where that is the faster one, else an all-reduce; the
    bucket's bytes either way. Source: https://pytorch.org/docs/stable/ddp_comm_hooks.html
    """
    buffer = bucket.buffer()
    if not bucket.is_last() and not gathers(buffer.numel(), buffer, group):
        work = dist.all_reduce(buffer, group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])
    # Waiting here costs less than a callback. The last bucket has no backward left to overlap with, and small ones are
    # sooner sent than overlapped.
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(sum_over_ranks(buffer, group))
    return future


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of a tensor over the ranks, perhaps in place; one collective of its bytes. All ranks call it."""
    if gathers(tensor.numel(), tensor, group):
        return copies_of_ranks(tensor, group).sum(0)  # in rank order, the same bits on every rank
    dist.all_reduce(tensor, group=group)
    return tensor


def parts_of_sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`sum_over_ranks` for who adds up himself: the sum is that over the first dimension of the result."""
    if gathers(tensor.numel(), tensor, group):
        return copies_of_ranks(tensor, group)
    return sum_over_ranks(tensor, group).unsqueeze(0)


def copies_of_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The ranks' tensors, of one shape and dtype, as (world size, *shape). All ranks call it.

    One collective of a rank's bytes to each other: an all-gather, for short tensors on the CPU as an all-to-all.
    """
    ranks = _size(group)
    if tensor.dim() != 1:
        return copies_of_ranks(tensor.reshape(-1), group).view(ranks, *tensor.shape)
    short = tensor.is_cpu and tensor.numel() * tensor.element_size() <= SHORT_BYTES
    if short and not compares_calls():  # which looks at an all-gather's sizes, not at an all-to-all's
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
    """Give the core up again and again, for less than half a millisecond of its time, until the exchange is done.

    Ranks that keep step are soon done; then to sleep and to be woken takes as long as the exchange itself
    (benchmarks/RESULTS.md, "Scheduling"). Longer, and ranks that share a core would keep each other from it.
    """
    # Not work.is_completed(): it waits, with Python's lock held, for a lock under which a profiler may want Python's.
    done = work.get_future().done
    for _ in range(YIELDS if hasattr(os, "sched_yield") else 0):
        if done():
            break
        os.sched_yield()
    work.wait()


def exchange(sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Send tensor i to rank i of the group and fill tensor i from it, all at once; what is empty is not sent.

    Gloo's own all-to-all and all-gather take longer, the first above all over a slow link (benchmarks/strict.py). This
    rank's own are left alone. All ranks call it, with sizes that agree.
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
    """Sum the gradients over the ranks, in place, where DDP's backward did not: not every rank ran one.

    One collective for each pair of dtype and device, of the gradients' bytes and a number for each parameter, which
    says whether any rank has a gradient: one that none has stays None. All ranks call it.
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
    """Whether gathering `numel` elements of each rank, of this tensor's dtype and device, beats exchanging sums."""
    if not like.is_cpu or like.layout != torch.strided:
        return False
    own = numel * like.element_size()
    return own <= SHORT_BYTES and own * _size(group) <= SHORT_BYTES_OF_ALL


def _size(group: dist.ProcessGroup | None) -> int:
    """By the group's own method, as `dist.get_world_size` takes longer."""
    return dist.get_world_size() if group is None else group.size()
