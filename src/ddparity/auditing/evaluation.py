"""Look at evaluations: DDP401 to DDP405. What depends on what a script does with its metrics is only likely."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .catalogue import Finding, finding
from .data import compare_content
from .records import Pass, Record, Run
from .source import compares_by_order, divides_by_length, divides_by_world, is_unrelated, trims

_MOST_PARTS = 12  # of a metric, by numbers that are reduced one after the other


def check_evaluation(run: Run) -> Iterator[Finding]:
    """Find evaluations that count samples twice, or take a part for the whole."""
    if run.world < 2 or not run.has_replicas or not run.uses("step"):
        return
    told: set[tuple[str, str | None]] = set()
    yield from _check_alone(run)
    for pair in run.pairs:
        first = pair[0]
        if first.training or first.loader["stream"] or not all(one.complete for one in pair):
            continue
        if not all(one.indices for one in pair):
            continue
        if len({one.loader["subset_digest"] for one in pair}) > 1 and set.intersection(*(set(p.indices) for p in pair)):
            continue  # other splits on each rank are told by DDP104
        for found in _check(run, pair):
            place = (found.code, first.loader["site"])
            if place not in told and not (found.code == "DDP402" and ("DDP401", first.loader["site"]) in told):
                told.add(place)
                yield found


def _check_alone(run: Run) -> Iterator[Finding]:
    """DDP402 where one rank evaluates, and its sampler gives it a share."""
    shared = {one.key for pair in run.pairs for one in pair}
    for rank in run.ranks:
        for one in rank.passes:
            size = one.loader["length"] or 0
            share = (
                one.complete
                and "Distributed" in one.loader["sampler"]
                and len(set(one.positions)) * run.world < 1.5 * size
            )
            elsewhere = any(other.key == one.key for each in run.ranks if each is not rank for other in each.passes)
            if not one.training and share and one.key not in shared and not elsewhere:
                yield finding(
                    "DDP402",
                    [rank.rank],
                    one.site,
                    one.loader["site"],
                    f"Rank {rank.rank} alone evaluates, but its sampler gives it {len(set(one.positions))} of {size} "
                    f"samples.",
                    "Evaluate on all ranks and sum over them, or give rank 0 a loader of the whole data set.",
                )
                return


def _check(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    first, ranks = pair[0], [one.rank for one in pair]
    site, cause = first.site, first.loader["site"]
    sets = [set(one.indices) for one in pair]
    if all(own == sets[0] for own in sets):
        if _is_rest(run, pair) or compare_content(run, pair) == "differs":  # each rank may have cut its own part
            return
        yield finding(
            "DDP404",
            ranks,
            site,
            cause,
            f"All ranks evaluate the same {len(sets[0])} samples.",
            "Share the samples out without padding (ddparity's ShardSampler or predict), or evaluate on rank 0.",
        )
        return
    total, union = sum(len(one.indices) for one in pair), len(set.union(*sets))
    windows = [_after(run, one) for one in pair]
    reductions = [[e for e in events if e["k"] == "collective"] for events in windows]
    lengths = [len(one.indices) for one in pair]
    counted = _counted(reductions, lengths) or _counted(reductions, lengths, "numbers")
    by_object = any("object" in e["name"] for e in reductions[0])  # results by sample, such as a dict of predictions
    by_number = counted is not None and "numbers" in counted
    if total > union and counted is not None and (by_number or not by_object):
        yield finding(
            "DDP401",
            ranks,
            counted["site"],
            cause,
            f"The evaluation counts {total} samples where the data set has {union}: the sampler's padding repeats "
            f"{total - union} of them.",
            "Share the samples out without padding (ddparity's ShardSampler or predict), or leave the padding out of "
            "the sums.",
            certainty="likely" if by_number else "proved",
        )
    gathers = [e for e in reductions[0] if "gather" in e["name"]]
    padded = _gathered(reductions, lengths) if total > union and counted is None and not by_object else None
    if padded is not None and not trims(padded["site"]) and not trims(site):
        yield finding(
            "DDP401",
            ranks,
            padded["site"],
            cause,
            f"The ranks gather the outputs of {total} samples where the data set has {union}, and no line of the file "
            f"cuts the {total - union} that the sampler repeats.",
            "Share the samples out without padding (ddparity's ShardSampler or predict), or leave the padding out: "
            "Accelerate's gather_for_metrics does.",
            certainty="likely",
        )
    if gathers and all("object" not in e["name"] for e in gathers) and _strided(first):
        floats = [e for e in gathers if "float" in e.get("dtype", "") and (e.get("shape") or [0])[0] > 1]
        if floats and len(floats) == len(gathers) and compares_by_order(floats[0]["site"]):
            yield finding(
                "DDP403",
                ranks,
                floats[0]["site"],
                cause,
                "Outputs of all ranks are joined in rank order, and nothing else is gathered, but the sampler gives "
                "each rank every world_size-th sample: the joined outputs are not in the order of the data set.",
                "Gather the labels or the indices in the same way, or use a contiguous sampler.",
                certainty="likely",
            )
    combining = [e for calls in reductions for e in calls if _combines(e) and not is_unrelated(site, e["site"])]
    by_files = _exchanges_files(windows)
    sent = any(e["k"] == "message" for events in windows for e in events)
    lines = [e for events in windows for e in events if e["k"] == "line" and _may_have_number(e["text"])]
    lines = [e for e in lines if not is_unrelated(site, e["site"])]
    if not combining and not by_files and not sent and lines:
        yield finding(
            "DDP402",
            ranks,
            lines[0]["site"],
            cause,
            f"Each rank evaluates its own {lengths[0]} of {union} samples, and nothing of it is reduced or gathered "
            f"before a line is printed.",
            "Sum the counts over the ranks with all_reduce, and divide then.",
            certainty="likely",
        )
    scalars = [e for e in reductions[0] if e["name"] in ("all_reduce", "reduce") and len(e.get("values") or []) == 1]
    means = [e for e in scalars if e["op"] == "AVG" or divides_by_world(e["site"], 6)]
    inside = sum(e["at"] <= first.end for e in means)
    by_batch = inside >= first.batches > 0 and inside % first.batches == 0
    after = [e for e in means if e["at"] > first.end and not is_unrelated(site, e["site"])]
    if total > union and (by_batch or after) and counted is None and not by_object and not trims(site):
        yield finding(
            "DDP401",
            ranks,
            (means if by_batch else after)[0]["site"],
            cause,
            f"The ranks average a number{' of each batch' if by_batch else ''} over {total} samples where the data set "
            f"has {union}: the sampler's padding repeats {total - union} of them.",
            "Share the samples out without padding (ddparity's ShardSampler or predict), and reduce sums and counts.",
            certainty="likely",
        )
    elif total > union and counted is None and not by_object and not trims(site):
        summed = [e for e in _summed(reductions, union) if not is_unrelated(site, e["site"])]
        over = [e for e in summed if divides_by_length(site, e["site"]) and not trims(e["site"])]
        in_parts = _counted_in_parts(reductions, lengths)
        if in_parts is not None and not over and not is_unrelated(site, in_parts["site"]):
            yield finding(
                "DDP401",
                ranks,
                in_parts["site"],
                cause,
                f"Two of the numbers that the ranks add up make {total} together, such as those of right and wrong "
                f"samples, where the data set has {union}: the sampler's padding repeats {total - union} of them.",
                "Share the samples out without padding (ddparity's ShardSampler or predict), or leave the padding out "
                "of the sums.",
                certainty="likely",
            )
        if over:
            yield finding(
                "DDP401",
                ranks,
                over[0]["site"],
                cause,
                f"The ranks add up over {total} samples, and divide by the length of a data set, here {union}: "
                f"the sampler's padding repeats {total - union} of them.",
                "Share the samples out without padding (ddparity's ShardSampler or predict), and divide by a count "
                "that is added up in the same way.",
                certainty="likely",
            )
    if len(set(lengths)) > 1 and means and counted is None:
        yield finding(
            "DDP405",
            ranks,
            means[0]["site"],
            cause,
            f"The ranks evaluate {', '.join(map(str, lengths))} samples and reduce one number each, but no count: a "
            f"mean of their means gives the samples unequal weights.",
            "Reduce the sum and the count, and divide then.",
            certainty="likely",
        )


def _after(run: Run, one: Pass) -> list[Record]:
    """Return what a rank does from the begin of an evaluation to the next backward or the next pass."""
    rank = next(rank for rank in run.ranks if rank.rank == one.rank)
    found = []
    for record in rank.records[one.begin + 1 :]:
        if record["k"] == "backward" or (record["k"] == "iter" and record["at"] > one.end):
            break
        found.append(record)
    return found


def _may_have_number(text: str) -> bool:
    """Return whether a line shows a number, as far as it is known: a log's line is known before it is filled in."""
    return not text or any(c.isdigit() or c in "%{" for c in text)


def _is_rest(run: Run, pair: list[Pass]) -> bool:
    """Return whether all ranks evaluate only the samples that a shared evaluation of the data set leaves over."""
    rest = set(pair[0].indices)
    for other in run.pairs:
        first = other[0]
        same = first.loader["key"] == pair[0].loader["key"] and not first.training and first is not pair[0]
        if same and not set(first.indices) & rest and len({tuple(one.indices) for one in other}) > 1:
            return True
    return False


def _exchanges_files(windows: list[list[Record]]) -> bool:
    """Return whether a rank reads what another has written since its evaluation began."""
    written = [{e["path"] for e in events if e["k"] == "file" and e["how"] != "read"} for events in windows]
    read = [{e["path"] for e in events if e["k"] == "file" and e["how"] == "read"} for events in windows]
    return any(read[i] & written[j] for i in range(len(windows)) for j in range(len(windows)) if i != j)


def _combines(collective: Record) -> bool:
    """Return whether a collective may bring the ranks' results together."""
    return any(part in collective["name"] for part in ("reduce", "gather", "all_to_all"))


def _counted(reductions: list[list[Record]], lengths: list[int], what: str = "values") -> Record | None:
    """Return the reduction to which each rank gives its number of samples, or the gather of objects that have it."""
    for calls in zip(*reductions):
        rows = [one.get(what) or [] for one in calls]
        if len({len(row) for row in rows}) == 1 and any(
            all(row[i] == length for row, length in zip(rows, lengths)) for i in range(len(rows[0]))
        ):
            found: Record = calls[0]
            return found
    return None


def _counted_in_parts(reductions: list[list[Record]], lengths: list[int]) -> Record | None:
    """Return a reduction of one line, two of whose numbers make up each rank's samples: hits and misses of a metric."""
    rows = [[e for e in calls if e.get("values") and _combines(e)] for calls in reductions]
    for site in dict.fromkeys(e["site"] for e in rows[0]):
        calls = [[e for e in row if e["site"] == site] for row in rows]
        if len({len(own) for own in calls}) > 1 or len(calls[0]) > _MOST_PARTS:
            continue
        sums = [[sum(e["values"]) for e in own] for own in calls]
        for i, j in itertools.combinations(range(len(calls[0])), 2):
            if all(own[i] + own[j] == length for own, length in zip(sums, lengths)):
                return calls[0][i]
    return None


def _summed(reductions: list[list[Record]], union: int) -> list[Record]:
    """Return what the ranks sum, or gather, of a few values; nothing where the sum of one is the samples' number."""
    found = []
    for calls in zip(*reductions):
        rows = [one.get("values") or [] for one in calls]
        if not rows[0] or len({len(row) for row in rows}) > 1:
            continue
        if any(sum(column) == union for column in zip(*rows)):
            return []  # they count each sample once
        adds = calls[0]["name"] in ("all_reduce", "reduce") and calls[0]["op"] in ("SUM", None)
        if adds or "gather" in calls[0]["name"]:
            found.append(calls[0])
    return found


def _gathered(reductions: list[list[Record]], lengths: list[int]) -> Record | None:
    """Return a gather by which each rank gives a row for each of its samples, over the whole evaluation."""
    rows = [[e for e in calls if "gather" in e["name"] and (e.get("shape") or [0])[0]] for calls in reductions]
    for site in dict.fromkeys(e["site"] for e in rows[0]):
        own = [[e["shape"][0] for e in calls if e["site"] == site] for calls in rows]
        counts = [sum(shapes) for shapes in own]
        if all(length and count and count % length == 0 for count, length in zip(counts, lengths)):
            return next(e for e in rows[0] if e["site"] == site)
    return None


def _strided(one: Pass) -> bool:
    steps = {b - a for a, b in itertools.pairwise(one.positions)}
    return len(one.positions) > 2 and steps != {1}
