"""Run a block of code on one rank first, then on the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch.distributed as dist

from .agreement import Agreement, Calls, store_access, store_root
from .blocks import block
from .members import members

# Inside of a `first`: the key of its current turn, and the ranks that run at the same time.
_turn: ContextVar[tuple[str, tuple[int, ...]] | None] = ContextVar("turn", default=None)


@block("`with ddparity.first() as goes_first:`")
def first(scope: Literal["world", "node"] = "world") -> Iterator[bool]:
    """Run the body on the first rank of the world, or of each node; then run it on the other ranks.

    Every rank of the default process group must call it. Yields True on a rank that runs first. Use it where one
    process prepares what all ranks then read: a download, a cache, a compiled extension. The other ranks wait as long
    as the body takes and the first rank's process lives. The group's time-out applies to a rank that does not call
    `first`. It may be nested. In a world of one, or without a process group, the body runs at once.

    Collectives: none; two agreements through the group's store, six short requests a rank and a poll while it waits.

    Raises:
        ValueError: `scope` is neither "world" nor "node".
        RankFailure: on every other rank, if the body raised on one rank or that rank's process died. The error names
            that rank, and has its traceback as a note. The rank itself raises its own exception. Also if a rank has
            not called `first` within the group's time-out.

    Example:
        >>> with first("node"):
        ...     data = "downloaded once on each node"
    """
    if scope not in ("world", "node"):
        raise ValueError(f'first() got scope {scope!r}: use "world" (one process) or "node" (one on each node)')
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
    with store_access(what):
        nodes = [member.node_rank for member in members(store)] if scope == "node" else [0] * dist.get_world_size()
        call = store.add(f"{prefix}/calls/{rank}", 1)
    firsts = tuple(sorted({nodes[other]: other for other in reversed(active)}.values()))  # the lowest rank of each node
    others = tuple(other for other in active if other not in firsts)
    key = f"{prefix}/{call}"
    calls = Calls(f"{prefix}/calls", call)
    before = Agreement(store, f"{key}/before", rank, firsts, what, calls)
    before.waiting = len(active)  # also those that do not run first
    after = Agreement(store, f"{key}/after", rank, active, what, calls)

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
        before.wait()  # the first rank of another node may have failed
    after.arrive()
    after.wait()
