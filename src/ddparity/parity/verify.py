"""Start the runs of a Task on different numbers of processes, and compare them."""

from __future__ import annotations

import logging
import math
import os
import pickle
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..data.sizes import checked_integer
from ..errors import ParityError
from ..gradients.replica import Reduction
from ..launcher import launch_forked
from ..runtime.environment import find_placement
from ..task.task import Task, check_task, load_target
from .comparison import CheckedStep, Comparison, Curve, Divergence
from .functions import EndNotes, Function, judge, options_of, read_ends, tolerances
from .noise import Series, envelope, tolerance_factor
from .notes import Run, checked_steps, read_run
from .run import RunPlan, Settings, run_alone, run_together
from .stages import compare, largest_weights, measure_differences

logger = logging.getLogger(__name__)

# The probability that `verify` rejects a Task that has parity.
FALSE_ALARM = 1e-3

# A GPU may add in no fixed order, so the first loss of a repeated run may differ by this many units in the last place.
_REPEATED_UNITS = 64


def verify(
    task: Task | Function | str,
    world_sizes: Iterable[int] = (1, 2),
    steps: int = 20,
    *,
    reduction: Reduction = "fast",
    sync_batchnorm: bool = False,
    num_workers: int = 0,
    threads: int = 1,
    permutations: int = 4,
) -> Comparison:
    """Prove that a Task, or a function, trains on several processes as on one: run it on each number, and compare.

    This function starts local processes. The reference is one process, which runs twice and must give the same result
    twice. With `reduction="strict"` every bit must be equal. With "fast", rounding must explain the differences. To
    measure rounding, one process runs `permutations` more times and sums gradients in other orders. A model with
    synchronised batch norms is compared with one process that joins, into one batch, the micro-batches that N ranks run
    at the same time.

    A function trains, for as many steps as it likes, with `replicate` and `accumulate` inside of a world that is
    joined already, and returns its model or a list of models. `steps` and `reduction` are given to its parameters of
    these names. The models' weights at the end are compared. Their noise is measured by runs in which the gradients of
    each optimizer's step are rounded at random.

    Args:
        task: a Task that can be pickled (its parts are functions of an importable module), a function of an importable
            module, or "file.py:name" of one of the two.
        world_sizes: the numbers of processes to compare with one process.
        steps: optimizer steps of each run. All steps up to 20 are checked, then fewer and fewer: 30 of 1,000.
        reduction, sync_batchnorm, num_workers: as in `ddparity train`; the last two of a Task alone.
        threads: of each process, the same in all runs, because the bits depend on it.
        permutations: how many runs measure the noise, at least 2. With fewer runs, larger differences are tolerated.

    Returns:
        The comparison. Its `checked` has the differences after each checked step.

    Raises:
        ParityError: the runs diverge. The message has the step, stage, parameter or micro-batch, and the likely cause.
            `comparison` of the error is what this function would return.
        RankFailure: a run failed.
        TypeError: the Task or function cannot be pickled.
        ValueError: an argument is out of range, a function needs other arguments than `steps` and `reduction`, strict
            is combined with synchronised batch norms, or a launcher started this process.

    Collectives: none in this process.

    Example (in a test, which needs no `if __name__ == "__main__":` of its own):
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
    task: Task | Function | str,
    world_sizes: Iterable[int] = (1, 2),
    steps: int = 20,
    *,
    reduction: Reduction = "fast",
    sync_batchnorm: bool = False,
    num_workers: int = 0,
    threads: int = 1,
    permutations: int = 4,
) -> Comparison:
    """Do the same as `verify`, but return the comparison even if the runs diverge."""
    sizes = sorted({checked_integer(size, "world_sizes") for size in world_sizes} | {1})
    numbers = {"steps": steps, "num_workers": num_workers, "threads": threads, "permutations": permutations}
    for name, least in (("steps", 1), ("num_workers", 0), ("threads", 1), ("permutations", 2)):
        if checked_integer(numbers[name], name) < least:
            raise ValueError(f"verify({name}={numbers[name]}): must be at least {least}")
    if sizes[0] < 1:
        raise ValueError(f"verify(world_sizes={sizes}): a number of processes must be at least 1")
    if reduction == "strict" and sync_batchnorm:
        raise ValueError(
            'verify(reduction="strict", sync_batchnorm=True): synchronised statistics depend on the number of '
            "processes, but strict results do not: leave one of the two out"
        )
    if (placement := find_placement()) is not None:
        raise ValueError(
            f"{placement.engine} started this process, as rank {placement.rank} of {placement.world_size}, but "
            f"verify() starts its own processes: call it in a process that no launcher started"
        )
    _check_picklable(task)
    target = load_target(task) if isinstance(task, str) else task
    if isinstance(target, Task):
        check_task(target, sizes[-1])
    else:
        options_of(target, steps, reduction)
        if sync_batchnorm or num_workers:
            raise ValueError("verify(sync_batchnorm=…, num_workers=…) is for a Task: the function decides them itself")
    with tempfile.TemporaryDirectory(prefix="ddparity-verify-") as folder:
        settings = Settings(task, steps, reduction, sync_batchnorm, num_workers, threads, Path(folder))
        runs = _Verification(settings, sizes, permutations)
        return (
            runs.compare() if isinstance(target, Task) else runs.compare_function("steps" in options_of(target, 0, ""))
        )


def _check_picklable(task: Task | Function | str) -> None:
    if isinstance(task, str):
        return
    try:
        pickle.dumps(task)
    except Exception as error:
        raise TypeError(
            f"this {'Task' if isinstance(task, Task) else 'function'} cannot be pickled ({error}), but verify() sends "
            f"it to the processes that run it: make its parts functions of a module, not lambdas or inner functions, "
            f'or give its name, as in verify("file.py:name")'
        ) from error


class _Verification:
    """The runs of one comparison, in the order in which one needs the other."""

    def __init__(self, settings: Settings, sizes: Sequence[int], permutations: int) -> None:
        self._settings = settings
        self._sizes = sizes
        self._permutations = permutations
        self._strict = settings.reduction == "strict"
        self._checked = checked_steps(settings.steps)

    def compare(self) -> Comparison:
        several = [size for size in self._sizes if size > 1]
        logger.info("verify: one process, twice")
        reference, repeat = self._run_alone([RunPlan("reference", "reference"), RunPlan("repeat")])
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
        divergence = self._compare_repeat(repeat, reference)
        if divergence is not None or not several:  # noise cannot be measured if the reference does not repeat itself
            return replace(found, divergences=(divergence,) if divergence is not None else ())
        references = dict.fromkeys(several, reference)
        names = dict.fromkeys(several, "reference")
        if synchronised:
            _check_no_random_forward(reference)
            logger.info("verify: one process, with joined micro-batches")
            names = {size: f"joined{size}" for size in several}
            plans = [RunPlan(names[size], names[size], joined=size) for size in several]
            references = dict(zip(several, self._run_alone(plans), strict=True))
        noise: dict[str, list[Series]] = {}
        if not self._strict:
            logger.info("verify: one process, with sums in %d other orders", self._permutations)
            by_name = {names[size]: (size if synchronised else 1, references[size]) for size in several}
            noise, divergence = self._measure_noise(by_name)
            if divergence is not None:
                return replace(found, divergences=(divergence,))
        comparisons = len(reference.ranks[0].units) * len(self._checked) * len(several)
        factor = 0.0 if self._strict else tolerance_factor(self._permutations, comparisons, FALSE_ALARM)

        checked: list[CheckedStep] = []
        curves: list[Curve] = []
        divergences: list[Divergence] = []
        for size in several:
            logger.info("verify: %d processes", size)
            run = self._run_together(RunPlan(f"world{size}", names[size]), size)
            floors = {} if self._strict else envelope(noise[names[size]], _units(references[size]), self._checked)
            tolerances = {name: {step: factor * value for step, value in row.items()} for name, row in floors.items()}
            steps, divergence = compare(run, references[size], None if self._strict else tolerances, synchronised)
            checked += steps
            divergences += [divergence] if divergence is not None else []
            found.fingerprints[size] = run.ranks[0].fingerprint
            curves.append(self._curve("processes", size, measure_differences(run, references[size]), floors))
            if not self._strict and (synchronised or size == several[0]):
                curves += [self._curve("noise", 1, one, floors) for one in noise[names[size]]]
                curves.append(self._curve("tolerance", 1, tolerances, floors))
        checked.sort(key=lambda one: (one.step, one.processes))
        return replace(
            found, factor=factor, checked=tuple(checked), curves=tuple(curves), divergences=tuple(divergences)
        )

    def compare_function(self, takes_steps: bool) -> Comparison:
        """Compare the models that a function returns."""
        several = [size for size in self._sizes if size > 1]
        logger.info("verify: one process, twice")
        reference, repeat = self._ends_alone([RunPlan("reference", "reference"), RunPlan("repeat")])
        found = Comparison(
            self._settings.steps if takes_steps else 0,
            self._settings.reduction,
            False,
            {1: reference.fingerprint},
            0 if self._strict else self._permutations,
            0.0,
            (),
            (),
            (),
        )
        if reference.steps == 0:
            logger.warning(
                "verify: the function has taken no step of an optimizer, so what is compared may be untrained: let it "
                "train, and return the model that it has trained"
            )
        if self._strict or reference.device == "cpu":
            _, divergence = judge([repeat], reference, None)
            if divergence is not None:
                return replace(found, divergences=(divergence,))
        tolerated, factor = None, 0.0
        if not self._strict and several:
            logger.info("verify: one process, with gradients rounded in %d other ways", self._permutations)
            numbers = range(self._permutations)
            noise = self._ends_alone([RunPlan(f"rounded{one}", "reference", permutation=one) for one in numbers])
            factor = tolerance_factor(self._permutations, len(reference.units) * len(several), FALSE_ALARM)
            tolerated = tolerances(noise, reference, factor)
        divergences = []
        for size in several:
            logger.info("verify: %d processes", size)
            plan = RunPlan(f"world{size}", "reference")
            launch_forked(run_together, self._settings, plan, dict(os.environ), nproc=size)
            ends = read_ends(self._settings.folder / plan.name, size)
            found.fingerprints[size] = ends[0].fingerprint
            found.ends[size], divergence = judge(ends, reference, tolerated)
            divergences += [divergence] if divergence is not None else []
        return replace(found, factor=factor, divergences=tuple(divergences))

    def _ends_alone(self, plans: Sequence[RunPlan]) -> list[EndNotes]:
        self._launch_alone(plans)
        return [read_ends(self._settings.folder / plan.name, 1)[0] for plan in plans]

    def _curve(
        self, kind: Literal["processes", "noise", "tolerance"], processes: int, series: Series, floors: Series
    ) -> Curve:
        values = tuple(largest_weights(series, floors, step) for step in self._checked)
        return Curve(kind, processes, tuple(self._checked), values)

    def _measure_noise(
        self, references: dict[str, tuple[int, Run]]
    ) -> tuple[dict[str, list[Series]], Divergence | None]:
        """Run with permuted sums, and return the differences of these runs from each reference.

        Args:
            references: by name, the number of joined micro-batches and the run.

        Returns:
            The differences by name of the reference, and the first divergence that no order of sums explains.
        """
        scale = max((size for size in self._sizes if size & (size - 1)), default=1)  # not a power of two
        plans = [
            RunPlan(f"{name}-permuted{number}", name, joined, permutation=number, scale=scale)
            for name, (joined, _) in references.items()
            for number in range(self._permutations)
        ]
        noise: dict[str, list[Series]] = {name: [] for name in references}
        divergence = None
        for plan, run in zip(plans, self._run_alone(plans), strict=True):
            assert plan.reference is not None, "a permuted run has a reference"
            joined, reference = references[plan.reference]
            noise[plan.reference].append(measure_differences(run, reference))
            divergence = divergence or compare(run, reference, self._same_first_loss(reference), joined > 1)[1]
        return noise, divergence

    def _run_alone(self, plans: Sequence[RunPlan]) -> list[Run]:
        """Do one-process runs."""
        self._launch_alone(plans)
        return [read_run(self._settings.folder / plan.name, 1) for plan in plans]

    def _launch_alone(self, plans: Sequence[RunPlan]) -> None:
        """Do one-process runs, at the same time as many as the largest world has processes."""
        width = self._sizes[-1]
        for start in range(0, len(plans), width):
            some = plans[start : start + width]
            launch_forked(run_alone, self._settings, some, dict(os.environ), nproc=len(some))

    def _run_together(self, plan: RunPlan, size: int) -> Run:
        """Do one run on `size` processes."""
        launch_forked(run_together, self._settings, plan, dict(os.environ), nproc=size)
        return read_run(self._settings.folder / plan.name, size)

    def _compare_repeat(self, repeat: Run, reference: Run) -> Divergence | None:
        """Return where the second run of one process diverges from the first."""
        exact = self._strict or reference.ranks[0].device == "cpu"  # a GPU may add in no fixed order
        return compare(repeat, reference, None if exact else self._same_first_loss(reference))[1]

    def _same_first_loss(self, reference: Run) -> Series:
        """Return tolerances that allow everything but another loss in the first step.

        No order of the gradients' sums explains another first loss.
        """
        units = _units(reference)
        tolerances = {name: dict.fromkeys(self._checked, math.inf) for name in units}
        tolerances["loss"] = {**tolerances["loss"], 1: _REPEATED_UNITS * units["loss"]}
        return tolerances


def _units(reference: Run) -> dict[str, float]:
    return reference.ranks[0].units


def _check_no_random_forward(reference: Run) -> None:
    for note in reference.ranks[0].steps:
        for micro in note.micros:
            if micro.before != micro.after:
                raise ValueError(
                    f"the model has synchronised batch norms and draws random numbers in its forward (dropout?; "
                    f"micro-batch {micro.index} of step {note.step}), but the reference, one process that joins "
                    f"micro-batches into one batch, draws other numbers: use p=0, or no synchronised batch norms"
                )
