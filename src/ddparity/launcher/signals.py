"""What the launcher does on a signal: it keeps it until a look at the ranks, and where no rank runs it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from .diagnosis.exits import signal_name

_WARNINGS = ("SIGUSR1", "SIGUSR2")
_STATUS = "SIGQUIT"
_APART_S = 0.5  # `timeout` sends a signal to its child and to its group: that is one


class Signals:
    """Signals that came while `handled` lasts, in the main thread; in another one Python allows no handlers.

    An exception from a handler may come between the start of a rank and the moment when its process id is kept, so
    that nobody would end that rank. While `raising` is False, a signal is therefore only kept, for `check`.

    `ending`: those that end the job, in the order they came. `asked`: SIGQUIT has asked for the state.
    """

    def __init__(self) -> None:
        self.ending: list[int] = []
        self.asked = False
        self.raising = True
        self._times: list[float] = []  # of those in `ending`
        self._warnings: list[int] = []
        self._own: dict[int, Any] = {}

    @contextmanager
    def handled(self, names: str) -> Iterator[None]:
        """Handle `names`, as in "SIGTERM,SIGINT", as those that end the job; the handlers from before come back."""
        chosen = [name.strip() for name in names.split(",")]
        for name in dict.fromkeys([*chosen, *_WARNINGS, _STATUS]):
            number = getattr(signal, name, None)
            if number is None:
                continue
            self._own[number] = self._ask if name == _STATUS else self._end if name in chosen else self._warn
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                self._own[number] = signal.SIG_IGN  # nohup
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
            raise SignalException(f"the launcher got {signal_name(number)}", signal.Signals(number))

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """While something may block, such as a full pipe: a signal ends that."""
        before, self.raising = self.raising, True
        try:
            yield
        finally:
            self.raising = before

    def repeated(self) -> bool:
        """Whether a second signal says that it shall end at once."""
        return bool(self._times) and self._times[-1] - self._times[0] > _APART_S

    def patience(self, seconds: float) -> Callable[[], bool]:
        """Whether to stop waiting, to be asked again and again: a signal has come, and `seconds` from now are over."""
        start = time.monotonic()
        return lambda: bool(self.ending) and (self.repeated() or time.monotonic() - start > seconds)

    def take_warnings(self) -> list[int]:
        """A scheduler's warnings, for the ranks, that have come since it was asked last."""
        taken, self._warnings = self._warnings, []
        return taken

    def _end(self, number: int, frame: object) -> None:
        self.ending.append(number)
        self._times.append(time.monotonic())
        if self.raising:
            self.check()

    def _warn(self, number: int, frame: object) -> None:
        self._warnings.append(number)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True  # answered at the next look


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
