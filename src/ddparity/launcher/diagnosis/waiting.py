"""Who waited for whom, from the polls of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from .desync import RankState, describe_ranks

_ENOUGH = 20  # polls, for shares to mean something
_SIGNIFICANT = 0.1


class Waits:
    """Counts, a poll at a time, the ranks that others waited for in a collective."""

    def __init__(self) -> None:
        self.polls = 0
        self.awaited: Counter[int] = Counter()
        self.waited: Counter[tuple[int, int]] = Counter()  # (for this rank, that rank)

    def count(self, states: Mapping[int, RankState], groups: Mapping[str, Sequence[int]]) -> None:
        """Add one poll: a rank is waited for where another waits in a collective that it has not issued yet."""
        if not groups:
            return
        self.polls += 1
        pairs = set()
        for group, ranks in groups.items():
            pending = {rank: one.sequence for rank in ranks if (one := states[rank].pending(group)) is not None}
            for rank in ranks:
                last = states[rank].last(group)
                reached = last.sequence if last is not None else 0
                pairs |= {(rank, other) for other, sequence in pending.items() if reached < sequence}
        self.awaited.update({rank for rank, _ in pairs})
        self.waited.update(pairs)

    def describe(self, always: bool = False) -> str:
        """A sentence for each rank that was waited for in a tenth of the polls or more."""
        lines = []
        for rank, count in self.awaited.most_common():
            share = count / max(1, self.polls)
            if always or (self.polls >= _ENOUGH and share >= _SIGNIFICANT):
                others = [other for (late, other) in self.waited if late == rank]
                lines.append(f"rank {rank} was waited for {share:.0%} of the time, by {describe_ranks(others)}")
        if not lines:
            return f"no rank was waited for (sampled, {self.polls} looks)" if always else ""
        return f"{'; '.join(lines)} (sampled, {self.polls} looks)"
