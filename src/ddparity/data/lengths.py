"""A plan for samples of different lengths: micro-batches of like lengths, each within a budget of padded units."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .permutation import permute
from .plan import Plan
from .sizes import as_array, check_sizes

# Samples whose lengths differ by at most 1/16 of the longest's are exchanged between micro-batches in each epoch. So at
# most a sixteenth of a budget is lost by that.
_ALIKE = 16


class _Pools(NamedTuple):
    """The samples by length, longest first, cut into pools; the micro-batches of a pool have equal sizes, but the last.

    Attributes:
        order: the data-set indices by length.
        starts: where each micro-batch begins in `order`, and the end.
        bounds: where each pool begins in `order`, and the end.
        pool_of: the pool of each micro-batch.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    bounds: NDArray[np.int64]
    pool_of: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LengthPlan(Plan):
    """Put samples of like length together, as many in a micro-batch as fit into a budget of padded units (tokens).

    A micro-batch has at most `max_units` units after padding: its longest length times its samples. A step has
    `micro_batches` of them; the last step of an epoch may have fewer. An epoch has every sample exactly once.

    With `shuffle`, the micro-batches of an epoch come in an order of its own, and samples whose lengths differ by at
    most a sixteenth are exchanged between micro-batches. The number of micro-batches and of steps is the same in every
    epoch, so `len(loader)` is right for a schedule.

    A micro-batch is weighted by its samples. For a loss that is a mean over tokens, give `accumulate(count=…)`.

    Memory: 24 bytes a sample or less. Time: one sort by length when it is first used; then a step takes the same time
    at any position.

    Args:
        lengths: 1-D, for each sample of the data set its number of units, an integer of 1 or more.
        max_units: the largest number of padded units of a micro-batch.
        micro_batches: of a step, over all ranks.
        seed: any integer.
        shuffle: False: the longest samples come first, in the same order in every epoch.

    Raises:
        TypeError: a length, size or the seed is not an integer.
        ValueError: a size is below 1; a sample alone has more than `max_units` units, or less than 1.

    Collectives: none.

    Example:
        >>> plan = LengthPlan([5, 2, 9, 2, 5, 2], max_units=10, micro_batches=2, shuffle=False)
        >>> [[micro.samples.tolist() for micro in step] for step in plan.steps(epoch=0)]
        [[[2], [0, 4]], [[1, 3, 5]]]
    """

    lengths: Any
    max_units: int
    micro_batches: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, max_units=1, micro_batches=1)
        lengths = as_array(self.lengths)
        lengths = lengths if lengths.size else np.empty(0, np.int64)
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise TypeError(
                f"LengthPlan(lengths) has shape {lengths.shape} and dtype {lengths.dtype}: give an integer for each "
                f"sample"
            )
        if (bad := (lengths < 1) | (lengths > self.max_units)).any():
            index = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"LengthPlan(max_units={self.max_units}): sample {index} has {lengths[index]} units: a sample must "
                f"have from 1 to max_units. Leave it out, cut it, or give a larger max_units"
            )
        lengths = lengths.astype(np.int64)
        lengths.flags.writeable = False
        object.__setattr__(self, "lengths", lengths)

    @property
    def length(self) -> int:
        return len(self.lengths)

    @property
    def micro_batches_per_step(self) -> int:
        return self.micro_batches

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._pools.pool_of) // self.micro_batches)

    def sizes(self, epoch: int, step: int) -> list[int]:
        numbers, starts = self._numbers(epoch, step), self._pools.starts
        found: list[int] = (starts[numbers + 1] - starts[numbers]).tolist()
        return found

    def samples(self, epoch: int, step: int, start: int, stop: int) -> NDArray[np.int64]:
        pools, taken, first = self._pools, [np.empty(0, np.int64)], 0
        for number in self._numbers(epoch, step).tolist():
            low, high = int(pools.starts[number]), int(pools.starts[number + 1])
            begin, end = max(start - first, 0), min(stop - first, high - low)
            if begin < end:
                taken.append(self._shuffled(epoch, int(pools.pool_of[number]), low + begin, low + end))
            first += high - low
        return np.concatenate(taken)

    def _numbers(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the numbers of a step's micro-batches in the order by length."""
        count = len(self._pools.pool_of)
        places = np.arange(step * self.micro_batches, min((step + 1) * self.micro_batches, count), dtype=np.int64)
        return permute(places, count, self.seed, "micro-batches", epoch) if self.shuffle else places

    def _shuffled(self, epoch: int, pool: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at these places of the order by length, after those of each pool have been shuffled."""
        pools, places = self._pools, np.arange(start, stop, dtype=np.int64)
        if self.shuffle:
            low, high = int(pools.bounds[pool]), int(pools.bounds[pool + 1])
            places = low + permute(places - low, high - low, self.seed, "pool", epoch, pool)
        return pools.order[places]

    @functools.cached_property
    def _pools(self) -> _Pools:
        order = np.argsort(-self.lengths, kind="stable")
        downward = -self.lengths[order]
        starts: list[NDArray[np.int64]] = []
        bounds, numbers = [0], []
        while (low := bounds[-1]) < len(order):
            longest = -int(downward[low])
            size = self.max_units // longest  # of each of the pool's micro-batches: any of its samples fit
            alike = int(np.searchsorted(downward, -(longest - longest // _ALIKE), side="right")) - low
            # Whole micro-batches, so that only the last pool leaves one that is not full.
            high = min(low + max(alike // size, 1) * size, len(order))
            starts.append(np.arange(low, high, size, dtype=np.int64))
            numbers.append(len(starts[-1]))
            bounds.append(high)
        return _Pools(
            order,
            np.concatenate([*starts, np.array([len(order)], np.int64)]),
            np.array(bounds, np.int64),
            np.repeat(np.arange(len(numbers), dtype=np.int64), numbers),
        )
