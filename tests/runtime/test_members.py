from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from ddparity.runtime.members import Member, collect_members, complete, publish_members
from tests.ranks import outcomes

SAYS = {
    "everything": lambda member: member,
    "no node (Open MPI)": lambda member: replace(member, node_rank=None),
    "no sizes (Slurm without tasks per node)": lambda member: replace(member, local_world_size=None),
    "local rank only": lambda member: replace(member, node_rank=None, local_world_size=None),
    "nothing (a group that the user made)": lambda member: Member(member.host, None),
}


def _layout(nodes: list[int]) -> list[Member]:
    """Return the expected list: `nodes[rank]` is a rank's machine, and machines are counted as they first appear."""
    order = list(dict.fromkeys(nodes))
    return [
        Member(f"host{node}", nodes[:rank].count(node), nodes.count(node), order.index(node))
        for rank, node in enumerate(nodes)
    ]


@pytest.mark.parametrize("says", SAYS)
@given(nodes=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_list_is_right_whatever_the_launcher_says(says: str, nodes: list[int]) -> None:
    """Ranks may be on machines in any order: in blocks, in turn (Slurm's cyclic, mpirun --map-by node), unevenly."""
    full = _layout(nodes)
    assert complete([SAYS[says](member) for member in full]) == full


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), names=st.booleans())
def test_nodes_of_one_machine(sizes: list[int], names: bool) -> None:
    """One host may stand for several nodes: they have numbers, or each of them begins with a local rank 0."""
    full = [Member("host", local, size, node) for node, size in enumerate(sizes) for local in range(size)]
    assert complete([member if names else replace(member, node_rank=None) for member in full]) == full


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([Member("a", 0, 1, 0)] * 2, "ranks 0 and 1 both claim local rank 0 of node 0: set LOCAL_RANK"),
        ([Member("a", 0), Member("a", 1), Member("a", 1)], "ranks 1 and 2 both claim local rank 1 of node 0"),
        ([Member("a", 0, gpu="u1"), Member("b", 0, gpu="u2"), Member("b", 1, gpu="u2")], "ranks 1 and 2.*GPU u2 of b"),
        ([Member("a", 0, 1, 0, "u1"), Member("a", 0, 1, 1, "u1")], "ranks 0 and 1 both claim GPU u1 of a"),
        ([Member("a", 0), Member("b", 0, error="no GPU"), Member("c", 0, error="no CPU")], r"rank 1 \(b\): no GPU"),
    ],
)
def test_contradictory_members_are_refused(members: list[Member], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete(members)


@pytest.mark.parametrize(
    "members",
    [
        [Member("a", 0, gpu="u1"), Member("b", 0, gpu="u1")],  # "cuda:0" of two machines whose driver gives no UUID
        [Member("a", 0, gpu="u1"), Member("a", 1, gpu="u2")],
        [Member("a", 0), Member("a", 1)],
    ],
)
def test_separate_gpus_are_accepted(members: list[Member]) -> None:
    assert [member.gpu for member in complete(members)] == [member.gpu for member in members]


def _called(port: int, members: list[Member], limit_s: float) -> list[Member]:
    rank = int(os.environ["MEMBER_RANK"])
    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20), wait_for_workers=False)
    return collect_members(store, rank, len(members), members[rank], time.monotonic() + limit_s)


def _rank(rank: int) -> dict[str, str]:
    return {"MEMBER_RANK": str(rank)}


def _even_ranks(number: int) -> dict[str, str]:
    return _rank(2 * number)


def _ranks_from_1(number: int) -> dict[str, str]:
    return _rank(number + 1)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def test_every_rank_gets_the_whole_list(store: TCPStore) -> None:
    full = _layout([0, 0, 1, 0])
    members = [Member(member.host, None) for member in full]
    ended = outcomes(_called, 4, store.port, members, 20, env=_rank, in_world=False)
    assert [outcome.value for outcome in ended] == [full] * 4, ended


@pytest.mark.parametrize("failed", [0, 2])
def test_an_error_of_one_member_is_raised_on_every_rank(store: TCPStore, failed: int) -> None:
    members = [Member("a", rank, error="no GPU" if rank == failed else None) for rank in range(3)]
    for outcome in outcomes(_called, 3, store.port, members, 20, env=_rank, in_world=False):
        assert outcome.error == f"RankFailure: rank {failed} (a): no GPU"
        assert outcome.seconds < 10


def test_a_contradiction_is_raised_on_every_rank(store: TCPStore) -> None:
    members = [Member("a", 0), Member("a", 1, gpu="u"), Member("a", 2, gpu="u")]
    for outcome in outcomes(_called, 3, store.port, members, 20, env=_rank, in_world=False):
        assert "RankFailure: ranks 1 and 2 both claim GPU u of a" in (outcome.error or "")


def test_rank_0_tells_all_ranks_which_are_missing(store: TCPStore) -> None:
    """Ranks 1 and 3 of 4 never join."""
    members = [Member("a", rank) for rank in range(4)]
    for outcome in outcomes(_called, 2, store.port, members, 1.0, env=_even_ranks, in_world=False):
        assert outcome.error == "TimeoutError: ranks 1, 3 did not join"
        assert outcome.seconds < 10


def test_without_rank_0_the_others_report_it(store: TCPStore) -> None:
    members = [Member("a", rank) for rank in range(3)]
    for outcome in outcomes(_called, 2, store.port, members, 0.5, env=_ranks_from_1, in_world=False):
        assert outcome.error == "TimeoutError: rank 0 did not report that all ranks joined"


def test_a_long_list_of_missing_ranks_is_cut(store: TCPStore) -> None:
    with pytest.raises(TimeoutError, match=r"^ranks 1, 2, 3, 4, 5, 6, 7, 8 … did not join$"):
        collect_members(store, 0, 20, Member("a", 0), time.monotonic())


class _Counted:
    """Record the names of the requests to a store."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.requests.append(name)
        return getattr(self._store, name)


def test_requests_of_a_rank(store: TCPStore) -> None:
    """A rank that joins when the list is there sends three requests: a set, a check, a get."""
    publish_members(store, [Member("a", 0, 2, 0), Member("a", 1, 2, 0)])
    counted = _Counted(store)
    assert len(collect_members(counted, 1, 2, Member("a", 1), time.monotonic() + 5)) == 2  # type: ignore[arg-type]
    assert counted.requests == ["set", "check", "get"]
