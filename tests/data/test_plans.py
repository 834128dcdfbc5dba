"""Weighted, ordered, by length, and a user's own: every plan keeps the protocol, and draws what it says."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pickle
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

import ddparity as dp
from ddparity.data.orders import _log
from ddparity.testing import _check_memory, check_plan

RNG = np.random.default_rng(0)
WEIGHTS = RNG.random(40) * (RNG.random(40) > 0.3)
LENGTHS = RNG.integers(1, 60, 200)


def _random_order(epoch: int, generator: torch.Generator) -> Any:
    return RandomSampler(range(37), generator=generator)


def _global_order(epoch: int, generator: torch.Generator) -> Any:
    """Two numbers of samples, and an order from the global streams of Python and NumPy."""
    order = [int(index) for index in np.random.permutation(20 + 5 * (epoch % 2))]
    random.shuffle(order)
    return order


def _curriculum(epoch: int, generator: torch.Generator) -> Any:
    """Only the easiest samples at first."""
    return SubsetRandomSampler(range(min(40, 10 * (epoch + 1))), generator)


def _classes(epoch: int, generator: torch.Generator) -> Any:
    """P x K: in each of 6 batches, 3 of the 5 classes with 2 of their 8 samples."""
    return [
        cls * 8 + one
        for _ in range(6)
        for cls in torch.randperm(5, generator=generator)[:3].tolist()
        for one in torch.randperm(8, generator=generator)[:2].tolist()
    ]


def _drawn(epoch: int, generator: torch.Generator) -> Any:
    return WeightedRandomSampler([1.0, 2.0, 3.0], 25, generator=generator)


PLANS = [
    dp.BatchPlan(101, 16, 3, seed=4),
    dp.BatchPlan(0, 16, 3),
    dp.WeightedPlan(WEIGHTS, 16, 3, seed=4),
    dp.WeightedPlan(WEIGHTS, 16, 5, num_samples=1000, seed=4),
    dp.WeightedPlan(WEIGHTS, 16, 3, num_samples=20, replacement=False),
    dp.WeightedPlan(10**12, 64, 8, num_samples=10**9),
    dp.WeightedPlan(50, 16, 4, num_samples=35, replacement=False),
    dp.WeightedPlan(torch.tensor([1, 0, 2]), 5, 2, num_samples=0),
    dp.OrderPlan(_random_order, 8, 3, seed=2),
    dp.OrderPlan(_global_order, 8, 8),
    dp.OrderPlan(_curriculum, 8, 2),
    dp.OrderPlan(_classes, 6, 2),
    dp.OrderPlan(_drawn, 6, 2),
    dp.LengthPlan(LENGTHS, 120, 4, seed=3),
    dp.LengthPlan(LENGTHS.tolist(), 59, 3, shuffle=False),
    dp.LengthPlan([], 10, 3),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_a_plan_keeps_the_protocol(plan: dp.Plan) -> None:
    check_plan(plan)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=60),
    budget=st.integers(30, 90),
    micro_batches=st.integers(1, 5),
    world_size=st.integers(1, 6),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_lengths_stay_within_the_budget_and_each_sample_comes_once(
    lengths: list[int], budget: int, micro_batches: int, world_size: int, shuffle: bool, epoch: int
) -> None:
    plan = dp.LengthPlan(lengths, budget, micro_batches, shuffle=shuffle)
    steps = [
        [micro for rank in range(world_size) for micro in plan.step(epoch, step, rank, world_size)]
        for step in range(plan.steps_per_epoch)
    ]
    for step in steps:
        for micro in step:
            assert len(micro.samples) * max(lengths[i] for i in micro.samples) <= budget
    assert sorted(i for step in steps for micro in step for i in micro.samples) == list(range(len(lengths)))
    assert all(len(step) == micro_batches for step in steps[:-1])


def _padded(plan: dp.LengthPlan, lengths: np.ndarray) -> tuple[int, int]:
    micros = [micro for step in plan.steps(0) for micro in step]
    return sum(len(micro.samples) * int(lengths[micro.samples].max()) for micro in micros), len(micros)


def test_the_padding_of_lengths_is_small() -> None:
    """Against an oracle: batches of the sorted lengths, each as full as the budget allows."""
    lengths = np.minimum(np.random.default_rng(1).lognormal(4, 0.8, 20_000).astype(np.int64) + 1, 2000)
    plan = dp.LengthPlan(lengths, 8000, 8)
    padded, count = _padded(plan, lengths)
    fewest, rest = 0, np.sort(lengths)[::-1]
    while len(rest):
        rest, fewest = rest[8000 // rest[0] :], fewest + 1
    assert padded < 1.06 * lengths.sum()
    assert count < 1.06 * fewest


def test_lengths_are_mixed_anew_in_each_epoch_and_the_steps_stay() -> None:
    plan = dp.LengthPlan(RNG.integers(90, 100, 400), 1000, 4)
    epochs = [[frozenset(micro.samples.tolist()) for step in plan.steps(e) for micro in step] for e in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == 40
    assert not set(epochs[0]) & set(epochs[1])
    other = dataclasses.replace(plan, seed=1)
    assert [micro.samples.tolist() for micro in other.step(0, 0)] != [m.samples.tolist() for m in plan.step(0, 0)]


@pytest.mark.parametrize("weights", [[0.0, 1.0, 3.0, 0.0, 6.0, 0.0], [0, 1, 3, 0, 6, 0]])
def test_draws_follow_the_weights(weights: list[float]) -> None:
    plan = dp.WeightedPlan(weights, 10_000, 10_000, num_samples=100_000)
    counts = np.bincount(np.concatenate([m.samples for step in plan.steps(0) for m in step]), minlength=6)
    expected = np.array(weights) / 10
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(100_000 * expected * (1 - expected))
    assert (np.abs(counts - 100_000 * expected) <= 4 * deviation).all()


def test_equal_weights_draw_equally_often_in_constant_memory() -> None:
    plan = dp.WeightedPlan(20, 10_000, 10_000, num_samples=100_000)
    counts = np.bincount(np.concatenate([m.samples for step in plan.steps(0) for m in step]))
    assert len(counts) == 20
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %
    assert len(pickle.dumps(dp.WeightedPlan(10**12, 8, 4, num_samples=10**15))) < 300


def test_without_replacement_it_is_the_law_of_successive_draws() -> None:
    """Each order of three samples is as likely as when one draws after the other by the weights that are left."""
    weights, epochs = np.array([1.0, 2.0, 5.0]), 6000
    plan = dp.WeightedPlan(weights, 3, 3, replacement=False, seed=1)
    counts = Counter(tuple(plan.step(epoch, 0)[0].samples.tolist()) for epoch in range(epochs))
    for order, count in counts.items():
        a, b, _ = (weights[index] for index in order)
        chance = a / 8 * b / (8 - a)
        assert abs(count - epochs * chance) < 4 * math.sqrt(epochs * chance), order
    assert len(counts) == 6
    partial = dp.WeightedPlan([1.0, 0.0, 3.0, 2.0], 2, 2, num_samples=2, replacement=False)
    assert all(len(set(partial.step(e, 0)[0].samples) - {1}) == 2 for e in range(50))


def test_the_logarithm_is_right_to_the_last_bits() -> None:
    x = np.concatenate([np.random.default_rng(0).random(10_000), [2.0**-53, 0.5, 1.0, 1 - 2.0**-53]])
    np.testing.assert_allclose(_log(x), np.log(x), rtol=1e-14, atol=1e-16)


DRAWN = [3, 3, 2, 2, 3, 3, 2, 3]
ORDER = [4, 0, 1, 3, 2]
UNIFORM = [9926609164, 7488792087, 5212284423, 4460845384]
BY_LENGTH = [[[0, 4], [6]], [[2], [5, 3, 7, 1]]]
SEEDS = [2912958763195337750, 2912958761232792676]
AFTER = (2912958763715730612, (3215020806179864456, 2))


def test_the_definition_of_draws_stays() -> None:
    """If these numbers change, every training changes."""
    assert dp.WeightedPlan([1, 2, 3, 4], 8, 8, num_samples=8, seed=3).step(1, 0)[0].samples.tolist() == DRAWN
    plan = dp.WeightedPlan([1, 2, 3, 4, 5], 5, 5, replacement=False, seed=3)
    assert plan.step(1, 0)[0].samples.tolist() == ORDER
    plan = dp.WeightedPlan(10**10, 4, 4, num_samples=4, seed=3)
    assert plan.step(1, 0)[0].samples.tolist() == UNIFORM
    lengths = dp.LengthPlan([5, 2, 9, 2, 5, 2, 7, 1], 10, 2, seed=3)
    assert [[m.samples.tolist() for m in step] for step in lengths.steps(1)] == BY_LENGTH
    assert [m.seed for m in lengths.step(1, 1)] == SEEDS
    assert (lengths.seed_after(1, 1), lengths.sample_seeds(1, (1 << 32) + 2)) == AFTER


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dp.WeightedPlan([1, -2.5], 4, 2), ValueError, "weight of sample 1 is -2.5"),
        (lambda: dp.WeightedPlan([1, math.nan], 4, 2), ValueError, "weight of sample 1 is nan"),
        (lambda: dp.WeightedPlan([0, 0], 4, 2), ValueError, "the 2 weights sum to 0"),
        (lambda: dp.WeightedPlan([], 4, 2), ValueError, "the 0 weights sum to 0"),
        (lambda: dp.WeightedPlan(0, 4, 2), ValueError, "weights=0"),
        (lambda: dp.WeightedPlan(2.5, 4, 2), TypeError, "weights=.*2.5.* is a float: give a weight for each"),
        (lambda: dp.WeightedPlan([[1.0]], 4, 2), TypeError, r"shape \(1, 1\)"),
        (lambda: dp.WeightedPlan(["a"], 4, 2), TypeError, "dtype <U1"),
        (lambda: dp.WeightedPlan([1, 0], 4, 2, replacement=False), ValueError, "only 1 samples have a weight"),
        (lambda: dp.WeightedPlan([1], 4, 2, num_samples=-1), ValueError, "num_samples=-1"),
        (lambda: dp.WeightedPlan({0: 1.0}, 4, 2), TypeError, r"weights=\{0: 1.0\}\) is a dict: give a weight for each"),
        (lambda: dp.WeightedPlan([1], 0, 2), ValueError, r"WeightedPlan\(global_batch=0"),
        (lambda: dp.OrderPlan([1, 2], 4, 2), TypeError, r"order=\[1, 2\]"),  # type: ignore[arg-type]
        (lambda: dp.OrderPlan(lambda e, g: [[1, 2]], 4, 2).step(0, 0), TypeError, "lists of indices.*chain"),
        (lambda: dp.OrderPlan(lambda e, g: [[1, 2], [3]], 4, 2).step(0, 0), TypeError, "lists of indices.*chain"),
        (lambda: dp.OrderPlan(lambda e, g: [1.5], 4, 2).step(0, 0), TypeError, "float64 values, the first is 1.5"),
        (
            lambda: dp.OrderPlan(lambda e, g: [3, -1], 4, 2).step(0, 0),
            ValueError,
            "index -1 at place 1: it is negative",
        ),
        (lambda: dp.OrderPlan(lambda e, g: None, 4, 2).step(0, 0), TypeError, r"order\(0, …\) gave None: give an iter"),  # type: ignore[arg-type,return-value]
        (lambda: dp.OrderPlan(lambda e, g: np.array(3), 4, 2).step(0, 0), TypeError, "an iterable of an epoch's"),
        (lambda: dp.WeightedPlan([1e308, 1e308], 4, 2), ValueError, "the 2 weights sum to inf"),
        (lambda: dp.LengthPlan(5, 10, 2), TypeError, r"LengthPlan\(lengths\) has shape \(\) and dtype int64"),
        (lambda: dp.LengthPlan([[1, 2], [3]], 10, 2), TypeError, r"has shape \(2,\) and dtype object"),
        (lambda: dp.LengthPlan([3, 11], 10, 2), ValueError, "sample 1 has 11 units"),
        (lambda: dp.LengthPlan([3, 0], 10, 2), ValueError, "sample 1 has 0 units"),
        (lambda: dp.LengthPlan([3.5], 10, 2), TypeError, "dtype float64"),
        (lambda: dp.LengthPlan([3], 10, 0), ValueError, "micro_batches=0"),
    ],
)
def test_what_a_plan_cannot_take_is_named(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_order_that_goes_on_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One without end would fill the memory in silence."""
    monkeypatch.setattr("ddparity.data.orders._PART", 4)
    monkeypatch.setattr("ddparity.data.orders._MANY", 12)
    plan = dp.OrderPlan(lambda epoch, generator: iter(range(11 + 2 * epoch)), 4, 2)
    assert [plan.samples_per_epoch(epoch) for epoch in (0, 1, 20)] == [11, 13, 51]
    assert plan.samples(20, 1, 0, 3).tolist() == [4, 5, 6]
    assert [one.getMessage()[:60] for one in caplog.records] == [
        f"OrderPlan: order({epoch}, …) has given 12 indices and goes on. If i"[:60] for epoch in (1, 20)
    ]


def test_a_users_arrays_stay_as_they_are_and_the_plans_too() -> None:
    weights = np.array([1.0, 2.0])
    plan = dp.WeightedPlan(weights, 4, 2)
    weights[:] = 0
    assert plan.weights.tolist() == [1.0, 2.0]
    assert plan != dp.WeightedPlan([1.0, 2.0], 4, 2)  # by identity: arrays have no single truth
    assert plan.description() == dp.WeightedPlan([1.0, 2.0], 4, 2).description()
    assert plan.description() != dp.WeightedPlan([1.0, 3.0], 4, 2).description()


def test_global_streams_are_as_before_the_call_of_an_order() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dp.OrderPlan(_global_order, 8, 8).step(3, 0)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def _numpy_order(epoch: int, generator: torch.Generator) -> np.ndarray:
    return np.random.permutation(_size)


_size = 0
# What docstrings state: the bytes that a plan keeps, and those while it is computed, a sample of the data set.
MEMORY: dict[str, tuple[Callable[[np.ndarray], dp.Plan], int, int]] = {
    "BatchPlan": (lambda values: dp.BatchPlan(len(values), 256, 32), 0, 0),
    "by weight": (lambda values: dp.WeightedPlan(values, 256, 32), 16, 24),
    "equal weights": (lambda values: dp.WeightedPlan(len(values), 256, 32), 0, 0),
    "without replacement": (lambda values: dp.WeightedPlan(values, 256, 32, replacement=False), 16, 85),
    "LengthPlan": (lambda values: dp.LengthPlan(values.astype(int), 3200, 8), 24, 32),
    "OrderPlan": (lambda values: dp.OrderPlan(_numpy_order, 256, 32), 8, 24),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_and_seeks_are_those_that_docstrings_state(name: str) -> None:
    """A seek to the end of an epoch whose first step was computed takes the memory of a step, for any data set."""
    global _size
    make, kept, peak = MEMORY[name]
    sizes = (50_000, 200_000)
    found = []
    for _size in sizes:
        values = np.random.default_rng(0).integers(50, 100, _size).astype(float)
        tracemalloc.start()
        plan = make(values)
        assert len(plan.step(0, 0)) == 8
        found.append(tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()
        assert plan.step(0, plan.steps_in(0) - 1)
        seek = tracemalloc.get_traced_memory()[1] - found[-1][0]
        tracemalloc.stop()
        assert seek < 20_000, "of 256 samples, whatever the size of the data set is"
    for stated, (small, large) in zip((kept, peak), zip(*found, strict=True), strict=True):
        assert (large - small) / (sizes[1] - sizes[0]) <= stated + 0.5


# The check itself: each broken promise is found, and named.


@dataclasses.dataclass(frozen=True)
class Own(dp.Plan):
    """A user's plan: pairs of neighbours, in an order of its own."""

    pairs: int
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.pairs // 3)

    @property
    def micro_batches_per_step(self) -> int:
        return 3

    @property
    def length(self) -> int:
        return 2 * self.pairs

    def sizes(self, epoch: int, step: int) -> list[int]:
        return [2] * min(3, self.pairs - 3 * step)

    def samples(self, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
        places = np.arange(6 * step + start, 6 * step + stop)
        return (places + 2 * epoch) % (2 * self.pairs)


def _with(**methods: Any) -> dp.Plan:
    return type("Broken", (Own,), methods)(10)


_calls: Counter[str] = Counter()


def _impure(self: Own, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
    _calls["samples"] += 1
    return Own.samples(self, epoch + _calls["samples"] % 2, step, start, stop)


_kept: dict[int, Any] = {}


def _keeping(self: Own, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
    return _kept.setdefault(len(_kept), Own.samples(self, epoch, step, start, stop))


def _to_all(self: Own, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1) -> Any:
    yield from Own.steps(self, epoch, start, stop)


def _without_last(
    self: Own, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
) -> Any:
    """Leave out what does not divide by the ranks, as a DistributedSampler with drop_last does."""
    for step in Own.steps(self, epoch, start, stop):
        each = len(step) // world_size
        yield step[rank * each : (rank + 1) * each]


def _by_world_size(
    self: Own, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
) -> Any:
    yield from Own.steps(dataclasses.replace(self, seed=world_size), epoch, start, stop, rank, world_size)


def _from_the_start(
    self: Own, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1
) -> Any:
    """Forget where a training continues."""
    yield from itertools.islice(Own.steps(self, epoch, 0, None, rank, world_size), 0, (stop or 4) - start)


def _unkeyed(self: Own, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
    return np.random.permutation(2 * self.pairs)[start:stop]


def _uneven(self: Own, epoch: int, start: int = 0, stop: int | None = None, rank: int = 0, world_size: int = 1) -> Any:
    for step in Own.steps(self, epoch, start, stop):
        yield step if rank == 0 else []


BROKEN = {
    "sizes are": {"sizes": lambda self, epoch, step: [3, 0]},
    r"4 micro-batches, and micro_batches_per_step is 3": {"sizes": lambda self, epoch, step: [1] * 4},
    "must be a 1-D int64 array": {
        "samples": lambda self, epoch, step, start, stop: np.zeros(stop - start, np.int32),
    },
    "have the index 21, and the length is 20": {
        "samples": lambda self, epoch, step, start, stop: np.arange(20, 20 + stop - start),
    },
    "have the index -1": {"samples": lambda self, epoch, step, start, stop: np.arange(-1, stop - start - 1)},
    "in all|not even shares": {"steps": _uneven},
    "is that of": {"_seed": lambda self, epoch, step, number: 2 * step + 2 * number},
    "must be even": {"_seed": lambda self, epoch, step, number: 100 * epoch + 10 * step + number},
    "ranks together have|is asked again|each step alone": {"samples": _impure},
    "micro_batches_per_step=0": {"micro_batches_per_step": 0},
    "the positions": {"steps": lambda self, *args: ([_moved(m) for m in step] for step in Own.steps(self, *args))},
    "weighs 0.5": {"steps": lambda self, *args: ([_heavy(m) for m in step] for step in Own.steps(self, *args))},
    "has a value that a checkpoint": {"description": lambda self, epoch=None: {"a": object()}},
    "description\\(\\) changes": {"description": lambda self, epoch=None: {"a": random.random()}},
    "not even shares|ranks together have": {"steps": _to_all},  # each rank has all samples
    "1 ranks together|2 ranks together": {"steps": _without_last},
    "2 ranks together have": {"steps": _by_world_size},
    "alone is|are those of other samples": {"steps": _from_the_start},
    "ranks together have|is asked again": {"samples": _unkeyed},
    "bytes more after each 12 steps": {"samples": _keeping},
    "raise IndexError": {"step": lambda self, e, s, r=0, w=1: Own.step(self, e, s % 4, r, w)},
}


def _moved(micro: dp.MicroBatch) -> dp.MicroBatch:
    return dataclasses.replace(micro, position=0)


def _heavy(micro: dp.MicroBatch) -> dp.MicroBatch:
    return dataclasses.replace(micro, weight=0.5)


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_plan_is_found(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "dumps", lambda plan: plan)  # the class has no name in this module
    monkeypatch.setattr(pickle, "loads", lambda plan: plan)
    check_plan(Own(10))
    with pytest.raises(AssertionError, match=message):
        check_plan(_with(**BROKEN[message]))


@dataclasses.dataclass(frozen=True)
class Odd(dp.BatchPlan):
    """The odd samples of a data set of twice as many."""

    @property
    def length(self) -> int:
        return 2 * self.num_samples

    def samples(self, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
        return 2 * super().samples(epoch, step, start, stop) + 1


def test_a_class_derived_from_a_batch_plan_has_samples_of_its_own() -> None:
    plan, plain = Odd(50, 8, 3), dp.BatchPlan(50, 8, 3)
    check_plan(plan)
    for ours, own in zip(plan.steps(1, 2, 7, 1, 2), plain.steps(1, 2, 7, 1, 2), strict=True):
        for one, other in zip(ours, own, strict=True):
            assert one.samples.tolist() == (2 * other.samples + 1).tolist()
            assert (one.index, one.seed, one.weight, one.position) == (
                other.index,
                other.seed,
                other.weight,
                other.position,
            )
    assert "first step of the epoch" in plan.description(0)
    assert "first step of the epoch" not in plain.description(0)
    with pytest.raises(TypeError, match="Other is derived from BatchPlan and has its own sizes: derive it from ddpar"):

        class Other(dp.BatchPlan):
            def sizes(self, epoch: int, step: int) -> tuple[int, ...]:
                return (8,)


def test_a_plan_may_keep_a_bounded_number_of_epochs() -> None:
    @functools.lru_cache(maxsize=8)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng(epoch).permutation(6000)

    class Cached(Own):
        def samples(self, epoch: int, step: int, start: int, stop: int) -> np.ndarray:
            return order(epoch)[6 * step + start : 6 * step + stop]

    check_plan(dp.OrderPlan(_random_order, 8, 3))
    _check_memory(Cached(3000), 0)


def test_a_plan_that_cannot_be_pickled_is_found() -> None:
    with pytest.raises(AssertionError, match="cannot be pickled"):
        check_plan(dp.OrderPlan(lambda epoch, generator: [1], 4, 2))


def test_what_is_no_plan_is_named() -> None:
    with pytest.raises(TypeError, match=r"a range without .*sizes.*derive its class from ddparity.Plan"):
        check_plan(range(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a StreamPlan, whose samples the stream decides"):
        check_plan(dp.StreamPlan(8, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a dict without"):
        dp.Loader(range(4), {})  # type: ignore[arg-type]


def test_functions_and_arrays_are_described_by_name_and_digest() -> None:
    plan = dp.OrderPlan(functools.partial(_curriculum), 8, 2)
    assert plan.description() == {
        "kind": "OrderPlan",
        "order": f"{__name__}._curriculum",
        "global_batch": 8,
        "micro_batch": 2,
        "seed": 0,
    }
    assert plan.description(0)["order of the epoch"] != plan.description(1)["order of the epoch"]
