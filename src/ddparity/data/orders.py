"""Plans whose samples are drawn by weight, or come in an order of the user's."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .permutation import permute, words
from .plan import Plan
from .rng import derive_seed, preserve_streams, seed_streams
from .sizes import as_array, check_sizes, checked_integer, cut_sizes, digest

logger = logging.getLogger(__name__)

_PART = 2**20  # indices of an order that are read at once: 8 bytes each, and 32 more while a part is read
_MANY = 2**24  # that a warning is given of: an order without end would fill the memory


class _OrderedPlan(Plan):
    """A plan that cuts an order of samples into global batches, and these into micro-batches, as a `BatchPlan` does."""

    global_batch: int
    micro_batch: int

    def samples_per_epoch(self, epoch: int) -> int:
        """Return the number of samples of an epoch."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        return self.steps_in(0)

    def steps_in(self, epoch: int) -> int:
        return -(-self.samples_per_epoch(epoch) // self.global_batch)

    @property
    def micro_batches_per_step(self) -> int:
        return len(cut_sizes(self.global_batch, self.micro_batch))

    def sizes(self, epoch: int, step: int) -> tuple[int, ...]:
        rest = self.samples_per_epoch(epoch) - step * self.global_batch
        return cut_sizes(min(self.global_batch, rest), self.micro_batch)


@dataclass(frozen=True, eq=False)
class WeightedPlan(_OrderedPlan):
    """Draw samples at random, each as often as its weight says (class balance), in global batches and micro-batches.

    Draws are keyed by the seed, the epoch and the place in the epoch, so they are the same on any number of ranks and
    after resumption. The last step may be short. For sampling without end, count steps and not epochs: `num_samples`
    may be any number, and `loader.steps(stop)` goes on over epochs.

    Memory: with replacement 16 bytes a sample of the data set; with an integer for the weights, none. Without
    replacement 8 bytes a sample and 8 a draw of the current epoch, and 85 bytes a sample while it is computed.
    Time of a seek: with replacement a binary search a sample of the step, at any step. Without replacement one sort of
    the data set an epoch. docs/data.md has figures.

    Args:
        weights: 1-D, for each sample of the data set its weight, 0 or more; they need not sum to one. An integer n: n
            samples of equal weight, in constant memory.
        global_batch, micro_batch: as of `BatchPlan`.
        num_samples: how many samples an epoch draws; None: as many as the data set has.
        replacement: False: an epoch draws no sample twice, as `torch.multinomial(replacement=False)`: each draw is by
            the weights of the samples that are left.
        seed: any integer.

    Raises:
        TypeError: a size or the seed is not an integer.
        ValueError: a weight is negative, infinite or NaN, all are 0, or an epoch without replacement wants more samples
            than have a weight.

    Collectives: none.

    Example: class 1 has one sample and half of the draws.
        >>> plan = WeightedPlan([1, 1, 1, 3], global_batch=600, micro_batch=600, num_samples=600)
        >>> drawn = plan.step(0, 0)[0].samples
        >>> bool(260 < (drawn == 3).sum() < 340)
        True
    """

    weights: Any
    global_batch: int
    micro_batch: int
    num_samples: int | None = None
    replacement: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.weights, int) or np.ndim(as_array(self.weights)) == 0:
            if not hasattr(self.weights, "__index__"):
                raise TypeError(
                    f"WeightedPlan(weights={self.weights!r}) is a {type(self.weights).__name__}: give a weight for "
                    f"each sample of the data set, 1-D, or an integer, the number of samples"
                )
            count = able = checked_integer(self.weights, "weights")
            if count < 1:
                raise ValueError(f"WeightedPlan(weights={count}): the number of samples must be at least 1")
            object.__setattr__(self, "weights", count)
        else:
            weights = _checked_weights(as_array(self.weights))
            count, able = len(weights), int(np.count_nonzero(weights))
            object.__setattr__(self, "weights", weights)
        if self.num_samples is None:
            object.__setattr__(self, "num_samples", count)
        check_sizes(self, num_samples=0, global_batch=1, micro_batch=1)
        if not self.replacement and self._draws > able:
            raise ValueError(
                f"WeightedPlan(num_samples={self.num_samples}, replacement=False): only {able} samples have a weight, "
                f"and an epoch draws none twice. Give num_samples={able} or fewer, or replacement=True"
            )

    @property
    def length(self) -> int:
        return self.weights if isinstance(self.weights, int) else len(self.weights)

    @property
    def _draws(self) -> int:
        assert self.num_samples is not None, "__post_init__ has set it"
        return self.num_samples

    def samples_per_epoch(self, epoch: int) -> int:
        return self._draws

    def samples(self, epoch: int, step: int, start: int, stop: int) -> NDArray[np.int64]:
        first = step * self.global_batch
        if not self.replacement and not isinstance(self.weights, int):
            return self._order(epoch)[first + start : first + stop]
        places = np.arange(first + start, first + stop, dtype=np.int64)
        if not self.replacement:
            return permute(places, self.length, self.seed, "draws", epoch)
        drawn = (words(places, self.seed, "draws", epoch) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        if isinstance(self.weights, int):
            return np.minimum((drawn * self.weights).astype(np.int64), self.weights - 1)
        sums = self._sums
        # "right": a sample of weight 0 has the sum of the one before it, and is passed over.
        drawn_samples: NDArray[np.int64] = np.searchsorted(sums, drawn * sums[-1], side="right").astype(np.int64)
        return np.minimum(drawn_samples, self._last)

    @functools.cached_property
    def _sums(self) -> NDArray[np.float64]:
        return np.cumsum(self.weights)

    @functools.cached_property
    def _last(self) -> int:
        """The last sample that has a weight: a product that is rounded up to the whole sum belongs to it."""
        return int(np.flatnonzero(self.weights)[-1])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return an epoch's draws without replacement: the samples in the order of exponential times over weights.

        Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
        """

        def order() -> NDArray[np.int64]:
            able = np.flatnonzero(self.weights)
            bits = words(able, self.seed, "draws", epoch) >> np.uint64(11)
            times = -_log((bits.astype(np.float64) + 1) * 2.0**-53) / self.weights[able]
            return able[np.argsort(times, kind="stable")[: self._draws]]

        return _kept(self, epoch, order)


@dataclass(frozen=True, eq=False)
class OrderPlan(_OrderedPlan):
    """Take the samples in an order of your own: a sampler of torch, a curriculum, P classes of K samples each.

    The order of one process is cut into global batches and micro-batches, as a `BatchPlan` cuts its own; the last step
    may be short. Epochs may have different numbers of samples; `len(loader)` is that of epoch 0.

    `order` must return the same indices on every rank and when it is called again after resumption, so all of its
    random numbers must come from `generator` or from the global streams, which are seeded for the call. `accumulate`
    compares a digest of the order between ranks at the start of an epoch; resumption within an epoch compares it, too.

    Memory: 8 bytes a sample of the epoch. Time of a seek: one call of `order`, kept until another epoch is asked for.

    Args:
        order: `order(epoch, generator)` returns an iterable of an epoch's data-set indices, in order; it must end.
            `generator` is a torch.Generator on the CPU with the epoch's seed. A function at the top of a module can be
            pickled.
        global_batch, micro_batch: as of `BatchPlan`.
        seed: any integer.

    Raises:
        TypeError: a size or the seed is not an integer, or `order` cannot be called; later, an index is not an integer.
        ValueError: a size is out of range; later, an index is negative.

    Collectives: none.

    Example:
        >>> from torch.utils.data import SubsetRandomSampler
        >>> plan = OrderPlan(lambda epoch, generator: SubsetRandomSampler(range(6), generator), 4, 2)
        >>> [[len(micro.samples) for micro in step] for step in plan.steps(epoch=0)]
        [[2, 2], [2]]
    """

    order: Callable[[int, torch.Generator], Iterable[int]]
    global_batch: int
    micro_batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.order):
            raise TypeError(
                f"OrderPlan(order={self.order!r}) is a {type(self.order).__name__}: give a function of the epoch and a "
                f"torch.Generator that returns the epoch's indices"
            )
        check_sizes(self, global_batch=1, micro_batch=1)

    @functools.cached_property
    def steps_per_epoch(self) -> int:  # kept, since the order of epoch 0 is not
        return self.steps_in(0)

    def samples_per_epoch(self, epoch: int) -> int:
        return len(self._order(epoch))

    def samples(self, epoch: int, step: int, start: int, stop: int) -> NDArray[np.int64]:
        first = step * self.global_batch
        return self._order(epoch)[first + start : first + stop]

    def description(self, epoch: int | None = None) -> dict[str, Any]:
        about = super().description()
        return about if epoch is None else {**about, "order of the epoch": digest(self._order(epoch))}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        def order() -> NDArray[np.int64]:
            seed = derive_seed(self.seed, "order", epoch)
            with preserve_streams():
                seed_streams(seed)
                return _checked_order(self.order(epoch, torch.Generator().manual_seed(seed)), epoch)

        return _kept(self, epoch, order)


def _kept(plan: Plan, epoch: int, order: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the order of an epoch, and keep it until another epoch's is asked for."""
    kept = plan.__dict__.get("_epoch_order")
    if kept is None or kept[0] != epoch:
        kept = (epoch, order())
        plan.__dict__["_epoch_order"] = kept  # a frozen dataclass forbids setattr
    found: NDArray[np.int64] = kept[1]
    return found


def _checked_order(given: Any, epoch: int) -> NDArray[np.int64]:
    if getattr(given, "ndim", 1) == 0 or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise TypeError(f"OrderPlan: order({epoch}, …) gave {given!r}: give an iterable of an epoch's indices")
    if hasattr(given, "__array__") or isinstance(given, range):
        return _indices(given, epoch)
    parts, iterator = [np.empty(0, np.int64)], iter(given)
    while part := list(itertools.islice(iterator, _PART)):
        parts.append(_indices(part, epoch, _PART * (len(parts) - 1)))
        if len(part) == _PART and len(parts) == _MANY // _PART + 1:
            logger.warning(
                "OrderPlan: order(%d, …) has given %d indices and goes on. If it has no end, cut it by "
                "itertools.islice(…, samples of an epoch), or draw by WeightedPlan(n, …): an epoch must end",
                *(epoch, _MANY),
            )
    return np.concatenate(parts)


def _indices(given: Any, epoch: int, first: int = 0) -> NDArray[np.int64]:
    """Return these indices of an epoch's order, of which they are those from place `first` on, as an array."""
    order = as_array(given) if len(given) else np.empty(0, np.int64)
    if order.ndim != 1 or order.dtype.kind not in "iu":
        shape = "lists of indices" if order.ndim > 1 or order.dtype.kind == "O" else f"{order.dtype} values"
        raise TypeError(
            f"OrderPlan: order({epoch}, …) gave {shape}, the first is {given[0]!r}: give integers, one for each "
            f"sample; the plan cuts the micro-batches (itertools.chain.from_iterable(batch_sampler) joins batches)"
        )
    if (negative := order < 0).any():
        place = int(np.flatnonzero(negative)[0])
        raise ValueError(
            f"OrderPlan: order({epoch}, …) gave the index {order[place]} at place {first + place}: it is negative"
        )
    return order.astype(np.int64)


def _checked_weights(weights: NDArray[Any]) -> NDArray[np.float64]:
    if weights.ndim != 1 or weights.dtype.kind not in "iufb":
        raise TypeError(
            f"WeightedPlan(weights) has shape {weights.shape} and dtype {weights.dtype}: give a number for each sample"
        )
    found = weights.astype(np.float64)
    if (bad := ~(np.isfinite(found) & (found >= 0))).any():
        index = int(np.flatnonzero(bad)[0])
        raise ValueError(f"WeightedPlan(weights): the weight of sample {index} is {found[index]}: give 0 or more")
    with np.errstate(over="ignore"):
        total = found.sum()
    if not 0 < total < np.inf:
        raise ValueError(f"WeightedPlan(weights): the {len(found)} weights sum to {total}: no sample can be drawn")
    found.flags.writeable = False
    return found


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the natural logarithm of positive numbers, with the same bits on every machine.

    NumPy's own differs in the last bit between processors, which could exchange two samples. Here are only operations
    that IEEE 754 rounds exactly: x = m * 2**e with m from 0.7 to 1.4, and log m = 2 * (s + s**3 / 3 + s**5 / 5 + …)
    for s = (m - 1) / (m + 1), which is at most 0.172.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, 2 * mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    square, total = s * s, np.zeros_like(s)
    for power in range(21, 0, -2):
        total = total * square + 1 / power
    found: NDArray[np.float64] = (exponent - low) * 0.6931471805599453 + 2 * s * total
    return found
