"""Read the records of a run: which process was which rank, its passes over loaders, its steps and their windows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_FIRST = 8  # steps by which ranks are told to be stages


@dataclass
class Pass:
    """One pass over a loader, on one rank. `indices`: what it drew, in the data set below all Subsets."""

    rank: int
    loader: Record
    number: int  # passes of this loader before
    site: str | None
    begin: int  # positions in the rank's records
    end: int
    planned: int | None
    epoch: int | None
    positions: list[int]
    batches: int
    given: int
    complete: bool
    how: str | None  # exhausted, cut, left; None: the process ended in it
    digests: list[int]
    training: bool
    base: int | None
    workers: int
    models: frozenset[tuple[str, int]] = frozenset()  # what the steps within it train
    endless: bool = False  # a part of a pass over a sampler that begins again by itself
    handled: bool = False  # what took its batches was no loop, and may begin another pass at its end

    @cached_property
    def indices(self) -> list[int]:
        mapped = self.loader.get("subset")
        if mapped is None:
            return self.positions
        return [mapped[i] for i in self.positions if 0 <= i < len(mapped)]

    @property
    def place(self) -> tuple[Any, ...]:
        """The loader's line, its data set, and whether it trains."""
        return self.loader["site"], self.loader["dataset"], self.training

    @property
    def training_of(self) -> tuple[Any, ...]:
        """The place and the models: passes that have both in common are epochs of one training."""
        return *self.place, self.models

    @property
    def key(self) -> tuple[Any, ...]:
        """What pairs this pass with that of another rank."""
        return (self.loader["site"], self.loader["dataset"], self.loader["ordinal"], self.number)


@dataclass
class Window:
    """What happened between two steps of an optimizer, in order."""

    events: list[Record]
    step: Record
    ddps: frozenset[int] = frozenset()  # the models whose parameters the optimizer has
    loops: frozenset[int] = frozenset()  # the lines of backwards that a window of the optimizer has several times

    def of(self, kind: str) -> list[Record]:
        return [one for one in self.events if one["k"] == kind]

    @cached_property
    def backwards(self) -> list[Record]:
        return self.of("backward")

    @cached_property
    def accumulated(self) -> list[Record]:
        """The micro-batches of this step: backwards called from the same lines as the last.

        If those are in no loop, also those without a reduction: a loop may have a line for the last micro-batch.
        """
        found, synchronised = [], True
        last = self.backwards[-1]["chain"] if self.backwards else None
        alone = last not in self.loops
        called: set[int] = set()
        repeats = [one for one in self.backwards if one["inside"]][:-1]  # of a closure, which are other tries
        stepped = max((one["at"] for one in self.of("step")), default=-1)  # another optimizer, which used those before
        for event in self.events:
            if event["k"] == "forward" and event["grad"]:
                synchronised = event["sync"]
                called.add(event["ddp"])
            elif event["k"] == "backward":
                others = bool(called and self.ddps) and not called & self.ddps and event is not self.backwards[-1]
                if (event["chain"] == last or (alone and not synchronised)) and not others:
                    found.append(event)
                called = set()
        found = [one for one in found if not any(one is repeat for repeat in repeats)]
        return [one for one in found if one["at"] > stepped] or found

    @cached_property
    def kept(self) -> list[Record]:
        """The micro-batches whose gradients no zero_grad() has thrown away, nor found that there are none."""
        own = self.step["opt"]
        zeros = [one["at"] for one in self.of("zero") if one["opt"] == own or (one["held"] and own in one["also"])]
        return [one for one in self.accumulated if one["at"] > max(zeros, default=-1)] or self.accumulated

    @cached_property
    def is_cut(self) -> bool:
        """Whether the audit ended the epoch inside of the step: a loop that loads ahead had a batch left."""
        cut = False
        for event in self.events:
            if event["k"] in ("end", "iter"):
                cut = event.get("how") == "cut"
            elif event["k"] == "backward" and cut:
                return True
        return False

    @property
    def gets_messages(self) -> bool:
        """Whether the rank sends something to another one, or gets it, before the first backward."""
        first = self.backwards[0]["at"] if self.backwards else -1
        return any(one["at"] < first and one.get("of", "store") != "store" for one in self.of("message"))

    def is_micro_batch(self, event: Record) -> bool:
        """Return whether an event is the backward of a micro-batch of this step."""
        return any(event is one for one in self.accumulated)

    def is_kept(self, event: Record) -> bool:
        return any(event is one for one in self.kept)


@dataclass
class Rank:
    """The records of the process of one rank, in order."""

    rank: int
    head: Record
    records: list[Record]
    fetches: list[Record] = field(default_factory=list)  # of its workers, too
    # Lines that made more optimizers on some rank than on another: which of them belong together is not known.
    unlike: frozenset[str | None] = frozenset()

    def of(self, kind: str) -> list[Record]:
        return self._kinds.get(kind, [])

    @cached_property
    def _kinds(self) -> dict[str, list[Record]]:
        found = defaultdict(list)
        for position, record in enumerate(self.records):
            record["at"] = position
            found[record["k"]].append(record)
        return dict(found)

    @cached_property
    def passes(self) -> list[Pass]:
        return list(_passes(self))

    @cached_property
    def optimizers(self) -> list[Record]:
        return [one for one in self.of("optimizer") if one["site"] not in self.unlike]

    def windows(self, optimizer: int) -> list[Window]:
        """The windows of an optimizer. A step that a GradScaler skips ends a window, too, which is left out.

        Under `join()` ranks make unequal numbers of steps, so only those of the first such context can be paired.
        """
        joins = self.of("join")
        last = joins[1]["at"] if len(joins) > 1 else len(self.records)
        own = frozenset(row[0] for row in self.parameters(optimizer)) - {0}
        found: list[Window] = []
        events: list[Record] = []
        made = next((one["at"] for one in self.optimizers if one["id"] == optimizer and not one["late"]), 0)
        for record in self.records[made:last]:
            if record["k"] == "step" and record["opt"] == optimizer:
                found.append(Window(events, record, own))
                events = []
            elif record["k"] == "scaler_step" and record["opt"] == optimizer:
                events = []
            else:
                events.append(record)
        chains = [Counter(one["chain"] for one in window.backwards) for window in found]
        loops = frozenset(chain for counts in chains for chain, count in counts.items() if count > 1)
        return [replace(window, loops=loops) for window in found]

    def models(self, optimizer: int) -> frozenset[tuple[str, int]]:
        """Return what an optimizer trains: the models that DDP wraps, or itself, for those without."""
        wrapped = frozenset(("ddp", row[0]) for row in self.parameters(optimizer) if row[0])
        return wrapped or frozenset([("optimizer", optimizer)])

    def parameters(self, optimizer: int) -> list[Any]:
        found = [one["params"] for one in self.of("parameters") if one["opt"] == optimizer]
        return found[-1] if found else []


@dataclass
class Run:
    """All ranks of a run, and how it ended."""

    script: Path
    ranks: list[Rank]
    exit_code: int
    failed: frozenset[int] = frozenset()  # the ranks that an exception ended
    others: list[Run] = field(default_factory=list)  # in which the same script started its ranks again

    @property
    def world(self) -> int:
        return len(self.ranks)

    @cached_property
    def pairs(self) -> list[list[Pass]]:
        """The passes of all ranks that belong together, those of ranks that share a model's gradients."""
        by_rank = [{one.key: one for one in rank.passes} for rank in self.ranks]
        common = [key for key in by_rank[0] if all(key in other for other in by_rank)] if by_rank else []
        return [[passes[key] for passes in by_rank] for key in common]

    @cached_property
    def groups(self) -> list[list[int]]:
        """The groups of ranks that reduce gradients together; all ranks where no DDP says otherwise."""
        found = {tuple(one["ranks"]) for rank in self.ranks for kind in ("ddp", "fsdp") for one in rank.of(kind)}
        whole = tuple(range(self.world))
        if not found and (self.uses("tensor_parallel") or self.has_stages):
            return [[rank] for rank in whole]  # all ranks share each batch by design
        if not found or whole in found:
            return [list(whole)]
        return [list(group) for group in sorted(found) if len(group) > 1]

    @cached_property
    def has_stages(self) -> bool:
        """Whether each rank has a stage of the model: of torch's pipelining, or by messages before each backward."""
        if self.uses("pipeline"):
            return True
        first = [rank.windows(one["id"])[:_FIRST] for rank in self.ranks for one in rank.optimizers]
        windows = [window for row in first for window in row if window.backwards]
        by_hand = not self.uses("ddp") and not self.uses("fsdp") and self.uses("message")
        return by_hand and bool(windows) and all(window.gets_messages for window in windows)

    @property
    def has_replicas(self) -> bool:
        """Whether some ranks train the same parameters on batches of their own."""
        return any(len(group) > 1 for group in self.groups)

    def ended_together(self, pair: list[Pass]) -> bool:
        """Return whether the ranks of passes that nothing cut short made equally many steps, and ended: none waits."""
        steps = {len(rank.of("step")) for rank in self.ranks if rank.rank in {one.rank for one in pair}}
        return self.exit_code == 0 and len(steps) == 1 and all(one.how != "cut" for one in pair)

    def items(self, one: Pass) -> Record | None:
        """Return what is known of the items of a pass's data set."""
        rank = next(rank for rank in self.ranks if rank.rank == one.rank)
        return next((items for items in rank.of("items") if items["key"] == one.loader["key"]), None)

    def is_drawn(self, one: Pass) -> bool:
        """Return whether a data set draws another sample at each access, so that its places say nothing."""
        items = self.items(one)
        return items is not None and items["drawn"] and not items["stored"]

    def uses(self, kind: str) -> bool:
        return any(rank.of(kind) for rank in self.ranks)


def read_run(folder: Path, script: Path, exit_code: int) -> Run:
    """Read the records in a folder. A last line that a crash cut short is left out.

    A script may start its ranks several times. The run is that with the most steps, and has the others.
    """
    processes = []
    for path in sorted(folder.glob("*.jsonl")):
        records = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        if records and records[0]["k"] == "process":
            processes.append((records[0], records[1:]))
    fetches: dict[int, list[Record]] = defaultdict(list)  # of workers, by the process that started them
    for _, records in processes:
        for one in records:
            if one["k"] == "fetch" and one["worker"] is not None:
                fetches[one["parent"]].append(one)
    for ranks in (sessions := _sessions(processes)):
        for rank in ranks.values():
            own = [one for one in rank.records if one["k"] == "fetch"]
            rank.fetches = fetches[rank.head["pid"]] + own
        counts = [Counter(one["site"] for one in rank.of("optimizer")) for rank in ranks.values()]
        unlike = frozenset(site for one in counts for site in one if len({other[site] for other in counts}) > 1)
        for rank in ranks.values():
            rank.unlike = unlike
    runs = [Run(script, [ranks[number] for number in sorted(ranks)], exit_code) for ranks in sessions]
    if not runs:
        return Run(script, [], exit_code)
    run = max(runs, key=lambda one: (sum(len(rank.of("step")) for rank in one.ranks), one.world))
    run.others = [one for one in runs if one is not run]
    return run


def _sessions(processes: list[tuple[Record, list[Record]]]) -> list[dict[int, Rank]]:
    """Return the processes that joined one process group together, by rank, in the order in which they joined.

    Of those that joined none, one a rank that a launcher gave, or that trained alone.
    """
    joined, alone = [], []
    for head, records in processes:
        if any(one["k"] == "fetch" and one["worker"] is not None for one in records):
            continue
        first = next((one for one in records if one["k"] == "joined"), None)
        if first is not None:
            joined.append((first, head, records))
        elif head["rank"] is not None or any(one["k"] in ("loader", "optimizer", "step") for one in records):
            alone.append((head, records))
    found: list[dict[int, Rank]] = []
    last: dict[int, dict[int, Rank]] = {}  # the session of a size that still takes ranks
    for first, head, records in sorted(joined, key=lambda row: float(row[0]["t"])):
        size = first["world"]
        if size not in last or first["rank"] in last[size]:
            last[size] = {}
            found.append(last[size])
        last[size][first["rank"]] = Rank(first["rank"], head, records)
    whole = bool(found)
    for head, records in alone:
        rank = int(head["rank"] or 0)
        if head["rank"] is None and whole:
            continue  # it started the ranks
        if not found:
            found.append({})
        kept = found[-1].get(rank)
        if kept is None or (not whole and _work(records) > _work(kept.records)):
            found[-1][rank] = Rank(rank, head, records)
    return found


def _work(records: list[Record]) -> int:
    return sum(one["k"] in ("step", "iter") for one in records)


def _passes(rank: Rank) -> Iterator[Pass]:
    loaders: dict[int, Record] = {}
    ordinals: dict[Any, int] = defaultdict(int)
    for one in rank.of("loader"):
        place = (one["site"], one["dataset"])
        loaders[one["id"]] = {**one, "ordinal": ordinals[place]}
        ordinals[place] += 1
    by_pass: dict[int, list[Record]] = defaultdict(list)
    for one in rank.records:
        if "it" in one and one["k"] in ("draw", "batch", "end", "given", "seed"):
            by_pass[one["it"]].append(one)
    backwards = [one["at"] for kind in ("backward", "step") for one in rank.of(kind)]
    models = {number: rank.models(number) for number in {one["opt"] for one in rank.of("step")}}
    for begin in rank.of("iter"):
        events = by_pass[begin["it"]]
        rows = [row for one in events if one["k"] == "draw" for row in one["rows"]]
        end = next((one for one in events if one["k"] == "end"), None)
        how = end["how"] if end is not None else None
        complete = any(one["k"] == "draw" and one["complete"] for one in events)
        notes = [one for one in events if one["k"] in ("draw", "batch", "given")]
        last = end["at"] if end is not None and how != "left" else max((n["at"] for n in notes), default=begin["at"])
        if how is None and not complete and notes:
            last = len(rank.records)
        given = (
            end["given"]
            if end is not None
            else max(
                [n["n"] + 1 for n in notes if n["k"] == "batch"] + [n["given"] for n in notes if n["k"] == "given"],
                default=0,
            )
        )
        if how == "left":
            rows = rows[: max(given, 1)]
        parts = [(rows, complete and how != "left")]
        planned = begin["planned"]
        if planned and len(rows) >= 2 * planned and not complete:  # a sampler of batches that begins again by itself
            parts = [(rows[i : i + planned], i + planned <= len(rows)) for i in range(0, len(rows), planned)]
        seed = next((one for one in events if one["k"] == "seed"), {"base": None, "workers": 0})
        for n, (part, whole) in enumerate(parts):
            yield Pass(
                rank=rank.rank,
                loader=loaders[begin["loader"]],
                number=begin["n"] + n,
                site=begin["site"],
                begin=begin["at"],
                end=last,
                planned=planned,
                epoch=begin["epoch"],
                positions=[i for row in part for i in row],
                batches=len(part),
                given=given,
                complete=whole,
                how=how,
                digests=[one["d"] for one in events if one["k"] == "batch"],
                training=any(begin["at"] < at <= last for at in backwards) and not _is_evaluated(rank, events),
                base=seed["base"],
                workers=int(seed["workers"] or 0),
                models=frozenset().union(
                    *(models[one["opt"]] for one in rank.of("step") if begin["at"] < one["at"] <= last)
                ),
                endless=len(parts) > 1,
                handled=end is not None and bool(end.get("handled")),
            )


def _is_evaluated(rank: Rank, events: list[Record]) -> bool:
    """Return whether a model in eval mode takes each batch of a pass without a gradient, in between a training.

    A batch may first be labelled so, and then trained on, before another is loaded.
    """
    batches = [one for one in events if one["k"] == "batch"]
    forwards = rank.of("forward")
    trained = {one["given"] for one in forwards if one["grad"]}
    firsts = [next((one for one in forwards if one["at"] > batch["at"]), None) for batch in batches]
    evaluated = all(one is not None and not one["grad"] and not one["train"] for one in firsts)
    return bool(firsts) and evaluated and not any(one["given"] in trained for one in batches)
