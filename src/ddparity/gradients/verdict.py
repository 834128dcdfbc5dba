"""Which rank computes wrong numbers, by what several ranks got for the same micro-batches. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Votes = Mapping[int, Mapping[int, int]]  # by micro-batch, named by its rank, what each rank got for it: a digest


@dataclass(frozen=True)
class Verdict:
    """The ranks that may be wrong: one, if it is known. None: the computation does not repeat itself.

    `micro_batch`, `wrong`, `right`: an example: a micro-batch, by its rank; a rank that got other bits for it; and a
    rank that is right, or has another opinion. `agreeing`: how many ranks agree with that one.
    """

    ranks: list[int]
    micro_batch: int = 0
    wrong: int = 0
    right: int = 0
    agreeing: int = 0


def verdict(votes: Votes, unstable: set[int]) -> Verdict:
    """Decide which rank is wrong.

    Args:
        votes: some differ. Each rank has run several micro-batches, and each was run by up to three ranks.
        unstable: the ranks that got other bits when they ran a micro-batch again.

    A rank is wrong if it alone is in the minority wherever a majority differs from somebody, and no other rank is
    unstable. Of two ranks the unstable one is wrong. If several ranks are unstable, the computation does not repeat
    itself.

    Example:
        >>> verdict({0: {0: 7, 1: 7, 2: 7}, 1: {1: 8, 2: 8, 0: 5}, 2: {2: 9, 0: 6, 1: 9}}, set()).ranks
        [0]
    """
    outvoted: list[Verdict] = []
    tied: list[Verdict] = []
    for micro_batch, of in votes.items():
        values = list(of.values())
        if len(set(values)) == 1:
            continue
        value = max(values, key=values.count)
        agree, differ = [rank for rank in of if of[rank] == value], [rank for rank in of if of[rank] != value]
        if len(agree) > len(differ):
            outvoted += [Verdict([rank], micro_batch, rank, agree[0], len(agree)) for rank in differ]
        else:
            tied.append(Verdict(sorted(of), micro_batch, differ[0], agree[0]))
    suspects = {rank for one in outvoted for rank in one.ranks}
    if len(suspects) == 1 and not tied and unstable <= suspects:
        return outvoted[0]
    if len(unstable) > 1 or not (outvoted or tied):
        return Verdict([])
    if not outvoted:
        for one in tied:
            if unstable and unstable <= set(one.ranks):
                (wrong,) = unstable
                return Verdict([wrong], one.micro_batch, wrong, next(rank for rank in one.ranks if rank != wrong))
    example = (tied or outvoted)[0]
    everybody = unstable.union(*(one.ranks for one in (*outvoted, *tied)))
    return Verdict(sorted(everybody), example.micro_batch, example.wrong, example.right)
