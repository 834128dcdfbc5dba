"""DCGAN with two DDP models, noise of each rank, fixed noise, images saved by rank 0."""

import os
import random
import tempfile

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

nz, ngf, ndf, nc = 8, 4, 4, 1


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        torch.nn.init.normal_(m.weight, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        torch.nn.init.normal_(m.weight, 1.0, 0.02)
        torch.nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(ndf, 1, 4, 1, 0, bias=False)
        )

    def forward(self, input):
        return self.main(input).view(-1)


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seed = 999
    random.seed(seed)
    torch.manual_seed(seed)
    images = torch.randn(128, nc, 8, 8)
    netG = Generator()
    netG.apply(weights_init)
    netD = Discriminator()
    netD.apply(weights_init)
    netG = DDP(netG)
    netD = DDP(netD)
    torch.manual_seed(seed + 1 + rank)
    dataset = TensorDataset(images)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler, num_workers=0)
    criterion = nn.BCEWithLogitsLoss()
    fixed_noise = torch.randn(16, nz, 1, 1, generator=torch.Generator().manual_seed(0))
    optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    out = os.path.join(tempfile.gettempdir(), f"gan-{os.environ['MASTER_PORT']}.pt")
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, (real,) in enumerate(loader):
            netD.zero_grad()
            b = real.size(0)
            label = torch.full((b,), 1.0)
            errD_real = criterion(netD(real), label)
            errD_real.backward()
            noise = torch.randn(b, nz, 1, 1)
            fake = netG(noise)
            label.fill_(0.0)
            errD_fake = criterion(netD(fake.detach()), label)
            errD_fake.backward()
            optimizerD.step()
            netG.zero_grad()
            label.fill_(1.0)
            errG = criterion(netD(fake), label)
            errG.backward()
            optimizerG.step()
            if rank == 0 and i % 4 == 0:
                print(
                    "[%d/2][%d/%d] Loss_D: %.4f Loss_G: %.4f"
                    % (epoch, i, len(loader), errD_real.item() + errD_fake.item(), errG.item())
                )
        if rank == 0:
            netG.module.eval()
            with torch.no_grad():
                torch.save(netG.module(fixed_noise), out)
            netG.module.train()
    if rank == 0:
        os.remove(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
