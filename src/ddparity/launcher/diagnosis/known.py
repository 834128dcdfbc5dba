"""What a watch knows of the ranks: it polls those of its machine, and is told of those of other machines."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...system import end_held_abort
from . import desync
from .desync import Finding, RankState, StragglerCount
from .flight import AGREEMENT, DEFAULT_GROUP, Operation, ask_groups, ask_records, read_record_file
from .instruments import FATAL
from .unended import read_ended
from .usage import Usage, read_usages

_ANSWER_S = 0.2
_ASK_S = 10.0  # until a rank that has not told the ranks of a group is asked again
_ABORT_S = 1.0  # how long an abort is held: the collectives of the other ranks are read meanwhile
_SILENT_S = 2.0  # a rank that ends is gone after this
_SUSPENDED_S = 10.0  # between two polls: this process was stopped
_CLOCK_STEP_S = 2.0  # the wall clock gained more: it was set, or the machine was suspended
_IDLE_CPU = 0.02  # a process that uses a smaller share of a core does nothing
_IDLE_S = 3.0  # over which that is measured
_USED_AFTER_S = 2.0  # without progress, from when on it is measured what ranks use


@dataclass(frozen=True)
class WatchedRank:
    """A rank of this machine. `folder`: the one that `instruments.install` was given in that process."""

    rank: int
    pid: int
    folder: Path


class Known:
    """The states of the ranks, as of the last poll.

    `ranks`: those of this machine. `states`: of all ranks that are known, also of other machines'. `repeated`: (rank,
    group) where the rank has called one collective twice. `unrecorded`: ranks that ended without a record, as by
    os._exit. `unchanged`: groups in which the same collectives were pending at the last two polls. No time counts
    while this process or all ranks of this machine are stopped, as by a scheduler.
    """

    def __init__(self, ranks: Sequence[WatchedRank]) -> None:
        self.ranks = {watched.rank: watched for watched in ranks}
        self.states = {rank: RankState(rank) for rank in self.ranks}
        self.repeated: set[tuple[int, str]] = set()
        self.unrecorded: set[int] = set()
        self.unchanged: set[str] = set()
        self.aborts: dict[int, float] = {}  # when the abort of a rank was seen
        self.straggler_count = StragglerCount()
        self._lost_s = 0.0
        self._losses: list[tuple[float, float]] = []  # (until when, in seconds since 1970; seconds that were lost)
        self._steps: list[tuple[float, float]] = []  # of the wall clock: (when, in seconds since 1970; seconds)
        self._looked_at, self._wall_at = time.monotonic(), time.time()
        self._released: set[int] = set()  # ranks whose abort is no longer held
        self._groups: dict[str, tuple[int, ...]] = {}  # the ranks of process groups, as far as ranks name them
        self._progress_at: dict[int, float] = dict.fromkeys(self.ranks, self.now())
        self._answered_at: dict[int, float] = {}
        self._missed: dict[int, int] = {}  # polls without an answer since the last answer
        self._calls: dict[tuple[int, str], dict[object, int]] = {}
        self._pending: dict[tuple[int, str], int] = {}  # (rank, group): the record that was pending at the last poll
        self._ask_at: dict[int, float] = {}  # by rank: when to ask next for its groups
        # A script may leave its world and make another one, whose groups have the names of those before.
        self._before: dict[tuple[int, str], int] = {}  # (rank, group): the last record of an earlier group of this name
        self._done: dict[int, tuple[Operation, ...]] = {}  # by rank: what all ranks had called at the last poll
        self._in_own_worlds: set[int] = set()  # ranks whose world is not the one that they were launched for
        self._used: dict[int, tuple[float, Usage]] = {}  # what each rank had used when progress stopped

    def now(self) -> float:
        """Return a time in seconds that stands still while this process, or all ranks of this machine, are stopped."""
        return time.monotonic() - self._lost_s

    def tick(self) -> float:
        """Return `now()`. Called several times a second: a long pause means that this process was stopped."""
        looked_at, wall_at = time.monotonic(), time.time()
        pause_s, step_s = looked_at - self._looked_at, wall_at - self._wall_at - (looked_at - self._looked_at)
        self._looked_at, self._wall_at = looked_at, wall_at
        if step_s > _CLOCK_STEP_S:
            self._steps.append((wall_at, step_s))
        if pause_s > _SUSPENDED_S:
            self._lose(pause_s)
        return self.now()

    def _lose(self, seconds: float) -> None:
        self._lost_s += seconds
        if self._losses and time.time() - self._losses[-1][0] < _SUSPENDED_S:  # a stop that lasts
            seconds += self._losses.pop()[1]
        self._losses.append((time.time(), seconds))

    def since_s(self, at_s: float) -> float:
        """Return how many seconds have passed since a time in seconds since 1970, without those that were lost.

        Nor do steps of the wall clock count.
        """
        lost_s = sum(min(seconds, max(0.0, when - at_s)) for when, seconds in self._losses + self._steps)
        return time.time() - at_s - lost_s

    # Polls.

    def check_aborts(self, now: float) -> bool:
        """Note which ranks hold an abort; return whether there is a new one. End an abort that was held long enough."""
        new = False
        for rank, watched in self.ranks.items():
            if rank in self._released or self.states[rank].exitcode is not None:
                continue
            if rank not in self.aborts:
                if _is_empty(watched.folder / FATAL):
                    continue
                self.aborts[rank] = now
                new = True
            elif now - self.aborts[rank] > _ABORT_S:
                self._released.add(rank)
                end_held_abort(watched.pid)  # the abort has no connection with the collectives of other ranks
        return new

    @property
    def aborting(self) -> bool:
        """Whether a rank's abort is held."""
        return bool(self.aborts.keys() - self._released)

    def poll(self, now: float, pause_s: float) -> None:
        """Ask the ranks of this machine for their collectives. `pause_s`: since the last poll."""
        folders = {rank: one.folder for rank, one in self.ranks.items() if self.states[rank].exitcode is None}
        for rank, record in ask_records(folders, _ANSWER_S).items():
            self._groups.update(record.groups)
            self._answered_at[rank] = now
            operations = tuple(self._with_ranks(one) for one in self._comparable(rank, record.operations))
            self.update(replace(self.states[rank], operations=operations, complete=record.complete), now)
            self._note_repeats(rank, record.operations)
        for rank in folders:
            answered = self._answered_at.get(rank, now)
            self._missed[rank] = 0 if answered == now else self._missed.get(rank, 0) + 1
            silent = self._missed[rank] > 1 and now - answered >= _SILENT_S
            self.states[rank] = replace(self.states[rank], silent=silent)
        if folders and all(self.states[rank].silent for rank in folders):
            self._lose(pause_s)
        self._leave_out_earlier(now)
        again = {rank for rank in self._in_own_worlds if self.alive(rank) and now >= self._ask_at.get(rank, now)}
        if again:  # nothing is compared until they have come back
            self.ask_for_groups(again)
            self._ask_at.update(dict.fromkeys(again, now + _ASK_S))
        local = self.local_states()
        self._done = {rank: desync.called_by_all(state) for rank, state in local.items()}
        groups = {one.group for state in local.values() for one in state.operations}
        self.straggler_count.add(local, {group: desync.group_ranks(local, group, self._groups) for group in groups})

    def update(self, state: RankState, now: float) -> None:
        """Note the state of a rank, of any machine."""
        before = self.states.get(state.rank)
        if before is None or progress(before.operations) != progress(state.operations):
            self._progress_at[state.rank] = now
            self._used.clear()
        self.states[state.rank] = state

    def ended(self, rank: int, exitcode: int) -> None:
        """Note that a rank of this machine has ended."""
        state = self.states.get(rank, RankState(rank))
        record = read_record_file(self.ranks[rank].folder) if rank in self.ranks else None
        if record is not None:
            self._note_repeats(rank, record.operations)
            operations = self._comparable(rank, record.operations)
            state = replace(state, operations=operations, complete=record.complete)
            self.unrecorded.discard(rank)
        elif rank in self.ranks:
            self.unrecorded.add(rank)
        self.states[rank] = replace(state, exitcode=exitcode, silent=False)
        self._done[rank] = desync.called_by_all(self.states[rank])

    def note_ends(self, now: float) -> None:
        """Note what ranks have left since the poll at `now`: on a busy machine, Python takes long to end a process.

        A rank whose script has ended well, and that nothing keeps, counts as ended. Others have written their records.
        """
        for rank, watched in self.ranks.items():
            exitcode = self.states[rank].exitcode
            ended = read_ended(watched.pid, watched.folder) if exitcode is None else None
            if exitcode is not None and rank in self.unrecorded:
                self.ended(rank, exitcode)
            elif ended is not None and ended.well and not ended.keeps:
                self.ended(rank, 0)
        self._leave_out_earlier(now)

    def note_unchanged(self, now: float) -> None:
        """Note the groups in which the same collectives are pending as at the last poll."""
        pending = {}
        for rank, state in self.states.items():
            if state.exitcode is None:
                for group in {one.group for one in state.operations if one.pending}:
                    if (one := state.pending(group)) is not None:
                        pending[rank, group] = one.record
        changed = {group for (rank, group), record in pending.items() if self._pending.get((rank, group)) != record}
        self.unchanged = {group for _, group in pending} - changed
        self._pending = pending
        self._learn_groups(now)
        if self.unchanged and not self._used and self.idle_s(self.ranks, now) > _USED_AFTER_S:
            self._used = {rank: (now, usage) for rank, usage in self._usages(self.ranks).items()}

    def _leave_out_earlier(self, now: float) -> None:
        # The record of a rank that has not answered now, or that left none at its end, may be older than `_done`.
        known = {
            rank: state
            for rank, state in self.local_states().items()
            if (rank not in self.unrecorded if state.exitcode is not None else self._answered_at.get(rank) == now)
        }
        self._before.update(desync.of_before(known, self._done))
        self._leave_out()

    def _comparable(self, rank: int, operations: Sequence[Operation]) -> tuple[Operation, ...]:
        """Return the calls of a rank of this machine without those of earlier groups of the same names.

        If a rank is in a world of its script's own, ranks have other numbers there: no calls can be compared.
        """
        if self._in_own_worlds:
            return ()
        return tuple(one for one in operations if one.record > self._before.get((rank, one.group), -1))

    def _leave_out(self) -> bool:
        """Leave out calls that cannot be compared; return whether there were any. This is no progress of a rank."""
        changed = False
        for rank in self.ranks:
            operations = self._comparable(rank, self.states[rank].operations)
            changed |= operations != self.states[rank].operations
            self.states[rank] = replace(self.states[rank], operations=operations)
        return changed

    def _with_ranks(self, operation: Operation) -> Operation:
        """Return an operation with the ranks of its group, if they are known: other machines may not know them."""
        if operation.pending and not operation.ranks and operation.group in self._groups:
            return replace(operation, ranks=self._groups[operation.group])
        return operation

    def _learn_groups(self, now: float) -> None:
        """Ask ranks of this machine for their groups while others wait.

        Those that wait in a group tell its ranks, unless the flight record names them, as NCCL's does. Those that have
        called what others wait in, and that do not wait, tell whether they called it in an earlier group of that name.
        """
        ranks = {
            rank
            for rank, group in self._pending
            if self.alive(rank) and group in self.unchanged and group not in self._groups and group != DEFAULT_GROUP
            if not self.states[rank].agrees(group)
        }
        for group in self.unchanged:
            first = min(one.sequence for state in self.states.values() if (one := state.pending(group)) is not None)
            ranks |= {
                rank
                for rank in self.ranks
                if self.alive(rank) and (rank, group) not in self._pending and self.states[rank].reached(group) >= first
            }
        ranks = {rank for rank in ranks if now >= self._ask_at.get(rank, now)}
        if ranks:
            self.ask_for_groups(ranks)
            self._ask_at.update(dict.fromkeys(ranks, now + _ASK_S))

    def ask_for_groups(self, ranks: Iterable[int] | None = None) -> bool:
        """Ask ranks of this machine for their groups; None: all of them. The next poll knows the ranks of the groups.

        Return whether the answers show that calls which were compared are of other groups, or groups of other ranks.
        """
        alive = [rank for rank in (self.ranks if ranks is None else ranks) if self.alive(rank)]
        answers = ask_groups({rank: self.ranks[rank].folder for rank in alive}, _ANSWER_S)
        groups = {group: ranks for one in answers.values() if one.launched for group, ranks in one.ranks.items()}
        compared = {group: self.ranks_of(group) for group in groups}
        self._groups.update(groups)
        for rank, answer in answers.items():
            (self._in_own_worlds.discard if answer.launched else self._in_own_worlds.add)(rank)
            for one in self.states[rank].operations:
                # The groups' numbers only grow, and the record was read before.
                if not one.point_to_point and one.sequence > answer.called.get((one.group, one.backend), one.sequence):
                    self._before[rank, one.group] = max(one.record, self._before.get((rank, one.group), -1))
        left_out = self._leave_out()
        return left_out or any(self.ranks_of(group) != ranks for group, ranks in compared.items())

    def _note_repeats(self, rank: int, operations: Sequence[Operation]) -> None:
        for one in operations:
            key = (rank, one.group)
            if key not in self.repeated and not one.point_to_point and one.backend != AGREEMENT:
                calls = self._calls.setdefault(key, {})
                if calls.setdefault((one.name, one.dtypes, one.inputs), one.record) != one.record:
                    self.repeated.add(key)
                    del self._calls[key]

    # Questions.

    def in_first_step(self, finding: Finding, rank: int) -> bool:
        """Return whether a rank has not called a collective twice: in the group of a finding, or in any."""
        if finding.agreement:
            return all(other != rank for other, _ in self.repeated)
        return (rank, finding.group) not in self.repeated

    def local_states(self) -> dict[int, RankState]:
        return {rank: self.states[rank] for rank in self.ranks}

    def ranks_of(self, group: str) -> tuple[int, ...]:
        return desync.group_ranks(self.states, group, self._groups)

    def alive(self, rank: int) -> bool:
        """Return whether a rank runs on this machine."""
        return rank in self.ranks and self.states[rank].exitcode is None

    def may_end(self, ranks: Iterable[int]) -> bool:
        """Return whether a rank has just not answered: it may be about to end. If it is stopped, it is silent later."""
        return any(self._missed.get(rank) and self.alive(rank) and not self.states[rank].silent for rank in ranks)

    def idle_s(self, ranks: Collection[int], now: float) -> float:
        """Return for how many seconds no rank has made progress."""
        return now - max((self._progress_at[rank] for rank in ranks), default=now)

    def no_progress_since_poll(self, ranks: Iterable[int]) -> bool:
        """Return whether no rank has made progress, or answers again, since the poll: reading stacks takes a while."""
        folders = {rank: self.ranks[rank].folder for rank in ranks if self.alive(rank)}
        return all(
            not self.states[rank].silent
            and progress(self._comparable(rank, record.operations)) == progress(self.states[rank].operations)
            for rank, record in ask_records(folders, _ANSWER_S).items()
        )

    def used(self, ranks: Iterable[int], now: float) -> dict[int, tuple[float, Usage, Usage]]:
        """Return what ranks of this machine have used since progress stopped: the seconds, then and now."""
        usages = self._usages(ranks)
        began = {rank: self._used.setdefault(rank, (now, usage)) for rank, usage in usages.items()}
        return {rank: (now - began[rank][0], began[rank][1], usage) for rank, usage in usages.items()}

    def _usages(self, ranks: Iterable[int]) -> dict[int, Usage]:
        pids = {rank: self.ranks[rank].pid for rank in ranks if self.alive(rank)}
        found = read_usages(pids.values())
        return {rank: found[pid] for rank, pid in pids.items()}


def is_idle(seconds: float, before: Usage, after: Usage) -> bool:
    """Return whether a process has used no processor between two measurements, which are some seconds apart."""
    return seconds >= _IDLE_S and after.cpu_s - before.cpu_s <= _IDLE_CPU * seconds


def progress(operations: Sequence[Operation]) -> object:
    """Return a value that changes when a rank calls a collective or when one of its collectives is done."""
    return operations[-1].record if operations else -1, tuple(one.record for one in operations if one.pending)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return True
