"""Compare the files and the collectives of the ranks: DDP501 to DDP505."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator

from .catalogue import Finding, finding
from .precedence import Meetings, meetings, precedes
from .records import Rank, Record, Run

_MOST_WRITES = 40  # of a file, which are compared


def check_files(run: Run) -> Iterator[Finding]:
    """Find files that several ranks write, and reads that no collective orders after the write."""
    by_path: dict[str, list[tuple[int, Record]]] = defaultdict(list)
    for rank in run.ranks:
        for one in rank.of("file"):
            by_path[one["path"]].append((rank.rank, one))
    told: set[tuple[str, str]] = set()
    shared = meetings(run)
    for path, uses in by_path.items():
        writers = {rank: one for rank, one in uses if one["how"] == "write"}
        writes = [(rank, one) for rank, one in uses if one["how"] == "write"][:_MOST_WRITES]
        first = next(
            (
                one
                for (rank, one), (other, two) in itertools.combinations(writes, 2)
                if rank != other and not _is_ordered(shared, rank, one, other, two)
            ),
            None,
        )
        if first is not None:
            if ("DDP501", first["site"]) in told:
                continue
            told.add(("DDP501", first["site"]))
            yield finding(
                "DDP501",
                sorted(writers),
                first["site"],
                None,
                f"Ranks {', '.join(map(str, sorted(writers)))} write {_short(path)}: what is left may be mixed or "
                f"broken.",
                "Write on rank 0 alone (`if dist.get_rank() == 0:`), or give each rank a name of its own.",
            )
            continue
        for writer, write in [(rank, one) for rank, one in uses if one["how"] == "write"]:
            for reader, read in uses:
                if reader == writer or read["how"] != "read" or ("DDP502", read["site"]) in told:
                    continue
                if not _is_ordered(shared, writer, write, reader, read):
                    told.add(("DDP502", read["site"]))
                    yield finding(
                        "DDP502",
                        sorted({writer, reader}),
                        read["site"],
                        write["site"],
                        f"Rank {reader} reads {_short(path)}, which rank {writer} writes, with no collective in "
                        f"between: the file may be missing, old or half written.",
                        "Call dist.barrier() on all ranks between the write and the read.",
                    )


def _is_ordered(shared: Meetings, writer: int, write: Record, reader: int, read: Record) -> bool:
    """Return whether a lock or a collective orders a write and a read of two ranks."""
    locked = write["locks"] and read["locks"]
    return bool(
        locked or precedes(shared, writer, write, reader, read) or precedes(shared, reader, read, writer, write)
    )


def _short(path: str) -> str:
    return path.rpartition("/")[2]


def check_collectives(run: Run) -> Iterator[Finding]:
    """DDP503: the first place where the ranks call different collectives. DDP505: a group that is not destroyed."""
    ranks = [rank.rank for rank in run.ranks]
    if run.world > 1:
        found = list(_check_buffers(run))
        yield from found or _check_sequences(run)
    ended = [rank for rank in run.ranks if rank.of("ended") and not rank.of("enough")]  # by themselves
    left = [rank.rank for rank in ended if rank.of("joined") and not rank.of("left")]
    if left and len(left) == len(ranks) and run.exit_code == 0:
        site = run.ranks[0].of("joined")[0]["site"]
        yield finding(
            "DDP505",
            left,
            site,
            None,
            "The script ends without dist.destroy_process_group(): a rank may end while another still waits.",
            "Call dist.destroy_process_group() at the end.",
        )


def _check_buffers(run: Run) -> Iterator[Finding]:
    """DDP503 for a wrapped model with buffers that some ranks call more often: a forward may broadcast them."""
    if run.uses("join"):
        return
    for group in run.groups:
        ranks = [rank for rank in run.ranks if rank.rank in group]
        for ddp in ranks[0].of("ddp"):
            found = _extra_broadcast(ranks, ddp["id"])
            if found is not None:
                site, n, (most, many), (fewest, few) = found
                yield finding(
                    "DDP503",
                    group,
                    site,
                    ddp["site"],
                    f"Before step {n} rank {most} calls the wrapped model {many} times, and rank {fewest} {few} times. "
                    f"Its forward broadcasts buffers, which meets another collective on the other ranks.",
                    "Call the wrapped model on all ranks, or model.module on one.",
                )
                return


def _extra_broadcast(ranks: list[Rank], number: int) -> tuple[str | None, int, tuple[int, int], tuple[int, int]] | None:
    """Return the line of a forward that one rank calls more often than another, and how often each calls."""
    rows = [_broadcasts(rank, number) for rank in ranks]
    last = min(map(len, rows)) - 1
    for n in range(last + 1):
        counts = [row[n] for row in rows]
        totals = [one.total() for one in counts]
        most, fewest = totals.index(max(totals)), totals.index(min(totals))
        extra = list(counts[most] - counts[fewest])
        if n == last:  # a crash or a hang may have ended it: only lines that the other rank never calls
            extra = [site for site in extra if not any(row[site] for row in rows[fewest])]
        if extra:
            return extra[0], n, (ranks[most].rank, totals[most]), (ranks[fewest].rank, totals[fewest])
    return None


def _broadcasts(rank: Rank, number: int) -> list[Counter[str | None]]:
    """Return the lines of forwards that broadcast a model's buffers, counted for each step."""
    found: list[Counter[str | None]] = [Counter()]
    for one in rank.records:
        if one["k"] == "step":
            found.append(Counter())
        elif one["k"] == "forward" and one["ddp"] == number and one.get("buffers"):
            found[-1][one["site"]] += 1
    return found


def _check_sequences(run: Run) -> Iterator[Finding]:
    """Compare the calls of each group's collectives on its ranks: the first difference is the cause of others."""
    world = tuple(range(run.world))
    groups = {tuple(one["group"] or world) for rank in run.ranks for one in rank.of("collective")}
    for group in sorted(groups, key=len, reverse=True):
        ranks = [rank for rank in run.ranks if rank.rank in group]
        rows = [[one for one in rank.of("collective") if tuple(one["group"] or world) == group] for rank in ranks]
        found = next(_check_calls(run, [rank.rank for rank in ranks], rows), None) if len(ranks) > 1 else None
        if found is not None:
            yield found
            return


def _check_calls(run: Run, numbers: list[int], rows: list[list[Record]]) -> Iterator[Finding]:
    for n, calls in enumerate(zip(*rows)):
        names = [one["name"] for one in calls]
        shapes = [(one.get("shape"), one.get("dtype")) for one in calls]
        sized = names[0] in ("all_reduce", "broadcast", "reduce")
        if len(set(names)) > 1 or (sized and any(shape != shapes[0] for shape in shapes)):
            what = [
                f"rank {rank} calls {one['name']}{_tensor(one)} in line {str(one['site']).rpartition(':')[2]}"
                for rank, one in zip(numbers, calls)
            ]
            yield finding(
                "DDP503",
                numbers,
                calls[0]["site"],
                calls[-1]["site"],
                f"As collective {n + 1} {', '.join(what)}.",
                "Call the same collectives in the same order, with tensors of the same shape, on all ranks.",
            )
            return
    counts = [len(row) for row in rows]
    if len(set(counts)) > 1 and (run.exit_code == 0 or _waits(run, rows)):
        most = max(range(len(rows)), key=lambda i: counts[i])
        extra = rows[most][min(counts)]
        missing = [numbers[i] for i in range(len(rows)) if counts[i] == min(counts)]
        if run.failed & {*missing}:
            return  # an exception of its own kept it from the call
        yield finding(
            "DDP503",
            numbers,
            extra["site"],
            None,
            f"Rank {numbers[most]} calls {extra['name']} in line {str(extra['site']).rpartition(':')[2]}, which rank "
            f"{', '.join(map(str, missing))} never calls{_in_backward(run, missing[0])}.",
            "Call each collective on all ranks, outside of `if rank == 0:`.",
        )


def _in_backward(run: Run, number: int) -> str:
    """Say where a rank is in a backward that never ended."""
    rank = next(one for one in run.ranks if one.rank == number)
    begun, ended = rank.of("begin_backward"), rank.of("backward")
    if len(begun) <= len(ended):
        return ""
    return f": it is in the backward of line {str(begun[-1]['site']).rpartition(':')[2]}"


def _waits(run: Run, rows: list[list[Record]]) -> bool:
    """Return whether a rank's last collective never ended while another rank's script came to its end."""
    done = [rank.of("ended") for rank in run.ranks]
    most = max(range(len(rows)), key=lambda i: len(rows[i]))
    return run.exit_code == 124 or (not done[most] and any(done))


def _tensor(one: Record) -> str:
    return f" of {one['shape']} {one['dtype'].removeprefix('torch.')}" if one.get("shape") is not None else ""
