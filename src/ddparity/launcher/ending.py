"""The processes of one machine's ranks: how each ended, and how the launcher ends them.

The launcher signals the main processes first, then kills all that they started. A guardian process does the latter
when the launcher itself is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from ..system import proc
from .diagnosis.exits import ERROR, ExitReport, has_exception, read_exception, read_exit_report
from .diagnosis.instruments import ENDED
from .output import RankFiles
from .resources import MemoryWatch

_PAUSE_S = 0.01
_FREES_S = 1.0  # between os._exit() and the end of a process that frees its memory on a busy machine
# It reads process ids until the launcher's end of the pipe closes, for whatever reason, then kills their sessions, and
# the processes that have the job's mark in their environment. The mark is the path of the job's folder: it is removed.
_GUARDIAN = """
all=
trackers=
mark=$1
while read -r id; do
    case $id in
        done) exit ;;
        forget) all= ;;
        *) all="$all -$id" ;;
    esac
done
[ "$all" ] || exec rm -rf -- "$mark"
for one in $(grep -lsF -e "$mark" /proc/[0-9]*/environ); do
    one=${one#/proc/}
    one=${one%/environ}
    if grep -qsE "$2" "/proc/$one/cmdline"; then trackers="$trackers $one"; else kill -9 "$one"; fi
done
for second in 1 2 3; do
    run=
    for one in $trackers; do kill -0 "$one" && run=1; done
    [ "$run" ] && sleep 1
done
kill -9 $all
for round in 1 2 3; do
    found=$(grep -lsF -e "$mark" /proc/[0-9]*/environ)
    [ "$found" ] || break
    for one in $found; do one=${one#/proc/}; kill -9 "${one%/environ}"; done
done
exec rm -rf -- "$mark"
"""
# They remove the named shared memory and semaphores of a rank and its children, after all of these have ended.
_TRACKERS = ("multiprocessing.resource_tracker", "torch_shm_manager")
_TRACKED_S = 3.0  # for that: torch's takes up to 2 s
SLOW_S = 3.0  # a process that has not ended this long after a signal is worth a line
# Whether a rank may go on after its exception, by its global rank, process id, folder and the seconds since then.
MayRun = Callable[[int, int, Path, float], bool]


class RankProcesses:
    """The main processes of this machine's ranks in one attempt, and how those that have ended did.

    `pids` and `ranks` have a process id and a global rank for each local rank. There are none for functions, which
    multiprocessing runs.
    """

    def __init__(self, pids: Mapping[int, int], ranks: Mapping[int, int], files: RankFiles) -> None:
        self._pids, self._ranks, self._files = dict(pids), dict(ranks), files
        self._ended: dict[int, tuple[int, float]] = {}  # local rank: exit code, when its script ended
        self._looked_s = time.time()

    @property
    def pids(self) -> list[int]:
        return list(self._pids.values())

    def ranks_of(self, pids: Collection[int]) -> dict[int, tuple[int, Path]]:
        """Return the process id and the folder of each global rank among these processes."""
        found = {local: pid for local, pid in self._pids.items() if pid in pids}
        return {self._ranks[local]: (pid, self._files.folders[local]) for local, pid in found.items()}

    @property
    def ended(self) -> frozenset[int]:
        """The local ranks that have ended."""
        return frozenset(self._ended)

    @property
    def all_ended(self) -> bool:
        return len(self._ended) == len(self._pids)

    @property
    def codes(self) -> set[int]:
        """The exit codes of the ranks that have ended."""
        return {code for code, _ in self._ended.values()}

    def look(self, linger_s: float, may_run: MayRun = lambda *rank: False) -> list[tuple[int, int]]:
        """Return the global rank and the exit code of each rank that has ended since the last look.

        A rank that wrote its exception more than `linger_s` ago and still runs counts as ended, with the exit code of
        the exception, unless it may run: it may save what is left.
        """
        found = []
        before, self._looked_s = self._looked_s, time.time()
        for local, pid in self._pids.items():
            if local in self._ended:
                continue
            code, since_s = how_ended(pid), self._since_exception_s(local) or 0.0
            if code is None and since_s > linger_s and not self._may_run(local, since_s, may_run):
                code = self._code_of_exception(local)
            if code is not None:
                # Without a note of its own, as after a kill, it ended after the look before this one. Its connections
                # were closed before that: the others fail before it can be waited for.
                at = self._exception_at(local) or self._noted(local, ENDED) or before - (0.0 if code else _FREES_S)
                self._ended[local] = code, at
                found.append((self._ranks[local], code))
        return found

    def saving(self, may_run: MayRun) -> bool:
        """Return whether a rank that has written its exception, and that has not ended, may run."""
        return any(
            local not in self._ended
            and (since_s := self._since_exception_s(local)) is not None
            and runs(pid)
            and self._may_run(local, since_s, may_run)
            for local, pid in self._pids.items()
        )

    def _may_run(self, local_rank: int, since_s: float, may_run: MayRun) -> bool:
        return may_run(self._ranks[local_rank], self._pids[local_rank], self._files.folders[local_rank], since_s)

    def _since_exception_s(self, local_rank: int) -> float | None:
        """Return how many seconds ago a rank wrote its exception; None if it has written none."""
        at = self._exception_at(local_rank)
        return time.time() - at if at is not None else None

    def _exception_at(self, local_rank: int) -> float | None:
        """Return when a rank wrote its exception, in seconds since 1970."""
        return self._noted(local_rank, ERROR) if has_exception(self._files.folders[local_rank]) else None

    def _noted(self, local_rank: int, name: str) -> float | None:
        """Return when a rank wrote a file of its folder, in seconds since 1970."""
        with suppress(OSError):
            return (self._files.folders[local_rank] / name).stat().st_mtime
        return None

    def _code_of_exception(self, local_rank: int) -> int:
        with suppress(OSError, ValueError, LookupError, TypeError):
            return int(read_exception(self._files.folders[local_rank])["extraInfo"]["exit_code"])
        return 1

    def exit_reports(self, memory: MemoryWatch, by_themselves: Collection[int] | None = None) -> list[ExitReport]:
        """Return the exit report of each rank that has ended.

        `by_themselves`: the local ranks that the launcher did not end; None: all of them.
        """
        host = socket.gethostname()
        reports = []
        for local, (code, at) in self._ended.items():
            ended_by_us = by_themselves is not None and local not in by_themselves
            output = "" if code == 0 or ended_by_us else self._files.end_of(local)
            one = read_exit_report(self._ranks[local], host, self._files.folders[local], code, at, ended_by_us, output)
            if code == -signal.SIGKILL and not ended_by_us:
                one = replace(one, evidence=memory.evidence(self._pids[local]))
            reports.append(one)
        return reports


def how_ended(pid: int) -> int | None:
    """Return a child's exit code, negative for a signal; None while it runs. Its parent can still wait for it."""
    with suppress(ChildProcessError):  # its parent has waited for it
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    return None


def runs(pid: int) -> bool:
    """Return whether a child still runs. False for a child that was waited for: another process may have its id."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to main processes only. It would kill data-loader workers, which lack their rank's handler."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(pids: Iterable[int], mark: str) -> None:
    """Send SIGKILL to ranks and to all that they started, also in sessions of their own.

    `mark`: what the environment of all of them has. Where a process has cleared its environment, it is found only for
    as long as its ancestors run.
    """
    pids = list(pids)
    others = started_by(pids, mark)
    trackers = [one for one in others if _removes_shared_memory(one)]
    if trackers:
        send(filter(runs, pids), signal.SIGKILL)
        for one in others:
            if one not in trackers:
                with suppress(psutil.Error):
                    one.kill()
        _wait_while(lambda: any(map(_is_alive, trackers)), _TRACKED_S)
    for _ in range(3):  # a process may start another one while this looks for it
        others = started_by(pids, mark)
        for pid in pids:
            if runs(pid) or how_ended(pid) is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        for one in others:
            with suppress(psutil.Error):
                one.kill()
        if not others:
            return


def started_by(pids: Iterable[int], mark: str) -> list[psutil.Process]:
    """Return the processes that these ranks have started, directly or not, and that still run."""
    pids, found = set(pids), {}
    for pid in pids:
        with suppress(psutil.Error):
            if runs(pid):
                found.update({child.pid: child for child in psutil.Process(pid).children(recursive=True)})
    for pid in psutil.pids():
        # `process` knows when it was started: `kill` refuses another process that has got its id.
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if mark.encode() in proc(pid, "environ").read_bytes():
                found[pid] = process
    return [one for pid, one in found.items() if pid not in pids and _is_alive(one)]


def end_left(pids: Collection[int], mark: str) -> str:
    """End what ranks that have ended well left running, and return what that was; "" for nothing.

    Each process has `SLOW_S` after SIGTERM.
    """
    left = started_by(pids, mark)
    names = []
    for one in left:
        with suppress(psutil.Error):
            names.append(f"{one.name()} ({one.pid})")
            one.terminate()
    psutil.wait_procs(left, timeout=SLOW_S)
    kill_all(pids, mark)
    return ", ".join(names)


def _removes_shared_memory(process: psutil.Process) -> bool:
    try:
        return any(name in one for name in _TRACKERS for one in process.cmdline())
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end(
    pids: Collection[int],
    number: int,
    grace_s: float,
    mark: str,
    hurry: Callable[[], bool] = lambda: False,
    slow: Callable[[list[int], float], bool] = lambda pids, left_s: True,
) -> None:
    """Send a signal to the processes, then kill them and all that they started.

    The kill follows once all have ended, after `grace_s` seconds, or as soon as `hurry()` returns True.

    `slow`: is called after `SLOW_S` with the processes that still run and the seconds that they have left, and returns
    whether they may have these; and again, with 0 seconds left, before those that have not ended are killed.
    """
    running = {pid for pid in pids if runs(pid)}
    send(running, number)
    send(running, signal.SIGCONT)  # a stopped process does not handle the signal
    left_s = max(0.0, grace_s - SLOW_S)
    _wait_for(running, min(SLOW_S, grace_s), hurry)
    rest = [pid for pid in running if runs(pid)]
    if rest and left_s and not hurry() and slow(rest, left_s):
        _wait_for(running, left_s, hurry)
        rest = [pid for pid in running if runs(pid)]
        if rest:
            slow(rest, 0.0)
    elif rest:
        slow(rest, 0.0)
    kill_all(pids, mark)
    _wait_for(running, 2.0)  # the launcher does not wait longer for a process in uninterruptible sleep


def _wait_for(pids: Collection[int], timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
    """Wait until all have ended, but no longer than `timeout_s` and not after `hurry()` returns True."""
    _wait_while(lambda: any(map(runs, pids)) and not hurry(), timeout_s)


def _wait_while(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while condition() and time.monotonic() <= deadline:
        time.sleep(_PAUSE_S)


class Guardian:
    """A shell that outlives the launcher for a moment. When the launcher is killed, it kills what the ranks started.

    `mark`: as for `kill_all`; it is the path of the job's temporary folder, which the guardian removes then.
    """

    def __init__(self, mark: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(FileNotFoundError):  # a container without a shell
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDIAN, "sh", mark, "|".join(_TRACKERS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def watch(self, pids: Iterable[int]) -> None:
        """Guard these processes, and no longer the earlier ones."""
        self._write("".join(f"{word}\n" for word in ("forget", *pids)))

    def dismiss(self) -> None:
        """End the guardian. It kills nothing."""
        self._write("done\n")
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.communicate()

    def _write(self, text: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with suppress(BrokenPipeError):  # the guardian has been killed
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()
