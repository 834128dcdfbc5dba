"""A contiguous share of a data set, for users' own loaders."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch.utils.data import Sampler

from .plan import checked_integer, share


class ShardSampler(Sampler[int]):
    """This rank's contiguous share of range(num_samples), in order, without padding; sizes differ by at most one.

    Args:
        num_samples: 0 or more.
        rank, world_size: None: those of the default process group, or a world of one.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> [list(ShardSampler(5, rank, 2)) for rank in (0, 1)]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(self, num_samples: int, rank: int | None = None, world_size: int | None = None) -> None:
        count = checked_integer(num_samples, "num_samples")
        if count < 0:
            raise ValueError(f"ShardSampler(num_samples={num_samples}): must be at least 0")
        joined = dist.is_available() and dist.is_initialized()
        if rank is None:
            rank = dist.get_rank() if joined else 0
        if world_size is None:
            world_size = dist.get_world_size() if joined else 1
        self.indices = share(count, rank, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
