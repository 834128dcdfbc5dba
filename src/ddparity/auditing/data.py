"""Compare what the ranks load: DDP101 to DDP108. Pure functions of the records."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

from .catalogue import Finding, finding, listed
from .orders import check_orders, check_stream, check_stream_orders
from .randomness import check_loop, check_noise, check_randomness
from .records import Pass, Record, Run, Window

_MOST = 0.9  # of a data set, from which a rank is told to load all of it
_DROPPED_OF_A_PASS, _DROPPED_OF_ALL = 0.10, 0.05
_SAMPLER = (
    "Give the DataLoader sampler=DistributedSampler(dataset), without shuffle=True, and call "
    "sampler.set_epoch(epoch) before each epoch."
)
_JOIN = "Call dist.init_process_group() and wrap the model in DistributedDataParallel. "


def check_data(run: Run) -> Iterator[Finding]:
    """Find faults in what the ranks draw from their data sets."""
    seen: set[tuple[str, Any]] = set()
    for found, _ in _all(run):
        cause = (found.cause_file, found.cause_line)
        if (found.code, cause) not in seen:
            seen.add((found.code, cause))
            yield found


def _all(run: Run) -> Iterator[tuple[Finding, Any]]:
    blamed = set()
    for group in run.groups:
        for pair in run.pairs:
            chosen = [one for one in pair if one.rank in group]
            if len(chosen) < 2:
                continue
            for found in _check_pair(run, chosen):
                blamed.add((found.code, chosen[0].place))
                yield found, chosen[0].place
        same = {place for code, place in blamed if code == "DDP101"}
        for found, place in check_randomness(run, group):
            if place not in same:
                blamed.add((found.code, place))
                yield found, place
    explained = any(code in ("DDP101", "DDP111") for code, _ in blamed)
    if run.world > 1 and any(one.training for one in run.ranks[0].passes) and not explained:
        for found in itertools.islice(itertools.chain(check_noise(run), check_loop(run)), 1):
            yield found, found.line
    for found, place in itertools.chain(check_orders(run), check_stream_orders(run)):
        yield found, place
    if run.has_replicas and run.world > 1 and not any(rank.of("loader") for rank in run.ranks):
        # In a loop of ddparity a DDP runs the module inside of it, so there is no forward, and it reduces by itself.
        checked = _check_inputs(run) if run.uses("forward") else () if run.uses("ddp") else _check_computed(run)
        for found in checked:
            yield found, found.line


def _check_pair(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    if pair[0].loader["stream"]:
        yield from check_stream(run, pair)
        return
    ranks = [one.rank for one in pair]
    first = pair[0]
    site, cause = first.site, first.loader["site"]
    sampler = first.loader["sampler_site"] or cause
    sets = [set(one.indices) for one in pair]
    identical = all(one.indices == first.indices for one in pair) and bool(first.indices)
    content = compare_content(run, pair)
    subsets_differ = len({one.loader["subset_digest"] for one in pair}) > 1
    positions = [set(one.positions) for one in pair]
    shared = set.intersection(*positions)
    disjoint = len(shared) <= len(pair) * (first.loader["batch"] or 1) and len(shared) < min(map(len, positions)) / 2
    by_hand = all(one.complete and one.loader["sampler"].startswith("torch.utils.data.sampler") for one in pair)
    if subsets_differ and set.intersection(*sets) and not identical and by_hand and first.training:
        yield from _check_parts(run, pair, sets)
        return
    if subsets_differ and set.intersection(*sets) and not identical:
        yield finding(
            "DDP104",
            ranks,
            site,
            first.loader["subset_site"] or cause,
            f"The Subset has other indices on each rank, so samples that one rank leaves out are loaded by another: "
            f"{len(set.intersection(*sets))} of {len(set.union(*sets))} samples are loaded by all ranks, where the "
            f"sampler would share them out{_leak(run, pair)}.",
            "Split with the same generator on each rank: random_split(dataset, lengths, "
            "generator=torch.Generator().manual_seed(0)).",
        )
        return
    shares = all(one.complete or "Distributed" in one.loader["sampler"] for one in pair)
    if content == "differs" and ((disjoint and shares) or _takes_a_share(pair)) and not subsets_differ:
        lengths = [one.loader["base_length"] for one in pair]
        what = (
            f"The data set has {listed(lengths)} samples on ranks {listed(ranks)}"
            if len(set(lengths)) > 1
            else f"The data set's items are not the same on ranks {listed(ranks)}, at places {_differing(run, pair)}"
        )
        yield finding(
            "DDP104",
            ranks,
            site,
            cause,
            f"{what}, but the sampler shares out its places as if all ranks had one data set.",
            "Build the data set from the same source on each rank: seed what is drawn, sort what is listed, or load it "
            "on one rank and broadcast it.",
        )
        return
    if not first.training:
        return
    complete = all(one.complete for one in pair)
    draws_again = any(_repeats(one) for one in pair)
    size = _size(pair)
    most = all(own == sets[0] or len(own) >= _MOST * size for own in sets)
    everything = complete and most and not draws_again and len(set.intersection(*sets)) > size / 2
    if all(run.is_drawn(one) for one in pair) and not _has_same_batches(pair):  # places say nothing
        yield from _check_counts(run, pair)
        return
    if content != "differs" and (identical or everything) and not first.loader["repeats"]:
        if _is_sliced(run, pair):
            return
        rest = size - len(sets[0])
        also = f", and {rest} of {size} samples are loaded by no rank" if complete and rest > 0.05 * size else ""
        order = "in the same order" if identical else "each in its own order"
        yield finding(
            "DDP101",
            ranks,
            site,
            sampler,
            f"Ranks {listed(ranks)} load the same {len(sets[0])} samples {order}, such as "
            f"{listed(first.indices[:4])}{also}: the ranks repeat each other's work.",
            _JOIN + _SAMPLER
            if not run.uses("joined")
            else _SAMPLER
            if "Distributed" not in first.loader["sampler"]
            else "Give each rank's sampler its own rank.",
        )
        return
    total, union = sum(len(one.indices) for one in pair), set.union(*sets)
    duplicates, lost = total - len(union), size - len(union)
    if complete and content != "differs" and not draws_again and not subsets_differ and size:
        if duplicates > len(pair) and lost > 0:
            yield finding(
                "DDP102",
                ranks,
                site,
                sampler,
                f"{duplicates} of {total} samples of an epoch are loaded twice or more, and {lost} of the {size} in "
                f"the data set by no rank.",
                "Give the sampler of each rank the same seed and length, and its own rank.",
            )
        elif _draws_another_part(run, first):
            pass
        elif lost > _DROPPED_OF_A_PASS * size or (
            lost > _DROPPED_OF_ALL * size and size - len(_ever(run, first)) > _DROPPED_OF_ALL * size
        ):
            yield finding(
                "DDP106",
                ranks,
                site,
                sampler if first.loader["sampler_drops"] and not first.loader["drop_last"] else cause,
                f"An epoch leaves out {lost} of {size} samples ({lost / size:.0%}).",
                "Leave drop_last=True out, or take a smaller batch.",
            )
        elif duplicates > 0:
            yield finding(
                "DDP108",
                ranks,
                site,
                sampler,
                f"{duplicates} of {total} samples of an epoch are loaded twice, so that all ranks have equally many.",
                "Nothing, where a few samples with double weight do no harm; else drop_last=True in the sampler.",
            )
    yield from _check_counts(run, pair)


def _size(pair: list[Pass]) -> int:
    """Return how many samples the ranks share out: all of a data set, or those that a sampler has chosen alike."""
    size, chosen = pair[0].loader["length"] or 0, pair[0].loader["chosen"]
    alike = chosen is not None and all(one.loader["chosen"] == chosen for one in pair)
    return int(min(size, chosen[0]) if alike else size)


def _check_parts(run: Run, pair: list[Pass], sets: list[set[int]]) -> Iterator[Finding]:
    """DDP102 for ranks that cut their own parts out of one data set, where the parts overlap."""
    size, union = pair[0].loader["base_length"] or 0, set.union(*sets)
    both = sum(map(len, sets)) - len(union)
    if compare_content(run, pair) == "differs" or any(_repeats(one) for one in pair) or both <= 0.05 * len(union):
        return
    code = "DDP104" if _drawn(sets) else "DDP102"
    yield finding(
        code,
        [one.rank for one in pair],
        pair[0].site,
        pair[0].loader["subset_site"] or pair[0].loader["site"],
        f"The ranks' subsets overlap: {both} of {len(union)} samples are loaded by two ranks or more, and "
        f"{max(0, size - len(union))} of {size} by none.",
        "Cut parts that do not overlap: range(rank, len(dataset), world_size) of one order, or DistributedSampler.",
    )


def _has_same_batches(pair: list[Pass]) -> bool:
    """Return whether the ranks got the same batches, as far as those are known."""
    known = list(zip(*(one.digests for one in pair)))
    return bool(known) and all(digest == row[0] for row in known for digest in row)


def _drawn(sets: list[set[int]]) -> bool:
    """Return whether the subsets look drawn at random, not cut: their indices have gaps in no regular order."""
    steps = {b - a for own in sets for a, b in itertools.pairwise(sorted(own))}
    return len(steps) > 2


def _takes_a_share(pair: list[Pass]) -> bool:
    """Return whether a sampler of the user's gives each rank one of world_size parts, not all, of a data set."""
    for one in pair:
        size = one.loader["length"] or 0
        own = len(set(one.positions)) * len(pair)
        if not one.complete or one.loader["sampler"].startswith("torch.") or not 0.8 * size <= own <= 1.2 * size:
            return False
    return True


def _is_sliced(run: Run, pair: list[Pass]) -> bool:
    """Return whether each rank gives its model, or loss, fewer samples than it loads: it takes its part of a batch."""
    for one in pair:
        events = run.ranks[_at(run, one.rank)].records[one.begin : one.end]
        sizes = [e["n"] for e in events if e["k"] == "forward" and e["grad"] and e["n"] is not None]
        sizes = sizes or [int(e["units"]) for e in events if e["k"] == "backward" and e["units"] is not None]
        if not sizes or max(sizes) * 2 > len(one.positions) / max(1, one.batches) + 1:
            return False
    return True


def _repeats(one: Pass) -> bool:
    """Return whether a rank draws a sample twice before its last batch, which may have padding, or is meant to."""
    if one.loader["repeats"]:
        return True
    kept = one.indices[: -max(1, len(one.indices) // max(1, one.batches))]
    return len(kept) > len(set(kept))


def _draws_another_part(run: Run, one: Pass) -> bool:
    """Return whether a sampler of the user's takes another part of a data set in each epoch."""
    if one.loader["sampler"].startswith("torch.") or one.loader["drop_last"]:
        return False
    return len(_ever(run, one)) > 1.2 * len(
        {i for pair in run.pairs for p in pair if p.key == one.key for i in p.indices}
    )


def _ever(run: Run, one: Pass) -> set[int]:
    return {i for pair in run.pairs for each in pair if each.place == one.place for i in each.indices}


def _leak(run: Run, pair: list[Pass]) -> str:
    """Say how many evaluated samples have been trained on, where a split differs between ranks."""
    kind = pair[0].loader["dataset"]
    evaluated: set[int] = set()
    trained: set[int] = set()
    for other in run.pairs:
        for one in other:
            if one.loader["dataset"] == kind and one.loader["subset"] is not None:
                (trained if one.training else evaluated).update(one.indices)
    both = evaluated & trained
    return f"; {len(both)} of {len(evaluated)} evaluated samples are trained on by some rank" if both else ""


def compare_content(run: Run, pair: list[Pass]) -> Literal["same", "differs", "unknown"]:
    """Say whether the ranks' data sets have the same items, by those that each rank has read again at its end."""
    if len({one.loader["base_length"] for one in pair}) > 1:
        return "differs"
    found = _items(run, pair)
    if any(one is None for one in found):
        return "unknown"
    stored = [one["stored"] for one in found if one is not None]
    samples = [set(one["samples"]) for one in found if one is not None]
    if set.intersection(*samples) or (stored[0] and all(one == stored[0] for one in stored)):
        return "same"  # an item may have noise of the rank's own
    places = [dict(zip(one["places"], one["digests"])) for one in found if one is not None]
    items = [[one[p] for one in places] for p in places[0] if all(one.get(p) is not None for one in places)]
    if not items:
        return "unknown"
    whole = all(row == item[0] for item in items for row in item)
    return "same" if whole or (not all(stored) and _same_part(items)) else "differs"


def _same_part(items: list[list[list[int | None]]]) -> bool:
    """Return whether a part of the items, such as the label, is the same on all ranks, and not always the same."""
    for k in range(min(len(row) for item in items for row in item)):
        part = [{row[k] for row in item} for item in items]
        if all(len(one) == 1 for one in part) and len(set.union(*part) - {None}) > 2:
            return True
    return False


def _items(run: Run, pair: list[Pass]) -> list[Record | None]:
    return [run.items(one) for one in pair]


def _at(run: Run, rank: int) -> int:
    return next(i for i, one in enumerate(run.ranks) if one.rank == rank)


def _differing(run: Run, pair: list[Pass]) -> str:
    places = [dict(zip(one["places"], one["digests"])) for one in _items(run, pair) if one is not None]
    return listed([p for p in places[0] if any(one.get(p) != places[0][p] for one in places)])


def _check_counts(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    """DDP105: a rank that has more batches waits in a reduction for the others, or trains alone."""
    if run.uses("join") or not run.uses("ddp") or run.ended_together(pair):
        return
    counts = [one.batches if one.complete and not one.loader["stream"] else one.given for one in pair]
    planned = [one.planned for one in pair]
    if all(one.complete or one.how == "exhausted" for one in pair):
        unequal = len(set(counts)) > 1
    elif any(one.how == "exhausted" for one in pair):  # the others may wait for it in a batch that it does not have
        fewest = min(one.given for one in pair if one.how == "exhausted")
        counts = [one.given if one.how == "exhausted" else max(one.given, one.batches) for one in pair]
        unequal = max(counts) > fewest and all(one.how in ("exhausted", None) for one in pair)
    else:
        unequal = None not in planned and len(set(planned)) > 1 and all(one.how != "left" for one in pair)
        counts = [count or 0 for count in planned] if unequal else counts
    if unequal and not any(one.how == "left" for one in pair):
        ranks = [one.rank for one in pair]
        handled = any(one.how == "cut" and one.handled for one in pair)
        yield finding(
            "DDP105",
            ranks,
            pair[0].site,
            pair[0].loader["site"],
            f"Ranks {listed(ranks)} have {listed(counts)} batches in an epoch: the rank with more of them waits in its "
            f"backward for gradients that no other rank sends{', unless it begins again' if handled else ''}.",
            "Give all ranks equally many batches (DistributedSampler pads or drops), or train inside "
            "`with Join([model]):`.",
            certainty="likely" if handled else "proved",
        )


def _check_inputs(run: Run) -> Iterator[Finding]:
    """DDP101 for a script without a DataLoader, by the inputs of its model."""
    rows = [[one for one in rank.of("forward") if one["grad"] and one["train"]] for rank in run.ranks]
    inputs = [[one["x"] for one in row if one["x"] is not None] for row in rows]
    shortest = min(map(len, inputs))
    if shortest >= 2 and all(len({row[i] for row in inputs}) == 1 for i in range(shortest)):
        yield finding(
            "DDP101",
            [rank.rank for rank in run.ranks],
            rows[0][0]["site"],
            rows[0][0]["site"],
            f"The model gets the same inputs on all ranks, in each of {shortest} forwards.",
            "Give each rank its own samples: take every world_size-th, or seed the draw with seed + rank.",
        )


def _check_computed(run: Run) -> Iterator[Finding]:
    """DDP101 for a script with neither a DataLoader nor DDP, by the gradients that the ranks compute."""
    for optimizer in run.ranks[0].optimizers:
        steps = list(zip(*(rank.windows(optimizer["id"]) for rank in run.ranks)))
        rows = [[_computed(window) for window in step] for step in steps]
        known = [row for row in rows if None not in row]
        if len(known) >= 2 and all(one == row[0] for row in known for one in row):
            yield finding(
                "DDP101",
                [rank.rank for rank in run.ranks],
                steps[0][0].step["site"],
                steps[0][0].backwards[-1]["site"] if steps[0][0].backwards else None,
                f"All ranks compute the same gradients, bit for bit, in each of {len(known)} steps: they train on the "
                f"same samples.",
                "Give each rank its own samples: take every world_size-th, or seed the draw with seed + rank.",
            )
            return


def _computed(window: Window) -> list[Any] | None:
    """Return checksums of what a rank computed itself: its gradients before a reduction by hand, or at the step.

    Where messages may reduce them, their norm after the backward.
    """
    by_hand = [one.get("digest") for one in window.of("collective") if one.get("gradient")]
    if by_hand:
        return by_hand
    if window.of("collective"):
        return None
    if window.of("message"):
        norm = window.backwards[-1]["norm"] if window.backwards else None
        return None if norm is None else [norm]
    grads: list[Any] | None = window.step.get("grads")
    return grads if grads and any(one is not None for one in grads) else None
