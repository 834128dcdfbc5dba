"""Which passes over memory a tensor takes: the compiled ones where they can, else torch's own operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import fused, stock


def passes_for(x: Tensor, *others: Tensor | None) -> Any:
    """The module with the functions that `stock` describes, for this input and these tensors with it."""
    return fused if fused.handles(x, *others) else stock
