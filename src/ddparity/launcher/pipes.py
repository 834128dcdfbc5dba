"""Read what ranks write from their pipes: the launcher keeps the end of each in memory, and all of it in a log."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..system import CLOEXEC, NONBLOCK, widen_pipe

KEPT_BYTES = 1 << 19  # of each stream of each rank
_BACKLOG_BYTES = 4 << 20  # that the terminal has not taken; then the rank waits, as one that writes to it itself
_PIPE_BYTES = 1 << 18  # what a rank can write while the launcher does not read
_CHUNK = 1 << 16
_PAUSE_S = 0.02  # between two reads of a rank that writes little: fewer wake-ups
_BUSY_BYTES = _PIPE_BYTES // 2  # a rank that has written more since the last read would soon wait


class RankPipe:
    """One stream of one rank.

    `shown`: `next` returns all of it, for the terminal. `log`: a file that gets all of it. `lose(log, error)` is called
    where the log cannot be written, as on a full disk: the rank itself must not notice.
    """

    def __init__(
        self,
        path: Path,
        shown: bool,
        log: Path | None = None,
        lose: Callable[[Path, OSError], None] = lambda log, error: None,
    ) -> None:
        self._log, self._lose = log, lose
        self._logged = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | CLOEXEC, 0o666) if log else -1
        os.mkfifo(path, 0o600)
        self.path, self.shown = path, shown
        self._rested = False
        self._reader = os.open(path, os.O_RDONLY | NONBLOCK)
        widen_pipe(self._reader, _PIPE_BYTES)
        self._lock = threading.Lock()  # the reader's thread and the agent's both read
        self._kept = bytearray()
        self._backlog = bytearray()

    @property
    def number(self) -> int:
        """The descriptor to wait for; -1 if the pipe is closed or must not be read for now."""
        return -1 if len(self._backlog) > _BACKLOG_BYTES else self._reader

    def read(self) -> int:
        """Read what the rank has written. Return the number of bytes. A rank that writes faster does not hold us."""
        count = 0
        with self._lock, suppress(BlockingIOError):
            while count < _PIPE_BYTES and self.number >= 0 and (chunk := os.read(self._reader, _CHUNK)):
                count += len(chunk)
                self._write(chunk)
                self._kept += chunk
                if self.shown:
                    self._backlog += chunk
                if len(self._kept) > 2 * KEPT_BYTES:
                    del self._kept[:-KEPT_BYTES]
        return count

    def _write(self, chunk: bytes) -> None:
        """Write to the log. What a full disk does not take is lost; a later chunk may find room again."""
        if self._log is None:
            return
        try:
            while chunk:
                chunk = chunk[os.write(self._logged, chunk) :]
        except OSError as error:
            self._lose(self._log, error)

    def next(self) -> bytes:
        """Return what has been read since the last call, for the terminal."""
        with self._lock:
            taken = bytes(self._backlog)
            self._backlog.clear()
        return taken

    def rest(self) -> bytes:
        """Return what was written since the last call of `next`, up to now; b"" from the second call on."""
        if self._rested:
            return b""
        self._rested = True
        taken = self.next()
        self.read()
        return taken + self.next()

    def end(self, size: int) -> bytes:
        """Return the last bytes that the rank has written."""
        self.read()
        return bytes(self._kept[-size:])

    def close(self, terminal: int | None) -> None:
        """Close the pipe. If a process still holds its other end, a program takes over and writes to the log.

        Otherwise that process, which may have outlived its rank, would end at its next output. `terminal`: a file
        descriptor to write to where there is no log; None: its output is dropped.
        """
        if self._reader < 0:
            return
        self.read()
        terminal = self._logged if self._log is not None else terminal
        if self._has_writers():
            os.set_blocking(self._reader, True)
            with suppress(OSError, NotImplementedError):  # there is no such program, or no such call
                _drain(self._reader, terminal)
        os.close(self._reader)
        self._reader = -1
        if self._log is not None:
            os.close(self._logged)

    def _has_writers(self) -> bool:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return not any(event & select.POLLHUP for _, event in poll.poll(0))


def _drain(reader: int, terminal: int | None) -> None:
    """Start `cat` in a session of its own. It ends when no process writes any more; nobody waits for it."""
    actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, reader, 0)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            actions.append((os.POSIX_SPAWN_DUP2, terminal if terminal is not None else nothing, number))
        os.posix_spawnp("cat", ["cat"], os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(nothing)


class PipeReader:
    """A thread that reads pipes until `close`, so that no rank waits for the launcher."""

    def __init__(self, pipes: Iterable[RankPipe]) -> None:
        self._pipes = list(pipes)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ddparity-pipes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            counts = [pipe.read() for pipe in self._pipes]
            if max(counts) > _BUSY_BYTES:
                continue
            if not any(counts):
                self._wait()
            self._ended.wait(_PAUSE_S)

    def _wait(self) -> None:
        """Wait until a rank writes, or for a moment: a pipe whose other end is closed never becomes quiet."""
        poll = select.poll()
        for pipe in self._pipes:
            if pipe.number >= 0:
                poll.register(pipe.number, select.POLLIN)
        if any(event & select.POLLIN for _, event in poll.poll(100)):
            return
        self._ended.wait(0.08)
