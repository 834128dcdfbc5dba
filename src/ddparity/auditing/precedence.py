"""Tell which events of two ranks are ordered: by collectives, by messages, or by other ranks in between."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .records import Record, Run

Meetings = dict[Any, dict[int, Record]]


def meetings(run: Run) -> Meetings:
    """Return what ranks do together: for each collective, and each backward, its record by rank.

    A backward counts, since DDP reduces in it. Messages between two ranks have the rank in their key: they are alone.
    """
    found: Meetings = defaultdict(dict)
    for rank in run.ranks:
        groups = {one["n"]: tuple(one["group"] or ()) for one in rank.of("collective")}
        counts: dict[Any, int] = defaultdict(int)
        for one in rank.records:
            if one["k"] not in ("completed", "backward", "joined", "ddp", "group", "message"):
                continue
            ranks = tuple(one["ranks"]) if one["k"] == "ddp" else groups.get(one.get("n"), ())
            key = (one["k"], ranks, rank.rank if one["k"] == "message" else None)
            counts[key] += 1
            found[*key, counts[key]][rank.rank] = one
    return found


def precedes(shared: Meetings, first: int, before: Record, second: int, after: Record) -> bool:
    """Return whether a record of the rank `first` is known on the rank `second` before another one there."""
    since = {first: before["at"]}
    messages = [(key[2], one) for key, rows in shared.items() if key[0] == "message" for one in rows.values()]
    growing = True
    while growing:
        growing = False
        for key, rows in shared.items():
            if key[0] == "message" or not any(rank in since and one["at"] > since[rank] for rank, one in rows.items()):
                continue
            for rank, one in rows.items():
                if one["at"] < since.get(rank, one["at"] + 1):
                    since[rank], growing = one["at"], True
        sent = min((one["t"] for rank, one in messages if rank in since and one["at"] > since[rank]), default=None)
        for rank, one in messages if sent is not None else ():
            if one["t"] >= sent and one["at"] < since.get(rank, one["at"] + 1):
                since[rank], growing = one["at"], True
    return second in since and since[second] < after["at"]
