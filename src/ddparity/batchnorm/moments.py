"""Mean and variance over all ranks, with derivatives of any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..comm.allreduce import copies_of_ranks, sum_over_ranks
from .dispatch import kernels_for
from .layout import dense, over


def sync_moments(
    x: Tensor, dims: int | Sequence[int], process_group: dist.ProcessGroup | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the biased variance and the count over `dims` and all ranks, to write your own norm.

    The result is the same as in one process that has the ranks' inputs concatenated along `dims`. So are the
    derivatives, of any order, of the sum of the ranks' losses.

    Args:
        x: floating-point tensor. The sizes of `dims` may differ between ranks and may be 0; the other sizes must be the
            same on all ranks.
        dims: the dimensions to reduce. To use only the elements of a mask: `sync_moments(x[mask], (0,))`.
        process_group: the ranks that take part; None: all ranks. In a world of one, or without a process group, there
            is no collective.
        keepdim: keep the reduced dimensions with size 1.

    Returns:
        mean, biased variance (both in x's dtype, or in float32 for half precision) and count (int64, 0-D). If the count
        is 0, mean and variance are 0.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: dims is empty, contains a dimension twice, or contains one that x does not have.

    Collectives: one all-gather of 2C + 1 float64 numbers from each rank, where C is the number of elements of the mean;
    in each backward one sum of 2C numbers. All ranks call it.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Example:
        >>> mean, variance, count = sync_moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 0)
        >>> mean, variance, count
        (tensor([2., 4.]), tensor([1., 4.]), tensor(2))
    """
    if not x.is_floating_point():
        raise TypeError(f"sync_moments() got a tensor of {x.dtype}: give a floating-point tensor")
    reduced = _checked_dims(x, [dims] if isinstance(dims, int) else list(dims))
    kept = [dim for dim in range(x.dim()) if dim not in reduced]
    shape = [x.size(dim) for dim in kept]
    mean, variance, total = Moments.apply(dense(_as_channels(x, reduced, kept)), group_of_several(process_group))
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if keepdim:
        shape = [1 if dim in reduced else x.size(dim) for dim in range(x.dim())]
    return mean.view(shape).to(kind), variance.view(shape).to(kind), total.to(torch.int64)


def group_of_several(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the process group if it has several ranks, otherwise None. `process_group` None: all ranks.

    Raises ValueError on a rank that is not in the group.
    """
    everyone = dist.group.WORLD
    if everyone is None:
        return None
    group = everyone if process_group is None else process_group
    if not isinstance(group, dist.ProcessGroup):  # new_group returns a number on a rank outside the group
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group that it was given: on each rank, pass a group that "
            f"contains this rank"
        )
    return group if group.size() > 1 else None


class SumOverRanks(Function):
    """Sum over the ranks. The gradient is also summed, since each rank's result depends on each rank's input.

    Collectives: one sum of the tensor's bytes in the forward, and one in each backward.
    """

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
    """Compute (mean, biased variance, count) of dense planes or rows over all ranks, in float64."""

    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        channels = x.size(1)
        kernels = kernels_for(x)
        payload, _ = kernels.moments(x)
        gathered = payload[None] if group is None else copies_of_ranks(payload, group)
        mean, _, unbiased, total = kernels.join(gathered, 1.0).split([channels, channels, channels, 1])
        return mean.clone(), unbiased * (total - 1).clamp(min=1) / total.clamp(min=1), total[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.group = inputs
        mean, _, total = output
        ctx.mark_non_differentiable(total)
        ctx.save_for_backward(x, mean, total)

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor, _: Any) -> Any:
        # mean = sum(x) / n and variance = sum((x - mean)²) / n over all ranks, so
        # dx = (sum over ranks of d_mean + 2 * (x - mean) * sum over ranks of d_variance) / n.
        x, mean, total = ctx.saved_tensors
        d_mean, d_variance = SumOverRanks.apply(torch.stack([d_mean, d_variance]), ctx.group)
        n = total.clamp(min=1)
        dx = (x - over(mean, x)) * over(2 * d_variance / n, x) + over(d_mean / n, x)
        return dx.to(x.dtype), None


def _checked_dims(x: Tensor, dims: list[int]) -> set[int]:
    """Return the dimensions as non-negative numbers. Raises ValueError if they do not fit x."""
    if not dims:
        raise ValueError("sync_moments() got no dims: give at least one dimension to reduce")
    for dim in dims:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"sync_moments() got dim {dim} for a tensor of {x.dim()} dimensions: give dims that it has"
            )
    reduced = {dim % x.dim() for dim in dims}
    if len(reduced) < len(dims):
        raise ValueError(f"sync_moments() got a dimension twice in dims={tuple(dims)}: give each dimension once")
    return reduced


def _as_channels(x: Tensor, reduced: set[int], kept: list[int]) -> Tensor:
    """Return x as (N, C, M), where C are the kept dimensions. It is a view if these are next to each other."""
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
