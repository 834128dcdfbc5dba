"""Test statistics of the keyed permutation. torch.randperm must pass the same bounds."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ddparity.data.permutation import _factors, permute

SIZES = (2, 3, 10, 257, 1024, 1025, 1500, 4099)


def _keyed(n: int, key: int) -> np.ndarray:
    return permute(np.arange(n), n, 0, "order", key)


def _control(n: int, key: int) -> np.ndarray:
    return torch.randperm(n, generator=torch.Generator().manual_seed(key)).numpy()


BOTH = pytest.mark.parametrize("shuffle", [_keyed, _control])


@given(n=st.integers(1, 6000), key=st.integers(0, 2**64))
def test_it_is_a_permutation(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 2**62), key=st.integers(), data=st.data())
def test_any_positions_at_any_size(n: int, key: int, data) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=20))
    values = permute(np.array(positions, dtype=np.int64), n, key)
    assert len(set(values.tolist())) == len(positions)
    assert all(0 <= value < n for value in values.tolist())
    singly = [permute(np.array([position]), n, key)[0] for position in positions]
    assert values.tolist() == singly


def test_the_definition_stays() -> None:
    """If these numbers change, every training changes: they are part of what a seed means."""
    assert permute(np.arange(8), 8, 0, "order", 0).tolist() == [2, 5, 7, 0, 4, 1, 3, 6]
    assert permute(np.arange(5), 10**9, 0, "order", 0).tolist() == [
        713425332,
        709436247,
        232901598,
        355368440,
        589485445,
    ]


@pytest.mark.parametrize(
    ("n", "values"),
    [
        (1024, [522, 876, 466, 528]),  # the largest whose keys are sorted
        (1025, [275, 485, 12, 679]),
        (1500, [514, 914, 793, 733]),
        (4099, [1798, 19, 307, 3229]),
        (1_000_003, [503295, 689566, 179246, 916772]),
        (2**40 + 1, [730214758884, 5027882603, 880110534485, 210273097756]),
        (2**62, [797185202918814574, 3110279708649764098, 2459233347632416138, 1010967619460096260]),
    ],
)
def test_the_definition_stays_at_every_size(n: int, values: list[int]) -> None:
    assert permute(np.array([0, 1, n // 2, n - 1]), n, 7, "order", 3).tolist() == values


@given(n=st.integers(1, 2**62))
@example(40**2 - 1)
def test_few_values_are_walked_over(n: int) -> None:
    """The network is a permutation of range(a * b). What is at least n of it is computed in vain."""
    a, b = _factors(n)
    assert n <= a * b <= n + max(a, b)
    assert a <= math.isqrt(n - 1) + 1
    assert max(a, b) < 2**32  # in `_feistel`, a half and a word of 48 bits are added


@BOTH
def test_every_order_of_few_is_equally_likely(shuffle: Callable[[int, int], np.ndarray]) -> None:
    trials = 12_000
    seen = Counter(tuple(shuffle(4, key).tolist()) for key in range(trials))
    assert len(seen) == 24
    assert _chi_square(np.array(list(seen.values())), trials / 24) < 55  # 23 degrees of freedom, p = 0.0002


@BOTH
@pytest.mark.parametrize("n", [10, 257, 1024, 1025, 1500])
def test_each_value_is_everywhere_equally_often(shuffle: Callable[[int, int], np.ndarray], n: int) -> None:
    trials, cells = 2000, 10
    where = np.stack([np.argsort(shuffle(n, key)) for key in range(trials)])  # (trials, n): positions of values
    for value in (0, 1, n // 2, n - 1):
        counts = np.bincount(where[:, value] * cells // n, minlength=cells)
        expected = np.bincount(np.arange(n) * cells // n, minlength=cells) * trials / n
        assert _chi_square(counts, expected) < 35  # 9 degrees of freedom, p = 0.00006


@BOTH
@pytest.mark.parametrize("n", SIZES)
def test_values_do_not_follow_positions(shuffle: Callable[[int, int], np.ndarray], n: int) -> None:
    trials = 400
    z = [_correlation(np.arange(n), shuffle(n, key)) * np.sqrt(n - 1) for key in range(trials)]
    assert abs(np.mean(z)) < 4 / np.sqrt(trials)
    assert 0.8 < np.std(z) < 1.2


@BOTH
@pytest.mark.parametrize("n", SIZES[2:])
def test_neighbours_do_not_stay_neighbours(shuffle: Callable[[int, int], np.ndarray], n: int) -> None:
    trials = 400
    orders = [shuffle(n, key) for key in range(trials)]
    serial = [_correlation(order[:-1], order[1:]) * np.sqrt(n) for order in orders]
    assert abs(np.mean(serial) + 1 / np.sqrt(n)) < 4 / np.sqrt(trials)  # without replacement: -1/n
    # Of n - 1 neighbouring pairs, one in n/2 differs by one, in either direction.
    adjacent = sum(int((np.abs(np.diff(order.astype(np.int64))) == 1).sum()) for order in orders)
    expected = trials * (n - 1) * 2 / n
    assert abs(adjacent - expected) < 5 * np.sqrt(expected)


@BOTH
@pytest.mark.parametrize("n", SIZES[2:])
def test_epochs_are_unrelated(shuffle: Callable[[int, int], np.ndarray], n: int) -> None:
    trials = 400
    orders = [shuffle(n, key) for key in range(trials + 1)]
    z = [_correlation(a, b) * np.sqrt(n - 1) for a, b in itertools.pairwise(orders)]
    assert abs(np.mean(z)) < 4 / np.sqrt(trials)
    assert 0.8 < np.std(z) < 1.2
    fixed = sum(int((a == b).sum()) for a, b in itertools.pairwise(orders))
    assert abs(fixed - trials) < 5 * np.sqrt(trials)  # two unrelated orders agree at one position on average


def test_seeds_are_unrelated() -> None:
    n = 1500
    orders = [permute(np.arange(n), n, seed, "order", 0) for seed in range(400)]
    z = [_correlation(a, b) * np.sqrt(n - 1) for a, b in itertools.pairwise(orders)]
    assert abs(np.mean(z)) < 4 / np.sqrt(len(z))
    assert 0.8 < np.std(z) < 1.2


def test_a_billion_samples_take_no_more_memory_than_a_thousand() -> None:
    peaks = {}
    for n in (10**3, 10**9):
        permute(np.arange(256), n, 0)  # fills the caches
        tracemalloc.start()
        permute(np.arange(n - 256, n), n, 0)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10**9] <= peaks[10**3]


def _chi_square(counts: np.ndarray, expected: float | np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])
