"""Send a nested value from one rank to all: the public function `broadcast`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .transfer import described, move
from .trees import new_tensor, single, take_apart


def broadcast(value: Any, source: int = 0) -> Any:
    """Return the value of rank `source` on every rank.

    Tensors of any dense dtype, numeric arrays, numbers, strings and None travel, in dicts, lists, tuples, named tuples
    and dataclasses of any depth. Every rank gets new tensors, on a device of the same type. What the other ranks pass
    is not looked at: give None there. NumPy's numbers become Python's.

    Collectives: two all-gathers (a number, and the description in JSON). Then the tensors are broadcast, in messages of
    at most 16 MiB. Nothing is pickled. Every rank calls it.

    Raises:
        TypeError: the value cannot be sent; the error names its part. The other ranks raise `RankFailure`.
        ValueError: `source` is not a rank, or differs between ranks; on every rank.

    Source: https://pytorch.org/docs/stable/distributed.html#torch.distributed.broadcast_object_list, which pickles.

    Example:
        >>> broadcast({"name": "run 7", "rates": [0.1, 0.01]})
        {'name': 'run 7', 'rates': [0.1, 0.01]}
    """
    joined = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    leaves: list[torch.Tensor] = []

    def describe() -> dict[str, Any]:
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < world_size:
            raise ValueError(f"broadcast(source={source!r}): give a rank, from 0 to {world_size - 1}")
        if rank != source:
            return {"source": source}
        node, found = take_apart(value)
        leaves.extend(found)
        return {"source": source, "node": node}

    everyones = described("broadcast", describe)
    for other, theirs in enumerate(everyones):
        if theirs["source"] != everyones[0]["source"]:
            raise ValueError(
                f"broadcast(source=…) differs between ranks: {everyones[0]['source']} on rank 0, {theirs['source']} on "
                f"rank {other}. Give the same on every rank"
            )
    received: dict[int, torch.Tensor] = {}
    build = single(everyones[source]["node"], received, new_tensor)
    slots = [received[number] for number in sorted(received)]
    if rank == source:
        for slot, leaf in zip(slots, leaves, strict=True):
            slot.copy_(leaf)
    if world_size > 1:
        move(slots, source, "all")
    return build()
