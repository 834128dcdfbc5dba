"""Contrastive learning: embeddings of all ranks are gathered with gradients; two views from the collate function."""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dnn
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return F.normalize(self.projector(self.backbone(x)), dim=-1)


def two_views(rows):
    x = torch.stack([r[0] for r in rows])
    return x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)


def nt_xent(a, b, temperature=0.5):
    world = dist.get_world_size()
    a_all = torch.cat(dnn.all_gather(a))
    b_all = torch.cat(dnn.all_gather(b))
    labels = torch.arange(len(a)) + dist.get_rank() * len(a)
    la = a @ b_all.t() / temperature
    lb = b @ a_all.t() / temperature
    return (F.cross_entropy(la, labels) + F.cross_entropy(lb, labels)) / 2


def train(args_epochs=2):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(128, 16))
    model = nn.parallel.DistributedDataParallel(Encoder())
    torch.manual_seed(100 * (rank + 1))
    sampler = DistributedSampler(data, shuffle=True, drop_last=True)
    loader = DataLoader(data, batch_size=16, sampler=sampler, collate_fn=two_views, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch in range(args_epochs):
        sampler.set_epoch(epoch)
        total = 0.0
        for v1, v2 in loader:
            z = model(torch.cat([v1, v2]))
            a, b = z.chunk(2)
            loss = nt_xent(a, b)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.reduce(total, dst=0)
        if rank == 0:
            print("epoch", epoch, "loss", float(total) / len(loader) / dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    train()
