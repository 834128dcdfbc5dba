"""What the records of ranks show, on tables."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from ddparity.launcher.diagnosis.absence import Schedule
from ddparity.launcher.diagnosis.circle import find_circle
from ddparity.launcher.diagnosis.desync import (
    RankState,
    StragglerCount,
    called_by_all,
    describe_ranks,
    find_left,
    find_mismatch,
    find_missing,
    group_ranks,
    of_before,
    stuck_groups,
)
from ddparity.launcher.diagnosis.flight import Operation, from_json, parse_record, to_json
from ddparity.launcher.diagnosis.hang_report import headline
from ddparity.launcher.diagnosis.known import Known
from ddparity.launcher.diagnosis.messages import MachineState, pack, unpack


def _op(
    sequence: int,
    name: str = "all_reduce",
    size: int = 4,
    dtype: str = "float32",
    pending: bool = False,
    **rest: object,
) -> Operation:
    fields = {"group": "0", "backend": "gloo", "point_to_point": False, "created_s": 0.0, "row": 1}
    sizes = () if name == "barrier" else (size,)
    values = {**fields, "record": sequence, "dtypes": (dtype,), "inputs": sizes, "outputs": sizes, **rest}
    return Operation(sequence=sequence, name=name, pending=pending, **values)  # type: ignore[arg-type]


def _states(*ranks: list[Operation], exits: dict[int, int] | None = None) -> dict[int, RankState]:
    return {rank: RankState(rank, tuple(own), (exits or {}).get(rank)) for rank, own in enumerate(ranks)}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            _op(3, pending=True),
            _op(3, "broadcast", pending=True),
            "rank 0 calls all_reduce of 4 float32, rank 1 calls broadcast of 4 float32",
        ),
        (
            _op(3, pending=True),
            _op(3, size=8, pending=True),
            "rank 0 calls all_reduce of 4 float32, rank 1 calls all_reduce of 8 float32",
        ),
        (
            _op(3, pending=True),
            _op(3, dtype="float64", pending=True),
            "rank 0 calls all_reduce of 4 float32, rank 1 calls all_reduce of 4 float64",
        ),
        (  # the root of a broadcast does not wait for the others
            _op(3, "broadcast"),
            _op(3, pending=True),
            "rank 0 calls broadcast of 4 float32, rank 1 calls all_reduce of 4 float32",
        ),
        (
            _op(3, "barrier", pending=True),
            _op(3, pending=True),
            "rank 0 calls barrier, rank 1 calls all_reduce of 4 float32",
        ),
    ],
)
def test_a_mismatch_is_described_by_the_calls_of_each_rank(first: Operation, second: Operation, said: str) -> None:
    states = _states([_op(1), _op(2), first], [_op(1), _op(2), second])
    found = find_mismatch(states, "0")
    assert found is not None and (found.kind, found.sequence) == ("mismatch", 3)
    assert headline(found, states) == f"the ranks do not agree on collective #3: {said}"


def test_the_minority_is_blamed() -> None:
    ranks = [[_op(1, pending=True)], [_op(1, "barrier", pending=True)], [_op(1, pending=True)]]
    found = find_mismatch(_states(*ranks), "0")
    assert found is not None and found.blamed == (1,) and found.waiting == (0, 2)


@pytest.mark.parametrize(
    "name", ["all_to_all", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base", "alltoall_base"]
)
def test_sizes_may_differ_where_each_rank_has_its_own(name: str) -> None:
    states = _states([_op(1, name, 4, pending=True)], [_op(1, name, 8, pending=True)])
    assert find_mismatch(states, "0") is None


def test_nccl_gathers_uneven_tensors_and_gloo_does_not() -> None:
    for backend, differs in (("nccl", False), ("gloo", True)):
        ranks = [[_op(1, "all_gather", size, pending=True, backend=backend)] for size in (4, 8)]
        assert (find_mismatch(_states(*ranks), "0") is not None) == differs


@pytest.mark.parametrize("differing", [{"row": 2}, {"dtype": "float64"}], ids=str)
def test_gloos_all_to_all_needs_rows_of_one_size_and_dtype(differing: dict[str, object]) -> None:
    for backend in ("nccl", "gloo"):
        ranks = [_op(1, "all_to_all", pending=True, backend=backend, **rest) for rest in ({}, differing)]
        assert (find_mismatch(_states(*([one] for one in ranks)), "0") is not None) == (backend == "gloo")


def test_a_collective_that_all_ranks_left_is_no_mismatch() -> None:
    states = _states([_op(1, "all_gather", 4), _op(2, pending=True)], [_op(1, "all_gather", 8)])
    assert find_mismatch(states, "0") is None


def test_an_earlier_mismatch_is_the_cause_even_if_it_returned() -> None:
    states = _states([_op(1), _op(2, pending=True)], [_op(1, "broadcast"), _op(2, pending=True)])
    found = find_mismatch(states, "0")
    assert found is not None and found.sequence == 1


def test_a_collective_of_an_earlier_group_of_the_same_name_is_no_mismatch() -> None:
    """torch names a group that is created again as before, and its numbers begin at 1 again."""
    before = [_op(1, created_s=1.0), _op(2, "barrier", created_s=2.0)]
    assert find_mismatch(_states([_op(1, size=9, pending=True, created_s=3.0)], before), "0") is None
    root = [_op(1, "broadcast", created_s=3.0), _op(2, pending=True, created_s=4.0)]
    assert find_mismatch(_states(root, before), "0") is None


def test_a_rank_that_went_on_without_the_others_is_a_mismatch() -> None:
    """The root of a broadcast does not wait for them."""
    sent = _op(1, "broadcast", created_s=1.0)
    late = [_op(1, pending=True, created_s=3.0)]
    assert find_mismatch(_states([sent, _op(2, pending=True, created_s=2.0)], late), "0") is not None
    assert find_mismatch(_states([sent, _op(2, "broadcast", created_s=4.0)], late), "0") is not None
    assert find_mismatch(_states([sent], late), "0") is None  # it may be of an earlier group
    assert find_mismatch(_states([sent], late), "0", aborted=True) is not None


def test_calls_of_an_earlier_world_are_known_by_the_numbers() -> None:
    """Rank 1's call #9 is done, so rank 0 had called #9 there; now it is at #2: it is in another world."""
    old = [_op(8, created_s=8.0), _op(9, created_s=9.0)]
    new = [_op(1, record=20, created_s=11.0), _op(2, record=21, created_s=12.0, pending=True)]
    done = {rank: called_by_all(state) for rank, state in _states(old, old).items()}
    assert of_before(_states(new, old), done) == {(1, "0"): 9}
    assert of_before(_states(old, old), done) == {}
    assert of_before(_states(new, new[:1]), done) == {}  # the record of rank 1 has only calls of the new world
    early = [replace(one, created_s=1.0) for one in new]
    assert of_before(_states(early, old), done) == {}  # which of the two worlds is the older one?
    other = [replace(one, backend="nccl") for one in new]
    assert of_before(_states(other, old), done) == {}  # NCCL's numbers are not Gloo's


@pytest.mark.parametrize(
    ("name", "size", "known"),
    [("all_reduce", 4, True), ("barrier", 0, True), ("broadcast", 4, False), ("all_reduce", 0, False)],
)
def test_which_collectives_all_ranks_have_called_if_one_is_done(name: str, size: int, known: bool) -> None:
    done = RankState(0, (_op(1, name, size),))
    assert bool(called_by_all(done)) == known
    assert called_by_all(RankState(0, (_op(1, name, size, pending=True),))) == ()


@pytest.mark.parametrize(
    ("ranks", "exits", "kind", "blamed", "waiting", "said"),
    [
        (
            [[_op(8), _op(9, pending=True)], [_op(8)], [_op(8), _op(9, pending=True)]],
            {},
            "absent",
            (1,),
            (0, 2),
            "rank 1 has not called all_reduce #9: ranks 0, 2 wait in all_reduce of 4 float32 (collective #9), "
            "the last call of rank 1 was all_reduce #8",
        ),
        (
            [[_op(9, pending=True)], [_op(8)], [_op(7)]],
            {},
            "absent",
            (1, 2),
            (0,),
            "ranks 1, 2 have not called all_reduce #9: rank 0 waits in all_reduce of 4 float32 (collective #9)",
        ),
        (
            [[_op(8), _op(9, pending=True)], [_op(8)], [_op(8)]],
            {1: 0},
            "finished",
            (1,),
            (0,),
            "rank 1 finished without calling all_reduce #9: rank 0 waits in all_reduce of 4 float32 (collective #9), "
            "the last call of rank 1 was all_reduce #8",
        ),
        (
            [[_op(9, pending=True)], [_op(9, pending=True)]],
            {},
            "stalled",
            (),
            (0, 1),
            "no data moves: ranks 0, 1 wait in all_reduce of 4 float32 (collective #9), which all ranks have called",
        ),
        (  # DDP's reducer calls several at once: the ranks wait in the first one that a rank has not called
            [[_op(8, pending=True), _op(9, pending=True)], [_op(7)]],
            {},
            "absent",
            (1,),
            (0,),
            "rank 1 has not called all_reduce #8: rank 0 waits in all_reduce of 4 float32 (collective #8), "
            "the last call of rank 1 was all_reduce #7",
        ),
    ],
)
def test_the_missing_ranks_are_named(
    ranks: list[list[Operation]],
    exits: dict[int, int],
    kind: str,
    blamed: tuple[int, ...],
    waiting: tuple[int, ...],
    said: str,
) -> None:
    states = _states(*ranks, exits=exits)
    found = find_missing(states, "0", tuple(states))
    assert found is not None
    assert (found.kind, found.blamed, found.waiting) == (kind, blamed, waiting)
    assert headline(found, states) == said


@pytest.mark.parametrize(
    ("last_called", "kind", "said"),
    [
        (
            8,
            "absent",
            "rank 1 has not called all_reduce #9: rank 0 waits in all_reduce of 4 float32 (collective #9), the last",
        ),
        (9, "stalled", "rank 1 does not answer: rank 0 waits in all_reduce of 4 float32 (collective #9), which all"),
    ],
)
def test_a_silent_rank_may_have_left_the_collective_that_it_waited_in(last_called: int, kind: str, said: str) -> None:
    states = _states([_op(9, pending=True)], [_op(last_called, pending=True)])
    states[1] = replace(states[1], silent=True)
    finding = find_missing(states, "0", (0, 1))
    assert finding is not None
    assert (finding.kind, finding.blamed, finding.waiting) == (kind, (1,), (0,))
    assert headline(finding, states).startswith(said)
    machine = MachineState("host", states, frozenset({(0, "0")}), "", ())
    assert unpack(pack(machine)) == machine


def test_the_work_grows_with_the_ranks_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    states = _states(*[[_op(8), _op(9, pending=True)] for _ in range(511)], [_op(8)])
    looks, last = 0, RankState.last

    def counted(state: RankState, group: str) -> Operation | None:
        nonlocal looks
        looks += 1
        return last(state, group)

    monkeypatch.setattr(RankState, "last", counted)
    finding = find_missing(states, "0", range(512))
    assert finding is not None
    assert finding.blamed == (511,)
    assert looks < 4 * 512


def test_no_hang_without_a_pending_collective() -> None:
    states = _states([_op(1)], [])
    assert find_missing(states, "0", (0, 1)) is None
    assert stuck_groups(states) == []


def test_send_and_recv_are_not_in_the_sequence_of_collectives() -> None:
    states = _states([_op(1), _op(5, "send", pending=True, point_to_point=True)], [_op(1)])
    assert stuck_groups(states) == [] and find_mismatch(states, "0") is None


def test_a_rank_that_left_is_found_after_all_ranks_have_ended() -> None:
    states = _states([_op(1), _op(2)], [_op(1)], exits={0: 1, 1: 0})
    found = find_left(states, "0", (0, 1))
    assert found is not None and (found.blamed, found.sequence) == ((1,), 2)
    assert find_left(_states([_op(1)], [_op(1)], exits={0: 1, 1: 0}), "0", (0, 1)) is None


def test_a_sub_group_has_the_ranks_that_called_a_collective_in_it() -> None:
    states = _states([_op(1), _op(1, group="3")], [_op(1)], [_op(1, group="3")])
    assert group_ranks(states, "0", {}) == (0, 1, 2)
    assert group_ranks(states, "3", {}) == (0, 2)
    assert group_ranks(states, "3", {"3": (0, 1)}) == (0, 1)


def test_a_group_in_which_only_one_rank_called_a_collective() -> None:
    states = _states([_op(1, group="3", pending=True)], [])
    found = find_missing(states, "3", (0,))
    assert found is not None and (found.kind, found.blamed) == ("absent", ())
    assert headline(found, states).startswith("no other rank has called all_reduce #1 of group 3: rank 0 waits in")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [((1,), "rank 1"), ((0, 1), "ranks 0, 1"), ((0, 1, 2, 3, 7), "ranks 0-3, 7"), ((5, 4, 6), "ranks 4-6")],
)
def test_ranks_read_as_ranges(ranks: tuple[int, ...], said: str) -> None:
    assert describe_ranks(ranks) == said


ENTRY = {
    "collective_seq_id": 3,
    "p2p_seq_id": 0,
    "is_p2p": False,
    "input_dtypes": ["Float"],
    "input_sizes": [[4, 2]],
    "output_sizes": [[4, 2]],
    "process_group": ["0", "default_pg"],
    "profiling_name": "gloo:all_reduce",
    "record_id": 2,
    "retired": False,
    "state": "scheduled",
    "time_created_ns": 5_000_000_000,
}


def test_a_record_is_read() -> None:
    done = {**ENTRY, "state": "completed", "profiling_name": "nccl:broadcast", "collective_seq_id": 4, "record_id": 3}
    config = {"0": {"name": "0", "ranks": "[0, 1]"}, "": {"name": "", "ranks": "[1]"}}
    record = parse_record(json.dumps({"entries": [ENTRY, done], "pg_config": config}).encode())
    first, second = record.operations
    assert str(first) == "all_reduce of 8 float32" and first.pending and first.created_s == 5.0
    assert first.row == 2
    assert (second.name, second.backend, second.pending) == ("broadcast", "nccl", False)
    assert record.groups == {"0": (0, 1)}
    assert from_json(json.loads(json.dumps(to_json(record.operations)))) == record.operations


def test_a_scalar_is_one_row() -> None:
    (one,) = parse_record(json.dumps({"entries": [{**ENTRY, "input_sizes": [[]]}]}).encode()).operations
    assert one.row == 1


def test_a_group_that_was_created_again_starts_again() -> None:
    again = {**ENTRY, "collective_seq_id": 1, "record_id": 3}
    record = parse_record(json.dumps({"entries": [ENTRY, again]}).encode())
    assert [one.sequence for one in record.operations] == [1]


def test_a_group_that_was_created_again_has_another_number_in_torch() -> None:
    """A world of one collective, and another one; the groups of two backends have one name and their own numbers."""
    first = [_entry(1, 0, pg_id=0, over="nccl"), _entry(1, 1, pg_id=1), _entry(2, 2, pg_id=0, over="nccl")]
    second = [_entry(1, 3, pg_id=2, over="nccl"), _entry(1, 4, pg_id=3)]
    for entries, records in ((first, [0, 1, 2]), (first + second[:1], [1, 3]), (first + second, [3, 4])):
        record = parse_record(json.dumps({"entries": entries}).encode())
        assert [one.record for one in record.operations] == records and record.complete


def _entry(sequence: int, record: int, pg_id: int, over: str = "gloo") -> dict[str, object]:
    name = f"{over}:all_reduce"
    return {**ENTRY, "collective_seq_id": sequence, "record_id": record, "pg_id": pg_id, "profiling_name": name}


def test_a_record_whose_first_collectives_are_gone_is_not_complete() -> None:
    assert not parse_record(json.dumps({"entries": [ENTRY]}).encode()).complete


def test_a_record_without_entries_is_empty() -> None:
    assert parse_record(b'{"version": "2.10", "pg_config": {}}').operations == ()


def test_straggler_shares() -> None:
    waits = StragglerCount()
    late = _states([_op(2, pending=True)], [_op(1)], [_op(2, pending=True)])
    even = _states([_op(2)], [_op(2)], [_op(2)])
    for number in range(100):
        waits.add(late if number < 38 else even, {"0": (0, 1, 2)})
    assert waits.describe() == "ranks 0, 2 waited for rank 1 in 38% of 100 samples"
    quiet = StragglerCount()
    assert quiet.describe() == "" and quiet.describe(always=True) == "no rank waited for another rank in 0 samples"


def _agreement(name: str, ranks: tuple[int, ...], main: bool = True) -> Operation:
    own = {"group": name, "backend": "agreement", "ranks": ranks, "main": main}
    return _op(1, name, pending=True, **{**own, "record": 9, "inputs": (), "outputs": ()})


def _circle(*ranks: list[Operation], complete: bool = True) -> str:
    states = {rank: replace(one, complete=complete) for rank, one in _states(*ranks).items()}
    found = find_circle(states, lambda group: group_ranks(states, group, {}))
    return headline(found, states) if found is not None else ""


def test_ranks_that_wait_for_each_other_are_found() -> None:
    """Each rank of a circle waits for another one of it, in a group's collective or in an agreement."""
    one, two = _op(1, group="1", pending=True), _op(1, group="2", pending=True)
    both = {"1": [_op(1, group="1", pending=False)], "2": [_op(1, group="2", pending=False)]}
    early = [replace(both["1"][0], sequence=0), replace(both["2"][0], sequence=0)]  # both ranks are in both groups
    said = "the ranks wait for each other: "
    assert _circle([*early, one], [*early, two]) == (
        said
        + "rank 0 waits in all_reduce #1 of group 1 for rank 1; rank 1 waits in all_reduce #1 of group 2 for rank 0"
    )
    assert _circle([*early, one], early) == ""  # rank 1 may compute
    assert _circle([_agreement("first", (0, 1))], [_agreement("save", (0, 1))]) == (
        said + "rank 0 waits in first for rank 1; rank 1 waits in save for rank 0"
    )
    assert _circle([_agreement("first", (0, 1))], [_agreement("first", (0, 1))]) == ""  # all have come
    assert (
        _circle([_agreement("first", (0, 1), main=False)], [_agreement("save", (0, 1))]) == ""
    )  # another thread waits
    assert _circle([_agreement("first", (0, 1))], [_op(1, pending=True)]) != ""
    # A third rank that waits for the circle is not in it.
    three = _circle([_agreement("a", (0, 1))], [_agreement("b", (0, 1))], [_agreement("c", (0, 1, 2))])
    assert three == said + "rank 0 waits in a for rank 1; rank 1 waits in b for rank 0"


def test_ranks_that_wait_in_an_agreement_of_others_are_seen() -> None:
    """Behind the first rank, which has come and runs its body, or has not come: the records do not show which."""
    known = Known([])
    known.states = _states([_op(1)], [_op(1), _agreement('first("world")', (0,))], [_op(1)])
    group = 'first("world")'
    assert stuck_groups(known.states) == [group] and known.ranks_of(group) == (0, 1)
    found = find_missing(known.states, group, known.ranks_of(group))
    assert found is not None and (found.kind, found.blamed, found.waiting) == ("absent", (0,), (1,))
    assert headline(found, known.states) == 'rank 1 waits in first("world") for rank 0'
    # An agreement comes once: a rank is in its first step until it has called any collective twice.
    known.repeated = {(1, "0")}
    assert found.agreement and [known.in_first_step(found, rank) for rank in (0, 1)] == [True, False]
    ended = _states([_op(1)], [_agreement("save", (0, 1))], exits={0: 0})
    last = find_missing(ended, "save", (0, 1))
    assert last is not None and last.proof and headline(last, ended).startswith("rank 0 finished without calling save")


def test_of_several_pending_collectives_only_what_all_of_them_lack_counts() -> None:
    """The main thread may wait in any of them."""
    early = [_op(0, group="1"), _op(0, group="2")]
    pending = [_op(1, group="1", pending=True), _op(1, group="2", pending=True)]
    assert _circle([*early, *pending], [*early, pending[0]]) == ""  # rank 1 lacks group 2's alone, and rank 0 nothing
    assert _circle([*early, pending[0]], [*early, pending[1]]) != ""


def test_a_collective_that_has_left_the_record_proves_nothing() -> None:
    """Rank 1 may have called the group's collective before the oldest one that its record still has."""
    one, two = _op(1, group="1", pending=True, ranks=(0, 1)), _op(1, group="2", pending=True, ranks=(0, 1))
    assert _circle([_op(1), one], [_op(1), two]) != ""
    assert _circle([_op(70), one], [_op(70), two]) != ""
    assert _circle([_op(70), one], [_op(70), two], complete=False) == ""


def test_a_long_wait_is_told_after_a_minute_and_then_rarely() -> None:
    schedule, told = Schedule(60), []
    for second in range(0, 40_000, 10):
        if schedule.due("wait", "place", second):
            schedule.reported("wait", second)
            told.append(second)
    assert told[:6] == [60, 300, 1500, 5100, 8700, 12300]
    assert schedule.due("another", "another place", 60)


def test_a_wait_that_comes_again_is_told_where_it_lasts_longer_than_before() -> None:
    schedule = Schedule(60)
    told: dict[int, list[int]] = {}
    for epoch, seconds in enumerate((90, 100, 80, 400)):
        for second in range(0, seconds, 10):
            if schedule.due(epoch, "evaluation", second):
                schedule.reported(epoch, second)
                told.setdefault(epoch, []).append(second)
    assert told == {0: [60], 3: [140]}  # 1.5 times the longest before


def test_a_step_of_the_wall_clock_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was suspended, or its clock was set: the monotonic clock stood still."""
    known, called_s, wall = Known([]), time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 7200)
    known.tick()
    assert known.since_s(called_s) < 60
    assert 0 <= known.since_s(time.time()) < 60
