"""What a rank carries so that the agent can see where it stands: installed in the worker before the user's script.

Nothing here runs while the script does: the server answers from its own thread, in C++, without the GIL.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set by the agent for its workers, unless the user has: how many collectives a rank remembers. Half a kilobyte each,
# read about once a second.
FLIGHT_VARIABLE = "TORCH_FR_BUFFER_SIZE"
FLIGHT_ENTRIES = "64"

SERVER = "server.sock"
FATAL = "fatal.txt"
STACKS = "stacks.txt"
FLIGHT = "flight.json"

# Real-time signals, which no library takes for itself: the first writes stacks, the second only interrupts a sleep.
STACK_SIGNAL: int | None = signal.SIGRTMIN + 7 if sys.platform == "linux" else None
WAKE_SIGNAL: int | None = signal.SIGRTMIN + 8 if sys.platform == "linux" else None
_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1)

_open: list[Any] = []  # files that faulthandler writes to when Python may be past opening any


def install(folder: Path) -> None:
    """Let the agent look into this process through files in `folder`; call it once, before the script runs.

    A fatal signal writes all stacks to `fatal.txt`, and SIGABRT then waits up to 6 s, in which the agent reads the
    collectives of this rank; torch's worker server listens on `server.sock`; at exit `flight.json` stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _dump_stacks(folder)
    if sys.platform == "linux":
        _allow_tracing()
    os.register_at_fork(after_in_child=_as_before)
    _serve(folder)
    atexit.register(_leave, folder, os.getpid())


def leave_record(folder: Path) -> None:
    """Write the last collectives of this rank to `flight.json`, as they are now; never raises."""
    from ..compat import flight_record

    with contextlib.suppress(Exception):  # a second failure must not hide the first
        record = flight_record()
        if record is not None:
            path = folder / FLIGHT
            written = path.with_suffix(".tmp")
            written.write_bytes(record)
            written.replace(path)


def let_abort(pid: int) -> None:
    """Wake a process of this machine that waits in its held SIGABRT, so that it dies of it now."""
    if WAKE_SIGNAL is None:
        return
    libc = ctypes.CDLL(None)
    with contextlib.suppress(OSError, AttributeError):  # it is gone; a C library without tgkill: it wakes by itself
        for thread in os.listdir(f"/proc/{pid}/task"):
            libc.tgkill(pid, int(thread), WAKE_SIGNAL)


def _dump_stacks(folder: Path) -> None:
    # The order matters: faulthandler's handler for SIGABRT writes the stacks, and then calls the one that was there
    # before it. `sleep` as a handler gets the signal's number as its seconds: 6, with the other threads alive.
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        libc.signal(WAKE_SIGNAL, ctypes.cast(libc.abs, ctypes.c_void_p))  # does nothing, but ends that sleep
    fatal = (folder / FATAL).open("w")
    _open.append(fatal)
    faulthandler.enable(fatal)
    if STACK_SIGNAL is not None:
        stacks = (folder / STACKS).open("w")
        _open.append(stacks)
        faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)


def _allow_tracing() -> None:
    """Let py-spy look at this process where the kernel otherwise allows it to parents alone (ptrace_scope 1)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)


def _as_before() -> None:
    """In a forked child, such as a data-loader worker: its crash is no crash of the rank, and nobody waits for it."""
    with contextlib.suppress(Exception):
        faulthandler.disable()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        faulthandler.enable(sys.__stderr__ or 2)


def _serve(folder: Path) -> None:
    from ..compat import serve_flight_records

    path = folder / SERVER
    path.unlink(missing_ok=True)
    with _quiet():
        serve_flight_records(str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what C++ writes to standard error: the server announces itself there as a warning."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _leave(folder: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    leave_record(folder)
    # Nobody may ask while the process takes itself apart; the server itself just goes with it.
    (folder / SERVER).unlink(missing_ok=True)
