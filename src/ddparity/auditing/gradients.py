"""Look at the windows between optimizer steps: DDP302 to DDP309. Pure functions of the records."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from .catalogue import Finding, finding
from .recording.losses import MEANS
from .records import Record, Run, Window
from .source import divides_by_world, divides_gradients

_OTHER = 1e-3  # of a sum of absolute values over a norm: more than numbers of 16 bits round
_UNEQUAL = 1.1  # ratio of counts from which their means are told to have wrong weights


def check_gradients(run: Run) -> Iterator[Finding]:
    """Find faults of accumulation, clipping, scaling and reduction."""
    hooked = run.uses("hook")
    for optimizer in run.ranks[0].optimizers if run.ranks else []:
        number = optimizer["id"]
        by_rank = [rank.windows(number) for rank in run.ranks]
        if not by_rank[0]:
            continue
        yield from _check_reductions(run, by_rank[0])
        if not hooked:
            yield from _check_divisor(run, by_rank[0])
        yield from _check_weights(run, by_rank)
        yield from _check_clips(run, by_rank)
        yield from _check_scaler(run, by_rank[0], number)
        yield from _check_thrown(run, by_rank[0], number)
        yield from _check_twice(run, by_rank)
        if not hooked:
            yield from _check_world_scale(run, by_rank[0])
            yield from _check_factor(run, by_rank)


def _ranks(run: Run) -> list[int]:
    return [rank.rank for rank in run.ranks]


def _reductions(window: Window) -> list[Record]:
    """Return the backwards of a window's micro-batches that DDP followed by a reduction."""
    found, synchronised = [], False
    for event in window.events:
        if event["k"] == "forward" and event["grad"]:
            synchronised = synchronised or event["sync"]
        elif event["k"] == "backward":
            if synchronised and window.is_kept(event):
                found.append(event)
            synchronised = False
    return found


def _check_reductions(run: Run, windows: list[Window]) -> Iterator[Finding]:
    if run.world < 2:
        return
    for window in windows:
        many, reduced = len(window.kept), len(_reductions(window))
        if many >= 2 and reduced >= 2:
            partly = any(not one["sync"] for one in window.of("forward") if one["grad"])
            yield finding(
                "DDP302",
                _ranks(run),
                window.backwards[-1]["site"],
                next(one["site"] for one in window.of("forward") if one["sync"]),
                f"{reduced} of the {many} backwards before step {window.step['n']} reduce the gradients, where one "
                f"would do{'' if partly else ': no forward runs under no_sync()'}.",
                "Run forward and backward of all micro-batches but the last under `with model.no_sync():` (the "
                "forward, too: it decides).",
            )
            return


def _check_divisor(run: Run, windows: list[Window]) -> Iterator[Finding]:
    windows = [window for window in windows if not window.is_cut]
    lengths = [len(window.kept) for window in windows]
    several = [row for row in zip(windows, [None, *windows]) if len(row[0].kept) >= 2]
    parts = sum(_is_of_one_batch(*row) for row in several)  # a tail may look so, where a loop loads ahead
    if not several or 2 * parts > len(several):
        return
    scales = {one["scale"] for window in windows for one in window.kept}
    summed = any(":sum" in one["node"] for window in windows for one in window.kept)
    whole = _divisor(windows, lengths)
    for window, length in zip(windows, lengths):
        if len(scales) != 1 or None in scales or summed or not length:
            break
        if whole and whole != length:
            yield finding(
                "DDP303",
                _ranks(run),
                window.step["site"],
                window.kept[0]["site"],
                f"Step {window.step['n']} follows {length} micro-batch{'es' if length > 1 else ''}, whose losses are "
                f"divided by {whole}: its gradient is {length}/{whole} of the mean.",
                "Divide by the number of micro-batches that the step has, also at the start and at the end of an "
                "epoch.",
                certainty="proved" if whole in lengths else "likely",  # it may be a weight of the loss
            )
            return
    node = windows[0].kept[0]["node"] if windows and windows[0].kept else ""
    for window, length in zip(windows, lengths):
        if length >= 2 and _are_means(window) and all(one["scale"] == 1 for one in window.kept):
            if window.of("scale") or _is_divided_by_hand(window, length):
                return
            yield finding(
                "DDP304",
                _ranks(run),
                window.backwards[-1]["site"],
                None,
                f"The losses of {length} micro-batches are means ({node.removesuffix('Backward0')}) and are added up "
                f"without a division: the gradient is {length} times that of their mean.",
                f"Divide the loss by {length} before backward, unless the learning rate makes up for it.",
                certainty="likely",
            )
            return


def _divisor(windows: list[Window], lengths: list[int]) -> int:
    """Return the whole number, of 2 or more, by which the losses are divided; 0 where it is none.

    Of several constants some may be weights: those count that give the length of the most windows.
    """
    constants = next((one["factors"] for window in windows for one in window.kept), None) or []
    found = {}
    for many in range(1, len(constants) + 1):
        for chosen in itertools.combinations(constants, many):
            divisor = 1 / math.prod(chosen) if all(map(math.isfinite, chosen)) and all(chosen) else 0
            if divisor >= 1.5 and math.isclose(divisor, round(divisor), rel_tol=1e-6):
                found[round(divisor)] = lengths.count(round(divisor)), many
    return max(found, key=found.__getitem__, default=0)


def _is_of_one_batch(window: Window, before: Window | None) -> bool:
    """Return whether all forwards of a window have one input, or one whole batch: their losses are parts of one.

    `before`: the window before, since which one batch was loaded, not a list of them.
    """
    forwards = [one for one in window.of("forward") if one["grad"]]
    if len(forwards) < 2 or len(window.kept) < 2:
        return False
    inputs = {one["x"] for one in forwards}
    earlier = max((one["given"] for one in before.backwards), default=0) if before is not None else 0
    whole = all(one["given"] == earlier + 1 for one in window.kept)
    sizes = {one["n"] for one in forwards} | {one["batch"] for one in window.kept}
    return None not in inputs | sizes and (len(inputs) == 1 or (whole and len(sizes) == 1))


def _is_divided_by_hand(window: Window, length: int) -> bool:
    """Return whether the gradients shrink between the last of `length` backwards and the clip, or the step.

    A reduction by hand shrinks them, too: the mean over N ranks is at least 1/sqrt(N) as long where they differ.
    """
    last, norm = _norms(window) or (0.0, 0.0)
    by_hand = any(one.get("gradient") for one in window.of("collective"))
    return norm < last * (1.02 / length if by_hand else 0.9)


def _check_weights(run: Run, by_rank: list[list[Window]]) -> Iterator[Finding]:
    """DDP305: micro-batches of one step with unequal counts whose means have equal weights."""
    for step in zip(*by_rank):
        rows = [_counts(window) for window in step]
        if any(row is None for row in rows):
            continue
        summed = all(_is_mean_of_its_rank(window) for window in step)  # sums, which each rank divides by its own count
        if summed:
            rows = [[sum(row)] for row in rows if row is not None]
        counts = [count for row in rows if row is not None for count in row]
        if len(counts) < 2 or min(counts) <= 0 or max(counts) < _UNEQUAL * min(counts):
            continue
        scales = {one["scale"] for window in step for one in window.kept}
        means = all(map(_are_means, step))
        if not summed and (len(scales) != 1 or None in scales or not means):
            continue
        # The short last micro-batch of an epoch, alike on all ranks, matters little.
        short = all(row == rows[0] for row in rows) and len({*counts[: len(rows[0] or []) - 1]}) == 1
        samples = step[0].kept[0]["units"] is None or _all_counted(step)
        what = "counted targets" if step[0].kept[0]["units"] is not None else "samples"
        yield finding(
            "DDP305",
            _ranks(run),
            step[0].kept[-1]["site"],
            None,
            f"The losses of step {step[0].step['n']} are means over {', '.join(f'{c:g}' for c in counts)} {what}, and "
            f"all have the same weight: a sample of the smallest counts {max(counts) / min(counts):.3g} times as much.",
            "Take the sum of the losses and divide it by the step's count on all ranks (times the world size, since "
            "DDP averages), or keep all micro-batches equally large.",
            severity="note" if short and samples else "warning",
        )
        return


def _is_mean_of_its_rank(window: Window) -> bool:
    """Return whether the losses of a window are sums, all divided by what this rank's micro-batches count together."""
    scales = {one["scale"] for one in window.kept}
    units = [one["units"] for one in window.kept]
    if len(scales) != 1 or None in scales or None in units or not all(":sum" in one["node"] for one in window.kept):
        return False
    return math.isclose(scales.pop() * sum(units), 1, rel_tol=1e-4)


def _all_counted(step: tuple[Window, ...]) -> bool:
    """Return whether the counts of cross-entropy are those of the samples: no target is left out."""
    for window in step:
        sizes = [one["n"] for one in window.of("forward") if one["grad"]]
        units = [one["units"] for one in window.kept]
        if len(sizes) != len(units) or None in sizes or None in units:
            return False
        if len({unit / size for unit, size in zip(units, sizes) if size}) > 1:
            return False
    return True


def _counts(window: Window) -> list[float] | None:
    """Return the units of the loss of each micro-batch, or their samples; None where they are not known."""
    found: list[float] = []
    size: int | None = None
    for event in window.events:
        if event["k"] == "forward" and event["grad"]:
            size = event["n"]
        elif window.is_kept(event):
            count = event["units"] if event["units"] is not None else size
            if count is None:
                return None
            found.append(float(count))
    return found


def _check_clips(run: Run, by_rank: list[list[Window]]) -> Iterator[Finding]:
    """DDP306: norms that differ between ranks were taken of gradients that had not been reduced."""
    if run.world < 2:
        return
    for step in zip(*by_rank):
        clips = [window.of("clip") for window in step]
        for calls in zip(*clips):
            norms = [one["norm"] for one in calls]
            if None in norms or not all(map(math.isfinite, norms)):
                continue
            apart = max(norms) - min(norms) > 1e-5 * max(norms)
            limit = calls[0]["limit"] or math.inf
            grads = [window.step.get("grads") for window in step]
            reduced = None not in grads and all(row == grads[0] for row in grads)
            if apart and max(norms) > limit and _is_sharded(run, step):
                yield finding(
                    "DDP306",
                    _ranks(run),
                    calls[0]["site"],
                    None,
                    f"Before step {step[0].step['n']} torch.nn.utils clips the shards of FullyShardedDataParallel to "
                    f"{limit:g} by the norms {', '.join(f'{norm:.4g}' for norm in norms)} of the ranks' own shards: "
                    f"each rank scales its shard by another factor.",
                    "Call the model's own clip_grad_norm_, which takes the norm over all ranks.",
                )
                return
            if apart and reduced and max(norms) > limit:
                yield finding(
                    "DDP306",
                    _ranks(run),
                    calls[0]["site"],
                    None,
                    f"Before step {step[0].step['n']} gradients with the {calls[0]['of']}s "
                    f"{', '.join(f'{norm:.4g}' for norm in norms)} on the ranks are clipped to {limit:g}, and only "
                    f"then reduced: each rank's share is scaled by another factor.",
                    "Clip after the backward that reduces the gradients, right before the step.",
                )
                return


def _is_sharded(run: Run, step: tuple[Window, ...]) -> bool:
    """Return whether the optimizer of a step has the shards of FullyShardedDataParallel alone."""
    parameters = run.ranks[0].parameters(step[0].step["opt"])
    return bool(parameters) and all(row[3] == "flat" for row in parameters)


def _check_scaler(run: Run, windows: list[Window], optimizer: int) -> Iterator[Finding]:
    stepped = {one["opt"] for one in run.ranks[0].of("scaler_step")}
    if stepped and optimizer not in stepped:
        return  # another model's losses are scaled
    for window in windows:
        scaled = False
        for event in window.events:
            if event["k"] == "scale":
                scaled = True
            elif event["k"] == "unscale" and event["opt"] in (optimizer, None):
                scaled = False
            elif (
                event["k"] == "clip"
                and scaled
                and not _is_scaled_limit(event)
                and (not event["opts"] or optimizer in event["opts"])
            ):
                yield finding(
                    "DDP308",
                    _ranks(run),
                    event["site"],
                    None,
                    f"Gradients are clipped to {event['limit']:g} while they are still multiplied by the GradScaler's "
                    f"factor"
                    + (f" (their {event['of']} is {event['norm']:.4g})." if event["norm"] is not None else "."),
                    "Call scaler.unscale_(optimizer) before the clip.",
                )
                return


def _is_scaled_limit(clip: Record) -> bool:
    """Return whether the limit of a clip is multiplied by the GradScaler's factor, too."""
    return bool(clip["scale"]) and clip["limit"] >= min(clip["scale"], 100)


def _check_thrown(run: Run, windows: list[Window], optimizer: int) -> Iterator[Finding]:
    rewrites = any(_is_rewritten(window, optimizer) for window in windows)
    for window in windows:
        if (last := _zeroed_last(window, optimizer)) is not None:
            yield finding(
                "DDP309",
                _ranks(run),
                last["site"],
                window.backwards[-1]["site"],
                f"zero_grad() runs between the last backward and step {window.step['n']}, which has no gradients left.",
                "Call zero_grad() after the step, or before the first backward.",
            )
            return
        if len(window.accumulated) < 2 or rewrites:  # which may have kept what zero_grad() throws away
            continue
        seen = 0
        for event in window.events:
            if window.is_micro_batch(event):
                seen += 1
            elif (
                event["k"] == "zero"
                and event["opt"] == optimizer
                and event["held"]
                and 0 < seen < len(window.accumulated)
            ):
                yield finding(
                    "DDP309",
                    _ranks(run),
                    event["site"],
                    window.backwards[-1]["site"],
                    f"zero_grad() runs after {seen} of the {len(window.accumulated)} backwards before step "
                    f"{window.step['n']}: the gradients of the earlier ones are thrown away.",
                    "Call zero_grad() once, after the step.",
                )
                return


def _is_rewritten(window: Window, optimizer: int) -> bool:
    """Return whether the script puts other gradients in the place of the last backward's: more than a factor.

    It does so before it reduces them by hand, if it does. A clip by value changes them, too, and says nothing.
    """
    if not window.backwards:
        return False
    last = window.backwards[-1]
    since = [one for one in window.events if one["at"] > last["at"]]
    clipped = any(one["k"] == "clip" and one["of"] != "norm" for one in since)
    then = next((one for one in since if one["k"] == "collective" and one.get("gradient")), window.step)
    earlier, later = (one.get("spreads", {}).get(str(optimizer)) for one in (last, then))
    return not clipped and None not in (earlier, later) and bool(abs(earlier - later) > _OTHER * earlier)


def _zeroed_last(window: Window, optimizer: int) -> Record | None:
    """Return the zero_grad() that leaves a step without gradients. Later steps' norms are not known."""
    zeros = [one for one in window.of("zero") if one["opt"] == optimizer and one["held"]]
    if not zeros or not window.backwards or window.step["n"] >= 10 or window.step.get("norm"):
        return None
    last = window.backwards[-1]
    return zeros[-1] if zeros[-1]["at"] > last["at"] and not last["inside"] else None


def _check_twice(run: Run, by_rank: list[list[Window]]) -> Iterator[Finding]:
    """DDP307: gradients that DDP has reduced are reduced again by hand."""
    if run.world < 2:
        return
    for step in zip(*by_rank):
        rows = [[one for one in window.of("collective") if one.get("gradient")] for window in step]
        if not rows[0] or not any(one["sync"] for one in step[0].of("forward") if one["grad"]):
            continue
        if step[0].events.index(rows[0][0]) < max(
            (i for i, e in enumerate(step[0].events) if e["k"] == "backward"), default=0
        ):
            continue
        same = all(len({one.get("digest") for one in calls}) == 1 for calls in zip(*rows))
        if not same or len({len(row) for row in rows}) > 1 or rows[0][0].get("digest") is None:
            continue
        after, before = step[0].step.get("norm"), step[0].backwards[-1].get("norm")
        ratio = after / before if after and before and not step[0].of("clip") else None
        scaled = ratio is not None and abs(ratio - 1) > 0.05
        effect = (
            f", which makes them {ratio:.3g} times as large"
            if scaled and ratio is not None
            else ", which changes nothing"
        )
        yield finding(
            "DDP307",
            _ranks(run),
            rows[0][0]["site"],
            None,
            f"{len(rows[0])} all_reduce calls before step {step[0].step['n']} reduce gradients that DDP has made equal "
            f"on all ranks already{effect}.",
            "Leave the reduction by hand out: DDP averages the gradients in the backward.",
            severity="error" if scaled else "warning",
        )
        return


def _check_world_scale(run: Run, windows: list[Window]) -> Iterator[Finding]:
    """DDP307, likely: a loss that is multiplied or divided by the world size, although DDP averages."""
    if run.world < 2 or not run.uses("ddp"):
        return
    scales = {one["scale"] for window in windows for one in window.kept}
    lengths = {len(window.kept) for window in windows}
    if len(scales) != 1 or lengths != {1} or None in scales:
        return
    scale = scales.pop()
    site = windows[0].kept[0]["site"]
    calls = [one for window in windows for one in window.of("collective") if one["name"] == "all_reduce"]
    is_reduced = any(one.get("graph") and math.prod(one["shape"]) == 1 for one in calls)  # the loss itself
    by_world = any(math.isclose(scale, other, rel_tol=1e-6) for other in (run.world, 1 / run.world))
    norms = [_norms(window) for window in windows]
    back = any(one is not None and math.isclose(scale * one[1], one[0], rel_tol=1e-3) for one in norms)  # by hand
    if by_world and not back and (is_reduced or divides_by_world(site)):
        yield finding(
            "DDP307",
            _ranks(run),
            site,
            None,
            f"The loss is {'multiplied' if scale > 1 else 'divided'} by {run.world}, the number of ranks, although DDP "
            f"averages the gradients already.",
            "Take the loss of the rank's batch as it is, unless the factor makes up for another.",
            certainty="likely",
        )


def _check_factor(run: Run, by_rank: list[list[Window]]) -> Iterator[Finding]:
    """DDP307, likely: gradients scaled by the number of ranks after DDP's average, or added up by hand alone."""
    if run.world < 2 or len(run.ranks[0].optimizers) != 1:  # the norms are those of all optimizers' gradients
        return
    steps = [step for step in zip(*by_rank) if all(_norms(window) and not window.of("scale") for window in step)]
    by_hand = [any(one.get("gradient") for one in step[0].of("collective")) for step in steps]
    if any(by_hand):
        yield from _check_sums(run, list(itertools.compress(steps, by_hand)))
    else:
        yield from _check_scaled(run, [step[0] for step in steps])


def _check_scaled(run: Run, windows: list[Window]) -> Iterator[Finding]:
    """Gradients that differ from DDP's average by the number of ranks, at every step."""
    if not windows or not all(_reductions(one) and len(one.kept) == 1 and _is_mean(one) for one in windows):
        return
    site = windows[0].step["site"]
    ratios = [later / earlier for earlier, later in filter(None, map(_norms, windows))]
    factors = (run.world, 1 / run.world)
    alike = any(all(math.isclose(factor, one, rel_tol=1e-3) for one in ratios) for factor in factors)
    if alike and divides_by_world(site):
        yield finding(
            "DDP307",
            _ranks(run),
            site,
            windows[0].backwards[-1]["site"],
            f"Between the backward and step {windows[0].step['n']} the gradients are "
            f"{'multiplied' if ratios[0] > 1 else 'divided'} by {run.world}, the number of ranks, although DDP has "
            f"averaged them already.",
            "Leave the gradients as DDP leaves them, unless the factor makes up for another.",
            certainty="likely",
        )


def _check_sums(run: Run, steps: list[tuple[Window, ...]]) -> Iterator[Finding]:
    """Sums over the ranks, by hand, that are longer than a mean can be."""
    for step in steps:
        norms = list(filter(None, map(_norms, step)))
        longest, later = max(earlier for earlier, _ in norms), norms[0][1]
        reduces = [one for one in step[0].of("collective") if one.get("gradient")]
        if (
            later > 1.02 * longest
            and not any(map(_reductions, step))
            and all(one["name"] == "all_reduce" and one["op"] == "SUM" for one in reduces)
            and all(map(_is_mean, step))
            and not divides_gradients(reduces[0]["site"])  # perhaps after a clip, or within the optimizer
            and not divides_by_world(step[0].backwards[-1]["site"])  # by a weight for each sample, say
        ):
            yield finding(
                "DDP307",
                _ranks(run),
                reduces[0]["site"],
                step[0].step["site"],
                f"The ranks' gradients are added up by hand, and not divided by their number: at step "
                f"{step[0].step['n']} the sum's norm is {later:.4g}, where a mean is at most as long as the longest of "
                f"the ranks' own, {longest:.4g}.",
                f"Divide the gradients by the number of ranks, here {run.world}, unless the learning rate makes up for "
                f"it.",
                certainty="likely",
            )
            return


def _norms(window: Window) -> tuple[float, float] | None:
    """Return the norm of the gradients after the last backward, and where they are clipped, or at the step."""
    last = window.backwards[-1].get("norm") if window.backwards else None
    clips = [one["norm"] for one in window.of("clip") if one["of"] == "norm"]
    later = clips[0] if clips else window.step.get("norm")
    if not last or later is None or not (math.isfinite(last) and math.isfinite(later)):
        return None
    return last, later


def _is_mean(window: Window) -> bool:
    """Return whether what the backwards of a window add up is the mean of its micro-batches' mean losses."""
    scales = [one["scale"] for one in window.kept]
    return _are_means(window) and None not in scales and math.isclose(sum(scales), 1, rel_tol=1e-4)


def _are_means(window: Window) -> bool:
    """Return whether all losses of a window are means over their samples."""
    return all(one["node"].startswith(MEANS) and ":sum" not in one["node"] for one in window.kept)
