"""Length buckets: a batch sampler of its own that each rank strides, padded batches, label smoothing, all_gather of ids."""

import math
import os
import random

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, Sampler


class Pairs(Dataset):
    def __init__(self, n, seed):
        r = random.Random(seed)
        self.rows = [[r.randrange(2, 20) for _ in range(r.randrange(3, 12))] for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return i, torch.tensor(self.rows[i])


class BucketBatchSampler(Sampler):
    def __init__(self, lengths, batch_size, rank, world, seed=0):
        self.lengths, self.batch_size, self.rank, self.world, self.seed = lengths, batch_size, rank, world, seed
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        r = random.Random(self.seed + self.epoch)
        order = sorted(range(len(self.lengths)), key=lambda i: (self.lengths[i], r.random()))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        batches = batches[: len(batches) // self.world * self.world]
        groups = [batches[i : i + self.world] for i in range(0, len(batches), self.world)]
        r.shuffle(groups)
        for g in groups:
            yield g[self.rank]

    def __len__(self):
        return math.ceil(len(self.lengths) / self.batch_size) // self.world


def pad(rows):
    ids = torch.tensor([i for i, _ in rows])
    return ids, nn.utils.rnn.pad_sequence([r for _, r in rows], batch_first=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16, padding_idx=0)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 20)

    def forward(self, x):
        return self.out(self.gru(self.emb(x))[0])


class Task:
    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(5)
        self.net = DDP(Model())
        self.train_data, self.valid_data = Pairs(128, 0), Pairs(26, 1)
        self.sampler = BucketBatchSampler([len(r) for r in self.train_data.rows], 8, self.rank, self.world)
        self.train_loader = DataLoader(self.train_data, batch_sampler=self.sampler, collate_fn=pad)
        self.valid_loader = DataLoader(
            self.valid_data, batch_size=4, sampler=range(self.rank, len(self.valid_data), self.world), collate_fn=pad
        )
        self.optim = torch.optim.Adam(self.net.parameters(), 1e-2)

    def loss(self, x, reduction="sum"):
        logits = self.net(x[:, :-1])
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), x[:, 1:].flatten(), ignore_index=0, reduction=reduction
        )

    def fit_one_epoch(self):
        self.net.train()
        for _, x in self.train_loader:
            tokens = (x[:, 1:] != 0).sum()
            dist.all_reduce(tokens)
            loss = self.loss(x) * self.world / tokens
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()

    def validate(self):
        self.net.eval()
        nll, count = torch.zeros(1), torch.zeros(1)
        with torch.no_grad():
            for _, x in self.valid_loader:
                nll += self.loss(x)
                count += (x[:, 1:] != 0).sum()
        for t in (nll, count):
            dist.all_reduce(t)
        return math.exp(nll.item() / count.item())

    def run(self):
        for epoch in range(2):
            self.sampler.set_epoch(epoch)
            self.fit_one_epoch()
            ppl = self.validate()
            if self.rank == 0:
                print(f"epoch {epoch} ppl {ppl:.2f}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        Task().run()
    finally:
        dist.destroy_process_group()
