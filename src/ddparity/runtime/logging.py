"""Output of N processes that reads like the output of one: logging, warnings, progress."""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..compat import Store
from .agreement import store_root
from .environment import find_placement

_FORMAT = "%(levelname)s %(name)s: %(message)s"
_PLAIN = logging.Formatter()  # what a handler without a formatter does
_CONNECT_S = 5.0


def setup_logging(level: int | str = logging.INFO, others: int | str = logging.WARNING) -> None:
    """Let rank 0 speak from `level` up, the other ranks only from `others` up, prefixed by their rank.

    Call it once on every rank, in or before `world()`. Handlers that exist, on the root logger or on a library's, stay
    and obey from now on; log files (`FileHandler`) are left alone. Without a handler on the root logger, one that
    writes to standard error is added. Python's `warnings` go through logging, and one that several ranks raise appears
    once; before `world()`, where ranks cannot ask each other, rank 0 shows its own. The progress bars of tqdm and of
    rich are silent on the other ranks.

    Collectives: none; one store request a distinct warning and rank; one connection a data-loader worker that warns.

    Raises:
        ValueError: a level's name is unknown.
    """
    rank = _rank()
    level, others = _level(level), _level(others)
    threshold = level if rank == 0 else others
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_StandardError())
        root.handlers[0].setFormatter(logging.Formatter(_FORMAT))
    root.setLevel(min(level, others))  # log files take the same records on every rank
    for handler in _terminal_handlers():
        handler.filters = [old for old in handler.filters if not isinstance(old, _Speaks)]
        handler.addFilter(_Speaks(rank, threshold))
        formatter = handler.formatter.plain if isinstance(handler.formatter, _Prefixed) else handler.formatter
        handler.setFormatter(_Prefixed(rank, formatter) if rank else formatter)
    logging.captureWarnings(True)
    if rank:
        _silence_progress_bars()


class _StandardError(logging.StreamHandler[Any]):
    """Writes to whatever sys.stderr is at the moment, so that a live display or a notebook can redirect it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _Speaks(logging.Filter):
    """Passes records from a threshold up, and each Python warning from the first process that raises it."""

    def __init__(self, rank: int, threshold: int) -> None:
        super().__init__()
        self._rank = rank
        self._threshold = threshold
        self._pid = os.getpid()
        self._own_store: Store | None = None  # of a forked process

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < self._threshold:
            return False
        return record.name != "py.warnings" or self._first_to_warn(record)

    def _first_to_warn(self, record: logging.LogRecord) -> bool:
        marks = vars(record)
        if "first_to_warn" not in marks:  # once a record, however many handlers ask
            marks["first_to_warn"] = self._claim(record.getMessage())
        return bool(marks["first_to_warn"])

    def _claim(self, message: str) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._rank == 0
        try:
            key = f"warnings/{hashlib.blake2b(message.encode(), digest_size=16).hexdigest()}"
            name = f"rank {self._rank}, process {os.getpid()}"
            return self._store().compare_set(key, "", name).decode() == name
        except (RuntimeError, AttributeError):  # no store at the end of a run, no clone: better twice than lost
            return True

    def _store(self) -> Store:
        """The group's store; a forked data-loader worker must not use its parent's connection, and opens its own."""
        if os.getpid() == self._pid:
            return store_root()
        if self._own_store is None:
            store = store_root()
            store.set_timeout(timedelta(seconds=_CONNECT_S))  # of this process's copy; no request
            self._own_store = store.clone()
        return self._own_store


class _Prefixed(logging.Formatter):
    def __init__(self, rank: int, plain: logging.Formatter | None) -> None:
        super().__init__()
        self.plain = plain
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        return f"[rank {self._rank}] {(self.plain or _PLAIN).format(record)}"


_TO_TERMINALS = (logging.StreamHandler, RichHandler)


def _terminal_handlers() -> list[logging.Handler]:
    """Every handler of the root logger, and the handlers of other loggers that write to a terminal; no log files."""
    handlers = list(logging.getLogger().handlers)
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            handlers += [handler for handler in logger.handlers if isinstance(handler, _TO_TERMINALS)]
    return [handler for handler in handlers if not isinstance(handler, logging.FileHandler)]


def _silence_progress_bars() -> None:
    """Their consoles stay, for what a program prints and logs there."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # for processes that this one starts
    _silence(Bars)
    with suppress(ImportError):
        _silence(importlib.import_module("tqdm.std").tqdm)


def _silence(bar: Any) -> None:
    """Make a class of progress bars, and its children, as with `disable=True`, also where a library passes False."""
    if not hasattr(bar.__init__, "silenced"):
        loud = bar.__init__

        @functools.wraps(loud)
        def silent(self: Any, *args: Any, **kwargs: Any) -> None:
            loud(self, *args, **{**kwargs, "disable": True})

        silent.silenced = True  # type: ignore[attr-defined]  # a mark, so that it is wrapped once
        bar.__init__ = silent


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    placement = find_placement()
    return placement.rank if placement is not None else 0


def _level(level: int | str) -> int:
    if isinstance(level, str):
        names = logging.getLevelNamesMapping()
        if level.upper() not in names:
            raise ValueError(f"unknown logging level {level!r}: use one of {', '.join(names)}")
        return names[level.upper()]
    return level


class Progress(Protocol):
    """One display for all ranks: `update` when it is `due`, `say` for a line that stays."""

    def due(self, done: int) -> bool: ...
    def update(self, done: int, samples: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...


@contextmanager
def progress(
    total: int | None, rank: int, title: str, unit: str = "steps", start: tuple[int, int] = (0, 0)
) -> Iterator[Progress]:
    """The live display on rank 0: units done of a total that may be unknown, samples a second, a note, time left.

    Plain lines where there is no terminal. `start`: units and samples that were done before.
    """
    if rank:
        yield _Silent()
        return
    console = Console()
    if not console.is_terminal:
        yield _Lines(total, title, unit, start)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} · {task.fields[rate]:,.0f} samples/s{task.fields[note]} ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Bars(*columns, console=console, refresh_per_second=5) as bars:
        yield _Live(bars, total, title, unit, start)


def show_table(title: str, rows: list[tuple[str, str]]) -> None:
    """A table of names and values on standard output, as wide as its longest row where that is no terminal."""
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print(table)


def show_grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a head on standard output; the first column reads from the left, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="cyan")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


class _Silent:
    def due(self, done: int) -> bool:
        return False

    def update(self, done: int, samples: int, note: str = "") -> None: ...
    def say(self, line: str) -> None: ...


class _Timed:
    """Due every `period_s` and at the end; keeps the rate and the time left."""

    def __init__(
        self, total: int | None, title: str, unit: str, period_s: float, start: tuple[int, int] = (0, 0)
    ) -> None:
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


class _Live(_Timed):
    def __init__(self, bars: Bars, total: int | None, title: str, unit: str, start: tuple[int, int] = (0, 0)) -> None:
        super().__init__(total, title, unit, 0.2, start)
        self._bars = bars
        self._task = bars.add_task(title, total=total, completed=start[0], unit=unit, rate=0.0, note="")

    def update(self, done: int, samples: int, note: str = "") -> None:
        rate = (samples - self.start[1]) / self.elapsed_s()
        self._bars.update(self._task, completed=done, rate=rate, note=f" · {note}" if note else "")

    def say(self, line: str) -> None:
        self._bars.console.print(line, highlight=False)


class _Lines(_Timed):
    """Lines for files and pipes."""

    def __init__(self, total: int | None, title: str, unit: str, start: tuple[int, int] = (0, 0)) -> None:
        super().__init__(total, title, unit, 5.0, start)

    def update(self, done: int, samples: int, note: str = "") -> None:
        elapsed_s = self.elapsed_s()
        parts = [f"{done} {self.unit}" if self.total is None else f"{done}/{self.total} {self.unit}"]
        parts += [f"{(samples - self.start[1]) / elapsed_s:,.0f} samples/s", *[note] * bool(note)]
        if self.total is not None:
            parts.append(f"{elapsed_s / (done - self.start[0]) * (self.total - done):.0f} s left")
        self.say(f"{self.title}: {', '.join(parts)}")

    def say(self, line: str) -> None:
        print(line, flush=True)
