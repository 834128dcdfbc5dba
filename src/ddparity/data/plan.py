"""The plan: which samples each step, micro-batch and rank gets. It depends only on the seed, the epoch and the step.

A plan cuts an epoch into steps and micro-batches, and gives each rank a contiguous share of them. The order of the
samples is a keyed permutation of range(num_samples), which is computed at the positions that are needed.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .rng import derive_seed, numbered_seed

# How many samples of a rank `BatchPlan.steps` computes at once: they take 80 kB during the computation.
_SAMPLES_AT_ONCE = 4096

# Constants of the permutation. They are 0-d arrays, because NumPy computes with 0-d and 1-element arrays in two thirds
# of the time that it needs for its scalars.
_ODD_1 = np.array(0x9E3779B97F4A7C15, np.uint64)
_ODD_2 = np.array(0xD6E8FEB86659FD93, np.uint64)
_HALF = np.array(32, np.uint64)
_HEADROOM = np.array(16, np.uint64)
_ROUNDS = 6
# Up to this size `permute` sorts random keys: it takes less than 20 µs and makes every permutation equally likely. A
# Feistel network over so few values would be measurably less random.
_SORTED = 1024


@dataclass(slots=True, eq=False)
class MicroBatch:
    """One micro-batch of a step: the unit of loading, randomness, execution and reduction.

    Attributes:
        index: its number within the step, over all ranks.
        samples: 1-D int64 data-set indices.
        seed: the seed of its random streams; `seed + 1` is the seed while it is loaded.
        weight: its share of the step's samples.
        position: where in the epoch its first sample is; the others follow.
    """

    index: int
    samples: NDArray[np.int64]
    seed: int
    weight: float
    position: int


@dataclass(frozen=True)
class BatchPlan:
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

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 0), ("global_batch", 1), ("micro_batch", 1)):
            value = checked_integer(getattr(self, name), name)
            object.__setattr__(self, name, value)
            if value < least:
                raise ValueError(f"BatchPlan({name}={value}): must be at least {least}")
        object.__setattr__(self, "seed", checked_integer(self.seed, "seed"))

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

    def step(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
        """Return the micro-batches of `rank` in `step` of `epoch`.

        The list is empty if the step has fewer micro-batches than there are ranks and this rank gets none.

        Raises:
            IndexError: the epoch has no such step.
            ValueError: `rank` is not in a world of `world_size`.
        """
        self.samples_in(step)  # raises IndexError
        return next(self.steps(epoch, step, step + 1, rank, world_size))

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
            positions = [
                np.arange(step * self.global_batch + bounds[0], step * self.global_batch + bounds[-1], dtype=np.int64)
                for step, (_, bounds, _) in zip(numbers, shares, strict=True)
            ]
            samples = np.concatenate(positions)
            if self.shuffle and samples.size:
                samples = permute(samples, self.num_samples, self.seed, "order", epoch)
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


def share(count: int, rank: int, world_size: int) -> range:
    """Return the contiguous share of range(count) that `rank` gets; sizes differ by at most one, larger ones first.

    Raises:
        ValueError: `rank` is not in a world of `world_size`.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}: ranks go from 0 to world_size - 1")
    return range(_part_start(count, rank, world_size), _part_start(count, rank + 1, world_size))


def checked_integer(value: object, name: str) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: it is not an integer; the message has the argument's `name`.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]  # the TypeError is for values of other types
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give an integer") from None


def permute(positions: NDArray[np.int64], n: int, *key: int | str) -> NDArray[np.int64]:
    """Return the elements at `positions` of the permutation of range(n) that `key` names.

    It is a Feistel network over Z_a x Z_b, with a and b near the square root of n. The few values from n to a*b are
    put through the network again (cycle walking). So it needs constant memory, and gives the same result on every
    machine and with every version of NumPy. n may be up to 2**62.

    Args:
        positions: 1-D int64, each at least 0 and less than n.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.

    Example:
        >>> sorted(permute(np.arange(5), 5, "epoch", 0).tolist())
        [0, 1, 2, 3, 4]
    """
    if n <= _SORTED:
        words = _sort_keys(np.arange(n, dtype=np.uint64), _round_keys(*key))
        return np.argsort(words, kind="stable")[positions]
    keys = _round_keys(*key)
    a, b = _factors(n)
    values = _feistel(positions.astype(np.uint64), a, b, keys)
    # The network is a permutation of range(a * b), so repeating it on a value from n on ends at a value below n.
    while values.max(initial=0) >= n:
        outside = np.flatnonzero(values >= n)
        values[outside] = _feistel(values[outside], a, b, keys)
    return values.view(np.int64)


@functools.lru_cache(maxsize=16)
def _series_key(seed: int) -> int:
    return derive_seed(seed, "micro-batches")


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
    bounds = tuple(_part_start(size, number, count) for number in range(numbers.start, numbers.stop + 1))
    return numbers.start, bounds, tuple((high - low) / size for low, high in itertools.pairwise(bounds))


def _part_start(count: int, part: int, parts: int) -> int:
    """Return where part `part` begins if range(count) is cut into `parts` parts, larger ones first."""
    size, larger = divmod(count, parts)
    return part * size + min(part, larger)


@functools.lru_cache(maxsize=16)
def _factors(n: int) -> tuple[int, int]:
    """Return a and b near the square root of n with the least product of at least n, so that few values are outside."""
    root = math.isqrt(n - 1) + 1
    return min(((a, -(-n // a)) for a in range(root, max(root // 2, root - 256), -1)), key=lambda ab: ab[0] * ab[1])


def _round_keys(*key: int | str) -> list[NDArray[np.uint64]]:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return [words[number : number + 1] for number in range(_ROUNDS)]


def _feistel(values: NDArray[np.uint64], a: int, b: int, keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return a keyed permutation of range(a * b) at `values`."""
    height, width = np.array(a, np.uint64), np.array(b, np.uint64)
    left, right = np.divmod(values, width)
    words = np.empty_like(left)
    for number in range(0, _ROUNDS, 2):
        left += _mixed(right, keys[number], words)
        left %= height
        right += _mixed(left, keys[number + 1], words)
        right %= width
    left *= width
    left += right
    return left


def _mixed(half: NDArray[np.uint64], key: NDArray[np.uint64], out: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a word of 48 bits for each value (multiply, xor-shift, multiply); a half plus a word cannot overflow."""
    np.add(half, key, out=out)
    np.multiply(out, _ODD_1, out=out)
    np.bitwise_xor(out, np.right_shift(out, _HALF), out=out)
    np.multiply(out, _ODD_2, out=out)
    return np.right_shift(out, _HEADROOM, out=out)


def _sort_keys(values: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return a 64-bit sort key for each value, unrelated between values and between `keys`."""
    words = values * _ODD_1
    for key in keys[:4]:
        words += key
        words ^= words >> _HALF
        words *= _ODD_2
    words ^= words >> _HALF
    return words
