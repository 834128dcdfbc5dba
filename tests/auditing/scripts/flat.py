"""Data parallel by hand: flat gradients with _flatten_dense_tensors, broadcast of state at the start, memmap tokens."""

import argparse
import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class CharRNN(nn.Module):
    def __init__(self, vocab, d):
        super().__init__()
        self.e, self.r, self.o = nn.Embedding(vocab, d), nn.RNN(d, d, batch_first=True), nn.Linear(d, vocab)

    def forward(self, x):
        return self.o(self.r(self.e(x))[0])


class Averager:
    def __init__(self, module):
        self.module = module
        for t in module.state_dict().values():
            dist.broadcast(t, 0)

    def reduce_gradients(self):
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = _flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        for g, s in zip(grads, _unflatten_dense_tensors(flat, grads)):
            g.copy_(s)


def get_batch(data, block, batch, rng):
    ix = rng.integers(0, len(data) - block - 1, size=batch)
    x = torch.stack([torch.from_numpy(data[i : i + block].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block].astype(np.int64)) for i in ix])
    return x, y


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--iters", type=int, default=12)
    ap.add_argument("--accum", type=int, default=2)
    ap.add_argument("--clip", type=float, default=0.5)
    a = ap.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    path = os.path.join(tempfile.gettempdir(), f"tokens-{os.environ['MASTER_PORT']}.bin")
    if rank == 0:
        np.random.default_rng(0).integers(0, 30, size=4000).astype(np.uint16).tofile(path)
    dist.barrier()
    data = np.memmap(path, dtype=np.uint16, mode="r")
    model = CharRNN(30, 16)
    averager = Averager(model)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(100 + rank)
    for it in range(a.iters):
        opt.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(a.accum):
            x, y = get_batch(data, 16, 4, rng)
            loss = nn.functional.cross_entropy(model(x).view(-1, 30), y.view(-1)) / a.accum
            loss.backward()
            total += loss.item()
        averager.reduce_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        opt.step()
        if it % 4 == 0:
            t = torch.tensor(total)
            dist.all_reduce(t, op=dist.ReduceOp.SUM)
            if rank == 0:
                print(f"iter {it}: {t.item() / world:.3f}")
    dist.barrier()
    if rank == 0:
        os.remove(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
