"""A generator and a discriminator with an optimizer each, in the way of the DCGAN example."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    real_data = TensorDataset(torch.randn(64, 6) + 2)
    generator = DDP(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)))
    discriminator = DDP(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)))
    torch.manual_seed(50 + rank)
    sampler = DistributedSampler(real_data)
    loader = DataLoader(real_data, batch_size=8, sampler=sampler)
    for_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (real,) in loader:
            ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
            noise = torch.randn(len(real), 4)
            fake = generator(noise)
            for_discriminator.zero_grad()
            both = discriminator(torch.cat([real, fake.detach()]))
            loss = criterion(both, torch.cat([ones, zeros]))
            loss.backward()
            for_discriminator.step()
            for_generator.zero_grad()
            for parameter in discriminator.parameters():
                parameter.requires_grad_(False)
            loss = criterion(discriminator.module(fake), ones)
            loss.backward()
            for_generator.step()
            for parameter in discriminator.parameters():
                parameter.requires_grad_(True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
