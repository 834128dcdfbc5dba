"""Compare a run with its reference, stage by stage, and find where they first diverge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import causes
from .causes import Cause
from .comparison import CheckedStep, Difference, Divergence, Stage
from .noise import Series
from .notes import MicroNote, Run, StepNote

# If the noise of a parameter is above this, its value is rounding only and says nothing about the other parameters.
_ROUNDING_ONLY = 0.1


def compare(
    run: Run, reference: Run, tolerances: Series | None, joined: bool = False
) -> tuple[list[CheckedStep], Divergence | None]:
    """Return the differences after each checked step, and where the run first diverges from its reference.

    `tolerances`: by quantity and checked step; None: bits must be equal. `joined`: the reference ran joined
    micro-batches as one batch, so its random streams and outputs are not those of single micro-batches.
    """
    differences = measure_differences(run, reference)
    checked: list[CheckedStep] = []
    mismatch, at = _initial_weights(run, reference), 0
    same_samples = True
    for ours, theirs in zip(run.steps(), reference.steps(), strict=True):
        pair = _StepPair(ours, theirs, differences, tolerances, joined)
        same_samples = same_samples and next(_data(pair), None) is None
        if mismatch is None and (mismatch := next(_mismatches(pair), None)) is not None:
            at = pair.step
        if ours[0].checked:
            bits = all(note.gradients == theirs[0].gradients and note.weights == theirs[0].weights for note in ours)
            checked.append(
                CheckedStep(
                    pair.step,
                    run.world_size,
                    weights=pair.worst("weights/"),
                    gradient_norm=pair.worst("gradient norm"),
                    loss=pair.worst("loss"),
                    buffers=pair.worst("buffers/"),
                    samples=same_samples,
                    bits=bits,
                )
            )
            same_samples = True
    if mismatch is None:
        return checked, None
    if tolerances is not None and not joined and at > 0 and mismatch.stage not in ("data", "random streams"):
        # The tolerated loss of a step may hide that single forwards differ. In the first step the weights are equal, so
        # a forward with other bits is the cause of what follows. (On a GPU it may differ without a cause.)
        first = next(_first_forward(run, reference), None)
        mismatch, at = (first, 1) if first is not None else (mismatch, at)
    return checked, Divergence(run.world_size, at, mismatch.stage, mismatch.where, mismatch.detail, mismatch.cause)


def measure_differences(run: Run, reference: Run) -> dict[str, dict[int, float]]:
    """Return the relative difference of each quantity from the reference after each checked step.

    Quantities: "weights/NAME", "buffers/NAME", "gradient/NAME" (its norm), "gradient norm" (of all), "loss".
    """
    found: dict[str, dict[int, float]] = {}
    for ours, theirs in zip(run.steps(), reference.steps(), strict=True):
        first, other = ours[0], theirs[0]
        if not first.checked:
            continue
        values = dict(first.differences)
        for name in {**first.norms, **other.norms}:
            both = name in first.norms and name in other.norms
            values[f"gradient/{name}"] = _relative(first.norms[name], other.norms[name]) if both else math.inf
        values["gradient norm"] = _relative(math.hypot(*first.norms.values()), math.hypot(*other.norms.values()))
        values["loss"] = _relative(_step_loss(ours), _step_loss(theirs))
        for name, value in values.items():
            found.setdefault(name, {})[first.step] = value
    return found


def _relative(value: float, reference: float) -> float:
    """Return the difference of two numbers relative to the larger one, with the rules of `recorder.difference`."""
    if value == reference or (math.isnan(value) and math.isnan(reference)):
        return 0.0
    distance = abs(value - reference)
    return distance / max(abs(value), abs(reference)) if distance < math.inf else math.inf


def _step_loss(ranks: Sequence[StepNote]) -> float:
    """Return the mean loss of the global batch; `fsum` makes its bits independent of the order of the terms."""
    terms = [micro.loss * micro.weight for note in ranks for micro in note.micros]
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


def largest_weights(differences: Series, noise: Series, step: int) -> float:
    """Return the largest difference of weights after a step, without parameters whose values are rounding only."""
    values = {name: value[step] for name, value in differences.items() if name.startswith("weights/")}
    kept = [value for name, value in values.items() if noise.get(name, {}).get(step, 0.0) < _ROUNDING_ONLY]
    return max(kept or values.values(), default=0.0)


@dataclass(frozen=True)
class _Mismatch:
    """A stage in which a step differs from the reference's by more than is tolerated."""

    stage: Stage
    where: str
    detail: str
    cause: Cause


@dataclass(frozen=True)
class _StepPair:
    """The notes of all ranks of one step, those of the reference, and what `compare` knows of the two runs."""

    ours: Sequence[StepNote]
    theirs: Sequence[StepNote]
    differences: Series
    tolerances: Series | None
    joined: bool

    @property
    def step(self) -> int:
        return self.ours[0].step

    def tolerated(self, name: str) -> float:
        """Return 0 in strict mode, and for what the reference does not have."""
        return self.tolerances.get(name, {}).get(self.step, 0.0) if self.tolerances is not None else 0.0

    def exceeds(self, name: str) -> bool:
        return self.differences[name][self.step] > self.tolerated(name)

    def worst(self, kind: str) -> Difference:
        """Return the difference with the largest ratio to its tolerance, of all quantities of a kind."""
        found = [
            Difference(value[self.step], self.tolerated(name), name.removeprefix(kind))
            for name, value in self.differences.items()
            if name.startswith(kind) and self.step in value
        ]
        return max(found, key=lambda one: (_ratio(one), one.value), default=Difference(0.0, 0.0))

    def micro_batches(self) -> Iterator[tuple[str, MicroNote, MicroNote]]:
        """Yield the micro-batches that both have, each with its name and the rank that ran it."""
        theirs = {micro.index: micro for note in self.theirs for micro in note.micros}
        ours = [(micro.index, rank, micro) for rank, note in enumerate(self.ours) for micro in note.micros]
        for index, rank, micro in sorted(ours, key=lambda one: one[:2]):
            if index in theirs:
                yield f"micro-batch {index} (rank {rank})", micro, theirs[index]


def _ratio(one: Difference) -> float:
    if one.value <= 0:
        return 0.0
    return one.value / one.tolerance if one.tolerance else math.inf


def _initial_weights(run: Run, reference: Run) -> _Mismatch | None:
    for notes in run.ranks:
        if name := _first_unequal(notes.built, reference.ranks[0].built):
            detail = f"model() returns other values on rank {notes.rank} of {run.world_size} than on one process"
            return _Mismatch("initial weights", name, detail, causes.INITIAL_WEIGHTS)
    return None


def _first_unequal(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    return next((name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)), None)


def _first_forward(run: Run, reference: Run) -> Iterator[_Mismatch]:
    """Yield the micro-batches of the first step whose outputs have other bits than the reference's, on a CPU."""
    if reference.ranks[0].device == "cpu":
        ours, theirs = next(zip(run.steps(), reference.steps(), strict=True))
        yield from _forward(_StepPair(ours, theirs, {}, None, False))


def _mismatches(pair: _StepPair) -> Iterator[_Mismatch]:
    """Yield the mismatches of one step, in the order in which a step runs its stages."""
    yield from _data(pair)
    if pair.ours[0].checked:
        if not pair.joined:
            yield from _streams(pair)
        yield from _forward(pair)
        yield from _gradients(pair)
        yield from _update(pair)
        yield from _buffers(pair)


def _data(pair: _StepPair) -> Iterator[_Mismatch]:
    ours, theirs = ([micro.index for note in ranks for micro in note.micros] for ranks in (pair.ours, pair.theirs))
    if len(ours) != len(theirs) or set(ours) != set(theirs):
        yield _Mismatch("data", "", f"{len(ours)} micro-batches were run instead of {len(theirs)}", causes.SAMPLES)
    for name, micro, reference in pair.micro_batches():
        if micro.samples != reference.samples:
            detail = f"it has the samples {_few(micro.samples)}, on one process {_few(reference.samples)}"
            yield _Mismatch("data", name, detail, causes.SAMPLES)
        elif micro.data != reference.data:
            detail = f"other data for the same samples {_few(micro.samples)}"
            yield _Mismatch("data", name, detail, causes.SAMPLES if len(pair.ours) > 1 else causes.DATA)


def _few(samples: Sequence[int]) -> str:
    return f"[{', '.join(map(str, samples[:8]))}{', …' if len(samples) > 8 else ''}]"


def _streams(pair: _StepPair) -> Iterator[_Mismatch]:
    for name, micro, reference in pair.micro_batches():
        for when in ("before", "after"):
            if getattr(micro, when) != getattr(reference, when):
                detail = f"the global random streams have another state {when} its forward"
                yield _Mismatch("random streams", name, detail, causes.STREAMS)


def _forward(pair: _StepPair) -> Iterator[_Mismatch]:
    world_size = len(pair.ours)
    if pair.tolerances is None:
        for name, micro, reference in pair.micro_batches():
            if micro.forward != reference.forward:
                cause = causes.SCALE if _is_scaled(micro.loss, reference.loss, world_size) else causes.FORWARD
                yield _Mismatch("forward", name, _both("its loss", micro.loss, reference.loss), cause)
        return
    if not pair.exceeds("loss"):
        return
    losses = _step_loss(pair.ours), _step_loss(pair.theirs)
    where = ""
    if not pair.joined:
        where, _, _ = max(pair.micro_batches(), key=lambda found: _relative(found[1].loss, found[2].loss))
    cause = causes.SCALE if _is_scaled(*losses, world_size) else causes.FORWARD
    yield _Mismatch("forward", where, _both("the step's loss", *losses, pair.tolerated("loss")), cause)


def _gradients(pair: _StepPair) -> Iterator[_Mismatch]:
    ours, reference = pair.ours[0], pair.theirs[0]
    for rank, note in enumerate(pair.ours):
        if name := _first_unequal(note.gradients, ours.gradients):
            yield _Mismatch("gradients", name, f"rank {rank} has another gradient than rank 0", causes.UNREDUCED)
    norms = math.hypot(*ours.norms.values()), math.hypot(*reference.norms.values())
    cause = causes.SCALE if _is_scaled(*norms, len(pair.ours)) else causes.GRADIENTS

    def both(name: str, tolerance: float | None = None) -> str:
        return _both("its norm", ours.norms.get(name, math.nan), reference.norms.get(name, math.nan), tolerance)

    if pair.tolerances is None:
        if name := _first_unequal(ours.gradients, reference.gradients):
            yield _Mismatch("gradients", name, both(name), cause if norms[0] != norms[1] else causes.ROUNDING)
        return
    for name in {**reference.norms, **ours.norms}:
        if pair.exceeds(f"gradient/{name}"):
            yield _Mismatch("gradients", name, both(name, pair.tolerated(f"gradient/{name}")), cause)
    if pair.exceeds("gradient norm"):
        yield _Mismatch("gradients", "", _both("their norm", *norms, pair.tolerated("gradient norm")), cause)


def _update(pair: _StepPair) -> Iterator[_Mismatch]:
    for rank, note in enumerate(pair.ours):
        if name := _first_unequal(note.weights, pair.ours[0].weights):
            yield _Mismatch("update", name, f"rank {rank} has other weights than rank 0", causes.UPDATE)
    if pair.tolerances is not None:
        yield from _beyond_tolerance(pair, "update", "weights/", causes.UPDATE)
        return
    reference = pair.theirs[0]
    for rank, note in enumerate(pair.ours):
        if name := _first_unequal(note.weights, reference.weights):
            yield _Mismatch("update", name, _relative_difference(pair, f"weights/{name}"), causes.UPDATE)
        if note.optimizer != reference.optimizer:
            detail = f"rank {rank} has another state than one process"
            yield _Mismatch("update", "the optimizer's state", detail, causes.UPDATE)


def _buffers(pair: _StepPair) -> Iterator[_Mismatch]:
    if pair.tolerances is not None:
        yield from _beyond_tolerance(pair, "buffers", "buffers/", causes.BUFFERS)
    elif name := _first_unequal(pair.ours[0].buffers, pair.theirs[0].buffers):
        yield _Mismatch("buffers", name, _relative_difference(pair, f"buffers/{name}"), causes.BUFFERS)


def _relative_difference(pair: _StepPair, name: str) -> str:
    return f"relative difference {pair.differences.get(name, {}).get(pair.step, math.inf):.2g}"


def _beyond_tolerance(pair: _StepPair, stage: Stage, kind: str, cause: Cause) -> Iterator[_Mismatch]:
    worst = pair.worst(kind)
    if worst.value > worst.tolerance:
        detail = f"relative difference {worst.value:.2g}, rounding explains {worst.tolerance:.2g}"
        yield _Mismatch(stage, worst.where, detail, cause)


def _is_scaled(value: float, reference: float, world_size: int) -> bool:
    """Return whether a value is the reference multiplied or divided by the number of processes."""
    return world_size > 1 and any(_relative(value, reference * ratio) < 1e-3 for ratio in (world_size, 1 / world_size))


def _both(what: str, value: float, reference: float, tolerance: float | None = None) -> str:
    text = f"{what} is {value:.9g}, on one process {reference:.9g}"
    if tolerance is None:
        return text
    return f"{text}: relative difference {_relative(value, reference):.2g}, rounding explains {tolerance:.2g}"
