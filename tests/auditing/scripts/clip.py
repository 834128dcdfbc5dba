"""open_clip: gathered features with gradient, a learnt scale that is clamped, a local loss."""

import math

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn


def gather(x):
    return torch.cat(torch.distributed.nn.all_gather(x), 0)


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.s = nn.Linear(6, 8), nn.Linear(5, 8), nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, x, y):
        return nn.functional.normalize(self.a(x), dim=-1), nn.functional.normalize(self.b(y), dim=-1), self.s.exp()


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(3)
    ds = torch.utils.data.TensorDataset(torch.randn(96, 6, generator=g), torch.randn(96, 5, generator=g))
    sampler = torch.utils.data.DistributedSampler(ds)
    loader = torch.utils.data.DataLoader(ds, 8, sampler=sampler, drop_last=True)
    model = nn.parallel.DistributedDataParallel(Clip())
    scaler = None
    excl = [p for n, p in model.named_parameters() if p.ndim < 2]
    rest = [p for n, p in model.named_parameters() if p.ndim >= 2]
    opt = torch.optim.AdamW([{"params": excl, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}], 1e-3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, (x, y) in enumerate(loader):
            for grp in opt.param_groups:
                grp["lr"] = 1e-3 * (i + 1) / 10
            opt.zero_grad()
            f, t, s = model(x, y)
            af, at = gather(f), gather(t)
            li, lt = s * f @ at.T, s * t @ af.T
            lab = torch.arange(len(x)) + len(x) * rank
            loss = (nn.functional.cross_entropy(li, lab) + nn.functional.cross_entropy(lt, lab)) / 2
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=2.0)
            opt.step()
            with torch.no_grad():
                model.module.s.clamp_(0, math.log(100))
        if rank == 0:
            print(f"Train Epoch {epoch} loss {loss.item():.3f} scale {s.item():.2f}")
        model.eval()
        if rank == 0:
            with torch.no_grad():
                f, t, s = model.module(ds.tensors[0], ds.tensors[1])
                print("R@1", ((f @ t.T).argmax(1) == torch.arange(96)).float().mean())
        model.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
