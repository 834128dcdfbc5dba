"""Handle the signals that the launcher gets: keep each one until the agent asks, or end if no rank runs."""

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
_APART_S = 0.5  # the program `timeout` sends one signal twice: to its child and to the process group


class Signals:
    """The signals that the launcher has got inside `handled`. Python allows handlers only in the main thread.

    While `raising` is False, a handler only keeps the signal, and `check` raises later: an exception between the start
    of a rank and the moment when its process id is stored would leave that rank running.

    `ending`: the signals that end the job, in their order. `asked`: SIGQUIT has asked for the stragglers.
    """

    def __init__(self) -> None:
        self.ending: list[int] = []
        self.asked = False
        self.raising = True
        self._times: list[float] = []  # of the signals in `ending`
        self._warnings: list[int] = []
        self._own: dict[int, Any] = {}

    @contextmanager
    def handled(self, names: str) -> Iterator[None]:
        """Handle signals in this block, and restore the old handlers at its end.

        `names`: the signals that end the job, like "SIGTERM,SIGINT".
        """
        chosen = [name.strip() for name in names.split(",")]
        for name in dict.fromkeys([*chosen, *_WARNINGS, _STATUS]):
            number = getattr(signal, name, None)
            if number is None:
                continue
            self._own[number] = self._ask if name == _STATUS else self._end if name in chosen else self._warn
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                self._own[number] = signal.SIG_IGN  # the launcher was started with nohup
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
        """Start ranks in this block. From here on no signal raises, until `raising` is set.

        The ranks start with Ctrl-C blocked. They unblock it when they can end without a traceback of our own code.
        """
        self.raising = False
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            self._install()  # in earlier versions, torch's agent sets its own handlers
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _install(self) -> None:
        if _in_main_thread():
            for number, handler in self._own.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise an exception if the launcher has got a signal that ends the job.

        Raises:
            SignalException: it holds the first such signal.
        """
        if self.ending:
            number = self.ending[0]
            raise SignalException(f"the launcher got {signal_name(number)}", signal.Signals(number))

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Let a signal raise at once in this block, which may wait without end, as for a full pipe."""
        before, self.raising = self.raising, True
        try:
            yield
        finally:
            self.raising = before

    def repeated(self) -> bool:
        """Return whether a second signal asks to end at once."""
        return bool(self._times) and self._times[-1] - self._times[0] > _APART_S

    def patience(self, seconds: float) -> Callable[[], bool]:
        """Return a function that returns whether a wait that starts now must end.

        It must end after a second signal, or if `seconds` have passed and there is a signal.
        """
        start = time.monotonic()
        return lambda: bool(self.ending) and (self.repeated() or time.monotonic() - start > seconds)

    def take_warnings(self) -> list[int]:
        """Return the scheduler's warnings (SIGUSR1, SIGUSR2) since the last call. They are for the ranks."""
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
        self.asked = True  # the agent answers when it looks next


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
