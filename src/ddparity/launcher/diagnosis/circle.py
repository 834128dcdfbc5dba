"""Find ranks that wait for each other: a pure function of what each rank waits in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .desync import Finding, RankState
from .flight import AGREEMENT, Operation


def find_circle(states: Mapping[int, RankState], ranks_of: Callable[[str], Sequence[int]]) -> Finding | None:
    """Return the ranks of which each waits for another one of them; None if there are none.

    It is a hang if the main thread of each of them really waits, and no other thread can call what is awaited; the
    records alone do not show that.
    """
    waits = {rank: found for rank, state in states.items() if (found := _waits(state))}
    awaited = {
        rank: frozenset.intersection(*(_missing(states, rank, one, ranks_of(one.group)) for one in operations))
        for rank, operations in waits.items()
    }
    circle = set(awaited)
    while True:
        needed = frozenset[int]().union(*(awaited[rank] for rank in circle))
        inside = {rank for rank in circle & needed if awaited[rank] & circle}
        if inside == circle:
            break
        circle = inside
    if not circle:
        return None
    operations = {rank: waits[rank][0] for rank in sorted(circle)}
    first = operations[min(circle)]
    return Finding(
        "circle",
        first.group,
        (),
        tuple(sorted(circle)),
        first.sequence,
        operations,
        {rank: tuple(sorted(awaited[rank] & circle)) for rank in sorted(circle)},
    )


def _waits(state: RankState) -> list[Operation]:
    """Return what the main thread of a rank may wait in: an agreement that it says, or else all pending collectives."""
    if state.silent or state.exitcode is not None:
        return []
    pending = [one for one in state.operations if one.pending and not one.point_to_point]
    agreements = [one for one in pending if one.main]
    return agreements[-1:] or [one for one in pending if one.backend != AGREEMENT]


def _missing(states: Mapping[int, RankState], rank: int, operation: Operation, ranks: Sequence[int]) -> frozenset[int]:
    """Return the ranks that have certainly not called an operation which this rank waits in."""
    return frozenset(other for other in ranks if other != rank and _lacks(states[other], operation))


def _lacks(state: RankState, operation: Operation) -> bool:
    last = state.last(operation.group)
    if last is not None:
        return last.sequence < operation.sequence
    return operation.backend == AGREEMENT or state.complete
