"""Watch the ranks of one machine from its agent and report a hang: which rank causes it, where it is, and why."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed import DistError

from . import desync, messages
from .desync import Finding, RankState, StragglerCount
from .flight import Operation, ask_records, read_record_file
from .hang_report import HangReport, Row, headline, make_row, write_stacks
from .instruments import FATAL, end_held_abort
from .messages import AgentChannel, MachineState
from .stacks import SLOW_ACTIVITIES, Stack, cpu_seconds, read_stacks, signal_for_stacks

_POLL_S = 1.0
_CHECK_S = 0.5  # between polls while a rank waits in the same collective as at the last poll
_SOON_S = 0.1  # between polls while a rank aborts, or other machines are asked
_ANSWER_S = 0.2
_ABORT_S = 1.0  # how long an abort is held: the collectives of the other ranks are read meanwhile
_LONG_WAIT = 10  # times the time-out: for a rank that compiles, reads or writes a checkpoint, or is in its first step
_SILENT_S = 2.0  # a rank that ends is gone after this
_UNRECORDED_S = 3.0
_TOGETHER_S = 3.0  # for the other machines to answer where their ranks are
_IDLE_CPU = 0.02  # a process that uses a smaller share of a core does nothing


@dataclass(frozen=True)
class WatchedRank:
    """A rank of this machine. `folder`: the one that `instruments.install` was given in that process."""

    rank: int
    pid: int
    folder: Path


class Watch:
    """Poll the collectives of the ranks; `look` returns a report once a hang is certain.

    `hang_timeout_s`: a rank that has not called a collective is reported if no rank has made progress for so long; 0:
    never. A collective that ranks call differently, or that a rank has ended without, is reported within seconds.
    `channel`: to the agents of the job's other machines, if there are any.
    """

    def __init__(
        self, ranks: Sequence[WatchedRank], hang_timeout_s: float, channel: AgentChannel | None = None
    ) -> None:
        self._ranks = {watched.rank: watched for watched in ranks}
        self._timeout_s = hang_timeout_s
        self._channel = channel
        self._host = socket.gethostname().partition(".")[0]
        self._next_poll = time.monotonic() + _POLL_S

        self._states = {rank: RankState(rank) for rank in self._ranks}  # also of other machines' ranks, if this leads
        self._groups: dict[str, tuple[int, ...]] = {}  # the ranks of process groups, as far as ranks name them
        self._progress_at: dict[int, float] = dict.fromkeys(self._ranks, time.monotonic())
        self._answered_at: dict[int, float] = {}
        self._missed: dict[int, int] = {}  # polls without an answer since the last answer
        self._unrecorded: set[int] = set()  # ranks that ended without flight.json, as by os._exit
        self._aborts: dict[int, float] = {}  # when the abort of a rank was seen
        self._released: set[int] = set()  # ranks whose abort is no longer held
        self._calls: dict[tuple[int, str], dict[object, int]] = {}
        self._repeated: set[tuple[int, str]] = set()  # (rank, group): it has called one collective twice
        self._straggler_count = StragglerCount()

        self._pending: dict[tuple[int, str], int] = {}  # (rank, group): the record that was pending at the last poll
        self._unchanged: set[str] = set()  # groups in which the same records were pending at the last poll
        self._check_at: dict[str, float] = {}  # by group: when to read stacks next
        self._long_wait_at: dict[str, float] = {}  # by group: when there was last a reason for a long wait
        self._cpu: dict[int, tuple[float, float]] = {}  # (time, CPU seconds) when progress stopped
        self._reported: set[tuple[object, ...]] = set()

        self._candidate: Finding | None = None  # the finding that the other machines are asked about
        self._question, self._asked_at = 0, 0.0
        self._announced = ""
        self._answer: tuple[Row, ...] = ()

    def ended(self, rank: int, exitcode: int) -> None:
        """Note that a rank of this machine has ended. The next look reports it if other ranks wait for it."""
        state = self._states.get(rank, RankState(rank))
        record = read_record_file(self._ranks[rank].folder) if rank in self._ranks else None
        if record is not None:
            self._note_repeats(rank, record.operations)
            state = replace(state, operations=record.operations)
        elif rank in self._ranks:
            self._unrecorded.add(rank)
        self._states[rank] = replace(state, exitcode=exitcode, silent=False)
        self._next_poll = min(self._next_poll, time.monotonic())

    @property
    def progressed(self) -> bool:
        """Whether a rank has called one collective twice, as in its second step."""
        return bool(self._repeated)

    def look(self) -> HangReport | None:
        """Poll the ranks if it is time to; return a report of a new hang. The agent calls it several times a second."""
        now = time.monotonic()
        self._check_aborts(now)
        if now < self._next_poll:
            return None
        self._poll(now)
        report = None
        if self._channel is None:
            finding = self._find_hang(now)
            report = self._report(finding) if finding is not None else None
        else:
            with suppress(DistError):  # the machine that holds the store is gone: an agent reports that
                report = self._look_with_others(self._channel, now)
        soon = self._aborts.keys() - self._released or self._candidate is not None
        self._next_poll = time.monotonic() + (_SOON_S if soon else _CHECK_S if self._unchanged else _POLL_S)
        return report

    def explain(self) -> HangReport | None:
        """Return why ranks failed, if their last collectives show it: a mismatch, or a rank that ended too early.

        The agent calls it after a rank has failed, before it ends the other ranks.
        """
        self._poll(time.monotonic())
        for group in desync.default_last(one.group for state in self._states.values() for one in state.operations):
            ranks = [rank for rank in self._ranks_of(group) if rank not in self._unrecorded]
            finding = desync.find_mismatch(self._states, group) or desync.find_left(self._states, group, ranks)
            if finding is not None:
                return self._report(finding)
        return None

    def stragglers(self, always: bool = False) -> str:
        """Return for which ranks the others waited; "" if no rank stands out, unless `always`."""
        return self._straggler_count.describe(always)

    def keep_stacks(self, report: HangReport, directory: Path, ends: bool = True) -> list[Path]:
        """Write the stacks of all ranks of this machine to files. Call it before any signal to the ranks.

        `ends`: the job ends after this. Then a rank whose stacks could not be read gets a signal to write them itself.
        """
        texts = dict(report.stacks)
        for rank, watched in self._ranks.items():
            if ends and rank not in texts and self._alive(rank):
                texts[rank] = signal_for_stacks(watched.pid, watched.folder)
        return write_stacks(texts, directory)

    # What is known of the ranks.

    def _check_aborts(self, now: float) -> None:
        """Note which ranks hold an abort, and end an abort that was held for long enough."""
        for rank, watched in self._ranks.items():
            if rank in self._released or self._states[rank].exitcode is not None:
                continue
            if rank not in self._aborts:
                if _is_empty(watched.folder / FATAL):
                    continue
                self._aborts[rank] = now
                self._next_poll = now
            elif now - self._aborts[rank] > _ABORT_S:
                self._released.add(rank)
                end_held_abort(watched.pid)  # the abort has no connection with the collectives of other ranks

    def _poll(self, now: float) -> None:
        """Ask the ranks of this machine for their collectives."""
        folders = {rank: one.folder for rank, one in self._ranks.items() if self._states[rank].exitcode is None}
        for rank, record in ask_records(folders, _ANSWER_S).items():
            self._groups.update(record.groups)
            self._answered_at[rank] = now
            self._update(replace(self._states[rank], operations=record.operations), now)
            self._note_repeats(rank, record.operations)
        for rank in folders:
            answered = self._answered_at.get(rank, now)
            self._missed[rank] = 0 if answered == now else self._missed.get(rank, 0) + 1
            silent = self._missed[rank] > 1 and now - answered >= _SILENT_S
            self._states[rank] = replace(self._states[rank], silent=silent)
        local = self._local_states()
        groups = {one.group for state in local.values() for one in state.operations}
        self._straggler_count.add(local, {group: desync.group_ranks(local, group, self._groups) for group in groups})

    def _update(self, state: RankState, now: float) -> None:
        before = self._states.get(state.rank)
        if before is None or _progress(before.operations) != _progress(state.operations):
            self._progress_at[state.rank] = now
            self._cpu.clear()
        self._states[state.rank] = state

    def _note_repeats(self, rank: int, operations: Sequence[Operation]) -> None:
        for one in operations:
            key = (rank, one.group)
            if key not in self._repeated and not one.point_to_point:
                calls = self._calls.setdefault(key, {})
                if calls.setdefault((one.name, one.dtypes, one.inputs), one.record) != one.record:
                    self._repeated.add(key)
                    del self._calls[key]

    def _note_unchanged(self) -> None:
        """Note the groups in which the same collectives are pending as at the last poll."""
        pending = {}
        for rank, state in self._states.items():
            if state.exitcode is None:
                for group in {one.group for one in state.operations if one.pending}:
                    if (one := state.pending(group)) is not None:
                        pending[rank, group] = one.record
        changed = {group for (rank, group), record in pending.items() if self._pending.get((rank, group)) != record}
        self._unchanged = {group for _, group in pending} - changed
        self._pending = pending

    def _local_states(self) -> dict[int, RankState]:
        return {rank: self._states[rank] for rank in self._ranks}

    def _ranks_of(self, group: str) -> tuple[int, ...]:
        return desync.group_ranks(self._states, group, self._groups)

    def _alive(self, rank: int) -> bool:
        return rank in self._ranks and self._states[rank].exitcode is None

    def _idle_s(self, ranks: Sequence[int], now: float) -> float:
        """Return for how many seconds no rank has made progress."""
        return now - max(self._progress_at[rank] for rank in ranks)

    # Whether they hang.

    def _find_hang(self, now: float) -> Finding | None:
        """Return a hang that is certain and has not been reported."""
        self._note_unchanged()
        aborting = bool(self._aborts.keys() - self._released)
        for group in desync.stuck_groups(self._states):
            if group not in self._unchanged and not aborting:
                continue
            finding = desync.find_mismatch(self._states, group)
            if finding is None and group in self._unchanged:
                finding = self._find_missing(group, now)
            if finding is not None and finding.key() not in self._reported:
                self._reported.add(finding.key())
                return finding
        return None

    def _find_missing(self, group: str, now: float) -> Finding | None:
        """Return which ranks a group waits for, once it is certain that they will not call the collective."""
        ranks = self._ranks_of(group)
        finding = desync.find_missing(self._states, group, ranks)
        if finding is None:
            return None
        idle_s = self._idle_s(ranks, now)
        if finding.kind == "finished":
            # If such a rank left no record at its end, its last collectives are known only up to the last poll.
            return finding if idle_s > _UNRECORDED_S or not set(finding.blamed) & self._unrecorded else None
        if self._timeout_s <= 0 or idle_s < self._timeout_s or finding.key() in self._reported:
            return None
        # A rank that does not answer may be about to end. If it is stopped, it becomes silent later.
        if any(self._missed.get(rank) and self._alive(rank) and not self._states[rank].silent for rank in ranks):
            return None
        if idle_s < self._timeout_s * _LONG_WAIT:
            if now < self._check_at.get(group, now):
                return None
            self._check_at[group] = now + min(1.0, self._timeout_s / 4)
            if self._may_take_long(finding, ranks, now):
                self._long_wait_at[group] = now
            if now - self._long_wait_at.get(group, float("-inf")) < self._timeout_s:
                return None
        return finding if self._no_progress_since_poll(ranks) else None

    def _no_progress_since_poll(self, ranks: Sequence[int]) -> bool:
        """Return whether no rank has made progress, or answers again, since the poll: reading stacks takes a while."""
        folders = {rank: self._ranks[rank].folder for rank in ranks if self._alive(rank)}
        return all(
            not self._states[rank].silent and _progress(record.operations) == _progress(self._states[rank].operations)
            for rank, record in ask_records(folders, _ANSWER_S).items()
        )

    def _may_take_long(self, finding: Finding, ranks: Sequence[int], now: float) -> bool:
        """Return whether a long wait is normal: in the first step, in a compiler, in a checkpoint, or if data moves."""
        stacks = self._stacks(finding.blamed)
        if any(stack.state in "TtD" for stack in stacks.values()):
            return False
        if any((rank, finding.group) not in self._repeated for rank in ranks):
            return True
        if any(stack.activity() in SLOW_ACTIVITIES for stack in stacks.values()):
            return True
        return finding.kind == "stalled" and self._use_cpu(ranks, now)

    def _use_cpu(self, ranks: Sequence[int], now: float) -> bool:
        """Return whether one of these processes has used its processor since progress stopped."""
        used_any = False
        for rank in ranks:
            if rank in self._ranks:
                used_s = cpu_seconds(self._ranks[rank].pid)
                began, before_s = self._cpu.setdefault(rank, (now, used_s))
                used_any |= now - began < 0.5 or used_s - before_s > _IDLE_CPU * (now - began)
        return used_any

    # Several machines: all publish their states, the leading agent compares them, asks where all ranks are, and
    # announces the report.

    def _look_with_others(self, channel: AgentChannel, now: float) -> HangReport | None:
        announced = channel.announced() or ""
        if announced != self._announced:
            self._announced, self._answer = announced, ()
            report = messages.unpack_hang(announced)
            if report is not None and not channel.leads:
                return replace(report, stacks=_texts(self._stacks(tuple(self._ranks))))
            group = messages.asked_group(announced)
            if group is not None:
                self._answer = self._rows(group, self._stacks(tuple(self._ranks)))
        repeated = frozenset(one for one in self._repeated if one[0] in self._ranks)
        own = MachineState(self._host, self._local_states(), repeated, announced, self._answer)
        channel.publish(messages.pack(own))
        if not channel.leads:
            return None
        machines = messages.unpack_all(channel.read())
        for machine in machines:
            self._repeated |= machine.repeated
            for rank in machine.states.keys() - self._ranks.keys():
                self._update(machine.states[rank], now)
        if self._candidate is not None:
            return self._decide(channel, self._candidate, machines, now)
        self._candidate = finding = self._find_hang(now)
        if finding is not None:
            self._question += 1
            self._asked_at = now
            channel.announce(messages.question(finding.group, self._question))
        return None

    def _decide(
        self, channel: AgentChannel, finding: Finding, machines: Sequence[MachineState], now: float
    ) -> HangReport | None:
        """Return the report once all machines have answered where their ranks are; None if it is no hang after all."""
        question = messages.question(finding.group, self._question)
        rows = {row.rank: row for machine in machines if machine.answers == question for row in machine.rows}
        if rows.keys() < self._states.keys() and now - self._asked_at < _TOGETHER_S:
            return None
        self._candidate = None
        idle_s = self._idle_s(self._ranks_of(finding.group), now)
        slow = any(rows[rank].activity in SLOW_ACTIVITIES for rank in finding.blamed if rank in rows)
        waits = finding.kind in ("absent", "stalled")
        progressed = waits and idle_s < now - self._asked_at
        answers = finding.kind == "stalled" and not all(self._states[rank].silent for rank in finding.blamed)
        if progressed or answers or (waits and slow and idle_s < self._timeout_s * _LONG_WAIT):
            self._reported.discard(finding.key())
            self._long_wait_at[finding.group] = now
            channel.announce("")
            return None
        report = self._report(finding)
        report = replace(report, rows=tuple(rows.get(row.rank, row) for row in report.rows))
        self._announced = messages.pack_hang(report, self._question)
        channel.announce(self._announced)
        return report

    # The report.

    def _report(self, finding: Finding) -> HangReport:
        stacks = self._stacks(tuple(self._ranks))
        rows = self._rows(finding.group, stacks, finding)
        said = headline(finding, self._states)
        return HangReport(finding.kind, finding.group, finding.blamed, said, rows, _texts(stacks))

    def _rows(self, group: str, stacks: Mapping[int, Stack], finding: Finding | None = None) -> tuple[Row, ...]:
        """Return the rows of this machine's ranks, or those of all ranks for a finding."""
        operations = finding.operations if finding is not None else {}
        ranks = sorted(self._states if finding is not None else self._ranks)
        return tuple(
            make_row(
                self._host if rank in self._ranks else "",
                self._states[rank],
                group,
                stacks.get(rank),
                operations.get(rank),
                rank in self._aborts,
            )
            for rank in ranks
        )

    def _stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        """Return the stacks of those of the ranks that run on this machine."""
        alive = {rank: self._ranks[rank] for rank in ranks if self._alive(rank)}
        return read_stacks(
            {rank: one.pid for rank, one in alive.items()}, {rank: one.folder for rank, one in alive.items()}
        )


def _texts(stacks: Mapping[int, Stack]) -> dict[int, str]:
    return {rank: stack.text for rank, stack in stacks.items() if stack.text}


def _progress(operations: Sequence[Operation]) -> object:
    """Return a value that changes when a rank calls a collective or when one of its collectives is done."""
    return operations[-1].record if operations else -1, tuple(one.record for one in operations if one.pending)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return True
