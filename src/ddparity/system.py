"""What only some operating systems have: /proc, schedulers, locks, signals. Other modules ask here, not the platform.

It imports the standard library alone: the worker of `ddparity run` loads it by its path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

LINUX = sys.platform == "linux"

# Flags of os.open that Windows does not have, or that only Windows has.
CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)
DIRECTORY: int = getattr(os, "O_DIRECTORY", 0)
BINARY: int = getattr(os, "O_BINARY", 0)
RENAMES_OPEN_FILES = sys.platform != "win32"

# Real-time signals, which no library uses. The first one has a rank write its stacks, the second one only ends a sleep.
STACK_SIGNAL: int | None = signal.SIGRTMIN + 7 if LINUX else None
WAKE_SIGNAL: int | None = signal.SIGRTMIN + 8 if LINUX else None

# A file system that cannot do this at all, not a failure of the disk.
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)

_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)
_seek = threading.Lock()  # where a read at a position is a seek and a read


# The launcher.


def run_needs() -> str:
    """Return why `ddparity run` and `launch` cannot start processes here, and what to do; "" if they can."""
    if hasattr(os, "mkfifo") and hasattr(os, "waitid") and hasattr(os, "killpg"):
        return ""
    return (
        f"{sys.platform} has no named pipes and process groups, with which processes are watched and ended here. One "
        f"process works: start the script with python, or `ddparity train` without --nproc. For several, start the "
        f"script with torchrun, or use Linux (on Windows: WSL)"
    )


def run_lacks() -> str:
    """Return what `ddparity run` does without on this system, in one line; "" on Linux."""
    if LINUX:
        return ""
    return (
        f"{sys.platform} is not Linux: a hang is found by its collectives, but its report has no lines of code and no "
        f"processor time; what ranks start in sessions of their own is not ended with them; ranks may outlive a "
        f"launcher that is killed; the job has no batch scheduling, and a container's limits are not seen"
    )


# Processes.


def proc(*parts: object) -> Path:
    """Return the path of an entry of /proc. On other systems than Linux there is none: reading raises OSError."""
    return Path("/proc", *map(str, parts))


def process_fields(pid: int) -> tuple[str, list[str]] | None:
    """Return the name of a process, and the fields of /proc/PID/stat behind it, which begin with the state.

    None where it has ended, is a zombie, or where there is no /proc.
    """
    try:
        head, _, tail = proc(pid, "stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return None
    fields = tail.split()
    return None if not fields or fields[0] in "ZX" else (head.partition("(")[2], fields)


def clock_ticks() -> int:
    """Return how many ticks of /proc a second has."""
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is killed. Linux only."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def allow_tracing() -> None:
    """Let py-spy read this process even if the kernel allows that only to parents (ptrace_scope 1). Linux only."""
    if LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)


def hold_aborts() -> None:
    """Let SIGABRT wait up to 6 s before it ends this process, or until `end_held_abort` is called. Linux only.

    Its handler is `sleep` of C, which takes the number of the signal as its seconds: 6. Other threads go on meanwhile.
    """
    if LINUX:
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        libc.signal(WAKE_SIGNAL, ctypes.cast(libc.abs, ctypes.c_void_p))  # does nothing, but ends that sleep


def end_held_abort(pid: int) -> None:
    """Wake a process of this machine that waits in its SIGABRT, so that it ends now."""
    if WAKE_SIGNAL is None:
        return
    libc = ctypes.CDLL(None)
    # OSError: the process is gone. AttributeError: this C library has no tgkill, and the process wakes by itself.
    with suppress(OSError, AttributeError):
        for thread in os.listdir(proc(pid, "task")):
            libc.tgkill(pid, int(thread), WAKE_SIGNAL)


# This machine.


def bound_cores() -> int:
    """Return how many cores this process may use by its affinity; where there is none, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the name of the processor, or else its kind."""
    with suppress(OSError), proc("cpuinfo").open() as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def boot_name() -> str:
    """Return a name of this machine that all containers on it share, until it starts again; else the host's name."""
    with suppress(OSError):
        return proc("sys", "kernel", "random", "boot_id").read_text().strip()
    return socket.gethostname()


def process_table() -> str:
    """Return a name of this machine and its process table: each container on a host has its own table."""
    with suppress(OSError):
        return f"{boot_name()}/{os.readlink(proc('self', 'ns', 'pid'))}"
    return socket.gethostname()


# Scheduling.


def schedule_batch() -> bool:
    """Schedule this thread, and what starts from it, as batch work; return whether it was not before. Linux only.

    A policy that the user has set stays.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return True


@contextmanager
def batch_scheduling() -> Iterator[None]:
    """Schedule this thread, and threads that start in this block, as batch work, where the system can do that."""
    changed = schedule_batch()
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


YIELDS = hasattr(os, "sched_yield")
yield_core = os.sched_yield if hasattr(os, "sched_yield") else lambda: None


# Sockets.


def unix_socket() -> socket.socket:
    """Return a new Unix socket.

    Raises:
        OSError: this system has none.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
    return socket.socket(socket.AF_UNIX)


def own_descriptors() -> list[int]:
    """Return the descriptors that this process has open; none where the system does not show them."""
    with suppress(OSError):
        return [int(name) for name in os.listdir(proc("self", "fd"))]
    return []


# Files.


def lock(descriptor: int, wait: bool = True) -> bool | None:
    """Lock a file for this process alone. The lock ends with the process.

    Return False if another process has it locked, None if the file system, or the system, has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def read_at(descriptor: int, target: memoryview, position: int) -> int:
    """Read into a buffer from a position of a file, in any thread; return the number of bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], position)
    with _seek:
        os.lseek(descriptor, position, os.SEEK_SET)
        data = os.read(descriptor, len(target))
    target[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, position: int) -> int:
    """Write at a position of a file, in any thread; return the number of bytes that were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _seek:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


def widen_pipe(descriptor: int, size: int) -> None:
    """Let a pipe hold so many bytes, where the system and the user's limit allow it."""
    with suppress(AttributeError, OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, size)


# Terminals.


def open_terminal() -> int | None:
    """Return a descriptor of the terminal that standard input reads from, to read and write; None if there is none."""
    with suppress(OSError):
        if fcntl is not None and os.isatty(0):
            if fcntl.fcntl(0, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                return os.dup(0)
            return os.open(os.ttyname(0), os.O_RDWR | os.O_NOCTTY)
    return None


@contextmanager
def terminal_restored() -> Iterator[None]:
    """Restore at the end of this block how the terminal behaves: a prompt that is killed leaves it without echo."""
    before: Any = None
    if termios is not None:
        with suppress(termios.error, OSError):  # no terminal
            before = termios.tcgetattr(0)
    try:
        yield
    finally:
        if before is not None:
            with suppress(termios.error, OSError):
                # A process in the background would be stopped.
                if os.tcgetpgrp(0) == os.getpgrp() and termios.tcgetattr(0) != before:
                    termios.tcsetattr(0, termios.TCSADRAIN, before)
