"""The micro-batches of a step with their data."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from .plan import Plan
from .rng import seed_streams
from .stream import StreamPlan


@dataclass(slots=True)
class LoadedMicroBatch:
    """A micro-batch with its data.

    Attributes:
        data: what the collate function returned.
        weight: what its mean loss is multiplied by before `backward`.
        index: its number in the step, over all ranks; or in the list of batches that it comes from.
        seed: the seed of its random streams; None if it has none of its own.
        share: its part of the step's units. The shares of a step sum to one over all ranks.
        recheck: it is a micro-batch of another rank, or one that has run already, and its gradient is only compared.
            Its share is 0. See `replicate(recheck_every=…)`.
    """

    data: Any
    weight: float
    index: int
    seed: int | None = None
    share: float = math.nan
    recheck: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.share):
            self.share = self.weight

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a micro-batch has its batch in .data: write `for micro in …:` and `x, y = micro.data`")


# Steps that have not ended, though a loop over them has taken their last micro-batch.
_taken: weakref.WeakSet[Step] = weakref.WeakSet()


class Step(Sequence[LoadedMicroBatch]):
    """The micro-batches of one optimizer step on this rank. Each is loaded when it is used for the first time.

    To take a micro-batch also seeds the random streams with its seed. So a forward after it draws the same numbers on
    any rank and with any number of workers.

    Attributes:
        epoch, number: the epoch, and the step's number in it.
        shares: how many micro-batches each rank has.
        seed: the seed of the random streams after the step.
        plan: what cuts the data set into steps.
        load_again: loads a micro-batch of any rank, given the rank and the number in its share, beside the loader's own
            order; None if that is not possible.
    """

    def __init__(
        self,
        epoch: int,
        number: int,
        size: int,
        load_next: Callable[[], LoadedMicroBatch],
        shares: tuple[int, ...],
        seed: int,
        plan: Plan | StreamPlan | None = None,
        load_again: Callable[[int, int], LoadedMicroBatch] | None = None,
    ) -> None:
        self.epoch = epoch
        self.number = number
        self.shares = shares
        self.seed = seed
        self.plan = plan
        self.load_again = load_again
        self._size = size
        self._load_next = load_next
        self._loaded: list[LoadedMicroBatch] = []
        self.on_end: Callable[[], None] | None = None
        if size == 0:
            _taken.add(self)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> LoadedMicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoadedMicroBatch]: ...
    def __getitem__(self, index: int | slice) -> LoadedMicroBatch | list[LoadedMicroBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"micro-batch {index} is out of range: the step has {self._size} on this rank")
        micro = self.load(index % self._size)
        assert micro.seed is not None, "a loader's micro-batches have seeds"
        seed_streams(micro.seed)
        return micro

    def __iter__(self) -> Iterator[LoadedMicroBatch]:
        for index in range(self._size):
            micro = self[index]
            if index == self._size - 1:
                _taken.add(self)
            yield micro
        self.end()

    def end(self) -> None:
        """Mark the step as done, so that the loader's position is after it.

        So are steps of other loaders whose last micro-batch was taken: `zip` does not ask its second iterator for more
        after the first one's end, and the loop over the second would not end.
        """
        for step in (self, *_taken):
            if step.on_end is not None:
                step.on_end()
        _taken.clear()

    def load(self, index: int) -> LoadedMicroBatch:
        """Return micro-batch `index` without seeding the random streams."""
        while len(self._loaded) <= index:
            self._loaded.append(self._load_next())
        return self._loaded[index]
