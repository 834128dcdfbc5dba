"""Folds, a new model and sampler each; WeightedRandomSampler wrapped for ranks; torchmetrics; a logger class."""

import logging
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy


class DistributedSamplerWrapper(DistributedSampler):
    """Catalyst's wrapper: shares out another sampler's draws."""

    def __init__(self, sampler, **kw):
        self.inner = sampler
        self.items = list(sampler)
        super().__init__(self.items, **kw)

    def __iter__(self):
        torch.manual_seed(self.epoch)
        self.items = list(self.inner)
        return iter([self.items[i] for i in super().__iter__()])


def folds(n, k):
    idx = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(k):
        test = idx[i::k]
        yield [j for j in idx if j not in set(test)], test


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    log = logging.getLogger("kfold")
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.addHandler(logging.StreamHandler())
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=g)
    y = (x[:, 0] > 0.5).long()
    data = TensorDataset(x, y)
    for f, (tr, te) in enumerate(folds(len(data), 2)):
        torch.manual_seed(f)
        model = DDP(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        train = Subset(data, tr)
        w = torch.tensor([3.0 if data[i][1] else 1.0 for i in tr])
        sampler = DistributedSamplerWrapper(
            WeightedRandomSampler(w, len(tr), generator=None), num_replicas=world, rank=rank, shuffle=False
        )
        loader = DataLoader(train, batch_size=10, sampler=sampler)
        test = DataLoader(Subset(data, te), batch_size=10, sampler=range(rank, len(te), world))
        metric = MulticlassAccuracy(num_classes=2)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            model.train()
            for xb, yb in loader:
                opt.zero_grad()
                nn.functional.cross_entropy(model(xb), yb).backward()
                opt.step()
            model.eval()
            metric.reset()
            with torch.no_grad():
                for xb, yb in test:
                    metric.update(model.module(xb), yb)
            acc = metric.compute()
            log.info("fold %d epoch %d acc %.3f", f, epoch, acc)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
