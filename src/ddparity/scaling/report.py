"""Show a report in the terminal."""

from __future__ import annotations

import dataclasses

from ..runtime.progress import show_grid, show_table
from .bench import RANKS, WANTED, Forecast, Report
from .measure import Stages
from .model import Scaled, one_process_s

STAGES = {  # of a step, in words, and the letter of its bar
    "load_s": "loading",
    "forward_s": "forward",
    "backward_s": "backward",
    "reduce_s": "collectives",
    "waiting_s": "waiting for others",
    "update_s": "optimizer",
    "between_s": "between",
}
_BAR = 60  # characters
_FILLS = "░▒█▓·▪ "


def show(report: Report) -> None:
    """Print the tables and what limits the step."""
    found = report.measured
    ranks = len(found.shares)
    one = one_process_s(found.work, found.work.micro_batches)
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("micro-batches of a step", f"{sum(found.shares)}: {', '.join(map(str, found.shares))} a rank"),
        ("one process alone", f"{_ms(one)} a step, {_ms(found.work.alone_s)} a micro-batch"),
    ]
    for variant in found.steps_s:
        step = found.median_s(variant)
        loaded = step + (0 if found.work.workers else max(found.shares) * found.work.load_s)
        said = (
            f"{_ms(step)} a step without loading, {report.sent_bytes(variant) / 1e3:,.0f} kB sent by a rank; speed-up"
        )
        rows.append((variant, f"{said} {one / loaded:.2f}"))
    rows += [(variant, f"not measured: {why}") for variant, why in found.refused.items()]
    rows.append(("collectives behind the backward", f"{100 * report.fit.hidden:.0f} % of their work costs no time"))
    rows.append(("what limits a step here", limit_here(report)))
    show_table(f"{report.title} on {ranks} processes ({found.device})", rows)
    head = ["rank", *(f"{name}, ms" for name in STAGES.values()), "step, ms"]
    show_grid(
        "Where a step's time goes (fast)",
        head,
        [
            [str(rank), *(f"{1e3 * value:.2f}" for value in dataclasses.astuple(one)), f"{1e3 * one.total_s:.2f}"]
            for rank, one in enumerate(found.stages)
        ],
    )
    longest = max(one.total_s for one in found.stages)
    for rank, one_rank in enumerate(found.stages):
        print(f"rank {rank} {_bar(one_rank, longest)}")
    print("       " + ", ".join(f"{fill} {name}" for fill, name in zip(_FILLS, STAGES.values(), strict=True)) + "\n")
    sizes = [
        [kind, f"{sent:,.0f}", f"{1e3 * seconds:.3f}", f"{sent / seconds / 1e6:,.0f}"]
        for kind, pairs in found.collectives.items()
        for sent, seconds in pairs
    ]
    show_grid("Collectives", ["kind", "bytes that a rank sends", "ms", "MB/s"], sizes)
    for forecast in report.forecasts:
        _show_forecast(forecast, report)


def _show_forecast(forecast: Forecast, report: Report) -> None:
    over = f"over {forecast.link.name}: speed-up (efficiency)"
    variants = list(forecast.grown)
    rows = []
    for number, ranks in enumerate(RANKS):
        row = [f"{ranks:,}", *(_scaled(forecast.grown[one][number]) for one in variants)]
        rows.append([*row, limit_of(forecast.grown["fast"][number]) if ranks > 1 else ""])
    show_grid(f"{report.each} micro-batches a rank, {over}", ["ranks", *variants, "limit (fast)"], rows)
    for variant, most in forecast.most.items():
        print(f"{variant}: {said_of(most)}")
    rows = [
        [f"{first.prediction.ranks:,}", *(_scaled(forecast.same[one][number]) for one in variants)]
        for number, first in enumerate(forecast.same["fast"])
    ]
    print()
    show_grid(
        f"The Task's {report.measured.work.micro_batches} micro-batches shared, {over}", ["ranks", *variants], rows
    )


def said_of(most: int) -> str:
    """Return up to how many ranks the efficiency is good enough."""
    if most == 1:
        return f"less than {100 * WANTED:.0f} % efficiency on any number of ranks"
    return f"{100 * WANTED:.0f} % efficiency up to {most:,} ranks{' or more' * (most == RANKS[-1])}"


def limit_here(report: Report) -> str:
    """Return what takes most of a measured step beside the forward, the backward and the optimizer."""
    slowest = max(report.measured.stages, key=lambda one: one.total_s)
    useful = slowest.forward_s + slowest.backward_s + slowest.update_s
    others = {
        name: getattr(slowest, field)
        for field, name in STAGES.items()
        if field not in ("forward_s", "backward_s", "update_s")
    }
    name = max(others, key=lambda one: others[one])
    share, rest = useful / slowest.total_s, others[name] / slowest.total_s
    if share >= 0.95:
        return f"computing, {100 * share:.0f} % of the step"
    return f"{name}, {100 * rest:.0f} % of the step; computing is {100 * share:.0f} %"


def limit_of(scaled: Scaled) -> str:
    """Return what a predicted step loses most to other ranks by, and how much of the step it is."""
    losses = {**scaled.prediction.losses(), "loading": scaled.prediction.load_s}
    name = max(losses, key=lambda one: losses[one])
    part = losses[name] / scaled.prediction.step_s
    return f"{name} {100 * part:.0f} %" if part >= 0.005 else "nothing"


def _scaled(one: Scaled) -> str:
    digits = 0 if one.speed_up >= 100 else 1 if one.speed_up >= 10 else 2
    return f"{one.speed_up:,.{digits}f} ({100 * one.efficiency:.0f} %)"


def _bar(one: Stages, longest: float) -> str:
    """Return the stages as characters; `longest`: the seconds of a whole bar."""
    shown, end, text = 0.0, 0, ""
    for fill, value in zip(_FILLS, dataclasses.astuple(one), strict=True):
        shown += value
        upto = round(_BAR * shown / longest)
        text, end = text + fill * (upto - end), upto
    return text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
