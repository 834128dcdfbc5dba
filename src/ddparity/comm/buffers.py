"""Memory that the reductions of a model use again in each step."""

from __future__ import annotations

import torch

from ..compat import is_unused

LEAST_BYTES = 2**17  # malloc keeps smaller memory by itself
STEPS = 3  # after so many without a use, memory is given back


class Buffers:
    """Tensors of megabytes, kept between steps, as DDP keeps its buckets.

    Their memory may become a user's gradients: it is used again only once nobody has it, in Python or in C++.
    The system gives a new one page by page, 4 kB at a time, which takes longer than to fill it (benchmarks/sizes.py).
    Only on the CPU: accelerators keep memory by themselves.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, int]] = []  # and in which step each was taken last
        self._step = 0

    def take(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """Return so many elements, not set, of the dtype and on the device of `like`.

        Nobody else uses their memory, nor will while this tensor lives, or a view of it.
        """
        if not like.is_cpu or size * like.element_size() < LEAST_BYTES:
            return like.new_empty(size)
        with torch.inference_mode(False):  # a later step may write into it outside of that mode
            for number, (tensor, _) in enumerate(self._kept):
                if tensor.numel() == size and tensor.dtype == like.dtype and is_unused(tensor):
                    del self._kept[number]
                    break
            else:
                tensor = like.new_empty(size)
            self._kept.append((tensor, self._step))
            return tensor.data  # with a count of versions of its own

    def next_step(self) -> None:
        """Give back what has not been taken for some steps."""
        self._step += 1
        self._kept = [(tensor, last) for tensor, last in self._kept if self._step - last <= STEPS]
