"""Whether gradients have changed, without a look at their values."""

from __future__ import annotations

from collections.abc import Iterable

import torch

NO_GRADIENT = (0, -1)


class State:
    """What changes when gradients do: which tensors they are, and how often they were written.

    It keeps the gradients alive, so that a new one cannot have the identity of one that is gone.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._gradients = [parameter.grad for parameter in parameters]
        self.marks = [NO_GRADIENT if one is None else (id(one), one._version) for one in self._gradients]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if two tensors of one shape and dtype have the same bits, NaN's, too."""
    return torch.equal(as_integers(a), as_integers(b))


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits as integers."""
    value = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.contiguous().view(width)
