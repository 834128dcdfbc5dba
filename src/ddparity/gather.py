"""Collecting values of any nesting from all ranks."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
import torch.distributed as dist

from .compat import all_gather_single
from .errors import RankFailure
from .trees import Node, byte_view, new_tensor, put_together, take_apart

_CHUNK_BYTES = 64 * 2**20
# What a rank passes that has nothing to give, not even a structure.
NOTHING = object()


def gather(value: Any, to: int | Literal["all"] = 0) -> Any:
    """Concatenate a value of every rank, in rank order, on rank `to` or on all. Every rank calls it.

    Tensors (any dense dtype) and numeric arrays are concatenated along their first dimension, in which ranks may
    differ, and 0-d ones are stacked; lists are joined; numbers, strings and None become a list with one entry a rank;
    dicts, tuples, named tuples and dataclasses keep their structure, which must be the same on every rank.

    Returns:
        The concatenation where it is received, None on the other ranks.

    Collectives: two all-gathers (a number, and the description in JSON), then for each tensor of each rank a send to
    `to`, or a broadcast, in chunks of at most 64 MiB, straight into the result. No pickle.

    Raises:
        TypeError: a value cannot travel; on its rank, naming it, and `RankFailure` on the others.
        ValueError: `to` is no rank, or the ranks' values do not fit together; on every rank.

    Example:
        >>> gather({"loss": 0.5, "rows": torch.ones(2, 3)})["loss"]
        [0.5]
    """
    result = gather_present(value, to)
    return None if result is NOTHING else result


def gather_present(value: Any, to: int | Literal["all"]) -> Any:
    """As `gather`, where a rank may pass NOTHING; NOTHING if none has a value, or this rank does not receive."""
    joined = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    check_receiver(to, world_size)
    problem: Exception | None = None
    node: Node | None = None
    leaves: list[torch.Tensor] = []
    try:
        if value is not NOTHING:
            node, leaves = take_apart(value)
    except Exception as error:
        problem, node = error, {"error": str(error)}
    nodes = _exchange(node, world_size)
    if problem is not None:
        raise problem
    for other, theirs in enumerate(nodes):
        if theirs is not None and "error" in theirs:
            raise RankFailure(f"rank {other} failed in gather: {theirs['error']}", other)

    present = [other for other in range(world_size) if nodes[other] is not None]
    if not present:
        return NOTHING
    receives = to in ("all", rank)
    build, targets = put_together([nodes[other] for other in present], new_tensor if receives else _placeholder)  # type: ignore[misc]
    for other, target in zip(present, targets, strict=True):
        for number in sorted(target):
            _move(leaves[number] if other == rank else None, target[number], other, rank, to)
    return build() if receives else NOTHING


def check_receiver(to: int | str, world_size: int) -> None:
    if to != "all" and (isinstance(to, (bool, str)) or not 0 <= to < world_size):
        raise ValueError(f'to={to!r} receives nothing: give a rank from 0 to {world_size - 1}, or "all"')


def _placeholder(node: Node) -> torch.Tensor:
    return new_tensor({**node, "device": "meta"})


def _exchange(node: Node | None, world_size: int) -> list[Node | None]:
    """Every rank's description, on every rank."""
    if world_size == 1:
        return [node]
    device = _wire_device()
    text = json.dumps(node).encode()
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    sizes = torch.empty(world_size, dtype=torch.int64, device=device)
    all_gather_single(sizes, torch.tensor([len(text)], device=device))
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(text)] = mine
    texts = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
    all_gather_single(texts, padded)
    rows = texts.cpu().view(world_size, longest)
    return [json.loads(bytes(row[:size].numpy())) for row, size in zip(rows, sizes.tolist(), strict=True)]


def _move(leaf: torch.Tensor | None, target: torch.Tensor, source: int, rank: int, to: int | str) -> None:
    """Bring one tensor of rank `source` to where it is received. `leaf` is the data, on its rank only."""
    receives = to in ("all", rank)
    if leaf is not None and receives:
        target.copy_(leaf)
    if source == to or (to != "all" and rank not in (source, to)) or not dist.is_initialized():
        return
    wire = _wire_device()
    data = leaf if leaf is not None else target
    staged = data if data.device.type == wire.type else data.new_empty(data.shape, device=wire)
    if leaf is not None and staged is not leaf:
        staged.copy_(leaf)
    for chunk in byte_view(staged).split(_CHUNK_BYTES):
        if to == "all":
            dist.broadcast(chunk, source)
        elif rank == source:
            dist.send(chunk, to)  # type: ignore[arg-type]
        else:
            dist.recv(chunk, source)
    if leaf is None and staged is not target:
        target.copy_(staged)


def _wire_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in str(dist.get_backend()) else torch.device("cpu")
    )
