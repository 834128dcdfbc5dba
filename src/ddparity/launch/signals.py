"""What the launcher does on a signal: it keeps it until a look at the ranks, and where no rank runs it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

_WARNINGS = ("SIGUSR1", "SIGUSR2")
_STATUS = "SIGQUIT"


def name_of(number: int) -> str:
    """Such as "SIGTERM"; real-time signals have no names of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Signals:
    """Signals that came while `handled` lasts, in the main thread; in another one Python allows no handlers.

    An exception from a handler may come between the start of a rank and the moment when its process id is kept, so
    that nobody would end that rank. While `raising` is False, a signal is therefore only kept, for `check`.

    `ending`: those that end the job, in the order they came. `warnings`: a scheduler's, which the ranks get. `asked`:
    SIGQUIT has asked for the state.
    """

    def __init__(self) -> None:
        self.ending: list[int] = []
        self.warnings: set[int] = set()
        self.asked = False
        self.raising = True
        self._own: dict[int, Any] = {}

    @contextmanager
    def handled(self, names: str) -> Iterator[None]:
        """Handle `names`, as in "SIGTERM,SIGINT", as those that end the job; the handlers from before come back."""
        chosen = [name.strip() for name in names.split(",")]
        for name in dict.fromkeys([*chosen, *_WARNINGS, _STATUS]):
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup
                continue
            self._own[number] = self._ask if name == _STATUS else self._end if name in chosen else self._warn
        before = {number: signal.getsignal(number) for number in self._own}
        try:
            self._install()
            yield
        finally:
            if _in_main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the start of ranks. They begin with Ctrl-C blocked, and let it through once they can end quietly."""
        self.raising = False
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            self._install()  # torch's agent has set handlers of its own, in earlier versions
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _install(self) -> None:
        if _in_main_thread():
            for number, handler in self._own.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises SignalException where a signal has come that ends the job."""
        if self.ending:
            number = self.ending[0]
            raise SignalException(f"the launcher got {name_of(number)}", signal.Signals(number))

    def _end(self, number: int, frame: object) -> None:
        self.ending.append(number)
        if self.raising:
            self.check()

    def _warn(self, number: int, frame: object) -> None:
        self.warnings.add(number)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True  # answered at the next look


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
