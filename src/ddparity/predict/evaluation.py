"""Running a model as it is for evaluation, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..replicate import unwrapped
from ..seeds import kept_streams

Model = nn.Module | Callable[[Any], Any]


def callable_of(model: Model, inputs: Callable[[Any], Any] | None) -> tuple[Callable[[Any], Any], torch.device | None]:
    """What to call with a batch, and the device that the batch must be on; None: where it is.

    A module is run inside of DDP, whose forward would broadcast buffers, and hang where shares are uneven.
    """
    if not isinstance(model, nn.Module):
        return (model if inputs is None else lambda batch: model(inputs(batch))), None
    module = unwrapped(model)
    take = inputs or (lambda batch: batch[0] if isinstance(batch, (list, tuple)) else batch)
    parameter = next(module.parameters(), None)
    return lambda batch: module(take(batch)), None if parameter is None else parameter.device


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Eval and inference mode; at the end modes, buffers and random streams are as before, also on an exception."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    buffers = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in modules]
    copies = {
        id(buffer): (buffer, None if buffer.is_inference() else buffer._version, buffer.clone())
        for _, named, _ in buffers
        for buffer in named.values()
        if buffer is not None
    }
    try:
        with kept_streams(), torch.inference_mode():
            if isinstance(model, nn.Module):
                model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, named, not_saved in buffers:
            module._buffers.clear()
            module._buffers.update(named)
            module._non_persistent_buffers_set = not_saved
        for buffer, version, copy in copies.values():
            if version is None or buffer._version != version:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(copy)
