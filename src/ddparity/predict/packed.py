"""Outputs that wait to be sent: copied, small, and side by side."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass

import torch

from ..trees import byte_view, leaves_of, new_tensor
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


class Packer:
    """Copies outputs: a model may write its next one into the same memory, and a view would keep more than itself.

    On the CPU they lie side by side in large blocks. Each on its own, between what the model takes and frees, would
    leave holes that together are as large as the outputs (benchmarks/RESULTS.md, "Prediction").
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._text = b""

    def pack(self, rows: Rows) -> Packed:
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
