"""Outputs in memory: written where they belong as they come in, then moved to the ranks that receive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from ..comm.nesting import Description
from ..comm.transfer import Receiver, exchange, move, move_json, takes_part
from ..comm.trees import assembled, leaves_of, new_tensor, plain_values, single
from ..errors import DDParityError
from .outputs import Rows, Schema, on_device
from .sendbuffer import Packed, Packer, Run
from .source import Source

_PIECE_BYTES = 4 * 2**20  # of small batches that are sent together

Targets = dict[int, torch.Tensor]
Finish = Callable[[], None]


class Collected:
    """The outputs for `length` samples, each row written to its place once.

    Tensors and arrays whose rows all have one shape are one tensor of their final size from the first batch on; rows
    of other shapes than the first batch's are kept aside, and then the whole is a list.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._columns: _Column | None = None

    def add(self, rows: Rows) -> None:
        if isinstance(self._columns, _Tensors) and self._columns.has_rows_of(rows.node):
            self._columns.rows(rows.start, rows.size).copy_(rows.leaves[0])  # as below, in less time
            return
        targets, finish = self.places(rows.start, rows.size, rows.node)
        for target, leaf in zip(targets, rows.leaves, strict=True):
            target.copy_(leaf)
        finish()

    def places(self, start: int, size: int, node: Description) -> tuple[list[torch.Tensor], Finish]:
        """Where to write the tensors of a batch's output, and what to call when that is done."""
        if self._columns is None:
            self._columns = _column(node, self._length)
        targets: Targets = {}
        finish = self._columns.place(node, start, size, targets)
        return [targets[number] for number in sorted(targets)], finish

    def value(self) -> Any:
        """The whole; an empty tensor where no batch came, since nothing is known of its structure."""
        return torch.empty(0) if self._columns is None else self._columns.value()


class _Tensors:
    def __init__(self, node: Description, length: int) -> None:
        self._is_array = node["kind"] == "array"
        self._row = node["shape"][1:]
        self._whole = _new({**node, "shape": [length, *self._row]})
        self._others: dict[int, torch.Tensor] = {}

    def has_rows_of(self, node: Description) -> bool:
        return bool(node["shape"][1:] == self._row)

    def rows(self, start: int, size: int) -> torch.Tensor:
        return self._whole[start : start + size]

    def place(self, node: Description, start: int, size: int, targets: Targets) -> Finish:
        if self.has_rows_of(node):
            targets[node["leaf"]] = self.rows(start, size)
            return _nothing
        batch = targets[node["leaf"]] = _new(node)
        with torch.inference_mode(False):  # as of a tensor, of its views
            self._others.update(zip(range(start, start + size), batch, strict=True))
        return _nothing

    def value(self) -> Any:
        if not self._others:
            return self._whole.numpy(force=True) if self._is_array else self._whole
        rows = [self._others[i] if i in self._others else row.clone() for i, row in enumerate(self._whole)]
        return [row.numpy(force=True) for row in rows] if self._is_array else rows


class _Entries:
    def __init__(self, length: int) -> None:
        self._entries: list[Any] = [None] * length

    def place(self, node: Description, start: int, size: int, targets: Targets) -> Finish:
        if node["kind"] == "plain list":
            text = targets[node["leaf"]] = _new(node)
            return lambda: self._set(start, plain_values(text))
        builds = [single(item, targets, _new) for item in node["items"]]
        return lambda: self._set(start, [build() for build in builds])

    def _set(self, start: int, entries: list[Any]) -> None:
        self._entries[start : start + len(entries)] = entries

    def value(self) -> Any:
        return self._entries


class _Nothing:
    """A field that is None."""

    def place(self, node: Description, start: int, size: int, targets: Targets) -> Finish:
        targets[node["leaf"]] = _new(node)
        return _nothing

    def value(self) -> Any:
        return None


class _Nesting:
    def __init__(self, node: Description, length: int) -> None:
        self._node = node
        self._items = [_column(item, length) for item in node["items"]]

    def place(self, node: Description, start: int, size: int, targets: Targets) -> Finish:
        inner = [
            column.place(item, start, size, targets) for column, item in zip(self._items, node["items"], strict=True)
        ]

        def finish() -> None:
            for one in inner:
                one()

        return finish

    def value(self) -> Any:
        return assembled(self._node, [column.value() for column in self._items])


_Column = _Tensors | _Entries | _Nothing | _Nesting


def _column(node: Description, length: int) -> _Column:
    if node["kind"] in ("tensor", "array"):
        return _Tensors(node, length)
    if node["kind"] in ("list", "plain list"):
        return _Entries(length)
    return _Nothing() if node["kind"] == "plain" else _Nesting(node, length)


def _new(node: Description) -> torch.Tensor:
    with torch.inference_mode(False):  # the result must be of use in a training
        return new_tensor(node)


def _nothing() -> None: ...


class Memory:
    """A sink that keeps all outputs: on the rank that receives where they belong, on the others until they are sent.

    `source`: numbers the samples, see `Batches`. `device`: where tensors are kept; None: where the model leaves them.
    """

    def __init__(
        self, source: Source, schema: Schema, to: Receiver, rank: int, world_size: int, device: torch.device | None
    ) -> None:
        self._source, self._schema, self._to, self._device = source, schema, to, device
        self._receives = to in ("all", rank)
        # A rank that also sends places its own when it sends them, so that it never holds them twice.
        placed = self._receives and (world_size == 1 or to != "all") and source.length is not None
        self._result = Collected(source.length) if placed and source.length is not None else None
        self._ran: list[range] = []
        self._packer = Packer()

    def take(self, samples: range, where: str, output: Any, batch: Any) -> None:
        node, leaves = self._schema.check(output, samples, where)
        if self._device is not None:
            node = on_device(node, self._device)
            leaves = [leaf.to(self._device) for leaf in leaves]
        self._ran.append(samples)
        rows = Rows(samples.start, len(samples), node, leaves)
        if self._result is not None:
            self._result.add(rows)
        else:
            self._packer.pack(rows)

    def finish(self) -> Any:
        length, place = self._source.settled(self._ran)
        ran = [range(place(part.start), place(part.start) + len(part)) for part in self._ran]
        held = self._packer.held
        for packed in held:
            packed.start = place(packed.start)
        result = self._result or Collected(length)
        del self._packer  # and its block
        bring_together(result, held, ran, length, self._to, self._receives)
        return result.value() if self._receives else None


def bring_together(
    result: Collected, held: deque[Packed | Run], ran: Sequence[range], length: int, to: Receiver, receives: bool
) -> None:
    """Move what each rank holds into the receivers' results. All ranks call it.

    Args:
        held: this rank's rows that are not in its result yet; emptied, so that memory is free as soon as it is sent.
        ran: the samples that this rank has run, those in its result included.

    Collectives: two all-gathers; then for each 4 MiB of small batches, or each larger one, or each 64 MiB of what are
    rows of one tensor, of a rank that does not receive alone, a description (two messages) and its tensors, sent to
    `to` or broadcast.

    Raises:
        DDParityError: a sample is missing or there twice; on every rank, before any output moves.
        Exception: what a row could not be placed for; after all have been received, so that no sender waits.
    """
    pieces = _pieces(held)
    said = exchange({"pieces": len(pieces), "ran": [[part.start, part.stop] for part in merged(ran)]})
    check_each_once([range(*part) for theirs in said for part in theirs["ran"]], length)
    several = len(said) > 1
    rank = dist.get_rank() if several else 0
    problem: Exception | None = None
    for source, theirs in enumerate(said):
        if source == rank:
            while pieces:
                rows = [packed.rows() for packed in pieces.popleft()]
                if several and takes_part(source, to):
                    _send(rows, source, to)
                problem = problem or (_not_added(rows, result) if receives else None)
        elif takes_part(source, to):
            for _ in range(theirs["pieces"]):
                problem = _receive(source, to, result, problem)
    if problem is not None:
        raise problem


def check_each_once(ran: Sequence[range], length: int) -> None:
    """Refuse samples that no rank ran, or that several did."""
    in_order = sorted((part for part in ran if part), key=lambda part: part.start)
    for before, after in pairwise([range(0), *in_order, range(length, length)]):
        if after.start != before.stop:
            problem = "are missing" if after.start > before.stop else "are there twice"
            low, high = sorted((before.stop, after.start))
            raise DDParityError(
                f"the outputs of the samples {low} to {high - 1} of {length} {problem}. No data set or model should "
                f"bring that about: please report it"
            )


def merged(ran: Sequence[range]) -> list[range]:
    """The same samples in as few ranges as follow one another."""
    merged: list[range] = []
    for part in sorted(ran, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            merged[-1] = range(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def _pieces(held: deque[Packed | Run]) -> deque[list[Packed | Run]]:
    pieces: deque[list[Packed | Run]] = deque()
    room = 0
    while held:
        packed = held.popleft()
        room -= packed.cost
        if not pieces or room < 0:
            pieces.append([])
            room = _PIECE_BYTES
        pieces[-1].append(packed)
    return pieces


def _send(piece: list[Rows], source: int, to: Receiver) -> None:
    nodes: list[Description] = []
    places = []
    for rows in piece:
        if rows.node not in nodes[-2:]:  # most batches are alike
            nodes.append(rows.node)
        places.append([rows.start, rows.size, len(nodes) - 1 - nodes[::-1].index(rows.node)])
    move_json({"nodes": nodes, "rows": places}, source, to)
    move([leaf for rows in piece for leaf in rows.leaves], source, to)


def _not_added(piece: list[Rows], result: Collected) -> Exception | None:
    try:
        for rows in piece:
            result.add(rows)
    except Exception as error:
        return error
    return None


def _receive(source: int, to: Receiver, result: Collected, problem: Exception | None) -> Exception | None:
    """Receive a piece into its place; where there is a problem, or that makes one, anywhere, since it is being sent."""
    head = move_json(None, source, to)
    described = [(start, size, head["nodes"][number]) for start, size, number in head["rows"]]
    placed: list[tuple[list[torch.Tensor], Finish]] = []
    try:
        placed = [] if problem else [result.places(*one) for one in described]
    except Exception as error:
        problem = error
    if problem is not None:
        placed = [([new_tensor(leaf) for leaf in leaves_of(node)], _nothing) for _, _, node in described]
    move([target for targets, _ in placed for target in targets], source, to)
    try:
        for _, finish in placed:
            finish()
    except Exception as error:
        problem = error
    return problem
