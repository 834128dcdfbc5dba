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

    def differs(self, before: State) -> bool:
        """Return True if a gradient is another one than before, or was written; not where it has gone."""
        pairs = zip(self.marks, before.marks, strict=True)
        return any(new != old and new != NO_GRADIENT for new, old in pairs)


NOTHING = State(())
