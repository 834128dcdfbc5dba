"""Compare what the ranks load: DDP101 to DDP113. Pure functions of the records."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Literal

from .catalogue import Finding, finding
from .records import Pass, Record, Run, Window

_MOST = 0.9  # of a data set, from which a rank is told to load all of it
_DROPPED_OF_A_PASS, _DROPPED_OF_ALL = 0.10, 0.05
_SAMPLER = (
    "Give the DataLoader sampler=DistributedSampler(dataset), without shuffle=True, and call "
    "sampler.set_epoch(epoch) before each epoch."
)
_JOIN = "Call dist.init_process_group() and wrap the model in DistributedDataParallel. "
_STREAMS = ("torch", "NumPy", "Python's random")


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
                blamed.add((found.code, _place(chosen[0])))
                yield found, _place(chosen[0])
        same = {place for code, place in blamed if code == "DDP101"}
        for found, place in _check_streams(run, group):
            if place not in same:
                yield found, place
    if run.world > 1 and any(one.training for one in run.ranks[0].passes) and not any(c == "DDP101" for c, _ in blamed):
        for found in _check_noise(run):
            yield found, found.line
    for found, place in itertools.chain(_check_epochs(run), _check_stream_epochs(run)):
        yield found, place
    if run.world > 1 and not any(rank.of("loader") for rank in run.ranks):
        for found in _check_inputs(run) if run.uses("forward") else _check_computed(run):
            yield found, found.line


def _place(one: Pass) -> Any:
    return one.loader["site"], one.loader["dataset"], one.training


def _check_pair(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    if pair[0].loader["stream"]:
        yield from _check_stream(run, pair)
        return
    ranks = [one.rank for one in pair]
    first = pair[0]
    site, cause = first.site, first.loader["site"]
    sets = [set(one.indices) for one in pair]
    identical = all(one.indices == first.indices for one in pair) and bool(first.indices)
    content = _content(run, pair)
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
            f"The data set has {_list(lengths)} samples on ranks {_list(ranks)}"
            if len(set(lengths)) > 1
            else f"The data set's items are not the same on ranks {_list(ranks)}, at places {_differing(run, pair)}"
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
    size = first.loader["length"] or 0
    most = all(own == sets[0] or len(own) >= _MOST * size for own in sets)
    everything = complete and most and not draws_again and len(set.intersection(*sets)) > size / 2
    if content != "differs" and (identical or everything):
        if _is_sliced(run, pair):
            return
        rest = size - len(sets[0])
        also = f", and {rest} of {size} samples are loaded by no rank" if complete and rest > 0.05 * size else ""
        order = "in the same order" if identical else "each in its own order"
        yield finding(
            "DDP101",
            ranks,
            site,
            cause,
            f"Ranks {_list(ranks)} load the same {len(sets[0])} samples {order}, such as "
            f"{_list(first.indices[:4])}{also}: the ranks repeat each other's work.",
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
                cause,
                f"{duplicates} of {total} samples of an epoch are loaded twice or more, and {lost} of the {size} in "
                f"the data set by no rank.",
                "Give the sampler of each rank the same seed and length, and its own rank.",
            )
        elif lost > _DROPPED_OF_A_PASS * size or (
            lost > _DROPPED_OF_ALL * size and size - len(_ever(run, first)) > _DROPPED_OF_ALL * size
        ):
            yield finding(
                "DDP106",
                ranks,
                site,
                cause,
                f"An epoch leaves out {lost} of {size} samples ({lost / size:.0%}).",
                "Leave drop_last=True out, or take a smaller batch.",
            )
        elif duplicates > 0:
            yield finding(
                "DDP108",
                ranks,
                site,
                cause,
                f"{duplicates} of {total} samples of an epoch are loaded twice, so that all ranks have equally many.",
                "Nothing, where a few samples with double weight do no harm; else drop_last=True in the sampler.",
            )
    yield from _check_counts(run, pair)


def _check_parts(run: Run, pair: list[Pass], sets: list[set[int]]) -> Iterator[Finding]:
    """DDP102 for ranks that cut their own parts out of one data set, where the parts overlap."""
    size, union = pair[0].loader["base_length"] or 0, set.union(*sets)
    both = sum(map(len, sets)) - len(union)
    if _content(run, pair) == "differs" or any(_repeats(one) for one in pair) or both <= 0.05 * len(union):
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
    """Return whether a rank draws a sample twice before its last batch, which may have padding."""
    kept = one.indices[: -max(1, len(one.indices) // max(1, one.batches))]
    return len(kept) > len(set(kept))


def _ever(run: Run, one: Pass) -> set[int]:
    return {i for pair in run.pairs for each in pair if _place(each) == _place(one) for i in each.indices}


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


def _content(run: Run, pair: list[Pass]) -> Literal["same", "differs", "unknown"]:
    """Say whether the ranks' data sets have the same items, by those that each rank has read again at its end."""
    if len({one.loader["base_length"] for one in pair}) > 1:
        return "differs"
    found = _items(run, pair)
    if any(one is None for one in found):
        return "unknown"
    places = [dict(zip(one["places"], one["digests"])) for one in found if one is not None]
    equal = [len({one[p] for one in places}) == 1 for p in places[0] if all(one.get(p) is not None for one in places)]
    return "unknown" if not equal else "same" if all(equal) else "differs"


def _items(run: Run, pair: list[Pass]) -> list[Record | None]:
    return [
        next((r for r in run.ranks[_at(run, one.rank)].of("items") if r["key"] == one.loader["key"]), None)
        for one in pair
    ]


def _at(run: Run, rank: int) -> int:
    return next(i for i, one in enumerate(run.ranks) if one.rank == rank)


def _differing(run: Run, pair: list[Pass]) -> str:
    places = [dict(zip(one["places"], one["digests"])) for one in _items(run, pair) if one is not None]
    return _list([p for p in places[0] if len({one.get(p) for one in places}) > 1])


def _check_counts(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    """DDP105: a rank that has more batches waits in a reduction for the others, or trains alone."""
    if run.uses("join") or not run.uses("ddp"):
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
        yield finding(
            "DDP105",
            ranks,
            pair[0].site,
            pair[0].loader["site"],
            f"Ranks {_list(ranks)} have {_list(counts)} batches in an epoch: the rank with more of them waits in its "
            f"backward for gradients that no other rank sends.",
            "Give all ranks equally many batches (DistributedSampler pads or drops), or train inside "
            "`with Join([model]):`.",
        )


def _check_stream(run: Run, pair: list[Pass]) -> Iterator[Finding]:
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
            f"Ranks {_list(ranks)} get the same {shortest} first batches from the stream.",
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
    more = len(set(ended)) > 1 if len(ended) == len(pair) else bool(ended and waits) and max(waits) > min(ended)
    if reduced and more and all(one.how in ("exhausted", None) for one in pair):
        yield finding(
            "DDP105",
            ranks,
            first.site,
            first.loader["site"],
            f"Ranks {_list(ranks)} have {_list([one.given for one in pair])} batches in an epoch of the stream.",
            "Share the stream out so that each rank has equally many batches, or train inside `with Join([model]):`.",
        )


def _check_stream_epochs(run: Run) -> Iterator[tuple[Finding, Any]]:
    """DDP103 and DDP107 for streams: the batches of one epoch against those of the next."""
    orders: dict[Any, list[list[Pass]]] = defaultdict(list)
    for pair in run.pairs:
        if pair[0].training and pair[0].loader["stream"] and all(len(one.digests) > 2 for one in pair):
            orders[_place(pair[0])].append(pair)
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
                    _place(first),
                )
            else:
                yield (
                    finding("DDP107", *where, f"{told}.", "Shuffle in the stream, unless the order is meant."),
                    _place(first),
                )
            break


def _check_epochs(run: Run) -> Iterator[tuple[Finding, Any]]:
    """DDP103 and DDP107: the order of one epoch against that of the next."""
    orders: dict[Any, list[list[Pass]]] = defaultdict(list)
    for pair in run.pairs:
        first = pair[0]
        if first.training and not first.loader["stream"] and all(one.batches > 1 for one in pair):
            key = (*_place(first), first.loader["subset_digest"], first.loader["length"])
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
                    f"The samples come in the order of the data set, {_list(rows[0][:4])}, … on rank {ranks[0]}.",
                    "Shuffle in the sampler, unless the order is meant.",
                ),
                _place(begin[0]),
            )
            continue
        pairs = list(itertools.pairwise(passes))
        if begin[0].endless:  # the workers of an endless loader load ahead, before set_epoch: one order may come twice
            pairs = pairs[1:] if all(_repeats_order(run, a[0], b[0]) for a, b in pairs if b[0].complete) else []
        for earlier, later in pairs:
            if all(_repeats_order(run, a, b) for a, b in zip(earlier, later)):
                many = len(passes)
                reshuffles = begin[0].epoch is not None or begin[0].loader["sampler"].startswith("torch.")
                yield (
                    finding(
                        "DDP103",
                        ranks,
                        begin[0].site,
                        begin[0].loader["site"],
                        f"Epochs load the same samples in the same order, {_list(rows[0][:4])}, … on rank {ranks[0]} "
                        f"({many} epochs seen): the shuffle is that of the first epoch, and so is each rank's share.",
                        "Call sampler.set_epoch(epoch) before each epoch, on the sampler that the loader draws from.",
                        certainty="proved"
                        if reshuffles
                        else "likely",  # a sampler of the user's may have a fixed order
                    ),
                    _place(begin[0]),
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


def _unpadded(one: Pass) -> list[int]:
    """Return a pass's indices without the padding at its end."""
    indices = one.indices
    while len(indices) > 1 and indices[-1] < indices[-2]:
        indices = indices[:-1]
    return indices if len(indices) >= len(one.indices) - (one.loader["batch"] or 1) else one.indices


def _check_streams(run: Run, group: list[int]) -> Iterator[tuple[Finding, Any]]:
    """DDP111, DDP112 and DDP113: the random streams that the data draws from."""
    states = {rank.rank: _states(rank) for rank in run.ranks}
    for pair in run.pairs:
        chosen = [one for one in pair if one.rank in group]
        if not chosen or not chosen[0].training:
            continue
        ranks, first = [one.rank for one in chosen], chosen[0]
        found = [states[one.rank].get((one.loader["id"], one.number), {}) for one in chosen]
        common = [place for place in found[0] if all(place in one for one in found)]
        for stream, name in enumerate(_STREAMS):
            drew = [p for p in common if all(one[p]["drew"][stream] and not one[p]["reseeded"] for one in found)]
            equal = [p for p in drew if len({one[p]["before"][stream] for one in found}) == 1]
            if len(chosen) > 1 and drew and len(equal) == len(drew):
                in_workers = equal[0][0] is not None
                yield (
                    finding(
                        "DDP112" if in_workers else "DDP111",
                        ranks,
                        first.site,
                        first.loader["site"],
                        f"The random stream of {name} is in the same state on ranks {_list(ranks)} before each of "
                        f"{len(equal)} batches{' in the workers' if in_workers else ''}: the ranks augment their "
                        f"samples with the same random numbers.",
                        "Seed with seed + rank after the model is made"
                        + (
                            ", or give the DataLoader generator=torch.Generator().manual_seed(seed + rank)."
                            if in_workers
                            else "."
                        ),
                    ),
                    _place(first),
                )
                break
    for rank in run.ranks:
        by_place: dict[Any, list[Pass]] = defaultdict(list)
        for one in rank.passes:
            if one.training:
                by_place[_place(one)].append(one)
        for passes in by_place.values():
            for earlier, later in itertools.pairwise(passes):
                before, after = (states[rank.rank].get((p.loader["id"], p.number), {}) for p in (earlier, later))
                for stream, name in enumerate(_STREAMS):
                    places = [
                        p
                        for p in before.keys() & after.keys()
                        if p[1] == 0
                        and all(one[p]["drew"][stream] and not one[p]["reseeded"] for one in (before, after))
                    ]
                    if places and all(before[p]["before"][stream] == after[p]["before"][stream] for p in places):
                        yield (
                            finding(
                                "DDP113",
                                [rank.rank],
                                earlier.site,
                                earlier.loader["site"],
                                f"The random stream of {name} begins two epochs in the same state on rank "
                                f"{rank.rank}: the data is augmented with the same random numbers in each epoch.",
                                "Leave the seed in worker_init_fn or at the epoch's start out, or make it depend on "
                                "the epoch.",
                            ),
                            _place(earlier),
                        )


def _states(rank: Any) -> dict[tuple[int, int], dict[Any, Record]]:
    """Return, for each pass of a rank, its records of fetches by worker and number."""
    by_number = {begin["it"]: (begin["loader"], begin["n"]) for begin in rank.of("iter")}
    owners = {one["id"]: one["own"] for one in rank.of("loader")}
    by_base: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)  # loaders may have one seed
    for one in rank.of("seed"):
        if one["it"] in by_number:
            by_base[one["base"]][owners.get(by_number[one["it"]][0], 0)] = by_number[one["it"]]
    found: dict[tuple[int, int], dict[Any, Record]] = defaultdict(dict)
    for one in rank.fetches:
        seeded = by_base.get(one["base"], {})
        place = (
            by_number.get(one["it"])
            if one["worker"] is None
            else seeded.get(one["own"], next(iter(seeded.values()), None))
        )
        if place is not None:
            found[place].setdefault((one["worker"], one["n"]), one)
    return found


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


def _check_noise(run: Run) -> Iterator[Finding]:
    """DDP111 for a model that gets random numbers, as a generator does, and not the loaders' samples."""
    for number in {one["id"] for one in run.ranks[0].of("ddp")}:
        rows = [
            [one for one in rank.of("forward") if one["ddp"] == number and one["train"] and one["x"] is not None]
            for rank in run.ranks
        ]
        steps = [[row[i]["x"] for row in rows] for i in range(min(map(len, rows)))]
        if len({step[0] for step in steps}) >= 2 and all(one == step[0] for step in steps for one in step):
            yield finding(
                "DDP111",
                [rank.rank for rank in run.ranks],
                rows[0][0]["site"],
                next(one["site"] for one in run.ranks[0].of("ddp") if one["id"] == number),
                f"The model gets the same inputs on all ranks in each of {len(steps)} forwards, although the ranks "
                f"load other samples: what it gets is drawn from equal random streams.",
                "Seed with seed + rank after the models are made.",
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
    """Return checksums of what a rank computed itself: its gradients before a reduction by hand, or at the step."""
    by_hand = [one.get("digest") for one in window.of("collective") if one.get("gradient")]
    if by_hand:
        return by_hand
    if window.of("collective"):
        return None
    grads: list[Any] | None = window.step.get("grads")
    return grads if grads and any(one is not None for one in grads) else None


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
