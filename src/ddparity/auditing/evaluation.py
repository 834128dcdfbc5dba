"""Look at evaluations: DDP401 to DDP405. What depends on what a script does with its metrics is only likely."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

from .catalogue import Finding, finding
from .gradients import divides_by_world
from .records import Pass, Record, Run


def check_evaluation(run: Run) -> Iterator[Finding]:
    """Find evaluations that count samples twice, or take a part for the whole."""
    if run.world < 2 or not run.uses("step"):
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
    counted = _counted(reductions, lengths)
    by_object = any("object" in e["name"] for e in reductions[0])  # results by sample, such as a dict of predictions
    if total > union and counted is not None and not by_object:
        yield finding(
            "DDP401",
            ranks,
            counted["site"],
            cause,
            f"The evaluation counts {total} samples where the data set has {union}: the sampler's padding repeats "
            f"{total - union} of them.",
            "Share the samples out without padding (ddparity's ShardSampler or predict), or leave the padding out of "
            "the sums.",
        )
    gathers = [e for e in reductions[0] if "gather" in e["name"]]
    padded = _gathered(reductions, lengths) if total > union and counted is None and not by_object else None
    if padded is not None and not _trims(padded["site"]) and not _trims(site):
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
        if floats and len(floats) == len(gathers) and _compares_by_order(floats[0]["site"]):
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
    if not any(reductions) and any(e["k"] == "line" for events in windows for e in events):
        lines = [e for events in windows for e in events if e["k"] == "line"]
        yield finding(
            "DDP402",
            ranks,
            lines[0]["site"],
            cause,
            f"Each rank evaluates its own {lengths[0]} of {union} samples, and nothing is reduced or gathered before a "
            f"line is printed.",
            "Sum the counts over the ranks with all_reduce, and divide then.",
            certainty="likely",
        )
    scalars = [e for e in reductions[0] if e["name"] in ("all_reduce", "reduce") and len(e.get("values") or []) == 1]
    means = [e for e in scalars if e["op"] == "AVG" or divides_by_world(e["site"], 6)]
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


def _counted(reductions: list[list[Record]], lengths: list[int]) -> Record | None:
    """Return the reduction to which each rank gives its number of samples."""
    for calls in zip(*reductions):
        rows = [one.get("values") or [] for one in calls]
        if len({len(row) for row in rows}) == 1 and any(
            all(row[i] == length for row, length in zip(rows, lengths)) for i in range(len(rows[0]))
        ):
            found: Record = calls[0]
            return found
    return None


def _gathered(reductions: list[list[Record]], lengths: list[int]) -> Record | None:
    """Return a gather by which each rank gives a row for each of its samples, over the whole evaluation."""
    rows = [[e for e in calls if "gather" in e["name"] and (e.get("shape") or [0])[0]] for calls in reductions]
    for site in {e["site"] for e in rows[0]}:
        own = [[e["shape"][0] for e in calls if e["site"] == site] for calls in rows]
        counts = [sum(shapes) for shapes in own]
        if all(length and count and count % length == 0 for count, length in zip(counts, lengths)):
            return next(e for e in rows[0] if e["site"] == site)
    return None


def _trims(site: str | None) -> bool:
    """Return whether a file cuts a sequence to a length, `outputs[: len(data)]`, or Accelerate does."""
    for node in ast.walk(_parsed(site)):
        if isinstance(node, ast.Attribute) and node.attr == "gather_for_metrics":
            return True
        cut = node.slice if isinstance(node, ast.Subscript) else None
        if (
            isinstance(cut, ast.Slice)
            and cut.lower is None
            and isinstance(cut.upper, (ast.Call, ast.Name, ast.Attribute, ast.BinOp))
        ):
            return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("unique", "scatter_", "index_copy_")
        ):
            return True
    return False


def _compares_by_order(site: str | None) -> bool:
    """Return whether a file reads a data set's labels as a whole, and has no line that may restore the order."""
    reads = False
    for node in ast.walk(_parsed(site)):
        if isinstance(node, ast.Attribute):
            if node.attr in (
                "stack",
                "T",
                "mT",
                "t",
                "transpose",
                "permute",
                "scatter_",
                "index_copy_",
            ):
                return False
            of_itself = isinstance(node.value, ast.Name) and node.value.id == "self"
            reads = reads or (node.attr in ("tensors", "targets", "labels", "target", "y") and not of_itself)
        elif (
            isinstance(node, ast.Slice)
            and node.step is not None
            and not isinstance(node.step, (ast.Constant, ast.UnaryOp))
        ):
            reads_shard = isinstance(node.lower, (ast.Name, ast.Attribute, ast.Call))
            if reads_shard:
                return False
    return reads


def _parsed(site: str | None) -> ast.Module:
    try:
        return ast.parse(Path(str(site).rpartition(":")[0]).read_text())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _strided(one: Pass) -> bool:
    steps = {b - a for a, b in itertools.pairwise(one.positions)}
    return len(one.positions) > 2 and steps != {1}
