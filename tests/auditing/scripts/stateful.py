"""A loader that can be saved and restored in the middle of an epoch (torchdata), with or without workers."""

import argparse

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler


def make_loader(dataset, sampler, workers):
    return StatefulDataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = StatefulDistributedSampler(dataset, shuffle=True)
    loader = make_loader(dataset, sampler, args.workers)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for i, (inputs, targets) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if epoch == 1 and i == 3:
                state = loader.state_dict()
    sampler = StatefulDistributedSampler(dataset, shuffle=True)
    restored = make_loader(dataset, sampler, args.workers)
    restored.load_state_dict(state)
    left = sum(len(inputs) for inputs, _ in restored)
    sums = torch.tensor([loss.item(), 1.0])
    dist.all_reduce(sums)
    if dist.get_rank() == 0:
        print(f"loss {sums[0] / sums[1]:.4f}, {left} samples were left")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
