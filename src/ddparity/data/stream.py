"""Read micro-batches from data that can only be iterated: the plan, and the readers, which run in a loader's workers.

Reader i of M reads micro-batch i of every step, on whichever rank and in whichever worker it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..compat import hide_worker
from ..errors import SampleError
from .dataset import reading_sample
from .permutation import permute
from .rng import derive_seed, numbered_seed, seed_streams
from .sizes import check_sizes, checked_integer, cut_sizes

# What a checkpoint has of a reader: where the stream begins to be read again, and what was taken since.
ReaderState = dict[str, Any]
ENDED: ReaderState = {"ended": True}
Opened = dict[int, tuple[int, Any]]  # of each reader, the pass and the iterator that it had last
_END = object()


@dataclass(frozen=True)
class StreamPlan:
    """Cut data that can only be iterated into steps: micro-batch i of every step is read by reader i.

    There are M readers, ceil(global_batch / micro_batch). Each reads a part of the stream, whichever rank and worker
    runs it, so the samples of a step depend neither on the number of ranks nor on workers. A rank runs a contiguous
    share of the readers.

    Without `steps_per_epoch`, an epoch has every sample of the stream exactly once. It ends when all readers have
    ended; where some have ended, the last steps have fewer micro-batches, and a reader's last one may be smaller. So
    let the readers' parts be of about equal size. The ranks agree on the sizes of a step one step ahead.

    With `steps_per_epoch`, every epoch has so many full steps. The readers go on from one epoch to the next; a reader
    whose part has ended reads it again, and the stream is told the next pass as its epoch.

    Args:
        global_batch: samples of a full step, over all ranks, 1 or more.
        micro_batch: the largest number of samples of a micro-batch, 1 or more.
        seed: any integer; the shuffle and all random streams depend on it.
        shuffle_buffer: how many samples of its part a reader shuffles at once; 0 or 1: as the stream gives them. A
            sample moves by at most two buffers.
        steps_per_epoch: None: an epoch ends with the stream.

    Memory: `shuffle_buffer` samples a reader, and this rank's micro-batches of the next step.
    Time of a seek: where the stream has a `state_dict`, to read at most two shuffle buffers, at any position. Otherwise
    to read again what was read before.

    Raises:
        TypeError: a size or the seed is not an integer.
        ValueError: a size is out of range.

    Collectives: without `steps_per_epoch` one all-gather a step, of 8 bytes a micro-batch, which runs during the step
    before; with it none. At the start of an epoch the ranks compare the plan and the position through the store.
    """

    global_batch: int
    micro_batch: int
    seed: int = 0
    shuffle_buffer: int = 0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, global_batch=1, micro_batch=1, shuffle_buffer=0)
        if self.steps_per_epoch is not None:
            steps = checked_integer(self.steps_per_epoch, "steps_per_epoch")
            if steps < 1:
                raise ValueError(f"StreamPlan(steps_per_epoch={steps}): must be at least 1")
            object.__setattr__(self, "steps_per_epoch", steps)

    @property
    def micro_batches_per_step(self) -> int:
        """The readers, and the micro-batches of a full step, over all ranks."""
        return len(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The samples of each micro-batch of a full step."""
        return cut_sizes(self.global_batch, self.micro_batch)

    def seed_of(self, epoch: int, step: int, reader: int) -> int:
        """Return the seed of the random streams of a micro-batch."""
        key = derive_seed(self.seed, "micro-batches", epoch)
        return numbered_seed(key, step * (self.micro_batches_per_step + 1) + reader)

    def seed_after(self, epoch: int, step: int) -> int:
        """Return the seed of the random streams between a step and the next; it is the same on every rank."""
        return self.seed_of(epoch, step, self.micro_batches_per_step)

    def description(self, epoch: int | None = None) -> dict[str, Any]:
        """Return plain values that are equal if the steps of the same stream are."""
        return {"kind": type(self).__name__, **vars(self)}


@dataclass(slots=True)
class Read:
    """A micro-batch as a reader gives it, and the reader's state after it; `size` 0 if the reader has ended."""

    reader: int
    size: int
    data: Any
    state: ReaderState


def check_stream(dataset: Any, plan: StreamPlan) -> None:
    """Check that a `StreamPlan` can read from this.

    Raises:
        TypeError: it has no `shard`, and is no function.
        ValueError: it has fewer shards than the plan has readers, or is a part of a stream.
    """
    readers = plan.micro_batches_per_step
    check_whole(dataset, "Loader")
    if has_shards(dataset):
        shards = getattr(dataset, "num_shards", None)
        if isinstance(shards, int) and shards < readers:
            raise ValueError(
                f"the stream has {shards} shards, and the plan {readers} micro-batches a step, each read from shards "
                f"of its own: give at most {shards} micro-batches (a larger micro_batch), or a stream in more shards"
            )
    elif not callable(dataset) or isinstance(dataset, IterableDataset):
        raise TypeError(
            f"Loader got a {type(dataset).__name__} with a StreamPlan: give something with shard(num_shards=, index=), "
            f"as datasets.IterableDataset has, or a function stream(reader, readers, epoch) that returns an iterable "
            f"of this reader's part"
        )


def has_shards(dataset: Any) -> bool:
    """Return whether this is cut by its method `shard(num_shards=, index=)`; otherwise a function gives the parts."""
    return _has(dataset, "shard")


def check_whole(dataset: Any, user: str) -> None:
    """Check that a stream is not one rank's part, which the readers would cut again.

    Raises:
        ValueError: Hugging Face's `split_dataset_by_node` has made it.
    """
    part: Any = getattr(dataset, "_distributed", None)
    if part is not None and getattr(part, "world_size", 1) > 1:
        raise ValueError(
            f"{user} got a stream that split_dataset_by_node(rank={part.rank}, world_size={part.world_size}) has cut, "
            f"and would cut it once more, so that samples were lost: leave split_dataset_by_node out"
        )


def opening_seed(seed: int, epoch: int) -> int:
    """Return the seed of the random streams while a function opens a stream, up to its first sample, for all readers.

    So `random.shuffle(files)` before `files[reader::readers]` gives each file once.
    """
    return derive_seed(seed, "opening", epoch)


class Readers(IterableDataset[list[Read]]):
    """In a worker: the micro-batches of its readers, as a list for each step.

    It ends after a list in which all have ended.
    """

    def __init__(self, dataset: Any, plan: StreamPlan, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self._plan, self._collate = plan, collate
        self._readers: Sequence[int] = ()
        self._epoch, self._step = 0, 0
        self._states: Sequence[ReaderState | None] = ()
        self._opened: Opened = {}

    def restart(self, epoch: int, step: int, readers: Sequence[int], states: Sequence[ReaderState | None]) -> None:
        """Begin at this step with these readers, and the states of all readers of the plan; None: by skipping."""
        self._epoch, self._step, self._readers, self._states = epoch, step, readers, states

    def __iter__(self) -> Iterator[list[Read]]:
        worker, plan = get_worker_info(), self._plan
        mine = self._readers if worker is None else self._readers[worker.id :: worker.num_workers]
        if worker is not None:
            hide_worker()  # streams would share out their samples among workers once more
        epoch, step = self._epoch, self._step
        readers = [_Reader(self.dataset, plan, one, epoch, step, self._states[one], self._opened) for one in mine]
        while readers:
            reads = [one.read(self._collate, plan.seed_of(epoch, step, one.number) + 1) for one in readers]
            yield reads
            if not any(one.size for one in reads):
                return
            step += 1
            if step == plan.steps_per_epoch:
                epoch, step = epoch + 1, 0


class _Reader:
    """Reads one part of a stream, in the order of its shuffle, from a step or a state on."""

    def __init__(
        self,
        dataset: Any,
        plan: StreamPlan,
        number: int,
        epoch: int,
        step: int,
        state: ReaderState | None,
        opened: Opened,
    ) -> None:
        self.number = number
        self._opened = opened
        self._dataset, self._plan = dataset, plan
        self._size = plan.sizes[number]
        self._ended = state == ENDED
        self._block: list[Any] = []
        if self._ended:
            return
        endless = plan.steps_per_epoch is not None
        skipped = 0
        if state is None:
            skipped = (step if plan.steps_per_epoch is None else epoch * plan.steps_per_epoch + step) * self._size
            state = {"pass": 0 if endless else epoch, "read": 0, "block": 0, "taken": 0, "stream": None}
        self._begin(state)
        for _ in range(state["taken"] + skipped):
            self._take()

    def read(self, collate: Callable[[list[Any]], Any], seed: int) -> Read:
        """Return the next micro-batch. `seed` is for the collate function."""
        samples: list[Any] = []
        while len(samples) < self._size and (sample := self._take()) is not _END:
            samples.append(sample)
        if not samples:
            return Read(self.number, 0, None, ENDED)
        seed_streams(seed)
        try:
            data = collate(samples)
        except Exception as error:
            raise SampleError(
                f"the collate function failed for {len(samples)} samples of reader {self.number}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return Read(self.number, len(samples), data, ENDED if self._ended else self._state())

    def _begin(self, state: ReaderState) -> None:
        """Open the stream where the state says that a block begins."""
        self._pass, self._block_number = state["pass"], state["block"]
        self._key = derive_seed(self._plan.seed, "samples", self._pass, self.number)
        self._count = 0  # samples that were read in this pass
        self._block, self._taken = [], 0
        self._was_in: int | None = None  # the earlier pass that had the same iterator
        self._order: list[int] = []
        self._next: list[Any] = []
        # Draws before the first sample are alike for all readers, so that each can take its part of one shuffled list.
        self._opening = opening_seed(self._plan.seed, self._pass)
        seed_streams(self._opening)
        try:
            self._stream = _Open(self._dataset, self.number, self._plan.micro_batches_per_step, self._pass)
            if state["stream"] is not None:
                self._count = state["read"]
            self._samples = self._stream.start(state["stream"])
            self._note_opened()
        except Exception as error:
            raise self._error(error) from error
        while self._count < state["read"] and self._raw() is not _END:
            pass
        self._next_start = self._start = (self._count, state["stream"])

    def _note_opened(self) -> None:
        """Check that no reader has had this iterator: it would go on where that one stopped.

        What can seek may begin again, so a reader may have the same one in its next pass.
        """
        self._was_in = None
        for reader, (its_pass, samples) in self._opened.items():
            if samples is self._samples:
                if reader != self.number or not self._stream.seeks:
                    raise self._had(reader, its_pass)
                self._was_in = its_pass
        self._opened[self.number] = (self._pass, self._samples)

    def _had(self, reader: int, its_pass: int) -> TypeError:
        return TypeError(
            f"the stream is the {type(self._samples).__name__} that reader {reader} was given for pass {its_pass}: "
            f"return a new iterable in each call, as a generator function does"
        )

    def _take(self) -> Any:
        """Return the next sample of the shuffled order, or _END."""
        if self._ended:
            return _END
        sample = self._raw() if self._plan.shuffle_buffer <= 1 else self._shuffled()
        if sample is not _END:
            return sample
        if self._count == 0 and self._was_in is not None:
            raise self._error(self._had(self.number, self._was_in))
        if self._plan.steps_per_epoch is None:
            self._ended = True
            return _END
        if self._count == 0:
            raise SampleError(f"reader {self.number} of the stream has no samples in pass {self._pass}, so none follow")
        self._begin({"pass": self._pass + 1, "read": 0, "block": 0, "taken": 0, "stream": None})
        return self._take()

    def _shuffled(self) -> Any:
        # A block of samples is given in a keyed order. For each that is given, one of the next block is read. So the
        # buffer holds one block, and reading it again from its start gives the same.
        if self._taken == len(self._block):
            first = not self._order
            self._block, self._next, self._start = self._next, [], self._next_start
            self._block_number += not first
            while len(self._block) < self._plan.shuffle_buffer and (sample := self._raw()) is not _END:
                self._block.append(sample)
            self._next_start = (self._count, self._stream.state())
            places = np.arange(len(self._block), dtype=np.int64)
            key = (self._plan.seed, "shuffle", self._pass, self.number, self._block_number)
            self._order, self._taken = permute(places, len(places), *key).tolist(), 0
            if not self._block:
                return _END
        place = self._order[self._taken]
        sample, self._block[place] = self._block[place], None
        self._taken += 1
        if (coming := self._raw()) is not _END:
            self._next.append(coming)
        return sample

    def _raw(self) -> Any:
        """Return the next sample as the stream gives it, or _END. The random streams are those of its place."""
        opens = self._count == 0 and not has_shards(self._dataset)  # a generator function has run no line yet
        seed_streams(self._opening if opens else numbered_seed(self._key, self._count) + 1)
        try:
            with reading_sample(self._key, self._count):
                sample = next(self._samples, _END)
        except Exception as error:
            raise self._error(error) from error
        self._count += sample is not _END
        return sample

    def _state(self) -> ReaderState:
        if self._plan.shuffle_buffer <= 1:
            read, taken, stream = self._count, 0, self._stream.state()
        else:
            (read, stream), taken = self._start, self._taken
        return {"pass": self._pass, "read": read, "block": self._block_number, "taken": taken, "stream": stream}

    def _error(self, error: Exception) -> SampleError:
        return SampleError(
            f"the stream failed at sample {self._count} of reader {self.number}, in pass {self._pass}: "
            f"{type(error).__name__}: {error}"
        )


class _Open:
    """A reader's part of a stream, and its own state, where it can seek."""

    def __init__(self, dataset: Any, reader: int, readers: int, epoch: int) -> None:
        if has_shards(dataset):
            part = dataset.shard(num_shards=readers, index=reader)
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        else:
            part = dataset(reader, readers, epoch)
        self._part: Any = part
        self._resets = _has(part, "state_dict", "reset") and not _has(part, "load_state_dict")  # a torchdata node
        self.seeks = (self._resets or _has(part, "state_dict", "load_state_dict")) and not _forgets(part)

    def start(self, state: Any) -> Iterator[Any]:
        """Return an iterator from the beginning, or from the state on."""
        part: Iterable[Any] = self._part
        state = copy.deepcopy(state)  # the part may write into it, and into what it gives
        if self._resets:
            self._part.reset(state)
        elif state is not None:
            self._part.load_state_dict(state)
        return iter(part)

    def state(self) -> Any:
        return copy.deepcopy(self._part.state_dict()) if self.seeks else None


def _has(part: Any, *names: str) -> bool:
    return all(callable(getattr(part, name, None)) for name in names)


def _forgets(part: Any) -> bool:
    """Return whether this is a Hugging Face stream with a shuffle buffer, whose samples its state does not have."""
    inner = getattr(part, "_ex_iterable", None)
    while inner is not None:
        if "BufferShuffled" in type(inner).__name__:
            return True
        inner = getattr(inner, "ex_iterable", None)
    return False
