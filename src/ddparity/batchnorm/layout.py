"""The memory layout of an input. The kernels read a dense input in its own layout, also in channels-last."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Return the input if it is planes (N, C, ...) or rows (N, ..., C) without gaps, otherwise a copy in planes."""
    return x if x.is_contiguous() or is_rows(x) else x.contiguous()


def dense_like(dy: Tensor, x: Tensor) -> Tensor:
    """Return the gradient in the layout of x, which is dense. It is a copy if the gradient has another layout."""
    if dy.stride() == x.stride() or (dy.is_contiguous() and x.is_contiguous()):
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def is_rows(x: Tensor) -> bool:
    """Return True if the channels of one position are next to each other in memory, and positions have no gaps."""
    return x.movedim(1, -1).is_contiguous()


def has_planes(x: Tensor) -> bool:
    """Return True if a dense input is planes (N, C, M), and False if it is rows."""
    return x.dim() > 2 and x.is_contiguous()


def sizes(x: Tensor) -> tuple[int, int, int]:
    """Return (N, C, M) for a dense input of planes, and (rows, C, 1) for one of rows."""
    channels, elements = x.size(1), x.numel()
    if elements and has_planes(x):
        batch = x.size(0)
        return batch, channels, elements // (batch * channels)
    return elements // channels, channels, 1


def reduced_dims(x: Tensor) -> list[int]:
    """Return all dimensions of x except the channel dimension."""
    return [dim for dim in range(x.dim()) if dim != 1]


def over(values: Tensor, x: Tensor) -> Tensor:
    """Return a view of one value for each channel that broadcasts over x."""
    return values.view([1, -1] + [1] * (x.dim() - 2))
