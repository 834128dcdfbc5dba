"""The one binary tree along which a step's micro-batches are summed, whoever computes which of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
Node = tuple[int, int]  # (level, position): micro-batches position * 2**level up to (position + 1) * 2**level


class TreeSum(Generic[T]):
    """Sums values along the tree as they come, as a binary counter carries: neighbours of equal size become one.

    Floating-point addition is not associative, so the order of a sum decides its bits. Here it is a function of the
    micro-batches' numbers alone: a node is its left half plus its right half, and a half that is not there, beyond the
    last micro-batch, adds nothing.

        8 micro-batches: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))        5: ((0 + 1) + (2 + 3)) + 4

    `nodes`: the whole sub-trees summed so far, in order, with their sums; of n contiguous micro-batches at most
    2 log2(n), and of the first n at most log2(n) + 1. Values come in the order of the micro-batches.

    Args:
        add: gives left + right, and may overwrite its left operand.

    Example:
        >>> tree = TreeSum(lambda left, right: f"({left} + {right})")
        >>> for number in range(5):
        ...     tree.push((0, number), str(number))
        >>> tree.nodes
        [((2, 0), '((0 + 1) + (2 + 3))'), ((0, 4), '4')]
        >>> tree.total()
        '(((0 + 1) + (2 + 3)) + 4)'
    """

    def __init__(self, add: Callable[[T, T], T]) -> None:
        self._add = add
        self.nodes: list[tuple[Node, T]] = []

    def push(self, node: Node, value: T) -> None:
        """Add the sum of a node, the one that follows those before."""
        level, position = node
        while position % 2 and self.nodes and self.nodes[-1][0] == (level, position - 1):
            _, left = self.nodes.pop()
            value = self._add(left, value)
            level, position = level + 1, position // 2
        self.nodes.append(((level, position), value))

    def total(self) -> T:
        """The root's sum, once all are there; frees the nodes.

        What is left are the sub-trees in front of the last micro-batch, ever smaller ones: the smallest two have no
        other neighbours.
        """
        _, right = self.nodes.pop()
        while self.nodes:
            _, left = self.nodes.pop()
            right = self._add(left, right)
        return right


@functools.lru_cache(maxsize=256)
def subtrees(start: int, stop: int) -> tuple[Node, ...]:
    """The whole sub-trees that the micro-batches `start` to `stop` consist of, in order."""
    tree = TreeSum[None](lambda left, right: None)
    for number in range(start, stop):
        tree.push((0, number), None)
    return tuple(node for node, _ in tree.nodes)
