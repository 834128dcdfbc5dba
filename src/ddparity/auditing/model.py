"""Compare the models of the ranks: DDP201 to DDP213, DDP301 and DDP310. Pure functions of the records."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from .catalogue import Certainty, Finding, counted, finding
from .records import Rank, Record, Run, Window

_IDLE = 2  # steps without a gradient that tell that an optimizer has other parameters than the model
_FEW = 5  # samples of a rank's batch
_WRAP = "Wrap the module that holds them in DistributedDataParallel, and call the wrapped one."


def check_model(run: Run) -> Iterator[Finding]:
    """Find parameters and buffers that differ between ranks, and steps on gradients that were not reduced."""
    found = [one for group in run.groups for one in _check_optimizers(run, group)]
    yield from found
    if not any(one.code in ("DDP201", "DDP202", "DDP301") for one in found):
        yield from _check_evaluated(run)
    yield from _check_norms(run)
    yield from _check_dropout(run)


def _check_optimizers(run: Run, group: list[int]) -> Iterator[Finding]:
    ranks = [rank for rank in run.ranks if rank.rank in group]
    if len(ranks) < 2:
        return
    for optimizer in ranks[0].optimizers:
        number = optimizer["id"]
        if not all(any(one["id"] == number for one in rank.optimizers) for rank in ranks):
            continue
        windows = [rank.windows(number) for rank in ranks]
        described = [rank.parameters(number) for rank in ranks]
        if not described[0] or len({len(one) for one in described}) > 1:
            continue
        yield from _check_steps(run, ranks, optimizer, described[0], list(zip(*windows)))
        yield from _check_sharded(ranks, windows[0])
        yield from _check_idle(ranks, optimizer, windows[0])


def _check_sharded(ranks: list[Rank], windows: list[Window]) -> Iterator[Finding]:
    """DDP301 for fully_shard: without a reduction its parameters have no gradient, so a step changes nothing."""
    for window in windows:
        if window.step.get("sharded"):
            switches = [one for one in ranks[0].of("reduces") if one["at"] < window.step["at"]]
            yield finding(
                "DDP301",
                [rank.rank for rank in ranks],
                window.step["site"],
                switches[-1]["site"],
                f"The last backward before step {window.step['n']} ran after set_requires_gradient_sync(False), so the "
                f"sharded parameters have no gradient, and the step does not change them.",
                "Call set_requires_gradient_sync(True) before the forward of the last micro-batch of each step, also "
                "of the short one at the end of an epoch.",
            )
            return


def _check_idle(ranks: list[Rank], optimizer: Record, windows: list[Window]) -> Iterator[Finding]:
    """DDP204: steps without a gradient, while parameters that no optimizer has get theirs."""
    idle = [window for window in windows if window.step.get("stray")]
    if len(idle) >= _IDLE and len(idle) == len([window for window in windows if "after" in window.step]):
        others = [one for one in ranks[0].of("step") if one["opt"] != optimizer["id"]]
        trains = any("after" in one and not one.get("stray") for one in others)  # so this one may have its turn later
        yield finding(
            "DDP204",
            [rank.rank for rank in ranks],
            idle[0].step["site"],
            optimizer["site"],
            f"None of the optimizer's parameters has a gradient at steps {idle[0].step['n']} to {idle[-1].step['n']}, "
            f"while {counted(idle[0].step['stray'], 'parameter')} in no optimizer got one: the steps change "
            f"nothing.",
            "Make the optimizer after the model is wrapped, sharded or changed, of the parameters of that model.",
            certainty="likely" if trains else "proved",
        )


def _check_steps(
    run: Run, ranks: list[Rank], optimizer: Record, parameters: list[Any], steps: list[tuple[Window, ...]]
) -> Iterator[Finding]:
    shown = [step for step in steps if all(window.step.get("grads") is not None for window in step)]
    shown = [step for step in shown if len({len(window.step["grads"]) for window in step}) == 1]
    if not shown:
        return
    numbers = [rank.rank for rank in ranks]
    count = max(len(step[0].step["grads"]) for step in shown)  # add_param_group() gives an optimizer more
    usable = [j for j in range(count) if j < len(parameters) and not parameters[j][3]]
    cause = optimizer["site"]

    def differ(step: tuple[Window, ...], what: str, of: list[int] = usable) -> set[int]:
        return {j for j in of if len({w.step[what][j] for w in step if j < len(w.step[what])}) > 1}

    unreduced: dict[int, tuple[Window, ...]] = {}
    for step in shown:
        for j in differ(step, "grads") & differ(step, "after"):  # an optimizer may reduce them in its own step
            unreduced.setdefault(j, step)
    healed = _healed(ranks[0], shown, differ)
    if healed is not None:
        yield finding(
            "DDP310",
            numbers,
            healed[0].step["site"],
            cause,
            f"Gradients differ between ranks, and parameters are made equal again later (before step "
            f"{healed[0].step['n']}): the ranks train apart in between (local SGD).",
            "Nothing, where this is meant.",
        )
        return
    outside = [j for j in unreduced if parameters[j][0] == 0]
    inside = [j for j in unreduced if parameters[j][0] != 0]
    if outside:
        step = unreduced[outside[0]]
        why = (
            "are in no DistributedDataParallel"
            if run.uses("ddp")
            else "are in no DistributedDataParallel (the script makes none)"
        )
        yield finding(
            "DDP201",
            numbers,
            step[0].step["site"],
            cause,
            f"{_named(parameters, outside)} {why}, and their gradients differ between ranks at step "
            f"{step[0].step['n']}{_norms(step)}: each rank trains its own copy.",
            _WRAP,
        )
    if inside:
        yield from _check_unreduced(ranks, parameters, unreduced, inside, cause)
    ignored = [j for j in range(min(count, len(parameters))) if parameters[j][3] == "ignored"]
    drifts = [j for j in ignored if not differ(shown[0], "before", ignored) & {j}]
    for step in shown:
        apart = sorted(differ(step, "grads", drifts) & differ(step, "after", drifts))
        if apart:
            yield finding(
                "DDP201",
                numbers,
                step[0].step["site"],
                cause,
                f"DistributedDataParallel was told to leave out {_named(parameters, apart)}, which begin with equal "
                f"values on the ranks; their gradients differ at step {step[0].step['n']}: each rank trains its own "
                f"copy.",
                "Reduce their gradients by hand, or let DistributedDataParallel do it, unless each rank's are its own.",
                certainty="likely",
            )
            break
    if unreduced:
        return
    yield from _check_parameters(run, numbers, shown, differ, parameters, cause)


def _healed(rank: Rank, shown: list[tuple[Window, ...]], differ: Any) -> tuple[Window, ...] | None:
    """Return the first step before which parameters are equal again that differed after an earlier one.

    None where all have loaded what the step before left on one rank, such as its checkpoint: that is no average.
    """
    apart: set[int] = set()
    for n, step in enumerate(shown):
        if apart and not differ(step, "before") & apart:
            return None if _are_loaded(rank, shown[n - 1], step, apart) else step
        apart |= differ(step, "after")
    return None


def _are_loaded(rank: Rank, last: tuple[Window, ...], step: tuple[Window, ...], which: set[int]) -> bool:
    """Return whether parameters before a step are those of one rank after the step before it, and it did not send them.

    A rank that reduces the gradients alone, and sends the parameters after its step, is right.
    """
    begin, end = last[0].step, step[0].step
    sent = [one for one in rank.of("collective") if "broadcast" in one["name"] or "scatter" in one["name"]]
    large = [one for one in sent if "shape" not in one or math.prod(one["shape"]) > 1]
    if begin["n"] + 1 != end["n"] or any(begin["at"] < one["at"] < end["at"] for one in [*large, *rank.of("message")]):
        return False
    return any(all(window.step["after"][j] == end["before"][j] for j in which) for window in last)


def _check_unreduced(
    ranks: list[Rank],
    parameters: list[Any],
    unreduced: dict[int, tuple[Window, ...]],
    inside: list[int],
    cause: str | None,
) -> Iterator[Finding]:
    numbers = [rank.rank for rank in ranks]
    frozen = [j for j in inside if parameters[j][2]]
    if frozen:
        step = unreduced[frozen[0]]
        wrapped = next((one["site"] for one in ranks[0].of("ddp") if one["id"] == parameters[frozen[0]][0]), None)
        yield finding(
            "DDP201",
            numbers,
            step[0].step["site"],
            wrapped,
            f"{_named(parameters, frozen)} did not require gradients when DistributedDataParallel was made, which "
            f"therefore never reduces them; at step {step[0].step['n']} their gradients differ between "
            f"ranks{_norms(step)}.",
            "Set requires_grad before the model is wrapped, or wrap it again after a change.",
        )
    rest = [j for j in inside if j not in frozen]
    if not rest:
        return
    step = min((unreduced[j] for j in rest), key=lambda one: int(one[0].step["n"]))
    number = parameters[rest[0]][0]
    window = step[0]
    forwards = [one for one in window.of("forward") if one["ddp"] == number and one["grad"]]
    backward = window.backwards[-1]["site"] if window.backwards else window.step["site"]
    where = f"at step {step[0].step['n']}"
    if not forwards and window.backwards and not ranks[0].of("compile"):
        yield finding(
            "DDP201",
            numbers,
            window.step["site"],
            backward,
            f"The wrapped model's forward is not called before the backward {where}, but its inner module "
            f"(model.module): DDP does not reduce the gradients of {_named(parameters, rest)}, which differ between "
            f"ranks{_norms(step)}.",
            "Call the model that DistributedDataParallel returned, not model.module.",
        )
        return
    if forwards and not forwards[-1]["sync"]:
        message = (
            f"The last forward before step {window.step['n']} ran under no_sync(), so the gradients of "
            f"{_named(parameters, rest)} were not reduced and differ between ranks{_norms(step)}."
        )
        fix = (
            "Leave no_sync() for the forward and backward of the last micro-batch before each step, also of the short "
            "one at the end of an epoch."
        )
        yield finding("DDP301", numbers, window.step["site"], forwards[-1]["site"], message, fix)
        return
    yield finding(
        "DDP301",
        numbers,
        window.step["site"],
        backward,
        f"The gradients of {_named(parameters, rest)} differ between ranks {where}{_norms(step)}.",
        "Let each backward whose gradients the step uses follow a forward of the wrapped model outside of no_sync(), "
        "and change gradients in the same way on all ranks.",
    )


def _check_parameters(
    run: Run,
    numbers: list[int],
    shown: list[tuple[Window, ...]],
    differ: Any,
    parameters: list[Any],
    cause: str | None,
) -> Iterator[Finding]:
    """DDP202 and DDP203: gradients are equal in all steps that are known."""
    for n, step in enumerate(shown):
        before, after = differ(step, "before"), differ(step, "after")
        if not before and not after:
            continue
        which = sorted(before or after)
        site, number = step[0].step["site"], step[0].step["n"]
        own = [j for j in which if parameters[j][0] == 0]
        if before and n == 0 and own:
            yield finding(
                "DDP203",
                numbers,
                site,
                cause,
                f"{_named(parameters, own)} begin with other values on each rank, and stay different: equal gradients "
                f"do not make them equal.",
                "Broadcast the parameters from rank 0 before training, or make the model under one seed.",
            )
            return
        if before:
            when = "before the first step" if n == 0 else f"between steps {shown[n - 1][0].step['n']} and {number}"
            yield finding(
                "DDP202",
                numbers,
                site,
                cause,
                f"{_named(parameters, which)} are changed {when} in another way on each rank: DDP makes parameters "
                f"equal once, when it is made, and then only gradients.",
                "Load or change parameters on all ranks alike, before the model is wrapped.",
            )
            return
        rates = [tuple(window.step.get("lr", ())) for window in step]
        why = f"; the learning rates are {', '.join(map(_rate, rates))}" if len(set(rates)) > 1 else ""
        yield finding(
            "DDP202",
            numbers,
            site,
            cause,
            f"{_named(parameters, which)} differ between ranks after step {number}, although their gradients and "
            f"earlier values are equal{why}.",
            "Give the optimizer the same learning rate, options and state on all ranks.",
        )
        return


def _rate(rates: tuple[float, ...]) -> str:
    return "/".join(f"{rate:g}" for rate in rates)


def _check_evaluated(run: Run) -> Iterator[Finding]:
    """DDP203 for models that no optimizer trains, DDP213 for buffers, where models are put into eval mode."""
    if run.world < 2 or run.has_stages:  # each rank evaluates another one
        return
    rows = [rank.of("eval") for rank in run.ranks]
    told: set[tuple[str, Any]] = set()
    for events in _paired([rank.of("held") for rank in run.ranks]):
        first = events[0]
        if len({one["parameters"] for one in events}) > 1 and ("DDP203", first["type"]) not in told:
            told.add(("DDP203", first["type"]))
            yield _differs(run, first, "proved" if first["frozen"] else "likely")
    broadcasts = {ddp["id"]: ddp["broadcasts"] for ddp in run.ranks[0].of("ddp")}
    ranks = [rank.rank for rank in run.ranks]
    for events in _paired(rows):
        first = events[0]
        names = [n for n in first["buffers"] if len({one["buffers"].get(n) for one in events}) > 1]
        synchronised = any(broadcasts.get(number) for number in first["ddps"])
        if names and not synchronised and ("DDP213", first["site"]) not in told:
            told.add(("DDP213", first["site"]))
            wrapped = next((one["site"] for one in run.ranks[0].of("ddp") if one["id"] in first["ddps"]), None)
            yield finding(
                "DDP213",
                ranks,
                first["site"],
                wrapped,
                f"{counted(len(names), 'buffer')}, such as {names[0]}, differed between ranks where {first['type']} "
                f"was evaluated: the ranks evaluate, and save, different models.",
                "Use SyncBatchNorm, leave broadcast_buffers=False out, or broadcast the buffers before an evaluation.",
                # A copy, such as an average of weights, takes what each rank's forward left: little, and usual.
                severity="note" if not first["ddps"] and any(broadcasts.values()) else None,
            )
        if (
            not first["ddps"]
            and first["parameters"] is not None
            and len({one["parameters"] for one in events}) > 1
            and ("DDP203", first["type"]) not in told
        ):
            told.add(("DDP203", first["type"]))
            yield _differs(run, first)
    for group in run.groups:
        for one in _beside([rank for rank in run.ranks if rank.rank in group]):
            if ("DDP203", one["type"]) not in told:
                told.add(("DDP203", one["type"]))
                yield _differs(run, one, "likely")


def _beside(ranks: list[Rank]) -> list[Record]:
    """Return models beside the training that are frozen, or changed without an optimizer, and differ between ranks.

    They differ at two steps. Models of one type and size are told apart by nothing, so all must differ.
    """
    if len(ranks) < 2:
        return []
    looks: list[dict[Any, list[Record]]] = []  # of each rank, by type, size and step
    for rank in ranks:
        looks.append(defaultdict(list))
        for one in rank.of("beside"):
            looks[-1][one["type"], one["size"], one["frozen"], one["steps"]].append(one)
    found = []
    for (*kind, frozen, step), first in looks[0].items():
        steps = sorted({key[3] for key in looks[0] if key[:3] == (*kind, frozen)})
        rows = [[{one["parameters"] for one in look[*kind, frozen, n]} for look in looks] for n in steps]
        apart = all(all(row) and len(set.union(*row)) == sum(map(len, row)) for row in rows)
        changed = all(not early & late for early, late in zip(rows[0], rows[-1]))
        if step == steps[0] and len(steps) > 1 and apart and (frozen or changed):
            found.append(first[0])
    return found


def _paired(rows: list[list[Record]]) -> list[list[Record]]:
    """Return the events of all ranks that belong together: of one line, one type and one number of steps."""
    by_rank: list[dict[Any, Record]] = []
    for row in rows:
        counts: Counter[Any] = Counter()
        found: dict[Any, Record] = {}
        for one in row:
            key = one["site"], one["type"], one.get("steps")
            counts[key] += 1
            found[*key, counts[key]] = one
        by_rank.append(found)
    return [[found[key] for found in by_rank] for key in by_rank[0] if all(key in found for found in by_rank)]


def _differs(run: Run, one: Record, certainty: Certainty = "proved") -> Finding:
    return finding(
        "DDP203",
        [rank.rank for rank in run.ranks],
        one["site"],
        one["site"],
        f"The parameters of {one['type']}, which is in no DistributedDataParallel, have other values on each rank.",
        "Load it from one checkpoint on all ranks, make it under one seed, or broadcast it from rank 0.",
        certainty,
    )


def _check_norms(run: Run) -> Iterator[Finding]:
    ranks = [rank.rank for rank in run.ranks]
    if run.world < 2:
        return
    for ddp in run.ranks[0].of("ddp"):
        local = [name for name, _, synchronised in ddp["norms"] if not synchronised]
        whole = [name for name, _, synchronised in ddp["norms"] if synchronised]
        if local and whole:
            yield finding(
                "DDP212",
                ranks,
                ddp["site"],
                ddp["site"],
                f"{counted(len(local), 'batch norm')}, such as {local[0]}, normalised over each rank's own samples, "
                f"{counted(len(whole), 'other')} over those of all ranks.",
                "Convert the whole model before it is wrapped.",
            )
        elif local and not run.uses("converted"):
            sizes = [
                one["n"]
                for rank in run.ranks
                for one in rank.of("forward")
                if one["ddp"] == ddp["id"] and one["train"] and one["grad"] and one["n"] is not None
            ]
            if sizes and sorted(sizes)[len(sizes) // 2] < _FEW:
                size = sorted(sizes)[len(sizes) // 2]
                yield finding(
                    "DDP211",
                    ranks,
                    ddp["site"],
                    ddp["site"],
                    f"{counted(len(local), 'batch norm')}, such as {local[0]}, normalised over "
                    f"{counted(size, 'sample')} of one rank.",
                    "Use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), or ddparity's on the CPU, before the "
                    "model is wrapped.",
                )
    for event in run.ranks[0].of("converted")[:1]:
        yield finding(
            "DDP212",
            ranks,
            event["site"],
            event["site"],
            "Batch norms are converted after the model was wrapped in DistributedDataParallel: what DDP calls may "
            "still be the old layers.",
            "Convert the model first, and wrap it then.",
        )


def _check_dropout(run: Run) -> Iterator[Finding]:
    rows = [[one for one in rank.of("forward") if one.get("dropout") and one["grad"]] for rank in run.ranks]
    shortest = min(map(len, rows)) if rows else 0
    equal = [i for i in range(shortest) if len({row[i]["rng"] for row in rows}) == 1]
    if run.world > 1 and equal:  # batches of other shapes draw other numbers, so the streams may part later
        yield finding(
            "DDP114",
            [rank.rank for rank in run.ranks],
            rows[0][0]["site"],
            None,
            f"The random stream of the model is in the same state on all ranks before {len(equal)} of {shortest} "
            f"forwards: the ranks drop out the same units.",
            "Seed with seed + rank after the model is made.",
        )


def _named(parameters: list[Any], which: list[int]) -> str:
    names = [parameters[j][1] for j in sorted(which)]
    return ", ".join(names[:3]) + (f" and {counted(len(names) - 3, 'other parameter')}" if len(names) > 3 else "")


def _norms(step: tuple[Window, ...]) -> str:
    norms = [window.step["norm"] for window in step]
    if None in norms or len(set(norms)) == 1:
        return ""
    return f" (norms {', '.join(f'{norm:.4g}' for norm in norms)})"
