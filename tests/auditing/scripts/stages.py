"""A pipeline by hand: rank 0 sends activations to the next stage, which sends their gradients back."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Stage(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return self.net(x)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5 + rank)
    stage = Stage(8)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    loader = DataLoader(TensorDataset(x, x.flip(1).tanh()), batch_size=8, shuffle=True, generator=generator)
    for epoch in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            if rank > 0:
                x = torch.empty_like(x)
                dist.recv(x, rank - 1)
                x.requires_grad_()
            out = stage(x)
            if rank < world - 1:
                dist.send(out.detach(), rank + 1)
                grad = torch.empty_like(out)
                dist.recv(grad, rank + 1)
                out.backward(grad)
            else:
                loss = F.mse_loss(out, y)
                loss.backward()
            if rank > 0:
                dist.send(x.grad, rank - 1)
            optimizer.step()
        stage.eval()
        if rank == world - 1:
            print(f"{epoch}: {loss.item():.4f}")
        stage.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
