"""Compare the orders of epochs (DDP103, DDP107) and the batches of iterable data sets (DDP101, DDP105, DDP109)."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from .catalogue import Finding, finding, listed
from .records import Pass, Run


def check_orders(run: Run) -> Iterator[tuple[Finding, Any]]:
    """DDP103 and DDP107: the order of one epoch against that of the next."""
    orders: dict[Any, list[list[Pass]]] = defaultdict(list)
    for pair in run.pairs:
        first = pair[0]
        drawn = any(map(run.is_drawn, pair))
        if first.training and not drawn and not first.loader["stream"] and all(one.batches > 1 for one in pair):
            key = (*first.training_of, first.loader["subset_digest"], first.loader["length"])
            orders[key].append(pair)
    for passes in orders.values():
        begin = passes[0]
        ranks = [one.rank for one in begin]
        rows = [one.indices for one in begin]
        rising = all(row == sorted(row) for row in (_unpadded(one) for one in begin))
        if rising and all(len(set(row)) > 2 for row in rows):
            yield (
                finding(
                    "DDP107",
                    ranks,
                    begin[0].site,
                    begin[0].loader["site"],
                    f"The samples come in the order of the data set, {listed(rows[0][:4])}, … on rank {ranks[0]}.",
                    "Shuffle in the sampler, unless the order is meant.",
                ),
                begin[0].place,
            )
            continue
        pairs = list(itertools.pairwise(passes))
        if begin[0].endless:  # the workers of an endless loader load ahead, before set_epoch: one order may come twice
            pairs = pairs[1:] if all(_repeats_order(run, a[0], b[0]) for a, b in pairs if b[0].complete) else []
        for earlier, later in pairs:
            if all(_repeats_order(run, a, b) and not _is_other_data(run, a, b) for a, b in zip(earlier, later)):
                many = len(passes)
                reshuffles = begin[0].epoch is not None or begin[0].loader["sampler"].startswith("torch.")
                yield (
                    finding(
                        "DDP103",
                        ranks,
                        begin[0].site,
                        begin[0].loader["site"],
                        f"Epochs load the same samples in the same order, {listed(rows[0][:4])}, … on rank {ranks[0]} "
                        f"({many} epochs seen): the shuffle is that of the first epoch, and so is each rank's share.",
                        "Call sampler.set_epoch(epoch) before each epoch, on the sampler that the loader draws from.",
                        certainty="proved"
                        if reshuffles
                        else "likely",  # a sampler of the user's may have a fixed order
                    ),
                    begin[0].place,
                )
                break


def _repeats_order(run: Run, earlier: Pass, later: Pass) -> bool:
    """Return whether a pass has the order of a whole one before it. A hang or crash may have ended the later one."""
    if not earlier.complete:
        return False
    if later.complete:
        return earlier.indices == later.indices
    known = len(later.indices)
    return run.exit_code != 0 and known >= 8 and later.batches > 2 and earlier.indices[:known] == later.indices


def _is_other_data(run: Run, earlier: Pass, later: Pass) -> bool:
    """Return whether two passes are over data sets that were made one after the other, and give other batches.

    The batches of one that is only made again may differ by an augmentation, but not what it keeps.
    """
    if earlier.loader["key"] == later.loader["key"] or earlier.digests == later.digests:
        return False
    stored = [(run.items(one) or {}).get("stored") for one in (earlier, later)]
    return not stored[0] or stored[0] != stored[1]


def _unpadded(one: Pass) -> list[int]:
    """Return a pass's indices without the padding at its end."""
    indices = one.indices
    while len(indices) > 1 and indices[-1] < indices[-2]:
        indices = indices[:-1]
    return indices if len(indices) >= len(one.indices) - (one.loader["batch"] or 1) else one.indices


def check_stream(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    first, ranks = pair[0], [one.rank for one in pair]
    if not first.training:
        return
    shortest = min(len(one.digests) for one in pair)
    same = [len({one.digests[i] for one in pair}) == 1 for i in range(shortest)]
    if shortest >= 2 and all(same):
        yield finding(
            "DDP101",
            ranks,
            first.site,
            first.loader["site"],
            f"Ranks {listed(ranks)} get the same {shortest} first batches from the stream.",
            "In the data set's __iter__, give each rank its own part: "
            "itertools.islice(stream, rank, None, world_size).",
        )
    workers = first.workers
    distinct = Counter(first.digests)
    if workers > 1 and len(first.digests) >= 2 * workers and all(n % workers == 0 for n in distinct.values()):
        yield finding(
            "DDP109",
            ranks,
            first.site,
            first.loader["site"],
            f"Each batch of the stream comes {workers} times: each of the {workers} workers reads all of it.",
            "In the data set's __iter__, share the stream out by torch.utils.data.get_worker_info().",
        )
    reduced = run.uses("ddp") and not run.uses("join")
    ended = [one.given for one in pair if one.how == "exhausted"]
    waits = [one.given for one in pair if one.how is None]
    reduced = reduced and not run.ended_together(pair)
    more = len(set(ended)) > 1 if len(ended) == len(pair) else bool(ended and waits) and max(waits) > min(ended)
    if reduced and more and all(one.how in ("exhausted", None) for one in pair):
        yield finding(
            "DDP105",
            ranks,
            first.site,
            first.loader["site"],
            f"Ranks {listed(ranks)} have {listed([one.given for one in pair])} batches in an epoch of the stream.",
            "Share the stream out so that each rank has equally many batches, or train inside `with Join([model]):`.",
        )


def check_stream_orders(run: Run) -> Iterator[tuple[Finding, Any]]:
    """DDP103 and DDP107 for streams: the batches of one epoch against those of the next."""
    orders: dict[Any, list[list[Pass]]] = defaultdict(list)
    for pair in run.pairs:
        if pair[0].training and pair[0].loader["stream"] and all(len(one.digests) > 2 for one in pair):
            orders[pair[0].training_of].append(pair)
    for passes in orders.values():
        first = passes[0][0]
        for earlier, later in itertools.pairwise(passes):
            shortest = min(len(one.digests) for one in (*earlier, *later))
            if any(a.digests[:shortest] != b.digests[:shortest] for a, b in zip(earlier, later)):
                continue
            told = (
                f"Epochs get the same {shortest} first batches from the stream, in the same order, on "
                f"{'each rank' if run.world > 1 else 'the rank'}"
            )
            where = [one.rank for one in earlier], first.site, first.loader["site"]
            if first.loader.get("shuffles"):
                yield (
                    finding(
                        "DDP103",
                        *where,
                        f"{told}, although its data set has {first.loader['shuffles']}.",
                        "Let the order depend on the epoch: call set_epoch(epoch) before each epoch, or seed with "
                        "seed + epoch. Persistent workers do not see a change of the data set: pass the epoch on.",
                        certainty="proved" if "epoch" in first.loader["shuffles"] else "likely",
                    ),
                    first.place,
                )
            else:
                yield (
                    finding("DDP107", *where, f"{told}.", "Shuffle in the stream, unless the order is meant."),
                    first.place,
                )
            break
