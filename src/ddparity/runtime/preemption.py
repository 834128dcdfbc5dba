"""Stop all ranks after the same step when the scheduler signals that the job will end soon."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from ..compat import PrefixStore
from .agreement import store_access, store_root
from .blocks import block

_WHAT = "stopping on a signal"


@block("`with ddparity.preemption() as stopping:`")
def preemption(*signals: str) -> Iterator[Callable[[], int]]:
    """Handle the signals by which a scheduler announces the job's end, so that all ranks stop after the same step.

    The signals are SIGUSR1 and SIGUSR2, or those given. Yields a function to call on every rank, once after each
    optimizer step. The function returns 0 as long as training continues. After every rank has received the signal, it
    returns the signal's number, after the same step on every rank. `ddparity run` sends a signal on to all ranks of
    all nodes, and `srun` to its tasks. Save a checkpoint then, and end with `sys.exit(128 + number)`, which tells a
    scheduler to start the job again.

    Every step must reduce gradients, so that no rank is a whole step ahead of another. All ranks must enter in the
    same order, in the main thread; in another thread no signal is handled.

    Collectives: none. Without a signal a call costs nothing; after a signal, two store requests a step.

    Raises:
        ValueError: there is no signal of that name.

    Example:
        >>> with preemption() as stopping:
        ...     for step in range(3):
        ...         if stopping():
        ...             break
    """
    numbers = [_number(name) for name in signals or _usual()]
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
    """Agree on the last step: the last rank to receive the signal chooses the step after the one it has finished."""

    def __init__(self) -> None:
        self._number = 0
        self._calls = 0
        self._told = False
        self._store: PrefixStore | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            root = store_root()
            with store_access(_WHAT):
                self._store = PrefixStore(f"preemption{root.add(f'preemption/{dist.get_rank()}', 1)}", root)

    def note(self, number: int, frame: Any) -> None:
        self._number = number  # read between two steps

    def __call__(self) -> int:
        self._calls += 1
        if not self._number or self._store is None:
            return self._number
        with store_access(_WHAT):
            if not self._told:
                self._told = True
                if self._store.add("told", 1) == dist.get_world_size():
                    # No other rank is further than the next step: the next step reduces, and so waits for this rank.
                    self._store.set("last", str(self._calls + 1))
            if self._store.check(["last"]) and self._calls >= int(self._store.get("last")):
                return self._number
        return 0


def _usual() -> list[str]:
    return [name for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]  # Windows has none of them


def _number(name: str) -> int:
    found = getattr(signal, name, None)
    if not isinstance(found, signal.Signals):
        raise ValueError(f"preemption({name!r}): there is no such signal; give a name as in preemption('SIGUSR1')")
    return found
