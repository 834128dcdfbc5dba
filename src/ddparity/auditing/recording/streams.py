"""Note the states of the global random streams: torch's, NumPy's and Python's."""

from __future__ import annotations

import functools
import os
import random
import sys
import zlib
from typing import Any

from .journal import Journal

_FETCHES = 6  # of each worker and pass


def stream_states() -> list[int]:
    """Return checksums of the states of the global random streams: torch's, NumPy's and Python's."""
    import torch

    states = [zlib.crc32(torch.get_rng_state().numpy().tobytes()), 0, zlib.crc32(repr(random.getstate()).encode())]
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        states[1] = zlib.crc32(state[1].tobytes(), int(state[2]))
    return states


def count_seeds(journal: Journal) -> None:
    """Count the calls that seed a global stream: a data set that seeds itself by item may repeat numbers by design."""
    import torch

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            journal.seeds += 1
            return function(*args, **options)

        return call

    torch.manual_seed = counted(torch.manual_seed)
    torch.random.manual_seed = torch.manual_seed
    random.seed = counted(random.seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed = counted(numpy.random.seed)


def watched_fetch(journal: Journal, fetch: Any) -> Any:
    """Return torch's fetch with a record of the random streams before and after it, for its first calls."""

    @functools.wraps(fetch)
    def watched(self: Any, index: Any) -> Any:
        done = getattr(self, "_ddparity_fetches", 0)
        if done >= _FETCHES or journal.hidden or type(self.dataset).__module__.startswith("ddparity."):
            return fetch(self, index)
        self._ddparity_fetches = done + 1
        import torch

        before, seeds = stream_states(), journal.seeds
        found = fetch(self, index)
        after = stream_states()
        if before != after:
            info = torch.utils.data.get_worker_info()
            journal.write(
                "fetch",
                n=done,
                worker=None if info is None else info.id,
                base=None if info is None else info.seed - info.id,
                parent=os.getppid(),
                own=id(self.dataset),  # the same in a forked worker
                it=journal.fetching if info is None else None,
                before=before,
                drew=[a != b for a, b in zip(before, after)],
                reseeded=journal.seeds != seeds,
            )
        return found

    return watched
