"""The training forward and backward of a batch norm over all ranks, as functions for autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..comm.allreduce import copies_of_ranks, parts_of_sum
from ..compat import in_transform
from .dispatch import kernels_for
from .layout import dense, dense_like, over, reduced_dims
from .moments import Moments, SumOverRanks

Announce = Callable[[str], None]
Dtypes = tuple[torch.dtype | None, torch.dtype | None]  # of weight and bias
Gradients = tuple[Tensor, Tensor | None, Tensor | None]  # of x, weight and bias


def sync_batch_norm(
    x: Tensor,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    group: dist.ProcessGroup,
    announce: Announce | None = None,
) -> Tensor:
    """Normalise x by the moments over all ranks, as torch.nn.functional.batch_norm does in training.

    Args:
        x: (N, C, ...), with at least one channel.
        running: running mean and variance, which are updated in place; None: there are none.
        announce: called before each collective with "forward" or "backward".

    Raises:
        ValueError: a tensor has another number of channels than x or is on another device; all ranks together have one
            value for each channel.

    Collectives: an all-gather of 2C + 1 float64 numbers from each rank; in the backward a sum of 2C. All ranks call it.
    """
    if torch.is_autocast_enabled(x.device.type):  # autocast would choose other dtypes inside
        with torch.autocast(x.device.type, enabled=False):
            return sync_batch_norm(x, running, weight, bias, momentum, eps, group, announce)
    running_mean, running_var = running or (None, None)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    others = momentum, eps, group, announce
    y: Tensor
    if in_transform():
        y, _ = _Transformed.apply(dense(x), weight, bias, running_mean, running_var, *others)
    else:
        y = _SyncBatchNorm.apply(dense(x), weight, bias, running, *others)
    return y


def check_channels(x: Tensor, **per_channel: Tensor | None) -> None:
    """Raise ValueError if a tensor does not fit x: the kernels get addresses and cannot check them."""
    channels, device = x.size(1), x.device
    if channels == 0:
        raise ValueError(
            f"SyncBatchNorm got an input of shape {tuple(x.shape)}, which has no channels: give one with at least one "
            f"channel"
        )
    for name, values in per_channel.items():
        if values is not None and (values.numel() != channels or values.device != device):
            raise ValueError(
                f"SyncBatchNorm got an input of shape {tuple(x.shape)} on {device}, but its {name} has "
                f"{values.numel()} elements on {values.device}: give an input of {values.numel()} channels, and move "
                f"layer and input to one device"
            )


class _SyncBatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None,
        momentum: float | Tensor,
        eps: float,
        group: dist.ProcessGroup,
        announce: Announce | None,
    ) -> Tensor:
        y, stats = normalised(x, weight, bias, eps, group, running, momentum, announce)
        _save(ctx, x, weight, bias, stats, eps, group, announce)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return *_backward(ctx, dy), None, None, None, None, None


class _Transformed(Function):
    """The same for torch.func, which needs a separate `setup_context`. This takes longer."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        group: dist.ProcessGroup,
        announce: Announce | None,
    ) -> tuple[Tensor, Tensor]:
        running = None if running_mean is None or running_var is None else (running_mean, running_var)
        return normalised(x, weight, bias, eps, group, running, momentum, announce)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, _, _, eps, group, announce = inputs
        _, stats = output
        ctx.mark_non_differentiable(stats)
        _save(ctx, x, weight, bias, stats, eps, group, announce)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        return *_backward(ctx, dy), None, None, None, None, None, None


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    group: dist.ProcessGroup,
    announce: Announce | None,
) -> None:
    dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    ctx.others = eps, group, announce, dtypes
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, stats)


def _backward(ctx: Any, dy: Tensor | None) -> Gradients:
    x, weight, stats = ctx.saved_tensors
    eps, group, announce, dtypes = ctx.others
    if dy is None:  # the output is not used, but the other ranks wait in the collective
        dy = torch.zeros_like(x)
    if announce is not None:
        announce("backward")
    # Gradient mode is on if the backward itself is differentiated (create_graph).
    gradients = _differentiable if torch.is_grad_enabled() else input_gradients
    return gradients(dy, x, weight, stats, eps, group, dtypes)


def normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    group: dist.ProcessGroup,
    running: tuple[Tensor, Tensor] | None = None,
    momentum: float | Tensor = 0.0,
    announce: Announce | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the stats of all ranks, and update the running statistics if they are given.

    Raises ValueError if all ranks together have one value for each channel.

    Collectives: one all-gather of 2C + 1 float64 numbers from each rank.
    """
    if announce is not None:
        announce("forward")
    kernels = kernels_for(x, weight, bias)
    payload, intermediate = kernels.moments(x)
    # The payload is float64, so other kernels may handle it than x, which may be in half precision.
    channel_kernels = kernels_for(payload, *running or ())
    stats = channel_kernels.join(copies_of_ranks(payload, group), eps)
    # Only a rank with at most one value checks this, since reading stats[-1] waits for the device.
    if x.numel() <= x.size(1) and stats[-1] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} and one value per "
            f"channel on all {dist.get_world_size(group)} ranks together: give more samples, or use eval mode"
        )
    y = kernels.normalise(x, intermediate, stats, weight, bias)
    if running is not None:
        channel_kernels.update(*running, stats, momentum)
    return y, stats


def input_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: dist.ProcessGroup, dtypes: Dtypes
) -> Gradients:
    """Return the gradient of x, and those of weight and bias from this rank's samples alone, which DDP averages.

    Collectives: one sum of 2C float64 numbers.
    """
    dy = dense_like(dy, x)
    kernels = kernels_for(x, dy, weight)
    sums = kernels.backward_sums(dy, x, stats)
    d_weight, d_bias = kernels.parameter_gradients(sums, stats, *dtypes)
    return kernels.backward_input(dy, x, stats, weight, parts_of_sum(sums, group)), d_weight, d_bias


def _differentiable(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: dist.ProcessGroup, dtypes: Dtypes
) -> Gradients:
    """Do the same as `input_gradients` in differentiable operations, collectives included.

    Collectives: those of `Moments`, and one sum of 2C float64 numbers.
    """
    mean, variance, total = Moments.apply(x, group)
    dims = reduced_dims(x)
    invstd, centred, wide_dy = (variance + eps).rsqrt(), x - over(mean, x), dy.to(mean.dtype)
    sum_dy, sum_dy_xmu = wide_dy.sum(dims), (wide_dy * centred).sum(dims)
    all_dy, all_dy_xmu = SumOverRanks.apply(torch.stack([sum_dy, sum_dy_xmu]), group)
    scale = invstd if weight is None else invstd * weight
    n = total.clamp(min=1)
    projection = centred * over(invstd.square() * all_dy_xmu / n, x)
    dx = (wide_dy - over(all_dy / n, x) - projection) * over(scale, x)
    d_weight, d_bias = (
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip((sum_dy_xmu * invstd, sum_dy), dtypes, strict=True)
    )
    return dx.to(x.dtype), d_weight, d_bias
