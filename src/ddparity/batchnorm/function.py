"""The training forward and backward of a batch norm over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..comm.allreduce import copies_of_ranks, parts_of_sum
from ..compat import in_transform
from .dispatch import passes_for
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
    """Normalise x with the moments over all ranks; as torch.nn.functional.batch_norm in training.

    `running`: mean and variance to update, if any. `announce`: called before each collective with its direction.

    Collectives: an exchange of 2C + 1 float64 numbers a rank; the backward a sum of 2C.
    """
    if torch.is_autocast_enabled(x.device.type):  # which would choose other dtypes inside
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
    """Refuse what the passes, which work on addresses, must never see."""
    channels, device = x.size(1), x.device
    if channels == 0:
        raise ValueError(f"SyncBatchNorm got input of shape {tuple(x.shape)}: it needs at least one channel")
    for name, values in per_channel.items():
        if values is not None and (values.numel() != channels or values.device != device):
            raise ValueError(
                f"SyncBatchNorm got input of shape {tuple(x.shape)} on {device}, but its {name} has "
                f"{values.numel()} elements on {values.device}"
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
        _keep(ctx, x, weight, bias, stats, eps, group, announce)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return *_backward(ctx, dy), None, None, None, None, None


class _Transformed(Function):
    """The same for torch.func, which demands that the context is set up afterwards: that takes longer."""

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
        _keep(ctx, x, weight, bias, stats, eps, group, announce)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        return *_backward(ctx, dy), None, None, None, None, None, None


def _keep(
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
    if dy is None:  # the others wait for this rank all the same
        dy = torch.zeros_like(x)
    if announce is not None:
        announce("backward")
    # Gradient mode is on where the backward itself is to be differentiated (create_graph).
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
    """The output and the statistics of all ranks; moves the running ones, if given.

    Raises ValueError where all ranks together have one value.
    """
    if announce is not None:
        announce("forward")
    passes = passes_for(x, weight, bias)
    payload, kept = passes.moments(x)
    for_channels = passes_for(payload, *running or ())  # these are float64 where x may be half precision
    stats = for_channels.join(copies_of_ranks(payload, group), eps)
    # Only a rank with no value or one can be in a batch of one; the others need not read the device.
    if x.numel() <= x.size(1) and stats[-1] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} and one value on "
            f"all {dist.get_world_size(group)} ranks together"
        )
    y = passes.normalise(x, kept, stats, weight, bias)
    if running is not None:
        for_channels.update(*running, stats, momentum)
    return y, stats


def input_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: dist.ProcessGroup, dtypes: Dtypes
) -> Gradients:
    """Gradients of the input, and of weight and bias from this rank's samples alone: DDP adds those up."""
    dy = dense_like(dy, x)
    passes = passes_for(x, dy, weight)
    sums = passes.backward_sums(dy, x, stats)
    d_weight, d_bias = passes.parameter_gradients(sums, stats, *dtypes)
    return passes.backward_input(dy, x, stats, weight, parts_of_sum(sums, group)), d_weight, d_bias


def _differentiable(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: dist.ProcessGroup, dtypes: Dtypes
) -> Gradients:
    """`input_gradients` in operations that are differentiable themselves, the collectives included."""
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
