"""A WGAN with a gradient penalty: several critic steps a generator step, with gradients averaged by hand."""

import torch
import torch.distributed as dist
from torch import autograd, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

N_CRITIC = 3


def penalty(critic, real, fake):
    alpha = torch.rand(len(real), 1)
    mixed = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (gradient,) = autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def average(module):
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    generator = DDP(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)))
    critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(96, 4, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(10 + rank)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, 8, sampler=sampler, drop_last=True)
    g_optimizer = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
    c_optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for i, (real,) in enumerate(loader):
            c_optimizer.zero_grad()
            with torch.no_grad():
                fake = generator(torch.randn(len(real), 3))
            loss = critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, real, fake)
            loss.backward()
            average(critic)
            c_optimizer.step()
            if (i + 1) % N_CRITIC == 0:
                g_optimizer.zero_grad()
                loss = -critic(generator(torch.randn(len(real), 3))).mean()
                loss.backward()
                g_optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
