"""A loop of `accumulate` that was left: its gradients are not reduced, and no optimizer may use them."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

# The parameters of loops that were left, with the gradients that they had then.
_left: MutableMapping[nn.Parameter, Any] = WeakIdKeyDictionary()
_hooks: list[Any] = []


def note_left(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse, from now on, an optimizer's step with the gradients that the parameters have now.

    zip() leaves the second of two loops after its last micro-batch. Only that generator is told, when it can no longer
    raise an error; the optimizer's step can.
    """
    for parameter in parameters:
        _left[parameter] = parameter.grad
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse))


def forget_left(parameters: Iterable[nn.Parameter]) -> None:
    """Let optimizers step again: a new loop has begun."""
    if _hooks:
        for parameter in parameters:
            _left.pop(parameter, None)
        if not len(_left):
            _hooks.pop().remove()


def _refuse(optimizer: Optimizer, _arguments: Any, _options: Any) -> None:
    own = [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in _left]
    # Gradients that are zero have been reduced, or zero_grad() was called.
    if own and all(one.grad is _left[one] for one in own) and any(_is_not_zero(one.grad) for one in own):
        raise RuntimeError(
            "optimizer.step() after a loop of accumulate() that was left before its end, so that its gradients are not "
            "reduced. zip() leaves the second of two loops: give both models to one, accumulate([first, second], …). "
            "After a break or an exception, call optimizer.zero_grad() and begin a new loop"
        )


def _is_not_zero(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
