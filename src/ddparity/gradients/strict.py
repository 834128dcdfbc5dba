"""Strict reduction: sum gradients along one tree over micro-batches, the same tree on any number of ranks."""

from __future__ import annotations

import functools
import itertools
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.allreduce import copies_of_ranks, flags, gathers, own_memory, start_exchange
from ..comm.buffers import Buffers
from ..compat import grad_dtype
from .aside import Aside
from .early import EarlyParts

Gradients = list[Tensor | None]  # of one or several micro-batches, one entry a parameter
Chain = list[Gradients]  # of neighbouring subtrees, to be added from the right

# x + -0.0 is x for every x, also for -0.0: a missing gradient does not change the bits of a sum.
_NOTHING = -0.0

_ALIGNED_BYTES = 64  # where torch's CPU allocations begin

# Of messages, far from those of a user. Each attempt to start early has others: what was sent in a loop that was left
# must not be taken for a later one's.
_LATE_TAG = 2**31 - 2
_FIRST_TAG = 2**30
_TAGS = 2**30 - 64

# By group: what is on its way to ranks that have left the loop. To drop it now would end the connection.
_left: weakref.WeakKeyDictionary[dist.ProcessGroup, list[object]] = weakref.WeakKeyDictionary()


class StrictReduction:
    """Take each micro-batch's gradients out of the parameters, and put the sum over all ranks back at the end.

    A parameter's sum is over the micro-batches that gave it a gradient. A parameter without a gradient in all of them
    keeps what it had. What parameters had before the step is added last.

    With `early`, the exchange of each part starts in this rank's last backward, as soon as it has the part's gradients.
    A part whose gradients the loop changes afterwards, on any rank, is exchanged again.

    Memory: the sums of whole subtrees. On one process these are at most log2(micro-batches) + 1 copies of the
    gradients; on several, at most one more than this rank's share has subtrees. During the exchange they lie in one
    buffer, and beside it a slice of each subtree of the other ranks, then the sum, whose parts become gradients. With
    `early`, the gradients stay beside that buffer until the loop is over. On the CPU the model keeps this memory, that
    of gradients that are gone too, for its next steps.

    Collectives: none in a world of one. Otherwise, for each pair of dtype and device: if the sums are small, one
    exchange of all subtrees' sums. If not, each rank sends each other rank the slices of its sums that this one
    finishes, and then the finished slice; where shares are whole subtrees, these are the bytes of a ring all-reduce.
    One number for each parameter says whether it has a gradient.

    Args:
        parameters: by name, the same on every rank.
        numbers: how many micro-batches each rank has in this step.
        rank: this rank. group: None in a world of one. buffers: of the model.

    Attributes:
        early: parts of the parameters, on the CPU, which call `start`; every rank has a micro-batch. None: all are
            exchanged after the loop.
        summed: the parameters that have a gradient, on any rank; after `finish`.

    Raises:
        TypeError: a gradient is sparse; the message names the parameter.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        numbers: Sequence[int],
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        named = list(parameters)
        self.early: EarlyParts[_Slices] | None = None
        self.summed: list[nn.Parameter] = []
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._group, self._buffers = group, buffers or Buffers()
        bounds = list(itertools.accumulate(numbers, initial=0))
        self._nodes = [subtrees(start, stop) for start, stop in itertools.pairwise(bounds)]
        self._next, self._stop = bounds[rank], bounds[rank + 1]
        self._tree: TreeSum[Gradients] = TreeSum(_added)
        self._aside = Aside(self._parameters)
        self._places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        self._last: Gradients = [None] * len(self._parameters)
        self._rest: _Slices | None = None
        self._changed: list[bool] = []
        self._key = self._tags = 0

    @torch.no_grad()
    def take(self) -> bool:
        """Take the gradients of this rank's next micro-batch out of the parameters; return True if there are any."""
        early = self.early if self._next + 1 == self._stop else None
        if early is not None and not early.plan.pending:
            early.complete()
            self._rest = self.start(early.last)
            self._changed = early.changed()
        taken = self._taken()
        if early is None:
            self._tree.push((0, self._next), taken)
            self._next += 1
        else:
            self._last = taken
        return any(gradient is not None for gradient in taken)

    @torch.no_grad()
    def start(self, parameters: list[nn.Parameter]) -> _Slices:
        """Start the exchange of parameters of one kind, whose gradients in the last micro-batch are complete."""
        old = self._aside.waiting()
        for number in map(self._places.__getitem__, map(id, parameters)):
            gradient = self._new_gradient(number, old)
            self._last[number] = gradient if gradient is None else gradient.detach().resolve_conj().resolve_neg()
        return self._started(parameters)

    @torch.no_grad()
    def finish(self, scale: float = 1.0) -> None:
        """Set the gradients to the sum over all micro-batches, times `scale`, plus what was there. All ranks call."""
        self._aside.settle()
        if self._group is not None and self._parameters and not all(self._nodes):
            self._aside.agree(self._group)
        if self._group is None:
            sums = self._tree.total()
        elif self.early is None:
            sums = self._exchanged(self._group)
        else:
            sums = self._completed(self.early, self._group)
        if self._group is not None:
            _left.pop(self._group, None)  # it has arrived, or nobody will ask for it
        for parameter, value in zip(self._parameters, sums, strict=True):
            if value is not None and scale != 1.0:
                value.mul_(scale)
            parameter.grad = value
        self.summed = [one for one, value in zip(self._parameters, sums, strict=True) if value is not None]
        self._aside.put_back()
        self.early = None  # it calls `start`: a cycle would keep the gradients until the next collection

    def has_gradients(self) -> bool:
        """Return True if the loop has left gradients since the last micro-batch was taken."""
        old = self._aside.waiting()
        return any(one.grad is not None and number not in old for number, one in enumerate(self._parameters))

    def restore(self) -> None:
        """Set the gradients to what the parameters had before the step."""
        self._abandon()
        self._clear()
        self._aside.restore()
        self.early = None

    def _taken(self) -> Gradients:
        gradients: Gradients = []
        old = self._aside.waiting()
        for number, parameter in enumerate(self._parameters):
            gradient = self._new_gradient(number, old)
            gradients.append(gradient)
            if gradient is not None:
                parameter.grad = None
        return own_memory(gradients)

    def _new_gradient(self, number: int, old: set[int]) -> Tensor | None:
        """Return a parameter's gradient, if the loop has given it one; `old`: those that have what was there before."""
        gradient = None if number in old else self._parameters[number].grad
        if gradient is not None and gradient.layout != torch.strided:
            raise TypeError(sparse_refusal(self._names[number]))
        return gradient

    def _exchanged(self, group: dist.ProcessGroup) -> Gradients:
        sums: Gradients = [None] * len(self._parameters)
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}  # in an order that is the same on every rank
        for index, parameter in enumerate(self._parameters):
            kinds.setdefault((grad_dtype(parameter), parameter.device), []).append(index)
        own = [gradients for _, gradients in self._tree.nodes]
        self._tree.nodes.clear()
        for indices in kinds.values():
            kind = _Kind([self._parameters[index] for index in indices])
            rows = [[[gradients[index] for index in indices]] for gradients in own]
            for gradients, index in itertools.product(own, indices):
                gradients[index] = None  # free it once it is copied
            most = max(map(len, self._nodes))
            if gathers(most * kind.width, kind.like, group):
                total = self._gathered(kind, rows, most, group)
            else:
                slices = _Slices(kind, rows, self._nodes, group, self._buffers)
                slices.sum()
                total = slices.total()
            for index, value in zip(indices, kind.values(total), strict=True):
                sums[index] = value
        return sums

    def _gathered(self, kind: _Kind, rows: list[Chain], most: int, group: dist.ProcessGroup) -> Tensor:
        """Finish the whole tree on every rank: more bytes than with slices, but one wait instead of two."""
        own = kind.like.new_empty(most, kind.width)
        for row in range(len(rows)):
            kind.write(rows, row, own[row])
        own[len(rows) :] = 0.0
        copies = copies_of_ranks(own, group)  # small, so the gradients may stay views of it
        found = (copies[rank, row] for rank, nodes in enumerate(self._nodes) for row in range(len(nodes)))
        return _tree_sum(self._nodes, found)

    def _started(self, parameters: list[nn.Parameter]) -> _Slices:
        """Start the exchange of parameters of one kind, from the earlier micro-batches' sums and `_last`."""
        assert self._group is not None and self.early is not None, "a group of several ranks"
        places = [self._places[id(parameter)] for parameter in parameters]
        nodes = [gradients for _, gradients in self._tree.nodes]
        alone = self._tree.alone((0, self._next))  # the others become one subtree with the last micro-batch
        chains = [[gradients] for gradients in nodes[:alone]] + [[*nodes[alone:], self._last]]
        rows = [[[gradients[place] for place in places] for gradients in chain] for chain in chains]
        if not self._key:
            sizes = [[parameter.numel() for parameter in part] for part in (*self.early.parts, self.early.last)]
            names = self.early.plan.number, self.early.plan.attempts, self._nodes, sizes
            self._key = zlib.crc32(repr(names).encode()) or 1
        tag = _FIRST_TAG + (self._key + self._tags) % _TAGS
        self._tags += 2
        return _Slices(_Kind(parameters), rows, self._nodes, self._group, self._buffers, tag)

    def _completed(self, early: EarlyParts[_Slices], group: dist.ProcessGroup) -> Gradients:
        """Return the sums of parts whose exchange was started in the backward."""
        anew = early.changed_anywhere(self._changed, self._key)
        if anew is None:  # a rank has left a loop that another one has not begun
            self._abandon()
            self._tree.push((0, self._next), self._last)
            sums = self._exchanged(group)
            early.finished()
            return sums
        parts, under_way = [*early.parts, early.last], list(early.started)
        for number, again in enumerate(anew):
            if again:
                under_way[number].wait()
                under_way[number] = self._started(parts[number])
        if self._rest is not None:
            under_way.append(self._rest)
        self._clear()
        for one in under_way:
            one.sum()
        sums = [None] * len(self._parameters)
        for one in under_way:
            for parameter, value in zip(one.kind.parameters, one.kind.values(one.total()), strict=True):
                sums[self._places[id(parameter)]] = value
        early.finished()
        return sums

    def _abandon(self) -> None:
        """Leave what is on its way."""
        if self.early is not None and self.early.started and self._group is not None:
            _left.setdefault(self._group, []).extend([*self.early.started, self._rest])
            self.early.plan.pending = True

    def _clear(self) -> None:
        self._tree.nodes.clear()
        self._last = [None] * len(self._parameters)
        self._rest = None


class _Kind:
    """Parameters of one dtype and device, and how their gradients lie in one tensor.

    Attributes:
        like: an empty tensor of their gradients' dtype and device. width: elements of a row: for each parameter,
            whether it has a gradient, then the gradients.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.like = parameters[0].new_empty(0, dtype=grad_dtype(parameters[0]))
        self._sizes = [len(parameters)] + [parameter.numel() for parameter in parameters]
        self._aligned = [_aligned(size, self.like.element_size()) for size in self._sizes]
        *self._begins, self.width = itertools.accumulate(self._aligned, initial=0)

    def write(self, rows: list[Chain], row: int, out: Tensor) -> None:
        """Write the sum of a row's chain to `out`; then drop it."""
        *lefts, gradients = rows[row]
        exist = tuple(any(one is not None for one in each) for each in zip(*rows[row], strict=True))
        values = [
            _nothing(parameter.numel(), out) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
        ]
        pieces: list[Tensor] = []
        sizes = zip([flags(exist, out.dtype, out.device), *values], self._sizes, self._aligned, strict=True)
        for value, size, aligned in sizes:
            pieces.append(value)
            if size < aligned:
                pieces.append(flags((False,) * (aligned - size), out.dtype, out.device))
        torch.cat(pieces, out=out)
        for left in reversed(lefts):
            for one, parameter, begin in zip(left, self.parameters, self._begins[1:], strict=True):
                if one is not None:
                    right = _parts(out[begin : begin + parameter.numel()].view(one.shape))
                    torch.add(_parts(one), right, out=right)
        rows[row] = []

    def values(self, total: Tensor) -> Gradients:
        """Return the gradients of a sum of rows."""
        exist = total[: len(self.parameters)].tolist()
        return [
            _laid_out(total, begin, parameter) if some else None
            for parameter, begin, some in zip(self.parameters, self._begins[1:], exist, strict=True)
        ]


class _Slices:
    """The tree's sums of some parameters, under way: each rank finishes one slice of them for all ranks.

    Collectives: none. Each rank sends each other rank the slices that this one finishes, and then the finished slice.

    Args:
        rows: of each of this rank's subtrees. nodes: every rank's subtrees. tag: of the messages, and 1 more.
    """

    def __init__(
        self,
        kind: _Kind,
        rows: list[Chain],
        nodes: Sequence[tuple[Subtree, ...]],
        group: dist.ProcessGroup,
        buffers: Buffers,
        tag: int = _LATE_TAG,
    ) -> None:
        self.kind, self._nodes, self._group, self._buffers, self._tag = kind, nodes, group, buffers, tag
        self._rank, world_size = dist.get_rank(group), len(nodes)
        self._piece = piece = -(-kind.width // world_size)
        own = buffers.take(max(1, len(rows)) * world_size * piece, kind.like).view(-1, world_size, piece)
        for row in range(len(rows)):
            flat = own[row].view(-1)
            kind.write(rows, row, flat[: kind.width])
            flat[kind.width :] = 0.0
        sent = [own[: len(rows), other].unbind() for other in range(world_size)]
        others = sum(map(len, nodes)) - len(rows)
        room = iter(buffers.take(others * piece, kind.like).view(others, piece))
        self._rows = [
            sent[self._rank] if other == self._rank else tuple(itertools.islice(room, len(theirs)))
            for other, theirs in enumerate(nodes)
        ]
        self._works = start_exchange(sent, self._rows, group, tag)

    def wait(self) -> None:
        """Wait for the messages that are on their way."""
        for work in self._works:
            work.wait()

    def sum(self) -> None:
        """Finish this rank's slice, and start to send it."""
        self.wait()
        world_size = len(self._nodes)
        # Its parts become the gradients. A later step writes here again only if nobody has kept one.
        self._total = total = self._buffers.take(world_size * self._piece, self.kind.like).view(world_size, -1)
        total[self._rank] = _tree_sum(self._nodes, itertools.chain.from_iterable(self._rows))
        sent = [[total[self._rank]]] * world_size
        self._works = start_exchange(sent, [[one] for one in total], self._group, self._tag + 1)

    def total(self) -> Tensor:
        """Return the sums, after `sum`."""
        self.wait()
        return self._total.view(-1)


def _tree_sum(nodes: Iterable[tuple[Subtree, ...]], rows: Iterable[Tensor]) -> Tensor:
    """Return the tree's sum of all ranks' subtrees, given in rank order; overwrites them."""
    tree: TreeSum[Tensor] = TreeSum(_add)
    for node, row in zip(itertools.chain.from_iterable(nodes), rows, strict=True):
        tree.push(node, row)
    return tree.total()


def _parts(value: Tensor) -> Tensor:
    """Return a view of real numbers.

    torch adds complex b as (1 + 0j) * b, which makes 0.0 of a real part of -0.0.
    """
    return torch.view_as_real(value) if value.is_complex() else value


def _add(left: Tensor, right: Tensor) -> Tensor:
    _parts(left).add_(_parts(right))
    return left


def _added(left: Gradients, right: Gradients) -> Gradients:
    both = [(_parts(a), _parts(b)) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


def _nothing(size: int, like: Tensor) -> Tensor:
    """Return what does not change the bits of a sum, in both parts of complex numbers."""
    return like.new_full((size,), complex(_NOTHING, _NOTHING) if like.is_complex() else _NOTHING)


def _aligned(size: int, element_size: int) -> int:
    """Return a number of elements after which the next tensor starts where an allocation of its own would start."""
    step = _ALIGNED_BYTES // element_size
    return -(-size // step) * step


def _laid_out(total: Tensor, begin: int, parameter: nn.Parameter) -> Tensor:
    """Return a gradient with the parameter's memory layout, as autograd makes one: the bits of a norm depend on it.

    begin: of its values, in the order of the dimensions, in `total`, a contiguous tensor.
    """
    if parameter.is_contiguous():
        offset = total.storage_offset() + begin
        return total.as_strided(parameter.shape, parameter.stride(), offset).data  # with a count of versions of its own
    value = total[begin : begin + parameter.numel()].view_as(parameter)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def sparse_refusal(name: str) -> str:
    return (
        f"the parameter {name} has a sparse gradient, of which the strict reduction has no ordered sum: use "
        f'sparse=False, or replicate(model, reduction="fast")'
    )


@contextmanager
def deterministic(device: torch.device | None, otherwise: Literal["error", "warn"] = "error") -> Iterator[None]:
    """Make operators deterministic inside the context, on an accelerator or with several threads.

    If an operator has no deterministic algorithm, torch raises an error or warns, with its name. On one CPU thread
    every operator is deterministic. At the end the settings are as before.
    """
    if (device is None or device.type == "cpu") and torch.get_num_threads() == 1:
        yield
        return
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    torch.set_deterministic_debug_mode(otherwise)
    torch.backends.cudnn.benchmark = False  # it chooses algorithms by their time, separately in each process
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark


T = TypeVar("T")
Subtree = tuple[int, int]  # (level, position): micro-batches position * 2**level up to (position + 1) * 2**level


class TreeSum(Generic[T]):
    """Sum values along the tree as they arrive, as a binary counter carries: two neighbours of equal size become one.

    Floating-point addition is not associative, so the order of a sum decides its bits. Here the order depends on the
    micro-batches' numbers alone: a subtree is its left half plus its right half. A half beyond the last micro-batch
    adds nothing.

        8 micro-batches: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))        5: ((0 + 1) + (2 + 3)) + 4

    Values arrive in the order of the micro-batches.

    Args:
        add: return left + right; it may overwrite its left operand.

    Attributes:
        nodes: the whole subtrees summed so far, in order, with their sums: at most 2 log2(n) of n contiguous
            micro-batches, and at most log2(n) + 1 of the first n.

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
        self.nodes: list[tuple[Subtree, T]] = []

    def push(self, subtree: Subtree, value: T) -> None:
        """Add the sum of the next subtree."""
        level, position = subtree
        for _ in range(len(self.nodes) - self.alone(subtree)):
            _, left = self.nodes.pop()
            value = self._add(left, value)
            level, position = level + 1, position // 2
        self.nodes.append(((level, position), value))

    def alone(self, subtree: Subtree) -> int:
        """Return how many of the nodes, from the first, the next subtree leaves as they are; it joins the others."""
        level, position = subtree
        count = len(self.nodes)
        while position % 2 and count and self.nodes[count - 1][0] == (level, position - 1):
            level, position, count = level + 1, position // 2, count - 1
        return count

    def total(self) -> T:
        """Return the sum of the whole tree, after the last value; free the subtrees.

        The subtrees that are left become smaller towards the last micro-batch. So the last two are always neighbours.
        """
        _, right = self.nodes.pop()
        while self.nodes:
            _, left = self.nodes.pop()
            right = self._add(left, right)
        return right


@functools.lru_cache(maxsize=256)
def subtrees(start: int, stop: int) -> tuple[Subtree, ...]:
    """Return the whole subtrees that make up the micro-batches `start` to `stop`, in order."""
    tree = TreeSum[None](lambda left, right: None)
    for number in range(start, stop):
        tree.push((0, number), None)
    return tuple(node for node, _ in tree.nodes)
