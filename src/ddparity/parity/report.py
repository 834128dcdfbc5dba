"""Show a comparison as a table and as a plot."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from ..runtime.progress import show_grid
from ..task.curves import pyplot_of_matplotlib
from .comparison import CheckedStep, Comparison, Curve, Difference


def show(comparison: Comparison, title: str) -> None:
    """Print the table of checked steps, the fingerprints and the verdict to standard output."""
    if comparison.checked:
        strict = comparison.reduction == "strict"
        kinds = ("weights", "gradient norm", "loss")
        head = ["step", *(kinds if strict else (f"{kind} (tolerated)" for kind in kinds)), "samples"]
        show_grid(f"{title}: largest relative differences from one process", head, _rows(comparison, strict))
    rows = [[str(number), value] for number, value in sorted(comparison.fingerprints.items())]
    head, when = ["processes", "fingerprint"], f"after {comparison.steps} steps"
    if comparison.ends:
        strict, when = comparison.reduction == "strict", "at the end"
        head.append("weights" if strict else "weights (tolerated)")
        ends = {1: "", **{number: _cell([one], strict) for number, one in comparison.ends.items()}}
        rows = [[number, value, ends[int(number)]] for number, value in rows]
    show_grid(f"{title}: {when}", head, rows)
    print(comparison.verdict(), flush=True)


def _rows(comparison: Comparison, strict: bool) -> list[list[str]]:
    """Return a row for each checked step, with the largest difference of all numbers of processes.

    Successive steps with the same cells are one row.
    """
    lines = [
        (step, _cells(list(found), strict))
        for step, found in itertools.groupby(comparison.checked, key=lambda one: one.step)
    ]
    rows = []
    for cells, same in itertools.groupby(lines, key=lambda line: line[1]):
        steps = [step for step, _ in same]
        rows.append([f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0]), *cells])
    return rows


def _cells(found: list[CheckedStep], strict: bool) -> list[str]:
    kinds = ([one.weights for one in found], [one.gradient_norm for one in found], [one.loss for one in found])
    return [*(_cell(kind, strict) for kind in kinds), "equal" if all(one.samples for one in found) else "differ"]


def _cell(found: list[Difference], strict: bool) -> str:
    worst = max(
        found, key=lambda one: (one.value > one.tolerance, one.value / one.tolerance if one.tolerance else one.value)
    )
    value = f"{worst.value:.1e}" if worst.value else "0"
    return value if strict else f"{value} ({worst.tolerance:.1e})"


def plot(comparison: Comparison, path: Path, title: str) -> None:
    """Draw the differences of weights and the noise of rounding, and write the plot to `path`.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    pyplot = pyplot_of_matplotlib()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes, comparison)
    axes.set_title(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


_COLOURS = ("tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:olive", "tab:cyan")


def draw(axes: Any, comparison: Comparison) -> None:
    """Draw into a matplotlib Axes: a curve for each run, grey for noise, and a dashed line for the tolerance."""
    noise = [curve for curve in comparison.curves if curve.kind == "noise"]
    floor = _floor(comparison.curves)
    for number, curve in enumerate(noise):
        label = f"sums permuted, one process ({len(noise)} runs)" if not number else None
        axes.plot(curve.steps, _drawable(curve, floor), color="0.6", linewidth=1, label=label)
    for number, curve in enumerate(one for one in comparison.curves if one.kind == "tolerance"):
        label = f"tolerated: {comparison.factor:.0f} times the noise" if not number else None
        axes.plot(curve.steps, _drawable(curve, floor), color="tab:red", linestyle="--", label=label)
    runs = [one for one in comparison.curves if one.kind == "processes"]
    for curve, colour in zip(runs, itertools.cycle(_COLOURS)):
        axes.plot(curve.steps, _drawable(curve, floor), color=colour, marker=".", label=f"{curve.processes} processes")
    steps = sorted({divergence.step for divergence in comparison.divergences})
    for number, step in enumerate(steps):
        axes.axvline(step, color="tab:red", linewidth=1, label="runs diverge" if not number else None)
    axes.set_yscale("log")
    axes.set_xscale("log" if comparison.steps > 50 else "linear")
    axes.set_xlabel("step")
    axes.set_ylabel("largest relative difference of weights")
    axes.grid(alpha=0.3)
    if runs or noise:
        axes.legend(fontsize="small")


def _floor(curves: tuple[Curve, ...]) -> float:
    """Return the value to draw for 0, which has no place on a logarithmic axis."""
    return min((value for curve in curves for value in curve.values if value > 0), default=1e-8) / 2


def _drawable(curve: Curve, floor: float) -> list[float]:
    return [value if 0 < value < float("inf") else floor if value == 0 else float("nan") for value in curve.values]
