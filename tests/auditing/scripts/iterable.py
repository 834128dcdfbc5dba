"""An IterableDataset shared out by rank and worker, a shuffle buffer, LM, fixed number of steps."""

import os
import random
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


class TextStream(IterableDataset):
    def __init__(self, docs, block, rank, world, seed):
        self.docs, self.block, self.rank, self.world, self.seed = docs, block, rank, world, seed
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        wid, nw = (info.id, info.num_workers) if info else (0, 1)
        shard = self.rank * nw + wid
        shards = self.world * nw
        rng = random.Random(self.seed + self.epoch)
        order = list(range(self.docs))
        rng.shuffle(order)
        buf = []
        for n, doc in enumerate(order):
            if n % shards != shard:
                continue
            g = torch.Generator().manual_seed(doc)
            buf.append(torch.randint(0, 32, (self.block + 1,), generator=g))
            if len(buf) >= 4:
                yield buf.pop(rng.randrange(len(buf)))
        yield from buf


class TinyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(32, 16)
        self.l = nn.LSTM(16, 16, batch_first=True)
        self.o = nn.Linear(16, 32)

    def forward(self, x):
        return self.o(self.l(self.e(x))[0])


def run():
    dist.init_process_group(backend="gloo", init_method="env://")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    ds = TextStream(96, 12, rank, world, 17)
    dl = DataLoader(ds, batch_size=4, num_workers=2)
    model = DDP(TinyLM())
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    step = 0
    for epoch in range(2):
        ds.set_epoch(epoch)
        for block in dl:
            x, y = block[:, :-1], block[:, 1:]
            logits = model(x)
            loss = nn.functional.cross_entropy(logits.reshape(-1, 32), y.reshape(-1))
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            if step % 5 == 0 and rank == 0:
                sys.stdout.write(f"step {step} loss {loss.item():.3f}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    run()
