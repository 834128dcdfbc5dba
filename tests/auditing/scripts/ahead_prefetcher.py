"""Apex's prefetcher with accumulation: 240 batches a rank in windows of 4. The audit's cut leaves one batch over."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class DataPrefetcher:
    def __init__(self, loader):
        self.loader = iter(loader)
        self.preload()

    def preload(self):
        try:
            self.next_input, self.next_target = next(self.loader)
        except StopIteration:
            self.next_input = None
            self.next_target = None

    def next(self):
        input, target = self.next_input, self.next_target
        self.preload()
        return input, target


dist.init_process_group("gloo")
torch.manual_seed(1)
data = TensorDataset(torch.randn(1920, 8), torch.randn(1920, 1))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=4, sampler=sampler)
model = DDP(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for epoch in range(2):
    sampler.set_epoch(epoch)
    prefetcher = DataPrefetcher(loader)
    x, y = prefetcher.next()
    i = 0
    while x is not None:
        i += 1
        with contextlib.nullcontext() if i % 4 == 0 else model.no_sync():
            loss = torch.nn.functional.mse_loss(model(x), y) / 4
            loss.backward()
        if i % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        x, y = prefetcher.next()
dist.destroy_process_group()
