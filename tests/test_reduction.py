"""How small tensors are exchanged."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from ddparity.reduction import SHORT_BYTES, copies_of_ranks
from tests.ranks import run_ranks

SHORT, LONG = 37, SHORT_BYTES + 1  # bytes


def _of(rank: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
    return torch.arange(numel).add(rank).remainder(5 if dtype != torch.bool else 2).to(dtype)


def _copies(dtype: torch.dtype) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sub = dist.new_group([ranks - 1, 0])
    for bytes_of_own in (SHORT, LONG):
        numel = -(-bytes_of_own // dtype.itemsize)
        everyones = torch.stack([_of(each, dtype, numel) for each in range(ranks)])
        assert torch.equal(copies_of_ranks(everyones[rank]), everyones)
        assert torch.equal(copies_of_ranks(everyones[rank][0]), everyones[:, 0])
        strided = everyones[rank].repeat(2).view(2, -1).t()
        assert torch.equal(copies_of_ranks(strided)[:, :, 0], everyones)
        if rank in (0, ranks - 1):
            assert torch.equal(copies_of_ranks(everyones[rank], sub), everyones[dist.get_process_group_ranks(sub)])


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_rank_gets_every_ranks_tensor(dtype: torch.dtype, world_size: int) -> None:
    run_ranks(_copies, world_size, dtype)


def _watched(bytes_of_own: int) -> dict[str, int]:
    tensor = torch.full((bytes_of_own,), dist.get_rank(), dtype=torch.uint8)
    with CommDebugMode() as mode:
        copies = copies_of_ranks(tensor)
    assert copies[:, 0].tolist() == [0, 1]
    return {str(operator).removeprefix("c10d."): count for operator, count in mode.get_comm_counts().items()}


def test_torchs_own_counter_of_collectives_sees_them() -> None:
    assert run_ranks(_watched, 2, SHORT) == [{"alltoall_base_": 1}] * 2
    assert run_ranks(_watched, 2, LONG) == [{"_allgather_base_": 1}] * 2
