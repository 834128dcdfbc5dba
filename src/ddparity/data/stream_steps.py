"""The steps of a stream in the process that trains: which micro-batches there are, agreed on one step ahead."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from ..comm.transfer import gather_json, wire_device
from ..compat import all_gather_single
from ..errors import SampleError
from ..runtime.agreement import agreed
from .dataset import load_batches, worker_options
from .rng import preserve_streams
from .sizes import share
from .step import LoadedMicroBatch, Step
from .stream import Read, Readers, ReaderState, StreamPlan, check_stream

_FAILED = -1  # what a rank sends for the sizes of a step that it could not read
Position = tuple[int, int]  # epoch, step


class StreamSteps:
    """Yield this rank's share of the steps of a stream, and keep the states of its readers for a checkpoint.

    Attributes:
        dataloader: the torch DataLoader whose workers run the readers.
        states: the readers' states at `position`, of all readers; None: the reader begins there by skipping.
    """

    def __init__(
        self,
        dataset: Any,
        plan: StreamPlan,
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        options: dict[str, Any],
    ) -> None:
        check_stream(dataset, plan)
        if options.get("persistent_workers"):
            raise TypeError(
                "Loader(persistent_workers=True) got a stream, whose workers begin at another position in each epoch: "
                "leave it out. With steps_per_epoch, workers stay from one epoch to the next"
            )
        self.plan = plan
        self._readers = Readers(dataset, plan, collate_fn or default_collate)
        self.dataloader: DataLoader[Any] = DataLoader(
            self._readers,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            **{
                "pin_memory": torch.cuda.is_available(),
                "generator": torch.Generator(),
                **options,
                **worker_options(num_workers, options.get("worker_init_fn")),
            },
        )
        self._states: dict[Position, dict[int, ReaderState | None]] = {}  # of this rank's readers, at some positions
        self._share: range = range(0)
        self._batches: Generator[list[Read]] | None = None
        self._goes_on: tuple[Position, int, int] | None = None  # what the batches continue with: position, rank, ranks

    def end(self) -> None:
        """End the workers, and forget what they have read ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._goes_on = None

    def load(self, position: Position, states: Sequence[ReaderState | None]) -> None:
        """Continue at `position` with the states of all readers."""
        self.end()
        self._states = {position: dict(enumerate(states))}

    def gathered(self, position: Position) -> list[ReaderState | None]:
        """Return the states of all readers at a position. Collectives: two all-gathers; all ranks call it.

        Raises:
            TypeError: the stream's `state_dict` has other things than JSON has; on every rank.
        """
        mine = [[reader, *_as_json(state)] for reader, state in self._states.get(position, {}).items()]
        found: list[ReaderState | None] = [None] * self.plan.micro_batches_per_step
        for states in gather_json(mine):
            for reader, text, problem in states:
                if problem:
                    raise TypeError(
                        f"the state_dict of reader {reader}'s part of the stream cannot be saved: {problem}. Let it "
                        f"have numbers, strings, None, lists, and dicts with strings as keys; or give the stream no "
                        f"state_dict, and its samples are read again and skipped"
                    )
                found[reader] = json.loads(text)
        return found

    def keep_from(self, position: Position) -> None:
        """Forget the states at positions before this one."""
        self._states = {at: states for at, states in self._states.items() if at >= position}

    def steps(self, epoch: int, step: int, rank: int, world_size: int) -> Iterator[Step]:
        """Yield the steps of an epoch from `step` on, on this rank. First compare ranks' plans and positions."""
        with agreed("the start of a stream's epoch") as agreement:
            if agreement is not None:
                values = {f"the plan's {name}": value for name, value in self.plan.description().items()}
                agreement.all_same({**values, "the epoch of the stream": epoch, "the step of the stream": step})
        readers = self.plan.micro_batches_per_step
        self._share = share(readers, rank, world_size)
        if self._goes_on != ((epoch, step), rank, world_size):
            self.end()
            known = self._states.get((epoch, step), {})
            states = [known.get(reader) for reader in range(readers)]
            self._readers.restart(epoch, step, self._share, states)
            self._states = {(epoch, step): {reader: states[reader] for reader in self._share}}
            self._batches = load_batches(self.dataloader)
        if self.plan.steps_per_epoch is None:
            yield from self._to_the_end(epoch, step, world_size)
        else:
            yield from self._full_steps(epoch, step, rank, world_size, self.plan.steps_per_epoch)

    def _full_steps(self, epoch: int, first: int, rank: int, world_size: int, stop: int) -> Iterator[Step]:
        """Yield steps in which every reader has a full micro-batch, so that nothing needs to be agreed on."""
        numbers = [len(share(self.plan.micro_batches_per_step, one, world_size)) for one in range(world_size)]
        batches = self._started()
        for step in range(first, stop):
            following = (epoch, step + 1) if step + 1 < stop else (epoch + 1, 0)
            loading = _Once(self._load, batches, following, {})
            yield self._step(epoch, step, self.plan.sizes, numbers, loading)
            loading()  # micro-batches that the script did not take do not go to the next step
            self._goes_on = (following, rank, world_size)

    def _to_the_end(self, epoch: int, step: int, world_size: int) -> Iterator[Step]:
        """Yield steps until all readers have ended. While one runs, the ranks agree on the sizes of the next."""
        ended: dict[int, Read] = {}
        batches = self._started()
        coming = self._read_ahead(batches, epoch, step, ended, world_size)
        while True:
            sizes = coming.agreed()
            if not any(sizes):
                self.end()
                return
            now, coming = coming, self._read_ahead(batches, epoch, step + 1, ended, world_size)
            numbers = [
                sum(sizes[reader] > 0 for reader in share(len(sizes), one, world_size)) for one in range(world_size)
            ]
            yield self._step(epoch, step, sizes, numbers, lambda reads=now.reads: reads)  # type: ignore[misc]
            step += 1

    def _step(
        self,
        epoch: int,
        step: int,
        sizes: Sequence[int],
        numbers: Sequence[int],
        reads: Callable[[], dict[int, Read]],
    ) -> Step:
        """Return a step of the readers that have not ended. Micro-batches are numbered without those that have."""
        alive = [reader for reader, size in enumerate(sizes) if size]
        mine = iter([(index, reader) for index, reader in enumerate(alive) if reader in self._share])

        def load_next() -> LoadedMicroBatch:
            index, reader = next(mine)
            weight = sizes[reader] / sum(sizes)
            return LoadedMicroBatch(reads().pop(reader).data, weight, index, self.plan.seed_of(epoch, step, reader))

        size = sum(reader in self._share for reader in alive)
        return Step(epoch, step, size, load_next, tuple(numbers), self.plan.seed_after(epoch, step), self.plan)

    def _started(self) -> Generator[list[Read]]:
        assert self._batches is not None, "`steps` has started them"
        return self._batches

    def _read_ahead(
        self, batches: Generator[list[Read]], epoch: int, step: int, ended: dict[int, Read], world_size: int
    ) -> _Coming:
        # Without workers, reading seeds this process's streams, and the script's draws must not depend on that.
        streams = contextlib.nullcontext() if self.dataloader.num_workers else preserve_streams()
        try:
            with streams:
                reads = self._load(batches, (epoch, step + 1), ended)
        except Exception as error:
            return _Coming({}, self._share, world_size, self.plan, error)
        return _Coming(reads, self._share, world_size, self.plan)

    def _load(self, batches: Generator[list[Read]], following: Position, ended: dict[int, Read]) -> dict[int, Read]:
        """Return this rank's micro-batches of the next step, by reader. `following`: the position after it."""
        if self._batches is not batches:
            raise RuntimeError(
                "these steps of the Loader have ended, because others were started or a state was loaded: a Loader has "
                "one iterator at a time"
            )
        reads, self._goes_on = dict(ended), None
        while len(reads) < len(self._share):
            for one in next(batches):
                reads[one.reader] = one
                if one.size == 0:
                    ended[one.reader] = one
        self._states[following] = {reader: read.state for reader, read in reads.items()}
        return reads


class _Once:
    """Calls a function when it is called for the first time, and returns its result each time."""

    def __init__(self, function: Callable[..., dict[int, Read]], *args: Any) -> None:
        self._function, self._args = function, args
        self._result: dict[int, Read] | None = None

    def __call__(self) -> dict[int, Read]:
        if self._result is None:
            self._result = self._function(*self._args)
        return self._result


class _Coming:
    """This rank's micro-batches of a step, and the sizes of all ranks', which are on their way.

    A rank that could not read raises its error only where it would take the step: until then, the others wait for it
    in the step before. They are told by a size of `_FAILED`.
    """

    def __init__(
        self,
        reads: dict[int, Read],
        mine: range,
        world_size: int,
        plan: StreamPlan,
        error: Exception | None = None,
    ) -> None:
        self.reads = {reader: read for reader, read in reads.items() if read.size}
        self._plan, self._world_size, self._error = plan, world_size, error
        width = len(share(plan.micro_batches_per_step, 0, world_size))  # the first rank has the most
        own = [_FAILED] if error else [reads[reader].size for reader in mine]
        sizes = torch.tensor(own + [0] * (width - len(own)))
        if world_size == 1:
            self._all, self._work = sizes, None
            return
        device = wire_device()
        self._all = torch.empty(world_size * width, dtype=sizes.dtype, device=device)
        self._sent = sizes.to(device)  # until the work is done
        self._work = all_gather_single(self._all, self._sent, async_op=True)

    def agreed(self) -> list[int]:
        """Return the sizes of all readers' micro-batches."""
        if self._work is not None:
            self._work.wait()
        if self._error is not None:
            raise self._error
        rows = self._all.view(self._world_size, -1).tolist()
        if failed := [rank for rank, row in enumerate(rows) if _FAILED in row]:
            raise SampleError(f"rank {failed[0]} could not read the next step of the stream; its own error says why")
        shares = [share(self._plan.micro_batches_per_step, rank, self._world_size) for rank in range(self._world_size)]
        return [size for row, mine in zip(rows, shares, strict=True) for size in row[: len(mine)]]


def _as_json(state: ReaderState | None) -> tuple[str, str]:
    """Return a state as JSON, or what it has that JSON has not."""
    try:
        text = json.dumps(state)
    except (TypeError, ValueError) as error:
        return "", str(error)
    return (text, "") if json.loads(text) == state else ("", f"it has tuples or keys that are no strings: {state}")


def _as_it_is(batch: Any) -> Any:
    return batch
