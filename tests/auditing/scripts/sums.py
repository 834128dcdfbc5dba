"""Evaluation by sums over len(dataset), unequal shards; per-sample losses gathered; conditional branch with unused
parameters; gradient checkpointing; fp16 compression hook; GradScaler on the CPU."""

import os

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x, deep):
        h = torch.relu(self.a(x))
        h = h + (checkpoint(self.b, h, use_reentrant=False) if deep else self.c(h))
        return self.head(h)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(141, 8, generator=g)
    y = torch.randint(0, 3, (141,), generator=g)
    data = TensorDataset(x, y)
    train, test = Subset(data, range(0, 112)), Subset(data, range(112, 141))
    torch.manual_seed(1)
    net = Net()
    model = DDP(net, find_unused_parameters=True)
    model.register_comm_hook(
        None, default_hooks.bf16_compress_hook if dist.get_backend() == "nccl" else default_hooks.allreduce_hook
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    sampler = DistributedSampler(train, shuffle=True, drop_last=True)
    loader = DataLoader(train, batch_size=8, sampler=sampler)
    mine = list(range(rank, len(test), world))
    held = DataLoader(Subset(test, mine), batch_size=4)
    opt = torch.optim.SGD(model.parameters(), 0.05)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        model.train()
        for i, (xb, yb) in enumerate(loader):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(xb, i % 2 == 0), yb)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(opt)
            scaler.update()
        model.eval()
        hits, nll = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for xb, yb in held:
                out = model.module(xb, True)
                hits += (out.argmax(1) == yb).sum()
                nll += nn.functional.cross_entropy(out, yb, reduction="sum")
        dist.all_reduce(hits)
        dist.all_reduce(nll)
        if rank == 0:
            print(f"{epoch} acc {hits.item() / len(test):.3f} nll {nll.item() / len(test):.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
