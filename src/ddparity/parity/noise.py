"""The noise of rounding in a training: sums in another order, and how much more than their effect is tolerated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

_MAX_PARTS = 8  # copies of the gradients in memory

# A number by quantity ("weights/NAME", "loss", ...) and step: a difference from the reference, the noise, a tolerance.
Series = Mapping[str, Mapping[int, float]]


class PermutedSum:
    """Sums the gradients of a step's micro-batches in a random order, in one process.

    `take` removes each micro-batch's gradient from the parameters after its backward. A random order deals the
    micro-batches to as many parts as there are micro-batches, at most 8. Each part adds its gradients in the order in
    which they come, as a rank does. Then the parts are added in a random order. The last bit of each sum is rounded up
    or down at random, because other things may round differently on several processes, and because two micro-batches
    have only one sum.

    Losses are multiplied by `scale`, and gradients divided by it, as by the world size where gradients are averaged.
    For a world size that is not a power of two this changes the rounding inside of each backward.

    Memory: one copy of the gradients for each part.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, scale: int = 1) -> None:
        self.scale = scale
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._generator = generator
        self._parts: list[list[torch.Tensor | None]] = []
        self._part_of: list[int] = []

    def begin(self, micro_batches: int) -> None:
        """Prepare for a step of this many micro-batches."""
        parts = min(micro_batches, _MAX_PARTS)
        self._part_of = [number % parts for number in self.order(micro_batches)]
        self._parts = [[None] * len(self._parameters) for _ in range(parts)]

    def order(self, count: int) -> list[int]:
        """Return a random order of 0 to `count` - 1; it comes from a generator of its own, not from a global stream."""
        order: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return order

    @torch.no_grad()
    def take(self, micro_batch: int) -> None:
        """Remove the gradients of micro-batch number `micro_batch`, from 0, from the parameters, and add them."""
        part = self._parts[self._part_of[micro_batch]]
        for index, parameter in enumerate(self._parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None and self.scale != 1:
                gradient = gradient / self.scale
            part[index] = _added(part[index], gradient)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the sums into the parameters' gradients."""
        for number in self.order(len(self._parts)):
            for parameter, gradient in zip(self._parameters, self._parts[number], strict=True):
                parameter.grad = _added(parameter.grad, gradient)
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                round_at_random(parameter.grad, self._generator)
        self._parts = []


def round_at_random(total: torch.Tensor, generator: torch.Generator) -> None:
    """Move a third of the elements up by one unit in the last place and a third down, in place."""
    if total.is_complex():
        total = torch.view_as_real(total)
    unit = torch.finfo(total.dtype).eps
    directions = torch.randint(-1, 2, total.shape, generator=generator).to(total)
    total.copy_(torch.where(directions == 0, total, total * (1 + unit * directions)))


def _added(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


def tolerance_factor(runs: int, comparisons: int, false_alarm: float) -> float:
    """Return how many times the largest difference of `runs` permuted runs is tolerated.

    Take differences as absolute values of normal numbers Z with one standard deviation, which is 1. Their density is at
    most k = sqrt(2 / pi), so the largest of P has a density of at most P k^P m^(P - 1), and one more difference exceeds
    F times the largest with a probability of at most

        integral of P k^P m^(P - 1) P(|Z| > F m) dm  =  k^P E|Z|^P / F^P

    F is chosen so that this is false_alarm / comparisons. `false_alarm` is then the probability that any of
    `comparisons` comparisons rejects a correct run.
    """
    moment = 2 ** (runs / 2) * math.gamma((runs + 1) / 2) / math.sqrt(math.pi)  # E|Z|^P
    bound = math.sqrt(2 / math.pi) ** runs * moment
    return max(1.0, float((bound * comparisons / false_alarm) ** (1 / runs)))


def envelope(runs: Sequence[Series], units: Mapping[str, float], steps: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return the noise by quantity and step: the largest difference of any permuted run until that step.

    The noise is at least one unit in the quantity's last place, `units`: no smaller difference exists.
    """
    found: dict[str, dict[int, float]] = {}
    for name, unit in units.items():
        largest = unit
        found[name] = {}
        for step in steps:
            largest = max([largest, *(run.get(name, {}).get(step, 0.0) for run in runs)])
            found[name][step] = largest
    return found
