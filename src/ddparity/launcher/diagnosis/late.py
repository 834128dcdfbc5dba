"""Tell what ranks do that have not ended some time after a signal: save, or wait for ranks that are gone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .desync import describe_ranks
from .stacks import SLOW_ACTIVITIES, Frame, Stack, ask_by_signal, is_users, read_stacks, works


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


def only_waits(stack: Stack, libraries: bool = False) -> bool:
    """Return whether the main thread waits in a collective, or at its end for other threads, and no other one works.

    It does not wait in a handler that has interrupted a collective, or in a save. `libraries`: a thread that runs code
    of a library alone works, too.
    """
    inner = tuple(itertools.takewhile(lambda frame: not is_users(frame), stack.frames))
    waits = bool(inner) and (replace(stack, frames=inner).in_collective() or any(map(_joins, inner)))
    return waits and stack.activity() not in SLOW_ACTIVITIES and not any(works(one, libraries) for one in stack.others)


def _joins(frame: Frame) -> bool:
    """Return whether Python waits here for the threads of a script that has ended."""
    return frame.file.endswith("threading.py") and frame.function.rpartition(".")[2] == "_shutdown"


def describe_doing(ranks: Mapping[int, object], stacks: Mapping[int, Stack]) -> str:
    """Return the ranks with what each does, like "rank 0 (saving or loading a checkpoint, train.py:40, in save)"."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        stack = stacks.get(rank, Stack())
        parts = [part for part in (stack.activity(), str(stack.user_frame() or "")) if part]
        groups.setdefault(f" ({', '.join(parts)})" if parts else "", []).append(rank)
    return ", ".join(f"{describe_ranks(some)}{doing}" for doing, some in groups.items())
