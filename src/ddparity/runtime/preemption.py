"""Stopping all ranks after the same step, when the scheduler announces that it takes the machines away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ..compat import PrefixStore
from .agreement import reaching_store, store_root

_WHAT = "stopping on a signal"


@contextmanager
def preemption(*signals: str) -> Iterator[Callable[[], int]]:
    """Handle a scheduler's warning, SIGUSR1 and SIGUSR2 or the signals named, so that all ranks stop together.

    Yields a function to call once after each optimizer step, on every rank. It gives 0 as long as training goes on, and
    the signal's number, on every rank after the same step, once the signal has come to all of them: `ddparity run`
    passes it on to all ranks of all machines, `srun` to its tasks. Save a checkpoint then, and end with
    `sys.exit(128 + number)`, which tells a scheduler that the job is to be started again.

    Every step must reduce gradients, so that no rank is a whole step ahead of another. Must be entered in the main
    thread, by all ranks in the same order; outside of it nothing is handled.

    Collectives: none. Without a signal a call costs nothing; from the signal on, two store requests a step.

    Raises:
        ValueError: there is no such signal.

    Example:
        >>> with preemption() as stopping:
        ...     for step in range(3):
        ...         if stopping():
        ...             break
    """
    numbers = [_number(name) for name in signals or ("SIGUSR1", "SIGUSR2")]
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """Agrees on the step: the last rank that learns of the signal chooses the one after the step it has finished."""

    def __init__(self) -> None:
        self._number = 0
        self._calls = 0
        self._told = False
        self._store: PrefixStore | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            root = store_root()
            with reaching_store(_WHAT):
                self._store = PrefixStore(f"preemption{root.add(f'preemption/{dist.get_rank()}', 1)}", root)

    def note(self, number: int, frame: Any) -> None:
        self._number = number  # looked at between two steps

    def __call__(self) -> int:
        self._calls += 1
        if not self._number or self._store is None:
            return self._number
        with reaching_store(_WHAT):
            if not self._told:
                self._told = True
                if self._store.add("told", 1) == dist.get_world_size():
                    # Any other rank is in the step after this one at most: that one reduces, and waits for us.
                    self._store.set("last", str(self._calls + 1))
            if self._store.check(["last"]) and self._calls >= int(self._store.get("last")):
                return self._number
        return 0


def _number(name: str) -> int:
    found = getattr(signal, name, None)
    if not isinstance(found, signal.Signals):
        raise ValueError(f"preemption({name!r}): there is no such signal; name one as in preemption('SIGUSR1')")
    return found
