"""Describe a hang for people: a headline, a table with one row per rank, and files with the stacks."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .desync import Finding, RankState, describe_ranks
from .flight import AGREEMENT, DEFAULT_GROUP, Operation
from .stacks import Stack, last_user_frame

ABORTING = "aborting"


@dataclass(frozen=True)
class Row:
    """One rank in a hang report.

    `where`: file:line. `since_s`: seconds since the rank called `collective`. `used`: what it has used since progress
    stopped. `only_waits`: it can do nothing but wait.
    """

    rank: int
    host: str
    where: str
    function: str
    activity: str
    collective: str
    since_s: float | None
    used: str = ""
    only_waits: bool = False


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
    if finding.kind == "circle":
        return f"the ranks wait for each other: {'; '.join(_circle(finding))}"
    if finding.kind == "mismatch":
        calls: dict[str, list[int]] = {}
        for rank, one in sorted(finding.operations.items()):
            calls.setdefault(str(one), []).append(rank)
        each = [f"{describe_ranks(ranks)} {_verb(ranks, 'call', 'calls')} {call}" for call, ranks in calls.items()]
        return f"the ranks do not agree on collective {number}: {', '.join(each)}"
    operation = next((one for rank in finding.waiting if (one := finding.operations.get(rank)) is not None), None)
    agreement = operation is not None and operation.backend == AGREEMENT
    waiting = f"{describe_ranks(finding.waiting)} {_verb(finding.waiting, 'wait', 'waits')} in {operation}"
    waiting += "" if agreement else f" (collective {number})"
    call = _called(operation) if operation is not None else f"collective {number}"
    who = describe_ranks(finding.blamed)
    if agreement and finding.blamed and finding.kind == "absent":  # they may have come, and still run the body
        return f"{waiting} for {who}"
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


def _circle(finding: Finding) -> list[str]:
    """Return which ranks wait in what and for whom, like "rank 0 waits in first("world") for rank 1"."""
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank in finding.waiting:
        one = finding.operations[rank]
        assert one is not None, "a rank of a circle waits"
        alike.setdefault((_called(one), finding.awaited[rank]), []).append(rank)
    return [
        f"{describe_ranks(ranks)} {_verb(ranks, 'wait', 'waits')} in {call} for {describe_ranks(awaited)}"
        for (call, awaited), ranks in alike.items()
    ]


def _called(operation: Operation) -> str:
    """Return a collective's name and number, like "all_reduce #6 of group 2", or the name of an agreement."""
    if operation.backend == AGREEMENT:
        return operation.name
    return f"{operation.name} #{operation.sequence}{_of_group(operation.group)}"


def _of_group(group: str) -> str:
    return "" if group == DEFAULT_GROUP else f" of group {group}"


def _verb(ranks: tuple[int, ...] | list[int], plural: str, singular: str) -> str:
    return plural if len(ranks) > 1 else singular


def make_row(
    host: str, state: RankState, operation: Operation | None, stack: Stack | None, activity: str = "", used: str = ""
) -> Row:
    """Return the row of one rank.

    Args:
        host: the machine's name.
        state: what is known of the rank.
        operation: the collective to show.
        stack: where the rank is; None: unknown.
        activity: what the rank does, where more is known of it than the stack shows.
        used: what the rank has used.
    """
    waits = operation if operation is not None and operation.pending and state.waits() else None
    agreement = operation is not None and operation.backend == AGREEMENT
    frame = stack.user_frame() if stack is not None else None
    if state.exitcode is not None:
        activity = f"ended with exit code {state.exitcode}"
    elif (
        not activity
        and waits is not None
        and stack is not None
        and (stack.in_collective(agreement) or (not agreement and stack.in_our_collective()))
    ):
        activity = f"in {waits.name}" if not agreement else "waiting for the others"
    elif not activity and stack is not None:
        activity = stack.activity()
    if operation is None:
        collective = ""
    else:
        shown = operation.name if agreement else f"{operation} #{operation.sequence}"
        last = operation.name if agreement else f"{operation.name} #{operation.sequence}"
        collective = shown if waits is not None or activity == ABORTING else f"(last: {last})"
    return Row(
        rank=state.rank,
        host=host,
        where=f"{frame.file}:{frame.line}" if frame is not None else "",
        function=frame.function if frame is not None else "",
        activity=activity,
        collective=collective,
        since_s=time.time() - operation.created_s if operation is not None else None,
        used=used,
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
    return f"hang: {report.headline}\n{describe_rows(report.rows, width)}"


def describe_rows(rows: Sequence[Row], width: int = 120) -> str:
    """Return a table with one row per rank, as plain text of at most `width` columns."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    used = any(row.used for row in rows)
    for name in ("rank", "host", "position", "activity", "collective", "called", *["used since"] * used):
        table.add_column(name, overflow="fold", no_wrap=name in ("rank", "host", "called"))
    for row in rows:
        where = f"{short(row.where)}, in {row.function}" if row.where else ""
        since = "" if row.since_s is None else f"{row.since_s:.0f} s ago"
        table.add_row(str(row.rank), row.host, where, row.activity, row.collective, since, *[row.used] * used)
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def short(where: str) -> str:
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
