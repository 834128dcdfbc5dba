"""Tensor parallel over all ranks with torch.distributed.tensor: the ranks share each batch by design."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset


class FeedForward(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.w1, self.w2 = nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.w2(torch.nn.functional.silu(self.w1(x)))


def main():
    world = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = FeedForward(8, 16)
    parallelize_module(model, mesh, {"w1": ColwiseParallel(), "w2": RowwiseParallel()})
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    x = torch.randn(64, 8)
    loader = DataLoader(TensorDataset(x), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    for epoch in range(2):
        for (xb,) in loader:
            opt.zero_grad()
            loss = (model(xb) - xb).pow(2).mean()
            loss.backward()
            opt.step()
        if dist.get_rank() == 0:
            print(f"{epoch} {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
