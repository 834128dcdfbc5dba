"""Measure a Task's step on the processes at hand, and predict what more ranks would give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.agreement import agreed
from ..runtime.first import first
from ..runtime.logging import setup_logging
from ..runtime.world import world
from ..task.task import Task, check_task
from .links import HERE, Link
from .measure import Measurement, measure
from .model import Fit, Scaled, Variant, fitted, fixed, growing, most_ranks, step_traffic

RANKS = tuple(2**power for power in range(11))  # 1 to 1,024
WANTED = 0.9  # efficiency


@dataclass(frozen=True)
class Forecast:
    """What N ranks give over one link, by variant. `same`: the Task's global batch, `grown`: one that grows with them.

    `most`: the largest number of ranks, up to 1,024, with 90 % efficiency, where the batch grows.
    """

    link: Link
    grown: dict[Variant, list[Scaled]]
    same: dict[Variant, list[Scaled]]
    most: dict[Variant, int]


@dataclass(frozen=True)
class Report:
    """What was measured, and what is predicted. `each`: micro-batches of a rank where the global batch grows."""

    title: str
    measured: Measurement
    fit: Fit
    each: int
    forecasts: list[Forecast]

    def sent_bytes(self, variant: Variant) -> float:
        """Return the bytes that a rank sends in a measured step, the rank that sends most."""
        found = self.measured
        return sum(one.sent_bytes for one in step_traffic(found.work, found.machine, variant, found.shares))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, in seconds and bytes."""
        found = self.measured
        return {
            "task": self.title,
            "ranks": len(found.shares),
            "device": found.device,
            "micro_batches": found.shares,
            "parameters": found.parameters,
            "step_s": {variant: found.median_s(variant) for variant in found.steps_s},
            "steps_s": found.steps_s,
            "sent_bytes": {variant: self.sent_bytes(variant) for variant in found.steps_s},
            "refused": found.refused,
            "stages_s": [dataclasses.asdict(one) for one in found.stages],
            "collectives": {kind: [list(pair) for pair in pairs] for kind, pairs in found.collectives.items()},
            "work": dataclasses.asdict(found.work),
            "machine": dataclasses.asdict(found.machine),
            "overlap": self.fit.hidden,
            "extra_s": self.fit.extra_s,
            "each": self.each,
            "predictions": [_forecast_to_json(one) for one in self.forecasts],
        }


def bench(
    task: Task,
    title: str,
    links: Sequence[Link] = (),
    workers: int = 0,
    threads: int | None = None,
    seconds: float = 60.0,
    each: int | None = None,
) -> Report | None:
    """Measure a Task's training step on the processes that a launcher started. Every rank calls it.

    Args:
        links: to predict for, beside what was measured between the processes.
        workers: data-loader workers of each process. threads: of each process; None: torch's default.
        seconds: how long to measure, about; importing, loading and the first steps come on top.
        each: micro-batches of a rank where the global batch grows; None: as many as here.

    Returns:
        The report on rank 0, None on the others.

    Raises:
        ValueError: there is one process only, or the Task cannot be measured.

    Collectives: those of `measure`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with world() as here:
        setup_logging()
        if here.world_size < 2:
            raise ValueError("bench measures what processes exchange: start at least 2 of them, with --nproc 2")
        check_task(task, here.world_size)
        with first("node"):
            train_set = task.dataset("train")
        with agreed("the training set"):
            if not hasattr(train_set, "__len__"):
                raise ValueError("the Task's training set has no length: bench measures map-style data sets")
        found = measure(task, here, train_set, workers, seconds)
        return report(title, found, links, each) if here.rank == 0 else None


def report(title: str, found: Measurement, links: Sequence[Link], each: int | None = None) -> Report:
    """Return the report of a measurement."""
    fit = fitted(found.work, found.machine, {one: found.median_s(one) for one in found.steps_s}, found.shares)
    count = each if each is not None else math.ceil(sum(found.shares) / len(found.shares))
    return Report(title, found, fit, count, [_forecast(found, fit, link, count) for link in (HERE, *links)])


def _forecast(found: Measurement, fit: Fit, link: Link, each: int) -> Forecast:
    known = found.work, found.machine, fit
    variants = list(found.steps_s)
    within = [ranks for ranks in RANKS if ranks <= found.work.micro_batches]
    return Forecast(
        link,
        {variant: [growing(*known, variant, ranks, each, link) for ranks in RANKS] for variant in variants},
        {variant: [fixed(*known, variant, ranks, link) for ranks in within] for variant in variants},
        {variant: most_ranks(*known, variant, each, link, WANTED, RANKS[-1]) for variant in variants},
    )


def _forecast_to_json(one: Forecast) -> dict[str, Any]:
    def listed(scaled: dict[Variant, list[Scaled]]) -> dict[str, Any]:
        return {
            variant: [
                {
                    **dataclasses.asdict(each.prediction),
                    "step_s": each.prediction.step_s,
                    "speed_up": each.speed_up,
                    "efficiency": each.efficiency,
                }
                for each in rows
            ]
            for variant, rows in scaled.items()
        }

    infinite = math.isinf(one.link.bytes_per_s)
    link = {
        "name": one.link.name,
        "bytes_per_s": None if infinite else one.link.bytes_per_s,
        "latency_s": one.link.latency_s,
    }
    return {"link": link, "growing": listed(one.grown), "same": listed(one.same), "ranks_with_90_percent": one.most}
