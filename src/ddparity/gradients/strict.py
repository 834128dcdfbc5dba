"""The strict reduction: gradients summed along one tree over the step's micro-batches, whoever ran which."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.allreduce import copies_of_ranks, exchange, gathers

Gradients = list[Tensor | None]  # of one or several micro-batches, one entry a parameter

# x + -0.0 is x for every x, -0.0 included: a gradient that is not there adds nothing to the bits of a sum.
_NOTHING = -0.0

_ALIGNED_BYTES = 64  # where torch's CPU allocations begin


class StrictReduction:
    """Takes each micro-batch's gradients out of the parameters, and puts the sum over all ranks back at the end.

    A parameter's sum is over the micro-batches that gave it a gradient; one that none gave a gradient keeps what it
    had. What parameters had before the step is added last.

    Memory: the sums of whole sub-trees, at most log2(micro-batches) + 1 copies of the gradients on one process, and at
    most as many as this rank's share has sub-trees, and one, on several. While they are exchanged, they lie in one
    buffer; beside it a slice of each sub-tree of the other ranks', then the sum, whose parts become the gradients.

    Collectives: none in a world of one. Otherwise, for each pair of dtype and device, an exchange of the sub-trees'
    sums where they are small; else each rank sends each other one the slices of its sums that this one finishes, and
    then the finished slice: where shares are whole sub-trees, the bytes of a ring all-reduce. With a number for each
    parameter, which says whether it has a gradient.

    Args:
        parameters: by name, the same on every rank.
        numbers: how many micro-batches each rank has in this step.
        rank: this one. group: None in a world of one.

    Raises:
        TypeError: a gradient is sparse; it names the parameter.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        numbers: Sequence[int],
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self._names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self._group = group
        bounds = list(itertools.accumulate(numbers, initial=0))
        self._nodes = [subtrees(start, stop) for start, stop in itertools.pairwise(bounds)]
        self._next = bounds[rank]
        self._tree: TreeSum[Gradients] = TreeSum(_added)
        self._before = self._taken()

    @torch.no_grad()
    def take(self) -> bool:
        """Take the gradients that this rank's next micro-batch left; return whether it left any."""
        taken = self._taken()
        self._tree.push((0, self._next), taken)
        self._next += 1
        return any(gradient is not None for gradient in taken)

    @torch.no_grad()
    def finish(self, scale: float = 1.0) -> None:
        """Leave the sum over all micro-batches, times `scale`, in the parameters' gradients. All ranks call it."""
        sums = self._tree.total() if self._group is None else self._exchanged(self._group)
        for parameter, before, value in zip(self._parameters, self._before, sums, strict=True):
            if value is not None and scale != 1.0:
                value.mul_(scale)
            if before is not None and value is not None:
                before.add_(value)
            parameter.grad = value if before is None else before

    def restore(self) -> None:
        """Put back what the parameters had before, where no rank's micro-batches gave them a gradient."""
        self._tree.nodes.clear()
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.grad = before

    def _taken(self) -> Gradients:
        gradients: Gradients = []
        for name, parameter in zip(self._names, self._parameters, strict=True):
            gradient = parameter.grad
            if gradient is not None and gradient.layout != torch.strided:
                raise TypeError(sparse_refusal(name))
            gradients.append(gradient)
            parameter.grad = None
        return gradients

    def _exchanged(self, group: dist.ProcessGroup) -> Gradients:
        sums: Gradients = [None] * len(self._parameters)

        def kind(index: int) -> tuple[str, str]:
            return str(self._parameters[index].dtype), str(self._parameters[index].device)

        own = [gradients for _, gradients in self._tree.nodes]
        self._tree.nodes.clear()
        for _, members in itertools.groupby(sorted(range(len(sums)), key=kind), key=kind):
            indices = list(members)
            parameters = [self._parameters[index] for index in indices]
            rows = [[gradients[index] for index in indices] for gradients in own]
            for gradients, index in itertools.product(own, indices):
                gradients[index] = None  # freed as soon as it is copied
            for index, value in zip(indices, self._summed(parameters, rows, group), strict=True):
                sums[index] = value
        return sums

    def _summed(self, parameters: list[nn.Parameter], rows: list[Gradients], group: dist.ProcessGroup) -> Gradients:
        """The tree's sums of some parameters of one kind; `rows`: their gradients in each of this rank's sub-trees."""
        sizes = [len(parameters)] + [parameter.numel() for parameter in parameters]
        aligned = [_aligned(size, parameters[0].element_size()) for size in sizes]
        most = max(map(len, self._nodes))
        if gathers(most * sum(aligned), parameters[0], group):
            total = self._gathered(parameters, rows, aligned, most, group)
        else:
            total = self._sliced(parameters, rows, aligned, group)
        parts = total[: sum(aligned)].split(aligned)
        exists, *values = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return [
            _laid_out(value, parameter) if some else None
            for parameter, value, some in zip(parameters, values, exists.tolist(), strict=True)
        ]

    def _gathered(
        self,
        parameters: list[nn.Parameter],
        rows: list[Gradients],
        aligned: list[int],
        most: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Every rank finishes the whole tree: more bytes than slices need, but one wait instead of two."""
        own = parameters[0].new_empty(most, sum(aligned))
        for row in range(len(rows)):
            _flatten(parameters, rows, row, aligned, own[row])
        own[len(rows) :] = 0.0
        copies = copies_of_ranks(own, group)  # small, so that the gradients may stay in there
        return self._tree_sum(copies[rank, row] for rank, nodes in enumerate(self._nodes) for row in range(len(nodes)))

    def _sliced(
        self, parameters: list[nn.Parameter], rows: list[Gradients], aligned: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """Each rank finishes the tree for a slice, and tells the others."""
        rank, world_size, width = dist.get_rank(group), len(self._nodes), sum(aligned)
        piece = -(-width // world_size)
        own = parameters[0].new_empty(world_size, len(rows), piece)
        for row in range(len(rows)):
            flat = own.new_empty(world_size * piece) if len(rows) > 1 else own.view(-1)
            _flatten(parameters, rows, row, aligned, flat[:width])
            flat[width:] = 0.0
            if len(rows) > 1:
                own[:, row] = flat.view(world_size, piece)
            del flat
        mine = own[rank].clone()
        parts = [mine if other == rank else own.new_empty(len(nodes), piece) for other, nodes in enumerate(self._nodes)]
        exchange(list(own), parts, group)
        del own
        total = mine.new_empty(world_size, piece)
        total[rank] = self._tree_sum(row for part in parts for row in part)
        del mine, parts
        exchange([total[rank]] * world_size, list(total), group)
        return total.view(-1)

    def _tree_sum(self, rows: Iterable[Tensor]) -> Tensor:
        """The tree's sum of all ranks' sub-trees, in rank order; overwrites them."""
        tree: TreeSum[Tensor] = TreeSum(Tensor.add_)
        for node, row in zip(itertools.chain.from_iterable(self._nodes), rows, strict=True):
            tree.push(node, row)
        return tree.total()


def _added(left: Gradients, right: Gradients) -> Gradients:
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


def _flatten(parameters: list[nn.Parameter], rows: list[Gradients], row: int, aligned: list[int], out: Tensor) -> None:
    """Write, for each parameter, whether it has a gradient, and the gradients; then let go of them."""
    gradients = rows[row]
    exists = torch.tensor([float(gradient is not None) for gradient in gradients])
    padding = out.new_zeros(_ALIGNED_BYTES // out.element_size())
    pieces: list[Tensor] = []
    values = [
        _nothing(parameter) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    for value, size in zip([exists.to(out), *values], aligned, strict=True):
        pieces.append(value)
        if value.numel() < size:
            pieces.append(padding[: size - value.numel()])
    torch.cat(pieces, out=out)
    rows[row] = []


def _nothing(parameter: nn.Parameter) -> Tensor:
    """What leaves the bits of any sum as they are, in both parts of complex numbers."""
    value = complex(_NOTHING, _NOTHING) if parameter.is_complex() else _NOTHING
    return parameter.new_full((parameter.numel(),), value)


def _aligned(size: int, element_size: int) -> int:
    """So many elements that what follows begins where an allocation of its own would."""
    step = _ALIGNED_BYTES // element_size
    return -(-size // step) * step


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A gradient that lies in memory as autograd lays one out, as the parameter: a norm's bits depend on it."""
    if parameter.is_contiguous():
        return value.view_as(parameter)
    return torch.empty_like(parameter).copy_(value.view_as(parameter))


def sparse_refusal(name: str) -> str:
    return (
        f"the parameter {name} has a sparse gradient, of which the strict reduction has no ordered sum: use "
        f'sparse=False, or replicate(model, reduction="fast")'
    )


@contextmanager
def deterministic(device: torch.device | None) -> Iterator[None]:
    """Have operators give the same bits each time, where they might not: on an accelerator, or with several threads.

    torch raises where an operator has no deterministic algorithm, and names it. On one CPU thread every operator is
    deterministic. What was set before is set again at the end.
    """
    if (device is None or device.type == "cpu") and torch.get_num_threads() == 1:
        yield
        return
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False  # it chooses algorithms by time, in each process for itself
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark


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
