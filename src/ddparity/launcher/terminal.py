"""Let the terminal follow the rank that asks for it: a debugger's prompt works on every rank.

The worker loads this file by its path. Where the job has a terminal, `pdb` takes it for as long as it shows a prompt,
and gives it back: the standard streams of the rank are then those of the terminal. `breakpoint()`, `pdb.set_trace()`,
`pdb.post_mortem()` and `torch.distributed.breakpoint()` all end in `pdb.Pdb.interaction`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

_LOCK = "terminal"  # in the folder of the job: the rank that has the terminal holds its lock


def follow(
    folder: Path,
    system: ModuleType,
    write_prompt: Callable[[Path], Path],
    after_import: Callable[[str, Callable[[], None]], None],
) -> None:
    """Prepare this process. Call it before the standard input is replaced; without a terminal, nothing happens.

    Args:
        folder: the rank's own.
        system: ddparity's `system.py`, which the worker has loaded by its path.
        write_prompt: writes a file in it, which is there while this process has, or waits for, the terminal.
        after_import: runs a function after a module has been imported.
    """
    descriptor = system.open_terminal()
    if descriptor is not None:
        terminal = _Terminal(descriptor, folder, system.lock, write_prompt)
        after_import("pdb", terminal.serve_pdb)


class _Terminal:
    def __init__(
        self, descriptor: int, folder: Path, lock: Callable[[int], Any], write_prompt: Callable[[Path], Path]
    ) -> None:
        self._descriptor, self._folder, self._lock, self._write_prompt = descriptor, folder, lock, write_prompt
        self._rank = os.environ.get("RANK", "0")
        self._threads = threading.RLock()
        self._depth = 0

    def serve_pdb(self) -> None:
        """Give each prompt of pdb the terminal."""
        import pdb

        interaction = pdb.Pdb.interaction

        @functools.wraps(interaction)
        def at_terminal(debugger: Any, *args: Any, **options: Any) -> Any:
            if not debugger.use_rawinput:  # the script has given it other streams
                return interaction(debugger, *args, **options)
            debugger.nosigint = True  # Ctrl-C ends the job, also after `continue`
            with self._held():
                return interaction(debugger, *args, **options)

        setattr(pdb.Pdb, "interaction", at_terminal)  # noqa: B010 - mypy refuses to assign to a method

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Have the terminal as standard streams in this block. Other ranks that ask wait."""
        with self._threads:
            if self._depth:  # a debugger inside of a debugger
                yield
                return
            self._depth += 1
            prompt = self._write_prompt(self._folder)
            try:
                with self._turn() as before, self._as_streams(), _interrupt_ends():
                    if before != self._rank:
                        os.write(2, f"ddparity: rank {self._rank} has the terminal\n".encode())
                    yield
            finally:
                self._depth -= 1
                prompt.unlink(missing_ok=True)

    @contextmanager
    def _turn(self) -> Iterator[str]:
        """Wait until no other rank has the terminal, and yield the rank that had it before. It begins with rank 0."""
        try:
            lock = (self._folder.parent / _LOCK).open("a+")
        except OSError:  # the disk is full
            yield self._rank
            return
        with lock:
            self._lock(lock.fileno())  # ends with the process, too
            lock.seek(0)
            before = lock.read() or "0"
            with suppress(OSError):
                lock.truncate(0)
                lock.write(self._rank)
                lock.flush()
            yield before

    @contextmanager
    def _as_streams(self) -> Iterator[None]:
        _flush()
        kept, stdin = [os.dup(number) for number in (0, 1, 2)], sys.stdin
        for number in (0, 1, 2):
            os.dup2(self._descriptor, number)
        try:
            sys.stdin = _standard_input()
            yield
        finally:
            sys.stdin = stdin
            _flush()
            for number, descriptor in enumerate(kept):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextmanager
def _interrupt_ends() -> Iterator[None]:
    """Let Ctrl-C end the script in this block. pdb would show its prompt again after a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a script may replace or close them
            stream.flush()


def _standard_input() -> Any:
    """Return Python's own file object of descriptor 0: with that one, input() edits lines."""
    with suppress(Exception):
        if sys.__stdin__ is not None and sys.__stdin__.fileno() == 0:
            return sys.__stdin__
    return open(0, closefd=False)
