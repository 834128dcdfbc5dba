"""What the watchers of models, optimizers and losses share in one process."""

from __future__ import annotations

import weakref
import zlib
from collections import Counter
from typing import Any

from .journal import Journal

HASHED = 10  # steps of each optimizer, and forwards, of which checksums are taken
MOST_EVENTS = 60_000


class Recorder:
    """The models and optimizers that this process has made, and the window that is open."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.made: Counter[tuple[str, str | None]] = Counter()  # models and optimizers, by their kind and line
        self.ddps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.names: dict[int, tuple[int, str]] = {}  # of the parameters in DDP, by id
        self.ignored: dict[int, int] = {}  # those that DDP was told to leave out, with its number
        self.frozen: dict[int, int] = {}  # those that required no gradient, with DDP's number
        self.optimizers: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self.depth = 0
        self.forwards = 0
        self.scale: float | None = None  # of a GradScaler
        self.events = 0
        self.evaluations: Counter[str | None] = Counter()  # by the line that calls eval()
        self.evaluated: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
        self.large: dict[tuple[int, str], int] = {}  # checksums of large buffers
        self.flat: weakref.WeakSet[Any] = weakref.WeakSet()  # modules of the first FSDP, whose gradients are shards
        self.fully_sharded = False
        self.reduces: bool | None = None  # the last switch of fully_shard's reduction

    def number(self, kind: str, site: str | None) -> int:
        """Return a number for a model or an optimizer, alike on ranks that make others elsewhere in between."""
        self.made[kind, site] += 1
        return zlib.crc32(f"{kind} {self.made[kind, site]} {site}".encode()) or 1

    def event(self, kind: str, /, **values: Any) -> None:
        self.events += 1
        if self.events < MOST_EVENTS:
            self.journal.write(kind, **values)
