"""Read a loss off the nodes of autograd: its constant factor, what it is a mean of, and over how many units."""

from __future__ import annotations

import math
from typing import Any

from .private import private

_SUMS = ("AddBackward0", "SubBackward0")
_LINEAR = (
    *_SUMS,
    "MulBackward0",
    "MulBackward1",
    "DivBackward0",
    "NegBackward0",
    "ToCopyBackward0",
    "ViewBackward0",
    "SqueezeBackward0",
)
# Nodes of losses that are means over their samples.
MEANS = ("NllLoss", "Mean", "MseLoss", "BinaryCrossEntropy", "L1Loss", "SmoothL1", "HuberLoss", "KlDiv")


def factors_of(loss: Any, scaler: float | None) -> tuple[list[float] | None, str, float | None]:
    """Return a loss's constant factors, the node of autograd below them, and its mean's units where torch keeps them.

    They are read off the multiplications and divisions by constants that end the graph. None: by another tensor.
    """
    saved = private().saved
    node, factors = loss.grad_fn, []
    for _ in range(8):
        if node is None:
            break
        name = node.name()
        if name not in ("MulBackward0", "DivBackward0"):
            break
        other = saved(node, "other")
        if name == "MulBackward0" and other is None:
            other = saved(node, "self")
        below = [one for one, _ in node.next_functions if one is not None]
        if len(below) != 1 or other is None or other.numel() != 1:
            return None, name, None
        value = float(other)
        if name == "MulBackward0" and scaler is not None and value == scaler:
            value, scaler = 1.0, None
        if name == "DivBackward0":
            value = 1 / value if value else math.nan
        if value != 1:
            factors.append(value)
        node = below[0]
    units = None
    name = _name_of(node)
    if name.startswith("NllLoss") and saved(node, "reduction") in (1, 2) and saved(node, "weight") is None:
        units = float(saved(node, "total_weight"))
    return factors, name, units


def _name_of(node: Any, depth: int = 6) -> str:
    """Return the name of a node of autograd; of a weighted sum of means, that of one of them."""
    if node is None:
        return ""
    saved = private().saved
    name = str(node.name())
    if saved(node, "reduction", 1) != 1:
        return f"{name}:sum"
    if depth and name in _LINEAR:
        below = [one for one, _ in node.next_functions if one is not None]
        factors = [saved(node, key) for key in ("self", "other")]
        if all(getattr(one, "numel", lambda: 1)() == 1 for one in factors):
            names = [_name_of(one, depth - 1) for one in below]
            if any(one.name() == "MulBackward1" for one in below) and any(n.startswith("NllLoss") for n in names):
                return "NllLoss"  # with label smoothing
            others = [one for one in names if ":sum" in one or not one.startswith(MEANS)]
            if names and (name in _SUMS or len(names) == 1):
                return others[0] if others else names[0]
    return name
