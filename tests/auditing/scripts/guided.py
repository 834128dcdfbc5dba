"""guided-diffusion: shards of the file list by rank, endless loader, micro-batches under no_sync, EMA lists, broadcast."""

import copy
import functools
import random

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


class ImageDataset(torch.utils.data.Dataset):
    def __init__(self, paths, shard=0, num_shards=1):
        self.local_images = paths[shard:][::num_shards]

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, i):
        arr = np.random.RandomState(self.local_images[i]).rand(6).astype("float32")
        if random.random() < 0.5:
            arr = arr[::-1].copy()
        return arr, {"y": self.local_images[i] % 3}


def load_data(rank, world, batch_size):
    loader = torch.utils.data.DataLoader(
        ImageDataset(list(range(90)), rank, world), batch_size=batch_size, shuffle=True, num_workers=1, drop_last=True
    )
    while True:
        yield from loader


class TrainLoop:
    def __init__(self, model, data, batch, micro):
        self.model, self.data, self.batch, self.micro = model, data, batch, micro
        with torch.no_grad():
            for p in model.parameters():
                dist.broadcast(p, 0)
        self.opt = torch.optim.AdamW(model.parameters(), 1e-3)
        self.ema = [copy.deepcopy(p) for p in model.parameters()]
        self.ddp = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, bucket_cap_mb=128, find_unused_parameters=False
        )

    def run(self):
        for step in range(12):
            batch, cond = next(self.data)
            self.forward_backward(batch, cond)
            self.opt.step()
            for t, s in zip(self.ema, self.model.parameters()):
                t.detach().mul_(0.99).add_(s, alpha=0.01)

    def forward_backward(self, batch, cond):
        self.opt.zero_grad()
        for i in range(0, len(batch), self.micro):
            micro = batch[i : i + self.micro]
            last = (i + self.micro) >= len(batch)
            t = torch.randint(0, 10, (len(micro),))
            noise = torch.randn_like(micro)
            w = torch.ones(len(micro))
            f = functools.partial(self.losses, micro, t, noise)
            if last:
                l = f()
            else:
                with self.ddp.no_sync():
                    l = f()
            (l * w).mean().backward()

    def losses(self, x, t, noise):
        return (self.ddp(x + noise * t[:, None] / 10) - noise).square().mean(1)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 6))
    TrainLoop(model, load_data(rank, world, 4), 4, 4).run()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
