"""Points where ranks agree: all arrive, or all learn who failed. Kept in the group's store, so no collective runs.

A store serves any subset of ranks and any device, is not bound to the group's time-out for collectives, and can be
polled between batches. Its weakness is a process that dies without a word; processes of the same machine notice that
by the process table, and a launcher ends the job on other machines.
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
from typing import Any

import psutil
import torch.distributed as dist

from ..compat import PrefixStore, Store, append, default_store, group_name
from ..errors import RankFailure

_POLL_S = (0.0005, 0.05)  # shortest and longest pause between two looks at the store
_PATIENCE = 0.05  # a pause is that part of the time waited so far, and so is at most what it adds
_LIVENESS_S = 0.5  # between two looks at the process table
_EXPLAIN_S = 2.0  # from a broken connection until its cause is known


class Agreement:
    """One agreement of the ranks `ranks`, under a key that all of them name alike.

    Each rank calls `arrive` or `fail`; `wait` returns when all have arrived, and raises `RankFailure` as soon as one
    has failed, died or left the world. `poll` looks without waiting. Traffic: three short store requests a rank, two a
    poll.
    """

    def __init__(self, store: Store, key: str, rank: int, ranks: Sequence[int], what: str) -> None:
        self._root = store
        self._store = PrefixStore(key, store)
        self._rank = rank
        self._ranks = ranks
        self._what = what
        self.meanwhile: Callable[[], None] | None = None  # called now and then while waiting
        with reaching_store(what):
            _register(store, rank)

    def arrive(self) -> None:
        with reaching_store(self._what):
            if self._store.add("arrived", 1) == len(self._ranks):
                self._store.set("done", "arrived")

    def fail(self, error: BaseException) -> None:
        """Tell the others of this rank's exception; the first to tell is the one that is named."""
        text = "".join(traceback.format_exception(error)).rstrip()
        self._report(self._rank, f"{type(error).__name__}: {error}", text)

    def first_said(self, name: str, text: str) -> str:
        """What the first rank to come here said."""
        with reaching_store(self._what):
            return self._store.compare_set(f"said/{name}", "", text).decode()

    def count(self, name: str, more: int = 1) -> int:
        """Add to a number that all ranks share; gives the sum."""
        with reaching_store(self._what):
            return self._store.add(f"count/{name}", more)

    def same(self, name: str, value: object) -> None:
        """Raise ValueError where `value` is not what the first rank to come here gave."""
        theirs = self.first_said(f"same/{name}", repr(value))
        if theirs != repr(value):
            raise ValueError(f"{name} differs between ranks: {value!r} on rank {self._rank}, {theirs} on another")

    def poll(self) -> bool:
        """Whether all have arrived. Raises `RankFailure` where one has failed."""
        if not self._store.check(["done"]):
            return False
        if self._store.get("done") != b"failed":
            return True
        rank, message, text = json.loads(self._store.get("failure"))
        failure = RankFailure(f"rank {rank} failed in {self._what}: {message}", rank)
        if text:
            failure.add_note(f"On rank {rank}:\n{text}")
        raise failure

    def all_same(self, values: dict[str, object], said: Mapping[str, Callable[[Any], str]] | None = None) -> None:
        """As `same`, of several values in one request: words and numbers, of the same names on every rank.

        `said`: what to say instead where the value of that name differs, given the other rank's.
        """
        text = json.dumps(values, default=str)
        theirs = json.loads(self.first_said("same", text))
        for name, value in json.loads(text).items():
            if theirs[name] != value and said is not None and name in said:
                raise ValueError(said[name](theirs[name]))
            if theirs[name] != value:
                raise ValueError(
                    f"{name} differs between ranks: {value!r} on rank {self._rank}, {theirs[name]!r} on another"
                )

    def look(self) -> None:
        """Raise `RankFailure` where a rank has failed, died or left; without waiting."""
        with reaching_store(self._what):
            self._look_for_the_dead()
            self.poll()

    def explain(self, error: Exception) -> None:
        """Raise `RankFailure` where a rank's failure or end is what broke a connection; waits for its word a moment."""
        deadline = time.monotonic() + _EXPLAIN_S
        while time.monotonic() < deadline:
            try:
                self.look()
            except RankFailure as failure:
                raise failure from error
            time.sleep(_POLL_S[1])

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for all. Raises `RankFailure` where one has failed, died, or is not there after `timeout_s`."""
        self._until(self.poll, timeout_s)

    def tell(self, name: str, text: str) -> None:
        """Say something to all ranks, once."""
        with reaching_store(self._what):
            self._store.set(f"told/{name}", text)

    def hear(self, name: str) -> str:
        """Wait for what a rank tells. Raises as `wait`."""
        self._until(lambda: self._store.check([f"told/{name}"]) or self.poll(), None)
        return self._store.get(f"told/{name}").decode()

    def _until(self, ready: Callable[[], bool], timeout_s: float | None) -> None:
        start = looked = time.monotonic()
        with reaching_store(self._what):
            while not ready():
                if self.meanwhile is not None:
                    self.meanwhile()
                now = time.monotonic()
                if now - looked > _LIVENESS_S:
                    looked = now
                    self._look_for_the_dead()
                if timeout_s is not None and now - start > timeout_s:
                    raise RankFailure(f"rank {self._rank} waited {timeout_s:g} s for the others in {self._what}")
                time.sleep(min(max(_PATIENCE * (now - start), _POLL_S[0]), _POLL_S[1]))

    def _report(self, rank: int, message: str, text: str) -> None:
        with reaching_store(self._what):
            self._store.compare_set("failure", "", json.dumps([rank, message, text]))
            self._store.set("done", "failed")

    def _look_for_the_dead(self) -> None:
        waited_for = set(self._ranks)
        # A rank that had come here leaves only when all have: "done" is set before, and looked at last.
        for rank in departed(self._root):
            if rank in waited_for and rank != self._rank and not self._store.check(["done"]):
                self._report(rank, "it left the world without coming here", "")
        for rank, pid in _neighbours(self._root):
            if rank in waited_for and rank != self._rank and not _alive(pid) and not self._store.check(["done"]):
                self._report(rank, f"its process {pid} on {socket.gethostname()} died", "")


@contextmanager
def reaching_store(what: str) -> Iterator[None]:
    """Say what it means when the store cannot be reached any more."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise RankFailure(
            f"lost the connection to the store in {what}: the process that holds it, rank 0 or the launcher, is gone "
            f"({str(error).splitlines()[0]})",
            0,
        ) from error


def depart(store: Store, rank: int) -> None:
    """Leave word that this rank comes to no agreement any more."""
    append(store, "departed", f"{rank}\n")


def departed(store: Store) -> list[int]:
    return [int(rank) for rank in store.get("departed").split()] if store.check(["departed"]) else []


def _register(store: Store, rank: int) -> None:
    """Enter this process, once, into its machine's list."""
    if store.add(f"registered/{rank}", 1) == 1:
        append(store, f"machine/{_machine()}", f"{rank} {os.getpid()}\n")


def _neighbours(store: Store) -> list[tuple[int, int]]:
    """(rank, process id) of the registered processes of this machine."""
    lines = store.get(f"machine/{_machine()}").decode().splitlines()
    return [(int(rank), int(pid)) for rank, pid in (line.split() for line in lines)]


@functools.cache
def _machine() -> str:
    """Names this machine and its process table: containers on one host have tables of their own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def store_root() -> Store:
    """Where all of the library's keys stand in the default group's store."""
    return PrefixStore("ddparity", default_store())


@contextmanager
def agreed(what: str, group: dist.ProcessGroup | None = None, kind: str = "agreed") -> Iterator[Agreement | None]:
    """Run the body on every rank of a group, the default one where None; an exception in one is raised on all.

    Every rank of the group must enter, in the same order among those of its `kind`. Yields the agreement, whose `poll`
    tells a long body early of another rank's failure; None in a world of one.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        yield None
        return
    rank, store = dist.get_rank(), store_root()
    ranks: Sequence[int] = range(dist.get_world_size())
    place = kind
    if group is not None:
        ranks, place = dist.get_process_group_ranks(group), f"{kind}/{group_name(group)}"
    with reaching_store(what):
        call = store.add(f"{place}/{rank}", 1)
    agreement = Agreement(store, f"{place}/call{call}", rank, ranks, what)
    try:
        yield agreement
    except BaseException as error:
        agreement.fail(error)
        raise
    agreement.arrive()
    agreement.wait()
