"""A trainer class with accumulation under no_sync, a short last window, workers, augmentation, AdamW and a clip."""

import argparse
import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Noisy(Dataset):
    """Draws its augmentation from the worker's random stream."""

    def __init__(self, count):
        self.x = torch.linspace(-1, 1, count * 4).reshape(count, 4)
        self.y = self.x.sum(1, keepdim=True)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.01 * torch.randn(4), self.y[index]


class Trainer:
    def __init__(self, model, options):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.options = options
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        data = Noisy(options.samples)
        self.sampler = DistributedSampler(data, shuffle=True, seed=3)
        self.loader = DataLoader(
            data,
            batch_size=options.batch,
            sampler=self.sampler,
            num_workers=options.workers,
            generator=torch.Generator().manual_seed(100 + self.rank),
        )
        self.loss = nn.MSELoss()

    def windows(self):
        window = []
        for batch in self.loader:
            window.append(batch)
            if len(window) == self.options.accumulate:
                yield window
                window = []
        if window:
            yield window

    def run_step(self, window):
        for i, (x, y) in enumerate(window):
            last = i == len(window) - 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                loss = self.loss(self.model(x), y) / len(window)
                loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.detach()

    def fit(self):
        for epoch in range(self.options.epochs):
            self.sampler.set_epoch(epoch)
            losses = [self.run_step(window) for window in self.windows()]
            mean = torch.stack(losses).mean()
            dist.all_reduce(mean)
            if self.rank == 0:
                print(f"loss {mean.item() / self.world:.4f}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    Trainer(model, options).fit()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
