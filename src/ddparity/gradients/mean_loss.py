"""The loop of a plain training as a function: forward and backward of all micro-batches of a step, `backward`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .accumulate import accumulate


def backward(
    model: nn.Module | Sequence[nn.Module],
    step: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    count: Callable[[Any], float] | None = None,
) -> torch.Tensor:
    """Run forward and backward of all micro-batches of a step; return this rank's part of the step's mean loss.

    It is this loop, for trainings that do nothing else in it:

        for micro in accumulate(model, step, count):
            value = loss(model, micro.data)
            (value * micro.weight).backward()
            part += value.detach() * micro.share

    Call `optimizer.step()` after it. The parts of all ranks sum to the mean loss, so `reduce(backward(...))` is what to
    log. A rank without a micro-batch returns 0.

    Args:
        model, step, count: as for `accumulate`.
        loss: gives the mean loss of a micro-batch, a scalar. It gets `model` and the data on the model's device.

    Returns:
        The part, a detached float32 scalar on the model's device.

    Collectives: those of `accumulate`.

    Raises:
        TypeError: `loss` gives no tensor.
        ValueError: `loss` gives more than one number.

    It also raises what `accumulate` raises.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> backward(model, [torch.ones(3, 2), torch.ones(1, 2)], lambda model, x: (model(x) * 0 + 2).mean())
        tensor(2.)
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    device = next((one.device for each in models for one in each.parameters()), None)
    part = torch.zeros((), dtype=torch.float32, device=device)
    for micro in accumulate(model, step, count):
        value = loss(model, micro.data)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"backward(): loss gave a {type(value).__name__}: return a scalar tensor, the mean loss")
        if value.numel() != 1:
            raise ValueError(
                f"backward(): loss gave a tensor of shape {tuple(value.shape)}: return a scalar, the mean loss of the "
                f"micro-batch"
            )
        (value * micro.weight).backward()
        part += value.detach().reshape(()) * micro.share
    return part
