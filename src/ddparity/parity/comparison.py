"""What `verify` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .causes import Cause

_BLIND = 0.1
Stage = Literal["initial weights", "data", "random streams", "forward", "gradients", "update", "buffers"]


@dataclass(frozen=True)
class Difference:
    """A relative difference from one process, the largest in proportion to what is tolerated there; `where`: of which
    parameter or buffer, empty for the whole."""

    value: float
    tolerance: float
    where: str = ""


@dataclass(frozen=True)
class CheckedStep:
    """The state after a step on `processes`, compared with one process. `bits`: gradients and weights are equal bit for
    bit. `samples`: each micro-batch since the last checked step had the same samples with the same data."""

    step: int
    processes: int
    weights: Difference
    gradient_norm: Difference
    loss: Difference
    buffers: Difference
    samples: bool
    bits: bool


@dataclass(frozen=True)
class Divergence:
    """Where runs first part. `processes`: of the run that parts, 1 where one process does not repeat itself. `step`:
    from 1; 0: before the first. `where`: the parameter, buffer or micro-batch."""

    processes: int
    step: int
    stage: Stage
    where: str
    detail: str
    cause: Cause

    def __str__(self) -> str:
        who = (
            "one process does not repeat itself" if self.processes == 1 else f"{self.processes} processes part from one"
        )
        when = f"in step {self.step}" if self.step else "before the first step"
        where = f", {self.where}" if self.where else ""
        return f"{who} {when}, in {self.stage}{where}: {self.detail}"


@dataclass(frozen=True)
class Curve:
    """The largest relative difference of weights after each of some steps, over the parameters that are not all
    rounding. `kind`: of a run on several processes, of one in which sums are permuted, or what is tolerated."""

    kind: Literal["processes", "noise", "tolerance"]
    processes: int
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs of one Task on different numbers of processes. `fingerprints`: of the model at the end, by number of
    processes. `factor`: how often the measured noise is tolerated, see docs/verify.md; 0 for strict."""

    steps: int
    reduction: str
    synchronised: bool
    fingerprints: dict[int, str]
    permutations: int
    factor: float
    checked: tuple[CheckedStep, ...]
    curves: tuple[Curve, ...]
    divergences: tuple[Divergence, ...]

    @property
    def parity(self) -> bool:
        return not self.divergences

    def verdict(self) -> str:
        """In a few lines: parity or not; where runs part, and the likely cause."""
        if self.divergences:
            return "no parity\n" + "\n".join(f"{found}\n{found.cause}" for found in self.divergences)
        if self.reduction == "strict":
            return "parity: the same bits on any of these numbers of processes"
        text = "parity, to rounding"
        if self.synchronised:
            text += ", with one process that runs the joined micro-batches as one batch"
        if (step := self.blind_from) is not None:
            text += f"\nfrom step {step} on rounding may be {_BLIND:.0%} of the weights and hide much: "
            text += "--reduction strict hides nothing"
        return text

    @property
    def blind_from(self) -> int | None:
        """The first checked step after which tolerated noise is a tenth of the weights; None: there is none."""
        blind = [
            step
            for curve in self.curves
            if curve.kind == "tolerance"
            for step, value in zip(curve.steps, curve.values, strict=True)
            if value >= _BLIND
        ]
        return min(blind, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts. Infinite differences are null."""
        return {"parity": self.parity, "verdict": self.verdict(), **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
