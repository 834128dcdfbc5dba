"""Gather nested values from all ranks: the public function `gather`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .nesting import Description
from .transfer import Receiver, checked_receiver, described, move, takes_part
from .trees import new_tensor, put_together, take_apart


def gather(value: Any, to: Receiver = 0) -> Any:
    """Concatenate the values of all ranks, in rank order, on rank `to`, or on every rank if `to` is "all".

    Tensors of any dense dtype and numeric arrays are concatenated along their first dimension, whose size may differ
    between ranks. 0-d tensors and arrays are stacked. Lists are joined. Numbers, strings and None become a list with
    one entry for each rank. Dicts, tuples, named tuples and dataclasses keep their structure, which must be the same on
    every rank.

    Returns:
        The concatenation on the ranks that receive it, None on the others.

    Collectives: two all-gathers (a number, and the description in JSON). Then the tensors of each rank are sent to
    `to`, or broadcast, in messages of at most 16 MiB; large ones go directly into the result. Nothing is pickled. Every
    rank calls it.

    Raises:
        TypeError: a value of this rank cannot be sent; the error names it. The other ranks raise `RankFailure`.
        ValueError: `to` is not a rank, or differs between ranks, or the ranks' values do not fit together; on every
            rank.

    Example:
        >>> gather({"loss": 0.5, "rows": torch.ones(2, 3)})["loss"]
        [0.5]
    """
    joined = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    leaves: list[torch.Tensor] = []

    def describe() -> Description:
        receiver = checked_receiver(to, world_size)
        node, found = take_apart(value)
        leaves.extend(found)
        return {**node, "to": receiver}

    nodes = described("gather", describe)
    receivers = [theirs.pop("to") for theirs in nodes]
    for other, receiver in enumerate(receivers):
        if receiver != receivers[0]:
            raise ValueError(
                f"gather(to=…) differs between ranks: {receivers[0]!r} on rank 0, {receiver!r} on rank {other}. Give "
                f"the same on every rank"
            )

    receives = to in ("all", rank)
    build, targets = put_together(nodes, new_tensor if receives else _placeholder)
    for source, target in enumerate(targets):
        slots = [target[number] for number in sorted(target)]  # the parts of the result that hold this rank's tensors
        if source == rank and receives:
            for slot, leaf in zip(slots, leaves, strict=True):
                slot.copy_(leaf)
        if world_size > 1 and takes_part(source, to):
            move(leaves if source == rank else slots, source, to)
    return build() if receives else None


def _placeholder(description: Description) -> torch.Tensor:
    return new_tensor({**description, "device": "meta"})
