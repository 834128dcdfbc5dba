"""Look at evaluations: DDP401 to DDP405. What depends on what a script does with its metrics is only likely."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .catalogue import Certainty, Finding, finding
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


@dataclass(frozen=True)
class _Evaluation:
    """A pass of all ranks over one data set, and what each does from its begin to the next training or pass."""

    run: Run
    pair: list[Pass]

    @property
    def site(self) -> str | None:
        return self.pair[0].site

    @cached_property
    def lengths(self) -> list[int]:
        """The samples of each rank, with those that a sampler repeats."""
        return [len(one.indices) for one in self.pair]

    @cached_property
    def total(self) -> int:
        return sum(self.lengths)

    @cached_property
    def union(self) -> int:
        """The samples that some rank evaluates."""
        return len(set().union(*(one.indices for one in self.pair)))

    @cached_property
    def events(self) -> list[list[Record]]:
        return [_after(self.run, one) for one in self.pair]

    @cached_property
    def calls(self) -> list[list[Record]]:
        """The collectives of each rank."""
        return [[e for e in events if e["k"] == "collective"] for events in self.events]

    @cached_property
    def counted(self) -> Record | None:
        """The collective by which each rank gives the number of its samples."""
        return _counted(self.calls, self.lengths) or _counted(self.calls, self.lengths, "numbers")

    @cached_property
    def by_object(self) -> bool:
        """Whether results may go by sample, such as a dict of predictions."""
        return any("object" in e["name"] for e in self.calls[0])

    @cached_property
    def means(self) -> list[Record]:
        """The reductions that make a mean over the ranks of one number."""
        scalars = [
            e for e in self.calls[0] if e["name"] in ("all_reduce", "reduce") and len(e.get("values") or []) == 1
        ]
        return [e for e in scalars if e["op"] == "AVG" or divides_by_world(e["site"], 6)]

    def finding(self, code: str, site: str | None, message: str, fix: str, certainty: Certainty = "likely") -> Finding:
        ranks = [one.rank for one in self.pair]
        return finding(code, ranks, site, self.pair[0].loader["site"], message, fix, certainty)


def _check(run: Run, pair: list[Pass]) -> Iterator[Finding]:
    it = _Evaluation(run, pair)
    sets = [set(one.indices) for one in pair]
    if all(own == sets[0] for own in sets):
        if _is_rest(run, pair) or compare_content(run, pair) == "differs":  # each rank may have cut its own part
            return
        yield it.finding(
            "DDP404",
            it.site,
            f"All ranks evaluate the same {len(sets[0])} samples.",
            "Share the samples out without padding (ddparity's ShardSampler or predict), or evaluate on rank 0.",
            "proved",
        )
        return
    if it.total > it.union:
        yield from _check_padding(it)
    yield from _check_order(it)
    yield from _check_share(it)
    if len(set(it.lengths)) > 1 and it.means and it.counted is None:
        yield it.finding(
            "DDP405",
            it.means[0]["site"],
            f"The ranks evaluate {', '.join(map(str, it.lengths))} samples and reduce one number each, but no count: a "
            f"mean of their means gives the samples unequal weights.",
            "Reduce the sum and the count, and divide then.",
        )


def _check_padding(it: _Evaluation) -> Iterator[Finding]:
    """DDP401, by the first way in which the samples that a sampler repeats get into the result."""
    for look in (_count_of_padding, _gather_of_padding, _mean_of_padding, _sum_of_padding):
        found = look(it)
        if found is not None:
            site, what, certainty = found
            yield it.finding(
                "DDP401",
                site,
                f"{what}: the sampler's padding repeats {it.total - it.union} of them.",
                "Share the samples out without padding (ddparity's ShardSampler or predict), or leave the padding out "
                "of what is summed or gathered, as Accelerate's gather_for_metrics does.",
                certainty,
            )
            return


_Padding = tuple[str | None, str, Certainty] | None


def _count_of_padding(it: _Evaluation) -> _Padding:
    by_number = it.counted is not None and "numbers" in it.counted
    if it.counted is None or (it.by_object and not by_number):
        return None
    if "gather" in it.counted["name"] and not by_number and (trims(it.counted["site"]) or trims(it.site)):
        return None  # the sizes of what is gathered next
    what = f"The evaluation counts {it.total} samples where the data set has {it.union}"
    return it.counted["site"], what, "likely" if by_number else "proved"


def _gather_of_padding(it: _Evaluation) -> _Padding:
    found = _gathered(it.calls, it.lengths) if it.counted is None else None
    if found is None or trims(found["site"]) or trims(it.site):
        return None
    what = (
        f"The ranks gather the outputs of {it.total} samples, and no line of the file cuts those that are too many, "
        f"where the data set has {it.union}"
    )
    return found["site"], what, "likely"


def _mean_of_padding(it: _Evaluation) -> _Padding:
    if it.counted is not None or it.by_object or trims(it.site):
        return None
    first = it.pair[0]
    inside = sum(e["at"] <= first.end for e in it.means)
    by_batch = inside >= first.batches > 0 and inside % first.batches == 0
    after = [e for e in it.means if e["at"] > first.end and not is_unrelated(it.site, e["site"])]
    if not by_batch and not after:
        return None
    of = " of each batch" if by_batch else ""
    what = f"The ranks average a number{of} over {it.total} samples where the data set has {it.union}"
    return (it.means if by_batch else after)[0]["site"], what, "likely"


def _sum_of_padding(it: _Evaluation) -> _Padding:
    if it.counted is not None or it.by_object or trims(it.site):
        return None
    summed = [e for e in _summed(it.calls, it.union) if not is_unrelated(it.site, e["site"])]
    over = [e for e in summed if divides_by_length(it.site, e["site"]) and not trims(e["site"])]
    if over:
        what = f"The ranks add up over {it.total} samples, and divide by the length of a data set, here {it.union}"
        return over[0]["site"], what, "likely"
    parts = _counted_in_parts(it.calls, it.lengths)
    if parts is None or is_unrelated(it.site, parts["site"]):
        return None
    what = (
        f"Two of the numbers that the ranks add up make {it.total} together, such as those of right and wrong samples, "
        f"where the data set has {it.union}"
    )
    return parts["site"], what, "likely"


def _check_order(it: _Evaluation) -> Iterator[Finding]:
    """DDP403: outputs that are joined by rank, and compared with labels in the data set's order."""
    gathers = [e for e in it.calls[0] if "gather" in e["name"]]
    floats = [e for e in gathers if "float" in e.get("dtype", "") and (e.get("shape") or [0])[0] > 1]
    whole = floats and floats[0]["at"] > it.pair[0].end  # not batch by batch
    if whole and len(floats) == len(gathers) and _strided(it.pair[0]) and compares_by_order(floats[0]["site"]):
        yield it.finding(
            "DDP403",
            floats[0]["site"],
            "Outputs of all ranks are joined in rank order, and nothing else is gathered, but the sampler gives each "
            "rank every world_size-th sample: the joined outputs are not in the order of the data set.",
            "Gather the labels or the indices in the same way, or use a contiguous sampler.",
        )


def _check_share(it: _Evaluation) -> Iterator[Finding]:
    """DDP402: a rank's share is evaluated and printed, and nothing brings the ranks' results together."""
    together = [e for calls in it.calls for e in calls if _combines(e) and not is_unrelated(it.site, e["site"])]
    sent = any(e["k"] == "message" for events in it.events for e in events)
    if together or sent or _exchanges_files(it.events):
        return
    lines = [e for events in it.events for e in events if e["k"] == "line" and _may_have_number(e["text"])]
    lines = [e for e in lines if not is_unrelated(it.site, e["site"])]
    if lines:
        yield it.finding(
            "DDP402",
            lines[0]["site"],
            f"Each rank evaluates its own {it.lengths[0]} of {it.union} samples, and nothing of it is reduced or "
            f"gathered before a line is printed.",
            "Sum the counts over the ranks with all_reduce, and divide then.",
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
    """Return a gather by which each rank gives a row for each of its samples, over the whole evaluation.

    None where something that is gathered may say which sample each row is of.
    """
    calls = [[e for e in own if "gather" in e["name"]] for own in reductions]
    if any(e.get("named") for own in calls for e in own):
        return None
    if any("object" in e["name"] and e.get("rows") is None for own in calls for e in own):
        return None
    rows = [[(e, e.get("rows") or (e.get("shape") or [0])[0]) for e in own] for own in calls]
    for site in dict.fromkeys(e["site"] for e, many in rows[0] if many):
        counts = [sum(many for e, many in own if e["site"] == site) for own in rows]
        if all(length and count and count % length == 0 for count, length in zip(counts, lengths)):
            return next(e for e, many in rows[0] if many and e["site"] == site)
    return None


def _strided(one: Pass) -> bool:
    steps = {b - a for a, b in itertools.pairwise(one.positions)}
    return len(one.positions) > 2 and steps != {1}
