"""A loop that counts its batches, in the way of Lightning's Trainer: it evaluates after the last one, by their number."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Trainer:
    def __init__(self, model, train, held_out):
        self.model, self.train, self.held_out = model, train, held_out
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

    def fit(self, epochs):
        self.validate(limit=2)  # before the training, to see that it works
        for epoch in range(epochs):
            self.train.sampler.set_epoch(epoch)
            batches, count = iter(self.train), 0
            while count < len(self.train):
                try:
                    (x,) = next(batches)
                except StopIteration:
                    break
                count += 1
                self.optimizer.zero_grad()
                self.model(x).square().mean().backward()
                self.optimizer.step()
                if count == len(self.train):
                    self.validate()
                    self.scheduler.step()

    def validate(self, limit=None):
        total = torch.zeros(2)
        self.model.eval()
        with torch.no_grad():
            for i, (x,) in enumerate(self.held_out):
                if i == limit:
                    break
                total += torch.tensor([self.model(x).square().sum(), len(x)])
        self.model.train()
        dist.all_reduce(total)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    train, test = TensorDataset(x[:48]), TensorDataset(x[48:])
    loader = DataLoader(train, batch_size=4, sampler=DistributedSampler(train))
    torch.manual_seed(rank)
    Trainer(DDP(nn.Linear(4, 1)), loader, DataLoader(test, batch_size=2, sampler=range(rank, 16, world))).fit(2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
