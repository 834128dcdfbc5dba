"""torchvision's references: repeated augmentation, EMA by AveragedModel, reduced evaluation counts, MetricLogger."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Aug(torch.utils.data.Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(8), self.y[i]


class RASampler(torch.utils.data.Sampler):
    def __init__(self, dataset, num_replicas=None, rank=None, shuffle=True, seed=0, repetitions=3):
        self.dataset, self.num_replicas, self.rank, self.epoch = dataset, dist.get_world_size(), dist.get_rank(), 0
        self.num_samples = int(math.ceil(len(dataset) * float(repetitions) / self.num_replicas))
        self.total_size = self.num_samples * self.num_replicas
        self.num_selected_samples = int(math.floor(len(dataset) // 8 * 8 / self.num_replicas))
        self.shuffle, self.seed, self.repetitions = shuffle, seed, repetitions

    def __iter__(self):
        g = torch.Generator().manual_seed(self.seed + self.epoch)
        indices = torch.randperm(len(self.dataset), generator=g).tolist()
        indices = [e for e in indices for i in range(self.repetitions)]
        indices += indices[: (self.total_size - len(indices))]
        indices = indices[self.rank : self.total_size : self.num_replicas]
        return iter(indices[: self.num_selected_samples])

    def __len__(self):
        return self.num_selected_samples

    def set_epoch(self, epoch):
        self.epoch = epoch


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    ds, test = (
        Aug(96),
        TensorDataset(torch.randn(31, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(31).long()),
    )
    sampler = RASampler(ds)
    loader = DataLoader(ds, batch_size=4, sampler=sampler, num_workers=1, generator=torch.Generator().manual_seed(rank))
    val = DataLoader(test, batch_size=8, sampler=list(range(rank, 31, dist.get_world_size())))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    ddp = nn.parallel.DistributedDataParallel(model)
    ema = torch.optim.swa_utils.AveragedModel(ddp.module, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b)
    opt = torch.optim.SGD(ddp.parameters(), 0.1)
    warm = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        ddp.train()
        for i, (x, y) in enumerate(loader):
            loss = nn.functional.cross_entropy(ddp(x), y, label_smoothing=0.1)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            opt.step()
            if i % 4 == 0:
                ema.update_parameters(ddp.module)
        warm.step()
        for m in (ddp, ema):
            m.eval()
            c = torch.zeros(2)
            with torch.inference_mode():
                for x, y in val:
                    c += torch.tensor([(m(x).argmax(1) == y).sum().item(), len(y)])
            dist.barrier()
            dist.all_reduce(c)
            if rank == 0:
                print(f"Acc {c[0] / c[1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
