"""Ranks that have failed and still run: they may save or upload what is left, and have the time for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .diagnosis.late import describe_doing, only_waits, stacks_of
from .diagnosis.limits import FILE, read_file, read_json

LINGER_S = 3.0  # a rank that runs for longer after its exception is told, or counts as ended if it only waits
_LOOK_S = 1.0  # between two looks at what a rank does


class Lingering:
    """Decide how long a rank may run after it has written its exception: `grace_s`, unless it can only wait.

    `tell`: says a line of the launcher.
    """

    def __init__(self, grace_s: float, tell: Callable[[str], None]) -> None:
        self._grace_s, self._tell = max(grace_s, LINGER_S), tell
        self._look_at: dict[int, float] = {}  # by process id
        self._told: set[int] = set()
        self._over: set[int] = set()

    def may_run(self, rank: int, pid: int, folder: Path, since_s: float) -> bool:
        """Return whether a rank may go on, `since_s` after its exception. It runs as the exit functions of a script do.

        It may not if its main thread waits in a collective or for other threads, and no other thread works.
        """
        if pid in self._over or time.monotonic() < self._look_at.get(pid, 0.0):
            return pid not in self._over
        self._look_at[pid] = time.monotonic() + _LOOK_S
        ranks = {rank: (pid, folder)}
        stacks = stacks_of(ranks, before_kill=False)
        late = since_s >= self._grace_s
        if late:
            they = describe_doing(ranks, stacks)
            self._tell(f"ending {they}, which still ran {self._grace_s:g} s after its exception (--shutdown-timeout)")
        if late or all(only_waits(stack) for stack in stacks.values()):
            self._over.add(pid)
            return False
        if since_s >= LINGER_S and pid not in self._told:
            self._told.add(pid)
            they = describe_doing(ranks, stacks)
            left_s = self._grace_s - since_s
            self._tell(
                f"rank {rank} failed: {_message(folder)}; waiting up to {left_s:.0f} s for {they}: a signal (Ctrl-C) "
                "ends this now"
            )
        return True


def _message(folder: Path) -> str:
    """Return the first line of the exception of a rank."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        text = str(read_json(read_file(folder / "error.json"), FILE)["message"]["message"])
        return text.partition("\n")[0]
    return "an exception"
