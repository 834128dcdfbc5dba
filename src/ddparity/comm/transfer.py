"""Move tensors and JSON values between ranks, in messages of bounded size and without pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..compat import all_gather_single
from ..errors import RankFailure
from .trees import byte_view

Receiver = int | Literal["all"]

_MESSAGE_BYTES = 16 * 2**20  # the largest message
_PACKED_BYTES = 4 * 2**20  # the most bytes of small tensors in one message
_SMALL_BYTES = 2**18  # a larger tensor is sent from its own memory, and received into it


def checked_receiver(to: Any, world_size: int) -> Receiver:
    """Return `to` if it is a rank or "all"; else raise ValueError."""
    if to == "all":
        return "all"
    if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < world_size:
        raise ValueError(f'to={to!r} receives nothing: give a rank from 0 to {world_size - 1}, or "all"')
    return to


def gather_json(value: Any) -> list[Any]:
    """Return every rank's value, which is sent as JSON, on every rank.

    Collectives: two all-gathers; all ranks call it.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1:
        return [value]
    device = wire_device()
    text = json.dumps(value).encode()
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


def described(what: str, describe: Callable[[], Any]) -> list[Any]:
    """Return what `describe` returns on each rank, which is sent as JSON, on every rank.

    Collectives: two all-gathers; all ranks call it.

    Raises:
        Exception: what `describe` raises on this rank. The other ranks raise `RankFailure`.
    """
    problem: Exception | None = None
    try:
        mine = {"value": describe()}
    except Exception as error:
        problem, mine = error, {"error": str(error)}
    everyones = gather_json(mine)
    if problem is not None:
        raise problem
    for rank, theirs in enumerate(everyones):
        if "error" in theirs:
            raise RankFailure(f"rank {rank} failed in {what}: {theirs['error']}", rank)
    return [theirs["value"] for theirs in everyones]


def takes_part(source: int, to: Receiver) -> bool:
    """Return True if this rank sends or receives when `source` sends to `to`."""
    return to == "all" or (source != to and dist.get_rank() in (source, to))


def move_json(value: Any, source: int, to: Receiver) -> Any:
    """Return the value of rank `source`, which is sent as JSON, on that rank and on those that receive it.

    Collectives: two messages or broadcasts; the ranks for which `takes_part` is True call it.
    """
    text = json.dumps(value).encode() if dist.get_rank() == source else b""
    size = torch.tensor([len(text)])
    move([size], source, to)
    buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
    move([buffer], source, to)
    return json.loads(bytes(buffer.numpy()))


def move(tensors: Sequence[torch.Tensor], source: int, to: Receiver) -> None:
    """Copy contiguous tensors of rank `source` into tensors of the same sizes on the ranks that receive them.

    Small tensors share a message. A large one is sent in messages of at most 16 MiB, without a copy if it is on the
    device from which the backend sends.

    Collectives: these messages or broadcasts; the ranks for which `takes_part` is True call it.
    """
    wire, sends = wire_device(), dist.get_rank() == source
    views = [byte_view(tensor) for tensor in tensors]
    for first, last in _runs([view.numel() for view in views]):
        parts = views[first:last]
        for pieces in [parts] if len(parts) > 1 else [[piece] for piece in parts[0].split(_MESSAGE_BYTES)]:
            message = pieces[0]
            if len(pieces) > 1 or message.device.type != wire.type:
                message = torch.empty(sum(piece.numel() for piece in pieces), dtype=torch.uint8, device=wire)
                if sends:
                    torch.cat([piece.to(wire) for piece in pieces], out=message)
            _pass(message, source, to)
            if message is not pieces[0] and not sends:
                for piece, received in zip(pieces, message.split([piece.numel() for piece in pieces]), strict=True):
                    piece.copy_(received)


def _runs(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Cut a sequence of tensors, given their bytes, into runs that share a message; yield (first, last + 1)."""
    first, held = 0, 0
    for number, size in enumerate(sizes):
        alone = size > _SMALL_BYTES
        if held and (alone or held + size > _PACKED_BYTES):
            yield first, number
            held = 0
        if not held:
            first = number
        held += size
        if alone:
            yield number, number + 1
            held = 0
    if held:
        yield first, len(sizes)


def _pass(message: torch.Tensor, source: int, to: Receiver) -> None:
    if to == "all":
        dist.broadcast(message, source)
    elif dist.get_rank() == source:
        dist.send(message, to)
    else:
        dist.recv(message, source)


def wire_device() -> torch.device:
    """Return the device from which the backend sends."""
    on_gpu = "nccl" in str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
