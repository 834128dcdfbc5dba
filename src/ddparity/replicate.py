"""A model on every rank, whose gradients are those of the global batch."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .compat import comm_hooks
from .reduction import sum_hook


def replicate(
    model: nn.Module, reduction: Literal["fast"] = "fast", **ddp_options: Any
) -> DistributedDataParallel | nn.Module:
    """Wrap a model in torch's DistributedDataParallel so that gradients are summed over the ranks, not averaged.

    With losses weighted by `accumulate`, whose weights sum to one over all ranks, the gradients after a step are those
    of the global batch's mean loss. In a world of one, with or without a process group, returns the model itself.

    Args:
        model: on its device, the same parameters' shapes on every rank; rank 0's values are broadcast.
        reduction: "fast", DDP's own overlapped reduction.
        ddp_options: of DistributedDataParallel: `find_unused_parameters`, `static_graph`, `process_group`, …

    Collectives: DDP's: at construction the parameters and buffers; a step the gradients once, and the buffers once in
    the first forward (`broadcast_buffers`).

    Raises:
        TypeError: the model is wrapped already, or no module.
        ValueError: the reduction is unknown.

    Source: https://pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    if reduction != "fast":
        raise ValueError(f'replicate(reduction={reduction!r}) is unknown: use "fast"')
    if not isinstance(model, nn.Module):
        raise TypeError(f"replicate() got a {type(model).__name__}: give a torch.nn.Module")
    if isinstance(model, DistributedDataParallel):
        raise TypeError("replicate() got a DistributedDataParallel: give the module inside, model.module")
    if not dist.is_initialized() or dist.get_world_size(ddp_options.get("process_group")) == 1:
        return model
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type == "cuda":
        ddp_options.setdefault("device_ids", [device])
    replicated = DistributedDataParallel(model, **ddp_options)
    replicated.register_comm_hook(replicated.process_group, sum_hook)
    return replicated


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DDP, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def averages(model: DistributedDataParallel) -> bool:
    """Whether a DDP module divides its gradients by the world size, as DDP does without `replicate`."""
    return sum_hook not in comm_hooks(model)
