"""Let loguru and structlog, which do not use Python's logging, follow the levels of `setup_logging`."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# The methods of structlog's loggers that are no names of levels.
_STRUCTLOG_LEVELS = {"msg": "INFO", "warn": "WARNING", "err": "ERROR", "failure": "ERROR", "exception": "ERROR"}


def follow_in_libraries(rank: int, threshold: int) -> None:
    """Let loguru and structlog, where they are installed, write to the terminal from a threshold up.

    It holds for what is configured now and later. On ranks other than 0, loguru's lines begin with the rank, and
    structlog's events have it as `rank`. Files, and loguru's sinks that are functions, do not change.
    """
    for name, follow in (("loguru._simple_sinks", _follow_loguru), ("structlog", _follow_structlog)):
        with suppress(ModuleNotFoundError):
            follow(importlib.import_module(name), rank, threshold)


def replace_method(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Set a function of a class or module to `make(original)`. A second call replaces what the first one has set."""
    restore_method(owner, name)
    original = getattr(owner, name)
    replaced = functools.wraps(original)(make(original))
    vars(replaced)["before_ddparity"] = original
    setattr(owner, name, replaced)


def restore_method(owner: Any, name: str) -> None:
    """Undo `replace_method`, if it was called."""
    current = getattr(owner, name)
    setattr(owner, name, getattr(current, "before_ddparity", current))


def writes_to_terminal(stream: Any) -> bool:
    """Return whether a stream is the process's standard output or standard error."""
    try:
        return stream.fileno() in (1, 2)
    except (AttributeError, OSError, ValueError):  # a file in memory, or a closed one
        return False


def _follow_loguru(sinks: Any, rank: int, threshold: int) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Any, message: Any) -> None:
            if writes_to_terminal(self._stream):
                record = getattr(message, "record", None)
                if record is not None and record["level"].no < threshold:
                    return
                if rank and record is not None and not message.startswith("{"):  # with serialize=True a line is JSON
                    message = type(message)(f"[rank {rank}] {message}")
                    message.record = record
            original(self, message)

        return write

    replace_method(sinks.StreamSink, "write", make)


def _follow_structlog(structlog: Any, rank: int, threshold: int) -> None:
    levels = logging.getLevelNamesMapping()

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def proxy(self: Any, method: str, event: Any = None, *args: Any, **values: Any) -> Any:
            # A logger of Python's logging has no `_file`: its handlers follow the levels.
            if writes_to_terminal(getattr(self._logger, "_file", None)):
                name = _STRUCTLOG_LEVELS.get(method, method.upper())
                if levels.get(name, threshold) < threshold:
                    return None
                if rank:
                    values.setdefault("rank", rank)
            return original(self, method, event, *args, **values)

        return proxy

    replace_method(structlog.BoundLoggerBase, "_proxy_to_logger", make)
