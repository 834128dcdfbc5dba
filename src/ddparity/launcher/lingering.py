"""Ranks that have failed and still run: they may save or upload what is left, and have the time for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .diagnosis.exits import read_exception
from .diagnosis.instruments import EXITED
from .diagnosis.late import describe_doing, only_waits, stacks_of
from .diagnosis.usage import read_usages

LINGER_S = 3.0  # a rank that runs for longer after its exception is told, or counts as ended if it only waits
_LOOK_S = 1.0  # between two looks at what a rank does


class Lingering:
    """Decide how long a rank may run after it has written its exception: `grace_s`, unless it can only wait.

    `told`: it was said that the job waits for a rank.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = max(grace_s, LINGER_S)
        self._look_at: dict[int, float] = {}  # by process id
        self._work: dict[int, tuple[float, ...]] = {}  # of the children of a process, at the last look
        self._told: set[int] = set()
        self._over: set[int] = set()

    @property
    def told(self) -> bool:
        return bool(self._told)

    def is_over(self, pid: int, folder: Path) -> bool:
        """Return whether a rank has had its time, or its exit functions have returned: it saves nothing any more."""
        return pid in self._over or (folder / EXITED).exists()

    def may_run(self, tell: Callable[[str], None], rank: int, pid: int, folder: Path, since_s: float) -> bool:
        """Return whether a rank may go on, `since_s` after its exception: its exit functions and its threads run.

        It may not if its main thread waits in a collective or for other threads, and neither another thread nor a child
        process works; nor once its exit functions have returned. `tell`: says a line of the launcher.
        """
        if self.is_over(pid, folder):
            return False
        now = time.monotonic()
        if now < self._look_at.get(pid, 0.0):
            return True
        self._look_at[pid] = now + _LOOK_S
        before, self._work[pid] = self._work.get(pid, (0.0,)), _work_of_children(pid)
        if since_s < LINGER_S:
            return True
        ranks = {rank: (pid, folder)}
        late, works = since_s >= self._grace_s, self._work[pid] != before
        stacks = stacks_of(ranks, before_kill=late)
        if late:
            they = describe_doing(ranks, stacks)
            tell(f"ending {they}, which still ran {self._grace_s:g} s after its exception (--shutdown-timeout)")
        if late or not (works or any(not only_waits(stack, libraries=True) for stack in stacks.values())):
            self._over.add(pid)
            return False
        if pid not in self._told:
            self._told.add(pid)
            they = describe_doing(ranks, stacks)
            tell(
                f"rank {rank} failed: {_message(folder)}; waiting up to {self._grace_s - since_s:.0f} s for {they}: "
                "a signal (Ctrl-C) ends this now"
            )
        return True


def _work_of_children(pid: int) -> tuple[float, ...]:
    """Return what the child processes of a rank have used: seconds of CPU, bytes read and written. (0,) without any."""
    used = read_usages([one for one, _ in read_usages([pid])[pid].children]).values()
    return tuple(number for one in used for number in (one.cpu_s, one.read, one.written)) or (0.0,)


def _message(folder: Path) -> str:
    """Return the first line of the exception of a rank."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return str(read_exception(folder)["message"]).partition("\n")[0]
    return "an exception"
