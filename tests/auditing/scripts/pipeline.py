"""A pipeline of torch.distributed.pipelining: each rank has a stage of the model, and reads the same batches."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


def main():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(7)
    blocks = [Block(8) for _ in range(world)]
    module = blocks[rank]
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    loader = DataLoader(TensorDataset(x, x.flip(1)), batch_size=16, shuffle=True, generator=generator)
    held_out = DataLoader(TensorDataset(x[:32]), batch_size=16)
    for epoch in range(3):
        module.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            losses = []
            if rank == 0:
                schedule.step(inputs)
            elif rank == world - 1:
                schedule.step(target=targets, losses=losses)
            else:
                schedule.step()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            for (inputs,) in held_out:
                width = module(inputs).shape[1]
        if rank == world - 1:
            print(f"{epoch}: {sum(losses).item() / len(losses):.4f}, {width}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
