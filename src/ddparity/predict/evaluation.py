"""Running a model as it is for evaluation, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

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
    """Eval and inference mode; at the end modes, buffers and random streams are as before, also on an exception.

    Raises:
        ValueError: a module is lazy, and its parameters would be made in inference mode.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if lazy := [type(module).__name__ for module in modules if _is_lazy(module)]:
        raise ValueError(
            f"predict() got a model with a {lazy[0]} that has not seen its input: run one batch through it before"
        )
    modes = [(module, module.training) for module in modules]
    before = [(module, dict(vars(module)), dict(module._buffers), set(_not_saved(module))) for module in modules]
    copies = {id(one): (one, one.clone()) for _, _, named, _ in before for one in named.values() if one is not None}
    try:
        with kept_streams(), torch.inference_mode():
            if isinstance(model, nn.Module):
                model.eval()
            yield
    finally:
        for module, training in modes:
            if type(module).train is not nn.Module.train and module.training != training:
                module.train(training)  # it does more than to set the mode, as layers that merge their weights do
        for module, training in modes:
            module.training = training
        for module, attributes, named, not_saved in before:
            module._buffers.clear()
            module._buffers.update(named)
            _not_saved(module).clear()
            _not_saved(module).update(not_saved)
            _forget_inference_tensors(module, attributes)
        for buffer, copy in copies.values():
            _restore(buffer, copy)


def _is_lazy(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(one is not None and is_lazy(one) for one in own)


def _not_saved(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _forget_inference_tensors(module: nn.Module, before: dict[str, Any]) -> None:
    """What a module has cached in inference mode as an attribute cannot take part in a training."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor) and value.is_inference() and value is not before.get(name):
            if name in before:
                vars(module)[name] = before[name]
            else:
                del vars(module)[name]


def _restore(buffer: torch.Tensor, copy: torch.Tensor) -> None:
    # By content: `.data` and NumPy write without a trace. Only where it differs: a backward may still want it as it is.
    same = buffer.shape == copy.shape and bool(((buffer == copy) | ((buffer != buffer) & (copy != copy))).all())
    if not same:
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.resize_(copy.shape).copy_(copy)
