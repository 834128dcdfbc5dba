"""Starts the runs that `verify` compares."""

from __future__ import annotations

import logging
import math
import os
import pickle
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..data.plan import checked_integer
from ..errors import ParityError
from ..gradients.replicate import Reduction
from ..launcher import launch_forked
from ..runtime.environment import find_placement
from ..task.task import Task, check_task, load_task
from .comparison import CheckedStep, Comparison, Curve, Divergence
from .noise import Measured, envelope, tolerance_factor
from .notes import Run, checked_steps, read_run
from .run import RunPlan, Settings, run_alone, run_together
from .stages import compare, largest_weights, measure

logger = logging.getLogger(__name__)

# How probable it is that an honest Task is told that it has no parity.
FALSE_ALARM = 1e-3

# A forward of one process twice, on a device whose sums have no fixed order: units in the last place.
_REPEATED_UNITS = 64


def verify(
    task: Task | str,
    world_sizes: Iterable[int] = (1, 2),
    steps: int = 20,
    *,
    reduction: Reduction = "fast",
    sync_batchnorm: bool = False,
    num_workers: int = 0,
    threads: int = 1,
    permutations: int = 4,
) -> Comparison:
    """Prove that a Task trains as one process on several: run its steps on each, and compare.

    Runs on local processes, which it starts. One process is the reference, and runs twice: it must repeat itself. With
    `reduction="strict"` every bit must be equal. With "fast" differences must be explained by rounding, which is
    measured: in `permutations` further runs of one process, gradients are summed in other orders. A model with
    synchronised batch norms is compared with one process that runs the micro-batches that N ranks run at the same time
    as one batch.

    Args:
        task: a Task that can be pickled (its parts are functions of an importable module), or "file.py:name".
        world_sizes: numbers of processes, besides one.
        steps: optimizer steps of each run; all up to 20 are checked, then ever fewer: 31 of 1,000.
        reduction, sync_batchnorm, num_workers: as in `ddparity train`.
        threads: of each process, the same for all: bits depend on it.
        permutations: runs that measure the noise, 2 or more: the fewer, the more is tolerated.

    Returns:
        The comparison, whose `checked` has the differences after each checked step.

    Raises:
        ParityError: the runs part. It says in which step, stage, parameter or micro-batch, with the likely cause; its
            `comparison` is what this function would have returned.
        RankFailure: a run failed.
        TypeError: the Task cannot be pickled.
        ValueError: an argument is out of range, or strict is combined with synchronised batch norms; or a launcher
            started this process.

    Collectives: none in this process.

    Example (in a test, behind no `if __name__ == "__main__":` of its own):
        ddparity.verify("examples/digits.py:digits", world_sizes=(1, 2, 4), reduction="strict")
    """
    comparison = compare_runs(
        task,
        world_sizes,
        steps,
        reduction=reduction,
        sync_batchnorm=sync_batchnorm,
        num_workers=num_workers,
        threads=threads,
        permutations=permutations,
    )
    if not comparison.parity:
        raise ParityError(comparison.verdict(), comparison)
    return comparison


def compare_runs(
    task: Task | str,
    world_sizes: Iterable[int] = (1, 2),
    steps: int = 20,
    *,
    reduction: Reduction = "fast",
    sync_batchnorm: bool = False,
    num_workers: int = 0,
    threads: int = 1,
    permutations: int = 4,
) -> Comparison:
    """As `verify`, and returns the comparison also where the runs part."""
    sizes = sorted({checked_integer(size, "world_sizes") for size in world_sizes} | {1})
    numbers = {"steps": steps, "num_workers": num_workers, "threads": threads, "permutations": permutations}
    for name, least in (("steps", 1), ("num_workers", 0), ("threads", 1), ("permutations", 2)):
        if checked_integer(numbers[name], name) < least:
            raise ValueError(f"verify({name}={numbers[name]}): must be at least {least}")
    if sizes[0] < 1:
        raise ValueError(f"verify(world_sizes={sizes}): numbers of processes are at least 1")
    if reduction == "strict" and sync_batchnorm:
        raise ValueError(
            'verify(reduction="strict", sync_batchnorm=True): synchronised statistics depend on the number of '
            "processes: leave one of the two out"
        )
    if (placement := find_placement()) is not None:
        raise ValueError(
            f"verify() starts its own processes, but {placement.engine} started this one, as rank {placement.rank} of "
            f"{placement.world_size}: call it in a process that no launcher started"
        )
    _check_travels(task)
    check_task(load_task(task) if isinstance(task, str) else task, sizes[-1])
    with tempfile.TemporaryDirectory(prefix="ddparity-verify-") as folder:
        settings = Settings(task, steps, reduction, sync_batchnorm, num_workers, threads, Path(folder))
        return _Runs(settings, sizes, permutations).compared()


def _check_travels(task: Task | str) -> None:
    if isinstance(task, str):
        return
    try:
        pickle.dumps(task)
    except Exception as error:
        raise TypeError(
            f"verify() cannot send this Task to the processes that run it ({error}): make its parts functions of a "
            f'module, not lambdas or inner functions, or give its name, as in verify("file.py:name")'
        ) from error


class _Runs:
    """The runs of one comparison, in the order in which they need each other."""

    def __init__(self, settings: Settings, sizes: Sequence[int], permutations: int) -> None:
        self._settings = settings
        self._sizes = sizes
        self._permutations = permutations
        self._strict = settings.reduction == "strict"
        self._checked = checked_steps(settings.steps)

    def compared(self) -> Comparison:
        several = [size for size in self._sizes if size > 1]
        logger.info("verify: one process, twice")
        reference, repeat = self._alone([RunPlan("reference", "reference"), RunPlan("repeat")])
        synchronised = reference.ranks[0].synchronised and bool(several)
        found = Comparison(
            self._settings.steps,
            self._settings.reduction,
            synchronised,
            {1: reference.ranks[0].fingerprint},
            0 if self._strict else self._permutations,
            0.0,
            (),
            (),
            (),
        )
        again = self._repeated(repeat, reference)
        if again is not None or not several:
            return replace(found, divergences=(again,) if again is not None else ())
        references = dict.fromkeys(several, reference)
        names = dict.fromkeys(several, "reference")
        if synchronised:
            _check_drawless(reference)
            logger.info("verify: one process, with joined micro-batches")
            names = {size: f"joined{size}" for size in several}
            plans = [RunPlan(names[size], names[size], joined=size) for size in several]
            references = dict(zip(several, self._alone(plans), strict=True))
        noise: dict[str, list[Measured]] = {}
        if not self._strict:
            logger.info("verify: one process, with sums in %d other orders", self._permutations)
            noise, unlike = self._noise(
                {names[size]: (size if synchronised else 1, references[size]) for size in several}
            )
            if unlike is not None:
                return replace(found, divergences=(unlike,))
        comparisons = len(reference.ranks[0].units) * len(self._checked) * len(several)
        factor = 0.0 if self._strict else tolerance_factor(self._permutations, comparisons, FALSE_ALARM)

        checked: list[CheckedStep] = []
        curves: list[Curve] = []
        divergences: list[Divergence] = []
        for size in several:
            logger.info("verify: %d processes", size)
            run = self._together(RunPlan(f"world{size}", names[size]), size)
            floors = {} if self._strict else envelope(noise[names[size]], _units(references[size]), self._checked)
            allowed = {name: {step: factor * value for step, value in row.items()} for name, row in floors.items()}
            rows, divergence = compare(run, references[size], None if self._strict else allowed, synchronised)
            checked += rows
            divergences += [divergence] if divergence is not None else []
            found.fingerprints[size] = run.ranks[0].fingerprint
            curves.append(self._curve("processes", size, measure(run, references[size]), floors))
            if not self._strict and (synchronised or size == several[0]):
                curves += [self._curve("noise", 1, one, floors) for one in noise[names[size]]]
                curves.append(self._curve("tolerance", 1, allowed, floors))
        checked.sort(key=lambda one: (one.step, one.processes))
        return replace(
            found, factor=factor, checked=tuple(checked), curves=tuple(curves), divergences=tuple(divergences)
        )

    def _curve(self, kind: str, processes: int, measured: Measured, floors: Measured) -> Curve:
        values = tuple(largest_weights(measured, floors, step) for step in self._checked)
        return Curve(kind, processes, tuple(self._checked), values)  # type: ignore[arg-type]

    def _noise(self, references: dict[str, tuple[int, Run]]) -> tuple[dict[str, list[Measured]], Divergence | None]:
        """How permuted runs differ from each reference, and where one differs by more than the order of sums."""
        plans = [
            RunPlan(f"{name}-permuted{number}", name, joined, permutation=number)
            for name, (joined, _) in references.items()
            for number in range(self._permutations)
        ]
        found: dict[str, list[Measured]] = {name: [] for name in references}
        unlike = None
        for plan, run in zip(plans, self._alone(plans), strict=True):
            assert plan.reference is not None, "permuted runs have one"
            joined, reference = references[plan.reference]
            found[plan.reference].append(measure(run, reference))
            unlike = unlike or compare(run, reference, self._first_loss(reference), joined > 1)[1]
        return found, unlike

    def _alone(self, plans: Sequence[RunPlan]) -> list[Run]:
        """One-process runs, as many at the same time as the largest world has processes."""
        width = self._sizes[-1]
        for start in range(0, len(plans), width):
            some = plans[start : start + width]
            launch_forked(run_alone, self._settings, some, dict(os.environ), nproc=len(some))
        return [read_run(self._settings.folder / plan.name, 1) for plan in plans]

    def _together(self, plan: RunPlan, size: int) -> Run:
        launch_forked(run_together, self._settings, plan, dict(os.environ), nproc=size)
        return read_run(self._settings.folder / plan.name, size)

    def _repeated(self, repeat: Run, reference: Run) -> Divergence | None:
        """Where a second run of one process parts from the first: then no noise can be measured."""
        exact = self._strict or reference.ranks[0].device == "cpu"  # sums of a GPU may have no fixed order
        return compare(repeat, reference, None if exact else self._first_loss(reference))[1]

    def _first_loss(self, reference: Run) -> Measured:
        """Tolerates anything but another first loss, which no order of gradients' sums explains."""
        units = _units(reference)
        tolerances = {name: dict.fromkeys(self._checked, math.inf) for name in units}
        tolerances["loss"] = {**tolerances["loss"], 1: _REPEATED_UNITS * units["loss"]}
        return tolerances


def _units(reference: Run) -> dict[str, float]:
    return reference.ranks[0].units


def _check_drawless(reference: Run) -> None:
    for note in reference.ranks[0].steps:
        for micro in note.micros:
            if micro.before != micro.after:
                raise ValueError(
                    f"the model has synchronised batch norms and draws random numbers in its forward (dropout?; "
                    f"micro-batch {micro.index} of step {note.step}): one process that runs joined micro-batches as "
                    f"one batch draws others, so nothing can be compared. Verify it with p=0, or without synchronised "
                    f"batch norms"
                )
