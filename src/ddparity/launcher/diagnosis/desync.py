"""Compare the collectives that the ranks of a process group called: pure functions of their flight records.

`find_mismatch`, `find_missing` and `find_left` each look for one kind of hang. `StragglerCount` counts for which ranks
the others wait while a job runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .flight import AGREEMENT, DEFAULT_GROUP, Operation

Kind = Literal["mismatch", "circle", "absent", "finished", "stalled"]
PROOFS = ("mismatch", "circle", "finished")  # such a hang cannot end by itself; the others may

# The number of elements must be the same on all ranks in these; in other collectives it may differ.
_SAME_SIZES = ("all_reduce", "allreduce", "broadcast", "reduce", "all_reduce_coalesced", "allreduce_coalesced")
# Gloo requires it in these, too. NCCL gathers tensors of different sizes by broadcasts.
_SAME_SIZES_GLOO = ("all_gather", "allgather", "_allgather_base", "allgather_base", "all_gather_into_tensor")
# The dtype is not compared in these: the root gives other tensors than the other ranks, or there are no tensors.
_ANY_DTYPE = ("scatter", "gather", "all_to_all", "alltoall", "barrier", "coalesced")
# Over Gloo these send rows (indices of the first dimension) of one tensor: ranks may have different numbers of them.
_ROWS_GLOO = ("all_to_all", "alltoall", "alltoall_base")
# No rank has returned from these before all have called them; from some others if a rank gives or gets no elements.
_TWO_WAY = ("all_reduce", "allreduce", "reduce_scatter", "barrier")
# A rank may return from these before another rank calls them: it only sends.
_ONE_WAY = ("broadcast", "reduce", "gather", "scatter")


@dataclass(frozen=True)
class RankState:
    """What is known of one rank: its collectives, oldest first, and its exit code if it has ended.

    `silent`: the rank runs but has not answered lately. It may have left the collective that it last waited in.
    `complete`: no collective has left its record, which has its last ones only.
    """

    rank: int
    operations: tuple[Operation, ...] = ()
    exitcode: int | None = None
    silent: bool = False
    complete: bool = True

    def last(self, group: str) -> Operation | None:
        """Return the last collective that the rank called in a group."""
        own = [one for one in self.operations if one.group == group and not one.point_to_point]
        return own[-1] if own else None

    def reached(self, group: str) -> int:
        """Return the sequence number of the last collective that the rank called in a group; 0 if none is known."""
        last = self.last(group)
        return last.sequence if last is not None else 0

    def waits(self) -> Operation | None:
        """Return what the rank waits in: an agreement of its main thread, or else its first pending collective."""
        if self.silent or self.exitcode is not None:
            return None
        pending = [one for one in self.operations if one.pending and not one.point_to_point]
        return next((one for one in pending if one.main), pending[0] if pending else None)

    def agrees(self, group: str) -> bool:
        """Return whether a group of this name is an agreement in which the rank waits."""
        return any(one.group == group and one.backend == AGREEMENT for one in self.operations)

    def shown(self, group: str = "") -> Operation | None:
        """Return the operation that a report shows: what the rank waits in, in a group or anywhere, or its last one."""
        if group:
            return self.pending(group) or self.last(group)
        calls = [one for one in self.operations if not one.point_to_point]
        return self.waits() or (calls[-1] if calls else None)

    def pending(self, group: str) -> Operation | None:
        """Return the first collective of a group that is not done, which is the one that the rank waits in."""
        if self.silent or self.exitcode is not None:
            return None
        own = (one for one in self.operations if one.group == group and not one.point_to_point and one.pending)
        return next(own, None)


@dataclass(frozen=True)
class Finding:
    """A hang in one process group.

    `blamed`: the ranks that cause it, as far as is known. `waiting`: the ranks that wait for them. `sequence`: the
    number of the collective. `operations`: the call of each rank that a report shows.

    `kind`: "mismatch": ranks called different collectives; "circle": each of the waiting ranks waits for another one
    of them, which `awaited` tells; "absent": the blamed ranks have not called the collective;
    "finished": they ended with exit code 0 and did not call it; "stalled": all ranks have called it, the blamed ranks
    do not answer.
    """

    kind: Kind
    group: str
    blamed: tuple[int, ...]
    waiting: tuple[int, ...]
    sequence: int
    operations: Mapping[int, Operation | None] = field(default_factory=dict)
    awaited: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def proof(self) -> bool:
        """Whether the hang cannot end by itself."""
        return self.kind in PROOFS

    def key(self) -> tuple[object, ...]:
        """Return what stays the same while the same hang lasts. In a stall, the silent ranks may change."""
        return self.kind, self.group, () if self.kind == "stalled" else self.blamed, self.sequence

    def place(self) -> tuple[object, ...]:
        """Return what is the same in waits that come again, as at the end of each epoch."""
        names = {one.name for one in self._awaited_calls()}
        return self.kind, self.group, self.blamed, *sorted(names)

    def waited_since_s(self) -> float:
        """Return when the first of the waiting ranks called the collective, in seconds since 1970."""
        return min((one.created_s for one in self._awaited_calls()), default=0.0)

    def timeout_s(self) -> float | None:
        """Return the time-out of the group; None if it is unknown."""
        return min((one.timeout_s for one in self._awaited_calls() if one.timeout_s is not None), default=None)

    @property
    def agreement(self) -> bool:
        """Whether the ranks wait in an agreement of ddparity, which ends by itself where a rank does not come."""
        return any(one.backend == AGREEMENT for one in self._awaited_calls())

    def _awaited_calls(self) -> list[Operation]:
        found = (self.operations.get(rank) for rank in self.waiting)
        return [one for one in found if one is not None and one.pending]


def stuck_groups(states: Mapping[int, RankState]) -> list[str]:
    """Return the groups in which a rank waits, the default group last: a hang of a sub-group is nearer to the cause."""
    return default_last(
        one.group for state in states.values() for one in state.operations if one.pending and not one.point_to_point
    )


def default_last(groups: Iterable[str]) -> list[str]:
    """Return each group once, in alphabetical order, the default group last."""
    return sorted(set(groups), key=lambda group: (group == DEFAULT_GROUP, group))


def group_ranks(states: Mapping[int, RankState], group: str, known: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the ranks of a group: those that a rank named (`known`), or those that called a collective in it."""
    operations = (one for state in states.values() for one in state.operations)
    told = next((one.ranks for one in operations if one.ranks and one.group == group), ())
    if told:
        # Ranks that run behind the first one wait in its agreement, too.
        return tuple(sorted(rank for rank in states if rank in told or states[rank].agrees(group)))
    if group in known:
        return tuple(rank for rank in known[group] if rank in states)
    if group == DEFAULT_GROUP:
        return tuple(sorted(states))
    return tuple(sorted(rank for rank, state in states.items() if state.last(group) is not None))


def called_by_all(state: RankState) -> tuple[Operation, ...]:
    """Return the last collective of each group and backend that all ranks have called: it is done on this rank."""
    found = {}
    for one in state.operations:
        moves = one.name == "barrier" or sum(one.inputs or one.outputs) > 0
        if moves and one.name.startswith(_TWO_WAY) and not (one.pending or one.point_to_point):
            found[one.group, one.backend] = one
    return tuple(found.values())


def of_before(states: Mapping[int, RankState], done: Mapping[int, Sequence[Operation]]) -> dict[tuple[int, str], int]:
    """Return which calls are of an earlier group of the same name: by (rank, group), the record of the last one.

    `states`: as they are now. `done`: by rank, what `called_by_all` returned at an earlier time. All ranks of that
    group had called it then. So a rank whose numbers are lower now is in another group. If it has called a collective
    there since, the other rank has not come there, or has made no call there yet. Times of calls are compared: it is
    for the ranks of one machine.
    """
    last: dict[tuple[str, str], list[Operation]] = {}
    for state in states.values():
        calls = {(one.group, one.backend): one for one in state.operations if not one.point_to_point}
        for key, one in calls.items():
            last.setdefault(key, []).append(one)
    found = {}
    for rank in states.keys() & done.keys():
        for one in done[rank]:
            own = [each.record for each in states[rank].operations if each.group == one.group]
            later = any(
                other.sequence < one.sequence and other.created_s > one.created_s
                for other in last.get((one.group, one.backend), ())
            )
            if later and one.record in own:  # otherwise the rank has called a collective in a later group, too
                found[rank, one.group] = max(own)
    return found


def find_mismatch(states: Mapping[int, RankState], group: str, aborted: bool = False) -> Finding | None:
    """Return the first collective of a group that ranks called differently.

    Sizes and dtypes are compared only if a rank waits in that collective: if all ranks have returned, they fitted.
    `aborted`: a rank has aborted, as Gloo does where sizes differ. The others may have returned from that collective.
    """
    called: dict[int, dict[int, Operation]] = {}
    for rank, state in states.items():
        for one in state.operations:
            if one.group == group and not one.point_to_point:
                called.setdefault(one.sequence, {})[rank] = one
    for sequence, operations in sorted(called.items()):
        newest_s = max(one.created_s for one in operations.values())
        operations = {
            rank: one for rank, one in operations.items() if aborted or not _is_of_before(states[rank], one, newest_s)
        }
        if len(operations) < 2:
            continue
        waited = any(one.pending for one in operations.values())
        # Ranks may give an all-to-all other numbers of rows; but Gloo aborts a rank that waits where they do not fit.
        signatures = {rank: _signature(one, waited, waited and aborted) for rank, one in operations.items()}
        if len(set(signatures.values())) > 1:
            blamed = _minority(signatures)
            others = tuple(sorted(set(operations) - set(blamed)))
            return Finding("mismatch", group, blamed, others, sequence, operations)
    return None


def _is_of_before(state: RankState, one: Operation, newest_s: float) -> bool:
    """Return whether a collective may be of an earlier group of the same name, whose numbers also began at 1.

    `newest_s`: when the last rank called the collective of this number. A rank that has returned and that has called
    nothing since then in the group says nothing about that call. An exception: it waits in a later collective, and
    could reach that one without the other ranks.
    """
    own = [each for each in state.operations if each.group == one.group and not each.point_to_point]
    if one.pending or own[-1].created_s >= newest_s:
        return False
    waits = state.pending(one.group)
    passed = [each.name for each in own if waits is not None and one.sequence <= each.sequence < waits.sequence]
    return not passed or any(name not in _ONE_WAY for name in passed)


def _signature(one: Operation, with_tensors: bool, with_rows: bool) -> tuple[object, ...]:
    """Return what must be the same on all ranks: the name of the collective, and what it requires of its tensors.

    `with_rows`: also of a collective to which ranks may give other numbers of rows.
    """
    name = one.name
    if not with_tensors:
        return (name,)
    over_gloo = one.backend == "gloo"
    if over_gloo and name in _ROWS_GLOO and not with_rows:
        return (name, one.dtypes[:1], one.row)
    sized = name in _SAME_SIZES or (over_gloo and name in (*_SAME_SIZES_GLOO, *_ROWS_GLOO))
    return (
        name,
        None if any(name.startswith(kind) for kind in _ANY_DTYPE) else one.dtypes[:1],
        sum(one.inputs or one.outputs) if sized else None,
    )


def _minority(signatures: Mapping[int, object]) -> tuple[int, ...]:
    """Return the ranks outside the largest party; of two equal parties, the one with the lowest rank is the largest."""
    parties: dict[object, list[int]] = {}
    for rank in sorted(signatures):
        parties.setdefault(signatures[rank], []).append(rank)
    most = max(parties.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    return tuple(sorted(set(signatures) - set(most)))


def find_missing(states: Mapping[int, RankState], group: str, ranks: Iterable[int]) -> Finding | None:
    """Return which of a group's ranks have not called the collective that other ranks wait in; None if no rank waits.

    The kind is "finished" if a missing rank ended with exit code 0: it will never call the collective. It is "stalled"
    if no rank is missing.
    """
    ranks = tuple(ranks)
    pending = {rank: one for rank in ranks if (one := states[rank].pending(group)) is not None}
    if not pending:
        return None
    # A rank may have called several collectives at once, as DDP's reducer does. The first one that a rank has not
    # called is the one that the others wait in.
    reached = {rank: states[rank].reached(group) for rank in ranks}
    lacking = [
        (sequence, missing)
        for sequence in {one.sequence for one in pending.values()}
        if (missing := tuple(rank for rank in ranks if reached[rank] < sequence))
    ]
    operations = {rank: states[rank].pending(group) or states[rank].last(group) for rank in ranks}
    if not lacking:
        first = min(one.sequence for one in pending.values())
        if len(ranks) == 1:  # no other rank was ever seen in this group
            return Finding("absent", group, (), ranks, first, operations)
        silent = tuple(rank for rank in ranks if states[rank].silent)
        return Finding("stalled", group, silent, tuple(pending), first, operations)
    sequence, missing = min(lacking)
    absent = set(missing)
    waiting = tuple(rank for rank, one in pending.items() if one.sequence <= sequence or rank not in absent)
    finished = tuple(rank for rank in missing if states[rank].exitcode == 0)
    return Finding("finished" if finished else "absent", group, finished or missing, waiting, sequence, operations)


def find_left(states: Mapping[int, RankState], group: str, ranks: Iterable[int]) -> Finding | None:
    """Return the ranks that ended with exit code 0 before a collective that other ranks called.

    For ranks that have ended: no rank waits any more, so `find_missing` finds nothing.
    """
    ranks = tuple(ranks)
    reached = {rank: states[rank].reached(group) for rank in ranks}
    highest = max(reached.values(), default=0)
    finished = tuple(rank for rank in ranks if states[rank].exitcode == 0 and reached[rank] < highest)
    if not finished:
        return None
    sequence = min(reached[rank] for rank in finished) + 1
    waiting = tuple(rank for rank in ranks if reached[rank] >= sequence)
    at = {
        rank: next((one for one in states[rank].operations if one.group == group and one.sequence == sequence), None)
        for rank in ranks
    }
    operations = {rank: at[rank] or states[rank].last(group) for rank in ranks}
    return Finding("finished", group, finished, waiting, sequence, operations)


class StragglerCount:
    """Count, one sample a poll, for which ranks the others wait in a collective."""

    _ENOUGH = 20  # samples: a share of fewer says little
    _SIGNIFICANT = 0.1  # share of the samples

    def __init__(self) -> None:
        self.samples = 0
        self.awaited: Counter[int] = Counter()
        self.pairs: Counter[tuple[int, int]] = Counter()  # (straggler, rank that waits for it)

    def add(self, states: Mapping[int, RankState], groups: Mapping[str, Sequence[int]]) -> None:
        """Add one sample. A rank is a straggler if another rank waits in a collective that it has not called yet."""
        if not groups:
            return
        self.samples += 1
        pairs = set()
        for group, ranks in groups.items():
            pending = {rank: one.sequence for rank in ranks if (one := states[rank].pending(group)) is not None}
            for rank in ranks:
                reached = states[rank].reached(group)
                pairs |= {(rank, other) for other, sequence in pending.items() if reached < sequence}
        self.awaited.update({rank for rank, _ in pairs})
        self.pairs.update(pairs)

    def describe(self, always: bool = False) -> str:
        """Return a sentence for each rank that others waited for in at least a tenth of the samples.

        If there is no such rank, return "". `always`: return smaller shares, too, and a sentence if there is no rank.
        """
        sentences = []
        for rank, count in self.awaited.most_common():
            share = count / max(1, self.samples)
            if always or (self.samples >= self._ENOUGH and share >= self._SIGNIFICANT):
                others = describe_ranks(other for (straggler, other) in self.pairs if straggler == rank)
                sentences.append(f"{others} waited for rank {rank} in {share:.0%} of {self.samples} samples")
        if not sentences and always:
            return f"no rank waited for another rank in {self.samples} samples"
        return "; ".join(sentences)


def describe_ranks(ranks: Iterable[int]) -> str:
    """Return a text like "rank 1" or "ranks 0-3, 7"."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = ", ".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans)
    return f"rank{'s' if len(ordered) > 1 else ''} {names}"
