"""Outputs that wait to be sent: copied into large blocks of memory, with small descriptions."""

from __future__ import annotations

import json
import zlib
from collections import deque
from dataclasses import dataclass

import torch

from ..comm.trees import byte_view, leaves_of, new_tensor
from .outputs import Rows

_BLOCK_BYTES = 2**26  # the C library maps memory of this size on its own: it is taken as it is written, and given back
_ALIGNED_BYTES = 64
_SHORT = 1000  # bytes; a shorter description, as of dense outputs, is not compressed
_OBJECTS = 8  # times the text of a description is the memory of its Python objects


@dataclass(slots=True)
class Packed:
    """The outputs of one batch. Tensors on the CPU are in `block` from `offset` on, the others in `elsewhere`."""

    start: int
    size: int
    text: bytes  # the description in JSON, compressed where it is long
    cost: int  # about the bytes that it takes when it is unpacked
    block: torch.Tensor
    offset: int
    elsewhere: list[torch.Tensor]

    def rows(self) -> Rows:
        description = json.loads(self.text if self.text.startswith(b"{") else zlib.decompress(self.text))
        leaves, offset, elsewhere = [], self.offset, iter(self.elsewhere)
        for leaf in leaves_of(description):
            if leaf.get("device", "cpu") != "cpu":
                leaves.append(next(elsewhere))
                continue
            kind = getattr(torch, leaf["dtype"])
            shape = torch.Size(leaf["shape"])
            offset = _aligned(offset, kind.itemsize)
            leaves.append(self.block[offset : offset + shape.numel() * kind.itemsize].view(kind).view(shape))
            offset += leaves[-1].nbytes
        return Rows(self.start, self.size, description, leaves)


class PackedRun:
    """The outputs of consecutive batches that are one tensor on the CPU each, as rows of one larger tensor.

    `start`, `size`: the samples. `cost`: as in `Packed`.
    """

    def __init__(self, rows: Rows, room: torch.Tensor) -> None:
        """`rows`: the first batch. `room`: free bytes for it and for the batches that follow."""
        self.start, self.size = rows.start, 0
        self._description, self._row = rows.description, rows.description["shape"][1:]
        self._row_bytes = rows.leaves[0].nbytes // rows.size
        self._most = room.numel() // self._row_bytes
        kind = getattr(torch, self._description["dtype"])
        self._whole = room[: self._most * self._row_bytes].view(kind).view(self._most, *self._row)

    @property
    def cost(self) -> int:
        return self.size * self._row_bytes

    def add(self, rows: Rows) -> bool:
        """Copy a batch behind the others. Return False if it does not belong there."""
        description, end = rows.description, self.size + rows.size
        if end > self._most or rows.start != self.start + self.size:
            return False
        if description["shape"][1:] != self._row or any(
            description[name] != self._description[name] for name in ("kind", "dtype")
        ):
            return False
        self._whole[self.size : end].copy_(rows.leaves[0])
        self.size = end
        return True

    def rows(self) -> Rows:
        description = {**self._description, "shape": [self.size, *self._row]}
        return Rows(self.start, self.size, description, [self._whole[: self.size]])


class Packer:
    """Copies outputs, since a model may write its next output into the same memory, and a view keeps its whole tensor.

    On the CPU, outputs lie side by side in large blocks. If each output had its own memory, between what the model
    allocates and frees, the unused gaps would be as large as all outputs (benchmarks/RESULTS.md, "Prediction").

    `held`: what is packed, in order.
    """

    def __init__(self) -> None:
        self.held: deque[Packed | PackedRun] = deque()
        self._run: PackedRun | None = None  # the last of `held`, if it is one
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._text = b""

    def pack(self, rows: Rows) -> None:
        description = rows.description
        is_dense = description["kind"] in ("tensor", "array") and description["device"] == "cpu"
        if is_dense and rows.leaves[0].nbytes:
            if self._run is None or not self._run.add(rows):
                self._begin_run(rows)
        else:
            self._end_run()
            self.held.append(self._packed(rows))

    def _begin_run(self, rows: Rows) -> None:
        self._end_run()
        start = self._room(rows.leaves[0].nbytes)
        self._run = PackedRun(rows, self._block[start:])
        self._used = start
        added = self._run.add(rows)
        assert added, "a run has room for the batch that begins it"
        self.held.append(self._run)

    def _end_run(self) -> None:
        if self._run is not None:
            self._used = _aligned(self._used + self._run.cost, _ALIGNED_BYTES)
            self._run = None

    def _packed(self, rows: Rows) -> Packed:
        plain = json.dumps(rows.description).encode()
        text = plain if len(plain) < _SHORT else zlib.compress(plain, 1)
        self._text = text = self._text if text == self._text else text  # most batches have the same one, and share it
        described = leaves_of(rows.description)
        here = [leaf for own, leaf in zip(described, rows.leaves, strict=True) if own.get("device", "cpu") == "cpu"]
        size = 0
        for leaf in here:
            size = _aligned(size, leaf.element_size()) + leaf.nbytes
        start = offset = self._room(size)
        for leaf in here:
            offset = _aligned(offset, leaf.element_size())
            self._block[offset : offset + leaf.nbytes].copy_(byte_view(leaf))
            offset += leaf.nbytes
        elsewhere = [
            new_tensor(own).copy_(leaf)
            for own, leaf in zip(described, rows.leaves, strict=True)
            if own.get("device", "cpu") != "cpu"
        ]
        cost = size + sum(leaf.nbytes for leaf in elsewhere) + _OBJECTS * len(plain)
        return Packed(rows.start, rows.size, text, cost, self._block, start, elsewhere)

    def _room(self, size: int) -> int:
        """Return the offset of `size` free bytes in the block."""
        if self._used + size > self._block.numel():
            self._block, self._used = torch.empty(max(size, _BLOCK_BYTES), dtype=torch.uint8), 0
        start = self._used
        self._used = _aligned(start + size, _ALIGNED_BYTES)
        return start


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to
