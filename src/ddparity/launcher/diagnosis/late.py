"""Tell what ranks do that have not ended some time after a signal: save, or wait for ranks that are gone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .desync import describe_ranks
from .stacks import SLOW_ACTIVITIES, Stack, ask_by_signal, is_users, read_stacks


def stacks_of(ranks: Mapping[int, tuple[int, Path]], before_kill: bool) -> dict[int, Stack]:
    """Return where these ranks are. `ranks`: the process id and the folder of each.

    `before_kill`: the ranks are killed after this. Those that could not be read get a signal to write their stacks.
    """
    found = read_stacks(
        {rank: pid for rank, (pid, _) in ranks.items()}, {r: folder for r, (_, folder) in ranks.items()}
    )
    if before_kill:
        found = {rank: ask_by_signal(stack, *ranks[rank]) for rank, stack in found.items()}
    return found


def only_waits(stack: Stack) -> bool:
    """Return whether a rank waits in a collective, and not in a handler that has interrupted one, or in a save."""
    inner = tuple(itertools.takewhile(lambda frame: not is_users(frame), stack.frames))
    waits = bool(inner) and replace(stack, frames=inner).in_collective()
    return waits and stack.activity() not in SLOW_ACTIVITIES


def describe_doing(ranks: Mapping[int, object], stacks: Mapping[int, Stack]) -> str:
    """Return the ranks with what each does, like "rank 0 (saving or loading a checkpoint, train.py:40, in save)"."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        stack = stacks.get(rank, Stack())
        parts = [part for part in (stack.activity(), str(stack.user_frame() or "")) if part]
        groups.setdefault(f" ({', '.join(parts)})" if parts else "", []).append(rank)
    return ", ".join(f"{describe_ranks(some)}{doing}" for doing, some in groups.items())
