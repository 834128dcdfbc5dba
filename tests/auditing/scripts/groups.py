"""Four ranks: two models, each trained by a group of two (an ensemble), and a mean over all ranks."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    member = rank // 2
    group = groups[member]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 8, generator=g)
    data = TensorDataset(x, x.sum(1).gt(0).float())
    torch.manual_seed(member)
    model = DDP(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), process_group=group)
    sampler = DistributedSampler(data, num_replicas=2, rank=rank % 2, shuffle=True, seed=member)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    opt = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for xb, yb in loader:
            opt.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(xb).squeeze(1), yb)
            loss.backward()
            opt.step()
        last = loss.detach().clone()
        dist.all_reduce(last)
        if rank == 0:
            print(f"epoch {epoch}: {last.item() / 4:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
