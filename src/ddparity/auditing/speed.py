"""Look at what costs time alone: DDP701, DDP703 and DDP704."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .catalogue import Finding, finding
from .records import Run


def check_speed(run: Run) -> Iterator[Finding]:
    """Find work that a training does without need."""
    ranks = [rank.rank for rank in run.ranks]
    if run.world > 1:
        yield from _check_ddp(run, ranks)
    site = _reads_in_loop(run.script) if run.uses("backward") else None
    if site is not None:
        yield finding(
            "DDP704",
            ranks,
            site,
            None,
            "A loop with a backward calls .item(), .cpu() or float() of a loss in each turn: on an accelerator each "
            "call waits for all work.",
            "Add up on the device, and read the value now and then.",
        )


def _check_ddp(run: Run, ranks: list[int]) -> Iterator[Finding]:
    rank = run.ranks[0]
    constant = {(one["ddp"], name) for one in rank.of("large") for name in one["same"]}
    for ddp in rank.of("ddp"):
        steps = 0
        used = True
        for optimizer in rank.optimizers:
            parameters = rank.parameters(optimizer["id"])
            own = [j for j, row in enumerate(parameters) if row[0] == ddp["id"] and not row[2]]
            for window in rank.windows(optimizer["id"]) if own else []:
                if window.step.get("grads") is not None:
                    steps += 1
                    used = used and all(window.step["grads"][j] is not None for j in own)
        if ddp["unused"] and used and steps >= 2:
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


def _reads_in_loop(script: Path) -> str | None:
    """Return the line of a .item() in the innermost loop that has a backward."""
    try:
        tree = ast.parse(script.read_text())
    except (OSError, SyntaxError, ValueError):
        return None
    for loop in ast.walk(tree):
        if not isinstance(loop, (ast.For, ast.While)):
            continue
        calls = [n for n in ast.walk(loop) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        inner = [n for n in ast.walk(loop) if isinstance(n, (ast.For, ast.While)) and n is not loop]
        deeper = {id(n) for one in inner for n in ast.walk(one)}
        own = [n for n in calls if id(n) not in deeper]
        if any(n.func.attr == "backward" for n in own if isinstance(n.func, ast.Attribute)):
            for n in own:
                if isinstance(n.func, ast.Attribute) and n.func.attr == "item":
                    return f"{script.resolve()}:{n.lineno}"
    return None
