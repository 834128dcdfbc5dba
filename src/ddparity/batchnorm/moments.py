"""Mean and variance over all ranks, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..comm.allreduce import copies_of_ranks, sum_over_ranks
from .dispatch import passes_for
from .layout import dense, over


def sync_moments(
    x: Tensor, dims: int | Sequence[int], process_group: dist.ProcessGroup | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the biased variance and the count over `dims` and over all ranks, for a norm of your own.

    The result is that of the ranks' inputs joined along `dims` in one process, and so are its derivatives, of any
    order: each rank's loss counts once, as if the losses were added up.

    Args:
        x: float tensor; sizes of `dims` may differ between ranks and may be zero, the others are the same everywhere.
        dims: dimensions to reduce. For elements without a mask: `sync_moments(x[mask], (0,))`.
        process_group: whose ranks; None: all. In a world of one, or without a group, nothing is exchanged.
        keepdim: keep the reduced dimensions with size 1.

    Returns:
        mean, biased variance (in x's dtype, in float32 for half precision) and count (int64, no dimensions). Both are 0
        where the count is 0.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: dims is empty, or names a dimension twice or one that x does not have.

    Collectives: an exchange of 2C + 1 float64 numbers a rank, C being the elements of the mean; each backward a sum
    of 2C. All ranks call it.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Example:
        >>> mean, variance, count = sync_moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 0)
        >>> mean, variance, count
        (tensor([2., 4.]), tensor([1., 4.]), tensor(2))
    """
    if not x.is_floating_point():
        raise TypeError(f"sync_moments() got a tensor of {x.dtype}: it takes floating-point ones")
    reduced = _checked_dims(x, [dims] if isinstance(dims, int) else list(dims))
    kept = [dim for dim in range(x.dim()) if dim not in reduced]
    shape = [x.size(dim) for dim in kept]
    mean, variance, total = Moments.apply(dense(_as_channels(x, reduced, kept)), group_of_several(process_group))
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if keepdim:
        shape = [1 if dim in reduced else x.size(dim) for dim in range(x.dim())]
    return mean.view(shape).to(kind), variance.view(shape).to(kind), total.to(torch.int64)


def group_of_several(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to exchange with; None where this process is alone.

    Raises ValueError on a rank that is not in the group.
    """
    everyone = dist.group.WORLD
    if everyone is None:
        return None
    group = everyone if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):  # torch gives a number to a rank that is not in it
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group it was given: on each rank, pass the group that has it"
        )
    return group if group.size() > 1 else None


class SumOverRanks(Function):
    """The sum over the ranks, whose gradient is again the sum: every rank's result depends on every rank's input."""

    @staticmethod
    def forward(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return value.clone() if group is None else sum_over_ranks(value.clone(), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return SumOverRanks.apply(gradient, ctx.group), None


class Moments(Function):
    """(mean, biased variance, count) of dense planes or rows over all ranks, as float64."""

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        channels = x.size(1)
        passes = passes_for(x)
        payload, _ = passes.moments(x)
        gathered = payload[None] if group is None else copies_of_ranks(payload, group)
        mean, _, unbiased, total = passes.join(gathered, 1.0).split([channels, channels, channels, 1])
        return mean.clone(), unbiased * (total - 1).clamp(min=1) / total.clamp(min=1), total[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.group = inputs
        mean, _, total = output
        ctx.mark_non_differentiable(total)
        ctx.save_for_backward(x, mean, total)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor, _: Any) -> Any:
        # mean = sum(x) / n and variance = sum((x - mean)²) / n over all ranks, so that
        # dx = (sum over ranks of d_mean + 2 * (x - mean) * sum over ranks of d_variance) / n.
        x, mean, total = ctx.saved_tensors
        d_mean, d_variance = SumOverRanks.apply(torch.stack([d_mean, d_variance]), ctx.group)
        n = total.clamp(min=1)
        dx = (x - over(mean, x)) * over(2 * d_variance / n, x) + over(d_mean / n, x)
        return dx.to(x.dtype), None


def _checked_dims(x: Tensor, dims: list[int]) -> set[int]:
    if not dims:
        raise ValueError("sync_moments() got no dims: name at least one dimension to reduce")
    for dim in dims:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"sync_moments() got dim {dim} for a tensor of {x.dim()} dimensions")
    reduced = {dim % x.dim() for dim in dims}
    if len(reduced) < len(dims):
        raise ValueError(f"sync_moments() got a dimension twice in dims={tuple(dims)}")
    return reduced


def _as_channels(x: Tensor, reduced: set[int], kept: list[int]) -> Tensor:
    """As (N, C, M): what is kept in the middle, without a copy where it lies together."""
    channels = 1
    for dim in kept:
        channels *= x.size(dim)
    if not kept or kept == list(range(kept[0], kept[-1] + 1)):
        before = after = 1
        for dim in reduced:
            if kept and dim < kept[0]:
                before *= x.size(dim)
            else:
                after *= x.size(dim)
        return x.reshape(before, channels, after)
    count = 1
    for dim in reduced:
        count *= x.size(dim)
    return x.permute(*kept, *sorted(reduced)).reshape(1, channels, count)
