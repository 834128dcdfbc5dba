"""Configure logging so that N processes write as one: log lines, Python's warnings, other libraries' progress bars."""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from ..compat import Store
from .agreement import store_root
from .environment import find_placement
from .log_libraries import follow_in_libraries, replace_method, restore_method, writes_to_terminal

_FORMAT = "%(levelname)s %(name)s: %(message)s"
_PLAIN = logging.Formatter()  # what a handler without a formatter uses
_CONNECT_S = 5.0


def setup_logging(
    level: int | str = logging.INFO, others: int | str = logging.WARNING, prints: Literal["all", "first"] = "all"
) -> None:
    """Let rank 0 log from `level` up, and the other ranks from `others` up, each line with the rank as a prefix.

    Call it once on every rank, before `world()` or inside of it. Handlers, on the root logger or on a library's, stay
    and follow these levels from now on, also those that are added later (`basicConfig(force=True)`, a library's own);
    log files (`FileHandler`) do not change. A root logger without a handler gets one that writes to standard error.
    loguru and structlog, where they are installed, follow the levels on the terminal. `prints="first"`: `print` shows
    nothing on the other ranks, unless it prints to a file. Python's `warnings` go through logging, and a warning that
    several ranks raise appears once. Before `world()` the ranks cannot ask each other, and only rank 0 shows its
    warnings. The progress bars of tqdm and rich are disabled on the other ranks.

    Collectives: none; one store request for each distinct warning and rank; one connection for each data-loader worker
    that warns.

    Raises:
        ValueError: a level's name is unknown, or `prints` is not one of the two.
    """
    if prints not in ("all", "first"):
        raise ValueError(f'prints={prints!r}: give "all", or "first" for the prints of rank 0 alone')
    rank = _rank()
    level, others = _level(level), _level(others)
    threshold = level if rank == 0 else others
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_StandardError())
        root.handlers[0].setFormatter(logging.Formatter(_FORMAT))
    root.setLevel(min(level, others))  # log files take the same records on every rank
    rank_filter = _RankFilter(rank, threshold)
    for handler in _terminal_handlers():
        _follow(handler, rank, rank_filter)
    _follow_later_handlers(rank, rank_filter)
    follow_in_libraries(rank, threshold)
    logging.captureWarnings(True)
    if rank:
        _disable_progress_bars()
    restore_method(builtins, "print")
    if rank and prints == "first":
        replace_method(builtins, "print", _quiet)


class _StandardError(logging.StreamHandler[Any]):
    """Write to the sys.stderr of the moment, which a live display or a notebook may replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


class _RankFilter(logging.Filter):
    """Pass records from a threshold up, and each Python warning only from the first process that raises it."""

    def __init__(self, rank: int, threshold: int) -> None:
        super().__init__()
        self._rank = rank
        self._threshold = threshold
        self._pid = os.getpid()
        self._own_store: Store | None = None  # of a forked process

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < self._threshold:
            return False
        return record.name != "py.warnings" or self._is_first_to_warn(record)

    def _is_first_to_warn(self, record: logging.LogRecord) -> bool:
        attributes = vars(record)
        if "first_to_warn" not in attributes:  # ask the store once for a record, even with several handlers
            attributes["first_to_warn"] = self._claim(record.getMessage())
        return bool(attributes["first_to_warn"])

    def _claim(self, message: str) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._rank == 0
        try:
            key = f"warnings/{hashlib.blake2b(message.encode(), digest_size=16).hexdigest()}"
            name = f"rank {self._rank}, process {os.getpid()}"
            return self._store().compare_set(key, "", name).decode() == name
        except (RuntimeError, AttributeError):
            # The store has ended with the run, or it has no `clone`: show a warning twice rather than lose it.
            return True

    def _store(self) -> Store:
        """Return the group's store. A forked data-loader worker opens its own connection, not its parent's."""
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


def _terminal_handlers() -> list[logging.Handler]:
    """Return the handlers of all loggers that write to a terminal."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [one for logger in loggers if isinstance(logger, logging.Logger) for one in _terminal_handlers_of(logger)]


def _terminal_handlers_of(logger: logging.Logger) -> list[logging.Handler]:
    """Return the handlers of a logger, of the root logger all but log files, that write to a terminal."""
    # A module that nobody has imported has no handlers.
    of_rich = [sys.modules["rich.logging"].RichHandler] if "rich.logging" in sys.modules else []
    kinds = (logging.Handler,) if logger is logging.root else (logging.StreamHandler, *of_rich)
    return [one for one in logger.handlers if isinstance(one, kinds) and not isinstance(one, logging.FileHandler)]


def _follow(handler: logging.Handler, rank: int, rank_filter: _RankFilter) -> None:
    """Give a handler the filter, and on ranks other than 0 the prefix."""
    if rank_filter not in handler.filters:
        handler.filters = [old for old in handler.filters if not isinstance(old, _RankFilter)]
        handler.addFilter(rank_filter)
    plain = handler.formatter.plain if isinstance(handler.formatter, _Prefixed) else handler.formatter
    if rank and plain is handler.formatter:
        handler.setFormatter(_Prefixed(rank, plain))
    elif not rank and plain is not handler.formatter:
        handler.setFormatter(plain)


def _follow_later_handlers(rank: int, rank_filter: _RankFilter) -> None:
    """Look at the handlers of a record before they get it: some may be new, or have a new formatter."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
            logger: logging.Logger | None = self
            while logger is not None:
                for handler in _terminal_handlers_of(logger):
                    _follow(handler, rank, rank_filter)
                logger = logger.parent if logger.propagate else None
            original(self, record)

        return call_handlers

    replace_method(logging.Logger, "callHandlers", make)


def _quiet(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `print` that shows nothing on the terminal."""

    def quiet(*values: Any, file: Any = None, **options: Any) -> None:
        if not writes_to_terminal(sys.stdout if file is None else file):
            original(*values, file=file, **options)

    return quiet


def _disable_progress_bars() -> None:
    """Disable the bars of rich and tqdm in this process. Their consoles still show what a program prints and logs."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # for processes that this one starts
    _disable(importlib.import_module("rich.progress").Progress)
    with suppress(ImportError):
        _disable(importlib.import_module("tqdm.std").tqdm)


def _disable(bar: Any) -> None:
    """Set `disable=True` in each new bar of a class and its subclasses, even where a library passes False."""
    if not hasattr(bar.__init__, "silenced"):
        original = bar.__init__

        @functools.wraps(original)
        def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **{**kwargs, "disable": True})

        disabled.silenced = True  # type: ignore[attr-defined]  # a flag, so that it is wrapped once
        bar.__init__ = disabled


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
