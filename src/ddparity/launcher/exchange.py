"""What the agents of several machines tell each other, through the store of their rendezvous.

A request to a store takes as long as the network is away: a thread makes them, and the agent reads what was heard last.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial

from ..compat import PrefixStore, Store, append

_BEAT_S = 0.5  # between two looks at the store
# Where the network is away for 10 s, the kernel's next try to deliver may come as late as after 21 s in all.
SILENT_S = 30.0
_UNREACHED_S = 15.0  # no connection to the store either, for so long: its machine has gone
_UNANSWERED_S = 60.0  # a machine that takes connections but does not answer
_GONE_S = 3.0  # in a failure, a machine that does not even beat has gone
_MEET_S = 30.0  # from the rendezvous to the first word of each machine
_LEAVE_S = 3.0  # the store ends with the machine that holds it: the others read before
_HURRY_S = 1.0  # to tell the others what is to be told, when a signal has come
_NOTHING = "-"
_BOARD = ("verdict", "failed", "changes", "signals", "beat")


@dataclass(frozen=True)
class Machine:
    """What a machine says about itself when a round begins. `holds`: the store at which all machines meet."""

    host: str
    ranks: tuple[int, ...]
    restarts: int
    holds: bool


class Exchange:
    """One round of a job: a new one begins with each start of the workers, under keys of its own.

    `patience_s`: for the other machines to end their ranks and tell how these ended. `waiting`: how many machines wait
    to be taken in. `address`: of the store, where another machine may hold it. `patience`: gives whether to stop
    waiting, since the user waits, when so many seconds are over.

    Raises:
        DistError: a machine has gone since the rendezvous.
    """

    def __init__(
        self,
        store: Store,
        node: int,
        nodes: int,
        own: Machine,
        patience_s: float,
        waiting: Callable[[], int],
        address: tuple[str, int],
        patience: Callable[[float], Callable[[], bool]],
    ) -> None:
        self._store = PrefixStore("ddparity", store)
        self._node, self._nodes, self._patience_s = node, nodes, patience_s
        self._count_waiting, self._patience = waiting, patience
        self._address = None if own.holds else address
        for key in _BOARD:
            self._store.compare_set(key, "", _NOTHING)
        for other in range(nodes):
            self._store.compare_set(f"state/{other}", "", _NOTHING)
        self._store.add("finished", 0)
        self._store.set(f"machine/{node}", json.dumps(asdict(own)))
        names = [f"machine/{other}" for other in range(nodes)]
        self._store.wait(names, timedelta(seconds=_MEET_S))
        self.machines = tuple(_machine(text) for text in self._store.multi_get(names))
        self.waiting = 0
        self.lost: str | None = None  # why the store has gone
        self._board = dict.fromkeys(_BOARD, "")
        self._announced = ""
        self._state, self._states = "", dict.fromkeys(range(nodes), "")
        self._beats: dict[int, tuple[str, float]] = {}  # of other machines: the last one, when it was first seen
        self._count = 0
        self._finished = 0
        self._passed: set[int] = set()
        self._outbox: deque[Callable[[], object]] = deque()
        self._wake, self._closed = threading.Event(), False
        self._asking: float | None = None  # since when the store has not answered
        self._probes: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="ddparity-exchange", daemon=True)
        self._thread.start()

    @property
    def leads(self) -> bool:
        """Whether this is the machine that compares what all have published."""
        return self._node == 0

    def publish(self, state: str) -> None:
        """This machine's ranks, for the one that compares."""
        self._state = state
        self._wake.set()

    def read(self) -> list[str]:
        """What each machine has published last, of those that have."""
        states = {**self._states, self._node: self._state}
        return [state for _, state in sorted(states.items()) if state]

    def announce(self, text: str) -> None:
        self._announced = text
        self._post(lambda: self._store.set("verdict", text or _NOTHING))

    def announced(self) -> str | None:
        return (self._announced if self.leads else self._board["verdict"]) or None

    def failed(self) -> bool:
        """Whether a machine has told of a failure, or has gone."""
        since = self._asking
        if since is not None and time.monotonic() - since > _GONE_S and self._probes is None and self._address:
            self._probes = threading.Thread(target=self._probe, args=(since,), name="ddparity-probe", daemon=True)
            self._probes.start()
        return bool(self._board["failed"]) or self.lost is not None or bool(self.silent())

    def silent(self) -> dict[int, float]:
        """Machines of which nothing was heard for long, and for how many seconds."""
        now = time.monotonic()
        return {node: now - since for node, (_, since) in self._beats.items() if now - since > SILENT_S}

    def change(self) -> None:
        """Tell that this machine ends its ranks to take another machine in, and that no rank has failed."""
        self._post(lambda: self._store.set("changes", "1"))

    def changes(self) -> bool:
        return bool(self._board["changes"])

    def signals(self, own: Iterable[int]) -> list[int]:
        """Pass on the warnings that came here, and hear of those that came to other machines; each one once."""
        for number in own:
            if number not in self._passed:
                self._post(partial(append, self._store, "signals", f"{number} "))
                self._passed.add(number)
        heard = [number for number in map(int, self._board["signals"].split()) if number not in self._passed]
        self._passed.update(heard)
        return heard

    def finish(self) -> None:
        """Tell that all ranks of this machine have finished."""
        self._post(lambda: self._store.add("finished", 1))

    def all_finished(self) -> bool:
        return self._finished >= self._nodes

    def leave(self) -> None:
        """Stay until the other machines have read that all have finished, or for a few seconds."""
        self._ask(lambda: self._stay(self._nodes, time.monotonic() + _LEAVE_S), _LEAVE_S + 1)

    def all_exit_reports(self, own: str) -> list[str | None]:
        """Tell how this machine's ranks ended, and hear it of the others; None for a machine that does not answer."""
        found = {self._node: own}
        self._ask(lambda: self._gather(found), self._patience_s + _LEAVE_S + 1)
        return [found.get(node) for node in range(self._nodes)]

    def close(self) -> None:
        """Say what is still to be said, and let go of the store, waiting for it only as long as it may take."""
        self._closed = True
        self._wake.set()
        deadline, hurry = time.monotonic() + SILENT_S, self._patience(_HURRY_S)
        while self._thread.is_alive() and self.lost is None and time.monotonic() < deadline and not hurry():
            self._thread.join(0.1)

    def _post(self, request: Callable[[], object]) -> None:
        self._outbox.append(request)
        self._wake.set()

    def _ask(self, request: Callable[[], object], timeout_s: float) -> None:
        """Have the thread make a request, and wait for it, but not for ever."""
        done = threading.Event()

        def made() -> None:
            try:
                request()
            finally:
                done.set()

        if self.lost is None:
            self._post(made)
            deadline, hurry = time.monotonic() + timeout_s, self._patience(_HURRY_S)
            while not done.wait(0.05) and self.lost is None and time.monotonic() < deadline and not hurry():
                pass

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
                self._asking = None
                self._wake.wait(_BEAT_S)
                self._wake.clear()
            self._send()
        except Exception as error:  # DistError, or torch's rendezvous' own around it
            self.lost = self.lost or plain_reason(error)

    def _probe(self, since: float) -> None:
        """While the store does not answer, look whether its machine can be reached at all."""
        assert self._address is not None
        reached = since
        while self._asking == since and self.lost is None:
            with suppress(OSError), socket.create_connection(self._address, 1.0):
                reached = time.monotonic()
            now = time.monotonic()
            if now - reached > _UNREACHED_S or now - since > _UNANSWERED_S:
                self.lost = f"no answer for {now - since:.0f} s"
            time.sleep(0.5)
        self._probes = None

    def _turn(self) -> None:
        self._asking = began = time.monotonic()
        self._send()
        self._beat()
        keys = [*_BOARD, "finished"]
        values = [value.decode() for value in self._store.multi_get(keys)]
        self._board = {key: value.removeprefix(_NOTHING) for key, value in zip(keys, values)}
        self._finished = int(values[-1])
        now = time.monotonic()
        if self.leads:
            others = [node for node in range(self._nodes) if node != self._node]
            for node, value in zip(others, self._store.multi_get([f"state/{node}" for node in others])):
                beat, _, self._states[node] = value.decode().partition("\n")
                self._hear(node, beat, now)
        else:
            self._hear(0, self._board["beat"], now)
        if now - began > _GONE_S:  # it is the store that was away
            self._beats = {node: (beat, now) for node, (beat, _) in self._beats.items()}
        self.waiting = self._count_waiting()

    def _send(self) -> None:
        while self._outbox:
            self._outbox.popleft()()

    def _beat(self) -> None:
        self._asking = time.monotonic()
        self._count += 1
        self._store.set(f"state/{self._node}", f"{self._count}\n{self._state}")
        if self.leads:
            self._store.set("beat", str(self._count))

    def _hear(self, node: int, beat: str, now: float) -> None:
        if node not in self._beats or self._beats[node][0] != beat:
            self._beats[node] = beat, now

    def _gather(self, found: dict[int, str]) -> None:
        self._store.set(f"fates/{self._node}", found[self._node])
        self._store.set("failed", "1")
        deadline = time.monotonic() + self._patience_s
        beats: dict[int, tuple[str, float]] = {}
        while missing := [node for node in range(self._nodes) if node not in found]:
            self._beat()
            now = time.monotonic()
            for node in missing:
                if self._store.check([f"fates/{node}"]):
                    found[node] = self._store.get(f"fates/{node}").decode()
                    continue
                beat = self._store.get(f"state/{node}").decode().partition("\n")[0]
                if node not in beats or beats[node][0] != beat:
                    beats[node] = beat, now
            # Who is here beats twice a second, also while it ends its ranks.
            if now > deadline or all(now - beats[node][1] > _GONE_S for node in missing if node not in found):
                break
            time.sleep(0.05)
        self._stay(len(found), time.monotonic() + _LEAVE_S)

    def _stay(self, count: int, deadline: float) -> None:
        self._store.add("read", 1)
        while self._store.add("read", 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)


def plain_reason(error: BaseException) -> str:
    """The last words of an error of the store, or of torch's rendezvous around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def machines_of(machines: Sequence[Machine], nodes: Collection[int]) -> str:
    """ "machine 1 (b)"."""
    return ", ".join(f"machine {node} ({machines[node].host})" for node in sorted(nodes))


def _machine(text: bytes) -> Machine:
    fields = json.loads(text)
    return Machine(**{**fields, "ranks": tuple(fields["ranks"])})
