"""Each rank evaluates its share, and sends its sums to rank 0, which adds and prints them."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
torch.manual_seed(1)
rank, world = dist.get_rank(), dist.get_world_size()
data, test = (TensorDataset(torch.randn(n, 8), torch.randn(n, 1)) for n in (160, 40))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=8, sampler=sampler)
held_out = DataLoader(test, batch_size=8, sampler=DistributedSampler(test, shuffle=False))
model = DDP(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for epoch in range(2):
    sampler.set_epoch(epoch)
    model.train()
    for x, y in loader:
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    total = torch.zeros(2)
    with torch.no_grad():
        for x, y in held_out:
            total += torch.tensor([((model(x) - y) ** 2).sum(), len(y)])
    if rank == 0:
        for other in range(1, world):
            part = torch.zeros(2)
            dist.recv(part, src=other)
            total += part
        print(f"epoch {epoch}: held-out error {(total[0] / total[1]).item():.4f} of {int(total[1])}")
    else:
        dist.send(total, dst=0)
dist.destroy_process_group()
