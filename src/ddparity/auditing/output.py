"""Look at what the ranks print, and which bars and trackers they start: DDP601 to DDP603."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .catalogue import Finding, counted, finding
from .records import Run


def check_output(run: Run) -> Iterator[Finding]:
    """Find what all ranks print, or several ranks start."""
    if run.world < 2:
        return
    ranks = [rank.rank for rank in run.ranks]
    places: dict[str, list[set[int | None]]] = defaultdict(lambda: [set() for _ in run.ranks])
    texts: dict[str, str] = {}
    for i, rank in enumerate(run.ranks):
        for one in rank.of("line"):
            if one["site"] is not None:
                places[one["site"]][i].add(one["d"])
                texts.setdefault(one["site"], one["text"])
    repeated = [site for site, rows in places.items() if set.intersection(*rows) - {None}]
    if repeated:
        yield finding(
            "DDP601",
            ranks,
            repeated[0],
            None,
            f"All ranks print the same lines in {counted(len(repeated), 'place')}, such as {texts[repeated[0]]!r}.",
            "Print on rank 0 alone, or call ddparity.setup_logging().",
        )
    for code, kind, what, fix in (
        ("DDP602", "bar", "show a progress bar", "Give tqdm disable=rank != 0."),
        ("DDP603", "tracker", "start a tracker", "Start the tracker on rank 0 alone."),
    ):
        by_site: dict[str | None, list[int]] = defaultdict(list)
        for rank in run.ranks:
            for site in {one["site"] for one in rank.of(kind)}:
                by_site[site].append(rank.rank)
        for site, who in by_site.items():
            if len(who) > 1:
                yield finding(code, who, site, None, f"Ranks {', '.join(map(str, who))} {what} each.", fix)
                break
