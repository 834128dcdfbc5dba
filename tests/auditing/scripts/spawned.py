"""Starts its own processes with mp.spawn. A CNN with batch norm, NumPy augmentation, a scaler and a random split."""

import os
import socket

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, DistributedSampler, random_split


class Images(Dataset):
    def __init__(self, count):
        self.images = np.random.RandomState(5).rand(count, 1, 6, 6).astype(np.float32)
        self.labels = (self.images.mean((1, 2, 3)) > 0.5).astype(np.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i]
        if np.random.rand() < 0.5:
            image = image[:, :, ::-1].copy()
        return image, self.labels[i]


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def work(rank, world, port):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(1)
    model = DDP(net())
    np.random.seed(10 + rank)
    torch.manual_seed(10 + rank)
    data = Images(100)
    train, test = random_split(data, [80, 20], generator=torch.Generator().manual_seed(42))
    sampler = DistributedSampler(train)
    loader = DataLoader(train, 10, sampler=sampler, num_workers=0, drop_last=True)
    check = DataLoader(test, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        model.train()
        for image, label in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = criterion(model(image), label)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        model.eval()
        if rank == 0:
            with torch.no_grad():
                right = sum((model.module(image).argmax(1) == label).sum().item() for image, label in check)
            print(f"accuracy {right / len(test):.2f}")
        dist.barrier()
    dist.destroy_process_group()


def main():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port), nprocs=2)


if __name__ == "__main__":
    main()
