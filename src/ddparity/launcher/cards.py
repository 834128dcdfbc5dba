"""The machines of a job compare what each was started with, in the store where they met, before any process starts."""

from __future__ import annotations

import json
import platform
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo

from ..compat import PrefixStore, Store
from ..errors import RendezvousError
from .options import Launch

_COME_S = 30.0  # from the rendezvous to the card of each machine
_LEAVE_S = 5.0  # how long a machine that found a mistake stays for those that still read


@dataclass(frozen=True)
class NodeCard:
    """What one machine was started with."""

    host: str
    nproc: int
    nproc_given: bool  # as a number: then it is meant to be the same everywhere
    nnodes: str
    torch: str
    python: str
    ddparity: str


def node_card(launch: Launch) -> NodeCard:
    config = launch.config
    return NodeCard(
        socket.gethostname(),
        config.nproc_per_node,
        launch.nproc_given,
        f"{config.min_nodes}:{config.max_nodes}",
        torch.__version__,
        platform.python_version(),
        metadata.version("ddparity"),
    )


def compare_cards(cards: Sequence[NodeCard]) -> str | None:
    """What is wrong between the machines of a job, in one sentence; None: nothing."""
    for what, values, way in (
        # Builds for CUDA and for the CPU may work together; versions may not.
        ("torch", [card.torch.partition("+")[0] for card in cards], "install the same version on every machine"),
        ("ddparity", [card.ddparity for card in cards], "install the same version on every machine"),
        ("--nnodes", [card.nnodes.replace(":", " to ") for card in cards], "give the same on every machine"),
    ):
        if len(set(values)) > 1:
            return f"the machines differ in {what}: {_by_value(cards, values)}; {way}"
    given = [card for card in cards if card.nproc_given]
    if len({card.nproc for card in given}) > 1:
        found = _by_value(given, [str(card.nproc) for card in given])
        return (
            f"the machines differ in --nproc: {found}; give the same on every machine, or --nproc auto where machines "
            f"differ"
        )
    return None


def exchange_cards(store: Store, group_rank: int, group_world_size: int, card: NodeCard, timeout_s: float) -> None:
    """Compare the cards of all machines of a rendezvous. Each of them calls it once, with a store of its own round.

    Raises:
        RendezvousError: machines differ, two have the same number, or one did not come within the time-out; on every
            machine that came in time.
    """
    own = PrefixStore("ddparity/nodes", store)
    place = own.add(f"{group_rank}/count", 1) - 1
    own.set(f"{group_rank}/{place}", json.dumps(asdict(card)))
    own.add("came", 1)
    deadline = time.monotonic() + timeout_s
    while (came := own.add("came", 0)) < group_world_size and time.monotonic() < deadline:
        time.sleep(0.02)  # a store wakes nobody when a number changes
    counts = {rank: own.add(f"{rank}/count", 0) for rank in range(group_world_size)}
    cards = {
        rank: [NodeCard(**json.loads(own.get(f"{rank}/{place}"))) for place in range(count)]
        for rank, count in counts.items()
    }
    problem = _miscounted(cards) or compare_cards([found[0] for _, found in sorted(cards.items())])
    own.add("read", 1)
    if problem is None:
        return
    # The store ends with the machine that opened it, and another may still be reading.
    deadline = time.monotonic() + _LEAVE_S
    while own.add("read", 0) < came and time.monotonic() < deadline:
        time.sleep(0.02)  # a store wakes nobody when a number changes
    raise RendezvousError(problem)


def check_nodes(handler: RendezvousHandler, card: NodeCard, timeout_s: float = _COME_S) -> RendezvousHandler:
    """Have the machines compare their cards whenever they have met through `handler`."""
    meet = handler.next_rendezvous
    met: list[int] = []

    def next_rendezvous() -> RendezvousInfo:
        info = meet()
        # A static rendezvous has one store for all rounds, and after a failure its machines start again by themselves.
        if handler.get_backend() != "static" or not met:
            met.append(info.rank)
            exchange_cards(info.store, info.rank, info.world_size, card, timeout_s)
        return info

    setattr(handler, "next_rendezvous", next_rendezvous)  # noqa: B010 - mypy lets no method be assigned
    return handler


def _miscounted(cards: dict[int, list[NodeCard]]) -> str | None:
    """Two machines with one number, or none with another."""
    absent = ", ".join(str(rank) for rank, found in cards.items() if not found)
    for rank, found in cards.items():
        if len(found) > 1:
            nobody = f", and none has {absent}" if absent else ""
            hosts = " and ".join(card.host for card in found)
            return f"{len(found)} machines have number {rank} ({hosts}){nobody}: give each its own --node-rank"
    if absent:
        return f"machine {absent} met the others but did not say what it was started with: did its launcher fail?"
    return None


def _by_value(cards: Sequence[NodeCard], values: Sequence[str]) -> str:
    hosts: dict[str, list[str]] = defaultdict(list)
    for card, value in zip(cards, values):
        hosts[value].append(card.host)
    return ", ".join(f"{value} on {' and '.join(names)}" for value, names in hosts.items())
