"""Report a run's progress: to the user by one live display and tables, to `ddparity run` by a marker file."""

from __future__ import annotations

import functools
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # importing ddparity need not take longer for rich
    from rich.progress import Progress as Bars
    from rich.table import Table

_NARROW = 75  # columns of a terminal, with fewer of which there is no bar beside the numbers
PROGRESS_MARKER = "progress"  # the file is there: the rank has finished a step, or has saved a checkpoint


@functools.cache
def mark_progress() -> None:
    """Write the progress marker: a file that tells this rank's agent that a failure from now on deserves a restart.

    Without an agent, do nothing. The file is written once in a process; later calls cost nothing.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        with suppress(OSError):
            (Path(error_file).parent / PROGRESS_MARKER).touch()


class Progress(Protocol):
    """The display of all ranks: call `update` when it is `due`, and `say` for a line that stays."""

    def due(self, done: int) -> bool: ...
    def update(self, done: int, samples: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...


@contextmanager
def progress(
    total: int | None, rank: int, title: str, unit: str = "steps", start: tuple[int, int] = (0, 0)
) -> Iterator[Progress]:
    """Show units done, samples per second, a note and the time left, on rank 0; the other ranks show nothing.

    On a terminal and in a notebook this is one line that changes, elsewhere plain lines.

    Args:
        total: the number of units; None where it is unknown.
        rank: this process's rank.
        title: the first word of the display.
        unit: the name of a unit, in the plural.
        start: units and samples that were done before.
    """
    if rank:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    if console.is_jupyter or _writes_to_notebook():
        line = _OneLine(total, title, unit, start)
        yield line
        line.end()
        return
    if not console.is_terminal:
        yield _Lines(total, title, unit, start)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        *[BarColumn()] * (console.width >= _NARROW),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} · {task.fields[rate]:,.0f} samples/s{task.fields[note]} ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, refresh_per_second=5) as bars:
        yield _Live(bars, total, title, unit, start)


def _writes_to_notebook() -> bool:
    """Return whether a notebook started this process and shows its output, which a pipe takes there."""
    with suppress(OSError, ValueError, AttributeError):  # standard output is closed, or no file
        return "JPY_PARENT_PID" in os.environ and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    return False


class _Silent:
    def due(self, done: int) -> bool:
        return False

    def update(self, done: int, samples: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...


class _Timed:
    """Measure the time; an update is due every `period_s` and after the last unit."""

    def __init__(self, total: int | None, title: str, unit: str, period_s: float, start: tuple[int, int]) -> None:
        self.total = total
        self.title = title
        self.unit = unit
        self.start = start
        self._period_s = period_s
        self._start = self._updated = time.monotonic()

    def due(self, done: int) -> bool:
        return done == self.total or time.monotonic() - self._updated >= self._period_s

    def elapsed_s(self) -> float:
        self._updated = time.monotonic()
        return max(self._updated - self._start, 1e-9)

    def text(self, done: int, samples: int, note: str) -> str:
        """Return the units done, the rate, the note and the time left."""
        elapsed_s = self.elapsed_s()
        parts = [f"{done} {self.unit}" if self.total is None else f"{done}/{self.total} {self.unit}"]
        parts += [f"{(samples - self.start[1]) / elapsed_s:,.0f} samples/s", *[note] * bool(note)]
        if self.total is not None:
            parts.append(f"{elapsed_s / (done - self.start[0]) * (self.total - done):.0f} s left")
        return f"{self.title}: {', '.join(parts)}"


class _Live(_Timed):
    def __init__(self, bars: Bars, total: int | None, title: str, unit: str, start: tuple[int, int]) -> None:
        super().__init__(total, title, unit, 0.2, start)
        self._bars = bars
        self._task = bars.add_task(title, total=total, completed=start[0], unit=unit, rate=0.0, note="")

    def update(self, done: int, samples: int, note: str = "") -> None:
        rate = (samples - self.start[1]) / self.elapsed_s()
        self._bars.update(self._task, completed=done, rate=rate, note=f" · {note}" if note else "")

    def say(self, line: str) -> None:
        self._bars.console.print(line, highlight=False)


class _Lines(_Timed):
    """Plain lines, for files and pipes."""

    def __init__(self, total: int | None, title: str, unit: str, start: tuple[int, int]) -> None:
        super().__init__(total, title, unit, 5.0, start)

    def update(self, done: int, samples: int, note: str = "") -> None:
        self.say(self.text(done, samples, note))

    def say(self, line: str) -> None:
        print(line, flush=True)


class _OneLine(_Timed):
    """One line that changes, for notebooks. They know only the return to its start, and colours."""

    def __init__(self, total: int | None, title: str, unit: str, start: tuple[int, int]) -> None:
        super().__init__(total, title, unit, 0.5, start)
        self._shown = ""

    def update(self, done: int, samples: int, note: str = "") -> None:
        self._show(self.text(done, samples, note))

    def say(self, line: str) -> None:
        shown = self._shown
        self._show(line)
        print(flush=True)
        self._shown = ""
        if shown:
            self._show(shown)

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            print(flush=True)

    def _show(self, line: str) -> None:
        print(f"\r{line.ljust(len(self._shown))}", end="", flush=True)
        self._shown = line


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a table of names and values to standard output."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print(table)


def show_grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a header to standard output: the first column is left-aligned, the others right-aligned."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="cyan")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _print(table)


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200  # not the 80 columns that rich assumes: long values are not folded
    console.print(table)
