"""Watch the ranks of one machine from its agent: report a hang, which ends the job, or ranks that others wait for.

What cannot end by itself is a hang: ranks call different collectives, a rank has ended while others wait for it, or
ranks wait for each other. A rank that has only not come yet may be healthy, however long it takes. It is reported, and
it is a hang when the time-out of its process group or the user's own time is over.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch.distributed import DistError

from . import desync, messages
from .absence import REPORT_S, Notice, Schedule, describe_absence, describe_unended, say_time
from .circle import find_circle
from .desync import Finding
from .exits import is_own_failure
from .hang_report import HangReport, Row, write_stacks
from .known import Known, WatchedRank, is_idle
from .looks import asked_group, exceptions_of, has_prompt, report_on, rows_of, stacks_of, texts
from .messages import AgentChannel, MachineState
from .stacks import DEBUGGED, SLOW_ACTIVITIES, signal_for_stacks
from .unended import Handled, read_ended

__all__ = ["Watch", "WatchedRank"]

_POLL_S = 1.0
_CHECK_S = 0.5  # between polls while a rank waits in the same collective as at the last poll
_SOON_S = 0.1  # between polls while a rank aborts, or other machines are asked
_LONG_WAIT = (
    10  # times the user's time: for a rank that compiles, reads or writes a checkpoint, or is in its first step
)
_UNRECORDED_S = 3.0
_CIRCLE_S = 3.0  # without progress, until ranks that wait for each other are looked at
_TOGETHER_S = 3.0  # for the other machines to answer where their ranks are
_AFTER_TIMEOUT_S = 5.0  # for torch to end the ranks itself
_BEFORE_TIMEOUT_S = 5.0  # when the stacks are kept: after the time-out the ranks may have ended
_KEPT_S = 30.0  # how long what was kept explains an end

# The ranks may go on while stacks are read. The other kinds are certain from the records alone.
_MAY_END = ("absent", "stalled", "circle")
# What a finding is for: it ends the job; it is told and the job goes on; it is kept for the end of the ranks.
_Purpose = Literal["end", "tell", "keep"]


class Watch:
    """Poll the collectives of the ranks; `look` returns a report once a hang is certain.

    Args:
        ranks: those of this machine.
        hang_timeout_s: seconds without progress after which a rank that has not called a collective is a hang; None:
            the time-out of the process group.
        channel: to the agents of the job's other machines, if there are any.
        report_s: seconds without progress after which such a rank is first reported.
    """

    def __init__(
        self,
        ranks: Sequence[WatchedRank],
        hang_timeout_s: float | None = None,
        channel: AgentChannel | None = None,
        report_s: float = REPORT_S,
    ) -> None:
        self._known = Known(ranks)
        self._timeout_s = hang_timeout_s
        self._own_timeout_s = hang_timeout_s if hang_timeout_s is not None else float("inf")
        self._channel = channel
        self._host = socket.gethostname().partition(".")[0]
        self._polled_at = self._known.now()
        self._next_poll = time.monotonic() + _POLL_S

        self._schedule = Schedule(report_s)
        self._notices: list[Notice] = []
        self._check_at: dict[str, float] = {}  # by group: when to read stacks next
        self._long_wait_at: dict[str, float] = {}  # by group: when there was last a reason for a long wait
        self._circle_at = 0.0  # when to look next at ranks that wait for each other
        self._circle: tuple[object, ...] = ()  # those of the last look
        self._reported: set[tuple[object, ...]] = set()
        self._kept: tuple[float, tuple[object, ...], HangReport] | None = None  # when, of which finding

        self._candidate: tuple[Finding, _Purpose] | None = None  # the finding that the other machines are asked about
        self._question, self._asked_at = 0, 0.0
        self._announced = ""
        self._answer: tuple[Row, ...] = ()

    def ended(self, rank: int, exitcode: int) -> None:
        """Note that a rank of this machine has ended. The next look reports it if other ranks wait for it."""
        self._known.ended(rank, exitcode)
        self._next_poll = min(self._next_poll, time.monotonic())

    @property
    def progressed(self) -> bool:
        """Whether a rank has called one collective twice, as in its second step."""
        return bool(self._known.repeated)

    def look(self) -> HangReport | None:
        """Poll the ranks if it is time to; return a report of a new hang. The agent calls it several times a second."""
        now = self._known.tick()
        if self._known.check_aborts(now):
            self._next_poll = time.monotonic()
        if time.monotonic() < self._next_poll:
            return None
        self._poll(now)
        report = None
        if self._channel is None:
            found = self._find_hang(now)
            report = self._judge(*found, now) if found is not None else None
        else:
            with suppress(DistError):  # the machine that holds the store is gone: an agent reports that
                report = self._look_with_others(self._channel, now)
        report = report or self._find_unended()
        soon = self._known.aborting or self._candidate is not None
        pause_s = _SOON_S if soon else _CHECK_S if self._known.unchanged else _POLL_S
        self._next_poll = time.monotonic() + pause_s
        return report

    def take_notices(self) -> list[Notice]:
        """Return the reports since the last call on ranks that others wait for. The job goes on."""
        taken, self._notices = self._notices, []
        return taken

    def explain(self) -> HangReport | None:
        """Return why ranks failed, if their last collectives show it: a mismatch, a rank that ended too early, or one
        that had not called a collective when its time-out was over.

        The agent calls it after a rank has failed, before it ends the other ranks.
        """
        known = self._known
        now = known.now()
        self._poll(now)
        known.ask_for_groups()
        known.note_ends(now)
        for group in desync.default_last(one.group for state in known.states.values() for one in state.operations):
            ranks = [rank for rank in known.ranks_of(group) if rank not in known.unrecorded]
            mismatch = desync.find_mismatch(known.states, group, bool(known.aborts))
            finding = mismatch or desync.find_left(known.states, group, ranks)
            if finding is not None:
                return report_on(known, self._host, finding)
        if self._kept is not None and now - self._kept[0] < _KEPT_S:
            return self._kept[2]
        return None

    def stragglers(self, always: bool = False) -> str:
        """Return for which ranks the others waited; "" if no rank stands out, unless `always`."""
        return self._known.straggler_count.describe(always)

    def rows(self) -> tuple[Row, ...]:
        """Return what each rank of this machine does now, and what it has used since progress stopped."""
        return rows_of(self._known, self._host, "", stacks_of(self._known, self._known.ranks))

    def at_prompt(self) -> list[int]:
        """Return the ranks of this machine that are at a debugger's prompt."""
        return [rank for rank in self._known.ranks if has_prompt(self._known, rank)]

    def exceptions(self) -> dict[int, Handled]:
        """Return the exceptions of ranks of this machine that are on their way out, while the rank waits."""
        found = exceptions_of(self._known, self._known.ranks)
        return {rank: one for rank, one in found.items() if one.leaves and is_own_failure(one.message)}

    def keep_stacks(self, report: HangReport, directory: Path, ends: bool = True) -> list[Path]:
        """Write the stacks of all ranks of this machine to files. Call it before any signal to the ranks.

        `ends`: the job ends after this. Then a rank whose stacks could not be read gets a signal to write them itself.
        """
        found = dict(report.stacks)
        for rank, watched in self._known.ranks.items():
            if ends and rank not in found and self._known.alive(rank):
                found[rank] = signal_for_stacks(watched.pid, watched.folder)
        return write_stacks(found, directory)

    def _poll(self, now: float) -> None:
        self._known.poll(now, now - self._polled_at)
        self._polled_at = now

    # Whether they hang.

    def _find_hang(self, now: float) -> tuple[Finding, _Purpose] | None:
        """Return a finding that has not been reported, and what it is for. The other machines are not asked yet."""
        self._known.note_unchanged(now)
        found = self._find_new(now)
        if found is not None and self._known.ask_for_groups():
            return None  # calls of different groups were compared: the next look compares again
        return found

    def _find_new(self, now: float) -> tuple[Finding, _Purpose] | None:
        known = self._known
        for group in desync.stuck_groups(known.states):
            if group not in known.unchanged and not known.aborting:
                continue
            finding = desync.find_mismatch(known.states, group, bool(known.aborts))
            if finding is None and group in known.unchanged:
                missing = desync.find_missing(known.states, group, known.ranks_of(group))
                finding = missing if missing is not None and missing.proof and self._is_recorded(missing, now) else None
            if finding is not None and finding.key() not in self._reported:
                return finding, "end"
        finding = self._find_circle(now)
        if finding is not None:
            return finding, "end"
        for group in desync.stuck_groups(known.states):
            finding = desync.find_missing(known.states, group, known.ranks_of(group))
            if finding is not None and not finding.proof and group in known.unchanged:
                purpose = self._purpose(finding, now)
                if purpose is not None:
                    return finding, purpose
        return None

    def _is_recorded(self, finding: Finding, now: float) -> bool:
        """Return whether the last collectives of ranks that finished are known.

        If such a rank left no record at its end, they are known only up to the last poll.
        """
        idle_s = self._known.idle_s(self._known.ranks_of(finding.group), now)
        return idle_s > _UNRECORDED_S or not set(finding.blamed) & self._known.unrecorded

    def _find_circle(self, now: float) -> Finding | None:
        """Return ranks that wait for each other, by their records."""
        if now < self._circle_at:
            return None
        finding = find_circle(self._known.states, self._known.ranks_of)
        if finding is None or finding.key() in self._reported:
            return None
        groups = {one.group for one in finding.operations.values() if one is not None}
        if not groups <= self._known.unchanged or self._known.idle_s(finding.waiting, now) < _CIRCLE_S:
            return None
        self._circle_at = now + _POLL_S
        if finding.key() != self._circle:  # groups may have been made again under their names, with other ranks
            self._circle = finding.key()
            self._known.ask_for_groups()
            return None
        return finding

    def _purpose(self, finding: Finding, now: float) -> _Purpose | None:
        """Return what a rank that has not come is to be reported for; None: for nothing now."""
        known, ranks = self._known, self._known.ranks_of(finding.group)
        idle_s = known.idle_s(ranks, now)
        if known.may_end(ranks) or any(has_prompt(known, rank) or self._is_leaving(rank) for rank in finding.blamed):
            return None
        new = finding.key() not in self._reported
        limit_s, waited_s = finding.timeout_s(), known.since_s(finding.waited_since_s())
        if limit_s is not None and new:
            # An agreement goes on after it where all ranks have come: a save or a download takes as long as it needs.
            if waited_s > limit_s + _AFTER_TIMEOUT_S and idle_s > _AFTER_TIMEOUT_S and not finding.agreement:
                return "end"
            kept = self._kept is not None and self._kept[1] == finding.key()
            soon = waited_s > limit_s - min(_BEFORE_TIMEOUT_S, limit_s / 2)
            if soon and not kept and not (finding.agreement and waited_s > limit_s + _AFTER_TIMEOUT_S):
                return "keep"
        if self._timeout_s is not None and new and idle_s >= self._timeout_s and self._is_too_long(finding, now):
            return "end"
        if self._schedule.due(finding.key(), finding.place(), idle_s):
            return "tell"
        return None

    def _is_too_long(self, finding: Finding, now: float) -> bool:
        """Return whether a wait that is longer than the user's time is no normal one, as that for a compiler is."""
        ranks = self._known.ranks_of(finding.group)
        if self._known.idle_s(ranks, now) >= self._own_timeout_s * _LONG_WAIT:
            return True
        if now < self._check_at.get(finding.group, now):
            return False
        self._check_at[finding.group] = now + min(1.0, self._own_timeout_s / 4)
        if self._may_take_long(finding, ranks, now):
            self._long_wait_at[finding.group] = now
        return now - self._long_wait_at.get(finding.group, float("-inf")) >= self._own_timeout_s

    def _may_take_long(self, finding: Finding, ranks: Sequence[int], now: float) -> bool:
        """Return whether a long wait is normal: in the first step, in a compiler, in a checkpoint, or if data moves."""
        stacks = stacks_of(self._known, finding.blamed)
        if any(stack.state in "TtD" for stack in stacks.values()):
            return False
        if any(self._known.in_first_step(finding, rank) for rank in ranks):
            return True
        if any(stack.activity() in SLOW_ACTIVITIES for stack in stacks.values()):
            return True
        return finding.kind == "stalled" and not all(is_idle(*one) for one in self._known.used(ranks, now).values())

    def _judge(self, finding: Finding, purpose: _Purpose, now: float) -> HangReport | None:
        """Return the report of a hang; keep or tell what is none, or what the stacks do not confirm."""
        report = report_on(self._known, self._host, finding)
        if not self._is_confirmed(finding, purpose, report.rows):
            return None
        waits = finding.waiting if finding.kind == "circle" else self._known.ranks_of(finding.group)
        if finding.kind in _MAY_END and not self._known.no_progress_since_poll(waits):
            return None
        return self._act(finding, purpose, report, now)

    def _is_found_again(self, finding: Finding) -> bool:
        """Return whether the records still show it, now that the agents have asked their ranks for their groups."""
        known, group = self._known, finding.group
        if finding.kind == "circle":
            again = find_circle(known.states, known.ranks_of)
        elif finding.kind == "mismatch":
            again = desync.find_mismatch(known.states, group, bool(known.aborts))
        else:
            again = desync.find_missing(known.states, group, known.ranks_of(group))
        return again is not None and again.key() == finding.key()

    def _is_confirmed(self, finding: Finding, purpose: _Purpose, rows: Sequence[Row]) -> bool:
        """Return whether what ranks do, of all machines, agrees with the finding."""
        by_rank = {row.rank: row for row in rows}
        if finding.kind == "circle":
            # Each of them waits in what the records say, and has no other thread that could call what is awaited.
            return all(rank in by_rank and by_rank[rank].only_waits for rank in finding.waiting)
        prompt = any(by_rank[rank].activity in DEBUGGED for rank in finding.blamed if rank in by_rank)
        return finding.proof or not prompt

    def _act(self, finding: Finding, purpose: _Purpose, report: HangReport, now: float) -> HangReport | None:
        self._reported |= {finding.key()} if purpose == "end" else set()
        final = replace(report, rows=tuple(replace(row, used="") for row in report.rows))
        if purpose == "end":
            return final
        if purpose == "keep":
            said = f"{report.headline}; the time-out of its process group is {say_time(finding.timeout_s() or 0.0)}"
            self._kept = now, finding.key(), replace(final, headline=said)
            return None
        idle_s = self._known.idle_s(self._known.ranks_of(finding.group), now)
        self._schedule.reported(finding.key(), idle_s)
        said = "".join(
            f"{one.message.partition(chr(10))[0]} is on its way on rank {rank}, and "
            for rank, one in self.exceptions().items()
        )
        lines = describe_absence(finding, said + report.headline, report.rows, idle_s, self._timeout_s)
        self._notices.append(Notice(lines, report))
        return None

    def _find_unended(self) -> HangReport | None:
        """Tell of ranks whose script has ended and whose process runs; with a time of the user's, end them after it."""
        known = self._known
        for rank, watched in known.ranks.items():
            ended = read_ended(watched.pid, watched.folder) if known.alive(rank) else None
            waited_s = known.since_s(ended.at_s) if ended is not None else 0.0
            key = ("unended", rank)
            if ended is None or self._is_leaving(rank):
                continue
            too_long = waited_s >= self._own_timeout_s and key not in self._reported
            if not (too_long or self._schedule.due(key, key, waited_s)):
                continue
            said = f"the script of rank {rank} has ended, but its process still runs"
            said += f": {ended.keeps} keeps it" if ended.keeps else ""
            stacks = stacks_of(known, known.ranks)
            report = HangReport("unended", "", (rank,), said, rows_of(known, self._host, "", stacks), texts(stacks))
            if too_long:
                self._reported.add(key)
                return report
            self._schedule.reported(key, waited_s)
            self._notices.append(Notice(describe_unended(said, waited_s, self._timeout_s), report))
        return None

    def _is_leaving(self, rank: int) -> bool:
        """Return whether a rank's script has ended and nothing is known that keeps its process: Python is ending it."""
        known = self._known
        ended = read_ended(known.ranks[rank].pid, known.ranks[rank].folder) if known.alive(rank) else None
        if ended is None or ended.keeps:
            return False
        return known.since_s(ended.at_s) < min(self._own_timeout_s * _LONG_WAIT, REPORT_S)

    # Several machines: all publish their states, the leading agent compares them, asks where all ranks are, and
    # announces the report.

    def _look_with_others(self, channel: AgentChannel, now: float) -> HangReport | None:
        known = self._known
        announced = channel.announced() or ""
        if announced != self._announced:
            self._announced, self._answer = announced, ()
            report = messages.unpack_hang(announced)
            if report is not None and not channel.leads:
                return replace(report, stacks=texts(stacks_of(known, known.ranks)))
            group = messages.asked_group(announced)
            if group is not None:
                known.ask_for_groups()
                self._answer = rows_of(known, self._host, group, stacks_of(known, known.ranks))
        repeated = frozenset(one for one in known.repeated if one[0] in known.ranks)
        own = MachineState(self._host, known.local_states(), repeated, announced, self._answer)
        channel.publish(messages.pack(own))
        if not channel.leads:
            return None
        machines = messages.unpack_all(channel.read())
        for machine in machines:
            known.repeated |= machine.repeated
            for rank in machine.states.keys() - known.ranks.keys():
                known.update(machine.states[rank], now)
        if self._candidate is not None:
            return self._decide(channel, *self._candidate, machines, now)
        self._candidate = found = self._find_hang(now)
        if found is not None:
            self._question += 1
            self._asked_at = now
            channel.announce(messages.question(asked_group(found[0]), self._question))
        return None

    def _decide(
        self,
        channel: AgentChannel,
        finding: Finding,
        purpose: _Purpose,
        machines: Sequence[MachineState],
        now: float,
    ) -> HangReport | None:
        """Return the report once all machines have answered where their ranks are; None if it is no hang after all."""
        known = self._known
        question = messages.question(asked_group(finding), self._question)
        rows = {row.rank: row for machine in machines if machine.answers == question for row in machine.rows}
        if rows.keys() < known.states.keys() and now - self._asked_at < _TOGETHER_S:
            return None
        self._candidate = None
        idle_s = known.idle_s(finding.waiting if finding.kind == "circle" else known.ranks_of(finding.group), now)
        slow = any(rows[rank].activity in SLOW_ACTIVITIES for rank in finding.blamed if rank in rows)
        waits = finding.kind in _MAY_END
        progressed = waits and idle_s < now - self._asked_at
        answers = finding.kind == "stalled" and not all(known.states[rank].silent for rank in finding.blamed)
        own = purpose == "end" and not finding.proof and slow and idle_s < self._own_timeout_s * _LONG_WAIT
        confirmed = self._is_found_again(finding) and self._is_confirmed(finding, purpose, tuple(rows.values()))
        report = None
        if not (progressed or (answers and purpose == "end") or own) and confirmed:
            report = report_on(self._known, self._host, finding)
            report = replace(report, rows=tuple(rows.get(row.rank, row) for row in report.rows))
            report = self._act(finding, purpose, report, now)
        elif purpose == "end":
            self._reported.discard(finding.key())
            self._long_wait_at[finding.group] = now
        self._announced = messages.pack_hang(report, self._question) if report is not None else ""
        channel.announce(self._announced)
        return report
