"""ZeroRedundancyOptimizer, a transformer, torch.compile with the eager backend, gathers by all_gather_into_tensor."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        h = self.n1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.n2(x))


class Net(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.inp = nn.Linear(6, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.out = nn.Linear(d, 1)

    def forward(self, x):
        x = self.inp(x)
        for b in self.blocks:
            x = b(x)
        return self.out(x.mean(1)).squeeze(-1)


def predict_all(model, dataset, rank, world):
    model.eval()
    per = -(-len(dataset) // world)
    out = torch.zeros(per)
    where = list(range(rank * per, min(len(dataset), (rank + 1) * per)))
    loader = DataLoader(dataset, batch_size=8, sampler=where)
    got = []
    with torch.inference_mode():
        for x, _ in loader:
            got.append(model(x))
    got = torch.cat(got)
    out[: len(got)] = got
    whole = torch.empty(per * world)
    dist.all_gather_into_tensor(whole, out)
    return whole[: len(dataset)]


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(160, 5, 6, generator=g)
    y = x.mean((1, 2))
    train, test = TensorDataset(x[:128], y[:128]), TensorDataset(x[128:157], y[128:157])
    torch.manual_seed(0)
    model = DDP(Net())
    opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=1e-3)
    sampler = DistributedSampler(train, seed=9)
    loader = DataLoader(train, batch_size=8, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        model.train()
        for xb, yb in loader:
            opt.zero_grad()
            nn.functional.huber_loss(model(xb), yb).backward()
            opt.step()
        p = predict_all(model, test, rank, world)
        err = (p - test.tensors[1]).abs().mean()
        if rank == 0:
            print(f"epoch {epoch} mae {err:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
