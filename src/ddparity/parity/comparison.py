"""The result of `verify`: differences after each checked step, where the runs diverge, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .causes import Cause

# From this relative noise on, a verdict says that rounding may hide a fault.
_BLIND = 0.1
Stage = Literal["initial weights", "data", "random streams", "forward", "gradients", "update", "buffers", "the end"]


@dataclass(frozen=True)
class Difference:
    """A relative difference from one process, and the difference that is tolerated.

    Of several parameters or buffers, it is the one with the largest ratio of the two, and `where` is its name.
    """

    value: float
    tolerance: float
    where: str = ""


@dataclass(frozen=True)
class CheckedStep:
    """The state after a step on `processes`, compared with one process.

    `samples`: each micro-batch since the last checked step had the same samples with the same data. `bits`: gradients
    and weights are equal bit for bit.
    """

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
    """The first place where runs diverge.

    `processes`: of the run that is compared with one process; 1: two runs of one process diverge. `step`: from 1; 0:
    before the first step. `where`: the parameter, buffer or micro-batch; empty: the whole step. `stage`: "the end" of a
    function that trains, at no step that is known.
    """

    processes: int
    step: int
    stage: Stage
    where: str
    detail: str
    cause: Cause

    def __str__(self) -> str:
        runs = "two runs on 1 process" if self.processes == 1 else f"the runs on 1 and {self.processes} processes"
        when = f"at step {self.step}" if self.step else "before the first step"
        where = f", {self.where}" if self.where else ""
        if self.stage == "the end":
            return f"{runs} diverge at the end{where}: {self.detail}"
        return f"{runs} diverge {when}, in {self.stage}{where}: {self.detail}"


@dataclass(frozen=True)
class Curve:
    """The largest relative difference of weights after each of `steps`.

    Parameters whose values are rounding only are left out. `kind`: "processes" for a run on several processes, "noise"
    for a run of one process with permuted sums, "tolerance" for the tolerated difference.
    """

    kind: Literal["processes", "noise", "tolerance"]
    processes: int
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs of one Task, or of a function that trains, on different numbers of processes.

    `fingerprints`: of the model at the end, by number of processes. `factor`: the tolerated difference as a multiple of
    the measured noise, see docs/verify.md; 0 in strict mode. `ends`: of a function, the largest difference of the
    returned model, by number of processes; it has no `checked` steps and no `curves`.
    """

    steps: int
    reduction: str
    synchronised: bool
    fingerprints: dict[int, str]
    permutations: int
    factor: float
    checked: tuple[CheckedStep, ...]
    curves: tuple[Curve, ...]
    divergences: tuple[Divergence, ...]
    ends: dict[int, Difference] = field(default_factory=dict)

    @property
    def parity(self) -> bool:
        """Whether no runs diverge."""
        return not self.divergences

    def verdict(self) -> str:
        """Return a few lines: parity or not, where the runs diverge, and the likely cause."""
        if self.divergences:
            return "no parity\n" + "\n".join(f"{found}\n{found.cause}" for found in self.divergences)
        if self.reduction == "strict":
            return "parity: the same bits on any of these numbers of processes"
        text = "parity, to rounding"
        if self.synchronised:
            text += ", with one process that runs the joined micro-batches as one batch"
        if (step := self.blind_from) is not None:
            text += f"\nfrom step {step} on, rounding may change the weights by {_BLIND:.0%} and hide a fault: "
            text += "use --reduction strict, which has no rounding"
        return text

    @property
    def blind_from(self) -> int | None:
        """The first checked step whose tolerance is a tenth of the weights or more; None: there is none."""
        blind = [
            step
            for curve in self.curves
            if curve.kind == "tolerance"
            for step, value in zip(curve.steps, curve.values, strict=True)
            if value >= _BLIND
        ]
        return min(blind, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as numbers, strings, lists and dicts. An infinite difference is None."""
        return {"parity": self.parity, "verdict": self.verdict(), **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
