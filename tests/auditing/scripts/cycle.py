"""Training by steps with a cycling loader; an evaluation every few steps; torch.stack restores the order of outputs."""

import os

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def cycle(loader, sampler):
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def auc(scores, labels):
    order = scores.argsort()
    ranks = torch.empty(len(scores))
    ranks[order] = torch.arange(1, len(scores) + 1, dtype=torch.float)
    pos = labels.sum()
    return (ranks[labels == 1].sum() - pos * (pos + 1) / 2) / (pos * (len(labels) - pos))


@torch.no_grad()
def evaluate(model, dataset, rank, world):
    model.eval()
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, 8, sampler=sampler)
    scores = torch.cat([torch.sigmoid(model(x).squeeze(1)) for x, _ in loader])
    parts = [torch.zeros_like(scores) for _ in range(world)]
    dist.all_gather(parts, scores)
    whole = torch.stack(parts, 1).reshape(-1)[: len(dataset)]
    model.train()
    return auc(whole, dataset.tensors[1])


def main(max_steps=20):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, generator=g)
    y = (x[:, 0] + 0.1 * torch.randn(100, generator=g) > 0).long()
    train, val = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:97], y[64:97])
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)))
    sampler = DistributedSampler(train)
    batches = cycle(DataLoader(train, 8, sampler=sampler), sampler)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(max_steps):
        xb, yb = next(batches)
        loss = nn.functional.binary_cross_entropy_with_logits(model(xb).squeeze(1), yb.float())
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 10 == 9:
            value = evaluate(model, val, rank, world)
            if rank == 0:
                print(f"{step} auc {value:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
