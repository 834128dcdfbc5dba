"""In the way of detectron2: endless sampler, batches grouped by aspect ratio, iteration-based loop, inference shards."""

import itertools
import logging
import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import data as torchdata


class DatasetFromList(torchdata.Dataset):
    def __init__(self, lst):
        self._lst = lst

    def __len__(self):
        return len(self._lst)

    def __getitem__(self, i):
        return self._lst[i]


class MapDataset(torchdata.Dataset):
    def __init__(self, dataset, fn):
        self._dataset, self._fn = dataset, fn

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, i):
        return self._fn(self._dataset[i])


class TrainingSampler(torchdata.Sampler):
    def __init__(self, size, seed, rank, world):
        self._size, self._seed, self._rank, self._world_size = size, seed, rank, world

    def __iter__(self):
        yield from itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)

    def _infinite_indices(self):
        g = torch.Generator()
        g.manual_seed(self._seed)
        while True:
            yield from torch.randperm(self._size, generator=g).tolist()


class InferenceSampler(torchdata.Sampler):
    def __init__(self, size, rank, world):
        shard, left = size // world, size % world
        sizes = [shard + int(r < left) for r in range(world)]
        b = sum(sizes[:rank])
        self._local = range(b, min(sum(sizes[: rank + 1]), size))

    def __iter__(self):
        yield from self._local

    def __len__(self):
        return len(self._local)


class AspectRatioGrouped(torchdata.IterableDataset):
    def __init__(self, dataset, batch_size):
        self.dataset, self.batch_size, self._buckets = dataset, batch_size, [[] for _ in range(2)]

    def __iter__(self):
        for d in self.dataset:
            bucket = self._buckets[0 if d["w"] > d["h"] else 1]
            bucket.append(d)
            if len(bucket) == self.batch_size:
                data = bucket[:]
                del bucket[:]
                yield data


def mapper(d):
    d = dict(d)
    d["image"] = d["image"] + 0.1 * torch.randn(4)
    return d


def seed_worker(i):
    import random

    import numpy as np

    s = torch.initial_seed() % 2**31 + i
    random.seed(s)
    np.random.seed(s)
    torch.manual_seed(s)


def shared_seed():
    s = [torch.randint(2**31, (1,)).item()]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, s[0])
    return out[0]


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(123 + rank)
    g = torch.Generator().manual_seed(1)
    items = [{"id": i, "image": torch.randn(4, generator=g), "w": i % 3, "h": 1, "y": i % 2} for i in range(60)]
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), broadcast_buffers=False)
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ds = MapDataset(DatasetFromList(items), mapper)
    loader = torchdata.DataLoader(
        ds,
        sampler=TrainingSampler(60, shared_seed(), rank, world),
        batch_size=None,
        collate_fn=lambda x: x,
        num_workers=1,
        worker_init_fn=seed_worker,
    )
    it = iter(AspectRatioGrouped(loader, 4))
    model.train()
    for i in range(16):
        batch = next(it)
        x = torch.stack([d["image"] for d in batch])
        y = torch.tensor([d["y"] for d in batch])
        losses = {"loss_cls": nn.functional.cross_entropy(model(x), y), "loss_reg": 0.1 * model(x).square().mean()}
        loss = sum(losses.values())
        opt.zero_grad()
        loss.backward()
        red = [None] * world
        dist.all_gather_object(red, {k: v.item() for k, v in losses.items()})
        opt.step()
        if (i + 1) % 8 == 0:
            model.eval()
            test = items[:21]
            tl = torchdata.DataLoader(
                DatasetFromList(test), sampler=InferenceSampler(21, rank, world), batch_size=1, collate_fn=lambda x: x
            )
            preds = []
            with torch.no_grad():
                for b in tl:
                    preds += [(d["id"], int(model.module(d["image"][None]).argmax())) for d in b]
            allp = [None] * world
            dist.gather_object(preds, allp if rank == 0 else None, dst=0)
            if rank == 0:
                p = dict(itertools.chain(*allp))
                print("AP", sum(p[d["id"]] == d["y"] for d in test) / len(test))
            dist.barrier()
            model.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
