"""Order between processes: one first, then the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch.distributed as dist

from .agreement import Agreement, reaching_store, store_root
from .members import roster

# The turn of the `first` that this code runs inside of: its key, and the ranks that run at the same time.
_turn: ContextVar[tuple[str, tuple[int, ...]] | None] = ContextVar("turn", default=None)


@contextmanager
def first(scope: Literal["world", "node"] = "world") -> Iterator[bool]:
    """Let the first rank of the world, or of each node, run the body; then the others run it.

    Every rank of the default process group must come here. Yields True on a rank that goes first. Use it where one
    process prepares what all then read: a download, a cache, a compiled extension. The others wait as long as the
    body takes, whatever the group's time-out, while the first rank's process lives. May be nested. In a world of one,
    or without a process group, the body just runs.

    Collectives: none; two agreements through the group's store, six short requests a rank and a poll while waiting.

    Raises:
        RankFailure: on every other rank, where the body raised on one or its process died; it names that rank, and
            carries its traceback as a note. The rank itself keeps its exception.

    Example:
        >>> with first("node"):
        ...     data = "downloaded once a node"
    """
    if scope not in ("world", "node"):
        raise ValueError(f'first() got scope {scope!r}: use "world" (one process) or "node" (one a node)')
    outer = _turn.get()
    if outer is not None:
        prefix, active = outer
    else:
        alone = not dist.is_initialized()
        prefix, active = "first", (0,) if alone else tuple(range(dist.get_world_size()))
    if len(active) == 1:
        yield True
        return

    what = f'first("{scope}")'
    rank, store = dist.get_rank(), store_root()
    with reaching_store(what):
        nodes = [0 if scope == "world" else card.node_rank for card in roster(store)]
        call = store.add(f"{prefix}/calls/{rank}", 1)
    firsts = tuple(sorted({nodes[other]: other for other in reversed(active)}.values()))  # the lowest of each node
    others = tuple(other for other in active if other not in firsts)
    key = f"{prefix}/{call}"
    before = Agreement(store, f"{key}/before", rank, firsts, what)
    after = Agreement(store, f"{key}/after", rank, active, what)

    leads = rank in firsts
    if not leads:
        before.wait()
    token = _turn.set((f"{key}/{'firsts' if leads else 'others'}", firsts if leads else others))
    try:
        yield leads
    except BaseException as error:
        (before if leads else after).fail(error)
        raise
    finally:
        _turn.reset(token)
    if leads:
        before.arrive()
        before.wait()  # another node's first may have failed
    after.arrive()
    after.wait()
