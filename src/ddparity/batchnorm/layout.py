"""How an input lies in memory. Passes read it as it lies, channels-last included, where it is dense."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """The input itself where it is planes (N, C, ...) or rows (N, ..., C) without gaps; otherwise a copy in planes."""
    return x if x.is_contiguous() or is_rows(x) else x.contiguous()


def dense_like(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient in the layout of x, which is dense; a copy where it lies otherwise."""
    if dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous()):
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def is_rows(x: Tensor) -> bool:
    """Whether the channels of one position lie together, and positions follow one another."""
    return x.movedim(1, -1).is_contiguous()


def has_planes(x: Tensor) -> bool:
    """Whether a dense input is planes (N, C, M) rather than rows."""
    return x.dim() > 2 and x.is_contiguous()


def sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, M) of planes, or (rows, C, 1) of a dense input."""
    channels, elements = x.size(1), x.numel()
    if elements and has_planes(x):
        batch = x.size(0)
        return batch, channels, elements // (batch * channels)
    return elements // channels, channels, 1


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


def over(values: Tensor, x: Tensor) -> Tensor:
    """Values a channel, to be broadcast over x."""
    return values.view([1, -1] + [1] * (x.dim() - 2))
