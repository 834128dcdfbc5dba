"""Gradients that are not complete, since a loop of `accumulate` is open or was left, or micro-batches were skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..comm.allreduce import copies_of_ranks

logger = logging.getLogger(__name__)


class Trained(Protocol):
    """A model in whose loop we are."""

    told_skipped: bool

    def parameters(self) -> list[nn.Parameter]: ...


# By the model's id: the model, its loop, and whether its gradients are incomplete.
_open: dict[int, tuple[Trained, object, Callable[[], bool]]] = {}
# The parameters of loops that were left, with the gradients that they had then.
_left = WeakIdKeyDictionary()
# One hook for all loops, from the first on: to register one takes longer than to call it.
_hooks: list[Any] = []


def open_loop(model: Trained, loop: object, incomplete: Callable[[], bool] = lambda: True) -> None:
    """Refuse an optimizer's step with the model's parameters until `close_loop` of the same loop, if `incomplete`."""
    _open[id(model)] = model, loop, incomplete
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check))


def close_loop(model: Trained, loop: object) -> None:
    """Allow optimizers' steps again, unless a newer loop over the model is open: an exception may keep an old one."""
    if id(model) in _open and _open[id(model)][1] is loop:
        del _open[id(model)]


_late = WeakIdKeyDictionary()  # hooks of parameters that refuse a backward
_DROPPED = object()  # in place of a gradient


def note_left(parameters: Iterable[nn.Parameter], dropped: bool = False) -> None:
    """Refuse, from now on, an optimizer's step with the gradients that the parameters have now.

    `dropped`: the loop's gradients are gone, so refuse any step, also one without a gradient.

    zip() leaves the second of two loops after its last micro-batch. Only that generator is told, when it can no longer
    raise an error; the optimizer's step can.
    """
    for parameter in parameters:
        _left[parameter] = _DROPPED if dropped else parameter.grad


def forget_left(parameters: Sequence[nn.Parameter]) -> None:
    """Let optimizers step again: a new loop has begun."""
    if _left.data or _late.data:
        for parameter in parameters:
            _left.pop(parameter, None)
        allow_late(parameters)


def refuse_late(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a backward until an optimizer steps or a loop begins, after a strict step with a micro-batch without one.

    It may be that micro-batch's, in a loop that ran ahead. DDP would average what strict mode adds.
    """
    allow_late(parameters)
    for parameter in parameters:
        if parameter.requires_grad:
            _late[parameter] = parameter.register_hook(_refuse_backward)


def allow_late(parameters: Iterable[nn.Parameter]) -> None:
    """Allow backwards again: they are in a loop's body, or the optimizer has stepped."""
    if _late.data:
        for parameter in parameters:
            hook = _late.pop(parameter, None)
            if hook is not None:
                hook.remove()


def _refuse_backward(_: torch.Tensor) -> NoReturn:
    raise RuntimeError(
        "a backward after the loop of accumulate(), in which a micro-batch had none, of a strict model: a loop may not "
        "run ahead, as list(accumulate(…)) does. Run each micro-batch's backward in the loop's body, a penalty's, too"
    )


def tell_skipped(model: Trained, skipped: Sequence[int], drops: bool) -> None:
    """Warn, once a model, of micro-batches without a backward. `drops`: their weights are taken out of the step."""
    if skipped and not model.told_skipped:
        model.told_skipped = True
        logger.warning(
            "accumulate(): micro-batch %s had no backward before the next was asked for: %s. A loop may not run "
            "ahead, as list(accumulate(…)) does. This is said once",
            ", ".join(map(str, skipped[:5])),
            "its weight is taken out of the step" if drops else "its gradient counts as zero",
        )


def refuse_superseded() -> NoReturn:
    """Raise RuntimeError: a newer loop over the model has begun, and this one goes on."""
    raise RuntimeError(
        "accumulate(): another loop over this model has begun before this one was finished. Two loops in zip() would "
        "reduce its gradients twice: loop over zip(accumulate(model, a), b), and take both losses in one micro-batch"
    )


def scale_of_rest(
    dropped: Sequence[float], numbers: Sequence[int], group: dist.ProcessGroup | None, device: torch.device | None
) -> float:
    """Return what the gradients are multiplied by, so that the weights that are left sum to one; 1.0 where none is.

    Args:
        dropped: the weights of this rank's micro-batches without a backward.
        numbers: micro-batches of each rank.

    Collectives: one of 8 bytes for each micro-batch of the rank that has most.
    """
    weights = torch.zeros(max(numbers), dtype=torch.float64)
    weights[: len(dropped)] = torch.tensor(dropped, dtype=torch.float64)
    if group is not None:
        weights = copies_of_ranks(weights.to(device), group)
    rest = 1.0 - math.fsum(weights.flatten().tolist())  # fsum: its bits do not depend on who ran which
    return 1.0 / rest if rest > 1e-9 else 1.0


def _check(optimizer: Optimizer, _arguments: Any, _options: Any) -> None:
    if _open or _left.data or _late.data:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        _refuse_open(parameters)
        _refuse_left(parameters)
        allow_late(parameters)


def _refuse_open(parameters: list[nn.Parameter]) -> None:
    own = set(map(id, parameters))
    for model, _, incomplete in list(_open.values()):
        if own.isdisjoint(map(id, model.parameters())) or not incomplete():
            continue
        raise RuntimeError(
            "optimizer.step() inside of the loop of accumulate() over the model, or before that loop has ended, so "
            "that the step's gradients are not complete: move optimizer.step() behind the loop. A zip() that has a "
            "name leaves its second loop open: give both models to one, accumulate([first, second], …)"
        )


def _refuse_left(parameters: list[nn.Parameter]) -> None:
    # Gradients that are zero have been reduced, or zero_grad() was called.
    if any(
        one in _left and (_left[one] is _DROPPED or (one.grad is _left[one] and _is_not_zero(one.grad)))
        for one in parameters
    ):
        raise RuntimeError(
            "optimizer.step() after a loop of accumulate() that was left before its end, so that its gradients are not "
            "reduced. zip() leaves the second of two loops: give both models to one, accumulate([first, second], …). "
            "After a break or an exception, call optimizer.zero_grad() and begin a new loop"
        )


def _is_not_zero(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())
