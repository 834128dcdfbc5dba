"""Compare the random streams that the data and the training loop draw from: DDP111 to DDP113."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .catalogue import Finding, finding, listed
from .records import Pass, Record, Run

_STREAMS = ("torch", "NumPy", "Python's random")


def check_randomness(run: Run, group: list[int]) -> Iterator[tuple[Finding, Any]]:
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
                        f"The random stream of {name} is in the same state on ranks {listed(ranks)} before each of "
                        f"{len(equal)} batches{' in the workers' if in_workers else ''}: the ranks augment their "
                        f"samples with the same random numbers.",
                        "Seed with seed + rank after the model is made"
                        + (
                            ", or give the DataLoader generator=torch.Generator().manual_seed(seed + rank)."
                            if in_workers
                            else "."
                        ),
                    ),
                    first.place,
                )
                break
    for rank in run.ranks:
        by_training: dict[Any, list[Pass]] = defaultdict(list)
        for one in rank.passes:
            if one.training:
                by_training[one.training_of].append(one)
        for passes in by_training.values():
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
                            earlier.place,
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


def check_noise(run: Run) -> Iterator[Finding]:
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


def check_loop(run: Run) -> Iterator[Finding]:
    """DDP111, a note, for random numbers that the training loop draws between forwards, such as noise and mixing."""
    rows = [[one for one in rank.of("forward") if one["grad"] and "rng" in one] for rank in run.ranks]
    steps = [[row[i] for row in rows] for i in range(min(map(len, rows)))]
    begins = [one["at"] for one in run.ranks[0].of("iter")]  # a loader draws its seed when a pass begins
    moved = sum(
        a[0]["rng"] != b[0]["rng"] and not any(a[0]["at"] < at < b[0]["at"] for at in begins)
        for a, b in itertools.pairwise(steps)
    )
    dropped = any("dropout" in one for row in rows for one in row)
    if moved >= 3 and not dropped and all(len({one["rng"] for one in step}) == 1 for step in steps):
        yield finding(
            "DDP111",
            [rank.rank for rank in run.ranks],
            rows[0][0]["site"],
            None,
            f"The random stream of torch is in the same state on all ranks before each of {len(steps)} forwards, and "
            f"numbers are drawn in between: what the training loop draws is the same on all ranks.",
            "Seed with seed + rank after the models are made.",
            severity="note",
        )
