"""Compares a run with its reference, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from . import causes
from .causes import Cause
from .comparison import CheckedStep, Difference, Divergence, Stage
from .digests import relative
from .noise import Measured
from .notes import MicroNote, Run, StepNote

# Differences of weights above this are all rounding: what such a parameter becomes says nothing about the others.
_ALL_ROUNDING = 0.1


@dataclass(frozen=True)
class Parting:
    """Where a run leaves its reference, before it is known whose run it is."""

    stage: Stage
    where: str
    detail: str
    cause: Cause


def measure(run: Run, reference: Run) -> dict[str, dict[int, float]]:
    """Each quantity's relative difference from the reference after each checked step.

    Quantities: "weights/NAME", "buffers/NAME", "gradient/NAME" (its norm), "gradient norm", "loss".
    """
    found: dict[str, dict[int, float]] = {}
    for ours, theirs in zip(run.steps(), reference.steps(), strict=True):
        first, other = ours[0], theirs[0]
        if not first.checked:
            continue
        values = dict(first.differences)
        for name in {**first.norms, **other.norms}:
            values[f"gradient/{name}"] = _relative(first.norms.get(name), other.norms.get(name))
        values["gradient norm"] = relative(math.hypot(*first.norms.values()), math.hypot(*other.norms.values()))
        values["loss"] = relative(step_loss(ours), step_loss(theirs))
        for name, value in values.items():
            found.setdefault(name, {})[first.step] = value
    return found


def _relative(value: float | None, reference: float | None) -> float:
    return math.inf if value is None or reference is None else relative(value, reference)


def step_loss(ranks: Sequence[StepNote]) -> float:
    """The global batch's mean loss, without rounding of its own: its bits do not depend on the order of the sum."""
    terms = [micro.loss * micro.weight for note in ranks for micro in note.micros]
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


def compare(
    run: Run, reference: Run, tolerances: Measured | None, joined: bool = False
) -> tuple[list[CheckedStep], Divergence | None]:
    """Each checked step's differences, and where the runs first part.

    `tolerances`: of each quantity after each checked step; None: bits must be equal. `joined`: the reference ran
    joined micro-batches as one, so that streams and outputs are not those of a micro-batch.
    """
    measured = measure(run, reference)
    checked: list[CheckedStep] = []
    parting, at = _initial(run, reference), 0
    samples = True
    for ours, theirs in zip(run.steps(), reference.steps(), strict=True):
        step = ours[0].step
        samples = samples and next(_data(ours, theirs), None) is None
        found = next(_partings(ours, theirs, measured, tolerances, joined), None) if parting is None else None
        if found is not None:
            parting, at = found, step
        if ours[0].checked:
            bits = all(n.gradients == theirs[0].gradients and n.weights == theirs[0].weights for n in ours)
            worst = partial(_worst, measured, tolerances, step)
            checked.append(
                CheckedStep(
                    step,
                    run.world_size,
                    worst("weights/"),
                    worst("gradient norm"),
                    worst("loss"),
                    worst("buffers/"),
                    samples,
                    bits,
                )
            )
            samples = True
    if parting is None:
        return checked, None
    if tolerances is not None and not joined and at > 0 and parting.stage not in ("data", "random streams"):
        # It began in the first forward where that, of equal weights, gave other bits already.
        parting, at = next(((one, 1) for one in _first_forward(run, reference)), (parting, at))
    return checked, Divergence(run.world_size, at, parting.stage, parting.where, parting.detail, parting.cause)


def _first_forward(run: Run, reference: Run) -> Iterator[Parting]:
    """Whether another forward in the first step explains what was found; a GPU's may differ without a cause."""
    if reference.ranks[0].device == "cpu":
        ours, theirs = next(zip(run.steps(), reference.steps(), strict=True))
        yield from _forward(ours, theirs, {}, None, False)


def _worst(measured: Measured, tolerances: Measured | None, step: int, kind: str) -> Difference:
    """The quantity of a kind that is largest in proportion to its tolerance."""
    found = [
        Difference(value[step], _tolerated(tolerances, name, step), name.removeprefix(kind))
        for name, value in measured.items()
        if name.startswith(kind) and step in value
    ]
    return max(found, key=lambda one: (_excess(one), one.value), default=Difference(0.0, 0.0))


def _tolerated(tolerances: Measured | None, name: str, step: int) -> float:
    """Nothing in strict mode, and of what the reference does not have."""
    return tolerances.get(name, {}).get(step, 0.0) if tolerances is not None else 0.0


def _excess(one: Difference) -> float:
    if one.value <= 0:
        return 0.0
    return one.value / one.tolerance if one.tolerance else math.inf


def largest_weights(measured: Measured, noise: Measured, step: int) -> float:
    """The largest difference of weights, leaving out parameters that are all rounding."""
    values = {name: value[step] for name, value in measured.items() if name.startswith("weights/")}
    kept = [value for name, value in values.items() if noise.get(name, {}).get(step, 0.0) < _ALL_ROUNDING]
    return max(kept or values.values(), default=0.0)


def _initial(run: Run, reference: Run) -> Parting | None:
    for notes in run.ranks:
        if name := _first_other(notes.built, reference.ranks[0].built):
            detail = f"model() gives other values on rank {notes.rank} of {run.world_size} than on one process"
            return Parting("initial weights", name, detail, causes.INITIAL_WEIGHTS)
    return None


def _first_other(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    return next((name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)), None)


def _partings(
    ours: Sequence[StepNote],
    theirs: Sequence[StepNote],
    measured: Measured,
    tolerances: Measured | None,
    joined: bool,
) -> Iterator[Parting]:
    """How one step parts from the reference's, in the order in which a step goes."""
    yield from _data(ours, theirs)
    if ours[0].checked:
        if not joined:
            yield from _streams(ours, theirs)
        yield from _forward(ours, theirs, measured, tolerances, joined)
        yield from _gradients(ours, theirs, measured, tolerances)
        yield from _update(ours, theirs, measured, tolerances)
        yield from _buffers(ours, theirs, measured, tolerances)


def _micros(ranks: Sequence[StepNote]) -> dict[int, tuple[int, MicroNote]]:
    return {micro.index: (rank, micro) for rank, note in enumerate(ranks) for micro in note.micros}


def _pairs(ours: Sequence[StepNote], theirs: Sequence[StepNote]) -> Iterator[tuple[str, MicroNote, MicroNote]]:
    """Micro-batches that both have, with a name that says where it ran."""
    there = _micros(theirs)
    for index, (rank, micro) in sorted(_micros(ours).items()):
        if index in there:
            yield f"micro-batch {index} (rank {rank})", micro, there[index][1]


def _data(ours: Sequence[StepNote], theirs: Sequence[StepNote]) -> Iterator[Parting]:
    counts = [sum(len(note.micros) for note in ranks) for ranks in (ours, theirs)]
    if counts[0] != counts[1] or set(_micros(ours)) != set(_micros(theirs)):
        yield Parting("data", "", f"{counts[0]} micro-batches were run instead of {counts[1]}", causes.SAMPLES)
    for name, micro, there in _pairs(ours, theirs):
        if micro.samples != there.samples:
            detail = f"it has the samples {_few(micro.samples)}, on one process {_few(there.samples)}"
            yield Parting("data", name, detail, causes.SAMPLES)
        elif micro.data != there.data:
            detail = f"other data for the same samples {_few(micro.samples)}"
            yield Parting("data", name, detail, causes.SAMPLES if len(ours) > 1 else causes.DATA)


def _few(samples: Sequence[int]) -> str:
    return f"[{', '.join(map(str, samples[:8]))}{', …' if len(samples) > 8 else ''}]"


def _streams(ours: Sequence[StepNote], theirs: Sequence[StepNote]) -> Iterator[Parting]:
    for name, micro, there in _pairs(ours, theirs):
        for when in ("before", "after"):
            if getattr(micro, when) != getattr(there, when):
                yield Parting(
                    "random streams",
                    name,
                    f"the global streams are in another state {when} its forward",
                    causes.STREAMS,
                )


def _forward(
    ours: Sequence[StepNote], theirs: Sequence[StepNote], measured: Measured, tolerances: Measured | None, joined: bool
) -> Iterator[Parting]:
    step = ours[0].step
    if tolerances is None:
        for name, micro, there in _pairs(ours, theirs):
            if micro.forward != there.forward:
                cause = causes.SCALE if _is_scale(micro.loss, there.loss, len(ours)) else causes.FORWARD
                yield Parting("forward", name, _numbers("its loss", micro.loss, there.loss), cause)
        return
    if _within(measured, tolerances, "loss", step):
        return
    losses = step_loss(ours), step_loss(theirs)
    where = ""
    if not joined:
        where, _, _ = max(_pairs(ours, theirs), key=lambda pair: relative(pair[1].loss, pair[2].loss))
    cause = causes.SCALE if _is_scale(losses[0], losses[1], len(ours)) else causes.FORWARD
    yield Parting(
        "forward", where, _numbers("the step's loss", losses[0], losses[1], _tolerated(tolerances, "loss", step)), cause
    )


def _gradients(
    ours: Sequence[StepNote], theirs: Sequence[StepNote], measured: Measured, tolerances: Measured | None
) -> Iterator[Parting]:
    step, reference = ours[0].step, theirs[0]
    for rank, note in enumerate(ours):
        if name := _first_other(note.gradients, ours[0].gradients):
            yield Parting("gradients", name, f"rank {rank} has another gradient than rank 0", causes.UNREDUCED)
    norms = [math.hypot(*note.norms.values()) for note in (ours[0], reference)]
    cause = causes.SCALE if _is_scale(norms[0], norms[1], len(ours)) else causes.GRADIENTS
    if tolerances is None:
        if name := _first_other(ours[0].gradients, reference.gradients):
            detail = _numbers("its norm", ours[0].norms.get(name, math.nan), reference.norms.get(name, math.nan))
            yield Parting("gradients", name, detail, cause if norms[0] != norms[1] else causes.ROUNDING)
        return
    for name in {**reference.norms, **ours[0].norms}:
        if not _within(measured, tolerances, f"gradient/{name}", step):
            norm, other = ours[0].norms.get(name, math.nan), reference.norms.get(name, math.nan)
            detail = _numbers("its norm", norm, other, _tolerated(tolerances, f"gradient/{name}", step))
            yield Parting("gradients", name, detail, cause)
    if not _within(measured, tolerances, "gradient norm", step):
        yield Parting(
            "gradients",
            "",
            _numbers("their norm", norms[0], norms[1], _tolerated(tolerances, "gradient norm", step)),
            cause,
        )


def _update(
    ours: Sequence[StepNote], theirs: Sequence[StepNote], measured: Measured, tolerances: Measured | None
) -> Iterator[Parting]:
    step = ours[0].step
    for rank, note in enumerate(ours):
        if name := _first_other(note.weights, ours[0].weights):
            yield Parting("update", name, f"rank {rank} has other weights than rank 0", causes.UPDATE)
    if tolerances is not None:
        yield from _beyond("update", "weights/", measured, tolerances, step, causes.UPDATE)
        return
    for rank, note in enumerate(ours):
        if name := _first_other(note.weights, theirs[0].weights):
            largest = measured.get(f"weights/{name}", {}).get(step, math.inf)
            yield Parting("update", name, f"relative difference {largest:.2g}", causes.UPDATE)
        if note.optimizer != theirs[0].optimizer:
            yield Parting("update", "the optimizer's state", f"rank {rank} has another", causes.UPDATE)


def _buffers(
    ours: Sequence[StepNote], theirs: Sequence[StepNote], measured: Measured, tolerances: Measured | None
) -> Iterator[Parting]:
    step = ours[0].step
    if tolerances is not None:
        yield from _beyond("buffers", "buffers/", measured, tolerances, step, causes.BUFFERS)
    elif name := _first_other(ours[0].buffers, theirs[0].buffers):
        largest = measured.get(f"buffers/{name}", {}).get(step, math.inf)
        yield Parting("buffers", name, f"relative difference {largest:.2g}", causes.BUFFERS)


def _beyond(
    stage: Stage, kind: str, measured: Measured, tolerances: Measured, step: int, cause: Cause
) -> Iterator[Parting]:
    worst = _worst(measured, tolerances, step, kind)
    if worst.value > worst.tolerance:
        detail = f"relative difference {worst.value:.2g}, where rounding explains {worst.tolerance:.2g}"
        yield Parting(stage, worst.where, detail, cause)


def _within(measured: Measured, tolerances: Measured, name: str, step: int) -> bool:
    return measured[name][step] <= _tolerated(tolerances, name, step)


def _is_scale(value: float, reference: float, world_size: int) -> bool:
    """Whether a value is the reference times or divided by the number of processes, as a wrong scale makes it."""
    return world_size > 1 and any(relative(value, reference * ratio) < 1e-3 for ratio in (world_size, 1 / world_size))


def _numbers(what: str, value: float, reference: float, tolerance: float | None = None) -> str:
    text = f"{what} is {value:.9g}, on one process {reference:.9g}"
    if tolerance is None:
        return text
    return f"{text}: relative difference {relative(value, reference):.2g}, where rounding explains {tolerance:.2g}"
