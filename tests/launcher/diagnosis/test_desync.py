"""What ranks' records tell, on tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ddparity.launcher.diagnosis.desync import (
    RankState,
    Waits,
    describe_ranks,
    find_absent,
    find_left,
    find_mismatch,
    members,
    sentence,
    stuck_groups,
)
from ddparity.launcher.diagnosis.flight import Operation, from_json, parse, to_json
from ddparity.launcher.diagnosis.messages import Report, pack, unpack


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
            "rank 0 calls all_reduce of 4 float32, rank 1 broadcast of 4 float32, as collective #3",
        ),
        (
            _op(3, pending=True),
            _op(3, size=8, pending=True),
            "rank 0 calls all_reduce of 4 float32, rank 1 all_reduce of 8 float32, as collective #3",
        ),
        (
            _op(3, pending=True),
            _op(3, dtype="float64", pending=True),
            "rank 0 calls all_reduce of 4 float32, rank 1 all_reduce of 4 float64, as collective #3",
        ),
        (  # the root of a broadcast goes on alone
            _op(3, "broadcast"),
            _op(3, pending=True),
            "rank 0 calls broadcast of 4 float32, rank 1 all_reduce of 4 float32, as collective #3",
        ),
        (
            _op(3, "barrier", pending=True),
            _op(3, pending=True),
            "rank 0 calls barrier, rank 1 all_reduce of 4 float32, as collective #3",
        ),
    ],
)
def test_a_mismatch_is_named_by_what_each_calls(first: Operation, second: Operation, said: str) -> None:
    states = _states([_op(1), _op(2), first], [_op(1), _op(2), second])
    found = find_mismatch(states, "0")
    assert found is not None and (found.kind, found.sequence) == ("mismatch", 3)
    assert sentence(found, states) == said


def test_the_few_are_odd() -> None:
    ranks = [[_op(1, pending=True)], [_op(1, "barrier", pending=True)], [_op(1, pending=True)]]
    found = find_mismatch(_states(*ranks), "0")
    assert found is not None and found.odd == (1,) and found.waiting == (0, 2)


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
def test_parts_that_go_to_all_over_gloo_have_rows_of_one_kind(differing: dict[str, object]) -> None:
    for backend in ("nccl", "gloo"):
        ranks = [_op(1, "all_to_all", pending=True, backend=backend, **rest) for rest in ({}, differing)]
        assert (find_mismatch(_states(*([one] for one in ranks)), "0") is not None) == (backend == "gloo")


def test_what_went_well_is_no_mismatch() -> None:
    states = _states([_op(1, "all_gather", 4), _op(2, pending=True)], [_op(1, "all_gather", 8)])
    assert find_mismatch(states, "0") is None


def test_another_operation_earlier_is_the_cause_though_it_returned() -> None:
    states = _states([_op(1), _op(2, pending=True)], [_op(1, "broadcast"), _op(2, pending=True)])
    found = find_mismatch(states, "0")
    assert found is not None and found.sequence == 1


@pytest.mark.parametrize(
    ("ranks", "exits", "kind", "odd", "waiting", "said"),
    [
        (
            [[_op(8), _op(9, pending=True)], [_op(8)], [_op(8), _op(9, pending=True)]],
            {},
            "absent",
            (1,),
            (0, 2),
            "rank 1 has not come to it: ranks 0, 2 wait in all_reduce of 4 float32 (collective #9), "
            "its last was all_reduce #8",
        ),
        (
            [[_op(9, pending=True)], [_op(8)], [_op(7)]],
            {},
            "absent",
            (1, 2),
            (0,),
            "ranks 1, 2 have not come to it: rank 0 waits in all_reduce of 4 float32 (collective #9)",
        ),
        (
            [[_op(8), _op(9, pending=True)], [_op(8)], [_op(8)]],
            {1: 0},
            "finished",
            (1,),
            (0,),
            "rank 1 finished after all_reduce #8, rank 0 waits in all_reduce of 4 float32 (collective #9)",
        ),
        (
            [[_op(9, pending=True)], [_op(9, pending=True)]],
            {},
            "stalled",
            (),
            (0, 1),
            "ranks 0, 1 wait in all_reduce of 4 float32 (collective #9) that all have issued: "
            "no data moves, the network stalls",
        ),
        (  # DDP's reducer issues several; the first that somebody lacks is the one
            [[_op(8, pending=True), _op(9, pending=True)], [_op(7)]],
            {},
            "absent",
            (1,),
            (0,),
            "rank 1 has not come to it: rank 0 waits in all_reduce of 4 float32 (collective #8), "
            "its last was all_reduce #7",
        ),
    ],
)
def test_who_is_waited_for(
    ranks: list[list[Operation]],
    exits: dict[int, int],
    kind: str,
    odd: tuple[int, ...],
    waiting: tuple[int, ...],
    said: str,
) -> None:
    states = _states(*ranks, exits=exits)
    found = find_absent(states, "0", tuple(states))
    assert found is not None
    assert (found.kind, found.odd, found.waiting) == (kind, odd, waiting)
    assert sentence(found, states) == said


@pytest.mark.parametrize(
    ("last_told", "kind", "said"),
    [
        (
            8,
            "absent",
            "rank 1 has not come to it: rank 0 waits in all_reduce of 4 float32 (collective #9), its last was",
        ),
        (9, "stalled", "rank 1 does not answer: rank 0 waits in all_reduce of 4 float32 (collective #9) that all"),
    ],
)
def test_what_a_silent_rank_waited_in_is_not_known_any_more(last_told: int, kind: str, said: str) -> None:
    states = _states([_op(9, pending=True)], [_op(last_told, pending=True)])
    states[1] = replace(states[1], silent=True)
    finding = find_absent(states, "0", (0, 1))
    assert finding is not None
    assert (finding.kind, finding.odd, finding.waiting) == (kind, (1,), (0,))
    assert sentence(finding, states).startswith(said)
    report = Report("host", states, frozenset({(0, "0")}), "", ())
    assert unpack(pack(report)) == report


def test_nothing_pending_is_nothing_to_find() -> None:
    states = _states([_op(1)], [])
    assert find_absent(states, "0", (0, 1)) is None
    assert stuck_groups(states) == []


def test_point_to_point_stands_outside_of_the_sequence() -> None:
    states = _states([_op(1), _op(5, "send", pending=True, point_to_point=True)], [_op(1)])
    assert stuck_groups(states) == [] and find_mismatch(states, "0") is None


def test_who_left_is_found_when_all_is_over() -> None:
    states = _states([_op(1), _op(2)], [_op(1)], exits={0: 1, 1: 0})
    found = find_left(states, "0", (0, 1))
    assert found is not None and (found.odd, found.sequence) == ((1,), 2)
    assert find_left(_states([_op(1)], [_op(1)], exits={0: 1, 1: 0}), "0", (0, 1)) is None


def test_a_sub_group_has_the_ranks_that_were_seen_in_it() -> None:
    states = _states([_op(1), _op(1, group="3")], [_op(1)], [_op(1, group="3")])
    assert members(states, "0", {}) == (0, 1, 2)
    assert members(states, "3", {}) == (0, 2)
    assert members(states, "3", {"3": (0, 1)}) == (0, 1)


def test_a_group_that_one_rank_alone_was_seen_in() -> None:
    states = _states([_op(1, group="3", pending=True)], [])
    found = find_absent(states, "3", (0,))
    assert found is not None and (found.kind, found.odd) == ("absent", ())
    assert sentence(found, states).endswith("that no other rank has come to")


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
    record = parse(json.dumps({"entries": [ENTRY, done], "pg_config": config}).encode())
    first, second = record.operations
    assert str(first) == "all_reduce of 8 float32" and first.pending and first.created_s == 5.0
    assert first.row == 2
    assert (second.name, second.backend, second.pending) == ("broadcast", "nccl", False)
    assert record.groups == {"0": (0, 1)}
    assert from_json(json.loads(json.dumps(to_json(record.operations)))) == record.operations


def test_a_number_is_a_row() -> None:
    (one,) = parse(json.dumps({"entries": [{**ENTRY, "input_sizes": [[]]}]}).encode()).operations
    assert one.row == 1


def test_a_group_that_was_made_anew_begins_anew() -> None:
    again = {**ENTRY, "collective_seq_id": 1, "record_id": 3}
    record = parse(json.dumps({"entries": [ENTRY, again]}).encode())
    assert [one.sequence for one in record.operations] == [1]


def test_a_record_without_entries_is_empty() -> None:
    assert parse(b'{"version": "2.10", "pg_config": {}}').operations == ()


def test_shares_of_waiting() -> None:
    waits = Waits()
    late = _states([_op(2, pending=True)], [_op(1)], [_op(2, pending=True)])
    even = _states([_op(2)], [_op(2)], [_op(2)])
    for number in range(100):
        waits.count(late if number < 38 else even, {"0": (0, 1, 2)})
    assert waits.describe() == "rank 1 was waited for 38% of the time, by ranks 0, 2 (sampled, 100 looks)"
    quiet = Waits()
    assert quiet.describe() == "" and quiet.describe(always=True) == "no rank was waited for (sampled, 0 looks)"
