"""Look at what costs time alone: DDP701 to DDP704."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .catalogue import Finding, finding
from .records import Run, Window
from .source import reads_in_loop

_WARM = 2  # first steps, whose times say little
_FEWEST = 6  # steps that can show that a rank is slow
_SLOW, _SLOW_S, _OF_A_STEP = 2.0, 0.005, 0.2  # times as long as the others, seconds longer, part of a step
_WAITS = {"backward": "begin_backward", "completed": "collective"}  # how a wait for other ranks ends, and begins


def check_speed(run: Run) -> Iterator[Finding]:
    """Find work that a training does without need."""
    ranks = [rank.rank for rank in run.ranks]
    if run.world > 1:
        yield from _check_ddp(run, ranks)
        yield from _check_waiting(run)
    calls = Counter(one["site"] for rank in run.ranks[:1] for one in rank.of("backward") if one["site"])
    reads = (reads_in_loop(site) for site, count in calls.items() if count > 1)
    site = next((one for one in reads if one is not None), None)
    if site is not None:
        yield finding(
            "DDP704",
            ranks,
            site,
            None,
            "Each backward comes with a call of .item(): on an accelerator it waits for all work.",
            "Add up on the device, and read the value now and then.",
        )


def _take_turns(window: Window, optimizers: set[int]) -> bool:
    """Return whether another one of the optimizers steps between two backwards, which may each leave out its half."""
    places = [one["at"] for one in window.backwards]
    steps = [one["at"] for one in window.of("step") if one["opt"] in optimizers]
    return bool(places) and any(min(places) < at < max(places) for at in steps)


def _check_ddp(run: Run, ranks: list[int]) -> Iterator[Finding]:
    rank = run.ranks[0]
    constant = {(one["ddp"], name) for one in rank.of("large") for name in one["same"]}
    for ddp in rank.of("ddp"):
        steps = 0
        used, turns = True, False
        numbers = [one["id"] for one in rank.optimizers]
        owners = {number for number in numbers if any(row[0] == ddp["id"] for row in rank.parameters(number))}
        for optimizer in rank.optimizers:
            parameters = rank.parameters(optimizer["id"])
            own = [j for j, row in enumerate(parameters) if row[0] == ddp["id"] and not row[2]]
            for window in rank.windows(optimizer["id"]) if own else []:
                turns = turns or _take_turns(window, owners)
                grads = window.step.get("grads")
                if grads is not None:  # of a parameter that the optimizer gets later they say nothing
                    steps += 1
                    used = used and all(j < len(grads) and grads[j] is not None for j in own)
        if ddp["unused"] and used and not turns and steps >= 2:
            yield finding(
                "DDP701",
                ranks,
                ddp["site"],
                None,
                f"find_unused_parameters=True, but each parameter had a gradient in each of {steps} steps: DDP "
                f"searches the graph after each forward for nothing.",
                "Leave find_unused_parameters=True out, if no branch of the model is ever left out.",
                certainty="likely",
            )
        large = [(name, size) for name, _, size in ddp["large"] if (ddp["id"], name) in constant]
        if large and ddp["broadcasts"]:
            yield finding(
                "DDP703",
                ranks,
                ddp["site"],
                None,
                f"Buffers that never change, such as {large[0][0]} ({large[0][1] / 2**20:.1f} MiB), are broadcast "
                f"before each forward.",
                "Register them with persistent=False and list them in DDP's parameters to ignore, or give "
                "broadcast_buffers=False if no buffer changes.",
            )


def _check_waiting(run: Run) -> Iterator[Finding]:
    """DDP702: a rank that takes longer than the others in nearly all steps. Wall-clock times of one machine."""
    if not run.uses("ddp") or run.uses("join"):
        return
    for optimizer in run.ranks[0].optimizers:
        by_rank = [rank.windows(optimizer["id"]) for rank in run.ranks]
        steps = [_timed(step, before) for before, step in itertools.pairwise(zip(*by_rank))][_WARM:]
        known = [step for step in steps if step is not None]
        if len(known) < _FEWEST:
            continue
        own = [statistics.median(times) for times in zip(*(step.own for step in known))]
        slow = own.index(max(own))
        others = max(time for i, time in enumerate(own) if i != slow)
        behind = sum(_is_behind(step.own, slow) for step in known)
        waited = own[slow] - others
        whole = statistics.median(step.whole for step in known)
        if behind < 0.9 * len(known) or waited < _OF_A_STEP * whole:
            continue
        number = run.ranks[slow].rank
        loads = statistics.median(step.windows[slow].step["load_s"] for step in known)
        loader = next((one for one in run.ranks[slow].passes if one.training), None) if loads > waited / 2 else None
        yield finding(
            "DDP702",
            [number],
            loader.site if loader is not None else _slowest(known, slow) or known[0].windows[slow].step["site"],
            loader.loader["site"] if loader is not None else None,
            f"Rank {number} works {own[slow] * 1e3:.0f} ms in a step, the others at most {others * 1e3:.0f} ms"
            + (f"; it waits {loads * 1e3:.0f} ms for its data" if loader is not None else "")
            + f". The others wait for it in {behind} of {len(known)} steps.",
            "Give all ranks equal work, and leave out what one rank alone does in each step; a slower machine gets a "
            "smaller share.",
            certainty="likely",
        )
        return


@dataclass(frozen=True)
class _Step:
    windows: tuple[Window, ...]
    own: tuple[float, ...]  # seconds that each rank worked, without its waits
    whole: float  # seconds


def _timed(step: tuple[Window, ...], before: tuple[Window, ...]) -> _Step | None:
    """Return the times of a step; None where an epoch begins in it, since other work is done then."""
    if any(window.of("iter") or window.of("end") for window in step):
        return None
    own, wholes = [], []
    for window, last in zip(step, before):
        begun: dict[str, float] = {}
        waited = 0.0
        for event in window.events:
            begun[event["k"]] = event["t"]
            waited += event["t"] - begun.get(_WAITS.get(event["k"], ""), event["t"])
        wholes.append(window.step["t"] - last.step["t"])
        own.append(wholes[-1] - waited)
    return _Step(step, tuple(own), max(wholes))


def _is_behind(own: tuple[float, ...], slow: int) -> bool:
    others = max(time for i, time in enumerate(own) if i != slow)
    return own[slow] >= _SLOW * others and own[slow] - others >= _SLOW_S


def _slowest(steps: list[_Step], slow: int) -> str | None:
    """Return the line of the call before which the slow rank loses most of its time."""
    lost: dict[str, float] = defaultdict(float)
    for step in steps:
        last = None
        for event in [*step.windows[slow].events, step.windows[slow].step]:
            if last is not None and event["k"] not in _WAITS and event.get("site"):
                lost[event["site"]] += event["t"] - last
            last = event["t"]
    return max(lost, key=lambda site: lost[site], default=None)
