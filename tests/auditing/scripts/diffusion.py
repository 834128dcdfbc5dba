"""A diffusion model on HF-style streams: StatefulDataLoader, EMA by torch's AveragedModel, noise in the loop, MLP."""

import os

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader


class Points(Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + 1

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(50, 16)
        self.net = nn.Sequential(nn.Linear(18, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x, self.time(t)], 1))


class Diffusion:
    def __init__(self, steps=50):
        self.alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps), 0)

    def loss(self, model, x):
        t = torch.randint(0, len(self.alpha), (len(x),))
        noise = torch.randn_like(x)
        a = self.alpha[t][:, None]
        return nn.functional.mse_loss(model(a.sqrt() * x + (1 - a).sqrt() * noise, t), noise)


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(Denoiser())
    torch.manual_seed(rank)
    ema = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    diffusion = Diffusion()
    data = Points(96)
    sampler = DistributedSampler(data, shuffle=True)
    loader = StatefulDataLoader(data, batch_size=8, sampler=sampler, num_workers=1)
    optim = torch.optim.AdamW(model.parameters(), 1e-3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x in loader:
            loss = diffusion.loss(model, x)
            optim.zero_grad()
            loss.backward()
            optim.step()
            ema.update_parameters(model.module)
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        if rank == 0:
            print("epoch", epoch, (mean / dist.get_world_size()).item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
