"""How long a training step takes on N ranks over a link. Pure functions of what was measured.

docs/scaling.md has the formulas. Which collective a step runs is decided as in `comm.allreduce`, `gradients.early`,
`gradients.strict` and `batchnorm.function`; a test compares the bytes with those that the kernel counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..comm.allreduce import SHORT_BYTES, SHORT_BYTES_OF_ALL
from ..data.sizes import share
from .links import HERE, Link, Machine, Time, Traffic, all_gather, all_to_all, halves, ring, slices, time_of, tree

Variant = Literal["fast", "strict", "SyncBatchNorm"]
_DRAWS = 4_000  # of a rank's share, from the measured micro-batches
_LOOKED_AT = 64  # ranks whose subtrees are counted; the pattern repeats
_FLOAT64_BYTES = 8  # what batch norms exchange


@dataclass(frozen=True)
class Part:
    """Gradients that are reduced together. `ready`: when the last backward has all of them, as a part of its time.

    `early`: that starts then, and not after the backward.
    """

    size: int  # bytes
    ready: float
    early: bool


@dataclass(frozen=True)
class Work:
    """What a step of the Task is, on this machine, without other ranks. Times are those with all processes at work.

    `micro_s`: forward and backward of micro-batches. `alone_s`: the median of one process at work alone; `update_s`,
    `update_alone_s`: of the optimizer. `load_s`: of a micro-batch. `backward_s`: of one backward.
    `parts`, `strict_parts`: of the fast and of the strict reduction. `layers`: channels of each batch norm that a
    micro-batch runs. `statistics_bytes`: of plain batch norms, fixed and for each micro-batch. `micro_batches`: of the
    Task's step.
    """

    micro_s: tuple[float, ...]
    alone_s: float
    update_s: float
    update_alone_s: float
    load_s: float
    workers: int
    backward_s: float
    parts: tuple[Part, ...]
    strict_parts: tuple[Part, ...]
    layers: tuple[int, ...]
    statistics_bytes: tuple[int, int]
    micro_batches: int


@dataclass(frozen=True)
class Fit:
    """What the measured steps say that their parts do not.

    `hidden`: how much of the processes' own work for collectives that run during the backward really costs no time.
    `extra_s`: what a step of each variant takes more, or less, than its parts: Python between them.
    """

    hidden: float
    extra_s: dict[Variant, float]


@dataclass(frozen=True)
class Prediction:
    """The seconds of a step on the slowest rank, by cause. `latency_s`, `wire_s`, `software_s`: of collectives, not
    hidden behind the backward. `waiting_s`: for the slowest rank, on average. `rest_s`: `Fit.extra_s`."""

    ranks: int
    micro_batches: int  # of the rank that has most
    compute_s: float
    load_s: float
    waiting_s: float
    software_s: float
    latency_s: float
    wire_s: float
    rest_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.load_s + sum(self.losses().values())

    def losses(self) -> dict[str, float]:
        """Return the seconds that other ranks cost, by cause, in words."""
        return {
            "the slowest rank": self.waiting_s,
            "the processes' own work for collectives": self.software_s,
            "latency": self.latency_s,
            "bandwidth": self.wire_s,
            "the rest": self.rest_s,
        }


# Collectives


def summed(size: float, ranks: int, machine: Machine, link: Link) -> Traffic:
    """Return the collective that sums `size` bytes over the ranks."""
    if machine.gloo and size <= SHORT_BYTES and size * ranks <= SHORT_BYTES_OF_ALL:
        return all_to_all(size, ranks)
    return reduced(size, ranks, machine, link)


def reduced(size: float, ranks: int, machine: Machine, link: Link) -> Traffic:
    """Return the all-reduce of `size` bytes: Gloo has a ring, NCCL takes what is faster."""
    around = ring(size, ranks)
    if machine.gloo:
        return around
    return min(around, tree(size, ranks), key=lambda one: time_of(one, machine, link).total_s)


def copied(size: float, ranks: int, machine: Machine) -> Traffic:
    """Return the collective that gives every rank the `size` bytes of each rank."""
    return all_to_all(size, ranks) if machine.gloo and size <= SHORT_BYTES else all_gather(size, ranks)


def strict_traffic(part: Part, rows: int, ranks: int, machine: Machine) -> tuple[Traffic, ...]:
    """Return what the strict reduction does with a part, in turn; `rows`: subtrees of the rank with most."""
    most = rows * part.size
    if part.early:
        return halves(part.size, ranks, rows)
    if machine.gloo and most <= SHORT_BYTES and most * ranks <= SHORT_BYTES_OF_ALL:
        return (copied(most, ranks, machine),)
    return (slices(part.size, ranks, rows),)


def part_traffic(part: Part, ranks: int, machine: Machine, link: Link) -> Traffic:
    """Return what the fast reduction does with a part."""
    return (reduced if part.early else summed)(part.size, ranks, machine, link)


def compared(early: int, ranks: int, machine: Machine) -> Traffic:
    """Return what tells, for each of so many parts that started early, whether its gradients have changed since."""
    return copied(8 * (early + 2), ranks, machine)


def step_traffic(
    work: Work, machine: Machine, variant: Variant, shares: Sequence[int], link: Link = HERE
) -> list[Traffic]:
    """Return the collectives of a step, on the rank that sends most."""
    ranks, most = len(shares), max(shares)
    if variant == "strict":
        rows, parts = rows_of(tuple(shares)), work.strict_parts
        found = [one for part in parts for one in strict_traffic(part, rows, ranks, machine)]
    else:
        parts = work.parts
        found = [part_traffic(part, ranks, machine, link) for part in parts]
    if early := sum(part.early for part in parts):
        found.append(compared(early, ranks, machine))
    if variant == "SyncBatchNorm":
        found += [
            one
            for channels in work.layers
            for one in layer_traffic(channels, ranks, machine, link)
            for _ in range(most)
        ]
    elif sum(work.statistics_bytes):
        found.append(statistics_traffic(work, most, ranks, machine))
    return found


def statistics_traffic(work: Work, most: int, ranks: int, machine: Machine) -> Traffic:
    """Return the exchange of plain batch norms' statistics in a step; `most`: micro-batches of the rank with most."""
    fixed, each = work.statistics_bytes
    return copied(fixed + most * each, ranks, machine)


def layer_traffic(channels: int, ranks: int, machine: Machine, link: Link) -> list[Traffic]:
    """Return what a synchronised batch norm does in a forward and a backward."""
    forward = copied((2 * channels + 1) * _FLOAT64_BYTES, ranks, machine)
    return [forward, summed(2 * channels * _FLOAT64_BYTES, ranks, machine, link)]


def subtrees_of(start: int, stop: int) -> int:
    """Return how many whole subtrees of the strict reduction's tree micro-batches `start` to `stop` make up."""
    count = 0
    while start < stop:
        size = start & -start or 1 << stop.bit_length()  # the largest subtree that begins here
        while start + size > stop:
            size >>= 1
        start, count = start + size, count + 1
    return count


@functools.lru_cache(maxsize=4096)
def rows_of(shares: tuple[int, ...]) -> int:
    """Return the subtrees of the rank that has most, from the ranks' numbers of micro-batches."""
    most = start = 0
    for size in shares[:_LOOKED_AT]:
        most, start = max(most, subtrees_of(start, start + size)), start + size
    return most


# Ranks that wait for each other


def mean_of_slowest(times: Sequence[float], ranks: int) -> float:
    """Return the mean of the largest of `ranks` draws from measured times.

    Of m sorted times the i-th is the largest of N draws with probability (i / m)^N - ((i - 1) / m)^N.
    """
    ordered = np.sort(times)
    below = (np.arange(len(ordered) + 1) / len(ordered)) ** ranks
    return float(ordered @ np.diff(below))


@functools.lru_cache(maxsize=256)
def sums_of_draws(times: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return sorted sums of `count` draws from measured times; the same in every call."""
    drawn = np.random.default_rng(0).choice(times, size=(_DRAWS, count)).sum(1)
    return tuple(np.sort(drawn).tolist())


def waiting_s(times: tuple[float, ...], count: int, ranks: int) -> float:
    """Return how much longer the slowest of the ranks takes for `count` micro-batches than one rank, on average."""
    if len(times) < 2 or ranks < 2 or count < 1:
        return 0.0
    drawn = sums_of_draws(times, count)
    return mean_of_slowest(drawn, ranks) - mean_of_slowest(drawn, 1)


# Steps


def predict(
    work: Work, machine: Machine, fit: Fit, variant: Variant, shares: Sequence[int], link: Link = HERE
) -> Prediction:
    """Return how long a step takes on ranks with these numbers of micro-batches."""
    ranks, most = len(shares), max(shares)
    micro = float(np.median(work.micro_s))
    compute = most * micro + work.update_s
    synced = variant == "SyncBatchNorm"
    # Synchronised batch norms wait in each micro-batch, other models once a step.
    waiting = most * waiting_s(work.micro_s, 1, ranks) if synced else waiting_s(work.micro_s, most, ranks)
    rows = rows_of(tuple(shares)) if variant == "strict" else None
    cost = exposed(work, machine, fit.hidden, ranks, link, rows)
    if synced:
        traffic = [one for channels in work.layers for one in layer_traffic(channels, ranks, machine, link)]
        cost += _sum(time_of(one, machine, link) for one in traffic).times(most)
    elif sum(work.statistics_bytes):
        cost += time_of(statistics_traffic(work, most, ranks, machine), machine, link)
    # Less than nothing where a step hides what its parts take alone, but a step is never shorter than its computing.
    rest = max(-cost.software_s - waiting, fit.extra_s.get(variant, 0.0)) if ranks > 1 else 0.0
    others = compute + waiting + cost.total_s + rest
    load = max(0.0, most * work.load_s - others) if work.workers else most * work.load_s
    return Prediction(ranks, most, compute, load, waiting, cost.software_s, cost.latency_s, cost.wire_s, rest)


def exposed(
    work: Work, machine: Machine, hidden: float, ranks: int, link: Link, strict_rows: int | None = None
) -> Time:
    """Return the time of a reduction that the backward does not hide: of the fast one, or, with `rows_of`, the strict.

    Parts are reduced one after the other, each when it is ready; the strict sums follow after the backward. What goes
    on during the backward is hidden, but of the processes' own work only `hidden`, a number from 0 to 1: where all
    cores compute, it takes a core from the backward.
    """
    if ranks < 2:
        return Time()
    parts = work.parts if strict_rows is None else work.strict_parts
    total, free, after = Time(), 0.0, Time()  # `free`: when the last exchange ends, from the begin of the backward
    for part in parts:
        if strict_rows is None:
            first, *rest = (part_traffic(part, ranks, machine, link),)
        else:
            first, *rest = strict_traffic(part, strict_rows, ranks, machine)
        took = time_of(first, machine, link)
        begin = part.ready * work.backward_s if part.early else work.backward_s
        free, total = max(free, begin) + took.total_s, total + took
        after += _sum(time_of(one, machine, link) for one in rest)
    seen = max(0.0, free - work.backward_s)
    shown = total.times(seen / total.total_s) if total.total_s else total
    covered = min(total.total_s - seen, total.software_s)
    cost = dataclasses.replace(shown, software_s=shown.software_s + (1 - hidden) * covered)
    if early := sum(part.early for part in parts):
        after += time_of(compared(early, ranks, machine), machine, link)
    return cost + after


def one_process_s(work: Work, micro_batches: int) -> float:
    """Return the seconds of a step of so many micro-batches on one process that has the machine for itself."""
    compute, load = micro_batches * work.alone_s + work.update_alone_s, micro_batches * work.load_s
    return max(compute, load) if work.workers else compute + load


def fitted(work: Work, machine: Machine, measured_s: dict[Variant, float], shares: Sequence[int]) -> Fit:
    """Return what makes the prediction for this machine's own processes the measured one.

    First `hidden` explains what a step of the fast reduction takes more than its parts, then `extra_s` does.
    """
    work = dataclasses.replace(work, load_s=0.0)  # the measured steps have their data in memory
    everything = predict(work, machine, Fit(1.0, {}), "fast", shares)
    nothing = predict(work, machine, Fit(0.0, {}), "fast", shares)
    between = nothing.step_s - everything.step_s
    hidden = 1.0
    if "fast" in measured_s and between > 0:
        hidden = min(1.0, max(0.0, (nothing.step_s - measured_s["fast"]) / between))
    extra: dict[Variant, float] = {}
    for variant, measured in measured_s.items():
        extra[variant] = measured - predict(work, machine, Fit(hidden, {}), variant, shares).step_s
    return Fit(hidden, extra)


# Tables


@dataclass(frozen=True)
class Scaled:
    """A step on N ranks beside one process: `speed_up` in samples a second, `efficiency` of a rank."""

    prediction: Prediction
    speed_up: float

    @property
    def efficiency(self) -> float:
        return self.speed_up / self.prediction.ranks


def growing(
    work: Work, machine: Machine, fit: Fit, variant: Variant, ranks: int, each: int, link: Link = HERE
) -> Scaled:
    """Return a step where the global batch grows with the ranks: each of them has `each` micro-batches."""
    found = predict(work, machine, fit, variant, (each,) * ranks, link) if ranks > 1 else _alone(work, each)
    return Scaled(found, ranks * one_process_s(work, each) / found.step_s)


def fixed(work: Work, machine: Machine, fit: Fit, variant: Variant, ranks: int, link: Link = HERE) -> Scaled:
    """Return a step of the Task's own global batch, shared among the ranks; at most one micro-batch a rank."""
    shares = tuple(len(share(work.micro_batches, rank, ranks)) for rank in range(ranks))
    found = predict(work, machine, fit, variant, shares, link) if ranks > 1 else _alone(work, work.micro_batches)
    return Scaled(found, one_process_s(work, work.micro_batches) / found.step_s)


def most_ranks(
    work: Work, machine: Machine, fit: Fit, variant: Variant, each: int, link: Link, wanted: float, limit: int
) -> int:
    """Return the largest number of ranks, up to `limit`, of which each is used to the part `wanted` or more."""
    good = [
        ranks
        for ranks in range(1, limit + 1)
        if growing(work, machine, fit, variant, ranks, each, link).efficiency >= wanted
    ]
    return max(good, default=1)


def _alone(work: Work, micro_batches: int) -> Prediction:
    compute = micro_batches * work.alone_s + work.update_alone_s
    load = one_process_s(work, micro_batches) - compute
    return Prediction(1, micro_batches, compute, load, 0.0, 0.0, 0.0, 0.0, 0.0)


def _sum(times: Iterable[Time]) -> Time:
    return sum(times, start=Time())
