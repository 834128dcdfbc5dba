"""Outputs in memory: write them to their final position as they arrive, then move them to the ranks that receive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from ..comm.nesting import Description
from ..comm.transfer import Receiver, gather_json, move, move_json, takes_part
from ..comm.trees import assembled, leaves_of, new_tensor, plain_values, single
from ..errors import DDParityError
from .outputs import Rows, Schema, on_device
from .sendbuffer import Packed, PackedRun, Packer
from .source import Source

_PIECE_BYTES = 4 * 2**20  # of small batches that are sent together

Targets = dict[int, torch.Tensor]
Finish = Callable[[], None]


class Collected:
    """The outputs for `length` samples. Each row is written once, to its final position.

    A tensor or array has its final size from the first batch on. Rows of another shape than the first batch's are kept
    apart, and then the result is a list.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._columns: _Column | None = None

    def add(self, rows: Rows) -> None:
        if isinstance(self._columns, _Tensors) and self._columns.has_rows_of(rows.description):
            self._columns.rows(rows.start, rows.size).copy_(rows.leaves[0])  # the same as below, in less time
            return
        targets, finish = self.plan(rows.start, rows.size, rows.description)
        for target, leaf in zip(targets, rows.leaves, strict=True):
            target.copy_(leaf)
        finish()

    def plan(self, start: int, size: int, description: Description) -> tuple[list[torch.Tensor], Finish]:
        """Return the tensors to write a batch's output to, and a function to call after that."""
        if self._columns is None:
            self._columns = _column(description, self._length)
        targets: Targets = {}
        finish = self._columns.plan(description, start, size, targets)
        return [targets[number] for number in sorted(targets)], finish

    def value(self) -> Any:
        """Return the whole; an empty tensor if there was no batch, since the structure is not known then."""
        return torch.empty(0) if self._columns is None else self._columns.value()


class _Tensors:
    def __init__(self, description: Description, length: int) -> None:
        self._is_array = description["kind"] == "array"
        self._row = description["shape"][1:]
        self._whole = _new({**description, "shape": [length, *self._row]})
        self._others: dict[int, torch.Tensor] = {}

    def has_rows_of(self, description: Description) -> bool:
        return bool(description["shape"][1:] == self._row)

    def rows(self, start: int, size: int) -> torch.Tensor:
        return self._whole[start : start + size]

    def plan(self, description: Description, start: int, size: int, targets: Targets) -> Finish:
        if self.has_rows_of(description):
            targets[description["leaf"]] = self.rows(start, size)
            return _nothing
        batch = targets[description["leaf"]] = _new(description)
        with torch.inference_mode(False):  # so that the views are no inference tensors either
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

    def plan(self, description: Description, start: int, size: int, targets: Targets) -> Finish:
        if description["kind"] == "plain list":
            text = targets[description["leaf"]] = _new(description)
            return lambda: self._set(start, plain_values(text))
        builds = [single(item, targets, _new) for item in description["items"]]
        return lambda: self._set(start, [build() for build in builds])

    def _set(self, start: int, entries: list[Any]) -> None:
        self._entries[start : start + len(entries)] = entries

    def value(self) -> Any:
        return self._entries


class _Nothing:
    """A field that is None."""

    def plan(self, description: Description, start: int, size: int, targets: Targets) -> Finish:
        targets[description["leaf"]] = _new(description)
        return _nothing

    def value(self) -> Any:
        return None


class _Nesting:
    def __init__(self, description: Description, length: int) -> None:
        self._description = description
        self._items = [_column(item, length) for item in description["items"]]

    def plan(self, description: Description, start: int, size: int, targets: Targets) -> Finish:
        inner = [
            column.plan(item, start, size, targets)
            for column, item in zip(self._items, description["items"], strict=True)
        ]

        def finish() -> None:
            for one in inner:
                one()

        return finish

    def value(self) -> Any:
        return assembled(self._description, [column.value() for column in self._items])


_Column = _Tensors | _Entries | _Nothing | _Nesting


def _column(description: Description, length: int) -> _Column:
    if description["kind"] in ("tensor", "array"):
        return _Tensors(description, length)
    if description["kind"] in ("list", "plain list"):
        return _Entries(length)
    return _Nothing() if description["kind"] == "plain" else _Nesting(description, length)


def _new(description: Description) -> torch.Tensor:
    with torch.inference_mode(False):  # the result can take part in a training
        return new_tensor(description)


def _nothing() -> None: ...


class Memory:
    """A sink that keeps all outputs: in the result on the rank that receives, on the others until they are sent.

    `source`: numbers the samples, see `Batches`. `device`: where tensors are kept; None: where the model leaves them.
    """

    def __init__(
        self, source: Source, schema: Schema, to: Receiver, rank: int, world_size: int, device: torch.device | None
    ) -> None:
        self._source, self._schema, self._to, self._device = source, schema, to, device
        self._receives = to in ("all", rank)
        # A rank that also sends writes its own outputs when it sends them, so that it never holds them twice.
        at_once = self._receives and (world_size == 1 or to != "all") and source.length is not None
        self._result = Collected(source.length) if at_once and source.length is not None else None
        self._ran: list[range] = []
        self._packer = Packer()

    def take(self, samples: range, where: str, output: Any, batch: Any) -> None:
        description, leaves = self._schema.check(output, samples, where)
        if self._device is not None:
            description = on_device(description, self._device)
            leaves = [leaf.to(self._device) for leaf in leaves]
        self._ran.append(samples)
        rows = Rows(samples.start, len(samples), description, leaves)
        if self._result is not None:
            self._result.add(rows)
        else:
            self._packer.pack(rows)

    def finish(self) -> Any:
        length, position = self._source.settled(self._ran)
        ran = [range(position(part.start), position(part.start) + len(part)) for part in self._ran]
        held = self._packer.held
        for packed in held:
            packed.start = position(packed.start)
        result = self._result or Collected(length)
        del self._packer  # also frees its block
        bring_together(result, held, ran, length, self._to, self._receives)
        return result.value() if self._receives else None


def bring_together(
    result: Collected, held: deque[Packed | PackedRun], ran: Sequence[range], length: int, to: Receiver, receives: bool
) -> None:
    """Move what each rank holds into the receivers' results. Every rank calls it.

    Args:
        held: this rank's rows that are not in its result yet. It is emptied, so that memory is freed once it is sent.
        ran: the samples that this rank has run, also those in its result.

    Collectives: two all-gathers. Then each rank but a single receiver sends to `to`, or broadcasts, a description (two
    messages) and its tensors for each 4 MiB of small batches, for each larger batch, and for each 64 MiB of batches
    that are rows of one tensor.

    Raises:
        DDParityError: a sample is missing or is there twice; on every rank, before any output moves.
        Exception: a row cannot be written; raised after all rows are received, so that no sender waits.
    """
    pieces = _pieces(held)
    said = gather_json({"pieces": len(pieces), "ran": [[part.start, part.stop] for part in merged(ran)]})
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
    """Check that each sample was run once.

    Raises:
        DDParityError: some samples are missing, or are there twice.
    """
    in_order = sorted((part for part in ran if part), key=lambda part: part.start)
    for before, after in pairwise([range(0), *in_order, range(length, length)]):
        if after.start != before.stop:
            problem = "are missing" if after.start > before.stop else "are there twice"
            low, high = sorted((before.stop, after.start))
            raise DDParityError(
                f"the outputs of the samples {low} to {high - 1} of {length} {problem}. No data set or model should "
                f"cause this: please report it"
            )


def merged(ran: Sequence[range]) -> list[range]:
    """Return the same samples in as few ranges as possible, in order."""
    merged: list[range] = []
    for part in sorted(ran, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            merged[-1] = range(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def _pieces(held: deque[Packed | PackedRun]) -> deque[list[Packed | PackedRun]]:
    pieces: deque[list[Packed | PackedRun]] = deque()
    room = 0
    while held:
        packed = held.popleft()
        room -= packed.cost
        if not pieces or room < 0:
            pieces.append([])
            room = _PIECE_BYTES - packed.cost
        pieces[-1].append(packed)
    return pieces


def _send(piece: list[Rows], source: int, to: Receiver) -> None:
    different: list[Description] = []
    numbered = []
    for rows in piece:
        if rows.description not in different[-2:]:  # most batches have the same description
            different.append(rows.description)
        numbered.append([rows.start, rows.size, len(different) - 1 - different[::-1].index(rows.description)])
    move_json({"descriptions": different, "rows": numbered}, source, to)
    move([leaf for rows in piece for leaf in rows.leaves], source, to)


def _not_added(piece: list[Rows], result: Collected) -> Exception | None:
    try:
        for rows in piece:
            result.add(rows)
    except Exception as error:
        return error
    return None


def _receive(source: int, to: Receiver, result: Collected, problem: Exception | None) -> Exception | None:
    """Receive a piece into the result. After a problem receive it anywhere, since it is sent all the same."""
    head = move_json(None, source, to)
    described = [(start, size, head["descriptions"][number]) for start, size, number in head["rows"]]
    plans: list[tuple[list[torch.Tensor], Finish]] = []
    try:
        plans = [] if problem else [result.plan(*one) for one in described]
    except Exception as error:
        problem = error
    if problem is not None:
        plans = [([new_tensor(leaf) for leaf in leaves_of(description)], _nothing) for _, _, description in described]
    move([target for targets, _ in plans for target in targets], source, to)
    try:
        for _, finish in plans:
            finish()
    except Exception as error:
        problem = error
    return problem
