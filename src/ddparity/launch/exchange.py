"""What the agents of several machines tell each other, through the store of their rendezvous."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress

from torch.distributed import DistError

from ..compat import PrefixStore, Store, append

_PATIENCE_S = 5.0  # for the other machines' account of a failure
_LOOK_S = 0.5  # between two looks whether another machine has failed


class Exchange:
    """One round of a job: a new one begins with each start of the workers, under keys of its own."""

    def __init__(self, store: Store, node: int, nodes: int) -> None:
        self._store = PrefixStore("ddparity", store)
        self._node, self._nodes = node, nodes
        self._looked = self._listened = 0.0
        self._passed: set[int] = set()

    @property
    def leads(self) -> bool:
        """Whether this is the machine that compares what all have published."""
        return self._node == 0

    def publish(self, state: str) -> None:
        """This machine's ranks, for the one that compares."""
        self._store.set(f"state/{self._node}", state)

    def read(self) -> list[str]:
        """What each machine has published last, of those that have."""
        keys = [key for node in range(self._nodes) if self._store.check([key := f"state/{node}"])]
        return [value.decode() for value in self._store.multi_get(keys)] if keys else []

    def tell(self, verdict: str) -> None:
        self._store.set("verdict", verdict)

    def verdict(self) -> str | None:
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def failed(self) -> bool:
        """Whether a machine has told of a failure; looks at the store twice a second."""
        if time.monotonic() - self._looked < _LOOK_S:
            return False
        self._looked = time.monotonic()
        try:
            return bool(self._store.check(["failed"]))
        except DistError:
            return True  # the machine that holds the store has gone

    def signals(self, own: Collection[int]) -> list[int]:
        """Pass on the warnings that came here, and hear of those that came to other machines."""
        new = set(own) - self._passed
        try:
            for number in new:
                append(self._store, "signals", f"{number} ")
            self._passed |= new
            if time.monotonic() - self._listened < _LOOK_S:
                return []
            self._listened = time.monotonic()
            if not self._store.check(["signals"]):
                return []
            return [number for number in map(int, self._store.get("signals").split()) if number not in self._passed]
        except DistError:  # found by `failed`
            return []

    def all_fates(self, own: str) -> list[str]:
        """Tell how this machine's ranks ended, and hear it of the others, as far as they answer in a few seconds."""
        found = {self._node: own}
        with suppress(DistError):
            self._store.set(f"fates/{self._node}", own)
            self._store.set("failed", "")
            deadline = time.monotonic() + _PATIENCE_S
            while len(found) < self._nodes and time.monotonic() < deadline:
                for node in range(self._nodes):
                    if node not in found and self._store.check([f"fates/{node}"]):
                        found[node] = self._store.get(f"fates/{node}").decode()
                time.sleep(0.05)
            # The store may end with this machine's agent: the others read before.
            self._store.add("read", 1)
            while self.leads and self._store.add("read", 0) < len(found) and time.monotonic() < deadline:
                time.sleep(0.05)
        return [text for _, text in sorted(found.items())]
