"""Whether all ranks predict with the same model: a short text that ranks compare, and what to say where it differs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..gradients.replicate import unwrapped
from .storage import check_words, parts

_DIGITS = 8  # of a word of 32 bits, in hex

_PARAMETERS = (
    "load the same checkpoint on every rank, seed them alike before the model is made (seed_everything), or send rank "
    "0's parameters to all by wrapping it (replicate, or torch's DistributedDataParallel)"
)
_BUFFERS = (
    "in a training with torch's DistributedDataParallel each rank's buffers, as the running statistics of a batch "
    "norm, follow its own batches, and rank 0's reach the others only with the next forward in training. Use "
    "convert_sync_batchnorm(model), or run the steps in accumulate(), which exchanges running statistics; or send rank "
    "0's before predict(): for buffer in model.buffers(): torch.distributed.broadcast(buffer, 0)"
)


class Replica:
    """What this rank's model holds: its parameters, and those buffers that a checkpoint has.

    What may differ is left out: buffers that are not saved, as a cache; shards of a distributed tensor; whatever a
    model that is a function uses.

    `text`: 8 characters for each tensor; None for a function.
    """

    def __init__(self, model: Any) -> None:
        self._names: list[str] = []
        self.text: str | None = None
        if isinstance(model, nn.Module):
            with torch.no_grad():
                self.text = self._checked(unwrapped(model))

    def _checked(self, module: nn.Module) -> str:
        held, headers = [], []
        for name, tensor in _kept(module):
            memory = parts(tensor)
            if memory is not None:
                held.append(memory)
                headers.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.layout}")
                self._names.append(name)
        return "".join(f"{word:0{_DIGITS}x}" for word in check_words(held, headers))

    def difference(self, theirs: str | None) -> str:
        """What to say where another rank's text is not this one's."""
        if self.text is None or theirs is None:
            return "predict() got a module on one rank and a function on another: give the same model on every rank"
        words = zip_longest(_words(self.text), _words(theirs))
        first = next(number for number, (ours, other) in enumerate(words) if ours != other)
        name = self._names[first] if first < len(self._names) else "one that this rank does not have"
        return (
            f"predict() got models that differ between ranks, so that outputs would depend on the number of processes. "
            f"The first difference is in the {name}: {_BUFFERS if name.startswith('buffer') else _PARAMETERS}"
        )


def _kept(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((f"parameter {name!r}", parameter) for name, parameter in module.named_parameters())
    not_saved = {
        f"{path}.{name}" if path else name
        for path, one in module.named_modules()
        for name in one._non_persistent_buffers_set
    }
    yield from ((f"buffer {name!r}", buffer) for name, buffer in module.named_buffers() if name not in not_saved)


def _words(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]
