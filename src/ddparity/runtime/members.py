"""Who runs where: each rank posts a card into the store, rank 0 reads them all and posts the roster."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from ..compat import Store
from ..errors import RankFailure
from .environment import Placement, find_placement

_POLL_S = (0.001, 0.1)  # first and longest pause between two looks at the store
_GRACE_S = 1.0  # from the deadline, for rank 0's word on who is missing to reach the others
_HOLD_S = 5.0  # how long rank 0 keeps the store for ranks that have not read an error


@dataclass(frozen=True)
class Card:
    """One rank's place. What its launcher did not say is None until the roster is made. `gpu`: its GPU's UUID."""

    host: str
    local_rank: int | None
    local_world_size: int | None = None
    node_rank: int | None = None
    gpu: str | None = None
    error: str | None = None


def own_card(placement: Placement | None) -> Card:
    if placement is None:
        return Card(socket.gethostname(), None)
    return Card(socket.gethostname(), placement.local_rank, placement.local_world_size, placement.node_rank)


def call_roll(store: Store, rank: int, world_size: int, card: Card, deadline: float) -> list[Card]:
    """Every rank's card, complete, on every rank. All ranks call it; two store requests a rank and a poll.

    Raises:
        TimeoutError: ranks are missing at `deadline` (of `time.monotonic`); names them where rank 0 came.
        RankFailure: a rank's card carries an error.
        ValueError: two ranks claim the same place or the same GPU.
    """
    store.set(f"roster/{rank}", json.dumps(asdict(card)))
    if rank == 0:
        _answer(store, world_size, deadline)
    return _read(store, rank, deadline + _GRACE_S)


def _answer(store: Store, world_size: int, deadline: float) -> None:
    """Rank 0 posts the roster, or why there is none."""
    keys = [f"roster/{rank}" for rank in range(world_size)]
    missing: list[int] = []
    if not _appear(store, keys, deadline):
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    answer: dict[str, object]
    if missing:
        answer = {"missing": _numbers("rank", missing) + " did not come"}
    else:
        cards = [Card(**json.loads(value)) for value in store.multi_get(keys)]
        try:
            answer = {"cards": [asdict(card) for card in complete(cards)]}
        except ValueError as error:
            failed = next((rank for rank, card in enumerate(cards) if card.error), -1)
            answer = {"error": str(error), "rank": failed}
    store.set("roster", json.dumps(answer))
    if "cards" not in answer:
        # The store may end with this process: those who came read the answer first.
        others = [f"roster/{rank}/read" for rank in range(1, world_size) if rank not in missing]
        _appear(store, others, time.monotonic() + (_GRACE_S if missing else _HOLD_S))


def _appear(store: Store, keys: list[str], deadline: float) -> bool:
    """Wait for keys of the store; False where one is missing at the deadline."""
    pause = _POLL_S[0]
    while keys and not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1])
    return True


def _read(store: Store, rank: int, deadline: float) -> list[Card]:
    if not _appear(store, ["roster"], deadline):
        raise TimeoutError("rank 0 did not report that all ranks came")
    answer = json.loads(store.get("roster"))
    if "cards" not in answer:
        store.set(f"roster/{rank}/read", "")
    if "missing" in answer:
        raise TimeoutError(answer["missing"])
    if "error" in answer:
        raise RankFailure(answer["error"], answer["rank"])
    return [Card(**card) for card in answer["cards"]]


def publish(store: Store, cards: list[Card]) -> None:
    """Put a complete roster where `roster` finds it. Every rank does, before it asks: one request, the same value."""
    store.set("roster", json.dumps({"cards": [asdict(card) for card in cards]}))


def roster(store: Store, timeout_s: float = 60.0) -> list[Card]:
    """The roster of the default group. Where its ranks did not come through `world()`, all of them call the roll."""
    if not store.check(["roster"]):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        placement = find_placement()
        ours = placement is not None and (placement.rank, placement.world_size) == (rank, world_size)
        card = own_card(placement if ours else None)
        return call_roll(store, rank, world_size, card, time.monotonic() + timeout_s)
    return _read(store, dist.get_rank(), time.monotonic())


def complete(cards: list[Card]) -> list[Card]:
    """Fill in what launchers do not say, from hosts and the order of ranks; refuse what cannot be.

    A local rank 0 begins a node; a rank with another one belongs to the latest node of its host.
    """
    for rank, card in enumerate(cards):
        if card.error:
            raise ValueError(f"rank {rank} ({card.host}): {card.error}")
    nodes: list[int] = []
    latest: dict[str, int] = {}
    for card in cards:
        if card.node_rank is not None:
            node = card.node_rank
        elif card.host in latest and card.local_rank != 0:
            node = latest[card.host]
        else:
            node = max(nodes, default=-1) + 1
        latest[card.host] = node
        nodes.append(node)
    full = [
        replace(
            card,
            local_rank=card.local_rank if card.local_rank is not None else nodes[:rank].count(node),
            local_world_size=card.local_world_size or nodes.count(node),
            node_rank=node,
        )
        for rank, (card, node) in enumerate(zip(cards, nodes, strict=True))
    ]
    _refuse_shared(
        full, lambda card: (card.node_rank, card.local_rank), "local rank {0[1]} of node {0[0]}: set LOCAL_RANK"
    )
    _refuse_shared(
        full,
        lambda card: card.gpu and (card.host, card.gpu),
        "GPU {0[1]} of {0[0]}: set LOCAL_RANK, or start at most one process a GPU",
    )
    return full


def _refuse_shared(cards: list[Card], place: Callable[[Card], object], text: str) -> None:
    taken: dict[object, int] = {}
    for rank, card in enumerate(cards):
        key = place(card)
        if key and taken.setdefault(key, rank) != rank:
            raise ValueError(f"ranks {taken[key]} and {rank} both claim " + text.format(key))


def _numbers(noun: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}"
