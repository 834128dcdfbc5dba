"""Running a model as it is for evaluation, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..data.rng import kept_streams
from ..gradients.replicate import unwrapped
from .storage import is_same, put_back

Model = nn.Module | Callable[[Any], Any]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


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
    before = [(module, _Attributes(module), dict(module._buffers), set(_not_saved(module))) for module in modules]
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
            attributes.forget_inference_tensors()
        for buffer, kept in copies.values():
            # By content: `.data` and NumPy write without a trace. Only where it differs: a backward may still want it
            # as it is.
            if not is_same(buffer, kept):
                put_back(buffer, kept)


def _is_lazy(module: nn.Module) -> bool:
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(one is not None and is_lazy(one) for one in own)


def _not_saved(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


class _Attributes:
    """What a module holds, to undo what it caches in inference mode, which cannot take part in a training.

    That is a tensor, or a dict, list or tuple of some, as an attribute or in a dict or list that is one. Whatever else
    it keeps there, as a count or the names of what it has seen, stays.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, _own(module)
        self._dicts = [(value, dict(value)) for value in self._before.values() if isinstance(value, dict)]
        self._lists = [(value, list(value)) for value in self._before.values() if isinstance(value, list)]

    def forget_inference_tensors(self) -> None:
        for named, entries in self._dicts:
            _forget(named, entries, named)
        for row, items in self._lists:
            if any(_is_new(item, items) for item in row):
                row[:] = items  # places may have moved, as in a window
        _forget(vars(self._module), self._before, _own(self._module))


def _own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes but for those that every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _forget(values: dict[Any, Any], before: dict[Any, Any], looked_at: dict[Any, Any]) -> None:
    for name, value in list(looked_at.items()):
        if value is not before.get(name) and _holds_inference_tensors(value):
            if name in before:
                values[name] = before[name]
            else:
                del values[name]


def _is_new(item: Any, before: list[Any]) -> bool:
    return _holds_inference_tensors(item) and not any(item is one for one in before)


def _holds_inference_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, torch.Tensor) and item.is_inference() for item in items)
