"""No DDP and no DataLoader: parameters are broadcast, gradients are summed by hand, batches are drawn at random."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def get_batch(data, generator, size):
    at = torch.randint(len(data) - 9, (size,), generator=generator)
    rows = torch.stack([data[i : i + 9] for i in at])
    return rows[:, :-1], rows[:, 1:]


def average_gradients(model, world):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1337 + rank)
    data = torch.arange(400) * 7 % 11
    model = nn.Sequential(nn.Embedding(11, 16), nn.Dropout(0.1), nn.Linear(16, 11))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    generator = torch.Generator().manual_seed(1337 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(12):
        x, y = get_batch(data, generator, 4)
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, 11), y.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, world)
        optimizer.step()
        if step % 5 == 0 and rank == 0:
            print(f"step {step}: {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
