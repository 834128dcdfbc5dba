"""In the way of DINO: student and teacher, crops, centre reduced by hand, cosine momentum, weight decay schedule."""

import json
import math
import os
import random
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


class Crops:
    def __call__(self, x):
        return [x + 0.1 * torch.randn(8) for _ in range(4)]


class DS(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.arange(64 * 8).float().reshape(64, 8) / 512
        self.t = Crops()

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.t(self.x[i]), i % 4


class Loss(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("center", torch.zeros(1, dim))

    def forward(self, s, t, n):
        so = (s / 0.1).chunk(n)
        to = torch.softmax((t - self.center) / 0.04, -1).detach().chunk(2)
        total, k = 0, 0
        for i, q in enumerate(to):
            for v in range(len(so)):
                if v == i:
                    continue
                total = total + torch.sum(-q * torch.log_softmax(so[v], -1), -1).mean()
                k += 1
        self.update_center(t)
        return total / k

    @torch.no_grad()
    def update_center(self, t):
        c = t.sum(0, keepdim=True)
        dist.all_reduce(c)
        c = c / (len(t) * dist.get_world_size())
        self.center = self.center * 0.9 + c * 0.1


def fix_random_seeds(seed=31):
    torch.manual_seed(seed)
    np.random.seed(seed)


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    fix_random_seeds(0)
    ds = DS()
    sampler = torch.utils.data.DistributedSampler(ds, shuffle=True)
    loader = torch.utils.data.DataLoader(ds, sampler=sampler, batch_size=8, num_workers=0, drop_last=True)
    student = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12))
    teacher = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12))
    student = nn.parallel.DistributedDataParallel(student)
    teacher.load_state_dict(student.module.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    torch.manual_seed(rank)
    crit = Loss(12)
    opt = torch.optim.AdamW(student.parameters())
    sched = np.linspace(1e-3, 1e-4, 100)
    it = 0
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, _ in loader:
            for g in opt.param_groups:
                g["lr"] = sched[it]
            t = teacher(torch.cat(images[:2]))
            s = student(torch.cat(images))
            loss = crit(s, t, 4)
            if not math.isfinite(loss.item()):
                sys.exit(1)
            opt.zero_grad()
            loss.backward()
            norms = [p.grad.norm().item() for p in student.parameters()]
            for p in student.parameters():
                coef = 3.0 / (p.grad.norm() + 1e-6)
                if coef < 1:
                    p.grad.mul_(coef)
            opt.step()
            with torch.no_grad():
                for q, k in zip(student.module.parameters(), teacher.parameters()):
                    k.data.mul_(0.99).add_(0.01 * q.detach().data)
            it += 1
        t = torch.tensor([loss.item(), 1.0], dtype=torch.float64)
        dist.barrier()
        dist.all_reduce(t)
        if rank == 0:
            print("Averaged stats", t[0] / t[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
