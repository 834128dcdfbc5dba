"""BasicSR: an enlarged sampler, a prefetcher, generator and discriminator, EMA, iterations, seeds by rank."""

import math
import random
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


class EnlargedSampler(torch.utils.data.Sampler):
    def __init__(self, dataset, num_replicas, rank, ratio=1):
        self.dataset, self.num_replicas, self.rank, self.epoch = dataset, num_replicas, rank, 0
        self.num_samples = math.ceil(len(dataset) * ratio / num_replicas)
        self.total_size = self.num_samples * num_replicas

    def __iter__(self):
        g = torch.Generator()
        g.manual_seed(self.epoch)
        indices = torch.randperm(self.total_size, generator=g).tolist()
        indices = [v % len(self.dataset) for v in indices]
        return iter(indices[self.rank : self.total_size : self.num_replicas])

    def __len__(self):
        return self.num_samples

    def set_epoch(self, epoch):
        self.epoch = epoch


class DS(torch.utils.data.Dataset):
    def __init__(self):
        self.x = np.random.RandomState(0).rand(24, 8).astype("float32")

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = torch.from_numpy(self.x[i])
        k = random.randint(0, 3)
        if np.random.rand() < 0.5:
            x = x.flip(0)
        return {"lq": x[k : k + 4], "gt": x[k : k + 4] * 2}


class CPUPrefetcher:
    def __init__(self, loader):
        self.ori_loader = loader
        self.loader = iter(loader)

    def next(self):
        try:
            return next(self.loader)
        except StopIteration:
            return None

    def reset(self):
        self.loader = iter(self.ori_loader)


def winit(i, n, rank, seed):
    s = n * rank + i + seed
    np.random.seed(s)
    random.seed(s)


def main():
    import functools

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(10 + rank)
    np.random.seed(10 + rank)
    random.seed(10 + rank)
    ds = DS()
    sampler = EnlargedSampler(ds, world, rank, 4)
    loader = torch.utils.data.DataLoader(
        ds,
        batch_size=4,
        shuffle=False,
        sampler=sampler,
        num_workers=1,
        drop_last=True,
        worker_init_fn=functools.partial(winit, n=1, rank=rank, seed=10),
    )
    pre = CPUPrefetcher(loader)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    disc = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    ema = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    ema.load_state_dict(net.module.state_dict())
    ema.eval()
    og, od = torch.optim.Adam(net.parameters(), 1e-3), torch.optim.Adam(disc.parameters(), 1e-3)
    it = 0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        pre.reset()
        data = pre.next()
        while data is not None:
            it += 1
            for p in disc.parameters():
                p.requires_grad = False
            og.zero_grad()
            out = net(data["lq"])
            l = nn.functional.l1_loss(out, data["gt"]) + 0.1 * nn.functional.softplus(-disc(out)).mean()
            l.backward()
            og.step()
            for p in disc.parameters():
                p.requires_grad = True
            od.zero_grad()
            a = nn.functional.softplus(-disc(data["gt"])).mean()
            a.backward()
            b = nn.functional.softplus(disc(out.detach().clone())).mean()
            b.backward()
            od.step()
            with torch.no_grad():
                for p, q in zip(ema.parameters(), net.module.parameters()):
                    p.data.mul_(0.9).add_(q.data, alpha=0.1)
            d = torch.stack([l.detach(), a.detach(), b.detach()])
            dist.reduce(d, dst=0)
            if rank == 0 and it % 4 == 0:
                d /= world
                print(d.tolist())
            data = pre.next()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
