"""Outputs that wait to be sent: copied, small, and side by side."""

from __future__ import annotations

import json
import zlib
from collections import deque
from dataclasses import dataclass

import torch

from ..comm.trees import byte_view, leaves_of, new_tensor
from .outputs import Rows

_BLOCK_BYTES = 2**26  # the C library gives memory of this size back, and takes it from the system as it is written
_ALIGNED_BYTES = 64
_SHORT = 1000  # bytes of a description, of dense outputs say, that are not worth compressing
_OBJECTS = 8  # Python's objects of a description take that many times its text


@dataclass(slots=True)
class Packed:
    """The outputs of one batch. Tensors on the CPU are in `block` from `offset` on, the others `elsewhere`."""

    start: int
    size: int
    text: bytes  # the description in JSON, compressed where it is long
    cost: int  # bytes to unpack it, roughly
    block: torch.Tensor
    offset: int
    elsewhere: list[torch.Tensor]

    def rows(self) -> Rows:
        node = json.loads(self.text if self.text.startswith(b"{") else zlib.decompress(self.text))
        leaves, offset, elsewhere = [], self.offset, iter(self.elsewhere)
        for leaf in leaves_of(node):
            if leaf.get("device", "cpu") != "cpu":
                leaves.append(next(elsewhere))
                continue
            kind = getattr(torch, leaf["dtype"])
            shape = torch.Size(leaf["shape"])
            offset = _aligned(offset, kind.itemsize)
            leaves.append(self.block[offset : offset + shape.numel() * kind.itemsize].view(kind).view(shape))
            offset += leaves[-1].nbytes
        return Rows(self.start, self.size, node, leaves)


class Run:
    """The outputs of batches that follow one another, where each is one tensor on the CPU: rows of a larger one.

    `start`, `size`: the samples. `cost`: as of `Packed`.
    """

    def __init__(self, rows: Rows, room: torch.Tensor) -> None:
        """`rows`: the first batch. `room`: free bytes for it and what will follow."""
        self.start, self.size = rows.start, 0
        self._node, self._row = rows.node, rows.node["shape"][1:]
        self._row_bytes = rows.leaves[0].nbytes // rows.size
        self._most = room.numel() // self._row_bytes
        kind = getattr(torch, self._node["dtype"])
        self._whole = room[: self._most * self._row_bytes].view(kind).view(self._most, *self._row)

    @property
    def cost(self) -> int:
        return self.size * self._row_bytes

    def add(self, rows: Rows) -> bool:
        """Copy a batch behind the others; False: it does not belong there."""
        node, end = rows.node, self.size + rows.size
        if end > self._most or rows.start != self.start + self.size:
            return False
        if node["shape"][1:] != self._row or node["dtype"] != self._node["dtype"] or node["kind"] != self._node["kind"]:
            return False
        self._whole[self.size : end].copy_(rows.leaves[0])
        self.size = end
        return True

    def rows(self) -> Rows:
        node = {**self._node, "shape": [self.size, *self._row]}
        return Rows(self.start, self.size, node, [self._whole[: self.size]])


class Packer:
    """Copies outputs: a model may write its next one into the same memory, and a view would keep more than itself.

    On the CPU they lie side by side in large blocks. Each on its own, between what the model takes and frees, would
    leave holes that together are as large as the outputs (benchmarks/RESULTS.md, "Prediction").

    `held`: what is packed, in order.
    """

    def __init__(self) -> None:
        self.held: deque[Packed | Run] = deque()
        self._run: Run | None = None  # the last of them, if it is one
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._text = b""

    def pack(self, rows: Rows) -> None:
        node = rows.node
        if node["kind"] in ("tensor", "array") and node["device"] == "cpu" and rows.leaves[0].nbytes:
            if self._run is None or not self._run.add(rows):
                self._begin_run(rows)
        else:
            self._end_run()
            self.held.append(self._packed(rows))

    def _begin_run(self, rows: Rows) -> None:
        self._end_run()
        start = self._room(rows.leaves[0].nbytes)
        self._run = Run(rows, self._block[start:])
        self._used = start
        added = self._run.add(rows)
        assert added, "a run has room for the batch that begins it"
        self.held.append(self._run)

    def _end_run(self) -> None:
        if self._run is not None:
            self._used = _aligned(self._used + self._run.cost, _ALIGNED_BYTES)
            self._run = None

    def _packed(self, rows: Rows) -> Packed:
        plain = json.dumps(rows.node).encode()
        text = plain if len(plain) < _SHORT else zlib.compress(plain, 1)
        self._text = text = self._text if text == self._text else text  # most batches are alike, and share it
        nodes = leaves_of(rows.node)
        here = [leaf for node, leaf in zip(nodes, rows.leaves, strict=True) if node.get("device", "cpu") == "cpu"]
        size = 0
        for leaf in here:
            size = _aligned(size, leaf.element_size()) + leaf.nbytes
        start = offset = self._room(size)
        for leaf in here:
            offset = _aligned(offset, leaf.element_size())
            self._block[offset : offset + leaf.nbytes].copy_(byte_view(leaf))
            offset += leaf.nbytes
        elsewhere = [
            new_tensor(node).copy_(leaf)
            for node, leaf in zip(nodes, rows.leaves, strict=True)
            if node.get("device", "cpu") != "cpu"
        ]
        cost = size + sum(leaf.nbytes for leaf in elsewhere) + _OBJECTS * len(plain)
        return Packed(rows.start, rows.size, text, cost, self._block, start, elsewhere)

    def _room(self, size: int) -> int:
        """Where `size` bytes of the block are free."""
        if self._used + size > self._block.numel():
            self._block, self._used = torch.empty(max(size, _BLOCK_BYTES), dtype=torch.uint8), 0
        start = self._used
        self._used = _aligned(start + size, _ALIGNED_BYTES)
        return start


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to
