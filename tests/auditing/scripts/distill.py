"""Distillation: a frozen teacher from one checkpoint, a student in DDP, metrics by torchmetrics, KL + CE."""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split


def mlp(h):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, h), nn.ReLU(), nn.Dropout(0.1), nn.Linear(h, 3))


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--alpha", type=float, default=0.5)
    p.add_argument("--T", type=float, default=2.0)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--seed", type=int, default=42)
    return p.parse_args()


class Meter:
    def __init__(self):
        self.sum, self.n = 0.0, 0

    def update(self, value, n):
        self.sum += value * n
        self.n += n

    def sync(self):
        t = torch.tensor([self.sum, self.n], dtype=torch.float64)
        dist.all_reduce(t)
        self.sum, self.n = t.tolist()

    @property
    def avg(self):
        return self.sum / max(1, self.n)


def main():
    args = parse()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    x = torch.randn(180, 4, 4)
    full = TensorDataset(x, (x.sum((1, 2)) > 0).long())
    train, val = random_split(full, [150, 30], generator=torch.Generator().manual_seed(args.seed))
    path = os.path.join(tempfile.gettempdir(), f"teacher-{os.environ['MASTER_PORT']}.pt")
    if rank == 0:
        torch.save(mlp(32).state_dict(), path)
    dist.barrier()
    teacher = mlp(32)
    teacher.load_state_dict(torch.load(path))
    teacher.eval()
    for p in teacher.parameters():
        p.requires_grad = False
    dist.barrier()
    if rank == 0:
        os.unlink(path)
    student = DDP(mlp(8))
    torch.manual_seed(args.seed + rank)
    ts = DistributedSampler(train, seed=args.seed)
    tl = DataLoader(train, batch_size=10, sampler=ts)
    vs = DistributedSampler(val, shuffle=False)
    vl = DataLoader(val, batch_size=5, sampler=vs)
    opt = torch.optim.Adam(student.parameters(), lr=1e-3)
    sched = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for ep in range(args.epochs):
        ts.set_epoch(ep)
        student.train()
        tm = Meter()
        for xb, yb in tl:
            with torch.no_grad():
                soft = teacher(xb)
            out = student(xb)
            kd = (
                F.kl_div(F.log_softmax(out / args.T, 1), F.softmax(soft / args.T, 1), reduction="batchmean") * args.T**2
            )
            loss = args.alpha * kd + (1 - args.alpha) * F.cross_entropy(out, yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
            tm.update(loss.item(), len(xb))
        sched.step()
        student.eval()
        vm = Meter()
        with torch.no_grad():
            for xb, yb in vl:
                vm.update((student(xb).argmax(1) == yb).float().mean().item(), len(xb))
        tm.sync()
        vm.sync()
        if rank == 0:
            print(f"{ep}: train {tm.avg:.3f} val {vm.avg:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
