"""Watches the ranks of a job from its agent, and says which of them hangs, where, and why."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed import DistError

from . import desync as compare
from . import messages
from .desync import Finding, RankState, Waits
from .flight import DEFAULT_GROUP, Operation, ask_records, left_record
from .hang_report import Row, Verdict, describe, make_row, write_stacks
from .instruments import FATAL, let_abort
from .messages import Exchange, Report
from .stacks import PATIENT, Stack, look_at, signal_for_stacks

__all__ = ["Exchange", "Row", "Verdict", "Watch", "Watched", "describe", "write_stacks"]

_POLL_S = 1.0
_CHECK_S = 0.5  # while all that is pending was so at the last poll
_ANSWER_S = 0.2
_ABORT_S = 1.0  # how long an abort is held for the other ranks' collectives to show
_PATIENCE = 10  # times the time-out, while compiling, in a checkpoint, or in the first step
_SILENT_S = 2.0  # a rank that ends is gone after this
_UNRECORDED_S = 3.0
_TOGETHER_S = 3.0  # for the other machines to tell where their ranks stand
_IDLE_CPU = 0.02  # below this share of a core a process does nothing


@dataclass(frozen=True)
class Watched:
    """A rank of this machine; `folder` is where `instruments.install` put its server."""

    rank: int
    pid: int
    folder: Path


class Watch:
    """Polls the ranks' collectives; `look` gives a verdict once a hang is certain.

    `hang_timeout_s`: how long no rank may come further before an absent one is called a hang. A collective that ranks
    call differently, or that a rank ended without, is told in seconds.
    """

    def __init__(self, ranks: Sequence[Watched], hang_timeout_s: float, exchange: Exchange | None = None) -> None:
        self._ranks = {watched.rank: watched for watched in ranks}
        self._timeout_s = hang_timeout_s
        self._exchange = exchange
        self._host = socket.gethostname().partition(".")[0]
        self._states = {rank: RankState(rank) for rank in self._ranks}
        self._moved: dict[int, float] = dict.fromkeys(self._ranks, time.monotonic())  # when a rank last came further
        self._pending: dict[tuple[int, str], int] = {}  # (rank, group) -> record that was pending at the last poll
        self._steady: set[str] = set()  # groups in which all that is pending was so at the last poll
        self._seen: dict[tuple[int, str], dict[object, int]] = {}
        self._repeated: set[tuple[int, str]] = set()  # (rank, group) that did one thing for the second time
        self._groups: dict[str, tuple[int, ...]] = {}
        self._aborts: dict[int, float] = {}
        self._released: set[int] = set()
        self._cpu: dict[int, tuple[float, float]] = {}  # (time, CPU seconds) when nothing moved first
        self._told: set[tuple[object, ...]] = set()
        self._unrecorded: set[int] = set()  # ended without flight.json, as by os._exit
        self._answered: dict[int, float] = {}
        self._missed: dict[int, int] = {}  # polls that a rank has not answered, since it last did
        self._check_at: dict[str, float] = {}  # by group: the next look at stacks
        self._excused: dict[str, float] = {}  # by group: when there was a reason to wait
        self._candidate: Finding | None = None  # what the other machines are asked about
        self._number, self._asked_at, self._said = 0, 0.0, ""
        self._answer: tuple[Row, ...] = ()
        self._next = time.monotonic() + _POLL_S
        self.waits = Waits()

    def ended(self, rank: int, exitcode: int) -> None:
        """Tell that a rank has ended. One that ended well while others wait for it is named at the next look."""
        state = self._states.get(rank, RankState(rank))
        left = left_record(self._ranks[rank].folder) if rank in self._ranks else None
        if left is not None:
            self._note_repeats(rank, left.operations)
        elif rank in self._ranks:
            self._unrecorded.add(rank)
        self._states[rank] = replace(
            state,
            exitcode=exitcode,
            operations=left.operations if left is not None else state.operations,
            silent=False,
        )
        self._next = min(self._next, time.monotonic())

    @property
    def progressed(self) -> bool:
        """Whether a rank has done a collective for the second time, as in its second step."""
        return bool(self._repeated)

    def look(self) -> Verdict | None:
        """Poll if it is time to, and judge. Called often; returns each hang once."""
        now = time.monotonic()
        self._see_aborts(now)
        if now < self._next:
            return None
        self._ask(now)
        if self._exchange is None:
            finding = self._find(now)
            verdict = self._verdict(finding) if finding is not None else None
        else:
            try:
                verdict = self._look_together(self._exchange, now)
            except DistError:  # the machine that holds the store is gone, which its agent or ours will tell
                verdict = None
        soon = self._aborts.keys() - self._released or self._candidate is not None
        self._next = time.monotonic() + (0.1 if soon else _CHECK_S if self._steady else _POLL_S)
        return verdict

    def explain(self) -> Verdict | None:
        """Why the ranks that have ended failed, where their last collectives tell: a mismatch, or one that left early.

        Asked by the agent once a rank has failed, before it ends the others.
        """
        self._ask(time.monotonic())
        for group in self._all_groups():
            ranks = [rank for rank in self._members(group) if rank not in self._unrecorded]
            for finding in (
                compare.find_mismatch(self._states, group),
                compare.find_left(self._states, group, ranks),
            ):
                if finding is not None:
                    return self._verdict(finding)
        return None

    def stragglers(self, always: bool = False) -> str:
        """Who was waited for, in shares of the polls; empty where nobody stood out, unless `always`."""
        return self.waits.describe(always)

    def keep_stacks(self, verdict: Verdict, directory: Path, ends: bool = True) -> list[Path]:
        """Write the stacks of all ranks of this machine to files; call it before any signal to them.

        `ends`: the job ends after this. Then a rank that could not be looked into writes its own, on a signal.
        """
        texts = dict(verdict.stacks)
        for rank, watched in self._ranks.items():
            if ends and rank not in texts and self._alive(rank):
                texts[rank] = signal_for_stacks(watched.pid, watched.folder)
        return write_stacks(texts, directory)

    def _see_aborts(self, now: float) -> None:
        for rank, watched in self._ranks.items():
            if rank in self._released or self._states[rank].exitcode is not None:
                continue
            if rank not in self._aborts:
                if _is_empty(watched.folder / FATAL):
                    continue
                self._aborts[rank] = now
                self._next = now
            elif now - self._aborts[rank] > _ABORT_S:
                self._released.add(rank)
                let_abort(watched.pid)  # it has nothing to do with the others' collectives

    def _ask(self, now: float) -> None:
        """Poll the ranks of this machine."""
        folders = {rank: one.folder for rank, one in self._ranks.items() if self._states[rank].exitcode is None}
        for rank, record in ask_records(folders, _ANSWER_S).items():
            self._groups.update(record.groups)
            self._answered[rank] = now
            self._note(replace(self._states[rank], operations=record.operations), now)
            self._note_repeats(rank, record.operations)
        for rank in folders:
            self._missed[rank] = 0 if self._answered.get(rank, now) == now else self._missed.get(rank, 0) + 1
            silent = self._missed[rank] > 1 and now - self._answered[rank] >= _SILENT_S
            self._states[rank] = replace(self._states[rank], silent=silent)
        local = {rank: self._states[rank] for rank in self._ranks}
        groups = {one.group for state in local.values() for one in state.operations}
        self.waits.count(local, {group: compare.members(local, group, self._groups) for group in groups})

    def _note(self, state: RankState, now: float) -> None:
        before = self._states.get(state.rank)
        if before is None or _progress(before.operations) != _progress(state.operations):
            self._moved[state.rank] = now
            self._cpu.clear()
        self._states[state.rank] = state

    def _see_what_stays(self) -> None:
        """Note the groups in which all that is pending was so at the last look."""
        pending = {}
        for rank, state in self._states.items():
            if state.exitcode is None:
                for group in {one.group for one in state.operations if one.pending}:
                    if (one := state.pending(group)) is not None:
                        pending[rank, group] = one.record
        groups = {group for _, group in pending}
        self._steady = {
            group
            for group in groups
            if all(self._pending.get(key) == record for key, record in pending.items() if key[1] == group)
        }
        self._pending = pending

    def _note_repeats(self, rank: int, operations: Sequence[Operation]) -> None:
        for one in operations:
            key = (rank, one.group)
            if key not in self._repeated and not one.point_to_point:
                seen = self._seen.setdefault(key, {})
                if seen.setdefault((one.name, one.dtypes, one.inputs), one.record) != one.record:
                    self._repeated.add(key)
                    del self._seen[key]

    def _all_groups(self) -> list[str]:
        found = {one.group for state in self._states.values() for one in state.operations}
        return sorted(found, key=lambda group: (group == DEFAULT_GROUP, group))

    def _members(self, group: str) -> tuple[int, ...]:
        return compare.members(self._states, group, self._groups)

    def _look_together(self, exchange: Exchange, now: float) -> Verdict | None:
        """One look of an agent among several: all publish; one compares, asks where all ranks stand, and tells."""
        said = exchange.verdict() or ""
        if said != self._said:
            self._said, self._answer = said, ()
            verdict = messages.unpack_verdict(said)
            if verdict is not None and not exchange.leads:
                stacks = self._stacks(tuple(self._ranks))
                return replace(verdict, stacks={rank: stack.text for rank, stack in stacks.items() if stack.text})
            group = messages.asked_group(said)
            if group is not None:
                self._answer = self._rows(group, self._stacks(tuple(self._ranks)))
        local = {rank: self._states[rank] for rank in self._ranks}
        repeated = frozenset(one for one in self._repeated if one[0] in local)
        exchange.publish(messages.pack(Report(self._host, local, repeated, said, self._answer)))
        if not exchange.leads:
            return None
        reports = [messages.unpack(text) for text in exchange.read()]
        for report in reports:
            self._repeated |= report.repeated
            for rank in report.states.keys() - self._ranks.keys():
                self._note(report.states[rank], now)
        if self._candidate is None:
            self._candidate = finding = self._find(now)
            if finding is not None:
                self._number += 1
                self._asked_at = now
                exchange.tell(messages.question(finding.group, self._number))
            return None
        return self._conclude(exchange, self._candidate, reports, now)

    def _conclude(self, exchange: Exchange, finding: Finding, reports: Sequence[Report], now: float) -> Verdict | None:
        """The verdict once all machines have told where their ranks stand; none where a rank there has a reason."""
        mine = messages.question(finding.group, self._number)
        rows = {row.rank: row for report in reports if report.answers == mine for row in report.rows}
        if rows.keys() < self._states.keys() and now - self._asked_at < _TOGETHER_S:
            return None
        self._candidate = None
        still_s = now - max(self._moved[rank] for rank in self._members(finding.group))
        patient = any(rows[rank].doing in PATIENT for rank in finding.odd if rank in rows)
        waits = finding.kind in ("absent", "stalled")
        moved = waits and still_s < now - self._asked_at
        answers = finding.kind == "stalled" and not all(self._states[rank].silent for rank in finding.odd)
        if moved or answers or (waits and patient and still_s < self._timeout_s * _PATIENCE):
            self._told.discard(finding.key())
            self._excused[finding.group] = now
            exchange.tell("")
            return None
        verdict = self._verdict(finding)
        verdict = replace(verdict, rows=tuple(rows.get(row.rank, row) for row in verdict.rows))
        self._said = messages.pack_verdict(verdict, self._number)
        exchange.tell(self._said)
        return verdict

    def _find(self, now: float) -> Finding | None:
        self._see_what_stays()
        aborting = bool(self._aborts.keys() - self._released)
        for group in compare.stuck_groups(self._states):
            if group not in self._steady and not aborting:
                continue
            finding = compare.find_mismatch(self._states, group)
            if finding is None and group in self._steady:
                finding = self._waiting(group, now)
            if finding is not None and finding.key() not in self._told:
                self._told.add(finding.key())
                return finding
        return None

    def _waiting(self, group: str, now: float) -> Finding | None:
        """A group that waits, once it is sure that it does so in vain."""
        ranks = self._members(group)
        finding = compare.find_absent(self._states, group, ranks)
        if finding is None:
            return None
        still_s = now - max(self._moved[rank] for rank in ranks)
        if finding.kind == "finished":
            # Without a record from its end, what is known of such a rank is as old as the last poll.
            return finding if still_s > _UNRECORDED_S or not set(finding.odd) & self._unrecorded else None
        if self._timeout_s <= 0 or still_s < self._timeout_s or finding.key() in self._told:
            return None
        # Who does not answer is about to end, or else stopped: then it is silent for longer.
        if any(self._missed.get(rank) and self._alive(rank) and not self._states[rank].silent for rank in ranks):
            return None
        if still_s < self._timeout_s * _PATIENCE:
            if now < self._check_at.get(group, now):
                return None
            self._check_at[group] = now + min(1.0, self._timeout_s / 4)
            if self._has_reason(finding, ranks, now):
                self._excused[group] = now
            if now - self._excused.get(group, float("-inf")) < self._timeout_s:
                return None
        return finding if self._still(ranks) else None

    def _still(self, ranks: Sequence[int]) -> bool:
        """Whether no rank has come further, or answers again, while the stacks were looked at."""
        folders = {rank: self._ranks[rank].folder for rank in ranks if self._alive(rank)}
        asked = ask_records(folders, _ANSWER_S)
        return all(
            not self._states[rank].silent and _progress(record.operations) == _progress(self._states[rank].operations)
            for rank, record in asked.items()
        )

    def _has_reason(self, finding: Finding, ranks: Sequence[int], now: float) -> bool:
        """Whether a long wait is to be expected: in the first step, in a compiler, in a checkpoint, or data moves."""
        stacks = self._stacks(finding.odd)
        if any(stack.state in "TtD" for stack in stacks.values()):
            return False
        if any((rank, finding.group) not in self._repeated for rank in ranks):
            return True
        if any(stack.doing() in PATIENT for stack in stacks.values()):
            return True
        return finding.kind == "stalled" and self._works(ranks, now)

    def _works(self, ranks: Sequence[int], now: float) -> bool:
        """Whether one of these processes used its processor since this was first asked."""
        works = False
        for rank in ranks:
            if rank in self._ranks:
                used = _cpu_seconds(self._ranks[rank].pid)
                began, before = self._cpu.setdefault(rank, (now, used))
                works |= now - began < 0.5 or used - before > _IDLE_CPU * (now - began)
        return works

    def _stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        alive = {rank: self._ranks[rank] for rank in ranks if self._alive(rank)}
        return look_at(
            {rank: one.pid for rank, one in alive.items()}, {rank: one.folder for rank, one in alive.items()}
        )

    def _alive(self, rank: int) -> bool:
        return rank in self._ranks and self._states[rank].exitcode is None

    def _rows(self, group: str, stacks: Mapping[int, Stack], finding: Finding | None = None) -> tuple[Row, ...]:
        """The rows of these ranks, or of all ranks for a finding."""
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

    def _verdict(self, finding: Finding) -> Verdict:
        stacks = self._stacks(tuple(self._ranks))
        rows = self._rows(finding.group, stacks, finding)
        texts = {rank: stack.text for rank, stack in stacks.items() if stack.text}
        said = compare.sentence(finding, self._states)
        return Verdict(finding.kind, finding.group, finding.odd, said, rows, texts)


def _progress(operations: Sequence[Operation]) -> object:
    """Changes when a rank issues a collective or one is done."""
    return operations[-1].record if operations else -1, tuple(one.record for one in operations if one.pending)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return True


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
