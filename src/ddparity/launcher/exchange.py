"""What the agents of several machines tell each other, through the store of their rendezvous.

A request to the store takes as long as the network is down. Therefore a thread makes the requests, and the agent reads
the last answers.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from ..compat import PrefixStore, Store, append
from ..errors import RendezvousError
from .diagnosis.exits import ExitReport, lost_reports, pack_reports, unpack_reports
from .diagnosis.limits import MESSAGE, read_json

_BEAT_S = 0.5  # between two looks at the store, and between two heartbeats
# Where the network is down for 10 s, the kernel's next try to deliver may come as late as after 21 s in all.
SILENT_S = 30.0
_UNREACHED_S = 15.0  # without a connection to the store for so long, its machine counts as lost
_UNANSWERED_S = 60.0  # a machine that accepts connections but does not answer
_LOST_S = 3.0  # after a failure, a machine without a heartbeat for so long counts as lost
_FIRST_WORD_S = 30.0  # from the rendezvous until each machine has described itself
_LEAVE_S = 3.0  # for the others to read before the store ends with the machine that holds it
_HURRY_S = 1.0  # for the last messages to the others, when a signal has come
_NOTHING = "-"
_WARNINGS = [str(int(getattr(signal, name))) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
_SHARED_KEYS = ("verdict", "failed", "changes", "signals", "beat")


@dataclass(frozen=True)
class Node:
    """One machine, as it describes itself when a round begins. `holds`: it holds the store of the job.

    `logs`: the number of the run in the folder of the logs; `begun`: it has begun, and is not a proposal.
    """

    host: str
    ranks: tuple[int, ...]
    restarts: int
    holds: bool
    logs: int = 1
    begun: bool = False


class Exchange:
    """One round of messages. A round begins with each start of the ranks and has keys of its own in the store.

    Args:
        store: the rendezvous' store, with a prefix of its own for each round.
        node_rank, nnodes: this machine's number, and how many machines there are.
        own: this machine's description.
        timeout_s: for the other machines to end their ranks and send their exit reports.
        count_waiting: returns how many machines wait to join the job; it asks the store.
        address: of the store, where another machine may hold it.
        patience: `patience(seconds)` returns a function that is True once the user has sent a signal and the seconds
            are over: a wait must then stop.

    Raises:
        DistError: a machine is lost since the rendezvous.
    """

    def __init__(
        self,
        store: Store,
        node_rank: int,
        nnodes: int,
        own: Node,
        timeout_s: float,
        count_waiting: Callable[[], int],
        address: tuple[str, int],
        patience: Callable[[float], Callable[[], bool]],
    ) -> None:
        self._store = PrefixStore("ddparity", store)
        self._node_rank, self._nnodes, self._timeout_s = node_rank, nnodes, timeout_s
        self._count_waiting, self._patience = count_waiting, patience
        self._address = None if own.holds else address
        self.nodes = self._meet(own)
        self.waiting = 0  # machines that wait to join the job
        self.lost: str | None = None  # the reason, where the store is lost
        self._shared = dict.fromkeys(_SHARED_KEYS, "")
        self._announced = ""
        self._state, self._states = "", dict.fromkeys(range(nnodes), "")
        self._beats: dict[int, tuple[str, float]] = {}  # other machines: the last heartbeat, when it was first seen
        self._count = 0
        self._finished = 0
        self._known_signals: set[int] = set()
        self._outbox: deque[Callable[[], object]] = deque()
        self._wake, self._closed = threading.Event(), False
        self._asking_since: float | None = None  # when the request that the store has not answered began
        self._probe: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="ddparity-exchange", daemon=True)
        self._thread.start()

    def _meet(self, own: Node) -> tuple[Node, ...]:
        """Return the descriptions of all machines. The leading one collects them: three requests a machine."""
        if self.leads:
            for key in _SHARED_KEYS:
                self._store.compare_set(key, "", _NOTHING)
            self._store.add("finished", 0)
        self._store.compare_set(f"state/{self._node_rank}", "", _NOTHING)
        self._store.set(f"machine/{self._node_rank}", json.dumps(asdict(own)))
        limit = timedelta(seconds=_FIRST_WORD_S)
        if self.leads:
            names = [f"machine/{other}" for other in range(self._nnodes)]
            self._store.wait(names, limit)
            self._store.set("machines", json.dumps([read_json(text) for text in self._store.multi_get(names)]))
        self._store.wait(["machines"], limit)
        return tuple(map(_node, read_json(self._store.get("machines"))))

    # The hang diagnosis: the leading machine compares what all machines publish, and announces its report.

    @property
    def leads(self) -> bool:
        """Whether this machine compares what all machines have published."""
        return self._node_rank == 0

    def publish(self, state: str) -> None:
        """Send the state of this machine's ranks to the leading machine."""
        self._state = state
        self._wake.set()

    def read(self) -> list[str]:
        """Return the last state of each machine that has published one."""
        states = {**self._states, self._node_rank: self._state}
        return [state for _, state in sorted(states.items()) if state]

    def announce(self, text: str) -> None:
        """Send the question or the hang report of the leading machine to all machines; "" withdraws the last one."""
        self._announced = text
        self._post(lambda: self._store.set("verdict", text or _NOTHING))

    def announced(self) -> str | None:
        """Return the last text that the leading machine announced."""
        return (self._announced if self.leads else self._shared["verdict"]) or None

    # The state of the job.

    def failed(self) -> bool:
        """Return whether a machine has reported a failure, or is lost."""
        since = self._asking_since
        if since is not None and time.monotonic() - since > _LOST_S and self._probe is None and self._address:
            self._probe = threading.Thread(target=self._run_probe, args=(since,), name="ddparity-probe", daemon=True)
            self._probe.start()
        return bool(self._shared["failed"]) or self.lost is not None or bool(self.silent())

    def silent(self) -> dict[int, float]:
        """Return the machines without a heartbeat for `SILENT_S`, and the seconds since their last one."""
        now = time.monotonic()
        return {node: now - since for node, (_, since) in self._beats.items() if now - since > SILENT_S}

    def change(self) -> None:
        """Tell the others that this machine ends its ranks so that another machine can join. No rank has failed."""
        self._post(lambda: self._store.set("changes", "1"))

    def changes(self) -> bool:
        return bool(self._shared["changes"])

    def signals(self, own: Iterable[int]) -> list[int]:
        """Send this machine's warnings to the others, and return those of other machines. Each appears once."""
        for number in own:
            if number not in self._known_signals:
                self._post(partial(append, self._store, "signals", f"{number} "))
                self._known_signals.add(number)
        theirs = [int(word) for word in self._shared["signals"].split() if word in _WARNINGS]
        new = [number for number in theirs if number not in self._known_signals]
        self._known_signals.update(new)
        return new

    def finish(self) -> None:
        """Tell the others that all ranks of this machine have finished."""
        self._post(lambda: self._store.add("finished", 1))

    def all_finished(self) -> bool:
        return self._finished >= self._nnodes

    def leave(self) -> None:
        """Wait, for a few seconds at most, until the other machines have read that all have finished."""
        self._ask(lambda: self._wait_for_readers(self._nnodes, time.monotonic() + _LEAVE_S), _LEAVE_S + 1)

    def all_exit_reports(self, own: Iterable[ExitReport]) -> list[ExitReport]:
        """Send this machine's exit reports and return those of all machines.

        The ranks of a machine that does not answer are reported as lost. Where the store itself is lost, only the ranks
        of the machine that held it are: nothing is known of the other machines.
        """
        silent = self.silent()
        texts = {self._node_rank: pack_reports(own)}
        self._ask(lambda: self._gather(texts), self._timeout_s + _LOST_S + _LEAVE_S + 1)
        reports: list[ExitReport] = []
        for number, node in enumerate(self.nodes):
            name = f"machine {number} ({node.host})"
            if (found := unpack_reports(texts.get(number, ""))) is not None:
                reports += found
            elif self.lost is not None:
                if node.holds:
                    reason = f"lost {name}, which holds the job's store: {self.lost}"
                    reports += lost_reports(node.ranks, node.host, reason, time.time())
            else:
                why = f"no heartbeat for {silent[number]:.0f} s" if number in silent else "no word from it"
                reports += lost_reports(node.ranks, node.host, f"lost {name}: {why}", time.time())
        return reports

    def close(self) -> None:
        """Send the messages that are left and end the thread. Wait no longer than the store may need to answer."""
        self._closed = True
        self._wake.set()
        deadline, hurry = time.monotonic() + SILENT_S, self._patience(_HURRY_S)
        while self._thread.is_alive() and self.lost is None and time.monotonic() < deadline and not hurry():
            self._thread.join(0.1)

    # Between the agent and the thread.

    def _post(self, request: Callable[[], object]) -> None:
        self._outbox.append(request)
        self._wake.set()

    def _ask(self, request: Callable[[], object], timeout_s: float) -> None:
        """Have the thread make a request, and wait for it, but no longer than `timeout_s`."""
        done = threading.Event()

        def make_request() -> None:
            try:
                request()
            finally:
                done.set()

        if self.lost is None:
            self._post(make_request)
            deadline, hurry = time.monotonic() + timeout_s, self._patience(_HURRY_S)
            while not done.wait(0.05) and self.lost is None and time.monotonic() < deadline and not hurry():
                pass

    # In the thread.

    def _run(self) -> None:
        try:
            while not self._closed:
                self._update()
                self._asking_since = None
                self._wake.wait(_BEAT_S)
                self._wake.clear()
            self._send()
        except Exception as error:  # DistError, or an error of torch's rendezvous around it
            self.lost = self.lost or plain_reason(error)

    def _run_probe(self, since: float) -> None:
        """While the store does not answer, test whether its machine can be reached at all. This is another thread."""
        assert self._address is not None
        reached = since
        while self._asking_since == since and self.lost is None:
            with suppress(OSError), socket.create_connection(self._address, 1.0):
                reached = time.monotonic()
            now = time.monotonic()
            if now - reached > _UNREACHED_S or now - since > _UNANSWERED_S:
                self.lost = f"no answer for {now - since:.0f} s"
            time.sleep(0.5)
        self._probe = None

    def _update(self) -> None:
        self._asking_since = began = time.monotonic()
        self._send()
        self._beat()
        keys = [*_SHARED_KEYS, "finished"]
        values = [value.decode() for value in self._store.multi_get(keys)]
        self._shared = {key: value.removeprefix(_NOTHING) for key, value in zip(keys, values)}
        self._finished = int(values[-1])
        now = time.monotonic()
        if self.leads:
            others = [node for node in range(self._nnodes) if node != self._node_rank]
            for node, value in zip(others, self._store.multi_get([f"state/{node}" for node in others])):
                beat, _, self._states[node] = value.decode().partition("\n")
                self._note_beat(node, beat, now)
        else:
            self._note_beat(0, self._shared["beat"], now)
        if now - began > _LOST_S:  # the store did not answer, so that no other machine could send a heartbeat
            self._beats = {node: (beat, now) for node, (beat, _) in self._beats.items()}
        self.waiting = self._count_waiting()

    def _send(self) -> None:
        while self._outbox:
            self._outbox.popleft()()

    def _beat(self) -> None:
        self._asking_since = time.monotonic()
        self._count += 1
        self._store.set(f"state/{self._node_rank}", f"{self._count}\n{self._state}")
        if self.leads:
            self._store.set("beat", str(self._count))

    def _note_beat(self, node: int, beat: str, now: float) -> None:
        if node not in self._beats or self._beats[node][0] != beat:
            self._beats[node] = beat, now

    def _gather(self, found: dict[int, str]) -> None:
        """Publish this machine's exit reports and add those of the other machines to `found`.

        The leading machine collects them and publishes them as one text. Where it is lost, each machine collects them.
        """
        self._store.set(f"fates/{self._node_rank}", found[self._node_rank])
        append(self._store, "reported", f"{self._node_rank} ")
        self._store.set("failed", "1")
        deadline = time.monotonic() + self._timeout_s
        if self.leads or not self._receive_fates(found, deadline + _LOST_S):
            self._collect_fates(found, deadline)
        if self.leads:
            text = json.dumps(found)
            self._store.set("fates", text if len(text) <= MESSAGE else _NOTHING)
        self._wait_for_readers(len(found), time.monotonic() + _LEAVE_S)

    def _receive_fates(self, found: dict[int, str], deadline: float) -> bool:
        """Wait for the collected reports; return False where the leading machine is silent."""
        leader, beaten = ("", time.monotonic()), 0.0
        while not self._store.check(["fates"]):
            now = time.monotonic()
            if now - beaten > _BEAT_S:
                self._beat()
                beaten, text = now, self._store.get("beat").decode()
                leader = leader if text == leader[0] else (text, now)
            if now > deadline or now - leader[1] > _LOST_S:
                return False
            time.sleep(0.05)
        collected = self._store.get("fates").decode()
        if collected == _NOTHING:  # too long for one value of the store
            return False
        reports = {int(node): one for node, one in read_json(collected).items()}
        found |= {node: one for node, one in reports.items() if node != self._node_rank}
        return True

    def _collect_fates(self, found: dict[int, str], deadline: float) -> None:
        beats: dict[int, tuple[str, float]] = {}
        while missing := [node for node in range(self._nnodes) if node not in found]:
            self._beat()
            reported = {int(node) for node in self._store.get("reported").split()} & set(missing)
            texts = self._store.multi_get([f"fates/{node}" for node in sorted(reported)]) if reported else []
            found |= {node: text.decode() for node, text in zip(sorted(reported), texts)}
            now, silent = time.monotonic(), [node for node in missing if node not in found]
            for node, text in zip(
                silent, self._store.multi_get([f"state/{node}" for node in silent]) if silent else []
            ):
                beat = text.decode().partition("\n")[0]
                if node not in beats or beats[node][0] != beat:
                    beats[node] = beat, now
            # A machine that runs sends a heartbeat twice a second, also while it ends its ranks.
            if now > deadline or all(now - beats[node][1] > _LOST_S for node in silent):
                break
            time.sleep(0.05)

    def _wait_for_readers(self, count: int, deadline: float) -> None:
        """Note that this machine has read, and wait until `count` machines have. The store may end with this one."""
        self._store.add("read", 1)
        while self._store.add("read", 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)


def plain_reason(error: BaseException) -> str:
    """Return the first line of the innermost error: torch's rendezvous wraps the store's errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _node(fields: Any) -> Node:
    try:
        node = Node(**{**fields, "ranks": tuple(map(int, fields["ranks"]))})
        node = replace(node, host=str(node.host), restarts=int(node.restarts), holds=bool(node.holds))
        return replace(node, logs=int(node.logs), begun=bool(node.begun))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RendezvousError(
            f"a machine described itself in a way that cannot be read ({error}): does another program use the port?"
        ) from None
