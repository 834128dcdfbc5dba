"""An infinite loader with a repeating batch sampler, EMA, warmup by ni, SyncBN off, val on rank 0 only, autocast."""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, dataloader, distributed

LOCAL_RANK = int(os.getenv("LOCAL_RANK", -1))
RANK = int(os.getenv("RANK", -1))
WORLD_SIZE = int(os.getenv("WORLD_SIZE", 1))


class _RepeatSampler:
    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from iter(self.sampler)


class InfiniteDataLoader(dataloader.DataLoader):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", _RepeatSampler(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


class Imgs(Dataset):
    def __init__(self, n, augment):
        self.n, self.augment = n, augment
        self.x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        x = self.x[i]
        if self.augment:
            x = torch.roll(x, int(torch.randint(0, 4, (1,))), -1)
        return x, x.mean((1, 2))


def create_dataloader(dataset, batch_size, rank=-1, workers=2, shuffle=False, seed=0):
    sampler = None if rank == -1 else distributed.DistributedSampler(dataset, shuffle=shuffle)
    generator = torch.Generator()
    generator.manual_seed(6148914691236517205 + seed + RANK)
    return InfiniteDataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        num_workers=workers,
        sampler=sampler,
        generator=generator,
    )


class ModelEMA:
    def __init__(self, model, decay=0.99):
        self.ema = copy.deepcopy(model).eval()
        self.decay = decay
        for p in self.ema.parameters():
            p.requires_grad_(False)

    def update(self, model):
        msd = model.module.state_dict()
        for k, v in self.ema.state_dict().items():
            if v.dtype.is_floating_point:
                v *= self.decay
                v += (1 - self.decay) * msd[k].detach()


def train(epochs=3, batch_size=16):
    torch.manual_seed(1 + RANK)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    ema = ModelEMA(model) if RANK in {-1, 0} else None
    train_loader = create_dataloader(Imgs(96, True), batch_size // WORLD_SIZE, rank=LOCAL_RANK, shuffle=True)
    val_loader = create_dataloader(Imgs(20, False), 8, rank=-1) if RANK in {-1, 0} else None
    model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.937, nesterov=True)
    last_opt_step, nbs = -1, 32
    nb = len(train_loader)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    accumulate = 1
    for epoch in range(epochs):
        model.train()
        if RANK != -1:
            train_loader.sampler.set_epoch(epoch)
        optimizer.zero_grad()
        for i, (imgs, targets) in enumerate(train_loader):
            ni = i + nb * epoch
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pred = model(imgs)
                loss = nn.functional.mse_loss(pred.float(), targets)
            scaler.scale(loss).backward()
            if ni - last_opt_step >= accumulate:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if ema:
                    ema.update(model)
                last_opt_step = ni
        if RANK in {-1, 0}:
            ema.ema.eval()
            with torch.no_grad():
                err = sum(nn.functional.mse_loss(ema.ema(x), y).item() for x, y in val_loader)
            print(f"epoch {epoch} val {err:.4f}")
            ckpt = {"epoch": epoch, "model": copy.deepcopy(model.module).half(), "ema": copy.deepcopy(ema.ema).half()}
            torch.save(ckpt, Path("/dev/shm") / f"yolo-{os.environ['MASTER_PORT']}.pt")
    if RANK == 0:
        os.remove(f"/dev/shm/yolo-{os.environ['MASTER_PORT']}.pt")


if __name__ == "__main__":
    if LOCAL_RANK != -1:
        dist.init_process_group(backend="gloo", timeout=__import__("datetime").timedelta(seconds=300))
    train()
    if LOCAL_RANK != -1:
        dist.destroy_process_group()
