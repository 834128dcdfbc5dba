from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from ddparity.runtime.members import Card, call_roll, complete, publish
from tests.ranks import outcomes

SAYS = {
    "everything": lambda card: card,
    "no node (Open MPI)": lambda card: replace(card, node_rank=None),
    "no sizes (Slurm without tasks per node)": lambda card: replace(card, local_world_size=None),
    "local rank only": lambda card: replace(card, node_rank=None, local_world_size=None),
    "nothing (a group made by hand)": lambda card: Card(card.host, None),
}


def _layout(nodes: list[int]) -> list[Card]:
    """The oracle: `nodes[rank]` is a rank's machine; machines are counted as they first appear."""
    order = list(dict.fromkeys(nodes))
    return [
        Card(f"host{node}", nodes[:rank].count(node), nodes.count(node), order.index(node))
        for rank, node in enumerate(nodes)
    ]


@pytest.mark.parametrize("says", SAYS)
@given(nodes=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_whatever_the_launcher_says_the_roster_is_the_machines(says: str, nodes: list[int]) -> None:
    """Ranks in any order over machines: in blocks, in turn (Slurm's cyclic, mpirun --map-by node), uneven."""
    full = _layout(nodes)
    assert complete([SAYS[says](card) for card in full]) == full


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), names=st.booleans())
def test_nodes_of_one_machine(sizes: list[int], names: bool) -> None:
    """Several nodes simulated on one host, by their numbers or by a local rank 0 that begins one."""
    full = [Card("host", local, size, node) for node, size in enumerate(sizes) for local in range(size)]
    assert complete([card if names else replace(card, node_rank=None) for card in full]) == full


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ([Card("a", 0, 1, 0), Card("a", 0, 1, 0)], "ranks 0 and 1 both claim local rank 0 of node 0: set LOCAL_RANK"),
        ([Card("a", 0), Card("a", 1), Card("a", 1)], "ranks 1 and 2 both claim local rank 1 of node 0"),
        ([Card("a", 0, gpu="u1"), Card("b", 0, gpu="u2"), Card("b", 1, gpu="u2")], "ranks 1 and 2.*GPU u2 of b"),
        ([Card("a", 0, 1, 0, "u1"), Card("a", 0, 1, 1, "u1")], "ranks 0 and 1 both claim GPU u1 of a"),
        ([Card("a", 0), Card("b", 0, error="no GPU"), Card("c", 0, error="no CPU")], r"rank 1 \(b\): no GPU"),
    ],
)
def test_what_cannot_be_is_refused(cards: list[Card], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete(cards)


@pytest.mark.parametrize(
    "cards",
    [
        [Card("a", 0, gpu="u1"), Card("b", 0, gpu="u1")],  # "cuda:0" of two machines, where a driver has no UUID
        [Card("a", 0, gpu="u1"), Card("a", 1, gpu="u2")],
        [Card("a", 0), Card("a", 1)],
    ],
)
def test_gpus_of_their_own_are_accepted(cards: list[Card]) -> None:
    assert [card.gpu for card in complete(cards)] == [card.gpu for card in cards]


def _called(port: int, cards: list[Card], limit_s: float) -> list[Card]:
    rank = int(os.environ["PLACE"])
    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20), wait_for_workers=False)
    return call_roll(store, rank, len(cards), cards[rank], time.monotonic() + limit_s)


def _place(rank: int) -> dict[str, str]:
    return {"PLACE": str(rank)}


def _even_places(number: int) -> dict[str, str]:
    return _place(2 * number)


def _places_from_1(number: int) -> dict[str, str]:
    return _place(number + 1)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def test_every_rank_gets_the_whole_roster(store: TCPStore) -> None:
    full = _layout([0, 0, 1, 0])
    cards = [Card(card.host, None) for card in full]
    ended = outcomes(_called, 4, store.port, cards, 20, env=_place, in_world=False)
    assert [outcome.value for outcome in ended] == [full] * 4, ended


@pytest.mark.parametrize("failed", [0, 2])
def test_an_error_on_one_card_is_raised_on_every_rank(store: TCPStore, failed: int) -> None:
    cards = [Card("a", rank, error="no GPU" if rank == failed else None) for rank in range(3)]
    for outcome in outcomes(_called, 3, store.port, cards, 20, env=_place, in_world=False):
        assert outcome.error == f"RankFailure: rank {failed} (a): no GPU"
        assert outcome.seconds < 10


def test_a_contradiction_is_raised_on_every_rank(store: TCPStore) -> None:
    cards = [Card("a", 0), Card("a", 1, gpu="u"), Card("a", 2, gpu="u")]
    for outcome in outcomes(_called, 3, store.port, cards, 20, env=_place, in_world=False):
        assert "RankFailure: ranks 1 and 2 both claim GPU u of a" in (outcome.error or "")


def test_rank_0_names_the_missing_to_all(store: TCPStore) -> None:
    """Ranks 1 and 3 of 4 never come."""
    cards = [Card("a", rank) for rank in range(4)]
    for outcome in outcomes(_called, 2, store.port, cards, 1.0, env=_even_places, in_world=False):
        assert outcome.error == "TimeoutError: ranks 1, 3 did not come"
        assert outcome.seconds < 10


def test_without_rank_0_the_others_say_so(store: TCPStore) -> None:
    cards = [Card("a", rank) for rank in range(3)]
    for outcome in outcomes(_called, 2, store.port, cards, 0.5, env=_places_from_1, in_world=False):
        assert outcome.error == "TimeoutError: rank 0 did not report that all ranks came"


def test_a_long_list_of_missing_ranks_is_cut(store: TCPStore) -> None:
    with pytest.raises(TimeoutError, match=r"^ranks 1, 2, 3, 4, 5, 6, 7, 8 … did not come$"):
        call_roll(store, 0, 20, Card("a", 0), time.monotonic())


class _Counted:
    """Counts what goes over the wire."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.requests.append(name)
        return getattr(self._store, name)


def test_requests_of_a_rank(store: TCPStore) -> None:
    """Whoever comes after the roster is there: a set, a check, a get. `roster` then needs no roll."""
    publish(store, [Card("a", 0, 2, 0), Card("a", 1, 2, 0)])
    counted = _Counted(store)
    assert len(call_roll(counted, 1, 2, Card("a", 1), time.monotonic() + 5)) == 2  # type: ignore[arg-type]
    assert counted.requests == ["set", "check", "get"]
