"""Note the indices that a loader takes from its sampler: workers that load ahead change nothing."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from .journal import Journal

MOST_INDICES = 2_000_000  # of one iteration
CHUNK = 100  # batches


class Iteration:
    """One pass over a loader."""

    def __init__(self, number: int, stream: bool) -> None:
        self.number, self.stream = number, stream
        self.batches = 0  # drawn from the sampler
        self.given = 0  # to the loop
        self.planned: int | None = None  # the loader's length
        self.windows = -1  # optimizer steps at the last `next`
        self.steps = 0
        self.indices = 0
        self.pending: list[list[Any]] = []
        self.complete = False
        self.over = False


class RecordedSampler:
    """A loader's sampler of batches, which notes what it gives."""

    def __init__(self, sampler: Any, loader: Any, opened: dict[int, Iteration], journal: Journal) -> None:
        self._sampler, self._loader, self._opened, self._journal = sampler, loader, opened, journal

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("_sampler", "_loader", "_opened", "_journal"):
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __iter__(self) -> Iterator[Any]:
        iteration = self._opened.get(id(self._loader))  # now, not at the first item
        drawn: Iterator[Any] = iter(self._sampler)
        if iteration is None:
            return drawn
        kind = _StatefulBatches if hasattr(drawn, "state_dict") else _Batches
        return kind(drawn, iteration, self._journal)


class _Batches:
    """The batches of indices of one iteration, which are noted as they are given."""

    def __init__(self, drawn: Any, iteration: Iteration, journal: Journal) -> None:
        self._drawn, self._iteration, self._journal = drawn, iteration, journal

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._drawn)
        except StopIteration:
            if not self._iteration.complete:
                self._iteration.complete = True
                _flush(self._journal, self._iteration)
            raise
        with self._journal.safely:
            _note_drawn(self._journal, self._iteration, batch)
        return batch


class StatefulSampler(RecordedSampler):
    """A sampler that torchdata's loader saves and restores: it asks for these methods by name."""

    def state_dict(self) -> Any:
        return self._sampler.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._sampler.load_state_dict(state)


class _StatefulBatches(_Batches):
    def state_dict(self) -> Any:
        return self._drawn.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._drawn.load_state_dict(state)


def _note_drawn(journal: Journal, iteration: Iteration, batch: Any) -> None:
    iteration.batches += 1
    if iteration.stream or iteration.indices > MOST_INDICES:
        return
    items = batch if isinstance(batch, (list, tuple)) else [batch]
    row = [int(i) if hasattr(i, "__index__") else zlib.crc32(repr(i).encode()) for i in items]
    iteration.indices += len(row)
    iteration.pending.append(row)
    if iteration.batches < CHUNK or len(iteration.pending) >= CHUNK:
        _flush(journal, iteration)


def _flush(journal: Journal, iteration: Iteration) -> None:
    if iteration.pending or iteration.complete:
        journal.write("draw", it=iteration.number, rows=iteration.pending, complete=iteration.complete)
        iteration.pending = []
