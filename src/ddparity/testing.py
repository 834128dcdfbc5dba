"""Checks for users' own tests: whether a plan of one's own keeps what `ddparity.Plan` asks for."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np

from .data.plan import MicroBatch, Plan, check_plan_methods
from .data.stream import StreamPlan

_STEPS = 6  # of an epoch, at its beginning, and as many at its end
_ROUNDS = 10  # of epochs, in which a plan that keeps a bounded number of steps or epochs stops growing


def check_plan(plan: Plan, epochs: Sequence[int] = (0, 1, 5), world_sizes: Sequence[int] = (1, 2, 3, 4, 7)) -> None:
    """Check that a plan gives the same steps on any number of ranks, whenever it is asked.

    It looks at the first and the last steps of each epoch in `epochs`: the sizes of micro-batches, their samples,
    weights, seeds and positions; that the shares of ranks are contiguous, that together they are the step of one
    process, and that their numbers differ by at most one; that a step is the same when it is asked for alone, again,
    in another order, and from a copy that was pickled; that neither random streams nor other epochs change it; and that
    the plan does not keep more memory with each step that it is asked for.

    It cannot check that a plan does not depend on the machine, for example by the time or the order of a set.

    Args:
        plan: the plan. epochs: the epochs that are looked at. world_sizes: the numbers of ranks.

    Raises:
        AssertionError: the plan breaks a promise; the message names it and the value.
        TypeError: something that a plan must have is missing; the message names it.

    Collectives: none.

    Example:
        >>> import ddparity as dp
        >>> check_plan(dp.BatchPlan(50, global_batch=8, micro_batch=4))
    """
    if isinstance(plan, StreamPlan):
        raise TypeError("check_plan() got a StreamPlan, whose samples the stream decides: it checks plans of data sets")
    check_plan_methods(plan)
    most = plan.micro_batches_per_step
    _whole(most, "micro_batches_per_step", 1)
    _whole(plan.steps_per_epoch, "steps_per_epoch", 0)
    _require(type(plan.seed) is int, f"seed={plan.seed!r} is not an integer")
    try:
        copy = pickle.loads(pickle.dumps(plan))
    except Exception as error:
        raise AssertionError(f"the plan cannot be pickled: {type(error).__name__}: {error}") from error
    about = plan.description()
    _require(
        all(isinstance(value, (bool, int, float, str, type(None))) for value in about.values()),
        f"description() has a value that a checkpoint does not compare: {about}",
    )
    seeds: dict[int, str] = {}
    expected: dict[tuple[int, int], list[Any]] = {}
    for epoch in epochs:
        steps = plan.steps_in(epoch)
        _whole(steps, f"steps_in({epoch})", 0)
        positions: set[int] = set()
        for step in sorted({*range(min(_STEPS, steps)), *range(max(0, steps - _STEPS), steps)}):
            where = f"epoch {epoch}, step {step}"
            micros = plan.step(epoch, step)
            _check_sizes(plan.sizes(epoch, step), micros, most, where)
            for micro in micros:
                _check_samples(micro, plan.length, where)
                own = range(micro.position, micro.position + len(micro.samples))
                _require(not positions.intersection(own), f"{where}: the positions {own} are those of other samples")
                positions.update(own)
                _note_seed(seeds, micro.seed, f"micro-batch {micro.index} of {where}")
            _note_seed(seeds, plan.seed_after(epoch, step), f"the end of {where}")
            expected[epoch, step] = _values(micros)
            for world_size in world_sizes:
                _check_shares(plan, epoch, step, world_size, expected[epoch, step], where)
        _check_series(plan, epoch, steps, expected)
        _require(not list(plan.steps(epoch, steps)), f"epoch {epoch} has steps after the last of {steps}")
        for beyond in (-1, steps):
            try:
                plan.step(epoch, beyond)
            except IndexError:
                continue
            raise AssertionError(
                f"step({epoch}, {beyond}) gives a step, but epoch {epoch} has {steps}: raise IndexError"
            )
    state = np.random.get_state()
    np.random.seed(1)
    try:
        for (epoch, step), values in sorted(expected.items(), reverse=True):
            for who, one in (("the plan itself", plan), ("a copy that was pickled", copy)):
                again = _values(one.step(epoch, step))
                _require(
                    again == values, f"epoch {epoch}, step {step} is {values}, but {again} when {who} is asked again"
                )
    finally:
        np.random.set_state(state)
    _require(plan.description() == about == copy.description(), "description() changes when it is asked again")
    _check_memory(plan, max(epochs, default=0) + 1)


def _check_sizes(sizes: Sequence[int], micros: list[MicroBatch], most: int, where: str) -> None:
    _require(all(int(size) >= 1 for size in sizes), f"{where}: sizes are {list(sizes)}, each must be at least 1")
    _require(1 <= len(sizes) <= most, f"{where}: {len(sizes)} micro-batches, and micro_batches_per_step is {most}")
    _require([one.index for one in micros] == list(range(len(sizes))), f"{where}: indices are not 0, 1, 2, …")
    given = [len(one.samples) for one in micros]
    _require(given == list(sizes), f"{where}: sizes are {list(sizes)}, but the samples' are {given}")
    for one in micros:
        weight = len(one.samples) / sum(sizes)
        _require(
            abs(one.weight - weight) <= 1e-12,
            f"{where}: micro-batch {one.index} weighs {one.weight}, and has {weight} of the step's samples",
        )


def _check_samples(micro: MicroBatch, length: int | None, where: str) -> None:
    samples, name = micro.samples, f"the samples of micro-batch {micro.index} of {where}"
    fits = isinstance(samples, np.ndarray) and samples.ndim == 1 and bool(samples.dtype == np.int64)
    _require(fits, f"{name} are {samples!r}: they must be a 1-D int64 array")
    least, largest = int(samples.min()), int(samples.max())
    _require(least >= 0, f"{name} have the index {least}")
    _require(length is None or largest < length, f"{name} have the index {largest}, and the length is {length}")


def _check_shares(plan: Plan, epoch: int, step: int, world_size: int, whole: list[Any], where: str) -> None:
    ranks = [plan.step(epoch, step, rank, world_size) for rank in range(world_size)]
    numbers = [len(micros) for micros in ranks]
    _require(
        max(numbers) - min(numbers) <= 1, f"{where}: {world_size} ranks have {numbers} micro-batches, not even shares"
    )
    joined = _values(list(itertools.chain.from_iterable(ranks)))
    _require(joined == whole, f"{where}: {world_size} ranks together have {joined}, one process has {whole}")


def _check_series(plan: Plan, epoch: int, steps: int, expected: dict[tuple[int, int], list[Any]]) -> None:
    for start in {0, max(0, steps - _STEPS)}:
        stop = min(start + _STEPS, steps)
        series = [_values(micros) for micros in plan.steps(epoch, start, stop)]
        alone = [expected[epoch, step] for step in range(start, stop)]
        _require(series == alone, f"steps({epoch}, {start}, {stop}) gives {series}, but each step alone is {alone}")


def _check_memory(plan: Plan, first: int) -> None:
    """Ask for steps of new epochs, until the plan keeps no more memory after them than before."""
    traces = not tracemalloc.is_tracing()
    if traces:
        tracemalloc.start()
    try:
        for number in range(_ROUNDS):
            before, asked, steps = tracemalloc.get_traced_memory()[0], 0, 0
            for epoch in range(first + 3 * number, first + 3 * number + 3):
                for micros in plan.steps(epoch, 0, 2 * _STEPS):
                    asked, steps = asked + sum(len(micro.samples) for micro in micros), steps + 1
            kept = tracemalloc.get_traced_memory()[0] - before
            if kept <= 1024 + 4 * asked:  # what a plan may note of an epoch, and half of an index a sample
                return
    finally:
        if traces:
            tracemalloc.stop()
    raise AssertionError(
        f"the plan keeps {kept:,} bytes more after each {steps} steps of new epochs, which have {asked:,} samples: a "
        f"long training would run out of memory. Compute a step when it is asked for, and bound every cache"
    )


def _note_seed(seeds: dict[int, str], seed: int, where: str) -> None:
    _require(
        type(seed) is int and 0 <= seed < 2**63, f"the seed of {where} is {seed!r}: it must be from 0 to 2**63 - 1"
    )
    _require(seed % 2 == 0, f"the seed of {where} is {seed}: it must be even, the next one is for the loading")
    _require(seed not in seeds, f"the seed of {where} is that of {seeds.get(seed)}: {seed}")
    seeds[seed] = where


def _values(micros: list[MicroBatch]) -> list[Any]:
    return [(one.index, one.samples.tolist(), one.seed, one.weight, one.position) for one in micros]


def _whole(value: Any, name: str, least: int) -> None:
    fits = isinstance(value, (int, np.integer)) and int(value) >= least
    _require(fits, f"{name}={value!r}: give an integer from {least}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
