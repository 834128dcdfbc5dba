"""Collect what each rank knows of itself (its host, local rank, node and GPU) into one list that every rank has.

Each rank writes its entry into the store. Rank 0 reads them all, completes them, and writes the list.
"""

from __future__ import annotations

import functools
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from ..compat import Store
from ..errors import RankFailure
from .environment import Placement, find_placement

_POLL_S = (0.001, 0.1)  # shortest and longest pause between two requests of a poll, for up to 256 ranks
_GRACE_S = 1.0  # after the deadline, until the other ranks have read from rank 0 which ranks are missing
_HOLD_S = 5.0  # how long rank 0 keeps the store for ranks that have not read an error


@dataclass(frozen=True)
class Member:
    """One rank. What its launcher does not say is None until the list is complete. `gpu`: its GPU's UUID."""

    host: str
    local_rank: int | None
    local_world_size: int | None = None
    node_rank: int | None = None
    gpu: str | None = None
    error: str | None = None


def this_member(placement: Placement | None) -> Member:
    """Return this rank's entry, from what its launcher says."""
    if placement is None:
        return Member(socket.gethostname(), None)
    return Member(socket.gethostname(), placement.local_rank, placement.local_world_size, placement.node_rank)


def collect_members(store: Store, rank: int, world_size: int, member: Member, deadline: float) -> list[Member]:
    """Return the complete list of members, in rank order. All ranks call it.

    Collectives: none; each rank sends two requests to the store and polls it.

    Raises:
        TimeoutError: ranks are missing at `deadline` (of `time.monotonic`). The error names them if rank 0 is there.
        RankFailure: a member has an error, or two ranks claim the same local rank of a node or the same GPU.
    """
    store.set(f"roster/{rank}", json.dumps(asdict(member)))
    if rank == 0:
        _write_list(store, world_size, deadline)
    return _read_list(store, rank, deadline + _GRACE_S, world_size)


def publish_members(store: Store, members: list[Member]) -> None:
    """Write a complete list to where `members` reads it: one request, of one rank for all."""
    store.set("roster", json.dumps({"cards": _rows(members)}))


def _rows(members: list[Member]) -> dict[str, list[Any]]:
    """Return a complete list in short, without the GPUs: every rank reads it. `_members` is the inverse."""
    hosts = list(dict.fromkeys(member.host for member in members))
    place = {host: number for number, host in enumerate(hosts)}
    rows = [[place[one.host], one.local_rank, one.local_world_size, one.node_rank] for one in members]
    return {"hosts": hosts, "rows": rows}


@functools.lru_cache(maxsize=2)  # 1,024 members take milliseconds, and `first` asks for them each time
def _members(text: bytes) -> tuple[Member, ...]:
    found = json.loads(text)["cards"]
    return tuple(Member(found["hosts"][place], *numbers) for place, *numbers in found["rows"])


def members(store: Store, timeout_s: float = 60.0) -> list[Member]:
    """Return the members of the default process group, in rank order.

    If its ranks did not join through `world()`, the first call collects the list, and all ranks must call it.
    """
    if not store.check(["roster"]):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        placement = find_placement()
        is_ours = placement is not None and (placement.rank, placement.world_size) == (rank, world_size)
        member = this_member(placement if is_ours else None)
        return collect_members(store, rank, world_size, member, time.monotonic() + timeout_s)
    return _read_list(store, dist.get_rank(), time.monotonic())


def _write_list(store: Store, world_size: int, deadline: float) -> None:
    """Write the list, or the reason why there is none. Rank 0 calls it."""
    keys = [f"roster/{rank}" for rank in range(world_size)]
    missing: list[int] = []
    if not _wait_for_keys(store, keys, deadline):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    answer: dict[str, object]
    if missing:
        answer = {"missing": _numbers("rank", missing) + " did not join"}
    else:
        found = [Member(**json.loads(value)) for value in store.multi_get(keys)]
        try:
            answer = {"cards": _rows(complete(found))}
        except ValueError as error:
            failed = next((rank for rank, member in enumerate(found) if member.error), -1)
            answer = {"error": str(error), "rank": failed}
    store.set("roster", json.dumps(answer))
    if "cards" not in answer:
        # The store may end with this process: wait until the other ranks have read the answer.
        others = [f"roster/{rank}/read" for rank in range(1, world_size) if rank not in missing]
        _wait_for_keys(store, others, time.monotonic() + (_GRACE_S if missing else _HOLD_S))


def _read_list(store: Store, rank: int, deadline: float, world_size: int = 1) -> list[Member]:
    if not _wait_for_keys(store, ["roster"], deadline, world_size):
        raise TimeoutError("rank 0 did not report that all ranks joined")
    text = store.get("roster")
    if text.startswith(b'{"cards"'):
        return list(_members(text))
    answer = json.loads(text)
    store.set(f"roster/{rank}/read", "")
    if "missing" in answer:
        raise TimeoutError(answer["missing"])
    raise RankFailure(answer["error"], answer["rank"])


def _wait_for_keys(store: Store, keys: list[str], deadline: float, waiting: int = 1) -> bool:
    """Wait until the store has all keys; return False where one is missing at the deadline.

    `waiting`: the number of ranks that wait at the same time. The more they are, the less often each asks.
    """
    times = max(1.0, waiting / 256)
    pause = _POLL_S[0] * times
    while keys and not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1] * times)
    return True


def complete(members: list[Member]) -> list[Member]:
    """Fill in what the launcher does not say, from the host names and the order of ranks.

    A local rank 0 begins a node. A rank with another local rank belongs to the latest node of its host.

    Raises:
        ValueError: a member has an error, or two ranks claim the same local rank of a node or the same GPU.
    """
    for rank, member in enumerate(members):
        if member.error:
            raise ValueError(f"rank {rank} ({member.host}): {member.error}")
    nodes: list[int] = []
    latest: dict[str, int] = {}
    for member in members:
        if member.node_rank is not None:
            node = member.node_rank
        elif member.host in latest and member.local_rank != 0:
            node = latest[member.host]
        else:
            node = max(nodes, default=-1) + 1
        latest[member.host] = node
        nodes.append(node)
    full = [
        replace(
            member,
            local_rank=member.local_rank if member.local_rank is not None else nodes[:rank].count(node),
            local_world_size=member.local_world_size or nodes.count(node),
            node_rank=node,
        )
        for rank, (member, node) in enumerate(zip(members, nodes, strict=True))
    ]
    _refuse_shared(full, lambda m: (m.node_rank, m.local_rank), "local rank {0[1]} of node {0[0]}: set LOCAL_RANK")
    _refuse_shared(
        full,
        lambda m: m.gpu and (m.host, m.gpu),
        "GPU {0[1]} of {0[0]}: set LOCAL_RANK, or start at most one process for each GPU",
    )
    return full


def _refuse_shared(members: list[Member], key_of: Callable[[Member], object], text: str) -> None:
    """Raise ValueError where two ranks have the same key. `text` describes the key, and says what to do."""
    owners: dict[object, int] = {}
    for rank, member in enumerate(members):
        key = key_of(member)
        if key and owners.setdefault(key, rank) != rank:
            raise ValueError(f"ranks {owners[key]} and {rank} both claim " + text.format(key))


def _numbers(noun: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}"
