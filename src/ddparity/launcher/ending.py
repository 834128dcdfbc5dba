"""Ending ranks: their main processes first, then what is left of their sessions; also when the launcher is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

_PAUSE_S = 0.01
_PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT
# Waits for the launcher's end of the pipe to close, whatever ended the launcher, and kills the sessions it was told of.
_GUARDIAN = """
all=
while read -r id; do
    case $id in
        done) exit ;;
        forget) all= ;;
        *) all="$all -$id" ;;
    esac
done
[ "$all" ] && kill -9 $all
"""


def how_ended(pid: int) -> int | None:
    """A child's exit code, negative for a signal; None while it runs. It stays to be waited for by who started it."""
    with suppress(ChildProcessError):  # has been waited for
        found = os.waitid(os.P_PID, pid, _PEEK)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    return None


def runs(pid: int) -> bool:
    """Whether a child has not ended. One that has been waited for has: somebody else may have its number."""
    try:
        return os.waitid(os.P_PID, pid, _PEEK) is None
    except ChildProcessError:
        return False


def send(pids: Iterable[int], number: int) -> None:
    """A signal to main processes only: data-loader workers would die of what their rank handles."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_sessions(pids: Iterable[int]) -> None:
    """SIGKILL to all that ranks have started, and to themselves. A rank leads a process group of its own."""
    for pid in pids:
        if runs(pid) or how_ended(pid) is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


def end(pids: Collection[int], number: int, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
    """Signal the processes, and kill them with their sessions when they have ended, `grace_s` is over, or `hurry()`."""
    running = {pid for pid in pids if runs(pid)}
    send(running, number)
    send(running, signal.SIGCONT)  # a stopped process would not see it
    wait_for(running, grace_s, hurry)
    kill_sessions(pids)
    wait_for(running, 2.0)  # one in uninterruptible sleep stays: the launcher ends without it


def wait_for(pids: Collection[int], timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> bool:
    """Whether all have ended in that time."""
    deadline = time.monotonic() + timeout_s
    while any(runs(pid) for pid in pids):
        if time.monotonic() > deadline or hurry():
            return False
        time.sleep(_PAUSE_S)
    return True


class Guardian:
    """A shell that outlives the launcher for a moment: when that is killed, it kills the ranks' sessions."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(FileNotFoundError):  # a container without a shell
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDIAN],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def watch(self, pids: Iterable[int]) -> None:
        """These instead of those that it was told of before."""
        self._tell("".join(f"{word}\n" for word in ("forget", *pids)))

    def dismiss(self) -> None:
        self._tell("done\n")
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.communicate()

    def _tell(self, text: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with suppress(BrokenPipeError):  # somebody killed it
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()
