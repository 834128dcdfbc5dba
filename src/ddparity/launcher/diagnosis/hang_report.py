"""Describe a hang for people: a headline, a table with one row per rank, and files with the stacks."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .desync import Finding, RankState, describe_ranks
from .flight import DEFAULT_GROUP, Operation
from .stacks import Stack, last_user_frame


@dataclass(frozen=True)
class Row:
    """One rank in a hang report. `where`: file:line. `since_s`: seconds since the rank called `collective`."""

    rank: int
    host: str
    where: str
    function: str
    activity: str
    collective: str
    since_s: float | None


@dataclass(frozen=True)
class HangReport:
    """One hang. `blamed`: the ranks that cause it, none if the network does. `stacks`: of this machine's ranks."""

    kind: str
    group: str
    blamed: tuple[int, ...]
    headline: str
    rows: tuple[Row, ...]
    stacks: Mapping[int, str]

    @property
    def left(self) -> tuple[int, ...]:
        """The ranks that ended with exit code 0 while other ranks waited for them."""
        return self.blamed if self.kind == "finished" else ()


def headline(finding: Finding, states: Mapping[int, RankState]) -> str:
    """Return one sentence: which rank causes the hang, what it did or did not do, and the evidence."""
    number = f"#{finding.sequence}{_of_group(finding.group)}"
    if finding.kind == "mismatch":
        calls: dict[str, list[int]] = {}
        for rank, one in sorted(finding.operations.items()):
            calls.setdefault(str(one), []).append(rank)
        each = [f"{describe_ranks(ranks)} {_verb(ranks, 'call', 'calls')} {call}" for call, ranks in calls.items()]
        return f"the ranks do not agree on collective {number}: {', '.join(each)}"
    operation = next((one for rank in finding.waiting if (one := finding.operations.get(rank)) is not None), None)
    waiting = (
        f"{describe_ranks(finding.waiting)} {_verb(finding.waiting, 'wait', 'waits')} in {operation} "
        f"(collective {number})"
    )
    call = f"{operation.name if operation is not None else 'collective'} {number}"
    who = describe_ranks(finding.blamed)
    if finding.kind == "stalled":
        what = f"{who} {_verb(finding.blamed, 'do', 'does')} not answer" if finding.blamed else "no data moves"
        return f"{what}: {waiting}, which all ranks have called"
    if not finding.blamed:
        return f"no other rank has called {call}: {waiting}"
    if finding.kind == "finished":
        what = f"finished without calling {call}"
    else:
        what = f"{_verb(finding.blamed, 'have', 'has')} not called {call}"
    lasts = {states[rank].last(finding.group) for rank in finding.blamed}
    last = lasts.pop() if len(lasts) == 1 else None
    evidence = f", the last call of {who} was {last.name} #{last.sequence}" if last is not None else ""
    return f"{who} {what}: {waiting}{evidence}"


def _of_group(group: str) -> str:
    return "" if group == DEFAULT_GROUP else f" of group {group}"


def _verb(ranks: tuple[int, ...] | list[int], plural: str, singular: str) -> str:
    return plural if len(ranks) > 1 else singular


def make_row(
    host: str, state: RankState, group: str, stack: Stack | None, operation: Operation | None, aborts: bool
) -> Row:
    """Return the row of one rank. `operation`: the collective to show if the rank waits in none of the group."""
    waits = state.pending(group) if state.exitcode is None else None
    shown = waits or operation or state.last(group)
    frame = stack.user_frame() if stack is not None else None
    if state.exitcode is not None:
        activity = f"ended with exit code {state.exitcode}"
    elif aborts:
        activity = "aborting"
    elif waits is not None and stack is not None and stack.in_collective():
        activity = f"in {waits.name}"
    else:
        activity = stack.activity() if stack is not None else ""
    if shown is None:
        collective = ""
    elif waits is not None or aborts:
        collective = f"{shown} #{shown.sequence}"
    else:
        collective = f"(last: {shown.name} #{shown.sequence})"
    return Row(
        rank=state.rank,
        host=host,
        where=f"{frame.file}:{frame.line}" if frame is not None else "",
        function=frame.function if frame is not None else "",
        activity=activity,
        collective=collective,
        since_s=time.time() - shown.created_s if shown is not None else None,
    )


def add_positions(report: HangReport, tracebacks: Mapping[int, str]) -> HangReport:
    """Return the report with the position of ranks that had ended before their stacks were read, from tracebacks."""
    rows = []
    for row in report.rows:
        frame = last_user_frame(tracebacks.get(row.rank, "")) if not row.where else None
        rows.append(row if frame is None else replace(row, where=f"{frame.file}:{frame.line}", function=frame.function))
    return replace(report, rows=tuple(rows))


def describe_hang(report: HangReport, width: int = 120) -> str:
    """Return the headline and a table with one row per rank, as plain text; the table has at most `width` columns."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    for name in ("rank", "host", "position", "activity", "collective", "called"):
        table.add_column(name, overflow="fold", no_wrap=name in ("rank", "host", "called"))
    for row in report.rows:
        where = f"{_short(row.where)}, in {row.function}" if row.where else ""
        since = "" if row.since_s is None else f"{row.since_s:.0f} s ago"
        table.add_row(str(row.rank), row.host, where, row.activity, row.collective, since)
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, highlight=False).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([f"hang: {report.headline}", *lines])


def _short(where: str) -> str:
    """Return a path relative to the working directory if it is below that."""
    try:
        relative = os.path.relpath(where)
    except ValueError:  # another drive
        return where
    return where if relative.startswith("..") else relative


def write_stacks(stacks: Mapping[int, str], directory: Path) -> list[Path]:
    """Write the stacks of each rank, of all its threads, to `stacks-rank-N.txt` in a directory; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for rank, text in sorted(stacks.items()):
        if text:
            written.append(directory / f"stacks-rank-{rank}.txt")
            written[-1].write_text(text.rstrip() + "\n")
    return written
