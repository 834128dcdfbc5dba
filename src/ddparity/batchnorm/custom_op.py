"""The layer as a custom operator. torch.compile puts it into its graph as one node, with the collectives inside."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat import constant_in_graph, group_name, group_of_name
from .function import check_channels, input_gradients, normalised
from .layout import dense
from .reference import update


@torch.library.custom_op(
    "ddparity::sync_batch_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, str group) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return normalised(dense(x), weight, bias, eps, group_of_name(group))


@_forward.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), x.new_empty(3 * x.size(1) + 1, dtype=torch.float64)


@torch.library.custom_op(
    "ddparity::sync_batch_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor stats, float eps, str group) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = stats.dtype, stats.dtype
    dx, d_weight, d_bias = input_gradients(dy, dense(x), weight, stats, eps, group_of_name(group), dtypes)
    assert d_weight is not None and d_bias is not None, "a dtype was given for both"
    return dx, d_weight, d_bias


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(x)), stats.new_empty(x.size(1)), stats.new_empty(x.size(1))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, ctx.eps, ctx.group_name = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, stats = ctx.saved_tensors
    dx, d_weight, d_bias = torch.ops.ddparity.sync_batch_norm_backward(dy, x, weight, stats, ctx.eps, ctx.group_name)
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    return dx, d_weight, None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def compiled_batch_norm(
    x: Tensor,
    running: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Do the same as `function.sync_batch_norm` in a traced graph. The update of `running` is a part of the graph.

    Raises ValueError for tensors of another number of channels than x or on another device.
    """
    if running is not None:
        check_channels(x, running_mean=running[0], running_var=running[1])
    check_channels(x, weight=weight, bias=bias)
    y: Tensor
    y, stats = torch.ops.ddparity.sync_batch_norm(x, weight, bias, eps, _name(group))
    if running is not None:
        update(*running, stats.detach(), momentum)
    return y


@constant_in_graph
def _name(group: dist.ProcessGroup) -> str:
    """Return the name of the group, as a constant of the graph: an operator takes no process group."""
    return group_name(group)
