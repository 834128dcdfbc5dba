"""The plan: which samples each step, micro-batch and rank gets, from the seed, the epoch and the step alone."""

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

from .rng import derive, numbered

_SAMPLES_AT_ONCE = 4096  # of a rank, in `steps`: 80 kB while they are computed


@dataclass(slots=True, eq=False)
class MicroBatch:
    """One micro-batch of a step: the atom of loading, randomness, execution and reduction.

    `index`: its number within the step, over all ranks. `samples`: 1-D int64 data-set indices. `seed`: keys its random
    streams, `seed + 1` those while it is loaded. `weight`: its share of the step's samples.
    """

    index: int
    samples: NDArray[np.int64]
    seed: int
    weight: float


@dataclass(frozen=True)
class BatchPlan:
    """Cuts a data set into global batches and micro-batches, the same for every world size.

    A step consumes `global_batch` samples in ceil(global_batch / micro_batch) micro-batches, whose sizes differ by at
    most one; each rank runs a contiguous share. The last, short step (absent with `drop_last`) is spread evenly over
    as many micro-batches as it can fill. An epoch has every sample exactly once, in a keyed random order with
    `shuffle`. Pure and picklable; memory and the time of a step do not depend on `num_samples`.

    Args:
        num_samples: samples in the data set, 0 or more.
        global_batch: samples a step, over all ranks, 1 or more.
        micro_batch: samples in one forward and backward, at most, 1 or more.
        seed: any integer; keys the order and all random streams.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is out of range.

    Example:
        >>> plan = BatchPlan(10, global_batch=4, micro_batch=2, shuffle=False)
        >>> [[m.samples.tolist() for m in plan.step(0, 2, rank, 2)] for rank in (0, 1)]
        [[[8]], [[9]]]
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
        """Of a full step; the last, short one may have fewer."""
        return -(-self.global_batch // self.micro_batch)

    def micro_batches_in(self, step: int) -> int:
        """Micro-batches of `step`, over all ranks."""
        return min(self.micro_batches_per_step, self.samples_in(step))

    def samples_in(self, step: int) -> int:
        """Samples of `step`, over all ranks."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is not in the plan: an epoch has {self.steps_per_epoch} steps, from 0")
        return min(self.global_batch, self.num_samples - step * self.global_batch)

    def step(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
        """The micro-batches of `rank` in `step` of `epoch`; an empty list where the step has fewer than ranks.

        Raises:
            IndexError: the epoch has no such step.
            ValueError: `rank` is not in a world of `world_size`.
        """
        self.samples_in(step)  # raises where there is no such step
        return next(self.steps(epoch, step, step + 1, rank, world_size))

    def steps(
        self, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[MicroBatch]]:
        """As `step` for each step from `start` to `stop`, faster: the order is computed for several at once."""
        stop = self.steps_per_epoch if stop is None else min(stop, self.steps_per_epoch)
        key = _key(self.seed)
        at_once = max(1, _SAMPLES_AT_ONCE * world_size // self.global_batch)
        for begin in range(start, stop, at_once):
            numbers = range(begin, min(begin + at_once, stop))
            cuts = [_cut(self.samples_in(step), self.micro_batches_per_step, rank, world_size) for step in numbers]
            positions = [
                np.arange(step * self.global_batch + bounds[0], step * self.global_batch + bounds[-1], dtype=np.int64)
                for step, (_, bounds, _) in zip(numbers, cuts, strict=True)
            ]
            samples = np.concatenate(positions)
            if self.shuffle and samples.size:
                samples = permute(samples, self.num_samples, self.seed, "order", epoch)
            taken = 0
            for step, (first, bounds, weights) in zip(numbers, cuts, strict=True):
                low, micros = taken, []
                index, number = first, self._number(epoch, step, first)
                for start_of_next, weight in zip(bounds[1:], weights, strict=True):
                    high = taken + start_of_next - bounds[0]
                    micros.append(MicroBatch(index, samples[low:high], numbered(key, number), weight))
                    low, index, number = high, index + 1, number + 1
                yield micros
                taken = low

    def seed_after(self, epoch: int, step: int) -> int:
        """Keys the random streams between a step and the next, the same on every rank."""
        return numbered(_key(self.seed), self._number(epoch, step, self.micro_batches_per_step))

    def _number(self, epoch: int, step: int, micro_batch: int) -> int:
        """Counts the keys of a training: one for each micro-batch, and one after each step."""
        return (epoch * self.steps_per_epoch + step) * (self.micro_batches_per_step + 1) + micro_batch


@functools.lru_cache(maxsize=16)
def _key(seed: int) -> int:
    return derive(seed, "micro-batches")


@functools.lru_cache(maxsize=64)
def _cut(size: int, most: int, rank: int, world_size: int) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """A rank's share of a step of `size` samples in at most `most` micro-batches.

    Its first micro-batch; where its micro-batches begin, and the last ends; their weights.
    """
    count = min(most, size)
    numbers = share(count, rank, world_size)
    bounds = tuple(part_start(size, number, count) for number in range(numbers.start, numbers.stop + 1))
    return numbers.start, bounds, tuple((high - low) / size for low, high in itertools.pairwise(bounds))


def share(count: int, rank: int, world_size: int) -> range:
    """The contiguous share of `count` things that `rank` gets; sizes differ by at most one, larger ones first."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}: ranks go from 0 to world_size - 1")
    return range(part_start(count, rank, world_size), part_start(count, rank + 1, world_size))


def part_start(count: int, part: int, parts: int) -> int:
    """Where part `part` begins when `count` things are cut into `parts` parts, larger ones first."""
    size, larger = divmod(count, parts)
    return part * size + min(part, larger)


def checked_integer(value: object, name: str) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give an integer") from None


# Operands are 0-d and 1-element arrays: NumPy handles them in two thirds of the time that its scalars take.
_ODD_1 = np.array(0x9E3779B97F4A7C15, np.uint64)
_ODD_2 = np.array(0xD6E8FEB86659FD93, np.uint64)
_HALF = np.array(32, np.uint64)
_HEADROOM = np.array(16, np.uint64)
_ROUNDS = 6
# Below this size a sort of random keys takes under 20 µs and every permutation is equally likely; a Feistel network
# over so few values would be visibly less than random.
_SORTED = 1024


def permute(positions: NDArray[np.int64], n: int, *key: int | str) -> NDArray[np.int64]:
    """The elements at `positions` of the permutation of range(n) that `key` names.

    A Feistel network over Z_a x Z_b, with a and b about the root of n, and cycle walking for the few values from n to
    a*b: constant memory, and the same result on every machine and NumPy version. n up to 2**62.

    Args:
        positions: 1-D int64, each at least 0 and below n.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.

    Example:
        >>> sorted(permute(np.arange(5), 5, "epoch", 0).tolist())
        [0, 1, 2, 3, 4]
    """
    if n <= _SORTED:
        words = _random_words(np.arange(n, dtype=np.uint64), _round_keys(*key))
        return np.argsort(words, kind="stable")[positions]
    keys = _round_keys(*key)
    a, b = _factors(n)
    values = _feistel(positions.astype(np.uint64), a, b, keys)
    # Walking on from a value outside of range(n) meets one inside: the network is a permutation of range(a * b).
    while values.max(initial=0) >= n:
        outside = np.flatnonzero(values >= n)
        values[outside] = _feistel(values[outside], a, b, keys)
    return values.view(np.int64)


@functools.lru_cache(maxsize=16)
def _factors(n: int) -> tuple[int, int]:
    """a and b near the root of n whose product exceeds n least: few values are then left to walk."""
    root = math.isqrt(n - 1) + 1
    return min(((a, -(-n // a)) for a in range(root, max(root // 2, root - 256), -1)), key=lambda ab: ab[0] * ab[1])


def _round_keys(*key: int | str) -> list[NDArray[np.uint64]]:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return [words[number : number + 1] for number in range(_ROUNDS)]


def _feistel(values: NDArray[np.uint64], a: int, b: int, keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    height, width = np.array(a, np.uint64), np.array(b, np.uint64)
    left, right = np.divmod(values, width)
    words = np.empty_like(left)
    for number in range(0, _ROUNDS, 2):
        left += _hashed(right, keys[number], words)
        left %= height
        right += _hashed(left, keys[number + 1], words)
        right %= width
    left *= width
    left += right
    return left


def _hashed(half: NDArray[np.uint64], key: NDArray[np.uint64], out: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 48-bit word from each value (multiply, xor-shift, multiply), so that adding it to a half cannot overflow."""
    np.add(half, key, out=out)
    np.multiply(out, _ODD_1, out=out)
    np.bitwise_xor(out, np.right_shift(out, _HALF), out=out)
    np.multiply(out, _ODD_2, out=out)
    return np.right_shift(out, _HEADROOM, out=out)


def _random_words(values: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """64-bit sort keys, unrelated between values and keys."""
    words = values * _ODD_1
    for key in keys[:4]:
        words += key
        words ^= words >> _HALF
        words *= _ODD_2
    words ^= words >> _HALF
    return words
