"""A classifier in functions, in the way of tutorials: sampler, DDP, evaluation summed over the ranks, checkpoint."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

EPOCHS = 2


def make_data(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def evaluate(model, loader):
    model.eval()
    total = torch.zeros(2)
    with torch.no_grad():
        for x, y in loader:
            total += torch.tensor([(model(x).argmax(1) == y).sum(), len(y)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    train, test = make_data(1, 64), make_data(2, 30)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    model = DDP(net)
    torch.manual_seed(1000 + rank)
    sampler = DistributedSampler(train, shuffle=True)
    loader = DataLoader(train, batch_size=8, sampler=sampler)
    held_out = DataLoader(test, batch_size=8, sampler=range(rank, len(test), world))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = os.path.join(tempfile.gettempdir(), f"ddparity-corpus-{os.environ['MASTER_PORT']}.pt")
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        accuracy = evaluate(model, held_out)
        if rank == 0:
            print(f"epoch {epoch}: {accuracy:.3f}")
    if rank == 0:
        torch.save(model.module.state_dict(), path)
    dist.barrier()
    torch.load(path)
    dist.barrier()
    if rank == 0:
        os.remove(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
