"""The rounding noise of a training: what another order of the same sums does to it, and what is more than that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

_PARTS = 8  # copies of the gradients that a permuted sum holds at most


class PermutedSum:
    """Sums the gradients of a step's micro-batches, in one process, in a random order.

    Each micro-batch's gradient is taken out of the parameters after its backward. Dealt in a random order to as many
    parts as there are micro-batches, at most 8, they are added up within each part as they come, as a rank does; then
    the parts in a random order. The last bit of each sum is rounded up or down at random, for what else may round
    otherwise on several processes: two micro-batches have only one sum.

    Memory: one copy of the gradients a part.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._generator = generator
        self._parts: list[list[torch.Tensor | None]] = []
        self._dealt: list[int] = []

    def begin(self, micro_batches: int) -> None:
        """Before a step of so many micro-batches."""
        parts = min(micro_batches, _PARTS)
        self._dealt = [place % parts for place in self.order(micro_batches)]
        self._parts = [[None] * len(self._parameters) for _ in range(parts)]

    def order(self, count: int) -> list[int]:
        """A random order of `count` things; drawn from a generator of its own, so that no other stream moves."""
        order: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return order

    @torch.no_grad()
    def take(self, micro_batch: int) -> None:
        """Take what the backward of micro-batch `micro_batch`, counted from 0, left."""
        part = self._parts[self._dealt[micro_batch]]
        for index, parameter in enumerate(self._parameters):
            gradient, parameter.grad = parameter.grad, None
            part[index] = _added(part[index], gradient)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the sums in the parameters' gradients."""
        for number in self.order(len(self._parts)):
            for parameter, gradient in zip(self._parameters, self._parts[number], strict=True):
                parameter.grad = _added(parameter.grad, gradient)
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                self._round_at_random(parameter.grad)
        self._parts = []

    def _round_at_random(self, total: torch.Tensor) -> None:
        """In place, a third of the elements one unit of the last place up, a third down."""
        if total.is_complex():
            total = torch.view_as_real(total)
        last_place = torch.finfo(total.dtype).eps
        ways = torch.randint(-1, 2, total.shape, generator=self._generator).to(total)
        total.copy_(torch.where(ways == 0, total, total * (1 + last_place * ways)))


def _added(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


Measured = Mapping[str, Mapping[int, float]]  # a quantity's differences from the reference, by step


def tolerance_factor(runs: int, comparisons: int, false_alarm: float) -> float:
    """By how much an honest run's difference may exceed the largest of `runs` permuted runs'.

    Take differences as absolute values of normal numbers Z of one spread, which is 1. Their density is at most k =
    sqrt(2 / pi), so the largest of P has a density of at most P k^P m^(P - 1), and one more exceeds F times it with a
    probability of at most

        integral of P k^P m^(P - 1) P(|Z| > F m) dm  =  k^P E|Z|^P / F^P

    which, for each of `comparisons` comparisons, is set to false_alarm / comparisons.
    """
    moment = 2 ** (runs / 2) * math.gamma((runs + 1) / 2) / math.sqrt(math.pi)  # E|Z|^P
    bound = math.sqrt(2 / math.pi) ** runs * moment
    return max(1.0, float((bound * comparisons / false_alarm) ** (1 / runs)))


def envelope(runs: Sequence[Measured], units: Mapping[str, float], steps: Sequence[int]) -> dict[str, dict[int, float]]:
    """The noise of each quantity after each checked step: the most that any permuted run has differed until then.

    At least one unit in the quantity's last place, `units`: a smaller difference cannot be told from none.
    """
    found: dict[str, dict[int, float]] = {}
    for name, unit in units.items():
        largest = unit
        found[name] = {}
        for step in steps:
            largest = max([largest, *(run.get(name, {}).get(step, 0.0) for run in runs)])
            found[name][step] = largest
    return found
