"""A step's micro-batches with their data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from .rng import seed_streams


@dataclass(slots=True)
class LoadedMicroBatch:
    """A micro-batch as a training step sees it.

    `data`: what the collate function made. `weight`: what its mean loss is multiplied by before `backward`. `index`:
    its number in the step, over all ranks, or in the list of batches that it came from. `seed`: keys its random
    streams; None: it has none of its own. `share`: its part of the step's units; these sum to one over all ranks.
    """

    data: Any
    weight: float
    index: int
    seed: int | None = None
    share: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.share):
            self.share = self.weight


class Step(Sequence[LoadedMicroBatch]):
    """The micro-batches of one optimizer step on this rank, each loaded when it is first asked for.

    Taking a micro-batch out also sets the random streams to its key, so that a forward after it draws the same numbers
    on any rank and with any number of workers.

    `number`, `epoch`: the step's. `shares`: how many micro-batches each rank has. `seed`: keys the random streams
    after the step. `plan`: what cuts the data set into steps.
    """

    def __init__(
        self,
        epoch: int,
        number: int,
        size: int,
        load_next: Callable[[], LoadedMicroBatch],
        shares: tuple[int, ...],
        seed: int,
        plan: object = None,
    ) -> None:
        self.epoch = epoch
        self.number = number
        self.shares = shares
        self.seed = seed
        self.plan = plan
        self._size = size
        self._load_next = load_next
        self._loaded: list[LoadedMicroBatch] = []
        self.on_end: Callable[[], None] | None = None

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
            raise IndexError(f"micro-batch {index} of a step that has {self._size} on this rank")
        micro = self.load(index % self._size)
        assert micro.seed is not None, "a loader's micro-batches have seeds"
        seed_streams(micro.seed)
        return micro

    def __iter__(self) -> Iterator[LoadedMicroBatch]:
        for index in range(self._size):
            yield self[index]
        self.end()

    def end(self) -> None:
        """The loop over the micro-batches has ended: the loader's position is behind this step now."""
        if self.on_end is not None:
            self.on_end()

    def load(self, index: int) -> LoadedMicroBatch:
        """Micro-batch `index`, without setting the random streams."""
        while len(self._loaded) <= index:
            self._loaded.append(self._load_next())
        return self._loaded[index]
