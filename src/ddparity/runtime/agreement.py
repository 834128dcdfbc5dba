"""Let ranks agree at a point of the program: all of them reach it, or all of them learn which rank failed.

An agreement uses the process group's key-value store, and no collective. A store works for any subset of ranks and on
any device, and can be polled between batches. It does not
notice a process that dies without a message. The processes of the same machine notice it by the process table; on
other machines the launcher ends the job. A rank that does not come to an agreement within the group's time-out is an
error on the ranks that wait. A rank that has come may take as long as it needs, for a download or a save.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..compat import PrefixStore, Store, append, default_store, group_name, group_timeout_s
from ..errors import RankFailure
from ..system import process_table
from .waits import end_wait, note_wait

_POLL_S = (0.0005, 0.05)  # shortest and longest pause between two polls of the store
_PATIENCE = 0.05  # a pause is this part of the time waited so far: polling adds at most this part to a wait
_LIVENESS_S = 0.5  # between two searches of the process table
_MANY = 256  # with more ranks than this, each asks the store less often, so that together they ask no more
_ABSENT_S = 5.0  # how long to wait for the rank that asks which ranks have not come
_CAUSE_S = 2.0  # how long to wait for the cause of a broken connection


@contextmanager
def agreed(what: str, group: dist.ProcessGroup | None = None, kind: str = "agreed") -> Iterator[Agreement | None]:
    """Run the body on every rank of a group; an exception on one rank is raised on all ranks.

    Every rank of the group must enter, and the entries of one `kind` must come in the same order on all ranks. Yields
    the agreement, with which a long body can ask early whether another rank has failed; None in a world of one.

    Args:
        what: what the ranks do here, for error messages.
        group: the process group; None is the default group.
        kind: the name of the series in which entries are counted.
    """
    agreement = begun(what, group, kind)
    if agreement is None:
        yield None
        return
    try:
        yield agreement
    except BaseException as error:
        agreement.fail(error)
        raise
    agreement.arrive()
    agreement.wait()


def begun(what: str, group: dist.ProcessGroup | None = None, kind: str = "agreed") -> Agreement | None:
    """Return the next agreement of a series, as `agreed` enters it, without a wait; None in a world of one.

    A thread can then arrive at it and wait for it, also after the rank has left the world.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return None
    rank, store = dist.get_rank(), store_root()
    ranks: Sequence[int] = range(dist.get_world_size())
    series = kind
    if group is not None:
        ranks, series = dist.get_process_group_ranks(group), f"{kind}/{group_name(group)}"
    with store_access(what):
        call = store.add(f"{series}/{rank}", 1)
    return Agreement(store, f"{series}/call{call}", rank, ranks, what, Calls(series, call, group))


@dataclass(frozen=True)
class Calls:
    """The series of calls that an agreement belongs to: in the store, `series`/rank has the number of a rank's calls.

    `call`: the agreement's number in the series. `group`: its process group, whose time-out holds; None: the default.
    """

    series: str
    call: int
    group: dist.ProcessGroup | None = None


class Agreement:
    """One agreement of the ranks `ranks`, under a key that is the same on all of them.

    `calls`: tells which ranks have come to the agreement. Those that have not after the group's time-out are an error.

    Each rank calls `arrive` or `fail`. `wait` returns when all ranks have arrived. It raises `RankFailure` as soon as
    one rank has failed, has died or has left the world. `poll` asks without waiting. Traffic: three short store
    requests a rank, and two a poll.

    Each method raises `RankFailure` where the store cannot be reached.
    """

    def __init__(
        self, store: Store, key: str, rank: int, ranks: Sequence[int], what: str, calls: Calls | None = None
    ) -> None:
        self._root = store
        self._key = key
        self._calls = calls
        self._store = PrefixStore(key, store)
        self._rank = rank
        self._ranks = ranks
        self._what = what
        self.waiting = len(ranks)  # how many ranks may wait for it at the same time
        self.while_waiting: Callable[[], None] | None = None  # called between two polls
        self.may_leave = False  # whether a rank may arrive after it has left the world, from a thread
        with store_access(what):
            _register(store, rank)

    def arrive(self) -> None:
        """Say that this rank has reached the agreement."""
        with store_access(self._what):
            if self._store.add("arrived", 1) == len(self._ranks):
                self._store.set("done", "arrived")

    def fail(self, error: BaseException) -> None:
        """Send this rank's exception to the others. If several ranks fail, the first one is named."""
        text = "".join(traceback.format_exception(error)).rstrip()
        self._report(self._rank, f"{type(error).__name__}: {error}", text)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until all ranks have arrived.

        Raises:
            RankFailure: a rank has failed, has died, has not arrived after `timeout_s`, or has not come to the
                agreement after the group's time-out.
        """
        self._wait_until(self.poll, timeout_s)

    def poll(self) -> bool:
        """Return True if all ranks have arrived; raise `RankFailure` if one has failed."""
        if not self._store.check(["done"]):
            return False
        if self._store.get("done") != b"failed":
            return True
        rank, message, text = json.loads(self._store.get("failure"))
        failure = RankFailure(f"rank {rank} failed in {self._what}: {message}", rank)
        if text:
            failure.add_note(f"On rank {rank}:\n{text}")
        raise failure

    def check(self) -> None:
        """Raise `RankFailure` if a rank has failed, has died or has left the world; do not wait."""
        with store_access(self._what):
            self._report_dead_ranks()
            self.poll()

    def raise_cause(self, error: Exception) -> None:
        """Raise `RankFailure` from `error`, a broken connection, if a rank's failure or end is the cause.

        Wait at most 2 s for the cause; return if none is found.
        """
        deadline = time.monotonic() + _CAUSE_S
        while time.monotonic() < deadline:
            try:
                self.check()
            except RankFailure as failure:
                raise failure from error
            time.sleep(_POLL_S[1])

    def first_value(self, name: str, text: str) -> str:
        """Return the text that the first rank to call this gave under this name."""
        with store_access(self._what):
            return self._store.compare_set(f"said/{name}", "", text).decode()

    def same(self, name: str, value: object) -> None:
        """Raise ValueError if `value` is not what the first rank to call this gave."""
        theirs = self.first_value(f"same/{name}", repr(value))
        if theirs != repr(value):
            raise ValueError(self._difference(name, repr(value), theirs))

    def all_same(self, values: dict[str, object], said: Mapping[str, Callable[[Any], str]] | None = None) -> None:
        """Raise ValueError if a value differs from that of the first rank to call this; one store request.

        Args:
            values: numbers and strings by name; the same names on every rank.
            said: for some names, a function of the other rank's value that returns the error's text.
        """
        text = json.dumps(values, default=str)
        theirs = json.loads(self.first_value("same", text))
        for name, value in json.loads(text).items():
            if theirs[name] != value and said is not None and name in said:
                raise ValueError(said[name](theirs[name]))
            if theirs[name] != value:
                raise ValueError(self._difference(name, repr(value), repr(theirs[name])))

    def count(self, name: str, more: int = 1) -> int:
        """Add to a number that all ranks share, and return the sum."""
        with store_access(self._what):
            return self._store.add(f"count/{name}", more)

    def publish(self, name: str, text: str) -> None:
        """Give all ranks a text under a name, once."""
        with store_access(self._what):
            self._store.set(f"told/{name}", text)

    def receive(self, name: str) -> str:
        """Wait for the text that a rank publishes under a name, and return it. Raises as `wait`."""
        self._wait_until(lambda: self._store.check([f"told/{name}"]) or self.poll(), None)
        return self._store.get(f"told/{name}").decode()

    def _difference(self, name: str, mine: str, theirs: str) -> str:
        return f"{name} differs between ranks: {mine} on rank {self._rank}, {theirs} on another"

    def _wait_until(self, ready: Callable[[], bool], timeout_s: float | None) -> None:
        start = searched = time.monotonic()
        began_s, noted = time.time(), None
        limit_s = group_timeout_s(self._calls.group) if timeout_s is None and self._calls is not None else timeout_s
        times = max(1.0, self.waiting / _MANY)
        with store_access(self._what):
            try:
                while not ready():
                    if self.while_waiting is not None:
                        self.while_waiting()
                    now = time.monotonic()
                    if now - searched > _LIVENESS_S * times:
                        searched = now
                        noted = noted or note_wait(self._what, self._key, self._ranks, began_s, limit_s)
                        self._report_dead_ranks()
                    if limit_s is not None and now - start > limit_s:
                        self._refuse_absent(limit_s)
                        limit_s = None  # all have come: a body may take as long as it needs
                        noted = noted and note_wait(self._what, self._key, self._ranks, began_s, limit_s)
                    pause_s = min(max(_PATIENCE * (now - start), _POLL_S[0]), _POLL_S[1])
                    time.sleep(pause_s * times)
            finally:
                end_wait(noted)

    def _refuse_absent(self, timeout_s: float) -> None:
        """Raise `RankFailure` if ranks have not come to this agreement; without `calls`, if they have not arrived."""
        waited = f"rank {self._rank} waited {timeout_s:g} s"
        if self._calls is None:
            raise RankFailure(f"{waited} for the other ranks in {self._what}")
        absent = self._absent(self._calls)
        if absent:
            who = (
                ("ranks " if len(absent) > 1 else "rank ") + ", ".join(map(str, absent[:8])) + " …" * (len(absent) > 8)
            )
            raise RankFailure(
                f"{waited}, the group's time-out, in {self._what} for {who}, which did not come to it: every rank must "
                f"call it, in the same order as the others"
            )

    def _absent(self, calls: Calls) -> list[int]:
        """Return the ranks that have not come. One rank asks the store for each of them, and tells the others."""
        deadline = time.monotonic() + _ABSENT_S
        if self._store.add("absent/asked", 1) > 1:
            while time.monotonic() < deadline:
                if self._store.check(["absent/found"]):
                    return [int(rank) for rank in json.loads(self._store.get("absent/found"))]
                time.sleep(_POLL_S[1])
        absent = [rank for rank in self._ranks if self._root.add(f"{calls.series}/{rank}", 0) < calls.call]
        self._store.set("absent/found", json.dumps(absent))
        return absent

    def _report(self, rank: int, message: str, text: str) -> None:
        with store_access(self._what):
            self._store.compare_set("failure", "", json.dumps([rank, message, text]))
            self._store.set("done", "failed")

    def _report_dead_ranks(self) -> None:
        others = set(self._ranks) - {self._rank}
        # A rank that has arrived leaves only after all have: "done" was set before it left, so "done" is read last.
        for rank in [] if self.may_leave else _left_ranks(self._root):
            if rank in others and not self._store.check(["done"]):
                self._report(rank, "it left the world before it reached this point", "")
        for rank, pid in _local_processes(self._root):
            if rank in others and not _is_alive(pid) and not self._store.check(["done"]):
                self._report(rank, f"its process {pid} on {socket.gethostname()} died", "")


@contextmanager
def store_access(what: str) -> Iterator[None]:
    """Raise `RankFailure` where the body loses the connection to the store."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise RankFailure(
            f"lost the connection to the store in {what}: the process that holds it, rank 0 or the launcher, has ended "
            f"({str(error).splitlines()[0]})",
            0,
        ) from error


def store_root() -> Store:
    """Return the part of the default group's store that holds all of this library's keys."""
    return PrefixStore("ddparity", default_store())


def leave(store: Store, rank: int) -> None:
    """Tell the other ranks that this rank reaches no further agreement."""
    append(store, "departed", f"{rank}\n")


def _left_ranks(store: Store) -> list[int]:
    return [int(rank) for rank in store.get("departed").split()] if store.check(["departed"]) else []


def _register(store: Store, rank: int) -> None:
    """Add this process to its machine's list, once."""
    if store.add(f"registered/{rank}", 1) == 1:
        append(store, f"machine/{_machine_id()}", f"{rank} {os.getpid()}\n")


def _local_processes(store: Store) -> list[tuple[int, int]]:
    """Return (rank, process id) of each registered process of this machine."""
    lines = store.get(f"machine/{_machine_id()}").decode().splitlines()
    return [(int(rank), int(pid)) for rank, pid in (line.split() for line in lines)]


_machine_id = functools.cache(process_table)


def _is_alive(pid: int) -> bool:
    import psutil  # here, since importing ddparity need not take longer for it

    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
