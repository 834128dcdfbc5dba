"""The tree over a step's micro-batches: its shape is that of their number, however they are shared out."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ddparity.data.sizes import share
from ddparity.gradients.strict import TreeSum, _aligned, subtrees


def _tree(start: int, size: int, count: int) -> str | None:
    """The oracle, from the root down: a node is its left half plus its right half, where they are there."""
    if start >= count:
        return None
    if size == 1:
        return str(start)
    left, right = _tree(start, size // 2, count), _tree(start + size // 2, size // 2, count)
    return left if right is None else f"({left}+{right})"


def _expected(count: int) -> str | None:
    return _tree(0, 2 ** math.ceil(math.log2(count)) if count > 1 else 1, count)


def _sum() -> TreeSum[str]:
    return TreeSum(lambda left, right: f"({left}+{right})")


@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=12))
def test_any_contiguous_shares_give_the_tree_of_one(count: int, cuts: list[int]) -> None:
    bounds = sorted({0, count, *(cut % count for cut in cuts)})
    whole = _sum()
    for start, stop in itertools.pairwise(bounds):
        part = _sum()
        for number in range(start, stop):
            part.push((0, number), str(number))
        assert tuple(node for node, _ in part.nodes) == subtrees(start, stop)
        assert len(part.nodes) <= max(1, 2 * math.log2(stop - start))
        for node, value in part.nodes:
            whole.push(node, value)
    assert whole.total() == _expected(count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
def test_the_shares_of_a_step_give_it(world_size: int) -> None:
    for count in range(world_size, 40):
        whole = _sum()
        for rank in range(world_size):
            mine = share(count, rank, world_size)
            part = _sum()
            for number in mine:
                part.push((0, number), str(number))
            for node, value in part.nodes:
                whole.push(node, value)
        assert whole.total() == _expected(count)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 31, 32, 1000])
def test_memory_is_that_of_a_binary_counter(count: int) -> None:
    most, whole = 0, _sum()
    for number in range(count):
        whole.push((0, number), "")
        most = max(most, len(whole.nodes))
    assert most <= math.log2(count) + 1


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8, 16]))
def test_tensors_begin_where_allocations_begin(size: int, element_size: int) -> None:
    """The kernels of a norm, and so its bits, depend on where a gradient begins: at 64 bytes on torch's CPU."""
    padded = _aligned(size, element_size)
    assert padded * element_size % 64 == 0
    assert 0 <= (padded - size) * element_size < 64


def test_an_empty_share_has_no_subtrees() -> None:
    assert subtrees(3, 3) == ()
