"""One DDP holds a generator and a discriminator: each backward leaves one of them out, so the search is needed."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x, step):
        z = torch.randn(len(x), 4)
        if step == "generator":
            self.discriminator.requires_grad_(False)
            loss = nn.functional.softplus(-self.discriminator(self.generator(z))).mean()
            self.discriminator.requires_grad_(True)
            return loss
        fake = self.discriminator(self.generator(z).detach())
        return nn.functional.softplus(-self.discriminator(x)).mean() + nn.functional.softplus(fake).mean()


dist.init_process_group("gloo")
torch.manual_seed(10 + dist.get_rank())
data = TensorDataset(torch.linspace(0, 1, 8 * 96).view(96, 8))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=8, sampler=sampler)
model = DDP(GAN(), find_unused_parameters=True)
first = torch.optim.Adam(model.module.generator.parameters(), lr=1e-3)
second = torch.optim.Adam(model.module.discriminator.parameters(), lr=1e-3)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for (x,) in loader:
        for name, optimizer in (("generator", first), ("discriminator", second)):
            optimizer.zero_grad()
            model(x, name).backward()
            optimizer.step()
dist.destroy_process_group()
