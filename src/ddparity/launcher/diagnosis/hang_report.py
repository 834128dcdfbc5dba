"""How a verdict reads."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .desync import RankState
from .flight import Operation
from .stacks import Stack, last_place


@dataclass(frozen=True)
class Row:
    """One rank in a verdict. `where`: file:line; `since_s`: how long it has been waiting, or away."""

    rank: int
    host: str
    where: str
    function: str
    doing: str
    waits_for: str
    since_s: float | None


@dataclass(frozen=True)
class Verdict:
    """What hangs. `odd`: the ranks to name, none where the network stalls; `sentence`: the whole of it in one."""

    kind: str
    group: str
    odd: tuple[int, ...]
    sentence: str
    rows: tuple[Row, ...]
    stacks: Mapping[int, str]

    @property
    def left(self) -> tuple[int, ...]:
        """The ranks that ended well while others needed them."""
        return self.odd if self.kind == "finished" else ()


def make_row(
    host: str, state: RankState, group: str, stack: Stack | None, operation: Operation | None, aborts: bool
) -> Row:
    """A rank as seen from a group; `operation`: the collective to show where it waits in none."""
    waits = state.pending(group) if state.exitcode is None else None
    shown = waits or operation or state.last(group)
    place = stack.place() if stack is not None else None
    if state.exitcode is not None:
        doing = f"ended with exit code {state.exitcode}"
    elif aborts:
        doing = "aborts"
    elif waits is not None and stack is not None and stack.in_collective():
        doing = f"in {waits.name}"
    else:
        doing = stack.doing() if stack is not None else ""
    if shown is None:
        collective = ""
    elif waits is not None or aborts:
        collective = f"{shown} #{shown.sequence}"
    else:
        collective = f"(last: {shown.name} #{shown.sequence})"
    return Row(
        rank=state.rank,
        host=host,
        where=f"{place.file}:{place.line}" if place is not None else "",
        function=place.function if place is not None else "",
        doing=doing,
        waits_for=collective,
        since_s=time.time() - shown.created_s if shown is not None else None,
    )


def placed(verdict: Verdict, traces: Mapping[int, str]) -> Verdict:
    """With where a rank stood from its traceback, for those that had ended before anybody looked."""
    rows = []
    for row in verdict.rows:
        place = last_place(traces.get(row.rank, "")) if not row.where else None
        rows.append(row if place is None else replace(row, where=f"{place.file}:{place.line}", function=place.function))
    return replace(verdict, rows=tuple(rows))


def describe(verdict: Verdict, width: int = 120) -> str:
    """The sentence and a table with a row a rank, as plain text of at most `width` columns."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    for name in ("rank", "host", "stands at", "does", "collective", "since"):
        table.add_column(name, overflow="fold", no_wrap=name in ("rank", "host", "since"))
    for row in verdict.rows:
        where = f"{_short(row.where)}, in {row.function}" if row.where else ""
        since = "" if row.since_s is None else f"{row.since_s:.0f} s"
        table.add_row(str(row.rank), row.host, where, row.doing, row.waits_for, since)
    text = io.StringIO()
    Console(file=text, width=width, color_system=None, highlight=False).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([f"hang: {verdict.sentence}", *lines])


def _short(where: str) -> str:
    """A path below the working directory, relative to it."""
    try:
        relative = os.path.relpath(where)
    except ValueError:  # another drive
        return where
    return where if relative.startswith("..") else relative


def write_stacks(stacks: Mapping[int, str], directory: Path) -> list[Path]:
    """Write each rank's stacks, all threads, to `stacks-rank-N.txt` in a directory; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for rank, text in sorted(stacks.items()):
        if text:
            written.append(directory / f"stacks-rank-{rank}.txt")
            written[-1].write_text(text.rstrip() + "\n")
    return written
