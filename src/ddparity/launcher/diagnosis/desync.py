"""Compares what ranks say of their collectives: pure functions on their records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .flight import DEFAULT_GROUP, Operation

Kind = Literal["mismatch", "absent", "finished", "stalled"]

# Ranks must agree on the number of elements here; elsewhere it may differ from rank to rank.
_SAME_SIZES = ("all_reduce", "allreduce", "broadcast", "reduce", "all_reduce_coalesced", "allreduce_coalesced")
# Gloo also demands it of these; NCCL gathers uneven tensors by broadcasts.
_SAME_SIZES_GLOO = ("all_gather", "allgather", "_allgather_base", "allgather_base", "all_gather_into_tensor")
# The rank that scatters or gathers, and the others, give different tensors, or none.
_ANY_DTYPE = ("scatter", "gather", "all_to_all", "alltoall", "barrier", "coalesced")
# Gloo's is of one tensor, whose rows (the first dimension) are shared out, evenly or not.
_ROWS_GLOO = ("all_to_all", "alltoall", "alltoall_base")


@dataclass(frozen=True)
class RankState:
    """What is known of one rank: its collectives, oldest first; its exit code where it has ended.

    `silent`: it runs but has not answered lately, so that what it waited in then it may have left since.
    """

    rank: int
    operations: tuple[Operation, ...] = ()
    exitcode: int | None = None
    silent: bool = False

    def last(self, group: str) -> Operation | None:
        own = [one for one in self.operations if one.group == group and not one.point_to_point]
        return own[-1] if own else None

    def pending(self, group: str) -> Operation | None:
        """The first of the group's collectives that is not done: the one that is waited in, as far as is known."""
        if self.silent or self.exitcode is not None:
            return None
        own = (one for one in self.operations if one.group == group and not one.point_to_point and one.pending)
        return next(own, None)


@dataclass(frozen=True)
class Finding:
    """What differs between the ranks of one group. `odd`: the ranks to name; `waiting`: those that wait for them."""

    kind: Kind
    group: str
    odd: tuple[int, ...]
    waiting: tuple[int, ...]
    sequence: int
    operations: Mapping[int, Operation | None] = field(default_factory=dict)

    def key(self) -> tuple[object, ...]:
        """The same for the same hang; in a stall other ranks may be silent at another look."""
        return self.kind, self.group, () if self.kind == "stalled" else self.odd, self.sequence


def stuck_groups(states: Mapping[int, RankState]) -> list[str]:
    """The groups in which a rank waits, the default one last: a sub-group's trouble is nearer to the cause."""
    found = {
        one.group for state in states.values() for one in state.operations if one.pending and not one.point_to_point
    }
    return sorted(found, key=lambda group: (group == DEFAULT_GROUP, group))


def members(states: Mapping[int, RankState], group: str, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The ranks of a group: those that one of them named, or else those that were seen in it."""
    if group in known:
        return tuple(rank for rank in known[group] if rank in states)
    if group == DEFAULT_GROUP:
        return tuple(sorted(states))
    return tuple(sorted(rank for rank, state in states.items() if state.last(group) is not None))


def find_mismatch(states: Mapping[int, RankState], group: str) -> Finding | None:
    """The first collective that ranks of the group issued differently, where one of them waits in it or after it.

    Tensors of different size or dtype are told only in a collective that somebody waits in: one that went well did.
    """
    issued: dict[int, dict[int, Operation]] = {}
    for rank, state in states.items():
        for one in state.operations:
            if one.group == group and not one.point_to_point:
                issued.setdefault(one.sequence, {})[rank] = one
    for sequence, operations in sorted(issued.items()):
        if len(operations) < 2:
            continue
        waited = any(one.pending for one in operations.values())
        signatures = {rank: _signature(one, waited) for rank, one in operations.items()}
        if len(set(signatures.values())) > 1:
            odd = _minority(signatures)
            others = tuple(sorted(set(operations) - set(odd)))
            return Finding("mismatch", group, odd, others, sequence, operations)
    return None


def _signature(one: Operation, whole: bool) -> tuple[object, ...]:
    name = one.name
    if not whole:
        return (name,)
    over_gloo = one.backend == "gloo"
    if over_gloo and name in _ROWS_GLOO:
        return (name, one.dtypes[:1], one.row)
    sized = name in _SAME_SIZES or (over_gloo and name in _SAME_SIZES_GLOO)
    return (
        name,
        None if any(name.startswith(kind) for kind in _ANY_DTYPE) else one.dtypes[:1],
        sum(one.inputs or one.outputs) if sized else None,
    )


def _minority(signatures: Mapping[int, object]) -> tuple[int, ...]:
    """The ranks that are not with the most; of equal parties, those without the lowest rank."""
    parties: dict[object, list[int]] = {}
    for rank in sorted(signatures):
        parties.setdefault(signatures[rank], []).append(rank)
    most = max(parties.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    return tuple(sorted(set(signatures) - set(most)))


def find_absent(states: Mapping[int, RankState], group: str, ranks: Iterable[int]) -> Finding | None:
    """Ranks that have not issued the collective that others wait in; `stalled` where all have: odd are silent ones.

    `finished`: an absent rank has ended well, and so will never come.
    """
    ranks = tuple(ranks)
    pending = {rank: one for rank in ranks if (one := states[rank].pending(group)) is not None}
    if not pending:
        return None
    reached = {rank: one.sequence if (one := states[rank].last(group)) is not None else 0 for rank in ranks}
    # A rank may have issued several, as DDP's reducer does; the first that somebody lacks is the one that is waited in.
    lacking = [
        (one.sequence, absent)
        for one in pending.values()
        if (absent := tuple(rank for rank in ranks if reached[rank] < one.sequence))
    ]
    operations = {rank: states[rank].pending(group) or states[rank].last(group) for rank in ranks}
    if not lacking:
        first = min(one.sequence for one in pending.values())
        if len(ranks) == 1:  # nobody else was ever seen in this group
            return Finding("absent", group, (), ranks, first, operations)
        silent = tuple(rank for rank in ranks if states[rank].silent)
        return Finding("stalled", group, silent, tuple(pending), first, operations)
    sequence, absent = min(lacking)
    waiting = tuple(rank for rank, one in pending.items() if one.sequence <= sequence or rank not in absent)
    gone = tuple(rank for rank in absent if states[rank].exitcode == 0)
    return Finding("finished" if gone else "absent", group, gone or absent, waiting, sequence, operations)


def find_left(states: Mapping[int, RankState], group: str, ranks: Iterable[int]) -> Finding | None:
    """A rank that ended well though others went on to a collective that needs it; asked once all of it is over."""
    ranks = tuple(ranks)
    reached = {rank: one.sequence if (one := states[rank].last(group)) is not None else 0 for rank in ranks}
    highest = max(reached.values(), default=0)
    gone = tuple(rank for rank in ranks if states[rank].exitcode == 0 and reached[rank] < highest)
    if not gone:
        return None
    sequence = min(reached[rank] for rank in gone) + 1
    waiting = tuple(rank for rank in ranks if reached[rank] >= sequence)
    at = {
        rank: next((one for one in states[rank].operations if one.group == group and one.sequence == sequence), None)
        for rank in ranks
    }
    return Finding(
        "finished", group, gone, waiting, sequence, {rank: at[rank] or states[rank].last(group) for rank in ranks}
    )


def describe_ranks(ranks: Iterable[int]) -> str:
    """ "rank 1", "ranks 0-3, 7"."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = ", ".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans)
    return f"rank{'s' if len(ordered) > 1 else ''} {names}"


def sentence(finding: Finding, states: Mapping[int, RankState]) -> str:
    """What a person needs to know of it, in one sentence."""
    number, place = finding.sequence, _of_group(finding.group)
    if finding.kind == "mismatch":
        calls: dict[str, list[int]] = {}
        for rank, one in sorted(finding.operations.items()):
            calls.setdefault(str(one), []).append(rank)
        said = ", ".join(
            f"{describe_ranks(ranks)} {'call' if len(ranks) > 1 else 'calls'} {call}"
            if not number_
            else f"{describe_ranks(ranks)} {call}"
            for number_, (call, ranks) in enumerate(calls.items())
        )
        return f"{said}, as collective #{number}{place}"
    waits = describe_ranks(finding.waiting)
    wait = "wait" if len(finding.waiting) > 1 else "waits"
    call = next((one for rank in finding.waiting if (one := finding.operations.get(rank)) is not None), None)
    what = f"{call} (collective #{number}{place})"
    if finding.kind == "stalled":
        if finding.odd:
            do = "do" if len(finding.odd) > 1 else "does"
            return f"{describe_ranks(finding.odd)} {do} not answer: {waits} {wait} in {what} that all have issued"
        return f"{waits} {wait} in {what} that all have issued: no data moves, the network stalls"
    if not finding.odd:
        return f"{waits} {wait} in {what} that no other rank has come to"
    odd, plural = describe_ranks(finding.odd), len(finding.odd) > 1
    lasts = {states[rank].last(finding.group) for rank in finding.odd}
    last = lasts.pop() if len(lasts) == 1 else None
    if finding.kind == "finished":
        after = f" after {last.name} #{last.sequence}" if last is not None else ""
        return f"{odd} finished{after}{place}, {waits} {wait} in {what.replace(place, '') if place else what}"
    not_there = f"{'have' if plural else 'has'} not come to it"
    after = f", {'their' if plural else 'its'} last was {last.name} #{last.sequence}" if last is not None else ""
    return f"{odd} {not_there}: {waits} {wait} in {what}{after}"


def _of_group(group: str) -> str:
    return "" if group == DEFAULT_GROUP else f" of group {group}"


_ENOUGH = 20  # polls, for shares to mean something
_SIGNIFICANT = 0.1


class Waits:
    """Counts, a poll at a time, the ranks that others waited for in a collective."""

    def __init__(self) -> None:
        self.polls = 0
        self.awaited: Counter[int] = Counter()
        self.waited: Counter[tuple[int, int]] = Counter()  # (for this rank, that rank)

    def count(self, states: Mapping[int, RankState], groups: Mapping[str, Sequence[int]]) -> None:
        """Add one poll: a rank is waited for where another waits in a collective that it has not issued yet."""
        if not groups:
            return
        self.polls += 1
        pairs = set()
        for group, ranks in groups.items():
            pending = {rank: one.sequence for rank in ranks if (one := states[rank].pending(group)) is not None}
            for rank in ranks:
                last = states[rank].last(group)
                reached = last.sequence if last is not None else 0
                pairs |= {(rank, other) for other, sequence in pending.items() if reached < sequence}
        self.awaited.update({rank for rank, _ in pairs})
        self.waited.update(pairs)

    def describe(self, always: bool = False) -> str:
        """A sentence for each rank that was waited for in a tenth of the polls or more."""
        lines = []
        for rank, count in self.awaited.most_common():
            share = count / max(1, self.polls)
            if always or (self.polls >= _ENOUGH and share >= _SIGNIFICANT):
                others = [other for (late, other) in self.waited if late == rank]
                lines.append(f"rank {rank} was waited for {share:.0%} of the time, by {describe_ranks(others)}")
        if not lines:
            return f"no rank was waited for (sampled, {self.polls} looks)" if always else ""
        return f"{'; '.join(lines)} (sampled, {self.polls} looks)"
