"""Test how the ranks' copies of a tensor are exchanged."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from ddparity.comm.allreduce import SHORT_BYTES, copies_of_ranks
from tests.ranks import run_ranks

SHORT, LONG = SHORT_BYTES, SHORT_BYTES + 8  # bytes


def _of(rank: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
    values = torch.arange(numel)
    return (values % 4 == rank if dtype == torch.bool else (values + rank) % 5).to(dtype)


def _copies(dtype: torch.dtype) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ends = dist.new_group([0, ranks - 1])
    for numel in (0, 1, 37, SHORT // dtype.itemsize, LONG // dtype.itemsize):
        everyones = torch.stack([_of(each, dtype, numel) for each in range(ranks)])
        assert torch.equal(copies_of_ranks(everyones[rank]), everyones)
        strided = everyones[rank].repeat(2).view(2, numel).t()
        assert torch.equal(copies_of_ranks(strided)[:, :, 0], everyones)
        if numel:
            assert torch.equal(copies_of_ranks(everyones[rank][0]), everyones[:, 0])
        if rank in (0, ranks - 1):
            assert torch.equal(copies_of_ranks(everyones[rank], ends), everyones[[0, -1]])
    images = _of(rank, dtype, 2 * 3 * 4 * 4).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for each, copy in enumerate(copies_of_ranks(images)):
        assert torch.equal(copy.flatten(), _of(each, dtype, 2 * 3 * 4 * 4))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
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


def _compared() -> str:
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    group = dist.new_group()
    copies_of_ranks(torch.ones(4), group)
    with pytest.raises(RuntimeError) as caught:
        copies_of_ranks(torch.ones(4 + dist.get_rank()), group)
    return str(caught.value)


def test_torchs_own_comparison_of_calls_sees_their_sizes() -> None:
    for said in run_ranks(_compared, 2):
        assert "Detected mismatch between collectives" in said and "TensorShape=[5]" in said
