"""The plan: which samples each step, micro-batch and rank gets. It depends only on the seed, the epoch and the step.

A plan cuts an epoch into steps and micro-batches, and gives each rank a contiguous share of them. `Plan` says what a
plan must give, and has the rest. `BatchPlan` is the usual one: its order is a keyed permutation of range(num_samples),
which is computed at the positions that are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .permutation import permute
from .rng import derive_seed, numbered_seed
from .sizes import check_sizes, cut_sizes, digest, part_start, plain, share

# How many samples of a rank `BatchPlan.steps` computes at once: they take 80 kB during the computation.
_SAMPLES_AT_ONCE = 4096
FIRST_STEP = "first step of the epoch"  # in the description of a plan of a user's
_STEP_POSITIONS = 32  # bits: in a `Plan`, the sample at place p of step s has the position s * 2**32 + p


@dataclass(slots=True, eq=False)
class MicroBatch:
    """One micro-batch of a step: the unit of loading, randomness, execution and reduction.

    Attributes:
        index: its number within the step, over all ranks.
        samples: 1-D int64 data-set indices.
        seed: the seed of its random streams; `seed + 1` is the seed while it is loaded.
        weight: its share of the step's samples.
        position: a number of its first sample that no other sample of the epoch has; the others have the next numbers.
    """

    index: int
    samples: NDArray[np.int64]
    seed: int
    weight: float
    position: int


class Plan(Protocol):
    """Say which samples each step consumes. Derive your own plan from this class, and write what it lacks.

    A plan must be a function of its arguments alone: the same on every rank, in every process, and when it is asked
    again. Everything else follows from that: any number of ranks and workers, and a training that continues at any
    step. `ddparity.testing.check_plan(plan)` checks it.

    You write:

    - `steps_per_epoch`: the steps of an epoch, 0 or more.
    - `micro_batches_per_step`: the largest number of micro-batches that a step has, 1 or more. More ranks are refused.
    - `sizes(epoch, step)`: how many samples each micro-batch of the step has, over all ranks; each 1 or more. It should
      take time that does not grow with `step`, since a training continues at a step by asking for it.
    - `samples(epoch, step, start, stop)`: the data-set indices at the places from `start` to before `stop` in the step,
      as a 1-D int64 array. A rank asks only for its own. An index may come up again, in the same step or later.

    You may write:

    - `seed`: the random streams of loading and of the model depend on it. Default 0.
    - `length`: the number of samples of the data set, which a `Loader` compares. Default None: any.
    - `steps_in(epoch)`: the steps of this epoch, if epochs differ. Default `steps_per_epoch`.
    - `description(epoch)`: what ranks compare before an epoch, and a checkpoint before it continues. Default: the
      fields of a dataclass (of arrays and lists a digest, of functions the name), and a digest of the epoch's first
      step.

    You need not write the others: `step` and `steps` give each rank a contiguous share of the micro-batches, whose
    numbers differ by at most one. A micro-batch has the seed of its epoch, step and number, and a weight by its size.

    A plan is picklable if its fields are. Make it a frozen dataclass; compare by identity (`eq=False`) if it has an
    array.

    Collectives: none.

    Example: classes in turn, so that each micro-batch has as many of one as of the other.
        >>> @dataclass(frozen=True)
        ... class InTurn(Plan):
        ...     per_class: int
        ...     seed: int = 0
        ...     steps_per_epoch = property(lambda self: self.per_class // 2)
        ...     micro_batches_per_step = 2
        ...     def sizes(self, epoch, step):
        ...         return [2, 2]
        ...     def samples(self, epoch, step, start, stop):
        ...         turns, classes = np.divmod(np.arange(4 * step + start, 4 * step + stop), 2)
        ...         return permute(turns, self.per_class, self.seed, epoch) + classes * self.per_class
        >>> [len(micro.samples) for micro in InTurn(per_class=50).step(epoch=0, step=3)]
        [2, 2]
    """

    @property
    def seed(self) -> int:
        return 0

    @property
    def length(self) -> int | None:
        return None

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...
    @property
    @abstractmethod
    def micro_batches_per_step(self) -> int: ...
    @abstractmethod
    def sizes(self, epoch: int, step: int) -> Sequence[int]: ...
    @abstractmethod
    def samples(self, epoch: int, step: int, start: int, stop: int) -> NDArray[np.int64]: ...

    def steps_in(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        return self.steps_per_epoch

    def step(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
        """Return the micro-batches of `rank` in `step` of `epoch`.

        The list is empty if the step has fewer micro-batches than there are ranks and this rank gets none.

        Raises:
            IndexError: the epoch has no such step.
            ValueError: `rank` is not in a world of `world_size`.
        """
        steps = self.steps_in(epoch)
        if not 0 <= step < steps:
            raise IndexError(f"step {step} is not in the plan: an epoch has {steps} steps, from 0")
        return next(self.steps(epoch, step, step + 1, rank, world_size))

    def steps(
        self, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[MicroBatch]]:
        """Yield what `step` returns for each step from `start` to before `stop`; None: to the end of the epoch."""
        steps = self.steps_in(epoch)
        for step in range(start, steps if stop is None else min(stop, steps)):
            sizes = self.sizes(epoch, step)
            places = list(itertools.accumulate(sizes, initial=0))
            mine = share(len(sizes), rank, world_size)
            first, last = places[mine.start], places[mine.stop]
            samples = self._checked_samples(epoch, step, first, last)
            yield [
                MicroBatch(
                    index,
                    samples[places[index] - first : places[index + 1] - first],
                    self._seed(epoch, step, index),
                    sizes[index] / places[-1],
                    (step << _STEP_POSITIONS) + places[index],
                )
                for index in mine
            ]

    def seed_after(self, epoch: int, step: int) -> int:
        """Return the seed of the random streams between a step and the next; it is the same on every rank."""
        return self._seed(epoch, step, self.micro_batches_per_step)

    def sample_seeds(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the key and the number of the seed of the sample at this position of an epoch; see `numbered_seed`.

        The samples at the following positions have the following numbers.
        """
        step, place = divmod(position, 1 << _STEP_POSITIONS)
        return derive_seed(self.seed, "samples", epoch, step), place

    def description(self, epoch: int | None = None) -> dict[str, Any]:
        """Return plain values that are equal if the steps are: of the plan, and with `epoch` also of that epoch."""
        fields: Sequence[dataclasses.Field[Any]] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        about = {"kind": type(self).__name__, **{one.name: plain(getattr(self, one.name)) for one in fields}}
        if epoch is not None and not _is_ours(self) and self.steps_in(epoch) > 0:
            sizes = list(self.sizes(epoch, 0))
            about[FIRST_STEP] = digest([*sizes, *np.asarray(self.samples(epoch, 0, 0, sum(sizes)))])
        return about

    def _checked_samples(self, epoch: int, step: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return what `samples` gives, if it is as many as `sizes` says; weights would be wrong otherwise."""
        samples = self.samples(epoch, step, start, stop) if start < stop else np.empty(0, np.int64)
        if len(samples) != stop - start:
            raise ValueError(
                f"{type(self).__name__}.samples({epoch}, {step}, {start}, {stop}) gave {len(samples)} samples for "
                f"{stop - start} places, but sizes({epoch}, {step}) are {list(self.sizes(epoch, step))}: let both "
                f"agree (ddparity.testing.check_plan finds such a step)"
            )
        return samples

    def _seed(self, epoch: int, step: int, micro_batch: int) -> int:
        return numbered_seed(_epoch_key(self.seed, epoch), step * (self.micro_batches_per_step + 1) + micro_batch)


def _is_ours(plan: Plan) -> bool:
    """Return whether the fields of a plan say it all: a user's samples may depend on what is in no field."""
    return type(plan).samples.__module__.startswith(f"{__package__}.")


def check_plan_methods(plan: Any) -> None:
    """Check that a plan has what `Plan` asks for.

    Raises:
        TypeError: something is missing; the message names it.
    """
    names = [name for name in vars(Plan) if not name.startswith("_")]
    if missing := [name for name in names if not hasattr(plan, name)]:
        raise TypeError(
            f"the plan is a {type(plan).__name__} without {', '.join(missing)}: derive its class from ddparity.Plan, "
            f"which says what a plan must have"
        )


@dataclass(frozen=True)
class BatchPlan(Plan):
    """Cut a data set into global batches and micro-batches, in the same way for every world size.

    A step consumes `global_batch` samples in the fewest micro-batches that hold them, ceil(samples / micro_batch),
    whose sizes differ by at most one. Each rank runs a contiguous share of them. A short last step has fewer
    micro-batches than the others, not smaller ones, so some ranks may get none; `drop_last` removes it. An epoch has
    every sample exactly once, in a keyed random order with `shuffle`. A plan is a pure function and picklable. Its
    memory and the time of a step do not depend on `num_samples`.

    Args:
        num_samples: samples in the data set, 0 or more.
        global_batch: samples of a step, over all ranks, 1 or more.
        micro_batch: the largest number of samples in one forward and backward, 1 or more.
        seed: any integer; the order and all random streams depend on it.
        shuffle: whether each epoch has a random order of its own; otherwise the order is 0, 1, 2, ….
        drop_last: whether a short last step is left out.

    Raises:
        TypeError: a size or the seed is not an integer.
        ValueError: a size is out of range.

    Example:
        >>> plan = BatchPlan(10, global_batch=4, micro_batch=2, shuffle=False)
        >>> [[m.samples.tolist() for m in plan.step(0, 2, rank, 2)] for rank in (0, 1)]
        [[[8, 9]], []]
    """

    num_samples: int
    global_batch: int
    micro_batch: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False

    def __init_subclass__(cls) -> None:
        """Refuse what `steps` would not see.

        Raises:
            TypeError: a class that is derived from this one cuts steps in another way.
        """
        if named := [name for name in ("sizes", "steps_in", "micro_batches_per_step", "step") if name in vars(cls)]:
            raise TypeError(
                f"{cls.__name__} is derived from BatchPlan and has its own {', '.join(named)}: derive it from "
                f"ddparity.Plan; a class derived from BatchPlan may have samples of its own"
            )

    def __post_init__(self) -> None:
        check_sizes(self, num_samples=0, global_batch=1, micro_batch=1)

    @property
    def length(self) -> int:
        return self.num_samples

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.num_samples, self.global_batch)
        return full + (rest > 0 and not self.drop_last)

    @property
    def micro_batches_per_step(self) -> int:
        """The micro-batches of a full step, over all ranks; a short last step may have fewer."""
        return self._micro_batches_of(self.global_batch)

    def micro_batches_in(self, step: int) -> int:
        """Return the number of micro-batches of `step`, over all ranks."""
        return self._micro_batches_of(self.samples_in(step))

    def _micro_batches_of(self, samples: int) -> int:
        return -(-samples // self.micro_batch)

    def samples_in(self, step: int) -> int:
        """Return the number of samples of `step`, over all ranks.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is not in the plan: an epoch has {self.steps_per_epoch} steps, from 0")
        return min(self.global_batch, self.num_samples - step * self.global_batch)

    def sizes(self, epoch: int, step: int) -> tuple[int, ...]:
        """Return the number of samples of each micro-batch of `step`, over all ranks."""
        return cut_sizes(self.samples_in(step), self.micro_batch)

    def samples(self, epoch: int, step: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the data-set indices at the places from `start` to before `stop` of a step."""
        first = step * self.global_batch
        positions = np.arange(first + start, first + stop, dtype=np.int64)
        return permute(positions, self.num_samples, self.seed, "order", epoch) if self.shuffle else positions

    def steps(
        self, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[MicroBatch]]:
        """Yield what `step` returns for each step from `start` to before `stop`; None: to the end of the epoch.

        It is faster than calls of `step`, because it computes the order of several steps at once.
        """
        stop = self.steps_per_epoch if stop is None else min(stop, self.steps_per_epoch)
        key = _series_key(self.seed)
        at_once = max(1, _SAMPLES_AT_ONCE * world_size // self.global_batch)
        for begin in range(start, stop, at_once):
            numbers = range(begin, min(begin + at_once, stop))
            shares = [
                _rank_share(self.samples_in(step), self.micro_batches_in(step), rank, world_size) for step in numbers
            ]
            samples = self._samples_of(epoch, {step: (at[0], at[-1]) for step, (_, at, _) in zip(numbers, shares)})
            taken = 0
            for step, (first, bounds, weights) in zip(numbers, shares, strict=True):
                low, micros = taken, []
                index, number = first, self._seed_number(epoch, step, first)
                to_position = step * self.global_batch + bounds[0] - taken
                for start_of_next, weight in zip(bounds[1:], weights, strict=True):
                    high = taken + start_of_next - bounds[0]
                    seed = numbered_seed(key, number)
                    micros.append(MicroBatch(index, samples[low:high], seed, weight, low + to_position))
                    low, index, number = high, index + 1, number + 1
                yield micros
                taken = low

    def _samples_of(self, epoch: int, places: dict[int, tuple[int, int]]) -> NDArray[np.int64]:
        """Return the samples at places, from the first to before the second, of some steps."""
        if not _is_ours(self):
            return np.concatenate([self._checked_samples(epoch, step, *ends) for step, ends in places.items()])
        starts = {step: step * self.global_batch for step in places}
        positions = [np.arange(starts[step] + low, starts[step] + high) for step, (low, high) in places.items()]
        samples = np.concatenate(positions).astype(np.int64, copy=False)
        if self.shuffle and samples.size:
            samples = permute(samples, self.num_samples, self.seed, "order", epoch)
        return samples

    def seed_after(self, epoch: int, step: int) -> int:
        """Return the seed of the random streams between a step and the next; it is the same on every rank."""
        return numbered_seed(_series_key(self.seed), self._seed_number(epoch, step, self.micro_batches_per_step))

    def sample_seeds(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the key and the number of the seed of the sample at this position of an epoch; see `numbered_seed`.

        The samples at the following positions have the following numbers. Neither the sizes of the batches nor the
        number of ranks matter.
        """
        return _sample_key(self.seed), epoch * self.num_samples + position

    def _seed_number(self, epoch: int, step: int, micro_batch: int) -> int:
        """Return the number of a seed in the training: one for each micro-batch, and one after each step."""
        return (epoch * self.steps_per_epoch + step) * (self.micro_batches_per_step + 1) + micro_batch


@functools.lru_cache(maxsize=16)
def _series_key(seed: int) -> int:
    return derive_seed(seed, "micro-batches")


@functools.lru_cache(maxsize=16)
def _epoch_key(seed: int, epoch: int) -> int:
    return derive_seed(seed, "micro-batches", epoch)


@functools.lru_cache(maxsize=16)
def _sample_key(seed: int) -> int:
    return derive_seed(seed, "samples")


@functools.lru_cache(maxsize=64)
def _rank_share(size: int, count: int, rank: int, world_size: int) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """Return a rank's share of a step of `size` samples in `count` micro-batches.

    Returns:
        The index of the rank's first micro-batch; the positions in the step where its micro-batches begin and where
        the last one ends; the weights of its micro-batches.
    """
    numbers = share(count, rank, world_size)
    bounds = tuple(part_start(size, number, count) for number in range(numbers.start, numbers.stop + 1))
    return numbers.start, bounds, tuple((high - low) / size for low, high in itertools.pairwise(bounds))
