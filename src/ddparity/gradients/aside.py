"""The gradients that parameters had before a step, put aside until the step's own are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm.allreduce import copies_of_ranks
from ..compat import local, untraced, version

_TO_ZERO, _TO_NONE = 1, 2  # what zero_grad() has made of a gradient


class Aside:
    """What the parameters had before a loop. A gradient is put aside by the loop's first backward that adds to it.

    Until then it stays where `optimizer.zero_grad()` finds it, which may be called inside of the loop.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._before: list[torch.Tensor | None] = [None] * len(parameters)
        self._waiting: dict[int, tuple[torch.Tensor, int]] = {}  # by position: the gradient, and its version
        self._dropped: dict[int, int] = {}  # by position: how
        self._hooks: list[Any] = []
        for number, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            self._waiting[number] = parameter.grad, version(parameter.grad)
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(untraced(self._put, number)))
            else:  # frozen so far; no hook
                self._put(number)

    def _put(self, number: int, _: Any = None) -> None:
        if self._is_old(number):
            parameter = self._parameters[number]
            self._before[number], parameter.grad = parameter.grad, None
            del self._waiting[number]

    def _is_old(self, number: int) -> bool:
        if number not in self._waiting:
            return False
        old, before = self._waiting[number]
        if self._parameters[number].grad is not old:  # zero_grad(), or another gradient in its place
            del self._waiting[number]
            self._dropped[number] = _TO_NONE
            return False
        if version(old) != before:  # zero_grad(set_to_none=False), or another view of the same memory was written
            if bool(local(old).any()):
                if local(old)._is_view():
                    return True
                raise RuntimeError(
                    "accumulate(): the loop has written by hand into a gradient that was there before it, so that what "
                    "is new in it cannot be told: call optimizer.zero_grad() before"
                )
            self._waiting[number] = old, version(old)
            self._dropped[number] = _TO_ZERO
        return True

    def waiting(self) -> set[int]:
        """Return the positions of the gradients that are still what they were before the loop.

        Raises:
            RuntimeError: the loop has written into one by hand, so that old and new are one.
        """
        return {number for number in list(self._waiting) if self._is_old(number)}

    def settle(self) -> None:
        """Put aside what no backward has; after the loop."""
        for number in self.waiting():
            self._put(number)
        self.end()

    def agree(self, group: dist.ProcessGroup) -> None:
        """Drop what another rank's loop has dropped, by zero_grad() in it; on a rank without a micro-batch none ran.

        Collectives: one of a byte a parameter. All ranks call it, after `settle`.
        """
        own = [self._dropped.get(number, 0) for number in range(len(self._parameters))]
        dropped = torch.tensor(own, dtype=torch.uint8, device=self._parameters[0].device)
        for number, how in enumerate(copies_of_ranks(dropped, group).amax(0).tolist()):
            old = self._before[number]
            if how == _TO_NONE:
                self._before[number] = None
            elif how == _TO_ZERO and old is not None:
                old.zero_()

    def end(self) -> None:
        """Put nothing aside any more."""
        self._waiting.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def put_back(self) -> None:
        """Add to the gradients what the parameters had before."""
        self.end()
        for number, (parameter, old) in enumerate(zip(self._parameters, self._before, strict=True)):
            if old is not None:
                parameter.grad = old if parameter.grad is None else old.add_(parameter.grad)
                self._before[number] = None

    def restore(self) -> None:
        """Set the gradients to what the parameters had before."""
        for number, (parameter, old) in enumerate(zip(self._parameters, self._before, strict=True)):
            if number not in self._waiting:
                parameter.grad = old
        self.end()
