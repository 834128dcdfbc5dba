"""The training forward and backward of a batch norm over all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..reduction import sum_over_ranks
from .layout import dense, dense_like, over, reduced_dims
from .moments import Moments, SumOverRanks, joined
from .passes import passes_for

Announce = Callable[[str], None]


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

    Collectives: an all-gather of 2C + 1 float64 numbers a rank; the backward a sum of 2C.
    """
    if torch.is_autocast_enabled(x.device.type):  # which would choose other dtypes inside
        with torch.autocast(x.device.type, enabled=False):
            return sync_batch_norm(x, running, weight, bias, momentum, eps, group, announce)
    running_mean, running_var = running or (None, None)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    arguments = (dense(x), running_mean, running_var, weight, bias, momentum, eps, group, announce)
    y: Tensor = _SyncBatchNorm.apply(*arguments)[0]
    return y


def check_channels(x: Tensor, **per_channel: Tensor | None) -> None:
    """Refuse what the passes, which work on addresses, must never see."""
    if x.size(1) == 0:
        raise ValueError(f"SyncBatchNorm got input of shape {tuple(x.shape)}: it needs at least one channel")
    for name, values in per_channel.items():
        if values is not None and (values.numel() != x.size(1) or values.device != x.device):
            raise ValueError(
                f"SyncBatchNorm got input of shape {tuple(x.shape)} on {x.device}, but its {name} has "
                f"{values.numel()} elements on {values.device}"
            )


class _SyncBatchNorm(Function):
    @staticmethod
    def forward(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        group: dist.ProcessGroup,
        announce: Announce | None,
    ) -> tuple[Tensor, Tensor]:
        if announce is not None:
            announce("forward")
        y, stats = normalised(x, weight, bias, eps, group)
        if running_mean is not None and running_var is not None:
            passes_for(stats, running_mean, running_var).update(running_mean, running_var, stats, momentum)
        return y, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, _, weight, bias, _, ctx.eps, ctx.group, ctx.announce = inputs
        _, stats = output
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        x, weight, stats = ctx.saved_tensors
        if dy is None:  # the others wait for this rank all the same
            dy = torch.zeros_like(x)
        if ctx.announce is not None:
            ctx.announce("backward")
        # Gradient mode is on where the backward itself is to be differentiated (create_graph).
        gradients = _differentiable if torch.is_grad_enabled() else input_gradients
        dx, d_weight, d_bias = gradients(dy, x, weight, stats, ctx.eps, ctx.group)
        return (
            dx,
            None,
            None,
            None if weight is None else d_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype),
            None,
            None,
            None,
            None,
        )


# torch looks the signature up in every call of `apply`, which takes longer than one of the passes. (For mypy functions
# have no such attribute, for `inspect` they have.)
_SyncBatchNorm.forward.__signature__ = inspect.signature(_SyncBatchNorm.forward)  # type: ignore[attr-defined]


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The output and the statistics of all ranks. Raises ValueError where all ranks together have one value."""
    passes = passes_for(x, weight, bias)
    payload, kept = passes.moments(x)
    stats = joined(payload, eps, group)
    # Only a rank with no value or one can be in a batch of one; the others need not read the device.
    if x.numel() <= x.size(1) and stats[-1] == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} and one value on "
            f"all {dist.get_world_size(group)} ranks together"
        )
    return passes.normalise(x, kept, stats, weight, bias), stats


def input_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, and of weight and bias from this rank's samples alone: DDP adds those up."""
    channels = x.size(1)
    dy = dense_like(dy, x)
    passes = passes_for(x, dy, weight)
    local = passes.backward_sums(dy, x, stats)
    d_bias, d_weight = local[:channels].clone(), local[channels:] * stats[channels : 2 * channels]
    sums = sum_over_ranks(local, group)
    return passes.backward_input(dy, x, stats, weight, sums), d_weight, d_bias


def _differentiable(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
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
    return dx.to(x.dtype), sum_dy_xmu * invstd, sum_dy
